// SPDX-License-Identifier: Apache-2.0
//! The fault budget: at most N-T replicas are bad at a sector at any moment, so that whatever
//! goes wrong is our fault and not the faults'.

use crate::quorum::Geometry;
use crate::units::SectorRange;

/// Most replicas of a simulated disk.
pub const REPLICAS: usize = 8;

/// Which copies may be bad, and how many more may become so.
pub struct Budget {
    limit: u32,
    block_sectors: usize,
    extent_shift: u32,
    /// Replicas whose sector is not what it should be, a bit each.
    tainted: Vec<u16>,
    /// Faults that are still at work on a sector, counted per replica.
    held: Vec<[u8; REPLICAS]>,
    held_bits: Vec<u16>,
    /// Replicas that may any moment be behind in an extent, because of a fault.
    doomed: Vec<u16>,
    /// Until when; a fault that nothing came of is forgotten.
    doomed_until: Vec<[u64; REPLICAS]>,
    /// Replicas that are behind in an extent, or not up.
    absent: Vec<u16>,
    /// Extents that nobody may spoil: their copies may all be different already.
    frozen: Vec<bool>,
    /// How long a fault counts that may leave a replica behind; `u64::MAX`: for ever.
    doom_lasts: u64,
    pub now: u64,
    pub step: u64,
    /// The last step in which more copies of a sector were bad than a quorum survives.
    lost_at: Vec<u64>,
    /// Copies that a quorum survives.
    spare: u32,
    /// Sectors that cannot be read near a sector, counted per replica.
    shaded: Vec<[u8; REPLICAS]>,
    shaded_bits: Vec<u16>,
    /// Repair operations at work in an extent, counted per replica.
    repairs: Vec<[u8; REPLICAS]>,
    /// Reads at work on a sector.
    reads: Vec<u32>,
    /// Writes at work on a sector.
    writes: Vec<u32>,
    rare: u32,
}

pub fn bit(replica: usize) -> u16 {
    1 << replica
}

fn sectors(range: SectorRange) -> impl Iterator<Item = usize> {
    (range.start()..range.end()).map(index)
}

/// A sector or extent number as an index.
pub fn index(number: u64) -> usize {
    usize::try_from(number).expect("a small disk")
}

impl Budget {
    /// At most `limit` copies are bad at once; a quorum survives `spare`.
    pub fn new(limit: usize, spare: usize, geometry: &Geometry) -> Self {
        let count = index(geometry.sectors());
        let extent_shift = geometry.extent_shift();
        let extents = (count >> extent_shift) + 1;
        Self {
            limit: u32::try_from(limit).expect("a few replicas"),
            block_sectors: index(u64::from(geometry.block_sectors())),
            extent_shift,
            tainted: vec![0; count],
            held: vec![[0; REPLICAS]; count],
            held_bits: vec![0; count],
            doomed: vec![0; extents],
            doomed_until: vec![[0; REPLICAS]; extents],
            absent: vec![0; extents],
            frozen: vec![false; extents],
            doom_lasts: u64::MAX,
            now: 0,
            step: 0,
            lost_at: vec![0; count],
            spare: u32::try_from(spare).expect("a few replicas"),
            shaded: vec![[0; REPLICAS]; count],
            shaded_bits: vec![0; count],
            reads: vec![0; count],
            writes: vec![0; count],
            rare: 0,
            repairs: vec![[0; REPLICAS]; extents],
        }
    }

    /// From now on replicas come back, and faults are forgotten after this time.
    pub fn forget_after(&mut self, lasts: u64) {
        self.doom_lasts = lasts;
    }

    /// Forgets old faults.
    pub fn expire(&mut self) {
        for (doomed, until) in self.doomed.iter_mut().zip(&self.doomed_until) {
            for (replica, &until) in until.iter().enumerate() {
                if until <= self.now {
                    *doomed &= !bit(replica);
                }
            }
        }
    }

    /// Who is behind in an extent or not up, and whether all its copies may be different.
    pub fn set_absent(&mut self, extent: u64, absent: u16, frozen: bool) {
        let e = index(extent);
        self.frozen[e] = frozen;
        if std::mem::replace(&mut self.absent[e], absent) != absent {
            let first = e << self.extent_shift;
            let last = (first + (1 << self.extent_shift)).min(self.tainted.len());
            for s in first..last {
                self.note_lost(s);
            }
        }
    }

    /// Nothing is in flight any more.
    pub fn restart(&mut self) {
        let count = self.tainted.len();
        self.held = vec![[0; REPLICAS]; count];
        self.held_bits = vec![0; count];
        self.reads = vec![0; count];
        self.writes = vec![0; count];
        self.doomed.fill(0);
        self.doomed_until.fill([0; REPLICAS]);
        for repairs in &mut self.repairs {
            *repairs = [0; REPLICAS];
        }
    }

    /// Copies whose content is silently wrong.
    pub fn tainted_copies(&self, sector: u64) -> u16 {
        self.tainted[index(sector)]
    }

    /// Whether the copy may be wrong or missing for whatever reason.
    pub fn is_bad(&self, sector: u64, replica: usize) -> bool {
        self.bad(index(sector)) & bit(replica) != 0
    }

    /// Whether more copies of the sector are bad than may be.
    pub fn is_overdrawn(&self, sector: u64) -> bool {
        self.bad(index(sector)).count_ones() > self.limit
    }

    pub fn sector_count(&self) -> u64 {
        self.tainted.len() as u64
    }

    pub fn extent_shift(&self) -> u32 {
        self.extent_shift
    }

    fn extent(&self, sector: usize) -> usize {
        sector >> self.extent_shift
    }

    fn bad(&self, sector: usize) -> u16 {
        self.tainted[sector]
            | self.held_bits[sector]
            | self.shaded_bits[sector]
            | self.doomed[self.extent(sector)]
            | self.absent[self.extent(sector)]
    }

    /// The sectors of the block of `sector`.
    fn around(&self, sector: usize) -> std::ops::Range<usize> {
        let first = sector - sector % self.block_sectors;
        first..(first + self.block_sectors).min(self.tainted.len())
    }

    /// Whether `sector` may become unreadable on `replica`; then it counts as that, and so does
    /// its block: a replica that fails a read is read again block by block.
    pub fn shade(&mut self, sector: u64, replica: usize) -> bool {
        let s = index(sector);
        let around = self.around(s);
        let free =
            self.repairs[self.extent(s)][replica] == 0 && self.reads[s] == 0 && self.writes[s] == 0;
        let fits = |s: usize| (self.bad(s) | bit(replica)).count_ones() <= self.limit;
        if !free || !around.clone().all(fits) {
            return false;
        }
        for s in around {
            self.shaded[s][replica] += 1;
            self.shaded_bits[s] |= bit(replica);
        }
        true
    }

    /// `sector` can be read again.
    pub fn unshade(&mut self, sector: u64, replica: usize) {
        for s in self.around(index(sector)) {
            self.shaded[s][replica] -= 1;
            if self.shaded[s][replica] == 0 {
                self.shaded_bits[s] &= !bit(replica);
            }
        }
    }

    /// Whether `replica` may be bad in `range`.
    pub fn admits(&self, range: SectorRange, replica: usize) -> bool {
        !self.is_frozen(range)
            && sectors(range).all(|s| (self.bad(s) | bit(replica)).count_ones() <= self.limit)
    }

    /// Whether the content of `range` may change on `replica` without a write. While a settlement
    /// is at work there, its repair may fail because of that, which costs the extent; then there
    /// must be room for that as well.
    pub fn admits_rot(&mut self, range: SectorRange, replica: usize) -> bool {
        if self.is_being_written(range) || self.is_frozen(range) {
            return false;
        }
        if self.is_being_settled(range, replica) {
            self.rare += 1;
            return self.rare.is_multiple_of(8) && self.doom(range, replica);
        }
        self.admits(range, replica)
    }

    /// Like [`Budget::admits_rot`] for a write whose fault is in the books already.
    pub fn admits_landing(&mut self, range: SectorRange, replica: usize) -> bool {
        !self.is_being_written(range)
            && (!self.is_being_settled(range, replica) || self.doom(range, replica))
    }

    /// While a write is under way, a read without a lock may have shown it because T copies held
    /// it. If one of these turned back into what another replica still holds, the next read would
    /// show that, and nobody could tell.
    fn is_being_written(&self, range: SectorRange) -> bool {
        sectors(range).any(|s| self.writes[s] > 0)
    }

    fn is_frozen(&self, range: SectorRange) -> bool {
        let extent = |sector: u64| self.extent(index(sector));
        (extent(range.start())..=extent(range.end() - 1)).any(|extent| self.frozen[extent])
    }

    /// Whether a settlement may have read `range` and be about to repair it.
    fn is_being_settled(&self, range: SectorRange, replica: usize) -> bool {
        let extent = self.extent(index(range.start()));
        self.repairs[extent][replica] > 0 || sectors(range).any(|s| self.reads[s] > 0)
    }

    pub fn begins(&mut self, range: SectorRange, writes: bool) {
        let counts = if writes {
            &mut self.writes
        } else {
            &mut self.reads
        };
        for s in sectors(range) {
            counts[s] += 1;
        }
    }

    pub fn ends(&mut self, range: SectorRange, writes: bool) {
        let counts = if writes {
            &mut self.writes
        } else {
            &mut self.reads
        };
        for s in sectors(range) {
            counts[s] -= 1;
        }
    }

    pub fn repair_begins(&mut self, range: SectorRange, replica: usize) {
        let extent = self.extent(index(range.start()));
        self.repairs[extent][replica] += 1;
    }

    pub fn repair_ends(&mut self, range: SectorRange, replica: usize) {
        let extent = self.extent(index(range.start()));
        self.repairs[extent][replica] -= 1;
    }

    /// Whether `replica` may fall behind in the extent of `range`; then it is expected to.
    pub fn doom(&mut self, range: SectorRange, replica: usize) -> bool {
        let extent = self.extent(index(range.start()));
        let first = extent << self.extent_shift;
        let last = (first + (1 << self.extent_shift)).min(self.tainted.len());
        let fits = self.doomed[extent] & bit(replica) != 0
            || (first..last).all(|s| (self.bad(s) | bit(replica)).count_ones() <= self.limit);
        if fits {
            self.doomed[extent] |= bit(replica);
            let until = &mut self.doomed_until[extent][replica];
            *until = self.now.saturating_add(self.doom_lasts).max(*until);
        }
        fits
    }

    /// Like [`Budget::doom`] for the whole disk.
    pub fn doom_everywhere(&mut self, replica: usize) -> bool {
        self.doom_until(replica, self.now.saturating_add(self.doom_lasts))
    }

    /// Like [`Budget::doom_everywhere`] until some time.
    pub fn doom_until(&mut self, replica: usize, time: u64) -> bool {
        let fits = (0..self.tainted.len())
            .all(|s| (self.bad(s) | bit(replica)).count_ones() <= self.limit);
        if fits {
            for (extent, until) in self.doomed.iter_mut().zip(&mut self.doomed_until) {
                *extent |= bit(replica);
                until[replica] = until[replica].max(time);
            }
        }
        fits
    }

    pub fn is_doomed_everywhere(&self, replica: usize) -> bool {
        (0..self.tainted.len() as u64).all(|sector| self.is_doomed(sector, replica))
    }

    pub fn is_doomed(&self, sector: u64, replica: usize) -> bool {
        let extent = self.extent(index(sector));
        (self.doomed[extent] | self.absent[extent]) & bit(replica) != 0
    }

    /// Whether a silent fault, other than being behind, explains what is wrong with the copy.
    pub fn is_tainted(&self, sector: u64, replica: usize) -> bool {
        let s = index(sector);
        (self.tainted[s] | self.held_bits[s]) & bit(replica) != 0
    }

    pub fn taint(&mut self, sector: u64, replica: usize) {
        self.tainted[index(sector)] |= bit(replica);
        self.note_lost(index(sector));
    }

    /// Takes note of sectors of which too many copies are bad as it is.
    pub fn look_at(&mut self, range: SectorRange) {
        for s in sectors(range) {
            self.note_lost(s);
        }
    }

    fn note_lost(&mut self, sector: usize) {
        if self.bad(sector).count_ones() > self.spare {
            self.lost_at[sector] = self.step;
        }
    }

    /// Whether more copies of the sector were bad since step `since` than a quorum survives.
    pub fn was_lost(&self, sector: u64, since: u64) -> bool {
        self.lost_at[index(sector)] >= since
    }

    pub fn cleanse(&mut self, sector: u64, replica: usize) {
        self.note_lost(index(sector));
        self.tainted[index(sector)] &= !bit(replica);
    }

    /// A fault is at work in `range` until [`Budget::release`].
    pub fn hold(&mut self, range: SectorRange, replica: usize) {
        for s in sectors(range) {
            self.held[s][replica] += 1;
            self.held_bits[s] |= bit(replica);
            self.note_lost(s);
        }
    }

    pub fn release(&mut self, range: SectorRange, replica: usize) {
        for s in sectors(range) {
            self.held[s][replica] -= 1;
            if self.held[s][replica] == 0 {
                self.held_bits[s] &= !bit(replica);
            }
        }
    }
}
