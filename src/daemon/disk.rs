// SPDX-License-Identifier: Apache-2.0
//! The disk that is served: replicas opened and checked, workers running, a device in front.

use std::path::PathBuf;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use thiserror::Error;
use tracing::{info, warn};

use super::clock::Clock;
use super::worker::{self, Message, WorkerError, WorkerSetup};
use crate::config::{Cache as CacheChoice, Config, Format as FormatChoice};
use crate::control::{Counters, ReportSender};
use crate::device::{Device, DeviceOptions, Mailbox, OptionsError, PublishOrder, WorkerMailbox};
use crate::quorum::{Geometry, Policy, PolicyError, Shared};
use crate::replica::{
    Cache, ExecutorConfig, Format, OpenError, RawOptions, Replica, SetError, SetShape, check_set,
    open_set,
};

/// Longest part of a request, in bytes; what is held back for settlements holds one for each
/// replica and the result.
const PART_BYTES_MAX: usize = 256 << 10;

/// Pause between two looks at a lock.
const LOCK_RETRY: Duration = Duration::from_millis(20);

/// Submissions of a worker that go to the kernel in one call.
const RING_ENTRIES: u32 = 256;

/// A disk that cannot be served.
#[derive(Debug, Error)]
pub enum DiskError {
    /// A replica cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The replicas do not make a disk.
    #[error(transparent)]
    Set(#[from] SetError),
    /// The policy contradicts itself.
    #[error(transparent)]
    Policy(#[from] PolicyError),
    /// The device cannot be as asked.
    #[error(transparent)]
    Options(#[from] OptionsError),
    /// A worker cannot be started.
    #[error(transparent)]
    Worker(#[from] WorkerError),
    /// No descriptor for a mailbox.
    #[error("cannot set up the mailbox of a worker")]
    Mailbox(#[source] std::io::Error),
}

/// A disk at work, with or without a front-end.
pub struct Disk {
    device: Arc<Device>,
    sectors: u64,
    mailboxes: Vec<Arc<Mailbox<Message>>>,
    workers: Vec<JoinHandle<()>>,
}

impl Disk {
    /// Opens and locks the replicas of `config` and starts the workers.
    ///
    /// # Errors
    /// The first thing that stands in the way; replicas opened before are closed again.
    pub fn start(
        config: &Config,
        reports: &ReportSender,
        counters: &Counters,
        clock: Clock,
    ) -> Result<Self, DiskError> {
        let options: Vec<RawOptions> = config
            .replicas
            .iter()
            .map(|r| raw_options(config, r))
            .collect();
        let replicas = open_when_free(&options, config.lock_timeout)?;
        let block_bytes = config.block_size.map(|size| size.bytes());
        let replicas: Vec<Option<Arc<Replica>>> = replicas.into_iter().map(Some).collect();
        let shape = check_set(&replicas, config.threshold, block_bytes, None)?;
        describe(&replicas, &shape, config.read_only);
        let policy = Policy {
            discard_zeroes: shape.can_zero_exactly,
            ..config.policy()
        };
        let block_sectors = shape.block_bytes / 512;
        let geometry = Geometry::new(shape.sectors, block_sectors)?;
        let shared = Arc::new(Shared::new(geometry, policy)?);

        let count = usize::from(config.workers);
        let mailboxes: Vec<Arc<Mailbox<Message>>> = (0..count)
            .map(|_| Mailbox::new().map(Arc::new))
            .collect::<Result<_, _>>()
            .map_err(DiskError::Mailbox)?;
        let device = Device::new(
            DeviceOptions {
                sectors: shape.sectors,
                block_bytes: shape.block_bytes,
                read_only: config.read_only,
                serial: config.serial.clone(),
                queues: config.num_queues,
                queue_size: config.queue_size,
            },
            // Front-ends are offered no record of what is in flight, so the used index has to be
            // one (rule Q3).
            PublishOrder::Ring,
            mailboxes
                .iter()
                .map(|m| Arc::clone(m) as Arc<dyn WorkerMailbox>)
                .collect(),
        )?;
        let mut disk = Self {
            device: Arc::new(device),
            sectors: shape.sectors,
            mailboxes,
            workers: Vec::with_capacity(count),
        };
        let executor = executor_config(config, replicas.len());
        for index in 0..config.workers {
            let worker = worker::spawn(WorkerSetup {
                index: u8::try_from(index).expect("the configuration allows at most 64 workers"),
                shared: Arc::clone(&shared),
                replicas: replicas.clone(),
                executor,
                mailboxes: disk.mailboxes.clone(),
                reports: reports.clone(),
                counters: counters.worker(usize::from(index)),
                clock,
            });
            match worker {
                Ok(worker) => disk.workers.push(worker),
                Err(error) => {
                    disk.stop();
                    return Err(error.into());
                }
            }
        }
        Ok(disk)
    }

    /// What front-ends connect to.
    #[must_use]
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// Size of the disk.
    #[must_use]
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// Lets the workers finish what they have and ends them. Connections have ended before.
    pub fn stop(self) {
        for mailbox in &self.mailboxes[..self.workers.len()] {
            mailbox.post(Message::Shutdown);
        }
        for worker in self.workers {
            // A worker that panicked has ended the process.
            let _ = worker.join();
        }
    }
}

/// Opens the replicas, waiting for those that somebody else has locked: a daemon that was killed
/// keeps its locks until its last operation has landed (rules K2, S2).
fn open_when_free(
    options: &[RawOptions],
    timeout: Duration,
) -> Result<Vec<Arc<Replica>>, OpenError> {
    let begin = Instant::now();
    loop {
        match open_set(options) {
            Err(error) if error.is_in_use() && begin.elapsed() < timeout => {
                if begin.elapsed() < LOCK_RETRY {
                    info!("{error}; waiting up to {} s for it", timeout.as_secs());
                }
                thread::sleep(LOCK_RETRY);
            }
            result => return result,
        }
    }
}

fn raw_options(config: &Config, replica: &crate::config::Replica) -> RawOptions {
    let mut options = RawOptions::new(replica.name.clone(), PathBuf::from(&replica.path));
    options.cache = match replica.cache {
        CacheChoice::Direct => Cache::Direct,
        CacheChoice::Buffered => Cache::Buffered,
    };
    options.format = replica.format.map(|format| match format {
        FormatChoice::Raw => Format::Raw,
    });
    // Rule Z4: a disk that is read-only to the guest is repaired only where that was asked for.
    options.read_only = config.read_only && !config.repair;
    options
}

/// Each worker gets its share of the memory, but never less than one request of the largest size
/// needs.
fn executor_config(config: &Config, replicas: usize) -> ExecutorConfig {
    let budget = usize::try_from(config.buffer_memory_bytes).unwrap_or(usize::MAX);
    let share = budget / usize::from(config.workers);
    ExecutorConfig {
        pool_budget_bytes: share.max(PART_BYTES_MAX * (replicas + 1)),
        reserve_bytes: PART_BYTES_MAX * (replicas + 1),
        ring_entries: RING_ENTRIES,
    }
}

fn describe(replicas: &[Option<Arc<Replica>>], shape: &SetShape, guest_is_reader: bool) {
    for note in &shape.notes {
        warn!("{note}");
    }
    for replica in replicas.iter().flatten() {
        info!(
            replica = replica.name(),
            path = %replica.path().display(),
            bytes = replica.length_bytes(),
            "opened"
        );
    }
    if !shape.can_zero_exactly && !guest_is_reader {
        info!("discards are ignored: not every replica can zero exact ranges");
    }
}
