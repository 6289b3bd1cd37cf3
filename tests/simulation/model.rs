// SPDX-License-Identifier: Apache-2.0
//! What the guest may see (invariant I1).
//!
//! Writes of a sector take effect in the order in which they were sent, because overlapping
//! requests are served in that order. So a sector's past is a row of versions, and a read may
//! return a version that is at least as new as the last one acknowledged, and the last one shown,
//! before the read began. A write that failed may or may not have happened; once a read that began
//! later has shown something older, it has not; that it was shown while it was in flight obliges to
//! nothing, because it takes more than N-T faults to make it fail.
//!
//! Zeroes do not say which write they are of, so showing them obliges to nothing. That also leaves
//! room for the one thing that votes without a lock cannot exclude: a read of a sector that is
//! being written twice may count the ballot of a replica from before both writes and that of
//! another from after both, if these are equal, although they were never equal at one moment.

use std::collections::BTreeMap;

use crate::budget::index;
use crate::content::version_of;
use crate::pool::REQUEST_SECTORS;
use crate::units::SectorRange;

/// Zeroing writes of a sector that are remembered.
const ZEROES_KEPT: usize = 256;

struct Sector {
    /// Nothing older may be returned any more.
    floor: u64,
    /// The last version that was acknowledged.
    acknowledged: u64,
    /// Versions that read as zeroes.
    zeroes: Vec<u64>,
    /// Failed writes and when they failed.
    failed: Vec<(u64, u64)>,
}

/// What a read must not fall behind, per sector of its range.
pub type Floors = [u64; REQUEST_SECTORS];

/// The guest's view of the disk.
pub struct Model {
    sectors: Vec<Sector>,
    /// Failed writes that are known not to have happened, and since when.
    dead: BTreeMap<(u64, u64), u64>,
    newest: u64,
}

impl Model {
    pub fn new(sector_count: u64) -> Self {
        let sectors = (0..sector_count)
            .map(|_| Sector {
                floor: 0,
                acknowledged: 0,
                zeroes: vec![0],
                failed: Vec::new(),
            })
            .collect();
        Self {
            sectors,
            dead: BTreeMap::new(),
            newest: 0,
        }
    }

    /// A new write.
    pub fn next_version(&mut self) -> u64 {
        self.newest += 1;
        self.newest
    }

    /// A write of zeroes was sent.
    pub fn zeroing(&mut self, range: SectorRange, version: u64) {
        for s in range.start()..range.end() {
            let zeroes = &mut self.sectors[index(s)].zeroes;
            if zeroes.len() == ZEROES_KEPT {
                zeroes.remove(0);
            }
            zeroes.push(version);
        }
    }

    pub fn floors(&self, range: SectorRange) -> Floors {
        let mut floors = [0; REQUEST_SECTORS];
        for (floor, s) in floors.iter_mut().zip(range.start()..range.end()) {
            *floor = self.sectors[index(s)].floor;
        }
        floors
    }

    pub fn acknowledged(&mut self, range: SectorRange, version: u64) {
        for s in range.start()..range.end() {
            let sector = &mut self.sectors[index(s)];
            sector.floor = sector.floor.max(version);
            sector.acknowledged = sector.acknowledged.max(version);
            sector.failed.retain(|(failed, _)| *failed > version);
        }
    }

    pub fn failed(&mut self, range: SectorRange, version: u64, step: u64) {
        for s in range.start()..range.end() {
            let sector = &mut self.sectors[index(s)];
            sector.failed.push((version, step));
            if sector.floor == version {
                sector.floor = sector.acknowledged;
            }
        }
    }

    /// The version that `value` stands for, if it is legal in `sector` for a reader that began at
    /// step `began` and must not fall behind `floor`.
    fn legal(&self, sector: u64, value: u64, floor: u64, began: u64) -> Option<u64> {
        let lives = |version: u64| {
            let dead = self.dead.get(&(sector, version));
            version >= floor && dead.is_none_or(|&died| died >= began)
        };
        if value == 0 {
            let zeroes = &self.sectors[index(sector)].zeroes;
            return zeroes.iter().copied().find(|&version| lives(version));
        }
        version_of(value, sector).filter(|&version| lives(version))
    }

    /// Whether the content is one that a read which begins now might return.
    pub fn is_legal_now(&self, sector: u64, value: u64) -> bool {
        let floor = self.sectors[index(sector)].floor;
        self.legal(sector, value, floor, u64::MAX).is_some()
    }

    /// A read that began at step `began` returned `value`.
    pub fn shown(
        &mut self,
        sector: u64,
        value: u64,
        floor: u64,
        began: u64,
        now: u64,
    ) -> Result<(), String> {
        let Some(version) = self.legal(sector, value, floor, began) else {
            return Err(format!(
                "sector {sector} read as {value:#x} (version {:?}); nothing older than version \
                 {floor} is legal",
                version_of(value, sector)
            ));
        };
        let known = &mut self.sectors[index(sector)];
        let dead = &mut self.dead;
        let failed_meanwhile = |&(failed, when): &(u64, u64)| failed == version && when >= began;
        if value != 0 && !known.failed.iter().any(failed_meanwhile) {
            known.floor = known.floor.max(version);
            known.failed.retain(|&(failed, when)| {
                let died = failed > version && when < began;
                if died {
                    dead.insert((sector, failed), now);
                }
                !died && failed > version
            });
        }
        Ok(())
    }
}
