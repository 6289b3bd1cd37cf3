// SPDX-License-Identifier: Apache-2.0
//! Courses of events that chance seldom makes: one lane, three replicas, step by step.

use crate::pool::{Pool, REQUEST_SECTORS};
use crate::quorum::{
    Action, Event, Geometry, Lane, LaneId, Mutation, Operation, OperationKind, Outcome, Policy,
    Request, Shared, Status, Tag,
};
use crate::units::{ReplicaId, SectorRange, Time};

const EIO: Outcome = Outcome::Failed { errno: 5 };

struct Script {
    lane: Lane,
    shared: Shared,
    pool: Pool,
    now: Time,
    submitted: Vec<Operation>,
    replies: Vec<(Tag, Status)>,
}

impl Script {
    fn new() -> Self {
        let geometry = Geometry::with_extent_shift(256, 1, 4).expect("a whole number of blocks");
        Self {
            lane: Lane::new(LaneId(0)),
            shared: Shared::new(geometry, Policy::new(3)).expect("the defaults"),
            pool: Pool::new(32, 4),
            now: Time::from_nanos(0),
            submitted: Vec::new(),
            replies: Vec::new(),
        }
    }

    fn tell(&mut self, event: Event) {
        let mut actions = Vec::new();
        let (shared, pool) = (&self.shared, &mut self.pool);
        self.lane
            .handle(self.now, event, shared, pool, &mut actions);
        for action in actions {
            match action {
                Action::Submit(operation) => self.submitted.push(operation),
                Action::Reply {
                    tag,
                    status,
                    request,
                    ..
                } => {
                    self.replies.push((tag, status));
                    self.tell(Event::Published { request });
                }
                Action::Wake { .. }
                | Action::Report(_)
                | Action::Record
                | Action::Kicked { .. } => {}
            }
        }
    }

    fn request(&mut self, tag: u32, request: Request) {
        let tag = Tag(tag);
        self.tell(Event::Request { tag, request });
    }

    fn write(&mut self, tag: u32, start: u64) {
        let range = SectorRange::new(start, 8).expect("not empty");
        let values = (0..REQUEST_SECTORS as u64).map(|sector| sector + start);
        let data = self.pool.take_filled(values).expect("a buffer");
        self.request(tag, Request::Write { range, data });
    }

    /// Ends operations, also those that come of it, as `outcome` says; `None` leaves them out.
    fn complete(&mut self, mut outcome: impl FnMut(&Operation) -> Option<Outcome>) {
        let mut left = Vec::new();
        while !self.submitted.is_empty() {
            let operation = self.submitted.remove(0);
            match outcome(&operation) {
                Some(outcome) => self.tell(Event::Completed {
                    op: operation.op,
                    outcome,
                }),
                None => left.push(operation),
            }
        }
        self.submitted = left;
    }

    fn is_behind(&self, extent: u64, replica: usize) -> bool {
        let replica = ReplicaId::new(replica);
        self.shared.membership.is_behind(extent, replica)
    }
}

/// F3: the flush of a run that has ended may tell of what was written since.
#[test]
fn flush_error_after_the_end_of_its_run_counts() {
    let mut script = Script::new();
    let slow = ReplicaId::new(2);
    while !script.shared.membership.note_late(slow, script.now) {}
    script.request(0, Request::Flush);
    script.complete(|op| (op.replica != slow).then_some(Outcome::Done));
    assert_eq!(
        script.replies,
        [(Tag(0), Status::Ok)],
        "who lags is not waited for"
    );
    script.shared.membership.note_prompt(slow);
    script.write(1, 0);
    script.complete(|op| (op.kind != OperationKind::Flush).then_some(Outcome::Done));
    assert_eq!(script.replies[1], (Tag(1), Status::Ok));
    assert!(!script.is_behind(0, 2));
    script.complete(|_| Some(EIO));
    assert!(script.is_behind(0, 2));
    assert!(!script.shared.membership.up().contains(slow));
    assert!(script.lane.is_idle());
}

/// F3: the flush that ends the resolving of one extent fails because of another.
#[test]
fn flush_error_of_a_settlement_counts_in_all_dirty_extents() {
    let mut script = Script::new();
    script.write(0, 64);
    script.complete(|_| Some(Outcome::Done));
    // Too few copies take it: its sectors are in U.
    script.write(1, 0);
    script.complete(|op| {
        Some(if op.replica.index() == 0 {
            Outcome::Done
        } else {
            EIO
        })
    });
    assert_eq!(script.replies[1], (Tag(1), Status::IoError));
    let range = SectorRange::new(0, 8).expect("not empty");
    script.request(2, Request::Read { range });
    let mut asked = 0;
    let mut buffers = Vec::new();
    while let Some(operation) = script.submitted.pop() {
        let op = operation.op;
        let outcome = match operation.kind {
            OperationKind::Read { buffer, .. } => {
                // The first replica holds the write, the others what was there before.
                let new = operation.replica.index() == 0 && asked < 3;
                asked += 1;
                buffers.push(buffer);
                for sector in 0..8 {
                    script.pool.put(buffer, sector, if new { 7 } else { 9 });
                }
                Outcome::Done
            }
            OperationKind::Flush if operation.replica.index() == 0 => EIO,
            OperationKind::Flush => Outcome::Done,
            OperationKind::Write { .. } | OperationKind::WriteZeroes { .. } => Outcome::Done,
        };
        script.tell(Event::Completed { op, outcome });
    }
    assert_eq!(script.replies[2], (Tag(2), Status::Ok));
    assert_eq!(buffers.len(), 4, "three ballots, one read back");
    assert!(script.is_behind(0, 0), "it was rewritten and not flushed");
    assert!(script.is_behind(4, 0), "nor was what it took before");
    assert!(script.lane.is_idle());
}

/// The resync of a replica that fails a flush, is opened anew and flushes well before the resync
/// ends: what was written to it may be gone. Returns whether it is still behind.
fn resync_across_a_kick(mutation: Option<Mutation>) -> bool {
    let mut script = Script::new();
    script.shared.mutation = mutation;
    let third = ReplicaId::new(2);
    script.write(0, 0);
    script.complete(|op| {
        Some(if op.replica == third {
            EIO
        } else {
            Outcome::Done
        })
    });
    assert!(script.is_behind(0, 2));
    // A flush is under way when the resync has written all it has to write.
    script.request(1, Request::Flush);
    let flushes = std::mem::take(&mut script.submitted);
    script.request(2, Request::Reconcile { extent: 0 });
    while let Some(operation) = script.submitted.pop() {
        if let OperationKind::Read { buffer, range, .. } = operation.kind {
            let value = if operation.replica == third { 9 } else { 7 };
            for sector in 0..range.count() as usize {
                script.pool.put(buffer, sector, value);
            }
        }
        let (op, outcome) = (operation.op, Outcome::Done);
        script.tell(Event::Completed { op, outcome });
    }
    // It fails, and the replica is back before the next one begins.
    for flush in flushes.into_iter().rev() {
        let (op, outcome) = match flush.replica == third {
            true => (flush.op, EIO),
            false => (flush.op, Outcome::Done),
        };
        script.tell(Event::Completed { op, outcome });
        if flush.replica == third {
            assert!(!script.shared.membership.up().contains(third));
        }
        script.shared.membership.admit(third);
    }
    script.complete(|_| Some(Outcome::Done));
    assert!(script.lane.is_idle());
    script.is_behind(0, 2)
}

/// Y5, c(i): what was written before a kick proves nothing.
#[test]
fn resync_of_a_replica_that_was_kicked_meanwhile_does_not_count() {
    assert!(resync_across_a_kick(None));
    assert!(!resync_across_a_kick(Some(Mutation::ResyncCounterIgnored)));
}
