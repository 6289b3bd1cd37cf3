// SPDX-License-Identifier: Apache-2.0
//! The clean end: everything flushed, no extent dirty, and the record says so (rule R8).
//!
//! ```text
//! Running -> Draining -> Flushing -> Cleaning -> Closing -> Landing -> Done
//!     (lane idle)  (one flush)  (marks cleared) (clean flag) (all copies)
//! ```
//!
//! Whatever does not succeed in time is left as it is: the next start then finds an unclean end, and
//! resolves what was dirty.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use tracing::{info, warn};

use super::super::{file_lock, fingerprints};
use super::{KeeperState, Maintenance, RecordEvent, STOP_TAG};
use crate::quorum::{Bitmap, Event, ReplicaState, Request, Shared, Status, Tag, Wakeup};
use crate::record::{ChangeId, Fingerprint, MemberState, Superblock, VERIFIED};
use crate::replica::Replica;
use crate::units::{ReplicaId, ReplicaSet, Time};

/// How long all of it may take.
pub const STOP_LIMIT: Duration = Duration::from_secs(20);

/// How long all replicas together may take to tell their fingerprints. They were flushed before.
const FINGERPRINT_LIMIT: Duration = Duration::from_secs(3);

/// How long copies of the record may take that are later than those that make the end durable. A
/// write that is under way keeps the lock of its copy, and who starts next waits for it.
const LANDING_LIMIT: Duration = Duration::from_secs(1);

/// How long it may take to give up locks. On network storage that is a request to a server.
const UNLOCK_LIMIT: Duration = Duration::from_secs(2);

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum Phase {
    #[default]
    Running,
    Draining,
    Flushing,
    Cleaning,
    Closing(ChangeId),
    Landing,
    Done,
}

/// How far the end is.
#[derive(Debug, Default)]
pub(super) struct Stop {
    phase: Phase,
    until: Option<Time>,
    flushed: Option<Status>,
    /// A worker may still have operations anywhere: nothing can be said to be clean.
    unsure: bool,
    /// Replicas whose fingerprint is still being taken.
    asked: ReplicaSet,
}

impl Stop {
    pub(super) fn is_begun(&self) -> bool {
        self.phase != Phase::Running
    }

    pub(super) fn is_done(&self) -> bool {
        self.phase == Phase::Done
    }

    pub(super) fn deadline(&self) -> Option<Time> {
        self.until
    }

    /// Whether the reply is to a request of the end.
    pub(super) fn take_reply(&mut self, tag: Tag, status: Status) -> bool {
        if tag == STOP_TAG {
            self.flushed = Some(status);
        }
        tag == STOP_TAG
    }
}

impl Maintenance {
    /// If the workers have ended, nothing is written any more but by what is under way here.
    pub(super) fn begin_stop(&mut self, workers_ended: bool) {
        if !self.stop.is_begun() {
            self.stop.unsure = !workers_ended;
            self.stop.phase = Phase::Draining;
            self.stop.until = Some(self.clock.now().after(STOP_LIMIT));
        }
    }

    pub(super) fn advance_stop(&mut self) {
        let over = self.stop.until.is_some_and(|until| until <= self.now);
        if over && self.stop.phase == Phase::Landing {
            self.stop.phase = Phase::Done;
        }
        if over && !self.stop.is_done() {
            warn!("the disk could not be closed in time: the next start resolves what is dirty");
            self.stop.phase = Phase::Done;
        }
        // Requests that wait for replicas to come back would hold up the end (rule Q4).
        if self.stop.is_begun() && self.lane.has_paused() {
            self.tell_lane(Event::Wake(Wakeup::FailPaused));
        }
        match self.stop.phase {
            Phase::Running | Phase::Done => {}
            Phase::Draining => {
                // Operations that hang are on replicas that were kicked.
                if self.lane.is_idle() || self.only_lost_replicas_are_busy() {
                    self.stop.phase = Phase::Flushing;
                    let request = Request::Flush;
                    self.tell_lane(Event::Request {
                        tag: STOP_TAG,
                        request,
                    });
                }
            }
            Phase::Flushing => {
                if self.stop.flushed.is_some() {
                    self.stop.phase = Phase::Cleaning;
                    for extent in 0..self.shared.geometry.extents() {
                        let marks = self.shared.membership.marks();
                        if marks.is_set(Bitmap::Dirty, extent) && !self.stop.unsure {
                            self.shared.try_clean(extent, self.now, 0);
                        }
                    }
                    self.close_record();
                }
            }
            Phase::Cleaning => self.stop.phase = Phase::Done,
            Phase::Landing => {
                if self.copies_have_landed() {
                    self.stop.phase = Phase::Done;
                }
            }
            Phase::Closing(change) => {
                let record = self.record.as_ref().expect("it is being closed");
                if record.durable >= Some(change) {
                    self.stop.phase = Phase::Landing;
                    self.stop.until = Some(self.now.after(LANDING_LIMIT));
                    self.advance_stop();
                } else if record.recorder.is_lost() {
                    warn!("the state record cannot be closed: the next start finds an unclean end");
                    self.stop.phase = Phase::Done;
                }
            }
        }
    }

    /// Whether all copies of the record have taken what was written to them.
    fn copies_have_landed(&self) -> bool {
        let record = self.record.as_ref();
        record.is_none_or(|record| record.under_way.iter().all(|count| *count == 0))
    }

    fn only_lost_replicas_are_busy(&self) -> bool {
        let busy = self.shared.membership.up();
        busy.iter()
            .all(|replica| self.executor.in_flight_on(replica) == 0)
    }

    /// Says in the record how the disk was left.
    fn close_record(&mut self) {
        if self.record.is_none() {
            return;
        }
        let members = &self.shared.membership;
        let dirty = members.marks().count(Bitmap::Dirty);
        let clean = dirty == 0 && self.shared.unresolved.extents() == 0 && !self.stop.unsure;
        // What is said of those that are not up stays: it is of the time before this run, or good
        // for nothing.
        let up = members.up();
        let mut open = self.roster.idle_replicas();
        open.retain(|(id, _)| up.contains(*id));
        self.stop.asked = open.iter().map(|(id, _)| *id).collect();
        let prints = fingerprints_of(open);
        for (id, _) in &prints {
            self.stop.asked.remove(*id);
        }
        let asked_in_vain = self.stop.asked;
        let (state, shared) = (self.keeper.state(), &self.shared);
        let Some(record) = &mut self.record else {
            return;
        };
        let change = record.recorder.change(|superblock| {
            describe(superblock, &state, shared);
            superblock.clean = clean;
            for (id, print) in &prints {
                superblock.members[id.index()].fingerprint = print.unwrap_or_default();
            }
            // One of before would be believed.
            for id in asked_in_vain.iter() {
                superblock.members[id.index()].fingerprint = Fingerprint::default();
            }
        });
        self.stop.phase = Phase::Closing(change);
        self.tell_recorder(RecordEvent::Poll);
        if clean {
            info!("closed: every extent is clean");
        } else {
            info!(
                dirty,
                "closed with dirty extents: the next start resolves them"
            );
        }
    }

    /// Gives up the locks of what nothing is under way on, after the end.
    ///
    /// A thread that hangs in an operation on one replica keeps all files of the process open, also
    /// after a signal has ended it. The locks on that replica have to stay (rule K2); with those on
    /// the others and on the record the disk could not be served again before the one answers.
    pub(super) fn release_locks(&mut self) {
        if self.stop.unsure || !self.stop.is_begun() {
            return;
        }
        let mut replicas = self.roster.idle_replicas();
        replicas.retain(|(id, _)| {
            self.executor.in_flight_on(*id) == 0 && !self.stop.asked.contains(*id)
        });
        let mut copies = Vec::new();
        if let Some(record) = &mut self.record {
            record.copies.end();
            let files = record.files.iter_mut().zip(&record.under_way);
            copies.extend(
                files.filter_map(|(file, under_way)| file.take().filter(|_| *under_way == 0)),
            );
        }
        let (done, unlocked) = channel();
        let helper = thread::Builder::new()
            .name("unlock".to_owned())
            .spawn(move || {
                // What cannot be given up ends with the process.
                for (_, replica) in &replicas {
                    let Replica::Raw(raw) = &**replica;
                    let _ = file_lock::unlock(&raw.fd());
                }
                for copy in &copies {
                    let _ = file_lock::unlock(copy);
                }
                drop((replicas, copies));
                let _ = done.send(());
            });
        if helper.is_ok() {
            let _ = unlocked.recv_timeout(UNLOCK_LIMIT);
        }
    }

    /// Whether operations are under way, which only those that hang are after the end.
    pub(super) fn has_operations(&self) -> bool {
        self.executor.in_flight() > 0 || !self.copies_have_landed()
    }

    /// After the end, waits for operations that hang: the disk may be opened again by this process,
    /// as soon as they have let go of their files (rule K2).
    pub(super) fn outlive_operations(&mut self) {
        // Nothing is taken out of it any more, and it may be readable.
        let _ = self.events.remove(&self.mailboxes[self.own()].as_fd());
        let mut landed = Vec::new();
        while self.has_operations() {
            let works = "the rings work as long as the thread";
            self.executor.submit().expect(works);
            let mut limits = vec![self.executor.wait_limit().expect(works)];
            if let Some(record) = &mut self.record {
                limits.push(record.writer.wait_limit().expect(works));
            }
            let limit = limits.into_iter().flatten().min();
            self.events
                .wait(limit, &mut self.ready)
                .expect("waiting does not fail");
            self.ready.clear();
            self.executor.reap(&mut landed).expect(works);
            landed.clear();
            self.move_record().expect(works);
        }
    }
}

/// What the record says of the members and of the keeper's work.
pub(super) fn describe(superblock: &mut Superblock, state: &KeeperState, shared: &Shared) {
    superblock.verify_cursor = state.verify_cursor.unwrap_or(VERIFIED);
    superblock.scrub_cursor = state.scrub_cursor.unwrap_or(VERIFIED);
    let epoch = superblock.epoch();
    for replica in shared.membership.replicas().iter() {
        let member = &mut superblock.members[replica.index()];
        member.state = match state.states[replica.index()] {
            ReplicaState::InSync => MemberState::InSync,
            ReplicaState::Syncing => MemberState::Syncing,
            ReplicaState::Missing => MemberState::Missing,
            ReplicaState::Failed => MemberState::Failed,
            ReplicaState::Removed => MemberState::Removed,
        };
        member.suspect = state.suspects.contains(replica);
        if member.state == MemberState::InSync {
            member.epoch_in_sync = epoch;
        }
    }
}

/// By what replicas are known again. The files are flushed first, so that their times of change are
/// the last ones. `None`: that cannot be told. Replicas that do not answer in time are left out.
///
/// Every replica is asked by a thread of its own, which stays where the storage hangs.
fn fingerprints_of(
    replicas: Vec<(ReplicaId, Arc<Replica>)>,
) -> Vec<(ReplicaId, Option<Fingerprint>)> {
    let (answers, prints) = channel();
    for (id, replica) in replicas {
        let answers = answers.clone();
        let asked = thread::Builder::new()
            .name(format!("fingerprint{}", id.index()))
            .spawn(move || {
                let found = replica.durable_fingerprint().ok();
                drop(replica);
                // Nobody waits any more only if this took too long.
                let _ = answers.send((id, found.map(|found| fingerprints::to_record(&found))));
            });
        if let Err(error) = asked {
            warn!(replica = id.index(), %error, "the replica is not asked what it is known by");
        }
    }
    drop(answers);
    let until = Instant::now() + FINGERPRINT_LIMIT;
    std::iter::from_fn(|| {
        let left = until.saturating_duration_since(Instant::now());
        prints.recv_timeout(left).ok()
    })
    .collect()
}
