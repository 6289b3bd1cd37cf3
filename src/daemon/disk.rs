// SPDX-License-Identifier: Apache-2.0
//! The disk that is served: opened and closed as the device in front of it wants, with its replicas
//! checked and its workers running while it is open.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use thiserror::Error;
use tracing::{info, warn};

use super::clock::Clock;
use super::maintenance::{self, MaintenanceError, MaintenanceSetup, STOP_LIMIT};
use super::resize::ResizeError;
use super::start::{self, Grow, GrowError, Looks, Start, StartError};
use super::worker::{self, Message, WorkerError, WorkerSetup};
use crate::config::{Config, GrowMode, RecordConfig};
use crate::control::{Counters, DiskFacts, ReportSender};
use crate::device::mailbox::Ack;
use crate::device::{
    BeganCallback, Device, DeviceOptions, DiskIdentity, Lifecycle, Mailbox, OpenDisk, OpenFailed,
    OptionsError, PublishOrder, Storage, WorkerMailbox,
};
use crate::quorum::{Command, Geometry, KeeperConfig};
use crate::record::Growth;
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
    /// What is opened is not what was there before.
    #[error(
        "the guest was told of {told}, and what is there now is {found}: it is not opened, since the \
         guest would not know; start the daemon again if that is meant to be so"
    )]
    Changed {
        /// What it was told.
        told: Looks,
        /// What is there.
        found: Looks,
    },
    /// No descriptor for a mailbox.
    #[error("cannot set up the mailbox of a worker")]
    Mailbox(#[source] std::io::Error),
}

/// What all openings of the disk have in common.
pub struct DiskSetup {
    /// What is served, and how.
    pub config: Arc<Config>,
    /// Where reports go.
    pub reports: ReportSender,
    /// What is counted, over all openings.
    pub counters: Counters,
    /// The time.
    pub clock: Clock,
}

/// How the disk is.
#[derive(Debug)]
pub enum Standing {
    /// It is open.
    Open(Box<DiskFacts>),
    /// It is open, and the maintenance thread does not answer.
    Silent,
    /// It is not: the next ring that starts opens it.
    Closed,
    /// It is being opened or closed.
    Changing,
}

/// The disk of the daemon: opened and closed, perhaps several times, while a device stays in front
/// of it.
///
/// ```text
///   Closed ---> Changing ---> Open ---> Changing ---> Closed
///          open                   close
/// ```
///
/// Who opens or closes it holds the gate of the device; whoever only asks does not wait for that.
pub struct Disk {
    setup: DiskSetup,
    /// What the guest was told; a disk that has become another one is not opened.
    told: Mutex<Option<Looks>>,
    state: Mutex<State>,
    /// What the operator wants as soon as the disk is open for the first time.
    wishes: Mutex<Vec<Command>>,
    /// What is to become of its size when it is opened the next time.
    grow: Mutex<Grow>,
    /// Why it has not become longer then.
    refusal: Mutex<Option<DiskError>>,
    /// Held by who resizes it.
    resizing: Mutex<()>,
    /// The process ends: nothing is waited for any more.
    given_up: AtomicBool,
}

enum State {
    Closed,
    Changing,
    Open(Running),
}

/// An open disk at work, with or without a front-end.
struct Running {
    mailboxes: Vec<Arc<Mailbox<Message>>>,
    /// Workers that were started.
    workers: usize,
    /// Each worker tells its end here, once.
    worker_ends: Receiver<()>,
    /// The maintenance thread tells its end here.
    maintenance_end: Receiver<()>,
    /// How long the end of the workers may take.
    workers_stop_limit: Duration,
    /// Which disk it is, and which run.
    identity: DiskIdentity,
    /// Its size, and its extents.
    geometry: Geometry,
}

impl Disk {
    /// The disk, and the device in front of it. The disk is opened, unless it is to be opened when
    /// the first ring starts; then it is only looked at. `wishes` are told to it once it is open.
    ///
    /// # Errors
    /// The first thing that stands in the way; replicas opened before are closed again.
    pub fn start(
        setup: DiskSetup,
        wishes: Vec<Command>,
    ) -> Result<(Arc<Self>, Arc<Device>), DiskError> {
        let grow = match setup.config.grow {
            GrowMode::Never => Grow::No,
            GrowMode::Found => Grow::Found,
        };
        let disk = Arc::new(Self {
            setup,
            told: Mutex::new(None),
            state: Mutex::new(State::Closed),
            wishes: Mutex::new(wishes),
            grow: Mutex::new(grow),
            refusal: Mutex::default(),
            resizing: Mutex::default(),
            given_up: AtomicBool::new(false),
        });
        let open = if disk.setup.config.incoming {
            *lock(&disk.told) = Some(start::look(&disk.setup.config)?);
            None
        } else {
            Some(disk.open_now(&AtomicBool::new(false))?)
        };
        let looks = disk.looks();
        let config = &disk.setup.config;
        let options = DeviceOptions {
            sectors: looks.sectors,
            block_bytes: looks.block_bytes,
            read_only: config.read_only,
            serial: config.serial.clone(),
            queues: config.num_queues,
            queue_size: config.queue_size,
        };
        let storage = Arc::clone(&disk) as Arc<dyn Storage>;
        let lifecycle = match open {
            Some(open) => Lifecycle::of_open(storage, open),
            None => Lifecycle::of_closed(storage, looks.uuid),
        };
        // Where the front-end keeps no record of what is in flight, the used index has to be one
        // (rule Q3).
        match Device::new(options, PublishOrder::Ring, lifecycle) {
            Ok(device) => Ok((disk, Arc::new(device))),
            Err(error) => {
                Storage::close(&*disk);
                Err(error.into())
            }
        }
    }

    /// What the guest is told.
    ///
    /// # Panics
    /// Before the disk was opened or looked at.
    #[must_use]
    pub fn looks(&self) -> Looks {
        lock(&self.told).expect("it was opened or looked at when it was made")
    }

    /// What the operator wants. Whether it was passed on: a closed disk is told nothing.
    pub fn command(&self, command: Command) -> bool {
        let mailbox = self.maintenance_mailbox();
        if let Some(mailbox) = &mailbox {
            mailbox.post(Message::Command(command));
        }
        mailbox.is_some()
    }

    /// How the disk is.
    #[must_use]
    pub fn status(&self) -> Standing {
        let mailbox = match &*lock(&self.state) {
            State::Closed => return Standing::Closed,
            State::Changing => return Standing::Changing,
            State::Open(running) => Arc::clone(running.maintenance_mailbox()),
        };
        let (ack, status) = Ack::new();
        mailbox.post(Message::Status(ack));
        drop(mailbox);
        match status.wait() {
            Ok(status) => Standing::Open(Box::new(status)),
            Err(_) => Standing::Silent,
        }
    }

    fn maintenance_mailbox(&self) -> Option<Arc<Mailbox<Message>>> {
        match &*lock(&self.state) {
            State::Open(running) => Some(Arc::clone(running.maintenance_mailbox())),
            State::Closed | State::Changing => None,
        }
    }

    /// Opens and locks the replicas and starts the workers.
    fn open_now(&self, given_up: &AtomicBool) -> Result<OpenDisk, DiskError> {
        let before = std::mem::replace(&mut *lock(&self.state), State::Changing);
        assert!(
            matches!(before, State::Closed),
            "only a closed disk is opened"
        );
        let result = self.open_closed(given_up);
        match result {
            Ok(running) => {
                let open = running.open_disk();
                for wish in lock(&self.wishes).drain(..) {
                    running.maintenance_mailbox().post(Message::Command(wish));
                }
                *lock(&self.state) = State::Open(running);
                Ok(open)
            }
            Err(error) => {
                *lock(&self.state) = State::Closed;
                Err(error)
            }
        }
    }

    fn open_closed(&self, given_up: &AtomicBool) -> Result<Running, DiskError> {
        let grow = std::mem::take(&mut *lock(&self.grow));
        let opened = match self.open_sized(grow, given_up) {
            Err(refusal) if matches!(grow, Grow::To(_)) => {
                warn!("the disk is opened at its old size: {refusal}");
                *lock(&self.refusal) = Some(refusal);
                // Unless the record says by now that it is longer.
                self.open_sized(Grow::Kept, given_up)
            }
            other => other,
        };
        if opened.is_err() && matches!(grow, Grow::To(_) | Grow::Kept) {
            // It may also say so when the next ring tries it again.
            *lock(&self.grow) = Grow::Kept;
        }
        opened
    }

    fn open_sized(&self, grow: Grow, given_up: &AtomicBool) -> Result<Running, DiskError> {
        let start = start::start(&self.setup.config, grow, given_up)?;
        let found = Looks {
            sectors: start.shape.sectors,
            block_bytes: start.shape.block_bytes,
            uuid: start.identity.uuid,
        };
        let mut told = lock(&self.told);
        let told = told.get_or_insert(found);
        let may_be_longer = matches!(grow, Grow::To(_) | Grow::Kept);
        if may_be_longer && told.sectors < found.sectors {
            told.sectors = found.sectors;
        }
        if *told != found {
            let told = *told;
            return Err(DiskError::Changed { told, found });
        }
        Running::start(&self.setup, start)
    }

    /// The right to resize the disk; `None` if somebody else has it.
    #[must_use]
    pub fn turn_to_resize(&self) -> Option<MutexGuard<'_, ()>> {
        self.resizing.try_lock().ok()
    }

    /// The disk is to be longer when it is opened the next time. `None`: it has that size.
    ///
    /// # Errors
    /// If it cannot have that size, as far as that can be told while it is open.
    pub fn growth_to(&self, sectors: u64) -> Result<Option<Growth>, ResizeError> {
        let geometry = match &*lock(&self.state) {
            State::Open(running) => running.geometry,
            State::Closed => return Err(ResizeError::Closed),
            State::Changing => return Err(ResizeError::Busy),
        };
        let growth = Growth::of(&geometry, sectors)?;
        if growth.is_some()
            && let Standing::Open(facts) = self.status()
            && facts.keeper.unresolved_extents > 0
        {
            // The guest need not wait to learn that.
            let dirty = facts.keeper.unresolved_extents;
            let refusal = StartError::Grow(GrowError::Dirty { dirty });
            return Err(ResizeError::Kept(refusal.into()));
        }
        let config = &self.setup.config;
        let unwritten = config.read_only && !config.repair;
        if growth.is_some() && (config.record == RecordConfig::None || unwritten) {
            let refusal = StartError::Grow(GrowError::NoRecord);
            return Err(ResizeError::Kept(refusal.into()));
        }
        if growth.is_some() {
            // Nobody asked for that of an attempt after which the disk could not be opened.
            self.take_refusal();
            *lock(&self.grow) = Grow::To(sectors);
        }
        Ok(growth)
    }

    /// Takes back what [`Disk::growth_to`] asked for, if the disk was not opened since.
    pub fn withdraw_growth(&self) -> bool {
        let mut grow = lock(&self.grow);
        let waits = matches!(*grow, Grow::To(_));
        if waits {
            *grow = Grow::No;
        }
        waits
    }

    /// Why the disk did not become longer when it was opened.
    pub fn take_refusal(&self) -> Option<DiskError> {
        lock(&self.refusal).take()
    }

    /// The process ends: whoever waits for locks gives up.
    pub fn give_up(&self) {
        self.given_up.store(true, Ordering::Relaxed);
    }

    /// Set when nothing is to be waited for any more.
    #[must_use]
    pub fn given_up(&self) -> &AtomicBool {
        &self.given_up
    }
}

impl Storage for Disk {
    fn open(&self, given_up: &AtomicBool) -> Result<OpenDisk, OpenFailed> {
        info!("opening the disk");
        self.open_now(given_up)
            .map_err(|error| OpenFailed(Arc::new(error)))
    }

    fn close(&self) {
        let before = std::mem::replace(&mut *lock(&self.state), State::Changing);
        if let State::Open(running) = before {
            running.stop();
        }
        *lock(&self.state) = State::Closed;
    }
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Running {
    /// Starts maintenance and the workers.
    fn start(setup: &DiskSetup, start: Start) -> Result<Self, DiskError> {
        let Start {
            shared,
            replicas,
            options,
            left,
            shape,
            record,
            keeper,
            identity,
        } = start;
        let DiskSetup {
            config,
            reports,
            counters,
            clock,
        } = setup;
        let clock = *clock;
        let count = usize::from(config.workers);
        // One more for the maintenance thread.
        let mailboxes: Vec<Arc<Mailbox<Message>>> = (0..=count)
            .map(|_| Mailbox::new().map(Arc::new))
            .collect::<Result<_, _>>()
            .map_err(DiskError::Mailbox)?;
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
        let mut running = Self {
            mailboxes,
            workers: 0,
            worker_ends,
            maintenance_end,
            workers_stop_limit: config.patience.io_timeout + WORKERS_STOP_MARGIN,
            identity,
            geometry: shared.geometry,
        };
        for index in 0..config.workers {
            let worker = worker::spawn(WorkerSetup {
                index: u8::try_from(index).expect("the configuration allows at most 63 workers"),
                shared: Arc::clone(&shared),
                replicas: replicas.clone(),
                executor,
                polling: config.polling,
                mailboxes: running.mailboxes.clone(),
                reports: reports.clone(),
                counters: counters.worker(usize::from(index)),
                clock,
                ended: ended.clone(),
            });
            match worker {
                Ok(()) => running.workers += 1,
                Err(error) => {
                    running.stop();
                    return Err(error.into());
                }
            }
        }
        Ok(running)
    }

    /// What connections see of it.
    fn open_disk(&self) -> OpenDisk {
        let workers = self.mailboxes[..self.workers].iter();
        let workers = workers.map(|mailbox| Arc::clone(mailbox) as Arc<dyn WorkerMailbox>);
        let maintenance = Arc::clone(self.maintenance_mailbox());
        let disk = OpenDisk::new(
            workers.collect(),
            self.identity,
            began_callback(maintenance),
        );
        disk.with_sectors(self.geometry.sectors())
    }

    fn maintenance_mailbox(&self) -> &Arc<Mailbox<Message>> {
        self.mailboxes.last().expect("maintenance has the last one")
    }

    /// Lets the workers finish what they have and ends them, then closes the record. Connections
    /// have ended before.
    ///
    /// Takes no longer than a limit, whatever hangs: threads that operations keep are left behind
    /// for the end of the process.
    fn stop(self) {
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

/// How long it takes at most to close a disk.
#[must_use]
pub fn stop_limit(config: &Config) -> Duration {
    let workers = config.patience.io_timeout + WORKERS_STOP_MARGIN;
    workers + STOP_LIMIT + MAINTENANCE_STOP_MARGIN
}

/// Tells maintenance how the disk begins, and waits until that is durable.
fn began_callback(maintenance: Arc<Mailbox<Message>>) -> BeganCallback {
    Box::new(move |began| {
        let (ack, durable) = Ack::new();
        maintenance.post(Message::Began(began, ack));
        durable.wait()
    })
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
