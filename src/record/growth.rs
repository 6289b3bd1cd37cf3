// SPDX-License-Identifier: Apache-2.0
//! A disk that becomes longer (rule Z3).
//!
//! Nothing in a copy moves: the pages of what is added lie behind those there are. So growing is
//! an opening like any other, of a record that was made longer between being read and being
//! written: the epoch of this run begins with pages first and the superblock with the new size
//! last, and before an epoch with the new size has begun the old size is what counts.
//!
//! Between the moment when the first copy says that it has begun and that when enough of them do,
//! an opening may go either way. One that takes the old size may write pages, which say nothing of
//! what is new. Hence the superblock tells of a growth ([`Growing`]) until enough copies know the
//! new size, and as long as it does, all that is new is dirty, whatever the maps say.

use thiserror::Error;

use super::layout::{EXTENTS_MAX, Layout, Slot};
use super::merge::survey_pages;
use super::opened::{CopyState, Opened};
use super::opening::{CopySource, Found, ReadBlock};
use super::superblock::{Growing, SECTORS_MAX, Superblock};
use crate::quorum::{Bitmap, Geometry, Marks, PAGE_EXTENTS, PAGE_WORDS, PageBits};

/// A size that the disk cannot be given. Sizes in the text are in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum GrowthError {
    /// Rule Z3: what is behind the end would be lost.
    #[error(
        "the disk has {} bytes and cannot be made shorter ({} bytes): give a larger size",
        from * 512,
        to * 512
    )]
    Shrinks {
        /// Sectors that it has.
        from: u64,
        /// Sectors that it was to have.
        to: u64,
    },
    /// The end would lie inside a block.
    #[error(
        "{} bytes are no whole number of blocks of {} bytes: give a multiple",
        to * 512,
        block_sectors * 512
    )]
    NotWholeBlocks {
        /// Sectors that it was to have.
        to: u64,
        /// Sectors of a logical block.
        block_sectors: u64,
    },
    /// There is a bit for each extent, and no room for more of them.
    #[error(
        "the state record of this disk has extents of {} bytes, with which it can describe \
         {} bytes and no more. To go beyond, stop the disk cleanly, make the replicas longer with \
         'truncate', remove the record ('quorum-blk record forget') and make one with larger \
         extents ('quorum-blk record create --assume-clean')",
        extent_sectors * 512,
        sectors_max * 512
    )]
    TooLarge {
        /// Sectors of an extent.
        extent_sectors: u64,
        /// Sectors that it may have.
        sectors_max: u64,
    },
}

/// What is added to a disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Growth {
    /// Sectors of before.
    pub from_sectors: u64,
    /// Sectors of after.
    pub to_sectors: u64,
    /// The first extent that has something new: the last of before if that was cut off by the end
    /// of the disk.
    first_extent: u64,
    /// One behind the last.
    end_extent: u64,
}

impl Growth {
    /// That of a disk of this geometry to `to` sectors; `None` if it has that size.
    ///
    /// # Errors
    /// If it cannot have that size.
    pub fn of(geometry: &Geometry, to: u64) -> Result<Option<Self>, GrowthError> {
        let from = geometry.sectors();
        let block_sectors = u64::from(geometry.block_sectors());
        if to < from {
            return Err(GrowthError::Shrinks { from, to });
        }
        if !to.is_multiple_of(block_sectors) {
            return Err(GrowthError::NotWholeBlocks { to, block_sectors });
        }
        let shift = geometry.extent_shift();
        let extent_sectors = 1 << shift;
        let sectors_max = EXTENTS_MAX.saturating_mul(extent_sectors).min(SECTORS_MAX);
        if to > sectors_max {
            return Err(GrowthError::TooLarge {
                extent_sectors,
                sectors_max,
            });
        }
        Ok((to > from).then(|| Self::between(from, to, shift)))
    }

    /// The one that a superblock tells of.
    pub(super) fn under_way(superblock: &Superblock) -> Option<Self> {
        let growing = superblock.growing?;
        let shift = superblock.extent_shift.into();
        Some(Self::between(
            growing.from_sectors,
            superblock.sectors,
            shift,
        ))
    }

    fn between(from_sectors: u64, to_sectors: u64, shift: u32) -> Self {
        Self {
            from_sectors,
            to_sectors,
            first_extent: from_sectors >> shift,
            end_extent: to_sectors.div_ceil(1 << shift),
        }
    }

    /// Marks all that is added dirty: nobody knows what the replicas hold there. `marks` are those
    /// of the longer disk. Whoever is absent is marked behind there by what marks him behind in
    /// all that is dirty.
    pub(super) fn mark(&self, marks: &Marks) {
        for extent in self.first_extent..self.end_extent {
            marks.set(Bitmap::Dirty, extent);
        }
    }

    /// Where everything is in a copy of the longer disk.
    #[must_use]
    pub fn layout(&self) -> Layout {
        Layout::new(self.end_extent)
    }

    /// Extents that are marked.
    #[must_use]
    pub fn extents(&self) -> u64 {
        self.end_extent - self.first_extent
    }
}

impl Opened {
    /// Whether [`Opened::grow`] was used.
    #[must_use]
    pub fn has_grown(&self) -> bool {
        self.superblock
            .growing
            .is_some_and(|growing| growing.epoch == 0)
    }

    /// What is being added to the disk, by [`Opened::grow`] or by a run that was cut short.
    #[must_use]
    pub fn growth(&self) -> Option<&Growth> {
        self.growth.as_ref()
    }

    /// Makes the disk longer, before the record goes on. `sources` are the copies that were
    /// opened, in their order, the files of those that are to be written as long as the new layout
    /// wants them ([`Growth::layout`]). All that is added is dirty afterwards.
    ///
    /// # Panics
    /// If the growth is not one of this disk, or there is another number of sources.
    pub fn grow<R: ReadBlock>(&mut self, growth: &Growth, sources: &mut [CopySource<R>]) {
        assert_eq!(growth.from_sectors, self.superblock.sectors);
        assert_eq!(sources.len(), self.copies.len());
        let old_extents = self.superblock.extents();
        let old_pages = self.superblock.layout().pages();
        assert_eq!(self.growth, None, "one after the other");
        self.growth = Some(*growth);
        // No guest has anything there: what nobody agrees on is chosen, also by a later run, until
        // all of it is equal (rule Y3).
        self.superblock.cold = true;
        self.superblock.sectors = growth.to_sectors;
        self.superblock.growing = Some(Growing {
            from_sectors: growth.from_sectors,
            epoch: 0,
        });
        self.superblock.check().expect("it was checked before");
        let layout = self.superblock.layout();
        self.forget_beyond(old_extents);
        self.pages.lengthen(layout);
        let (known, all) = (
            self.copies.first().map_or(0, |c| c.slots.len()),
            self.pages.count(),
        );
        for (copy, source) in self.copies.iter_mut().zip(sources) {
            copy.slots.resize(all, Slot::A);
            copy.matches.resize(all, false);
            let reader = match (&copy.state, &mut source.found) {
                (CopyState::Current | CopyState::Stale, Found::Present(reader)) => reader,
                _ => continue,
            };
            // A growth that was cut short may have left images there, which nothing depends on.
            // What is written now must be newer.
            let survey = survey_pages(reader, &self.superblock, old_pages);
            copy.slots[known..].copy_from_slice(&survey.slots);
            for (own, found) in self.pages.sequences_mut()[known..]
                .iter_mut()
                .zip(survey.sequences)
            {
                *own = found.max(*own);
            }
        }
    }

    /// A page that was lost counts as all set, and one of a growth that was cut short may have
    /// marks of extents the disk does not have yet. They mean nothing for those it gets now.
    fn forget_beyond(&mut self, extents: u64) {
        for name in self.pages.names() {
            let first = u64::try_from(name.page).expect("at most 33") * PAGE_EXTENTS;
            let kept = extents.saturating_sub(first).min(PAGE_EXTENTS);
            let number = self.pages.number(name);
            if truncate(self.pages.bits_mut(number), kept) {
                for copy in &mut self.copies {
                    copy.matches[number] = false;
                }
            }
        }
    }
}

/// Clears all bits from `kept` on. Returns whether one was set.
fn truncate(bits: &mut PageBits, kept: u64) -> bool {
    let mut changed = false;
    for (word, bits) in (0..PAGE_WORDS as u64).zip(bits.iter_mut()) {
        let mask = match kept.saturating_sub(word * 64) {
            0 => 0,
            left @ 1..64 => (1 << left) - 1,
            64.. => u64::MAX,
        };
        changed |= *bits & !mask != 0;
        *bits &= mask;
    }
    changed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_those_that_can_be() {
        // 100 sectors in blocks of 4 and extents of 8: 13 extents, the last one cut off.
        let geometry = Geometry::with_extent_shift(100, 4, 3).unwrap();
        let of = |to| Growth::of(&geometry, to);
        assert_eq!(of(100), Ok(None));
        assert!(matches!(
            of(96),
            Err(GrowthError::Shrinks { from: 100, to: 96 })
        ));
        assert!(matches!(of(102), Err(GrowthError::NotWholeBlocks { .. })));
        let most = EXTENTS_MAX * 8;
        let refused = of(most + 4).unwrap_err();
        let sectors_max = most;
        let extent_sectors = 8;
        let expected = GrowthError::TooLarge {
            extent_sectors,
            sectors_max,
        };
        assert_eq!(refused, expected);
        assert_eq!(
            of(most).unwrap().unwrap().layout(),
            Layout::new(EXTENTS_MAX)
        );
        // Inside the extent that was cut off, and beyond it.
        for (to, extents) in [(104, 12..13), (108, 12..14), (116, 12..15)] {
            let growth = of(to).unwrap().unwrap();
            let marks = Marks::new(1, to.div_ceil(8), true);
            growth.mark(&marks);
            assert!(marks.iter(Bitmap::Dirty).eq(extents.clone()), "{to}");
            assert_eq!(growth.extents(), extents.end - extents.start);
        }
    }

    #[test]
    fn truncate_keeps_what_is_before() {
        for kept in [0, 1, 63, 64, 65, 130, PAGE_EXTENTS - 1] {
            let mut bits = [u64::MAX; PAGE_WORDS];
            assert!(truncate(&mut bits, kept));
            let left: u64 = bits.iter().map(|word| u64::from(word.count_ones())).sum();
            assert_eq!(left, kept);
            assert!(!truncate(&mut bits, kept));
        }
        assert!(!truncate(&mut [u64::MAX; PAGE_WORDS], PAGE_EXTENTS));
    }
}
