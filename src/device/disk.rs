// SPDX-License-Identifier: Apache-2.0
//! The device that is served: what every connection to it shares.

use std::sync::Arc;

use super::config_space::{CONFIG_BYTES_MAX, DeviceOptions, OptionsError};
use super::mailbox::WorkerMailbox;
use super::queue::PublishOrder;

/// One virtual disk as front-ends see it, and the workers behind it. Outlives connections.
pub struct Device {
    options: Arc<DeviceOptions>,
    config_space: [u8; CONFIG_BYTES_MAX],
    order: PublishOrder,
    workers: Vec<Arc<dyn WorkerMailbox>>,
}

impl Device {
    /// A device with these options, whose queues are spread over `workers`.
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
    ) -> Result<Self, OptionsError> {
        assert!(!workers.is_empty(), "a device needs a worker");
        options.validate()?;
        Ok(Self {
            config_space: options.config_space(),
            options: Arc::new(options),
            order,
            workers,
        })
    }

    /// What is served.
    #[must_use]
    pub fn options(&self) -> &Arc<DeviceOptions> {
        &self.options
    }

    /// In which order completions are published.
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

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Device")
            .field("options", &self.options)
            .field("order", &self.order)
            .field("workers", &self.workers.len())
            .finish_non_exhaustive()
    }
}
