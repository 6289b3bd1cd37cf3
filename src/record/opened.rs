// SPDX-License-Identifier: Apache-2.0
//! The outcome of an opening: what the record said, and what each copy needs.

use super::growth::Growth;
use super::history::History;
use super::layout::Slot;
use super::merge::MergedPages;
use super::superblock::Superblock;
use crate::quorum::{Marks, PageBits, PageName};

/// How a copy was found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum CopyState {
    /// It belongs to the epoch that was chosen.
    Current,
    /// It is of an older epoch, or of one that never counted; what it says is not used.
    Stale,
    /// It holds no superblock; it may be written.
    Blank,
    /// There is no file.
    Missing,
    /// It cannot be opened or read, for this reason.
    Unreadable(String),
}

/// Something an operator should be told about an opening that went well.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Note {
    /// The copy in this place is not used as a source, and why; it is written anew if it can be.
    NotUsed {
        /// Its name.
        copy: String,
        /// What was found.
        state: CopyState,
    },
    /// A page was lost: all its bits count as set.
    PageLost(PageName),
    /// Slots of pages that are torn or damaged in this copy. One of a page is what a crash leaves.
    DamagedSlots {
        /// Its name.
        copy: String,
        /// How many.
        count: usize,
    },
}

/// A copy as the recorder goes on with it.
pub(super) struct OpenedCopy {
    pub state: CopyState,
    /// Its index among the copies.
    pub index: u8,
    /// The slot of the superblock to be written next.
    pub superblock_slot: Slot,
    /// Per page the slot to be written next.
    pub slots: Vec<Slot>,
    /// Per page whether its newest image is equal to the merged one.
    pub matches: Vec<bool>,
}

/// What the copies say together.
pub struct Opened {
    /// The superblock of the epoch that was chosen; its `copy_index` is that of any copy.
    pub superblock: Superblock,
    /// What is being added to the disk; all of it counts as dirty.
    pub(super) growth: Option<Growth>,
    /// What an operator should know.
    pub notes: Vec<Note>,
    /// A minority of the copies may go on alone.
    pub(super) force: bool,
    /// It took force: too few copies could be read to know that nothing is newer.
    pub(super) minority: bool,
    /// The record is new: no copy holds anything.
    pub(super) fresh: bool,
    /// Every epoch that was met.
    pub(super) known: History,
    /// No copy has a larger one.
    pub(super) sequence_max: u64,
    pub(super) copies: Vec<OpenedCopy>,
    pub(super) pages: MergedPages,
}

impl Opened {
    /// A record that is to be created on `copies` empty copies. `superblock` says what is to be in
    /// it; what it says of epochs, sequences and copies does not matter.
    ///
    /// # Panics
    /// If `copies` is not 1, 3 or 5, or the superblock is impossible: both are the caller's.
    #[must_use]
    pub fn create(mut superblock: Superblock, copies: usize) -> Self {
        superblock.copies = u8::try_from(copies).expect("1, 3 or 5 copies");
        superblock.copy_index = 0;
        superblock.included = 1;
        superblock.sequence = 1;
        superblock.check().expect("a superblock that can be");
        let pages = MergedPages::new(superblock.layout(), superblock.slots());
        let copy = |index| OpenedCopy {
            state: CopyState::Blank,
            index,
            superblock_slot: Slot::A,
            slots: vec![Slot::A; pages.count()],
            matches: vec![false; pages.count()],
        };
        Self {
            growth: None,
            notes: Vec::new(),
            force: false,
            minority: false,
            fresh: true,
            known: superblock.history,
            sequence_max: 0,
            copies: (0..superblock.copies).map(copy).collect(),
            pages,
            superblock,
        }
    }

    /// How the copy in place `copy` was found.
    #[must_use]
    pub fn state(&self, copy: usize) -> &CopyState {
        &self.copies[copy].state
    }

    /// The index of the copy in place `copy`: the place for which it was made.
    #[must_use]
    pub fn index(&self, copy: usize) -> usize {
        self.copies[copy].index.into()
    }

    /// Whether a minority of the copies was taken as the truth (rule S6): what the others knew is
    /// lost.
    #[must_use]
    pub fn is_minority(&self) -> bool {
        self.minority
    }

    /// The merged bits of a page.
    #[must_use]
    pub fn bits(&self, name: PageName) -> &PageBits {
        self.pages.bits(name)
    }

    /// Number of pages that count as lost.
    #[must_use]
    pub fn pages_lost(&self) -> usize {
        let lost = |note: &&Note| matches!(note, Note::PageLost(_));
        self.notes.iter().filter(lost).count()
    }

    /// Sets all bits in `marks`, which must have maps for [`Superblock::slots`] replicas.
    pub fn load(&self, marks: &Marks) {
        for name in self.pages.names() {
            marks.load(name, self.pages.bits(name));
        }
        if let Some(growth) = &self.growth {
            growth.mark(marks);
        }
    }
}
