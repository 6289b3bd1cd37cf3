// SPDX-License-Identifier: Apache-2.0
//! The clean end: everything flushed, no extent dirty, and the record says so (rule R8).
//!
//! ```text
//! Running -> Draining -> Flushing -> Cleaning -> Closing -> Done
//!     (lane idle)  (one flush)  (marks cleared) (clean flag)
//! ```
//!
//! Whatever does not succeed in time is left as it is: the next start then finds an unclean end, and
//! resolves what was dirty.

use std::time::Duration;

use tracing::{info, warn};

use super::super::fingerprints;
use super::{KeeperState, Maintenance, RecordEvent, STOP_TAG};
use crate::quorum::{Bitmap, Event, ReplicaState, Request, Shared, Status, Tag};
use crate::record::{ChangeId, Fingerprint, MemberState, Superblock, VERIFIED};
use crate::replica::Replica;
use crate::units::{ReplicaId, Time};

/// How long all of it may take.
const STOP_LIMIT: Duration = Duration::from_secs(20);

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum Phase {
    #[default]
    Running,
    Draining,
    Flushing,
    Cleaning,
    Closing(ChangeId),
    Done,
}

/// How far the end is.
#[derive(Debug, Default)]
pub(super) struct Stop {
    phase: Phase,
    until: Option<Time>,
    flushed: Option<Status>,
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
    /// Workers have ended: nothing is written any more but by what is under way here.
    pub(super) fn begin_stop(&mut self) {
        if !self.stop.is_begun() {
            self.stop.phase = Phase::Draining;
            self.stop.until = Some(self.clock.now().after(STOP_LIMIT));
        }
    }

    pub(super) fn advance_stop(&mut self) {
        if self.stop.until.is_some_and(|until| until <= self.now) && !self.stop.is_done() {
            warn!("the disk could not be closed in time: the next start resolves what is dirty");
            self.stop.phase = Phase::Done;
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
                        if marks.is_set(Bitmap::Dirty, extent) {
                            self.shared.try_clean(extent, self.now, 0);
                        }
                    }
                    self.close_record();
                }
            }
            Phase::Cleaning => self.stop.phase = Phase::Done,
            Phase::Closing(change) => {
                let record = self.record.as_ref().expect("it is being closed");
                if record.durable >= Some(change) {
                    self.stop.phase = Phase::Done;
                } else if record.recorder.is_lost() {
                    warn!("the state record cannot be closed: the next start finds an unclean end");
                    self.stop.phase = Phase::Done;
                }
            }
        }
    }

    fn only_lost_replicas_are_busy(&self) -> bool {
        let busy = self.shared.membership.up();
        busy.iter()
            .all(|replica| self.executor.in_flight_on(replica) == 0)
    }

    /// Says in the record how the disk was left.
    fn close_record(&mut self) {
        let members = &self.shared.membership;
        let dirty = members.marks().count(Bitmap::Dirty);
        let clean = dirty == 0 && self.shared.unresolved.extents() == 0;
        let replicas = self.roster.open_replicas();
        let (state, shared) = (self.keeper.state(), &self.shared);
        let up = members.up();
        let Some(record) = &mut self.record else {
            return;
        };
        let change = record.recorder.change(|superblock| {
            describe(superblock, &state, shared);
            superblock.clean = clean;
            for (index, replica) in replicas.iter().enumerate() {
                let open = replica
                    .as_ref()
                    .filter(|_| up.contains(ReplicaId::new(index)));
                // What is said of those that are not up stays: it is of the time before this run,
                // or good for nothing.
                if let Some(replica) = open {
                    let print = fingerprint_of(replica).unwrap_or_default();
                    superblock.members[index].fingerprint = print;
                }
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

/// By what a replica is known again. The file is flushed first, so that its time of change is the
/// last one.
fn fingerprint_of(replica: &Replica) -> Option<Fingerprint> {
    let found = replica.durable_fingerprint().ok()?;
    Some(fingerprints::to_record(&found))
}
