// SPDX-License-Identifier: Apache-2.0
//! Writes, zeroes and discards: order, intent, all current copies, reply (rules L3, W1-W7).

use super::super::event::{
    Action, BehindCause, BufferId, During, LockTicket, OperationKind, Outcome, Report, Status, Tag,
};
use super::super::membership::{Intent, Settled};
use super::super::mutation::broken;
use super::super::{Buffers, LockMode};
use super::reconcile::Waiter;
use super::{Activity, Lane, SlotId, Turn, errno_of};
use crate::units::{REPLICAS_MAX, ReplicaId, ReplicaSet, SectorRange, Time};

/// How often a write that fewer than T copies took is repeated in place (rule W7).
const REPEATS_MAX: u8 = 3;

/// What the sectors are to hold.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Content {
    /// These bytes, copied from the guest once (rule L4).
    Data(BufferId),
    /// Zeroes, by whatever method each replica has (rule Z1).
    Zeroes {
        /// Whether space may be given back.
        unmap: bool,
    },
}

/// ```text
/// Locking -> Intent -> Writing -> Marking -> Replied
///    ^         |D*, B*    |       |B*
///    +- Suspended <-------+
/// ```
/// Suspended: too few copies are current, before anything was written or in the end; a resync or a
/// replica's return is waited for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    Locking,
    /// Has lost its lock for a while, not its place (rule V6).
    Suspended,
    /// Waits until the record says that the extent is dirty (rule W2).
    Intent,
    Writing,
    /// Waits until the record says who lacks the write (rule W4).
    Marking,
    Replied,
}

/// A write in flight.
pub(super) struct Write {
    tag: Tag,
    range: SectorRange,
    content: Content,
    /// The buffer of the data was given back.
    data_given: bool,
    phase: Phase,
    locked: bool,
    published: bool,
    /// Replicas that have not answered.
    pending: ReplicaSet,
    /// Those of them that nobody waits for and that may still be written to.
    strays: ReplicaSet,
    /// Replicas that hold the write.
    done: ReplicaSet,
    failed: ReplicaSet,
    errnos: [i32; REPLICAS_MAX],
    repeats: u8,
    /// Something was written for it, at some time.
    touched: bool,
    /// Its extent was resynced for it; it is not done a second time.
    reconciled: bool,
    /// How often that was done in vain.
    attempts: u8,
    started: Time,
    /// When those that are late are left behind; set once T copies hold the write (rule W6).
    grace_until: Option<Time>,
}

impl Write {
    pub(super) fn is_late(&self, now: Time) -> bool {
        self.phase == Phase::Writing && self.grace_until.is_some_and(|until| until <= now)
    }

    /// Replicas that have not answered since `since` or longer.
    pub(super) fn overdue(&self, since: Time) -> ReplicaSet {
        if self.started <= since {
            self.pending
        } else {
            ReplicaSet::EMPTY
        }
    }

    fn operation(&self) -> OperationKind {
        match self.content {
            Content::Data(buffer) => OperationKind::Write {
                range: self.range,
                buffer,
                skip_bytes: 0,
            },
            Content::Zeroes { unmap } => OperationKind::WriteZeroes {
                range: self.range,
                unmap,
            },
        }
    }

    fn take_data(&mut self) -> Option<BufferId> {
        match self.content {
            Content::Data(buffer) if !self.data_given => {
                self.data_given = true;
                Some(buffer)
            }
            Content::Data(_) | Content::Zeroes { .. } => None,
        }
    }

    fn behind_cause(&self, replica: ReplicaId) -> BehindCause {
        if self.pending.contains(replica) {
            BehindCause::Late
        } else {
            BehindCause::WriteFailed(self.errnos[replica.index()])
        }
    }
}

impl Lane {
    fn write_mut(&mut self, slot: SlotId) -> &mut Write {
        match self.activities.get_mut(slot) {
            Some(Activity::Write(write)) => write,
            _ => unreachable!("the slot holds a write"),
        }
    }

    pub(super) fn write_begin<B: Buffers>(
        &mut self,
        turn: &mut Turn<'_, B>,
        tag: Tag,
        range: SectorRange,
        content: Content,
    ) {
        assert!(
            turn.shared.geometry.admits(range),
            "write of {range} is not cut right"
        );
        let slot = self.activities.insert(Activity::Write(Write {
            tag,
            range,
            content,
            data_given: false,
            phase: Phase::Locking,
            locked: true,
            published: false,
            pending: ReplicaSet::EMPTY,
            strays: ReplicaSet::EMPTY,
            done: ReplicaSet::EMPTY,
            failed: ReplicaSet::EMPTY,
            errnos: [0; REPLICAS_MAX],
            repeats: 0,
            touched: false,
            reconciled: false,
            attempts: 0,
            started: turn.now,
            grace_until: None,
        }));
        if broken!(turn.shared, WritesUnordered) {
            self.write_mut(slot).locked = false;
            self.write_granted(turn, slot);
        } else if self.lock(turn, slot, range, LockMode::Exclusive) {
            self.write_granted(turn, slot);
        }
    }

    pub(super) fn write_granted<B: Buffers>(&mut self, turn: &mut Turn<'_, B>, slot: SlotId) {
        let shared = turn.shared;
        let range = self.write_mut(slot).range;
        let extent = shared.geometry.extent_of(range.start());
        let mut intent = shared.membership.intend(extent);
        if broken!(shared, WriteBeforeIntent)
            && let Intent::Wait(_) = intent
        {
            turn.actions.push(Action::Record);
            intent = Intent::Ready(shared.membership.current(extent));
        }
        if broken!(shared, WriteClearsBehind) {
            intent = Intent::Ready(shared.membership.replicas());
        }
        match intent {
            Intent::TooFew => self.write_without_quorum(turn, slot),
            // Rule W2: intent before anything is written.
            Intent::Wait(number) => {
                self.write_mut(slot).phase = Phase::Intent;
                self.wait_durable(turn, slot, number);
            }
            Intent::Ready(targets) => {
                let write = self.write_mut(slot);
                write.phase = Phase::Writing;
                write.started = turn.now;
                // What an earlier attempt came to proves nothing after a suspension.
                write.done = ReplicaSet::EMPTY;
                write.failed = ReplicaSet::EMPTY;
                write.repeats = 0;
                write.touched = true;
                self.write_submit(turn, slot, targets);
            }
        }
    }

    /// Rules W1, V6: fewer than T copies are current, before any replica is touched, or because some
    /// went while they were written.
    fn write_without_quorum<B: Buffers>(&mut self, turn: &mut Turn<'_, B>, slot: SlotId) {
        let shared = turn.shared;
        let write = self.write_mut(slot);
        let (range, reconciled, locked) = (write.range, write.reconciled, write.locked);
        let extent = shared.geometry.extent_of(range.start());
        let threshold = shared.policy.threshold;
        if locked && !reconciled && self.can_reconcile(turn, extent, threshold) {
            // First this, then the lock: the resync is granted it before anybody else.
            self.reconcile_for(turn, extent, Waiter::Write(slot));
            self.write_suspend(turn, slot);
        } else if locked && self.shall_pause(turn, threshold) {
            self.paused.push(Waiter::Write(slot));
            self.write_suspend(turn, slot);
        } else {
            self.write_fail(turn, slot);
        }
    }

    fn write_suspend<B: Buffers>(&mut self, turn: &mut Turn<'_, B>, slot: SlotId) {
        let write = self.write_mut(slot);
        write.phase = Phase::Suspended;
        if write.grace_until.take().is_some() {
            self.disarm();
        }
        self.write_leave_strays(turn, slot);
        let (range, ticket) = (self.write_mut(slot).range, LockTicket(slot.pack()));
        turn.shared
            .order
            .suspend(range, self.id, ticket, &mut self.woken);
        self.wake(turn.actions);
    }

    /// How often the extent of a suspended write was brought into order in vain.
    pub(super) fn write_attempts(&mut self, slot: SlotId) -> &mut u8 {
        &mut self.write_mut(slot).attempts
    }

    /// What the write was suspended for is over.
    pub(super) fn write_resume<B: Buffers>(
        &mut self,
        turn: &mut Turn<'_, B>,
        slot: SlotId,
        reconciled: bool,
    ) {
        let write = self.write_mut(slot);
        assert!(write.phase == Phase::Suspended, "resumed once");
        write.phase = Phase::Locking;
        write.reconciled = reconciled;
        let (range, ticket) = (write.range, LockTicket(slot.pack()));
        turn.shared
            .order
            .resume(range, self.id, ticket, &mut self.woken);
        self.wake(turn.actions);
    }

    /// The write was suspended and is not to be done any more.
    pub(super) fn write_abandon<B: Buffers>(&mut self, turn: &mut Turn<'_, B>, slot: SlotId) {
        let write = self.write_mut(slot);
        assert!(write.phase == Phase::Suspended, "nobody waits for it");
        write.locked = false;
        let (range, ticket) = (write.range, LockTicket(slot.pack()));
        turn.shared
            .order
            .abandon(range, self.id, ticket, &mut self.woken);
        self.wake(turn.actions);
        self.write_fail(turn, slot);
    }

    /// Nothing was written, or not enough can be remembered about what was.
    fn write_fail<B: Buffers>(&mut self, turn: &mut Turn<'_, B>, slot: SlotId) {
        let range = self.write_mut(slot).range;
        turn.report(Report::Failure {
            range,
            during: During::Write,
        });
        self.write_reply(turn, slot, Status::IoError);
    }

    /// Marks that the write waited for are durable, or never will be.
    pub(super) fn write_durable<B: Buffers>(&mut self, turn: &mut Turn<'_, B>, slot: SlotId) {
        let lost = turn.shared.is_record_lost();
        let write = self.write_mut(slot);
        let range = write.range;
        match write.phase {
            Phase::Intent if lost => self.write_fail(turn, slot),
            Phase::Intent => self.write_granted(turn, slot),
            Phase::Marking if lost => {
                // T copies hold it, and a restart would not know who does not: old or new, fixed by
                // the first read.
                turn.shared.unresolved.insert(range);
                self.write_fail(turn, slot);
            }
            Phase::Marking => self.write_decide(turn, slot, true),
            Phase::Locking | Phase::Suspended | Phase::Writing | Phase::Replied => {
                unreachable!("waits for no mark")
            }
        }
        self.write_wind_up(turn, slot);
    }

    fn write_submit<B: Buffers>(
        &mut self,
        turn: &mut Turn<'_, B>,
        slot: SlotId,
        replicas: ReplicaSet,
    ) {
        let write = self.write_mut(slot);
        // Operations on replicas that went meanwhile may still be out.
        assert!(
            write.pending.intersection(replicas).is_empty(),
            "one operation on a replica at a time"
        );
        write.pending = write.pending.union(replicas);
        let kind = write.operation();
        for replica in replicas.iter() {
            turn.submit(slot, replica, kind);
        }
    }

    pub(super) fn write_completed<B: Buffers>(
        &mut self,
        turn: &mut Turn<'_, B>,
        slot: SlotId,
        replica: ReplicaId,
        outcome: Outcome,
    ) {
        let write = self.write_mut(slot);
        assert!(
            write.pending.contains(replica),
            "one answer from each replica written to"
        );
        write.pending.remove(replica);
        let (range, stray) = (write.range, write.strays.contains(replica));
        if stray {
            write.strays.remove(replica);
            let extent = turn.shared.geometry.extent_of(range.start());
            turn.shared.membership.end_stray(extent, replica);
        }
        match errno_of(outcome) {
            // Written before a suspension, maybe, and since then by others.
            _ if stray => {}
            None => write.done.insert(replica),
            Some(errno) => {
                write.failed.insert(replica);
                write.errnos[replica.index()] = errno;
            }
        }
        if write.phase == Phase::Writing {
            self.write_decide(turn, slot, false);
        }
        self.write_wind_up(turn, slot);
    }

    pub(super) fn write_late<B: Buffers>(&mut self, turn: &mut Turn<'_, B>, slot: SlotId) {
        self.write_decide(turn, slot, true);
        self.write_wind_up(turn, slot);
    }

    /// A replica went: it is not waited for any more.
    pub(super) fn write_members_changed<B: Buffers>(
        &mut self,
        turn: &mut Turn<'_, B>,
        slot: SlotId,
    ) {
        if self.write_mut(slot).phase == Phase::Writing {
            self.write_decide(turn, slot, false);
            self.write_wind_up(turn, slot);
        }
    }

    fn write_decide<B: Buffers>(&mut self, turn: &mut Turn<'_, B>, slot: SlotId, late: bool) {
        let shared = turn.shared;
        let mut threshold = shared.policy.threshold;
        if broken!(shared, AcknowledgeBelowThreshold) {
            threshold = 1;
        }
        let up = shared.membership.up();
        let write = self.write_mut(slot);
        let awaited = write.pending.minus(write.strays).intersection(up);
        if !awaited.is_empty() && write.phase == Phase::Writing {
            if write.done.count() < threshold {
                return;
            }
            let lagging = shared.membership.lagging().contains_all(awaited);
            if !late && !lagging && !broken!(shared, AcknowledgeBelowThreshold) {
                self.write_arm_grace(turn, slot);
                return;
            }
        }
        let (range, done, failed) = (write.range, write.done, write.failed);
        let extent = shared.geometry.extent_of(range.start());
        let mut holders = done;
        if broken!(shared, FailedWriteNotMarked | AcknowledgeBelowThreshold) {
            holders = done.union(failed).union(write.pending);
        }
        if broken!(shared, LateWriteNotMarked) {
            holders = done.union(write.pending);
        }
        // Rules W4, W5: everybody else is behind before the guest hears of it.
        if let Settled::Held { marked, wait } = shared.membership.settle_for(extent, holders) {
            self.write_held(turn, slot, marked, wait);
            return;
        }
        let write = self.write_mut(slot);
        if !awaited.is_empty() && write.phase == Phase::Writing {
            // Too few without the late ones: wait for them (rule W6, last clause).
            if write.grace_until.take().is_some() {
                self.disarm();
            }
            return;
        }
        // Somebody may have fallen behind because of another write in the extent (rule W3).
        let again = failed.intersection(shared.membership.current(extent));
        if write.phase == Phase::Writing && write.repeats < REPEATS_MAX && !again.is_empty() {
            // Rule W7: again, under the same lock.
            write.repeats += 1;
            write.failed = failed.minus(again);
            write.started = turn.now;
            self.write_submit(turn, slot, again);
            return;
        }
        // Old or new, fixed by the first read.
        if !broken!(shared, FailedWriteNotUnresolved) {
            shared.unresolved.insert(range);
        }
        if shared.membership.current(extent).count() < shared.policy.threshold {
            // Rule V6: replicas went, and this waits for them or for others like any request.
            self.write_without_quorum(turn, slot);
        } else {
            self.write_fail(turn, slot);
        }
    }

    /// T copies hold the write and everybody else is behind there.
    fn write_held<B: Buffers>(
        &mut self,
        turn: &mut Turn<'_, B>,
        slot: SlotId,
        marked: ReplicaSet,
        wait: Option<u64>,
    ) {
        let shared = turn.shared;
        let range = self.write_mut(slot).range;
        let number = shared.geometry.extent_of(range.start());
        let extent = shared.geometry.extent_range(number);
        for replica in marked.iter() {
            let why = self.write_mut(slot).behind_cause(replica);
            turn.report(Report::Behind {
                replica,
                extent,
                why,
            });
            if why == BehindCause::Late && shared.membership.note_late(replica, turn.now) {
                turn.report(Report::Lagging { replica });
            }
        }
        if let Some(wait) = wait
            && !broken!(shared, AcknowledgeBeforeBehind)
        {
            let write = self.write_mut(slot);
            write.phase = Phase::Marking;
            if write.grace_until.take().is_some() {
                self.disarm();
            }
            self.wait_durable(turn, slot, wait);
            return;
        }
        if wait.is_some() {
            turn.actions.push(Action::Record);
        }
        // Every current copy holds it: whatever was undecided here is decided.
        shared.unresolved.remove(range);
        self.write_reply(turn, slot, Status::Ok);
    }

    fn write_arm_grace<B: Buffers>(&mut self, turn: &mut Turn<'_, B>, slot: SlotId) {
        let write = self.write_mut(slot);
        if write.grace_until.is_some() {
            return;
        }
        write.grace_until = Some(turn.now.after(turn.grace(write.started)));
        self.arm(turn.now);
    }

    fn write_reply<B: Buffers>(&mut self, turn: &mut Turn<'_, B>, slot: SlotId, status: Status) {
        let write = self.write_mut(slot);
        let (tag, range, touched) = (write.tag, write.range, write.touched);
        write.phase = Phase::Replied;
        if write.grace_until.take().is_some() {
            self.disarm();
        }
        let extent = turn.shared.geometry.extent_of(range.start());
        if touched {
            turn.shared.activity.note(extent, turn.now);
        }
        self.write_leave_strays(turn, slot);
        self.reply(turn, slot, tag, status, None);
        if broken!(turn.shared, LockReleasedBeforePublication) {
            let write = self.write_mut(slot);
            if std::mem::take(&mut write.locked) {
                self.unlock(turn, slot, range);
            }
        }
    }

    /// Operations that are still out when the lock is lost, or the reply given, may land at any time.
    fn write_leave_strays<B: Buffers>(&mut self, turn: &mut Turn<'_, B>, slot: SlotId) {
        let write = self.write_mut(slot);
        let new = write.pending.minus(write.strays);
        write.strays = write.pending;
        let extent = turn.shared.geometry.extent_of(write.range.start());
        for replica in new.iter() {
            turn.shared.membership.leave_stray(extent, replica);
        }
    }

    /// Complete, but published later: settlements may pass, writes may not (rules L3, Q3).
    pub(super) fn write_deferred<B: Buffers>(&mut self, turn: &mut Turn<'_, B>, slot: SlotId) {
        if broken!(turn.shared, DeferredIgnored) {
            return;
        }
        let write = self.write_mut(slot);
        assert!(
            write.phase == Phase::Replied && !write.published,
            "deferred after the reply"
        );
        if write.locked {
            let (range, ticket) = (write.range, LockTicket(slot.pack()));
            turn.shared
                .order
                .defer(range, self.id, ticket, &mut self.woken);
            self.wake(turn.actions);
        }
    }

    pub(super) fn write_published<B: Buffers>(&mut self, turn: &mut Turn<'_, B>, slot: SlotId) {
        let write = self.write_mut(slot);
        assert!(
            write.phase == Phase::Replied && !write.published,
            "published once, when replied"
        );
        write.published = true;
        let (range, locked) = (write.range, std::mem::take(&mut write.locked));
        // Rule L3: not before this moment. Who has not completed is marked behind.
        if locked {
            self.unlock(turn, slot, range);
        }
        self.write_wind_up(turn, slot);
    }

    fn write_wind_up<B: Buffers>(&mut self, turn: &mut Turn<'_, B>, slot: SlotId) {
        let Some(Activity::Write(write)) = self.activities.get_mut(slot) else {
            return;
        };
        if write.phase != Phase::Replied || !write.pending.is_empty() {
            return;
        }
        // The data are on the replicas; only the lock waits for the publication. A large request
        // of the guest needs the buffer for its later parts.
        if let Some(buffer) = write.take_data() {
            turn.buffers.give(buffer);
        }
        if write.published {
            self.activities.remove(slot);
        }
    }
}
