// SPDX-License-Identifier: Apache-2.0
//! The configuration space of a virtio block device (virtio 1.2, section 5.2.4).

use super::error::FrontEndError;

/// Bytes of the configuration space up to the end of the write zeroes fields.
pub const CONFIG_BYTES: u32 = 60;

/// The fields, in the order of the specification. A field whose feature bit is not offered means
/// nothing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Config {
    /// Size of the disk in sectors of 512 bytes.
    pub capacity_sectors: u64,
    /// Longest segment in bytes.
    pub size_max: u32,
    /// Most segments in a request.
    pub seg_max: u32,
    /// Logical block size in bytes.
    pub blk_size: u32,
    /// Logical blocks in a physical block, as a power of two.
    pub physical_block_exp: u8,
    /// Offset of the first aligned logical block.
    pub alignment_offset: u8,
    /// Smallest reasonable request in logical blocks.
    pub min_io_size: u16,
    /// Best request size in logical blocks.
    pub opt_io_size: u32,
    /// Cache mode: 1 is write-back.
    pub writeback: u8,
    /// Number of request queues.
    pub num_queues: u16,
    /// Most sectors in one discard segment.
    pub max_discard_sectors: u32,
    /// Most segments in a discard request.
    pub max_discard_seg: u32,
    /// Alignment of discards in sectors.
    pub discard_sector_alignment: u32,
    /// Most sectors in one write zeroes segment.
    pub max_write_zeroes_sectors: u32,
    /// Most segments in a write zeroes request.
    pub max_write_zeroes_seg: u32,
    /// 1: write zeroes with the unmap flag may deallocate.
    pub write_zeroes_may_unmap: u8,
}

impl Config {
    /// Reads the fields from the first [`CONFIG_BYTES`] bytes of the configuration space.
    ///
    /// # Errors
    /// If there are fewer bytes.
    pub fn parse(bytes: &[u8]) -> Result<Self, FrontEndError> {
        let needed = CONFIG_BYTES as usize;
        if bytes.len() < needed {
            return Err(FrontEndError::ShortConfig {
                bytes: bytes.len(),
                needed,
            });
        }
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let u32_at = |at: usize| u32::from(u16_at(at)) | u32::from(u16_at(at + 2)) << u16::BITS;
        Ok(Self {
            capacity_sectors: u64::from(u32_at(0)) | u64::from(u32_at(4)) << u32::BITS,
            size_max: u32_at(8),
            seg_max: u32_at(12),
            blk_size: u32_at(20),
            physical_block_exp: bytes[24],
            alignment_offset: bytes[25],
            min_io_size: u16_at(26),
            opt_io_size: u32_at(28),
            writeback: bytes[32],
            num_queues: u16_at(34),
            max_discard_sectors: u32_at(36),
            max_discard_seg: u32_at(40),
            discard_sector_alignment: u32_at(44),
            max_write_zeroes_sectors: u32_at(48),
            max_write_zeroes_seg: u32_at(52),
            write_zeroes_may_unmap: bytes[56],
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn config_fields_have_their_offsets() {
        let mut bytes = [0; 60];
        bytes[0] = 7;
        bytes[4] = 1;
        bytes[20..24].copy_from_slice(&4096u32.to_le_bytes());
        bytes[34] = 64;
        bytes[56] = 1;
        let config = Config::parse(&bytes).unwrap();
        assert_eq!(config.capacity_sectors, (1 << 32) + 7);
        assert_eq!(config.blk_size, 4096);
        assert_eq!(config.num_queues, 64);
        assert_eq!(config.write_zeroes_may_unmap, 1);
        assert!(Config::parse(&bytes[..59]).is_err());
    }
}
