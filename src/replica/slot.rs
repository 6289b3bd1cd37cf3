// SPDX-License-Identifier: Apache-2.0
//! One place in the set, as an executor sees it: the replica in it, and what it is busy with.
//!
//! ```text
//!   Empty -- attach --> Attached -- detach --> Leaving -- last operation ended --> Empty
//! ```

use std::sync::Arc;

use io_uring::squeue;

use crate::io::detour;
use crate::replica::Replica;
use crate::replica::flight::ZeroMethods;

/// A slot: with a replica, without one, or with one that is on its way out.
#[derive(Debug)]
pub(super) struct Slot {
    state: State,
    /// Operations that were begun and have not ended; none if the slot is empty.
    in_flight: u32,
    pub(super) alignment_bytes: u32,
    pub(super) zero_methods: ZeroMethods,
    /// Of every submission, see [`detour`].
    pub(super) flags: squeue::Flags,
}

/// The `Arc` keeps the files open, and with them the locks (rule K2).
#[derive(Debug)]
enum State {
    Empty,
    Attached(Arc<Replica>),
    /// Nothing begins any more; the kernel still has operations.
    Leaving(Arc<Replica>),
}

impl Slot {
    /// A slot with this replica or none, and nothing in flight.
    pub(super) fn new(replica: Option<Arc<Replica>>) -> Self {
        let can_punch = replica.as_ref().is_some_and(|one| one.can_zero_exactly());
        Self {
            in_flight: 0,
            alignment_bytes: replica
                .as_ref()
                .map_or(1, |one| one.direct_alignment_bytes()),
            zero_methods: ZeroMethods {
                punch: can_punch,
                zero_range: true,
            },
            flags: replica.as_ref().map_or(squeue::Flags::empty(), |one| {
                detour::submission_flags(one.data_fd())
            }),
            state: replica.map_or(State::Empty, State::Attached),
        }
    }

    /// Counts an operation that begins and tells how to zero; `None` if none may begin here.
    pub(super) fn begin(&mut self) -> Option<ZeroMethods> {
        if !self.is_attached() {
            return None;
        }
        self.in_flight += 1;
        Some(self.zero_methods)
    }

    /// Counts an operation that has ended.
    ///
    /// # Panics
    /// If none was in flight.
    pub(super) fn end(&mut self) {
        self.in_flight = self
            .in_flight
            .checked_sub(1)
            .expect("an operation that ends was begun in the same slot");
    }

    /// Lets nothing begin any more.
    pub(super) fn leave(&mut self) {
        self.state = match std::mem::replace(&mut self.state, State::Empty) {
            State::Empty => State::Empty,
            State::Attached(replica) | State::Leaving(replica) => State::Leaving(replica),
        };
    }

    pub(super) fn in_flight(&self) -> u32 {
        self.in_flight
    }

    pub(super) fn is_empty(&self) -> bool {
        matches!(self.state, State::Empty)
    }

    pub(super) fn is_attached(&self) -> bool {
        matches!(self.state, State::Attached(_))
    }

    /// Whether the replica is on its way out and nothing keeps it any more.
    pub(super) fn is_done(&self) -> bool {
        matches!(self.state, State::Leaving(_)) && self.in_flight == 0
    }

    /// The replica, also while it is on its way out.
    pub(super) fn replica(&self) -> Option<&Arc<Replica>> {
        match &self.state {
            State::Empty => None,
            State::Attached(replica) | State::Leaving(replica) => Some(replica),
        }
    }
}
