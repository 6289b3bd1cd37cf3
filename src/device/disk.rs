// SPDX-License-Identifier: Apache-2.0
//! The device that is served: what every connection to it shares.

use std::fmt;
use std::sync::Arc;

use super::config_space::{DeviceOptions, OptionsError};
use super::front_end_line::FrontEndLine;
use super::lifecycle::Lifecycle;
use super::mailbox::WorkerGone;
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

/// One virtual disk as front-ends see it, and what is behind it. Outlives connections.
pub struct Device {
    /// As it was made; its disk may be longer since.
    options: DeviceOptions,
    line: FrontEndLine,
    order: PublishOrder,
    lifecycle: Lifecycle,
}

impl Device {
    /// A device with these options, and the disk behind it, open or closed.
    ///
    /// # Errors
    /// The first option that cannot be served.
    pub fn new(
        options: DeviceOptions,
        order: PublishOrder,
        lifecycle: Lifecycle,
    ) -> Result<Self, OptionsError> {
        options.validate()?;
        Ok(Self {
            options,
            line: FrontEndLine::default(),
            order,
            lifecycle,
        })
    }

    /// Which disk it is, and which run it is or was last in; of no run if it was never open.
    #[must_use]
    pub fn identity(&self) -> DiskIdentity {
        self.lifecycle.identity()
    }

    /// What is served.
    #[must_use]
    pub fn options(&self) -> Arc<DeviceOptions> {
        let sectors = self.lifecycle.sectors().unwrap_or(self.options.sectors);
        Arc::new(DeviceOptions {
            sectors,
            ..self.options.clone()
        })
    }

    /// Where the front-end there is can be told something.
    #[must_use]
    pub fn line(&self) -> &FrontEndLine {
        &self.line
    }

    /// In which order completions of queues are published whose front-end does not track what
    /// is in flight.
    #[must_use]
    pub fn order(&self) -> PublishOrder {
        self.order
    }

    /// The disk behind it.
    #[must_use]
    pub fn lifecycle(&self) -> &Lifecycle {
        &self.lifecycle
    }

    /// `size` bytes of the configuration space from `offset` on, zeroes beyond its end.
    #[must_use]
    pub fn config_bytes(&self, offset: u32, size: u32) -> Vec<u8> {
        let offset = offset as usize;
        let mut bytes = vec![0u8; size as usize];
        let config_space = self.options().config_space();
        let known = config_space.get(offset..).unwrap_or_default();
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
            .finish_non_exhaustive()
    }
}
