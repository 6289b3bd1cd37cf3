// SPDX-License-Identifier: Apache-2.0
//! Numbers in a block, little-endian (rule R2), and its checksum.

use super::layout::Block;

/// Reads the fields of a block one after the other. Offsets are constants of the format, so no
/// block can make it read outside.
pub(super) struct Reader<'a> {
    block: &'a Block,
    at: usize,
}

impl<'a> Reader<'a> {
    pub fn new(block: &'a Block, at: usize) -> Self {
        Self { block, at }
    }

    /// The next `LEN` bytes.
    pub fn bytes<const LEN: usize>(&mut self) -> [u8; LEN] {
        let bytes = &self.block[self.at..self.at + LEN];
        self.at += LEN;
        bytes.try_into().expect("as long as it was cut")
    }

    pub fn u8(&mut self) -> u8 {
        u8::from_le_bytes(self.bytes())
    }

    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.bytes())
    }

    pub fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.bytes())
    }

    pub fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.bytes())
    }

    pub fn i64(&mut self) -> i64 {
        i64::from_le_bytes(self.bytes())
    }

    pub fn at(&self) -> usize {
        self.at
    }
}

/// Writes the fields of a block one after the other.
pub(super) struct Writer<'a> {
    block: &'a mut Block,
    at: usize,
}

impl<'a> Writer<'a> {
    pub fn new(block: &'a mut Block, at: usize) -> Self {
        Self { block, at }
    }

    pub fn bytes(&mut self, bytes: &[u8]) {
        self.block[self.at..self.at + bytes.len()].copy_from_slice(bytes);
        self.at += bytes.len();
    }

    pub fn u8(&mut self, value: u8) {
        self.bytes(&[value]);
    }

    pub fn u16(&mut self, value: u16) {
        self.bytes(&value.to_le_bytes());
    }

    pub fn u32(&mut self, value: u32) {
        self.bytes(&value.to_le_bytes());
    }

    pub fn u64(&mut self, value: u64) {
        self.bytes(&value.to_le_bytes());
    }

    pub fn i64(&mut self, value: i64) {
        self.bytes(&value.to_le_bytes());
    }

    pub fn at(&self) -> usize {
        self.at
    }
}

/// CRC-32C (Castagnoli) of the block as if the four bytes at `crc_at` were zero.
pub(super) fn checksum(block: &Block, crc_at: usize) -> u32 {
    let mut digest = crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc32Iscsi);
    digest.update(&block[..crc_at]);
    digest.update(&[0; 4]);
    digest.update(&block[crc_at + 4..]);
    u32::try_from(digest.finalize()).expect("a checksum of 32 bits")
}

/// Puts the checksum where it belongs. Everything else must be in place.
pub(super) fn seal(block: &mut Block, crc_at: usize) {
    let crc = checksum(block, crc_at);
    block[crc_at..crc_at + 4].copy_from_slice(&crc.to_le_bytes());
}

/// Whether the block holds the checksum of the rest of it.
pub(super) fn is_sealed(block: &Block, crc_at: usize) -> bool {
    Reader::new(block, crc_at).u32() == checksum(block, crc_at)
}

#[cfg(test)]
mod tests {
    /// The check value every catalogue of checksums gives for CRC-32C, so that others can read us.
    #[test]
    fn checksum_is_castagnoli() {
        let mut digest = crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc32Iscsi);
        digest.update(b"123456789");
        assert_eq!(digest.finalize(), 0xE306_9283);
    }
}
