// SPDX-License-Identifier: Apache-2.0
//! Resolve, resync, probes, clean extents.

use std::time::Duration;

use super::super::super::event::{BehindCause, LaneId, LockTicket, Report, Request, Status};
use super::super::super::marks::Bitmap;
use super::super::super::order::LockMode;
use super::super::super::shared::{CrashTie, Shared};
use super::super::{KeeperAction, KeeperConfig, KeeperEvent, KeeperReport, KeeperState};
use super::{MS, SECOND, Setup, World, extents_of, fall_behind, id, ids, world};
use crate::units::{SectorRange, Time};

#[test]
fn order_is_unresolved_behind_then_scrub() {
    let failed = SectorRange::new((40 << 11) + 8, 16).unwrap();
    let mut world = Setup {
        start: KeeperState {
            verify_cursor: Some(0),
            ..KeeperState::fresh()
        },
        ..Setup::default()
    }
    .build(|shared| {
        fall_behind(shared, 2, [1, 50, 60, 70, 150].into_iter());
        for extent in [8, 90] {
            shared.unresolved.insert_extent(extent);
        }
        shared.unresolved.insert(failed);
    });
    let served = world.serve_all();
    assert_eq!(extents_of(&served), [8, 90, 1, 50, 60, 70, 150]);
    let checks = served.iter().enumerate().filter_map(|(at, request)| {
        let Request::Check { range, repair } = *request else {
            return None;
        };
        Some((at, range, repair))
    });
    // The sectors of the failed write, then the pass, when the rest is under way.
    let checks: Vec<_> = checks.collect();
    assert_eq!(checks[0], (1, failed, true));
    assert!(checks[1].0 >= 4 && checks[1].1.start() == 0);
    assert_eq!(world.shared.unresolved.next(0), None);
}

#[test]
fn no_more_than_a_few_extents_at_a_time() {
    let mut world = world(|shared| fall_behind(shared, 0, 0..200));
    world.tick();
    assert_eq!(world.open.len(), 4);
    world.serve(0, |_| false);
    assert_eq!(world.open.len(), 4);
}

/// Bytes reconciled in `seconds` when each extent takes a millisecond.
fn resynced_bytes(world: &mut World, seconds: u64, active: bool) -> u64 {
    let (mut total, mut bytes) = (0, 0);
    let end = world.now.after(Duration::from_secs(seconds));
    world.tick();
    while world.now < end {
        if active {
            total += 1;
            world.event(KeeperEvent::GuestRequests { total });
        }
        match world.serve(MS, |_| false) {
            Some(Request::Reconcile { .. }) => bytes += 1 << 20,
            Some(other) => panic!("{other:?} was not asked for"),
            None => world.pass(MS),
        }
    }
    bytes
}

#[test]
fn resync_is_limited_while_the_guest_is_active() {
    let rate = 128 << 20;
    for (active, least, most) in [
        (true, 5 * rate - rate / 10, 5 * rate + rate / 5),
        (false, 20 * rate, u64::MAX),
    ] {
        let setup = Setup {
            extents: 20_000,
            ..Setup::default()
        };
        let mut world = setup.build(|shared| fall_behind(shared, 1, 0..20_000));
        let bytes = resynced_bytes(&mut world, 5, active);
        assert!(bytes >= least && bytes <= most, "{active}: {bytes}");
    }
}

#[test]
fn progress_is_told_every_ten_seconds() {
    let mut world = Setup {
        extents: 10_000,
        ..Setup::default()
    }
    .build(|shared| fall_behind(shared, 1, 0..10_000));
    resynced_bytes(&mut world, 25, true);
    let told: Vec<_> = world
        .reports()
        .into_iter()
        .filter_map(|report| match report {
            KeeperReport::ResyncBegun { bytes_left, .. } => Some((bytes_left, 0)),
            KeeperReport::ResyncProgress {
                bytes_left,
                bytes_done,
                ..
            } => Some((bytes_left, bytes_done)),
            _ => None,
        })
        .collect();
    assert_eq!(told.len(), 3);
    let all = 10_000 << 20;
    assert_eq!(told[0], (all, 0));
    for (count, (left, done)) in (0..).zip(told) {
        assert_eq!(left + done, all);
        let expected = count * (1280 << 20);
        assert!(done.abs_diff(expected) <= 20 << 20, "{done} of {expected}");
    }
}

#[test]
fn limit_ends_a_second_after_the_last_request() {
    let config = KeeperConfig {
        resync_bytes_per_s: 1 << 10,
        ..KeeperConfig::default()
    };
    let mut world = Setup {
        config,
        ..Setup::default()
    }
    .build(|shared| fall_behind(shared, 1, 0..200));
    world.event(KeeperEvent::GuestRequests { total: 5 });
    assert_eq!(world.open.len(), 1);
    world.pass(990 * MS);
    assert_eq!(world.open.len(), 1);
    world.pass(10 * MS);
    assert_eq!(world.open.len(), 4);
}

#[test]
fn failing_extents_are_tried_again_later_and_keep_nobody_waiting() {
    let mut world = world(|shared| {
        fall_behind(shared, 1, 0..100);
        shared.unresolved.insert_extent(3);
    });
    let bad = |extent: u64| extent < 10;
    let mut tried = Vec::new();
    let begin = world.now;
    world.tick();
    while world.now.since(begin) < Duration::from_secs(40) {
        match world.serve(0, bad) {
            Some(Request::Reconcile { extent }) => {
                tried.push((world.now.since(begin).as_secs(), extent));
            }
            Some(other) => assert_eq!(other, Request::Flush),
            None => world.pass(500 * MS),
        }
    }
    let at_once: Vec<u64> = tried.iter().filter(|t| t.0 == 0).map(|t| t.1).collect();
    assert_eq!(at_once.len(), 100, "each was tried once");
    assert_eq!(world.shared.membership.behind_extents(id(1)), 10);
    let again: Vec<u64> = tried.iter().filter(|t| t.1 == 7).map(|t| t.0).collect();
    assert_eq!(again, [0, 1, 3, 7, 15, 31]);
    // When something has changed, at once.
    world.shared.decide_crash_ties(CrashTie::Error);
    let served = world.serve_all();
    assert_eq!(extents_of(&served).len(), 10);
}

#[test]
fn delay_is_short_again_when_trying_was_worth_while() {
    let mut world = world(|shared| fall_behind(shared, 1, 0..2));
    let mut bad = 2;
    world.tick();
    let mut tried = Vec::new();
    let begin = world.now;
    while tried.len() < 12 {
        match world.serve(0, |extent| extent < bad) {
            Some(Request::Reconcile { extent: 0 }) => {
                tried.push(world.now.since(begin).as_secs());
                // The other one can be helped from now on.
                bad = if tried.len() >= 5 { 1 } else { 2 };
            }
            Some(_) => {}
            None => world.pass(500 * MS),
        }
    }
    assert_eq!(tried[..8], [0, 1, 3, 7, 15, 16, 18, 22]);
}

#[test]
fn good_reply_that_changes_nothing_is_not_repeated_at_once() {
    let mut world = world(|shared| fall_behind(shared, 1, [5].into_iter()));
    world.tick();
    world.reply_to(|_| true, Status::Ok);
    assert_eq!(world.open, []);
    world.pass(SECOND);
    assert_eq!(world.open.len(), 1);
}

#[test]
fn late_write_is_made_up_for_when_it_is_reported() {
    let mut world = world(|_| {});
    world.tick();
    let marked = world.shared.membership.mark_behind(33, id(2));
    assert!(marked.is_some());
    world.event(KeeperEvent::Report(Report::Behind {
        replica: id(2),
        extent: world.shared.geometry.extent_range(33),
        why: BehindCause::Late,
    }));
    assert_eq!(extents_of(&world.serve_all()), [33]);
    // Nothing tells of this one; it is found by looking.
    world.shared.membership.mark_behind(34, id(2));
    world.pass(5 * SECOND);
    assert_eq!(extents_of(&world.serve_all()), [34]);
}

fn lagging_world() -> World {
    world(|shared| {
        let lags = (0..8).any(|_| shared.membership.note_late(id(1), Time::from_nanos(SECOND)));
        assert!(lags);
        assert!(shared.membership.lagging().contains(id(1)));
        write(shared, 17, Time::from_nanos(1000 * SECOND));
        flush(shared, 1, &[0, 1, 2]);
    })
}

fn probe(world: &mut World, nanos: u64, status: Status) {
    world.pass(500 * MS);
    let [(_, Request::Probe { replica, .. })] = world.open[..] else {
        panic!("{:?}", world.open);
    };
    assert_eq!(replica, id(1));
    world.pass(nanos);
    world.reply_to(|_| true, status);
}

#[test]
fn lagging_replica_is_probed_and_resynced_once_it_is_prompt() {
    let mut world = lagging_world();
    world.tick();
    assert_eq!(world.open, [], "it is not resynced while it lags");
    let answers = [
        (MS, Status::Ok),
        (MS, Status::Ok),
        (MS, Status::Ok),
        (25 * MS, Status::Ok),
        (MS, Status::Ok),
        (MS, Status::Ok),
        (MS, Status::IoError),
        (MS, Status::Ok),
        (MS, Status::Ok),
        (MS, Status::Ok),
    ];
    for (nanos, status) in answers {
        probe(&mut world, nanos, status);
        assert!(world.shared.membership.lagging().contains(id(1)));
        assert_eq!(world.open, []);
    }
    probe(&mut world, MS, Status::Ok);
    assert!(world.shared.membership.lagging().is_empty());
    assert!(world.did(KeeperAction::MembersChanged));
    let replica = id(1);
    assert!(world.reports().contains(&KeeperReport::Prompt { replica }));
    assert_eq!(extents_of(&world.serve_all()), [17]);
}

#[test]
fn lagging_replica_that_does_not_answer_gets_one_probe() {
    let mut world = lagging_world();
    world.pass(60 * SECOND);
    let probes = world
        .open
        .iter()
        .filter(|(_, request)| matches!(request, Request::Probe { .. }));
    assert_eq!(probes.count(), 1);
}

const LANE: LaneId = LaneId(0);
const TICKET: LockTicket = LockTicket(1);

/// A write in `extent` that ended just now.
fn write(shared: &Shared, extent: u64, now: Time) {
    shared.membership.intend(extent);
    shared.activity.note(extent, now);
}

fn flush(shared: &Shared, run: u64, replicas: &[usize]) {
    shared.activity.begin_run(run);
    for &replica in replicas {
        shared.activity.flushed(id(replica), run);
    }
}

#[test]
fn extents_are_clean_only_by_the_rule() {
    type Case = (&'static str, bool, fn(&Shared));
    let cases: [Case; 7] = [
        ("flushed everywhere", true, |_| {}),
        ("a later write", false, |shared| {
            write(shared, 9, Time::from_nanos(1000 * SECOND));
        }),
        ("locked", false, |shared| {
            let range = SectorRange::new((9 << 11) + 8, 8).unwrap();
            let mode = LockMode::Exclusive;
            assert!(shared.order.acquire(range, mode, LANE, TICKET));
        }),
        ("unresolved", false, |shared| {
            let range = SectorRange::new((9 << 11) + 8, 8).unwrap();
            shared.unresolved.insert(range);
        }),
        ("unresolved as a whole", false, |shared| {
            shared.unresolved.insert_extent(9);
        }),
        ("a replica behind for good", true, |shared| {
            assert!(shared.membership.mark_behind(9, id(2)).is_some());
        }),
        ("too few copies", false, |shared| {
            fall_behind(shared, 1, [9].into_iter());
            fall_behind(shared, 2, [9].into_iter());
        }),
    ];
    for (name, clean, change) in cases {
        let mut world = world(|shared| {
            write(shared, 9, Time::from_nanos(1000 * SECOND));
            flush(shared, 1, &[0, 1, 2]);
            change(shared);
        });
        world.pass(4 * SECOND);
        assert!(world.shared.membership.is_dirty(9), "{name}: too soon");
        world.pass(7 * SECOND);
        assert_eq!(!world.shared.membership.is_dirty(9), clean, "{name}");
        assert_eq!(world.did(KeeperAction::Record), clean, "{name}");
    }
}

#[test]
fn behind_mark_that_is_not_durable_keeps_the_extent_dirty() {
    let setup = Setup {
        recorded: true,
        ..Setup::default()
    };
    let mut world = setup.build(|shared| {
        write(shared, 9, Time::from_nanos(1000 * SECOND));
        flush(shared, 1, &[0, 1, 2]);
        shared.membership.mark_behind(9, id(1));
        // Nobody brings it back.
        shared.membership.kick(id(1));
    });
    world.pass(60 * SECOND);
    assert!(world.shared.membership.is_dirty(9));
}

#[test]
fn keeper_flushes_for_a_guest_that_does_not() {
    let mut world = world(|shared| {
        write(shared, 9, Time::from_nanos(1000 * SECOND));
        flush(shared, 1, &[0, 2]);
    });
    world.pass(29 * SECOND);
    assert_eq!(world.open, []);
    world.pass(2 * SECOND);
    assert!(matches!(world.open[..], [(_, Request::Flush)]));
    // It has no effect: it is not asked for again at once.
    world.reply_to(|_| true, Status::IoError);
    world.pass(25 * SECOND);
    assert_eq!(world.open, []);
    world.pass(10 * SECOND);
    flush(&world.shared, 2, &[0, 1, 2]);
    world.reply_to(|request| *request == Request::Flush, Status::Ok);
    assert!(!world.shared.membership.is_dirty(9));
    world.pass(100 * SECOND);
    assert_eq!(world.open, []);
}

#[test]
fn no_flush_is_wasted_on_what_stays_dirty() {
    let mut world = world(|shared| {
        write(shared, 9, Time::from_nanos(1000 * SECOND));
        let failed = SectorRange::new((9 << 11) + 8, 8).unwrap();
        shared.unresolved.insert(failed);
    });
    world.pass(100 * SECOND);
    let flush = |(_, request): &(_, Request)| *request == Request::Flush;
    assert!(!world.open.iter().any(flush));
}

/// H3: a check would need T current copies; the whole extent is brought into order instead, which
/// gives it them.
#[test]
fn extent_with_sectors_of_a_failed_write_and_too_few_copies_is_reconciled() {
    let failed = SectorRange::new((9 << 11) + 8, 8).unwrap();
    let mut world = world(|shared| {
        shared.membership.intend(9);
        shared.unresolved.insert(failed);
        fall_behind(shared, 1, [9].into_iter());
        fall_behind(shared, 2, [9].into_iter());
    });
    world.tick();
    assert_eq!(world.open[0].1, Request::Reconcile { extent: 9 });
    // With enough copies, sectors of a failed write are settled on their own.
    let membership = &world.shared.membership;
    assert!(membership.clear_behind(9, id(1), membership.counter(id(1))));
    world.reply_to(
        |request| *request == Request::Reconcile { extent: 9 },
        Status::IoError,
    );
    world.pass(100 * SECOND);
    let range = failed;
    let repair = true;
    let check = Request::Check { range, repair };
    assert!(world.open.iter().any(|(_, request)| *request == check));
}

#[test]
fn large_sweeps_go_in_steps() {
    let setup = Setup {
        extents: 10_000,
        ..Setup::default()
    };
    let mut world = setup.build(|shared| {
        for extent in 0..10_000 {
            shared.membership.intend(extent);
        }
        flush(shared, 1, &[0, 1, 2]);
    });
    let dirty = |world: &World| world.shared.membership.marks().count(Bitmap::Dirty);
    world.tick();
    assert_eq!(dirty(&world), 10_000 - 4096);
    world.pass(3 * MS);
    assert_eq!(dirty(&world), 0);
    assert_eq!(ids(&[0, 1, 2]), world.shared.membership.current(0));
}

#[test]
fn extents_that_requests_brought_up_to_date_count_as_resynced() {
    let mut world = world(|shared| fall_behind(shared, 1, [3, 9, 199].into_iter()));
    world.tick();
    // A lane could not wait for the keeper.
    let membership = &world.shared.membership;
    let counter = membership.counter(id(1));
    assert!(membership.clear_behind(9, id(1), counter));
    let whole = world.shared.geometry.extent_range(9).len_bytes() as u64;
    let status = world.keeper.status(&world.shared);
    assert_eq!(status.replicas[1].resynced_bytes, whole);
    // Once, and the last extent for what it is.
    assert!(membership.clear_behind(9, id(1), counter));
    let last = world.shared.geometry.extents() - 1;
    membership.marks().set(Bitmap::Behind(id(1)), last);
    assert!(membership.clear_behind(last, id(1), counter));
    let rest = world.shared.geometry.extent_range(last).len_bytes() as u64;
    let status = world.keeper.status(&world.shared);
    assert_eq!(status.replicas[1].resynced_bytes, whole + rest);
    assert_eq!(status.replicas[0].resynced_bytes, 0);
}
