// SPDX-License-Identifier: Apache-2.0
//! What lanes share, under a model checker of threads: range locks, behind marks, flush runs.
//!
//! The shared structures are compiled into this test by path, beside a `sync` module that gives
//! them shuttle's primitives instead of the standard library's. Shuttle then runs real threads of
//! this test one at a time, in many random orders that differ at every access to a primitive.
//!
//! It has a `main` of its own because the unit tests of these files come along and cannot run
//! outside of shuttle; without the usual harness they are left out.

#[allow(
    dead_code,
    unused_imports,
    reason = "only a part of the units is used here"
)]
#[path = "../src/units.rs"]
mod units;

#[allow(
    dead_code,
    unused_imports,
    reason = "the lanes and the unit tests use more of it"
)]
#[path = "../src/quorum"]
mod quorum {
    #[path = "event.rs"]
    pub mod event;
    #[path = "flush_gate.rs"]
    pub mod flush_gate;
    #[path = "marks.rs"]
    pub mod marks;
    #[path = "membership.rs"]
    pub mod membership;
    #[path = "order.rs"]
    pub mod order;

    /// Stands in for `src/quorum/sync.rs`.
    mod sync {
        pub(super) use shuttle::sync::{
            Mutex,
            atomic::{AtomicU32, AtomicU64, Ordering, fence},
        };
    }
}

use std::sync::atomic::{AtomicBool, Ordering};

use shuttle::sync::{Arc, Mutex, atomic::AtomicU64, mpsc};
use shuttle::thread;

use quorum::event::{LaneId, LockTicket};
use quorum::flush_gate::{FlushGate, Join};
use quorum::marks::{Bitmap, Marks, PAGE_WORDS};
use quorum::membership::{Intent, Membership, Settled};
use quorum::order::{LockMode, Order};
use units::{ReplicaId, ReplicaSet, SectorRange};

/// Orders of threads tried per test.
const SCHEDULES: usize = if cfg!(debug_assertions) {
    2_000
} else {
    20_000
};

fn lane(index: usize) -> LaneId {
    LaneId(u8::try_from(index).expect("few lanes"))
}

fn range(start: u64, count: u32) -> SectorRange {
    SectorRange::new(start, count).expect("not empty")
}

/// A channel to each lane.
type Mail<T> = (Vec<mpsc::Sender<T>>, Vec<mpsc::Receiver<T>>);

fn mail<T>(lanes: usize) -> Mail<T> {
    (0..lanes).map(|_| mpsc::channel()).unzip()
}

/// I10: nobody else holds what an exclusive holder holds, every lock that is waited for is
/// granted, and whoever is woken is woken once.
fn order_gives_an_exclusive_range_to_one_lane() {
    shuttle::check_random(
        || {
            let order = Arc::new(Order::new(4));
            let inside = Arc::new(AtomicU64::new(0));
            let (senders, receivers) = mail::<LockTicket>(3);
            let threads: Vec<_> = receivers
                .into_iter()
                .enumerate()
                .map(|(id, granted)| {
                    let (order, inside) = (order.clone(), inside.clone());
                    let senders = senders.clone();
                    thread::spawn(move || {
                        for round in 0..2u64 {
                            let mode = match (id, round) {
                                (2, _) => LockMode::Shared,
                                _ => LockMode::Exclusive,
                            };
                            // All of these share sector 2.
                            let mine = range(2 - u64::from(id == 0), 2);
                            let ticket = LockTicket(round);
                            if !order.acquire(mine, mode, lane(id), ticket) {
                                assert_eq!(granted.recv(), Ok(ticket));
                            }
                            let weight = if mode == LockMode::Exclusive { 100 } else { 1 };
                            let before = inside.fetch_add(weight, Ordering::SeqCst);
                            assert!(before == 0 || (weight == 1 && before < 100));
                            inside.fetch_sub(weight, Ordering::SeqCst);
                            let mut woken = Vec::new();
                            order.release(mine, lane(id), ticket, &mut woken);
                            for (to, ticket) in woken {
                                let to = &senders[usize::from(to.0)];
                                to.send(ticket).expect("it waits");
                            }
                        }
                    })
                })
                .collect();
            for thread in threads {
                thread.join().expect("no assertion failed");
            }
            assert!(order.is_empty());
        },
        SCHEDULES,
    );
}

/// V7: a read without a lock that was undisturbed saw no half of any write.
fn read_stamp_never_calls_a_torn_read_undisturbed() {
    // Over all schedules, some read must have been undisturbed, or this test shows nothing.
    static UNDISTURBED: AtomicBool = AtomicBool::new(false);
    shuttle::check_random(
        || {
            let order = Arc::new(Order::new(4));
            let copies = Arc::new([AtomicU64::new(0), AtomicU64::new(0)]);
            let all = range(0, 8);
            let writer = {
                let (order, copies) = (order.clone(), copies.clone());
                thread::spawn(move || {
                    for version in 1..=2 {
                        let ticket = LockTicket(version);
                        assert!(order.acquire(all, LockMode::Exclusive, lane(0), ticket));
                        for copy in copies.iter() {
                            copy.store(version, Ordering::SeqCst);
                        }
                        order.release(all, lane(0), ticket, &mut Vec::new());
                    }
                })
            };
            let stamp = order.read_stamp(all);
            let ballots = copies.each_ref().map(|copy| copy.load(Ordering::SeqCst));
            if order.undisturbed(all, stamp) {
                UNDISTURBED.store(true, Ordering::Relaxed);
                assert_eq!(ballots[0], ballots[1], "an undisturbed read met a write");
            }
            writer.join().expect("no assertion failed");
        },
        SCHEDULES,
    );
    assert!(UNDISTURBED.load(Ordering::Relaxed));
}

fn members() -> Arc<Membership> {
    Arc::new(Membership::new(3, 2, Marks::new(3, 4, false)))
}

/// W4, W5: whatever lanes decide at the same time, T copies stay current, and every write that
/// was acknowledged is on all of them.
fn membership_keeps_threshold_copies_that_hold_every_write() {
    shuttle::check_random(
        || {
            let members = members();
            let acknowledged = Arc::new(Mutex::new(Vec::new()));
            let writers: Vec<_> = (0..3)
                .map(|id| {
                    let (members, acknowledged) = (members.clone(), acknowledged.clone());
                    thread::spawn(move || {
                        assert!(matches!(
                            members.intend(1),
                            Intent::Ready(_) | Intent::TooFew
                        ));
                        let mut holders = ReplicaSet::first(3);
                        holders.remove(ReplicaId::new(id));
                        if let Settled::Held { .. } = members.settle_for(1, holders) {
                            acknowledged.lock().expect("not poisoned").push(holders);
                        }
                    })
                })
                .collect();
            let repair_failed = members.mark_behind(1, ReplicaId::new(0));
            for writer in writers {
                writer.join().expect("no assertion failed");
            }
            let current = members.current(1);
            assert!(current.count() >= 2, "a last copy was taken away");
            for holders in acknowledged.lock().expect("not poisoned").iter() {
                assert!(
                    holders.contains_all(current),
                    "a current copy lacks a write"
                );
            }
            assert!(repair_failed.is_none() || !current.contains(ReplicaId::new(0)));
            assert_eq!(members.current(0), ReplicaSet::first(3));
        },
        SCHEDULES,
    );
}

/// A replica that is kicked at any moment lacks nothing that was acknowledged without it once it is
/// admitted again: it is behind there.
fn kicked_replica_comes_back_without_what_it_missed() {
    shuttle::check_random(
        || {
            let members = members();
            let acknowledged = Arc::new(Mutex::new(Vec::new()));
            let writers: Vec<_> = (0..2)
                .map(|extent| {
                    let (members, acknowledged) = (members.clone(), acknowledged.clone());
                    thread::spawn(move || {
                        for _ in 0..2 {
                            let Intent::Ready(targets) = members.intend(extent) else {
                                panic!("two others are current");
                            };
                            // Who is not up any more fails the operation.
                            let holders = targets.intersection(members.up());
                            if let Settled::Held { .. } = members.settle_for(extent, holders) {
                                let mut list = acknowledged.lock().expect("not poisoned");
                                list.push((extent, holders));
                            }
                        }
                    })
                })
                .collect();
            let first = ReplicaId::new(0);
            let counter = members.counter(first);
            assert!(members.kick(first).is_some());
            assert!(members.kick(first).is_none());
            assert_ne!(members.counter(first), counter);
            for writer in writers {
                writer.join().expect("no assertion failed");
            }
            members.admit(first);
            for &(extent, holders) in acknowledged.lock().expect("not poisoned").iter() {
                assert!(
                    holders.contains_all(members.current(extent)),
                    "a current copy lacks a write"
                );
            }
            assert_eq!(members.current(3), ReplicaSet::first(3));
        },
        SCHEDULES,
    );
}

/// R6: a durable bit is in the last image that was written, whoever sets and clears it meanwhile;
/// and whoever asked for a bit finds it durable, or cleared, when it is settled.
fn durable_marks_are_in_the_last_image() {
    static DURABLE: AtomicBool = AtomicBool::new(false);
    const ROUNDS: usize = 4;
    let bit = Bitmap::Dirty;
    shuttle::check_random(
        move || {
            let marks = Arc::new(Marks::new(1, 4, true));
            marks.set(bit, 2);
            let cleared = Arc::new(AtomicU64::new(0));
            let recorder = {
                let marks = marks.clone();
                thread::spawn(move || {
                    let mut last = false;
                    for _ in 0..ROUNDS {
                        let mut pages = Vec::new();
                        let number = marks.collect(&mut pages);
                        for name in pages {
                            let mut bits = [0; PAGE_WORDS];
                            marks.copy_page(name, &mut bits);
                            last = bits[0] & 4 != 0;
                            // It is on its way: what it lacks must not count as durable.
                            assert!(last || !marks.is_durable(bit, 2));
                            marks.made_durable(name, &bits);
                        }
                        marks.settle(number);
                    }
                    last
                })
            };
            let sweep = {
                let (marks, cleared) = (marks.clone(), cleared.clone());
                thread::spawn(move || {
                    cleared.store(1, Ordering::SeqCst);
                    marks.clear(bit, 2);
                })
            };
            let lane = {
                let (marks, cleared) = (marks.clone(), cleared.clone());
                thread::spawn(move || {
                    let number = marks.ask(bit, 2);
                    if number.is_none_or(|number| marks.is_settled(number)) {
                        let durable = marks.is_durable(bit, 2);
                        assert!(durable || cleared.load(Ordering::SeqCst) == 1);
                    }
                })
            };
            sweep.join().expect("no assertion failed");
            lane.join().expect("no assertion failed");
            let last = recorder.join().expect("no assertion failed");
            if marks.is_durable(bit, 2) {
                DURABLE.store(true, Ordering::Relaxed);
                assert!(last, "durable, and not in the last image");
            }
        },
        SCHEDULES,
    );
    assert!(DURABLE.load(Ordering::Relaxed));
}

/// F1, F2: one run at a time; every request ends with a run that began after it.
fn flush_gate_covers_every_request_by_a_later_run() {
    enum Told {
        Begin,
        Done(u64),
    }
    const LANES: usize = 3;
    shuttle::check_random(
        || {
            let gate = Arc::new(FlushGate::default());
            let running = Arc::new(AtomicU64::new(0));
            let begun = Arc::new(AtomicU64::new(0));
            let (senders, receivers) = mail::<Told>(LANES);
            let threads: Vec<_> = receivers
                .into_iter()
                .enumerate()
                .map(|(id, told)| {
                    let (gate, running, begun) = (gate.clone(), running.clone(), begun.clone());
                    let senders = senders.clone();
                    thread::spawn(move || {
                        let run = || {
                            assert_eq!(running.fetch_add(1, Ordering::SeqCst), 0, "two runs");
                            begun.fetch_add(1, Ordering::SeqCst);
                            running.fetch_sub(1, Ordering::SeqCst);
                            let finished = gate.finish(lane(id));
                            for to in finished.sharers.iter().filter(|&to| to != lane(id)) {
                                let to = &senders[usize::from(to.0)];
                                to.send(Told::Done(finished.run)).expect("it waits");
                            }
                            if let Some(to) = finished.next {
                                let to = &senders[usize::from(to.0)];
                                to.send(Told::Begin).expect("it waits");
                            }
                            finished.run
                        };
                        for _ in 0..2 {
                            let before = begun.load(Ordering::SeqCst);
                            let wanted = match gate.join(lane(id)) {
                                Join::Start(number) => {
                                    assert_eq!(run(), number);
                                    number
                                }
                                Join::Wait(number) => loop {
                                    let ended = match told.recv().expect("lanes live") {
                                        Told::Begin => run(),
                                        Told::Done(ended) => ended,
                                    };
                                    if ended == number {
                                        break number;
                                    }
                                },
                            };
                            assert!(wanted > before, "the run began before the request");
                        }
                    })
                })
                .collect();
            for thread in threads {
                thread.join().expect("no assertion failed");
            }
        },
        SCHEDULES,
    );
}

/// A test and its name.
type Test = (&'static str, fn());

fn main() {
    let tests: [Test; 6] = [
        (
            "order_gives_an_exclusive_range_to_one_lane",
            order_gives_an_exclusive_range_to_one_lane,
        ),
        (
            "read_stamp_never_calls_a_torn_read_undisturbed",
            read_stamp_never_calls_a_torn_read_undisturbed,
        ),
        (
            "membership_keeps_threshold_copies_that_hold_every_write",
            membership_keeps_threshold_copies_that_hold_every_write,
        ),
        (
            "kicked_replica_comes_back_without_what_it_missed",
            kicked_replica_comes_back_without_what_it_missed,
        ),
        (
            "durable_marks_are_in_the_last_image",
            durable_marks_are_in_the_last_image,
        ),
        (
            "flush_gate_covers_every_request_by_a_later_run",
            flush_gate_covers_every_request_by_a_later_run,
        ),
    ];
    for (name, test) in tests {
        test();
        println!("test {name} ... ok, {SCHEDULES} schedules");
    }
}
