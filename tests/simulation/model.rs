// SPDX-License-Identifier: Apache-2.0
//! What the guest may see (invariants I1, I8).
//!
//! Writes of a sector take effect in the order in which they were sent, because overlapping
//! requests are served in that order. So a sector's past is a row of versions, and a read may
//! return a version that is at least as new as the last one acknowledged, and the last one shown,
//! before the read began. A write that failed may or may not have happened; once a read that began
//! later has shown something older, it has not; that it was shown while it was in flight obliges to
//! nothing, because it takes more than N-T faults to make it fail.
//!
//! When the daemon is killed, every write in flight has failed in this sense, and nothing else has
//! happened. When the power is lost, a sector holds the version of the last flush or one that was
//! sent since. Whatever is shown then is settled, and survives the next loss of power like something
//! flushed (rule Y1).
//!
//! Zeroes do not say which write they are of, so showing them obliges to little. That also leaves
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
    /// The last version that was acknowledged, or shown when it could not be undone any more.
    settled: u64,
    /// The last version that is known to survive a loss of power.
    durable: u64,
    /// Versions that read as zeroes.
    zeroes: Vec<u64>,
    /// Failed writes and when they failed.
    failed: Vec<(u64, u64)>,
    /// Versions after the durable one.
    sent: Vec<u64>,
    /// When the last writes were acknowledged that were flushed since, and when that was known; the
    /// latest is last.
    sound: Vec<Sound>,
}

/// A write that was acknowledged and flushed.
#[derive(Clone, Copy)]
struct Sound {
    since: u64,
    known: u64,
}

/// Acknowledged and flushed writes of a sector that are remembered.
const SOUND_KEPT: usize = 64;

/// What a read must not fall behind, per sector of its range.
pub type Floors = [u64; REQUEST_SECTORS];

/// The guest's view of the disk.
pub struct Model {
    sectors: Vec<Sector>,
    /// Failed writes that are known not to have happened, and since when.
    dead: BTreeMap<(u64, u64), u64>,
    newest: u64,
    /// The step in which each version was acknowledged, 0 if it was not.
    acknowledged_at: Vec<u64>,
    pub step: u64,
    /// Versions up to this one are of before the last crash.
    before_crash: u64,
    /// Versions up to this one are of before the last loss of power.
    before_loss: u64,
    /// What is not flushed may be lost.
    volatile: bool,
}

impl Model {
    pub fn new(sector_count: u64, volatile: bool) -> Self {
        let sectors = (0..sector_count)
            .map(|_| Sector {
                floor: 0,
                settled: 0,
                durable: 0,
                zeroes: vec![0],
                failed: Vec::new(),
                sent: Vec::new(),
                sound: Vec::new(),
            })
            .collect();
        Self {
            sectors,
            dead: BTreeMap::new(),
            newest: 0,
            acknowledged_at: vec![0],
            step: 0,
            before_crash: 0,
            before_loss: 0,
            volatile,
        }
    }

    /// A new write of `range`, of zeroes or not.
    pub fn next_version(&mut self, range: SectorRange, zero: bool) -> u64 {
        self.newest += 1;
        self.acknowledged_at.push(0);
        for s in range.start()..range.end() {
            let sector = &mut self.sectors[index(s)];
            sector.sent.push(self.newest);
            if zero {
                if sector.zeroes.len() == ZEROES_KEPT {
                    sector.zeroes.remove(0);
                }
                sector.zeroes.push(self.newest);
            }
        }
        self.newest
    }

    pub fn floors(&self, range: SectorRange) -> Floors {
        let mut floors = [0; REQUEST_SECTORS];
        for (floor, s) in floors.iter_mut().zip(range.start()..range.end()) {
            *floor = self.sectors[index(s)].floor;
        }
        floors
    }

    pub fn acknowledged(&mut self, range: SectorRange, version: u64) {
        self.acknowledged_at[index(version)] = self.step;
        let moment = (self.step, self.step);
        for s in range.start()..range.end() {
            let sector = &mut self.sectors[index(s)];
            sector.floor = sector.floor.max(version);
            sector.settled = sector.settled.max(version);
            sector.failed.retain(|(failed, _)| *failed > version);
            if !self.volatile {
                sector.survives(version, moment);
            }
        }
    }

    /// The step in which the last write of the sector was acknowledged that was known to be flushed in
    /// step `began`: for whoever began to read then, all that is older was overwritten for good.
    pub fn sound_since(&self, sector: u64, began: u64) -> u64 {
        let sound = &self.sectors[index(sector)].sound;
        let known = sound.iter().rfind(|sound| sound.known <= began);
        known.map_or(0, |sound| sound.since)
    }

    /// Whether the content is that of this version, or of a later one.
    pub fn is_not_older(&self, sector: u64, value: u64, version: u64) -> bool {
        if value == 0 {
            // The latest first: it is nearly always one of these.
            let lives =
                |&known: &u64| known >= version && !self.dead.contains_key(&(sector, known));
            return self.sectors[index(sector)].zeroes.iter().rev().any(lives);
        }
        self.legal(sector, value, version, u64::MAX).is_some()
    }

    pub fn failed(&mut self, range: SectorRange, version: u64, step: u64) {
        for s in range.start()..range.end() {
            let sector = &mut self.sectors[index(s)];
            sector.failed.push((version, step));
            if sector.floor == version {
                sector.floor = sector.settled;
            }
        }
    }

    /// The versions that a flush which begins now makes durable, sector by sector.
    pub fn settled(&self) -> Vec<u64> {
        self.sectors.iter().map(|sector| sector.settled).collect()
    }

    /// Such a flush was acknowledged.
    pub fn flushed(&mut self, settled: &[u64]) {
        for (sector, &version) in self.sectors.iter_mut().zip(settled) {
            sector.survives(version, (self.acknowledged_at[index(version)], self.step));
        }
    }

    /// The daemon is gone, and with the `power` what was not flushed.
    pub fn crash(&mut self, power: bool, step: u64) {
        for (s, sector) in (0..).zip(&mut self.sectors) {
            if power {
                sector.settled = sector.durable;
            }
            sector.floor = sector.settled;
            let (floor, dead, failed) = (sector.floor, &self.dead, &mut sector.failed);
            failed.retain(|&(version, _)| version > floor);
            for &version in &sector.sent {
                let known = failed.iter().any(|&(known, _)| known == version);
                if version > floor && !known && !dead.contains_key(&(s, version)) {
                    failed.push((version, step));
                }
            }
        }
        let sectors = &self.sectors;
        self.dead
            .retain(|&(s, version), _| version > sectors[index(s)].durable);
        self.before_crash = self.newest;
        if power {
            self.before_loss = self.newest;
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

    /// What is known of a sector, for people.
    pub fn describe(&self, sector: u64) -> String {
        let known = &self.sectors[index(sector)];
        format!(
            "nothing older than {} is legal (settled {}, durable {}, failed {:?})",
            known.floor, known.settled, known.durable, known.failed
        )
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
        // What was shown of a write that failed meanwhile obliges to nothing any more.
        let floor = floor.min(self.sectors[index(sector)].floor);
        let Some(version) = self.legal(sector, value, floor, began) else {
            return Err(format!(
                "sector {sector} read as {value:#x} (version {:?}); nothing older than version \
                 {floor} is legal",
                version_of(value, sector)
            ));
        };
        let before_crash = self.before_crash;
        let durable = !self.volatile || version <= self.before_loss;
        let moment = (self.acknowledged_at[index(version)], self.step);
        let known = &mut self.sectors[index(sector)];
        let dead = &mut self.dead;
        if value == 0 {
            // Which write it was of is certain enough if all of them are of before a crash.
            if known
                .zeroes
                .last()
                .is_some_and(|&last| last <= before_crash)
            {
                let zeroes = &known.zeroes;
                known.failed.retain(|&(failed, when)| {
                    let died = failed > version && when < began && !zeroes.contains(&failed);
                    if died {
                        dead.insert((sector, failed), now);
                    }
                    !died && failed > version
                });
                known.floor = known.floor.max(version);
                known.settle(version, durable, moment);
            }
            return Ok(());
        }
        let failed_meanwhile = |&(failed, when): &(u64, u64)| failed == version && when >= began;
        if !known.failed.iter().any(failed_meanwhile) {
            known.floor = known.floor.max(version);
            // Sectors of a write that failed are resolved before they are shown.
            let mut resolved = version <= before_crash;
            known.failed.retain(|&(failed, when)| {
                let died = failed > version && when < began;
                resolved |= failed >= version && when < began;
                if died {
                    dead.insert((sector, failed), now);
                }
                !died && failed > version
            });
            if resolved {
                known.settle(version, durable, moment);
            }
        }
        Ok(())
    }
}

impl Sector {
    /// The version is there to stay, also if the power goes if it is `durable`.
    fn settle(&mut self, version: u64, durable: bool, moment: (u64, u64)) {
        self.settled = self.settled.max(version);
        if durable {
            self.survives(version, moment);
        }
    }

    /// The version was acknowledged in step `since`, 0 if it was not, and is flushed in step `known`.
    fn survives(&mut self, version: u64, (since, known): (u64, u64)) {
        let latest = self.sound.last().map_or(0, |sound| sound.since);
        if since > latest {
            if self.sound.len() == SOUND_KEPT {
                self.sound.remove(0);
            }
            self.sound.push(Sound { since, known });
        }
        self.durable = self.durable.max(version);
        let durable = self.durable;
        self.sent.retain(|&sent| sent > durable);
    }
}
