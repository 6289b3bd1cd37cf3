// SPDX-License-Identifier: Apache-2.0
//! The device that is served: what every connection to it shares.

use std::sync::Arc;

use super::config_space::{CONFIG_BYTES_MAX, DeviceOptions, OptionsError};
use super::lifecycle::Lifecycle;
use super::queue::PublishOrder;

/// One virtual disk as front-ends see it, and what is behind it. Outlives connections.
pub struct Device {
    options: Arc<DeviceOptions>,
    config_space: [u8; CONFIG_BYTES_MAX],
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
            config_space: options.config_space(),
            options: Arc::new(options),
            order,
            lifecycle,
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
            .finish_non_exhaustive()
    }
}
