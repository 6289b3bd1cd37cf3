// SPDX-License-Identifier: Apache-2.0
//! The daemon is killed with requests in flight, and the next one goes on: every request is
//! completed exactly once (rule I11). The front-end fails on a completion of what is not in
//! flight, and waits for what is.

use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use quorum_blk::front_end::{
    Completion, Framing, FrontEnd, Options, Request, Status, Token, features,
};
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserInflight;

use crate::common::{Disk, FaultyFile, Random, SECTOR, Setup, Signal, eventually};

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
    let log = disk.process().log();
    assert!(log.contains(AGAIN), "nothing was in flight at any kill");
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

/// A disk of which two replicas can be made to go wrong, the disk's majority with them.
struct Faulty {
    // Before the disk: what hangs fails when its server ends, and then the daemon can end too.
    files: Vec<FaultyFile>,
    disk: Disk,
}

impl Faulty {
    fn new() -> Self {
        let mut disk = Setup::new().start();
        disk.stop();
        let mut files = Vec::new();
        for (index, image) in disk.images.iter_mut().enumerate() {
            // As if they had never been served.
            let record = format!("{}.qrec", image.display());
            std::fs::remove_file(record).expect("a copy of the record");
            if index > 0 {
                let file = FaultyFile::new(image);
                image.clone_from(&file.path);
                files.push(file);
            }
        }
        disk.start_again();
        Self { files, disk }
    }

    fn tell(&self, command: &str) {
        for file in &self.files {
            file.tell(command);
        }
    }

    /// Kills the daemon, lets what it had under way land, and starts another one, which has the
    /// locks when all has landed.
    fn replace(&mut self) {
        self.disk.process().signal(Signal::Kill);
        self.tell("resume");
        self.disk.process().wait(LIMIT);
        self.disk.start_again();
    }
}

const HELD: usize = 6;

/// What the daemon says when a queue begins with requests of its predecessor.
const AGAIN: &str = "requests in flight are executed again";

/// Writes that cannot end, then reads that can, in one queue.
fn writes_then_reads(front_end: &mut FrontEnd) -> (Vec<Token>, Vec<Token>) {
    let queue = front_end.queue(0);
    let mut writes = Vec::new();
    for slot in 0..HELD {
        let data = content(slot, 1);
        let sector = (slot * SLOT_SECTORS) as u64;
        let write = Request::Write {
            sector,
            data: &data,
        };
        writes.push(queue.submit(&write).expect("room"));
    }
    let mut reads = Vec::new();
    for slot in 100..100 + HELD {
        let sector = (slot * SLOT_SECTORS) as u64;
        let read = Request::Read {
            sector,
            len: SECTOR,
        };
        reads.push(queue.submit(&read).expect("room"));
    }
    reads.push(queue.submit(&Request::GetId).expect("room"));
    (writes, reads)
}

fn all_done(front_end: &mut FrontEnd, tokens: Vec<Token>) {
    let queue = front_end.queue(0);
    queue.set_timeout(LIMIT);
    for token in tokens {
        let done = queue.wait(token).expect("an end");
        assert_eq!(done.status, Status::Ok);
    }
    assert_eq!(queue.in_flight(), 0);
}

fn assert_written(front_end: &mut FrontEnd) {
    for slot in 0..HELD {
        let mut back = vec![0; SLOT_SECTORS * SECTOR];
        let sector = (slot * SLOT_SECTORS) as u64;
        front_end.queue(0).read(sector, &mut back).expect("a read");
        assert!(back == content(slot, 1), "slot {slot}");
    }
}

/// The real test: without a record of what is in flight the used index would be taken for the
/// first request that is not complete.
#[test]
fn requests_completed_out_of_order_are_not_repeated_and_none_is_lost() {
    for (features, manners) in [
        (features::LINUX, Options::default()),
        (features::LINUX & !features::INDIRECT, Options::default()),
        (features::LINUX, Options::cloud_hypervisor()),
    ] {
        let mut site = Faulty::new();
        let options = Options {
            features,
            ..manners
        };
        let mut front_end = site.disk.connect(&options);
        site.tell("hang write");
        let (writes, reads) = writes_then_reads(&mut front_end);
        // Completed and published before what came first.
        all_done_but(&mut front_end, reads, HELD);
        let positions = front_end.queue(0).ring_mut();
        let (used, available) = (positions.used_index(), positions.avail_index());
        assert_eq!(available - used.expect("a ring"), 6);

        // Twice: the first successor gets no further either.
        site.replace();
        site.tell("hang write");
        front_end
            .reconnect(&site.disk.socket)
            .expect("it serves again");
        let repeated = |site: &mut Faulty| {
            let log = site.disk.process().log();
            let lines = log.lines().filter(|line| line.contains(AGAIN));
            lines.map(str::to_owned).collect::<Vec<_>>()
        };
        let begun = eventually(|| (repeated(&mut site).len() == 1).then_some(()));
        assert!(begun.is_some(), "{}", site.disk.process().log());
        assert_eq!(front_end.queue(0).in_flight(), HELD);
        // And the second is killed before anybody connects.
        site.replace();
        site.replace();
        front_end
            .reconnect(&site.disk.socket)
            .expect("it serves again");
        all_done(&mut front_end, writes);
        assert_written(&mut front_end);
        let lines = repeated(&mut site);
        assert_eq!(lines.len(), 2, "{lines:?}");
        assert!(
            lines.iter().all(|line| line.contains("marked=6")),
            "{lines:?}"
        );
        drop(front_end);
        site.disk.stop_and_compare();
    }
}

/// Waits for all of `tokens`, after which `left` others are in flight.
fn all_done_but(front_end: &mut FrontEnd, tokens: Vec<Token>, left: usize) {
    let queue = front_end.queue(0);
    for token in tokens {
        assert_eq!(queue.wait(token).expect("an end").status, Status::Ok);
    }
    assert_eq!(queue.in_flight(), left);
}

/// Rule Q3: what comes later in the ring is not shown before what comes first.
#[test]
fn front_end_that_tracks_nothing_sees_completions_in_ring_order() {
    let mut site = Faulty::new();
    let options = Options {
        inflight: false,
        ..Options::default()
    };
    let mut front_end = site.disk.connect(&options);
    site.tell("hang write");
    let (writes, reads) = writes_then_reads(&mut front_end);
    for file in &site.files {
        file.wait_until("held", HELD as u64);
    }
    front_end.queue(0).set_timeout(Duration::from_millis(300));
    front_end.queue(0).wait_any().expect_err("nothing is shown");
    assert_eq!(
        front_end.queue(0).ring_mut().used_index().expect("a ring"),
        0
    );
    site.replace();
    front_end
        .reconnect(&site.disk.socket)
        .expect("it serves again");
    all_done(&mut front_end, [writes, reads].concat());
    assert_written(&mut front_end);
    let log = site.disk.process().log();
    assert!(!log.contains(AGAIN));
    drop(front_end);
    site.disk.stop_and_compare();
}

#[test]
fn what_was_in_flight_on_another_disk_is_refused() {
    let mut ours = Setup::new().start();
    let mut other = Setup::new().start();
    let mut front_end = ours.connect(&Options::default());
    front_end.queue(0).flush().expect("a flush");
    front_end
        .reconnect(&other.socket)
        .expect_err("another disk");
    let told = eventually(|| {
        let log = other.process().log();
        log.contains("what was in flight on another disk")
            .then_some(())
    });
    assert!(told.is_some(), "{}", other.process().log());
    other.assert_serves();
    front_end.reconnect(&ours.socket).expect("its own disk");
    front_end.queue(0).flush().expect("a flush");
    drop(front_end);
    ours.stop_and_compare();
    other.stop_and_compare();
}

#[test]
fn impossible_region_stops_its_queue_alone() {
    let mut disk = Setup::new().start();
    let options = Options {
        queues: 2,
        ..Options::default()
    };
    let mut front_end = disk.connect(&options);
    front_end.queue(0).flush().expect("a flush");
    disk.end(Signal::Kill);
    disk.start_again();
    let (_, file) = front_end.inflight_mut().expect("it is tracked");
    // The mark of head 3 of queue 0.
    file.write_all_at(&[7], 16 + 3 * 16).expect("a memory file");
    front_end.reconnect(&disk.socket).expect("it serves again");
    let read = |front_end: &mut FrontEnd, queue| {
        let mut back = [0; SECTOR];
        front_end.queue(queue).read(0, &mut back)
    };
    read(&mut front_end, 1).expect("the other queue lives");
    front_end.queue(0).set_timeout(Duration::from_millis(200));
    read(&mut front_end, 0).expect_err("a queue that stopped");
    let log = disk.process().log();
    assert!(log.contains("the mark of head 3 is 7"), "{log}");
    // A driver that starts anew gets a new buffer.
    front_end.stop().expect("the rings stop");
    front_end.start().expect("the rings start");
    read(&mut front_end, 0).expect("the queue is back");
    drop(front_end);
    disk.stop_and_compare();
}

/// A queue that broke leaves marks behind. Its driver has forgotten them when it resets the device,
/// also where the front-end keeps the buffer.
#[test]
fn reset_takes_away_what_a_broken_queue_has_left_behind() {
    let mut disk = Setup::new().start();
    let mut front_end = disk.connect(&Options::default());
    front_end.queue(0).flush().expect("a flush");
    let queue = front_end.queue(0);
    queue.ring_mut().set_avail_index(4000).expect("a ring");
    queue.kick().expect("a kick");
    let stopped = eventually(|| {
        let log = disk.process().log();
        log.contains("the queue stops").then_some(())
    });
    stopped.expect("an impossible index");
    let (shape, file) = front_end.inflight_mut().expect("it is tracked");
    let (shape, file) = (*shape, file.try_clone().expect("a descriptor"));
    let mark_at = 16 + 3 * 16;
    file.write_all_at(&[1], mark_at).expect("a memory file");
    front_end.ask_replies(true);
    front_end.reset().expect("RESET_DEVICE is offered");
    front_end.ask_replies(false);
    let mut mark = [7];
    file.read_exact_at(&mut mark, mark_at)
        .expect("a memory file");
    assert_eq!(mark, [0]);
    // Fresh rings, and then the buffer of before.
    front_end.start().expect("the rings start");
    front_end.stop().expect("the rings stop");
    *front_end.inflight_mut().expect("it is tracked") = (shape, file);
    front_end.resume(0).expect("the rings start");
    let mut back = [0; SECTOR];
    front_end.queue(0).read(0, &mut back).expect("a read");
    drop(front_end);
    disk.stop_and_compare();
}

#[test]
fn impossible_buffers_end_the_connection_with_the_reason() {
    type Spoil = fn(&mut VhostUserInflight);
    let cases: [(&str, Spoil); 5] = [
        ("does not fit in its file", |told| told.mmap_size += 4096),
        ("does not begin at a page", |told| told.mmap_offset = 8),
        ("is too short", |told| told.mmap_size = 64),
        ("is not possible", |told| told.num_queues = 5000),
        ("was made for 1 of 256", |told| told.queue_size = 128),
    ];
    let mut disk = Setup::new().start();
    for (reason, spoil) in cases {
        let mut front_end = disk.connect(&Options::default());
        front_end.stop().expect("the ring stops");
        let (told, file) = front_end.inflight_mut().expect("it is tracked");
        let mut lie = *told;
        spoil(&mut lie);
        let file = file.as_raw_fd();
        // Whether the message is answered is a matter of time; the next one is not.
        let _ = front_end.send("SET_INFLIGHT_FD", |protocol| {
            protocol.set_inflight_fd(&lie, file)
        });
        front_end.config().expect_err("the connection has ended");
        let told = eventually(|| disk.process().log().contains(reason).then_some(()));
        assert!(told.is_some(), "{reason}: {}", disk.process().log());
    }
    disk.assert_serves();
    disk.stop_and_compare();
}
