// SPDX-License-Identifier: Apache-2.0
//! Units and identities shared by every module: sectors, ranges of them, replicas, time.
//!
//! They are types, so that a sector is never taken for a byte or an index for a count. Nothing
//! here knows what the numbers are used for.

use std::fmt;
use std::time::Duration;

/// Bytes in a sector. Virtio counts in these whatever the device's block size is
/// (virtio 1.2, section 5.2.4).
pub const SECTOR_BYTES: u64 = 512;

/// [`SECTOR_BYTES`] for lengths in memory.
pub const SECTOR_LEN: usize = 512;

/// The largest number of replicas of one disk (CONSISTENCY section 1: N <= 16).
pub const REPLICAS_MAX: usize = 16;

/// A non-empty run of sectors that ends at or before sector `u64::MAX`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SectorRange {
    start: u64,
    count: u32,
}

impl SectorRange {
    /// The range of `count` sectors from sector `start`, or `None` if it is empty or ends past
    /// the last sector number there is.
    #[must_use]
    pub fn new(start: u64, count: u32) -> Option<Self> {
        if count == 0 || start.checked_add(u64::from(count)).is_none() {
            return None;
        }
        Some(Self { start, count })
    }

    /// First sector.
    #[must_use]
    pub fn start(self) -> u64 {
        self.start
    }

    /// Number of sectors, at least 1.
    #[must_use]
    pub fn count(self) -> u32 {
        self.count
    }

    /// The sector after the last one.
    #[must_use]
    pub fn end(self) -> u64 {
        self.start + u64::from(self.count)
    }

    /// Offset of the first byte on a replica.
    #[must_use]
    pub fn offset_bytes(self) -> u64 {
        self.start * SECTOR_BYTES
    }

    /// Length in bytes.
    #[must_use]
    pub fn len_bytes(self) -> usize {
        self.count as usize * SECTOR_LEN
    }

    /// Whether the two ranges share a sector.
    #[must_use]
    pub fn overlaps(self, other: Self) -> bool {
        self.start < other.end() && other.start < self.end()
    }

    /// Whether every sector of `other` is in this range.
    #[must_use]
    pub fn contains(self, other: Self) -> bool {
        self.start <= other.start && other.end() <= self.end()
    }

    /// The smallest range that holds this one and begins and ends at multiples of
    /// `block_sectors` (a power of two).
    #[must_use]
    pub fn rounded_out(self, block_sectors: u32) -> Self {
        debug_assert!(block_sectors.is_power_of_two());
        let mask = u64::from(block_sectors) - 1;
        let start = self.start & !mask;
        let end = (self.end() + mask) & !mask;
        let count = u32::try_from(end - start).expect("a rounded range stays below 2^32 sectors");
        Self { start, count }
    }

    /// Whether both ends are multiples of `block_sectors` (a power of two).
    #[must_use]
    pub fn is_aligned(self, block_sectors: u32) -> bool {
        self.rounded_out(block_sectors) == self
    }
}

impl fmt::Debug for SectorRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}+{}", self.start, self.count)
    }
}

impl fmt::Display for SectorRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// The slot of a replica in the replica set, `0..REPLICAS_MAX`, in the order of configuration.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ReplicaId(u8);

impl ReplicaId {
    /// The replica in slot `index`.
    ///
    /// # Panics
    /// If `index` is not below [`REPLICAS_MAX`].
    #[must_use]
    pub fn new(index: usize) -> Self {
        assert!(index < REPLICAS_MAX, "replica index {index} out of range");
        Self(u8::try_from(index).expect("REPLICAS_MAX fits in a byte"))
    }

    /// The slot, for indexing.
    #[must_use]
    pub fn index(self) -> usize {
        usize::from(self.0)
    }
}

impl fmt::Debug for ReplicaId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "r{}", self.0)
    }
}

/// A set of replicas, one bit a slot.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct ReplicaSet(u16);

impl ReplicaSet {
    /// No replica.
    pub const EMPTY: Self = Self(0);

    /// The first `count` slots.
    #[must_use]
    pub fn first(count: usize) -> Self {
        assert!(count <= REPLICAS_MAX);
        let bits = (1u32 << count) - 1;
        Self(u16::try_from(bits).expect("at most 16 bits"))
    }

    /// The set whose bits are `bits`: bit i is slot i.
    #[must_use]
    pub fn from_bits(bits: u16) -> Self {
        Self(bits)
    }

    /// Bit i is slot i.
    #[must_use]
    pub fn bits(self) -> u16 {
        self.0
    }

    /// Number of members.
    #[must_use]
    pub fn count(self) -> usize {
        self.0.count_ones() as usize
    }

    /// Whether there is no member.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Whether `replica` is a member.
    #[must_use]
    pub fn contains(self, replica: ReplicaId) -> bool {
        self.0 & (1 << replica.0) != 0
    }

    /// Whether every member of `other` is a member of this set.
    #[must_use]
    pub fn contains_all(self, other: Self) -> bool {
        other.0 & !self.0 == 0
    }

    /// Makes `replica` a member.
    pub fn insert(&mut self, replica: ReplicaId) {
        self.0 |= 1 << replica.0;
    }

    /// Takes `replica` out.
    pub fn remove(&mut self, replica: ReplicaId) {
        self.0 &= !(1 << replica.0);
    }

    /// Members of either set.
    #[must_use]
    pub fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Members of both sets.
    #[must_use]
    pub fn intersection(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// Members of this set that are not in `other`.
    #[must_use]
    pub fn minus(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// Members in the order of their slots.
    pub fn iter(self) -> impl Iterator<Item = ReplicaId> {
        let mut bits = self.0;
        std::iter::from_fn(move || {
            if bits == 0 {
                return None;
            }
            let slot = bits.trailing_zeros();
            bits &= bits - 1;
            Some(ReplicaId::new(slot as usize))
        })
    }
}

impl fmt::Debug for ReplicaSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

impl Extend<ReplicaId> for ReplicaSet {
    fn extend<I: IntoIterator<Item = ReplicaId>>(&mut self, replicas: I) {
        for replica in replicas {
            self.insert(replica);
        }
    }
}

impl FromIterator<ReplicaId> for ReplicaSet {
    fn from_iter<I: IntoIterator<Item = ReplicaId>>(replicas: I) -> Self {
        let mut set = Self::EMPTY;
        set.extend(replicas);
        set
    }
}

/// A point on the monotonic clock of whoever drives the core, in nanoseconds from an origin of
/// its choice. The core reads no clock: it is told the time with every event.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Time(u64);

impl Time {
    /// The point `nanos` nanoseconds after the origin.
    #[must_use]
    pub fn from_nanos(nanos: u64) -> Self {
        Self(nanos)
    }

    /// Nanoseconds since the origin.
    #[must_use]
    pub fn nanos(self) -> u64 {
        self.0
    }

    /// The point `duration` later, or the last one there is.
    #[must_use]
    pub fn after(self, duration: Duration) -> Self {
        let nanos = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        Self(self.0.saturating_add(nanos))
    }

    /// The point `duration` before; the origin if that would be before it.
    #[must_use]
    pub fn before(self, duration: Duration) -> Self {
        let nanos = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        Self(self.0.saturating_sub(nanos))
    }

    /// The time from `earlier` to this point; zero if `earlier` is later.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

impl fmt::Debug for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}ns", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn range_new_rejects_empty_and_overflow() {
        assert!(SectorRange::new(0, 0).is_none());
        assert!(SectorRange::new(u64::MAX, 1).is_none());
        assert!(SectorRange::new(u64::MAX - 1, 1).is_some());
    }

    #[test]
    fn range_overlap_and_rounding() {
        let a = SectorRange::new(8, 8).unwrap();
        let cases = [
            (0, 8, false),
            (0, 9, true),
            (15, 1, true),
            (16, 4, false),
            (9, 2, true),
        ];
        for (start, count, overlaps) in cases {
            let b = SectorRange::new(start, count).unwrap();
            assert_eq!(a.overlaps(b), overlaps, "{a} {b}");
            assert_eq!(b.overlaps(a), overlaps, "{b} {a}");
        }
        let rounded = SectorRange::new(9, 8).unwrap().rounded_out(8);
        assert_eq!((rounded.start(), rounded.count()), (8, 16));
        assert!(a.is_aligned(8));
    }

    #[test]
    fn replica_set_algebra() {
        let mut set = ReplicaSet::first(3);
        set.remove(ReplicaId::new(1));
        assert_eq!(set.count(), 2);
        assert_eq!(set.iter().map(ReplicaId::index).collect::<Vec<_>>(), [0, 2]);
        assert!(ReplicaSet::first(3).contains_all(set));
        assert!(!set.contains_all(ReplicaSet::first(3)));
        assert_eq!(ReplicaSet::first(16).count(), 16);
    }
}
