// SPDX-License-Identifier: Apache-2.0
//! Courses of events that chance seldom makes: one lane, three replicas, step by step.

use crate::quorum::{Mutation, OperationKind, Outcome, Request, Status, Tag};
use crate::script::{EIO, Script};
use crate::units::ReplicaId;

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
    script.read(2, 0);
    let mut reads = 0;
    while let Some(operation) = script.submitted.pop() {
        let outcome = match operation.kind {
            OperationKind::Flush if operation.replica.index() == 0 => EIO,
            OperationKind::Read { .. } => {
                reads += 1;
                Outcome::Done
            }
            _ => Outcome::Done,
        };
        script.end(operation, outcome);
    }
    assert_eq!(script.replies[2], (Tag(2), Status::Ok));
    assert_eq!(reads, 4, "three ballots, one read back");
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
        script.end(operation, Outcome::Done);
    }
    // It fails, and the replica is back before the next one begins.
    for flush in flushes.into_iter().rev() {
        let failed = flush.replica == third;
        script.end(flush, if failed { EIO } else { Outcome::Done });
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
