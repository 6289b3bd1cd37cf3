// SPDX-License-Identifier: Apache-2.0
//! A worker that is warm allocates nothing, whatever its guest asks for: queue, lane, votes, ring
//! and buffers work in memory that is there. The daemon runs in this process, over its real
//! socket, and an allocator counts what the threads of its workers ask for.
#![allow(unsafe_code, reason = "a global allocator that counts")]
#![allow(
    clippy::unwrap_used,
    reason = "everything in this file is test code, helpers included"
)]

#[allow(dead_code, reason = "other tests use more of it")]
#[path = "common/random.rs"]
mod random;

use std::alloc::{GlobalAlloc, Layout, System};
use std::os::fd::IntoRawFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use quorum_blk::cli::{self, Command};
use quorum_blk::daemon;
use quorum_blk::front_end::{FrontEnd, Options, Queue, Request, Segment, Status};
use random::Random;

const DISK_BYTES: usize = 32 << 20;
const SECTOR_BYTES: usize = 512;
const DEPTH: usize = 32;

struct Counting;

/// Allocations by workers.
static BY_WORKERS: AtomicU64 = AtomicU64::new(0);

/// Whether this thread is a worker, by its name. Asked of the kernel: asking std allocates.
fn on_worker() -> bool {
    let mut name = [0u8; 16];
    // SAFETY: the kernel writes at most 16 bytes.
    unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
    name.starts_with(b"worker")
}

// SAFETY: everything is handed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if on_worker() {
            BY_WORKERS.fetch_add(1, Ordering::Relaxed);
        }
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

/// A daemon with three equal replicas in `folder`, and a front-end of it. It ends with the
/// connection.
fn serve(folder: &Path, queues: u16) -> (FrontEnd, std::thread::JoinHandle<()>) {
    let socket = folder.join("sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let mut line = vec!["quorum-blk".to_owned(), "serve".to_owned()];
    line.push(format!("--workers={queues}"));
    for name in ["a", "b", "c"] {
        let path = folder.join(name);
        std::fs::write(&path, vec![1; DISK_BYTES]).unwrap();
        line.push(format!("--replica={},cache=buffered", path.display()));
    }
    let daemon = std::thread::spawn(move || {
        let (connection, _) = listener.accept().unwrap();
        line.push(format!("--fd={}", connection.into_raw_fd()));
        let command = cli::parse(line.into_iter().map(Into::into)).unwrap();
        let Command::Serve(mut config) = command else {
            unreachable!("the line says serve")
        };
        // On a machine that is busy with something else a replica may be late by the usual measure.
        // What is remembered and told of that takes memory, and is no steady state.
        let patience = &mut config.patience;
        patience.write_grace_min = NEVER_LATE;
        patience.write_grace_max = NEVER_LATE;
        patience.flush_grace = NEVER_LATE;
        patience.io_timeout = NEVER_LATE;
        daemon::run(*config).unwrap();
    });
    let options = Options {
        queues,
        ..Options::default()
    };
    (FrontEnd::connect(&socket, &options).unwrap(), daemon)
}

/// Runs `count` requests of `len` bytes, on all queues in turn with 32 in flight on each: reads, writes,
/// flushes, zeroes and discards. What writes stays in one half of the disk, where writes wait for
/// each other, and reads in the other: where a read meets a write in flight and the replicas
/// differ for the moment, the vote sector by sector takes memory.
fn load(disk: &mut FrontEnd, random: &mut Random, count: usize, len: usize) {
    let data = vec![1; len];
    let mut submitted = 0;
    while submitted < count {
        for queue in disk.queues() {
            while queue.in_flight() < DEPTH {
                submit(queue, random, &data);
                submitted += 1;
            }
        }
        for queue in disk.queues() {
            // At least half of them, so that the rest meets the next ones.
            while queue.in_flight() > DEPTH / 2 {
                assert_eq!(queue.wait_any().unwrap().status, Status::Ok);
            }
        }
    }
    for queue in disk.queues() {
        while queue.in_flight() > 0 {
            assert_eq!(queue.wait_any().unwrap().status, Status::Ok);
        }
    }
}

fn submit(queue: &mut Queue, random: &mut Random, data: &[u8]) {
    let len = data.len();
    let sectors = len / SECTOR_BYTES;
    let half = DISK_BYTES / len / 2;
    let block = random.below(half);
    let sector = (block * sectors) as u64;
    let segment = [Segment::new(sector, u32::try_from(sectors).unwrap())];
    let request = match random.below(30) {
        0 => Request::Flush,
        1 => Request::WriteZeroes(&segment),
        2 => Request::Discard(&segment),
        3..16 => Request::Write { sector, data },
        _ => Request::Read {
            sector: ((half + block) * sectors) as u64,
            len,
        },
    };
    queue.submit(&request).unwrap();
}

/// Longer than the test may take.
const NEVER_LATE: Duration = Duration::from_secs(600);

#[test]
fn a_warm_worker_does_not_allocate() {
    for queues in [1, 2] {
        let folder = tempfile::tempdir().unwrap();
        let (mut disk, daemon) = serve(folder.path(), queues);
        let mut random = Random::new(1);
        // Enough for every slot of a request to have held one of each kind and size.
        let each = usize::from(queues);
        load(&mut disk, &mut random, 8000 * each, 4 << 10);
        load(&mut disk, &mut random, 1000 * each, 128 << 10);
        assert!(BY_WORKERS.load(Ordering::Relaxed) > 0, "the counter counts");
        let before = BY_WORKERS.load(Ordering::Relaxed);
        load(&mut disk, &mut random, 20_000, 4 << 10);
        load(&mut disk, &mut random, 2000, 128 << 10);
        let allocated = BY_WORKERS.load(Ordering::Relaxed) - before;
        assert_eq!(allocated, 0, "with {queues} workers");
        drop(disk);
        daemon.join().unwrap();
    }
}
