// SPDX-License-Identifier: Apache-2.0
//! The first comparison of adopted images, scrubs, and what the daemon says of itself.

use std::fs;
use std::time::Duration;

use serde_json::Value;

use crate::common::{Random, SECTOR, Signal};
use crate::guest::Guest;
use crate::model::{Model, content};
use crate::site::{SECTORS, Site};
use quorum_blk::front_end::Status;
use quorum_blk::record::Superblock;

/// Images that hold version 1 of every sector, never served.
fn images_of_one_version() -> (Site, Model) {
    let site = Site::bare(&[]);
    let mut model = Model::new(SECTORS);
    let version = model.begin(0, SECTORS);
    model.acknowledge(0, SECTORS, version);
    let bytes = content(0, SECTORS, version);
    for image in &site.images {
        fs::write(image, &bytes).expect("an image");
    }
    (site, model)
}

fn is_done(kind: &str, counts: [(&str, u64); 3]) -> impl Fn(&Value) -> bool {
    move |data| {
        data["type"] == kind
            && counts
                .iter()
                .all(|(name, count)| data[*name].as_u64() == Some(*count))
    }
}

#[test]
fn the_first_comparison_finds_and_repairs_what_was_wrong_before() {
    let (mut site, mut model) = images_of_one_version();
    site.spoil(0, 100, 3, 0xaa);
    site.spoil(1, 5000, 2, 0xbb);
    site.spoil(2, SECTORS - 1, 1, 0xcc);
    site.start();
    let counts = [
        ("compared-sectors", SECTORS as u64),
        ("differing-sectors", 6),
        ("repaired-sectors", 6),
    ];
    site.await_event("QUORUM_BLK_SCRUB_DONE", is_done("verify", counts));
    site.await_equal();
    Guest::connect(&site).check_all(&mut model, false);
    site.stop();
    assert_eq!(site.difference(), None);
    // Once, not again.
    site.start();
    Guest::connect(&site).check_all(&mut model, false);
    site.stop();
    assert!(site.events("QUORUM_BLK_SCRUB_BEGUN").is_empty());
}

#[test]
fn sectors_that_nobody_agrees_on_are_errors_until_they_are_written() {
    let (mut site, mut model) = images_of_one_version();
    site.spoil(0, 700, 1, 1);
    site.spoil(1, 700, 1, 2);
    // Its neighbour is wrong on one replica only.
    site.spoil(2, 703, 1, 3);
    site.start();
    let counts = [
        ("differing-sectors", 1),
        ("unresolved-sectors", 1),
        ("repaired-sectors", 1),
    ];
    site.await_event("QUORUM_BLK_SCRUB_DONE", is_done("verify", counts));
    let mut guest = Guest::connect(&site);
    assert_eq!(guest.status_of_read(700), Status::IoError);
    assert_eq!(guest.status_of_read(701), Status::Ok);
    guest.write(&mut model, 700, 1);
    guest.check_all(&mut model, false);
    drop(guest);
    site.await_equal();
    site.stop();
}

#[test]
fn a_scrub_finds_rot_that_nobody_reads() {
    let mut site = Site::new(&[]);
    let mut model = Model::new(SECTORS);
    let mut random = Random::new(51);
    let mut guest = Guest::connect(&site);
    let worked = guest.work(&mut model, &mut random, 8, |done| done < 200);
    worked.expect("the daemon lives");
    guest.flush(&mut model);
    site.spoil(1, 3000, 16, 0x77);
    site.process().signal(Signal::User2);
    // Beside a guest that works.
    let worked = guest.work(&mut model, &mut random, 2, |done| done < 300);
    worked.expect("the daemon lives");
    site.await_event("QUORUM_BLK_SCRUB_DONE", |data| data["type"] == "scrub");
    drop(guest);
    site.await_equal();
    site.assert_no_failure();
    site.stop();
    assert_eq!(site.difference(), None);
}

#[test]
fn a_scrub_that_only_checks_changes_nothing() {
    let mut site = Site::new(&["--scrub", "check"]);
    site.spoil(1, 3000, 16, 0x77);
    let spoiled = fs::read(&site.images[1]).expect("an image");
    site.process().signal(Signal::User2);
    let counts = [
        ("compared-sectors", SECTORS as u64),
        ("differing-sectors", 16),
        ("repaired-sectors", 0),
    ];
    site.await_event("QUORUM_BLK_SCRUB_DONE", is_done("scrub", counts));
    let now = fs::read(&site.images[1]).expect("an image");
    assert!(now == spoiled, "it was written to");
    assert_eq!(now[3000 * SECTOR], 0x77);
    site.stop();
}

#[test]
fn status_tells_states_and_what_is_left_to_do() {
    let mut site = Site::new(&[]);
    let status = site.status();
    assert!(status.contains("the disk is healthy"), "{status}");
    for replica in ["replica0", "replica1", "replica2"] {
        assert!(status.contains(&format!("{replica}  in-sync")), "{status}");
    }
    let mut model = Model::new(SECTORS);
    let mut guest = Guest::connect(&site);
    guest.write(&mut model, 0, 8);
    let away = site.folder().join("away");
    fs::rename(&site.images[2], &away).expect("a file of ours");
    site.await_state(2, "missing");
    guest.write(&mut model, 4096, 8);
    let status = site.status();
    assert!(status.contains("the disk is degraded"), "{status}");
    assert!(status.contains("replica2  missing"), "{status}");
    assert!(status.contains("behind in 2 extents: 2 MiB"), "{status}");
    fs::rename(&away, &site.images[2]).expect("a file of ours");
    site.await_state(2, "in-sync");
    assert!(site.status().contains("the disk is healthy"));
    drop(guest);
    site.stop();
}

#[test]
fn a_scrub_does_not_keep_writes_out_while_a_replica_hangs() {
    let mut site = Site::faulty(&[1], &["--io-timeout", "20"]);
    let mut model = Model::new(SECTORS);
    let mut guest = Guest::connect(&site);
    guest.write(&mut model, 0, 8);
    site.fault(1).tell("hang read");
    site.process().signal(Signal::User2);
    site.fault(1).wait_until_at_least("held", 1);
    // The range of the first piece, long before the replica counts as hung.
    let taken = guest.write(&mut model, 8, 8);
    assert!(taken < Duration::from_secs(8), "{taken:?}");
    site.fault(1).tell("resume");
    site.await_event("QUORUM_BLK_SCRUB_DONE", |data| {
        data["type"] == "scrub" && data["failed-sectors"].as_u64() > Some(0)
    });
    drop(guest);
    site.await_equal();
    site.assert_no_failure();
    site.stop();
}

#[test]
fn the_time_to_the_next_scrub_goes_on_over_restarts() {
    let mut site = Site::new(&["--scrub-interval", "1m"]);
    site.stop();
    // As if that had been an hour ago.
    for copy in 0..3 {
        let path = site.record(copy);
        let mut bytes = fs::read(&path).expect("a copy of the record");
        for block in bytes[..2 * 4096].chunks_mut(4096) {
            let block: &mut [u8; 4096] = block.try_into().expect("a block");
            let mut superblock = Superblock::decode(block).expect("a superblock");
            assert!(
                superblock.scrubbed_at > 0,
                "counted from the first start on"
            );
            superblock.scrubbed_at -= 3600;
            *block = superblock.encode();
        }
        fs::write(&path, bytes).expect("a copy of the record");
    }
    site.start();
    site.await_event("QUORUM_BLK_SCRUB_DONE", |data| data["type"] == "scrub");
    site.stop();
    // That one is over.
    site.start();
    site.stop();
    assert!(site.events("QUORUM_BLK_SCRUB_BEGUN").is_empty());
}
