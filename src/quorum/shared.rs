// SPDX-License-Identifier: Apache-2.0
//! What the lanes of one disk agree on: membership, order, unresolved sectors, flush runs.

use super::activity::Activity;
use super::event::LaneId;
use super::flush_gate::FlushGate;
use super::marks::{Bitmap, Marks};
use super::membership::Membership;
use super::order::Order;
use super::policy::{Geometry, Policy, PolicyError};
use super::sync::{AtomicU32, AtomicU64, Ordering};
use super::unresolved::Unresolved;
use crate::units::{ReplicaSet, Time};

/// How sectors in U that no version has T votes for are decided (rules S4, Y3).
///
/// ```text
/// MajorityOnly --cold, and remembered------------> Choose (Error, if that is the policy)
///      |
///      +--------warm, and requests repeated------> Error (Choose, after an earlier cold start)
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CrashTie {
    /// Not yet: it is not known whether the start is warm or cold, or it is warm and requests of
    /// before the end are still being repeated. Reads of the guest that need a decision wait.
    MajorityOnly,
    /// The largest group, ties to the first replica that is not suspect: every version is legal.
    Choose,
    /// Not at all: all legal differences were removed by repeating requests, or the operator wants
    /// no choice made.
    Error,
}

/// Stands for requests to be repeated that no queue has told of yet: more than any front-end can
/// have in flight.
const REPEATS_UNKNOWN: u64 = 1 << 62;

/// Shared by all lanes of a disk; small, and cheap to read.
pub struct Shared {
    /// The shape of the disk.
    pub geometry: Geometry,
    /// How it decides.
    pub policy: Policy,
    /// Who is current where.
    pub membership: Membership,
    /// Range locks.
    pub order: Order,
    /// The set U.
    pub unresolved: Unresolved,
    /// Flush runs.
    pub flushes: FlushGate,
    /// When extents were written to, and flushed.
    pub activity: Activity,
    /// Replicas that are doubted: they vote but never decide a tie (CONSISTENCY section 10).
    suspects: AtomicU32,
    crash_tie: AtomicU32,
    /// Requests of before the last end that are not repeated yet, and [`REPEATS_UNKNOWN`] while
    /// there may be more than have been counted.
    repeats_left: AtomicU64,
    /// The last crash before which U was empty was cold, and that is remembered.
    was_cold: AtomicU32,
    /// The state record cannot be written any more.
    record_lost: AtomicU32,
    /// Lanes with requests that wait for marks to become durable, a bit each.
    waiting: AtomicU64,
    /// A rule that this build breaks on purpose, so that a test can show that it is noticed.
    #[cfg(test)]
    pub mutation: Option<super::mutation::Mutation>,
}

impl Shared {
    /// The shared part of a disk without a state record, with every replica current everywhere.
    ///
    /// # Errors
    /// If the policy contradicts itself.
    pub fn new(geometry: Geometry, policy: Policy) -> Result<Self, PolicyError> {
        let marks = Marks::new(policy.replicas, geometry.extents(), false);
        Self::with_marks(geometry, policy, marks)
    }

    /// The shared part of a disk with what its record holds. All replicas are up.
    ///
    /// # Errors
    /// If the policy contradicts itself.
    pub fn with_marks(
        geometry: Geometry,
        policy: Policy,
        marks: Marks,
    ) -> Result<Self, PolicyError> {
        policy.validate()?;
        let (replicas, extents) = (policy.replicas, geometry.extents());
        assert_eq!(marks.extents(), extents, "the marks of this disk");
        let shared = Self {
            membership: Membership::new(replicas, policy.threshold, marks),
            order: Order::new(geometry.extent_shift()),
            unresolved: Unresolved::new(extents, geometry.extent_shift()),
            flushes: FlushGate::default(),
            activity: Activity::new(replicas, extents),
            suspects: AtomicU32::new(0),
            crash_tie: AtomicU32::new(0),
            repeats_left: AtomicU64::new(REPEATS_UNKNOWN),
            was_cold: AtomicU32::new(0),
            record_lost: AtomicU32::new(0),
            waiting: AtomicU64::new(0),
            geometry,
            policy,
            #[cfg(test)]
            mutation: None,
        };
        shared.begin_cold();
        Ok(shared)
    }

    /// After an unclean end: everything dirty is unresolved (rule S4).
    pub fn resolve_dirty(&self) {
        for extent in self.membership.marks().iter(Bitmap::Dirty) {
            self.unresolved.insert_extent(extent);
        }
    }

    /// After an unclean end, before anything is served: nothing is chosen until the front-end has
    /// shown whether the start is warm or cold (rule S4). `was_cold`: the record says that U holds
    /// sectors of a cold start of before, so that there may be differences that no repetition
    /// removes.
    pub fn await_front_end(&self, was_cold: bool) {
        self.was_cold.store(u32::from(was_cold), Ordering::Release);
        self.decide_crash_ties(CrashTie::MajorityOnly);
    }

    /// The start is cold, and the record says so: every version of a sector in U is legal. Owed
    /// then is [`Wakeup::TiesDecided`](super::Wakeup::TiesDecided) to every lane.
    pub fn begin_cold(&self) {
        self.decide_crash_ties(self.tie_when_cold());
    }

    /// A queue has begun with this many requests that were in flight when the last daemon ended,
    /// and that are repeated before anything new is fetched from it (rule Q2). To be called before
    /// the first of them is begun. [`Shared::end_repeat`] is owed for each.
    pub fn expect_repeats(&self, requests: u64) {
        self.repeats_left.fetch_add(requests, Ordering::AcqRel);
    }

    /// A request that was expected is published, or makes no difference to any sector. Returns
    /// whether ties are decided by that; [`Wakeup::TiesDecided`](super::Wakeup::TiesDecided) is owed
    /// then to every lane.
    #[must_use]
    pub fn end_repeat(&self) -> bool {
        let before = self.repeats_left.fetch_sub(1, Ordering::AcqRel);
        before == 1 && self.end_repeats()
    }

    /// The start is warm, and every queue that has requests to repeat has said so. Once these are
    /// repeated, nothing is left in U that may legally differ, and a tie is an error (rule Y3).
    /// Returns what [`Shared::end_repeat`] does.
    #[must_use]
    pub fn begin_warm(&self) -> bool {
        let known = self
            .repeats_left
            .fetch_sub(REPEATS_UNKNOWN, Ordering::AcqRel);
        known == REPEATS_UNKNOWN && self.end_repeats()
    }

    /// No request is repeated any more that could remove a difference, or it is not waited for any
    /// longer. Returns whether ties are decided by that.
    pub fn end_repeats(&self) -> bool {
        if self.crash_tie() != CrashTie::MajorityOnly {
            return false;
        }
        self.decide_crash_ties(match self.was_cold.load(Ordering::Acquire) {
            0 => CrashTie::Error,
            _ => self.tie_when_cold(),
        });
        true
    }

    fn tie_when_cold(&self) -> CrashTie {
        if self.policy.crash_tie_error {
            CrashTie::Error
        } else {
            CrashTie::Choose
        }
    }

    /// From now on ties among sectors in U are decided like this.
    pub fn decide_crash_ties(&self, tie: CrashTie) {
        let number = match tie {
            CrashTie::MajorityOnly => 0,
            CrashTie::Choose => 1,
            CrashTie::Error => 2,
        };
        self.crash_tie.store(number, Ordering::Release);
    }

    /// How ties among sectors in U are decided.
    #[must_use]
    pub fn crash_tie(&self) -> CrashTie {
        match self.crash_tie.load(Ordering::Acquire) {
            0 => CrashTie::MajorityOnly,
            1 => CrashTie::Choose,
            _ => CrashTie::Error,
        }
    }

    /// Replicas that never decide a tie.
    #[must_use]
    pub fn suspects(&self) -> ReplicaSet {
        let bits = self.suspects.load(Ordering::Acquire);
        ReplicaSet::from_bits(u16::try_from(bits).expect("16 replicas at most"))
    }

    /// These replicas never decide a tie from now on.
    pub fn set_suspects(&self, suspects: ReplicaSet) {
        self.suspects
            .store(u32::from(suspects.bits()), Ordering::Release);
    }

    /// No mark becomes durable until [`Shared::regain_record`] (rule R1). Every lane is owed a
    /// wakeup.
    pub fn lose_record(&self) {
        self.record_lost.store(1, Ordering::Release);
    }

    /// Marks become durable again: enough copies of the record are back.
    pub fn regain_record(&self) {
        self.record_lost.store(0, Ordering::Release);
    }

    /// Whether marks cannot become durable at the moment.
    #[must_use]
    pub fn is_record_lost(&self) -> bool {
        self.record_lost.load(Ordering::Acquire) != 0
    }

    /// A request of `lane` waits for a mark. To be called before the last look at whether it is
    /// durable already.
    pub(super) fn wait_for_record(&self, lane: LaneId) {
        self.waiting.fetch_or(1 << lane.0, Ordering::SeqCst);
    }

    /// Lanes that are owed [`Wakeup::Durable`](super::Wakeup::Durable), now that more marks are
    /// durable, or lost.
    pub fn take_waiting(&self) -> impl Iterator<Item = LaneId> + use<> {
        let mut lanes = self.waiting.swap(0, Ordering::SeqCst);
        std::iter::from_fn(move || {
            if lanes == 0 {
                return None;
            }
            let lane = lanes.trailing_zeros();
            lanes &= lanes - 1;
            Some(LaneId(u8::try_from(lane).expect("below 64")))
        })
    }

    /// The first extent of which a flush of the replicas in `done` leaves fewer than T durable copies
    /// of what was written there since the last flush that was told to have succeeded (invariant I5).
    #[must_use]
    pub fn lacking_flush(&self, done: ReplicaSet) -> Option<u64> {
        let activity = &self.activity;
        let counts = |extent| !activity.is_covered(activity.last(extent));
        self.membership.first_lacking(done, counts)
    }

    /// Marks the extent clean if rule W8 allows it: it was not written to since `idle_ns`, nobody
    /// holds or waits for a lock in it, it is resolved, enough copies are current, each of them has
    /// been flushed since, and everybody else is behind for good. Returns whether it is clean now.
    pub fn try_clean(&self, extent: u64, now: Time, idle_ns: u64) -> bool {
        let marks = self.membership.marks();
        let stamp = self.activity.last(extent);
        let range = self.geometry.extent_range(extent);
        if stamp.age_ns(now) < idle_ns {
            return false;
        }
        let broken = super::mutation::broken!(self, CleanBeforeFlush);
        let clean = self.order.if_quiet(range, || {
            let current = self.membership.current(extent);
            let others = self.membership.replicas().minus(current);
            let behind = |replica| marks.is_durable(Bitmap::Behind(replica), extent);
            let flushed = |replica| self.activity.is_flushed(replica, stamp);
            let clean = current.count() >= self.policy.threshold
                && self.activity.last(extent) == stamp
                && !self.unresolved.touches(range)
                && others.iter().all(behind)
                && current
                    .intersection(self.membership.unflushable())
                    .is_empty()
                && current.iter().all(flushed);
            if clean || broken {
                marks.clear(Bitmap::Dirty, extent);
            }
            clean || broken
        });
        clean.unwrap_or(false)
    }
}
