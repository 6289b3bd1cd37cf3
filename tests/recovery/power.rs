// SPDX-License-Identifier: Apache-2.0
//! Power losses, imitated: the daemon is killed and what replicas had not been told to flush is
//! lost, all of it or any part. What was flushed is there; what was read once does not change.

use std::time::Duration;

use crate::common::{Random, Signal};
use crate::guest::Guest;
use crate::model::Model;
use crate::site::{SECTORS, Site};

/// Works with a flush now and then, until the daemon is killed in the middle of it.
fn work_and_lose_power(
    site: &mut Site,
    model: &mut Model,
    random: &mut Random,
    lose: impl Fn(&Site),
) {
    let mut guest = Guest::connect(site);
    for _ in 0..1 + random.below(3) {
        let requests = 20 + random.below(100);
        let worked = guest.work(model, random, 8, |done| done < requests);
        worked.expect("the daemon lives");
        guest.flush(model);
    }
    let after = Duration::from_micros(random.below(15_000) as u64);
    let process = site.process();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(after);
            process.signal(Signal::Kill);
        });
        assert!(guest.work(model, random, 16, |_| true).is_err());
    });
    drop(guest);
    site.kill();
    lose(site);
    model.lose_power();
}

/// Loses what `replica` has not flushed; by the toss of a coin if there is a seed.
fn drop_unsynced(site: &Site, replica: usize, seed: Option<usize>) {
    let command = seed.map_or("drop".to_owned(), |seed| format!("drop {seed}"));
    site.fault(replica).ask(&command);
}

fn buffered(replicas: &[usize]) -> Option<Site> {
    let site = Site::faulty(replicas, &[])?;
    for &replica in replicas {
        site.fault(replica).tell("buffer on");
    }
    Some(site)
}

/// Ends a test: everything becomes equal, on the medium too.
fn settle(mut site: Site, model: &mut Model, replicas: &[usize]) {
    let mut guest = Guest::connect(&site);
    guest.check_all(model, false);
    guest.flush(model);
    guest.check_all(model, false);
    drop(guest);
    site.assert_no_failure();
    site.stop();
    for &replica in replicas {
        assert_eq!(site.fault(replica).ask("unsynced"), 0, "closed unflushed");
    }
    assert_eq!(site.difference(), None);
}

#[test]
fn one_replica_that_lost_its_unflushed_writes_changes_nothing() {
    let Some(mut site) = buffered(&[2]) else {
        return;
    };
    let mut model = Model::new(SECTORS);
    let mut random = Random::new(41);
    for round in 0..8 {
        let seed = (round % 2 == 1).then_some(round);
        work_and_lose_power(&mut site, &mut model, &mut random, |site| {
            drop_unsynced(site, 2, seed);
        });
        site.start();
        let mut guest = Guest::connect(&site);
        guest.check_all(&mut model, true);
        site.assert_no_failure();
    }
    settle(site, &mut model, &[2]);
}

#[test]
fn a_host_that_lost_power_keeps_what_was_flushed() {
    let all = [0, 1, 2];
    let Some(mut site) = buffered(&all) else {
        return;
    };
    let mut model = Model::new(SECTORS);
    let mut random = Random::new(42);
    for round in 0..10 {
        work_and_lose_power(&mut site, &mut model, &mut random, |site| {
            for replica in all {
                let seed = (round % 3 > 0).then_some(10 * round + replica);
                drop_unsynced(site, replica, seed);
            }
        });
        site.start();
        let mut guest = Guest::connect(&site);
        guest.check_all(&mut model, true);
        guest.check_all(&mut model, true);
        site.assert_no_failure();
    }
    settle(site, &mut model, &all);
}

#[test]
fn what_was_read_after_a_power_loss_survives_the_next_one() {
    let all = [0, 1, 2];
    let Some(mut site) = buffered(&all) else {
        return;
    };
    let mut model = Model::new(SECTORS);
    let mut random = Random::new(43);
    for round in 0..6 {
        work_and_lose_power(&mut site, &mut model, &mut random, |site| {
            for replica in all {
                drop_unsynced(site, replica, Some(10 * round + replica));
            }
        });
        for again in 0..2 {
            site.start();
            let mut guest = Guest::connect(&site);
            // Read, and not flushed by the guest: rule Y1 has made it durable before it was shown.
            let part = random.below(SECTORS / 2);
            for start in (part..part + SECTORS / 2).step_by(64) {
                guest.read_resolving(&mut model, start, 64.min(SECTORS - start));
            }
            drop(guest);
            site.kill();
            for replica in all {
                drop_unsynced(&site, replica, Some(1000 + 10 * round + replica + again));
            }
            model.lose_power();
        }
        site.start();
        Guest::connect(&site).check_all(&mut model, true);
        site.assert_no_failure();
    }
    settle(site, &mut model, &all);
}

#[test]
fn power_lost_while_a_replica_is_away_brings_back_no_old_data() {
    let Some(mut site) = buffered(&[0, 1]) else {
        return;
    };
    let mut model = Model::new(SECTORS);
    let mut random = Random::new(44);
    let mut guest = Guest::connect(&site);
    let worked = guest.work(&mut model, &mut random, 8, |done| done < 200);
    worked.expect("the daemon lives");
    let away = site.folder().join("away");
    std::fs::rename(&site.images[2], &away).expect("a file of ours");
    site.await_event("QUORUM_BLK_REPLICA_KICKED", |data| {
        data["replica"] == "replica2"
    });
    drop(guest);
    work_and_lose_power(&mut site, &mut model, &mut random, |site| {
        drop_unsynced(site, 0, Some(1));
        drop_unsynced(site, 1, Some(2));
    });
    std::fs::rename(&away, &site.images[2]).expect("a file of ours");
    site.start();
    let mut guest = Guest::connect(&site);
    guest.check_all(&mut model, true);
    drop(guest);
    site.await_equal();
    settle(site, &mut model, &[0, 1]);
}
