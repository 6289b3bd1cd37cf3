// SPDX-License-Identifier: Apache-2.0
//! Settling a range under the exclusive lock: arbitration of a difference or an error (rules V5,
//! Y2), resolving of sectors in U (rule Y1), and the repair of who is wrong (rule Y4).
//!
//! ```text
//! Locking -> Starved -> Reading -> [Writing -> Checking]* -> [Flushing] -> Settled
//!            (buffers)  (all of Cur)  (each dissenter, run by run)  (U only)
//! ```
//!
//! A replica that cannot read the whole range is read once more block by block: it has no vote where a
//! block fails, and its vote everywhere else. Two replicas with one bad sector each, in different
//! places, then still give every sector two votes.

use super::super::event::{
    BadCause, BehindCause, BufferId, During, OperationKind, Outcome, Report, Status, Tag,
};
use super::super::mutation::broken;
use super::super::vote::{Ballots, Rule};
use super::super::{Buffers, LockMode, Purpose};
use super::{ACTIVITIES_RESERVED, Activity, EIO, Lane, ReplicaBuffers, SlotId, Turn, errno_of};
use crate::units::{REPLICAS_MAX, ReplicaId, ReplicaSet, SECTOR_LEN, SectorRange, Time};

/// Settlements of a lane at once. More wait for nothing but buffers.
const SETTLES_MAX: usize = ACTIVITIES_RESERVED / 2;

/// What is to be settled.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Matter {
    pub(super) range: SectorRange,
    pub(super) during: During,
    /// A write that was under way explains the difference that was seen: if it is gone, there was
    /// none (I15).
    pub(super) explained: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    Locking,
    Starved,
    Reading,
    Repairing,
    Flushing,
    Settled,
}

/// What is being done to one dissenter.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum Repair {
    /// Nothing to do, or done.
    #[default]
    None,
    /// A run is being written; it ends before this sector of the range.
    Writing { next: u32 },
    /// All runs are written; the range is read back.
    Checking,
    /// All read back right, at this many sectors.
    Right { sectors: u32 },
    /// Could not be repaired.
    Wrong,
}

impl Repair {
    fn under_way(self) -> bool {
        matches!(self, Repair::Writing { .. } | Repair::Checking)
    }
}

/// A settlement in progress.
pub(super) struct Settle {
    matter: Matter,
    /// The read that waits for the outcome.
    origin: Option<Tag>,
    phase: Phase,
    locked: bool,
    published: bool,
    pending: ReplicaSet,
    /// Those that were read, at least in part.
    good: ReplicaSet,
    /// Those that could not be read at all.
    failed: ReplicaSet,
    /// How far those are that are read block by block: the first sector not read yet.
    piecewise: [Option<u32>; REPLICAS_MAX],
    /// For each sector, the replicas of `good` that could not read it.
    unread: Vec<ReplicaSet>,
    causes: [BadCause; REPLICAS_MAX],
    ballots: ReplicaBuffers,
    /// Where the winners are put together; of the replicas, the repair writes from here.
    result: Option<BufferId>,
    /// Which sectors of the range are in U. Known once the lock is held: a write that failed may
    /// have put them there, or another settlement taken them out, while this one waited.
    open: Vec<bool>,
    /// Winner of each sector, empty where nobody won.
    winners: Vec<ReplicaSet>,
    repairs: [Repair; REPLICAS_MAX],
    deadline: Option<Time>,
}

impl Settle {
    pub(super) fn is_late(&self, now: Time) -> bool {
        self.deadline.is_some_and(|deadline| deadline <= now)
    }

    /// Whether a sector of the range is in U (rule Y1).
    fn resolves(&self) -> bool {
        self.open.contains(&true)
    }

    /// Elects each sector by `rule`, or by the rule of U where it is in U.
    fn elect<B: Buffers>(&self, buffers: &B, rule: Rule, open_rule: Rule) -> Vec<ReplicaSet> {
        let mut ballots = Ballots::new();
        for replica in self.good.iter() {
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

    /// Runs of sectors of the range for whose index `wanted` holds.
    fn runs(&self, wanted: impl Fn(usize) -> bool) -> Vec<SectorRange> {
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
    fn is_wrong(&self, replica: ReplicaId, index: usize) -> bool {
        !self.winners[index].is_empty() && !self.winners[index].contains(replica)
    }

    fn sub_range(&self, first: u32, end: u32) -> SectorRange {
        let start = self.matter.range.start() + u64::from(first);
        SectorRange::new(start, end - first).expect("a run is not empty")
    }

    /// The first run of whole blocks from sector `from` of the range on that `replica` holds
    /// wrongly and for which there is a winner, as sectors of the range.
    fn next_run(&self, replica: ReplicaId, from: u32, block_sectors: u32) -> Option<(u32, u32)> {
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

impl Lane {
    fn settle_mut(&mut self, slot: SlotId) -> &mut Settle {
        match self.activities.get_mut(slot) {
            Some(Activity::Settle(settle)) => settle,
            _ => unreachable!("the slot holds a settlement"),
        }
    }

    /// Settles a matter that nobody waits for, unless that is being done already.
    pub(super) fn settle_in_background<B: Buffers>(
        &mut self,
        turn: &mut Turn<'_, B>,
        matter: Matter,
    ) {
        let mut waiting = self.settles.clone();
        waiting.retain(|&slot| {
            let settle = self.settle_mut(slot);
            settle.phase == Phase::Locking && settle.matter.range.contains(matter.range)
        });
        if waiting.is_empty() {
            if self.settles.len() >= SETTLES_MAX {
                self.counters.settles_dropped += 1;
                return;
            }
            self.settle_begin(turn, matter, None);
        }
    }

    pub(super) fn settle_begin<B: Buffers>(
        &mut self,
        turn: &mut Turn<'_, B>,
        matter: Matter,
        origin: Option<Tag>,
    ) {
        self.counters.arbitrations += 1;
        let slot = self.activities.insert(Activity::Settle(Box::new(Settle {
            matter,
            origin,
            phase: Phase::Locking,
            locked: true,
            published: origin.is_none(),
            pending: ReplicaSet::EMPTY,
            good: ReplicaSet::EMPTY,
            failed: ReplicaSet::EMPTY,
            piecewise: [None; REPLICAS_MAX],
            unread: Vec::new(),
            causes: [BadCause::Differs; REPLICAS_MAX],
            ballots: ReplicaBuffers::default(),
            result: None,
            open: Vec::new(),
            winners: Vec::new(),
            repairs: [Repair::None; REPLICAS_MAX],
            deadline: None,
        })));
        self.settles.push(slot);
        if self.lock(turn, slot, matter.range, LockMode::Settle) {
            self.settle_granted(turn, slot);
        }
    }

    /// The lock first, then buffers: whoever holds buffers for a settlement needs nothing more to
    /// finish, and what is held back from guests is enough for one.
    pub(super) fn settle_granted<B: Buffers>(&mut self, turn: &mut Turn<'_, B>, slot: SlotId) {
        self.settle_mut(slot).phase = Phase::Starved;
        if !self.settles_starved.is_empty() || !self.settle_take_buffers(turn, slot) {
            self.settles_starved.push_back(slot);
        }
    }

    pub(super) fn settle_take_buffers<B: Buffers>(
        &mut self,
        turn: &mut Turn<'_, B>,
        slot: SlotId,
    ) -> bool {
        let shared = turn.shared;
        let range = self.settle_mut(slot).matter.range;
        let mut current = shared
            .membership
            .current(shared.geometry.extent_of(range.start()));
        if broken!(shared, BehindVotes) {
            current = shared.membership.replicas();
        }
        let len = range.len_bytes();
        let purpose = Purpose::Settle;
        let Some(mut ballots) = ReplicaBuffers::take(turn.buffers, current, len, purpose) else {
            return false;
        };
        let Some(result) = turn.buffers.take(len, purpose) else {
            ballots.give_all(turn.buffers);
            return false;
        };
        let until = turn.now.after(shared.policy.write_grace_max);
        self.arm(turn.now);
        let settle = self.settle_mut(slot);
        settle.phase = Phase::Reading;
        settle.ballots = ballots;
        settle.result = Some(result);
        settle.pending = current;
        settle.open = sectors_of(range)
            .map(|sector| shared.unresolved.touches(sector))
            .collect();
        settle.unread = vec![ReplicaSet::EMPTY; settle.open.len()];
        settle.deadline = Some(until);
        for replica in current.iter() {
            let buffer = ballots.of(replica);
            let kind = OperationKind::Read {
                range,
                buffer,
                skip_bytes: 0,
            };
            turn.submit(slot, replica, kind);
        }
        if current.is_empty() {
            self.settle_decide(turn, slot);
        }
        true
    }

    pub(super) fn settle_completed<B: Buffers>(
        &mut self,
        turn: &mut Turn<'_, B>,
        slot: SlotId,
        replica: ReplicaId,
        outcome: Outcome,
    ) {
        let settle = self.settle_mut(slot);
        assert!(
            settle.pending.contains(replica),
            "one operation on a replica at a time"
        );
        settle.pending.remove(replica);
        match settle.phase {
            Phase::Reading => {
                self.settle_read_step(turn, slot, replica, outcome);
                if self.settle_mut(slot).pending.is_empty() {
                    self.settle_decide(turn, slot);
                }
            }
            Phase::Repairing => self.settle_repair_step(turn, slot, replica, outcome),
            Phase::Flushing => {
                if errno_of(outcome).is_some() {
                    self.settle_leave_behind(turn, slot, replica);
                }
                self.settle_after_flush(turn, slot);
            }
            // A straggler of a settlement that did not wait for it.
            Phase::Locking | Phase::Starved | Phase::Settled => {}
        }
        self.settle_wind_up(turn, slot);
    }

    /// Takes the answer of a replica, or to one block of it, and reads the next block if it has
    /// come to that.
    fn settle_read_step<B: Buffers>(
        &mut self,
        turn: &mut Turn<'_, B>,
        slot: SlotId,
        replica: ReplicaId,
        outcome: Outcome,
    ) {
        let block_sectors = turn.shared.geometry.block_sectors();
        let silenced = broken!(turn.shared, OneBadBlockSilences);
        let settle = self.settle_mut(slot);
        let count = settle.matter.range.count();
        let cause = match outcome {
            Outcome::Done => None,
            Outcome::Short { .. } => Some(BadCause::Short),
            Outcome::Failed { errno } => Some(BadCause::Error(errno)),
        };
        if let Some(cause) = cause {
            settle.causes[replica.index()] = cause;
        }
        let next = match (settle.piecewise[replica.index()], cause) {
            (None, None) => {
                settle.good.insert(replica);
                return;
            }
            (None, Some(_)) if count <= block_sectors || silenced => {
                settle.failed.insert(replica);
                return;
            }
            (None, Some(_)) => 0,
            (Some(first), cause) => {
                let end = (first + block_sectors).min(count);
                if cause.is_none() {
                    settle.good.insert(replica);
                } else {
                    for unread in &mut settle.unread[first as usize..end as usize] {
                        unread.insert(replica);
                    }
                }
                end
            }
        };
        if next == count {
            if !settle.good.contains(replica) {
                settle.failed.insert(replica);
            }
            return;
        }
        settle.piecewise[replica.index()] = Some(next);
        settle.pending.insert(replica);
        let range = settle.sub_range(next, (next + block_sectors).min(count));
        let buffer = settle.ballots.of(replica);
        let skip_bytes = next * u32::try_from(SECTOR_LEN).expect("512");
        let kind = OperationKind::Read {
            range,
            buffer,
            skip_bytes,
        };
        turn.submit(slot, replica, kind);
    }

    /// A deadline has passed: go on without those that hang, if that is right.
    pub(super) fn settle_late<B: Buffers>(&mut self, turn: &mut Turn<'_, B>, slot: SlotId) {
        let policy = &turn.shared.policy;
        let until = turn.now.after(policy.write_grace_max);
        let (threshold, majority) = (policy.threshold, policy.majority());
        let settle = self.settle_mut(slot);
        settle.deadline = Some(until);
        match settle.phase {
            Phase::Reading => {
                // T equal votes are final whoever is still out; nothing less is (rule V2). Whoever
                // is being read block by block is still out.
                let good = settle.good;
                settle.good = good.minus(settle.pending);
                let decided = majority && {
                    let rule = Rule::Threshold(threshold);
                    let winners = settle.elect(turn.buffers, rule, rule);
                    winners.iter().all(|winner| !winner.is_empty())
                };
                if decided {
                    self.settle_decide(turn, slot);
                } else {
                    settle.good = good;
                }
            }
            Phase::Repairing | Phase::Flushing => {
                for replica in settle.pending.iter() {
                    if self.settle_mut(slot).repairs[replica.index()].under_way() {
                        self.settle_leave_behind(turn, slot, replica);
                    }
                }
                self.settle_after_repair(turn, slot);
            }
            Phase::Locking | Phase::Starved | Phase::Settled => {}
        }
        self.settle_wind_up(turn, slot);
    }

    /// All ballots that count are in: elect, report, repair.
    fn settle_decide<B: Buffers>(&mut self, turn: &mut Turn<'_, B>, slot: SlotId) {
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

    /// Starts to rewrite what differs from the winner, on all dissenters at once.
    fn settle_repair<B: Buffers>(
        &mut self,
        turn: &mut Turn<'_, B>,
        slot: SlotId,
        voters: ReplicaSet,
    ) {
        let settle = self.settle_mut(slot);
        settle.phase = Phase::Repairing;
        let range = settle.matter.range;
        if broken!(turn.shared, RepairUnlocked) {
            settle.locked = false;
            self.unlock(turn, slot, range);
        }
        for replica in voters.iter() {
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
        let range = settle.matter.range;
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
        // Rule W2 holds for repairs too.
        shared
            .membership
            .make_dirty(shared.geometry.extent_of(range.start()));
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
        if broken!(turn.shared, RepairNotReadBack) {
            settle.repairs[replica.index()] = Repair::Right { sectors: 0 };
            return;
        }
        settle.repairs[replica.index()] = Repair::Checking;
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

    fn settle_repair_step<B: Buffers>(
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
        let settle = self.settle_mut(slot);
        let result = turn
            .buffers
            .bytes(settle.result.expect("taken with the ballots"));
        let back = turn.buffers.bytes(settle.ballots.of(replica));
        let mut rewritten = 0;
        let mut right = true;
        for (index, winner) in settle.winners.iter().enumerate() {
            if winner.is_empty() {
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
    fn settle_leave_behind<B: Buffers>(
        &mut self,
        turn: &mut Turn<'_, B>,
        slot: SlotId,
        replica: ReplicaId,
    ) {
        let geometry = &turn.shared.geometry;
        let settle = self.settle_mut(slot);
        let range = settle.matter.range;
        let extent = geometry.extent_of(range.start());
        let marked = turn.shared.membership.mark_behind(extent, replica);
        if marked.is_none() && settle.pending.contains(replica) {
            return;
        }
        settle.repairs[replica.index()] = Repair::Wrong;
        turn.report(Report::RepairFailed { replica, range });
        if marked == Some(true) {
            let extent = geometry.extent_range(extent);
            turn.report(Report::Behind {
                replica,
                extent,
                why: BehindCause::RepairFailed,
            });
        }
    }

    /// Goes on when no repair is under way any more.
    fn settle_after_repair<B: Buffers>(&mut self, turn: &mut Turn<'_, B>, slot: SlotId) {
        let settle = self.settle_mut(slot);
        if settle.repairs.iter().any(|repair| repair.under_way()) || settle.phase == Phase::Settled
        {
            return;
        }
        let mut rewritten = ReplicaSet::EMPTY;
        for index in 0..REPLICAS_MAX {
            let replica = ReplicaId::new(index);
            let settle = self.settle_mut(slot);
            if let Repair::Right { sectors } = settle.repairs[index]
                && settle.phase == Phase::Repairing
            {
                rewritten.insert(replica);
                let ranges = settle.runs(|index| settle.is_wrong(replica, index));
                for range in ranges {
                    turn.report(Report::Repaired { replica, range });
                }
                self.counters.repaired_sectors += u64::from(sectors);
            }
        }
        let settle = self.settle_mut(slot);
        if settle.resolves() && settle.phase == Phase::Repairing {
            // Rule Y1: what was rewritten is durable before anybody sees it.
            settle.phase = Phase::Flushing;
            settle.deadline = Some(turn.now.after(turn.shared.policy.write_grace_max));
            for replica in rewritten.minus(settle.pending).iter() {
                let settle = self.settle_mut(slot);
                settle.pending.insert(replica);
                settle.repairs[replica.index()] = Repair::Checking;
                turn.submit(slot, replica, OperationKind::Flush);
            }
            if rewritten.is_empty() {
                self.settle_conclude(turn, slot);
            }
            return;
        }
        self.settle_conclude(turn, slot);
    }

    fn settle_after_flush<B: Buffers>(&mut self, turn: &mut Turn<'_, B>, slot: SlotId) {
        let settle = self.settle_mut(slot);
        for replica in (0..REPLICAS_MAX).map(ReplicaId::new) {
            let repair = &mut settle.repairs[replica.index()];
            if !settle.pending.contains(replica) && *repair == Repair::Checking {
                *repair = Repair::Right { sectors: 0 };
            }
        }
        self.settle_after_repair(turn, slot);
    }

    /// The outcome stands: reply, leave U, release the lock.
    fn settle_conclude<B: Buffers>(&mut self, turn: &mut Turn<'_, B>, slot: SlotId) {
        let shared = turn.shared;
        let settle = self.settle_mut(slot);
        let (range, resolves) = (settle.matter.range, settle.resolves());
        settle.phase = Phase::Settled;
        let current = shared
            .membership
            .current(shared.geometry.extent_of(range.start()));
        let decided = settle.winners.iter().all(|winner| !winner.is_empty());
        let verified = !shared.policy.blkverify
            || settle
                .winners
                .iter()
                .all(|winner| winner.contains_all(settle.good));
        let (origin, result) = (settle.origin, settle.result);
        if settle.deadline.take().is_some() {
            self.disarm();
        }
        if resolves && decided && current.count() >= shared.policy.threshold {
            shared.unresolved.remove(range);
        }
        if let Some(tag) = origin {
            let (status, data) = if decided && verified {
                (Status::Ok, result)
            } else {
                (Status::IoError, None)
            };
            self.reply(turn, slot, tag, status, data);
        }
        if std::mem::take(&mut self.settle_mut(slot).locked) {
            self.unlock(turn, slot, range);
        }
    }

    pub(super) fn settle_published<B: Buffers>(&mut self, turn: &mut Turn<'_, B>, slot: SlotId) {
        let settle = self.settle_mut(slot);
        assert!(
            settle.phase == Phase::Settled && !settle.published,
            "published once, when settled"
        );
        settle.published = true;
        self.settle_wind_up(turn, slot);
    }

    fn settle_wind_up<B: Buffers>(&mut self, turn: &mut Turn<'_, B>, slot: SlotId) {
        let settle = self.settle_mut(slot);
        if settle.phase != Phase::Settled || !settle.published {
            return;
        }
        // What a replica that hangs does not use is not to be missing elsewhere.
        settle.ballots.give_except(turn.buffers, settle.pending);
        if !settle.pending.is_empty() {
            return;
        }
        settle.ballots.give_all(turn.buffers);
        let result = settle.result.take();
        turn.give(result);
        self.activities.remove(slot);
        self.settles.retain(|&known| known != slot);
    }
}

/// The sectors of `range`, one by one.
fn sectors_of(range: SectorRange) -> impl Iterator<Item = SectorRange> {
    (range.start()..range.end())
        .map(|sector| SectorRange::new(sector, 1).expect("a sector of a range"))
}

/// Errno of a cause, for logs and events.
impl BadCause {
    /// The errno a cause stands for, if it is one.
    #[must_use]
    pub fn errno(self) -> Option<i32> {
        match self {
            BadCause::Differs => None,
            BadCause::Error(errno) => Some(errno),
            BadCause::Short => Some(EIO),
        }
    }
}
