// SPDX-License-Identifier: Apache-2.0
//! What the disk must hold: a function of seed, pass and sector, so that nothing need be
//! remembered and a sector from the wrong place is never right.

use crate::units::{SECTOR_BYTES, SECTOR_LEN, SectorRange};

/// A xorshift generator; good enough for data that no compressor or stuck bit gets right.
#[derive(Clone, Debug)]
pub(super) struct Random(u64);

impl Random {
    /// The sequence that belongs to `seed`.
    pub(super) fn new(seed: u64) -> Self {
        // Neighbouring seeds must not begin alike, and zero is the one state without successor.
        let mixed = (seed ^ (seed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        Self((mixed ^ (mixed >> 31)) | 1)
    }

    /// The next number.
    pub(super) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// A number below `bound`, which is not 0.
    pub(super) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    /// Puts `items` into a random order.
    pub(super) fn shuffle<T>(&mut self, items: &mut [T]) {
        for at in (1..items.len()).rev() {
            let bound = u64::try_from(at + 1).expect("lengths have at most 64 bits");
            let other = usize::try_from(self.below(bound)).expect("below a length");
            items.swap(at, other);
        }
    }
}

/// The content of the disk.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pattern {
    seed: u64,
}

impl Pattern {
    /// The content that belongs to `seed`.
    pub(super) fn new(seed: u64) -> Self {
        Self { seed }
    }

    /// The bytes of `range`.
    pub(super) fn bytes(self, range: SectorRange) -> Vec<u8> {
        let mut bytes = vec![0; range.len_bytes()];
        for (sector, chunk) in (range.start()..).zip(bytes.chunks_exact_mut(SECTOR_LEN)) {
            let mut random = Random::new(self.seed.wrapping_mul(0x1_0000_01b3) ^ sector);
            for word in chunk.chunks_exact_mut(8) {
                word.copy_from_slice(&random.next().to_le_bytes());
            }
        }
        bytes
    }

    /// The first sector of `range` whose bytes in `bytes` are not the right ones.
    pub(super) fn first_wrong(self, range: SectorRange, bytes: &[u8]) -> Option<u64> {
        let right = self.bytes(range);
        if right == bytes {
            return None;
        }
        let differs = right.iter().zip(bytes).position(|(a, b)| a != b);
        let at = differs.unwrap_or_else(|| bytes.len().min(right.len()));
        let at = u64::try_from(at).expect("lengths have at most 64 bits");
        Some(range.start() + at / SECTOR_BYTES)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pattern_knows_each_sector_by_its_place() {
        let pattern = Pattern::new(1);
        let range = SectorRange::new(100, 16).unwrap();
        let mut bytes = pattern.bytes(range);
        assert_eq!(pattern.first_wrong(range, &bytes), None);
        bytes[5 * SECTOR_LEN + 511] ^= 1;
        assert_eq!(pattern.first_wrong(range, &bytes), Some(105));
        let elsewhere = SectorRange::new(101, 16).unwrap();
        assert_eq!(
            pattern.first_wrong(elsewhere, &pattern.bytes(range)),
            Some(101)
        );
    }

    #[test]
    fn shuffle_keeps_every_item() {
        let mut items: Vec<u32> = (0..100).collect();
        Random::new(3).shuffle(&mut items);
        assert_ne!(items, (0..100).collect::<Vec<_>>());
        items.sort_unstable();
        assert_eq!(items, (0..100).collect::<Vec<_>>());
    }
}
