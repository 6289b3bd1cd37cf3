// SPDX-License-Identifier: Apache-2.0
//! Replicas that hang or fail for a while: the guest sees nothing but a delay that has a bound,
//! and afterwards the replica gets what it missed and votes again.

use std::time::Duration;

use crate::common::Random;
use crate::guest::Guest;
use crate::model::Model;
use crate::site::{SECTORS, Site};

/// Rule W6: nobody waits longer than a second for one late replica; some more for a machine that
/// does other things.
const WRITE_MAX: Duration = Duration::from_millis(1500);

fn busy(guest: &mut Guest, model: &mut Model, random: &mut Random, requests: usize) {
    let worked = guest.work(model, random, 8, |done| done < requests);
    worked.expect("the daemon lives");
}

#[test]
fn a_hanging_replica_delays_nobody_beyond_the_grace_and_gets_what_it_missed() {
    let mut site = Site::faulty(&[1], &["--io-timeout", "2"]);
    let mut model = Model::new(SECTORS);
    let mut random = Random::new(21);
    let mut guest = Guest::connect(&site);
    // Extents 0 to 7; the last one is not touched after this.
    for sector in (0..SECTORS).step_by(512) {
        guest.write(&mut model, sector, 16);
    }
    guest.flush(&mut model);
    guest.take_latencies();

    site.fault(1).tell("hang");
    let mut slowest = Duration::ZERO;
    for round in 0..60 {
        let sector = random.below(SECTORS / 4);
        slowest = slowest.max(guest.write(&mut model, sector, 8));
        slowest = slowest.max(guest.read(&mut model, sector, 16));
        if round == 30 {
            // Rule F2: it does not wait either for one that is lagging.
            let flushed = guest.flush(&mut model);
            assert!(flushed < Duration::from_secs(3), "{flushed:?}");
        }
    }
    assert!(slowest < WRITE_MAX, "{slowest:?}");
    site.await_event("QUORUM_BLK_REPLICA_KICKED", |data| {
        data["replica"] == "replica1" && data["cause"] == "hung"
    });
    assert!(site.fault(1).ask("held") > 0, "it still hangs");
    busy(&mut guest, &mut model, &mut random, 100);
    let asked = site.fault(1).ask("count write");

    site.fault(1).tell("resume");
    site.await_state(1, "in-sync");
    guest.check_all(&mut model, false);
    guest.flush(&mut model);
    site.await_equal();
    assert!(site.fault(1).ask("count write") > asked, "it was rewritten");
    site.assert_no_failure();
    // And it is waited for again.
    busy(&mut guest, &mut model, &mut random, 100);
    drop(guest);
    site.stop();
    assert_eq!(site.difference(), None);
}

#[test]
fn only_what_a_replica_missed_is_copied() {
    let mut site = Site::faulty(&[2], &["--io-timeout", "2"]);
    let mut model = Model::new(SECTORS);
    let mut guest = Guest::connect(&site);
    site.fault(2).tell("hang write");
    // One extent of eight.
    guest.write(&mut model, 4096, 8);
    site.await_event("QUORUM_BLK_REPLICA_KICKED", |data| {
        data["replica"] == "replica2"
    });
    guest.write(&mut model, 4200, 8);
    let reads = site.fault(2).ask("count read");
    site.fault(2).tell("resume");
    site.await_state(2, "in-sync");
    site.await_event("QUORUM_BLK_RESYNC_DONE", |data| {
        data["replica"] == "replica2" && data["bytes-done"] == 1 << 20
    });
    // At most 128 KiB a read: an extent is nine of them at least, the disk seventy.
    let reads = site.fault(2).ask("count read") - reads;
    assert!(reads < 64, "{reads} reads for one extent");
    drop(guest);
    site.await_equal();
    site.stop();
}

#[test]
fn a_replica_that_fails_writes_for_a_while_is_behind_and_catches_up() {
    for fault in ["eio write", "enospc"] {
        let mut site = Site::faulty(&[0], &["--max-write-errors", "0"]);
        let mut model = Model::new(SECTORS);
        let mut random = Random::new(22);
        let mut guest = Guest::connect(&site);
        busy(&mut guest, &mut model, &mut random, 100);
        site.fault(0).tell(&format!("{fault} on"));
        busy(&mut guest, &mut model, &mut random, 200);
        site.await_event("QUORUM_BLK_REPLICA_BEHIND", |data| {
            data["replica"] == "replica0" && data["cause"] == "write-failed"
        });
        guest.flush(&mut model);
        guest.check_all(&mut model, false);
        assert_eq!(site.state(0).as_deref(), Some("syncing"));
        site.fault(0).tell(&format!("{fault} off"));
        busy(&mut guest, &mut model, &mut random, 200);
        site.await_state(0, "in-sync");
        drop(guest);
        site.await_equal();
        site.assert_no_failure();
        site.stop();
        assert_eq!(site.difference(), None, "{fault}");
    }
}

#[test]
fn a_replica_beyond_its_error_budget_is_failed_and_stays_so() {
    let mut site = Site::faulty(&[0], &["--max-write-errors", "4"]);
    let mut model = Model::new(SECTORS);
    let mut random = Random::new(23);
    let mut guest = Guest::connect(&site);
    site.fault(0).tell("eio write on");
    busy(&mut guest, &mut model, &mut random, 300);
    site.await_state(0, "failed");
    site.fault(0).tell("eio write off");
    busy(&mut guest, &mut model, &mut random, 300);
    guest.check_all(&mut model, false);
    let status = site.status();
    assert!(status.contains("the disk is degraded"), "{status}");
    assert!(status.contains("replica0  failed"), "{status}");
    drop(guest);
    site.stop_anyhow();
    // It is known to be failed.
    site.start();
    let log = site.log();
    assert!(log.contains("replica 'replica0' is failed"), "{log}");
    Guest::connect(&site).check_all(&mut model, true);
    site.assert_no_failure();
    site.stop_anyhow();
    // Until an operator gives it another chance.
    site.start_with(&["--clear", "replica0"]);
    site.await_state(0, "in-sync");
    Guest::connect(&site).check_all(&mut model, true);
    site.await_equal();
    site.stop();
    assert_eq!(site.difference(), None);
}

#[test]
fn a_flush_that_failed_once_is_never_believed_again() {
    let mut site = Site::faulty(&[1], &[]);
    let mut model = Model::new(SECTORS);
    let mut random = Random::new(24);
    let mut guest = Guest::connect(&site);
    busy(&mut guest, &mut model, &mut random, 100);
    site.fault(1).tell("buffer on");
    busy(&mut guest, &mut model, &mut random, 100);
    site.fault(1).tell("eio fsync on");
    guest.flush(&mut model);
    // Rule F3: what was dirty may be lost although the next flush is good, as with page caches.
    assert!(site.fault(1).ask("drop") > 0, "nothing was lost");
    site.fault(1).tell("eio fsync off");
    guest.flush(&mut model);
    site.await_event("QUORUM_BLK_REPLICA_KICKED", |data| {
        data["replica"] == "replica1" && data["cause"] == "flush-failed"
    });
    busy(&mut guest, &mut model, &mut random, 100);
    guest.check_all(&mut model, false);
    site.await_state(1, "in-sync");
    guest.flush(&mut model);
    site.fault(1).tell("buffer off");
    guest.check_all(&mut model, false);
    drop(guest);
    site.await_equal();
    site.assert_no_failure();
    site.stop();
}

#[test]
fn read_errors_are_outvoted_and_rewritten() {
    let mut site = Site::faulty(&[1], &["--max-repairs", "0"]);
    let mut model = Model::new(SECTORS);
    let mut random = Random::new(25);
    let mut guest = Guest::connect(&site);
    busy(&mut guest, &mut model, &mut random, 200);
    guest.flush(&mut model);
    site.fault(1).tell("eio read on 1000 64");
    guest.check_all(&mut model, false);
    site.await_event("QUORUM_REPORT_BAD", |data| {
        data["replica"] == "replica1" && data["type"] == "read"
    });
    site.fault(1).tell("eio read off");
    busy(&mut guest, &mut model, &mut random, 100);
    drop(guest);
    site.await_equal();
    site.assert_no_failure();
    site.stop();
}
