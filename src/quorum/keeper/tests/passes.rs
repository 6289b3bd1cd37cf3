// SPDX-License-Identifier: Apache-2.0
//! Verify and scrub.

use std::time::Duration;

use super::super::super::event::{BadCause, During, Report, Request, Status};
use super::super::{
    Command, KeeperAction, KeeperConfig, KeeperEvent, KeeperReport, KeeperState, PassKind, Refusal,
    ScrubCounts,
};
use super::{MS, SECOND, Setup, World, fall_behind, id, ids};
use crate::units::SectorRange;

/// Sectors in a GiB.
const GIB: u64 = 1 << 21;

fn pass_setup(gibibytes: u64) -> Setup {
    Setup {
        extents: gibibytes * 1024,
        ..Setup::default()
    }
}

fn scrub(world: &mut World, repair: bool) {
    world.event(KeeperEvent::Command(Command::Scrub { repair }));
}

fn checks(world: &World) -> Vec<(SectorRange, bool)> {
    let checks = world.open.iter().map(|(_, request)| match *request {
        Request::Check { range, repair } => (range, repair),
        other => panic!("{other:?} was not asked for"),
    });
    checks.collect()
}

/// Runs until the pass ends or `until` is asked for; each check takes no time. Returns what was
/// checked, in sectors, and where it began.
fn run(world: &mut World, until: u64) -> (u64, u64) {
    let (mut sectors, mut first) = (0, u64::MAX);
    while world.keeper.status(&world.shared).pass.is_some() {
        let Some(request) = world.serve(0, |_| false) else {
            let deadline = world.keeper.deadline().unwrap();
            world.now = deadline;
            world.tick();
            continue;
        };
        let Request::Check { range, .. } = request else {
            panic!("{request:?} was not asked for");
        };
        sectors += u64::from(range.count());
        first = first.min(range.start());
        if range.end() >= until {
            break;
        }
    }
    (sectors, first)
}

fn cursors(world: &World) -> Vec<Option<u64>> {
    world.saves().iter().map(|save| save.scrub_cursor).collect()
}

#[test]
fn scrub_compares_everything_at_its_rate_and_saves_each_gibibyte() {
    let mut world = pass_setup(3).build(|_| {});
    let begin = world.now;
    scrub(&mut world, true);
    let (sectors, first) = run(&mut world, u64::MAX);
    assert_eq!((sectors, first), (3 * GIB, 0));
    assert_eq!(
        cursors(&world),
        [Some(0), Some(GIB), Some(2 * GIB), None],
        "saved when it begins, each GiB, and when it is through"
    );
    let took = world.now.since(begin).as_secs_f64();
    let expected = 3.0 * 1024.0 / 64.0;
    assert!((took - expected).abs() < 1.0, "{took} s");
    let counts = ScrubCounts {
        compared: 3 * GIB,
        ..ScrubCounts::default()
    };
    let kind = PassKind::Scrub;
    let done = KeeperReport::PassDone { kind, counts };
    assert_eq!(world.reports().last(), Some(&done));
    world.pass(1000 * SECOND);
    assert_eq!(world.open, []);
}

#[test]
fn scrub_goes_on_where_the_record_says() {
    let mut world = pass_setup(3).build(|_| {});
    scrub(&mut world, true);
    run(&mut world, 2 * GIB + 5000);
    let start = *world.saves().last().unwrap();
    assert_eq!(start.scrub_cursor, Some(2 * GIB));
    let config = KeeperConfig {
        scrub_repairs: false,
        ..KeeperConfig::default()
    };
    let mut world = Setup {
        start,
        config,
        ..pass_setup(3)
    }
    .build(|_| {});
    world.tick();
    assert!(checks(&world).iter().all(|&(_, repair)| !repair));
    assert_eq!(run(&mut world, u64::MAX), (GIB, 2 * GIB));
    assert_eq!(cursors(&world), [None]);
}

#[test]
fn disk_is_verified_once() {
    let start = KeeperState {
        verify_cursor: Some(0),
        ..KeeperState::fresh()
    };
    let mut world = Setup {
        start,
        ..pass_setup(2)
    }
    .build(|_| {});
    world.tick();
    // A scrub that is asked for meanwhile comes after it.
    scrub(&mut world, false);
    assert!(checks(&world).iter().all(|&(_, repair)| repair));
    run(&mut world, 2 * GIB);
    let state = *world.saves().last().unwrap();
    assert_eq!((state.verify_cursor, state.scrub_cursor), (None, Some(0)));
    let verified = world.saves().iter().map(|s| s.verify_cursor).max();
    assert_eq!(verified, Some(Some(GIB)));
    assert!(checks(&world).iter().all(|&(_, repair)| !repair));
    let (sectors, _) = run(&mut world, u64::MAX);
    assert_eq!(sectors, 2 * GIB);
    let start = *world.saves().last().unwrap();
    assert_eq!(start.verify_cursor, None);
    let mut world = Setup {
        start,
        ..pass_setup(2)
    }
    .build(|_| {});
    world.pass(1000 * SECOND);
    assert_eq!(world.open, []);
}

#[test]
fn cursor_waits_for_the_slowest_piece() {
    let mut world = pass_setup(2).build(|_| {});
    scrub(&mut world, true);
    let slow = world.open.remove(0);
    run(&mut world, GIB + 4096);
    assert_eq!(cursors(&world), [Some(0)]);
    let (tag, status) = (slow.0, Status::Ok);
    world.event(KeeperEvent::Replied { tag, status });
    assert_eq!(cursors(&world), [Some(0), Some(GIB)]);
}

#[test]
fn counts_are_of_what_is_compared_at_the_moment() {
    let mut world = pass_setup(1).build(|_| {});
    scrub(&mut world, true);
    let (range, _) = checks(&world)[0];
    let part = SectorRange::new(range.start() + 8, 8).unwrap();
    let elsewhere = SectorRange::new(GIB - 8, 8).unwrap();
    let (replica, during) = (id(1), During::Read);
    let bad = |range, cause| Report::Bad {
        replica,
        range,
        cause,
        during,
    };
    for report in [
        bad(part, BadCause::Differs),
        bad(elsewhere, BadCause::Differs),
        bad(part, BadCause::Error(5)),
        Report::Repaired {
            replica,
            range: part,
        },
        Report::Failure {
            range: part,
            during,
        },
    ] {
        world.event(KeeperEvent::Report(report));
    }
    world.reply_to(|_| true, Status::IoError);
    world.reply_to(|_| true, Status::Ok);
    world.event(KeeperEvent::Command(Command::StopScrub));
    let counts = ScrubCounts {
        compared: 512,
        differing: 8,
        unreadable: 8,
        repaired: 8,
        unresolved: 8,
        failed: 512,
    };
    let kind = PassKind::Scrub;
    let stopped = KeeperReport::PassStopped { kind, counts };
    assert_eq!(world.reports().last(), Some(&stopped));
    assert_eq!(cursors(&world).last(), Some(&None));
    // What was under way does not count for the next one.
    scrub(&mut world, true);
    while !world.open.is_empty() {
        let (range, _) = checks(&world)[0];
        if range.start() == 0 {
            break;
        }
        world.reply_to(|_| true, Status::Ok);
    }
    let pass = world.keeper.status(&world.shared).pass.unwrap();
    assert_eq!(pass.counts, ScrubCounts::default());
}

#[test]
fn scrub_yields_to_resync_and_to_the_guest() {
    let mut world = pass_setup(1).build(|shared| fall_behind(shared, 1, 0..8));
    world.event(KeeperEvent::GuestRequests { total: 1 });
    scrub(&mut world, true);
    assert!(
        world
            .open
            .iter()
            .all(|(_, request)| matches!(request, Request::Reconcile { .. }))
    );
    while world
        .open
        .iter()
        .any(|(_, request)| matches!(request, Request::Reconcile { .. }))
    {
        world.serve(0, |_| false);
    }
    assert_eq!(checks(&world).len(), 1, "one at a time beside the guest");
    world.pass(2 * SECOND);
    world.serve(0, |_| false);
    assert_eq!(checks(&world).len(), 4);
}

#[test]
fn scrub_waits_until_enough_replicas_are_up() {
    let mut world = pass_setup(1).build(|shared| {
        shared.membership.leave_out(id(0));
        shared.membership.leave_out(id(1));
    });
    scrub(&mut world, true);
    world.pass(100 * SECOND);
    assert_eq!(world.open, []);
    let replica = id(0);
    world.event(KeeperEvent::Opened {
        replica,
        same: true,
    });
    assert_eq!(world.shared.membership.up(), ids(&[0, 2]));
    assert_eq!(checks(&world).len(), 4);
}

#[test]
fn scrub_begins_on_its_own_after_its_interval() {
    let config = KeeperConfig {
        scrub_interval: Some(Duration::from_secs(3600)),
        ..KeeperConfig::default()
    };
    let mut world = Setup {
        config,
        ..pass_setup(1)
    }
    .build(|_| {});
    world.tick();
    world.pass(3599 * SECOND);
    assert_eq!(world.open, []);
    world.pass(SECOND);
    assert_eq!(checks(&world).len(), 4);
    run(&mut world, u64::MAX);
    let ended = world.now;
    while world.open.is_empty() {
        world.pass(100 * MS);
    }
    let between = world.now.since(ended).as_secs();
    assert!((3599..=3601).contains(&between), "{between}");
}

#[test]
fn cursor_beyond_the_disk_is_no_harm() {
    for sector in [u64::MAX, GIB, GIB - 1, 4 * GIB + 3] {
        let start = KeeperState {
            verify_cursor: Some(sector),
            scrub_cursor: Some(sector),
            ..KeeperState::fresh()
        };
        let mut world = Setup {
            start,
            ..pass_setup(1)
        }
        .build(|_| {});
        world.tick();
        assert!(checks(&world)[0].0.is_aligned(8));
        run(&mut world, u64::MAX);
        let state = *world.saves().last().unwrap();
        assert_eq!((state.verify_cursor, state.scrub_cursor), (None, None));
    }
}

#[test]
fn stopping_nothing_is_refused() {
    let mut world = pass_setup(1).build(|_| {});
    let command = Command::StopScrub;
    world.event(KeeperEvent::Command(command));
    let why = Refusal::NoScrub;
    assert!(world.did(KeeperAction::Report(KeeperReport::Refused { command, why })));
}
