// SPDX-License-Identifier: Apache-2.0
//! Bringing one extent into order under its exclusive lock: resolving it after a crash (rule Y1),
//! and bringing replicas that are up and behind in it up to date (rules Y5, V6).
//!
//! ```text
//! Locking -> Queued -> Piece -> ... -> Piece -> Flushing -> Marking -> Done
//! (extent)   (turn)    a settlement each        a run that   (B* of who is
//!                                               begins now    not current)
//! ```
//!
//! The work on the data is that of settlements, one for each piece of the extent, under the lock
//! that this activity holds. It is begun for maintenance, and for requests of the guest that
//! cannot be served before it is done; these wait here.

use super::super::event::{During, LockTicket, Status, Tag};
use super::super::membership::Settled;
use super::super::mutation::broken;
use super::super::shared::CrashTie;
use super::super::{Buffers, LockMode};
use super::flush::FlushFor;
use super::settle::Matter;
use super::{Activity, Lane, SlotId, Turn};
use crate::units::{REPLICAS_MAX, ReplicaId, ReplicaSet, SectorRange};

/// Attempts to bring an extent into order for a request that lacks current copies, half a second
/// apart: longer than a replica takes to be opened again after a hiccup.
pub(super) const ATTEMPTS_MAX: u8 = 20;

/// Extents of a lane that are worked on at once. More wait with their locks held.
const RECONCILES_MAX: usize = 32;

/// A request that cannot go on before an extent is in order, or before replicas come back.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Waiter {
    /// A suspended write.
    Write(SlotId),
    /// A read that holds nothing.
    Read {
        /// Its name.
        tag: Tag,
        /// What it reads.
        range: SectorRange,
        /// How often its extent was brought into order in vain.
        attempts: u8,
    },
    /// A flush request.
    Flush(SlotId),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    Locking,
    Queued,
    Piece,
    Flushing,
    Marking,
    Done,
}

/// An extent being brought into order.
pub(super) struct Reconcile {
    /// The request of maintenance it is for.
    tag: Option<Tag>,
    extent: u64,
    range: SectorRange,
    phase: Phase,
    /// First sector that no piece has covered.
    next: u64,
    /// Sectors of the extent were in U, and all pieces so far are equal on all current copies.
    resolves: bool,
    /// Replicas to bring up to date.
    targets: ReplicaSet,
    /// Who votes.
    voters: ReplicaSet,
    /// c(i) of everybody, from before the first copy was read.
    counters: [u32; REPLICAS_MAX],
    /// Everybody who was written to.
    rewritten: ReplicaSet,
    waiters: Vec<Waiter>,
}

impl Reconcile {
    /// Whose copy is not known to be durable as it is: who was rewritten, and in U everybody. Copies
    /// may be equal only because an earlier attempt to resolve them ended before its flush.
    fn unflushed(&self) -> ReplicaSet {
        if self.resolves {
            self.voters
        } else {
            self.rewritten
        }
    }
}

/// What became of a piece.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct PieceResult {
    /// Every sector has a winner.
    pub(super) decided: bool,
    /// All current copies hold the winners.
    pub(super) complete: bool,
    /// Voters that were rewritten.
    pub(super) rewritten: ReplicaSet,
    /// Targets that do not hold the piece.
    pub(super) lost: ReplicaSet,
}

impl Lane {
    fn reconcile_mut(&mut self, slot: SlotId) -> &mut Reconcile {
        match self.activities.get_mut(slot) {
            Some(Activity::Reconcile(reconcile)) => reconcile,
            _ => unreachable!("the slot holds a reconciliation"),
        }
    }

    /// Whether bringing `extent` into order gives a request the `needed` current copies it lacks
    /// (rule V6). Without any current copy there is nothing to bring it into order from.
    pub(super) fn can_reconcile<B: Buffers>(
        &self,
        turn: &Turn<'_, B>,
        extent: u64,
        needed: usize,
    ) -> bool {
        let members = &turn.shared.membership;
        let current = members.current(extent);
        !current.is_empty() && current.union(members.returning(extent)).count() >= needed
    }

    /// Whether a request waits for replicas to come back instead of failing.
    pub(super) fn shall_pause<B: Buffers>(&self, turn: &Turn<'_, B>, needed: usize) -> bool {
        turn.shared.policy.pause && turn.shared.membership.up().count() < needed
    }

    /// Brings `extent` into order and then lets `waiter` go on.
    pub(super) fn reconcile_for<B: Buffers>(
        &mut self,
        turn: &mut Turn<'_, B>,
        extent: u64,
        waiter: Waiter,
    ) {
        let mut known = self.reconciles.clone();
        known.retain(|&slot| {
            let reconcile = self.reconcile_mut(slot);
            // One that has begun may have begun without what this request needs.
            reconcile.extent == extent && reconcile.phase == Phase::Locking
        });
        let slot = match known.first() {
            Some(&slot) => slot,
            None => self.reconcile_begin(turn, extent, None),
        };
        // Granted at once, and found to have nothing to do.
        match self.activities.get_mut(slot) {
            Some(Activity::Reconcile(reconcile)) => reconcile.waiters.push(waiter),
            _ => unreachable!("it is not looked at before the event is handled"),
        }
    }

    /// Starts to bring an extent into order.
    pub(super) fn reconcile_begin<B: Buffers>(
        &mut self,
        turn: &mut Turn<'_, B>,
        extent: u64,
        tag: Option<Tag>,
    ) -> SlotId {
        let range = turn.shared.geometry.extent_range(extent);
        let reconcile = Reconcile {
            tag,
            extent,
            range,
            phase: Phase::Locking,
            next: range.start(),
            resolves: false,
            targets: ReplicaSet::EMPTY,
            voters: ReplicaSet::EMPTY,
            counters: [0; REPLICAS_MAX],
            rewritten: ReplicaSet::EMPTY,
            waiters: Vec::new(),
        };
        let slot = self
            .activities
            .insert(Activity::Reconcile(Box::new(reconcile)));
        self.reconciles.push(slot);
        if self.lock(turn, slot, range, LockMode::Settle) {
            // Not here: whoever begins it has something to add.
            self.granted.push_back(LockTicket(slot.pack()));
        }
        slot
    }

    pub(super) fn reconcile_granted<B: Buffers>(&mut self, turn: &mut Turn<'_, B>, slot: SlotId) {
        self.reconcile_mut(slot).phase = Phase::Queued;
        self.reconciles_queued.push_back(slot);
        self.reconcile_next(turn);
    }

    /// Starts the next extent, if it is the turn of one. Returns whether it was.
    pub(super) fn reconcile_next<B: Buffers>(&mut self, turn: &mut Turn<'_, B>) -> bool {
        if self.reconciling >= RECONCILES_MAX {
            return false;
        }
        let Some(slot) = self.reconciles_queued.pop_front() else {
            return false;
        };
        self.reconciling += 1;
        self.reconcile_start(turn, slot);
        true
    }

    /// Looks what there is to do. It is done with the lock held, so nothing is written meanwhile.
    fn reconcile_start<B: Buffers>(&mut self, turn: &mut Turn<'_, B>, slot: SlotId) {
        let shared = turn.shared;
        let members = &shared.membership;
        let extent = self.reconcile_mut(slot).extent;
        let voters = members.current(extent);
        let mut targets = members.returning(extent);
        let prompt = targets.minus(members.lagging());
        if voters.union(prompt).count() >= shared.policy.threshold {
            targets = prompt;
        }
        let free = |&replica: &ReplicaId| !members.has_stray(extent, replica);
        let targets: ReplicaSet = targets.iter().filter(free).collect();
        let resolves = shared
            .unresolved
            .touches(shared.geometry.extent_range(extent));
        let reconcile = self.reconcile_mut(slot);
        reconcile.resolves = resolves;
        reconcile.targets = targets;
        reconcile.voters = voters;
        for replica in members.replicas().iter() {
            reconcile.counters[replica.index()] = members.counter(replica);
        }
        if voters.is_empty() || !resolves && targets.is_empty() {
            self.reconcile_end(turn, slot);
            return;
        }
        self.reconcile_next_piece(turn, slot);
    }

    fn reconcile_next_piece<B: Buffers>(&mut self, turn: &mut Turn<'_, B>, slot: SlotId) {
        let geometry = &turn.shared.geometry;
        let reconcile = self.reconcile_mut(slot);
        let left = u32::try_from(reconcile.range.end() - reconcile.next).expect("inside an extent");
        let Some(rest) = SectorRange::new(reconcile.next, left) else {
            self.reconcile_flush(turn, slot);
            return;
        };
        let piece = geometry.first_piece(rest);
        reconcile.phase = Phase::Piece;
        reconcile.next = piece.end();
        let targets = reconcile.targets;
        let matter = Matter::new(piece, During::Check, true);
        self.settle_piece(turn, matter, slot, targets);
    }

    /// A settlement of this reconciliation has ended.
    pub(super) fn reconcile_piece_done<B: Buffers>(
        &mut self,
        turn: &mut Turn<'_, B>,
        slot: SlotId,
        result: PieceResult,
    ) {
        let reconcile = self.reconcile_mut(slot);
        reconcile.rewritten = reconcile.rewritten.union(result.rewritten);
        reconcile.targets = reconcile.targets.minus(result.lost);
        // What is not equal on all current copies stays in U; the targets are served all the same.
        reconcile.resolves &= result.complete;
        if !result.decided {
            // Nobody knows what the targets should hold.
            reconcile.targets = ReplicaSet::EMPTY;
        }
        if !reconcile.resolves && reconcile.targets.is_empty() {
            self.reconcile_end(turn, slot);
            return;
        }
        self.reconcile_next_piece(turn, slot);
    }

    /// All copies are equal; what was written becomes durable before anybody relies on it.
    fn reconcile_flush<B: Buffers>(&mut self, turn: &mut Turn<'_, B>, slot: SlotId) {
        let shared = turn.shared;
        let reconcile = self.reconcile_mut(slot);
        reconcile.phase = Phase::Flushing;
        let needed = reconcile.targets.union(reconcile.unflushed());
        let extent = reconcile.extent;
        if needed.is_empty() || broken!(shared, ResolveNotFlushed | ResyncNotFlushed) {
            self.reconcile_flushed(turn, slot);
            return;
        }
        shared.activity.note(extent, turn.now);
        self.flush_for(turn, FlushFor::Reconcile(slot));
    }

    /// The flush run has ended; who was not flushed in it is behind, or not up.
    pub(super) fn reconcile_flushed<B: Buffers>(&mut self, turn: &mut Turn<'_, B>, slot: SlotId) {
        let shared = turn.shared;
        let members = &shared.membership;
        let reconcile = self.reconcile_mut(slot);
        let extent = reconcile.extent;
        let stamp = shared.activity.last(extent);
        let broken = broken!(shared, ResolveNotFlushed | ResyncNotFlushed);
        let flushed = |replica| broken || shared.activity.is_flushed(replica, stamp);
        let current = members.current(extent);
        let durable = reconcile
            .unflushed()
            .iter()
            .all(|replica| flushed(replica) || !current.contains(replica));
        let known = reconcile.voters.contains_all(current);
        reconcile.resolves &= durable && known;
        let resolved = reconcile.resolves;
        let mut returned = ReplicaSet::EMPTY;
        for replica in reconcile.targets.iter() {
            let mut counter = reconcile.counters[replica.index()];
            if broken!(shared, ResyncCounterIgnored) {
                counter = members.counter(replica);
            }
            if flushed(replica)
                && durable
                && known
                && members.clear_behind(extent, replica, counter)
            {
                returned.insert(replica);
            }
        }
        self.counters.resynced_extents += u64::try_from(returned.count()).expect("16 at most");
        if resolved {
            // Rule Y1: what is shown does not change any more, whoever is there after a crash.
            let holders = members.current(extent);
            match members.settle_for(extent, holders) {
                Settled::Held {
                    wait: Some(number), ..
                } => {
                    self.reconcile_mut(slot).phase = Phase::Marking;
                    self.wait_durable(turn, slot, number);
                    return;
                }
                Settled::Held { wait: None, .. } => self.reconcile_leave_unresolved(turn, slot),
                Settled::TooFew => {}
            }
        }
        self.reconcile_end(turn, slot);
    }

    /// Marks that the end waited for are durable, or never will be.
    pub(super) fn reconcile_durable<B: Buffers>(&mut self, turn: &mut Turn<'_, B>, slot: SlotId) {
        assert!(
            self.reconcile_mut(slot).phase == Phase::Marking,
            "waits for no mark"
        );
        if !turn.shared.is_record_lost() {
            self.reconcile_leave_unresolved(turn, slot);
        }
        self.reconcile_end(turn, slot);
    }

    fn reconcile_leave_unresolved<B: Buffers>(&mut self, turn: &mut Turn<'_, B>, slot: SlotId) {
        let reconcile = self.reconcile_mut(slot);
        let (extent, range) = (reconcile.extent, reconcile.range);
        turn.shared.unresolved.remove_extent(extent, range);
    }

    /// Whatever became of it: lets others have the extent, and those go on who waited.
    fn reconcile_end<B: Buffers>(&mut self, turn: &mut Turn<'_, B>, slot: SlotId) {
        let shared = turn.shared;
        let reconcile = self.reconcile_mut(slot);
        reconcile.phase = Phase::Done;
        let (tag, extent, range) = (reconcile.tag, reconcile.extent, reconcile.range);
        let waiters = std::mem::take(&mut reconcile.waiters);
        self.reconciles.retain(|&known| known != slot);
        self.unlock(turn, slot, range);
        for waiter in waiters {
            self.reconcile_done_for(turn, extent, waiter);
        }
        if let Some(tag) = tag {
            let members = &shared.membership;
            let left = members.returning(extent).minus(members.lagging());
            let done = left.is_empty() && !shared.unresolved.touches(range);
            let status = if done { Status::Ok } else { Status::IoError };
            // Lives on until the reply is taken note of.
            self.reply(turn, slot, tag, status, None);
        } else {
            self.activities.remove(slot);
        }
        // The next one is started by who looks what became possible.
        self.reconciling -= 1;
    }

    /// The request goes on, or waits for another attempt: an operation of before may have been in
    /// the way, or a replica that went and is to come back (rule V6).
    fn reconcile_done_for<B: Buffers>(
        &mut self,
        turn: &mut Turn<'_, B>,
        extent: u64,
        mut waiter: Waiter,
    ) {
        let needed = turn.shared.policy.threshold;
        let lacks = turn.shared.membership.current(extent).count() < needed;
        let flush = matches!(waiter, Waiter::Flush(_));
        let attempts = match &mut waiter {
            Waiter::Read { attempts, .. } => attempts,
            Waiter::Write(slot) => self.write_attempts(*slot),
            Waiter::Flush(slot) => self.flush_attempts(*slot),
        };
        *attempts += 1;
        if flush && !lacks {
            // There may be more extents, and each has its chance.
            *attempts = 0;
        }
        if lacks && *attempts < ATTEMPTS_MAX && self.can_reconcile(turn, extent, needed) {
            self.retries.push(waiter);
        } else {
            self.go_on(turn, waiter, true);
        }
    }

    /// Another attempt for those whose first one was in vain.
    pub(super) fn retry<B: Buffers>(&mut self, turn: &mut Turn<'_, B>) {
        for waiter in std::mem::take(&mut self.retries) {
            self.go_on(turn, waiter, false);
        }
    }

    /// A read that gives its slot back and waits. It is counted all the same: it will want one.
    pub(super) fn park_read(&mut self, tag: Tag, range: SectorRange) -> Waiter {
        self.parked_reads += 1;
        let attempts = 0;
        Waiter::Read {
            tag,
            range,
            attempts,
        }
    }

    /// A request that waited goes on.
    pub(super) fn go_on<B: Buffers>(
        &mut self,
        turn: &mut Turn<'_, B>,
        waiter: Waiter,
        reconciled: bool,
    ) {
        match waiter {
            Waiter::Write(slot) => self.write_resume(turn, slot, reconciled),
            // Past all that wait: it may be first in its ring (rule Q3).
            Waiter::Read {
                tag,
                range,
                attempts,
            } => {
                self.parked_reads -= 1;
                let mut matter = Matter::new(range, During::Read, true);
                matter.reconciled = reconciled;
                matter.attempts = attempts;
                self.settle_begin(turn, matter, Some(tag));
            }
            Waiter::Flush(slot) => self.flush_again(turn, slot),
        }
    }

    /// The read needs a decision that nobody may make yet (rule S4).
    pub(super) fn wait_for_decision<B: Buffers>(
        &mut self,
        turn: &Turn<'_, B>,
        tag: Tag,
        range: SectorRange,
    ) {
        let waiter = self.park_read(tag, range);
        if turn.shared.crash_tie() == CrashTie::MajorityOnly {
            // Whoever decides does so before the lanes are woken: one of us sees the other.
            self.undecided.push(waiter);
        } else {
            self.retries.push(waiter);
        }
    }

    /// What becomes of ties is known: those go on who waited for that, and requests whose extent
    /// could not be brought into order without it.
    pub(super) fn resume_undecided<B: Buffers>(&mut self, turn: &mut Turn<'_, B>) {
        for waiter in std::mem::take(&mut self.undecided) {
            self.go_on(turn, waiter, false);
        }
        self.retry(turn);
    }

    /// Replicas went or came: those go on who waited for that.
    pub(super) fn resume_paused<B: Buffers>(&mut self, turn: &mut Turn<'_, B>) {
        for waiter in std::mem::take(&mut self.paused) {
            self.go_on(turn, waiter, false);
        }
    }

    /// Those who wait for replicas to come back fail (rule Q4).
    pub(super) fn fail_paused<B: Buffers>(&mut self, turn: &mut Turn<'_, B>) {
        let mut waiters = std::mem::take(&mut self.paused);
        waiters.append(&mut self.retries);
        for waiter in waiters {
            match waiter {
                Waiter::Write(slot) => self.write_abandon(turn, slot),
                Waiter::Read { tag, range, .. } => {
                    self.parked_reads -= 1;
                    self.refuse(turn, tag, range, During::Read);
                }
                Waiter::Flush(slot) => self.flush_refuse(turn, slot),
            }
        }
    }
}
