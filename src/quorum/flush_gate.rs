// SPDX-License-Identifier: Apache-2.0
//! Flushes of all lanes, one run at a time (rules F1, F2).
//!
//! A flush request that arrives while a run is under way shares the next run with everybody else
//! who waits, because only a run that begins after the request covers it. The lane that ends a
//! run names the lane that begins the next.

use super::event::LaneId;
use super::sync::Mutex;
use crate::units::{ReplicaId, ReplicaSet};

/// What a lane with a flush request does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Join {
    /// Begin this run now.
    Start(u64),
    /// The request is covered by this run, which has not begun.
    Wait(u64),
}

/// What follows from the end of a run.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Finished {
    /// The run that ended.
    pub run: u64,
    /// Other lanes with requests in the run that ended.
    pub sharers: LaneSet,
    /// The lane to begin the next run.
    pub next: Option<LaneId>,
}

/// A set of lanes, one bit each.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct LaneSet(u64);

impl LaneSet {
    fn insert(&mut self, lane: LaneId) {
        self.0 |= 1 << lane.0;
    }

    fn pop(&mut self) -> Option<LaneId> {
        if self.0 == 0 {
            return None;
        }
        let lane = self.0.trailing_zeros();
        self.0 &= self.0 - 1;
        Some(LaneId(u8::try_from(lane).expect("below 64")))
    }

    /// Lanes in order.
    pub fn iter(mut self) -> impl Iterator<Item = LaneId> {
        std::iter::from_fn(move || self.pop())
    }
}

#[derive(Default)]
struct Gate {
    run: u64,
    running: Option<LaneId>,
    sharers: LaneSet,
    waiters: LaneSet,
    unanswered: ReplicaSet,
}

/// See the module.
#[derive(Default)]
pub struct FlushGate {
    gate: Mutex<Gate>,
}

impl FlushGate {
    /// A request of `lane` wants to be covered by a run.
    pub fn join(&self, lane: LaneId) -> Join {
        let mut gate = self.gate.lock().expect("no panic under this lock");
        if gate.running.is_none() {
            gate.run += 1;
            gate.running = Some(lane);
            return Join::Start(gate.run);
        }
        gate.waiters.insert(lane);
        Join::Wait(gate.run + 1)
    }

    /// Number of the run that is under way, or was last.
    #[must_use]
    pub fn run(&self) -> u64 {
        self.gate.lock().expect("no panic under this lock").run
    }

    /// The run of `lane` has ended.
    pub fn finish(&self, lane: LaneId) -> Finished {
        let mut gate = self.gate.lock().expect("no panic under this lock");
        assert_eq!(
            gate.running,
            Some(lane),
            "the lane that began a run ends it"
        );
        let run = gate.run;
        let sharers = std::mem::take(&mut gate.sharers);
        gate.running = gate.waiters.pop();
        gate.sharers = std::mem::take(&mut gate.waiters);
        gate.run += u64::from(gate.running.is_some());
        Finished {
            run,
            sharers,
            next: gate.running,
        }
    }

    /// Replicas that still work on a flush of an earlier run: at most one is in flight on each.
    #[must_use]
    pub fn unanswered(&self) -> ReplicaSet {
        self.gate
            .lock()
            .expect("no panic under this lock")
            .unanswered
    }

    /// A run ended without the flush of `replica`.
    pub fn leave_unanswered(&self, replica: ReplicaId) {
        self.gate
            .lock()
            .expect("no panic under this lock")
            .unanswered
            .insert(replica);
    }

    /// The flush that was left has completed.
    pub fn answered(&self, replica: ReplicaId) {
        self.gate
            .lock()
            .expect("no panic under this lock")
            .unanswered
            .remove(replica);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn join_during_a_run_shares_the_next_one() {
        let gate = FlushGate::default();
        let [a, b, c] = [LaneId(0), LaneId(1), LaneId(2)];
        assert_eq!(gate.join(a), Join::Start(1));
        assert_eq!(gate.join(b), Join::Wait(2));
        assert_eq!(gate.join(c), Join::Wait(2));
        assert_eq!(gate.join(a), Join::Wait(2));
        let finished = gate.finish(a);
        assert_eq!((finished.run, finished.sharers.iter().count()), (1, 0));
        assert_eq!(finished.next, Some(a));
        assert_eq!(gate.join(b), Join::Wait(3));
        let finished = gate.finish(a);
        assert_eq!(finished.sharers.iter().collect::<Vec<_>>(), [b, c]);
        assert_eq!(finished.next, Some(b));
        assert_eq!(gate.finish(b).next, None);
        assert_eq!(gate.join(c), Join::Start(4));
    }
}
