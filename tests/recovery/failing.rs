// SPDX-License-Identifier: Apache-2.0
//! Replicas that hang or fail for a while: the guest sees nothing but a delay that has a bound,
//! and afterwards the replica gets what it missed and votes again.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use quorum_blk::front_end::{FrontEnd, Options, Queue, Request, Status};

use crate::common::{Random, SECTOR};
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

#[test]
fn a_replica_that_hangs_at_the_start_is_left_out_until_it_answers() {
    let mut site = Site::faulty(&[1], &["--io-timeout", "2"]);
    let mut model = Model::new(SECTORS);
    let mut random = Random::new(26);
    let mut guest = Guest::connect(&site);
    busy(&mut guest, &mut model, &mut random, 100);
    drop(guest);
    site.stop();
    site.fault(1).tell("hang");
    site.start();
    let log = site.log();
    assert!(log.contains("does not answer"), "{log}");
    let mut guest = Guest::connect(&site);
    guest.check_all(&mut model, false);
    busy(&mut guest, &mut model, &mut random, 100);
    site.fault(1).tell("resume");
    site.await_state(1, "in-sync");
    guest.check_all(&mut model, false);
    drop(guest);
    site.await_equal();
    site.assert_no_failure();
    site.stop();
    assert_eq!(site.difference(), None);
}

#[test]
fn a_daemon_is_stopped_beside_a_replica_that_hangs() {
    let mut site = Site::faulty(&[1], &["--io-timeout", "2"]);
    let mut model = Model::new(SECTORS);
    let mut guest = Guest::connect(&site);
    guest.write(&mut model, 0, 64);
    site.fault(1).tell("hang");
    guest.write(&mut model, 0, 64);
    drop(guest);
    let begun = Instant::now();
    site.stop();
    let taken = begun.elapsed();
    assert!(taken < Duration::from_secs(10), "{taken:?}");
    site.fault(1).tell("resume");
    site.start();
    let mut guest = Guest::connect(&site);
    guest.check_all(&mut model, false);
    site.await_healthy();
    guest.check_all(&mut model, false);
    drop(guest);
    site.await_equal();
    site.stop();
}

/// Writes, reads and flushes on one queue until told to stop. Every request must end well.
fn drive(queue: &mut Queue, seed: u64, stop: &AtomicBool) {
    let mut random = Random::new(seed);
    let mut waiting = 0;
    while !stop.load(Ordering::Relaxed) || waiting > 0 {
        while waiting < 8 && !stop.load(Ordering::Relaxed) {
            let sector = 8 * random.below(SECTORS / 8) as u64;
            let data = random.bytes(8 * SECTOR);
            let request = match random.below(32) {
                0 => Request::Flush,
                1..8 => Request::Read {
                    sector,
                    len: data.len(),
                },
                _ => Request::Write {
                    sector,
                    data: &data,
                },
            };
            queue.submit(&request).expect("room");
            waiting += 1;
        }
        let completion = queue.wait_any().expect("every request is answered");
        assert_eq!(completion.status, Status::Ok);
        waiting -= 1;
    }
}

#[test]
fn four_queues_work_on_while_a_replica_hangs_and_comes_back() {
    let arguments = ["--io-timeout", "2", "--max-kicks", "0"];
    let mut site = Site::faulty(&[2], &arguments);
    let options = Options {
        queues: 4,
        timeout: Duration::from_secs(10),
        ..Options::default()
    };
    let mut front_end = FrontEnd::connect(&site.socket, &options).expect("a connection");
    for round in 0..2 {
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for queue in front_end.queues() {
                let seed = 100 * round + u64::from(queue.index());
                let stop = &stop;
                scope.spawn(move || drive(queue, seed, stop));
            }
            std::thread::sleep(Duration::from_millis(200));
            site.fault(2).tell("hang");
            site.await_state(2, "missing");
            std::thread::sleep(Duration::from_millis(500));
            site.fault(2).tell("resume");
            site.await_state(2, "in-sync");
            stop.store(true, Ordering::Relaxed);
        });
    }
    drop(front_end);
    site.await_healthy();
    site.await_equal();
    site.assert_no_failure();
    site.stop();
    assert_eq!(site.difference(), None);
}

#[test]
fn a_full_replica_does_not_keep_a_good_one_from_catching_up() {
    let arguments = ["--max-write-errors", "0", "--max-repairs", "0"];
    let mut site = Site::faulty(&[0, 1], &arguments);
    let mut model = Model::new(SECTORS);
    let mut guest = Guest::connect(&site);
    // Replica 0 is late until nobody waits for it, and then replica 1 is full: two of three.
    site.fault(0).tell("delay 0.1 write");
    for sector in (0..SECTORS).step_by(1024) {
        guest.write(&mut model, sector, 8);
    }
    site.await_event("QUORUM_BLK_REPLICA_LAGGING", |data| {
        data["replica"] == "replica0"
    });
    site.fault(1).tell("enospc on");
    // However it ends: two replicas of three do not take it.
    guest.status_of_write(4000, 8);
    // One is enough again.
    site.fault(0).tell("delay 0");
    site.await_state(0, "in-sync");
    for sector in (512..SECTORS).step_by(1024) {
        guest.write(&mut model, sector, 8);
    }
    guest.check_all(&mut model, false);
    site.fault(1).tell("enospc off");
    site.await_healthy();
    drop(guest);
    site.await_equal();
    site.stop();
}
