// SPDX-License-Identifier: Apache-2.0
//! Calling extents clean (rule W8), and the flush for guests that never ask for one.

use std::time::Duration;

use super::super::event::Request;
use super::super::marks::Bitmap;
use super::super::shared::Shared;
use super::jobs::{Job, Jobs, Turn};
use super::{KeeperAction, KeeperConfig};
use crate::units::Time;

/// Dirty extents looked at in one go. A look takes some 100 ns; the thread has other things to do.
const EXTENTS_AT_ONCE: usize = 4096;

/// From one go to the next while a sweep is not through.
const PAUSE: Duration = Duration::from_millis(1);

/// See the module.
pub(super) struct Sweep {
    interval: Duration,
    idle_ns: u64,
    flush_interval: Duration,
    /// When to go on.
    next_at: Time,
    /// From which extent on; 0 begins a sweep.
    from: u64,
    /// An extent of this sweep is dirty only for want of a flush.
    flush_wanted: bool,
    /// When the last flush of the keeper was asked for.
    flushed_at: Option<Time>,
}

impl Sweep {
    pub(super) fn new(config: &KeeperConfig) -> Self {
        let idle = config.idle_before_clean.as_nanos();
        Self {
            interval: config.sweep_interval,
            idle_ns: u64::try_from(idle).unwrap_or(u64::MAX),
            flush_interval: config.flush_interval,
            next_at: Time::default(),
            from: 0,
            flush_wanted: false,
            flushed_at: None,
        }
    }

    pub(super) fn deadline(&self) -> Time {
        self.next_at
    }

    /// The flush has ended, well or not.
    pub(super) fn flushed(&mut self, now: Time) {
        self.next_at = now;
        self.from = 0;
    }

    /// Goes on with the sweep. Returns whether a sweep began: a good moment to look at everything
    /// else that nobody tells the keeper.
    pub(super) fn advance(&mut self, turn: &mut Turn<'_>, jobs: &mut Jobs) -> bool {
        if turn.now < self.next_at {
            return false;
        }
        let begins = self.from == 0;
        self.flush_wanted &= !begins;
        let (mut cleaned, mut seen, mut last) = (false, 0, 0);
        let shared = turn.shared;
        let dirty = shared
            .membership
            .marks()
            .iter_from(Bitmap::Dirty, self.from);
        for extent in dirty.take(EXTENTS_AT_ONCE) {
            (seen, last) = (seen + 1, extent);
            if shared.try_clean(extent, turn.now, self.idle_ns) {
                cleaned = true;
            } else {
                self.flush_wanted |= self.lacks_flush(shared, extent, turn.now);
            }
        }
        if cleaned {
            turn.actions.push(KeeperAction::Record);
        }
        if seen == EXTENTS_AT_ONCE {
            self.from = last + 1;
            self.next_at = turn.now.after(PAUSE);
            return begins;
        }
        self.from = 0;
        self.next_at = turn.now.after(self.interval);
        self.flush(turn, jobs);
        begins
    }

    /// Whether nothing but a flush keeps `extent` from being clean, and has for long.
    fn lacks_flush(&self, shared: &Shared, extent: u64, now: Time) -> bool {
        let stamp = shared.activity.last(extent);
        let current = shared.membership.current(extent);
        let mut each = current.iter();
        u128::from(stamp.age_ns(now)) >= self.flush_interval.as_nanos()
            && current.count() >= shared.policy.threshold
            && !shared
                .unresolved
                .touches(shared.geometry.extent_range(extent))
            && each.any(|replica| !shared.activity.is_flushed(replica, stamp))
    }

    fn flush(&mut self, turn: &mut Turn<'_>, jobs: &mut Jobs) {
        let lately = |at| turn.now.since(at) < self.flush_interval;
        if !self.flush_wanted
            || self.flushed_at.is_some_and(lately)
            || jobs.iter().any(|job| job == Job::Flush)
            || !jobs.has_room()
        {
            return;
        }
        self.flushed_at = Some(turn.now);
        jobs.start(turn, Job::Flush, Request::Flush);
    }
}
