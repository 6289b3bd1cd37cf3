// SPDX-License-Identifier: Apache-2.0
//! Where things lie in a copy of the record (rule R2).
//!
//! Blocks 0 and 1 are the two slots of the superblock. Then, page number by page number, the two
//! slots of that page of each of the 17 bit maps. The page number is the slower index, so that a
//! disk that grows only makes the file longer: nothing in it moves.

use crate::quorum::{Bitmap, PAGE_EXTENTS, PageName};
use crate::units::REPLICAS_MAX;

/// Bytes of a block: the unit of every write to a copy.
pub const BLOCK_BYTES: usize = 4096;

/// A block of a copy.
pub type Block = [u8; BLOCK_BYTES];

/// The largest K (rule R1).
pub const COPIES_MAX: usize = 5;

/// Extents a disk has at most (CONSISTENCY section 1).
pub(super) const EXTENTS_MAX: u64 = 1 << 20;

/// Pages of one bit map at most.
pub const PAGES_MAX: usize = 33;

const _: () = assert!(EXTENTS_MAX.div_ceil(PAGE_EXTENTS) == PAGES_MAX as u64);

/// Bit maps in a record: D and B of every slot there can be.
const BITMAPS: usize = 1 + REPLICAS_MAX;

/// Blocks before the first page.
const SUPERBLOCKS: u64 = 2;

/// Bytes of the longest copy.
pub const LENGTH_BYTES_MAX: u64 =
    (SUPERBLOCKS + 2 * (PAGES_MAX * BITMAPS) as u64) * BLOCK_BYTES as u64;

/// One of the two places a block has. Writes alternate between them, so that a torn write leaves
/// the other one as it was (rule R4).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Slot {
    /// The first.
    A,
    /// The second.
    B,
}

impl Slot {
    /// Both, in the order in which they lie.
    pub const BOTH: [Self; 2] = [Self::A, Self::B];

    /// The other one.
    #[must_use]
    pub fn other(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
        }
    }

    /// 0 or 1.
    #[must_use]
    pub fn index(self) -> usize {
        match self {
            Self::A => 0,
            Self::B => 1,
        }
    }
}

/// The places of everything in a copy.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Layout {
    pages: usize,
}

impl Layout {
    /// For a disk of `extents` extents.
    ///
    /// # Panics
    /// If that is not from 1 to 2^20: whoever reads a superblock has checked it (rule R9).
    #[must_use]
    pub fn new(extents: u64) -> Self {
        assert!((1..=EXTENTS_MAX).contains(&extents), "{extents} extents");
        let pages = usize::try_from(extents.div_ceil(PAGE_EXTENTS)).expect("at most 33");
        Self { pages }
    }

    /// Pages of each bit map, 1 to [`PAGES_MAX`].
    #[must_use]
    pub fn pages(self) -> usize {
        self.pages
    }

    /// The block of a slot of the superblock.
    #[must_use]
    pub fn superblock_block(slot: Slot) -> u64 {
        slot.index() as u64
    }

    /// The block of a slot of a page.
    ///
    /// # Panics
    /// If there is no such page.
    #[must_use]
    pub fn block_of(self, name: PageName, slot: Slot) -> u64 {
        assert!(
            name.page < self.pages,
            "page {} of {}",
            name.page,
            self.pages
        );
        let place = name.page * BITMAPS + name.bitmap.number();
        SUPERBLOCKS + 2 * place as u64 + slot.index() as u64
    }

    /// Blocks of a copy.
    #[must_use]
    pub fn blocks(self) -> u64 {
        SUPERBLOCKS + 2 * (BITMAPS * self.pages) as u64
    }

    /// Bytes of a copy. The file is allocated whole when it is created.
    #[must_use]
    pub fn length_bytes(self) -> u64 {
        self.blocks() * BLOCK_BYTES as u64
    }

    /// The place of a page in [`Layout::names`].
    pub(super) fn number(self, name: PageName, slots: usize) -> usize {
        assert!(name.page < self.pages && name.bitmap.number() <= slots);
        name.page * (slots + 1) + name.bitmap.number()
    }

    /// Names of all pages of D and of the B of the first `slots` slots.
    pub(super) fn names(self, slots: usize) -> impl Iterator<Item = PageName> + use<> {
        (0..self.pages).flat_map(move |page| {
            (0..=slots).map(move |number| PageName {
                bitmap: Bitmap::from_number(number),
                page,
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_used_once_and_fill_the_file() {
        for extents in [1, PAGE_EXTENTS, PAGE_EXTENTS + 1, EXTENTS_MAX] {
            let layout = Layout::new(extents);
            let mut blocks: Vec<u64> = Slot::BOTH.map(Layout::superblock_block).to_vec();
            for name in layout.names(REPLICAS_MAX) {
                blocks.extend(Slot::BOTH.map(|slot| layout.block_of(name, slot)));
            }
            let all: Vec<u64> = (0..layout.blocks()).collect();
            assert_eq!(blocks, all, "{extents} extents");
        }
        assert_eq!(Layout::new(EXTENTS_MAX).length_bytes(), 1124 * 4096);
    }

    #[test]
    fn growing_moves_nothing() {
        let (small, large) = (Layout::new(PAGE_EXTENTS), Layout::new(2 * PAGE_EXTENTS));
        for name in small.names(REPLICAS_MAX) {
            assert_eq!(small.block_of(name, Slot::B), large.block_of(name, Slot::B));
        }
    }
}
