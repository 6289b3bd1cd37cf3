// SPDX-License-Identifier: Apache-2.0
//! What a start decides (CONSISTENCY section 9), with the program itself: who takes part, who is
//! rewritten, when nothing is served, and what the operator is told.

use std::fs;
use std::path::Path;

use quorum_blk::front_end::Status;

use crate::common::{Process, Random, SECTOR};
use crate::guest::Guest;
use crate::model::{Model, content};
use crate::site::{SECTORS, SETTLED, Site};

/// A disk with a past, cleanly stopped.
fn stopped(seed: u64) -> (Site, Model) {
    let mut site = Site::new(&["--lock-timeout", "1"]);
    let mut model = Model::new(SECTORS);
    let mut guest = Guest::connect(&site);
    let worked = guest.work(&mut model, &mut Random::new(seed), 16, |done| done < 300);
    worked.expect("the daemon lives");
    drop(guest);
    site.stop();
    assert_eq!(site.difference(), None);
    (site, model)
}

/// Serves it, finds everything right and, in the end, equal.
#[track_caller]
fn serves(site: &mut Site, model: &mut Model, more: &[&str]) -> String {
    site.start_with(more);
    let mut guest = Guest::connect(site);
    guest.check_all(model, true);
    guest.write(model, 9, 3);
    drop(guest);
    site.await_equal();
    site.assert_no_failure();
    let log = site.log();
    site.stop();
    assert_eq!(site.difference(), None);
    log
}

#[track_caller]
fn contains(log: &str, text: &str) {
    assert!(log.contains(text), "no {text:?} in: {log}");
}

fn take_away(path: &Path) {
    let mut away = path.to_owned().into_os_string();
    away.push(".away");
    fs::rename(path, away).expect("a file of ours");
}

fn put_back(path: &Path) {
    let mut away = path.to_owned().into_os_string();
    away.push(".away");
    fs::rename(away, path).expect("a file of ours");
}

#[test]
fn after_a_clean_stop_nothing_is_to_be_done() {
    let (mut site, mut model) = stopped(61);
    for _ in 0..3 {
        let log = serves(&mut site, &mut model, &[]);
        assert!(!log.contains("WARN"), "{log}");
        let done = ["QUORUM_BLK_RESYNC_BEGUN", "QUORUM_BLK_SCRUB_BEGUN"];
        assert!(done.iter().all(|name| site.events(name).is_empty()));
    }
}

#[test]
fn one_replica_missing_is_waited_for_while_the_disk_is_served() {
    let (mut site, mut model) = stopped(62);
    take_away(&site.images[1]);
    site.start();
    contains(&site.log(), "the disk is served without it");
    let mut guest = Guest::connect(&site);
    guest.check_all(&mut model, false);
    guest.write(&mut model, 5000, 30);
    put_back(&site.images[1]);
    site.await_state(1, "in-sync");
    drop(guest);
    site.await_equal();
    site.stop();
    serves(&mut site, &mut model, &[]);
}

#[test]
fn a_minority_of_replicas_is_served_only_by_force_and_the_others_are_rewritten() {
    let (mut site, mut model) = stopped(63);
    take_away(&site.images[0]);
    take_away(&site.images[2]);
    let log = site.refused(&[]);
    contains(&log, "only 1 of 3 replicas can be used, and 2 are needed");
    contains(&log, "--force");
    site.start_with(&["--force"]);
    contains(&site.log(), "DANGEROUS: by force the disk is served with 1");
    let mut guest = Guest::connect(&site);
    guest.check_all(&mut model, false);
    guest.write(&mut model, 77, 7);
    // Two stale ones that agree with each other.
    put_back(&site.images[0]);
    put_back(&site.images[2]);
    site.await_state(0, "in-sync");
    site.await_state(2, "in-sync");
    guest.check_all(&mut model, false);
    drop(guest);
    site.await_equal();
    site.stop();
    serves(&mut site, &mut model, &[]);
}

#[test]
fn stale_replicas_that_were_forced_out_are_a_minority_for_ever() {
    let (mut site, mut model) = stopped(64);
    take_away(&site.images[0]);
    take_away(&site.images[2]);
    site.start_with(&["--force"]);
    let mut guest = Guest::connect(&site);
    guest.write(&mut model, 77, 7);
    drop(guest);
    site.kill();
    put_back(&site.images[0]);
    put_back(&site.images[2]);
    // They agree with each other, and with nothing that was acknowledged.
    serves(&mut site, &mut model, &[]);
}

#[test]
fn a_replica_changed_while_nobody_served_it_is_rewritten() {
    let (mut site, mut model) = stopped(65);
    site.spoil(1, 0, SECTORS, 0x11);
    let log = serves(&mut site, &mut model, &[]);
    contains(&log, "replica 'replica1' changed while");
    // A copy in its place, as a restored backup is.
    let copy = site.folder().join("copy");
    fs::copy(&site.images[2], &copy).expect("a copy");
    fs::rename(&copy, &site.images[2]).expect("a file of ours");
    let log = serves(&mut site, &mut model, &[]);
    contains(&log, "is not the file or device that it was");
}

#[test]
fn when_all_replicas_changed_they_vote_and_are_compared() {
    let (mut site, mut model) = stopped(66);
    for (index, sector) in [1000, 2000, 3000].into_iter().enumerate() {
        site.spoil(index, sector, 5, 0x22);
    }
    site.start();
    contains(&site.log(), "every replica changed");
    site.await_event("QUORUM_BLK_SCRUB_DONE", |data| {
        data["type"] == "verify" && data["repaired-sectors"] == 15
    });
    let mut guest = Guest::connect(&site);
    guest.check_all(&mut model, false);
    drop(guest);
    site.await_equal();
    site.stop();
}

#[test]
fn replicas_in_another_order_are_refused_with_the_right_one() {
    let (mut site, mut model) = stopped(67);
    // The copies of the record stay where they are: they know the order.
    let places = [site.record(0), site.record(1), site.record(2)];
    let records = places
        .each_ref()
        .map(|path| fs::read(path).expect("a copy"));
    site.paths.swap(0, 2);
    let log = site.refused(&[]);
    contains(&log, "another order");
    contains(&log, "give them as replica2, replica1, replica0");
    site.paths.swap(0, 2);
    let now = places
        .each_ref()
        .map(|path| fs::read(path).expect("a copy"));
    assert!(now == records, "a refusal changes nothing");
    serves(&mut site, &mut model, &[]);
}

#[test]
fn copies_of_the_record_that_are_lost_are_made_anew_as_long_as_most_are_left() {
    let (mut site, mut model) = stopped(68);
    fs::remove_file(site.record(1)).expect("a copy");
    let log = serves(&mut site, &mut model, &[]);
    contains(&log, "made anew");
    // It counts again.
    fs::remove_file(site.record(0)).expect("a copy");
    serves(&mut site, &mut model, &[]);

    fs::remove_file(site.record(0)).expect("a copy");
    fs::remove_file(site.record(2)).expect("a copy");
    let log = site.refused(&[]);
    contains(&log, "only 1 of 3 copies of the state record can be used");
    assert!(
        !site.record(0).exists(),
        "nothing is made where nothing is served"
    );
    let log = serves(&mut site, &mut model, &["--force"]);
    contains(&log, "DANGEROUS: by force a minority of the copies");
    let log = serves(&mut site, &mut model, &[]);
    assert!(!log.contains("WARN"), "{log}");
}

#[test]
fn without_any_copy_of_the_record_the_images_are_plain_again() {
    let (mut site, mut model) = stopped(69);
    for index in 0..3 {
        fs::remove_file(site.record(index)).expect("a copy");
    }
    site.spoil(0, 4000, 2, 0x33);
    let log = serves(&mut site, &mut model, &[]);
    contains(&log, "the disk is served for the first time");
}

#[test]
fn a_record_of_another_disk_is_refused() {
    let (mut site, mut model) = stopped(70);
    let (other, _) = stopped(71);
    let own = fs::read(site.record(2)).expect("a copy");
    fs::copy(other.record(2), site.record(2)).expect("a copy");
    let log = site.refused(&[]);
    contains(&log, "put in the wrong place");
    fs::write(site.record(2), own).expect("a copy");
    serves(&mut site, &mut model, &[]);
}

#[test]
fn a_record_that_lived_apart_is_refused() {
    let (mut site, mut model) = stopped(72);
    let now = |site: &Site| [0, 1, 2].map(|index| fs::read(site.record(index)).expect("a copy"));
    let before = now(&site);
    serves(&mut site, &mut model, &[]);
    let one_life = now(&site);
    for (index, bytes) in before.iter().enumerate() {
        fs::write(site.record(index), bytes).expect("a copy");
    }
    serves(&mut site, &mut model, &[]);
    let other_life = now(&site);
    fs::write(site.record(0), &one_life[0]).expect("a copy");
    let log = site.refused(&[]);
    contains(&log, "have lived apart");
    fs::write(site.record(0), &other_life[0]).expect("a copy");
    serves(&mut site, &mut model, &[]);
}

#[test]
fn an_old_copy_of_the_record_is_brought_up_to_date() {
    let (mut site, mut model) = stopped(73);
    let old = fs::read(site.record(0)).expect("a copy");
    // Replica 2 misses a run that the old copy knows nothing of.
    take_away(&site.images[2]);
    site.start();
    let mut guest = Guest::connect(&site);
    guest.write(&mut model, 8000, 20);
    drop(guest);
    site.stop();
    fs::write(site.record(0), old).expect("a copy");
    put_back(&site.images[2]);
    let log = serves(&mut site, &mut model, &[]);
    contains(&log, "is old and is brought up to date");
}

#[test]
fn adopted_images_take_the_content_of_the_one_that_is_named() {
    let mut site = Site::bare(&[]);
    let mut model = Model::new(SECTORS);
    for index in [0, 2, 1] {
        let version = model.begin(0, SECTORS);
        model.acknowledge(0, SECTORS, version);
        let bytes = content(0, SECTORS, version);
        fs::write(&site.images[index], bytes).expect("an image");
    }
    // The last one written was replica 1.
    let log = serves(&mut site, &mut model, &["--adopt-from", "replica1"]);
    contains(
        &log,
        "all others are overwritten with the one that is adopted",
    );
    let log = serves(&mut site, &mut model, &["--adopt-from", "replica0"]);
    contains(&log, "change nothing here");
}

#[test]
fn a_guest_flushes_while_others_are_overwritten_with_the_adopted_image() {
    let mut site = Site::bare(&["--resync-rate", "1M"]);
    let mut model = Model::new(SECTORS);
    for index in [1, 2] {
        site.spoil(index, 0, SECTORS, 0x55);
    }
    site.start_with(&["--adopt-from", "replica0"]);
    let mut guest = Guest::connect(&site);
    let mut random = Random::new(76);
    for _ in 0..40 {
        let worked = guest.work(&mut model, &mut random, 4, |done| done < 5);
        worked.expect("the daemon lives");
        guest.flush(&mut model);
    }
    guest.check_all(&mut model, false);
    drop(guest);
    site.await_equal();
    site.assert_no_failure();
    site.stop();
}

#[test]
fn a_guest_flushes_while_slow_replicas_get_all_that_they_missed() {
    let mut site = Site::faulty(&[0], &[]);
    site.stop();
    let missing = site.folder().join("missing");
    let path = std::mem::replace(&mut site.paths[0], missing);
    take_away(&site.images[2]);
    let mut model = Model::new(SECTORS);
    site.start_with(&["--force"]);
    let mut guest = Guest::connect(&site);
    for sector in (0..SECTORS).step_by(1024) {
        guest.write(&mut model, sector, 64);
    }
    drop(guest);
    site.stop_anyhow();
    site.paths[0] = path;
    put_back(&site.images[2]);
    site.fault(0).tell("delay 0.05");
    site.start();
    let mut guest = Guest::connect(&site);
    for _ in 0..60 {
        // Extents of which there is one copy are dirty only because they are copied.
        guest.flush(&mut model);
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    site.fault(0).tell("delay 0");
    guest.check_all(&mut model, false);
    drop(guest);
    site.await_equal();
    site.assert_no_failure();
    site.stop();
}

#[test]
fn images_assumed_clean_are_not_compared() {
    let mut site = Site::bare(&[]);
    site.spoil(1, 50, 1, 0x44);
    site.start_with(&["--assume-clean"]);
    site.stop();
    assert!(site.events("QUORUM_BLK_SCRUB_BEGUN").is_empty());
    assert!(site.difference().is_some());
}

#[test]
fn a_second_daemon_is_refused() {
    let (mut site, mut model) = stopped(74);
    site.start();
    let folder = tempfile::tempdir_in(site.folder()).expect("a folder");
    let mut arguments = vec!["serve".into(), "--lock-timeout".into(), "1".into()];
    for path in &site.paths {
        arguments.extend(["--replica".into(), path.into()]);
    }
    arguments.extend(["--socket-path".into(), folder.path().join("s").into()]);
    let mut second = Process::start(folder.path(), &arguments);
    let status = second.wait(SETTLED);
    assert_eq!(status.code(), Some(1), "{}", second.log());
    contains(&second.log(), "another process");
    let mut guest = Guest::connect(&site);
    guest.check_all(&mut model, false);
    guest.write(&mut model, 1, 1);
    drop(guest);
    site.stop();
}

#[test]
fn a_disk_that_nothing_may_be_written_to_is_not_settled() {
    let (mut site, mut model) = stopped(75);
    site.start();
    let mut guest = Guest::connect(&site);
    guest.write(&mut model, 100, 100);
    drop(guest);
    site.kill();
    let before = fs::read(site.record(0)).expect("a copy");
    let log = site.refused(&["--read-only"]);
    contains(&log, "nothing may be written to them: add --repair on");
    assert!(fs::read(site.record(0)).expect("a copy") == before);
    serves(&mut site, &mut model, &[]);
    // Now it is clean.
    site.start_with(&["--read-only"]);
    Guest::connect(&site).check_all(&mut model, false);
    site.stop_anyhow();
    assert_eq!(
        fs::read(&site.images[0]).expect("an image").len(),
        SECTORS * SECTOR
    );
    let log = serves(&mut site, &mut model, &[]);
    assert!(!log.contains("WARN"), "{log}");
}

#[test]
fn a_blank_file_in_the_place_of_the_last_good_copy_is_not_believed() {
    let (mut site, mut model) = stopped(80);
    let old = fs::read(&site.images[0]).expect("an image");
    take_away(&site.images[0]);
    take_away(&site.images[2]);
    site.start_with(&["--force"]);
    let mut guest = Guest::connect(&site);
    guest.write(&mut model, 77, 7);
    drop(guest);
    site.stop_anyhow();
    put_back(&site.images[0]);
    put_back(&site.images[2]);
    let blank = site.folder().join("blank");
    fs::write(&blank, vec![0; SECTORS * SECTOR]).expect("an image");
    fs::rename(&blank, &site.images[1]).expect("a file of ours");
    // Only the file that is gone held what was written last.
    site.start();
    contains(&site.log(), "every replica lacks what was written last");
    let mut guest = Guest::connect(&site);
    assert_eq!(guest.status_of_read(5), Status::IoError);
    drop(guest);
    site.stop_anyhow();
    for index in [0, 2] {
        assert!(fs::read(&site.images[index]).expect("an image") == old);
    }
    // The operator takes what there is.
    site.start_with(&["--force-current", "replica0"]);
    site.await_equal();
    assert!(fs::read(&site.images[1]).expect("an image") == old);
    let mut guest = Guest::connect(&site);
    assert_eq!(guest.status_of_read(5), Status::Ok);
    drop(guest);
    site.stop();
    assert_eq!(site.difference(), None);
}
