// SPDX-License-Identifier: Apache-2.0
//! The daemon is told to end while an operation on a replica hangs: it ends all the same, closes
//! the record and gives up whatever the operation does not need.

use std::fs::File;
use std::time::{Duration, Instant};

use quorum_blk::daemon::file_lock::{Locked, try_lock, unlock};

use crate::common::Signal;
use crate::guest::Guest;
use crate::model::Model;
use crate::site::{SECTORS, Site};

/// How long the end may take: `--io-timeout`, and some seconds for a machine that does other things.
const END_MAX: Duration = Duration::from_secs(15);

/// Waits until the daemon has said that it closed the disk, and has left.
fn await_left(site: &Site) {
    let deadline = Instant::now() + END_MAX;
    while !site.log().contains("counters") || site.socket.exists() {
        assert!(Instant::now() < deadline, "it goes on: {}", site.log());
        std::thread::sleep(Duration::from_millis(10));
    }
    let log = site.log();
    assert!(log.contains("closed: every extent is clean"), "{log}");
}

/// Whether somebody else could have the file.
fn is_free(path: &std::path::Path) -> bool {
    let file = File::options().read(true).write(true).open(path);
    let file = file.expect("a file of the site");
    let locked = try_lock(&file).expect("an answer");
    unlock(&file).expect("an answer");
    locked == Locked::Yes
}

fn await_free(path: &std::path::Path) {
    let deadline = Instant::now() + END_MAX;
    while !is_free(path) {
        assert!(Instant::now() < deadline, "{} is locked", path.display());
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn busy_site() -> (Site, Model, Guest) {
    let site = Site::faulty(&[1], &["--io-timeout", "2", "--flush-grace", "1"]);
    let mut model = Model::new(SECTORS);
    let mut guest = Guest::connect(&site);
    guest.write(&mut model, 0, 16);
    guest.flush(&mut model);
    (site, model, guest)
}

/// Ends the daemon while something hangs on replica 1, and looks what comes of it.
fn end_while_hanging(mut site: Site, model: Model) {
    site.process().signal(Signal::Terminate);
    see_end(site, model);
}

/// The daemon was told to end.
fn see_end(mut site: Site, mut model: Model) {
    await_left(&site);
    // What does not hang can be served again at once.
    for index in 0..3 {
        await_free(&site.record(index));
    }
    await_free(&site.images[0]);
    await_free(&site.images[2]);
    site.fault(1).tell("resume");
    let status = site.process().wait(END_MAX);
    assert_eq!(status.code(), Some(0), "{status}: {}", site.log());

    site.start();
    let log = site.log();
    assert!(!log.contains("unclean"), "{log}");
    site.await_healthy();
    let mut guest = Guest::connect(&site);
    guest.check_all(&mut model, false);
    drop(guest);
    site.await_equal();
    site.assert_no_failure();
    site.stop();
    assert_eq!(site.difference(), None);
}

fn with_operations_of_the_guest(hang: &str) {
    let (site, mut model, mut guest) = busy_site();
    site.fault(1).tell(hang);
    guest.write(&mut model, 4096, 16);
    guest.flush(&mut model);
    site.await_event("QUORUM_BLK_REPLICA_KICKED", |data| {
        data["replica"] == "replica1"
    });
    drop(guest);
    end_while_hanging(site, model);
}

#[test]
fn a_replica_that_hangs_in_writes_holds_up_neither_the_end_nor_the_record() {
    with_operations_of_the_guest("hang");
}

#[test]
fn a_replica_that_hangs_in_flushes_holds_up_neither_the_end_nor_the_record() {
    with_operations_of_the_guest("hang fsync");
}

#[test]
fn a_replica_that_hangs_in_the_last_flush_holds_up_neither_the_end_nor_the_record() {
    let (site, mut model, mut guest) = busy_site();
    guest.write(&mut model, 4096, 16);
    site.fault(1).tell("hang fsync");
    drop(guest);
    end_while_hanging(site, model);
}

#[test]
fn a_replica_that_hangs_when_its_fingerprint_is_taken_holds_up_neither_the_end_nor_the_record() {
    let (mut site, mut model, mut guest) = busy_site();
    guest.write(&mut model, 4096, 16);
    drop(guest);
    // Late, so that there is time to let the second one hang: the one after the last flush.
    site.fault(1).tell("delay 0.5 fsync");
    let asked = site.fault(1).ask("count fsync");
    site.process().signal(Signal::Terminate);
    site.fault(1).wait_until("count fsync", asked + 2);
    site.fault(1).tell("hang fsync");
    site.fault(1).tell("delay 0 fsync");
    see_end(site, model);
}
