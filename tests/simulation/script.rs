// SPDX-License-Identifier: Apache-2.0
//! One lane over three replicas, told step by step what happens: a small machine for courses of
//! events that chance seldom makes.

use std::time::Duration;

use crate::pool::{Pool, REQUEST_SECTORS};
use crate::quorum::{
    Action, Event, Geometry, Lane, LaneId, Marks, Operation, OperationKind, Outcome, PAGE_WORDS,
    Policy, Report, Request, RequestId, Shared, Status, Tag, Wakeup,
};
use crate::units::{ReplicaId, SECTOR_LEN, SectorRange, Time};

pub const EIO: Outcome = Outcome::Failed { errno: 5 };

const SECTORS: u64 = 256;

pub struct Script {
    pub lane: Lane,
    pub shared: Shared,
    pub pool: Pool,
    pub now: Time,
    pub submitted: Vec<Operation>,
    pub replies: Vec<(Tag, Status)>,
    pub reports: Vec<Report>,
    /// What each good read returned.
    pub shown: Vec<(Tag, Vec<u64>)>,
    /// Replies are published when [`Script::publish`] says so.
    pub publishes_late: bool,
    unpublished: Vec<RequestId>,
    /// What the sectors of each replica hold.
    pub disks: Vec<Vec<u64>>,
}

impl Script {
    /// A disk of 16 extents of 16 sectors without a record.
    pub fn new() -> Self {
        Self::with(Policy::new(3), false)
    }

    /// The same with another policy, and with a record that writes when [`Script::record`] says so.
    pub fn with(policy: Policy, recorded: bool) -> Self {
        let geometry =
            Geometry::with_extent_shift(SECTORS, 1, 4).expect("a whole number of blocks");
        let replicas = policy.replicas;
        let marks = Marks::new(replicas, geometry.extents(), recorded);
        Self {
            lane: Lane::new(LaneId(0)),
            shared: Shared::with_marks(geometry, policy, marks).expect("a valid policy"),
            pool: Pool::new(32, 4),
            now: Time::from_nanos(0),
            submitted: Vec::new(),
            replies: Vec::new(),
            reports: Vec::new(),
            shown: Vec::new(),
            publishes_late: false,
            unpublished: Vec::new(),
            disks: vec![vec![0; 256]; replicas],
        }
    }

    pub fn tell(&mut self, event: Event) {
        let mut actions = Vec::new();
        let (shared, pool) = (&self.shared, &mut self.pool);
        self.lane
            .handle(self.now, event, shared, pool, &mut actions);
        assert_eq!(self.pool.misuse(), None);
        for action in actions {
            match action {
                Action::Submit(operation) => self.submit(operation),
                Action::Reply {
                    tag,
                    status,
                    request,
                    data,
                } => {
                    self.replies.push((tag, status));
                    if let Some(data) = data {
                        let value = |sector| self.pool.value(data, sector);
                        self.shown.push((tag, (0..8).map(value).collect()));
                    }
                    self.unpublished.push(request);
                    if !self.publishes_late {
                        self.publish();
                    }
                }
                Action::Report(report) => self.reports.push(report),
                Action::Wake { .. } | Action::Record | Action::Kicked { .. } => {}
            }
        }
    }

    /// The guest is shown all replies.
    pub fn publish(&mut self) {
        for request in std::mem::take(&mut self.unpublished) {
            self.tell(Event::Published { request });
        }
    }

    pub fn request(&mut self, tag: u32, request: Request) {
        let tag = Tag(tag);
        self.tell(Event::Request { tag, request });
    }

    /// Eight sectors from `start` on, which hold their numbers then.
    pub fn write(&mut self, tag: u32, start: u64) {
        self.write_values(tag, start, |sector| sector);
    }

    pub fn write_values(&mut self, tag: u32, start: u64, value: impl Fn(u64) -> u64) {
        let values = (0..REQUEST_SECTORS as u64).map(|sector| value(sector + start));
        let data = self.pool.take_filled(values).expect("a buffer");
        let range = eight(start);
        self.request(tag, Request::Write { range, data });
    }

    pub fn read(&mut self, tag: u32, start: u64) {
        let range = eight(start);
        self.request(tag, Request::Read { range });
    }

    fn submit(&mut self, operation: Operation) {
        if let Some((buffer, fills)) = buffer_of(&operation) {
            let legal = self.pool.begin(buffer, fills);
            legal.expect("the rules of buffers hold");
        }
        self.submitted.push(operation);
    }

    /// The operation has ended, and has done what it should if it went well.
    pub fn end(&mut self, operation: Operation, outcome: Outcome) {
        if let Some((buffer, fills)) = buffer_of(&operation) {
            self.pool.end(buffer, fills);
        }
        if outcome == Outcome::Done {
            self.transfer(&operation);
        }
        let op = operation.op;
        self.tell(Event::Completed { op, outcome });
    }

    fn transfer(&mut self, operation: &Operation) {
        let disk = &mut self.disks[operation.replica.index()];
        let place = |sector: u64| usize::try_from(sector).expect("a small disk");
        match operation.kind {
            OperationKind::Read {
                range,
                buffer,
                skip_bytes,
            } => {
                let skipped = skip_bytes as usize / SECTOR_LEN;
                for (index, sector) in (range.start()..range.end()).enumerate() {
                    self.pool.put(buffer, skipped + index, disk[place(sector)]);
                }
            }
            OperationKind::Write {
                range,
                buffer,
                skip_bytes,
            } => {
                let skipped = skip_bytes as usize / SECTOR_LEN;
                for (index, sector) in (range.start()..range.end()).enumerate() {
                    disk[place(sector)] = self.pool.value(buffer, skipped + index);
                }
            }
            OperationKind::WriteZeroes { range, .. } => {
                disk[place(range.start())..place(range.end())].fill(0);
            }
            OperationKind::Flush => {}
        }
    }

    /// Ends operations, also those that come of it, as `outcome` says; `None` leaves them out.
    pub fn complete(&mut self, mut outcome: impl FnMut(&Operation) -> Option<Outcome>) {
        let mut left = Vec::new();
        while !self.submitted.is_empty() {
            let operation = self.submitted.remove(0);
            match outcome(&operation) {
                Some(outcome) => self.end(operation, outcome),
                None => left.push(operation),
            }
        }
        self.submitted = left;
    }

    /// Ends everything well.
    pub fn complete_all(&mut self) {
        self.complete(|_| Some(Outcome::Done));
    }

    /// Whoever did it, the replica is not up any more.
    pub fn lose(&mut self, replica: usize) {
        let kicked = self.shared.membership.kick(ReplicaId::new(replica));
        assert!(kicked.is_some(), "it was up");
        self.tell(Event::Wake(Wakeup::MembersChanged));
    }

    /// It is back.
    pub fn bring_back(&mut self, replica: usize) {
        self.shared.membership.admit(ReplicaId::new(replica));
        self.tell(Event::Wake(Wakeup::MembersChanged));
    }

    /// The record writes what there is to write.
    pub fn record(&mut self) {
        let marks = self.shared.membership.marks();
        let mut pages = Vec::new();
        let number = marks.collect(&mut pages);
        let mut bits = [0; PAGE_WORDS];
        for page in pages {
            marks.copy_page(page, &mut bits);
            marks.made_durable(page, &bits);
        }
        marks.settle(number);
        if self.shared.take_waiting().next().is_some() {
            self.tell(Event::Wake(Wakeup::Durable));
        }
    }

    /// Time passes, and the lane is told whenever it wants to be.
    pub fn pass(&mut self, time: Duration) {
        let end = self.now.after(time);
        while let Some(deadline) = self.lane.deadline().filter(|&deadline| deadline <= end) {
            self.now = self.now.max(deadline);
            self.tell(Event::Tick);
        }
        self.now = end;
    }

    pub fn is_behind(&self, extent: u64, replica: usize) -> bool {
        let replica = ReplicaId::new(replica);
        self.shared.membership.is_behind(extent, replica)
    }

    /// The reply to the request, if there was one.
    pub fn status(&self, tag: u32) -> Option<Status> {
        let mut replies = self.replies.iter().filter(|(known, _)| *known == Tag(tag));
        let status = replies.next().map(|&(_, status)| status);
        assert_eq!(replies.next(), None, "one reply");
        status
    }

    /// The replicas with operations that are out.
    pub fn busy(&self) -> Vec<usize> {
        self.submitted.iter().map(|op| op.replica.index()).collect()
    }
}

/// Eight sectors.
pub fn eight(start: u64) -> SectorRange {
    SectorRange::new(start, 8).expect("not empty")
}

fn buffer_of(operation: &Operation) -> Option<(crate::quorum::BufferId, bool)> {
    match operation.kind {
        OperationKind::Read { buffer, .. } => Some((buffer, true)),
        OperationKind::Write { buffer, .. } => Some((buffer, false)),
        OperationKind::WriteZeroes { .. } | OperationKind::Flush => None,
    }
}
