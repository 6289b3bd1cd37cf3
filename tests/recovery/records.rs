// SPDX-License-Identifier: Apache-2.0
//! Copies of the state record that fail while the disk is served (rule R1): one is left out, and
//! without most of them nothing is written that could not be remembered.

use std::fs::{self, File};
use std::time::Duration;

use quorum_blk::front_end::Status;

use crate::common::{FaultyFile, Random};
use crate::guest::Guest;
use crate::model::Model;
use crate::site::{SECTORS, Site};

/// A disk whose first `count` copies of the record go wrong on command.
fn with_faulty_records(count: usize) -> (Vec<FaultyFile>, Site) {
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
    (copies, site)
}

fn busy(guest: &mut Guest, model: &mut Model, random: &mut Random, requests: usize) {
    let worked = guest.work(model, random, 8, |done| done < requests);
    worked.expect("the daemon lives");
}

#[test]
fn a_copy_that_fails_or_hangs_is_left_out_and_nobody_waits_for_it() {
    for fault in ["eio write on", "enospc on", "hang write"] {
        let (copies, mut site) = with_faulty_records(1);
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
    let (copies, mut site) = with_faulty_records(2);
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
