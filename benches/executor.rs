// SPDX-License-Identifier: Apache-2.0
//! The floor under the whole daemon: 4 KiB random reads of three replicas through the executor
//! alone, without a vote and without virtio. Prints requests (of three operations each) a second
//! and processor time per request.
//!
//! `cargo bench --bench executor [-- FOLDER]`: the images are made in FOLDER, by default the
//! system's temporary folder. Use a file system that is not tmpfs.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::{Duration, Instant};

use quorum_blk::quorum::{BufferId, Buffers, OpId, Operation, OperationKind, Outcome, Purpose};
use quorum_blk::replica::{Cache, Executor, ExecutorConfig, RawOptions, open_set};
use quorum_blk::units::{ReplicaId, SectorRange};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

const REPLICAS: usize = 3;
const IMAGE_BYTES: u64 = 256 << 20;
const RUN_FOR: Duration = Duration::from_secs(3);

/// A request: one read of each replica.
#[derive(Clone, Copy)]
struct Request {
    buffers: [BufferId; REPLICAS],
    left: usize,
}

/// xorshift: cheap and the same every time.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

fn main() {
    // cargo adds --bench to the arguments.
    let folder = std::env::args().skip(1).find(|arg| !arg.starts_with('-'));
    let folder = folder.map_or_else(std::env::temp_dir, Into::into);
    let folder = tempfile::tempdir_in(folder).expect("the folder can be written");
    for cache in [Cache::Buffered, Cache::Direct] {
        let options: Vec<RawOptions> = ["a", "b", "c"]
            .iter()
            .map(|name| image(folder.path(), name, cache))
            .collect();
        for (len, depth) in [(4096, 32), (4096, 1), (128 << 10, 8)] {
            measure(&options, len, depth, cache);
        }
    }
}

fn image(folder: &Path, name: &str, cache: Cache) -> RawOptions {
    let path = folder.join(name);
    if !path.exists() {
        let mut file = File::create(&path).expect("the image can be made");
        let block = vec![0x5a; 1 << 20];
        for _ in 0..IMAGE_BYTES >> 20 {
            file.write_all(&block).expect("there is room for the image");
        }
        file.sync_all().expect("the image can be written");
    }
    RawOptions {
        cache,
        ..RawOptions::new(name, path)
    }
}

fn measure(options: &[RawOptions], len: u32, depth: usize, cache: Cache) {
    let replicas = open_set(options).expect("the images open");
    let replicas: Vec<_> = replicas.into_iter().map(Some).collect();
    if cache == Cache::Buffered {
        for one in options {
            std::fs::read(&one.path).expect("the page cache is filled");
        }
    }
    let mut executor =
        Executor::new(&replicas, ExecutorConfig::default()).expect("io_uring works here");
    let epoll = watch(&executor);
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut requests = vec![None; depth];
    let mut ended: Vec<(OpId, Outcome)> = Vec::with_capacity(1024);
    let mut finished = 0u64;
    let (start, cpu) = (Instant::now(), cpu_time());
    for (slot, request) in requests.iter_mut().enumerate() {
        *request = Some(begin(&mut executor, &mut random, slot, len));
    }
    while start.elapsed() < RUN_FOR {
        executor.submit().expect("the ring works");
        executor.reap(&mut ended).expect("the ring works");
        if ended.is_empty() {
            if executor.wait_limit().expect("the ring works").is_none() {
                wait(&epoll);
            }
            continue;
        }
        for (op, outcome) in ended.drain(..) {
            assert_eq!(outcome, Outcome::Done);
            let slot = usize::try_from(op.0).expect("a slot");
            let request: &mut Request = requests[slot].as_mut().expect("it is in flight");
            request.left -= 1;
            if request.left == 0 {
                for buffer in request.buffers {
                    executor.pool_mut().give(buffer);
                }
                finished += 1;
                requests[slot] = Some(begin(&mut executor, &mut random, slot, len));
            }
        }
    }
    let (elapsed, cpu) = (start.elapsed(), cpu_time() - cpu);
    let finished_f = finished as f64;
    println!(
        "{cache:?} read {:>4} KiB depth {depth:>2}: {:>8.0} requests/s, {:>6.2} us CPU each",
        len >> 10,
        finished_f / elapsed.as_secs_f64(),
        cpu.as_secs_f64() * 1e6 / finished_f,
    );
    while executor.in_flight() > 0 {
        executor.submit().expect("the ring works");
        executor.reap(&mut ended).expect("the ring works");
    }
}

fn begin(executor: &mut Executor, random: &mut Random, slot: usize, len: u32) -> Request {
    let start = random.below(IMAGE_BYTES / u64::from(len)) * u64::from(len) / 512;
    let range = SectorRange::new(start, len / 512).expect("not empty");
    let buffers = std::array::from_fn(|index| {
        let buffer = executor
            .pool_mut()
            .take(range.len_bytes(), Purpose::Guest)
            .expect("the pool is large enough");
        executor.start(&Operation {
            op: OpId(slot as u64),
            replica: ReplicaId::new(index),
            kind: OperationKind::Read {
                range,
                buffer,
                skip_bytes: 0,
            },
        });
        buffer
    });
    Request {
        buffers,
        left: REPLICAS,
    }
}

/// Watches the executor as a worker does: by edges, so that nothing needs to be read.
fn watch(executor: &Executor) -> Epoll {
    let epoll = Epoll::new().expect("epoll works here");
    let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, 0);
    epoll
        .ctl(ControlOperation::Add, executor.wake_fd().as_raw_fd(), event)
        .expect("an eventfd can be watched");
    epoll
}

fn wait(epoll: &Epoll) {
    let mut events = [EpollEvent::default()];
    match epoll.wait(1000, &mut events) {
        Ok(woken) => assert_eq!(woken, 1, "a wake-up was lost"),
        // The ring interrupts its thread when it needs another kernel thread.
        Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::Interrupted),
    }
}

/// Processor time of all threads of this process, those of the kernel that work for it included.
#[allow(unsafe_code, reason = "getrusage has no safe wrapper here")]
fn cpu_time() -> Duration {
    // SAFETY: a structure of integers, for which zero is a value.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: the structure is valid and ours.
    let result = unsafe { libc::getrusage(libc::RUSAGE_SELF, &raw mut usage) };
    assert_eq!(result, 0);
    let part = |time: libc::timeval| {
        Duration::from_secs(u64::try_from(time.tv_sec).expect("time runs forwards"))
            + Duration::from_micros(u64::try_from(time.tv_usec).expect("time runs forwards"))
    };
    part(usage.ru_utime) + part(usage.ru_stime)
}
