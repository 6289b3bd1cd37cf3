// SPDX-License-Identifier: Apache-2.0
//! The verdict of a settlement: who wins each sector, and what is said of the others.

use super::super::super::event::{BadCause, Report};
use super::super::super::vote::Rule;
use super::{Buffers, Lane, Matter, SECTOR_LEN, SlotId, Turn};

impl Lane {
    /// All ballots that count are in: elect, report, repair.
    pub(super) fn settle_decide<B: Buffers>(&mut self, turn: &mut Turn<'_, B>, slot: SlotId) {
        let policy = &turn.shared.policy;
        let (threshold, majority) = (policy.threshold, policy.majority());
        let settle = self.settle_mut(slot);
        let least = threshold;
        let rule = if majority {
            Rule::Threshold(threshold)
        } else {
            Rule::LargestUnique { least }
        };
        // Any version a sector in U may legally have will do if nobody has T votes.
        settle.winners = settle.elect(turn.buffers, rule, Rule::LargestFirst { least });
        self.settle_assemble(turn, slot);
        self.settle_report(turn, slot);
        let settle = self.settle_mut(slot);
        let voters = settle.good.union(settle.failed);
        // Rule V3: a winner of a minority threshold is written to others only if it has more
        // than half of the current copies.
        let enough = majority
            || settle
                .winners
                .iter()
                .zip(&settle.open)
                .all(|(winner, &open)| open || 2 * winner.count() > voters.count());
        if settle.resolves() || (policy.repair && !policy.blkverify && enough) {
            self.settle_repair(turn, slot, voters);
        } else {
            self.settle_conclude(turn, slot);
        }
    }

    /// Puts the winners of all sectors together in the result buffer.
    fn settle_assemble<B: Buffers>(&mut self, turn: &mut Turn<'_, B>, slot: SlotId) {
        let settle = self.settle_mut(slot);
        let result = settle.result.expect("taken with the ballots");
        let mut sector = [0u8; SECTOR_LEN];
        for (index, winner) in settle.winners.iter().enumerate() {
            let Some(source) = winner.iter().next() else {
                continue;
            };
            let at = index * SECTOR_LEN..(index + 1) * SECTOR_LEN;
            let ballot = turn.buffers.bytes(settle.ballots.of(source));
            sector.copy_from_slice(&ballot[at.clone()]);
            turn.buffers.bytes_mut(result)[at].copy_from_slice(&sector);
        }
    }

    fn settle_report<B: Buffers>(&mut self, turn: &mut Turn<'_, B>, slot: SlotId) {
        let blkverify = turn.shared.policy.blkverify;
        let settle = self.settle_mut(slot);
        let Matter {
            range,
            during,
            explained,
        } = settle.matter;
        let undecided = settle.runs(|index| settle.winners[index].is_empty());
        let differing = settle.runs(|index| {
            let readable = settle.good.minus(settle.unread[index]);
            !settle.winners[index].contains_all(readable)
        });
        for replica in settle.failed.iter() {
            let cause = settle.causes[replica.index()];
            turn.report(Report::Bad {
                replica,
                range,
                cause,
                during,
            });
        }
        let mut unreadable = !settle.failed.is_empty();
        for replica in settle.good.iter() {
            for range in settle.runs(|index| settle.unread[index].contains(replica)) {
                unreadable = true;
                let cause = settle.causes[replica.index()];
                turn.report(Report::Bad {
                    replica,
                    range,
                    cause,
                    during,
                });
            }
            // In U a difference is what was to be expected, and no fault of a replica.
            let wrong = |index: usize| {
                let read = !settle.unread[index].contains(replica);
                read && !settle.open[index] && settle.is_wrong(replica, index)
            };
            for range in settle.runs(wrong) {
                turn.report(Report::Bad {
                    replica,
                    range,
                    cause: BadCause::Differs,
                    during,
                });
            }
        }
        let transient = !explained && differing.is_empty() && !unreadable;
        if blkverify && let Some(&range) = differing.first() {
            turn.report(Report::VerifyFailed { range });
        }
        for range in undecided {
            turn.report(Report::Failure { range, during });
        }
        if transient {
            turn.report(Report::Transient { range });
            self.counters.transient += 1;
        }
    }
}
