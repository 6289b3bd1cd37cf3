// SPDX-License-Identifier: Apache-2.0
//! What a replica would lose with the power: writes that reached it and were not flushed.
//!
//! A flush covers the writes that had ended when it began. One that fails leaves what it covers as
//! Linux does: the pages are clean, so that no later flush writes them, and reads show them until
//! they are dropped, although the medium may not hold them (rules F3, F4).

use crate::budget::index;
use crate::rng::Rng;

/// Contents of a sector that are remembered; the oldest unflushed ones cannot survive then.
const KEPT: usize = 24;

/// A write of a sector that the medium may lack.
#[derive(Clone, Copy)]
struct Entry {
    value: u64,
    operation: u64,
    /// The step in which the operation ended.
    ended: u64,
    /// A flush that covered it failed: no other one will write it.
    forsaken: bool,
}

/// The volatile cache in front of a medium.
pub struct Cache {
    stable: Vec<u64>,
    entries: Vec<Vec<Entry>>,
    /// Sectors with entries.
    dirty: Vec<u64>,
}

impl Cache {
    pub fn new(sector_count: u64) -> Self {
        Self {
            stable: vec![0; index(sector_count)],
            entries: vec![Vec::new(); index(sector_count)],
            dirty: Vec::new(),
        }
    }

    /// `operation` writes the sector.
    pub fn write(&mut self, sector: u64, value: u64, operation: u64) {
        let entries = &mut self.entries[index(sector)];
        if entries.is_empty() {
            self.dirty.push(sector);
        }
        if entries.len() == KEPT {
            entries.remove(0);
        }
        entries.push(Entry {
            value,
            operation,
            ended: u64::MAX,
            forsaken: false,
        });
    }

    /// The medium itself changes.
    pub fn overwrite(&mut self, sector: u64, value: u64) {
        self.stable[index(sector)] = value;
        self.entries[index(sector)].clear();
        self.dirty.retain(|&dirty| dirty != sector);
    }

    /// The operation has ended: flushes that begin from now on cover it.
    pub fn ended(&mut self, sectors: std::ops::Range<u64>, operation: u64, step: u64) {
        for sector in sectors {
            for entry in &mut self.entries[index(sector)] {
                if entry.operation == operation {
                    entry.ended = step;
                }
            }
        }
    }

    /// A flush that began in step `began` went well.
    pub fn flushed(&mut self, began: u64) {
        self.settle(began, |_| true);
    }

    /// A flush that began in step `began` failed: what it covers is written or not, and clean.
    pub fn flush_failed(&mut self, began: u64, rng: &mut Rng) {
        self.settle(began, |_| rng.chance(500_000));
    }

    fn settle(&mut self, began: u64, mut written: impl FnMut(u64) -> bool) {
        let (entries, stable) = (&mut self.entries, &mut self.stable);
        self.dirty.retain(|&sector| {
            let entries = &mut entries[index(sector)];
            let covered = |entry: &Entry| entry.ended <= began && !entry.forsaken;
            if let Some(last) = entries.iter().rposition(covered) {
                if written(sector) {
                    stable[index(sector)] = entries[last].value;
                    entries.drain(..=last);
                } else {
                    for entry in &mut entries[..=last] {
                        entry.forsaken = true;
                    }
                }
            }
            !entries.is_empty()
        });
    }

    /// The pages that a flush has failed to write are dropped (rule F4). Calls `shown` with each
    /// sector that reads differently from now on.
    pub fn drop_clean(&mut self, mut shown: impl FnMut(u64, u64)) {
        let (entries, stable) = (&mut self.entries, &self.stable);
        self.dirty.retain(|&sector| {
            let entries = &mut entries[index(sector)];
            let before = entries.len();
            entries.retain(|entry| !entry.forsaken);
            if entries.len() < before {
                let last = entries.last().map(|entry| entry.value);
                shown(sector, last.unwrap_or(stable[index(sector)]));
            }
            !entries.is_empty()
        });
    }

    /// The power is gone: of each sector any of the unflushed contents is left, or the flushed one.
    pub fn lose(&mut self, rng: &mut Rng, mut shown: impl FnMut(u64, u64)) {
        for sector in self.dirty.drain(..) {
            let s = index(sector);
            let entries = &mut self.entries[s];
            if rng.chance(600_000) {
                self.stable[s] = entries[rng.index(entries.len())].value;
            }
            entries.clear();
            shown(sector, self.stable[s]);
        }
    }

    /// Whether the medium holds what the sector reads as.
    pub fn is_durable(&self, sector: u64) -> bool {
        self.entries[index(sector)].is_empty()
    }

    /// What the sector may hold after a loss of power.
    pub fn survivors(&self, sector: u64) -> impl Iterator<Item = u64> + '_ {
        let unflushed = self.entries[index(sector)].iter().map(|entry| entry.value);
        std::iter::once(self.stable[index(sector)]).chain(unflushed)
    }

    /// Sectors whose write had ended by step `step` and is not durable.
    pub fn unflushed(&self, step: u64) -> impl Iterator<Item = u64> + '_ {
        let old = move |&&sector: &&u64| {
            let entries = &self.entries[index(sector)];
            entries.iter().any(|entry| entry.ended <= step)
        };
        self.dirty.iter().filter(old).copied()
    }
}
