// SPDX-License-Identifier: Apache-2.0
//! Files of replicas that are taken away, exchanged or cut short while the disk is served.

use std::fs::{self, File};

use crate::common::{Random, SECTOR};
use crate::guest::Guest;
use crate::model::Model;
use crate::site::{SECTORS, Site};

/// No replica is given up for what these tests do to it.
const LENIENT: [&str; 6] = [
    "--max-kicks",
    "0",
    "--max-write-errors",
    "0",
    "--max-repairs",
    "0",
];

fn busy(guest: &mut Guest, model: &mut Model, random: &mut Random, requests: usize) {
    let worked = guest.work(model, random, 8, |done| done < requests);
    worked.expect("the daemon lives");
}

#[test]
fn a_file_taken_away_and_put_back_gets_what_it_missed() {
    let mut site = Site::new(&[]);
    let mut model = Model::new(SECTORS);
    let mut random = Random::new(31);
    let mut guest = Guest::connect(&site);
    busy(&mut guest, &mut model, &mut random, 200);
    let away = site.folder().join("away");
    fs::rename(&site.images[1], &away).expect("a file of ours");
    site.await_event("QUORUM_BLK_REPLICA_KICKED", |data| {
        data["replica"] == "replica1" && data["cause"] == "vanished"
    });
    busy(&mut guest, &mut model, &mut random, 300);
    guest.flush(&mut model);
    assert!(site.status().contains("replica1  missing"));
    fs::rename(&away, &site.images[1]).expect("a file of ours");
    busy(&mut guest, &mut model, &mut random, 300);
    site.await_state(1, "in-sync");
    guest.check_all(&mut model, false);
    drop(guest);
    site.await_equal();
    site.assert_no_failure();
    site.stop();
    assert_eq!(site.difference(), None);
}

#[test]
fn an_older_copy_in_the_place_of_a_file_never_shows_its_data() {
    let mut site = Site::new(&LENIENT);
    let mut model = Model::new(SECTORS);
    let mut random = Random::new(32);
    let mut guest = Guest::connect(&site);
    busy(&mut guest, &mut model, &mut random, 200);
    guest.flush(&mut model);
    let older = site.folder().join("older");
    fs::copy(&site.images[2], &older).expect("a copy");
    busy(&mut guest, &mut model, &mut random, 300);
    fs::rename(&older, &site.images[2]).expect("a file of ours");
    busy(&mut guest, &mut model, &mut random, 100);
    site.await_event("QUORUM_BLK_REPLICA_STATE", |data| {
        data["replica"] == "replica2" && data["cause"] == "replaced"
    });
    guest.check_all(&mut model, false);
    busy(&mut guest, &mut model, &mut random, 300);
    site.await_state(2, "in-sync");
    guest.check_all(&mut model, false);
    drop(guest);
    site.await_equal();
    site.assert_no_failure();
    site.stop();
    assert_eq!(site.difference(), None);
}

#[test]
fn a_file_cut_short_gets_back_its_length_and_what_it_held() {
    let mut site = Site::new(&LENIENT);
    let mut model = Model::new(SECTORS);
    let mut guest = Guest::connect(&site);
    for sector in (0..SECTORS).step_by(64) {
        guest.write(&mut model, sector, 64);
    }
    guest.flush(&mut model);
    let bytes = (SECTORS * SECTOR) as u64;
    let file = File::options().write(true).open(&site.images[0]);
    file.and_then(|file| file.set_len(bytes / 2))
        .expect("a shorter image");
    // Nobody reads there: only its length tells.
    site.await_event("QUORUM_BLK_REPLICA_KICKED", |data| {
        data["replica"] == "replica0" && data["cause"] == "vanished"
    });
    guest.check_all(&mut model, false);
    guest.write(&mut model, 100, 8);
    site.await_state(0, "in-sync");
    guest.check_all(&mut model, false);
    drop(guest);
    site.await_equal();
    site.assert_no_failure();
    site.stop();
    assert_eq!(site.difference(), None);
}

#[test]
fn a_file_cut_short_under_a_reader_gives_no_zeroes() {
    let mut site = Site::new(&LENIENT);
    let mut model = Model::new(SECTORS);
    let mut random = Random::new(33);
    let mut guest = Guest::connect(&site);
    for sector in (0..SECTORS).step_by(64) {
        guest.write(&mut model, sector, 64);
    }
    let file = File::options().write(true).open(&site.images[1]);
    let file = file.expect("an image");
    file.set_len(1 << 20).expect("a shorter image");
    guest.check_all(&mut model, false);
    busy(&mut guest, &mut model, &mut random, 300);
    file.set_len((SECTORS * SECTOR) as u64)
        .expect("a longer image");
    guest.check_all(&mut model, false);
    drop(guest);
    site.await_equal();
    site.assert_no_failure();
    site.stop();
    assert_eq!(site.difference(), None);
}
