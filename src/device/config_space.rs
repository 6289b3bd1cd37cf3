// SPDX-License-Identifier: Apache-2.0
//! What the disk says of itself: feature bits and `struct virtio_blk_config`
//! (virtio 1.2, sections 5.2.3 and 5.2.4).

use thiserror::Error;
use vhost::vhost_user::message::VhostUserProtocolFeatures;

use super::chain::CHAIN_DESCRIPTORS_MAX;
use super::request::RequestRules;
use crate::units::SECTOR_BYTES;

/// Most sectors in one segment of a discard: 64 MiB. With [`DISCARD_SEGMENTS_MAX`] it bounds the
/// parts of one request: each extent is one, and all are locked until the last is done.
pub const DISCARD_SECTORS_MAX: u32 = 1 << 17;

/// Most segments of a discard.
pub const DISCARD_SEGMENTS_MAX: u32 = 16;

/// Most sectors in one segment of write zeroes, for the same reason.
pub const WRITE_ZEROES_SECTORS_MAX: u32 = 1 << 17;

/// Most segments of write zeroes.
pub const WRITE_ZEROES_SEGMENTS_MAX: u32 = 16;

/// Most bytes of data in one request: 256 MiB. Virtio cannot announce it (SIZE_MAX is per
/// segment, and drivers take its absence for the better); no driver comes near it.
pub const REQUEST_BYTES_MAX: u64 = 1 << 28;

/// Most data segments of a request we announce: what fits, with header and status, in QEMU's
/// default queue of 128. Drivers without indirect descriptors (crosvm's) wait forever for room
/// that a shorter queue never has.
pub const SEGMENTS_MAX: u16 = 126;

/// Length of the serial number of GET_ID (virtio 1.2, section 5.2.6).
pub const SERIAL_BYTES: usize = 20;

/// Most queues: vhost-user names a queue in one byte where it passes descriptors.
pub const QUEUES_MAX: u16 = 256;

/// Largest queue size offered.
pub const QUEUE_SIZE_MAX: u16 = 1024;

/// Smallest queue size offered: header, data and status of one request.
pub const QUEUE_SIZE_MIN: u16 = 4;

/// The longest configuration space a front-end may read (vhost-user: 256 bytes).
pub const CONFIG_BYTES_MAX: usize = 256;

/// Feature bits of virtio, of virtio-blk and of vhost-user, as masks.
pub mod feature {
    /// Data segments in a request are limited by `seg_max`.
    pub const SEG_MAX: u64 = 1 << 2;
    /// The disk cannot be written.
    pub const RO: u64 = 1 << 5;
    /// `blk_size` is valid.
    pub const BLK_SIZE: u64 = 1 << 6;
    /// There is a cache and a command to flush it.
    pub const FLUSH: u64 = 1 << 9;
    /// The topology fields are valid.
    pub const TOPOLOGY: u64 = 1 << 10;
    /// Several queues.
    pub const MQ: u64 = 1 << 12;
    /// Discard.
    pub const DISCARD: u64 = 1 << 13;
    /// Write zeroes.
    pub const WRITE_ZEROES: u64 = 1 << 14;
    /// Writes to guest memory are to be logged (vhost-user, "Migration"): its virtual machine is
    /// being moved elsewhere.
    pub const LOG_ALL: u64 = 1 << 26;
    /// Indirect descriptor tables.
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// `used_event` and `avail_event`.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// vhost-user protocol features can be negotiated.
    pub const PROTOCOL_FEATURES: u64 = 1 << 30;
    /// Not a legacy device.
    pub const VERSION_1: u64 = 1 << 32;
}

/// What is served, as far as the front-end can see it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DeviceOptions {
    /// Sectors of the disk.
    pub sectors: u64,
    /// Logical block size in bytes: 512, 1024, 2048 or 4096.
    pub block_bytes: u32,
    /// Whether guest writes are refused.
    pub read_only: bool,
    /// Serial number: at most [`SERIAL_BYTES`] bytes.
    pub serial: String,
    /// Number of queues, 1 to [`QUEUES_MAX`].
    pub queues: u16,
    /// Largest queue size: a power of two, [`QUEUE_SIZE_MIN`] to [`QUEUE_SIZE_MAX`].
    pub queue_size: u16,
}

/// An option that cannot be served.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum OptionsError {
    /// Not a logical block size.
    #[error("a block size of {block_bytes} bytes is not possible; give 512, 1024, 2048 or 4096")]
    BlockSize {
        /// As given.
        block_bytes: u32,
    },
    /// No whole number of blocks.
    #[error("a disk of {sectors} sectors is empty or no whole number of {block_bytes}-byte blocks")]
    Sectors {
        /// As given.
        sectors: u64,
        /// Logical block size.
        block_bytes: u32,
    },
    /// The serial does not fit.
    #[error("the serial \"{serial}\" has {} bytes; a virtio serial has at most {SERIAL_BYTES}", .serial.len())]
    Serial {
        /// As given.
        serial: String,
    },
    /// Number of queues out of range.
    #[error("{queues} queues are not possible; give 1 to {QUEUES_MAX}")]
    Queues {
        /// As given.
        queues: u16,
    },
    /// Queue size out of range.
    #[error(
        "a queue size of {queue_size} is not possible; give a power of two \
         from {QUEUE_SIZE_MIN} to {QUEUE_SIZE_MAX}"
    )]
    QueueSize {
        /// As given.
        queue_size: u16,
    },
}

impl DeviceOptions {
    /// Checks every option.
    ///
    /// # Errors
    /// The first option that cannot be served.
    pub fn validate(&self) -> Result<(), OptionsError> {
        let block_bytes = self.block_bytes;
        if !matches!(block_bytes, 512 | 1024 | 2048 | 4096) {
            return Err(OptionsError::BlockSize { block_bytes });
        }
        let sectors = self.sectors;
        if sectors == 0 || !sectors.is_multiple_of(u64::from(self.block_sectors())) {
            return Err(OptionsError::Sectors {
                sectors,
                block_bytes,
            });
        }
        if self.serial.len() > SERIAL_BYTES {
            let serial = self.serial.clone();
            return Err(OptionsError::Serial { serial });
        }
        if self.queues == 0 || self.queues > QUEUES_MAX {
            let queues = self.queues;
            return Err(OptionsError::Queues { queues });
        }
        let size = QUEUE_SIZE_MIN..=QUEUE_SIZE_MAX;
        if !self.queue_size.is_power_of_two() || !size.contains(&self.queue_size) {
            let queue_size = self.queue_size;
            return Err(OptionsError::QueueSize { queue_size });
        }
        Ok(())
    }

    /// Sectors in a logical block.
    #[must_use]
    pub fn block_sectors(&self) -> u32 {
        self.block_bytes / u32::try_from(SECTOR_BYTES).expect("512 fits")
    }

    /// The feature bits offered.
    ///
    /// FLUSH is always among them (rule F1): a driver that sees a write-through disk never
    /// flushes. SIZE_MAX and CONFIG_WCE never are.
    #[must_use]
    pub fn features(&self) -> u64 {
        let always = feature::VERSION_1
            | feature::INDIRECT_DESC
            | feature::EVENT_IDX
            | feature::MQ
            | feature::FLUSH
            | feature::BLK_SIZE
            | feature::TOPOLOGY
            | feature::SEG_MAX
            | feature::LOG_ALL
            | feature::PROTOCOL_FEATURES;
        if self.read_only {
            always | feature::RO
        } else {
            always | feature::DISCARD | feature::WRITE_ZEROES
        }
    }

    /// The vhost-user protocol features offered.
    #[must_use]
    pub fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::LOG_SHMFD
            | VhostUserProtocolFeatures::INFLIGHT_SHMFD
            | VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::RESET_DEVICE
    }

    /// The rules for requests of a driver that took `acked_features`.
    #[must_use]
    pub fn rules(&self, acked_features: u64) -> RequestRules {
        let mut serial = [0u8; SERIAL_BYTES];
        serial[..self.serial.len()].copy_from_slice(self.serial.as_bytes());
        RequestRules {
            sectors: self.sectors,
            block_sectors: self.block_sectors(),
            read_only: self.read_only,
            discard: acked_features & feature::DISCARD != 0,
            write_zeroes: acked_features & feature::WRITE_ZEROES != 0,
            serial,
        }
    }

    /// `struct virtio_blk_config`, little-endian, zeroes beyond its last field.
    #[must_use]
    pub fn config_space(&self) -> [u8; CONFIG_BYTES_MAX] {
        let mut space = [0u8; CONFIG_BYTES_MAX];
        let mut put = |at: usize, bytes: &[u8]| space[at..at + bytes.len()].copy_from_slice(bytes);
        let queue_limit = self
            .queue_size
            .min(u16::try_from(CHAIN_DESCRIPTORS_MAX).expect("the longest chain fits in 16 bits"))
            - 2;
        // Physical blocks of 4 KiB: what file systems and media of the replicas write at least.
        let blocks_per_page = 4096 / self.block_bytes;
        let page_shift = u8::try_from(blocks_per_page.trailing_zeros()).expect("at most 3");
        let min_io_blocks = u16::try_from(blocks_per_page).expect("at most 8");
        put(0, &self.sectors.to_le_bytes()); // capacity
        put(12, &u32::from(queue_limit.min(SEGMENTS_MAX)).to_le_bytes()); // seg_max
        put(20, &self.block_bytes.to_le_bytes()); // blk_size
        put(24, &[page_shift]); // physical_block_exp
        put(26, &min_io_blocks.to_le_bytes()); // min_io_size
        put(32, &[1]); // writeback
        put(34, &self.queues.to_le_bytes()); // num_queues
        if !self.read_only {
            put(36, &DISCARD_SECTORS_MAX.to_le_bytes()); // max_discard_sectors
            put(40, &DISCARD_SEGMENTS_MAX.to_le_bytes()); // max_discard_seg
            put(44, &self.block_sectors().to_le_bytes()); // discard_sector_alignment
            put(48, &WRITE_ZEROES_SECTORS_MAX.to_le_bytes()); // max_write_zeroes_sectors
            put(52, &WRITE_ZEROES_SEGMENTS_MAX.to_le_bytes()); // max_write_zeroes_seg
            put(56, &[1]); // write_zeroes_may_unmap
        }
        space
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> DeviceOptions {
        DeviceOptions {
            sectors: 2048,
            block_bytes: 512,
            read_only: false,
            serial: "disk-1".to_owned(),
            queues: 64,
            queue_size: 256,
        }
    }

    #[test]
    fn config_space_fields_are_where_the_specification_has_them() {
        let space = options().config_space();
        assert_eq!(space[0..8], 2048u64.to_le_bytes());
        assert_eq!(space[8..12], [0; 4], "size_max is not offered");
        assert_eq!(space[12..16], 126u32.to_le_bytes());
        assert_eq!(space[20..24], 512u32.to_le_bytes());
        assert_eq!((space[24], space[26], space[32]), (3, 8, 1));
        assert_eq!(space[34..36], 64u16.to_le_bytes());
        assert_eq!(space[36..40], (1u32 << 17).to_le_bytes());
        assert_eq!(space[44..48], 1u32.to_le_bytes());
        assert_eq!(space[56], 1);
        assert_eq!(space[57..], [0; 199]);
    }

    #[test]
    fn read_only_offers_ro_and_nothing_that_writes() {
        let mut options = options();
        options.read_only = true;
        let features = options.features();
        assert_ne!(features & feature::RO, 0);
        assert_eq!(features & (feature::DISCARD | feature::WRITE_ZEROES), 0);
        assert_eq!(options.config_space()[36..], [0; 220]);
        assert_ne!(features & feature::FLUSH, 0);
    }

    #[test]
    fn options_out_of_range_are_refused() {
        assert_eq!(options().validate(), Ok(()));
        type Case = (fn(&mut DeviceOptions), &'static str);
        let cases: [Case; 7] = [
            (|o| o.block_bytes = 513, "block size"),
            (|o| o.sectors = 0, "empty"),
            (|o| (o.sectors, o.block_bytes) = (9, 4096), "whole number"),
            (|o| o.serial = "x".repeat(21), "at most 20"),
            (|o| o.queues = 0, "queues"),
            (|o| o.queue_size = 96, "power of two"),
            (|o| o.queue_size = 2048, "power of two"),
        ];
        for (spoil, text) in cases {
            let mut options = options();
            spoil(&mut options);
            let error = options.validate().unwrap_err();
            assert!(error.to_string().contains(text), "{error}");
        }
    }
}
