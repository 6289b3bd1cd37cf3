// SPDX-License-Identifier: Apache-2.0
//! The daemon is killed again and again, at any moment of its life, and the guest must not notice
//! (rules Q1 to Q3, L3 and I11 of docs/consistency.md).
//!
//! A front-end in the test process keeps four queues full of reads, writes, flushes, discards and
//! zeroes that overlap, as direct and as INDIRECT chains. The daemon is killed with SIGKILL while
//! it starts, at any message of the negotiation (so also between GET_INFLIGHT_FD and
//! SET_INFLIGHT_FD), right afterwards, in the middle of requests, and while it ends because it was
//! asked to; the next one is started and
//! the front-end finds it as QEMU does or as cloud-hypervisor does. Checked:
//!
//! - every head made available is seen used exactly once, and none that is not in flight; the used
//!   index never goes back; at each pause no descriptor is missing;
//! - every request ends with OK;
//! - every read shows what it must: a model knows what overlapping requests may leave;
//! - in the end all replicas are byte-identical and hold what was acknowledged, and the record of
//!   the disk is clean.
//!
//! One replica answers late, so that requests are completed out of order; where in-flight tracking
//! is agreed on that must be seen to happen, and where it is not it must not.
//!
//! What must be noticed, and was seen to be, within forty kills each: marks that are forgotten at
//! the start, or not kept at all although that was agreed on, with completions published as they
//! come (every storm with tracking: the used ring names a head that is not in flight); the same
//! order of publication where nothing is tracked (both storms without).
//!
//! `STORM_KILLS` sets the number of kills of each storm (then without a limit in time), `STORM_SEED`
//! the seed; `scripts/storm` does both. The seed decides what is done and when; how far the daemon
//! has got by then is up to the machine.
//!
//! - `storm`: kills, pauses, and what happens beside them.
//! - `guest`: the requests and their account. `model`: what sectors may hold.
//! - `site`: replicas and daemons.

#[path = "../common/mod.rs"]
mod common;
mod guest;
mod model;
mod site;
mod storm;

use std::time::Duration;

use quorum_blk::front_end::Options;
use storm::{Storm, Weather};

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().expect("a number"))
}

/// Four queues whose indices soon wrap.
fn weather(options: Options, seed: u64) -> Weather {
    let kills = number("STORM_KILLS");
    let kills = kills.map(|kills| usize::try_from(kills).expect("not so many"));
    Weather {
        options: Options {
            queues: 4,
            queue_size: 128,
            first_index: 65_000,
            timeout: site::PATIENCE,
            ..options
        },
        late: None,
        leaving: false,
        resets: false,
        kills: kills.unwrap_or(300),
        limit: Duration::from_secs(if kills.is_some() { 1 << 20 } else { 20 }),
        seed: number("STORM_SEED").unwrap_or(0) ^ seed,
    }
}

fn rage(weather: Weather) {
    println!("{weather:?}");
    let mut storm = Storm::new(weather);
    storm.rage();
    let record = storm.calm();
    let (figures, kills) = (storm.figures, storm.kills);
    let stops = storm.clean_stops;
    println!("{kills:?}, {stops} clean stops, {figures:?}");
    let log = storm.site.whole_log();
    for complaint in ["panicked", "the queue stops", "ERROR"] {
        let lines = log.lines().filter(|line| line.contains(complaint));
        let lines: Vec<&str> = lines.take(5).collect();
        assert!(lines.is_empty(), "{lines:#?}");
    }
    for event in ["QUORUM_FAILURE", "QUORUM_REPORT_BAD"] {
        assert_eq!(storm.site.count_events(event), 0, "{event}");
    }
    println!("{record}");
    assert!(kills.during_negotiation > 0 && kills.before_it_listened > 0);
    assert!(figures.survived > 0, "nothing was in flight at any kill");
    if weather.leaving {
        let resyncs = storm.site.count_events("QUORUM_BLK_RESYNC_BEGUN");
        assert!(resyncs > 0, "no resync was under way at any time");
    }
    if weather.options.inflight {
        assert!(log.contains("executed again"), "no mark was ever left");
        let often = figures.completed / 100;
        assert!(figures.overtaking > often, "too little out of order");
    } else {
        assert_eq!(figures.overtaking, 0, "out of order and untracked");
    }
}

#[test]
fn storm_as_qemu_sees_it() {
    rage(Weather {
        late: Some(4),
        ..weather(Options::default(), 0x51)
    });
}

#[test]
fn storm_as_cloud_hypervisor_sees_it() {
    rage(Weather {
        late: Some(4),
        ..weather(Options::cloud_hypervisor(), 0xc4)
    });
}

#[test]
fn storm_without_in_flight_tracking() {
    let options = Options {
        inflight: false,
        ..Options::default()
    };
    rage(Weather {
        late: Some(2),
        ..weather(options, 0x0f)
    });
}

#[test]
fn storm_without_in_flight_tracking_as_cloud_hypervisor_sees_it() {
    let options = Options {
        inflight: false,
        ..Options::cloud_hypervisor()
    };
    rage(weather(options, 0x1f));
}

#[test]
fn storm_while_a_replica_leaves_and_comes_back() {
    rage(Weather {
        leaving: true,
        ..weather(Options::default(), 0x1e)
    });
}

#[test]
fn storm_over_a_guest_that_is_reset() {
    rage(Weather {
        late: Some(4),
        leaving: true,
        resets: true,
        ..weather(Options::default(), 0x4e)
    });
}
