// SPDX-License-Identifier: Apache-2.0
//! The rings of the simulated guest: a lane serves one to three of them, a request has one to four
//! parts, and replies become visible in the order in which the requests of a ring were sent
//! (rule Q3), as in the worker of the daemon.

use std::collections::VecDeque;

use crate::clock::Happening;
use crate::faults::MS;
use crate::guest::{GuestRequest, Kind};
use crate::quorum::{BufferId, Event, Request, RequestId, Tag};
use crate::trace::Verdict;
use crate::world::{Breach, World};

/// A part of a request that the lane has not been told of.
#[derive(Clone, Copy, Debug)]
pub struct Planned {
    pub guest: GuestRequest,
    /// Without data; a write gets a buffer when it is sent.
    pub request: Request,
}

/// A part in the lane.
#[derive(Clone, Copy)]
struct Part {
    tag: Tag,
    reads: bool,
    replied: Option<RequestId>,
    deferred: bool,
}

/// A request of the guest, by its parts.
#[derive(Default)]
struct Entry {
    /// Its name for the front-end.
    id: u64,
    /// It was in flight when the last daemon ended, and may change sectors.
    repeated: bool,
    parts: Vec<Part>,
    unsent: usize,
    /// The lane knows that it is published.
    told: bool,
}

impl Entry {
    fn is_complete(&self) -> bool {
        self.unsent == 0 && self.parts.iter().all(|part| part.replied.is_some())
    }
}

/// The rings of one lane.
#[derive(Default)]
pub struct Rings {
    rings: Vec<VecDeque<Entry>>,
    /// Parts of the request that was begun last, and the ring it is in.
    unsent: VecDeque<Planned>,
    sending: usize,
    /// A look at what can be published is to come.
    due: bool,
    /// As they complete, not in the order of the ring: the front-end remembers what is in flight.
    any_order: bool,
    /// Of each ring, what the guest sees complete and whose marks are still set.
    uncleared: Vec<Vec<Entry>>,
    /// Replied reads: their buffers go back at once.
    copied: Vec<RequestId>,
}

impl Rings {
    pub fn new(count: usize, any_order: bool) -> Self {
        Self {
            rings: (0..count).map(|_| VecDeque::new()).collect(),
            uncleared: (0..count).map(|_| Vec::new()).collect(),
            any_order,
            ..Self::default()
        }
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.rings.len()
    }

    /// Whether nothing that was begun is unpublished.
    pub fn is_idle(&self) -> bool {
        self.rings.iter().all(VecDeque::is_empty) && self.uncleared.iter().all(Vec::is_empty)
    }

    /// Whether all parts of all requests are in the lane.
    pub fn all_sent(&self) -> bool {
        self.unsent.is_empty()
    }

    /// Nobody looks at the reply: it is as good as published.
    pub fn note_copied(&mut self, request: RequestId) {
        self.copied.push(request);
    }

    fn part(&mut self, tag: Tag) -> Option<&mut Part> {
        let parts = self.rings.iter_mut().flatten().flat_map(|e| &mut e.parts);
        parts.into_iter().find(|part| part.tag == tag)
    }

    /// Takes the requests of a ring whose turn it is.
    fn take_batch(&mut self, ring: usize) -> Vec<Entry> {
        let entries = &mut self.rings[ring];
        if !self.any_order {
            let first = entries.iter().position(|entry| !entry.is_complete());
            return entries.drain(..first.unwrap_or(entries.len())).collect();
        }
        let (batch, left) = entries.drain(..).partition(Entry::is_complete);
        *entries = left;
        Vec::from_iter::<VecDeque<Entry>>(batch)
    }

    /// Takes note of a reply that has to wait for an earlier request, once.
    fn take_undeferred(&mut self) -> Option<RequestId> {
        let mut parts = self.rings.iter_mut().flatten().flat_map(|e| &mut e.parts);
        let part = parts.find(|p| p.replied.is_some() && !p.reads && !p.deferred)?;
        part.deferred = true;
        part.replied
    }
}

impl World {
    /// Begins a request of `parts` in one of the rings of the lane.
    pub fn begin(&mut self, lane: usize, parts: Vec<Planned>) -> Verdict {
        let ring = self.rng.index(self.workers[lane].rings.rings.len());
        self.begin_in(lane, ring, parts)
    }

    /// Begins a request of `parts` in a ring of the lane: marks it first.
    pub fn begin_in(&mut self, lane: usize, ring: usize, parts: Vec<Planned>) -> Verdict {
        let id = self.inflight.mark(lane, ring, &parts);
        let entry = Entry {
            id,
            unsent: parts.len(),
            ..Entry::default()
        };
        self.fetch(lane, ring, entry, parts)
    }

    /// Begins a request once more that was in flight when the last daemon ended.
    pub fn repeat(&mut self, lane: usize, ring: usize, id: u64, parts: Vec<Planned>) -> Verdict {
        let repeated = parts[0].guest.kind == Kind::Write;
        let entry = Entry {
            id,
            repeated,
            unsent: parts.len(),
            ..Entry::default()
        };
        if !repeated {
            self.end_repeat();
        }
        self.fetch(lane, ring, entry, parts)
    }

    fn fetch(
        &mut self,
        lane: usize,
        ring: usize,
        entry: Entry,
        mut parts: Vec<Planned>,
    ) -> Verdict {
        let several = parts.len() > 1 && parts[0].guest.kind == Kind::Write;
        if several && !self.broken.is(Breach::PartsNotAnnounced) {
            let ranges = parts.iter().map(|part| part.guest.range);
            self.workers[lane].lane.announce(ranges, &self.shared);
            for (number, part) in parts.iter_mut().enumerate() {
                self.number(&mut part.guest, (lane, ring, entry.id));
                self.inflight.note_part(lane, ring, entry.id, number, part);
            }
        }
        let rings = &mut self.workers[lane].rings;
        rings.sending = ring;
        rings.rings[ring].push_back(entry);
        rings.unsent.extend(parts);
        if rings.any_order && self.rng.chance(20_000) {
            // It may be killed when it has marked the request and done nothing else.
            let later = self.rng.below(100_000);
            self.clock.after(later, Happening::Resume { lane });
            return Ok(());
        }
        self.send_parts(lane)
    }

    /// Hands the lane the parts of the request that was begun, as many as it has room and buffers
    /// for. Nothing else is begun before all are sent.
    pub fn send_parts(&mut self, lane: usize) -> Verdict {
        while let Some(&Planned { mut guest, request }) = self.workers[lane].rings.unsent.front() {
            let mut request = request;
            let mut room = self.workers[lane].lane.has_room();
            let rings = &self.workers[lane].rings;
            let ring = rings.sending;
            let id = rings.rings[ring].back().expect("begun last").id;
            if room && guest.version == 0 {
                self.number(&mut guest, (lane, ring, id));
            }
            let worker = &mut self.workers[lane];
            if room && let Request::Write { data, .. } = &mut request {
                match worker.pool.take_filled(guest.values()) {
                    Some(buffer) => *data = buffer,
                    None => room = false,
                }
            }
            if !room {
                self.tally.count("stalled requests");
                let later = self.rng.between(20_000, 200_000);
                self.clock.after(later, Happening::Resume { lane });
                return Ok(());
            }
            // What is repeated has its content, and gets its place when it is sure to be sent.
            self.number(&mut guest, (lane, ring, id));
            let tag = self.guests.add(lane, guest);
            if guest.kind == Kind::Flush && self.profile.life.is_some() {
                let settled = self.model.settled();
                self.guests.note_covered(lane, tag, settled);
            }
            let rings = &mut self.workers[lane].rings;
            rings.unsent.pop_front();
            let sending = rings.sending;
            let entry = rings.rings[sending].back_mut().expect("begun last");
            let (id, number) = (entry.id, entry.parts.len());
            let known = Planned { guest, request };
            self.inflight.note_part(lane, sending, id, number, &known);
            entry.unsent -= 1;
            entry.parts.push(Part {
                tag,
                reads: matches!(request, Request::Read { .. }),
                replied: None,
                deferred: false,
            });
            self.deliver(lane, Event::Request { tag, request })?;
        }
        let mut actions = Vec::new();
        let worker = &mut self.workers[lane];
        worker.lane.all_parts_told(&self.shared, &mut actions);
        self.carry_out(lane, &actions)
    }

    /// Notes the reply to a part. It becomes visible with the next batch, at the earliest.
    pub fn note_reply(&mut self, lane: usize, tag: Tag, request: RequestId) {
        let rings = &mut self.workers[lane].rings;
        let part = rings.part(tag).expect("only parts get replies");
        part.replied = Some(request);
        if part.reads {
            rings.copied.push(request);
        }
        if !std::mem::replace(&mut rings.due, true) {
            // Replies become visible in batches: now and then it takes long.
            let delay = match self.rng.below(10) {
                0 => self.rng.between(50_000, crate::faults::MS),
                _ => self.rng.below(5_000),
            };
            self.clock.after(delay, Happening::Publish { lane });
        }
    }

    /// Reads hold nothing that publication has to be waited for.
    pub fn release_copied(&mut self, lane: usize) -> Verdict {
        while let Some(request) = self.workers[lane].rings.copied.pop() {
            self.deliver(lane, Event::Published { request })?;
        }
        Ok(())
    }

    /// Shows the guest what is complete and whose turn it is; the rest is deferred.
    pub fn publish(&mut self, lane: usize) -> Verdict {
        self.workers[lane].rings.due = false;
        for ring in 0..self.workers[lane].rings.rings.len() {
            let rings = &mut self.workers[lane].rings;
            let careless = self.broken.is(Breach::MarksClearedLate);
            if !rings.uncleared[ring].is_empty() && !careless {
                // The list of the last batch is in use.
                continue;
            }
            let batch = rings.take_batch(ring);
            if batch.is_empty() {
                continue;
            }
            let ids: Vec<u64> = batch.iter().map(|entry| entry.id).collect();
            self.publish_batch(lane, ring, &ids)?;
            for entry in &batch {
                for part in &entry.parts {
                    self.guests.published(lane, part.tag);
                }
                let think = self.rng.below(100_000);
                self.clock.after(think, Happening::Guest { lane });
            }
            self.workers[lane].rings.uncleared[ring].extend(batch);
            if careless {
                self.tell_published(lane, ring)?;
                self.clock.after(MS, Happening::Clear { lane, ring });
                continue;
            }
            if !self.workers[lane].rings.any_order {
                self.clear(lane, ring)?;
                continue;
            }
            let later = match self.rng.below(10) {
                0 => self.rng.below(100_000),
                _ => 0,
            };
            self.clock.after(later, Happening::Clear { lane, ring });
        }
        while let Some(request) = self.workers[lane].rings.take_undeferred() {
            self.tally.count("deferred replies");
            self.deliver(lane, Event::Deferred { request })?;
        }
        Ok(())
    }
}

impl World {
    /// The marks of the last batch are cleared, and then the lane hears of it (rule L3).
    pub fn clear(&mut self, lane: usize, ring: usize) -> Verdict {
        let batch = &self.workers[lane].rings.uncleared[ring];
        let ids: Vec<u64> = batch.iter().map(|entry| entry.id).collect();
        let repeated = batch.iter().filter(|entry| entry.repeated).count();
        self.inflight.clear(lane, ring, &ids);
        self.tell_published(lane, ring)?;
        self.workers[lane].rings.uncleared[ring].clear();
        for _ in 0..repeated {
            self.end_repeat();
        }
        Ok(())
    }

    /// The lane hears of what was published; it releases the locks of writes.
    fn tell_published(&mut self, lane: usize, ring: usize) -> Verdict {
        let batch = &mut self.workers[lane].rings.uncleared[ring];
        let untold = batch.iter_mut().filter(|entry| !entry.told);
        let mut requests = Vec::new();
        for entry in untold {
            entry.told = true;
            let parts = entry.parts.iter().filter(|part| !part.reads);
            requests.extend(parts.map(|part| part.replied.expect("complete")));
        }
        for request in requests {
            self.deliver(lane, Event::Published { request })?;
        }
        Ok(())
    }
}

/// Stands for the buffer that a planned write does not have yet.
pub const NO_BUFFER: BufferId = BufferId(u32::MAX);
