// SPDX-License-Identifier: Apache-2.0
//! The device as the crate sees it.
//!
//! It spawns no thread and registers no descriptor with the crate: the workers are ours and
//! outlive the connection, and [`DeviceVring`] tells them what happens to their queues.

use std::io;
use std::sync::{Arc, OnceLock};

use tracing::{debug, info};
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost_user_backend::VhostUserBackend;
use vmm_sys_util::epoll::EventSet;

use super::disk::Device;
use super::mailbox::WorkerGone;
use super::vring::{self, ConnectionMemory, DeviceVring, RingContext};
use super::{GuestBitmap, GuestMemory};

/// The back-end of one connection.
#[derive(Debug)]
pub struct ConnectionBackend {
    context: Arc<RingContext>,
    rings: OnceLock<Vec<DeviceVring>>,
}

impl ConnectionBackend {
    /// The back-end of a new connection to `device`.
    #[must_use]
    pub fn new(device: Arc<Device>) -> Self {
        Self {
            context: Arc::new(RingContext::new(device)),
            rings: OnceLock::new(),
        }
    }

    /// What the rings of this connection share.
    #[must_use]
    pub fn context(&self) -> &Arc<RingContext> {
        &self.context
    }

    /// The rings the crate made for this connection; once, before it handles a message.
    pub fn set_rings(&self, rings: Vec<DeviceVring>) {
        let device = self.context.device();
        device.lifecycle().gate().attach(rings.clone());
        let before = self.rings.set(rings);
        assert!(before.is_ok(), "a connection makes its rings once");
    }

    /// Closes the disk when the front-end has taken the last ring away while it logged: its guest
    /// goes on elsewhere, where the locks are waited for (rule Q5). If it does not, the next ring
    /// that starts opens the disk again.
    fn let_go(&self) {
        let mut gate = self.context.device().lifecycle().gate();
        if self.context.logging().is_wanted()
            && gate.disk().is_some()
            && vring::are_idle(self.rings())
        {
            info!("the guest is being moved: the disk is closed, for who has the guest next");
            gate.close();
        }
    }

    fn rings(&self) -> &[DeviceVring] {
        self.rings.get().map_or(&[], Vec::as_slice)
    }

    /// The end of the connection: everything fetched is completed, then guest memory is let go.
    ///
    /// # Errors
    /// If a worker is gone.
    pub fn shut_down(&self) -> Result<(), WorkerGone> {
        let mut gate = self.context.device().lifecycle().gate();
        gate.attach(Vec::new());
        let stopped = vring::stop_all(self.rings());
        stopped.and(vring::replace_memory(&gate, &Arc::new(GuestMemory::new())))
    }
}

impl VhostUserBackend for ConnectionBackend {
    type Bitmap = GuestBitmap;
    type Vring = DeviceVring;

    fn num_queues(&self) -> usize {
        usize::from(self.context.device().options().queues)
    }

    fn max_queue_size(&self) -> usize {
        usize::from(self.context.device().options().queue_size)
    }

    fn features(&self) -> u64 {
        self.context.device().options().features()
    }

    fn acked_features(&self, features: u64) {
        // The crate takes no error here; a worker that is gone is noticed at the next message that
        // needs it.
        if let Err(error) = vring::set_features(&self.context, self.rings(), features) {
            debug!(%error, "features");
        }
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        self.context.device().options().protocol_features()
    }

    fn reset_device(&self) {
        let _gate = self.context.device().lifecycle().gate();
        // As above.
        if let Err(error) = vring::reset_all(self.rings()) {
            debug!(%error, "reset");
        }
    }

    fn set_event_idx(&self, _enabled: bool) {
        // Follows from the features.
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        self.context.device().config_bytes(offset, size)
    }

    fn set_config(&self, offset: u32, buf: &[u8]) -> io::Result<()> {
        // No field is writable without CONFIG_WCE. A guest that writes one all the same must
        // not cost the connection, which an error would.
        debug!(offset, len = buf.len(), "SET_CONFIG ignored");
        Ok(())
    }

    fn update_memory(&self, _memory: ConnectionMemory) -> io::Result<()> {
        // It is the one of the context.
        self.context.share_memory().map_err(io::Error::other)
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        Vec::new()
    }

    fn stop_vring(&self, queue_index: u32) -> io::Result<()> {
        let ring = usize::try_from(queue_index)
            .ok()
            .and_then(|index| self.rings().get(index));
        let Some(ring) = ring else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        ring.stop().map_err(io::Error::other)?;
        self.let_go();
        Ok(())
    }

    fn handle_event(
        &self,
        _device_event: u16,
        _events: EventSet,
        _vrings: &[DeviceVring],
        _thread_id: usize,
    ) -> io::Result<()> {
        // Never called: there is no thread of the crate to call it.
        Ok(())
    }
}
