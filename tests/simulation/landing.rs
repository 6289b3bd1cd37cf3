// SPDX-License-Identifier: Apache-2.0
//! What reaches the media: in time, late, at the end of the daemon, or where nobody meant it to.

use crate::budget::index;
use crate::clock::Happening;
use crate::content::SECTOR_LEN;
use crate::faults::{Fault, MS, mask_of, masked};
use crate::operations::{InFlight, REMEMBERED, landing_mask, target};
use crate::quorum::OperationKind;
use crate::trace::Line;
use crate::units::SectorRange;
use crate::world::World;

/// A write that was called complete and has not reached the medium.
pub struct Landing {
    pub replica: usize,
    pub range: SectorRange,
    pub values: Vec<u64>,
    /// Writes that had reached each sector when this one was called complete.
    pub landings: Vec<u32>,
}

impl World {
    /// The daemon is gone: of what is still to be transferred the sectors in `mask` are.
    pub fn transfer_rest(&mut self, slot: usize, mask: u64) {
        let flight = self.operations.flight(slot);
        let replica = flight.operation.replica.index();
        match target(flight.operation.kind) {
            Some((range, true)) => {
                self.transfer(slot, mask & !flight.transferred);
                self.disks[replica].ended(range, flight.number, self.step);
            }
            Some((_, false)) => {}
            // It may have failed, and nobody was told.
            None => {
                let well = flight.fault == Fault::None;
                if mask != 0 {
                    self.disks[replica].flushed(flight.submitted, well, &mut self.rng);
                }
            }
        }
    }

    /// The write goes on although the daemon is gone.
    pub fn outlive(&mut self, slot: usize) {
        let flight = self.operations.flight(slot);
        let replica = flight.operation.replica.index();
        let (range, data) = match flight.operation.kind {
            OperationKind::Write {
                range,
                buffer,
                skip_bytes,
            } => (range, Some((buffer, skip_bytes))),
            OperationKind::WriteZeroes { range, .. } => (range, None),
            OperationKind::Read { .. } | OperationKind::Flush => return,
        };
        let pool = &self.workers[flight.lane].pool;
        let mask = landing_mask(flight.fault, range) & !flight.transferred;
        let values = masked(range, mask).map(|(place, sector)| {
            let value = data.map_or(0, |(buffer, skip_bytes)| {
                let skip = index(u64::from(skip_bytes)) / SECTOR_LEN;
                pool.value(buffer, skip + place)
            });
            (replica, sector, value)
        });
        self.life.strays.push(values.collect());
        let number = self.life.strays.len() - 1;
        let later = self.rng.below(30 * MS);
        let what = crate::life::Event::Stray { number };
        self.clock.after(later, Happening::Life(what));
    }

    pub fn land(&mut self, replica: usize, sector: u64, value: u64, operation: u64) {
        self.put_on_medium(replica, sector, value, operation);
        if self.budget.is_tainted(sector, replica) {
            // To stay: what was wrong there does not come back.
            self.disks[replica].rot(sector, value);
            self.budget.cleanse(sector, replica);
        }
        if self.profile.excess > 0 && !self.model.is_legal_now(sector, value) {
            // The bad copies have won.
            self.budget.taint(sector, replica);
        }
    }

    pub fn put_on_medium(&mut self, replica: usize, sector: u64, value: u64, operation: u64) {
        if self.disks[replica].write(sector, value, operation) {
            self.budget.unshade(sector, replica);
        }
    }

    /// Content changes that nobody asked for.
    pub fn spoil(&mut self, replica: usize, sector: u64, value: u64) {
        self.disks[replica].rot(sector, value);
        self.budget.taint(sector, replica);
        self.spoiled_at[index(sector)][replica] = self.step;
        let line = Line::Spoiled { replica, sector };
        self.trace.note(self.step, self.clock.now(), 0, line);
    }

    /// A write that was called complete long ago reaches the medium, on top of what is there.
    pub fn land_late(&mut self, late: usize) {
        let &Landing { replica, range, .. } = &self.operations.late[late];
        if !self.budget.admits_landing(range, replica) {
            self.clock.after(MS, Happening::Land { late });
            return;
        }
        for (place, sector) in (range.start()..range.end()).enumerate() {
            let landing = &self.operations.late[late];
            let (value, seen) = (landing.values[place], landing.landings[place]);
            let overtaken = self.disks[replica].landings(sector) != seen;
            self.put_on_medium(replica, sector, value, u64::MAX);
            // To stay: that it came so late is fault enough.
            self.disks[replica].rot(sector, value);
            self.spoiled_at[index(sector)][replica] = self.step;
            if overtaken {
                self.budget.taint(sector, replica);
            } else {
                self.budget.cleanse(sector, replica);
            }
        }
        self.operations.late_left -= 1;
        // Who has read what was there before may still speak of it.
        let forget = Happening::Forget { replica, range };
        self.clock.after(REMEMBERED, forget);
    }

    /// Keeps the data of a late write until they land.
    pub fn postpone(&mut self, flight: &InFlight, range: SectorRange, after: u64) {
        let replica = flight.operation.replica.index();
        let count = index(u64::from(range.count()));
        let mut landing = Landing {
            replica,
            range,
            values: vec![0; count],
            landings: vec![0; count],
        };
        for (place, sector) in masked(range, mask_of(range)) {
            landing.landings[place] = self.disks[replica].landings(sector);
            if let OperationKind::Write {
                buffer, skip_bytes, ..
            } = flight.operation.kind
            {
                let skip = index(u64::from(skip_bytes)) / SECTOR_LEN;
                landing.values[place] = self.workers[flight.lane].pool.value(buffer, skip + place);
            }
        }
        self.operations.late.push(landing);
        self.operations.late_left += 1;
        let late = self.operations.late.len() - 1;
        self.clock.after(after, Happening::Land { late });
    }
}
