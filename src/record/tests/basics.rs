// SPDX-License-Identifier: Apache-2.0
//! One behaviour a test: create, open, exclude, return, lose.

use std::time::Duration;

use super::support::*;
use crate::record::*;

fn says(machine: &Machine, wanted: fn(&RecordAction) -> bool) -> bool {
    machine.said.iter().any(wanted)
}

#[test]
fn created_record_opens_empty_in_a_later_epoch() {
    let machine = Machine::create(3, 100);
    assert!(machine.recorder.is_idle());
    let changed = |a: &RecordAction| matches!(a, RecordAction::Changed(ChangeId { .. }));
    assert!(says(&machine, changed));
    let opened = open_all(&machine.files).unwrap();
    assert_eq!(opened.superblock.epoch(), 2);
    assert_eq!(opened.superblock.included, 7);
    assert!(opened.notes.is_empty(), "{:?}", opened.notes);
    assert!(set_bits(&opened, d()).is_empty());
    let again = Machine::open(machine.files, 2).unwrap();
    assert_eq!(again.recorder.superblock().epoch(), 2);
}

#[test]
fn marks_survive() {
    let mut machine = Machine::create(3, 40_000);
    machine.set(d(), 5);
    machine.set(b(2), 39_999);
    machine.said.clear();
    let mut machine = Machine::open(machine.files, 2).unwrap();
    assert!(machine.marks.is_set(d(), 5) && !machine.marks.is_durable(d(), 5));
    machine.poll();
    // The copies are equal: only superblocks are written.
    assert!(machine.pending.iter().all(|write| write.block < 2));
    machine.run();
    assert!(machine.marks.is_durable(d(), 5) && machine.marks.is_durable(b(2), 39_999));
    assert!(machine.marks.is_settled(machine.marks.requested()));
    assert_eq!(machine.recorder.superblock().epoch(), 3);
}

#[test]
fn mark_is_durable_on_two_of_three() {
    let mut machine = Machine::create(3, 100);
    let _ = machine.marks.ask(d(), 1);
    machine.poll();
    assert_eq!(machine.pending.len(), 3);
    machine.finish(0, None);
    assert!(!machine.marks.is_durable(d(), 1));
    machine.finish(0, None);
    assert!(machine.marks.is_durable(d(), 1));
}

#[test]
fn slow_copy_catches_up_with_the_newest_image() {
    let mut machine = Machine::create(3, 100);
    let _ = machine.marks.ask(d(), 1);
    machine.poll();
    machine.run_without(&[2]);
    for extent in 2..9 {
        let _ = machine.marks.ask(d(), extent);
        machine.poll();
        machine.run_without(&[2]);
        assert!(machine.marks.is_durable(d(), extent));
    }
    // The old image, then the newest: no more.
    assert_eq!(machine.pending.len(), 1);
    machine.finish(0, None);
    assert_eq!(machine.pending.len(), 1);
    machine.run();
    for file in &mut machine.files[..2] {
        file.fill(0);
    }
    let force = OpenOptions {
        force: true,
        ..OpenOptions::default()
    };
    let opened = open_some(&machine.files, 4, &force).unwrap();
    assert_eq!(set_bits(&opened, d()), (1..9).collect::<Vec<_>>());
}

#[test]
fn failed_copy_is_left_out_and_the_epoch_rises_first() {
    let mut machine = Machine::create(3, 100);
    let _ = machine.marks.ask(d(), 1);
    machine.poll();
    let failing = machine.pending.iter().position(|p| p.copy == 2).unwrap();
    machine.finish(failing, Some(5));
    let excluded = |a: &RecordAction| {
        matches!(
            a,
            RecordAction::Excluded {
                copy: 2,
                errno: Some(5),
                took_part: true,
            }
        )
    };
    assert!(says(&machine, excluded));
    // Both others have the page, and the superblock is on its way.
    machine.finish(0, None);
    machine.finish(0, None);
    assert!(!machine.marks.is_durable(d(), 1));
    machine.run();
    assert!(machine.marks.is_durable(d(), 1));
    let opened = open_all(&machine.files).unwrap();
    assert_eq!(
        (opened.superblock.epoch(), opened.superblock.included),
        (3, 3)
    );
    assert_eq!(opened.state(2), &CopyState::Stale);
    // With one copy of the new epoch and the old one there are two, and the new one decides.
    let opened = open_some(&machine.files, 6, &OpenOptions::default()).unwrap();
    assert_eq!(set_bits(&opened, d()), [1]);
    assert_eq!(opened.pages_lost(), 0);
}

#[test]
fn late_copy_is_left_out_after_the_limit() {
    let mut machine = Machine::create(3, 100);
    let _ = machine.marks.ask(d(), 1);
    machine.poll();
    assert_eq!(
        machine.recorder.deadline(),
        Some(machine.now.after(RECORD_HANG_LIMIT)),
        "nobody can be spared yet"
    );
    machine.run_without(&[0]);
    let deadline = machine.recorder.deadline().unwrap();
    assert_eq!(deadline, machine.now.after(RECORD_WRITE_LIMIT));
    machine.now = deadline;
    machine.tell(RecordEvent::Tick);
    let excluded = |a: &RecordAction| {
        matches!(
            a,
            RecordAction::Excluded {
                copy: 0,
                errno: None,
                took_part: true,
            }
        )
    };
    assert!(says(&machine, excluded));
    assert_eq!(machine.readmit(0), Err(RecorderError::Busy));
    machine.run();
    assert_eq!(machine.recorder.superblock().epoch(), 3);
    assert_eq!(machine.recorder.deadline(), None);
}

#[test]
fn record_whose_majority_hangs_is_lost_after_a_longer_limit() {
    let mut machine = Machine::create(3, 100);
    let _ = machine.marks.ask(d(), 1);
    machine.poll();
    machine.run_without(&[0, 1]);
    let deadline = machine.recorder.deadline().unwrap();
    assert_eq!(deadline, machine.now.after(RECORD_HANG_LIMIT));
    assert!(!machine.recorder.is_lost());
    machine.now = deadline;
    machine.tell(RecordEvent::Tick);
    assert!(says(&machine, |a| matches!(a, RecordAction::Lost)));
    assert!(machine.recorder.is_lost());
}

#[test]
fn copy_returns_whole_in_a_new_epoch() {
    let mut machine = Machine::create(3, 40_000);
    machine.set(d(), 35_000);
    let _ = machine.marks.ask(b(1), 7);
    machine.poll();
    machine.finish(0, Some(28));
    machine.run();
    assert!(!machine.recorder.is_good(0));
    machine.files[0].fill(0);
    assert_eq!(machine.readmit(1), Err(RecorderError::InUse));
    machine.readmit(0).unwrap();
    machine.poll();
    // It does not hold others up while it is being written.
    let _ = machine.marks.ask(d(), 3);
    machine.poll();
    machine.run();
    assert!(machine.marks.is_durable(d(), 3));
    assert!(machine.recorder.is_good(0) && machine.recorder.is_idle());
    assert_eq!(machine.recorder.superblock().epoch(), 4);
    let opened = open_some(&machine.files, 5, &OpenOptions::default()).unwrap();
    assert_eq!(set_bits(&opened, d()), [3, 35_000]);
    assert_eq!(set_bits(&opened, b(1)), [7]);
    assert!(matches!(opened.notes[..], [Note::NotUsed { .. }]));
}

#[test]
fn without_a_majority_nothing_becomes_durable_until_a_copy_is_back() {
    let mut machine = Machine::create(3, 100);
    let number = machine.marks.ask(d(), 1).unwrap();
    machine.poll();
    machine.finish(0, Some(5));
    machine.finish(0, Some(5));
    machine.run();
    assert!(machine.recorder.is_lost());
    assert!(says(&machine, |a| matches!(a, RecordAction::Lost)));
    assert!(!machine.marks.is_settled(number));
    machine.readmit(1).unwrap();
    machine.poll();
    machine.run();
    assert!(says(&machine, |a| matches!(a, RecordAction::Regained)));
    assert!(machine.marks.is_settled(number) && machine.marks.is_durable(d(), 1));
    let opened = open_some(&machine.files, 6, &OpenOptions::default()).unwrap();
    assert_eq!(set_bits(&opened, d()), [1]);
}

#[test]
fn clears_wait_and_go_with_the_next_set() {
    let mut machine = Machine::create(1, 100);
    machine.set(d(), 1);
    machine.marks.clear(d(), 1);
    machine.poll();
    assert!(machine.pending.is_empty());
    let deadline = machine.recorder.deadline().unwrap();
    assert_eq!(deadline.since(machine.now), Duration::from_secs(1));
    machine.now = deadline;
    machine.tell(RecordEvent::Tick);
    assert_eq!(machine.pending.len(), 1);
    machine.run();
    assert!(set_bits(&open_all(&machine.files).unwrap(), d()).is_empty());
    assert_eq!(machine.recorder.deadline(), None);
}

#[test]
fn change_is_written_after_the_pages_before_it() {
    let mut machine = Machine::create(3, 100);
    machine.set(d(), 1);
    machine.marks.clear(d(), 1);
    let change = machine
        .recorder
        .change(|superblock| superblock.clean = true);
    machine.poll();
    assert!(machine.pending.iter().all(|write| write.block >= 2));
    machine.said.clear();
    machine.run();
    let changed = machine.said.iter().filter_map(|action| match action {
        RecordAction::Changed(id) => Some(*id),
        _ => None,
    });
    assert_eq!(changed.collect::<Vec<_>>(), [change]);
    let opened = open_all(&machine.files).unwrap();
    assert!(opened.superblock.clean && set_bits(&opened, d()).is_empty());
    // The next epoch begins unclean (R8).
    let mut machine = Machine::open(machine.files, 2).unwrap();
    machine.poll();
    machine.run();
    assert!(!open_all(&machine.files).unwrap().superblock.clean);
}

#[test]
fn change_of_members_raises_the_epoch() {
    let mut machine = Machine::create(3, 100);
    machine
        .recorder
        .change(|superblock| superblock.verify_cursor = 8);
    machine.poll();
    machine.run();
    assert_eq!(machine.recorder.superblock().epoch(), 2);
    machine
        .recorder
        .change(|superblock| superblock.threshold = 3);
    machine.poll();
    machine.run();
    assert_eq!(machine.recorder.superblock().epoch(), 3);
    assert_eq!(
        open_all(&machine.files).unwrap().superblock.verify_cursor,
        8
    );
}

#[test]
fn copy_that_hangs_on_its_return_holds_nothing_up_for_long() {
    let mut machine = Machine::create(3, 100);
    machine.set(d(), 2);
    let _ = machine.marks.ask(d(), 1);
    machine.poll();
    machine.finish(0, Some(5));
    machine.run();
    machine.readmit(0).unwrap();
    machine.poll();
    let number = machine.marks.ask(d(), 3).unwrap();
    machine.poll();
    machine.run_without(&[0]);
    assert!(!machine.marks.is_settled(number), "it may be ready soon");
    let until = machine.recorder.deadline().unwrap();
    assert_eq!(until, machine.now.after(RECORD_JOIN_PAUSE));
    machine.now = until;
    machine.tell(RecordEvent::Tick);
    machine.run_without(&[0]);
    assert!(machine.marks.is_settled(number));
    // It is late, and not waited for again.
    machine.finish(0, None);
    machine.poll();
    let number = machine.marks.ask(d(), 9).unwrap();
    machine.poll();
    machine.run_without(&[0]);
    assert!(machine.marks.is_settled(number));
    // Much later it is given up, and that changes nothing.
    let epoch = machine.recorder.superblock().epoch();
    machine.now = machine.recorder.deadline().unwrap();
    machine.tell(RecordEvent::Tick);
    let given_up = |a: &RecordAction| {
        matches!(
            a,
            RecordAction::Excluded {
                copy: 0,
                errno: None,
                took_part: false,
            }
        )
    };
    assert!(says(&machine, given_up));
    machine.run();
    assert_eq!(machine.recorder.superblock().epoch(), epoch);
    assert_eq!(machine.recorder.deadline(), None);
}

#[test]
fn damaged_copy_is_not_written_over_on_its_return() {
    let mut machine = Machine::create(3, 100);
    let _ = machine.marks.ask(d(), 1);
    machine.poll();
    machine.finish(0, Some(5));
    machine.run();
    machine.files[0][..8192].fill(7);
    let refused = machine.readmit(0);
    assert!(matches!(refused, Err(RecorderError::Unusable { .. })));
}
