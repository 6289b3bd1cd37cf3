// SPDX-License-Identifier: Apache-2.0
//! What the front-end remembers of requests in flight (rules Q1, Q2), and how the next daemon
//! repeats them.
//!
//! A region a ring, as the specification of vhost-user has it: a request is marked with a counter
//! when it is fetched, before anything else is done. Its publication links it into the list of the
//! last batch, stores the used index, clears the marks of the batch, and notes the used index in
//! the region; only then is the lane told, which releases the locks (rule L3). A daemon may be
//! killed before and after the used index is stored: whoever comes next finishes the last batch if
//! the region does not know the used index, and repeats what is marked then, in the order of the
//! counters, before anything new from the ring.
//!
//! What the guest knows stands beside it: requests that it has not seen complete. Each of them
//! completes once, whatever happens to daemons meanwhile (I11).

use std::collections::{BTreeSet, VecDeque};

use crate::clock::Happening;
use crate::faults::MS;
use crate::guest::Kind;
use crate::life::Event;
use crate::model::Model;
use crate::quorum::{KeeperEvent, Wakeup};
use crate::rings::Planned;
use crate::trace::{Verdict, violation};
use crate::units::SectorRange;
use crate::world::{Breach, World};

/// A request that is marked.
#[derive(Clone, Debug)]
pub struct Marked {
    pub id: u64,
    counter: u64,
    parts: Vec<Planned>,
}

/// The part of the buffer that belongs to a ring, the used index of the ring, and what is still to
/// be repeated.
#[derive(Default)]
struct Region {
    marked: Vec<Marked>,
    counter: u64,
    /// As the guest sees it.
    used: u64,
    /// As the region has it.
    used_known: u64,
    last_batch: Vec<u64>,
    repeats: VecDeque<Marked>,
}

impl Region {
    /// As a daemon finds it: finishes the last batch, and repeats the rest.
    fn recover(&mut self, model: &Model, broken: Option<Breach>) {
        if self.used != self.used_known && broken != Some(Breach::LastBatchForgotten) {
            let batch = std::mem::take(&mut self.last_batch);
            self.marked.retain(|request| !batch.contains(&request.id));
        }
        self.used_known = self.used;
        self.marked.sort_by_key(|request| request.counter);
        for part in self
            .marked
            .iter_mut()
            .flat_map(|request| &mut request.parts)
        {
            if std::mem::take(&mut part.guest.placed) {
                part.guest.passed |= model.is_passed(&part.guest);
            }
        }
        self.repeats = self.marked.iter().cloned().collect();
        match broken {
            Some(Breach::MarksIgnored) => self.repeats.clear(),
            Some(Breach::RepeatsOutOfOrder) => self.repeats.make_contiguous().reverse(),
            _ => {}
        }
    }
}

/// The in-flight buffer of a front-end, and what the guest waits for.
#[derive(Default)]
pub struct Inflight {
    /// By lane and ring.
    regions: Vec<Vec<Region>>,
    /// Requests are marked.
    tracked: bool,
    /// Requests that the guest has not seen complete.
    outstanding: BTreeSet<u64>,
    next_id: u64,
}

impl Inflight {
    /// A buffer that nothing was ever in, for so many rings of each lane; or none, if what is in
    /// flight is not `tracked`.
    pub fn new(rings: &[usize], tracked: bool) -> Self {
        let ring = |&count: &usize| (0..count).map(|_| Region::default()).collect();
        Self {
            regions: rings.iter().map(ring).collect(),
            tracked,
            ..Self::default()
        }
    }

    /// Whether a front-end has such rings.
    pub fn has_regions(&self) -> bool {
        !self.regions.is_empty()
    }

    /// Rings of the lane.
    pub fn rings(&self, lane: usize) -> usize {
        self.regions[lane].len()
    }

    /// A request is fetched from the ring.
    pub fn mark(&mut self, lane: usize, ring: usize, parts: &[Planned]) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        self.outstanding.insert(id);
        if self.tracked
            && let Some(region) = self.region(lane, ring)
        {
            let counter = region.counter;
            region.counter += 1;
            let parts = parts.to_vec();
            region.marked.push(Marked { id, counter, parts });
        }
        id
    }

    /// The region of a ring of the guest; the rings of maintenance have none.
    fn region(&mut self, lane: usize, ring: usize) -> Option<&mut Region> {
        self.regions.get_mut(lane)?.get_mut(ring)
    }

    /// The part got its place among all writes: it keeps its content when it is repeated.
    pub fn note_part(&mut self, lane: usize, ring: usize, id: u64, part: usize, known: &Planned) {
        let Some(region) = self.region(lane, ring) else {
            return;
        };
        if let Some(request) = region.marked.iter_mut().find(|request| request.id == id) {
            request.parts[part].guest = known.guest;
        }
    }

    /// The guest sees these requests of a ring complete. Returns one that it does not wait for.
    pub fn publish(&mut self, lane: usize, ring: usize, ids: &[u64]) -> Option<u64> {
        if let Some(region) = self.region(lane, ring) {
            region.last_batch = ids.to_vec();
            region.used += ids.len() as u64;
        }
        let mut ids = ids.iter().copied();
        ids.find(|id| !self.outstanding.remove(id))
    }

    /// The marks of a batch are taken away.
    pub fn clear(&mut self, lane: usize, ring: usize, ids: &[u64]) {
        if let Some(region) = self.region(lane, ring) {
            region.marked.retain(|request| !ids.contains(&request.id));
            region.used_known = region.used;
        }
    }

    /// The next request of the ring that is to be repeated.
    pub fn take_repeat(&mut self, lane: usize, ring: usize) -> Option<(u64, Vec<Planned>)> {
        let request = self.region(lane, ring)?.repeats.pop_front()?;
        Some((request.id, request.parts))
    }

    /// Whether the lane has requests to repeat, and whether anybody has.
    pub fn has_repeats(&self, lane: usize) -> bool {
        let regions = self.regions.get(lane).into_iter().flatten();
        regions.into_iter().any(|region| !region.repeats.is_empty())
    }

    /// Whether every request of the guest is complete.
    pub fn is_quiet(&self) -> bool {
        self.outstanding.is_empty()
    }

    /// What every ring has to repeat, by lane and ring.
    fn repeats(&self) -> impl Iterator<Item = (usize, usize, &Marked)> {
        let lanes = self.regions.iter().enumerate();
        let rings = lanes.flat_map(|(lane, rings)| {
            let rings = rings.iter().enumerate();
            rings.map(move |(ring, region)| (lane, ring, region))
        });
        rings.flat_map(|(lane, ring, region)| {
            let repeats = region.repeats.iter();
            repeats.map(move |request| (lane, ring, request))
        })
    }

    /// Writes that are to be repeated, by their place among all writes.
    pub fn orders(&self) -> BTreeSet<u64> {
        let parts = self.repeats().flat_map(|(_, _, request)| &request.parts);
        let writes = parts.filter(|part| part.guest.kind == Kind::Write);
        writes
            .map(|part| part.guest.order)
            .filter(|&o| o > 0)
            .collect()
    }

    /// Numbers writes that are to be repeated anew, those of each ring in its order.
    pub fn renumber(&mut self, model: &mut Model) {
        for region in self.regions.iter_mut().flatten() {
            for request in &mut region.marked {
                let same = |other: &&mut Marked| other.id == request.id;
                let Some(repeat) = region.repeats.iter_mut().find(same) else {
                    continue;
                };
                for part in &mut request.parts {
                    if part.guest.order > 0 && !part.guest.passed {
                        part.guest.order = model.renumber(&part.guest);
                    }
                }
                repeat.parts.clone_from(&request.parts);
            }
        }
    }

    /// Whether writes that are to be repeated overlap this one, and come from the same ring.
    fn overlapping(&self) -> u64 {
        let writes = |request: &&Marked| request.parts[0].guest.kind == Kind::Write;
        let mut count = 0;
        for rings in &self.regions {
            for region in rings {
                let ranges = region.repeats.iter().filter(writes);
                let ranges: Vec<SectorRange> = ranges
                    .flat_map(|request| request.parts.iter().map(|part| part.guest.range))
                    .collect();
                let meets = |(at, range): (usize, &SectorRange)| {
                    ranges[..at].iter().any(|other| other.overlaps(*range))
                };
                let met = ranges.iter().enumerate().filter(|&pair| meets(pair));
                count += u64::try_from(met.count()).expect("few");
            }
        }
        count
    }
}

impl World {
    /// The daemon has ended, and the front-end keeps what was in flight, or is gone with it.
    pub fn hand_over(&mut self, warm: bool) {
        let broken = self.broken.breach;
        if !warm {
            self.inflight = Inflight::default();
            return;
        }
        for region in self.inflight.regions.iter_mut().flatten() {
            region.recover(&self.model, broken);
        }
        let repeats = self.inflight.repeats().count();
        self.tally.add("re-executed", repeats as u64);
        self.tally
            .add("re-executed overlapping", self.inflight.overlapping());
        let pending = self.inflight.regions.iter().flatten();
        let cut = pending.filter(|region| !region.last_batch.is_empty());
        self.tally.add("batches before a kill", cut.count() as u64);
    }

    /// The rings begin: a warm front-end has requests to repeat, one ring after the other tells how
    /// many, and when all have, it is decided what ties mean (rule Y3).
    pub fn begin_warm(&mut self) {
        let repeats = self.inflight.repeats().count();
        self.shared.expect_repeats(repeats as u64);
        let later = self.rng.below(2 * MS);
        self.clock.after(later, Happening::Life(Event::Gathered));
    }

    /// A request that was repeated makes no difference any more.
    pub fn end_repeat(&mut self) {
        if self.shared.end_repeat() {
            self.tell_ties_decided();
        }
    }

    /// It is decided what becomes of ties: everybody goes on who waits for that.
    pub fn tell_ties_decided(&mut self) {
        for lane in 0..self.workers.len() {
            let (delay, wakeup) = (self.rng.below(200_000), Wakeup::TiesDecided);
            self.clock.after(delay, Happening::Wake { lane, wakeup });
        }
        self.tell_keeper(KeeperEvent::Tick);
    }

    /// The used index is stored: the guest sees the batch.
    pub fn publish_batch(&mut self, lane: usize, ring: usize, ids: &[u64]) -> Verdict {
        match self.inflight.publish(lane, ring, ids) {
            Some(id) => violation("I11", format!("request {id} completes twice")),
            None => Ok(()),
        }
    }
}
