// SPDX-License-Identifier: Apache-2.0
//! Storage that hangs delays the end of a queue, of a connection and of the daemon for as long as
//! `--io-timeout` says, and no longer. More replicas hang here than may: with fewer a request does
//! not even wait for them.

use std::time::{Duration, Instant};

use quorum_blk::front_end::{FrontEnd, Options, Request, Status, Token};

use crate::common::{FaultyFile, SECTOR, Signal};
use crate::site::{Daemon, PATIENCE, Site, await_that};

const IO_TIMEOUT: Duration = Duration::from_secs(2);
/// The timeout, and some seconds for a machine that does other things.
const BOUND: Duration = Duration::from_secs(12);

fn options() -> Options {
    Options {
        timeout: PATIENCE,
        ..Options::default()
    }
}

/// A daemon with a front-end that waits for a read of sector 0 and a write of sector 1, beside two
/// replicas that hang.
fn hanging() -> (Site, Daemon, FrontEnd, Vec<Token>) {
    let site = Site::new(&[0, 1], &["--io-timeout", "2", "--lock-timeout", "2"]);
    let daemon = site.start("daemon");
    let mut front_end = FrontEnd::connect(&site.socket, &options()).unwrap();
    let queue = front_end.queue(0);
    queue.write_data(0, &[7; 2 * SECTOR]).unwrap();
    queue.flush().unwrap();
    for replica in 0..2 {
        site.fault(replica).tell("hang");
    }
    let read = Request::Read {
        sector: 0,
        len: SECTOR,
    };
    let data = [8; SECTOR];
    let write = Request::Write {
        sector: 1,
        data: &data,
    };
    let queue = front_end.queue(0);
    let tokens = vec![queue.submit(&read).unwrap(), queue.submit(&write).unwrap()];
    await_that("both hang", || {
        (0..2).all(|replica| site.fault(replica).ask("held") >= 2)
    });
    (site, daemon, front_end, tokens)
}

/// All requests end, and say that they could not be carried out. It does not matter whether the
/// connection is still there: what is completed stands in the rings.
#[track_caller]
fn see_failed(front_end: &mut FrontEnd, mut tokens: Vec<Token>) {
    let deadline = Instant::now() + 2 * PATIENCE;
    while !tokens.is_empty() {
        assert!(Instant::now() < deadline, "{tokens:?} are not completed");
        let Some(completion) = front_end.queue(0).poll().unwrap() else {
            std::thread::sleep(Duration::from_millis(2));
            continue;
        };
        assert_eq!(completion.status, Status::IoError);
        tokens.retain(|token| *token != completion.token);
    }
}

/// After it is over the disk has what was acknowledged.
#[track_caller]
fn recover(site: &Site) {
    for replica in 0..2 {
        site.fault(replica).tell("resume");
    }
    let mut data = [0; SECTOR];
    await_that("the disk is read again", || {
        let mut front_end = FrontEnd::connect(&site.socket, &options()).unwrap();
        front_end.queue(0).read(0, &mut data).is_ok()
    });
    assert_eq!(data, [7; SECTOR]);
}

#[test]
fn a_queue_is_stopped_beside_replicas_that_hang() {
    let (site, mut daemon, mut front_end, tokens) = hanging();
    let begun = Instant::now();
    // GET_VRING_BASE: the true next index (rule Q4).
    assert_eq!(front_end.stop().unwrap(), [4]);
    let taken = begun.elapsed();
    assert!(taken < BOUND, "{taken:?}");
    // Not before, either: what was fetched is not given up.
    assert!(taken > IO_TIMEOUT / 2, "{taken:?}");
    see_failed(&mut front_end, tokens);
    drop(front_end);
    recover(&site);
    daemon.signal(Signal::Terminate);
    daemon.ends_well();
}

#[test]
fn a_front_end_leaves_and_comes_back_beside_replicas_that_hang() {
    let (site, mut daemon, mut front_end, tokens) = hanging();
    let begun = Instant::now();
    front_end.reconnect(&site.socket).unwrap();
    let taken = begun.elapsed();
    assert!(taken < BOUND, "{taken:?}");
    see_failed(&mut front_end, tokens);
    drop(front_end);
    recover(&site);
    daemon.signal(Signal::Terminate);
    daemon.ends_well();
}

#[test]
fn the_daemon_ends_beside_replicas_that_hang() {
    let (site, mut daemon, mut front_end, tokens) = hanging();
    let begun = Instant::now();
    daemon.signal(Signal::Terminate);
    see_failed(&mut front_end, tokens);
    // The last that it says. The process stays as long as the storage keeps it.
    await_that("it has ended", || daemon.log().contains("log: "));
    let taken = begun.elapsed();
    // A second time for the flush of those that are left.
    assert!(taken < IO_TIMEOUT + BOUND, "{taken:?}");
    for replica in 0..2 {
        site.fault(replica).tell("resume");
    }
    daemon.ends_well();
    let mut next = site.start("next");
    recover(&site);
    next.signal(Signal::Terminate);
    next.ends_well();
}

/// Writes to clean extents wait for the record (rule W2). If too many copies of it hang it is given
/// up after 30 s (`RECORD_HANG_LIMIT`), and so are they; nothing waits longer.
#[test]
fn the_daemon_ends_beside_a_record_that_hangs() {
    const RECORD_HANG_LIMIT: Duration = Duration::from_secs(30);
    let mut site = Site::new(&[], &["--io-timeout", "2", "--lock-timeout", "2"]);
    let records: Vec<FaultyFile> = (0..2)
        .map(|index| {
            let file = site.folder().join(format!("{index}.record"));
            std::fs::write(&file, []).unwrap();
            FaultyFile::new(&file)
        })
        .collect();
    let third = site.folder().join("2.record");
    let places = [&records[0].path, &records[1].path, &third];
    for (path, record) in site.paths.iter_mut().zip(places) {
        *path = format!("{},record={}", path.display(), record.display()).into();
    }
    let mut daemon = site.start("daemon");
    let mut front_end = FrontEnd::connect(&site.socket, &options()).unwrap();
    front_end.queue(0).write_data(0, &[7; SECTOR]).unwrap();
    for record in &records {
        record.tell("hang");
    }
    let data = [8; SECTOR];
    let write = Request::Write {
        sector: 4096,
        data: &data,
    };
    let token = front_end.queue(0).submit(&write).unwrap();
    await_that("the record hangs", || {
        records.iter().all(|record| record.ask("held") > 0)
    });
    let begun = Instant::now();
    daemon.signal(Signal::Terminate);
    see_failed(&mut front_end, vec![token]);
    while !daemon.log().contains("log: ") {
        let taken = begun.elapsed();
        assert!(taken < RECORD_HANG_LIMIT + 2 * BOUND, "{taken:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
    for record in &records {
        record.tell("resume");
    }
    daemon.ends_well();
}
