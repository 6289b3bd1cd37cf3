// SPDX-License-Identifier: Apache-2.0
//! How replicas leave the workers and come back to them.
//!
//! ```text
//! Here -> Leaving -> Away -> Joining -> Here
//!   take_away  | all      | opened   | all workers
//!              | let go   |          | have it
//! ```
//!
//! A replica that was kicked is used by nobody new, but operations on it may be under way for as
//! long as the kernel likes. Only when every worker has seen its last one end is the replica
//! closed, and only then may it be opened again: no operation of its earlier life can land in its
//! later one (CONSISTENCY section 10).

use std::sync::Arc;
use std::sync::mpsc::Sender;

use super::super::warden::{Order, Reopened};
use super::super::worker::Message;
use super::{KeeperEvent, Maintenance};
use crate::replica::Replica;
use crate::units::ReplicaId;

/// Where a replica is in its life.
enum Standing {
    /// Everybody has it.
    Here(Arc<Replica>),
    /// So many workers have operations on it under way; this thread may too.
    Leaving {
        replica: Arc<Replica>,
        workers: usize,
    },
    /// Nobody has it.
    Away,
    /// So many workers do not have it yet.
    Joining {
        replica: Arc<Replica>,
        same: bool,
        workers: usize,
    },
}

/// The replicas of the disk, as far as they are open.
pub(super) struct Roster {
    standings: Vec<Standing>,
    wardens: Vec<Sender<Order>>,
    workers: usize,
}

impl Roster {
    pub(super) fn new(
        replicas: Vec<Option<Arc<Replica>>>,
        wardens: Vec<Sender<Order>>,
        workers: usize,
    ) -> Self {
        let roster = Self {
            standings: replicas
                .into_iter()
                .map(|replica| replica.map_or(Standing::Away, Standing::Here))
                .collect(),
            wardens,
            workers,
        };
        for (standing, warden) in roster.standings.iter().zip(&roster.wardens) {
            if let Standing::Here(replica) = standing {
                // A warden lives as long as this.
                let _ = warden.send(Order::Watch(Arc::downgrade(replica)));
            }
        }
        roster
    }

    /// Replicas that nobody has.
    pub(super) fn missing(&self) -> Vec<ReplicaId> {
        let away = |(_, standing): &(usize, &Standing)| matches!(standing, Standing::Away);
        let all = self.standings.iter().enumerate();
        all.filter(away).map(|(at, _)| ReplicaId::new(at)).collect()
    }

    /// The replicas that are open.
    pub(super) fn open_replicas(&self) -> Vec<Option<Arc<Replica>>> {
        let open = |standing: &Standing| match standing {
            Standing::Here(replica)
            | Standing::Leaving { replica, .. }
            | Standing::Joining { replica, .. } => Some(Arc::clone(replica)),
            Standing::Away => None,
        };
        self.standings.iter().map(open).collect()
    }

    /// The open replicas on which no worker has anything under way, once the workers have ended.
    pub(super) fn idle_replicas(&self) -> Vec<(ReplicaId, Arc<Replica>)> {
        let idle = |(at, standing): (usize, &Standing)| match standing {
            Standing::Here(replica) | Standing::Joining { replica, .. } => {
                Some((ReplicaId::new(at), Arc::clone(replica)))
            }
            Standing::Leaving { .. } | Standing::Away => None,
        };
        self.standings.iter().enumerate().filter_map(idle).collect()
    }

    /// Has a replica opened that is away.
    pub(super) fn open(&self, replica: ReplicaId) {
        let order = Order::Open(self.open_replicas());
        let _ = self.wardens[replica.index()].send(order);
    }

    /// A worker has seen its last operation on the replica end.
    pub(super) fn left(&mut self, replica: ReplicaId) {
        match &mut self.standings[replica.index()] {
            Standing::Leaving { workers, .. } => *workers -= 1,
            Standing::Here(_) | Standing::Away | Standing::Joining { .. } => {
                unreachable!("a worker lets go once, when told")
            }
        }
    }

    /// A worker has the replica.
    pub(super) fn joined(&mut self, replica: ReplicaId) {
        match &mut self.standings[replica.index()] {
            Standing::Joining { workers, .. } => *workers -= 1,
            Standing::Here(_) | Standing::Away | Standing::Leaving { .. } => {
                unreachable!("a worker takes it once, when told")
            }
        }
    }
}

impl Maintenance {
    /// The replica was kicked: nobody starts anything on it any more.
    pub(super) fn take_away(&mut self, id: ReplicaId) {
        let standing = &mut self.roster.standings[id.index()];
        match std::mem::replace(standing, Standing::Away) {
            Standing::Here(replica) => {
                let workers = self.roster.workers;
                *standing = Standing::Leaving { replica, workers };
                for mailbox in &self.mailboxes[..workers] {
                    mailbox.post(Message::Detach(id));
                }
                self.executor
                    .detach(id)
                    .expect("the ring works as long as the thread");
            }
            // Kicked by several lanes at once, or by nobody who had it.
            other => *standing = other,
        }
    }

    /// The answer of a warden.
    pub(super) fn opened(&mut self, id: ReplicaId, reopened: Option<Reopened>) {
        let Some(Reopened { replica, same }) = reopened else {
            self.tell_keeper(KeeperEvent::OpenFailed { replica: id });
            return;
        };
        let workers = self.roster.workers;
        for mailbox in &self.mailboxes[..workers] {
            mailbox.post(Message::Attach(id, Arc::clone(&replica)));
        }
        self.executor
            .attach(id, Arc::clone(&replica))
            .expect("the slot is free since the replica left");
        self.roster.standings[id.index()] = Standing::Joining {
            replica,
            same,
            workers,
        };
    }

    /// Closes replicas that everybody has let go of, and lets those vote that everybody has.
    pub(super) fn move_replicas(&mut self) {
        for at in 0..self.roster.standings.len() {
            let id = ReplicaId::new(at);
            let standing = &mut self.roster.standings[at];
            match standing {
                Standing::Leaving { workers: 0, .. } if self.executor.is_detached(id) => {
                    if let Standing::Leaving { replica, .. } =
                        std::mem::replace(standing, Standing::Away)
                    {
                        let _ = self.roster.wardens[at].send(Order::Close(replica));
                    }
                    self.tell_keeper(KeeperEvent::Detached { replica: id });
                }
                Standing::Joining {
                    replica,
                    same,
                    workers: 0,
                } => {
                    let (replica, same) = (Arc::clone(replica), *same);
                    let order = Order::Watch(Arc::downgrade(&replica));
                    let _ = self.roster.wardens[at].send(order);
                    *standing = Standing::Here(replica);
                    self.tell_keeper(KeeperEvent::Opened { replica: id, same });
                }
                Standing::Here(_)
                | Standing::Away
                | Standing::Leaving { .. }
                | Standing::Joining { .. } => {}
            }
        }
    }
}
