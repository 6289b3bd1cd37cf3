// SPDX-License-Identifier: Apache-2.0
//! The repair that follows from a verdict: whole blocks that differ are rewritten with the winner's
//! bytes, under the lock of the vote, and read back (rule Y4).

use super::super::super::event::{Action, BehindCause, OperationKind, Outcome, Report};
use super::super::super::mutation::broken;
use super::super::errno_of;
use super::super::flush::FlushFor;
use super::{Buffers, Lane, Phase, REPLICAS_MAX, Repair, ReplicaId, SECTOR_LEN, SlotId, Turn};

impl Lane {
    /// Starts to rewrite what differs from the winner, on all dissenters and targets at once, when
    /// it is certain that a crash would not be forgotten meanwhile (rule W2).
    pub(super) fn settle_repair<B: Buffers>(&mut self, turn: &mut Turn<'_, B>, slot: SlotId) {
        let shared = turn.shared;
        let block_sectors = shared.geometry.block_sectors();
        let settle = self.settle_mut(slot);
        let range = settle.matter.range;
        // Who went while the record was waited for is not written to any more.
        let gone = settle.to_repair.minus(shared.membership.up());
        settle.lost = settle.lost.union(settle.targets.intersection(gone));
        settle.to_repair = settle.to_repair.minus(gone);
        let to_repair = settle.to_repair;
        let differs = |replica| settle.next_run(replica, 0, block_sectors).is_some();
        let any = to_repair.iter().any(differs);
        let extent = shared.geometry.extent_of(range.start());
        if any && let Some(number) = shared.membership.intend_repair(extent) {
            if broken!(shared, WriteBeforeIntent) {
                turn.actions.push(Action::Record);
            } else {
                settle.phase = Phase::Intent;
                if settle.deadline.take().is_some() {
                    self.disarm();
                }
                self.wait_durable(turn, slot, number);
                return;
            }
        }
        let settle = self.settle_mut(slot);
        settle.phase = Phase::Repairing;
        if settle.deadline.is_none() {
            settle.deadline = Some(turn.now.after(shared.policy.write_grace_max));
            self.arm(turn.now);
        }
        if broken!(shared, RepairUnlocked) {
            let settle = self.settle_mut(slot);
            if std::mem::take(&mut settle.locked) {
                self.unlock(turn, slot, range);
            }
        }
        for replica in to_repair.iter() {
            self.settle_write_run(turn, slot, replica, 0);
        }
        self.settle_after_repair(turn, slot);
    }

    /// Writes the next run that `replica` holds wrongly; when there is none, reads back.
    fn settle_write_run<B: Buffers>(
        &mut self,
        turn: &mut Turn<'_, B>,
        slot: SlotId,
        replica: ReplicaId,
        from: u32,
    ) {
        let shared = turn.shared;
        let settle = self.settle_mut(slot);
        assert!(
            !settle.pending.contains(replica),
            "one operation on a replica at a time"
        );
        let Some((first, end)) = settle.next_run(replica, from, shared.geometry.block_sectors())
        else {
            if from > 0 {
                self.settle_check(turn, slot, replica);
            }
            return;
        };
        let run = settle.sub_range(first, end);
        let buffer = settle.result.expect("taken with the ballots");
        settle.repairs[replica.index()] = Repair::Writing { next: end };
        settle.pending.insert(replica);
        settle.writing.insert(replica);
        settle.asked_at = turn.now;
        // A step of its own gets time of its own: a slow answer before does not count against it.
        settle.deadline = Some(turn.now.after(shared.policy.write_grace_max));
        let skip_bytes = first * u32::try_from(SECTOR_LEN).expect("512");
        turn.submit(
            slot,
            replica,
            OperationKind::Write {
                range: run,
                buffer,
                skip_bytes,
            },
        );
    }

    fn settle_check<B: Buffers>(
        &mut self,
        turn: &mut Turn<'_, B>,
        slot: SlotId,
        replica: ReplicaId,
    ) {
        let settle = self.settle_mut(slot);
        settle.writing.remove(replica);
        // A target is checked by the votes and scrubs to come; reading it back would double the
        // cost of a rebuild.
        if settle.targets.contains(replica) || broken!(turn.shared, RepairNotReadBack) {
            settle.repairs[replica.index()] = Repair::Right { sectors: 0 };
            return;
        }
        settle.repairs[replica.index()] = Repair::Checking;
        settle.asked_at = turn.now;
        settle.deadline = Some(turn.now.after(turn.shared.policy.write_grace_max));
        settle.pending.insert(replica);
        let (range, buffer) = (settle.matter.range, settle.ballots.of(replica));
        let kind = OperationKind::Read {
            range,
            buffer,
            skip_bytes: 0,
        };
        turn.submit(slot, replica, kind);
    }

    pub(super) fn settle_repair_step<B: Buffers>(
        &mut self,
        turn: &mut Turn<'_, B>,
        slot: SlotId,
        replica: ReplicaId,
        outcome: Outcome,
    ) {
        let settle = self.settle_mut(slot);
        match settle.repairs[replica.index()] {
            Repair::Writing { next } if errno_of(outcome).is_none() => {
                self.settle_write_run(turn, slot, replica, next);
            }
            Repair::Checking if errno_of(outcome).is_none() => {
                self.settle_compare(turn, slot, replica);
            }
            Repair::Writing { .. } | Repair::Checking => {
                self.settle_leave_behind(turn, slot, replica);
            }
            // A straggling read of a replica that is no dissenter.
            Repair::None | Repair::Right { .. } | Repair::Wrong => {}
        }
        self.settle_after_repair(turn, slot);
    }

    /// Compares what was read back with the winner, on all sectors that have one (rule Y4).
    fn settle_compare<B: Buffers>(
        &mut self,
        turn: &mut Turn<'_, B>,
        slot: SlotId,
        replica: ReplicaId,
    ) {
        let block_sectors = turn.shared.geometry.block_sectors();
        let settle = self.settle_mut(slot);
        let result = turn
            .buffers
            .bytes(settle.result.expect("taken with the ballots"));
        let back = turn.buffers.bytes(settle.ballots.of(replica));
        let mut rewritten = 0;
        let mut right = true;
        for (index, winner) in settle.winners.iter().enumerate() {
            if !settle.is_block_decided(index, block_sectors) {
                continue;
            }
            let at = index * SECTOR_LEN..(index + 1) * SECTOR_LEN;
            right &= result[at.clone()] == back[at];
            rewritten += u32::from(!winner.contains(replica));
        }
        if right {
            settle.repairs[replica.index()] = Repair::Right { sectors: rewritten };
        } else {
            self.settle_leave_behind(turn, slot, replica);
        }
    }

    /// The replica could not be repaired: it is behind here before anybody is told (rule Y4). One
    /// whose write hangs and that cannot be marked keeps the lock instead: its write could land on
    /// top of a later one.
    pub(super) fn settle_leave_behind<B: Buffers>(
        &mut self,
        turn: &mut Turn<'_, B>,
        slot: SlotId,
        replica: ReplicaId,
    ) {
        let geometry = &turn.shared.geometry;
        let settle = self.settle_mut(slot);
        let range = settle.matter.range;
        let extent = geometry.extent_of(range.start());
        if settle.targets.contains(replica) {
            // It is behind, and stays so. One that refuses the write is worse than one that is late.
            let refused = !settle.pending.contains(replica);
            settle.lost.insert(replica);
            settle.repairs[replica.index()] = Repair::Wrong;
            if refused && turn.shared.membership.up().contains(replica) {
                turn.report(Report::RepairFailed { replica, range });
            }
            return;
        }
        let gone = !turn.shared.membership.up().contains(replica);
        let marked = turn.shared.membership.mark_behind(extent, replica);
        if marked.is_none() && settle.pending.contains(replica) && !gone {
            return;
        }
        settle.repairs[replica.index()] = Repair::Wrong;
        turn.report(Report::RepairFailed { replica, range });
        let Some(marked) = marked else { return };
        let settle = self.settle_mut(slot);
        settle.marks = settle.marks.max(marked.wait);
        if marked.wait.is_some() {
            turn.actions.push(Action::Record);
        }
        if marked.new {
            let extent = geometry.extent_range(extent);
            turn.report(Report::Behind {
                replica,
                extent,
                why: BehindCause::RepairFailed,
            });
        }
    }

    /// Goes on when no repair is under way any more.
    pub(super) fn settle_after_repair<B: Buffers>(&mut self, turn: &mut Turn<'_, B>, slot: SlotId) {
        let settle = self.settle_mut(slot);
        if settle.repairs.iter().any(|repair| repair.under_way())
            || settle.phase != Phase::Repairing
        {
            return;
        }
        let block_sectors = turn.shared.geometry.block_sectors();
        for index in 0..REPLICAS_MAX {
            let replica = ReplicaId::new(index);
            let settle = self.settle_mut(slot);
            let Repair::Right { sectors } = settle.repairs[index] else {
                continue;
            };
            if settle.targets.contains(replica) {
                continue;
            }
            settle.rewritten.insert(replica);
            // In U a difference is what was to be expected, and no fault of a replica.
            let rewritten = |index| {
                settle.is_wrong(replica, index)
                    && !settle.open[index]
                    && settle.is_block_decided(index, block_sectors)
            };
            let ranges = settle.runs(rewritten);
            for range in ranges {
                turn.report(Report::Repaired { replica, range });
            }
            self.counters.repaired_sectors += u64::from(sectors);
        }
        let settle = self.settle_mut(slot);
        if settle.resolves() && settle.parent.is_none() {
            // Rule Y1: it is durable before anybody sees it. Also where nothing was rewritten: copies
            // may be equal only because an earlier attempt ended before its flush.
            settle.phase = Phase::Flushing;
            let range = settle.matter.range;
            if settle.deadline.take().is_some() {
                self.disarm();
            }
            let extent = turn.shared.geometry.extent_of(range.start());
            turn.shared.activity.note(extent, turn.now);
            self.settle_mut(slot).stamp = Some(turn.shared.activity.last(extent));
            self.flush_for(turn, FlushFor::Settle(slot));
            return;
        }
        self.settle_conclude(turn, slot);
    }

    /// The flush run has ended; who was not flushed in it is behind, or not up, unless there is
    /// nobody else left.
    pub(in super::super) fn settle_flushed<B: Buffers>(
        &mut self,
        turn: &mut Turn<'_, B>,
        slot: SlotId,
    ) {
        let shared = turn.shared;
        let settle = self.settle_mut(slot);
        let extent = shared.geometry.extent_of(settle.matter.range.start());
        let stamp = settle.stamp.expect("taken when the flush was asked for");
        let current = shared.membership.current(extent);
        let flushed = |replica| shared.activity.is_flushed(replica, stamp);
        settle.undurable = !current.iter().all(flushed);
        self.settle_conclude(turn, slot);
        self.settle_wind_up(turn, slot);
    }
}
