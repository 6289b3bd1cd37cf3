// SPDX-License-Identifier: Apache-2.0
//! Replicas that hang, fail, lose what was not flushed, leave and come back, on a file that does
//! so on command (`tests/vm/faulty_file.py`). Needs root and FUSE; without, the tests say so and
//! end.
#![allow(
    clippy::unwrap_used,
    reason = "everything in this file is test code, helpers included"
)]

mod common;

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{FaultyFile, PATIENCE, SECTOR, Setup, Signal, eventually};
use quorum_blk::front_end::Options;
use quorum_blk::quorum::{BufferId, Buffers, OpId, Operation, OperationKind, Outcome, Purpose};
use quorum_blk::replica::{
    Cache, Executor, ExecutorConfig, Fingerprint, Presence, RawOptions, ReopenError, Replica,
    open_one_beside, open_set,
};
use quorum_blk::units::{ReplicaId, SectorRange};

const SECTORS: u64 = 2048;
const IMAGE_BYTES: usize = 1 << 20;
const DONE: Outcome = Outcome::Done;
const GONE: Outcome = Outcome::Failed {
    errno: libc::ENODEV,
};
const EIO: Outcome = Outcome::Failed { errno: libc::EIO };

/// A healthy replica in slot 0 and a faulty one in slot 1, both full of 1s, and an executor.
struct Pair {
    executor: Executor,
    ended: Vec<(OpId, Outcome)>,
    faulty: FaultyFile,
    options: RawOptions,
    folder: tempfile::TempDir,
}

fn options(name: &str, path: &Path, cache: Cache) -> RawOptions {
    RawOptions {
        cache,
        ..RawOptions::new(name, path)
    }
}

fn faulty_file(folder: &Path, start: fn(&Path) -> FaultyFile) -> FaultyFile {
    let image = folder.join("b");
    fs::write(&image, vec![1; IMAGE_BYTES]).unwrap();
    start(&image)
}

impl Pair {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let healthy = folder.path().join("a");
        fs::write(&healthy, vec![1; IMAGE_BYTES]).unwrap();
        let faulty = faulty_file(folder.path(), FaultyFile::new);
        let set = [
            options("a", &healthy, Cache::Buffered),
            options("b", &faulty.path, Cache::Direct),
        ];
        let replicas: Vec<_> = open_set(&set).unwrap().into_iter().map(Some).collect();
        let config = ExecutorConfig {
            pool_budget_bytes: 4 << 20,
            reserve_bytes: 0,
            ring_entries: 64,
        };
        let [_, options] = set;
        Self {
            executor: Executor::new(&replicas, config).unwrap(),
            ended: Vec::new(),
            faulty,
            options,
            folder,
        }
    }

    fn buffer(&mut self, byte: u8) -> BufferId {
        let pool = self.executor.pool_mut();
        let buffer = pool.take(4096, Purpose::Guest).unwrap();
        pool.bytes_mut(buffer).fill(byte);
        buffer
    }

    fn start(&mut self, op: u64, replica: ReplicaId, kind: OperationKind) {
        let op = OpId(op);
        self.executor.start(&Operation { op, replica, kind });
        self.executor.submit().unwrap();
    }

    /// Reaps until `count` operations have ended, and returns what became of them by number.
    fn reap(&mut self, count: usize) -> Vec<(u64, Outcome)> {
        let deadline = Instant::now() + PATIENCE;
        while self.ended.len() < count {
            assert!(Instant::now() < deadline, "{:?}", self.ended);
            self.executor.submit().unwrap();
            self.executor.reap(&mut self.ended).unwrap();
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(self.ended.len(), count);
        let mut ended: Vec<(u64, Outcome)> =
            self.ended.drain(..).map(|(op, end)| (op.0, end)).collect();
        ended.sort_unstable_by_key(|(op, _)| *op);
        ended
    }

    fn run(&mut self, kind: OperationKind) -> Outcome {
        self.start(99, faulty_slot(), kind);
        self.reap(1)[0].1
    }

    /// What the faulty replica has at a sector, 4096 bytes that are all the same.
    fn read(&mut self, sector: u64) -> u8 {
        let buffer = self.buffer(0);
        assert_eq!(self.run(read(sector, buffer)), DONE);
        let bytes = self.executor.pool().bytes(buffer);
        let byte = bytes[0];
        assert!(bytes[..4096].iter().all(|&other| other == byte));
        self.executor.pool_mut().give(buffer);
        byte
    }

    fn write(&mut self, sector: u64, byte: u8) -> Outcome {
        let buffer = self.buffer(byte);
        let outcome = self.run(write(sector, buffer));
        self.executor.pool_mut().give(buffer);
        outcome
    }

    fn reopen(&self) -> Result<Arc<Replica>, ReopenError> {
        open_one_beside(&self.options, &[], SECTORS, 512).map(|(replica, _)| replica)
    }

    fn image(&self, sector: usize) -> u8 {
        fs::read(&self.faulty.image).unwrap()[sector * 512]
    }
}

fn healthy_slot() -> ReplicaId {
    ReplicaId::new(0)
}

fn faulty_slot() -> ReplicaId {
    ReplicaId::new(1)
}

fn read(sector: u64, buffer: BufferId) -> OperationKind {
    OperationKind::Read {
        range: SectorRange::new(sector, 8).unwrap(),
        buffer,
        skip_bytes: 0,
    }
}

fn write(sector: u64, buffer: BufferId) -> OperationKind {
    OperationKind::Write {
        range: SectorRange::new(sector, 8).unwrap(),
        buffer,
        skip_bytes: 0,
    }
}

#[test]
fn detach_waits_for_what_hangs_and_keeps_the_locks_until_then() {
    let mut pair = Pair::new();
    pair.faulty.tell("hang");
    let (data, room) = (pair.buffer(7), pair.buffer(0));
    pair.start(1, faulty_slot(), write(16, data));
    pair.start(2, faulty_slot(), read(0, room));
    pair.start(4, healthy_slot(), write(16, data));
    assert_eq!(pair.reap(1), [(4, DONE)]);
    pair.faulty.wait_until("held", 2);
    // The kernel lets it wait for the write, so the file system need not see it.
    pair.start(3, faulty_slot(), OperationKind::Flush);
    pair.executor.submit().unwrap();

    pair.executor.detach(faulty_slot()).unwrap();
    assert!(!pair.executor.is_detached(faulty_slot()));
    // Nothing begins any more, and that shows without waiting.
    pair.start(5, faulty_slot(), OperationKind::Flush);
    assert_eq!(pair.executor.wait_limit().unwrap(), Some(Duration::ZERO));
    assert_eq!(pair.reap(1), [(5, GONE)]);
    assert_eq!(pair.executor.in_flight_on(faulty_slot()), 3);
    // The owner of the buffers gives them up; the kernel still has them.
    pair.executor.pool_mut().give(data);
    pair.executor.pool_mut().give(room);
    assert_eq!(pair.executor.pool().busy_buffers(), 2);
    // Rule K2: a late write cannot overtake a new owner, for there is none.
    let error = pair.reopen().unwrap_err();
    assert!(matches!(&error, ReopenError::Open(error) if error.is_in_use()));
    assert_eq!(pair.image(16), 1);

    pair.faulty.tell("resume");
    assert_eq!(pair.reap(3), [(1, DONE), (2, DONE), (3, DONE)]);
    assert!(pair.executor.is_detached(faulty_slot()));
    assert_eq!(pair.executor.in_flight(), 0);
    assert_eq!(pair.executor.pool().busy_buffers(), 0);
    assert_eq!(pair.image(16), 7);
    // Nobody has it any more: it was closed with the last operation.
    let again = pair.reopen().unwrap();
    pair.executor.attach(faulty_slot(), again).unwrap();
    assert_eq!(pair.read(16), 7);
}

#[test]
fn many_operations_that_hang_do_not_hold_up_the_other_replica() {
    let mut pair = Pair::new();
    pair.faulty.tell("hang");
    // Each keeps a thread of the kernel waiting, and it has eight by default on two processors.
    for op in 0..60 {
        pair.start(op, faulty_slot(), OperationKind::Flush);
    }
    pair.start(100, healthy_slot(), OperationKind::Flush);
    let range = SectorRange::new(0, 8).unwrap();
    let zeroes = OperationKind::WriteZeroes { range, unmap: true };
    pair.start(101, healthy_slot(), zeroes);
    assert_eq!(pair.reap(2), [(100, DONE), (101, DONE)]);
    assert_eq!(pair.executor.in_flight_on(faulty_slot()), 60);
    pair.faulty.tell("resume");
    assert!(pair.reap(60).iter().all(|(_, end)| *end == DONE));
}

#[test]
fn a_replica_whose_server_died_is_gone_and_lets_go() {
    let mut pair = Pair::new();
    let replica = pair.executor.replicas().nth(1).unwrap().cloned().unwrap();
    assert_eq!(replica.is_still_there().unwrap(), Presence::There);
    pair.faulty.tell("hang");
    let room = pair.buffer(0);
    pair.start(1, faulty_slot(), read(0, room));
    pair.faulty.wait_until("held", 1);
    pair.executor.detach(faulty_slot()).unwrap();
    pair.faulty.kill();
    let ended = pair.reap(1);
    assert!(
        matches!(ended[..], [(1, Outcome::Failed { .. })]),
        "{ended:?}"
    );
    assert!(pair.executor.is_detached(faulty_slot()));
    assert_eq!(replica.is_still_there().unwrap(), Presence::Gone);
    drop(replica);
    assert!(pair.reopen().is_err());
}

#[test]
fn errors_on_command_become_outcomes() {
    let mut pair = Pair::new();
    pair.faulty.tell("eio read on 64 8");
    let buffer = pair.buffer(0);
    assert_eq!(pair.run(read(64, buffer)), EIO);
    assert_eq!(pair.run(read(72, buffer)), DONE);
    pair.faulty.tell("eio read off");
    assert_eq!(pair.run(read(64, buffer)), DONE);
    pair.executor.pool_mut().give(buffer);

    pair.faulty.tell("enospc on");
    let errno = libc::ENOSPC;
    assert_eq!(pair.write(64, 5), Outcome::Failed { errno });
    pair.faulty.tell("enospc off");
    assert_eq!(pair.write(64, 5), DONE);
    assert_eq!(pair.read(64), 5);

    pair.faulty.tell("eio fsync on");
    assert_eq!(pair.run(OperationKind::Flush), EIO);
    pair.faulty.tell("eio fsync off");
    assert_eq!(pair.run(OperationKind::Flush), DONE);
}

#[test]
fn a_delay_is_shared_by_what_waits_side_by_side() {
    let mut pair = Pair::new();
    pair.faulty.tell("delay 0.3 read");
    let begin = Instant::now();
    for op in 0..8 {
        let buffer = pair.buffer(0);
        pair.start(op, faulty_slot(), read(op * 8, buffer));
    }
    pair.reap(8);
    let taken = begin.elapsed();
    assert!(taken >= Duration::from_millis(300), "{taken:?}");
    assert!(taken < Duration::from_millis(1500), "{taken:?}");
}

#[test]
fn power_loss_takes_what_was_not_flushed_and_nothing_else() {
    let mut pair = Pair::new();
    pair.faulty.tell("buffer on");
    assert_eq!(pair.write(0, 2), DONE);
    assert_eq!(pair.run(OperationKind::Flush), DONE);
    assert_eq!(pair.write(0, 3), DONE);
    let range = SectorRange::new(8, 8).unwrap();
    let zeroes = OperationKind::WriteZeroes { range, unmap: true };
    assert_eq!(pair.run(zeroes), DONE);
    assert_eq!((pair.read(0), pair.read(8)), (3, 0));
    assert_eq!((pair.image(0), pair.image(8)), (2, 1));
    assert_eq!(pair.faulty.ask("drop"), 16);
    assert_eq!((pair.read(0), pair.read(8)), (2, 1));

    for sector in (0..SECTORS).step_by(8) {
        assert_eq!(pair.write(sector, 4), DONE);
    }
    let lost = pair.faulty.ask("drop 1");
    let kept = fs::read(&pair.faulty.image).unwrap();
    let kept = kept.chunks(512).filter(|sector| sector[0] == 4).count();
    assert_eq!(u64::try_from(kept).unwrap(), SECTORS - lost);
    assert!((SECTORS / 3..SECTORS * 2 / 3).contains(&lost), "{lost}");
}

#[test]
fn opening_drops_pages_that_are_not_what_the_medium_has() {
    let folder = tempfile::tempdir().unwrap();
    let faulty = faulty_file(folder.path(), FaultyFile::cached);
    assert!(
        fs::read(&faulty.path)
            .unwrap()
            .iter()
            .all(|&byte| byte == 1)
    );
    // Behind the back of the page cache, as a medium goes bad.
    fs::write(&faulty.image, vec![2; IMAGE_BYTES]).unwrap();
    assert_eq!(
        fs::read(&faulty.path).unwrap()[0],
        1,
        "the cache still has it"
    );
    let options = options("b", &faulty.path, Cache::Buffered);
    let replica = open_set(std::slice::from_ref(&options)).unwrap().remove(0);
    // Rule F4.
    assert!(
        fs::read(&faulty.path)
            .unwrap()
            .iter()
            .all(|&byte| byte == 2)
    );
    drop(replica);

    fs::write(&faulty.image, vec![3; IMAGE_BYTES]).unwrap();
    assert_eq!(fs::read(&faulty.path).unwrap()[0], 2);
    let (_replica, _) = open_one_beside(&options, &[], SECTORS, 512).unwrap();
    assert_eq!(fs::read(&faulty.path).unwrap()[0], 3);
}

#[test]
fn a_replica_changed_while_it_was_away_shows_when_it_is_reopened() {
    let mut pair = Pair::new();
    for changed in [false, true] {
        assert_eq!(pair.write(0, 9), DONE);
        let replica = pair.executor.replicas().nth(1).unwrap().cloned().unwrap();
        pair.executor.detach(faulty_slot()).unwrap();
        assert!(pair.executor.is_detached(faulty_slot()));
        let left = replica.durable_fingerprint().unwrap();
        drop(replica);
        std::thread::sleep(Duration::from_millis(20));
        if changed {
            fs::write(&pair.faulty.image, vec![1; IMAGE_BYTES]).unwrap();
        }
        let again = pair.reopen().unwrap();
        assert_eq!(again.found().is_unchanged_since(&left), !changed);
        let by_path = Fingerprint::of_path(&pair.options.path).unwrap();
        assert_eq!(by_path.is_unchanged_since(&left), !changed);
        pair.executor.attach(faulty_slot(), again).unwrap();
        assert_eq!(pair.read(0), if changed { 1 } else { 9 });
    }
    assert!(pair.folder.path().exists());
}

#[test]
fn a_killed_daemon_keeps_its_locks_until_its_last_write_has_landed() {
    let mut disk = Setup::new().start();
    disk.stop();
    let faulty = FaultyFile::new(&disk.images[2]);
    disk.images[2].clone_from(&faulty.path);
    disk.start_again();
    let mut front_end = disk.connect(&Options::default());
    faulty.tell("hang write");
    let data = vec![0x77; 8 * SECTOR];
    front_end.queue(0).write_data(16, &data).unwrap();
    faulty.wait_until("held", 1);
    disk.process().signal(Signal::Kill);
    drop(front_end);

    // Rule K2: while the write can still come, nobody else gets the replica.
    let options = options("c", &faulty.path, Cache::Buffered);
    let open = || open_set(std::slice::from_ref(&options));
    for _ in 0..20 {
        std::thread::sleep(Duration::from_millis(20));
        assert!(open().is_err_and(|error| error.is_in_use()));
    }
    assert!(disk.sectors_of(0, 16, 8) == data);
    let image = || fs::read(&faulty.image).unwrap()[16 * SECTOR..24 * SECTOR].to_vec();
    assert_eq!(image(), vec![0; 8 * SECTOR]);
    faulty.tell("resume");
    assert!(eventually(|| open().ok()).is_some());
    assert_eq!(image(), data);
}
