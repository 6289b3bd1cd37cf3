// SPDX-License-Identifier: Apache-2.0
//! The virtual clock: what happens when, in an order that only the seed decides.

use std::cmp::Ordering;
use std::collections::BinaryHeap;

use crate::life::Event;
use crate::quorum::Wakeup;
use crate::units::SectorRange;

/// Something that happens at a point of virtual time.
#[derive(Clone, Copy, Debug)]
pub enum Happening {
    /// The guest would like to send a request on this lane's queue.
    Guest { lane: usize },
    /// The operation in this slot ends.
    Complete { slot: usize },
    /// The guest sees the replies whose turn it is.
    Publish { lane: usize },
    /// The marks of what was published last in this ring are cleared.
    Clear { lane: usize, ring: usize },
    /// There may be buffers for the rest of the request that was begun.
    Resume { lane: usize },
    /// A wakeup reaches its lane.
    Wake { lane: usize, wakeup: Wakeup },
    /// The lane's timer fires.
    Tick { lane: usize },
    /// A write that was called complete long ago reaches the medium.
    Land { late: usize },
    /// A fault of one operation no longer counts against the budget.
    Forget { replica: usize, range: SectorRange },
    /// Something in the life of the daemon, of its record or of a member.
    Life(Event),
}

struct Entry {
    at: u64,
    number: u64,
    what: Happening,
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Entry {}

impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Entry {
    /// The heap yields its greatest entry: the earliest, and of those the first that was put in.
    fn cmp(&self, other: &Self) -> Ordering {
        (other.at, other.number).cmp(&(self.at, self.number))
    }
}

/// The queue of what is to happen, and the time.
#[derive(Default)]
pub struct Clock {
    heap: BinaryHeap<Entry>,
    number: u64,
    now: u64,
}

impl Clock {
    /// Nanoseconds since the start of the run.
    pub fn now(&self) -> u64 {
        self.now
    }

    pub fn after(&mut self, delay: u64, what: Happening) {
        self.number += 1;
        let (at, number) = (self.now + delay, self.number);
        self.heap.push(Entry { at, number, what });
    }

    /// Only what `stays` will happen.
    pub fn keep(&mut self, stays: impl Fn(&Happening) -> bool) {
        self.heap.retain(|entry| stays(&entry.what));
    }

    /// Moves on to the next thing to happen.
    pub fn next(&mut self) -> Option<Happening> {
        let entry = self.heap.pop()?;
        self.now = entry.at;
        Some(entry.what)
    }
}
