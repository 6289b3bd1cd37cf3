// SPDX-License-Identifier: Apache-2.0
//! The maps of several copies become one, page by page (rule R5).
//!
//! Within an epoch there is one writer, and the images of a page are numbered in their order. An
//! image that was made durable is on more than half of the copies, so the newest one that can be
//! read is at least as new: every mark that was durable and still holds is set in it. What is clear
//! in it was clear in fact when it was made, also if it never became durable itself. Older images
//! are not added: marks that were cleared since would come back, and those of several moments
//! together can leave an extent without any current copy.
//!
//! One exception: a copy with a damaged superblock slot may have been in the epoch, or may have been
//! on its way back into it, with images that were made before the newest of the others and are
//! numbered beyond them. What it has set is added to what is certain, so nothing is lost either way.
//!
//! If so many images of a page are damaged or absent that the newest of the rest may be too old, the
//! page is lost, and all of it counts as set.

use super::layout::{BLOCK_BYTES, Block, Layout, Slot};
use super::opening::ReadBlock;
use super::page::{decode_bits, decode_header};
use super::superblock::{DiskUuid, Superblock};
use crate::quorum::{PAGE_WORDS, PageBits, PageName};

/// All pages of all maps in use.
pub(super) struct MergedPages {
    layout: Layout,
    slots: usize,
    bits: Vec<PageBits>,
    /// The largest sequence of each page that was met on any copy.
    sequences: Vec<u64>,
}

impl MergedPages {
    /// Clear maps: D, and B of `slots` slots.
    pub fn new(layout: Layout, slots: usize) -> Self {
        let count = layout.pages() * (slots + 1);
        Self {
            layout,
            slots,
            bits: vec![[0; PAGE_WORDS]; count],
            sequences: vec![0; count],
        }
    }

    pub fn count(&self) -> usize {
        self.bits.len()
    }

    pub fn names(&self) -> impl Iterator<Item = PageName> + use<> {
        self.layout.names(self.slots)
    }

    pub fn bits(&self, name: PageName) -> &PageBits {
        &self.bits[self.layout.number(name, self.slots)]
    }

    /// The sequences, which the recorder goes on from.
    pub fn sequences(&self) -> &[u64] {
        &self.sequences
    }

    pub fn sequences_mut(&mut self) -> &mut [u64] {
        &mut self.sequences
    }

    /// The number of a page, in the order of all of them.
    pub fn number(&self, name: PageName) -> usize {
        self.layout.number(name, self.slots)
    }

    /// The bits of the page of this number.
    pub fn bits_mut(&mut self, number: usize) -> &mut PageBits {
        &mut self.bits[number]
    }

    /// Adds clear pages for a disk that has become longer. Those that there are keep their
    /// numbers: the page is the slower index.
    pub fn lengthen(&mut self, layout: Layout) {
        let count = layout.pages() * (self.slots + 1);
        assert!(count >= self.bits.len(), "a disk does not become shorter");
        self.layout = layout;
        self.bits.resize(count, [0; PAGE_WORDS]);
        self.sequences.resize(count, 0);
    }
}

/// A copy as a source of pages.
pub(super) struct PageSource<'a, R> {
    /// None: there is nothing to read.
    pub reader: Option<&'a mut R>,
    /// Its bits are merged.
    pub holder: bool,
    /// It may be no holder: its images may be newer by number and yet know less.
    pub uncertain: bool,
    /// It took part in the epoch: an image it has lost may have been one that mattered.
    pub counts: bool,
}

/// What was found on a copy.
pub(super) struct CopyPages {
    /// Per page the slot to be written next.
    pub slots: Vec<Slot>,
    /// Per page whether its newest image equals the merged one.
    pub matches: Vec<bool>,
    /// Slots that hold something that is not valid, or cannot be read.
    pub damaged: usize,
}

/// The outcome.
pub(super) struct Merged {
    pub pages: MergedPages,
    pub copies: Vec<CopyPages>,
    /// Pages of which too little is left.
    pub lost: Vec<PageName>,
}

/// An image that cannot be read now may be readable tomorrow. It is newer than those that can be
/// read by fewer images than this.
const UNREAD_IMAGES: u64 = 1 << 32;

/// The two images of a page on a copy.
struct Images {
    blocks: [Box<Block>; 2],
    /// Of the valid ones.
    sequences: [Option<u64>; 2],
    damaged: usize,
    /// A slot cannot be read. No torn write does that: it may be the newer image.
    unreadable: bool,
}

impl Images {
    fn new() -> Self {
        Self {
            blocks: [Box::new([0; BLOCK_BYTES]), Box::new([0; BLOCK_BYTES])],
            sequences: [None; 2],
            damaged: 0,
            unreadable: false,
        }
    }

    fn read<R: ReadBlock>(
        &mut self,
        reader: Option<&mut R>,
        layout: Layout,
        name: PageName,
        disk: DiskUuid,
    ) {
        self.sequences = [None; 2];
        self.unreadable = false;
        let Some(reader) = reader else { return };
        for slot in Slot::BOTH {
            let block = &mut self.blocks[slot.index()];
            let read = reader.read_block(layout.block_of(name, slot), block);
            let sequence = match read {
                Ok(()) => decode_header(block, name, disk).ok(),
                Err(_) => None,
            };
            self.sequences[slot.index()] = sequence;
            self.unreadable |= read.is_err();
            let blank = read.is_ok() && block.iter().all(|&byte| byte == 0);
            if sequence.is_none() && !blank {
                self.damaged += 1;
            }
        }
    }

    /// The slot of the newest valid image.
    fn newest(&self) -> Option<Slot> {
        let [a, b] = self.sequences;
        match (a, b) {
            (None, None) => None,
            _ if a >= b => Some(Slot::A),
            _ => Some(Slot::B),
        }
    }

    /// The newest valid image: its slot, its sequence.
    fn newest_image(&self) -> Option<(Slot, u64)> {
        let slot = self.newest()?;
        Some((slot, self.sequences[slot.index()]?))
    }

    /// Sets all bits that the image in `slot` has set.
    fn add_to(&self, slot: Slot, bits: &mut PageBits) {
        decode_bits(&self.blocks[slot.index()], |word, value| {
            bits[word] |= value;
        });
    }

    /// The slot to be written next: that of the older image, or of none (rule R4).
    fn next(&self) -> Slot {
        self.newest().map_or(Slot::A, Slot::other)
    }

    /// What the next image must be numbered beyond.
    fn newest_sequence(&self) -> u64 {
        let newest = self.sequences.iter().flatten().copied().max();
        let unread = if self.unreadable { UNREAD_IMAGES } else { 0 };
        newest.unwrap_or(0).saturating_add(unread)
    }

    fn equals(&self, slot: Slot, bits: &PageBits) -> bool {
        let mut equal = true;
        decode_bits(&self.blocks[slot.index()], |word, value| {
            equal &= bits[word] == value;
        });
        equal
    }
}

/// What is to be known of a copy before it is written whole.
pub(super) struct Survey {
    /// Per page the slot to be written next.
    pub slots: Vec<Slot>,
    /// Per page the largest sequence in it.
    pub sequences: Vec<u64>,
}

/// Looks at the pages of a copy that is not used as a source: what is written to it must be newer
/// than what it holds, and a stale image must not outlive it in the other slot.
pub(super) fn survey<R: ReadBlock>(reader: &mut R, superblock: &Superblock) -> Survey {
    survey_pages(reader, superblock, 0)
}

/// The same of the pages from number `first` of each map on.
pub(super) fn survey_pages<R: ReadBlock>(
    reader: &mut R,
    superblock: &Superblock,
    first: usize,
) -> Survey {
    let layout = superblock.layout();
    let mut images = Images::new();
    let mut survey = Survey {
        slots: Vec::new(),
        sequences: Vec::new(),
    };
    let names = layout.names(superblock.slots());
    for name in names.filter(|name| name.page >= first) {
        images.read(Some(reader), layout, name, superblock.disk);
        survey.slots.push(images.next());
        survey.sequences.push(images.newest_sequence());
    }
    survey
}

/// Merges the pages of `sources`. `absent` copies of the epoch cannot be read at all; a page is
/// lost if more than `allowed` of the images that may matter are missing.
pub(super) fn merge<R: ReadBlock>(
    sources: &mut [PageSource<'_, R>],
    superblock: &Superblock,
    absent: usize,
    allowed: usize,
) -> Merged {
    let layout = superblock.layout();
    let mut pages = MergedPages::new(layout, superblock.slots());
    let mut lost = Vec::new();
    let count = pages.count();
    let mut images: Vec<Images> = sources.iter().map(|_| Images::new()).collect();
    let mut copies: Vec<CopyPages> = sources
        .iter()
        .map(|_| CopyPages {
            slots: Vec::with_capacity(count),
            matches: Vec::with_capacity(count),
            damaged: 0,
        })
        .collect();
    for (number, name) in pages.names().enumerate() {
        let bits = &mut pages.bits[number];
        let (mut missing, mut newest) = (absent, None);
        for (source, images) in sources.iter_mut().zip(&mut images) {
            let reader = source.reader.as_deref_mut();
            images.read(reader, layout, name, superblock.disk);
            let sequence = &mut pages.sequences[number];
            *sequence = (*sequence).max(images.newest_sequence());
            if !source.holder {
                continue;
            }
            if let Some((slot, found)) = images.newest_image()
                && !source.uncertain
            {
                if Some(found) > newest {
                    newest = Some(found);
                    *bits = [0; PAGE_WORDS];
                }
                if Some(found) == newest {
                    images.add_to(slot, bits);
                }
            }
            if source.counts && (images.unreadable || images.newest().is_none()) {
                missing += 1;
            }
        }
        let certain = newest;
        for (source, images) in sources.iter().zip(&images) {
            if let Some((slot, found)) = images.newest_image()
                && source.holder
                && source.uncertain
                && Some(found) >= certain
            {
                images.add_to(slot, bits);
                newest = newest.max(Some(found));
            }
        }
        if newest.is_none() || missing > allowed {
            *bits = [u64::MAX; PAGE_WORDS];
            lost.push(name);
        }
        for (images, copy) in images.iter().zip(&mut copies) {
            let newest = images.newest();
            copy.slots.push(images.next());
            let matches = newest.is_some_and(|slot| images.equals(slot, bits));
            copy.matches.push(matches && !images.unreadable);
        }
    }
    for (copy, images) in copies.iter_mut().zip(&images) {
        copy.damaged = images.damaged;
    }
    Merged {
        pages,
        copies,
        lost,
    }
}
