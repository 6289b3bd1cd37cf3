// SPDX-License-Identifier: Apache-2.0
//! A page of bits on disk: 32 bytes of header, 4064 bytes of bits (rule R4).

use super::error::FormatError;
use super::fields::{Reader, Writer, is_sealed, seal};
use super::layout::{BLOCK_BYTES, Block};
use super::superblock::{DiskUuid, SEQUENCE_MAX};
use crate::quorum::{PAGE_WORDS, PageBits, PageName};

/// First bytes of a page: `QPAG`.
const MAGIC: u32 = u32::from_le_bytes(*b"QPAG");

/// Where the checksum is.
pub(super) const PAGE_CRC_AT: usize = 28;

/// Bytes before the bits.
pub(super) const PAGE_HEADER_BYTES: usize = 32;

const _: () = assert!(PAGE_HEADER_BYTES + PAGE_WORDS * 8 == BLOCK_BYTES);

/// One image of a page. Later images of a page have larger sequences.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PageImage {
    /// Which page.
    pub name: PageName,
    /// Order among the images of this page.
    pub sequence: u64,
    /// Bit `e % 64` of word `e / 64` is extent `page * 32512 + e`.
    pub bits: Box<PageBits>,
}

impl PageImage {
    /// The block to write for a page of disk `disk`.
    #[must_use]
    pub fn encode(&self, disk: DiskUuid) -> Block {
        let mut block = [0; BLOCK_BYTES];
        encode_into(&mut block, self.name, self.sequence, &self.bits, disk);
        block
    }

    /// Reads page `name` of disk `disk`.
    ///
    /// # Errors
    /// If the block is torn, damaged, empty, or belongs elsewhere.
    pub fn decode(block: &Block, name: PageName, disk: DiskUuid) -> Result<Self, FormatError> {
        let sequence = decode_header(block, name, disk)?;
        let mut bits = Box::new([0; PAGE_WORDS]);
        decode_bits(block, |word, value| bits[word] = value);
        Ok(Self {
            name,
            sequence,
            bits,
        })
    }
}

/// [`PageImage::encode`] in place.
pub(super) fn encode_into(
    block: &mut Block,
    name: PageName,
    sequence: u64,
    bits: &PageBits,
    disk: DiskUuid,
) {
    let mut writer = Writer::new(block, 0);
    writer.u32(MAGIC);
    writer.u16(u16::try_from(name.bitmap.number()).expect("at most 17 maps"));
    writer.u16(0);
    writer.u32(u32::try_from(name.page).expect("at most 33 pages"));
    writer.u64(disk.low());
    writer.u64(sequence);
    writer.u32(0);
    debug_assert_eq!(writer.at(), PAGE_HEADER_BYTES);
    for word in bits {
        writer.u64(*word);
    }
    seal(block, PAGE_CRC_AT);
}

/// Checks a block and returns its sequence.
pub(super) fn decode_header(
    block: &Block,
    name: PageName,
    disk: DiskUuid,
) -> Result<u64, FormatError> {
    let mut reader = Reader::new(block, 0);
    if reader.u32() != MAGIC {
        return Err(FormatError::Magic);
    }
    if !is_sealed(block, PAGE_CRC_AT) {
        return Err(FormatError::Checksum);
    }
    let (kind, reserved, page) = (reader.u16(), reader.u16(), reader.u32());
    if usize::from(kind) != name.bitmap.number() || usize::try_from(page) != Ok(name.page) {
        return Err(FormatError::Misplaced);
    }
    if reserved != 0 {
        return Err(FormatError::Field { field: "reserved" });
    }
    if reader.u64() != disk.low() {
        return Err(FormatError::OtherDisk);
    }
    let sequence = reader.u64();
    if !(1..=SEQUENCE_MAX).contains(&sequence) {
        return Err(FormatError::Field { field: "sequence" });
    }
    Ok(sequence)
}

/// Hands over the words of a block that was checked.
pub(super) fn decode_bits(block: &Block, mut word: impl FnMut(usize, u64)) {
    let mut reader = Reader::new(block, PAGE_HEADER_BYTES);
    for index in 0..PAGE_WORDS {
        word(index, reader.u64());
    }
}
