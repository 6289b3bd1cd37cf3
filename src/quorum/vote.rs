// SPDX-License-Identifier: Apache-2.0
//! The election of one sector: which ballots are equal, and which group wins (rules V1-V3, Y3).

use crate::units::{REPLICAS_MAX, ReplicaId, ReplicaSet, SECTOR_LEN};

/// What makes a group of equal ballots the winner.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Rule {
    /// At least this many equal ballots. With 2T > N there is at most one such group (rule V2).
    Threshold(usize),
    /// The largest group, if it is the only one of its size and has at least this many ballots
    /// (rule V3).
    LargestUnique {
        /// T.
        least: usize,
    },
    /// At least this many equal ballots, otherwise the largest group, ties to the one with the
    /// first replica: for sectors whose legal content is any of the versions (rules W7, Y3).
    LargestFirst {
        /// T.
        least: usize,
    },
}

/// One replica's ballot for a range: its bytes, a whole number of sectors.
pub type Ballot<'a> = (ReplicaId, &'a [u8]);

/// The ballots of one range, one per replica that answered.
pub struct Ballots<'a> {
    ballots: [Option<Ballot<'a>>; REPLICAS_MAX],
    count: usize,
}

impl<'a> Ballots<'a> {
    /// No ballots yet.
    #[must_use]
    pub fn new() -> Self {
        Self {
            ballots: [None; REPLICAS_MAX],
            count: 0,
        }
    }

    /// Adds the ballot of one replica.
    pub fn add(&mut self, replica: ReplicaId, bytes: &'a [u8]) {
        self.ballots[self.count] = Some((replica, bytes));
        self.count += 1;
    }

    /// The replicas whose equal ballots win sector `index` of the range, or none.
    #[must_use]
    pub fn elect(&self, index: usize, rule: Rule) -> ReplicaSet {
        self.elect_without(index, rule, ReplicaSet::EMPTY)
    }

    /// Like [`Ballots::elect`]; the replicas in `unread` could not be read in this sector and have
    /// no vote there (rule V4).
    #[must_use]
    pub fn elect_without(&self, index: usize, rule: Rule, unread: ReplicaSet) -> ReplicaSet {
        let mut groups = [ReplicaSet::EMPTY; REPLICAS_MAX];
        let mut contents: [&[u8]; REPLICAS_MAX] = [&[]; REPLICAS_MAX];
        let mut group_count = 0;
        for (replica, bytes) in self.ballots[..self.count].iter().flatten() {
            if unread.contains(*replica) {
                continue;
            }
            let sector = &bytes[index * SECTOR_LEN..(index + 1) * SECTOR_LEN];
            let group = contents[..group_count]
                .iter()
                .position(|content| *content == sector);
            let group = group.unwrap_or_else(|| {
                contents[group_count] = sector;
                group_count += 1;
                group_count - 1
            });
            groups[group].insert(*replica);
        }
        choose(&groups[..group_count], rule)
    }
}

impl Default for Ballots<'_> {
    fn default() -> Self {
        Self::new()
    }
}

/// The winning group; groups are in the order of their first replica.
fn choose(groups: &[ReplicaSet], rule: Rule) -> ReplicaSet {
    let largest = groups.iter().map(|group| group.count()).max().unwrap_or(0);
    let mut of_largest = groups.iter().filter(|group| group.count() == largest);
    let first = of_largest.next().copied().unwrap_or(ReplicaSet::EMPTY);
    match rule {
        Rule::Threshold(least) if largest < least => ReplicaSet::EMPTY,
        Rule::LargestUnique { least } if largest < least || of_largest.next().is_some() => {
            ReplicaSet::EMPTY
        }
        Rule::Threshold(_) | Rule::LargestUnique { .. } | Rule::LargestFirst { .. } => first,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The obvious slow oracle: count for each ballot how many are equal to it.
    fn oracle(contents: &[u8], rule: Rule) -> Option<u8> {
        let votes = |c: u8| contents.iter().filter(|&&x| x == c).count();
        let most = contents.iter().map(|&c| votes(c)).max()?;
        let first = contents.iter().copied().find(|&c| votes(c) == most)?;
        let unique = contents.iter().all(|&c| c == first || votes(c) < most);
        match rule {
            Rule::Threshold(t) => (most >= t).then_some(first),
            Rule::LargestUnique { least } => (most >= least && unique).then_some(first),
            Rule::LargestFirst { .. } => Some(first),
        }
    }

    /// All contents of up to five replicas out of five versions, every threshold, every rule.
    #[test]
    fn elect_all_inputs_up_to_five_replicas() {
        let sectors: Vec<Vec<u8>> = (0..5u8).map(|c| vec![c; SECTOR_LEN]).collect();
        let mut cases = 0;
        for n in 0..=5u32 {
            for code in 0..5u32.pow(n) {
                let contents: Vec<u8> = (0..n)
                    .map(|i| u8::try_from(code / 5u32.pow(i) % 5).unwrap())
                    .collect();
                let mut ballots = Ballots::new();
                for (i, &c) in contents.iter().enumerate() {
                    ballots.add(ReplicaId::new(i), &sectors[usize::from(c)]);
                }
                for t in 1..=5 {
                    for rule in [
                        Rule::Threshold(t),
                        Rule::LargestUnique { least: t },
                        Rule::LargestFirst { least: t },
                    ] {
                        // With T <= N/2 the plain threshold can have two winners; it is not used.
                        if matches!(rule, Rule::Threshold(t) if 2 * t <= contents.len()) {
                            continue;
                        }
                        let winner = oracle(&contents, rule);
                        let expected: ReplicaSet = contents
                            .iter()
                            .enumerate()
                            .filter(|(_, c)| Some(**c) == winner)
                            .map(|(i, _)| ReplicaId::new(i))
                            .collect();
                        assert_eq!(ballots.elect(0, rule), expected, "{contents:?} {rule:?}");
                        cases += 1;
                    }
                }
            }
        }
        assert!(cases > 30_000);
    }

    #[test]
    fn elect_looks_at_every_byte_of_the_sector_asked_for() {
        let good = vec![7u8; 3 * SECTOR_LEN];
        for at in [0, 1, SECTOR_LEN - 1] {
            let mut bad = good.clone();
            bad[SECTOR_LEN + at] ^= 1;
            let mut ballots = Ballots::new();
            ballots.add(ReplicaId::new(0), &good);
            ballots.add(ReplicaId::new(1), &bad);
            let rule = Rule::Threshold(2);
            assert_eq!(ballots.elect(0, rule).count(), 2);
            assert_eq!(ballots.elect(1, rule).count(), 0);
            assert_eq!(ballots.elect(2, rule).count(), 2);
        }
    }
}
