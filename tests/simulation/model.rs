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
//! If the guest lives on when the daemon is killed, its writes in flight have not failed: they are
//! repeated. The guest waits for all of them, so they may take effect in any order, and after writes
//! that it sends and sees complete meanwhile on other rings. So each of them is numbered anew: at the
//! kill, after all that was there, since its content may have landed already; and once more when it
//! gets its lock, because it comes after whatever got it before. Only what the daemon has decided
//! stays decided, as overlapping requests are served in the order of their arrival (rules L1, L3, Q2): a
//! write keeps its number if one that got its lock later was acknowledged, or if it is repeated
//! after a later one of its own ring. What was shown before the kill is not taken back; what is shown of such a
//! write afterwards obliges to nothing before it is acknowledged, since it may be what was there
//! before, and others may be repeated before it is.
//!
//! Zeroes do not say which write they are of, so showing them obliges to little. That also leaves
//! room for the one thing that votes without a lock cannot exclude: a read of a sector that is
//! being written twice may count the ballot of a replica from before both writes and that of
//! another from after both, if these are equal, although they were never equal at one moment.

use std::collections::{BTreeMap, BTreeSet};

use crate::budget::index;
use crate::content::version_of;
use crate::guest::GuestRequest;
use crate::pool::REQUEST_SECTORS;
use crate::units::SectorRange;

/// Zeroing writes of a sector that are remembered.
const ZEROES_KEPT: usize = 256;

/// Where a request comes from: lane, ring, and its name, which rises within a ring.
pub type Origin = (usize, usize, u64);

struct Sector {
    /// The last write that got its lock since the daemon began, of each ring.
    placed: Vec<Origin>,
    /// Nothing older may be returned any more.
    floor: u64,
    /// The same, as far as it was shown to a guest that outlived the daemon: copies may be older
    /// that are to be rewritten before they are shown.
    shown: u64,
    /// The last version that was acknowledged, or shown when it could not be undone any more.
    settled: u64,
    /// The one that was before it.
    below: u64,
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
    /// Versions of writes that were in flight when the daemon was killed, and are repeated.
    live: BTreeSet<u64>,
    /// The last numbers of writes that were numbered anew, by what their content says.
    moved: BTreeMap<u64, u64>,
}

impl Model {
    pub fn new(sector_count: u64, volatile: bool) -> Self {
        let sectors = (0..sector_count)
            .map(|_| Sector {
                placed: Vec::new(),
                floor: 0,
                shown: 0,
                settled: 0,
                below: 0,
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
            live: BTreeSet::new(),
            moved: BTreeMap::new(),
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

    /// The number of a write that is to be repeated, or is repeated now: the last of all.
    pub fn renumber(&mut self, guest: &GuestRequest) -> u64 {
        let GuestRequest { range, order, .. } = *guest;
        for s in range.start()..range.end() {
            self.sectors[index(s)].forget(order);
            self.dead.remove(&(s, order));
        }
        self.live.remove(&order);
        let number = self.next_version(range, guest.zero);
        self.live.insert(number);
        if !guest.zero {
            self.moved.insert(guest.version, number);
        }
        number
    }

    /// Whether a write that is in flight, and has its lock, was passed by one that is acknowledged.
    pub fn is_passed(&self, guest: &GuestRequest) -> bool {
        let passed = |s: u64| {
            let settled = self.sectors[index(s)].settled;
            settled > guest.order && self.acknowledged_at[index(settled)] > 0
        };
        (guest.range.start()..guest.range.end()).any(passed)
    }

    /// Whether a later write of the same ring got its lock there since the daemon began.
    pub fn is_out_of_turn(&self, range: SectorRange, (lane, ring, id): Origin) -> bool {
        let later = |&(l, r, other): &Origin| (l, r) == (lane, ring) && other > id;
        let mut sectors = range.start()..range.end();
        sectors.any(|s| self.sectors[index(s)].placed.iter().any(later))
    }

    /// The write has got its lock.
    pub fn note_placed(&mut self, range: SectorRange, (lane, ring, id): Origin) {
        for s in range.start()..range.end() {
            let placed = &mut self.sectors[index(s)].placed;
            match placed.iter_mut().find(|(l, r, _)| (*l, *r) == (lane, ring)) {
                Some((_, _, last)) => *last = id.max(*last),
                None => placed.push((lane, ring, id)),
            }
        }
    }

    pub fn floors(&self, range: SectorRange) -> Floors {
        let mut floors = [0; REQUEST_SECTORS];
        for (floor, s) in floors.iter_mut().zip(range.start()..range.end()) {
            *floor = self.sectors[index(s)].least();
        }
        floors
    }

    pub fn acknowledged(&mut self, range: SectorRange, version: u64) {
        self.live.remove(&version);
        self.acknowledged_at[index(version)] = self.step;
        let moment = (self.step, self.step);
        for s in range.start()..range.end() {
            let sector = &mut self.sectors[index(s)];
            sector.floor = sector.floor.max(version);
            if version > sector.settled {
                sector.below = std::mem::replace(&mut sector.settled, version);
            }
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
        self.live.remove(&version);
        for s in range.start()..range.end() {
            let sector = &mut self.sectors[index(s)];
            sector.failed.push((version, step));
            if sector.floor == version {
                sector.floor = sector.settled;
            }
            if sector.shown == version {
                sector.shown = sector.settled;
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

    /// The daemon is gone, and with the `power` what was not flushed. If the guest lives on, its
    /// writes in flight are `live`.
    pub fn crash(&mut self, power: bool, live: Option<BTreeSet<u64>>, step: u64) {
        let warm = live.is_some();
        self.live = live.unwrap_or_default();
        let live = &self.live;
        for (s, sector) in (0..).zip(&mut self.sectors) {
            sector.placed.clear();
            sector.shown = if warm { sector.least() } else { 0 };
            if power {
                sector.settled = sector.durable;
            }
            sector.floor = sector.settled;
            let (floor, dead, failed) = (sector.floor, &self.dead, &mut sector.failed);
            failed.retain(|&(version, _)| version > floor);
            for &version in &sector.sent {
                let known = failed.iter().any(|&(known, _)| known == version);
                if version <= floor || known || dead.contains_key(&(s, version)) {
                    continue;
                }
                // Also what failed before and was overtaken by a write in flight, which was shown: not
                // all copies need to hold that one yet.
                if !live.contains(&version) {
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
        let version = version_of(value, sector)?;
        let version = *self.moved.get(&version).unwrap_or(&version);
        lives(version).then_some(version)
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
        let floor = floor.min(self.sectors[index(sector)].least());
        let Some(version) = self.legal(sector, value, floor, began) else {
            return Err(format!(
                "sector {sector} read as {value:#x} (version {:?}); nothing older than version \
                 {floor} is legal",
                version_of(value, sector)
            ));
        };
        let before_crash = self.before_crash;
        let live = &self.live;
        if live.contains(&version) {
            // It may be of before the kill, and other writes may be repeated before it is.
            return Ok(());
        }
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
                && !known.zeroes.iter().any(|zeroes| live.contains(zeroes))
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
    /// Nothing older may be shown.
    fn least(&self) -> u64 {
        self.floor.max(self.shown)
    }

    /// The version is there to stay, also if the power goes if it is `durable`.
    fn settle(&mut self, version: u64, durable: bool, moment: (u64, u64)) {
        self.settled = self.settled.max(version);
        if durable {
            self.survives(version, moment);
        }
    }

    /// There is no such version any more, and that it was replied to obliges to nothing.
    fn forget(&mut self, version: u64) {
        self.failed.retain(|&(failed, _)| failed != version);
        self.sent.retain(|&sent| sent != version);
        self.zeroes.retain(|&zeroes| zeroes != version);
        if self.settled == version {
            self.settled = self.below;
        }
        self.durable = self.durable.min(self.settled);
        if self.floor == version {
            self.floor = self.settled;
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
