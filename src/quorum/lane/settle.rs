// SPDX-License-Identifier: Apache-2.0
//! Settling a range under the exclusive lock: arbitration of a difference or an error (rules V5,
//! Y2), resolving of sectors in U (rule Y1), and the repair of who is wrong (rule Y4).
//!
//! ```text
//! Locking -> Starved -> Reading -> Intent -> [Writing -> Checking]* -> Flushing -> Marking -> Settled
//!            (buffers)  (all of Cur)   (D*)  (each dissenter, run by run)  (U only)    (B*)
//! ```
//!
//! A replica that cannot read the whole range is read once more block by block: it has no vote
//! where a block fails, and its vote everywhere else. Two replicas with one bad sector each, in
//! different places, then still give every sector two votes.
//!
//! This file holds the life of a settlement; `reading` asks the copies, `ballots` counts, `verdict`
//! elects and reports, `repair` rewrites.

mod ballots;
mod reading;
mod repair;
mod verdict;

use super::super::activity::Stamp;
use super::super::event::{BadCause, BufferId, During, Outcome, Status, Tag};
use super::super::membership::Settled;
use super::super::vote::Rule;
use super::super::{Buffers, LockMode};
use super::reconcile::{PieceResult, Waiter};
use super::{ACTIVITIES_RESERVED, Activity, EIO, Lane, ReplicaBuffers, SlotId, Turn};
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
    /// The extent was brought into order for it; that is not done a second time.
    pub(super) reconciled: bool,
    /// Whether dissenters are rewritten, if the policy allows it.
    pub(super) repair: bool,
    /// How often the extent was brought into order for it in vain.
    pub(super) attempts: u8,
}

impl Matter {
    pub(super) fn new(range: SectorRange, during: During, explained: bool) -> Self {
        Self {
            range,
            during,
            explained,
            reconciled: false,
            repair: true,
            attempts: 0,
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    Locking,
    Starved,
    Reading,
    /// Waits until the record says that the extent is dirty (rule W2).
    Intent,
    Repairing,
    Flushing,
    /// Waits until the record says who could not be repaired (rule Y4).
    Marking,
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
    /// The reconciliation it is a piece of, which holds the lock.
    parent: Option<SlotId>,
    /// Replicas that are behind and to be brought up to date: they are read and written, and have
    /// no vote.
    targets: ReplicaSet,
    /// Targets that do not hold the range in the end.
    lost: ReplicaSet,
    /// Voters that were rewritten.
    rewritten: ReplicaSet,
    /// Who is to be rewritten where it differs.
    to_repair: ReplicaSet,
    /// Replicas whose last operation was a write.
    writing: ReplicaSet,
    /// Repairs that nobody waits for and that may still land.
    strays: ReplicaSet,
    /// The moment after which a flush has to have begun to make the sectors durable. Others may
    /// write in the extent meanwhile.
    stamp: Option<Stamp>,
    /// A current copy of sectors in U could not be flushed: they stay in U, and are not shown.
    undurable: bool,
    /// It was elected before it was known whether ties are decided by a choice (rule S4). That may be
    /// known by the time the settlement ends.
    early: bool,
    /// Everybody who is not current has been marked behind, so that no other version of what leaves
    /// U can come back.
    others_marked: bool,
    /// Marks up to this number have to be durable before the reply.
    marks: Option<u64>,
    /// When the last operation was submitted.
    asked_at: Time,
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

    /// Replicas that have not answered since `since` or longer.
    pub(super) fn overdue(&self, since: Time) -> ReplicaSet {
        if self.asked_at <= since {
            self.pending
        } else {
            ReplicaSet::EMPTY
        }
    }

    /// Whether the replica holds the winner of every sector now.
    fn is_right(&self, replica: ReplicaId) -> bool {
        let read = self.good.contains(replica)
            && self.winners.iter().all(|winner| winner.contains(replica));
        read || matches!(self.repairs[replica.index()], Repair::Right { .. })
    }

    fn is_stray(&self, replica: ReplicaId) -> bool {
        self.strays.contains(replica)
    }

    /// Whether a sector of the range is in U (rule Y1).
    fn resolves(&self) -> bool {
        self.open.contains(&true)
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
        let slot = self.settle_insert(turn, matter, origin);
        self.settles.push(slot);
        if self.lock(turn, slot, matter.range, LockMode::Settle) {
            self.settle_granted(turn, slot);
        }
    }

    /// Settles a piece of an extent whose lock `parent` holds, and brings `targets` up to date in
    /// it.
    pub(super) fn settle_piece<B: Buffers>(
        &mut self,
        turn: &mut Turn<'_, B>,
        matter: Matter,
        parent: SlotId,
        targets: ReplicaSet,
    ) {
        let slot = self.settle_insert(turn, matter, None);
        let settle = self.settle_mut(slot);
        settle.locked = false;
        settle.parent = Some(parent);
        settle.targets = targets;
        self.settle_wait_for_buffers(turn, slot);
    }

    fn settle_insert<B: Buffers>(
        &mut self,
        turn: &mut Turn<'_, B>,
        matter: Matter,
        origin: Option<Tag>,
    ) -> SlotId {
        self.activities.insert(Activity::Settle(Box::new(Settle {
            matter,
            parent: None,
            targets: ReplicaSet::EMPTY,
            lost: ReplicaSet::EMPTY,
            rewritten: ReplicaSet::EMPTY,
            to_repair: ReplicaSet::EMPTY,
            writing: ReplicaSet::EMPTY,
            strays: ReplicaSet::EMPTY,
            stamp: None,
            undurable: false,
            early: false,
            others_marked: false,
            marks: None,
            asked_at: turn.now,
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
        })))
    }

    /// The lock first, then buffers: whoever holds buffers for a settlement needs nothing more to
    /// finish, and what is held back from guests is enough for one.
    pub(super) fn settle_granted<B: Buffers>(&mut self, turn: &mut Turn<'_, B>, slot: SlotId) {
        let shared = turn.shared;
        let settle = self.settle_mut(slot);
        let (matter, origin) = (settle.matter, settle.origin);
        let extent = shared.geometry.extent_of(matter.range.start());
        let threshold = shared.policy.threshold;
        let too_few = shared.membership.current(extent).count() < threshold;
        let resolve = shared.unresolved.holds_extent(extent);
        if !matter.reconciled && (too_few || resolve) {
            // Rules V6, Y1: whole extents first. Whoever asked goes on afterwards.
            let can = resolve || self.can_reconcile(turn, extent, threshold);
            let pause = self.shall_pause(turn, threshold);
            if can || pause {
                self.settle_cancel(turn, slot);
                let range = matter.range;
                if let Some(tag) = origin {
                    let mut waiter = self.park_read(tag, range);
                    if let Waiter::Read { attempts, .. } = &mut waiter {
                        *attempts = matter.attempts;
                    }
                    if pause {
                        self.paused.push(waiter);
                    } else {
                        self.reconcile_for(turn, extent, waiter);
                    }
                }
                return;
            }
        }
        self.settle_wait_for_buffers(turn, slot);
    }

    /// Ends a settlement that has done nothing but take its lock.
    fn settle_cancel<B: Buffers>(&mut self, turn: &mut Turn<'_, B>, slot: SlotId) {
        let range = self.settle_mut(slot).matter.range;
        self.unlock(turn, slot, range);
        self.activities.remove(slot);
        self.settles.retain(|&known| known != slot);
    }

    fn settle_wait_for_buffers<B: Buffers>(&mut self, turn: &mut Turn<'_, B>, slot: SlotId) {
        self.settle_mut(slot).phase = Phase::Starved;
        if !self.settles_starved.is_empty() || !self.settle_take_buffers(turn, slot) {
            self.settles_starved.push_back(slot);
        }
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
        if settle.is_stray(replica) {
            settle.strays.remove(replica);
            let extent = turn.shared.geometry.extent_of(settle.matter.range.start());
            turn.shared.membership.end_stray(extent, replica);
        }
        match self.settle_mut(slot).phase {
            Phase::Reading => {
                self.settle_read_step(turn, slot, replica, outcome);
                self.settle_all_read(turn, slot);
            }
            Phase::Repairing => self.settle_repair_step(turn, slot, replica, outcome),
            // A straggler of a settlement that did not wait for it.
            Phase::Locking
            | Phase::Starved
            | Phase::Intent
            | Phase::Flushing
            | Phase::Marking
            | Phase::Settled => {}
        }
        self.settle_wind_up(turn, slot);
    }

    /// A replica went: it is not waited for any more.
    pub(super) fn settle_members_changed<B: Buffers>(
        &mut self,
        turn: &mut Turn<'_, B>,
        slot: SlotId,
    ) {
        let up = turn.shared.membership.up();
        let settle = self.settle_mut(slot);
        match settle.phase {
            Phase::Reading => self.settle_all_read(turn, slot),
            Phase::Repairing => {
                let gone = settle.pending.minus(up);
                for replica in gone.iter() {
                    if self.settle_mut(slot).repairs[replica.index()].under_way() {
                        self.settle_leave_behind(turn, slot, replica);
                    }
                }
                self.settle_after_repair(turn, slot);
            }
            Phase::Locking
            | Phase::Starved
            | Phase::Intent
            | Phase::Flushing
            | Phase::Marking
            | Phase::Settled => {}
        }
        self.settle_wind_up(turn, slot);
    }

    /// Marks that the settlement waited for are durable, or never will be.
    pub(super) fn settle_durable<B: Buffers>(&mut self, turn: &mut Turn<'_, B>, slot: SlotId) {
        let lost = turn.shared.is_record_lost();
        let settle = self.settle_mut(slot);
        match settle.phase {
            Phase::Intent if lost => {
                // Rule W2: nothing is written any more. The answer is right all the same.
                settle.lost = settle.targets;
                self.settle_conclude(turn, slot);
            }
            Phase::Intent => self.settle_repair(turn, slot),
            Phase::Marking => self.settle_conclude(turn, slot),
            Phase::Locking
            | Phase::Starved
            | Phase::Reading
            | Phase::Repairing
            | Phase::Flushing
            | Phase::Settled => unreachable!("waits for no mark"),
        }
        self.settle_wind_up(turn, slot);
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
                    settle.lost = settle
                        .lost
                        .union(settle.targets.intersection(settle.pending));
                    self.settle_decide(turn, slot);
                } else {
                    settle.good = good;
                }
            }
            Phase::Repairing => {
                for replica in settle.pending.iter() {
                    if self.settle_mut(slot).repairs[replica.index()].under_way() {
                        self.settle_leave_behind(turn, slot, replica);
                    }
                }
                self.settle_after_repair(turn, slot);
            }
            Phase::Locking
            | Phase::Starved
            | Phase::Intent
            | Phase::Flushing
            | Phase::Marking
            | Phase::Settled => {}
        }
        self.settle_wind_up(turn, slot);
    }

    /// The outcome stands: once it is remembered who could not be repaired, reply, leave U, release
    /// the lock.
    fn settle_conclude<B: Buffers>(&mut self, turn: &mut Turn<'_, B>, slot: SlotId) {
        let shared = turn.shared;
        let settle = self.settle_mut(slot);
        if settle.phase == Phase::Settled {
            return;
        }
        if let Some(number) = settle.marks.take()
            && !shared.membership.marks().is_settled(number)
            && !shared.is_record_lost()
        {
            settle.phase = Phase::Marking;
            if settle.deadline.take().is_some() {
                self.disarm();
            }
            self.wait_durable(turn, slot, number);
            return;
        }
        let (range, resolves) = (settle.matter.range, settle.resolves());
        let extent = shared.geometry.extent_of(range.start());
        let current = shared.membership.current(extent);
        let decided = settle.winners.iter().all(|winner| !winner.is_empty());
        let leaves = resolves && settle.parent.is_none() && !settle.undurable;
        if leaves && decided && !std::mem::replace(&mut settle.others_marked, true) {
            // Rule Y1: what is shown does not change any more, whoever is there after a crash.
            if let Settled::Held { wait, .. } = shared.membership.settle_for(extent, current) {
                settle.marks = wait;
                self.settle_conclude(turn, slot);
                return;
            }
        }
        let settle = self.settle_mut(slot);
        settle.phase = Phase::Settled;
        let lost = shared.is_record_lost() && resolves;
        let verified = !shared.policy.blkverify
            || settle
                .winners
                .iter()
                .all(|winner| winner.contains_all(settle.good));
        // Nobody may hold anything else in what is to leave U.
        let complete = decided && current.iter().all(|replica| settle.is_right(replica));
        let (origin, result) = (settle.origin, settle.result);
        if settle.deadline.take().is_some() {
            self.disarm();
        }
        if leaves && complete && !lost && current.count() >= shared.policy.threshold {
            shared.unresolved.remove(range);
        }
        let settle = self.settle_mut(slot);
        let undurable = settle.undurable;
        if !settle.rewritten.is_empty() || !settle.to_repair.is_empty() {
            shared.activity.note(extent, turn.now);
        }
        self.settle_leave_strays(turn, slot);
        let settle = self.settle_mut(slot);
        if let Some(parent) = settle.parent {
            let result = PieceResult {
                decided,
                complete,
                rewritten: settle.rewritten,
                lost: settle.lost,
            };
            // The parent may be done with that, and this slot then used again.
            self.settle_wind_up(turn, slot);
            self.reconcile_piece_done(turn, parent, result);
            return;
        }
        if let Some(tag) = origin.filter(|_| !self.settle_leaves_it_open(turn, slot)) {
            let (status, data) = if decided && verified && !undurable && !lost {
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

    /// A read that met nothing worse than sectors in U without a majority, before anybody may
    /// choose, waits until it is known what becomes of them (rules S4, Y3). Returns whether it does.
    fn settle_leaves_it_open<B: Buffers>(&mut self, turn: &Turn<'_, B>, slot: SlotId) -> bool {
        let settle = self.settle_mut(slot);
        let mut undecided = (settle.winners.iter().zip(&settle.open))
            .filter(|(winner, _)| winner.is_empty())
            .peekable();
        let open = undecided.peek().is_some() && undecided.all(|(_, &open)| open);
        let read = settle.matter.during == During::Read;
        let (true, Some(tag)) = (settle.early && open && read, settle.origin) else {
            return false;
        };
        // Nothing is replied, so there is nothing to publish.
        settle.published = true;
        let range = settle.matter.range;
        self.wait_for_decision(turn, tag, range);
        true
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

    /// Repairs that hang and that nobody waits for.
    fn settle_leave_strays<B: Buffers>(&mut self, turn: &mut Turn<'_, B>, slot: SlotId) {
        let settle = self.settle_mut(slot);
        let extent = turn.shared.geometry.extent_of(settle.matter.range.start());
        let strays = settle.pending.intersection(settle.writing);
        settle.strays = strays;
        for replica in strays.iter() {
            turn.shared.membership.leave_stray(extent, replica);
        }
    }

    fn settle_wind_up<B: Buffers>(&mut self, turn: &mut Turn<'_, B>, slot: SlotId) {
        let Some(Activity::Settle(settle)) = self.activities.get_mut(slot) else {
            return;
        };
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
