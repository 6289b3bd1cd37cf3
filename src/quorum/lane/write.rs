// SPDX-License-Identifier: Apache-2.0
//! Writes, zeroes and discards: order, intent, all current copies, reply (rules L3, W1-W7).

use super::super::event::{
    BehindCause, BufferId, During, LockTicket, OperationKind, Outcome, Report, Status, Tag,
};
use super::super::mutation::broken;
use super::super::{Buffers, LockMode};
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

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    Locking,
    Writing,
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
    /// Replicas that hold the write.
    done: ReplicaSet,
    failed: ReplicaSet,
    errnos: [i32; REPLICAS_MAX],
    repeats: u8,
    started: Time,
    /// When those that are late are left behind; set once T copies hold the write (rule W6).
    grace_until: Option<Time>,
}

impl Write {
    pub(super) fn is_late(&self, now: Time) -> bool {
        self.phase == Phase::Writing && self.grace_until.is_some_and(|until| until <= now)
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
            done: ReplicaSet::EMPTY,
            failed: ReplicaSet::EMPTY,
            errnos: [0; REPLICAS_MAX],
            repeats: 0,
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
        let mut current = shared.membership.current(extent);
        if broken!(shared, WriteClearsBehind) {
            current = shared.membership.replicas();
        }
        if current.count() < shared.policy.threshold {
            // Rule W1: before any replica is touched.
            turn.report(Report::Failure {
                range,
                during: During::Write,
            });
            self.write_reply(turn, slot, Status::IoError);
            return;
        }
        // Rule W2: intent before anything is written.
        shared.membership.make_dirty(extent);
        let write = self.write_mut(slot);
        write.phase = Phase::Writing;
        write.started = turn.now;
        self.write_submit(turn, slot, current);
    }

    fn write_submit<B: Buffers>(
        &mut self,
        turn: &mut Turn<'_, B>,
        slot: SlotId,
        replicas: ReplicaSet,
    ) {
        let write = self.write_mut(slot);
        write.pending = replicas;
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
        match errno_of(outcome) {
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

    fn write_decide<B: Buffers>(&mut self, turn: &mut Turn<'_, B>, slot: SlotId, late: bool) {
        let shared = turn.shared;
        let mut threshold = shared.policy.threshold;
        if broken!(shared, AcknowledgeBelowThreshold) {
            threshold = 1;
        }
        let write = self.write_mut(slot);
        if !write.pending.is_empty() {
            if write.done.count() < threshold {
                return;
            }
            if !late && !broken!(shared, AcknowledgeBelowThreshold) {
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
        if let Some(marked) = shared.membership.settle_for(extent, holders) {
            // Every current copy holds it: whatever was undecided here is decided.
            shared.unresolved.remove(range);
            let extent = shared.geometry.extent_range(extent);
            for replica in marked.iter() {
                let why = self.write_mut(slot).behind_cause(replica);
                turn.report(Report::Behind {
                    replica,
                    extent,
                    why,
                });
            }
            self.write_reply(turn, slot, Status::Ok);
            return;
        }
        let write = self.write_mut(slot);
        if !write.pending.is_empty() {
            // Too few without the late ones: wait for them (rule W6, last clause).
            write.grace_until = None;
            self.disarm();
            return;
        }
        // Somebody may have fallen behind because of another write in the extent (rule W3).
        let again = failed.intersection(shared.membership.current(extent));
        if write.repeats < REPEATS_MAX && !again.is_empty() {
            // Rule W7: again, under the same lock.
            write.repeats += 1;
            write.failed = failed.minus(again);
            self.write_submit(turn, slot, again);
            return;
        }
        // Old or new, fixed by the first read.
        if !broken!(shared, FailedWriteNotUnresolved) {
            shared.unresolved.insert(range);
        }
        turn.report(Report::Failure {
            range,
            during: During::Write,
        });
        self.write_reply(turn, slot, Status::IoError);
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
        let (tag, range) = (write.tag, write.range);
        write.phase = Phase::Replied;
        if write.grace_until.take().is_some() {
            self.disarm();
        }
        self.reply(turn, slot, tag, status, None);
        if broken!(turn.shared, LockReleasedBeforePublication) {
            let write = self.write_mut(slot);
            if std::mem::take(&mut write.locked) {
                self.unlock(turn, slot, range);
            }
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
