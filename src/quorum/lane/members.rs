// SPDX-License-Identifier: Apache-2.0
//! Replicas that go: who hangs is kicked, and whoever waits for a replica that went is told.

use super::super::Buffers;
use super::super::event::{Action, KickCause, Report};
use super::{Activity, Lane, Turn};
use crate::units::{ReplicaId, ReplicaSet, Time};

impl Lane {
    /// Declares replicas not up on which an operation takes longer than `io-timeout`.
    pub(super) fn look_for_hung<B: Buffers>(&mut self, turn: &mut Turn<'_, B>) {
        let timeout = turn.shared.policy.io_timeout;
        if turn.now.since(Time::default()) < timeout {
            return;
        }
        let since = turn.now.before(timeout);
        let mut overdue = ReplicaSet::EMPTY;
        let mut swept = std::mem::take(&mut self.swept);
        swept.clear();
        swept.extend(self.activities.ids());
        for &slot in &swept {
            let late = match self.activities.get_mut(slot) {
                Some(Activity::Read(read)) => read.overdue(since),
                Some(Activity::Write(write)) => write.overdue(since),
                Some(Activity::Settle(settle)) => settle.overdue(since),
                Some(Activity::FlushRun(run)) => run.overdue(since),
                Some(Activity::Probe(probe)) => probe.overdue(since),
                Some(Activity::Reconcile(_) | Activity::FlushRequest(_) | Activity::Replied)
                | None => ReplicaSet::EMPTY,
            };
            overdue = overdue.union(late);
        }
        self.swept = swept;
        for replica in overdue.iter() {
            self.kick(turn, replica, KickCause::Hung);
        }
    }

    /// The replica cannot be relied on any more: everybody is told.
    pub(super) fn kick<B: Buffers>(
        &mut self,
        turn: &mut Turn<'_, B>,
        replica: ReplicaId,
        why: KickCause,
    ) {
        let Some(marked) = turn.shared.membership.kick(replica) else {
            return;
        };
        let extents = marked.extents;
        turn.report(Report::Kicked {
            replica,
            why,
            extents,
        });
        turn.actions.push(Action::Kicked { replica, why });
        if marked.wait.is_some() {
            turn.actions.push(Action::Record);
        }
        self.members_changed = true;
    }

    /// Nobody who is not up is waited for any more, and who waited for replicas looks again.
    pub(super) fn tell_members_changed<B: Buffers>(&mut self, turn: &mut Turn<'_, B>) {
        let mut swept = std::mem::take(&mut self.swept);
        swept.clear();
        swept.extend(self.activities.ids());
        for &slot in &swept {
            match self.activities.get_mut(slot) {
                Some(Activity::Read(_)) => self.read_members_changed(turn, slot),
                Some(Activity::Write(_)) => self.write_members_changed(turn, slot),
                Some(Activity::Settle(_)) => self.settle_members_changed(turn, slot),
                Some(Activity::FlushRun(_)) => self.flush_members_changed(turn, slot),
                Some(
                    Activity::Reconcile(_)
                    | Activity::FlushRequest(_)
                    | Activity::Probe(_)
                    | Activity::Replied,
                )
                | None => {}
            }
        }
        self.swept = swept;
        if !self.paused.is_empty()
            && turn.shared.membership.up().count() >= turn.shared.policy.threshold
        {
            self.resume_paused(turn);
        }
    }
}
