// SPDX-License-Identifier: Apache-2.0
//! What a sector holds: 512 real bytes that spell one number over and over.
//!
//! The number is the version of a write and the sector it was meant for, so that content tells
//! who wrote it and where it belongs. Zero is a sector that was never written, or zeroed.

pub const SECTOR_LEN: usize = 512;

/// Bits of a number that name the sector.
const SECTOR_BITS: u32 = 12;

/// Set in content that no write ever had.
const GARBLED: u64 = 1 << 63;

/// The content of `sector` after write number `version`.
pub fn written(version: u64, sector: u64) -> u64 {
    assert!(sector < 1 << SECTOR_BITS);
    (version << SECTOR_BITS) | sector
}

/// Content that is nobody's.
pub fn garbled(random: u64) -> u64 {
    random | GARBLED
}

/// The write that left this content in this sector; `None` if none could have.
pub fn version_of(value: u64, sector: u64) -> Option<u64> {
    let here = value & ((1 << SECTOR_BITS) - 1) == sector;
    (value & GARBLED == 0 && here).then_some(value >> SECTOR_BITS)
}

pub fn fill_sector(sector: &mut [u8], value: u64) {
    let word = value.to_le_bytes();
    for place in sector.chunks_exact_mut(8) {
        place.copy_from_slice(&word);
    }
}

/// The number in a sector. One that mixes several is garbled.
pub fn sector_value(sector: &[u8]) -> u64 {
    let first: [u8; 8] = sector[..8].try_into().expect("eight bytes");
    // Equal to itself moved by one word: every word is equal.
    if sector[8..] == sector[..SECTOR_LEN - 8] {
        u64::from_le_bytes(first)
    } else {
        garbled(u64::from_le_bytes(first))
    }
}
