// SPDX-License-Identifier: Apache-2.0
//! Resolve and resync (rules Y1, Y5, Y7): which extent is reconciled next, and when.
//!
//! First extents that requests of the guest wait for, then those with unresolved sectors, then
//! those in which a replica lacks something that is up and not lagging; each in the order of the
//! disk. What cannot be reconciled now is passed over until a common moment of retry, so that it
//! costs the others nothing, and one bit of memory.

use super::super::event::{Request, Status};
use super::super::marks::Bitmap;
use super::super::shared::{CrashTie, Shared};
use super::KeeperConfig;
use super::jobs::{Job, Jobs, Turn};
use super::rate::{Backoff, Bucket};
use crate::units::{ReplicaSet, Time};

/// Extents reconciled at a time: enough to keep replicas busy, few enough that a request of the
/// guest seldom finds its extent locked.
const WINDOW: usize = 4;

/// Extents that guests wait for and that are remembered. Those beyond are served in their turn.
const WANTED_MAX: usize = 64;

/// Extents that could not be reconciled, until all of them are tried again.
struct Failures {
    /// A bit an extent, made when the first one fails.
    bits: Vec<u64>,
    count: u64,
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
            bits: Vec::new(),
            count: 0,
            retry_at: None,
            cleared_at: Time::default(),
            backoff: Backoff::new(config.reopen_delay_min, config.reopen_delay_max),
        }
    }

    fn contains(&self, extent: u64) -> bool {
        let (word, bit) = place(extent);
        self.bits.get(word).is_some_and(|bits| bits & bit != 0)
    }

    fn insert(&mut self, now: Time, extent: u64, extents: u64) {
        let (word, bit) = place(extent);
        if self.bits.is_empty() {
            self.bits = vec![0; place(extents).0 + 1];
        }
        self.count += u64::from(self.bits[word] & bit == 0);
        self.bits[word] |= bit;
        if self.retry_at.is_none() {
            // A first failure, long after the last one, is not a repetition.
            if now.since(self.cleared_at) > self.backoff.most() {
                self.backoff.reset();
            }
            self.retry_at = Some(now.after(self.backoff.take()));
        }
    }

    /// Everything may be tried again.
    fn clear(&mut self, now: Time) {
        self.bits = Vec::new();
        self.count = 0;
        self.retry_at = None;
        self.cleared_at = now;
    }
}

/// Where a candidate was found.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Source {
    Wanted,
    Unresolved,
    Behind,
}

/// See the module.
pub(super) struct Pump {
    rate: Bucket,
    wanted: Vec<u64>,
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
            wanted: Vec::new(),
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

    /// A request of the guest waits for this extent (rule V6).
    pub(super) fn want(&mut self, extent: u64) {
        if !self.wanted.contains(&extent) && self.wanted.len() < WANTED_MAX {
            self.wanted.push(extent);
        }
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

    /// A reconciliation has ended.
    pub(super) fn replied(
        &mut self,
        turn: &Turn<'_>,
        extent: u64,
        returning: ReplicaSet,
        status: Status,
    ) {
        self.look = true;
        let shared = turn.shared;
        // Good but not done is as little use: it must not be repeated without end.
        let undone = || needs(shared, extent, helpable(shared).intersection(returning));
        if status == Status::IoError || undone() {
            self.failures
                .insert(turn.now, extent, shared.geometry.extents());
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
            let busy = |job: &Job| matches!(job, Job::Reconcile { .. });
            if jobs.iter().filter(busy).count() >= WINDOW || !jobs.has_room() {
                // A reply makes room, and looks again.
                return;
            }
            let Some((extent, source)) = self.candidate(turn.shared, jobs, helpable) else {
                self.look = false;
                return;
            };
            if let Some(idle_at) = idle_at
                && source != Source::Wanted
            {
                if let Some(opens_at) = self.rate.opens_at(turn.now) {
                    self.resume_at = Some(opens_at.min(idle_at));
                    self.look = false;
                    return;
                }
                let range = turn.shared.geometry.extent_range(extent);
                self.rate.charge(turn.now, range.len_bytes() as u64);
            }
            self.accept(extent, source);
            let returning = turn.shared.membership.returning(extent);
            let job = Job::Reconcile { extent, returning };
            jobs.start(turn, job, Request::Reconcile { extent });
        }
    }

    fn accept(&mut self, extent: u64, source: Source) {
        match source {
            Source::Wanted => self.wanted.retain(|&wanted| wanted != extent),
            Source::Unresolved => self.unresolved_from = extent + 1,
            Source::Behind => self.behind_from = extent + 1,
        }
    }

    /// The next extent to reconcile.
    fn candidate(
        &mut self,
        shared: &Shared,
        jobs: &Jobs,
        helpable: ReplicaSet,
    ) -> Option<(u64, Source)> {
        let busy = |extent: u64| {
            let same = |job| matches!(job, Job::Reconcile { extent: other, .. } if other == extent);
            jobs.iter().any(same)
        };
        self.wanted
            .retain(|&extent| needs(shared, extent, helpable));
        if let Some(&extent) = self.wanted.iter().find(|&&extent| !busy(extent)) {
            return Some((extent, Source::Wanted));
        }
        let free = |extent: u64| !self.failures.contains(extent) && !busy(extent);
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

/// Whether there is something to be done in `extent`.
fn needs(shared: &Shared, extent: u64, helpable: ReplicaSet) -> bool {
    let range = shared.geometry.extent_range(extent);
    let mut helpable = helpable.iter();
    shared.unresolved.touches(range)
        || helpable.any(|replica| shared.membership.is_behind(extent, replica))
}
