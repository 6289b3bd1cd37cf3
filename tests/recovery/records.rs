// SPDX-License-Identifier: Apache-2.0
//! Copies of the state record that fail while the disk is served (rule R1): one is left out and
//! comes back by itself, and without most of them nothing is written that could not be remembered.

use std::fs::{self, File};
use std::path::Path;
use std::time::{Duration, Instant};

use quorum_blk::front_end::Status;
use serde_json::Value;

use crate::common::{FaultyFile, Random};
use crate::guest::Guest;
use crate::model::Model;
use crate::site::{SECTORS, SETTLED, Site};

/// A disk whose first `count` copies of the record go wrong on command. These end before the
/// daemon, which may hang on them.
fn with_faulty_records(count: usize) -> (Site, Vec<FaultyFile>) {
    let mut site = Site::bare(&[]);
    let mut copies = Vec::new();
    for (index, path) in site.paths.iter_mut().enumerate() {
        let record = path.with_extension("record");
        File::create(&record).expect("an empty file");
        let place = if index < count {
            let faulty = FaultyFile::new(&record);
            let place = faulty.path.clone();
            copies.push(faulty);
            place
        } else {
            record
        };
        path.as_mut_os_string().push(",record=");
        path.as_mut_os_string().push(place);
    }
    site.start_with(&["--assume-clean"]);
    (site, copies)
}

fn busy(guest: &mut Guest, model: &mut Model, random: &mut Random, requests: usize) {
    let worked = guest.work(model, random, 8, |done| done < requests);
    worked.expect("the daemon lives");
}

#[test]
fn a_copy_that_fails_or_hangs_is_left_out_and_nobody_waits_for_it() {
    for fault in ["eio write on", "enospc on", "hang write"] {
        let (mut site, copies) = with_faulty_records(1);
        let mut model = Model::new(SECTORS);
        let mut random = Random::new(81);
        let mut guest = Guest::connect(&site);
        guest.write(&mut model, 0, 8);
        copies[0].tell(fault);
        // Extents that were clean: each needs a write of the record.
        for sector in (2048..SECTORS).step_by(2048) {
            let taken = guest.write(&mut model, sector, 8);
            assert!(taken < Duration::from_secs(2), "{fault}: {taken:?}");
        }
        busy(&mut guest, &mut model, &mut random, 100);
        site.await_event("QUORUM_BLK_RECORD_COPY_LOST", |data| data["copy"] == 0);
        drop(guest);
        copies[0].tell("resume");
        copies[0].tell("eio write off");
        copies[0].tell("enospc off");
        // What it says is old: it must not be believed.
        site.kill();
        site.start();
        let mut guest = Guest::connect(&site);
        guest.check_all(&mut model, true);
        drop(guest);
        site.await_equal();
        site.assert_no_failure();
        site.stop();
        drop(copies);
    }
}

#[test]
fn without_most_copies_of_the_record_nothing_is_written_that_cannot_be_remembered() {
    let (mut site, copies) = with_faulty_records(2);
    let mut model = Model::new(SECTORS);
    let mut guest = Guest::connect(&site);
    guest.write(&mut model, 0, 8);
    let before = fs::read(&site.images[0]).expect("an image");
    copies[0].tell("eio write on");
    copies[1].tell("eio write on");
    // A clean extent: its mark cannot be made durable (rule W2).
    assert_eq!(guest.status_of_write(8000, 8), Status::IoError);
    site.await_event("QUORUM_BLK_RECORD_LOST", |_| true);
    assert!(fs::read(&site.images[0]).expect("an image") == before);
    // What needs no new mark goes on.
    guest.write(&mut model, 16, 8);
    guest.check_all(&mut model, false);
    drop(guest);
    site.kill();
    copies[0].tell("eio write off");
    copies[1].tell("eio write off");
    site.start();
    let mut guest = Guest::connect(&site);
    guest.check_all(&mut model, true);
    guest.write(&mut model, 8000, 8);
    drop(guest);
    site.await_equal();
    site.stop();
    drop(copies);
}

/// The states of the copies, as the status tells them.
fn copy_states(site: &mut Site) -> Vec<String> {
    let status = site.status();
    let lines = status.lines().filter(|line| line.contains("state record"));
    let state = |line: &str| line.rsplit(": ").next().unwrap_or_default().to_owned();
    lines.map(state).collect()
}

#[test]
fn a_copy_that_failed_is_back_when_it_can_be_written_again() {
    let (mut site, copies) = with_faulty_records(1);
    let mut model = Model::new(SECTORS);
    let mut guest = Guest::connect(&site);
    guest.write(&mut model, 0, 8);
    assert_eq!(copy_states(&mut site), ["in use", "in use", "in use"]);
    copies[0].tell("eio write on");
    guest.write(&mut model, 2048, 8);
    site.await_event("QUORUM_BLK_RECORD_COPY_LOST", |data| data["copy"] == 0);
    assert_eq!(copy_states(&mut site)[0], "left out");
    // It is tried again and still fails; that is no news.
    site.await_log("cannot be used yet");
    assert_eq!(site.events("QUORUM_BLK_RECORD_COPY_LOST").len(), 1);
    copies[0].tell("eio write off");
    site.await_event("QUORUM_BLK_RECORD_COPY_RETURNED", |data| data["copy"] == 0);
    assert_eq!(copy_states(&mut site), ["in use", "in use", "in use"]);
    guest.write(&mut model, 4096, 8);
    drop(guest);
    site.kill();
    // It counts again: with one of the others gone there is still a majority.
    fs::remove_file(site.images[1].with_extension("record")).expect("a copy");
    site.start();
    let mut guest = Guest::connect(&site);
    guest.check_all(&mut model, true);
    drop(guest);
    site.await_equal();
    site.assert_no_failure();
    site.stop();
    drop(copies);
}

#[test]
fn a_copy_that_vanished_is_made_anew() {
    let (mut site, mut copies) = with_faulty_records(1);
    let mut model = Model::new(SECTORS);
    let mut guest = Guest::connect(&site);
    guest.write(&mut model, 0, 8);
    let copy = copies.remove(0);
    let place = copy.path.clone();
    // Dead, and not mounted any more: what is left is the name.
    drop(copy);
    fs::remove_file(&place).expect("the mount point");
    guest.write(&mut model, 2048, 8);
    site.await_event("QUORUM_BLK_RECORD_COPY_LOST", |data| data["copy"] == 0);
    site.await_event("QUORUM_BLK_RECORD_COPY_RETURNED", |data| data["copy"] == 0);
    let lengths = [&place, &site.images[1].with_extension("record")]
        .map(|path| fs::metadata(path).expect("a copy").len());
    assert_eq!(lengths[0], lengths[1]);
    guest.check_all(&mut model, false);
    drop(guest);
    site.stop();
}

#[test]
fn a_copy_on_which_writes_hang_holds_up_nobody_when_it_is_tried_again() {
    let (mut site, copies) = with_faulty_records(1);
    let mut model = Model::new(SECTORS);
    let mut guest = Guest::connect(&site);
    guest.write(&mut model, 0, 8);
    copies[0].tell("eio write on");
    guest.write(&mut model, 2048, 8);
    site.await_event("QUORUM_BLK_RECORD_COPY_LOST", |data| data["copy"] == 0);
    copies[0].tell("hang write");
    copies[0].tell("eio write off");
    copies[0].wait_until("held", 1);
    for sector in (4096..SECTORS).step_by(2048) {
        let taken = guest.write(&mut model, sector, 8);
        assert!(taken < Duration::from_secs(2), "{taken:?}");
    }
    copies[0].tell("resume");
    site.await_event("QUORUM_BLK_RECORD_COPY_RETURNED", |data| data["copy"] == 0);
    drop(guest);
    site.stop();
    drop(copies);
}

#[test]
fn a_record_of_one_copy_that_failed_once_is_not_lost_for_good() {
    let mut site = Site::bare(&[]);
    let record = site.images[0].with_extension("record");
    File::create(&record).expect("an empty file");
    let copy = FaultyFile::new(&record);
    site.paths[0].as_mut_os_string().push(",record=");
    site.paths[0].as_mut_os_string().push(&copy.path);
    site.start_with(&["--assume-clean"]);
    let mut model = Model::new(SECTORS);
    let mut guest = Guest::connect(&site);
    guest.write(&mut model, 0, 8);
    copy.tell("eio write on");
    assert_eq!(guest.status_of_write(8000, 8), Status::IoError);
    site.await_event("QUORUM_BLK_RECORD_LOST", |_| true);
    copy.tell("eio write off");
    site.await_event("QUORUM_BLK_RECORD_REGAINED", |_: &Value| true);
    guest.write(&mut model, 8000, 8);
    guest.write(&mut model, 12_000, 8);
    drop(guest);
    site.kill();
    site.start();
    let mut guest = Guest::connect(&site);
    guest.check_all(&mut model, true);
    drop(guest);
    site.await_equal();
    site.stop();
    drop(copy);
}

#[test]
fn a_copy_that_hangs_at_the_start_is_left_out_until_it_answers() {
    let (mut site, copies) = with_faulty_records(1);
    let mut model = Model::new(SECTORS);
    let mut guest = Guest::connect(&site);
    guest.write(&mut model, 0, 8);
    drop(guest);
    site.stop();
    copies[0].tell("hang read");
    let begun = Instant::now();
    site.start_with(&["--io-timeout", "1"]);
    assert!(
        begun.elapsed() < Duration::from_secs(15),
        "it was waited for"
    );
    let log = site.log();
    assert!(log.contains("does not answer within 1 s"), "{log}");
    let mut guest = Guest::connect(&site);
    guest.check_all(&mut model, true);
    guest.write(&mut model, 2048, 8);
    assert_eq!(copy_states(&mut site)[0], "left out");
    copies[0].tell("resume");
    site.await_event("QUORUM_BLK_RECORD_COPY_RETURNED", |data| data["copy"] == 0);
    drop(guest);
    site.stop();
    drop(copies);
}

#[test]
fn without_a_majority_of_copies_that_answer_nothing_is_served() {
    let (mut site, copies) = with_faulty_records(2);
    site.stop();
    copies[0].tell("hang read");
    copies[1].tell("hang read");
    // Its threads keep the process as long as the storage hangs, but it has spoken.
    site.start_and_leave_with(&["--io-timeout", "1"]);
    site.await_log("only 1 of 3 copies");
    let said = site.log();
    assert!(said.contains("does not answer within 1 s"), "{said}");
    copies[0].tell("resume");
    copies[1].tell("resume");
    let status = site.process().wait(SETTLED);
    assert_eq!(status.code(), Some(1), "{status}");
}

/// Gives every replica a copy of the record at these paths.
fn set_records(site: &mut Site, copies: [&Path; 3]) {
    for ((path, image), copy) in site.paths.iter_mut().zip(&site.images).zip(copies) {
        let mut argument = image.clone().into_os_string();
        argument.push(",record=");
        argument.push(copy);
        *path = argument.into();
    }
}

#[test]
fn a_copy_that_cannot_be_written_still_says_what_it_knows() {
    let mut site = Site::bare(&[]);
    let names = [0, 1, 2].map(|index| site.images[index].with_extension("record"));
    let [first, second, third] = names.each_ref().map(|name| name.as_path());
    set_records(&mut site, [first, second, third]);
    site.start_with(&["--assume-clean"]);
    site.stop();
    let old = fs::read(first).expect("a copy");
    let mut model = Model::new(SECTORS);
    site.start();
    Guest::connect(&site).write(&mut model, 0, 8);
    site.stop();
    // One copy is old, one is gone, and the one that knows best cannot be written.
    fs::write(first, old).expect("a copy");
    fs::remove_file(third).expect("a copy");
    let read_only = FaultyFile::read_only(second);
    set_records(&mut site, [first, &read_only.path, third]);
    site.start();
    let log = site.log();
    assert!(log.contains("can be read and not written"), "{log}");
    assert!(log.contains("0.record of the state record is old"), "{log}");
    assert!(!log.contains("was changed"), "{log}");
    let mut guest = Guest::connect(&site);
    guest.check_all(&mut model, true);
    guest.write(&mut model, 2048, 8);
    drop(guest);
    site.stop();
    site.assert_no_failure();
}

#[test]
fn without_locks_the_record_is_read_when_the_replicas_are_ours() {
    let mut first = Site::bare(&["--lock-timeout", "20"]);
    let record = first.images[0].with_extension("record");
    File::create(&record).expect("an empty file");
    let copy = FaultyFile::without_locks(&record);
    first.paths[0].as_mut_os_string().push(",record=");
    first.paths[0].as_mut_os_string().push(&copy.path);
    first.start_with(&["--assume-clean"]);
    let mut model = Model::new(SECTORS);
    let mut guest = Guest::connect(&first);
    guest.write(&mut model, 0, 8);
    // The record can be had, the replicas cannot.
    let mut second = Site::bare(&["--lock-timeout", "20"]);
    second.paths.clone_from(&first.paths);
    second.images.clone_from(&first.images);
    second.start_and_leave();
    second.await_log("waiting up to 20 s for it");
    guest.write(&mut model, 2048, 8);
    drop(guest);
    first.stop();
    second.await_serving();
    let log = second.log();
    assert!(log.contains("has no locks"), "{log}");
    assert!(!log.contains("did not stop cleanly"), "{log}");
    let mut guest = Guest::connect(&second);
    guest.check_all(&mut model, true);
    guest.write(&mut model, 4096, 8);
    drop(guest);
    second.await_equal();
    second.stop();
    drop(copy);
}
