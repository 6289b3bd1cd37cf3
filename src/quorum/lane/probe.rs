// SPDX-License-Identifier: Apache-2.0
//! Probes: one read of one replica, to see whether it answers in time again (rule W6).

use super::super::event::{OperationKind, Outcome, Status, Tag};
use super::super::{Buffers, Purpose};
use super::{Activity, BufferId, Lane, SlotId, Turn, errno_of};
use crate::units::{ReplicaId, ReplicaSet, SectorRange, Time};

/// A probe in flight.
pub(super) struct Probe {
    tag: Tag,
    replica: ReplicaId,
    buffer: BufferId,
    asked_at: Time,
    replied: bool,
}

impl Probe {
    /// The replica, if it has not answered since `since` or longer.
    pub(super) fn overdue(&self, since: Time) -> ReplicaSet {
        let late = !self.replied && self.asked_at <= since;
        late.then_some(self.replica).into_iter().collect()
    }
}

impl Lane {
    pub(super) fn probe_begin<B: Buffers>(
        &mut self,
        turn: &mut Turn<'_, B>,
        tag: Tag,
        replica: ReplicaId,
        range: SectorRange,
    ) {
        assert!(
            turn.shared.geometry.admits(range),
            "probe of {range} is not cut right"
        );
        let Some(buffer) = turn.buffers.take(range.len_bytes(), Purpose::Guest) else {
            self.reply_at_once(turn, tag, Status::IoError);
            return;
        };
        let slot = self.activities.insert(Activity::Probe(Probe {
            tag,
            replica,
            buffer,
            asked_at: turn.now,
            replied: false,
        }));
        let kind = OperationKind::Read {
            range,
            buffer,
            skip_bytes: 0,
        };
        turn.submit(slot, replica, kind);
    }

    pub(super) fn probe_completed<B: Buffers>(
        &mut self,
        turn: &mut Turn<'_, B>,
        slot: SlotId,
        outcome: Outcome,
    ) {
        let Some(Activity::Probe(probe)) = self.activities.get_mut(slot) else {
            unreachable!("the slot holds a probe")
        };
        probe.replied = true;
        let (tag, buffer) = (probe.tag, probe.buffer);
        turn.buffers.give(buffer);
        let status = match errno_of(outcome) {
            None => Status::Ok,
            Some(_) => Status::IoError,
        };
        self.reply(turn, slot, tag, status, None);
    }
}
