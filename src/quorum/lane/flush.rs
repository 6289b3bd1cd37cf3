// SPDX-License-Identifier: Apache-2.0
//! Flushes: one run at a time over all replicas, shared by who waits (rules F1-F3).

use super::super::Buffers;
use super::super::event::{
    Action, During, FlushEnd, KickCause, OperationKind, Outcome, Report, Status, Tag, Wakeup,
};
use super::super::flush_gate::Join;
use super::super::mutation::broken;
use super::reconcile::{ATTEMPTS_MAX, Waiter};
use super::{Activity, ETIMEDOUT, Lane, SlotId, Turn, errno_of};
use crate::units::{REPLICAS_MAX, ReplicaId, ReplicaSet, SectorRange, Time};

/// Who wants to be covered by a run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum FlushFor {
    /// A request; its slot is that of the flush request.
    Request(Tag),
    /// An extent that was brought into order.
    Reconcile(SlotId),
    /// A settlement of sectors in U.
    Settle(SlotId),
}

/// Waits for the run that covers it.
pub(super) struct FlushRequest {
    whom: FlushFor,
    run: u64,
    /// How often in a row an extent was brought into order for it in vain.
    attempts: u8,
}

/// One flush of every replica, in parallel.
pub(super) struct FlushRun {
    run: u64,
    pending: ReplicaSet,
    done: ReplicaSet,
    errnos: [i32; REPLICAS_MAX],
    /// c(i) of everybody when the run began.
    counters: [u32; REPLICAS_MAX],
    started: Time,
    deadline: Option<Time>,
    /// All that matter have answered; marks may still be waited for.
    ended: bool,
    /// What is to be told once the marks are durable.
    verdict: Option<FlushEnd>,
    told: bool,
}

impl FlushRun {
    pub(super) fn is_late(&self, now: Time) -> bool {
        self.deadline.is_some_and(|deadline| deadline <= now)
    }

    /// Replicas that have not answered since `since` or longer.
    pub(super) fn overdue(&self, since: Time) -> ReplicaSet {
        if self.started <= since {
            self.pending
        } else {
            ReplicaSet::EMPTY
        }
    }
}

impl<B> Turn<'_, B> {
    /// No part of the disk is known to be durable on enough replicas.
    fn report_flush_failure(&mut self) {
        let sectors = u32::try_from(self.shared.geometry.sectors()).unwrap_or(u32::MAX);
        let range = SectorRange::new(0, sectors).expect("a disk is not empty");
        self.actions.push(Action::Report(Report::Failure {
            range,
            during: During::Flush,
        }));
    }
}

impl Lane {
    fn run_mut(&mut self, slot: SlotId) -> &mut FlushRun {
        match self.activities.get_mut(slot) {
            Some(Activity::FlushRun(run)) => run,
            _ => unreachable!("the slot holds a flush run"),
        }
    }

    /// Waits for a run that begins from now on.
    pub(super) fn flush_for<B: Buffers>(&mut self, turn: &mut Turn<'_, B>, whom: FlushFor) {
        let run = self.flush_join(turn);
        let slot = self.activities.insert(Activity::FlushRequest(FlushRequest {
            whom,
            run,
            attempts: 0,
        }));
        self.flushes.push(slot);
    }

    fn flush_join<B: Buffers>(&mut self, turn: &mut Turn<'_, B>) -> u64 {
        let join = turn.shared.flushes.join(self.id);
        let (Join::Start(run) | Join::Wait(run)) = join;
        self.run_due |= matches!(join, Join::Start(_));
        run
    }

    fn flush_request_mut(&mut self, slot: SlotId) -> &mut FlushRequest {
        match self.activities.get_mut(slot) {
            Some(Activity::FlushRequest(request)) => request,
            _ => unreachable!("a flush request lives until it is published"),
        }
    }

    /// How often in a row an extent was brought into order for a flush request in vain.
    pub(super) fn flush_attempts(&mut self, slot: SlotId) -> &mut u8 {
        &mut self.flush_request_mut(slot).attempts
    }

    /// A flush request that waited for replicas to come back, or for an extent to be brought into
    /// order. All of these first, then another run.
    pub(super) fn flush_again<B: Buffers>(&mut self, turn: &mut Turn<'_, B>, slot: SlotId) {
        let up = turn.shared.membership.up();
        if let Some(extent) = turn.shared.lacking_flush(up)
            && self.flush_await(turn, slot, extent)
        {
            return;
        }
        let joined = self.flush_join(turn);
        self.flush_request_mut(slot).run = joined;
        self.flushes.push(slot);
    }

    /// Fewer than T replicas can make durable what was written in `extent`: if others can be brought
    /// up to date, that is waited for (rule V6).
    fn flush_await<B: Buffers>(
        &mut self,
        turn: &mut Turn<'_, B>,
        slot: SlotId,
        extent: u64,
    ) -> bool {
        let can = *self.flush_attempts(slot) < ATTEMPTS_MAX
            && self.can_reconcile(turn, extent, turn.shared.policy.threshold);
        if can {
            self.reconcile_for(turn, extent, Waiter::Flush(slot));
        }
        can
    }

    /// A flush request that waits for replicas to come back is to fail.
    pub(super) fn flush_refuse<B: Buffers>(&mut self, turn: &mut Turn<'_, B>, slot: SlotId) {
        let whom = self.flush_request_mut(slot).whom;
        if let FlushFor::Request(tag) = whom {
            self.reply(turn, slot, tag, Status::IoError, None);
        }
    }

    /// Begins the run that is this lane's.
    pub(super) fn flush_begin<B: Buffers>(&mut self, turn: &mut Turn<'_, B>) {
        let shared = turn.shared;
        let members = &shared.membership;
        let run = shared.flushes.run();
        // Before any flush is submitted: writes that end from here on are not covered.
        shared.activity.begin_run(run);
        // One flush at a time on each replica: who still works on an earlier one fails this one.
        let asked = members.up().minus(shared.flushes.unanswered());
        let mut counters = [0; REPLICAS_MAX];
        for replica in members.replicas().iter() {
            counters[replica.index()] = members.counter(replica);
        }
        let slot = self.activities.insert(Activity::FlushRun(FlushRun {
            run,
            pending: asked,
            done: ReplicaSet::EMPTY,
            errnos: [ETIMEDOUT; REPLICAS_MAX],
            counters,
            started: turn.now,
            deadline: None,
            ended: false,
            verdict: None,
            told: false,
        }));
        for replica in asked.iter() {
            turn.submit(slot, replica, OperationKind::Flush);
        }
        if asked.is_empty() {
            self.flush_end(turn, slot);
            self.flush_wind_up(slot);
        }
    }

    pub(super) fn flush_completed<B: Buffers>(
        &mut self,
        turn: &mut Turn<'_, B>,
        slot: SlotId,
        replica: ReplicaId,
        outcome: Outcome,
    ) {
        let shared = turn.shared;
        let run = self.run_mut(slot);
        assert!(
            run.pending.contains(replica),
            "one answer from each replica flushed"
        );
        run.pending.remove(replica);
        let (ended, number) = (run.ended, run.run);
        let fresh = run.counters[replica.index()] == shared.membership.counter(replica)
            && shared.membership.up().contains(replica);
        if ended {
            shared.flushes.answered(replica);
        }
        match errno_of(outcome) {
            Some(errno) => {
                run.errnos[replica.index()] = errno;
                if broken!(shared, FlushErrorForgotten | FailedFlushNotMarked) {
                    if broken!(shared, FlushErrorForgotten) && !ended {
                        self.run_mut(slot).done.insert(replica);
                    }
                } else if fresh {
                    // Rule F3: it counts from now on, whatever becomes of the run, also one that
                    // ended before: it may be about what was written since.
                    self.flush_failed(turn, replica, errno);
                }
            }
            // A flush from before a kick proves nothing about the replica.
            None if fresh => {
                run.done.insert(replica);
                shared.activity.flushed(replica, number);
            }
            None => {}
        }
        self.flush_decide(turn, slot);
        self.flush_wind_up(slot);
    }

    /// Ends the run if nobody is left to wait for.
    pub(super) fn flush_decide<B: Buffers>(&mut self, turn: &mut Turn<'_, B>, slot: SlotId) {
        let shared = turn.shared;
        let members = &shared.membership;
        if self.run_mut(slot).ended {
            return;
        }
        let enough = self.flush_is_enough(turn, slot);
        let run = self.run_mut(slot);
        let mut awaited = run.pending.intersection(members.up());
        if enough {
            // Rule F2: who lags is not waited for.
            awaited = awaited.minus(members.lagging());
        }
        if awaited.is_empty() {
            self.flush_end(turn, slot);
        } else if enough && run.deadline.is_none() {
            run.deadline = Some(turn.now.after(shared.policy.flush_grace));
            self.arm(turn.now);
        }
    }

    /// Whether the flushes that have succeeded will do. Somebody may be flushed and behind: then the
    /// others are not left out for being slow (invariant I5).
    fn flush_is_enough<B: Buffers>(&mut self, turn: &Turn<'_, B>, slot: SlotId) -> bool {
        let done = self.run_mut(slot).done;
        done.count() >= turn.shared.policy.threshold && turn.shared.lacking_flush(done).is_none()
    }

    /// Rule F3: a flush error counts at the moment it is seen, and no other flush will report it
    /// again: the replica is behind in all that is dirty, and opened anew before it is relied on. If
    /// too few would be left meanwhile it stays, without what may be lost on it.
    fn flush_failed<B: Buffers>(&mut self, turn: &mut Turn<'_, B>, replica: ReplicaId, errno: i32) {
        let members = &turn.shared.membership;
        let mut others = members.up();
        others.remove(replica);
        if others.count() >= turn.shared.policy.threshold {
            self.kick(turn, replica, KickCause::FlushFailed(errno));
        } else {
            members.note_unflushable(replica);
            members.mark_behind_where_dirty(replica);
        }
        let extents = turn.shared.membership.behind_extents(replica);
        turn.report(Report::FlushFailed {
            replica,
            errno,
            extents,
        });
    }

    pub(super) fn flush_late<B: Buffers>(&mut self, turn: &mut Turn<'_, B>, slot: SlotId) {
        if !self.flush_is_enough(turn, slot) {
            // Somebody has fallen behind meanwhile, and who is late is needed.
            self.run_mut(slot).deadline = None;
            self.disarm();
            return;
        }
        // Rule F2: it had its time.
        let late = self.run_mut(slot).pending;
        let up = turn.shared.membership.up();
        for replica in late.intersection(up).iter() {
            if !broken!(turn.shared, FailedFlushNotMarked) {
                self.flush_failed(turn, replica, ETIMEDOUT);
            }
        }
        self.flush_end(turn, slot);
        self.flush_wind_up(slot);
    }

    /// The run ends: whoever did not succeed is behind in all that is dirty (rule F2), and that is
    /// durable before anybody is told that it succeeded.
    fn flush_end<B: Buffers>(&mut self, turn: &mut Turn<'_, B>, slot: SlotId) {
        let shared = turn.shared;
        let run = self.run_mut(slot);
        if !run.ended {
            run.ended = true;
            for replica in run.pending.iter() {
                shared.flushes.leave_unanswered(replica);
            }
        }
        let done = run.done;
        if run.deadline.take().is_some() {
            self.disarm();
        }
        let mut ok = done.count() >= shared.policy.threshold;
        let mut wait = None;
        for replica in shared.membership.replicas().minus(done).iter() {
            if broken!(shared, FailedFlushNotMarked) {
                continue;
            }
            let marked = shared.membership.mark_behind_where_dirty(replica);
            ok &= marked.complete;
            wait = wait.max(marked.wait);
        }
        // After the marks: a replica that was flushed and kicked since does not count any more.
        let lacking = shared
            .lacking_flush(done)
            .filter(|_| !broken!(shared, FlushOfCopiesBehind));
        let end = match lacking {
            _ if !ok => FlushEnd::Failed,
            Some(extent) => FlushEnd::Lacking { extent },
            None => FlushEnd::Durable,
        };
        self.run_mut(slot).verdict = Some(end);
        match wait {
            // What becomes dirty from here on is nothing that this run covers.
            Some(wait) if end == FlushEnd::Durable && !broken!(shared, AcknowledgeBeforeBehind) => {
                self.wait_durable(turn, slot, wait);
            }
            Some(_) | None => self.flush_tell(turn, slot, end),
        }
    }

    /// Marks that the run waited for are durable, or never will be.
    pub(super) fn flush_durable<B: Buffers>(&mut self, turn: &mut Turn<'_, B>, slot: SlotId) {
        let mut end = self.run_mut(slot).verdict.expect("it has ended");
        if turn.shared.is_record_lost() {
            end = FlushEnd::Failed;
        }
        self.flush_tell(turn, slot, end);
        self.flush_wind_up(slot);
    }

    fn flush_tell<B: Buffers>(&mut self, turn: &mut Turn<'_, B>, slot: SlotId, end: FlushEnd) {
        let run = self.run_mut(slot);
        run.told = true;
        match end {
            FlushEnd::Durable => turn.shared.activity.covered(run.run),
            FlushEnd::Failed => turn.report_flush_failure(),
            FlushEnd::Lacking { .. } => {}
        }
        self.flush_publish(turn, end);
    }

    /// A replica went: it is not waited for any more.
    pub(super) fn flush_members_changed<B: Buffers>(
        &mut self,
        turn: &mut Turn<'_, B>,
        slot: SlotId,
    ) {
        self.flush_decide(turn, slot);
        self.flush_wind_up(slot);
    }

    /// Tells everybody who waits for the run that ended, and has the next one begun.
    fn flush_publish<B: Buffers>(&mut self, turn: &mut Turn<'_, B>, end: FlushEnd) {
        let finished = turn.shared.flushes.finish(self.id);
        let run = finished.run;
        for lane in finished.sharers.iter() {
            if lane != self.id {
                turn.actions.push(Action::Wake {
                    lane,
                    wakeup: Wakeup::FlushDone { run, end },
                });
            }
        }
        self.flush_answer(turn, run, end);
        match finished.next {
            Some(lane) if lane == self.id => self.run_due = true,
            Some(lane) => turn.actions.push(Action::Wake {
                lane,
                wakeup: Wakeup::FlushStart,
            }),
            None => {}
        }
    }

    /// Tells those of this lane whom run `run` covers.
    pub(super) fn flush_answer<B: Buffers>(
        &mut self,
        turn: &mut Turn<'_, B>,
        run: u64,
        end: FlushEnd,
    ) {
        // Whoever is told may want to be covered by another run: those are behind the others.
        let mut left = self.flushes.len();
        let mut at = 0;
        while left > 0 {
            left -= 1;
            let slot = self.flushes[at];
            let Some(Activity::FlushRequest(request)) = self.activities.get_mut(slot) else {
                unreachable!("a flush request lives until it is published")
            };
            if request.run != run {
                at += 1;
                continue;
            }
            let whom = request.whom;
            self.flushes.remove(at);
            match whom {
                FlushFor::Request(tag) => self.flush_reply(turn, slot, tag, end),
                FlushFor::Reconcile(whom) => {
                    self.activities.remove(slot);
                    self.reconcile_flushed(turn, whom);
                }
                FlushFor::Settle(whom) => {
                    self.activities.remove(slot);
                    self.settle_flushed(turn, whom);
                }
            }
        }
    }

    /// Replies to a flush request whose run has ended, unless it has to wait for another one.
    fn flush_reply<B: Buffers>(
        &mut self,
        turn: &mut Turn<'_, B>,
        slot: SlotId,
        tag: Tag,
        end: FlushEnd,
    ) {
        if end == FlushEnd::Durable {
            self.reply(turn, slot, tag, Status::Ok, None);
            return;
        }
        if let FlushEnd::Lacking { extent } = end
            && self.flush_await(turn, slot, extent)
        {
            return;
        }
        if self.shall_pause(turn, turn.shared.policy.threshold) {
            self.paused.push(Waiter::Flush(slot));
            return;
        }
        if let FlushEnd::Lacking { .. } = end {
            turn.report_flush_failure();
        }
        self.reply(turn, slot, tag, Status::IoError, None);
    }

    fn flush_wind_up(&mut self, slot: SlotId) {
        let Some(Activity::FlushRun(run)) = self.activities.get_mut(slot) else {
            return;
        };
        if run.told && run.pending.is_empty() {
            self.activities.remove(slot);
        }
    }
}
