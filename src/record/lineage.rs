// SPDX-License-Identifier: Apache-2.0
//! Which epoch the copies are to be read in (rules R1, R5).
//!
//! An epoch counts from the moment more than K/2 copies hold it. A crash in the middle of a raise
//! leaves one that fewer hold and nothing depends on; the next opening, with other copies, may
//! raise to another epoch beside it. Such leftovers are no fork. A fork is two epochs of which
//! neither knows the other and both may have counted.

use super::history::{EpochEntry, History};

/// What a copy tells of its life.
pub(super) struct Life {
    /// That of its newest superblock.
    pub history: History,
    /// Its other slot is torn or damaged: the copy may have been further than it shows.
    pub uncertain: bool,
}

impl Life {
    fn knows(&self, entry: EpochEntry) -> bool {
        self.history.entries().contains(&entry)
    }
}

/// What was decided.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Decision {
    /// The newest epoch that may count, and for each life whether it may hold what was made
    /// durable in it. The pages of those that do are merged.
    Epoch(EpochEntry, Vec<bool>),
    /// Two lives that exclude each other, and from which epoch on.
    Fork(usize, usize, u64),
}

/// Decides for the `lives` that can be read of `copies` copies.
pub(super) fn decide(lives: &[Life], copies: usize) -> Decision {
    let mut counting = counting(lives, copies);
    let absent = copies.saturating_sub(lives.len());
    // An epoch that surely counted leaves no room for others beside it, but for forced ones.
    let sure = counting.iter().filter(|(_, sure)| *sure);
    if let Some(&(sure, _)) = sure.max_by_key(|(entry, _)| entry.epoch) {
        for &(entry, is_sure) in &counting {
            if let Some((one, other)) = conflict(lives, entry, sure).filter(|_| is_sure) {
                return part(lives, one, other);
            }
        }
        counting.retain(|&(entry, _)| conflict(lives, entry, sure).is_none());
    }
    let Some(&(chosen, _)) = counting.iter().max_by_key(|(entry, _)| entry.epoch) else {
        return part(lives, 0, 1);
    };
    let mut holders: Vec<bool> = lives
        .iter()
        .map(|life| life.knows(chosen) || life.uncertain)
        .collect();
    for &(entry, _) in &counting {
        let Some((one, other)) = conflict(lives, entry, chosen) else {
            continue;
        };
        if absent > 0 {
            return part(lives, one, other);
        }
        // Every copy is here and none of the two epochs is on a majority for certain: at most one
        // of them counted. Nothing it made durable is lost if the pages of both are merged.
        for (holder, life) in holders.iter_mut().zip(lives) {
            *holder |= life.knows(entry);
        }
    }
    Decision::Epoch(chosen, holders)
}

/// Epochs that may have counted, and whether they surely did.
fn counting(lives: &[Life], copies: usize) -> Vec<(EpochEntry, bool)> {
    let absent = copies.saturating_sub(lives.len());
    let majority = copies / 2 + 1;
    let mut counting: Vec<(EpochEntry, bool)> = Vec::new();
    for &entry in lives.iter().flat_map(|life| life.history.entries()) {
        if counting.iter().any(|(known, _)| *known == entry) {
            continue;
        }
        let support = lives.iter().filter(|life| life.knows(entry)).count();
        let torn = |life: &&Life| {
            life.uncertain && !life.knows(entry) && life.history.newest().epoch < entry.epoch
        };
        let unknown = absent + lives.iter().filter(torn).count();
        if entry.forced || support + unknown >= majority {
            counting.push((entry, entry.forced || support >= majority));
        }
    }
    counting
}

/// A life that knows the one and not the other, and one the other way round, if the two epochs
/// are not of one line.
fn conflict(lives: &[Life], one: EpochEntry, other: EpochEntry) -> Option<(usize, usize)> {
    let (old, new) = if one.epoch <= other.epoch {
        (one, other)
    } else {
        (other, one)
    };
    if old == new {
        return None;
    }
    let without =
        |life: &Life| life.knows(new) && !life.knows(old) && !life.history.has_forgotten(old.epoch);
    let new_side = lives.iter().position(without)?;
    let old_side = lives.iter().position(|life| life.knows(old))?;
    Some((old_side, new_side))
}

/// The fork between two lives.
fn part(lives: &[Life], one: usize, other: usize) -> Decision {
    let other_entries = lives[other].history.entries();
    let apart = lives[one].history.entries().iter().rev();
    let epoch = apart
        .filter(|entry| !other_entries.contains(entry))
        .map(|entry| entry.epoch)
        .next();
    let newest = lives[one].history.newest().epoch;
    Decision::Fork(one, other, epoch.unwrap_or(newest))
}

#[cfg(test)]
mod tests {
    use super::super::history::EpochId;
    use super::*;

    fn entry(name: &str) -> EpochEntry {
        let (epoch, rest) = name.split_at(name.find(char::is_alphabetic).unwrap());
        let mut id = [0; 16];
        id[0] = rest.as_bytes()[0];
        EpochEntry {
            epoch: epoch.parse().unwrap(),
            id: EpochId(id),
            forced: rest.ends_with('!'),
        }
    }

    /// `"5a 6x ?"`: epochs 5 and 6, the other slot is damaged.
    fn life(text: &str) -> Life {
        let mut words: Vec<&str> = text.split(' ').collect();
        let uncertain = words.last() == Some(&"?");
        words.retain(|word| *word != "?");
        let mut history = History::new(entry(words[0]));
        words[1..].iter().for_each(|word| history.push(entry(word)));
        Life { history, uncertain }
    }

    #[test]
    fn decision_for_every_kind_of_past() {
        // Lives, K, and the epoch with its holders, or none for a fork.
        type Case = (
            &'static [&'static str],
            usize,
            Option<(&'static str, &'static [bool])>,
        );
        let cases: &[Case] = &[
            (&["5a"], 1, Some(("5a", &[true]))),
            (&["5a", "5a", "5a"], 3, Some(("5a", &[true, true, true]))),
            // One was shut out, or absent.
            (
                &["5a 6a", "5a 6a", "5a"],
                3,
                Some(("6a", &[true, true, false])),
            ),
            (&["5a 6a", "5a"], 3, Some(("6a", &[true, false]))),
            // A raise that reached one copy only: all here, so it never counted.
            (&["5a 6x", "5a", "5a"], 3, Some(("5a", &[true, true, true]))),
            // The same, but torn on the others: it may have.
            (
                &["5a 6x", "5a ?", "5a ?"],
                3,
                Some(("6x", &[true, true, true])),
            ),
            // A leftover beside an epoch that counts, also with the larger number.
            (
                &["5a 6x", "5a 6y", "5a 6y"],
                3,
                Some(("6y", &[false, true, true])),
            ),
            (
                &["5a 6x 7x", "5a 6y", "5a 6y"],
                3,
                Some(("6y", &[false, true, true])),
            ),
            // Two leftovers.
            (
                &["5a 6x", "5a 6y", "5a"],
                3,
                Some(("5a", &[true, true, true])),
            ),
            (
                &["5a 6x", "5a 6y", "5a 6z"],
                3,
                Some(("5a", &[true, true, true])),
            ),
            (
                &["5a 6x", "5a 6y", "5a ?"],
                3,
                Some(("6y", &[true, true, true])),
            ),
            // More than half of five have it, so no other epoch beside it counted.
            (
                &["5a 6x", "5a 6y", "5a 6y", "5a 6y"],
                5,
                Some(("6y", &[false, true, true, true])),
            ),
            // The third would tell.
            (&["5a 6x", "5a 6y"], 3, None),
            // Force counts with any number.
            (
                &["5a 6x!", "5a", "5a"],
                3,
                Some(("6x!", &[true, false, false])),
            ),
            (&["5a 6x!", "5a 6y", "5a 6y"], 3, None),
            (
                &["5a 6x! 7x", "5a 6x! 7x", "5a"],
                3,
                Some(("7x", &[true, true, false])),
            ),
            // Nothing in common.
            (&["5a", "5b", "5c"], 3, None),
            (
                &["5a 6x 7x", "5a 6x 7x", "5a 6x 7x", "5a 6x", "5a"],
                5,
                Some(("7x", &[true, true, true, false, false])),
            ),
        ];
        for (texts, copies, expected) in cases {
            let lives: Vec<Life> = texts.iter().map(|text| life(text)).collect();
            let found = decide(&lives, *copies);
            match expected {
                Some((name, holders)) => {
                    let expected = Decision::Epoch(entry(name), holders.to_vec());
                    assert_eq!(found, expected, "{texts:?}");
                }
                None => assert!(matches!(found, Decision::Fork(..)), "{texts:?}: {found:?}"),
            }
        }
    }
}
