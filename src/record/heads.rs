// SPDX-License-Identifier: Apache-2.0
//! The two superblock slots of one copy.

use super::error::{FormatError, Refusal};
use super::layout::{BLOCK_BYTES, Layout, Slot};
use super::opening::ReadBlock;
use super::superblock::Superblock;

/// The superblocks of a copy.
pub(super) struct Heads {
    /// Valid ones, by slot.
    pub valid: [Option<Superblock>; 2],
    /// A slot holds something, or something that cannot be read, and no superblock.
    pub uncertain: bool,
}

impl Heads {
    pub fn newest(&self) -> Option<&Superblock> {
        let valid = self.valid.iter().flatten();
        valid.max_by_key(|superblock| (superblock.epoch(), superblock.sequence))
    }

    /// The slot of the older superblock, or of none.
    pub fn next_slot(&self) -> Slot {
        let [a, b] = &self.valid;
        let key = |superblock: &Superblock| (superblock.epoch(), superblock.sequence);
        if a.as_ref().map(key) <= b.as_ref().map(key) {
            Slot::A
        } else {
            Slot::B
        }
    }
}

/// Reads and checks the superblocks of a copy. A copy without a valid one but with an empty slot
/// is one that was never finished: nothing can have depended on it alone.
///
/// # Errors
/// Outside: another version wrote it. Inside: why the copy says nothing.
pub(super) fn read_heads<R: ReadBlock>(
    name: &str,
    reader: &mut R,
) -> Result<Result<Heads, String>, Refusal> {
    let mut heads = Heads {
        valid: [None, None],
        uncertain: false,
    };
    let mut block = [0; BLOCK_BYTES];
    let mut has_empty_slot = false;
    let mut why = "both of its superblocks are damaged".to_owned();
    for slot in Slot::BOTH {
        if let Err(errno) = reader.read_block(Layout::superblock_block(slot), &mut block) {
            heads.uncertain = true;
            why = format!("its superblocks cannot be read (errno {errno})");
            continue;
        }
        match Superblock::decode(&block) {
            Ok(superblock) => heads.valid[slot.index()] = Some(superblock),
            Err(FormatError::Blank) => has_empty_slot = true,
            Err(source) if source.is_newer() => {
                let copy = name.to_owned();
                return Err(Refusal::Unsupported { copy, source });
            }
            Err(_) => heads.uncertain = true,
        }
    }
    if heads.newest().is_none() && !has_empty_slot {
        return Ok(Err(why));
    }
    Ok(Ok(heads))
}
