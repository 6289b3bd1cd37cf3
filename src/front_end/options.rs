// SPDX-License-Identifier: Apache-2.0
//! What a front-end asks for, and whose manners it has.

use std::time::Duration;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ,
    VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

/// Virtio feature bits a front-end may want, as masks.
pub mod features {
    use super::{
        VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ,
        VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY,
        VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_F_VERSION_1, VIRTIO_RING_F_EVENT_IDX,
        VIRTIO_RING_F_INDIRECT_DESC,
    };

    /// Segments have a longest length.
    pub const SIZE_MAX: u64 = 1 << VIRTIO_BLK_F_SIZE_MAX;
    /// Requests have a largest number of segments.
    pub const SEG_MAX: u64 = 1 << VIRTIO_BLK_F_SEG_MAX;
    /// The disk cannot be written.
    pub const RO: u64 = 1 << VIRTIO_BLK_F_RO;
    /// The logical block size is told.
    pub const BLK_SIZE: u64 = 1 << VIRTIO_BLK_F_BLK_SIZE;
    /// Flush requests.
    pub const FLUSH: u64 = 1 << VIRTIO_BLK_F_FLUSH;
    /// The topology is told.
    pub const TOPOLOGY: u64 = 1 << VIRTIO_BLK_F_TOPOLOGY;
    /// Several queues.
    pub const MQ: u64 = 1 << VIRTIO_BLK_F_MQ;
    /// Discard requests.
    pub const DISCARD: u64 = 1 << VIRTIO_BLK_F_DISCARD;
    /// Write zeroes requests.
    pub const WRITE_ZEROES: u64 = 1 << VIRTIO_BLK_F_WRITE_ZEROES;
    /// Descriptor tables outside the ring.
    pub const INDIRECT: u64 = 1 << VIRTIO_RING_F_INDIRECT_DESC;
    /// Interrupts and kicks by index.
    pub const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;
    /// The device follows virtio 1.
    pub const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;

    /// What a Linux driver takes.
    pub const LINUX: u64 = SEG_MAX
        | RO
        | BLK_SIZE
        | FLUSH
        | TOPOLOGY
        | MQ
        | DISCARD
        | WRITE_ZEROES
        | INDIRECT
        | EVENT_IDX
        | VERSION_1;

    /// What a boot firmware takes: one request at a time, nothing it could do without.
    pub const FIRMWARE: u64 = BLK_SIZE | VERSION_1;
}

/// The order of the messages that start and stop the device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Manners {
    /// Replies are asked for where they matter; number, base, address and kick of a ring, then
    /// the next; all are enabled at the end.
    Qemu,
    /// A reply to nearly every message; all ring sizes first; a ring is told its base after its
    /// addresses.
    CloudHypervisor,
}

/// The message by which the back-end learns of the guest memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MemoryBy {
    /// One SET_MEM_TABLE with all regions.
    Table,
    /// An ADD_MEM_REG for each region, where the back-end knows it, else SET_MEM_TABLE.
    Regions,
}

/// What a front-end asks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Options {
    /// Number of queues to set up, at least 1.
    pub queues: u16,
    /// Entries of each ring. The specification wants a power of two up to 32768; nothing is
    /// checked here.
    pub queue_size: u16,
    /// Virtio features to accept of those offered; see [`features`].
    pub features: u64,
    /// Guest memory in bytes, shared out evenly among the queues.
    pub memory_bytes: u64,
    /// How the back-end is told of the memory.
    pub memory_by: MemoryBy,
    /// Order of messages.
    pub manners: Manners,
    /// Whether rings get a call descriptor. Without, the used rings are polled.
    pub call: bool,
    /// Whether to ask for an in-flight buffer if the back-end has them.
    pub inflight: bool,
    /// Index at which the available and used rings begin.
    pub first_index: u16,
    /// What SET_VRING_BASE says, if that shall not be the truth.
    pub wrong_base: Option<u16>,
    /// How long to wait for an answer or a completion.
    pub timeout: Duration,
}

impl Default for Options {
    /// One queue as QEMU and Linux would set it up.
    fn default() -> Self {
        Self {
            queues: 1,
            queue_size: 256,
            features: features::LINUX,
            memory_bytes: 64 << 20,
            memory_by: MemoryBy::Regions,
            manners: Manners::Qemu,
            call: true,
            inflight: true,
            first_index: 0,
            wrong_base: None,
            timeout: Duration::from_secs(10),
        }
    }
}

impl Options {
    /// One queue as cloud-hypervisor would set it up.
    #[must_use]
    pub fn cloud_hypervisor() -> Self {
        Self {
            memory_by: MemoryBy::Table,
            manners: Manners::CloudHypervisor,
            ..Self::default()
        }
    }
}
