// SPDX-License-Identifier: Apache-2.0
//! When each extent was written to last, and what was flushed since: what may be called clean.
//!
//! Flush runs are numbered in the order in which they begin. A write that ends stamps its extent
//! with the number of the latest run; a replica that completes a run with a higher number has
//! flushed the write, because that run began later.

use super::sync::{AtomicU64, Ordering};
use crate::units::{ReplicaId, Time};

/// Unit of the times in stamps.
const UNIT_NS: u64 = 100_000_000;

/// A moment of write activity in an extent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Stamp(u64);

impl Stamp {
    /// Age at `now`, in nanoseconds, to 100 ms.
    #[must_use]
    pub fn age_ns(self, now: Time) -> u64 {
        let units = now.nanos() / UNIT_NS;
        units.saturating_sub(self.0 >> 32) * UNIT_NS
    }

    fn run(self) -> u64 {
        self.0 & u64::from(u32::MAX)
    }
}

/// Write activity of all extents.
pub struct Activity {
    stamps: Box<[AtomicU64]>,
    /// Flush runs that have begun.
    begun: AtomicU64,
    /// The last run that each replica has completed.
    flushed: Box<[AtomicU64]>,
    /// The last run that made durable on T replicas whatever had ended before it began.
    covered: AtomicU64,
}

impl Activity {
    /// No activity on a disk of `extents` extents with `replicas` replicas.
    #[must_use]
    pub fn new(replicas: usize, extents: u64) -> Self {
        let extents = usize::try_from(extents).expect("at most 2^20 extents");
        let zeroes = |count: usize| (0..count).map(|_| AtomicU64::new(0)).collect();
        Self {
            stamps: zeroes(extents),
            begun: AtomicU64::new(0),
            flushed: zeroes(replicas),
            covered: AtomicU64::new(0),
        }
    }

    fn stamp_of(&self, extent: u64) -> &AtomicU64 {
        &self.stamps[usize::try_from(extent).expect("at most 2^20 extents")]
    }

    /// Something was written in `extent`; called when the last of it has ended, under its lock.
    pub fn note(&self, extent: u64, now: Time) {
        // The numbers of runs are compared in 32 bits: 136 years at a run a second.
        let run = self.begun.load(Ordering::Acquire) & u64::from(u32::MAX);
        let stamp = (now.nanos() / UNIT_NS) << 32 | run;
        self.stamp_of(extent).store(stamp, Ordering::Release);
    }

    /// The last activity in `extent`.
    #[must_use]
    pub fn last(&self, extent: u64) -> Stamp {
        Stamp(self.stamp_of(extent).load(Ordering::Acquire))
    }

    /// A flush run begins; nothing of it was submitted yet.
    pub fn begin_run(&self, run: u64) {
        self.begun.fetch_max(run, Ordering::AcqRel);
    }

    /// `replica` has completed run `run`, without having been kicked since it began.
    pub fn flushed(&self, replica: ReplicaId, run: u64) {
        self.flushed[replica.index()].fetch_max(run, Ordering::AcqRel);
    }

    /// Whatever had ended before run `run` began is durable on T replicas (invariant I5).
    pub fn covered(&self, run: u64) {
        self.covered.fetch_max(run, Ordering::AcqRel);
    }

    /// Whether the activity of `stamp` ended before a run began that made it durable on T replicas.
    #[must_use]
    pub fn is_covered(&self, stamp: Stamp) -> bool {
        self.covered.load(Ordering::Acquire) > stamp.run()
    }

    /// Whether `replica` has completed a flush that began after the activity of `stamp`.
    #[must_use]
    pub fn is_flushed(&self, replica: ReplicaId, stamp: Stamp) -> bool {
        self.flushed[replica.index()].load(Ordering::Acquire) > stamp.run()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_run_that_began_later_covers_a_write() {
        let activity = Activity::new(2, 10);
        let (r, now) = (ReplicaId::new(1), Time::from_nanos(7_000_000_000));
        activity.begin_run(1);
        activity.note(3, now);
        activity.flushed(r, 1);
        let stamp = activity.last(3);
        assert!(!activity.is_flushed(r, stamp));
        activity.begin_run(2);
        activity.flushed(r, 2);
        assert!(activity.is_flushed(r, stamp));
        assert!(!activity.is_flushed(ReplicaId::new(0), stamp));
        activity.covered(1);
        assert!(!activity.is_covered(stamp));
        activity.covered(2);
        assert!(activity.is_covered(stamp));
        let later = Time::from_nanos(12_500_000_000);
        assert_eq!(stamp.age_ns(later), 5_500_000_000);
    }
}
