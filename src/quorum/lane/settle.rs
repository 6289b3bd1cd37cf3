// SPDX-License-Identifier: Apache-2.0
//! Settling a range under the exclusive lock: arbitration of a difference or an error (rules V5,
//! Y2), resolving of sectors in U (rule Y1), and the repair of who is wrong (rule Y4).
//!
//! ```text
//! Locking -> Starved -> Reading -> [Writing -> Checking]* -> [Flushing] -> Settled
//!            (buffers)  (all of Cur)  (each dissenter, run by run)  (U only)
//! ```
//!
//! A replica that cannot read the whole range is read once more block by block: it has no vote
//! where a block fails, and its vote everywhere else. Two replicas with one bad sector each, in
//! different places, then still give every sector two votes.
//!
//! This file holds the life of a settlement; `verdict` elects and reports, `repair` rewrites.

mod repair;
mod verdict;

use super::super::event::{BadCause, BufferId, During, OperationKind, Outcome, Status, Tag};
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
                let flushed = settle.repairs[replica.index()] == Repair::Checking;
                if let Some(errno) = errno_of(outcome)
                    && flushed
                {
                    self.settle_leave_behind(turn, slot, replica);
                    self.flush_failed(turn, replica, errno);
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
