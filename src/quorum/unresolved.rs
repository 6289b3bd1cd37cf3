// SPDX-License-Identifier: Apache-2.0
//! The set U: sectors whose content must be settled on all current copies before it is shown
//! (rules W7, Y1).
//!
//! After an unclean start it holds whole extents, all that were dirty; they are resolved as a whole.
//! While the disk is served, the ranges of writes that failed come and go.

use super::sync::{AtomicU64, AtomicUsize, Mutex, Ordering};
use crate::units::SectorRange;

/// Sectors to be resolved. Empty nearly always; then a look costs two loads.
pub struct Unresolved {
    /// Ranges outside of `extents`.
    count: AtomicUsize,
    ranges: Mutex<Vec<SectorRange>>,
    /// Whole extents, a bit each.
    extents: Box<[AtomicU64]>,
    extent_count: AtomicU64,
    extent_shift: u32,
}

impl Unresolved {
    /// Nothing, on a disk of `extents` extents of `2^extent_shift` sectors.
    #[must_use]
    pub fn new(extents: u64, extent_shift: u32) -> Self {
        let words = usize::try_from(extents.div_ceil(64)).expect("at most 2^20 extents");
        Self {
            count: AtomicUsize::new(0),
            ranges: Mutex::new(Vec::new()),
            extents: (0..words).map(|_| AtomicU64::new(0)).collect(),
            extent_count: AtomicU64::new(0),
            extent_shift,
        }
    }

    fn place(&self, extent: u64) -> (&AtomicU64, u64) {
        let word = usize::try_from(extent / 64).expect("at most 2^20 extents");
        (&self.extents[word], 1 << (extent % 64))
    }

    /// Puts a whole extent into U.
    pub fn insert_extent(&self, extent: u64) {
        let (word, bit) = self.place(extent);
        if word.fetch_or(bit, Ordering::AcqRel) & bit == 0 {
            self.extent_count.fetch_add(1, Ordering::AcqRel);
        }
    }

    /// Whether the whole extent is in U.
    #[must_use]
    pub fn holds_extent(&self, extent: u64) -> bool {
        if self.extent_count.load(Ordering::Acquire) == 0 {
            return false;
        }
        let (word, bit) = self.place(extent);
        word.load(Ordering::Acquire) & bit != 0
    }

    /// Extents that are in U as a whole.
    #[must_use]
    pub fn extents(&self) -> u64 {
        self.extent_count.load(Ordering::Acquire)
    }

    /// The first extent from `first` on that is in U as a whole.
    #[must_use]
    pub fn next_extent(&self, first: u64) -> Option<u64> {
        if self.extents() == 0 {
            return None;
        }
        let start = usize::try_from(first / 64).expect("at most 2^20 extents");
        let words = self.extents.get(start..).unwrap_or_default();
        for (index, word) in (start as u64..).zip(words) {
            let mut bits = word.load(Ordering::Acquire);
            if index == first / 64 {
                bits &= u64::MAX << (first % 64);
            }
            if bits != 0 {
                return Some(index * 64 + u64::from(bits.trailing_zeros()));
            }
        }
        None
    }

    /// The first extent from `first` on that has a sector in U.
    #[must_use]
    pub fn next(&self, first: u64) -> Option<u64> {
        let whole = self.next_extent(first);
        if self.count.load(Ordering::Acquire) == 0 {
            return whole;
        }
        let ranges = self.ranges.lock().expect("no panic under this lock");
        // A range lies in one extent.
        let partly = ranges
            .iter()
            .map(|range| range.start() >> self.extent_shift);
        partly.filter(|&extent| extent >= first).chain(whole).min()
    }

    /// A range in `extent` that was put into U as such.
    #[must_use]
    pub fn part_of(&self, extent: u64) -> Option<SectorRange> {
        let ranges = self.ranges.lock().expect("no panic under this lock");
        let inside = |range: &&SectorRange| range.start() >> self.extent_shift == extent;
        ranges.iter().find(inside).copied()
    }

    /// The extent is equal and durable on all current copies. The caller holds its lock.
    pub fn remove_extent(&self, extent: u64, range: SectorRange) {
        let (word, bit) = self.place(extent);
        if word.fetch_and(!bit, Ordering::AcqRel) & bit != 0 {
            self.extent_count.fetch_sub(1, Ordering::AcqRel);
        }
        self.remove(range);
    }

    /// Puts `range` into U. The caller holds its exclusive lock.
    pub fn insert(&self, range: SectorRange) {
        let mut ranges = self.ranges.lock().expect("no panic under this lock");
        if !ranges.iter().any(|known| known.contains(range)) {
            ranges.push(range);
        }
        self.count.store(ranges.len(), Ordering::Release);
    }

    /// Whether a sector of `range`, which lies in one extent, is in U.
    #[must_use]
    pub fn touches(&self, range: SectorRange) -> bool {
        if self.holds_extent(range.start() >> self.extent_shift) {
            return true;
        }
        if self.count.load(Ordering::Acquire) == 0 {
            return false;
        }
        let ranges = self.ranges.lock().expect("no panic under this lock");
        ranges.iter().any(|known| known.overlaps(range))
    }

    /// Takes the sectors of `range` out of U, unless their whole extent is in it: they are equal on
    /// all current copies. The caller holds the exclusive lock.
    pub fn remove(&self, range: SectorRange) {
        if self.count.load(Ordering::Acquire) == 0 {
            return;
        }
        let mut ranges = self.ranges.lock().expect("no panic under this lock");
        let mut kept = Vec::with_capacity(ranges.len() + 1);
        for known in ranges.iter() {
            let before = range.start().saturating_sub(known.start());
            let after = known.end().saturating_sub(range.end());
            if !known.overlaps(range) {
                kept.push(*known);
                continue;
            }
            let part = |start: u64, count: u64| {
                u32::try_from(count)
                    .ok()
                    .and_then(|count| SectorRange::new(start, count))
            };
            kept.extend(part(known.start(), before));
            kept.extend(part(range.end(), after));
        }
        self.count.store(kept.len(), Ordering::Release);
        *ranges = kept;
    }

    /// Sectors in U outside of whole extents, each counted once per range that holds it.
    #[must_use]
    pub fn sectors(&self) -> u64 {
        let ranges = self.ranges.lock().expect("no panic under this lock");
        ranges.iter().map(|range| u64::from(range.count())).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    proptest::proptest! {
        #[test]
        fn unresolved_agrees_with_a_set_of_sectors(
            steps in proptest::collection::vec((0u64..64, 1u32..12, 0u8..3), 1..80)
        ) {
            let unresolved = Unresolved::new(1, 11);
            let mut model = BTreeSet::new();
            for (start, count, step) in steps {
                let range = SectorRange::new(start, count).unwrap();
                match step {
                    0 => {
                        unresolved.insert(range);
                        model.extend(range.start()..range.end());
                    }
                    1 => {
                        unresolved.remove(range);
                        model.retain(|s| !(range.start()..range.end()).contains(s));
                    }
                    _ => assert_eq!(
                        unresolved.touches(range),
                        model.range(range.start()..range.end()).next().is_some()
                    ),
                }
            }
            assert_eq!(unresolved.sectors() == 0, model.is_empty());
        }
    }

    #[test]
    fn whole_extents_come_and_go() {
        let unresolved = Unresolved::new(200, 4);
        let range = |extent: u64| SectorRange::new(extent << 4, 16).unwrap();
        for extent in [3, 130] {
            unresolved.insert_extent(extent);
        }
        assert!(unresolved.touches(range(130)) && !unresolved.touches(range(131)));
        // A part that was settled does not take the rest out.
        unresolved.remove(SectorRange::new(130 << 4, 4).unwrap());
        assert!(unresolved.touches(SectorRange::new(130 << 4, 1).unwrap()));
        assert_eq!(
            (unresolved.next_extent(0), unresolved.next_extent(4)),
            (Some(3), Some(130))
        );
        assert_eq!(unresolved.next_extent(131), None);
        unresolved.insert(SectorRange::new(5 << 4, 4).unwrap());
        assert_eq!(unresolved.next(4), Some(5));
        assert_eq!(unresolved.next(6), Some(130));
        assert_eq!(unresolved.part_of(5), SectorRange::new(5 << 4, 4));
        assert_eq!(unresolved.part_of(130), None);
        unresolved.remove_extent(130, range(130));
        assert_eq!((unresolved.extents(), unresolved.next_extent(4)), (1, None));
        assert_eq!((unresolved.next(0), unresolved.next(4)), (Some(3), Some(5)));
    }
}
