// SPDX-License-Identifier: Apache-2.0
//! The set U: sectors whose content must be settled on all current copies before it is shown
//! (rules W7, Y1).
//!
//! After an unclean start it holds whole extents, all that were dirty; they are resolved as a whole.
//! While the disk is served, the ranges of writes that failed come and go.

use std::collections::BTreeMap;

use super::sync::{AtomicU64, AtomicUsize, Mutex, Ordering};
use crate::units::SectorRange;

/// Ranges of writes that failed, at most. One more, and its whole extent is in U instead: a bit.
const RANGES_MAX: usize = 1024;

/// Sectors to be resolved. Empty nearly always; then a look costs two loads.
pub struct Unresolved {
    /// Ranges outside of `extents`.
    count: AtomicUsize,
    /// They do not overlap; each lies in one extent.
    ranges: Mutex<Ranges>,
    /// Whole extents, a bit each.
    extents: Box<[AtomicU64]>,
    extent_count: AtomicU64,
    extent_shift: u32,
}

/// Ends of ranges by their starts.
#[derive(Default)]
struct Ranges(BTreeMap<u64, u64>);

impl Ranges {
    /// The first range with a sector in `start..end`.
    fn first_in(&self, start: u64, end: u64) -> Option<(u64, u64)> {
        let before = self.0.range(..=start).next_back();
        let before = before.filter(|&(_, &known_end)| known_end > start);
        let found = before.or_else(|| self.0.range(start..end).next());
        found.map(|(&known, &known_end)| (known, known_end))
    }

    /// Takes `start..end` out of the ranges.
    fn cut(&mut self, start: u64, end: u64) {
        while let Some((known, known_end)) = self.first_in(start, end) {
            self.0.remove(&known);
            if known < start {
                self.0.insert(known, start);
            }
            if known_end > end {
                self.0.insert(end, known_end);
            }
        }
    }
}

impl Unresolved {
    /// Nothing, on a disk of `extents` extents of `2^extent_shift` sectors.
    #[must_use]
    pub fn new(extents: u64, extent_shift: u32) -> Self {
        let words = usize::try_from(extents.div_ceil(64)).expect("at most 2^20 extents");
        Self {
            count: AtomicUsize::new(0),
            ranges: Mutex::new(Ranges::default()),
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
        let partly = (self.count.load(Ordering::Acquire) != 0)
            .then(|| {
                let ranges = self.ranges.lock().expect("no panic under this lock");
                ranges.first_in(first << self.extent_shift, u64::MAX)
            })
            .flatten();
        let partly = partly.map(|(start, _)| start >> self.extent_shift);
        partly.into_iter().chain(self.next_extent(first)).min()
    }

    /// A range in `extent` that was put into U as such.
    #[must_use]
    pub fn part_of(&self, extent: u64) -> Option<SectorRange> {
        let (start, end) = (
            extent << self.extent_shift,
            (extent + 1) << self.extent_shift,
        );
        let ranges = self.ranges.lock().expect("no panic under this lock");
        let (start, end) = ranges.first_in(start, end)?;
        SectorRange::new(start, u32::try_from(end - start).ok()?)
    }

    /// The extent is equal and durable on all current copies. The caller holds its lock.
    pub fn remove_extent(&self, extent: u64, range: SectorRange) {
        let (word, bit) = self.place(extent);
        if word.fetch_and(!bit, Ordering::AcqRel) & bit != 0 {
            self.extent_count.fetch_sub(1, Ordering::AcqRel);
        }
        self.remove(range);
    }

    /// Puts `range`, which lies in one extent, into U. The caller holds its exclusive lock.
    pub fn insert(&self, range: SectorRange) {
        let mut ranges = self.ranges.lock().expect("no panic under this lock");
        let (mut start, mut end) = (range.start(), range.end());
        while let Some((known, known_end)) = ranges.first_in(start, end) {
            ranges.0.remove(&known);
            (start, end) = (start.min(known), end.max(known_end));
        }
        ranges.0.insert(start, end);
        if ranges.0.len() > RANGES_MAX {
            let extent = start >> self.extent_shift;
            self.insert_extent(extent);
            let first = extent << self.extent_shift;
            ranges.cut(first, first + (1 << self.extent_shift));
        }
        self.count.store(ranges.0.len(), Ordering::Release);
    }

    /// Whether a sector of `range`, which lies in one extent, is in U.
    #[must_use]
    pub fn touches(&self, range: SectorRange) -> bool {
        // In this order: what is no range any more may have become a whole extent.
        self.touches_range(range) || self.holds_extent(range.start() >> self.extent_shift)
    }

    fn touches_range(&self, range: SectorRange) -> bool {
        if self.count.load(Ordering::Acquire) == 0 {
            return false;
        }
        let ranges = self.ranges.lock().expect("no panic under this lock");
        ranges.first_in(range.start(), range.end()).is_some()
    }

    /// Takes the sectors of `range` out of U, unless their whole extent is in it: they are equal on
    /// all current copies. The caller holds the exclusive lock.
    pub fn remove(&self, range: SectorRange) {
        if self.count.load(Ordering::Acquire) == 0 {
            return;
        }
        let mut ranges = self.ranges.lock().expect("no panic under this lock");
        ranges.cut(range.start(), range.end());
        self.count.store(ranges.0.len(), Ordering::Release);
    }

    /// Sectors in U outside of whole extents.
    #[must_use]
    pub fn sectors(&self) -> u64 {
        let ranges = self.ranges.lock().expect("no panic under this lock");
        ranges.0.iter().map(|(start, end)| end - start).sum()
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
            assert_eq!(unresolved.sectors(), model.len() as u64);
        }
    }

    #[test]
    fn ranges_beyond_the_most_put_their_extents_into_u() {
        // 16 extents of 1024 sectors, every other sector.
        let unresolved = Unresolved::new(16, 10);
        let sector = |sector: u64| SectorRange::new(sector, 1).unwrap();
        for number in 0..6000 {
            unresolved.insert(sector(2 * number));
        }
        let ranges = unresolved.ranges.lock().unwrap().0.len();
        assert!(ranges <= RANGES_MAX, "{ranges} ranges");
        assert!((0..6000).all(|number| unresolved.touches(sector(2 * number))));
        assert_eq!(unresolved.extents(), 10, "the first two fit");
        assert!(!unresolved.touches(sector(1)));
        assert!(unresolved.touches(sector(4097)), "it is whole by now");
        assert_eq!(unresolved.part_of(0), Some(sector(0)));
        assert_eq!(unresolved.part_of(5), None);
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
