// SPDX-License-Identifier: Apache-2.0
//! A simulated replica: what each sector holds, and which cannot be read.

use crate::budget::index;
use crate::cache::Cache;
use crate::rng::Rng;
use crate::units::SectorRange;

/// The medium of one replica.
pub struct Disk {
    content: Vec<u64>,
    unreadable: Vec<bool>,
    unreadable_count: usize,
    /// Writes that reached each sector.
    landings: Vec<u32>,
    /// What is not flushed, if anybody will ask.
    cache: Option<Cache>,
}

impl Disk {
    /// A medium of zeroes, with a volatile cache or without one.
    pub fn new(sector_count: u64, volatile: bool) -> Self {
        let count = index(sector_count);
        Self {
            cache: volatile.then(|| Cache::new(sector_count)),
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

    /// A write of `operation` reaches the sector; it can be read again. Returns whether it could
    /// not before.
    pub fn write(&mut self, sector: u64, value: u64, operation: u64) -> bool {
        let s = index(sector);
        self.content[s] = value;
        self.landings[s] += 1;
        if let Some(cache) = &mut self.cache {
            cache.write(sector, value, operation);
        }
        let was_unreadable = std::mem::take(&mut self.unreadable[s]);
        self.unreadable_count -= usize::from(was_unreadable);
        was_unreadable
    }

    /// The content changes without a write.
    pub fn rot(&mut self, sector: u64, value: u64) {
        self.content[index(sector)] = value;
        if let Some(cache) = &mut self.cache {
            cache.overwrite(sector, value);
        }
    }

    /// The write has ended: later flushes cover it.
    pub fn ended(&mut self, range: SectorRange, operation: u64, step: u64) {
        if let Some(cache) = &mut self.cache {
            cache.ended(range.start()..range.end(), operation, step);
        }
    }

    /// A flush that began in step `began` has ended well, or has not.
    pub fn flushed(&mut self, began: u64, well: bool, rng: &mut Rng) {
        if let Some(cache) = &mut self.cache {
            if well {
                cache.flushed(began);
            } else {
                cache.flush_failed(began, rng);
            }
        }
    }

    /// It is opened anew, and what only the cache of the host held is dropped (rule F4). Returns
    /// the sectors of which that is so.
    pub fn drop_clean(&mut self) -> Vec<u64> {
        let mut dropped = Vec::new();
        let content = &mut self.content;
        if let Some(cache) = &mut self.cache {
            cache.drop_clean(|sector, value| {
                content[index(sector)] = value;
                dropped.push(sector);
            });
        }
        dropped
    }

    /// The power is gone, and with it any part of what was not flushed.
    pub fn lose_power(&mut self, rng: &mut Rng) {
        let content = &mut self.content;
        if let Some(cache) = &mut self.cache {
            cache.lose(rng, |sector, value| content[index(sector)] = value);
        }
    }

    /// Whether what the sector holds would survive a loss of power.
    pub fn is_durable(&self, sector: u64) -> bool {
        self.cache
            .as_ref()
            .is_none_or(|cache| cache.is_durable(sector))
    }

    /// What the sector may hold after a loss of power now.
    pub fn survivors(&self, sector: u64) -> impl Iterator<Item = u64> + '_ {
        let cached = self.cache.iter().flat_map(move |c| c.survivors(sector));
        let certain = self.cache.is_none().then(|| self.value(sector));
        cached.chain(certain)
    }

    /// Sectors whose last writes had ended by step `step` and are not durable.
    pub fn unflushed(&self, step: u64) -> impl Iterator<Item = u64> + '_ {
        let cache = self.cache.iter();
        cache.flat_map(move |cache| cache.unflushed(step))
    }

    /// The sector can be read again. Returns whether it could not before.
    pub fn mend(&mut self, sector: u64) -> bool {
        let was_unreadable = std::mem::take(&mut self.unreadable[index(sector)]);
        self.unreadable_count -= usize::from(was_unreadable);
        was_unreadable
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
