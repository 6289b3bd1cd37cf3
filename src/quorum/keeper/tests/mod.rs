// SPDX-License-Identifier: Apache-2.0
//! The keeper of a small disk, with a lane that does what it is told.

mod life;
mod passes;
mod work;

use std::time::Duration;

use super::super::event::{Request, Status, Tag};
use super::super::marks::{Bitmap, Marks};
use super::super::policy::{Geometry, Policy};
use super::super::shared::Shared;
use super::{
    Keeper, KeeperAction, KeeperConfig, KeeperEvent, KeeperReport, KeeperStart, KeeperState,
};
use crate::units::{ReplicaId, ReplicaSet, Time};

pub(super) const MS: u64 = 1_000_000;
pub(super) const SECOND: u64 = 1000 * MS;

pub(super) fn id(index: usize) -> ReplicaId {
    ReplicaId::new(index)
}

pub(super) fn ids(indices: &[usize]) -> ReplicaSet {
    indices.iter().map(|&index| id(index)).collect()
}

/// A keeper, what it keeps, and what it asked for.
pub(super) struct World {
    pub(super) shared: Shared,
    pub(super) keeper: Keeper,
    pub(super) now: Time,
    /// Requests that were not replied to, oldest first.
    pub(super) open: Vec<(Tag, Request)>,
    /// All other actions, with their times.
    pub(super) log: Vec<(u64, KeeperAction)>,
}

/// How a world begins.
pub(super) struct Setup {
    pub(super) extents: u64,
    pub(super) replicas: usize,
    pub(super) recorded: bool,
    pub(super) config: KeeperConfig,
    pub(super) start: KeeperStart,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            extents: 200,
            replicas: 3,
            recorded: false,
            config: KeeperConfig::default(),
            start: KeeperState::fresh(),
        }
    }
}

impl Setup {
    pub(super) fn build(self, prepare: impl FnOnce(&Shared)) -> World {
        let geometry = Geometry::new(self.extents << 11, 8).unwrap();
        let marks = Marks::new(self.replicas, geometry.extents(), self.recorded);
        let policy = Policy::new(self.replicas);
        let shared = Shared::with_marks(geometry, policy, marks).unwrap();
        prepare(&shared);
        let keeper = Keeper::new(self.config, self.start, &shared);
        World {
            shared,
            keeper,
            now: Time::from_nanos(1000 * SECOND),
            open: Vec::new(),
            log: Vec::new(),
        }
    }
}

pub(super) fn world(prepare: impl FnOnce(&Shared)) -> World {
    Setup::default().build(prepare)
}

/// Makes `replica` behind in `extent`, whatever the rules say.
pub(super) fn fall_behind(shared: &Shared, replica: usize, extents: impl Iterator<Item = u64>) {
    let marks = shared.membership.marks();
    for extent in extents {
        marks.set(Bitmap::Behind(id(replica)), extent);
    }
    // Not up for a moment, so that the membership looks at its bits.
    shared.membership.admit(id(replica));
}

impl World {
    pub(super) fn event(&mut self, event: KeeperEvent) {
        let mut actions = Vec::new();
        self.keeper
            .handle(self.now, event, &self.shared, &mut actions);
        for action in actions {
            match action {
                KeeperAction::Request { tag, request } => self.open.push((tag, request)),
                other => self.log.push((self.now.nanos(), other)),
            }
        }
        assert!(self.open.len() <= super::REQUESTS_MAX);
        let deadline = self.keeper.deadline().unwrap();
        assert!(deadline > self.now, "the keeper would spin: {deadline:?}");
    }

    pub(super) fn tick(&mut self) {
        self.event(KeeperEvent::Tick);
    }

    /// Lets time pass without replies to requests.
    pub(super) fn pass(&mut self, nanos: u64) {
        let end = self.now.after(Duration::from_nanos(nanos));
        while let Some(deadline) = self.keeper.deadline().filter(|&at| at <= end) {
            self.now = deadline.max(self.now);
            self.tick();
        }
        self.now = end;
    }

    /// Replies to the oldest request that `which` accepts.
    pub(super) fn reply_to(&mut self, which: impl Fn(&Request) -> bool, status: Status) -> Request {
        let at = self.open.iter().position(|(_, request)| which(request));
        let (tag, request) = self.open.remove(at.expect("such a request"));
        self.event(KeeperEvent::Replied { tag, status });
        request
    }

    /// What the lane would do with the oldest request, which takes `nanos`: a reconciliation brings
    /// everybody up to date unless `fails` says otherwise, all else is good.
    pub(super) fn serve(&mut self, nanos: u64, fails: impl Fn(u64) -> bool) -> Option<Request> {
        let &(_, request) = self.open.first()?;
        self.pass(nanos);
        let mut status = Status::Ok;
        if let Request::Reconcile { extent } = request {
            if fails(extent) {
                status = Status::IoError;
            } else {
                let membership = &self.shared.membership;
                for replica in membership.returning(extent).iter() {
                    let counter = membership.counter(replica);
                    assert!(membership.clear_behind(extent, replica, counter));
                }
                let range = self.shared.geometry.extent_range(extent);
                self.shared.unresolved.remove_extent(extent, range);
            }
        }
        if let Request::Check { range, .. } = request {
            self.shared.unresolved.remove(range);
        }
        Some(self.reply_to(|other| *other == request, status))
    }

    /// Serves until nothing is left to do at once.
    pub(super) fn serve_all(&mut self) -> Vec<Request> {
        let mut served = Vec::new();
        self.tick();
        while let Some(request) = self.serve(0, |_| false) {
            served.push(request);
        }
        served
    }

    pub(super) fn reports(&self) -> Vec<KeeperReport> {
        let reports = self.log.iter().filter_map(|(_, action)| match action {
            KeeperAction::Report(report) => Some(*report),
            _ => None,
        });
        reports.collect()
    }

    pub(super) fn saves(&self) -> Vec<KeeperState> {
        let saves = self.log.iter().filter_map(|(_, action)| match action {
            KeeperAction::Save(state) => Some(*state),
            _ => None,
        });
        saves.collect()
    }

    pub(super) fn did(&self, action: KeeperAction) -> bool {
        self.log.iter().any(|(_, other)| *other == action)
    }
}

pub(super) fn extents_of(requests: &[Request]) -> Vec<u64> {
    let extents = requests.iter().filter_map(|request| match request {
        Request::Reconcile { extent } => Some(*extent),
        _ => None,
    });
    extents.collect()
}

#[test]
fn requests_are_such_as_a_lane_takes() {
    let mut world = Setup {
        start: KeeperState {
            verify_cursor: Some(3),
            ..KeeperState::fresh()
        },
        ..Setup::default()
    }
    .build(|shared| fall_behind(shared, 2, [3, 199].into_iter()));
    let served = world.serve_all();
    assert!(served.len() > 2);
    for request in served {
        match request {
            Request::Check { range, .. } => {
                assert!(world.shared.geometry.admits(range));
                assert!(range.count() <= world.shared.geometry.request_sectors_max());
            }
            Request::Reconcile { extent } => assert!(extent < world.shared.geometry.extents()),
            other => panic!("{other:?} was not needed"),
        }
    }
}
