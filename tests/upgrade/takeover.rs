// SPDX-License-Identifier: Apache-2.0
//! The old daemon is terminated or killed while the new one waits for it.

use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use quorum_blk::front_end::{FrontEnd, Options, Request, Status};
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};
use serde_json::Value;

use crate::common::{SECTOR, Signal};
use crate::guest::Load;
use crate::site::{Daemon, Site, await_that};

/// Starts the next daemon and waits until it waits for the one that runs.
fn waiting(site: &Site, name: &str) -> Daemon {
    let mut daemon = site.launch(name, &["--lock-timeout", "60"]);
    daemon.await_log("is locked by another process; waiting up to 60 s");
    daemon
}

#[test]
fn the_next_daemon_takes_over_from_one_that_is_terminated() {
    for (seed, options) in [
        (1, Options::default()),
        (2, Options::cloud_hypervisor()),
        (
            3,
            Options {
                inflight: false,
                ..Options::default()
            },
        ),
    ] {
        let site = Site::new(&[], &[]);
        let mut old = site.start("daemon0");
        let load = Load::start(&site.socket, options, seed);
        for round in 1..4 {
            load.await_progress(200);
            let mut new = waiting(&site, &format!("daemon{round}"));
            load.await_progress(200);
            old.signal(Signal::Terminate);
            old.ends_well();
            let log = old.log();
            assert!(log.contains("closed: every extent is clean"), "{log}");
            new.await_log("ready for a front-end");
            load.await_outages(round);
            load.await_progress(200);
            old.assert_no_failure();
            old = new;
        }
        println!("without a back-end for {:?}", load.outages());
        load.stop().check_all();
        old.stop();
        old.assert_no_failure();
        site.await_equal();
    }
}

#[test]
fn the_next_daemon_takes_over_from_one_that_is_killed() {
    for (seed, options) in [(4, Options::default()), (5, Options::cloud_hypervisor())] {
        let site = Site::new(&[], &[]);
        let mut old = site.start("daemon0");
        let load = Load::start(&site.socket, options, seed);
        for round in 1..6 {
            load.await_progress(200);
            let mut new = waiting(&site, &format!("daemon{round}"));
            load.await_progress(100);
            old.kill();
            new.await_log("ready for a front-end");
            load.await_outages(round);
            load.await_progress(200);
            old = new;
        }
        println!("without a back-end for {:?}", load.outages());
        load.stop().check_all();
        old.stop();
        old.assert_no_failure();
        site.await_equal();
    }
}

#[test]
fn the_next_daemon_takes_over_from_one_beside_a_replica_that_hangs() {
    for signal in [Signal::Terminate, Signal::Kill] {
        let site = Site::new(&[1], &["--io-timeout", "2", "--flush-grace", "1"]);
        let mut old = site.start("old");
        let load = Load::start(&site.socket, Options::default(), 6);
        load.await_progress(200);
        site.fault(1).tell("hang");
        load.await_progress(200);
        await_that("the replica is taken out", || {
            !old.events("QUORUM_BLK_REPLICA_KICKED").is_empty()
        });
        // The locks of the others are given up by the old one; so long is waited for the one of the
        // replica that hangs (rule S2).
        let mut new = site.launch("new", &["--lock-timeout", "8"]);
        new.await_log("is locked by another process; waiting up to 8 s");
        old.signal(signal);
        if signal == Signal::Kill {
            // Its locks last until the operations have landed, whoever waits for them (rule K2).
            std::thread::sleep(Duration::from_millis(500));
            assert!(!new.log().contains("ready for a front-end"));
            site.fault(1).tell("resume");
        }
        new.await_log("ready for a front-end");
        load.await_outages(1);
        load.await_progress(200);
        site.fault(1).tell("resume");
        if signal == Signal::Terminate {
            old.ends_well();
        }
        let mut guest = load.stop();
        guest.check_all();
        await_that("the replica is in sync", || {
            let states = new.events("QUORUM_BLK_REPLICA_STATE");
            states.last().is_some_and(|last| last["to"] == "in-sync")
        });
        guest.check_all();
        drop(guest);
        new.signal(Signal::Terminate);
        new.ends_well();
        new.assert_no_failure();
        site.await_equal();
    }
}

/// The socket is free for a successor as soon as the end has begun, and not only when the last
/// request has been completed.
#[test]
fn a_daemon_that_ends_stops_listening_before_it_drains() {
    let site = Site::new(&[0, 1], &[]);
    let mut old = site.start("old");
    let options = Options {
        timeout: Duration::from_secs(30),
        ..Options::default()
    };
    let mut front_end = FrontEnd::connect(&site.socket, &options).unwrap();
    front_end.queue(0).write_data(0, &[1; SECTOR]).unwrap();
    for replica in 0..2 {
        site.fault(replica).tell("hang read");
    }
    let read = Request::Read {
        sector: 0,
        len: SECTOR,
    };
    let token = front_end.queue(0).submit(&read).unwrap();
    await_that("the read is under way", || site.fault(0).ask("held") > 0);
    let begun = Instant::now();
    old.signal(Signal::Terminate);
    await_that("it stops listening", || !site.socket.exists());
    // The connection is there until the request has completed, or for two seconds.
    let open = is_open(front_end.socket());
    assert!(open || begun.elapsed() > Duration::from_secs(2));
    assert!(old.is_running());
    assert_eq!(front_end.queue(0).in_flight(), 1);
    for replica in 0..2 {
        site.fault(replica).tell("resume");
    }
    let mut completion = None;
    await_that("the read is completed", || {
        completion = front_end.queue(0).poll().unwrap();
        completion.is_some()
    });
    let completion = completion.expect("it was waited for");
    assert_eq!(completion.token, token);
    assert_eq!(completion.status, Status::Ok);
    assert_eq!(completion.data, [1; SECTOR]);
    old.ends_well();
    assert!(!is_open(front_end.socket()));
}

/// Whether the other side has not closed it.
fn is_open(socket: &UnixStream) -> bool {
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
    let mut byte = [0];
    matches!(recv(socket, &mut byte, flags), Err(Errno::AGAIN))
}

#[test]
fn a_socket_that_is_never_given_up_is_not_taken() {
    let site = Site::new(&[], &[]);
    let other = Site::new(&[], &[]);
    let _there = other.start("there");
    let mut arguments = site.serve_arguments("new");
    arguments.extend(["--socket-path".into(), other.socket.clone().into()]);
    arguments.extend(["--lock-timeout".into(), "1".into()]);
    let process = crate::common::Process::start(&site.folder_of("new"), &arguments);
    let mut new = site.daemon("new", process);
    let said = new.refuses();
    assert!(said.contains("another process is listening on"), "{said}");
    assert!(said.contains("did not stop within 1 s"), "{said}");
    // It had opened its own disk, and has closed it.
    assert!(said.contains("every extent is clean"), "{said}");
}

#[test]
fn the_first_request_is_told_once_with_the_time_it_took() {
    let site = Site::new(&[], &["--log-format", "json", "--workers", "2"]);
    let begun = Instant::now();
    let mut daemon = site.start("daemon");
    let load = Load::start(&site.socket, Options::default(), 7);
    daemon.await_log("first request completed");
    let most = u64::try_from(begun.elapsed().as_millis()).unwrap() + 20;
    load.await_progress(100);
    drop(load.stop());
    daemon.stop();
    let log = daemon.log();
    let lines: Vec<Value> = log
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .filter(|line: &Value| line.get("ms_after_exec").is_some())
        .collect();
    assert_eq!(lines.len(), 1, "{log}");
    let told = lines[0]["ms_after_exec"].as_u64().unwrap();
    assert!(told <= most, "{told} of {most} ms");
    let message = format!("first request completed {told} ms after exec");
    assert_eq!(lines[0]["message"], *message);
    let events = daemon.events("QUORUM_BLK_FIRST_REQUEST");
    assert_eq!(events.len(), 1);
    assert_eq!(events[0]["ms-after-exec"], told);
}
