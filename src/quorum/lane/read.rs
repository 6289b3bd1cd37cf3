// SPDX-License-Identifier: Apache-2.0
//! Reads: ask, compare, reply at T equal, look at late ballots too (rules V1-V7).

use std::time::Duration;

use super::super::event::{During, OperationKind, Outcome, Status, Tag};
use super::super::mutation::broken;
use super::super::order::ReadStamp;
use super::super::policy::{REQUEST_SECTORS_MAX, ReadPattern};
use super::super::vote::{Ballots, Rule};
use super::super::{Buffers, LockMode, Purpose};
use super::settle::Matter;
use super::{Activity, Lane, ReplicaBuffers, STRAGGLERS_MAX, SlotId, Turn};
use crate::units::{ReplicaId, ReplicaSet, SECTOR_LEN, SectorRange, Time};

/// How long a check waits for a replica at least, before the range is passed over. Longer than
/// any disk that works takes, so that a slow replica is still compared.
const CHECK_GRACE: Duration = Duration::from_secs(1);

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    /// Waits for buffers.
    Starved,
    /// Has buffers and waits for its lock.
    Locking,
    /// Operations are out, no reply yet.
    Asking,
    /// Replied; stragglers may be out.
    Replied,
    /// Handed to a settlement; stragglers may be out.
    Left,
}

/// All current copies have to answer, and nobody wants the data (rule Y6).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Check {
    /// Whether what differs is rewritten, if the policy allows it.
    repair: bool,
}

/// A read in flight.
pub(super) struct Read {
    tag: Tag,
    range: SectorRange,
    phase: Phase,
    check: Option<Check>,
    locked: bool,
    published: bool,
    /// Every replica that was asked.
    asked: ReplicaSet,
    /// Those that have not answered.
    pending: ReplicaSet,
    /// Those that answered with data.
    good: ReplicaSet,
    /// Those that answered with an error: no vote (rule V4).
    failed: ReplicaSet,
    /// The ballot the others are compared with; after the reply, the one that was returned.
    reference: Option<ReplicaId>,
    /// Ballots equal to the reference, itself included.
    agreeing: usize,
    /// A ballot differs from the reference.
    differs: bool,
    stamp: Option<ReadStamp>,
    asked_at: Time,
    /// When those that are late are not waited for any more, although the answers that are in
    /// decide nothing.
    deadline: Option<Time>,
    ballots: ReplicaBuffers,
}

impl Read {
    pub(super) fn is_late(&self, now: Time) -> bool {
        self.phase == Phase::Asking && self.deadline.is_some_and(|deadline| deadline <= now)
    }

    /// Replicas that have not answered since `since` or longer.
    pub(super) fn overdue(&self, since: Time) -> ReplicaSet {
        if self.asked_at <= since {
            self.pending
        } else {
            ReplicaSet::EMPTY
        }
    }

    /// Asks `others` with the buffer that was taken for one who is not current any more.
    fn ask_instead(&mut self, others: ReplicaSet) {
        for other in others.iter() {
            self.ballots.0[other.index()] = self.ballots.0.iter_mut().find_map(Option::take);
        }
        self.asked = others;
    }

    /// Compares the ballot of `replica` with the reference, on all bytes.
    fn count_ballot<B: Buffers>(&mut self, buffers: &B, replica: ReplicaId) {
        self.good.insert(replica);
        let Some(reference) = self.reference else {
            self.reference = Some(replica);
            self.agreeing = 1;
            return;
        };
        let len = self.range.len_bytes();
        let ours = &buffers.bytes(self.ballots.of(reference))[..len];
        if ours == &buffers.bytes(self.ballots.of(replica))[..len] {
            self.agreeing += 1;
        } else {
            self.differs = true;
        }
    }

    /// If every sector has a winner among the ballots that are in, puts the winners together in
    /// the reference ballot. T equal votes are final, whoever is still out (rule V2).
    fn assemble<B: Buffers>(&mut self, buffers: &mut B, threshold: usize) -> bool {
        let Some(reference) = self.reference else {
            return false;
        };
        let sectors = self.range.count() as usize;
        let mut ballots = Ballots::new();
        for replica in self.good.iter() {
            ballots.add(replica, buffers.bytes(self.ballots.of(replica)));
        }
        let rule = Rule::Threshold(threshold);
        // On the stack: reads that meet a write are no reason to allocate.
        let mut winners = [ReplicaSet::EMPTY; REQUEST_SECTORS_MAX as usize];
        for (index, winner) in winners[..sectors].iter_mut().enumerate() {
            *winner = ballots.elect(index, rule);
            if winner.is_empty() {
                return false;
            }
        }
        for (index, winner) in winners[..sectors].iter().enumerate() {
            if !winner.contains(reference)
                && let Some(source) = winner.iter().next()
            {
                copy_sector(buffers, self.ballots, source, reference, index);
            }
        }
        true
    }
}

fn copy_sector<B: Buffers>(
    buffers: &mut B,
    ballots: ReplicaBuffers,
    from: ReplicaId,
    to: ReplicaId,
    index: usize,
) {
    let at = index * SECTOR_LEN..(index + 1) * SECTOR_LEN;
    let mut sector = [0u8; SECTOR_LEN];
    sector.copy_from_slice(&buffers.bytes(ballots.of(from))[at.clone()]);
    buffers.bytes_mut(ballots.of(to))[at].copy_from_slice(&sector);
}

impl Lane {
    fn read_mut(&mut self, slot: SlotId) -> &mut Read {
        match self.activities.get_mut(slot) {
            Some(Activity::Read(read)) => read,
            _ => unreachable!("the slot holds a read"),
        }
    }

    pub(super) fn read_begin<B: Buffers>(
        &mut self,
        turn: &mut Turn<'_, B>,
        tag: Tag,
        range: SectorRange,
    ) {
        self.read_insert(turn, tag, range, None);
    }

    /// Compares all current copies of `range` under a shared lock (rule Y6).
    pub(super) fn check_begin<B: Buffers>(
        &mut self,
        turn: &mut Turn<'_, B>,
        tag: Tag,
        range: SectorRange,
        repair: bool,
    ) {
        assert!(
            turn.shared.geometry.admits(range),
            "check of {range} is not cut right"
        );
        self.counters.checked_sectors += u64::from(range.count());
        self.read_insert(turn, tag, range, Some(Check { repair }));
    }

    fn read_insert<B: Buffers>(
        &mut self,
        turn: &mut Turn<'_, B>,
        tag: Tag,
        range: SectorRange,
        check: Option<Check>,
    ) {
        let slot = self.activities.insert(Activity::Read(Read {
            tag,
            range,
            phase: Phase::Starved,
            check,
            locked: false,
            published: false,
            asked: ReplicaSet::EMPTY,
            pending: ReplicaSet::EMPTY,
            good: ReplicaSet::EMPTY,
            failed: ReplicaSet::EMPTY,
            reference: None,
            agreeing: 0,
            differs: false,
            stamp: None,
            asked_at: turn.now,
            deadline: None,
            ballots: ReplicaBuffers::default(),
        }));
        if !self.starved.is_empty() || !self.read_take_buffers(turn, slot) {
            self.counters.starved += 1;
            self.starved.push_back(slot);
        }
    }

    /// Buffers first, then the lock: a read that held a lock while it waits for buffers could
    /// wait for writes that hold the buffers and wait for the lock.
    pub(super) fn read_take_buffers<B: Buffers>(
        &mut self,
        turn: &mut Turn<'_, B>,
        slot: SlotId,
    ) -> bool {
        let read = self.read_mut(slot);
        let (range, thorough) = (read.range, read.check.is_some());
        let asked = self.whom_to_ask(turn, range, thorough);
        let taken = ReplicaBuffers::take(turn.buffers, asked, range.len_bytes(), Purpose::Guest);
        let Some(ballots) = taken else { return false };
        let read = self.read_mut(slot);
        read.ballots = ballots;
        read.asked = asked;
        read.phase = Phase::Locking;
        // Rule L1: with T equal votes required a read cannot be wrong without a lock.
        let policy = &turn.shared.policy;
        let lockless = policy.majority() && policy.read_pattern == ReadPattern::Quorum && !thorough;
        if !lockless {
            self.read_mut(slot).locked = true;
            if !self.lock(turn, slot, range, LockMode::Shared) {
                return true;
            }
        }
        self.read_ask(turn, slot);
        true
    }

    fn whom_to_ask<B: Buffers>(
        &mut self,
        turn: &Turn<'_, B>,
        range: SectorRange,
        thorough: bool,
    ) -> ReplicaSet {
        let shared = turn.shared;
        let policy = &shared.policy;
        let mut asked = shared
            .membership
            .current(shared.geometry.extent_of(range.start()));
        if broken!(shared, BehindVotes) {
            asked = shared.membership.replicas();
        }
        if thorough {
            return asked;
        }
        if policy.read_pattern == ReadPattern::Fifo {
            return asked.iter().take(1).collect();
        }
        if !policy.majority() {
            return asked;
        }
        // It is asked again when its answers come in. To try it before that would cost buffers
        // for as long as it hangs, until there are none left.
        for replica in asked.iter() {
            if self.stragglers[replica.index()] > STRAGGLERS_MAX && asked.count() > policy.threshold
            {
                self.counters.reads_without_laggard += 1;
                asked.remove(replica);
            }
        }
        asked
    }

    pub(super) fn read_ask<B: Buffers>(&mut self, turn: &mut Turn<'_, B>, slot: SlotId) {
        let shared = turn.shared;
        let read = self.read_mut(slot);
        let range = read.range;
        let current = shared
            .membership
            .current(shared.geometry.extent_of(range.start()));
        if !broken!(shared, BehindVotes) {
            // Somebody may have been marked while this read waited.
            read.asked = read.asked.intersection(current);
        }
        let extent = shared.geometry.extent_of(range.start());
        let read = self.read_mut(slot);
        let thorough = read.check.is_some();
        let fifo = shared.policy.read_pattern == ReadPattern::Fifo && !thorough;
        let needed = if fifo { 1 } else { shared.policy.threshold };
        if shared.unresolved.holds_extent(extent) || current.count() < needed {
            self.read_without_quorum(turn, slot, extent, needed);
            return;
        }
        let read = self.read_mut(slot);
        if fifo && read.asked.is_empty() && !current.is_empty() {
            // The other replica, under the same lock: one queued for anew would come after writes
            // that are published only after this read.
            read.ask_instead(current.iter().take(1).collect());
        }
        let asked = read.asked;
        let displaced = read.locked && asked.count() < needed && current.count() >= needed;
        if displaced || shared.unresolved.touches(range) {
            let tag = self.read_drop(turn, slot);
            let matter = Matter::new(range, During::Read, true);
            self.settle_begin(turn, matter, Some(tag));
            return;
        }
        if asked.count() < needed {
            // Whoever was to be asked fell behind meanwhile; there are others.
            self.read_start_over(turn, slot);
            return;
        }
        let read = self.read_mut(slot);
        read.phase = Phase::Asking;
        read.asked_at = turn.now;
        read.pending = asked;
        read.stamp = Some(shared.order.read_stamp(range));
        let ballots = read.ballots;
        for replica in asked.iter() {
            let buffer = ballots.of(replica);
            turn.submit(
                slot,
                replica,
                OperationKind::Read {
                    range,
                    buffer,
                    skip_bytes: 0,
                },
            );
        }
        if thorough {
            // A scrub must not keep writes out for as long as a replica hangs.
            let patience = shared.policy.write_grace_max.max(CHECK_GRACE);
            self.read_mut(slot).deadline = Some(turn.now.after(patience));
            self.arm(turn.now);
        }
    }

    /// The extent has to be brought into order first, or replicas have to come back (rules V6, Y1).
    fn read_without_quorum<B: Buffers>(
        &mut self,
        turn: &mut Turn<'_, B>,
        slot: SlotId,
        extent: u64,
        needed: usize,
    ) {
        let resolve = turn.shared.unresolved.holds_extent(extent);
        let read = self.read_mut(slot);
        let (range, thorough) = (read.range, read.check.is_some());
        let tag = self.read_drop(turn, slot);
        if thorough {
            // Whoever brings extents into order comes by; a check need not wait for it.
            self.reply_at_once(turn, tag, Status::IoError);
        } else if self.shall_pause(turn, needed) {
            let waiter = self.park_read(tag, range);
            self.paused.push(waiter);
        } else if resolve || self.can_reconcile(turn, extent, needed) {
            let waiter = self.park_read(tag, range);
            self.reconcile_for(turn, extent, waiter);
        } else {
            self.refuse(turn, tag, range, During::Read);
        }
    }

    /// Only without a lock, which would lose its place.
    fn read_start_over<B: Buffers>(&mut self, turn: &mut Turn<'_, B>, slot: SlotId) {
        let read = self.read_mut(slot);
        assert!(!read.locked, "a place in the order is kept");
        read.ballots.give_all(turn.buffers);
        read.phase = Phase::Starved;
        if !self.read_take_buffers(turn, slot) {
            self.starved.push_back(slot);
        }
    }

    pub(super) fn read_completed<B: Buffers>(
        &mut self,
        turn: &mut Turn<'_, B>,
        slot: SlotId,
        replica: ReplicaId,
        outcome: Outcome,
    ) {
        let late_ignored = broken!(turn.shared, LateBallotsIgnored | BuffersGivenBackEarly);
        let read = self.read_mut(slot);
        assert!(
            read.pending.contains(replica),
            "one answer from each replica asked"
        );
        read.pending.remove(replica);
        let replied = matches!(read.phase, Phase::Replied | Phase::Left);
        match outcome {
            _ if read.phase == Phase::Left => {}
            Outcome::Done if replied && (read.differs || late_ignored) => {
                read.good.insert(replica);
            }
            Outcome::Done => read.count_ballot(turn.buffers, replica),
            Outcome::Short { .. } | Outcome::Failed { .. } => read.failed.insert(replica),
        }
        if replied {
            let stragglers = &mut self.stragglers[replica.index()];
            *stragglers = stragglers
                .checked_sub(1)
                .expect("every straggler was counted");
        } else {
            self.read_decide(turn, slot);
        }
        self.read_wind_up(turn, slot);
    }

    /// Replies, asks the next one (fifo) or goes to arbitration, if the answers so far allow it.
    fn read_decide<B: Buffers>(&mut self, turn: &mut Turn<'_, B>, slot: SlotId) {
        let shared = turn.shared;
        let policy = &shared.policy;
        let up = shared.membership.up();
        let thorough = self.read_mut(slot).check.is_some();
        let fifo = policy.read_pattern == ReadPattern::Fifo && !thorough;
        let mut threshold = if fifo { 1 } else { policy.threshold };
        if broken!(shared, EarlyReplyBelowThreshold) {
            threshold = (threshold - 1).max(1);
        }
        let read = self.read_mut(slot);
        // Rule V3: without a majority all must answer and agree; anything else is arbitrated.
        let early = (fifo || policy.majority()) && !thorough;
        let awaited = read.pending.intersection(up);
        let agreed = if early {
            read.agreeing >= threshold
        } else {
            let complete = awaited.is_empty() && (!thorough || read.failed.is_empty());
            complete && !read.differs && read.agreeing >= threshold
        };
        // A verifier does not put sectors together: a difference stops it.
        let mixed = || early && !policy.blkverify;
        if agreed
            || (read.differs && mixed() && {
                let buffers = &mut *turn.buffers;
                read.assemble(buffers, threshold)
            })
        {
            self.read_reply(turn, slot);
            return;
        }
        if !awaited.is_empty() {
            // Two answers that a write came between differ, and the third may never come.
            if early && read.deadline.is_none() && read.good.count() >= threshold {
                read.deadline = Some(turn.now.after(turn.grace(read.asked_at)));
                self.arm(turn.now);
            }
            return;
        }
        if fifo && self.read_ask_next(turn, slot) {
            return;
        }
        self.read_arbitrate(turn, slot);
    }

    /// A replica went: it is not waited for any more.
    pub(super) fn read_members_changed<B: Buffers>(
        &mut self,
        turn: &mut Turn<'_, B>,
        slot: SlotId,
    ) {
        if self.read_mut(slot).phase == Phase::Asking {
            self.read_decide(turn, slot);
            self.read_wind_up(turn, slot);
        }
    }

    pub(super) fn read_late<B: Buffers>(&mut self, turn: &mut Turn<'_, B>, slot: SlotId) {
        let read = self.read_mut(slot);
        if read.check.is_some() && !read.differs && read.failed.is_empty() {
            // Who answered agrees. The range is passed over, and met again by the next pass.
            let tag = read.tag;
            read.phase = Phase::Left;
            self.read_abandon(turn, slot);
            self.reply_at_once(turn, tag, Status::IoError);
            return;
        }
        self.read_arbitrate(turn, slot);
    }

    /// Hands the request to a settlement. Answers that are still out are waited for, because of
    /// their buffers, and not looked at: the settlement asks everybody again.
    fn read_arbitrate<B: Buffers>(&mut self, turn: &mut Turn<'_, B>, slot: SlotId) {
        let shared = turn.shared;
        let read = self.read_mut(slot);
        let (tag, range) = (read.tag, read.range);
        let repair = read.check.is_none_or(|check| check.repair);
        let stamp = read.stamp.expect("taken before anybody was asked");
        let explained = read.failed.is_empty() && !shared.order.undisturbed(range, stamp);
        let during = if read.check.is_some() {
            During::Check
        } else {
            During::Read
        };
        read.phase = Phase::Left;
        self.read_abandon(turn, slot);
        if broken!(shared, NoArbitration) {
            self.refuse(turn, tag, range, During::Read);
            return;
        }
        // Rule V5: once more under the exclusive lock before anything is reported.
        let mut matter = Matter::new(range, during, explained);
        matter.repair = repair;
        self.settle_begin(turn, matter, Some(tag));
    }

    /// Fifo: asks the next current replica after an error. Returns whether there was one.
    fn read_ask_next<B: Buffers>(&mut self, turn: &mut Turn<'_, B>, slot: SlotId) -> bool {
        let read = self.read_mut(slot);
        let range = read.range;
        let current = turn
            .shared
            .membership
            .current(turn.shared.geometry.extent_of(range.start()));
        let next = current.minus(read.asked).iter().next();
        let used = read
            .asked
            .iter()
            .find_map(|r| read.ballots.0[r.index()].take());
        let (Some(next), Some(buffer)) = (next, used) else {
            turn.give(used);
            return false;
        };
        read.ballots.0[next.index()] = Some(buffer);
        read.asked.insert(next);
        read.pending.insert(next);
        turn.submit(
            slot,
            next,
            OperationKind::Read {
                range,
                buffer,
                skip_bytes: 0,
            },
        );
        true
    }

    fn read_reply<B: Buffers>(&mut self, turn: &mut Turn<'_, B>, slot: SlotId) {
        let read = self.read_mut(slot);
        let (tag, range, locked, pending) = (read.tag, read.range, read.locked, read.pending);
        let reference = read.reference.expect("who is agreed with is there");
        let data = read.ballots.of(reference);
        read.phase = Phase::Replied;
        read.locked = false;
        self.read_leave_stragglers(slot);
        if !pending.is_empty() {
            self.counters.early_replies += 1;
        }
        self.reply(turn, slot, tag, Status::Ok, Some(data));
        if locked {
            self.unlock(turn, slot, range);
        }
        if broken!(turn.shared, BuffersGivenBackEarly) {
            let read = self.read_mut(slot);
            for replica in read.pending.iter() {
                turn.give(read.ballots.0[replica.index()].take());
            }
        }
    }

    /// Nobody waits for the answers that are out any more.
    fn read_leave_stragglers(&mut self, slot: SlotId) {
        let read = self.read_mut(slot);
        let (pending, deadline) = (read.pending, read.deadline.take());
        for replica in pending.iter() {
            self.stragglers[replica.index()] += 1;
        }
        if deadline.is_some() {
            self.disarm();
        }
    }

    /// A read whose request went elsewhere gives back all it can.
    fn read_abandon<B: Buffers>(&mut self, turn: &mut Turn<'_, B>, slot: SlotId) {
        self.read_leave_stragglers(slot);
        let read = self.read_mut(slot);
        read.ballots.give_except(turn.buffers, read.pending);
        let range = read.range;
        if std::mem::take(&mut read.locked) {
            self.unlock(turn, slot, range);
        }
        if self.read_mut(slot).pending.is_empty() {
            self.activities.remove(slot);
        }
    }

    pub(super) fn read_published<B: Buffers>(&mut self, turn: &mut Turn<'_, B>, slot: SlotId) {
        let read = self.read_mut(slot);
        assert!(
            read.phase == Phase::Replied && !read.published,
            "published once, after the reply"
        );
        read.published = true;
        // Stragglers are compared with the reference; the rest is free.
        let mut kept = read.pending;
        kept.extend(read.reference);
        read.ballots.give_except(turn.buffers, kept);
        self.read_wind_up(turn, slot);
    }

    /// Ends the activity once all answers are in and the reply is published, and sees to it that
    /// what was found wrong is looked at (rules V4, V7).
    fn read_wind_up<B: Buffers>(&mut self, turn: &mut Turn<'_, B>, slot: SlotId) {
        let Some(Activity::Read(read)) = self.activities.get_mut(slot) else {
            return;
        };
        if read.phase == Phase::Left && read.pending.is_empty() {
            self.read_drop(turn, slot);
            return;
        }
        if read.phase != Phase::Replied || !read.pending.is_empty() || !read.published {
            return;
        }
        let range = read.range;
        let stamp = read.stamp.expect("taken before anybody was asked");
        let unexplained = read.differs && turn.shared.order.undisturbed(range, stamp);
        let suspicious = !read.failed.is_empty() || unexplained;
        self.read_drop(turn, slot);
        if suspicious {
            let matter = Matter::new(range, During::Read, false);
            self.settle_in_background(turn, matter);
        }
    }

    /// Gives everything back and forgets the read.
    fn read_drop<B: Buffers>(&mut self, turn: &mut Turn<'_, B>, slot: SlotId) -> Tag {
        let Activity::Read(mut read) = self.activities.remove(slot) else {
            unreachable!("the slot holds a read")
        };
        assert!(
            read.pending.is_empty(),
            "buffers are not given back under an operation (V7)"
        );
        read.ballots.give_all(turn.buffers);
        if read.locked {
            self.unlock(turn, slot, read.range);
        }
        read.tag
    }
}
