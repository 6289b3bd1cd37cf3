// SPDX-License-Identifier: Apache-2.0
//! The set U: sectors whose content must be settled on all current copies before it is shown
//! (rules W7, Y1).

use super::sync::{AtomicUsize, Mutex, Ordering};
use crate::units::SectorRange;

/// Ranges to be resolved. Empty nearly always; then a look costs one load.
pub struct Unresolved {
    count: AtomicUsize,
    ranges: Mutex<Vec<SectorRange>>,
}

impl Unresolved {
    /// No range.
    #[must_use]
    pub fn new() -> Self {
        Self {
            count: AtomicUsize::new(0),
            ranges: Mutex::new(Vec::new()),
        }
    }

    /// Puts `range` into U. The caller holds its exclusive lock.
    pub fn insert(&self, range: SectorRange) {
        let mut ranges = self.ranges.lock().expect("no panic under this lock");
        if !ranges.iter().any(|known| known.contains(range)) {
            ranges.push(range);
        }
        self.count.store(ranges.len(), Ordering::Release);
    }

    /// Whether a sector of `range` is in U.
    #[must_use]
    pub fn touches(&self, range: SectorRange) -> bool {
        if self.count.load(Ordering::Acquire) == 0 {
            return false;
        }
        let ranges = self.ranges.lock().expect("no panic under this lock");
        ranges.iter().any(|known| known.overlaps(range))
    }

    /// Takes the sectors of `range` out of U: they are equal and durable on all current copies.
    /// The caller holds the exclusive lock.
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

    /// Sectors in U, each counted once per range that holds it.
    #[must_use]
    pub fn sectors(&self) -> u64 {
        let ranges = self.ranges.lock().expect("no panic under this lock");
        ranges.iter().map(|range| u64::from(range.count())).sum()
    }
}

impl Default for Unresolved {
    fn default() -> Self {
        Self::new()
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
            let unresolved = Unresolved::new();
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
}
