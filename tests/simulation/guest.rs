// SPDX-License-Identifier: Apache-2.0
//! The guest: what it asks for, without any regard for what it has asked for already.

use std::collections::BTreeMap;

use crate::budget::index;
use crate::clock::Happening;
use crate::content::{garbled, written};
use crate::faults::MS;
use crate::life::{Event, Stop};
use crate::model::{Floors, Origin};
use crate::profile::Ailment;
use crate::quorum::{Request, Status, Tag};
use crate::rings::{NO_BUFFER, Planned};
use crate::trace::{Line, Verdict};
use crate::units::SectorRange;
use crate::world::{Breach, World};

/// What a request of the guest is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    Read,
    /// Also of zeroes.
    Write,
    /// A discard that does nothing.
    Nothing,
    Flush,
}

/// A request in flight.
#[derive(Clone, Copy, Debug)]
pub struct GuestRequest {
    pub kind: Kind,
    pub range: SectorRange,
    /// Of a write.
    pub version: u64,
    /// Its place among all writes: the version, unless it was in flight when a daemon was killed.
    pub order: u64,
    /// It has that place since the daemon began.
    pub placed: bool,
    /// Its place is one that it must not have any more: a later write was acknowledged.
    pub passed: bool,
    /// Whether it writes zeroes.
    pub zero: bool,
    /// Of a read.
    pub floors: Floors,
    /// Of a flush: extents with writes that the guest saw complete.
    pub covers: u64,
    /// When it was sent.
    pub began: u64,
    pub replied: Option<Status>,
}

impl GuestRequest {
    pub fn read(range: SectorRange, floors: Floors, step: u64) -> Self {
        Self {
            kind: Kind::Read,
            range,
            version: 0,
            order: 0,
            placed: false,
            passed: false,
            zero: false,
            floors,
            covers: 0,
            began: step,
            replied: None,
        }
    }

    /// What a write holds, sector by sector.
    pub fn values(&self) -> impl Iterator<Item = u64> + use<> {
        let (range, version) = (self.range, self.version);
        (range.start()..range.end()).map(move |sector| written(version, sector))
    }
}

/// The requests of all queues.
pub struct Guests {
    lanes: Vec<Vec<Option<GuestRequest>>>,
    left: u64,
    waiting: u64,
    /// Writes that were replied to and are not published, per extent.
    unpublished: Vec<Vec<(usize, Tag, SectorRange)>>,
    /// Extents with a write that the guest saw complete.
    pub written: u64,
    /// For each flush in flight, the versions that it covers.
    snapshots: BTreeMap<(usize, Tag), Vec<u64>>,
}

impl Guests {
    pub fn new(lanes: usize, requests: u64, extents: u64) -> Self {
        assert!(extents <= 64, "a bit each");
        Self {
            lanes: vec![Vec::new(); lanes],
            left: requests,
            waiting: 0,
            unpublished: vec![Vec::new(); index(extents)],
            written: 0,
            snapshots: BTreeMap::new(),
        }
    }

    /// No daemon knows of what was asked for any more; what completed before the `power` was lost
    /// may be lost with it.
    pub fn restart(&mut self, lanes: usize, power: bool) {
        self.lanes = vec![Vec::new(); lanes];
        self.waiting = 0;
        self.unpublished.iter_mut().for_each(Vec::clear);
        self.snapshots.clear();
        if power {
            self.written = 0;
        }
    }

    /// Whether no request waits for its reply.
    pub fn is_quiet(&self) -> bool {
        self.waiting == 0
    }

    /// Whether all requests were sent and replied to.
    pub fn all_replied(&self) -> bool {
        self.left == 0 && self.waiting == 0
    }

    /// Requests without a reply, for people.
    pub fn list_waiting(&self) -> String {
        let mut list = String::new();
        for (lane, requests) in self.lanes.iter().enumerate() {
            for request in requests.iter().flatten().filter(|r| r.replied.is_none()) {
                let GuestRequest {
                    kind, range, began, ..
                } = request;
                list += &format!("; lane {lane}: {kind:?} of {range} since step {began}");
            }
        }
        list
    }

    pub fn add(&mut self, lane: usize, request: GuestRequest) -> Tag {
        self.waiting += 1;
        let requests = &mut self.lanes[lane];
        let free = requests.iter().position(Option::is_none);
        let place = free.unwrap_or_else(|| {
            requests.push(None);
            requests.len() - 1
        });
        requests[place] = Some(request);
        Tag(u32::try_from(place).expect("few requests"))
    }

    pub fn request(&self, lane: usize, tag: Tag) -> Option<&GuestRequest> {
        self.lanes[lane].get(tag.0 as usize)?.as_ref()
    }

    /// Notes the reply and returns the request; `None` if none was due.
    pub fn replied(
        &mut self,
        lane: usize,
        tag: Tag,
        status: Status,
        extent: u64,
    ) -> Option<GuestRequest> {
        let request = self.lanes[lane].get_mut(tag.0 as usize)?.as_mut()?;
        if request.replied.is_some() {
            return None;
        }
        request.replied = Some(status);
        self.waiting -= 1;
        if request.kind == Kind::Write {
            self.unpublished[index(extent)].push((lane, tag, request.range));
        }
        Some(*request)
    }

    pub fn published(&mut self, lane: usize, tag: Tag) {
        let request = self.lanes[lane][tag.0 as usize].take().expect("replied to");
        if request.kind == Kind::Write {
            for (extent, writes) in self.unpublished.iter_mut().enumerate() {
                let known = writes.len();
                writes.retain(|&(l, t, _)| (l, t) != (lane, tag));
                if writes.len() < known && request.replied == Some(Status::Ok) {
                    self.written |= 1 << extent;
                }
            }
        }
    }

    /// The flush covers these versions.
    pub fn note_covered(&mut self, lane: usize, tag: Tag, settled: Vec<u64>) {
        self.snapshots.insert((lane, tag), settled);
    }

    /// What the flush covers, now that it is over.
    pub fn take_covered(&mut self, lane: usize, tag: Tag) -> Option<Vec<u64>> {
        self.snapshots.remove(&(lane, tag))
    }

    /// A write whose reply the guest has not seen and that overlaps `range`.
    pub fn unpublished_write(&self, extent: u64, range: SectorRange) -> Option<SectorRange> {
        let writes = &self.unpublished[index(extent)];
        let found = writes
            .iter()
            .find(|(_, _, written)| written.overlaps(range));
        found.map(|(_, _, written)| *written)
    }
}

impl World {
    /// The guest sends its next request on this queue, if it has one and the lane takes it.
    pub fn guest_turn(&mut self, lane: usize) -> Verdict {
        let repeats = self.inflight.has_repeats(lane);
        if !repeats && (self.guests.left == 0 || self.life.stop != Stop::No) {
            return Ok(());
        }
        let worker = &self.workers[lane];
        if !worker.lane.has_room() || !worker.rings.all_sent() {
            let later = self.rng.between(50_000, 200_000);
            self.clock.after(later, Happening::Guest { lane });
            return Ok(());
        }
        // Rule Q2: what is marked comes before anything new in the ring.
        let rings = self.workers[lane].rings.count();
        let ring = self.rng.index(rings);
        let new = self.guests.left > 0 && self.life.stop == Stop::No;
        let late = new && self.broken.is(Breach::RepeatsComeLast) && self.rng.chance(900_000);
        let among = if new { 0..0 } else { 0..rings };
        for ring in std::iter::once(ring).chain(among) {
            if !late && let Some((id, parts)) = self.inflight.take_repeat(lane, ring) {
                return self.repeat(lane, ring, id, parts);
            }
        }
        if !new {
            return Ok(());
        }
        let parts = self.plan();
        let count = parts.len() as u64;
        self.guests.left = self.guests.left.saturating_sub(count);
        self.tally.add("requests", count);
        self.begin_in(lane, ring, parts)?;
        self.spoil_something();
        Ok(())
    }

    /// The next request, cut into parts.
    fn plan(&mut self) -> Vec<Planned> {
        let [reads, zeroes, discards, flushes] = self.profile.mix;
        let roll = self.rng.below(1000);
        let unmap = self.rng.chance(500_000);
        let mut ranges = vec![self.some_range()];
        let flush =
            (reads + zeroes + discards..reads + zeroes + discards + flushes).contains(&roll);
        if !flush && self.rng.chance(300_000) {
            for _ in 0..self.rng.between(1, 3) {
                let last = *ranges.last().expect("one at least");
                ranges.extend(self.range_after(last));
            }
        }
        let mut parts = Vec::new();
        for range in ranges {
            let mut guest = GuestRequest::read(range, [0; _], self.step);
            let request = if roll < reads {
                guest.floors = self.model.floors(range);
                Request::Read { range }
            } else if roll < reads + zeroes + discards {
                let zero = roll < reads + zeroes;
                guest.kind = if zero || self.shape.policy.discard_zeroes {
                    guest.zero = true;
                    Kind::Write
                } else {
                    Kind::Nothing
                };
                if zero {
                    Request::WriteZeroes { range, unmap }
                } else {
                    Request::Discard { range }
                }
            } else if flush {
                guest.kind = Kind::Flush;
                guest.covers = self.guests.written;
                Request::Flush
            } else {
                guest.kind = Kind::Write;
                let data = NO_BUFFER;
                Request::Write { range, data }
            };
            parts.push(Planned { guest, request });
        }
        parts
    }

    /// Gives a write its version, when its place among all writes is taken; one that is repeated
    /// keeps its content and gets a new place.
    pub fn number(&mut self, guest: &mut GuestRequest, from: Origin) {
        if guest.kind != Kind::Write || std::mem::replace(&mut guest.placed, true) {
            return;
        }
        if guest.version == 0 {
            guest.version = self.model.next_version(guest.range, guest.zero);
            guest.order = guest.version;
        } else if !guest.passed && !self.model.is_out_of_turn(guest.range, from) {
            guest.order = self.model.renumber(guest);
        }
        self.model.note_placed(guest.range, from);
        let GuestRequest {
            range,
            version,
            order,
            ..
        } = *guest;
        self.note(Line::Placed {
            from,
            range,
            version,
            order,
        });
    }

    /// Sectors that go on where `range` ends, if the disk does.
    fn range_after(&mut self, range: SectorRange) -> Option<SectorRange> {
        let geometry = self.shape.geometry;
        let left = u32::try_from(geometry.sectors() - range.end()).expect("a small disk");
        let count = range.count().min(left);
        Some(geometry.first_piece(SectorRange::new(range.end(), count)?))
    }

    /// Half of all requests go to a few sectors, so that they meet.
    fn some_range(&mut self) -> SectorRange {
        let geometry = self.shape.geometry;
        let block = u64::from(geometry.block_sectors());
        let blocks = geometry.sectors() / block;
        let hot = (32 / block).max(2).min(blocks);
        let among = if self.rng.chance(500_000) {
            hot
        } else {
            blocks
        };
        let start = self.rng.below(among) * block;
        let count = if block == 1 {
            self.rng.between(1, 8)
        } else {
            block * self.rng.between(1, 2)
        };
        // Never a whole extent: that is how reconciliations are known.
        let whole = 1 << geometry.extent_shift();
        let count = if count < whole { count } else { block };
        let count = count.min(geometry.sectors() - start);
        let count = u32::try_from(count).expect("a short request");
        geometry.first_piece(SectorRange::new(start, count).expect("not empty"))
    }

    /// Faults that come without an operation.
    fn spoil_something(&mut self) {
        let rates = self.plan.rates;
        if self.rng.chance(rates.rot) {
            self.rot();
        }
        if self.rng.chance(rates.unreadable) {
            let (sector, replica) = self.some_copy();
            if self.disks[replica].is_readable(sector_range(sector))
                && self.budget.shade(sector, replica)
            {
                self.disks[replica].make_unreadable(sector);
                self.budget.taint(sector, replica);
                self.spoiled_at[index(sector)][replica] = self.step;
                self.tally.count("unreadable sector");
            }
        }
        let leaves = self.profile.life.map_or(0, |life| life.leaves);
        if self.rng.chance(leaves) {
            let (_, replica) = self.some_copy();
            self.leave(replica);
        }
        let ailment = self.profile.ailment;
        if ailment != Ailment::None
            && self.plan.slow.is_none()
            && self.plan.hung.is_none()
            && self.rng.chance(2_000)
        {
            let (_, replica) = self.some_copy();
            if self.plan.afflict(ailment, replica, &mut self.budget) {
                self.tally.count("ailing replica");
                if self.profile.life.is_some() {
                    let lasts = self.rng.between(5 * MS, 300 * MS);
                    self.clock.after(lasts, Happening::Life(Event::Relieve));
                }
            }
        }
    }

    fn some_copy(&mut self) -> (u64, usize) {
        let sector = self.rng.below(self.shape.geometry.sectors());
        let replica = self.rng.index(self.shape.policy.replicas);
        (sector, self.life.faulty.unwrap_or(replica))
    }

    /// A sector of one replica holds something else from now on: noise, what it held at some
    /// time, or what another sector holds.
    fn rot(&mut self) {
        let (sector, replica) = self.some_copy();
        if !self.budget.admits_rot(sector_range(sector), replica) {
            return;
        }
        let now = self.disks[replica].value(sector);
        let value = match self.rng.below(4) {
            0 => written(self.rng.between(1, self.step), sector),
            1 => self.disks[replica].value(sector ^ 1),
            2 => 0,
            _ => garbled(self.rng.next()),
        };
        // What may be there anyway would be no fault, and confuse the books.
        if value != now && !self.model.is_legal_now(sector, value) {
            self.spoil(replica, sector, value);
            self.tally.count("rot");
        }
    }
}

fn sector_range(sector: u64) -> SectorRange {
    SectorRange::new(sector, 1).expect("one sector")
}
