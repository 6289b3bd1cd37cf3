// SPDX-License-Identifier: Apache-2.0
//! Who leaves, who comes back, who is kept.

use super::super::super::event::{BehindCause, KickCause, Report};
use super::super::super::marks::{Bitmap, PAGE_WORDS};
use super::super::super::shared::Shared;
use super::super::{
    Command, KeeperAction, KeeperConfig, KeeperEvent, KeeperReport, KeeperState, Refusal,
    ReplicaState, StateCause,
};
use super::{SECOND, Setup, World, fall_behind, id, ids, world};
use crate::units::SectorRange;

fn write_failed(replica: usize) -> KeeperEvent {
    KeeperEvent::Report(Report::Behind {
        replica: id(replica),
        extent: SectorRange::new(0, 2048).unwrap(),
        why: BehindCause::WriteFailed(5),
    })
}

/// A lane kicks a replica and says so.
fn kick(world: &mut World, replica: usize) {
    assert!(world.shared.membership.kick(id(replica)).is_some());
    let (replica, why) = (id(replica), KickCause::Hung);
    world.event(KeeperEvent::Kicked { replica, why });
}

fn detach(world: &mut World, replica: usize) {
    let replica = id(replica);
    world.event(KeeperEvent::Detached { replica });
}

fn open(world: &mut World, replica: usize, same: bool) {
    let replica = id(replica);
    assert_eq!(
        world.log.last().unwrap().1,
        KeeperAction::Reopen { replica }
    );
    world.event(KeeperEvent::Opened { replica, same });
}

fn state(world: &World, replica: usize) -> ReplicaState {
    world.keeper.status(&world.shared).replicas[replica].state
}

fn reopenings(world: &World) -> Vec<u64> {
    let times = world.log.iter().filter_map(|(time, action)| {
        matches!(action, KeeperAction::Reopen { .. }).then_some(*time)
    });
    times.collect()
}

fn everything(shared: &Shared) -> std::ops::Range<u64> {
    0..shared.geometry.extents()
}

#[test]
fn kicked_replica_is_opened_once_it_is_detached() {
    let mut world = world(|_| {});
    kick(&mut world, 1);
    assert_eq!(state(&world, 1), ReplicaState::Missing);
    // An operation of before may still land.
    world.pass(40 * SECOND);
    assert_eq!(reopenings(&world), [0; 0]);
    detach(&mut world, 1);
    assert_eq!(reopenings(&world), [world.now.nanos()]);
    // A word that came late changes nothing.
    let (replica, why) = (id(1), KickCause::Hung);
    open(&mut world, 1, true);
    world.event(KeeperEvent::Kicked { replica, why });
    assert_eq!(state(&world, 1), ReplicaState::InSync);
}

#[test]
fn failed_attempts_double_the_delay() {
    let mut world = world(|_| {});
    kick(&mut world, 0);
    detach(&mut world, 0);
    let mut delays = Vec::new();
    for _ in 0..8 {
        let from = world.now;
        while !matches!(world.log.last(), Some((_, KeeperAction::Reopen { .. }))) {
            world.now = world.keeper.deadline().unwrap();
            world.tick();
        }
        delays.push(world.now.since(from).as_secs());
        let replica = id(0);
        world.event(KeeperEvent::OpenFailed { replica });
        world.log.clear();
    }
    assert_eq!(delays, [1, 2, 4, 8, 16, 32, 60, 60]);
}

#[test]
fn returned_replica_is_resynced_and_in_sync_again() {
    let mut world = world(|shared| {
        for extent in [4, 9] {
            shared.membership.intend(extent);
        }
    });
    kick(&mut world, 2);
    detach(&mut world, 2);
    world.pass(SECOND);
    open(&mut world, 2, true);
    assert!(world.did(KeeperAction::Admitted { replica: id(2) }));
    assert_eq!(state(&world, 2), ReplicaState::Syncing);
    let served = world.serve_all();
    assert_eq!(super::extents_of(&served), [4, 9]);
    assert_eq!(state(&world, 2), ReplicaState::InSync);
    let replica = id(2);
    let bytes_done = 2 << 20;
    let reports = world.reports();
    assert!(reports.contains(&KeeperReport::ResyncBegun {
        replica,
        bytes_left: 2 << 20
    }));
    assert_eq!(
        reports.last(),
        Some(&KeeperReport::ResyncDone {
            replica,
            bytes_done
        })
    );
    // The states of before and after are saved, at once where a replica went or came.
    let states: Vec<_> = world.saves().iter().map(|save| save.states[2]).collect();
    assert_eq!(states, [ReplicaState::Missing, ReplicaState::Syncing]);
    world.pass(SECOND);
    assert_eq!(
        world.saves().last().unwrap().states[2],
        ReplicaState::InSync
    );
}

/// The record writes what there is to write.
fn record(world: &World) {
    let mut pages = Vec::new();
    let marks = world.shared.membership.marks();
    let number = marks.collect(&mut pages);
    for &page in &pages {
        let mut bits = [0; PAGE_WORDS];
        marks.copy_page(page, &mut bits);
        marks.made_durable(page, &bits);
    }
    marks.settle(number);
}

#[test]
fn replica_is_in_sync_once_the_record_says_so() {
    let setup = Setup {
        recorded: true,
        ..Setup::default()
    };
    let mut world = setup.build(|shared| fall_behind(shared, 2, [3].into_iter()));
    record(&world);
    world.log.clear();
    world.serve_all();
    assert_eq!(world.shared.membership.behind_extents(id(2)), 0);
    assert_eq!(state(&world, 2), ReplicaState::Syncing);
    assert!(
        world.did(KeeperAction::Record),
        "it is not left to a lazy clear"
    );
    world.pass(10 * SECOND);
    assert_eq!(state(&world, 2), ReplicaState::Syncing);
    // It falls behind and catches up once more before the record has written anything: what it
    // writes then is of before.
    let mut pages = Vec::new();
    let number = world.shared.membership.marks().collect(&mut pages);
    fall_behind(&world.shared, 2, [5].into_iter());
    let membership = &world.shared.membership;
    assert!(membership.clear_behind(5, id(2), membership.counter(id(2))));
    membership.marks().settle(number);
    world.pass(10 * SECOND);
    assert_eq!(state(&world, 2), ReplicaState::Syncing);
    record(&world);
    world.pass(SECOND);
    assert_eq!(state(&world, 2), ReplicaState::InSync);
}

#[test]
fn replaced_replica_is_behind_everywhere_for_good_before_it_is_admitted() {
    let mut world = Setup {
        recorded: true,
        ..Setup::default()
    }
    .build(|_| {});
    kick(&mut world, 1);
    detach(&mut world, 1);
    world.pass(SECOND);
    open(&mut world, 1, false);
    world.pass(10 * SECOND);
    assert!(!world.did(KeeperAction::Admitted { replica: id(1) }));
    assert!(!world.shared.membership.up().contains(id(1)));
    record(&world);
    world.tick();
    assert!(world.did(KeeperAction::Admitted { replica: id(1) }));
    let behind = world.shared.membership.behind_extents(id(1));
    assert_eq!(behind, world.shared.geometry.extents());
    assert_eq!(world.shared.membership.current(7), ids(&[0, 2]));
    assert!(world.reports().contains(&KeeperReport::State {
        replica: id(1),
        from: ReplicaState::Missing,
        to: ReplicaState::Syncing,
        why: StateCause::Replaced,
    }));
}

#[test]
fn write_errors_make_suspect_then_failed() {
    let mut world = world(|_| {});
    for count in 1..=16 {
        assert!(world.shared.membership.up().contains(id(0)), "{count}");
        assert_eq!(world.shared.suspects(), ids(&[0][..usize::from(count > 8)]));
        world.event(write_failed(0));
    }
    let (replica, why) = (id(0), KickCause::Budget);
    assert!(world.did(KeeperAction::Kicked { replica, why }));
    assert_eq!(state(&world, 0), ReplicaState::Failed);
    let save = *world.saves().last().unwrap();
    assert_eq!(save.states[0], ReplicaState::Failed);
    assert_eq!(save.suspects, ids(&[0]));
    detach(&mut world, 0);
    world.pass(600 * SECOND);
    assert_eq!(reopenings(&world), [0; 0]);
    world.event(KeeperEvent::Command(Command::Clear { replica }));
    assert_eq!(world.shared.suspects(), ids(&[]));
    assert_eq!(reopenings(&world).len(), 1);
    world.event(KeeperEvent::Opened {
        replica,
        same: true,
    });
    assert_eq!(state(&world, 0), ReplicaState::InSync);
}

#[test]
fn failed_state_is_kept_over_restarts() {
    let mut states = KeeperState::fresh().states;
    states[2] = ReplicaState::Failed;
    let start = KeeperState {
        states,
        suspects: ids(&[2]),
        ..KeeperState::fresh()
    };
    let setup = Setup {
        start,
        ..Setup::default()
    };
    let mut world = setup.build(|shared| {
        shared.membership.leave_out(id(2));
        shared.membership.leave_out(id(1));
    });
    world.pass(100 * SECOND);
    assert_eq!(world.shared.suspects(), ids(&[2]));
    assert_eq!(state(&world, 1), ReplicaState::Missing);
    assert_eq!(state(&world, 2), ReplicaState::Failed);
    assert!(world.did(KeeperAction::Reopen { replica: id(1) }));
    assert!(!world.did(KeeperAction::Reopen { replica: id(2) }));
}

#[test]
fn last_current_copy_is_kept_until_there_is_another() {
    let mut world = world(|shared| {
        fall_behind(shared, 1, [5].into_iter());
        fall_behind(shared, 2, [5, 6].into_iter());
    });
    world.tick();
    for _ in 0..20 {
        world.event(write_failed(0));
    }
    let (replica, why) = (id(0), KickCause::Budget);
    assert_eq!(state(&world, 0), ReplicaState::InSync);
    let kept = KeeperReport::Kept { replica, why };
    let times = world.reports().iter().filter(|&&r| r == kept).count();
    assert_eq!(times, 1);
    let fail = Command::Fail { replica };
    world.event(KeeperEvent::Command(fail));
    assert!(world.reports().contains(&KeeperReport::Refused {
        command: fail,
        why: Refusal::Needed
    }));
    world.serve_all();
    world.pass(5 * SECOND);
    assert!(world.did(KeeperAction::Kicked { replica, why }));
    assert_eq!(state(&world, 0), ReplicaState::Failed);
    // Now two are left, which is T.
    for _ in 0..20 {
        world.event(write_failed(1));
    }
    world.pass(50 * SECOND);
    assert_eq!(world.shared.membership.up(), ids(&[1, 2]));
}

#[test]
fn needed_replica_comes_back_however_much_it_did_wrong() {
    let mut world = world(|shared| {
        fall_behind(shared, 1, [5].into_iter());
        fall_behind(shared, 2, [5].into_iter());
    });
    world.tick();
    for _ in 0..20 {
        world.event(write_failed(0));
    }
    kick(&mut world, 0);
    assert_eq!(state(&world, 0), ReplicaState::Missing);
    detach(&mut world, 0);
    world.pass(SECOND);
    let replica = id(0);
    world.event(KeeperEvent::Opened {
        replica,
        same: true,
    });
    assert!(world.shared.membership.current(5).contains(id(0)));
    world.serve_all();
    world.pass(5 * SECOND);
    assert_eq!(state(&world, 0), ReplicaState::Failed);
}

#[test]
fn delay_begins_anew_after_a_replica_was_up_for_long() {
    let mut world = Setup {
        config: KeeperConfig {
            kicks_max: 0,
            ..KeeperConfig::default()
        },
        ..Setup::default()
    }
    .build(|_| {});
    let mut delays = Vec::new();
    for up_seconds in [5, 5, 5, 61, 5] {
        world.pass(up_seconds * SECOND);
        kick(&mut world, 1);
        detach(&mut world, 1);
        let from = world.now;
        while !world.did(KeeperAction::Reopen { replica: id(1) }) {
            world.pass(SECOND);
        }
        delays.push(world.now.since(from).as_secs());
        open(&mut world, 1, true);
        world.log.clear();
    }
    // The first one was up since the beginning of time.
    assert_eq!(delays, [1, 2, 4, 1, 2]);
}

#[test]
fn fourth_kick_in_a_minute_fails_the_replica() {
    let mut world = world(|_| {});
    for count in 1..=4 {
        kick(&mut world, 2);
        detach(&mut world, 2);
        if count < 4 {
            world.pass(5 * SECOND);
            open(&mut world, 2, true);
        }
        assert_eq!(world.shared.suspects().count(), usize::from(count >= 2));
    }
    assert_eq!(state(&world, 2), ReplicaState::Failed);
    world.pass(300 * SECOND);
    assert_eq!(reopenings(&world).len(), 3);
}

#[test]
fn flush_error_has_the_replica_opened_again() {
    let mut world = world(|_| {});
    let replica = id(1);
    let failed = |replica| {
        KeeperEvent::Report(Report::FlushFailed {
            replica,
            errno: 5,
            extents: 0,
        })
    };
    let counter = world.shared.membership.counter(replica);
    world.event(failed(replica));
    let why = KickCause::FlushFailed(5);
    assert!(world.did(KeeperAction::Kicked { replica, why }));
    assert!(world.shared.membership.counter(replica) > counter);
    // The second one is needed until the first is back.
    world.event(failed(id(0)));
    assert!(world.shared.membership.up().contains(id(0)));
    detach(&mut world, 1);
    world.pass(SECOND);
    open(&mut world, 1, true);
    world.pass(5 * SECOND);
    assert!(!world.shared.membership.up().contains(id(0)));
    assert_eq!(state(&world, 0), ReplicaState::Missing);
}

#[test]
fn repairs_count_by_sector_and_resyncs_do_not() {
    let config = KeeperConfig {
        repairs_max: 10,
        ..KeeperConfig::default()
    };
    let mut world = Setup {
        config,
        ..Setup::default()
    }
    .build(|shared| fall_behind(shared, 0, 0..100));
    world.serve_all();
    assert_eq!(world.shared.suspects(), ids(&[]));
    let repaired = |count| {
        KeeperEvent::Report(Report::Repaired {
            replica: id(0),
            range: SectorRange::new(8, count).unwrap(),
        })
    };
    world.event(repaired(8));
    assert_eq!(world.shared.suspects(), ids(&[0]));
    world.event(repaired(2));
    assert_eq!(state(&world, 0), ReplicaState::Failed);
}

#[test]
fn forced_copy_serves_what_nobody_had() {
    let mut world = world(|shared| {
        for replica in 0..3 {
            fall_behind(shared, replica, [11].into_iter());
        }
        fall_behind(shared, 1, [12].into_iter());
    });
    assert!(world.shared.membership.current(11).is_empty());
    let replica = id(1);
    let force = Command::ForceCurrent { replica };
    world.event(KeeperEvent::Command(force));
    let extents = 1;
    assert!(
        world
            .reports()
            .contains(&KeeperReport::Forced { replica, extents })
    );
    assert_eq!(world.shared.membership.current(11), ids(&[1]));
    assert!(world.shared.membership.is_behind(12, replica));
    assert!(world.shared.membership.is_dirty(11));
    assert!(world.shared.unresolved.holds_extent(11));
    world.serve_all();
    assert_eq!(world.shared.membership.current(11), ids(&[0, 1, 2]));
    world.event(KeeperEvent::Command(force));
    assert!(world.reports().contains(&KeeperReport::Refused {
        command: force,
        why: Refusal::NothingLost
    }));
}

#[test]
fn replica_that_failed_does_not_count_as_a_copy_that_may_return() {
    let mut states = KeeperState::fresh().states;
    states[0] = ReplicaState::Failed;
    let start = KeeperState {
        states,
        ..KeeperState::fresh()
    };
    let setup = Setup {
        start,
        ..Setup::default()
    };
    let mut world = setup.build(|shared| {
        shared.membership.leave_out(id(0));
        for replica in 1..3 {
            fall_behind(shared, replica, [3].into_iter());
        }
    });
    let replica = id(2);
    world.event(KeeperEvent::Command(Command::ForceCurrent { replica }));
    assert_eq!(world.shared.membership.current(3), ids(&[2]));
    let marks = world.shared.membership.marks();
    assert!(marks.is_set(Bitmap::Behind(id(0)), 3));
}

#[test]
fn vanished_replica_leaves_if_it_can() {
    let mut world = world(|shared| {
        let all = everything(shared);
        fall_behind(shared, 1, all.clone());
        fall_behind(shared, 2, all);
    });
    world.event(KeeperEvent::Vanished { replica: id(2) });
    assert_eq!(state(&world, 2), ReplicaState::Missing);
    world.event(KeeperEvent::Vanished { replica: id(0) });
    assert!(world.shared.membership.up().contains(id(0)));
}

#[test]
fn unknown_replica_is_refused() {
    let mut world = world(|_| {});
    let command = Command::Fail { replica: id(7) };
    world.event(KeeperEvent::Command(command));
    let why = Refusal::NoSuchReplica;
    assert_eq!(world.reports(), [KeeperReport::Refused { command, why }]);
}
