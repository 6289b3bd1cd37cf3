// SPDX-License-Identifier: Apache-2.0
//! Our private page behind the regions of an in-flight buffer: whose buffer it is (rule Q2).
//!
//! ```text
//!   0  [u8; 8]  "QBLKINFL"
//!   8  u32      version: 1
//!  12  u16      queues
//!  14  u16      queue size
//!  16  [u8; 16] UUID of the disk; zeroes: it has no record
//!  32  u32      CRC-32C of bytes 0 to 31
//!  36  u32      0
//!  40  [u8; 16] run whose rings were last started with the buffer; zeroes: none
//!  56  u32      CRC-32C of bytes 40 to 55
//!  60  u32      0
//! ```
//!
//! Little-endian, zeroes up to the end of the page. The run changes while the rest stays, so it
//! has a checksum of its own: a kill while it is written leaves a page that says nothing, which
//! is a cold start and never a wrong warm one.

use crc_fast::{CrcAlgorithm, checksum};

use super::layout::Shape;
use super::mapping::Mapping;
use crate::device::disk::DiskIdentity;

const MAGIC: [u8; 8] = *b"QBLKINFL";
const VERSION: u32 = 1;
const CONSTANT_BYTES: usize = 32;
const RUN_AT: usize = 40;

/// What a private page says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Page {
    /// What the buffer was made for.
    pub shape: Shape,
    /// Of which disk; zeroes: of one without a record.
    pub uuid: [u8; 16],
    /// The run whose rings were last started with it; zeroes: of none.
    pub run: [u8; 16],
}

impl Page {
    /// Reads the page at `at`; `None` if it is none of ours or damaged.
    pub fn read(mapping: &Mapping, at: usize) -> Option<Self> {
        let constant: [u8; CONSTANT_BYTES] = mapping.read(at);
        let sum = u32::from_le_bytes(mapping.read(at + CONSTANT_BYTES));
        let known = constant[..8] == MAGIC
            && constant[8..12] == VERSION.to_le_bytes()
            && sum == crc32c(&constant);
        if !known {
            return None;
        }
        let run: [u8; 16] = mapping.read(at + RUN_AT);
        let sum = u32::from_le_bytes(mapping.read(at + RUN_AT + 16));
        Some(Self {
            shape: Shape {
                queues: u16::from_le_bytes([constant[12], constant[13]]),
                queue_size: u16::from_le_bytes([constant[14], constant[15]]),
            },
            uuid: *constant[16..].first_chunk().expect("32 less 16"),
            run: if sum == crc32c(&run) { run } else { [0; 16] },
        })
    }

    /// Writes the page at `at`.
    pub fn write(&self, mapping: &Mapping, at: usize) {
        // First nobody's: what is torn must not give this disk's page an older run.
        mapping.write(at + RUN_AT, &[0; 16]);
        let mut constant = [0; CONSTANT_BYTES];
        constant[..8].copy_from_slice(&MAGIC);
        constant[8..12].copy_from_slice(&VERSION.to_le_bytes());
        constant[12..14].copy_from_slice(&self.shape.queues.to_le_bytes());
        constant[14..16].copy_from_slice(&self.shape.queue_size.to_le_bytes());
        constant[16..].copy_from_slice(&self.uuid);
        mapping.write(at, &constant);
        mapping.write(at + CONSTANT_BYTES, &crc32c(&constant).to_le_bytes());
        mapping.write(at + RUN_AT, &self.run);
        mapping.write(at + RUN_AT + 16, &crc32c(&self.run).to_le_bytes());
    }

    /// Whether the buffer is of another disk. One without a record is any.
    pub fn is_of_another(&self, disk: DiskIdentity) -> bool {
        let known = self.uuid != [0; 16] && disk.uuid != [0; 16];
        known && self.uuid != disk.uuid
    }

    /// Whether its marks are all that was in flight when the disk was last used.
    pub fn is_of_last_run(&self, disk: DiskIdentity) -> bool {
        disk.uuid != [0; 16]
            && self.uuid == disk.uuid
            && self.run != [0; 16]
            && (self.run == disk.run || self.run == disk.previous_run)
    }
}

fn crc32c(bytes: &[u8]) -> u32 {
    u32::try_from(checksum(CrcAlgorithm::Crc32Iscsi, bytes)).expect("a CRC-32 has 32 bits")
}
