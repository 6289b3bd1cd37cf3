// SPDX-License-Identifier: Apache-2.0
//! One copy of the record as the recorder sees it: what it lacks and what is being written to it.

use super::layout::{COPIES_MAX, PAGES_MAX, Slot};
use crate::units::{REPLICAS_MAX, Time};

/// Pages of all maps at most.
const NUMBERS_MAX: usize = PAGES_MAX * (1 + REPLICAS_MAX);

/// Writes on their way to one copy at most: an opening may have hundreds of pages to write, and
/// the queues of a disk should stay open for others.
pub(super) const WRITES_PER_COPY_MAX: usize = 64;

const _: () = assert!(COPIES_MAX <= 8, "a set of copies is a byte");

/// Numbers a write to a copy; no two have the same.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct WriteId(pub u64);

/// A set of pages, by number.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct PageSet {
    words: [u64; NUMBERS_MAX.div_ceil(64)],
}

impl PageSet {
    pub const EMPTY: Self = Self {
        words: [0; NUMBERS_MAX.div_ceil(64)],
    };

    /// The first `count` pages.
    pub fn first(count: usize) -> Self {
        let mut set = Self::EMPTY;
        (0..count).for_each(|number| set.insert(number));
        set
    }

    pub fn insert(&mut self, number: usize) {
        self.words[number / 64] |= 1 << (number % 64);
    }

    pub fn contains(&self, number: usize) -> bool {
        self.words[number / 64] & (1 << (number % 64)) != 0
    }

    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|&word| word == 0)
    }

    /// Takes out the smallest.
    pub fn pop(&mut self) -> Option<usize> {
        let index = self.words.iter().position(|&word| word != 0)?;
        let bit = self.words[index].trailing_zeros() as usize;
        self.words[index] &= self.words[index] - 1;
        Some(index * 64 + bit)
    }
}

/// Part a copy plays.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Standing {
    /// It takes part in the epoch.
    Good,
    /// It is being written whole, and will take part when an epoch with it begins.
    Joining,
    /// It is not written.
    Out,
}

/// What a write is of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Target {
    /// The page of this number.
    Page(usize),
    /// The superblock with this sequence.
    Superblock(u64),
}

/// A write that was handed out and not answered.
#[derive(Clone, Copy)]
struct InFlight {
    write: WriteId,
    target: Target,
    since: Time,
}

/// A copy.
pub(super) struct Copy {
    /// Its index, as its superblock says.
    pub index: u8,
    pub standing: Standing,
    /// Pages whose newest image is neither on it nor on its way to it.
    pub missing: PageSet,
    /// Per page the slot to be written next: the one of the older image (rule R4).
    slots: Vec<Slot>,
    superblock_slot: Slot,
    /// Sequence of the newest superblock on it.
    superblock_held: u64,
    in_flight: Vec<InFlight>,
    /// On its return it was waited for once, in vain.
    pub waited_for: bool,
}

impl Copy {
    pub fn new(index: u8, standing: Standing, slots: Vec<Slot>, superblock_slot: Slot) -> Self {
        Self {
            index,
            standing,
            missing: PageSet::EMPTY,
            slots,
            superblock_slot,
            superblock_held: 0,
            in_flight: Vec::with_capacity(WRITES_PER_COPY_MAX),
            waited_for: false,
        }
    }

    pub fn is_idle(&self) -> bool {
        self.in_flight.is_empty()
    }

    /// It has everything up to the superblock of this sequence.
    pub fn is_level(&self, superblock: u64) -> bool {
        self.standing == Standing::Good
            && self.is_idle()
            && self.missing.is_empty()
            && self.superblock_held == superblock
    }

    /// It has every page, and waits for the epoch that takes it in.
    pub fn has_joined(&self) -> bool {
        self.standing == Standing::Joining && self.is_idle() && self.missing.is_empty()
    }

    /// When the oldest write began.
    pub fn busy_since(&self) -> Option<Time> {
        self.in_flight.iter().map(|write| write.since).min()
    }

    /// The superblock of this sequence is what it lacks next.
    pub fn lacks_superblock(&self, sequence: u64) -> bool {
        self.standing == Standing::Good && self.superblock_held != sequence
    }

    /// A write begins. Returns the slot it goes to.
    pub fn begin(&mut self, write: WriteId, target: Target, now: Time) -> Slot {
        self.in_flight.push(InFlight {
            write,
            target,
            since: now,
        });
        match target {
            Target::Page(number) => self.slots[number],
            Target::Superblock(_) => self.superblock_slot,
        }
    }

    /// A write ended. Returns whether it was one of ours.
    pub fn end(&mut self, write: WriteId, succeeded: bool) -> bool {
        let Some(place) = self.in_flight.iter().position(|w| w.write == write) else {
            return false;
        };
        let ended = self.in_flight.swap_remove(place);
        if succeeded {
            match ended.target {
                Target::Page(number) => self.slots[number] = self.slots[number].other(),
                Target::Superblock(sequence) => {
                    self.superblock_slot = self.superblock_slot.other();
                    self.superblock_held = sequence;
                }
            }
        }
        true
    }

    /// It is to be written whole, beginning with these slots.
    pub fn join(&mut self, slots: Vec<Slot>, superblock_slot: Slot) {
        self.standing = Standing::Joining;
        self.missing = PageSet::first(slots.len());
        self.slots = slots;
        self.superblock_slot = superblock_slot;
        self.superblock_held = 0;
        self.waited_for = false;
    }

    /// Everything it lacked is on its way to it.
    pub fn is_joining_soon(&self) -> bool {
        self.standing == Standing::Joining && self.missing.is_empty() && !self.is_idle()
    }

    /// It is written no more.
    pub fn leave(&mut self) {
        self.standing = Standing::Out;
        self.missing = PageSet::EMPTY;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_set_gives_back_what_it_was_given() {
        let mut set = PageSet::first(3);
        for number in [63, 64, NUMBERS_MAX - 1] {
            set.insert(number);
        }
        assert!(set.contains(64) && !set.contains(65));
        let all: Vec<usize> = std::iter::from_fn(|| set.pop()).collect();
        assert_eq!(all, [0, 1, 2, 63, 64, NUMBERS_MAX - 1]);
        assert!(set.is_empty());
    }
}
