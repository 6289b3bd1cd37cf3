// SPDX-License-Identifier: Apache-2.0
//! What each sector may hold while requests overlap: the last write that ended before the read
//! began, or one that was under way meanwhile (invariant I1). What a read has shown while nobody
//! wrote stays.

use std::collections::BTreeMap;

use crate::common::SECTOR;

/// A number that no other write of the run has; 0: zeroes.
pub type Version = u64;

/// Everything that begins or ends does so at a moment of its own.
pub type Moment = u64;

/// What a request does to sectors.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Change {
    /// They hold this version then.
    To(Version),
    /// Discarded: all zeroes, or all as before (rule Z2).
    MaybeZero,
}

#[derive(Clone, Copy, Debug)]
struct Write {
    change: Change,
    begun: Moment,
    ended: Option<Moment>,
    /// Nobody knows whether it was carried out.
    abandoned: bool,
}

impl Write {
    fn version(&self) -> Version {
        match self.change {
            Change::To(version) => version,
            Change::MaybeZero => 0,
        }
    }

    /// Whether nothing that ended before this one began can be seen by who begins at `moment`.
    fn covers(&self, other: &Self, moment: Moment) -> bool {
        let sure = matches!(self.change, Change::To(_)) && !self.abandoned;
        let after = other.ended.is_some_and(|ended| ended < self.begun);
        sure && after && self.ended.is_some_and(|ended| ended < moment)
    }
}

/// What may be in one sector: everything that is not covered for sure.
#[derive(Debug)]
struct Place {
    writes: Vec<Write>,
    /// Reads under way.
    readers: u32,
}

/// All sectors. Those that were never written are zero.
pub struct Model {
    places: BTreeMap<usize, Place>,
    sectors: usize,
    now: Moment,
    next: Version,
}

impl Model {
    /// A disk of zeroes.
    pub fn new(sectors: usize) -> Self {
        Self {
            places: BTreeMap::new(),
            sectors,
            now: 1,
            next: 1,
        }
    }

    /// Sectors of the disk.
    pub fn sectors(&self) -> usize {
        self.sectors
    }

    /// A version of its own.
    pub fn new_version(&mut self) -> Version {
        self.next += 1;
        self.next - 1
    }

    fn tick(&mut self) -> Moment {
        self.now += 1;
        self.now
    }

    fn place(&mut self, sector: usize) -> &mut Place {
        self.places.entry(sector).or_insert_with(|| {
            let zeroes = Write {
                change: Change::To(0),
                begun: 0,
                ended: Some(0),
                abandoned: false,
            };
            Place {
                writes: vec![zeroes],
                readers: 0,
            }
        })
    }

    /// A request that changes sectors is about to be made available. Returns when.
    pub fn begin_write(&mut self, start: usize, count: usize, change: Change) -> Moment {
        let begun = self.tick();
        for sector in start..start + count {
            let write = Write {
                change,
                begun,
                ended: None,
                abandoned: false,
            };
            self.place(sector).writes.push(write);
        }
        begun
    }

    /// The request that began at `begun` was acknowledged.
    pub fn end_write(&mut self, start: usize, count: usize, begun: Moment) {
        let now = self.tick();
        for sector in start..start + count {
            let place = self.place(sector);
            let write = place.writes.iter_mut().find(|write| write.begun == begun);
            write.expect("it has begun").ended = Some(now);
            place.forget(now + 1);
        }
    }

    /// A read is about to be made available. Returns when.
    pub fn begin_read(&mut self, start: usize, count: usize) -> Moment {
        for sector in start..start + count {
            self.place(sector).readers += 1;
        }
        self.tick()
    }

    /// The read that began at `begun` has shown these bytes.
    #[track_caller]
    pub fn end_read(&mut self, start: usize, begun: Moment, bytes: &[u8]) {
        let now = self.tick();
        for (sector, bytes) in (start..).zip(bytes.chunks(SECTOR)) {
            let place = self.place(sector);
            place.see(sector, begun, bytes);
            place.readers -= 1;
            place.forget(now);
        }
    }

    /// The request that began at `begun` was not made available after all.
    pub fn cancel_write(&mut self, start: usize, count: usize, begun: Moment) {
        for sector in start..start + count {
            let place = self.place(sector);
            place.writes.retain(|write| write.begun != begun);
        }
    }

    /// A read was not made available after all.
    pub fn cancel_read(&mut self, start: usize, count: usize) {
        for sector in start..start + count {
            self.place(sector).readers -= 1;
        }
    }

    /// The guest is reset: nobody waits any more for what is under way.
    pub fn abandon(&mut self) {
        let now = self.tick();
        for place in self.places.values_mut() {
            place.readers = 0;
            let open = place.writes.iter_mut();
            for write in open.filter(|write| write.ended.is_none()) {
                write.ended = Some(now);
                write.abandoned = true;
            }
        }
    }

    /// Nothing is under way: checks what a replica holds.
    #[track_caller]
    pub fn check_image(&mut self, bytes: &[u8]) {
        let now = self.tick();
        for (sector, bytes) in bytes.chunks(SECTOR).enumerate() {
            match self.places.get_mut(&sector) {
                Some(place) => place.see(sector, now, bytes),
                None => assert_eq!(version_of(sector, bytes), Some(0), "sector {sector}"),
            }
        }
    }
}

impl Place {
    #[track_caller]
    fn see(&mut self, sector: usize, begun: Moment, bytes: &[u8]) {
        let seen = version_of(sector, bytes);
        let possible = |write: &&Write| {
            let covered = |other: &Write| other.covers(write, begun);
            Some(write.version()) == seen && !self.writes.iter().any(covered)
        };
        let Some(&write) = self.writes.iter().rev().find(possible) else {
            panic!("sector {sector} holds {seen:?} for a read at {begun}: {self:?}");
        };
        let quiet = |write: &Write| write.ended.is_some_and(|ended| ended < begun);
        if self.readers <= 1 && self.writes.iter().all(quiet) {
            self.writes = vec![Write {
                change: Change::To(write.version()),
                abandoned: false,
                ..write
            }];
        }
    }

    /// Forgets what nobody can see any more who begins at `now`.
    fn forget(&mut self, now: Moment) {
        if self.readers == 0 && self.writes.len() > 1 {
            let writes = self.writes.clone();
            self.writes
                .retain(|write| !writes.iter().any(|other| other.covers(write, now)));
        }
    }
}

/// What a write of some sectors carries.
pub fn content(start: usize, count: usize, version: Version) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(count * SECTOR);
    for sector in start..start + count {
        // The same version in another sector is something else.
        let mut word = version;
        for _ in 0..SECTOR / 8 {
            bytes.extend(word.to_le_bytes());
            word = mixed(word ^ sector as u64);
        }
    }
    bytes
}

/// The version of which these bytes are the content of `sector`, if there is one.
fn version_of(sector: usize, bytes: &[u8]) -> Option<Version> {
    if bytes.iter().all(|&byte| byte == 0) {
        return Some(0);
    }
    let version = Version::from_le_bytes(bytes[..8].try_into().expect("eight bytes"));
    (content(sector, 1, version) == bytes).then_some(version)
}

fn mixed(word: u64) -> u64 {
    let word = (word ^ (word >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word ^ (word >> 32)
}

#[test]
fn model_notices_what_is_not_allowed() {
    let mut model = Model::new(64);
    let first = model.begin_write(3, 1, Change::To(7));
    let early = model.begin_read(3, 1);
    model.end_write(3, 1, first);
    // Under way together with the write: both are right.
    model.end_read(3, early, &[0; SECTOR]);
    let read = model.begin_read(3, 1);
    model.end_read(3, read, &content(3, 1, 7));
    let old = std::panic::catch_unwind(move || {
        let read = model.begin_read(3, 1);
        model.end_read(3, read, &[0; SECTOR]);
    });
    assert!(old.is_err(), "an acknowledged write was lost unseen");

    let mut model = Model::new(64);
    let one = model.begin_write(5, 1, Change::To(1));
    let two = model.begin_write(5, 1, Change::To(2));
    model.end_write(5, 1, two);
    model.end_write(5, 1, one);
    let read = model.begin_read(5, 1);
    model.end_read(5, read, &content(5, 1, 2));
    let turned = std::panic::catch_unwind(move || {
        let read = model.begin_read(5, 1);
        model.end_read(5, read, &content(5, 1, 1));
    });
    assert!(turned.is_err(), "what a read has shown changed unseen");
}
