// SPDX-License-Identifier: Apache-2.0
//! Flushes: one run at a time over all replicas, shared by who waits (rules F1-F3).

use super::super::Buffers;
use super::super::event::{Action, During, OperationKind, Outcome, Report, Status, Tag, Wakeup};
use super::super::flush_gate::Join;
use super::super::mutation::broken;
use super::{Activity, ETIMEDOUT, Lane, SlotId, Turn, errno_of};
use crate::units::{REPLICAS_MAX, ReplicaId, ReplicaSet, SectorRange, Time};

/// A guest's flush; it waits for the run that covers it.
pub(super) struct FlushRequest {
    tag: Tag,
    run: u64,
}

/// One flush of every replica, in parallel.
pub(super) struct FlushRun {
    asked: ReplicaSet,
    pending: ReplicaSet,
    done: ReplicaSet,
    errnos: [i32; REPLICAS_MAX],
    deadline: Option<Time>,
    ended: bool,
}

impl FlushRun {
    pub(super) fn is_late(&self, now: Time) -> bool {
        self.deadline.is_some_and(|deadline| deadline <= now)
    }
}

impl Lane {
    fn run_mut(&mut self, slot: SlotId) -> &mut FlushRun {
        match self.activities.get_mut(slot) {
            Some(Activity::FlushRun(run)) => run,
            _ => unreachable!("the slot holds a flush run"),
        }
    }

    pub(super) fn flush_request<B: Buffers>(&mut self, turn: &mut Turn<'_, B>, tag: Tag) {
        let join = turn.shared.flushes.join(self.id);
        let (Join::Start(run) | Join::Wait(run)) = join;
        let slot = self
            .activities
            .insert(Activity::FlushRequest(FlushRequest { tag, run }));
        self.flushes.push(slot);
        self.run_due |= matches!(join, Join::Start(_));
    }

    /// Begins the run that is this lane's.
    pub(super) fn flush_begin<B: Buffers>(&mut self, turn: &mut Turn<'_, B>) {
        let shared = turn.shared;
        // One flush at a time on each replica: who still works on an earlier one fails this one.
        let asked = shared
            .membership
            .replicas()
            .minus(shared.flushes.unanswered());
        let slot = self.activities.insert(Activity::FlushRun(FlushRun {
            asked,
            pending: asked,
            done: ReplicaSet::EMPTY,
            errnos: [ETIMEDOUT; REPLICAS_MAX],
            deadline: None,
            ended: false,
        }));
        for replica in asked.iter() {
            turn.submit(slot, replica, OperationKind::Flush);
        }
        if asked.is_empty() {
            self.flush_end(turn, slot);
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
        if run.ended {
            shared.flushes.answered(replica);
            if let Some(errno) = errno_of(outcome) {
                // It may be about what was written since the run ended.
                self.flush_failed(turn, replica, errno);
            }
            self.flush_wind_up(slot);
            return;
        }
        if let Some(errno) = errno_of(outcome) {
            run.errnos[replica.index()] = errno;
            // Rule F3: it counts from now on, whatever becomes of the run.
            if !broken!(shared, FailedFlushNotMarked) {
                shared.membership.mark_behind_where_dirty(replica);
            }
        } else {
            run.done.insert(replica);
        }
        let (pending, done) = (run.pending, run.done);
        if pending.is_empty() {
            self.flush_end(turn, slot);
        } else if done.count() >= shared.policy.threshold && run.deadline.is_none() {
            run.deadline = Some(turn.now.after(shared.policy.flush_grace));
            self.arm(turn.now);
        }
        self.flush_wind_up(slot);
    }

    /// Rule F3: a flush error counts at the moment it is seen, whoever asked for the flush. No
    /// other flush will report it again.
    pub(super) fn flush_failed<B: Buffers>(
        &mut self,
        turn: &mut Turn<'_, B>,
        replica: ReplicaId,
        errno: i32,
    ) {
        let membership = &turn.shared.membership;
        if membership.mark_behind_where_dirty(replica).0 > 0 {
            let extents = membership.behind_extents(replica);
            turn.report(Report::FlushFailed {
                replica,
                errno,
                extents,
            });
        }
    }

    pub(super) fn flush_late<B: Buffers>(&mut self, turn: &mut Turn<'_, B>, slot: SlotId) {
        self.flush_end(turn, slot);
        self.flush_wind_up(slot);
    }

    /// The run ends: whoever did not succeed is behind in all that is dirty (rule F2).
    fn flush_end<B: Buffers>(&mut self, turn: &mut Turn<'_, B>, slot: SlotId) {
        let shared = turn.shared;
        let run = self.run_mut(slot);
        run.ended = true;
        let (asked, pending, done, errnos) = (run.asked, run.pending, run.done, run.errnos);
        if run.deadline.take().is_some() {
            self.disarm();
        }
        let mut ok = done.count() >= shared.policy.threshold;
        for replica in shared.membership.replicas().minus(done).iter() {
            if pending.contains(replica) {
                shared.flushes.leave_unanswered(replica);
            }
            if broken!(shared, FailedFlushNotMarked) {
                continue;
            }
            let (_, complete) = shared.membership.mark_behind_where_dirty(replica);
            ok &= complete;
            if asked.contains(replica) {
                let errno = errnos[replica.index()];
                let extents = shared.membership.behind_extents(replica);
                turn.report(Report::FlushFailed {
                    replica,
                    errno,
                    extents,
                });
            }
        }
        if !ok {
            let sectors = u32::try_from(shared.geometry.sectors()).unwrap_or(u32::MAX);
            let range = SectorRange::new(0, sectors).expect("a disk is not empty");
            turn.report(Report::Failure {
                range,
                during: During::Flush,
            });
        }
        self.flush_publish(turn, ok);
    }

    /// Tells everybody who waits for the run that ended, and has the next one begun.
    fn flush_publish<B: Buffers>(&mut self, turn: &mut Turn<'_, B>, ok: bool) {
        let finished = turn.shared.flushes.finish(self.id);
        let run = finished.run;
        for lane in finished.sharers.iter() {
            if lane != self.id {
                turn.actions.push(Action::Wake {
                    lane,
                    wakeup: Wakeup::FlushDone { run, ok },
                });
            }
        }
        self.flush_answer(turn, run, ok);
        match finished.next {
            Some(lane) if lane == self.id => self.run_due = true,
            Some(lane) => turn.actions.push(Action::Wake {
                lane,
                wakeup: Wakeup::FlushStart,
            }),
            None => {}
        }
    }

    /// Replies to the requests of this lane that run `run` covers.
    pub(super) fn flush_answer<B: Buffers>(&mut self, turn: &mut Turn<'_, B>, run: u64, ok: bool) {
        let status = if ok { Status::Ok } else { Status::IoError };
        let mut flushes = std::mem::take(&mut self.flushes);
        flushes.retain(|&slot| {
            let Some(Activity::FlushRequest(request)) = self.activities.get_mut(slot) else {
                unreachable!("a flush request lives until it is published")
            };
            if request.run != run {
                return true;
            }
            let tag = request.tag;
            self.reply(turn, slot, tag, status, None);
            false
        });
        self.flushes = flushes;
    }

    fn flush_wind_up(&mut self, slot: SlotId) {
        let run = self.run_mut(slot);
        if run.ended && run.pending.is_empty() {
            self.activities.remove(slot);
        }
    }
}
