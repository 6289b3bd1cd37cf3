// SPDX-License-Identifier: Apache-2.0
//! The virtio-blk and vhost-user side: everything between the front-end's socket, guest memory
//! and a worker. Knows nothing of replicas.
//!
//! - [`chain`], [`request`]: a descriptor chain of a hostile guest becomes a [`GuestRequest`].
//! - [`config_space`]: features and configuration the guest sees.
//! - [`queue`]: a [`VirtQueue`], owned by one worker: fetch, complete, publish.
//! - [`inflight`]: what is in flight, remembered by the front-end while we are killed.
//! - [`notify`]: the eventfds of a queue.
//! - [`mailbox`]: how the threads of a connection tell workers what to do.
//! - [`vring`], [`backend`]: the crate's view of rings and device, turned into commands.
//! - [`message`], [`shim`]: what a front-end may send.
//! - [`front_end_line`]: what we may tell a front-end.
//! - [`dirty_log`]: which pages of guest memory were written, for live migration.
//! - [`disk`], [`lifecycle`], [`connection`]: the served device; when the disk behind it is open;
//!   one front-end from connect to disconnect.

pub mod backend;
pub mod chain;
pub mod config_space;
pub mod connection;
pub mod dirty_log;
pub mod disk;
pub mod front_end_line;
#[doc(hidden)]
pub mod fuzzing;
pub mod inflight;
pub mod lifecycle;
pub mod mailbox;
pub mod message;
pub mod notify;
pub mod queue;
pub mod request;
pub mod shim;
#[cfg(test)]
mod test_support;
pub mod vring;

pub use config_space::{DeviceOptions, OptionsError};
pub use connection::{Connection, ConnectionEnd, ConnectionHandle};
pub use dirty_log::GuestBitmap;
pub use disk::{Began, BeganCallback, Device, DiskIdentity};
pub use front_end_line::Told;
pub use lifecycle::{Lifecycle, OpenDisk, OpenFailed, Storage, SuspendError};
pub use mailbox::{Ack, Mailbox, QueueCommand, WorkerMailbox};
pub use notify::{Call, Kick};
pub use queue::{Fetched, PublishOrder, QueueSetup, Ticket, VirtQueue};
pub use request::{BlockStatus, GuestRequest, RequestKind, Segment};

/// The guest memory a worker sees: a snapshot that stays mapped as long as it is held.
pub type GuestMemory = vm_memory::GuestMemoryMmap<GuestBitmap>;
