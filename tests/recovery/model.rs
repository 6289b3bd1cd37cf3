// SPDX-License-Identifier: Apache-2.0
//! What each sector of a disk may hold: invariants I1, I5 and I8, from the outside.

use crate::common::SECTOR;

/// A number that no other write of the run has; 0: never written.
pub type Version = u64;

/// One sector.
#[derive(Clone, Debug)]
struct Place {
    /// What it may hold now: the last acknowledged version and those in flight.
    now: Vec<Version>,
    /// What it held for sure at the last flush.
    flushed: Vec<Version>,
    /// What was written since.
    since: Vec<Version>,
}

/// All sectors.
pub struct Model {
    places: Vec<Place>,
    next: Version,
}

impl Model {
    /// A disk of zeroes.
    pub fn new(sectors: usize) -> Self {
        let place = Place {
            now: vec![0],
            flushed: vec![0],
            since: Vec::new(),
        };
        Self {
            places: vec![place; sectors],
            next: 1,
        }
    }

    /// Sectors of the disk.
    pub fn sectors(&self) -> usize {
        self.places.len()
    }

    /// A write is about to begin. Returns its version.
    pub fn begin(&mut self, start: usize, count: usize) -> Version {
        let version = self.next;
        self.next += 1;
        for place in &mut self.places[start..start + count] {
            place.now.push(version);
            place.since.push(version);
        }
        version
    }

    /// A write was acknowledged; no other one in flight touches its sectors.
    pub fn acknowledge(&mut self, start: usize, count: usize, version: Version) {
        for place in &mut self.places[start..start + count] {
            place.now = vec![version];
        }
    }

    /// A flush was acknowledged, and no write was in flight since it began.
    pub fn flush(&mut self) {
        for place in &mut self.places {
            place.flushed.clone_from(&place.now);
            place.since.clear();
        }
    }

    /// The host has lost power: a sector holds what it held at the last flush, or anything that
    /// was written since.
    pub fn lose_power(&mut self) {
        for place in &mut self.places {
            place.now = [&place.flushed[..], &place.since[..]].concat();
        }
    }

    /// The guest has read this from `start` on. Whatever it was, it does not change any more, not
    /// even by a loss of power if the disk was `resolving` what an unclean end had left (rule Y1).
    #[track_caller]
    pub fn see(&mut self, start: usize, bytes: &[u8], resolving: bool) {
        for (at, bytes) in (start..).zip(bytes.chunks(SECTOR)) {
            let place = &mut self.places[at];
            let seen = version_of(at, bytes);
            let right = seen.is_some_and(|seen| place.now.contains(&seen));
            assert!(
                right,
                "sector {at} holds {seen:?}, which is none of {:?}; at the last flush it was {:?}",
                place.now, place.flushed
            );
            place.now = seen.into_iter().collect();
            if resolving {
                place.flushed.clone_from(&place.now);
                place.since.clear();
            }
        }
    }
}

/// What a write of some sectors carries.
pub fn content(start: usize, count: usize, version: Version) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(count * SECTOR);
    for sector in start..start + count {
        let mut word = version;
        for _ in 0..SECTOR / 8 {
            bytes.extend(word.to_le_bytes());
            // The same version in another sector is something else.
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
