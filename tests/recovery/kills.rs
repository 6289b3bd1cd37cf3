// SPDX-License-Identifier: Apache-2.0
//! The daemon is killed and started again: no acknowledged write is lost, no old data come back,
//! and all replicas become alike.

use std::time::Duration;

use crate::common::{Random, Signal};
use crate::guest::{Gone, Guest};
use crate::model::Model;
use crate::site::{SECTORS, Site};

/// Kills the daemon after `after` in the middle of writes.
fn work_until_killed(
    site: &mut Site,
    model: &mut Model,
    random: &mut Random,
    after: Duration,
) -> usize {
    let mut guest = Guest::connect(site);
    let process = site.process();
    let mut count = 0;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(after);
            process.signal(Signal::Kill);
        });
        let ended = guest.work(model, random, 16, |done| {
            count = done;
            true
        });
        assert!(matches!(ended, Err(Gone)));
    });
    site.kill();
    count
}

#[test]
fn twenty_kills_lose_no_acknowledged_write() {
    let mut site = Site::new(&[]);
    let mut model = Model::new(SECTORS);
    let mut random = Random::new(11);
    let mut written = 0;
    for round in 0..20 {
        let after = Duration::from_micros(random.below(60_000) as u64);
        written += work_until_killed(&mut site, &mut model, &mut random, after);
        site.start();
        let log = site.log();
        assert!(log.contains("the last run did not stop cleanly"), "{log}");
        if round % 2 == 0 {
            Guest::connect(&site).check_all(&mut model, true);
        }
        if round % 5 == 4 {
            // Nobody writes: once it says that all is resolved, all is alike.
            let mut guest = Guest::connect(&site);
            guest.flush(&mut model);
            if log.contains("dirty extents are made equal") {
                site.await_log("is resolved");
            }
            site.await_equal();
        }
        site.assert_no_failure();
    }
    assert!(written > 500, "only {written} requests in twenty rounds");
    let mut guest = Guest::connect(&site);
    guest.check_all(&mut model, true);
    drop(guest);
    site.await_equal();
    site.stop();
    assert_eq!(site.difference(), None);
}

#[test]
fn killed_twice_before_anything_was_resolved() {
    let mut site = Site::new(&[]);
    let mut model = Model::new(SECTORS);
    let mut random = Random::new(12);
    for _ in 0..6 {
        let after = Duration::from_micros(5_000 + random.below(30_000) as u64);
        work_until_killed(&mut site, &mut model, &mut random, after);
        for _ in 0..2 {
            site.start();
            std::thread::sleep(Duration::from_micros(random.below(20_000) as u64));
            site.kill();
        }
        site.start();
        Guest::connect(&site).check_all(&mut model, true);
        site.assert_no_failure();
    }
    site.await_equal();
    site.stop();
    assert_eq!(site.difference(), None);
}

#[test]
fn killed_during_a_resync_it_goes_on_after_the_restart() {
    // Slow enough to be met half done.
    let mut site = Site::new(&["--resync-rate", "1M"]);
    let mut model = Model::new(SECTORS);
    let mut random = Random::new(13);
    let mut guest = Guest::connect(&site);
    guest
        .work(&mut model, &mut random, 16, |done| done < 500)
        .expect("it lives");
    guest.flush(&mut model);
    drop(guest);
    site.stop();
    // Replica 1 comes back with zeroes: it lacks everything.
    let stale = vec![0; SECTORS * crate::common::SECTOR];
    std::fs::write(&site.images[1], &stale).expect("an image");
    for _ in 0..4 {
        site.start();
        let mut guest = Guest::connect(&site);
        // Never the old data, wherever it is read; and work that makes the resync slow.
        guest.check_all(&mut model, true);
        guest
            .work(&mut model, &mut random, 4, |done| done < 100)
            .expect("it lives");
        drop(guest);
        site.assert_no_failure();
        site.kill();
    }
    site.start();
    let mut guest = Guest::connect(&site);
    guest.check_all(&mut model, true);
    drop(guest);
    site.await_equal();
    site.stop();
    assert_eq!(site.difference(), None);
}

#[test]
fn a_replica_missing_at_the_restart_comes_back_stale_and_never_votes_with_it() {
    let mut site = Site::new(&[]);
    let mut model = Model::new(SECTORS);
    let mut random = Random::new(14);
    let mut guest = Guest::connect(&site);
    guest
        .work(&mut model, &mut random, 16, |done| done < 300)
        .expect("it lives");
    drop(guest);
    let after = Duration::from_millis(20);
    work_until_killed(&mut site, &mut model, &mut random, after);

    let away = site.folder().join("away");
    std::fs::rename(&site.images[2], &away).expect("a file of ours");
    site.start();
    let log = site.log();
    assert!(log.contains("the disk is served without it"), "{log}");
    let mut guest = Guest::connect(&site);
    guest.check_all(&mut model, true);
    guest
        .work(&mut model, &mut random, 16, |done| done < 300)
        .expect("it lives");
    guest.flush(&mut model);

    std::fs::rename(&away, &site.images[2]).expect("a file of ours");
    // While it is brought up to date, and after.
    guest
        .work(&mut model, &mut random, 8, |done| done < 300)
        .expect("it lives");
    guest.check_all(&mut model, false);
    site.await_state(2, "in-sync");
    guest.check_all(&mut model, false);
    drop(guest);
    site.await_equal();
    site.assert_no_failure();
    site.stop();
    assert_eq!(site.difference(), None);
}

#[test]
fn a_replica_that_missed_a_whole_run_does_not_decide_the_next() {
    let mut site = Site::new(&[]);
    let mut model = Model::new(SECTORS);
    let mut random = Random::new(15);
    let mut guest = Guest::connect(&site);
    guest
        .work(&mut model, &mut random, 16, |done| done < 200)
        .expect("it lives");
    drop(guest);
    site.stop();
    let away = site.folder().join("away");
    std::fs::rename(&site.images[0], &away).expect("a file of ours");
    site.start();
    let mut guest = Guest::connect(&site);
    guest
        .work(&mut model, &mut random, 16, |done| done < 300)
        .expect("it lives");
    drop(guest);
    site.kill();

    // Now another one is missing: the stale one and one that knows everything are left.
    std::fs::rename(&away, &site.images[0]).expect("a file of ours");
    std::fs::rename(&site.images[1], &away).expect("a file of ours");
    site.start();
    let mut guest = Guest::connect(&site);
    guest.check_all(&mut model, true);
    std::fs::rename(&away, &site.images[1]).expect("a file of ours");
    site.await_state(1, "in-sync");
    guest.check_all(&mut model, false);
    drop(guest);
    site.await_equal();
    site.assert_no_failure();
    site.stop();
}

#[test]
fn killed_while_the_record_is_made_it_is_made_again() {
    let mut random = Random::new(16);
    for round in 0..15 {
        let mut site = Site::bare(&[]);
        for _ in 0..2 {
            site.start_and_leave();
            std::thread::sleep(Duration::from_micros(random.below(50_000) as u64));
            site.kill();
        }
        let mut model = Model::new(SECTORS);
        site.start();
        let mut guest = Guest::connect(&site);
        guest.write(&mut model, 8 * round, 8);
        guest.check_all(&mut model, false);
        drop(guest);
        site.await_equal();
        site.stop();
    }
}

#[test]
fn killed_while_it_closes_the_disk_it_has_lost_nothing() {
    let mut site = Site::new(&[]);
    let mut model = Model::new(SECTORS);
    let mut random = Random::new(17);
    for _ in 0..15 {
        let mut guest = Guest::connect(&site);
        guest
            .work(&mut model, &mut random, 8, |done| done < 60)
            .expect("it lives");
        drop(guest);
        site.process().signal(Signal::Terminate);
        std::thread::sleep(Duration::from_micros(random.below(8_000) as u64));
        site.kill();
        site.start();
        Guest::connect(&site).check_all(&mut model, true);
        site.assert_no_failure();
    }
    site.await_equal();
    site.stop();
    assert_eq!(site.difference(), None);
}
