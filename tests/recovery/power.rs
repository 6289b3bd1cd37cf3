// SPDX-License-Identifier: Apache-2.0
//! Power losses, imitated: the daemon is killed and what replicas had not been told to flush is
//! lost, all of it or any part. What was flushed is there; what was read once does not change.

use crate::common::{Random, Signal};
use crate::guest::Guest;
use crate::model::Model;
use crate::site::{SECTORS, Site};

/// Works with a flush now and then, until the daemon is killed in the middle of it; then `lose`
/// loses what is not flushed. Returns how many sectors that were.
fn work_and_lose_power(
    site: &mut Site,
    model: &mut Model,
    random: &mut Random,
    lose: impl Fn(&Site) -> u64,
) -> u64 {
    let mut guest = Guest::connect(site);
    for _ in 0..1 + random.below(3) {
        let requests = 20 + random.below(100);
        let worked = guest.work(model, random, 8, |done| done < requests);
        worked.expect("the daemon lives");
        guest.flush(model);
    }
    let last = 20 + random.below(200);
    let process = site.process();
    let worked = guest.work(model, random, 16, |done| {
        if done == last {
            process.signal(Signal::Kill);
        }
        true
    });
    assert!(worked.is_err());
    drop(guest);
    site.kill();
    let lost = lose(site);
    model.lose_power();
    lost
}

/// Loses what `replica` has not flushed, all or, with a seed, by the toss of a coin. Returns how
/// many sectors.
fn drop_unsynced(site: &Site, replica: usize, seed: Option<usize>) -> u64 {
    let command = seed.map_or("drop".to_owned(), |seed| format!("drop {seed}"));
    site.fault(replica).ask(&command)
}

/// A disk of `count` replicas of which these lose what is not flushed.
fn buffered(count: usize, replicas: &[usize]) -> Site {
    let site = Site::faulty_of(count, replicas, &[]);
    for &replica in replicas {
        site.fault(replica).tell("buffer on");
    }
    site
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
    let mut site = buffered(3, &[2]);
    let mut model = Model::new(SECTORS);
    let mut random = Random::new(41);
    let mut lost = 0;
    for round in 0..8 {
        let seed = (round % 2 == 1).then_some(round);
        lost += work_and_lose_power(&mut site, &mut model, &mut random, |site| {
            drop_unsynced(site, 2, seed)
        });
        site.start();
        let mut guest = Guest::connect(&site);
        guest.check_all(&mut model, true);
        site.assert_no_failure();
    }
    assert!(lost > 100, "only {lost} sectors were lost");
    settle(site, &mut model, &[2]);
}

#[test]
fn a_host_that_lost_power_keeps_what_was_flushed() {
    let all = [0, 1, 2];
    let mut site = buffered(3, &all);
    let mut model = Model::new(SECTORS);
    let mut random = Random::new(42);
    let mut lost = 0;
    for round in 0..10 {
        lost += work_and_lose_power(&mut site, &mut model, &mut random, |site| {
            let seed = |replica| (round % 3 > 0).then_some(10 * round + replica);
            let lost = all.map(|replica| drop_unsynced(site, replica, seed(replica)));
            lost.iter().sum()
        });
        site.start();
        let mut guest = Guest::connect(&site);
        guest.check_all(&mut model, true);
        guest.check_all(&mut model, true);
        site.assert_no_failure();
    }
    assert!(lost > 300, "only {lost} sectors were lost");
    settle(site, &mut model, &all);
}

#[test]
fn two_replicas_that_differ_after_a_power_loss_are_made_equal() {
    // No majority decides where they differ: one is chosen (rule Y3), once and for all.
    let both = [0, 1];
    let mut site = buffered(2, &both);
    let mut model = Model::new(SECTORS);
    let mut random = Random::new(45);
    for round in 0..10 {
        work_and_lose_power(&mut site, &mut model, &mut random, |site| {
            let lost = both.map(|replica| drop_unsynced(site, replica, Some(2 * round + replica)));
            lost.iter().sum()
        });
        assert!(site.difference().is_some(), "the tosses were equal");
        site.start();
        let mut guest = Guest::connect(&site);
        guest.check_all(&mut model, true);
        guest.check_all(&mut model, true);
        site.assert_no_failure();
    }
    settle(site, &mut model, &both);
}

#[test]
fn what_was_read_after_a_power_loss_survives_the_next_one() {
    let all = [0, 1, 2];
    let mut site = buffered(3, &all);
    let mut model = Model::new(SECTORS);
    let mut random = Random::new(43);
    for round in 0..6 {
        work_and_lose_power(&mut site, &mut model, &mut random, |site| {
            let lost = all.map(|replica| drop_unsynced(site, replica, Some(10 * round + replica)));
            lost.iter().sum()
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
    let mut site = buffered(3, &[0, 1]);
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
        drop_unsynced(site, 0, Some(1)) + drop_unsynced(site, 1, Some(2))
    });
    std::fs::rename(&away, &site.images[2]).expect("a file of ours");
    site.start();
    let mut guest = Guest::connect(&site);
    guest.check_all(&mut model, true);
    drop(guest);
    site.await_equal();
    settle(site, &mut model, &[0, 1]);
}

#[test]
fn what_one_start_has_shown_the_next_shows_too_whoever_is_there() {
    for seed in [46, 47, 48] {
        let mut site = buffered(3, &[0, 1]);
        let mut model = Model::new(SECTORS);
        let mut random = Random::new(seed);
        let mut guest = Guest::connect(&site);
        let worked = guest.work(&mut model, &mut random, 8, |done| done < 100);
        worked.expect("the daemon lives");
        let away = site.folder().join("away");
        std::fs::rename(&site.images[2], &away).expect("a file of ours");
        site.await_event("QUORUM_BLK_REPLICA_KICKED", |data| {
            data["replica"] == "replica2"
        });
        drop(guest);
        // Replicas 0 and 1 differ wherever only one of them has lost something.
        work_and_lose_power(&mut site, &mut model, &mut random, |site| {
            drop_unsynced(site, 0, Some(3)) + drop_unsynced(site, 1, Some(4))
        });
        site.start();
        let mut guest = Guest::connect(&site);
        for start in (0..SECTORS / 2).step_by(64) {
            guest.read_resolving(&mut model, start, 64);
        }
        drop(guest);
        site.kill();
        drop_unsynced(&site, 0, None);
        drop_unsynced(&site, 1, None);
        model.lose_power();
        // Now replica 1 alone knows what was shown, if it was flushed before (rule Y1).
        std::fs::rename(&away, &site.images[2]).expect("a file of ours");
        let missing = site.folder().join("missing");
        let path = std::mem::replace(&mut site.paths[0], missing);
        let record = site.record(0);
        let kept = format!("{}.qrec", path.display());
        std::fs::copy(kept, record).expect("a copy of the record");
        site.start();
        let mut guest = Guest::connect(&site);
        guest.check_all(&mut model, true);
        drop(guest);
        site.assert_no_failure();
        site.stop_anyhow();
        let same = std::fs::read(&site.images[1]).expect("an image")
            == std::fs::read(&site.images[2]).expect("an image");
        assert!(same, "the replicas that were there differ");
    }
}
