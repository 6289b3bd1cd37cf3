// SPDX-License-Identifier: Apache-2.0
//! Resolve and resync (rules Y1, Y5, Y7): which extent is reconciled next, and when.
//!
//! First extents with unresolved sectors, then those in which a replica lacks something that is up
//! and not lagging; each in the order of the disk. Extents that requests of the guest wait for are
//! reconciled by the lanes of these requests (rule V6). What cannot be reconciled now is passed
//! over until a common moment of retry, so that it costs the others nothing, and two bits of
//! memory.

use super::super::event::{Request, Status};
use super::super::marks::Bitmap;
use super::super::shared::{CrashTie, Shared};
use super::KeeperConfig;
use super::jobs::{Job, Jobs, Turn};
use super::rate::{Backoff, Bucket};
use crate::units::{ReplicaSet, SectorRange, Time};

/// Extents reconciled at a time: enough to keep replicas busy, few enough that a request of the
/// guest seldom finds its extent locked.
const WINDOW: usize = 4;

/// A bit an extent, made when the first one is set.
#[derive(Default)]
struct Bits(Vec<u64>);

impl Bits {
    fn contains(&self, extent: u64) -> bool {
        let (word, bit) = place(extent);
        self.0.get(word).is_some_and(|bits| bits & bit != 0)
    }

    fn insert(&mut self, extent: u64, extents: u64) {
        if self.0.is_empty() {
            self.0 = vec![0; place(extents).0 + 1];
        }
        let (word, bit) = place(extent);
        self.0[word] |= bit;
    }
}

/// Extents that could not be reconciled, until all of them are tried again.
struct Failures {
    failed: Bits,
    /// Those of the time before, which were given another chance since.
    again: Bits,
    retry_at: Option<Time>,
    cleared_at: Time,
    backoff: Backoff,
}

fn place(extent: u64) -> (usize, u64) {
    let word = usize::try_from(extent / 64).expect("at most 2^20 extents");
    (word, 1 << (extent % 64))
}

impl Failures {
    fn new(config: &KeeperConfig) -> Self {
        Self {
            failed: Bits::default(),
            again: Bits::default(),
            retry_at: None,
            cleared_at: Time::default(),
            backoff: Backoff::new(config.reopen_delay_min, config.reopen_delay_max),
        }
    }

    fn insert(&mut self, now: Time, extent: u64, extents: u64) {
        self.failed.insert(extent, extents);
        if self.retry_at.is_none() {
            // A first failure, long after the last one, is not a repetition.
            if now.since(self.cleared_at) > self.backoff.most() {
                self.backoff.reset();
            }
            self.retry_at = Some(now.after(self.backoff.take()));
        }
    }

    /// An extent is in order. If it was not when it was tried before, trying is worth while, and
    /// the others are not kept waiting for long.
    fn succeeded(&mut self, now: Time, extent: u64) {
        if self.again.contains(extent) {
            self.backoff.reset();
            if let Some(retry_at) = &mut self.retry_at {
                *retry_at = (*retry_at).min(now.after(self.backoff.take()));
            }
        }
    }

    /// Everything may be tried again.
    fn clear(&mut self, now: Time) {
        self.again = std::mem::take(&mut self.failed);
        self.retry_at = None;
        self.cleared_at = now;
    }
}

/// Where a candidate was found.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Source {
    Unresolved,
    Behind,
}

/// See the module.
pub(super) struct Pump {
    rate: Bucket,
    unresolved_from: u64,
    behind_from: u64,
    failures: Failures,
    seen_tie: Option<CrashTie>,
    /// Whether there may be something to do that was not seen yet.
    look: bool,
    /// When the rate allows more.
    resume_at: Option<Time>,
}

impl Pump {
    pub(super) fn new(config: &KeeperConfig) -> Self {
        Self {
            rate: Bucket::new(config.resync_bytes_per_s),
            unresolved_from: 0,
            behind_from: 0,
            failures: Failures::new(config),
            seen_tie: None,
            look: true,
            resume_at: None,
        }
    }

    /// There may be more to do.
    pub(super) fn look(&mut self) {
        self.look = true;
    }

    /// What failed may not fail any more: the members have changed.
    pub(super) fn forgive(&mut self, now: Time) {
        self.failures.clear(now);
        self.failures.backoff.reset();
        self.look = true;
    }

    /// Whether everything that can be done is done, so that lesser work may be.
    pub(super) fn is_idle(&self) -> bool {
        !self.look && self.resume_at.is_none()
    }

    pub(super) fn deadline(&self) -> Option<Time> {
        let times = [self.resume_at, self.failures.retry_at];
        times.into_iter().flatten().min()
    }

    /// A reconciliation has ended. `returning`: who was behind before.
    pub(super) fn reconciled(
        &mut self,
        turn: &Turn<'_>,
        extent: u64,
        returning: ReplicaSet,
        status: Status,
    ) {
        let shared = turn.shared;
        let mut targets = helpable(shared).intersection(returning).iter();
        let left = shared.unresolved.holds_extent(extent)
            || targets.any(|replica| shared.membership.is_behind(extent, replica));
        self.ended(turn, extent, status, left);
    }

    /// Unresolved sectors were settled.
    pub(super) fn resolved(&mut self, turn: &Turn<'_>, range: SectorRange, status: Status) {
        let left = turn.shared.unresolved.touches(range);
        let extent = turn.shared.geometry.extent_of(range.start());
        self.ended(turn, extent, status, left);
    }

    fn ended(&mut self, turn: &Turn<'_>, extent: u64, status: Status, left: bool) {
        self.look = true;
        // Good but not done is as little use: it must not be repeated without end.
        if status == Status::IoError || left {
            let extents = turn.shared.geometry.extents();
            self.failures.insert(turn.now, extent, extents);
        } else {
            self.failures.succeeded(turn.now, extent);
        }
    }

    /// Starts what may be started. `idle_at`: when the guest counts as idle, if it does not yet.
    pub(super) fn advance(&mut self, turn: &mut Turn<'_>, jobs: &mut Jobs, idle_at: Option<Time>) {
        let tie = turn.shared.crash_tie();
        if self.seen_tie != Some(tie) {
            self.seen_tie = Some(tie);
            self.forgive(turn.now);
        }
        if self.failures.retry_at.is_some_and(|at| at <= turn.now) {
            self.failures.clear(turn.now);
            self.look = true;
        }
        if self.resume_at.is_some_and(|at| at <= turn.now) {
            self.look = true;
        }
        if !self.look {
            return;
        }
        self.resume_at = None;
        let helpable = helpable(turn.shared);
        loop {
            let busy = |job: &Job| matches!(job, Job::Reconcile { .. } | Job::Resolve { .. });
            if jobs.iter().filter(busy).count() >= WINDOW || !jobs.has_room() {
                // A reply makes room, and looks again.
                return;
            }
            let Some((extent, source)) = self.candidate(turn.shared, jobs, helpable) else {
                self.look = false;
                return;
            };
            if let Some(idle_at) = idle_at {
                if let Some(opens_at) = self.rate.opens_at(turn.now) {
                    self.resume_at = Some(opens_at.min(idle_at));
                    self.look = false;
                    return;
                }
                let range = turn.shared.geometry.extent_range(extent);
                self.rate.charge(turn.now, range.len_bytes() as u64);
            }
            match source {
                Source::Unresolved => self.unresolved_from = extent + 1,
                Source::Behind => self.behind_from = extent + 1,
            }
            let (job, request) = work_on(turn.shared, extent);
            jobs.start(turn, job, request);
        }
    }

    /// The next extent to reconcile.
    fn candidate(
        &self,
        shared: &Shared,
        jobs: &Jobs,
        helpable: ReplicaSet,
    ) -> Option<(u64, Source)> {
        let busy = |extent: u64| {
            jobs.iter().any(|job| match job {
                Job::Reconcile { extent: other, .. } => other == extent,
                Job::Resolve { range } => shared.geometry.extent_of(range.start()) == extent,
                Job::Check { .. } | Job::Probe { .. } | Job::Flush => false,
            })
        };
        let free = |extent: u64| !self.failures.failed.contains(extent) && !busy(extent);
        let unresolved = |first: u64| {
            std::iter::successors(shared.unresolved.next(first), |&extent| {
                shared.unresolved.next(extent + 1)
            })
        };
        if let Some(extent) = around(self.unresolved_from, unresolved, free) {
            return Some((extent, Source::Unresolved));
        }
        let marks = shared.membership.marks();
        let replicas = helpable.iter();
        let found = replicas.filter_map(|replica| {
            let behind = |first: u64| marks.iter_from(Bitmap::Behind(replica), first);
            around(self.behind_from, behind, free)
        });
        // The one that comes first going up from where the last one was.
        let from = self.behind_from;
        let extent = found.min_by_key(|&extent| (extent < from, extent))?;
        Some((extent, Source::Behind))
    }
}

/// The first that is `free` of those that `listed` gives from `from` on, then from the beginning.
fn around<I: Iterator<Item = u64>>(
    from: u64,
    listed: impl Fn(u64) -> I,
    free: impl Fn(u64) -> bool,
) -> Option<u64> {
    let after = listed(from).find(|&extent| free(extent));
    after.or_else(|| {
        let mut before = listed(0).take_while(|&extent| extent < from);
        before.find(|&extent| free(extent))
    })
}

/// Replicas that a resync can bring up to date: they are up, and answer in time.
fn helpable(shared: &Shared) -> ReplicaSet {
    let membership = &shared.membership;
    let up = membership.up().minus(membership.lagging());
    let behind = up.iter().filter(|&r| membership.behind_extents(r) > 0);
    behind.collect()
}

/// How `extent` is brought closer to order. Sectors of a write that failed are settled when they
/// are read, by whomever (rule W7); whole extents are reconciled.
fn work_on(shared: &Shared, extent: u64) -> (Job, Request) {
    let returning = shared.membership.returning(extent);
    // A check needs T current copies; without them the whole extent is in want of order.
    let enough = shared.membership.current(extent).count() >= shared.policy.threshold;
    if enough
        && !shared.unresolved.holds_extent(extent)
        && let Some(part) = shared.unresolved.part_of(extent)
    {
        let range = shared.geometry.first_piece(part);
        let repair = true;
        return (Job::Resolve { range }, Request::Check { range, repair });
    }
    (
        Job::Reconcile { extent, returning },
        Request::Reconcile { extent },
    )
}
