// SPDX-License-Identifier: Apache-2.0
//! The verdict of a settlement: who wins each sector, and what is said of the others.

use super::super::super::event::{BadCause, Report};
use super::super::super::mutation::broken;
use super::super::super::shared::CrashTie;
use super::super::super::vote::Rule;
use super::{Buffers, Lane, Matter, ReplicaSet, SECTOR_LEN, SlotId, Turn};

impl Lane {
    /// All ballots that count are in: elect, report, repair.
    pub(super) fn settle_decide<B: Buffers>(&mut self, turn: &mut Turn<'_, B>, slot: SlotId) {
        let shared = turn.shared;
        let policy = &shared.policy;
        let (threshold, majority) = (policy.threshold, policy.majority());
        let extent = shared
            .geometry
            .extent_of(self.settle_mut(slot).matter.range.start());
        let current = shared.membership.current(extent);
        let crash = shared.unresolved.holds_extent(extent);
        let settle = self.settle_mut(slot);
        // Who fell behind, or went, since it answered has no vote any more (rule V1).
        settle.good = settle.good.intersection(current.union(settle.targets));
        let current = current.count();
        // Rule Y5: with fewer than T current copies all of them must agree. Only an extent that is
        // being brought into order is decided like that; a guest's read is not.
        let least = if settle.parent.is_some() {
            threshold.min(current.max(1))
        } else {
            threshold
        };
        let rule = if majority || least < threshold {
            Rule::Threshold(least)
        } else {
            Rule::LargestUnique { least }
        };
        // Any version a sector in U may legally have will do if nobody has T votes; but after a
        // crash not everybody wants that (rules S4, Y3), and a guest's read needs T copies to choose
        // from (rule V6).
        let few = settle.parent.is_none() && current < threshold;
        let tie = shared.crash_tie();
        settle.early = tie == CrashTie::MajorityOnly;
        let open_rule = match tie {
            _ if few => rule,
            CrashTie::Choose => Rule::LargestFirst { least },
            CrashTie::MajorityOnly | CrashTie::Error if crash => rule,
            CrashTie::MajorityOnly | CrashTie::Error => Rule::LargestFirst { least },
        };
        settle.winners = settle.elect(turn.buffers, rule, open_rule);
        self.settle_prefer_trusted(turn, slot, rule);
        self.settle_refuse_lone_winners(slot, least, least < threshold);
        self.settle_assemble(turn, slot);
        self.settle_compare_targets(turn, slot);
        self.settle_report(turn, slot);
        let settle = self.settle_mut(slot);
        let voters = settle.good.union(settle.failed).minus(settle.targets);
        // Rule V3: a winner of a minority threshold is written to others only if it has more
        // than half of the current copies.
        let enough = majority
            || settle
                .winners
                .iter()
                .zip(&settle.open)
                .all(|(winner, &open)| open || 2 * winner.count() > voters.count());
        let may_repair = policy.repair && settle.matter.repair && !policy.blkverify;
        let rewrite = settle.resolves() || (may_repair && enough);
        let voters = if rewrite { voters } else { ReplicaSet::EMPTY };
        settle.to_repair = voters.union(settle.targets.minus(settle.lost));
        if settle.to_repair.is_empty() {
            self.settle_conclude(turn, slot);
        } else {
            self.settle_repair(turn, slot);
        }
    }

    /// Takes back what was elected by too few: with fewer than T current copies all must agree where
    /// nothing is to be chosen (rule Y5), and what is chosen is chosen from at least as many readable
    /// copies as would have been needed to agree.
    fn settle_refuse_lone_winners(&mut self, slot: SlotId, least: usize, unanimous: bool) {
        let settle = self.settle_mut(slot);
        let voters = settle.good.minus(settle.targets);
        for index in 0..settle.winners.len() {
            let readable = voters.minus(settle.unread[index]);
            let dissent = settle.winners[index] != readable;
            let open = settle.open[index];
            if readable.count() < least || unanimous && !open && dissent {
                settle.winners[index] = ReplicaSet::EMPTY;
            }
        }
    }

    /// Where the choice in U fell on replicas that are doubted alone, and others hold a version in
    /// as many copies, the others have it. Says what was chosen (rule Y3).
    fn settle_prefer_trusted<B: Buffers>(
        &mut self,
        turn: &mut Turn<'_, B>,
        slot: SlotId,
        rule: Rule,
    ) {
        let suspects = turn.shared.suspects();
        let first = broken!(turn.shared, FirstReplicaBelieved);
        let settle = self.settle_mut(slot);
        if !settle.resolves() {
            return;
        }
        let certain = settle.elect(turn.buffers, rule, rule);
        let mut chosen = Vec::new();
        for (index, certain) in certain.iter().enumerate() {
            if !settle.open[index] || !certain.is_empty() && !first {
                continue;
            }
            let winner = settle.winners[index];
            let doubted = !winner.is_empty() && suspects.contains_all(winner);
            let readable = settle
                .good
                .minus(settle.targets)
                .minus(settle.unread[index]);
            if first {
                settle.winners[index] = readable.iter().take(1).collect();
            } else if doubted {
                let other = settle.group_without(turn.buffers, index, suspects);
                if other.count() >= winner.count() {
                    settle.winners[index] = other;
                }
            }
            if settle.winners[index] != readable {
                chosen.push(index);
            }
        }
        for range in settle.runs(|index| chosen.contains(&index)) {
            let index = usize::try_from(range.start() - settle.matter.range.start());
            let winner = settle.winners[index.expect("inside a request")];
            if let Some(replica) = winner.iter().next() {
                turn.report(Report::Chosen { range, replica });
            }
        }
    }

    /// Finds out where the targets hold what won already: only the rest is written (rule Y5).
    fn settle_compare_targets<B: Buffers>(&mut self, turn: &mut Turn<'_, B>, slot: SlotId) {
        let settle = self.settle_mut(slot);
        let result = turn
            .buffers
            .bytes(settle.result.expect("taken with the ballots"));
        let comparable = settle.targets.minus(turn.shared.membership.unflushable());
        for replica in comparable.intersection(settle.good).iter() {
            let ballot = turn.buffers.bytes(settle.ballots.of(replica));
            for (index, winner) in settle.winners.iter_mut().enumerate() {
                let at = index * SECTOR_LEN..(index + 1) * SECTOR_LEN;
                let read = !settle.unread[index].contains(replica);
                if read && !winner.is_empty() && ballot[at.clone()] == result[at] {
                    winner.insert(replica);
                }
            }
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
        let waits = settle.early;
        let Matter {
            range,
            during,
            explained,
            reconciled: _,
            repair: _,
            attempts: _,
        } = settle.matter;
        let voters = settle.good.minus(settle.targets);
        // What cannot be chosen yet will be: that is no failure.
        let undecided =
            settle.runs(|index| settle.winners[index].is_empty() && !(waits && settle.open[index]));
        let differing = settle.runs(|index| {
            let readable = voters.minus(settle.unread[index]);
            !settle.winners[index].contains_all(readable)
        });
        for replica in settle.failed.minus(settle.targets).iter() {
            let cause = settle.causes[replica.index()];
            turn.report(Report::Bad {
                replica,
                range,
                cause,
                during,
            });
        }
        let mut unreadable = !settle.failed.minus(settle.targets).is_empty();
        for replica in voters.iter() {
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
