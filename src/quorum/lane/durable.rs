// SPDX-License-Identifier: Apache-2.0
//! Activities that wait until marks are durable (rules W2, W4, F2, Y1).

use super::super::Buffers;
use super::super::event::Action;
use super::{Activity, Lane, SlotId, Turn};

impl Lane {
    /// The activity goes on when the marks up to `number` are durable, or never will be.
    pub(super) fn wait_durable<B: Buffers>(
        &mut self,
        turn: &mut Turn<'_, B>,
        slot: SlotId,
        number: u64,
    ) {
        self.waits.push_back((number, slot));
        // Before the next look at what is durable: whoever makes it so sees this, or we see that.
        turn.shared.wait_for_record(self.id);
        turn.actions.push(Action::Record);
    }

    /// The first activity whose marks are durable.
    pub(super) fn take_durable<B: Buffers>(&mut self, turn: &Turn<'_, B>) -> Option<SlotId> {
        let &(number, slot) = self.waits.front()?;
        let shared = turn.shared;
        let ready = || shared.membership.marks().is_settled(number) || shared.is_record_lost();
        // The flag first: more may have been made durable, but not these, and it be taken down.
        let is_ready = ready() || {
            shared.wait_for_record(self.id);
            ready()
        };
        is_ready.then(|| {
            self.waits.pop_front();
            slot
        })
    }

    pub(super) fn run_durable<B: Buffers>(&mut self, turn: &mut Turn<'_, B>, slot: SlotId) {
        match self
            .activities
            .get_mut(slot)
            .expect("who waits for a mark lives")
        {
            Activity::Write(_) => self.write_durable(turn, slot),
            Activity::Settle(_) => self.settle_durable(turn, slot),
            Activity::FlushRun(_) => self.flush_durable(turn, slot),
            Activity::Reconcile(_) => self.reconcile_durable(turn, slot),
            Activity::Read(_)
            | Activity::FlushRequest(_)
            | Activity::Probe(_)
            | Activity::Replied => unreachable!("waits for no mark"),
        }
    }
}
