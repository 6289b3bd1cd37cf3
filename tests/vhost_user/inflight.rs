// SPDX-License-Identifier: Apache-2.0
//! The daemon is killed with requests in flight, and the next one goes on: every request is
//! completed exactly once (rule I11). The front-end fails on a completion of what is not in
//! flight, and waits for what is.

use std::time::{Duration, Instant};

use quorum_blk::front_end::{Completion, Framing, FrontEnd, Options, Request, Status, Token};

use crate::common::{Disk, Random, SECTOR, Setup, Signal};

/// How long a restarted daemon may take for anything.
const LIMIT: Duration = Duration::from_secs(30);

/// Slots that are written as a whole, each with one request in flight at most.
const SLOTS: usize = 512;
const SLOT_SECTORS: usize = 8;

/// The work of one guest: writes to slots, reads of them, flushes.
struct Guest {
    random: Random,
    /// The version each slot holds: of the last write that was completed.
    versions: Vec<u64>,
    next_version: u64,
    in_flight: Vec<Work>,
    completed: u64,
}

struct Work {
    queue: usize,
    token: Token,
    kind: Kind,
}

#[derive(Clone, Copy)]
enum Kind {
    Write { slot: usize, version: u64 },
    Read { slot: usize },
    Flush,
}

fn content(slot: usize, version: u64) -> Vec<u8> {
    if version == 0 {
        return vec![0; SLOT_SECTORS * SECTOR];
    }
    Random::new(version << 10 | slot as u64).bytes(SLOT_SECTORS * SECTOR)
}

impl Guest {
    fn new(seed: u64) -> Self {
        Self {
            random: Random::new(seed),
            versions: vec![0; SLOTS],
            next_version: 1,
            in_flight: Vec::new(),
            completed: 0,
        }
    }

    /// One more request on `queue`.
    fn submit(&mut self, front_end: &mut FrontEnd, queue: usize) {
        let slot = self.random.below(SLOTS);
        let busy = self.in_flight.iter().any(|work| match work.kind {
            Kind::Write { slot: other, .. } | Kind::Read { slot: other } => other == slot,
            Kind::Flush => false,
        });
        let sector = (slot * SLOT_SECTORS) as u64;
        let pieces = if self.random.below(2) == 0 {
            1024
        } else {
            1 << 20
        };
        let queue_of = front_end.queue(queue);
        queue_of.set_framing(Framing {
            data_piece: pieces,
            ..Framing::default()
        });
        let (kind, token) = if busy || self.random.below(16) == 0 {
            (Kind::Flush, queue_of.submit(&Request::Flush))
        } else if self.random.below(3) == 0 {
            let len = SLOT_SECTORS * SECTOR;
            (
                Kind::Read { slot },
                queue_of.submit(&Request::Read { sector, len }),
            )
        } else {
            let version = self.next_version;
            self.next_version += 1;
            let data = content(slot, version);
            let write = Request::Write {
                sector,
                data: &data,
            };
            (Kind::Write { slot, version }, queue_of.submit(&write))
        };
        let token = token.expect("a queue with room");
        self.in_flight.push(Work { queue, token, kind });
    }

    fn take(&mut self, queue: usize, completion: &Completion) {
        let at = self
            .in_flight
            .iter()
            .position(|work| work.queue == queue && work.token == completion.token);
        let work = self.in_flight.swap_remove(at.expect("it is in flight"));
        assert_eq!(completion.status, Status::Ok);
        self.completed += 1;
        match work.kind {
            Kind::Write { slot, version } => self.versions[slot] = version,
            Kind::Read { slot } => {
                let expected = content(slot, self.versions[slot]);
                assert!(completion.data == expected, "slot {slot}");
            }
            Kind::Flush => {}
        }
    }

    /// Works at `depth` requests in flight on each of `queues` until `count` more are completed.
    fn work(&mut self, front_end: &mut FrontEnd, queues: usize, depth: usize, count: u64) {
        let until = self.completed + count;
        let deadline = Instant::now() + LIMIT;
        while self.completed < until {
            for queue in 0..queues {
                while self.in_flight.iter().filter(|w| w.queue == queue).count() < depth {
                    self.submit(front_end, queue);
                }
            }
            self.collect(front_end, queues);
            assert!(
                Instant::now() < deadline,
                "{} in flight",
                self.in_flight.len()
            );
        }
    }

    fn collect(&mut self, front_end: &mut FrontEnd, queues: usize) {
        for queue in 0..queues {
            while let Some(done) = front_end.queue(queue).poll().expect("heads in flight") {
                self.take(queue, &done);
            }
        }
    }

    /// Waits for the end of everything in flight.
    fn drain(&mut self, front_end: &mut FrontEnd, queues: usize) {
        let deadline = Instant::now() + LIMIT;
        while !self.in_flight.is_empty() {
            self.collect(front_end, queues);
            assert!(
                Instant::now() < deadline,
                "{} in flight",
                self.in_flight.len()
            );
        }
    }

    /// What the disk must hold in the end.
    fn image(&self, bytes: usize) -> Vec<u8> {
        let mut image = vec![0; bytes];
        for (slot, &version) in self.versions.iter().enumerate() {
            let at = slot * SLOT_SECTORS * SECTOR;
            image[at..at + SLOT_SECTORS * SECTOR].copy_from_slice(&content(slot, version));
        }
        image
    }
}

/// Kills the daemon, starts another and connects to it.
fn replace(disk: &mut Disk, front_end: &mut FrontEnd) {
    disk.end(Signal::Kill);
    disk.start_again();
    front_end.reconnect(&disk.socket).expect("it serves again");
}

fn storm(manners: Options, seed: u64, kills: usize) {
    const QUEUES: usize = 2;
    let mut disk = Setup::new().start();
    let options = Options {
        queues: 2,
        ..manners
    };
    let mut front_end = disk.connect(&options);
    let mut guest = Guest::new(seed);
    for _ in 0..kills {
        let count = guest.random.below(600) as u64;
        let depth = 1 + guest.random.below(48);
        guest.work(&mut front_end, QUEUES, depth, count);
        replace(&mut disk, &mut front_end);
    }
    guest.work(&mut front_end, QUEUES, 16, 200);
    guest.drain(&mut front_end, QUEUES);
    let positions = front_end.stop().expect("the rings stop");
    for (queue, position) in positions.into_iter().enumerate() {
        let available = front_end.queue(queue).ring_mut().avail_index();
        assert_eq!(position, u32::from(available), "queue {queue}");
    }
    let image = guest.image(8 << 20);
    disk.stop_and_expect(&image);
}

#[test]
fn killed_as_qemu_sees_it_completes_every_request_once() {
    storm(Options::default(), 1, 12);
}

#[test]
fn killed_as_cloud_hypervisor_sees_it_completes_every_request_once() {
    storm(Options::cloud_hypervisor(), 2, 12);
}
