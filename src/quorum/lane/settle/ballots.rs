// SPDX-License-Identifier: Apache-2.0
//! Settlements: what the ballots of a range say, sector by sector, and which runs follow from it.

use super::super::super::Buffers;
use super::super::super::vote::{Ballots, Rule};
use super::Settle;
use crate::units::{ReplicaId, ReplicaSet, SectorRange};

impl Settle {
    /// Elects each sector by `rule`, or by the rule of U where it is in U.
    pub(super) fn elect<B: Buffers>(
        &self,
        buffers: &B,
        rule: Rule,
        open_rule: Rule,
    ) -> Vec<ReplicaSet> {
        let mut ballots = Ballots::new();
        for replica in self.good.minus(self.targets).iter() {
            ballots.add(replica, buffers.bytes(self.ballots.of(replica)));
        }
        let rules = self
            .open
            .iter()
            .map(|&open| if open { open_rule } else { rule });
        rules
            .enumerate()
            .map(|(index, rule)| ballots.elect_without(index, rule, self.unread[index]))
            .collect()
    }

    /// The largest group of equal ballots at `index`, without those of `excluded`.
    pub(super) fn group_without<B: Buffers>(
        &self,
        buffers: &B,
        index: usize,
        excluded: ReplicaSet,
    ) -> ReplicaSet {
        let mut ballots = Ballots::new();
        for replica in self.good.minus(self.targets).iter() {
            ballots.add(replica, buffers.bytes(self.ballots.of(replica)));
        }
        let without = self.unread[index].union(excluded);
        ballots.elect_without(index, Rule::LargestFirst { least: 1 }, without)
    }

    /// Runs of sectors of the range for whose index `wanted` holds.
    pub(super) fn runs(&self, wanted: impl Fn(usize) -> bool) -> Vec<SectorRange> {
        let mut runs = Vec::new();
        let mut start = None;
        let count = self.matter.range.count();
        for index in 0..=count {
            let inside = index < count && wanted(index as usize);
            match (inside, start) {
                (true, None) => start = Some(index),
                (false, Some(first)) => {
                    runs.push(self.sub_range(first, index));
                    start = None;
                }
                _ => {}
            }
        }
        runs
    }

    /// Whether there is a winner at `index` and `replica` holds something else, or nothing
    /// readable.
    pub(super) fn is_wrong(&self, replica: ReplicaId, index: usize) -> bool {
        !self.winners[index].is_empty() && !self.winners[index].contains(replica)
    }

    /// Whether every sector of the block around `index` has a winner: only whole blocks are
    /// rewritten.
    pub(super) fn is_block_decided(&self, index: usize, block_sectors: u32) -> bool {
        let block = block_sectors as usize;
        let first = index - index % block;
        self.winners[first..first + block]
            .iter()
            .all(|winner| !winner.is_empty())
    }

    pub(super) fn sub_range(&self, first: u32, end: u32) -> SectorRange {
        let start = self.matter.range.start() + u64::from(first);
        SectorRange::new(start, end - first).expect("a run is not empty")
    }

    /// The first run of whole blocks from sector `from` of the range on that `replica` holds
    /// wrongly and for which there is a winner, as sectors of the range.
    pub(super) fn next_run(
        &self,
        replica: ReplicaId,
        from: u32,
        block_sectors: u32,
    ) -> Option<(u32, u32)> {
        let count = self.matter.range.count();
        let wrong = |block: u32| {
            let sectors = &self.winners[block as usize..(block + block_sectors) as usize];
            sectors.iter().all(|winner| !winner.is_empty())
                && sectors.iter().any(|winner| !winner.contains(replica))
        };
        let blocks = |from: u32| (from..count).step_by(block_sectors as usize);
        let first = blocks(from).find(|&block| wrong(block))?;
        let end = blocks(first).find(|&block| !wrong(block)).unwrap_or(count);
        Some((first, end))
    }
}
