// SPDX-License-Identifier: Apache-2.0
//! What a daemon makes of the record and the replicas that it finds (CONSISTENCY section 9): real
//! files that are changed, lost, exchanged and brought back between two runs.
#![allow(
    clippy::unwrap_used,
    reason = "everything in this file is test code, helpers included"
)]

mod common;

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Instant;

use common::{Disk, PATIENCE, SECTOR, Setup, Signal, assert_same, eventually};
use quorum_blk::config::FirstUse;
use quorum_blk::daemon::first_use::{self, RunIds};
use quorum_blk::front_end::Options;
use quorum_blk::quorum::{Geometry, Marks, Policy};
use quorum_blk::record::{Fingerprint, Opened, RecordAction, RecordEvent, Recorder};
use quorum_blk::replica::{Cache, RawOptions, RawReplica};
use quorum_blk::units::Time;

const BYTES: usize = 4 << 20;

/// The sector that tests write.
const AT: u64 = 4100;

fn setup() -> Setup {
    Setup::new()
        .bytes(BYTES as u64)
        .arguments(&["--lock-timeout", "2"])
}

/// The log of the runs so far.
fn log(disk: &mut Disk) -> String {
    disk.process().log()
}

/// What the daemon says at its next start.
fn log_of_start(disk: &mut Disk) -> String {
    let before = log(disk).len();
    disk.start_again();
    log(disk)[before..].to_owned()
}

fn write(disk: &Disk, byte: u8) {
    let mut front_end = disk.connect(&Options::default());
    let data = vec![byte; 8 * SECTOR];
    front_end.queue(0).write_data(AT, &data).unwrap();
    front_end.queue(0).flush().unwrap();
}

#[track_caller]
fn expect(disk: &Disk, byte: u8) {
    let mut front_end = disk.connect(&Options::default());
    let mut data = vec![0; 8 * SECTOR];
    front_end.queue(0).read(AT, &mut data).unwrap();
    assert!(
        data == vec![byte; 8 * SECTOR],
        "{} instead of {byte}",
        data[0]
    );
}

/// Waits until the keeper says that a replica lacks nothing any more.
#[track_caller]
fn await_resync(disk: &mut Disk, from: usize, replica: &str) {
    let done = format!("replica {replica} lacks nothing any more");
    let found = eventually(|| log(disk)[from..].contains(&done).then_some(()));
    assert!(found.is_some(), "{replica} is not brought up to date");
}

fn copies(disk: &Disk) -> Vec<PathBuf> {
    let beside = |image: &PathBuf| {
        let mut path = image.clone().into_os_string();
        path.push(".qrec");
        PathBuf::from(path)
    };
    disk.images.iter().map(beside).collect()
}

fn hide(disk: &Disk, replica: usize) {
    fs::rename(&disk.images[replica], disk.folder().join("hidden")).unwrap();
}

fn unhide(disk: &Disk, replica: usize) {
    fs::rename(disk.folder().join("hidden"), &disk.images[replica]).unwrap();
}

/// Stops the daemon; all replicas must then be equal.
fn stop_and_compare(disk: &mut Disk) {
    disk.stop();
    let first = fs::read(&disk.images[0]).unwrap();
    for image in &disk.images[1..] {
        assert_same(image, &fs::read(image).unwrap(), &first);
    }
}

#[test]
fn record_is_made_the_first_time_and_found_the_second() {
    let mut disk = setup().start();
    assert!(log(&mut disk).contains("the disk is served for the first time"));
    for copy in copies(&disk) {
        assert_eq!(fs::metadata(copy).unwrap().len(), 36 * 4096);
    }
    write(&disk, 1);
    disk.stop();
    let said = log_of_start(&mut disk);
    assert!(
        !said.contains("WARN") && !said.contains("first time"),
        "{said}"
    );
    expect(&disk, 1);
    stop_and_compare(&mut disk);
}

#[test]
fn first_time_needs_all_replicas_and_leaves_nothing_without() {
    let mut disk = setup().start();
    disk.stop();
    for copy in copies(&disk) {
        fs::remove_file(copy).unwrap();
    }
    hide(&disk, 1);
    let said = disk.refusal();
    assert!(said.contains("'replica1'"), "{said}");
    assert!(
        said.contains("the first time all of its replicas must be there"),
        "{said}"
    );
    assert!(copies(&disk).iter().all(|copy| !copy.exists()));
}

/// Makes a record as a first start does, but only the writes to its first copy take place.
fn half_make_record(disk: &Disk) {
    let geometry = Geometry::new(BYTES as u64 / 512, 1).unwrap();
    let ids = RunIds::new().unwrap();
    let prints = [Fingerprint::default(); 3];
    let policy = Policy::new(3);
    let first = first_use::superblock(&geometry, &policy, FirstUse::Verify, ids, &prints).unwrap();
    let files: Vec<File> = copies(disk)
        .iter()
        .map(|copy| {
            let mut options = File::options();
            let options = options.read(true).write(true).create(true).truncate(true);
            let file = options.open(copy).unwrap();
            file.set_len(first.layout().length_bytes()).unwrap();
            file
        })
        .collect();
    let marks = Marks::new(3, geometry.extents(), true);
    let mut recorder = Recorder::new(Opened::create(first, 3), &[true; 3], ids.run).unwrap();
    let mut actions = Vec::new();
    recorder.handle(Time::default(), RecordEvent::Poll, &marks, &mut actions);
    while let Some(action) = actions.pop() {
        let RecordAction::Write {
            copy: copy @ 0,
            write,
            block,
            bytes,
        } = action
        else {
            continue;
        };
        files[0].write_all_at(&bytes[..], block * 4096).unwrap();
        let errno = None;
        let event = RecordEvent::Written { copy, write, errno };
        recorder.handle(Time::default(), event, &marks, &mut actions);
    }
    let block: &mut [u8] = &mut [0; 8];
    files[0].read_exact_at(block, 0).unwrap();
    assert_eq!(block, b"qblk-rec", "the first copy is finished");
}

#[test]
fn record_whose_making_was_cut_short_is_made_again() {
    let mut disk = setup().start();
    disk.stop();
    half_make_record(&disk);
    let said = log_of_start(&mut disk);
    assert!(said.contains("served for the first time"), "{said}");
    disk.stop();
    for copy in copies(&disk) {
        // No room for more than the name.
        File::create(copy).unwrap();
    }
    let said = log_of_start(&mut disk);
    assert!(said.contains("served for the first time"), "{said}");
    disk.assert_serves();
}

#[test]
fn adopted_replica_becomes_the_disk() {
    let mut disk = setup().start();
    disk.stop();
    for copy in copies(&disk) {
        fs::remove_file(copy).unwrap();
    }
    for (replica, image) in disk.images.iter().enumerate() {
        let byte = u8::try_from(replica).unwrap();
        fs::write(image, vec![byte; BYTES]).unwrap();
    }
    disk.set_arguments(&["--adopt-from", "replica1"]);
    let from = log(&mut disk).len();
    disk.start_again();
    expect(&disk, 1);
    await_resync(&mut disk, from, "replica0");
    await_resync(&mut disk, from, "replica2");
    disk.stop();
    for image in &disk.images {
        assert_same(image, &fs::read(image).unwrap(), &vec![1; BYTES]);
    }
    // The argument may stay where it is, in a unit file for example.
    assert!(log_of_start(&mut disk).contains("change nothing here"));
}

#[test]
fn replica_that_was_changed_does_not_vote_and_is_rewritten() {
    let mut disk = setup().start();
    write(&disk, 7);
    disk.stop();
    disk.spoil(1, AT, 8, 0xee);
    disk.spoil(1, 0, 8, 0xee);
    let from = log(&mut disk).len();
    let said = log_of_start(&mut disk);
    assert!(
        said.contains("replica 'replica1' changed while the disk was not served"),
        "{said}"
    );
    expect(&disk, 7);
    await_resync(&mut disk, from, "replica1");
    // It was not asked: nobody is blamed.
    disk.assert_nothing_reported();
    stop_and_compare(&mut disk);
}

#[test]
fn disk_whose_replicas_all_changed_votes_and_is_compared() {
    let mut disk = setup().start();
    write(&disk, 7);
    disk.stop();
    for replica in 0..3 {
        disk.spoil(replica, AT, 8, 9);
    }
    disk.spoil(2, AT + 16, 1, 0xee);
    let said = log_of_start(&mut disk);
    assert!(said.contains("every replica changed"), "{said}");
    expect(&disk, 9);
    disk.await_sectors(2, AT + 16, &[0; SECTOR]);
    stop_and_compare(&mut disk);
}

#[test]
fn missing_replica_gets_what_it_missed_in_a_later_run() {
    let mut disk = setup().start();
    write(&disk, 1);
    disk.stop();
    hide(&disk, 2);
    let said = log_of_start(&mut disk);
    assert!(
        said.contains("'replica2'") && said.contains("served without it"),
        "{said}"
    );
    write(&disk, 2);
    disk.end(Signal::Kill);
    // Back before the next run, with old data; a replica that has the new is away.
    unhide(&disk, 2);
    hide(&disk, 0);
    disk.start_again();
    expect(&disk, 2);
    let from = log(&mut disk).len();
    disk.stop();
    unhide(&disk, 0);
    disk.start_again();
    await_resync(&mut disk, from, "replica0");
    expect(&disk, 2);
    stop_and_compare(&mut disk);
}

/// Bytes that a replica lacks when its resync begins, as it says.
#[track_caller]
fn lacking(disk: &mut Disk, from: usize, replica: &str) -> u64 {
    await_resync(disk, from, replica);
    let log = log(disk);
    let said = format!("resync of replica {replica} begins");
    let line = log[from..].lines().find(|line| line.contains(&said));
    let (_, bytes) = line.unwrap().rsplit_once("bytes_left=").unwrap();
    bytes.trim().parse().unwrap()
}

#[test]
fn missing_replica_that_nobody_touched_gets_only_what_it_missed() {
    // It comes back while the disk is served, or before; one more run goes by, or not.
    for (while_served, runs) in [(true, 1), (false, 1), (false, 2)] {
        let mut disk = setup().start();
        write(&disk, 1);
        disk.stop();
        hide(&disk, 2);
        for _ in 0..runs {
            disk.start_again();
            write(&disk, 2);
            if !while_served {
                disk.stop();
            }
        }
        let from = log(&mut disk).len();
        unhide(&disk, 2);
        if !while_served {
            disk.start_again();
        }
        assert_eq!(lacking(&mut disk, from, "replica2"), 1 << 20);
        expect(&disk, 2);
        stop_and_compare(&mut disk);
    }
}

#[test]
fn killed_daemon_is_told_of_and_everything_is_made_equal() {
    let mut disk = setup().start();
    write(&disk, 3);
    disk.end(Signal::Kill);
    // What a power loss may leave: a write that only one replica had.
    disk.spoil(1, AT + 3, 1, 0xee);
    let said = log_of_start(&mut disk);
    assert!(said.contains("did not stop cleanly"), "{said}");
    assert!(said.contains("dirty extents are made equal"), "{said}");
    expect(&disk, 3);
    disk.await_sectors(1, AT + 3, &[3; SECTOR]);
    stop_and_compare(&mut disk);
}

#[test]
fn versions_that_nobody_can_vote_on_after_a_crash_become_one() {
    let mut disk = setup().replicas(2).start();
    write(&disk, 3);
    disk.end(Signal::Kill);
    disk.spoil(1, AT, 8, 4);
    disk.start_again();
    // Without the rule for crashes: one vote against one.
    expect(&disk, 3);
    disk.await_sectors(1, AT, &[3; 8 * SECTOR]);
    stop_and_compare(&mut disk);
}

#[test]
fn replaced_replica_is_known_in_its_new_file_also_after_a_crash() {
    let mut disk = setup().start();
    write(&disk, 1);
    disk.stop();
    // Beside the old one, so that it cannot get its inode.
    let new = disk.folder().join("new");
    fs::write(&new, vec![0xee; BYTES]).unwrap();
    fs::rename(&new, &disk.images[1]).unwrap();
    let from = log(&mut disk).len();
    let said = log_of_start(&mut disk);
    assert!(
        said.contains("is not the file or device that it was"),
        "{said}"
    );
    await_resync(&mut disk, from, "replica1");
    disk.end(Signal::Kill);
    let said = log_of_start(&mut disk);
    assert!(!said.contains("is not the file"), "{said}");
    expect(&disk, 1);
    stop_and_compare(&mut disk);
}

#[test]
fn replicas_that_were_written_off_are_overwritten_when_they_come_back() {
    let mut disk = setup().start();
    write(&disk, 1);
    disk.stop();
    hide(&disk, 1);
    let other = disk.folder().join("other");
    fs::rename(&disk.images[2], &other).unwrap();
    disk.spoil(0, AT, 8, 2);
    let said = disk.refusal();
    assert!(
        said.contains("every replica that is there was changed"),
        "{said}"
    );
    disk.set_arguments(&["--force"]);
    let from = log(&mut disk).len();
    disk.start_again();
    // As they were left, and no extent was written since: but they are not the disk any more.
    unhide(&disk, 1);
    fs::rename(&other, &disk.images[2]).unwrap();
    await_resync(&mut disk, from, "replica1");
    await_resync(&mut disk, from, "replica2");
    expect(&disk, 2);
    disk.assert_nothing_reported();
    stop_and_compare(&mut disk);
}

#[test]
fn exchanged_replicas_are_refused_with_the_right_order() {
    for clean in [true, false] {
        let mut disk = setup().start();
        write(&disk, 1);
        if clean {
            disk.stop();
        } else {
            disk.end(Signal::Kill);
        }
        fs::rename(&disk.images[1], disk.folder().join("other")).unwrap();
        fs::rename(&disk.images[2], &disk.images[1]).unwrap();
        fs::rename(disk.folder().join("other"), &disk.images[2]).unwrap();
        let said = disk.refusal();
        assert!(
            said.contains("give them as replica0, replica2, replica1"),
            "{said}"
        );
        // Given as before they are taken, wherever they are.
        disk.images.swap(1, 2);
        disk.start_again();
        expect(&disk, 1);
    }
}

#[test]
fn minority_is_served_by_force_only_and_overwrites_the_others() {
    let mut disk = setup().start();
    write(&disk, 1);
    disk.stop();
    hide(&disk, 1);
    let other = disk.folder().join("other");
    fs::rename(&disk.images[2], &other).unwrap();
    let said = disk.refusal();
    assert!(
        said.contains("only 1 of 3 replicas can be used, and 2 are needed"),
        "{said}"
    );
    assert!(said.contains("--force"), "{said}");

    disk.set_arguments(&["--force"]);
    disk.start_again();
    write(&disk, 2);
    disk.stop();
    unhide(&disk, 1);
    fs::rename(&other, &disk.images[2]).unwrap();
    disk.set_arguments(&[]);
    let from = log(&mut disk).len();
    disk.start_again();
    expect(&disk, 2);
    await_resync(&mut disk, from, "replica1");
    await_resync(&mut disk, from, "replica2");
    stop_and_compare(&mut disk);
}

#[test]
fn replica_in_use_elsewhere_is_waited_for_and_then_left_out() {
    let mut disk = setup().start();
    disk.stop();
    let options = RawOptions {
        cache: Cache::Buffered,
        ..RawOptions::new("other", &disk.images[2])
    };
    let other = RawReplica::open(&options).unwrap();
    let begin = Instant::now();
    let said = log_of_start(&mut disk);
    assert!(begin.elapsed().as_secs() >= 2, "it is waited for");
    assert!(begin.elapsed() < PATIENCE);
    assert!(said.contains("in use by"), "{said}");
    assert!(said.contains("the disk is served without it"), "{said}");
    drop(other);
    disk.assert_serves();
}

#[test]
fn lost_copies_of_the_record_are_made_anew_as_long_as_most_are_left() {
    let mut disk = setup().start();
    write(&disk, 1);
    disk.stop();
    let records = copies(&disk);
    fs::remove_file(&records[0]).unwrap();
    let said = log_of_start(&mut disk);
    assert!(said.contains("was missing: it is made anew"), "{said}");
    disk.stop();
    assert!(!log_of_start(&mut disk).contains("WARN"));
    disk.stop();

    fs::remove_file(&records[0]).unwrap();
    fs::remove_file(&records[1]).unwrap();
    let said = disk.refusal();
    assert!(
        said.contains("only 1 of 3 copies of the state record can be used"),
        "{said}"
    );
    disk.set_arguments(&["--force"]);
    disk.start_again();
    expect(&disk, 1);
    stop_and_compare(&mut disk);
    disk.set_arguments(&[]);
    assert!(!log_of_start(&mut disk).contains("copies of the state record"));
}

#[test]
fn record_that_may_be_old_makes_no_replica_win_by_its_age() {
    let mut disk = setup().start();
    write(&disk, 1);
    disk.stop();
    let records = copies(&disk);
    let other = disk.folder().join("other");
    // A run without a replica and the copy beside it, and then that copy is all that is left.
    fs::rename(&records[2], &other).unwrap();
    hide(&disk, 2);
    disk.start_again();
    write(&disk, 2);
    disk.stop();
    fs::rename(&other, &records[2]).unwrap();
    unhide(&disk, 2);
    fs::remove_file(&records[0]).unwrap();
    fs::remove_file(&records[1]).unwrap();
    disk.set_arguments(&["--force"]);
    let said = log_of_start(&mut disk);
    assert!(said.contains("a minority of the copies"), "{said}");
    expect(&disk, 2);
    disk.await_sectors(2, AT, &[2; 8 * SECTOR]);
    stop_and_compare(&mut disk);
}

#[test]
fn copy_of_the_record_is_not_made_where_its_replica_is_missing() {
    let mut disk = setup().start();
    disk.stop();
    // A file system that is not mounted: its folder is there, and empty.
    let record = copies(&disk).swap_remove(2);
    let other = disk.folder().join("other");
    fs::rename(&record, &other).unwrap();
    hide(&disk, 2);
    let said = log_of_start(&mut disk);
    assert!(said.contains("is missing, as its replica is"), "{said}");
    write(&disk, 1);
    disk.stop();
    assert!(!record.exists());
    fs::rename(&other, &record).unwrap();
    unhide(&disk, 2);
    let from = log(&mut disk).len();
    let said = log_of_start(&mut disk);
    assert!(said.contains("is old and is brought up to date"), "{said}");
    assert_eq!(lacking(&mut disk, from, "replica2"), 1 << 20);
    stop_and_compare(&mut disk);
    let said = log_of_start(&mut disk);
    assert!(!said.contains("WARN"), "{said}");
}

#[test]
fn file_that_is_no_copy_of_the_record_is_not_touched() {
    let mut disk = setup().start();
    disk.stop();
    let place = &copies(&disk)[1];
    let text = "somebody's notes\n".repeat(20_000);
    fs::write(place, &text).unwrap();
    let said = log_of_start(&mut disk);
    assert!(
        said.contains("replica1.img.qrec of the state record cannot be used"),
        "{said}"
    );
    write(&disk, 1);
    disk.stop();
    assert_eq!(fs::read_to_string(place).unwrap(), text);
}

#[test]
fn shorter_replica_is_left_out_and_longer_ones_are_cut() {
    let mut disk = setup().start();
    write(&disk, 1);
    disk.stop();
    for (replica, length) in [(0, BYTES / 2), (1, 2 * BYTES), (2, 2 * BYTES)] {
        let image = File::options().write(true).open(&disk.images[replica]);
        image.unwrap().set_len(length as u64).unwrap();
    }
    let said = disk.refusal();
    assert!(
        said.contains("every replica that is there was changed"),
        "{said}"
    );
    let image = File::options().write(true).open(&disk.images[0]).unwrap();
    image.set_len(2 * BYTES as u64).unwrap();
    let said = log_of_start(&mut disk);
    assert!(said.contains("the rest is not used"), "{said}");
    let mut front_end = disk.connect(&Options::default());
    assert_eq!(
        front_end.config().unwrap().capacity_sectors,
        BYTES as u64 / 512
    );
}

#[test]
fn other_number_of_replicas_is_refused() {
    let mut disk = setup().replicas(5).start();
    disk.stop();
    disk.images.truncate(4);
    let said = disk.refusal();
    assert!(
        said.contains("of a disk of 5 replicas, and 4 are given"),
        "{said}"
    );
}

#[test]
fn guest_may_write_what_looks_like_another_format() {
    let mut disk = setup().start();
    let mut front_end = disk.connect(&Options::default());
    let mut data = vec![0; SECTOR];
    data[..4].copy_from_slice(b"QFI\xfb");
    front_end.queue(0).write_data(0, &data).unwrap();
    drop(front_end);
    disk.stop();
    disk.start_again();
}

#[test]
fn reader_heeds_the_record_and_does_not_write_it() {
    let mut disk = setup().start();
    write(&disk, 1);
    disk.stop();
    disk.spoil(0, AT, 8, 2);
    disk.spoil(1, AT, 8, 2);
    let before = fs::read(&copies(&disk)[0]).unwrap();
    disk.set_arguments(&["--read-only"]);
    // Two of three say otherwise, but they were changed.
    disk.start_again();
    let mut front_end = disk.connect(&Options::default());
    let mut data = vec![0; SECTOR];
    let read = front_end.queue(0).read(AT, &mut data);
    assert!(read.is_err() || data == [1; SECTOR], "{:?}", data[0]);
    drop(front_end);
    disk.stop();
    assert!(fs::read(&copies(&disk)[0]).unwrap() == before);
    for copy in copies(&disk) {
        fs::remove_file(copy).unwrap();
    }
    disk.start_again();
    expect(&disk, 2);
    assert!(copies(&disk).iter().all(|copy| !copy.exists()));
}

#[test]
fn first_starts_at_the_same_time_do_not_keep_replicas_from_each_other() {
    let mut disk = setup().start();
    disk.stop();
    for copy in copies(&disk) {
        fs::remove_file(copy).unwrap();
    }
    // In the order in which everybody opens them, as a start that is further on does.
    let mut images = disk.images.clone();
    images.sort_by_key(|image| fs::metadata(image).unwrap().ino());
    let open = |image: &PathBuf| {
        let mut options = RawOptions::new("other".to_owned(), image.clone());
        options.cache = Cache::Buffered;
        RawReplica::open(&options)
    };
    let held = open(&images[1]).unwrap();
    disk.set_arguments(&["--lock-timeout", "20"]);
    let mut arguments = disk.serve_arguments();
    arguments.extend(["--socket-path".into(), disk.socket.clone().into()]);
    let mut process = common::Process::start(disk.folder(), &arguments);
    let waits = eventually(|| process.log().contains("waiting up to 20 s").then_some(()));
    assert!(waits.is_some(), "{}", process.log());
    // It waits for the second one; the third is for whoever has that.
    let last = open(&images[2]).expect("nobody has it");
    drop((held, last));
    let serves = eventually(|| UnixStream::connect(&disk.socket).ok());
    assert!(serves.is_some(), "{}", process.log());
    process.signal(Signal::Terminate);
    assert!(process.wait(PATIENCE).success());
}

#[test]
fn copies_of_the_record_in_each_others_places_are_refused() {
    let mut disk = setup().start();
    write(&disk, 1);
    disk.stop();
    let exchange = |a: &PathBuf, b: &PathBuf| {
        // As new files, which are not known again by anything.
        let (left, right) = (fs::read(a).unwrap(), fs::read(b).unwrap());
        for (path, bytes) in [(a, right), (b, left)] {
            let other = path.with_extension("new");
            fs::write(&other, bytes).unwrap();
            fs::rename(other, path).unwrap();
        }
    };
    let records = copies(&disk);
    exchange(&records[0], &records[1]);
    // The replicas are known to be where they belong.
    let said = log_of_start(&mut disk);
    assert!(
        said.contains("replica0.img.qrec is number 1 and was 2"),
        "{said}"
    );
    assert!(said.contains("move them back"), "{said}");
    disk.stop();
    exchange(&records[0], &records[1]);
    disk.start_again();
    expect(&disk, 1);
    disk.stop();
    // Copied to another host, and two of them given for each other: all have changed.
    for files in [&disk.images, &records] {
        exchange(&files[0], &files[1]);
    }
    exchange(&disk.images[2], &disk.images[2]);
    let said = disk.refusal();
    assert!(said.contains("in another order"), "{said}");
}
