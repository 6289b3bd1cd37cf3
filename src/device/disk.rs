// SPDX-License-Identifier: Apache-2.0
//! The device that is served: what every connection to it shares.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use super::config_space::{CONFIG_BYTES_MAX, DeviceOptions, OptionsError};
use super::mailbox::{WorkerGone, WorkerMailbox};
use super::queue::PublishOrder;

/// Tells one disk from another, and one run of the daemon from another: what an in-flight buffer
/// is marked with (rule Q2). All zeroes: the disk remembers nothing of itself, and every start is
/// cold.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct DiskIdentity {
    /// UUID of the disk, from its record.
    pub uuid: [u8; 16],
    /// Random bytes of this run, from which the ids of all its epochs derive (rule R7). Not the
    /// epoch itself: that may rise during a run.
    pub run: [u8; 16],
    /// Those of the run before, as its last epoch in the record has them.
    pub previous_run: [u8; 16],
}

impl DiskIdentity {
    /// No record: nothing can be told.
    pub const NONE: Self = Self {
        uuid: [0; 16],
        run: [0; 16],
        previous_run: [0; 16],
    };
}

/// How a disk begins to be used after it was opened (CONSISTENCY section 1).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Began {
    /// The front-end brought back the buffer of the run before: whatever was in flight at its end
    /// is executed again.
    Warm,
    /// It did not: what was in flight is lost, or nobody knows of it.
    Cold,
}

/// Takes the news of how the disk begins. Returns when what follows from it is durable: only then
/// may the buffer of the front-end be marked as one of this run (a run that dies before must
/// leave a buffer behind that is still cold).
pub type BeganCallback = Box<dyn Fn(Began) -> Result<(), WorkerGone> + Send + Sync>;

/// One virtual disk as front-ends see it, and the workers behind it. Outlives connections.
pub struct Device {
    options: Arc<DeviceOptions>,
    config_space: [u8; CONFIG_BYTES_MAX],
    order: PublishOrder,
    workers: Vec<Arc<dyn WorkerMailbox>>,
    identity: DiskIdentity,
    began: BeganCallback,
    /// What was told of how it began.
    told: Mutex<Option<Result<(), WorkerGone>>>,
}

impl Device {
    /// A device with these options, whose queues are spread over `workers`. `order` is for queues
    /// whose front-end does not track what is in flight. `began` is called once, before the first
    /// ring starts.
    ///
    /// # Errors
    /// The first option that cannot be served.
    ///
    /// # Panics
    /// If there is no worker.
    pub fn new(
        options: DeviceOptions,
        order: PublishOrder,
        workers: Vec<Arc<dyn WorkerMailbox>>,
        identity: DiskIdentity,
        began: BeganCallback,
    ) -> Result<Self, OptionsError> {
        assert!(!workers.is_empty(), "a device needs a worker");
        options.validate()?;
        Ok(Self {
            config_space: options.config_space(),
            options: Arc::new(options),
            order,
            workers,
            identity,
            began,
            told: Mutex::new(None),
        })
    }

    /// Which disk it is, and which run of the daemon.
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
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        *told.get_or_insert_with(|| (self.began)(began))
    }

    /// What is served.
    #[must_use]
    pub fn options(&self) -> &Arc<DeviceOptions> {
        &self.options
    }

    /// In which order completions of queues are published whose front-end does not track what
    /// is in flight.
    #[must_use]
    pub fn order(&self) -> PublishOrder {
        self.order
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

    /// `size` bytes of the configuration space from `offset` on, zeroes beyond its end.
    #[must_use]
    pub fn config_bytes(&self, offset: u32, size: u32) -> Vec<u8> {
        let offset = offset as usize;
        let mut bytes = vec![0u8; size as usize];
        let known = self.config_space.get(offset..).unwrap_or_default();
        let count = known.len().min(bytes.len());
        bytes[..count].copy_from_slice(&known[..count]);
        bytes
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Device")
            .field("options", &self.options)
            .field("order", &self.order)
            .field("workers", &self.workers.len())
            .field("identity", &self.identity)
            .finish_non_exhaustive()
    }
}
