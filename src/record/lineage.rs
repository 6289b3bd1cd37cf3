// SPDX-License-Identifier: Apache-2.0
//! Which epoch the copies are to be read in (rules R1, R5).
//!
//! An epoch is begun in two steps: it is written to the copies, and when enough of them have it
//! they are told so ([`EpochEntry::begun`]). Nothing depends on an epoch before enough copies hold
//! the second. So among more than K/2 copies one says of every epoch that matters that it was
//! begun, and one such word is proof that a majority held the epoch. A crash before that leaves an
//! epoch that does not matter; the next opening goes on from an older one and may write another
//! beside it. Its history has everything the copies knew that it saw ([`History::join`]); any epoch
//! that a majority held is among that. A fork is therefore two epochs that were begun, of which the
//! newer one's history does not have the older.

use super::history::{EpochEntry, History};

/// What a copy tells of its life.
pub(super) struct Life {
    /// That of its newest superblock.
    pub history: History,
    /// Its other slot is torn or damaged: the copy may have been further than it shows.
    pub uncertain: bool,
}

/// Whether a copy has what was made durable in the epoch that was chosen.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Holds {
    /// It takes part.
    Yes,
    /// Its damaged slot may have said so, if the epoch has it among its copies.
    Perhaps,
    /// What it says is old.
    No,
}

/// What was decided.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Decision {
    /// The newest epoch that was begun, and for each life whether it holds what was made durable
    /// in it. The pages of those that do are merged.
    Epoch(EpochEntry, Vec<Holds>),
    /// Two lives that exclude each other, and from which epoch on.
    Fork(usize, usize, u64),
}

/// Decides.
///
/// # Panics
/// If there is no life.
pub(super) fn decide(lives: &[Life]) -> Decision {
    let all = || lives.iter().flat_map(|life| life.history.entries());
    let begun = all().filter(|entry| entry.begun);
    let chosen = match begun.max_by_key(|entry| entry.epoch) {
        Some(&chosen) => {
            for &entry in all().filter(|entry| entry.begun) {
                if let Some((one, other)) = conflict(lives, entry, chosen) {
                    return part(lives, one, other);
                }
            }
            chosen
        }
        // No epoch was ever begun, so nothing depends on the choice.
        None => {
            let support = |entry| {
                lives
                    .iter()
                    .filter(|life| life.history.knows(entry))
                    .count()
            };
            let usual = all().max_by_key(|&&entry| (support(entry), entry.epoch));
            *usual.expect("a life has an epoch")
        }
    };
    let holds = |life: &Life| {
        if life.history.knows(chosen) {
            Holds::Yes
        } else if life.uncertain {
            Holds::Perhaps
        } else {
            Holds::No
        }
    };
    Decision::Epoch(chosen, lives.iter().map(holds).collect())
}

/// A life that knows the older of two epochs and one that knows the newer and not the older, if
/// the epochs are not of one line.
fn conflict(lives: &[Life], one: EpochEntry, other: EpochEntry) -> Option<(usize, usize)> {
    if one.is_same(other) {
        return None;
    }
    let (old, new) = if one.epoch <= other.epoch {
        (one, other)
    } else {
        (other, one)
    };
    let without = |life: &Life| {
        life.history.knows(new) && !life.history.knows(old) && !life.history.has_forgotten(old)
    };
    let new_side = lives.iter().position(without)?;
    let old_side = lives.iter().position(|life| life.history.knows(old))?;
    Some((old_side, new_side))
}

/// The fork between two lives.
fn part(lives: &[Life], one: usize, other: usize) -> Decision {
    let apart = lives[one].history.entries().iter().rev();
    let apart = apart.filter(|&&entry| !lives[other].history.knows(entry));
    let epoch = apart.map(|entry| entry.epoch).next();
    let newest = lives[one].history.newest().epoch;
    Decision::Fork(one, other, epoch.unwrap_or(newest))
}

#[cfg(test)]
mod tests {
    use super::super::history::EpochId;
    use super::*;

    /// `"6x"`: epoch 6 of id x; `"6x."`: written but not begun.
    fn entry(text: &str) -> EpochEntry {
        let (epoch, id) = text.split_at(text.find(char::is_alphabetic).unwrap());
        EpochEntry {
            epoch: epoch.parse().unwrap(),
            id: EpochId([id.as_bytes()[0]; 16]),
            forced: false,
            begun: !id.ends_with('.'),
        }
    }

    /// `"5a 6x ?"`: epochs 5 and 6; the other slot is damaged.
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
        // Lives; the epoch, and who holds it: yes, perhaps, no. Or none for a fork.
        type Case = (
            &'static [&'static str],
            Option<(&'static str, &'static str)>,
        );
        let cases: &[Case] = &[
            (&["5a"], Some(("5a", "y"))),
            (&["5a", "5a", "5a"], Some(("5a", "yyy"))),
            // One was shut out, or absent.
            (&["5a 6a", "5a 6a", "5a"], Some(("6a", "yyn"))),
            (&["5a 6a", "5a"], Some(("6a", "yn"))),
            // Begun, though not everybody heard.
            (&["5a 6a", "5a 6a.", "5a ?"], Some(("6a", "yyp"))),
            // A raise that a crash cut short.
            (&["5a 6x.", "5a", "5a"], Some(("5a", "yyy"))),
            (&["5a 6x.", "5a ?", "5a ?"], Some(("5a", "yyy"))),
            // Its leftover beside an epoch that was begun, also with the larger number.
            (&["5a 6x.", "5a 6y", "5a 6y"], Some(("6y", "nyy"))),
            (&["5a 6x.", "5a 6y"], Some(("6y", "ny"))),
            (&["5a 6x. 7x.", "5a 6y", "5a 6y"], Some(("6y", "nyy"))),
            // Leftovers only.
            (&["5a 6x.", "5a 6y.", "5a"], Some(("5a", "yyy"))),
            (&["5a 6x.", "5a 6y.", "5a 6z."], Some(("5a", "yyy"))),
            // A leftover that was taken up again.
            (&["5a 6x. 7x", "5a 6x. 7x", "5a 6y."], Some(("7x", "yyn"))),
            // A new record.
            (&["1a.", "1a.", "1a."], Some(("1a.", "yyy"))),
            (&["1a. 2x.", "1a.", "1a."], Some(("1a.", "yyy"))),
            // Begun, but the next opening met a copy that had not heard: it knows of it.
            (&["5a 6x. 7y", "5a 6x. 7y", "5a 6x"], Some(("7y", "yyn"))),
            // Forks.
            (&["5a 6x", "5a 6y"], None),
            (&["5a 6x", "5a 6y", "5a 6y"], None),
            (&["5a 6x 7x 8x", "5a 6y", "5a 6x"], None),
            (&["5a", "6b"], None),
        ];
        for (texts, expected) in cases {
            let lives: Vec<Life> = texts.iter().map(|text| life(text)).collect();
            let found = decide(&lives);
            match expected {
                Some((name, holders)) => {
                    let holds = holders.chars().map(|holds| match holds {
                        'y' => Holds::Yes,
                        'p' => Holds::Perhaps,
                        _ => Holds::No,
                    });
                    let expected = Decision::Epoch(entry(name), holds.collect());
                    assert_eq!(found, expected, "{texts:?}");
                }
                None => assert!(matches!(found, Decision::Fork(..)), "{texts:?}: {found:?}"),
            }
        }
    }

    #[test]
    fn epoch_before_all_that_is_remembered_is_no_fork() {
        let mut new = History::new(entry("5a"));
        (6..40).for_each(|epoch| new.push(entry(&format!("{epoch}a"))));
        let lives = [
            life("5a"),
            Life {
                history: new,
                uncertain: false,
            },
        ];
        let expected = vec![Holds::No, Holds::Yes];
        assert_eq!(decide(&lives), Decision::Epoch(entry("39a"), expected));
    }
}
