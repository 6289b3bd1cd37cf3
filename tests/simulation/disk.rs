// SPDX-License-Identifier: Apache-2.0
//! A simulated replica: what each sector holds, and which cannot be read.

use crate::budget::index;
use crate::units::SectorRange;

/// The medium of one replica.
pub struct Disk {
    content: Vec<u64>,
    unreadable: Vec<bool>,
    unreadable_count: usize,
    /// Writes that reached each sector.
    landings: Vec<u32>,
}

impl Disk {
    pub fn new(sector_count: u64) -> Self {
        let count = index(sector_count);
        Self {
            content: vec![0; count],
            unreadable: vec![false; count],
            unreadable_count: 0,
            landings: vec![0; count],
        }
    }

    pub fn value(&self, sector: u64) -> u64 {
        self.content[index(sector)]
    }

    pub fn landings(&self, sector: u64) -> u32 {
        self.landings[index(sector)]
    }

    /// A write reaches the sector; it can be read again. Returns whether it could not before.
    pub fn write(&mut self, sector: u64, value: u64) -> bool {
        let s = index(sector);
        self.content[s] = value;
        self.landings[s] += 1;
        let was_unreadable = std::mem::take(&mut self.unreadable[s]);
        self.unreadable_count -= usize::from(was_unreadable);
        was_unreadable
    }

    /// The content changes without a write.
    pub fn rot(&mut self, sector: u64, value: u64) {
        self.content[index(sector)] = value;
    }

    pub fn make_unreadable(&mut self, sector: u64) {
        let s = index(sector);
        self.unreadable_count += usize::from(!self.unreadable[s]);
        self.unreadable[s] = true;
    }

    pub fn is_readable(&self, range: SectorRange) -> bool {
        self.unreadable_count == 0
            || !(range.start()..range.end()).any(|s| self.unreadable[index(s)])
    }
}
