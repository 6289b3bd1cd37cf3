// SPDX-License-Identifier: Apache-2.0
//! The marks of one running queue.
//!
//! The order of stores (see [`super::mapping`] for why the compiler is all that must keep it):
//!
//! ```text
//! fetch     counter, mark                            before the request is looked at
//! publish   next, last_batch_head  for each head     link
//!           used elements, used index                guest memory
//!           marks                  for each head     clear
//!           used_idx                                 end_batch
//! ```
//!
//! Killed before the used index was stored, all of the batch are marked and are executed again;
//! the list is not looked at, because `used_idx` equals the used index. Killed after that and
//! before `used_idx` was stored, the list tells whose marks to clear: as many as the used index is
//! ahead. The list of one batch is not overwritten before its end. The counter goes before the
//! mark, so that a marked head has its own.

use super::QueueRegion;
use super::layout::{LAST_BATCH_HEAD_AT, USED_IDX_AT, counter_at, mark_at, next_at};
use super::recovery::{self, InflightFault};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Mark {
    Clear,
    InFlight,
    /// Completed, not published.
    Complete,
}

/// The account of a queue of what is in flight, kept in its region as well.
#[derive(Debug)]
pub struct Marks {
    region: QueueRegion,
    /// By head. The region is the front-end's: it is not read again.
    heads: Box<[Mark]>,
    counter: u64,
    last_batch_head: u16,
}

impl Marks {
    /// The marks of a queue of `size` that starts at used index `used`, and the heads that are
    /// marked already, in the order in which they were fetched.
    ///
    /// # Errors
    /// If the region is impossible. It is left as it is.
    pub fn begin(
        region: QueueRegion,
        size: u16,
        used: u16,
    ) -> Result<(Self, Vec<u16>), InflightFault> {
        let left = recovery::recover(&region, size, used)?;
        let mut heads = vec![Mark::Clear; usize::from(size)].into_boxed_slice();
        for &head in &left.heads {
            heads[usize::from(head)] = Mark::InFlight;
        }
        let marks = Self {
            region,
            heads,
            counter: left.counter_next,
            last_batch_head: left.last_batch_head,
        };
        Ok((marks, left.heads))
    }

    /// Marks `head`, which was fetched just now (rule Q1). Returns whether that is possible: it is
    /// not if there is no such descriptor, or a request with this head is in flight.
    #[must_use = "a head that cannot be marked must not be acted on"]
    pub fn mark(&mut self, head: u16) -> bool {
        let Some(mark @ Mark::Clear) = self.heads.get_mut(usize::from(head)) else {
            return false;
        };
        *mark = Mark::InFlight;
        self.region.store(counter_at(head), self.counter);
        self.region.store(mark_at(head), 1u8);
        // From far below its end: recovery refuses counters in the upper half.
        self.counter += 1;
        true
    }

    /// Notes that the request with this head is complete.
    ///
    /// # Panics
    /// If it is not in flight: completing twice is our bug.
    pub fn complete(&mut self, head: u16) {
        let mark = &mut self.heads[usize::from(head)];
        assert_eq!(*mark, Mark::InFlight, "head {head} was completed twice");
        *mark = Mark::Complete;
    }

    /// Before the batch is published: adds `head` to its list.
    pub fn link(&mut self, head: u16) {
        self.region.store(next_at(head), self.last_batch_head);
        self.last_batch_head = head;
        self.region.store(LAST_BATCH_HEAD_AT, head);
    }

    /// After the used index was stored: takes the mark of `head` away.
    pub fn clear(&mut self, head: u16) {
        self.heads[usize::from(head)] = Mark::Clear;
        self.region.store(mark_at(head), 0u8);
    }

    /// After all marks of the batch are cleared. `used` is the used index.
    pub fn end_batch(&self, used: u16) {
        self.region.store(USED_IDX_AT, used);
    }
}
