// SPDX-License-Identifier: Apache-2.0
//! Replicas that lie: the guest sees the right data, the liar is named and put right.

use std::fs::OpenOptions;
use std::sync::atomic::{AtomicBool, Ordering};

use quorum_blk::front_end::{FrontEnd, Options, Request, Status};

use crate::common::{Disk, Random, SECTOR, Setup, eventually, temporary_folder};

/// A disk whose first 4 MiB hold random data on all replicas. If one of them was late, there is
/// one fault already, and these tests add as many as can be borne: a new disk is taken then.
fn start(setup: Setup) -> (Disk, FrontEnd, Vec<u8>) {
    let content = Random::new(77).bytes(4 << 20);
    for _ in 0..10 {
        let disk = setup.clone().start();
        let mut front_end = disk.connect(&Options::default());
        let queue = front_end.queue(0);
        for (sector, chunk) in (0..).step_by(128).zip(content.chunks(128 * SECTOR)) {
            queue.write_data(sector, chunk).expect("a write");
        }
        queue.flush().expect("a flush");
        if disk.events_named("QUORUM_BLK_REPLICA_BEHIND").is_empty() {
            return (disk, front_end, content);
        }
    }
    panic!("this machine is too busy for tests of faults");
}

#[track_caller]
fn read_right(front_end: &mut FrontEnd, content: &[u8], sector: u64, sectors: usize) {
    let mut back = vec![0; sectors * SECTOR];
    front_end.queue(0).read(sector, &mut back).expect("a read");
    let at = usize::try_from(sector).expect("small") * SECTOR;
    assert!(back == content[at..at + back.len()], "wrong data");
}

fn part(content: &[u8], sector: usize, sectors: usize) -> &[u8] {
    &content[sector * SECTOR..(sector + sectors) * SECTOR]
}

#[test]
fn spoiled_sectors_are_outvoted_reported_and_repaired() {
    for liar in 0..3 {
        let (mut disk, mut front_end, content) = start(Setup::new());
        disk.assert_nothing_reported();
        disk.spoil(liar, 100, 8, 0xff);
        read_right(&mut front_end, &content, 64, 128);
        let event = disk.await_event("QUORUM_REPORT_BAD", |data| data["sector-num"] == 100);
        let data = &event["data"];
        assert_eq!(data["node-name"], format!("replica{liar}"));
        assert_eq!(data["sectors-count"], 8);
        assert_eq!(data["type"], "read");
        assert!(data.get("error").is_none(), "it could be read: {data}");
        assert!(event["timestamp"]["seconds"].as_u64() > Some(1_000_000_000));
        disk.await_sectors(liar, 100, part(&content, 100, 8));
        assert_eq!(disk.events_named("QUORUM_REPORT_BAD").len(), 1);
        drop(front_end);
        disk.stop_and_compare();
    }
}

#[test]
fn events_name_replicas_as_the_user_does() {
    let folder = temporary_folder();
    let named: Vec<String> = ["red", "green", "blue"]
        .iter()
        .map(|name| {
            let path = folder.path().join(name);
            let file = std::fs::File::create(&path).expect("an image");
            file.set_len(8 << 20).expect("a sparse image");
            format!("{},name={name}", path.display())
        })
        .collect();
    let mut arguments = Vec::new();
    for name in &named {
        arguments.extend(["--replica", name]);
    }
    // Three replicas of the setup and three of ours.
    let disk = Setup::new().arguments(&arguments).start();
    let mut front_end = disk.connect(&Options::default());
    let content = vec![9; SECTOR];
    front_end.queue(0).write_data(0, &content).expect("a write");
    std::fs::write(folder.path().join("green"), vec![3; 8 << 20]).expect("an image");
    read_right(&mut front_end, &content, 0, 1);
    let event = disk.await_event("QUORUM_REPORT_BAD", |_| true);
    assert_eq!(event["data"]["node-name"], "green");
    assert_eq!(event["data"]["sector-num"], 0);
    assert_eq!(event["data"]["sectors-count"], 1);
}

#[test]
fn different_sectors_of_two_replicas_are_both_put_right() {
    let (mut disk, mut front_end, content) = start(Setup::new());
    disk.spoil(0, 200, 4, 1);
    disk.spoil(2, 210, 2, 2);
    disk.spoil(1, 230, 1, 3);
    read_right(&mut front_end, &content, 192, 64);
    for (replica, sector, sectors) in [(0, 200, 4), (2, 210, 2), (1, 230, 1)] {
        let name = format!("replica{replica}");
        disk.await_event("QUORUM_REPORT_BAD", |data| {
            data["node-name"] == name.as_str()
                && data["sector-num"] == sector
                && data["sectors-count"] == sectors
        });
        let right = part(&content, sector, sectors);
        disk.await_sectors(replica, sector as u64, right);
    }
    assert!(disk.events_named("QUORUM_FAILURE").is_empty());
    drop(front_end);
    disk.stop_and_compare();
}

#[test]
fn sector_without_winner_fails_alone() {
    let (mut disk, mut front_end, content) = start(Setup::new());
    disk.spoil(0, 300, 1, 1);
    disk.spoil(1, 300, 1, 2);
    let bad = Request::Read {
        sector: 296,
        len: 8 * SECTOR,
    };
    let completion = front_end.queue(0).run(&bad).expect("an end");
    assert_eq!(completion.status, Status::IoError);
    let event = disk.await_event("QUORUM_FAILURE", |_| true);
    assert_eq!(event["data"]["sector-num"], 300);
    assert_eq!(event["data"]["sectors-count"], 1);
    read_right(&mut front_end, &content, 292, 8);
    read_right(&mut front_end, &content, 301, 8);
    // Nobody may decide on its own: all three versions are still there.
    assert_eq!(disk.sectors_of(0, 300, 1), [1; SECTOR]);
    assert_eq!(disk.sectors_of(1, 300, 1), [2; SECTOR]);
    assert_eq!(disk.sectors_of(2, 300, 1), part(&content, 300, 1));
    // The guest's own write settles it.
    let fresh = [0x42; SECTOR];
    front_end.queue(0).write_data(300, &fresh).expect("a write");
    let mut back = [0; SECTOR];
    front_end.queue(0).read(300, &mut back).expect("a read");
    assert_eq!(back, fresh);
    drop(front_end);
    disk.stop_and_compare();
}

#[test]
fn two_of_five_may_lie_in_the_same_sector() {
    let (mut disk, mut front_end, content) = start(Setup::new().replicas(5));
    disk.spoil(1, 50, 2, 1);
    disk.spoil(3, 51, 2, 1);
    read_right(&mut front_end, &content, 40, 32);
    disk.await_sectors(1, 50, part(&content, 50, 2));
    disk.await_sectors(3, 51, part(&content, 51, 2));
    for (name, sector) in [("replica1", 50), ("replica3", 51)] {
        disk.await_event("QUORUM_REPORT_BAD", |data| {
            data["node-name"] == name && data["sector-num"] == sector && data["sectors-count"] == 2
        });
    }
    drop(front_end);
    disk.stop_and_compare();
}

#[test]
fn repair_off_reports_and_leaves_the_replica_alone() {
    let (mut disk, mut front_end, content) = start(Setup::new().arguments(&["--repair", "off"]));
    disk.spoil(1, 20, 3, 0xaa);
    for _ in 0..3 {
        read_right(&mut front_end, &content, 16, 16);
    }
    disk.await_event("QUORUM_REPORT_BAD", |data| {
        data["sector-num"] == 20 && data["sectors-count"] == 3
    });
    drop(front_end);
    disk.stop();
    assert_eq!(disk.sectors_of(1, 20, 3), [0xaa; 3 * SECTOR]);
}

#[test]
fn partial_overwrite_of_a_spoiled_stretch_keeps_the_rest_right() {
    let (mut disk, mut front_end, mut content) = start(Setup::new());
    disk.spoil(2, 400, 16, 0xee);
    let fresh = [0x11; 4 * SECTOR];
    front_end.queue(0).write_data(404, &fresh).expect("a write");
    content[404 * SECTOR..408 * SECTOR].copy_from_slice(&fresh);
    read_right(&mut front_end, &content, 396, 24);
    disk.await_sectors(2, 400, part(&content, 400, 16));
    drop(front_end);
    disk.stop_and_compare();
}

#[test]
fn truncated_replica_is_no_vote_and_no_harm() {
    let (mut disk, mut front_end, content) = start(Setup::new());
    let file = OpenOptions::new().write(true).open(&disk.images[1]);
    file.expect("an image")
        .set_len(1 << 20)
        .expect("a shorter image");
    // The first half of what is read is there, the second is not.
    read_right(&mut front_end, &content, 2040, 16);
    read_right(&mut front_end, &content, 4096, 64);
    let event = disk.await_event("QUORUM_REPORT_BAD", |data| data["node-name"] == "replica1");
    assert!(
        event["data"]["sector-num"].as_u64() >= Some(2048),
        "{event}"
    );
    let fresh = vec![3; 64 * SECTOR];
    front_end
        .queue(0)
        .write_data(4096, &fresh)
        .expect("a write");
    let mut back = vec![0; fresh.len()];
    front_end.queue(0).read(4096, &mut back).expect("a read");
    assert!(back == fresh);
    drop(front_end);
    disk.stop();
    assert_eq!(disk.sectors_of(0, 4096, 64), fresh);
    assert_eq!(disk.sectors_of(2, 4096, 64), fresh);
}

#[test]
fn garbage_under_load_never_reaches_the_guest() {
    let (mut disk, mut front_end, content) = start(Setup::new());
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (disk, over) = (&disk, &over);
        scope.spawn(move || {
            let mut random = Random::new(11);
            while !over.load(Ordering::Relaxed) {
                let sectors = 1 + random.below(16);
                let sector = random.below(8192 - sectors) as u64;
                let byte = random.next().to_le_bytes()[0];
                disk.spoil(1, sector, sectors, byte);
            }
        });
        let mut random = Random::new(12);
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            for _ in 0..1500 {
                let sectors = 1 + random.below(128);
                let sector = random.below(8192 - sectors) as u64;
                read_right(&mut front_end, &content, sector, sectors);
            }
        }));
        over.store(true, Ordering::Relaxed);
        if let Err(panic) = outcome {
            std::panic::resume_unwind(panic);
        }
    });
    assert!(disk.events_named("QUORUM_FAILURE").is_empty());
    disk.await_event("QUORUM_REPORT_BAD", |data| data["node-name"] == "replica1");
    read_right(&mut front_end, &content, 0, 8192);
    drop(front_end);
    disk.stop();
    // What was spoiled while it was being repaired may be so still; the others never were.
    for replica in [0, 2] {
        assert!(disk.sectors_of(replica, 0, 8192) == content);
    }
}

#[test]
fn repeated_reports_are_limited_and_counted() {
    let (mut disk, mut front_end, content) = start(Setup::new());
    for at in 0..50usize {
        let sector = at as u64 * 100;
        disk.spoil(0, sector, 1, 0x99);
        // A late vote is not compared when a repair nearby came in between (rule V7): read again.
        let repaired = eventually(|| {
            read_right(&mut front_end, &content, sector, 8);
            (disk.sectors_of(0, sector, 1) == part(&content, at * 100, 1)).then_some(())
        });
        assert!(repaired.is_some(), "sector {sector} stays as it is");
    }
    let events = eventually(|| {
        let events = disk.events_named("QUORUM_REPORT_BAD");
        let last = events.last()?["data"]["sector-num"].as_u64()?;
        (last == 4900).then_some(events)
    });
    let events = events.expect("the last report is kept");
    assert!(
        events.len() < 10,
        "{} events in a second or two",
        events.len()
    );
    let suppressed: u64 = events
        .iter()
        .filter_map(|event| event["data"]["suppressed"].as_u64())
        .sum();
    assert_eq!(suppressed + events.len() as u64, 50);
    drop(front_end);
    disk.stop_and_compare();
}

#[test]
fn blkverify_stops_at_the_first_difference() {
    let setup = Setup::new().replicas(2).arguments(&["--blkverify"]);
    let (mut disk, mut front_end, content) = start(setup);
    read_right(&mut front_end, &content, 0, 64);
    disk.spoil(1, 33, 1, 5);
    let bad = Request::Read {
        sector: 32,
        len: 8 * SECTOR,
    };
    let ended = front_end.queue(0).run(&bad);
    assert!(
        !matches!(&ended, Ok(completion) if completion.status == Status::Ok),
        "{ended:?}"
    );
    let status = disk.process().wait(crate::common::PATIENCE);
    assert!(!status.success(), "{status}");
    let event = disk.await_event("QUORUM_BLK_VERIFY_FAILED", |_| true);
    assert_eq!(event["data"]["sector-num"], 33);
}
