// SPDX-License-Identifier: Apache-2.0
//! Courses of events around too few copies: replicas that go while a request needs them, and what is
//! told only when it is durable.

use std::time::Duration;

use crate::quorum::{
    Event, Mutation, Operation, OperationKind, Outcome, Policy, Report, Request, Status, Tag,
    Wakeup,
};
use crate::script::{EIO, Script, eight};
use crate::units::ReplicaId;

const DONE: Option<Outcome> = Some(Outcome::Done);

fn is_flush(operation: &Operation) -> bool {
    operation.kind == OperationKind::Flush
}

fn is_write(operation: &Operation) -> bool {
    matches!(operation.kind, OperationKind::Write { .. })
}

fn pausing(pause: bool) -> Policy {
    Policy {
        pause,
        ..Policy::new(3)
    }
}

/// A write that the third replica lacks.
fn third_is_behind(script: &mut Script, tag: u32, start: u64) {
    script.write_values(tag, start, |_| 7);
    script.complete(|op| {
        Some(if op.replica.index() == 2 {
            EIO
        } else {
            Outcome::Done
        })
    });
    assert_eq!(script.status(tag), Some(Status::Ok));
    assert!(script.is_behind(start / 16, 2));
}

/// A flush that succeeds on T replicas, of which one is behind. Returns whether the write was durable
/// on T replicas when the reply came.
fn flush_with_a_copy_behind(mutation: Option<Mutation>) -> bool {
    let mut script = Script::new();
    script.shared.mutation = mutation;
    for (tag, start) in [(0, 0), (1, 16), (2, 32)] {
        third_is_behind(&mut script, tag, start);
    }
    script.request(3, Request::Flush);
    script.complete(|op| (op.replica.index() == 1).then_some(EIO));
    assert_eq!(script.status(3), None);
    let mut flushed_behind = false;
    while script.status(3).is_none() {
        let operation = script.submitted.remove(0);
        let extents_behind = (0..3).filter(|&extent| script.is_behind(extent, 2)).count();
        flushed_behind |= is_flush(&operation) && extents_behind == 0;
        script.end(operation, Outcome::Done);
    }
    assert_eq!(script.status(3), Some(Status::Ok));
    script.complete_all();
    assert!(script.lane.is_idle());
    let equal = [0, 16, 32].iter().all(|&s| script.disks[2][s] == 7);
    equal && flushed_behind
}

/// I5: two replicas are flushed, and one of them lacks what is to be durable on two.
#[test]
fn flush_waits_for_extents_in_which_too_few_of_the_flushed_are_current() {
    assert!(flush_with_a_copy_behind(None));
    assert!(!flush_with_a_copy_behind(Some(
        Mutation::FlushOfCopiesBehind
    )));
}

/// I5: who is late is awaited where it is needed, although enough replicas have answered.
#[test]
fn flush_awaits_a_late_replica_if_another_one_is_behind() {
    let mut script = Script::new();
    third_is_behind(&mut script, 0, 0);
    script.request(1, Request::Flush);
    script.complete(|op| (op.replica.index() != 1).then_some(Outcome::Done));
    script.pass(Duration::from_secs(8));
    assert_eq!(script.status(1), None);
    assert!(script.shared.membership.up().contains(ReplicaId::new(1)));
    script.complete_all();
    assert_eq!(script.status(1), Some(Status::Ok));
    assert!(script.lane.is_idle());
}

/// I5: what an earlier flush has made durable on T replicas asks for nothing, so that an extent whose
/// copies are gone does not fail flushes for ever.
#[test]
fn flush_that_covers_nothing_new_needs_no_more_copies() {
    let mut script = Script::new();
    third_is_behind(&mut script, 0, 0);
    script.request(1, Request::Flush);
    script.complete_all();
    assert_eq!(script.status(1), Some(Status::Ok));
    script.lose(1);
    script.request(2, Request::Flush);
    script.complete(|op| is_flush(op).then_some(Outcome::Done));
    assert_eq!(script.status(2), Some(Status::Ok));
    assert!(script.is_behind(0, 2), "not brought up to date for that");
}

/// C1: one replica fails the write and one hangs and is kicked. It is repeated in place where it
/// failed; what ends on the other later counts for nothing.
#[test]
fn repeat_of_a_write_while_that_on_a_kicked_replica_is_out() {
    for late in [Outcome::Done, EIO] {
        let mut script = Script::new();
        script.write_values(0, 0, |_| 7);
        let outcomes = [DONE, Some(EIO), None];
        script.complete(|op| outcomes[op.replica.index()]);
        assert_eq!(
            script.busy(),
            [2],
            "nothing is decided while it may still answer"
        );
        script.lose(2);
        assert_eq!(script.busy(), [2, 1], "the failed one again");
        let repeated = script.submitted.remove(1);
        script.end(repeated, Outcome::Done);
        assert_eq!(script.status(0), Some(Status::Ok));
        assert!(script.is_behind(0, 2));
        assert!(!script.pool.all_free(), "the hung write still uses it");
        assert!(!script.lane.is_idle());
        let third = ReplicaId::new(2);
        assert!(script.shared.membership.has_stray(0, third));
        script.complete(|_| Some(late));
        assert!(!script.shared.membership.has_stray(0, third));
        assert!(script.is_behind(0, 2), "it counts for nothing");
        assert!(script.pool.all_free() && script.lane.is_idle());
        assert!(script.shared.order.is_empty());
    }
}

/// C1: the hung write ends while the other one is repeated, without success: one copy is not enough,
/// whatever is on the replica that was kicked.
#[test]
fn write_on_a_kicked_replica_is_no_copy() {
    let mut script = Script::new();
    script.write_values(0, 0, |_| 7);
    let outcomes = [DONE, Some(EIO), None];
    script.complete(|op| outcomes[op.replica.index()]);
    script.lose(2);
    script.complete(|op| (op.replica.index() == 2).then_some(Outcome::Done));
    assert_eq!(script.status(0), None);
    let mut repeats = 0;
    script.complete(|_| {
        repeats += 1;
        Some(EIO)
    });
    assert_eq!(repeats, 3);
    assert_eq!(script.status(0), Some(Status::IoError));
    assert!(script.shared.unresolved.touches(eight(0)));
    assert!(script.lane.is_idle() && script.pool.all_free());
}

/// V6, policy `pause`: a write that was sent when its replicas went waits for them.
#[test]
fn write_that_loses_its_replicas_pauses() {
    let mut script = Script::with(pausing(true), false);
    script.write_values(0, 0, |_| 7);
    script.complete(|op| (op.replica.index() == 0).then_some(Outcome::Done));
    script.lose(1);
    script.lose(2);
    assert_eq!(script.status(0), None, "it waits");
    assert!(script.lane.has_paused());
    assert!(script.shared.unresolved.touches(eight(0)), "old or new");
    // What comes of the writes that were out proves nothing.
    script.complete_all();
    assert!(script.is_behind(0, 1) && script.is_behind(0, 2));
    script.bring_back(1);
    assert!(
        script.submitted.iter().all(|op| !is_write(op)),
        "first the extent"
    );
    script.complete_all();
    assert_eq!(script.status(0), Some(Status::Ok));
    assert_eq!(script.disks[1][..8], [7; 8]);
    assert!(!script.shared.unresolved.touches(eight(0)));
    assert!(!script.lane.has_paused() && script.lane.is_idle());
    assert!(script.shared.order.is_empty() && script.pool.all_free());
}

/// Q4: the same, but the queue is stopped.
#[test]
fn write_that_paused_after_it_was_sent_fails_when_paused_requests_do() {
    let mut script = Script::with(pausing(true), false);
    script.write_values(0, 0, |_| 7);
    script.complete(|op| (op.replica.index() == 0).then_some(Outcome::Done));
    script.lose(1);
    script.lose(2);
    assert_eq!(script.status(0), None);
    script.tell(Event::Wake(Wakeup::FailPaused));
    assert_eq!(script.status(0), Some(Status::IoError));
    assert!(
        !script.lane.has_paused() && !script.lane.is_idle(),
        "two writes are out"
    );
    script.complete_all();
    assert!(script.lane.is_idle() && script.pool.all_free());
    assert!(script.shared.unresolved.touches(eight(0)));
    assert!(script.shared.order.is_empty());
}

/// Policy `error`: the same write fails at once.
#[test]
fn write_that_loses_its_replicas_fails_without_pause() {
    let mut script = Script::new();
    script.write(0, 0);
    script.complete(|op| (op.replica.index() == 0).then_some(Outcome::Done));
    script.lose(1);
    assert_eq!(script.status(0), None);
    script.lose(2);
    assert_eq!(script.status(0), Some(Status::IoError));
    script.complete_all();
    assert!(script.lane.is_idle());
}

/// V6: the second replica goes while it is written and the third is behind, but T are up: the extent
/// is brought into order, then the write is done.
#[test]
fn write_that_loses_a_copy_waits_for_one_that_is_behind() {
    let mut script = Script::new();
    third_is_behind(&mut script, 0, 0);
    script.write_values(1, 4, |_| 9);
    script.complete(|op| (op.replica.index() == 0).then_some(Outcome::Done));
    script.lose(1);
    assert_eq!(script.status(1), None);
    // The write that is out on the second may land; nobody waits for it.
    script.complete(|op| (op.replica.index() != 1).then_some(Outcome::Done));
    assert_eq!(script.status(1), Some(Status::Ok));
    assert!(!script.is_behind(0, 2));
    assert_eq!(script.disks[2][..12], script.disks[0][..12]);
    assert_eq!(script.disks[2][4..12], [9; 8]);
    script.complete_all();
    assert!(script.lane.is_idle() && script.pool.all_free());
}

/// H1: a flush without one replica marks it behind in what is dirty then, and waits for these marks
/// only. What becomes dirty meanwhile does not keep it.
#[test]
fn flush_marks_once_however_much_becomes_dirty() {
    let mut script = Script::with(Policy::new(3), true);
    script.write(0, 0);
    script.record();
    script.complete_all();
    script.lose(2);
    script.request(1, Request::Flush);
    script.complete_all();
    assert_eq!(
        script.status(1),
        None,
        "it is not yet remembered who lacks it"
    );
    // Another extent, dirty for good soon, but without the mark of who is gone.
    script.write(2, 32);
    let marks = script.shared.membership.marks();
    assert!(!marks.set(crate::quorum::Bitmap::Dirty, 2));
    marks.set(crate::quorum::Bitmap::Dirty, 3);
    let asked = marks.requested();
    script.record();
    assert_eq!(script.status(1), Some(Status::Ok));
    assert_eq!(
        script.shared.membership.marks().requested(),
        asked,
        "no more marks"
    );
    assert!(!script.is_behind(3, 2));
    script.complete_all();
    assert_eq!(script.status(2), Some(Status::Ok));
}

/// H2: reads that wait for replicas hold no slot, but they will want one.
#[test]
fn reads_that_wait_for_replicas_take_up_room() {
    let mut script = Script::with(pausing(true), false);
    script.lose(1);
    script.lose(2);
    let mut reads = 0;
    while script.lane.has_room() {
        script.read(reads, 0);
        reads += 1;
        assert!(reads < 4000, "there is no end to them");
    }
    assert_eq!(script.replies, []);
    script.bring_back(1);
    script.complete_all();
    assert_eq!(script.replies.len(), reads as usize);
    assert!(
        script
            .replies
            .iter()
            .all(|&(_, status)| status == Status::Ok)
    );
    assert!(script.lane.is_idle());
    assert!(script.lane.has_room());
}

/// L1: overlapping requests are served in the order of their arrival, also where only one that waits
/// is in between.
#[test]
fn overlapping_requests_keep_their_order() {
    let mut script = Script::new();
    // 1 overlaps 0, and 2 overlaps 1 alone.
    for (tag, start) in [(0, 0), (1, 4), (2, 8)] {
        script.write_values(tag, start, |_| u64::from(tag) + 1);
    }
    assert_eq!(script.submitted.len(), 3, "the first one alone");
    // A check wants a shared lock, and waits for those that came before it.
    let range = eight(8);
    let repair = false;
    script.request(3, Request::Check { range, repair });
    // Nothing bars the last one.
    script.write(4, 16);
    assert_eq!(script.submitted.len(), 6);
    let mut order = Vec::new();
    script.complete(|op| {
        if let (0, OperationKind::Write { range, .. } | OperationKind::Read { range, .. }) =
            (op.replica.index(), op.kind)
        {
            order.push((range.start(), is_write(op)));
        }
        DONE
    });
    let expected = [(0, true), (16, true), (4, true), (8, true), (8, false)];
    assert_eq!(order, expected);
    let last = &script.disks[0][..16];
    assert_eq!(
        (&last[..4], &last[4..8], &last[8..]),
        (&[1; 4][..], &[2; 4][..], &[3; 8][..])
    );
    let tags: Vec<_> = script.replies.iter().map(|&(Tag(tag), _)| tag).collect();
    assert_eq!(tags, [0, 4, 1, 2, 3]);
    assert!(script.lane.is_idle() && script.shared.order.is_empty());
}

/// M1, M4, M5 (Y1): after a failed write, the first read shows nothing before the replica it had
/// rewritten is flushed and it is remembered for good who is not among the current copies; only then
/// the sectors leave U.
#[test]
fn sectors_leave_u_after_the_flush_and_the_marks() {
    let mut script = Script::with(Policy::new(3), true);
    script.write(0, 0);
    script.record();
    script.complete_all();
    script.write_values(1, 0, |_| 7);
    script.complete(|op| {
        Some(if op.replica.index() == 0 {
            Outcome::Done
        } else {
            EIO
        })
    });
    assert_eq!(script.status(1), Some(Status::IoError));
    assert!(script.shared.unresolved.touches(eight(0)));
    // Another write leaves the third behind in the extent, but that is not durable.
    script.write(2, 8);
    script.complete(|op| {
        Some(if op.replica.index() == 2 {
            EIO
        } else {
            Outcome::Done
        })
    });
    assert!(script.is_behind(0, 2));
    assert_eq!(script.status(2), None);
    script.read(3, 0);
    script.complete(|op| (!is_flush(op)).then_some(Outcome::Done));
    assert!(
        script.submitted.iter().any(is_flush),
        "what was rewritten is flushed"
    );
    assert_eq!(script.status(3), None);
    assert!(script.shared.unresolved.touches(eight(0)));
    script.complete_all();
    assert_eq!(script.status(3), None, "the mark is not durable");
    assert!(script.shared.unresolved.touches(eight(0)));
    script.record();
    assert_eq!(script.status(3), Some(Status::Ok));
    assert!(!script.shared.unresolved.touches(eight(0)));
    assert_eq!(script.disks[0][..8], script.disks[1][..8]);
    assert_eq!(script.shown[0].1, script.disks[0][..8]);
}

/// Y1: a copy that could not be flushed keeps its sectors in U, and they are not shown.
#[test]
fn sectors_that_could_not_be_flushed_stay_in_u() {
    let mut script = Script::new();
    script.write_values(0, 0, |_| 7);
    script.complete(|op| {
        Some(if op.replica.index() == 0 {
            Outcome::Done
        } else {
            EIO
        })
    });
    script.lose(2);
    script.read(1, 0);
    script.complete(|op| Some(if is_flush(op) { EIO } else { Outcome::Done }));
    assert_eq!(script.status(1), Some(Status::IoError));
    assert!(script.shared.unresolved.touches(eight(0)));
    let failed = |report: &Report| matches!(report, Report::FlushFailed { .. });
    assert!(script.reports.iter().any(failed));
}

/// W6, V6: a write leaves a late replica behind, and before that is durable another one goes. The
/// extent is not brought into order on the late one while its write may still land there.
#[test]
fn late_write_of_a_suspended_one_is_waited_for() {
    let mut script = Script::with(Policy::new(3), true);
    script.write(0, 0);
    script.record();
    script.complete_all();
    script.write_values(1, 0, |_| 7);
    script.complete(|op| (op.replica.index() != 2).then_some(Outcome::Done));
    script.pass(Duration::from_secs(2));
    assert!(script.is_behind(0, 2), "too late");
    script.lose(1);
    script.record();
    assert_eq!(script.status(1), None);
    assert!(script.shared.membership.has_stray(0, ReplicaId::new(2)));
    script.complete(|op| (op.replica.index() != 2).then_some(Outcome::Done));
    let transfers = script.submitted.iter().filter(|op| !is_flush(op));
    assert_eq!(transfers.count(), 1, "nothing but the late write");
    script.complete_all();
    assert_eq!(script.status(1), None, "another attempt is made in a while");
    for _ in 0..8 {
        script.pass(Duration::from_millis(500));
        script.complete_all();
        script.record();
    }
    assert_eq!(script.status(1), Some(Status::Ok));
    assert_eq!(script.disks[2][..8], [7; 8]);
    assert!(script.lane.is_idle() && script.pool.all_free());
}
