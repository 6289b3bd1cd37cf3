// SPDX-License-Identifier: Apache-2.0
//! How a daemon ends: it is killed, the power of the host goes, or it is stopped.
//!
//! Of every write in flight any sectors reach the replica before the next start (rule K2). Without
//! power the replicas lose any part of what was not flushed. The guest is gone as well (a cold
//! start): its requests in flight have failed as far as anybody knows. Or it lives on, and its
//! requests in flight are repeated ([`inflight`](crate::inflight)).

use crate::clock::Happening;
use crate::faults::MS;
use crate::life::{Event, Stop};
use crate::maintenance::STOP_TAG;
use crate::quorum::{Bitmap, Event as LaneEvent, Request, Status};
use crate::trace::{Line, Verdict, violation};
use crate::world::{Breach, World};

impl World {
    /// When and how this daemon ends.
    pub fn plan_end(&mut self) {
        let life = self.profile.life.expect("a run with a record");
        self.life.crash_at = u64::MAX;
        if life.steps == 0 || self.calm {
            return;
        }
        // Now and then at once, in the middle of the start or of the resync after it.
        let steps = match self.rng.below(10) {
            0 => self.rng.below(20),
            1 | 2 => self.rng.below(life.steps / 8 + 1),
            _ => self.rng.below(2 * life.steps),
        };
        self.life.crash_at = self.step + 1 + steps;
    }

    /// The time of the daemon has come.
    pub fn end_daemon(&mut self) -> Verdict {
        let life = self.profile.life.expect("a run with a record");
        if self.life.stop == Stop::Marking {
            self.tally.count("clean stops");
            self.change_while_stopped();
            return self.crash(false);
        }
        let roll = self.rng.below(1000);
        if roll < life.stops && self.life.stop == Stop::No && self.is_serving() {
            self.life.stop = Stop::Draining;
            // It may be killed before it is through.
            let patience = match self.rng.below(4) {
                0 => self.rng.below(400),
                _ => 100_000,
            };
            self.life.crash_at = self.step + patience;
            return Ok(());
        }
        let power = roll >= 1000 - life.power;
        self.tally
            .count(if power { "power losses" } else { "kills" });
        self.crash(power)
    }

    fn is_serving(&self) -> bool {
        let staff = self.maintenance.as_ref();
        staff.is_some_and(|staff| staff.keeper.is_some())
    }

    /// A clean stop goes on.
    pub fn advance_stop(&mut self) -> Verdict {
        if self.life.stop != Stop::Draining {
            return Ok(());
        }
        let idle = self.guests.is_quiet()
            && self.operations.none_in_flight()
            && self.workers.iter().all(|worker| {
                worker.lane.is_idle() && worker.rings.is_idle() && worker.rings.all_sent()
            });
        if idle {
            self.life.stop = Stop::Flushing;
            let (lane, request) = (self.shape.lanes, Request::Flush);
            let tag = STOP_TAG;
            self.deliver(lane, LaneEvent::Request { tag, request })?;
        }
        Ok(())
    }

    /// The flush of a clean stop has ended: whatever can be called clean is.
    pub fn note_stop_flushed(&mut self, status: Status) {
        if status != Status::Ok {
            self.life.crash_at = 0;
            return;
        }
        let now = crate::units::Time::from_nanos(self.clock.now());
        let marks = self.shared.membership.marks();
        let dirty: Vec<u64> = marks.iter(Bitmap::Dirty).collect();
        for extent in dirty {
            self.shared.try_clean(extent, now, 0);
        }
        let clean = self.shared.membership.marks().count(Bitmap::Dirty) == 0;
        self.life.stopped_clean = clean;
        let prints = self.life.fingerprints.clone();
        let staff = self.maintenance.as_mut().expect("there is a record");
        let change = staff.recorder.change(|superblock| {
            superblock.clean = clean;
            for (member, print) in superblock.members.iter_mut().zip(prints) {
                member.fingerprint.inode = print;
            }
        });
        staff.stop = Some(change);
        let delay = self.rng.below(MS);
        self.clock.after(delay, Happening::Life(Event::Poll));
    }

    /// Somebody writes to a member while no daemon has it open.
    fn change_while_stopped(&mut self) {
        let odds = self.profile.life.map_or(0, |life| life.changed);
        let replica = self.rng.index(self.disks.len());
        if !self.life.stopped_clean
            || !self.rng.chance(odds)
            || !self.life.may_fail(replica)
            || !self.budget.doom_everywhere(replica)
        {
            return;
        }
        self.tally.count("changed while stopped");
        self.life.fingerprints[replica] += 1;
        for sector in 0..self.shape.geometry.sectors() {
            if self.rng.chance(200_000) {
                let value = self.rng.pick(&[0, crate::content::written(1, sector)]);
                self.disks[replica].rot(sector, value);
            }
        }
    }

    /// The daemon is gone, and with the `power` what was not flushed; the next one starts.
    pub fn crash(&mut self, power: bool) -> Verdict {
        let marks = self.list_disorder();
        self.note(Line::Ended { power, marks });
        self.plan.hung = None;
        self.plan.slow = None;
        self.operations.take_parked();
        for slot in self.operations.in_flight() {
            self.drop_operation(slot, power);
        }
        if let Some(copies) = &mut self.copies {
            copies.crash(&mut self.rng);
        }
        if power {
            for disk in &mut self.disks {
                disk.lose_power(&mut self.rng);
            }
        }
        // A front-end that comes and is not connected yet brings what it brought before.
        let known = self.life.connected || self.life.warm;
        let odds = self.profile.life.map_or(0, |life| life.warm);
        let warm = known && odds > 0 && !power && self.rng.below(1000) < odds;
        self.tally.add("warm starts", u64::from(warm));
        self.life.warm = warm;
        self.hand_over(warm);
        let live = self.inflight.orders();
        self.model.crash(power, warm.then_some(live), self.step);
        self.inflight.renumber(&mut self.model);
        self.guests.restart(self.shape.lanes, power);
        self.clock.keep(|what| {
            matches!(
                what,
                Happening::Life(Event::Return { .. } | Event::Stray { .. })
            )
        });
        self.maintenance = None;
        self.budget.restart();
        for replica in 0..self.disks.len() {
            self.open_member(replica);
        }
        if !warm {
            self.agree_where_tainted();
        }
        self.start()
    }

    /// An operation that nobody hears of any more.
    fn drop_operation(&mut self, slot: usize, power: bool) {
        let mask = match self.rng.below(3) {
            0 => 0,
            1 => u64::MAX,
            _ => self.rng.next(),
        };
        if self.broken.is(Breach::FlightOutlivesLock) && !power {
            self.outlive(slot);
            return;
        }
        self.transfer_rest(slot, mask);
    }

    /// Nothing is left to be done.
    pub fn settle_down(&mut self) -> Verdict {
        for replica in 0..self.disks.len() {
            self.life.present[replica] = true;
        }
        if self.life.stop != Stop::No {
            // Nobody is left to make use of the stop.
            self.crash(false)?;
        }
        let limit = self.clock.now() + 300_000 * MS;
        while !self.is_settled() {
            if !self.advance()? || self.clock.now() > limit {
                return violation("I9", format!("never in order: {}", self.list_disorder()));
            }
        }
        Ok(())
    }

    fn is_settled(&self) -> bool {
        let staff = self.maintenance.as_ref().expect("there is a record");
        self.is_in_order()
            && staff.recorder.is_idle()
            && staff.inbox.is_empty()
            && self.operations.none_in_flight()
            && self.operations.late_left == 0
            && self.workers.iter().all(|worker| {
                worker.lane.is_idle() && worker.rings.is_idle() && worker.pool.all_free()
            })
    }
}
