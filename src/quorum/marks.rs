// SPDX-License-Identifier: Apache-2.0
//! The bits the disk remembers: D, extents whose copies may be unequal or unflushed, and B, extents
//! in which a replica may lack an acknowledged write.
//!
//! Every bit exists twice. *Wanted* is what holds now and decides who votes. *Durable* (D*, B*) is
//! what the state record is certain to say after a crash: set in its last durable image **and** in
//! every image being written. What depends on a mark waits for the durable bit (rules W2, W4, R6).
//!
//! Setting is for any lane and costs a load if the bit is set already. A newly set bit raises the
//! number of [marks asked for](Marks::requested); all marks up to a number become durable together,
//! so one write of the record serves everybody who waits. The record reads pages of bits with
//! [`Marks::collect`] and [`Marks::copy_page`] and tells with [`Marks::made_durable`] and
//! [`Marks::settle`] what it has made of them.
//!
//! Clearing is lazy and never waited for. A cleared bit is not durable from that moment on,
//! whatever images of it are on their way.

use super::sync::{AtomicU64, Mutex, Ordering};
use crate::units::ReplicaId;

/// Words of 64 bits in a page of the record (rule R4: 4064 bytes of bits).
pub const PAGE_WORDS: usize = 508;

/// Extents that a page speaks of.
pub const PAGE_EXTENTS: u64 = PAGE_WORDS as u64 * 64;

/// One of the bit maps.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Bitmap {
    /// D.
    Dirty,
    /// B of this replica.
    Behind(ReplicaId),
}

impl Bitmap {
    /// Its number in the record: 0 is D, 1 to 16 are B of the slots (rule R2).
    #[must_use]
    pub fn number(self) -> usize {
        match self {
            Self::Dirty => 0,
            Self::Behind(replica) => 1 + replica.index(),
        }
    }

    /// The map of that number.
    #[must_use]
    pub fn from_number(number: usize) -> Self {
        match number.checked_sub(1) {
            None => Self::Dirty,
            Some(index) => Self::Behind(ReplicaId::new(index)),
        }
    }
}

/// A page of one bit map.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct PageName {
    /// Of which map.
    pub bitmap: Bitmap,
    /// Which one, from 0.
    pub page: usize,
}

/// The bits of a page.
pub type PageBits = [u64; PAGE_WORDS];

/// One map: a bit an extent, wanted and durable.
struct Map {
    wanted: Box<[AtomicU64]>,
    durable: Box<[AtomicU64]>,
    /// Wanted bits that are set.
    count: AtomicU64,
    /// Number of the last mark of this map that was asked for.
    asked: AtomicU64,
    /// Not zero: bits of the page have changed since the record took them.
    touched: Box<[AtomicU64]>,
}

impl Map {
    fn new(extents: u64) -> Self {
        let words = usize::try_from(extents.div_ceil(64)).expect("at most 2^20 extents");
        let zeroes = |count: usize| (0..count).map(|_| AtomicU64::new(0)).collect();
        Self {
            wanted: zeroes(words),
            durable: zeroes(words),
            count: AtomicU64::new(0),
            asked: AtomicU64::new(0),
            touched: zeroes(words.div_ceil(PAGE_WORDS)),
        }
    }

    fn words_of_page(page: usize) -> std::ops::Range<usize> {
        page * PAGE_WORDS..(page + 1) * PAGE_WORDS
    }
}

fn place(extent: u64) -> (usize, u64) {
    let word = usize::try_from(extent / 64).expect("at most 2^20 extents");
    (word, 1 << (extent % 64))
}

/// All maps of a disk.
pub struct Marks {
    maps: Box<[Map]>,
    extents: u64,
    /// Nothing is recorded: a bit is as durable as it will ever be when it is set.
    recorded: bool,
    requested: AtomicU64,
    settled: AtomicU64,
    /// Clears and the taking note of durable images exclude each other.
    imaging: Mutex<()>,
}

impl Marks {
    /// Clear maps for `replicas` replicas of a disk of `extents` extents. With `recorded` a bit is
    /// durable once the record says so, otherwise at once.
    #[must_use]
    pub fn new(replicas: usize, extents: u64, recorded: bool) -> Self {
        Self {
            maps: (0..=replicas).map(|_| Map::new(extents)).collect(),
            extents,
            recorded,
            requested: AtomicU64::new(0),
            settled: AtomicU64::new(0),
            imaging: Mutex::new(()),
        }
    }

    fn map(&self, bitmap: Bitmap) -> &Map {
        &self.maps[bitmap.number()]
    }

    /// Number of extents.
    #[must_use]
    pub fn extents(&self) -> u64 {
        self.extents
    }

    /// Whether the bit is set.
    #[must_use]
    pub fn is_set(&self, bitmap: Bitmap, extent: u64) -> bool {
        let (word, bit) = place(extent);
        self.map(bitmap).wanted[word].load(Ordering::Acquire) & bit != 0
    }

    /// Whether the bit is set for good: D*, B*.
    #[must_use]
    pub fn is_durable(&self, bitmap: Bitmap, extent: u64) -> bool {
        let (word, bit) = place(extent);
        self.map(bitmap).durable[word].load(Ordering::Acquire) & bit != 0
    }

    /// Number of bits that are set.
    #[must_use]
    pub fn count(&self, bitmap: Bitmap) -> u64 {
        self.map(bitmap).count.load(Ordering::Acquire)
    }

    /// Sets a bit. Returns whether it was clear. Does not write to memory if it was set.
    pub fn set(&self, bitmap: Bitmap, extent: u64) -> bool {
        assert!(extent < self.extents, "an extent of the disk");
        let (word, bit) = place(extent);
        let map = self.map(bitmap);
        if map.wanted[word].load(Ordering::Acquire) & bit != 0 {
            return false;
        }
        if map.wanted[word].fetch_or(bit, Ordering::AcqRel) & bit != 0 {
            return false;
        }
        map.count.fetch_add(1, Ordering::AcqRel);
        if self.recorded {
            self.request(map, word);
        } else {
            map.durable[word].fetch_or(bit, Ordering::AcqRel);
        }
        true
    }

    /// Sets a bit that something depends on. `None`: it is durable. Otherwise it is when
    /// [`Marks::is_settled`] holds for the number that is returned, unless it was cleared again.
    #[must_use]
    pub fn ask(&self, bitmap: Bitmap, extent: u64) -> Option<u64> {
        if self.is_durable(bitmap, extent) {
            return None;
        }
        self.set(bitmap, extent);
        if !self.recorded {
            return None;
        }
        // A number of its own, even if the bit was set: whoever set it may not have come to the
        // point where the record sees it.
        let (word, _) = place(extent);
        Some(self.request(self.map(bitmap), word))
    }

    fn request(&self, map: &Map, word: usize) -> u64 {
        // In this order: whoever sees the number finds the page touched and the bit set.
        map.touched[word / PAGE_WORDS].store(1, Ordering::Release);
        let number = self.requested.fetch_add(1, Ordering::AcqRel) + 1;
        map.asked.fetch_max(number, Ordering::AcqRel);
        number
    }

    /// For whoever depends on clears, which are lazy otherwise: all bits that are clear now are so
    /// in the record when [`Marks::is_settled`] holds for the number that is returned, unless
    /// [`Marks::last_asked`] is higher then. `None`: nothing is recorded.
    #[must_use]
    pub fn ask_clears(&self) -> Option<u64> {
        let next = || self.requested.fetch_add(1, Ordering::AcqRel) + 1;
        self.recorded.then(next)
    }

    /// Number of the last mark of this map that was asked for.
    #[must_use]
    pub fn last_asked(&self, bitmap: Bitmap) -> u64 {
        self.map(bitmap).asked.load(Ordering::Acquire)
    }

    /// Clears a bit. Returns whether it was set.
    pub fn clear(&self, bitmap: Bitmap, extent: u64) -> bool {
        let _alone = self.imaging.lock().expect("no panic under this lock");
        let (word, bit) = place(extent);
        let map = self.map(bitmap);
        map.durable[word].fetch_and(!bit, Ordering::AcqRel);
        if map.wanted[word].fetch_and(!bit, Ordering::AcqRel) & bit == 0 {
            return false;
        }
        map.count.fetch_sub(1, Ordering::AcqRel);
        map.touched[word / PAGE_WORDS].store(1, Ordering::Release);
        true
    }

    /// Sets every bit of a map.
    pub fn set_all(&self, bitmap: Bitmap) {
        for extent in 0..self.extents {
            self.set(bitmap, extent);
        }
    }

    /// Extents whose bit is set, in order.
    pub fn iter(&self, bitmap: Bitmap) -> impl Iterator<Item = u64> + '_ {
        self.iter_from(bitmap, 0)
    }

    /// Like [`Marks::iter`], from extent `first` on.
    pub fn iter_from(&self, bitmap: Bitmap, first: u64) -> impl Iterator<Item = u64> + '_ {
        let words = &self.map(bitmap).wanted;
        let start = usize::try_from(first / 64)
            .expect("at most 2^20 extents")
            .min(words.len());
        (start as u64..)
            .zip(&words[start..])
            .flat_map(move |(index, word)| {
                let mut bits = word.load(Ordering::Acquire);
                if index == first / 64 {
                    bits &= u64::MAX << (first % 64);
                }
                std::iter::from_fn(move || {
                    if bits == 0 {
                        return None;
                    }
                    let bit = bits.trailing_zeros();
                    bits &= bits - 1;
                    Some(index * 64 + u64::from(bit))
                })
            })
    }

    /// Whether `replica` is behind for good in every dirty extent: a look at all words.
    #[must_use]
    pub fn is_covered(&self, replica: ReplicaId) -> bool {
        let dirty = self.map(Bitmap::Dirty).wanted.iter();
        let behind = self.map(Bitmap::Behind(replica)).durable.iter();
        dirty
            .zip(behind)
            .all(|(d, b)| d.load(Ordering::Acquire) & !b.load(Ordering::Acquire) == 0)
    }

    /// Marks that were asked for so far.
    #[must_use]
    pub fn requested(&self) -> u64 {
        self.requested.load(Ordering::Acquire)
    }

    /// Whether all marks up to the `number`th are durable, or cleared since.
    #[must_use]
    pub fn is_settled(&self, number: u64) -> bool {
        // Together with the flags of waiting lanes: one of the two sees the other.
        self.settled.load(Ordering::SeqCst) >= number
    }

    /// Whether the record has something to write: a page has changed since it was taken.
    #[must_use]
    pub fn is_touched(&self) -> bool {
        let touched = |map: &Map| map.touched.iter().any(|t| t.load(Ordering::Acquire) != 0);
        self.maps.iter().any(touched)
    }

    /// For the record: appends the pages that changed since the last call. The return value is
    /// for [`Marks::settle`], when all of them are durable.
    pub fn collect(&self, pages: &mut Vec<PageName>) -> u64 {
        // First the number: what is asked for after it is in the next image.
        let number = self.requested();
        for (map, bits) in self.maps.iter().enumerate() {
            for (page, touched) in bits.touched.iter().enumerate() {
                if touched.load(Ordering::Acquire) != 0 && touched.swap(0, Ordering::AcqRel) != 0 {
                    let bitmap = Bitmap::from_number(map);
                    pages.push(PageName { bitmap, page });
                }
            }
        }
        number
    }

    /// For the record: the wanted bits of a page; beyond the disk they are clear.
    pub fn copy_page(&self, name: PageName, bits: &mut PageBits) {
        let words = &self.map(name.bitmap).wanted;
        for (bits, index) in bits.iter_mut().zip(Map::words_of_page(name.page)) {
            *bits = words
                .get(index)
                .map_or(0, |word| word.load(Ordering::Acquire));
        }
    }

    /// For the record: this image of a page is durable, and no older one is being written.
    pub fn made_durable(&self, name: PageName, bits: &PageBits) {
        let _alone = self.imaging.lock().expect("no panic under this lock");
        let map = self.map(name.bitmap);
        for (&bits, index) in bits.iter().zip(Map::words_of_page(name.page)) {
            if let Some(wanted) = map.wanted.get(index) {
                // A bit cleared since then is not in the images to come.
                let durable = bits & wanted.load(Ordering::Acquire);
                map.durable[index].store(durable, Ordering::Release);
            }
        }
    }

    /// For the record: all marks up to the `number`th are durable.
    pub fn settle(&self, number: u64) {
        self.settled.fetch_max(number, Ordering::SeqCst);
    }

    /// At a start, before anything else: sets the bits that the record holds. They are durable once
    /// the record has written the page again, or has said that all copies hold it.
    pub fn load(&self, name: PageName, bits: &PageBits) {
        for (&bits, word) in bits.iter().zip(name.page as u64 * PAGE_WORDS as u64..) {
            let mut bits = bits;
            while bits != 0 {
                let extent = word * 64 + u64::from(bits.trailing_zeros());
                bits &= bits - 1;
                // Whatever a damaged page says of extents that do not exist means nothing.
                if extent < self.extents {
                    self.set(name.bitmap, extent);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn b1() -> Bitmap {
        Bitmap::Behind(ReplicaId::new(1))
    }

    fn image(marks: &Marks, name: PageName) -> PageBits {
        let mut bits = [0; PAGE_WORDS];
        marks.copy_page(name, &mut bits);
        bits
    }

    #[test]
    fn set_is_durable_only_when_the_record_says_so() {
        let marks = Marks::new(3, 70_000, true);
        assert!(marks.set(b1(), 40_000));
        assert!(!marks.set(b1(), 40_000));
        assert!(marks.is_set(b1(), 40_000) && !marks.is_durable(b1(), 40_000));
        let asked = marks.requested();
        let mut pages = Vec::new();
        let number = marks.collect(&mut pages);
        let name = PageName {
            bitmap: b1(),
            page: 1,
        };
        assert_eq!((pages.as_slice(), number), ([name].as_slice(), asked));
        // Asked for while the image is on its way: not in it.
        let bits = image(&marks, name);
        marks.set(b1(), 40_001);
        marks.made_durable(name, &bits);
        marks.settle(number);
        assert!(marks.is_durable(b1(), 40_000) && !marks.is_durable(b1(), 40_001));
        assert!(marks.is_settled(asked) && !marks.is_settled(marks.requested()));
        assert!(marks.is_touched());
        assert_eq!(marks.ask(b1(), 40_000), None);
        let waits_for = marks.ask(b1(), 40_001).expect("not durable yet");
        assert!(!marks.is_settled(waits_for));
    }

    #[test]
    fn clear_is_not_undone_by_an_image_on_its_way() {
        let marks = Marks::new(3, 100, true);
        marks.set(Bitmap::Dirty, 5);
        let mut pages = Vec::new();
        marks.collect(&mut pages);
        let old = image(&marks, pages[0]);
        assert!(marks.clear(Bitmap::Dirty, 5));
        marks.made_durable(pages[0], &old);
        assert!(!marks.is_durable(Bitmap::Dirty, 5));
        assert_eq!(marks.count(Bitmap::Dirty), 0);
    }

    #[test]
    fn without_a_record_marks_are_durable_at_once() {
        let marks = Marks::new(1, 100, false);
        marks.set(Bitmap::Dirty, 99);
        assert!(marks.is_durable(Bitmap::Dirty, 99) && marks.is_settled(marks.requested()));
    }

    #[test]
    fn iter_from_begins_inside_a_word() {
        let marks = Marks::new(1, 200, false);
        for extent in [3, 64, 70, 199] {
            marks.set(Bitmap::Dirty, extent);
        }
        let found: Vec<u64> = marks.iter_from(Bitmap::Dirty, 65).collect();
        assert_eq!(found, [70, 199]);
        assert_eq!(marks.iter_from(Bitmap::Dirty, 4096).count(), 0);
    }

    #[test]
    fn load_ignores_extents_beyond_the_disk() {
        let marks = Marks::new(1, 65, true);
        let mut bits = [0; PAGE_WORDS];
        bits[1] = u64::MAX;
        let name = PageName {
            bitmap: Bitmap::Dirty,
            page: 0,
        };
        marks.load(name, &bits);
        assert_eq!(marks.iter(Bitmap::Dirty).collect::<Vec<_>>(), [64]);
        assert!(!marks.is_durable(Bitmap::Dirty, 64));
    }
}
