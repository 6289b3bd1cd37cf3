// SPDX-License-Identifier: Apache-2.0
//! The data path of the executor does not allocate once it is warm.
#![allow(unsafe_code, reason = "a global allocator that counts")]
#![allow(
    clippy::unwrap_used,
    reason = "everything in this file is test code, helpers included"
)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::os::fd::AsRawFd;

use quorum_blk::quorum::{Buffers, OpId, Operation, OperationKind, Outcome, Purpose};
use quorum_blk::replica::{Executor, ExecutorConfig, RawOptions, open_set};
use quorum_blk::units::{ReplicaId, SectorRange};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: everything is handed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // A thread that is ending has no counter any more, and is not measured.
        let _ = ALLOCATIONS.try_with(|count| count.set(count.get() + 1));
        // SAFETY: the caller's promise about the layout.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise; the memory came from `alloc` above.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// Starts a batch of reads, writes, zeroes and a flush on every replica, and waits for all.
fn batch(executor: &mut Executor, epoll: &Epoll, ended: &mut Vec<(OpId, Outcome)>) {
    let range = |start| SectorRange::new(start, 8).unwrap();
    let mut buffers = [None; 48];
    let mut started = 0;
    for (index, slot) in buffers.iter_mut().enumerate() {
        let buffer = executor.pool_mut().take(4096, Purpose::Guest).unwrap();
        *slot = Some(buffer);
        let range = range(index as u64 * 8);
        let kind = if index % 2 == 0 {
            OperationKind::Read {
                range,
                buffer,
                skip_bytes: 0,
            }
        } else {
            OperationKind::Write {
                range,
                buffer,
                skip_bytes: 0,
            }
        };
        let replica = ReplicaId::new(index % 3);
        let op = OpId(index as u64);
        executor.start(&Operation { op, replica, kind });
        started += 1;
    }
    let zeroes = OperationKind::WriteZeroes {
        range: range(1024),
        unmap: false,
    };
    for kind in [zeroes, OperationKind::Flush] {
        let replica = ReplicaId::new(0);
        let op = OpId(100);
        executor.start(&Operation { op, replica, kind });
        started += 1;
    }
    ended.clear();
    while ended.len() < started {
        executor.submit().unwrap();
        executor.reap(ended).unwrap();
        if ended.len() < started && executor.wait_limit().unwrap().is_none() {
            let mut events = [EpollEvent::default()];
            match epoll.wait(10_000, &mut events) {
                Ok(woken) => assert_eq!(woken, 1, "a wake-up was lost"),
                // The ring interrupts its thread when it needs another kernel thread.
                Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::Interrupted),
            }
        }
    }
    assert!(ended.iter().all(|(_, outcome)| *outcome == Outcome::Done));
    for buffer in buffers.into_iter().flatten() {
        executor.pool_mut().give(buffer);
    }
}

#[test]
fn a_warm_executor_does_not_allocate() {
    let folder = tempfile::tempdir().unwrap();
    let options = ["a", "b", "c"].map(|name| {
        let path = folder.path().join(name);
        std::fs::write(&path, vec![1; 1 << 20]).unwrap();
        RawOptions::new(name, path)
    });
    // Fewer entries than a batch has operations: the backlog is used too.
    let config = ExecutorConfig {
        ring_entries: 16,
        ..ExecutorConfig::default()
    };
    let replicas: Vec<_> = open_set(&options).unwrap().into_iter().map(Some).collect();
    let mut executor = Executor::new(&replicas, config).unwrap();
    let epoll = Epoll::new().unwrap();
    let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, 0);
    let wake = executor.wake_fd().as_raw_fd();
    epoll.ctl(ControlOperation::Add, wake, event).unwrap();
    let mut ended = Vec::with_capacity(64);
    batch(&mut executor, &epoll, &mut ended);
    let before = ALLOCATIONS.get();
    assert!(before > 0, "the counter counts");
    for _ in 0..50 {
        batch(&mut executor, &epoll, &mut ended);
    }
    assert_eq!(ALLOCATIONS.get() - before, 0);
}
