// SPDX-License-Identifier: Apache-2.0
//! The disk that is served: replicas opened and checked, workers running, a device in front.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use thiserror::Error;
use tracing::warn;

use super::clock::Clock;
use super::maintenance::{self, MaintenanceError, MaintenanceSetup, STOP_LIMIT};
use super::start::{self, Start, StartError};
use super::worker::{self, Message, WorkerError, WorkerSetup};
use crate::config::Config;
use crate::control::{Counters, ReportSender};
use crate::device::mailbox::Ack;
use crate::device::{Device, DeviceOptions, Mailbox, OptionsError, PublishOrder, WorkerMailbox};
use crate::quorum::{Command, KeeperConfig, KeeperStatus};
use crate::replica::ExecutorConfig;

/// Longest part of a request, in bytes; what is held back for settlements holds one for each
/// replica and the result.
const PART_BYTES_MAX: usize = 256 << 10;

/// Submissions of a worker that go to the kernel in one call.
const RING_ENTRIES: u32 = 256;

/// How long workers may take to end beyond the time after which operations count as hung.
const WORKERS_STOP_MARGIN: Duration = Duration::from_secs(10);

/// How long maintenance may take to end beyond the time in which the record is to be closed.
const MAINTENANCE_STOP_MARGIN: Duration = Duration::from_secs(5);

/// A disk that cannot be served.
#[derive(Debug, Error)]
pub enum DiskError {
    /// Replicas and record do not make a disk.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The maintenance thread cannot be started.
    #[error(transparent)]
    Maintenance(#[from] MaintenanceError),
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
    /// Workers that were started.
    workers: usize,
    /// Each worker tells its end here, once.
    worker_ends: Receiver<()>,
    /// The maintenance thread tells its end here.
    maintenance_end: Receiver<()>,
    /// How long the end of the workers may take.
    workers_stop_limit: Duration,
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
        let Start {
            shared,
            replicas,
            options,
            left,
            shape,
            record,
            keeper,
        } = start::start(config)?;
        let count = usize::from(config.workers);
        // One more for the maintenance thread.
        let mailboxes: Vec<Arc<Mailbox<Message>>> = (0..=count)
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
            mailboxes[..count]
                .iter()
                .map(|m| Arc::clone(m) as Arc<dyn WorkerMailbox>)
                .collect(),
        )?;
        let executor = executor_config(config, replicas.len());
        let (ended, maintenance_end) = channel();
        maintenance::spawn(MaintenanceSetup {
            shared: Arc::clone(&shared),
            replicas: replicas.clone(),
            options,
            left,
            block_bytes: shape.block_bytes,
            executor: maintenance_executor_config(replicas.len()),
            mailboxes: mailboxes.clone(),
            reports: reports.clone(),
            counters: counters.clone(),
            clock,
            keeper_config: keeper_config(config),
            keeper,
            record,
            ended,
        })?;
        let (ended, worker_ends) = channel();
        let mut disk = Self {
            device: Arc::new(device),
            sectors: shape.sectors,
            mailboxes,
            workers: 0,
            worker_ends,
            maintenance_end,
            workers_stop_limit: config.patience.io_timeout + WORKERS_STOP_MARGIN,
        };
        for index in 0..config.workers {
            let worker = worker::spawn(WorkerSetup {
                index: u8::try_from(index).expect("the configuration allows at most 63 workers"),
                shared: Arc::clone(&shared),
                replicas: replicas.clone(),
                executor,
                polling: config.polling,
                mailboxes: disk.mailboxes.clone(),
                reports: reports.clone(),
                counters: counters.worker(usize::from(index)),
                clock,
                ended: ended.clone(),
            });
            match worker {
                Ok(()) => disk.workers += 1,
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

    /// What the operator wants.
    pub fn command(&self, command: Command) {
        self.maintenance_mailbox().post(Message::Command(command));
    }

    /// How the disk is; `None` if the maintenance thread has ended.
    #[must_use]
    pub fn status(&self) -> Option<KeeperStatus> {
        let (ack, status) = Ack::new();
        self.maintenance_mailbox().post(Message::Status(ack));
        status.wait().ok()
    }

    fn maintenance_mailbox(&self) -> &Mailbox<Message> {
        self.mailboxes.last().expect("maintenance has the last one")
    }

    /// Lets the workers finish what they have and ends them, then closes the record. Connections
    /// have ended before.
    ///
    /// Takes no longer than a limit, whatever hangs: threads that operations keep are left behind
    /// for the end of the process.
    pub fn stop(self) {
        for mailbox in &self.mailboxes[..self.workers] {
            mailbox.post(Message::Shutdown);
        }
        let until = Instant::now() + self.workers_stop_limit;
        let ended = (0..self.workers)
            .take_while(|_| {
                let left = until.saturating_duration_since(Instant::now());
                self.worker_ends.recv_timeout(left).is_ok()
            })
            .count();
        let workers_ended = ended == self.workers;
        if !workers_ended {
            warn!(
                "{} workers did not end in time: the disk is not closed cleanly",
                self.workers - ended
            );
        }
        self.maintenance_mailbox()
            .post(Message::Close { workers_ended });
        let limit = STOP_LIMIT + MAINTENANCE_STOP_MARGIN;
        if self.maintenance_end.recv_timeout(limit).is_err() {
            warn!("the maintenance thread did not end in time");
        }
    }
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

/// Extents that maintenance works on at once, and pieces of a scrub.
const MAINTENANCE_DEPTH: usize = 8;

/// Enough for what the keeper has under way at once.
fn maintenance_executor_config(replicas: usize) -> ExecutorConfig {
    let settlement = PART_BYTES_MAX * (replicas + 1);
    ExecutorConfig {
        pool_budget_bytes: settlement * MAINTENANCE_DEPTH / 2,
        reserve_bytes: settlement * MAINTENANCE_DEPTH / 2,
        ring_entries: RING_ENTRIES,
    }
}

fn keeper_config(config: &Config) -> KeeperConfig {
    let upkeep = &config.upkeep;
    KeeperConfig {
        resync_bytes_per_s: upkeep.resync_bytes_per_s,
        scrub_bytes_per_s: upkeep.scrub_bytes_per_s,
        scrub_interval: upkeep.scrub_interval,
        scrub_repairs: upkeep.scrub_repairs,
        write_errors_max: upkeep.write_errors_max,
        kicks_max: upkeep.kicks_max,
        repairs_max: upkeep.repairs_max,
        ..KeeperConfig::default()
    }
}
