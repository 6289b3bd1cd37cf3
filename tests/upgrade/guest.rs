// SPDX-License-Identifier: Apache-2.0
//! A load that goes on over the end of its back-end, as a guest does: what it has asked for stays
//! in its rings, and the next back-end has to complete it, once. Every block is written and read by
//! one request at a time, so that what it must hold is known exactly, also over a restart.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use quorum_blk::front_end::{Completion, FrontEnd, FrontEndError, Options, Request, Status, Token};

use crate::common::{Random, SECTOR};
use crate::site::{PATIENCE, SECTORS};

/// Sectors of a block.
const BLOCK: usize = 8;
const BLOCKS: usize = SECTORS / BLOCK;
/// Requests under way on each queue.
const DEPTH: usize = 16;
/// Queues, each driven in turn.
const QUEUES: usize = 2;

/// A request that is under way, and the version it writes; `None`: it reads.
struct Busy {
    token: Token,
    block: usize,
    writes: Option<u32>,
}

/// The load, on a thread of its own.
pub struct Load {
    shared: Arc<Shared>,
    thread: JoinHandle<Guest>,
}

/// What thread and test tell each other.
#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    completed: AtomicUsize,
    /// How long it was without a back-end: from the end of one to the first completion by the next.
    outages: Mutex<Vec<Duration>>,
    /// How often it found nobody at the socket.
    refused: AtomicUsize,
}

/// The guest.
pub struct Guest {
    front_end: FrontEnd,
    socket: PathBuf,
    random: Random,
    /// What was acknowledged last, by block.
    versions: Vec<u32>,
    busy: Vec<Vec<Busy>>,
    next_version: u32,
    shared: Arc<Shared>,
    /// Since when there is no back-end.
    alone: Option<Instant>,
}

impl Load {
    /// Boots a guest that works until it is told to stop.
    pub fn start(socket: &Path, options: Options, seed: u64) -> Self {
        let mut guest = Guest::boot(socket, options, seed);
        let shared = Arc::clone(&guest.shared);
        let thread = std::thread::spawn(move || {
            guest.work();
            guest
        });
        Self { shared, thread }
    }

    /// Waits until it has completed so many more requests.
    #[track_caller]
    pub fn await_progress(&self, requests: usize) {
        let goal = self.completed() + requests;
        let deadline = Instant::now() + PATIENCE;
        while self.completed() < goal {
            assert!(!self.thread.is_finished(), "the load failed");
            assert!(Instant::now() < deadline, "the load stands still");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// How many requests were completed.
    pub fn completed(&self) -> usize {
        self.shared.completed.load(Ordering::Relaxed)
    }

    /// How long it was without a back-end, each time.
    pub fn outages(&self) -> Vec<Duration> {
        self.shared.outages.lock().unwrap().clone()
    }

    /// How often it found nobody at the socket.
    pub fn refused(&self) -> usize {
        self.shared.refused.load(Ordering::Relaxed)
    }

    /// Waits until it has gone on at a new back-end so often.
    #[track_caller]
    pub fn await_outages(&self, count: usize) {
        crate::site::await_that("the guest goes on", || {
            assert!(!self.thread.is_finished(), "the load failed");
            self.outages().len() >= count
        });
    }

    /// Lets it complete what is under way. Returns the guest.
    #[track_caller]
    pub fn stop(self) -> Guest {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("the load did not fail")
    }
}

impl Guest {
    /// Boots a guest.
    fn boot(socket: &Path, options: Options, seed: u64) -> Self {
        let options = Options {
            queues: u16::try_from(QUEUES).unwrap(),
            timeout: PATIENCE,
            ..options
        };
        Self {
            front_end: FrontEnd::connect(socket, &options).expect("the daemon serves"),
            socket: socket.to_owned(),
            random: Random::new(seed),
            versions: vec![0; BLOCKS],
            busy: (0..QUEUES).map(|_| Vec::new()).collect(),
            next_version: 1,
            shared: Arc::default(),
            alone: None,
        }
    }

    /// Reads every block and compares it with what was acknowledged.
    pub fn check_all(&mut self) {
        for block in 0..BLOCKS {
            let mut bytes = vec![0; BLOCK * SECTOR];
            let queue = self.front_end.queue(block % QUEUES);
            queue.read((block * BLOCK) as u64, &mut bytes).unwrap();
            assert!(
                bytes == content(block, self.versions[block]),
                "block {block} does not hold version {}",
                self.versions[block]
            );
        }
    }

    fn work(&mut self) {
        while !self.shared.stop.load(Ordering::Relaxed) {
            for queue in 0..QUEUES {
                while self.busy[queue].len() < DEPTH {
                    self.submit(queue);
                }
            }
            for queue in 0..QUEUES {
                self.complete_one(queue);
            }
        }
        for queue in 0..QUEUES {
            while !self.busy[queue].is_empty() {
                self.complete_one(queue);
            }
        }
    }

    fn submit(&mut self, queue: usize) {
        let block = self.random.below(BLOCKS);
        let mut all = self.busy.iter().flatten();
        if all.any(|busy| busy.block == block) {
            return;
        }
        let sector = (block * BLOCK) as u64;
        let writes = (self.random.below(4) != 0).then_some(self.next_version);
        let data = content(block, self.next_version);
        self.next_version += 1;
        let request = match writes {
            Some(_) => Request::Write {
                sector,
                data: &data,
            },
            None => Request::Read {
                sector,
                len: data.len(),
            },
        };
        let token = self.front_end.queue(queue).submit(&request).unwrap();
        self.busy[queue].push(Busy {
            token,
            block,
            writes,
        });
    }

    /// Waits for one completion, with whatever back-end.
    fn complete_one(&mut self, queue: usize) {
        loop {
            match self.front_end.queue(queue).wait_any() {
                Ok(completion) => return self.take(queue, &completion),
                Err(FrontEndError::Closed) => self.reconnect(),
                // Also: something was completed that was not asked for, or twice.
                Err(error) => panic!("{error:?}"),
            }
        }
    }

    fn take(&mut self, queue: usize, completion: &Completion) {
        let mut all = self.busy[queue].iter();
        let at = all.position(|busy| busy.token == completion.token);
        let busy = self.busy[queue].swap_remove(at.expect("a request of ours"));
        assert_eq!(completion.status, Status::Ok, "block {}", busy.block);
        match busy.writes {
            Some(version) => self.versions[busy.block] = version,
            None => assert!(
                completion.data == content(busy.block, self.versions[busy.block]),
                "block {} does not hold version {}",
                busy.block,
                self.versions[busy.block]
            ),
        }
        if let Some(since) = self.alone.take() {
            self.shared.outages.lock().unwrap().push(since.elapsed());
        }
        self.shared.completed.fetch_add(1, Ordering::Relaxed);
    }

    /// Tries until a back-end takes the rings.
    fn reconnect(&mut self) {
        self.alone.get_or_insert_with(Instant::now);
        let deadline = Instant::now() + PATIENCE;
        while let Err(error) = self.front_end.reconnect(&self.socket) {
            assert!(Instant::now() < deadline, "nobody serves: {error:?}");
            if matches!(error, FrontEndError::Connect { .. }) {
                self.shared.refused.fetch_add(1, Ordering::Relaxed);
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

/// What a block holds in one of its versions; zeroes in the first.
fn content(block: usize, version: u32) -> Vec<u8> {
    if version == 0 {
        return vec![0; BLOCK * SECTOR];
    }
    let seed = (u64::from(version) << 32) | block as u64;
    Random::new(seed).bytes(BLOCK * SECTOR)
}
