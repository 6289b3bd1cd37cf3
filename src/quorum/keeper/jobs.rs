// SPDX-License-Identifier: Apache-2.0
//! Requests that the maintenance lane works on for the keeper, by tag.

use super::super::event::{Request, Tag};
use super::super::shared::Shared;
use super::KeeperAction;
use crate::units::{ReplicaId, ReplicaSet, SectorRange, Time};

/// Requests of the keeper at a time: four to resync, four to scrub, a probe of each replica but
/// one, a flush, and what is left of a scrub that was stopped.
pub const REQUESTS_MAX: usize = 32;

/// What a request was made for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Job {
    /// Resolve and resync an extent; these replicas were behind there.
    Reconcile { extent: u64, returning: ReplicaSet },
    /// Settle sectors of a write that failed.
    Resolve { range: SectorRange },
    /// Compare a range, in a pass of this number.
    Check { pass: u32, range: SectorRange },
    /// See whether a lagging replica answers.
    Probe { replica: ReplicaId, since: Time },
    /// Make clean what nobody flushes.
    Flush,
}

/// One call of the keeper.
pub(super) struct Turn<'a> {
    pub(super) now: Time,
    pub(super) shared: &'a Shared,
    pub(super) actions: &'a mut Vec<KeeperAction>,
}

/// See the module.
pub(super) struct Jobs {
    slots: [Option<Job>; REQUESTS_MAX],
}

impl Jobs {
    pub(super) fn new() -> Self {
        let slots = [None; REQUESTS_MAX];
        Self { slots }
    }

    /// Whether one more may be started.
    pub(super) fn has_room(&self) -> bool {
        self.slots.iter().any(Option::is_none)
    }

    /// Asks for `request`. The caller has seen that there is room.
    pub(super) fn start(&mut self, turn: &mut Turn<'_>, job: Job, request: Request) {
        let free = self.slots.iter().position(Option::is_none);
        let slot = free.expect("who starts a job has seen that there is room");
        self.slots[slot] = Some(job);
        let tag = Tag(u32::try_from(slot).expect("a small number"));
        turn.actions.push(KeeperAction::Request { tag, request });
    }

    /// The request was replied to.
    ///
    /// # Panics
    /// If there is no such request: a broken invariant.
    pub(super) fn end(&mut self, tag: Tag) -> Job {
        let slot = usize::try_from(tag.0).expect("32 bits fit");
        let job = self.slots.get_mut(slot).and_then(Option::take);
        job.expect("one reply a request")
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = Job> {
        self.slots.iter().flatten().copied()
    }
}
