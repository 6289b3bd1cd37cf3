// SPDX-License-Identifier: Apache-2.0
//! When the disk behind a device is open, and how that changes under the rings of a connection.
//!
//! ```text
//!          the first ring starts (rule Q5)
//!   Closed ------------------------------> Open
//!     ^    <------------------------------
//!     |     the front-end has taken all rings away while it logged: the guest has gone elsewhere
//!     +--- suspension: all rings drained, closed, something done, open, the rings run again
//! ```
//!
//! Whoever starts, stops or suspends rings, or opens or closes the disk, holds the [`Gate`]: a ring
//! runs only while the disk is open. Opening waits for the locks of others, so it is done by the
//! thread that handles the messages of a connection and never by the control thread.

use std::error::Error;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use thiserror::Error;

use super::disk::{Began, BeganCallback, DiskIdentity};
use super::mailbox::{WorkerGone, WorkerMailbox};
use super::vring::{self, DeviceVring};

/// What is behind a device and can be opened and closed.
pub trait Storage: Send + Sync {
    /// Opens the disk and starts its workers. Waits for locks, but ends soon after `given_up` is
    /// set: nobody needs it any more.
    ///
    /// # Errors
    /// Why it cannot be opened now; nothing stays open.
    fn open(&self, given_up: &AtomicBool) -> Result<OpenDisk, OpenFailed>;

    /// Ends the workers, whose queues have been stopped, closes the disk and gives up its locks.
    fn close(&self);
}

/// A disk that could not be opened. It may be another time.
#[derive(Clone, Debug, Error)]
#[error("the disk cannot be opened")]
pub struct OpenFailed(#[source] pub Arc<dyn Error + Send + Sync>);

/// An open disk: which it is, and the workers that its queues are spread over. Every opening makes
/// another one.
pub struct OpenDisk {
    workers: Vec<Arc<dyn WorkerMailbox>>,
    identity: DiskIdentity,
    /// 0: what the device was made with.
    sectors: u64,
    began: BeganCallback,
    /// What came of telling how it began.
    told: Mutex<Option<Result<(), WorkerGone>>>,
}

impl OpenDisk {
    /// A disk that `workers` serve. `began` is called once, before its first ring starts.
    ///
    /// # Panics
    /// If there is no worker.
    #[must_use]
    pub fn new(
        workers: Vec<Arc<dyn WorkerMailbox>>,
        identity: DiskIdentity,
        began: BeganCallback,
    ) -> Self {
        assert!(!workers.is_empty(), "a device needs a worker");
        Self {
            workers,
            identity,
            sectors: 0,
            began,
            told: Mutex::new(None),
        }
    }

    /// The same with this size: a disk may be longer than when it was opened before (rule Z3).
    #[must_use]
    pub fn with_sectors(self, sectors: u64) -> Self {
        Self { sectors, ..self }
    }

    /// Which disk it is, and which run: an opening is a run of its own (rule R7).
    #[must_use]
    pub fn identity(&self) -> DiskIdentity {
        self.identity
    }

    /// Says how the disk begins to be used, before a ring of it starts. Only the first word since
    /// the disk was opened counts. Returns when what follows from it is durable; not for threads
    /// of the data path.
    ///
    /// # Errors
    /// If nobody is there any more to see to that.
    pub fn begin(&self, began: Began) -> Result<(), WorkerGone> {
        let mut told = lock(&self.told);
        *told.get_or_insert_with(|| (self.began)(began))
    }

    /// The worker that owns queue `queue`.
    #[must_use]
    pub fn worker_of(&self, queue: u16) -> &Arc<dyn WorkerMailbox> {
        &self.workers[usize::from(queue) % self.workers.len()]
    }

    /// All workers.
    #[must_use]
    pub fn workers(&self) -> &[Arc<dyn WorkerMailbox>] {
        &self.workers
    }
}

impl fmt::Debug for OpenDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OpenDisk")
            .field("workers", &self.workers.len())
            .field("identity", &self.identity)
            .finish_non_exhaustive()
    }
}

/// A suspension that did not go well.
#[derive(Clone, Debug, Error)]
pub enum SuspendError {
    /// The disk could not be opened again. The connection ends, and the next ring that starts
    /// tries again.
    #[error(transparent)]
    Open(#[from] OpenFailed),
    /// A worker is gone: the process cannot serve any more.
    #[error(transparent)]
    Worker(#[from] WorkerGone),
}

/// The disk behind a device, open or closed, and the rings that run on it.
pub struct Lifecycle {
    storage: Arc<dyn Storage>,
    state: Mutex<State>,
    /// Apart from the state, which is held while the disk is being opened.
    identity: Mutex<DiskIdentity>,
    /// Of the disk when it was last opened; 0: what the device was made with.
    sectors: AtomicU64,
}

#[derive(Default)]
struct State {
    open: Option<Arc<OpenDisk>>,
    /// Of the connection there is.
    rings: Vec<DeviceVring>,
}

impl Lifecycle {
    /// A disk that `storage` has opened already.
    #[must_use]
    pub fn of_open(storage: Arc<dyn Storage>, open: OpenDisk) -> Self {
        Self {
            storage,
            identity: Mutex::new(open.identity),
            sectors: AtomicU64::new(open.sectors),
            state: Mutex::new(State {
                open: Some(Arc::new(open)),
                rings: Vec::new(),
            }),
        }
    }

    /// A disk that `storage` is to open when the first ring starts. `uuid` is what is known of it;
    /// zeroes if nothing is.
    #[must_use]
    pub fn of_closed(storage: Arc<dyn Storage>, uuid: [u8; 16]) -> Self {
        Self {
            storage,
            identity: Mutex::new(DiskIdentity {
                uuid,
                ..DiskIdentity::NONE
            }),
            state: Mutex::default(),
            sectors: AtomicU64::new(0),
        }
    }

    /// Which disk it is, and which run it is or was last in; of no run if it was never open.
    #[must_use]
    pub fn identity(&self) -> DiskIdentity {
        *lock(&self.identity)
    }

    /// Size of the disk when it was last opened, if that said so.
    #[must_use]
    pub fn sectors(&self) -> Option<u64> {
        let sectors = self.sectors.load(Ordering::Acquire);
        (sectors > 0).then_some(sectors)
    }

    /// Waits until nobody else changes anything. Not for the control thread while there is a
    /// connection: opening may wait for locks.
    #[must_use]
    pub fn gate(&self) -> Gate<'_> {
        Gate {
            lifecycle: self,
            state: lock(&self.state),
        }
    }

    /// Drains all rings that run, closes the disk cleanly, does `work` while nobody has it, opens
    /// it, and lets the same rings run again. The front-end sees nothing of it but delay: its
    /// messages wait meanwhile.
    ///
    /// A disk that is closed stays closed, and `work` is done at once. On a thread of its own: it
    /// takes as long as draining (bounded by the io-timeout), closing and opening do.
    ///
    /// # Errors
    /// If the disk cannot be opened after `work`, which is then done all the same. A connection
    /// with rings that should run is ended, and the next ring that starts tries again.
    pub fn suspended<R>(
        &self,
        given_up: &AtomicBool,
        work: impl FnOnce() -> R,
    ) -> Result<R, SuspendError> {
        let mut gate = self.gate();
        if gate.disk().is_none() {
            return Ok(work());
        }
        let rings = gate.state.rings.clone();
        vring::stop_all(&rings)?;
        gate.close();
        let result = work();
        if let Err(error) = gate.open(given_up) {
            vring::abandon(&rings, &error);
            return Err(error.into());
        }
        vring::start_all(&rings, &mut gate);
        Ok(result)
    }
}

impl fmt::Debug for Lifecycle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lifecycle").finish_non_exhaustive()
    }
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The right to start and stop rings, and to open and close the disk.
pub struct Gate<'a> {
    lifecycle: &'a Lifecycle,
    state: MutexGuard<'a, State>,
}

impl Gate<'_> {
    /// The disk, if it is open.
    #[must_use]
    pub fn disk(&self) -> Option<&Arc<OpenDisk>> {
        self.state.open.as_ref()
    }

    /// The disk, which is opened if it is closed.
    ///
    /// # Errors
    /// If it cannot be opened.
    pub fn open(&mut self, given_up: &AtomicBool) -> Result<Arc<OpenDisk>, OpenFailed> {
        if let Some(open) = &self.state.open {
            return Ok(Arc::clone(open));
        }
        let open = Arc::new(self.lifecycle.storage.open(given_up)?);
        *lock(&self.lifecycle.identity) = open.identity;
        self.lifecycle
            .sectors
            .store(open.sectors, Ordering::Release);
        self.state.open = Some(Arc::clone(&open));
        Ok(open)
    }

    /// Closes the disk, if it is open. No ring runs any more.
    pub fn close(&mut self) {
        if self.state.open.take().is_some() {
            self.lifecycle.storage.close();
        }
    }

    /// Notes the rings of the connection there is now; none when it has ended.
    pub fn attach(&mut self, rings: Vec<DeviceVring>) {
        self.state.rings = rings;
    }
}
