// SPDX-License-Identifier: Apache-2.0
//! The executor on real files.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::*;
use crate::quorum::{Buffers, OperationKind, Purpose};
use crate::replica::flight::ZeroMethods;
use crate::replica::{Cache, RawOptions, open_set};
use crate::units::{ReplicaId, SectorRange};

const IMAGE_BYTES: usize = 1 << 20;

fn options(directory: &Path, name: &str, cache: Cache) -> RawOptions {
    let path = directory.join(name);
    fs::write(&path, pattern(IMAGE_BYTES, 1)).unwrap();
    RawOptions {
        cache,
        ..RawOptions::new(name, path)
    }
}

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..=250u8)
        .map(|byte| byte ^ seed)
        .cycle()
        .take(len)
        .collect()
}

fn executor(options: &[RawOptions]) -> Executor {
    let config = ExecutorConfig {
        pool_budget_bytes: 4 << 20,
        reserve_bytes: 0,
        ring_entries: 8,
    };
    let replicas: Vec<_> = open_set(options).unwrap().into_iter().map(Some).collect();
    Executor::new(&replicas, config).unwrap()
}

fn range(start: u64, count: u32) -> SectorRange {
    SectorRange::new(start, count).unwrap()
}

fn operation(op: u64, replica: usize, kind: OperationKind) -> Operation {
    Operation {
        op: OpId(op),
        replica: ReplicaId::new(replica),
        kind,
    }
}

/// Runs operations until all have ended, sleeping on the wake descriptor as a worker does.
fn run(executor: &mut Executor, operations: &[Operation]) -> Vec<Outcome> {
    // By edges: nobody reads the descriptor.
    let epoll = Epoll::new().unwrap();
    let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, 0);
    let wake = executor.wake_fd().as_raw_fd();
    epoll.ctl(ControlOperation::Add, wake, event).unwrap();
    for operation in operations {
        executor.start(operation);
    }
    let mut ended = Vec::new();
    let start = Instant::now();
    while ended.len() < operations.len() {
        assert!(start.elapsed() < Duration::from_secs(20), "{executor:?}");
        executor.submit().unwrap();
        executor.reap(&mut ended).unwrap();
        if ended.len() == operations.len() {
            break;
        }
        let limit = executor.wait_limit().unwrap();
        let timeout = limit.map_or(10_000, |limit| i32::try_from(limit.as_millis()).unwrap());
        let mut events = [EpollEvent::default()];
        match epoll.wait(timeout, &mut events) {
            Ok(woken) => assert!(woken == 1 || limit.is_some(), "a wake-up was lost"),
            // The ring interrupts its thread when it needs another kernel thread.
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::Interrupted),
        }
    }
    assert_eq!(executor.in_flight(), 0);
    operations
        .iter()
        .map(|operation| {
            let mut mine = ended.iter().filter(|(op, _)| *op == operation.op);
            let outcome = mine.next().expect("every operation ends").1;
            assert_eq!(mine.next(), None, "{operation:?} ended twice");
            outcome
        })
        .collect()
}

fn run_one(executor: &mut Executor, kind: OperationKind) -> Outcome {
    run(executor, &[operation(1, 0, kind)])[0]
}

fn taken(executor: &mut Executor, content: &[u8]) -> BufferId {
    let pool = executor.pool_mut();
    let buffer = pool.take(content.len(), Purpose::Guest).unwrap();
    pool.bytes_mut(buffer)[..content.len()].copy_from_slice(content);
    buffer
}

fn write_zeroes(start: u64, count: u32, unmap: bool) -> OperationKind {
    let range = range(start, count);
    OperationKind::WriteZeroes { range, unmap }
}

#[test]
fn write_then_read_returns_the_bytes_on_every_kind_of_replica() {
    let directory = tempfile::tempdir().unwrap();
    let set = [
        options(directory.path(), "a", Cache::Direct),
        options(directory.path(), "b", Cache::Buffered),
    ];
    let mut executor = executor(&set);
    for (op, sectors) in [(1, 8u32), (3, 64), (5, 512)] {
        let content = pattern(sectors as usize * 512, u8::try_from(op).unwrap());
        let data = taken(&mut executor, &content);
        let whole = range(64, sectors);
        let write = |op, replica| {
            let kind = OperationKind::Write {
                range: whole,
                buffer: data,
                skip_bytes: 0,
            };
            operation(op, replica, kind)
        };
        // One buffer, written to both at the same time.
        let outcomes = run(&mut executor, &[write(op, 0), write(op + 1, 1)]);
        assert_eq!(outcomes, [Outcome::Done; 2]);
        executor.pool_mut().give(data);
        for replica in 0..2 {
            let buffer = taken(&mut executor, &vec![0xee; content.len()]);
            let kind = OperationKind::Read {
                range: whole,
                buffer,
                skip_bytes: 0,
            };
            let outcome = run(&mut executor, &[operation(op, replica, kind)]);
            assert_eq!(outcome, [Outcome::Done]);
            assert!(executor.pool().bytes(buffer)[..content.len()] == content);
            executor.pool_mut().give(buffer);
        }
        assert_eq!(run_one(&mut executor, OperationKind::Flush), Outcome::Done);
        for one in &set {
            assert!(fs::read(&one.path).unwrap()[64 * 512..][..content.len()] == content);
        }
    }
    assert_eq!(executor.pool().available_bytes(), 4 << 20);
}

#[test]
fn write_with_skip_takes_the_bytes_from_there() {
    let directory = tempfile::tempdir().unwrap();
    let set = [options(directory.path(), "a", Cache::Direct)];
    let mut executor = executor(&set);
    let content = pattern(16384, 9);
    let buffer = taken(&mut executor, &content);
    let kind = OperationKind::Write {
        range: range(8, 8),
        buffer,
        skip_bytes: 8192,
    };
    assert_eq!(run_one(&mut executor, kind), Outcome::Done);
    let mut expected = pattern(IMAGE_BYTES, 1);
    expected[4096..8192].copy_from_slice(&content[8192..12288]);
    assert!(fs::read(&set[0].path).unwrap() == expected);
}

#[test]
fn more_operations_than_ring_entries_all_end() {
    let directory = tempfile::tempdir().unwrap();
    let set = [options(directory.path(), "a", Cache::Direct)];
    let mut executor = executor(&set);
    let operations: Vec<Operation> = (0..200)
        .map(|op| {
            let buffer = taken(&mut executor, &[0; 4096]);
            let range = range(op * 8, 8);
            operation(
                op,
                0,
                OperationKind::Read {
                    range,
                    buffer,
                    skip_bytes: 0,
                },
            )
        })
        .collect();
    let outcomes = run(&mut executor, &operations);
    assert!(outcomes.iter().all(|outcome| *outcome == Outcome::Done));
    let content = pattern(IMAGE_BYTES, 1);
    for one in operations {
        let OperationKind::Read { range, buffer, .. } = one.kind else {
            unreachable!("only reads were started")
        };
        let at = usize::try_from(range.offset_bytes()).unwrap();
        assert!(executor.pool().bytes(buffer) == &content[at..at + 4096]);
    }
}

fn zeroing(directory: &Path, cache: Cache, unmap: bool) -> Executor {
    let set = [options(directory, "a", cache)];
    let mut executor = executor(&set);
    let outcome = run_one(&mut executor, write_zeroes(8, 1024, unmap));
    assert_eq!(outcome, Outcome::Done);
    let mut expected = pattern(IMAGE_BYTES, 1);
    expected[4096..][..1024 * 512].fill(0);
    assert!(fs::read(&set[0].path).unwrap() == expected);
    executor
}

#[test]
fn write_zeroes_reads_back_zero_and_touches_nothing_else() {
    for cache in [Cache::Direct, Cache::Buffered] {
        for unmap in [false, true] {
            let directory = tempfile::tempdir().unwrap();
            zeroing(directory.path(), cache, unmap);
        }
    }
}

#[test]
fn write_zeroes_where_it_is_not_supported_writes_zeroes() {
    // tmpfs punches holes but has no ZERO_RANGE.
    let directory = tempfile::tempdir_in("/dev/shm").unwrap();
    let executor = zeroing(directory.path(), Cache::Buffered, false);
    assert!(!executor.slots[0].zero_methods.zero_range);
    assert!(executor.slots[0].zero_methods.punch);
}

#[test]
fn write_zeroes_by_writing_more_than_the_zeroes_there_are() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a");
    fs::write(&path, vec![7; 3 << 20]).unwrap();
    let mut executor = executor(&[RawOptions::new("a", &path)]);
    executor.slots[0].zero_methods = ZeroMethods {
        punch: false,
        zero_range: false,
    };
    let sectors = 5 << 10; // 2.5 MiB
    let outcome = run_one(&mut executor, write_zeroes(8, sectors, true));
    assert_eq!(outcome, Outcome::Done);
    let content = fs::read(&path).unwrap();
    let end = 4096 + sectors as usize * 512;
    assert!(content[..4096].iter().all(|&byte| byte == 7));
    assert!(content[4096..end].iter().all(|&byte| byte == 0));
    assert!(content[end..].iter().all(|&byte| byte == 7));
}

#[test]
fn read_past_the_end_of_a_cut_file_is_short() {
    for cache in [Cache::Direct, Cache::Buffered] {
        let directory = tempfile::tempdir().unwrap();
        let set = [options(directory.path(), "a", cache)];
        let mut executor = executor(&set);
        let file = File::options().write(true).open(&set[0].path).unwrap();
        for (len, got) in [(8192, 4096), (6000, 1904), (4096, 0), (0, 0)] {
            file.set_len(len).unwrap();
            let buffer = taken(&mut executor, &[0; 8192]);
            let kind = OperationKind::Read {
                range: range(8, 16),
                buffer,
                skip_bytes: 0,
            };
            let expected = 8192;
            let outcome = run_one(&mut executor, kind);
            assert_eq!(outcome, Outcome::Short { expected, got }, "{cache:?} {len}");
            executor.pool_mut().give(buffer);
        }
    }
}

#[test]
fn write_and_zero_after_the_end_of_a_cut_file_bring_it_back() {
    let directory = tempfile::tempdir().unwrap();
    let set = [options(directory.path(), "a", Cache::Direct)];
    let mut executor = executor(&set);
    let file = File::options().write(true).open(&set[0].path).unwrap();
    file.set_len(4096).unwrap();
    let outcome = run_one(&mut executor, write_zeroes(16, 8, false));
    assert_eq!(outcome, Outcome::Done);
    assert_eq!(file.metadata().unwrap().len(), 12_288);
}

#[test]
fn write_to_a_read_only_replica_fails_and_the_executor_goes_on() {
    let directory = tempfile::tempdir().unwrap();
    let set = [RawOptions {
        read_only: true,
        ..options(directory.path(), "a", Cache::Direct)
    }];
    let mut executor = executor(&set);
    let buffer = taken(&mut executor, &[0; 4096]);
    let range = range(0, 8);
    let kind = OperationKind::Write {
        range,
        buffer,
        skip_bytes: 0,
    };
    let errno = libc::EBADF;
    assert_eq!(run_one(&mut executor, kind), Outcome::Failed { errno });
    let kind = OperationKind::Read {
        range,
        buffer,
        skip_bytes: 0,
    };
    assert_eq!(run_one(&mut executor, kind), Outcome::Done);
    assert!(executor.pool().bytes(buffer) == &pattern(IMAGE_BYTES, 1)[..4096]);
}

/// A mounted file system that goes away with the value.
struct Mount(PathBuf);

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn write_to_a_full_file_system_fails_with_enospc() {
    let directory = tempfile::tempdir().unwrap();
    let status = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=64k", "none"])
        .arg(directory.path())
        .output();
    if !status.is_ok_and(|output| output.status.success()) {
        eprintln!("not run: a tmpfs cannot be mounted here");
        return;
    }
    let mount = Mount(directory.path().to_path_buf());
    let path = mount.0.join("a");
    File::create(&path).unwrap().set_len(1 << 20).unwrap();
    let options = RawOptions {
        cache: Cache::Buffered,
        ..RawOptions::new("a", &path)
    };
    let mut executor = executor(&[options]);
    let buffer = taken(&mut executor, &pattern(128 << 10, 3));
    let kind = OperationKind::Write {
        range: range(0, 256),
        buffer,
        skip_bytes: 0,
    };
    let errno = libc::ENOSPC;
    assert_eq!(run_one(&mut executor, kind), Outcome::Failed { errno });
    assert_eq!(executor.pool().busy_buffers(), 0);
}

#[test]
fn drop_lets_go_of_the_locks_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let set = [options(directory.path(), "a", Cache::Direct)];
    for _ in 0..20 {
        let mut executor = executor(&set);
        let outcome = run_one(&mut executor, write_zeroes(8, 8, false));
        assert_eq!(outcome, Outcome::Done);
        let outcome = run_one(&mut executor, OperationKind::Flush);
        assert_eq!(outcome, Outcome::Done);
    }
}

#[test]
fn give_before_the_completion_keeps_the_memory_from_others() {
    let directory = tempfile::tempdir().unwrap();
    let set = [options(directory.path(), "a", Cache::Direct)];
    let mut executor = executor(&set);
    let buffer = taken(&mut executor, &[0; 4096]);
    let range = range(0, 8);
    let read = operation(
        1,
        0,
        OperationKind::Read {
            range,
            buffer,
            skip_bytes: 0,
        },
    );
    executor.start(&read);
    executor.pool_mut().give(buffer);
    let other = taken(&mut executor, &[5; 4096]);
    assert_ne!(other, buffer);
    executor.submit().unwrap();
    let mut ended = Vec::new();
    while ended.is_empty() {
        executor.reap(&mut ended).unwrap();
    }
    assert_eq!(ended, [(OpId(1), Outcome::Done)]);
    assert!(executor.pool().bytes(other).iter().all(|&byte| byte == 5));
    assert_eq!(executor.pool().available_bytes(), (4 << 20) - 4096);
}

#[test]
fn an_unregistered_pool_works_the_same() {
    let directory = tempfile::tempdir().unwrap();
    let set = [options(directory.path(), "a", Cache::Direct)];
    let mut executor = executor(&set);
    executor.registered = false;
    let content = pattern(4096, 77);
    let buffer = taken(&mut executor, &content);
    let range = range(8, 8);
    let kind = OperationKind::Write {
        range,
        buffer,
        skip_bytes: 0,
    };
    assert_eq!(run_one(&mut executor, kind), Outcome::Done);
    executor.pool_mut().bytes_mut(buffer).fill(0);
    let kind = OperationKind::Read {
        range,
        buffer,
        skip_bytes: 0,
    };
    assert_eq!(run_one(&mut executor, kind), Outcome::Done);
    assert!(executor.pool().bytes(buffer) == content);
}

/// Two replicas of which the second is missing.
fn executor_with_a_gap(directory: &Path) -> (Executor, RawOptions) {
    let set = [
        options(directory, "a", Cache::Direct),
        options(directory, "b", Cache::Direct),
    ];
    let a = open_set(&set[..1]).unwrap().remove(0);
    let config = ExecutorConfig {
        pool_budget_bytes: 4 << 20,
        reserve_bytes: 0,
        ring_entries: 8,
    };
    let [_, b] = set;
    (Executor::new(&[Some(a), None], config).unwrap(), b)
}

fn reopen(options: &RawOptions) -> Arc<Replica> {
    open_set(std::slice::from_ref(options)).unwrap().remove(0)
}

#[test]
fn start_on_a_missing_replica_ends_at_once_and_leaves_the_buffer_alone() {
    let directory = tempfile::tempdir().unwrap();
    let (mut executor, _) = executor_with_a_gap(directory.path());
    let gap = ReplicaId::new(1);
    assert!(executor.is_detached(gap) && !executor.is_detached(ReplicaId::new(0)));
    let buffer = taken(&mut executor, &[0; 4096]);
    let range = range(0, 8);
    let read = OperationKind::Read {
        range,
        buffer,
        skip_bytes: 0,
    };
    // The same buffer twice: neither uses it.
    executor.start(&operation(1, 1, read));
    executor.start(&operation(2, 1, read));
    assert_eq!((executor.in_flight(), executor.in_flight_on(gap)), (2, 0));
    assert_eq!(executor.wait_limit().unwrap(), Some(Duration::ZERO));
    let mut ended = Vec::new();
    executor.reap(&mut ended).unwrap();
    assert_eq!(ended, [(OpId(1), NO_REPLICA), (OpId(2), NO_REPLICA)]);
    assert_eq!(executor.in_flight(), 0);
    assert_eq!(executor.ring_enters(), 0);
    assert_eq!(executor.wait_limit().unwrap(), None);
    assert_eq!(
        run(&mut executor, &[operation(3, 0, read)]),
        [Outcome::Done]
    );
}

#[test]
fn attach_fills_a_gap_and_detach_makes_one_as_often_as_asked() {
    let directory = tempfile::tempdir().unwrap();
    let (mut executor, b) = executor_with_a_gap(directory.path());
    let gap = ReplicaId::new(1);
    for round in 0..20 {
        let replica = reopen(&b);
        executor.attach(gap, Arc::clone(&replica)).unwrap();
        assert_eq!(executor.replicas().flatten().count(), 2);
        let content = pattern(4096, round);
        let buffer = taken(&mut executor, &content);
        let range = range(8, 8);
        let write = OperationKind::Write {
            range,
            buffer,
            skip_bytes: 0,
        };
        let outcomes = run(
            &mut executor,
            &[operation(1, 0, write), operation(2, 1, write)],
        );
        assert_eq!(outcomes, [Outcome::Done; 2]);
        executor.pool_mut().give(buffer);
        assert!(fs::read(&b.path).unwrap()[4096..8192] == content);
        executor.detach(gap).unwrap();
        executor.detach(gap).unwrap();
        assert!(executor.is_detached(gap));
        assert_eq!(Arc::strong_count(&replica), 1);
        let flush = [
            operation(3, 0, OperationKind::Flush),
            operation(4, 1, OperationKind::Flush),
        ];
        assert_eq!(run(&mut executor, &flush), [Outcome::Done, NO_REPLICA]);
        // Closed here; the next round could not open it otherwise.
    }
}

#[test]
fn detach_by_one_worker_leaves_the_locks_to_the_others() {
    let directory = tempfile::tempdir().unwrap();
    let set = [options(directory.path(), "a", Cache::Direct)];
    let replica = reopen(&set[0]);
    let only = ReplicaId::new(0);
    let mut workers: Vec<Executor> = (0..2)
        .map(|_| {
            let config = ExecutorConfig::default();
            Executor::new(&[Some(Arc::clone(&replica))], config).unwrap()
        })
        .collect();
    drop(replica);
    workers[0].detach(only).unwrap();
    assert!(open_set(&set).unwrap_err().is_in_use());
    assert_eq!(
        run_one(&mut workers[1], OperationKind::Flush),
        Outcome::Done
    );
    workers[1].detach(only).unwrap();
    drop(open_set(&set).unwrap());
}

#[test]
fn detach_does_not_submit_the_rest_of_a_transfer() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a");
    fs::write(&path, vec![7; 3 << 20]).unwrap();
    let mut executor = executor(&[RawOptions::new("a", &path)]);
    executor.slots[0].zero_methods = ZeroMethods {
        punch: false,
        zero_range: false,
    };
    let only = ReplicaId::new(0);
    executor.start(&operation(1, 0, write_zeroes(0, 4096, true)));
    executor.submit().unwrap();
    executor.detach(only).unwrap();
    assert!(!executor.is_detached(only));
    let mut ended = Vec::new();
    while ended.is_empty() {
        executor.submit().unwrap();
        executor.reap(&mut ended).unwrap();
    }
    assert_eq!(ended, [(OpId(1), NO_REPLICA)]);
    assert!(executor.is_detached(only));
    let content = fs::read(&path).unwrap();
    let zeroed = content.iter().take_while(|&&byte| byte == 0).count();
    assert_eq!(zeroed, ZEROES_BYTES as usize);
}

#[test]
#[should_panic(expected = "r0 is attached while its slot is in use")]
fn attach_to_a_slot_in_use_is_a_mistake_of_ours() {
    let directory = tempfile::tempdir().unwrap();
    let (mut executor, b) = executor_with_a_gap(directory.path());
    let _ = executor.attach(ReplicaId::new(0), reopen(&b));
}
