// SPDX-License-Identifier: Apache-2.0
//! Order among overlapping requests of all lanes: range locks (rules L1-L5).
//!
//! Requests lie in one extent, and an extent belongs to one shard, so a request takes exactly one
//! short mutex. A shard keeps its locks in the order of arrival; a lock is granted once nothing
//! that arrived before it conflicts with it, so a waiting exclusive lock bars those behind it.
//! A lane that must wait is woken by the lane that releases.
//!
//! Two modes exist because of publication in ring order (rule Q3). A write that is complete but
//! waits for an earlier request of its queue to be published keeps later *writes* out (rule L3).
//! The earlier request may be a read that has to be settled in the very same sectors: it would
//! wait for the write and the write for it. So the write is [deferred](Order::defer), and a
//! settlement, which never changes what the sectors mean, passes deferred writes and everybody
//! who waits for them.
//!
//! A request of the guest may have several parts, each with a lock of its own, and is published
//! when all are complete. Were the parts queued for one by one, two lanes could each get a part
//! that the other waits for, directly or by way of small requests between them. So the lane
//! [announces](Order::announce) all of them in one step, and each part takes the place in the
//! order that was announced.

use super::event::{LaneId, LockTicket};
use super::sync::{AtomicU64, Mutex, Ordering, fence};
use crate::units::SectorRange;

/// Shards; a power of two. Enough that a few workers seldom meet in one.
const SHARDS: usize = 128;

/// How a range is held.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LockMode {
    /// Beside other shared holders.
    Shared,
    /// Alone: a guest's write.
    Exclusive,
    /// Alone but for deferred writes, and before all that wait: a settlement.
    Settle,
    /// What an exclusive lock becomes when its write is complete and not yet published.
    Deferred,
}

impl LockMode {
    fn excludes(self, other: Self) -> bool {
        match (self, other) {
            (Self::Shared, Self::Shared | Self::Deferred)
            | (Self::Deferred, Self::Shared | Self::Settle | Self::Deferred)
            | (Self::Settle, Self::Deferred) => false,
            (Self::Shared, Self::Exclusive | Self::Settle)
            | (Self::Deferred, Self::Exclusive)
            | (Self::Settle, Self::Shared | Self::Exclusive | Self::Settle)
            | (Self::Exclusive, _) => true,
        }
    }

    /// Whether ballots that others read meanwhile may differ although every replica is right. A
    /// settlement is no excuse: it makes copies equal that were not.
    fn disturbs(self) -> bool {
        self == Self::Exclusive
    }
}

#[derive(Clone, Copy, Debug)]
struct Lock {
    range: SectorRange,
    mode: LockMode,
    granted: bool,
    /// Keeps the place of locks to come; never granted.
    announced: bool,
    /// Keeps its place, but is not granted before it is resumed.
    suspended: bool,
    lane: LaneId,
    ticket: LockTicket,
}

/// The ticket of what is only announced. Slots of lanes pack into fewer bits.
const NO_TICKET: LockTicket = LockTicket(u64::MAX);

impl Lock {
    fn conflicts(&self, range: SectorRange, mode: LockMode) -> bool {
        self.mode.excludes(mode) && self.range.overlaps(range)
    }

    fn is_settle(&self) -> bool {
        self.mode == LockMode::Settle
    }

    /// Whether this lock has to wait for `other`, which arrived `before` it or after it.
    /// Settlements wait for holders only; everybody else also for those who came before and for
    /// settlements. What is only announced keeps no reads out: they may have buffers that the
    /// request which announced it waits for.
    fn is_barred_by(&self, other: &Self, before: bool) -> bool {
        if other.announced && self.mode != LockMode::Exclusive {
            return false;
        }
        let counts = other.granted || !self.is_settle() && (before || other.is_settle());
        counts && other.ticket_of() != self.ticket_of() && other.conflicts(self.range, self.mode)
    }

    fn ticket_of(&self) -> (LaneId, LockTicket) {
        (self.lane, self.ticket)
    }
}

/// A cache line pair of its own, so that lanes at work in different shards do not slow each other.
#[repr(align(128))]
struct Shard {
    /// Exclusive locks ever granted here. Raised before anything is written under the lock.
    exclusive_granted: AtomicU64,
    /// Exclusive locks ever released here.
    exclusive_released: AtomicU64,
    locks: Mutex<Vec<Lock>>,
}

impl Shard {
    /// Grants what overlaps `range` and nothing bars any more; settlements first.
    fn grant(&self, locks: &mut [Lock], range: SectorRange, woken: &mut Vec<(LaneId, LockTicket)>) {
        for settling in [true, false] {
            for index in 0..locks.len() {
                let waiter = locks[index];
                if waiter.granted
                    || waiter.announced
                    || waiter.suspended
                    || waiter.is_settle() != settling
                    || !waiter.range.overlaps(range)
                    || locks
                        .iter()
                        .enumerate()
                        .any(|(at, lock)| waiter.is_barred_by(lock, at < index))
                {
                    continue;
                }
                locks[index].granted = true;
                if waiter.mode.disturbs() {
                    self.exclusive_granted.fetch_add(1, Ordering::AcqRel);
                }
                woken.push((waiter.lane, waiter.ticket));
            }
        }
    }
}

fn position(locks: &[Lock], lane: LaneId, ticket: LockTicket) -> usize {
    locks
        .iter()
        .position(|lock| lock.lane == lane && lock.ticket == ticket)
        .expect("who holds a lock is in its shard")
}

/// What a read without a lock remembers of its beginning (rule V7).
#[derive(Clone, Copy, Debug)]
pub struct ReadStamp {
    granted: u64,
    quiet: bool,
}

/// The range locks of a disk, shared by its lanes.
pub struct Order {
    shards: Box<[Shard]>,
    extent_shift: u32,
}

impl Order {
    /// Locks for a disk whose extents have `2^extent_shift` sectors.
    #[must_use]
    pub fn new(extent_shift: u32) -> Self {
        let shards = (0..SHARDS)
            .map(|_| Shard {
                exclusive_granted: AtomicU64::new(0),
                exclusive_released: AtomicU64::new(0),
                // More locks at once than this in one shard are exceptional; the vector grows then.
                locks: Mutex::new(Vec::with_capacity(64)),
            })
            .collect();
        Self {
            shards,
            extent_shift,
        }
    }

    fn shard(&self, range: SectorRange) -> &Shard {
        let extent = range.start() >> self.extent_shift;
        debug_assert_eq!(
            extent,
            (range.end() - 1) >> self.extent_shift,
            "one extent, one shard"
        );
        // Neighbouring extents land in neighbouring shards; that spreads sequential work too.
        let shard = usize::try_from(extent % SHARDS as u64).expect("below SHARDS");
        &self.shards[shard]
    }

    /// Queues for `range`. Returns whether the lock is held now; otherwise some later
    /// [`Order::release`] returns the ticket.
    pub fn acquire(
        &self,
        range: SectorRange,
        mode: LockMode,
        lane: LaneId,
        ticket: LockTicket,
    ) -> bool {
        let shard = self.shard(range);
        let mut locks = shard.locks.lock().expect("no panic under this lock");
        let mut lock = Lock {
            range,
            mode,
            granted: false,
            announced: false,
            suspended: false,
            lane,
            ticket,
        };
        let announced = |other: &Lock| {
            other.announced
                && mode == LockMode::Exclusive
                && other.lane == lane
                && other.range.overlaps(range)
        };
        let place = locks.iter().position(announced).unwrap_or(locks.len());
        lock.granted = !locks
            .iter()
            .enumerate()
            .any(|(at, other)| lock.is_barred_by(other, at < place));
        if lock.granted && mode.disturbs() {
            shard.exclusive_granted.fetch_add(1, Ordering::AcqRel);
        }
        locks.insert(place, lock);
        lock.granted
    }

    /// Queues for all of `ranges` in one step as far as other lanes can see. Exclusive locks that
    /// `lane` then acquires in them take the place in the order that they have now. One request
    /// of a lane at a time; ends with [`Order::withdraw`].
    pub fn announce(&self, ranges: &[SectorRange], lane: LaneId) {
        // Always in the order of the shards, so that two announcements cannot wait for each other.
        let mut shards: Vec<_> = (self.shards_of(ranges))
            .map(|shard| shard.locks.lock().expect("no panic under this lock"))
            .collect();
        for locks in &mut shards {
            locks.extend(ranges.iter().map(|&range| Lock {
                range,
                mode: LockMode::Exclusive,
                granted: false,
                announced: true,
                suspended: false,
                lane,
                ticket: NO_TICKET,
            }));
        }
    }

    /// All locks in the `ranges` that `lane` announced are queued for, or never will be.
    pub fn withdraw(
        &self,
        ranges: &[SectorRange],
        lane: LaneId,
        woken: &mut Vec<(LaneId, LockTicket)>,
    ) {
        for shard in self.shards_of(ranges) {
            let mut locks = shard.locks.lock().expect("no panic under this lock");
            locks.retain(|lock| !lock.announced || lock.lane != lane);
            for &range in ranges {
                shard.grant(&mut locks, range, woken);
            }
        }
    }

    /// The shards that hold extents of `ranges`, each once, in order.
    fn shards_of(&self, ranges: &[SectorRange]) -> impl Iterator<Item = &Shard> {
        let mut touched = [false; SHARDS];
        for range in ranges {
            let first = range.start() >> self.extent_shift;
            let last = (range.end() - 1) >> self.extent_shift;
            for extent in (first..=last).take(SHARDS) {
                let shard = usize::try_from(extent % SHARDS as u64).expect("below SHARDS");
                touched[shard] = true;
            }
        }
        let shards = self.shards.iter().zip(touched);
        shards.filter_map(|(shard, touched)| touched.then_some(shard))
    }

    /// Makes one change to the lock of this name, which is at the index that `change` is given, and
    /// grants what that makes possible.
    fn change(
        &self,
        range: SectorRange,
        lane: LaneId,
        ticket: LockTicket,
        woken: &mut Vec<(LaneId, LockTicket)>,
        change: impl FnOnce(&Shard, &mut Vec<Lock>, usize),
    ) {
        let shard = self.shard(range);
        let mut locks = shard.locks.lock().expect("no panic under this lock");
        let index = position(&locks, lane, ticket);
        change(shard, &mut locks, index);
        shard.grant(&mut locks, range, woken);
    }

    /// The write under this exclusive lock is complete on all current copies but not yet
    /// published. Keeps other writes out until the release.
    pub fn defer(
        &self,
        range: SectorRange,
        lane: LaneId,
        ticket: LockTicket,
        woken: &mut Vec<(LaneId, LockTicket)>,
    ) {
        self.change(range, lane, ticket, woken, |shard, locks, index| {
            let held = &mut locks[index];
            assert!(
                held.granted && held.mode == LockMode::Exclusive,
                "once, by its holder"
            );
            held.mode = LockMode::Deferred;
            shard.exclusive_released.fetch_add(1, Ordering::AcqRel);
        });
    }

    /// The holder of this exclusive lock cannot go on before something else is done under a
    /// [settlement's](LockMode::Settle) lock in the same range, or before replicas come back: gives
    /// it back but keeps the place in the order, until [`Order::resume`]. What was written under it is
    /// in U.
    pub fn suspend(
        &self,
        range: SectorRange,
        lane: LaneId,
        ticket: LockTicket,
        woken: &mut Vec<(LaneId, LockTicket)>,
    ) {
        self.change(range, lane, ticket, woken, |shard, locks, index| {
            let held = &mut locks[index];
            assert!(
                held.granted && held.mode == LockMode::Exclusive,
                "by its holder"
            );
            held.granted = false;
            held.suspended = true;
            shard.exclusive_released.fetch_add(1, Ordering::AcqRel);
        });
    }

    /// The lock is wanted again. It is granted, now or later, like one that was queued for when it
    /// first was.
    pub fn resume(
        &self,
        range: SectorRange,
        lane: LaneId,
        ticket: LockTicket,
        woken: &mut Vec<(LaneId, LockTicket)>,
    ) {
        self.change(range, lane, ticket, woken, |_, locks, index| {
            assert!(locks[index].suspended, "after it was suspended");
            locks[index].suspended = false;
        });
    }

    /// The suspended lock is not wanted any more.
    pub fn abandon(
        &self,
        range: SectorRange,
        lane: LaneId,
        ticket: LockTicket,
        woken: &mut Vec<(LaneId, LockTicket)>,
    ) {
        self.change(range, lane, ticket, woken, |_, locks, index| {
            let gone = locks.remove(index);
            assert!(gone.suspended, "after it was suspended");
        });
    }

    /// Runs `act` if nobody holds or waits for any lock in `range`; nobody gets one meanwhile.
    /// `act` must not come back here, and must be short.
    pub fn if_quiet<R>(&self, range: SectorRange, act: impl FnOnce() -> R) -> Option<R> {
        let shard = self.shard(range);
        let locks = shard.locks.lock().expect("no panic under this lock");
        let quiet = !locks.iter().any(|lock| lock.range.overlaps(range));
        quiet.then(act)
    }

    /// Gives a granted lock back and appends those that are granted because of it.
    ///
    /// # Panics
    /// If the lock is not held: a broken invariant (I10).
    pub fn release(
        &self,
        range: SectorRange,
        lane: LaneId,
        ticket: LockTicket,
        woken: &mut Vec<(LaneId, LockTicket)>,
    ) {
        self.change(range, lane, ticket, woken, |shard, locks, index| {
            let gone = locks.remove(index);
            assert!(gone.granted, "a lock is released by its holder (I10)");
            assert_eq!(gone.range, range, "a lock is released as it was taken");
            if gone.mode.disturbs() {
                shard.exclusive_released.fetch_add(1, Ordering::AcqRel);
            }
        });
    }

    /// Taken before a read without a lock is submitted.
    #[must_use]
    pub fn read_stamp(&self, range: SectorRange) -> ReadStamp {
        let shard = self.shard(range);
        // Released first: if the two are equal, every lock granted so far was released before.
        let released = shard.exclusive_released.load(Ordering::Acquire);
        let granted = shard.exclusive_granted.load(Ordering::Acquire);
        ReadStamp {
            granted,
            quiet: released == granted,
        }
    }

    /// Whether no exclusive lock was held near `range` at any moment since `stamp` was taken. Only
    /// then does a difference among the ballots of such a read mean anything (rule V7).
    #[must_use]
    pub fn undisturbed(&self, range: SectorRange, stamp: ReadStamp) -> bool {
        fence(Ordering::SeqCst);
        stamp.quiet && self.shard(range).exclusive_granted.load(Ordering::Acquire) == stamp.granted
    }

    /// Number of locks held or waited for.
    #[must_use]
    pub fn len(&self) -> usize {
        self.shards
            .iter()
            .map(|s| s.locks.lock().expect("no panic under this lock").len())
            .sum()
    }

    /// Whether no lock is held or waited for.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, count: u32) -> SectorRange {
        SectorRange::new(start, count).unwrap()
    }

    fn ticket(n: u64) -> LockTicket {
        LockTicket(n)
    }

    const LANE: LaneId = LaneId(0);

    #[test]
    fn acquire_disjoint_ranges_are_granted() {
        let order = Order::new(11);
        assert!(order.acquire(range(0, 8), LockMode::Exclusive, LANE, ticket(1)));
        assert!(order.acquire(range(8, 8), LockMode::Exclusive, LANE, ticket(2)));
        assert!(!order.acquire(range(7, 2), LockMode::Shared, LANE, ticket(3)));
    }

    #[test]
    fn waiting_exclusive_bars_later_shared() {
        let order = Order::new(11);
        let mut woken = Vec::new();
        assert!(order.acquire(range(0, 8), LockMode::Shared, LANE, ticket(1)));
        assert!(!order.acquire(range(0, 8), LockMode::Exclusive, LANE, ticket(2)));
        assert!(!order.acquire(range(0, 8), LockMode::Shared, LANE, ticket(3)));
        order.release(range(0, 8), LANE, ticket(1), &mut woken);
        assert_eq!(woken, [(LANE, ticket(2))]);
        woken.clear();
        order.release(range(0, 8), LANE, ticket(2), &mut woken);
        assert_eq!(woken, [(LANE, ticket(3))]);
    }

    #[test]
    fn read_stamp_notices_a_write_before_during_and_after() {
        let order = Order::new(11);
        let mut woken = Vec::new();
        let r = range(0, 8);
        let before = order.read_stamp(r);
        assert!(order.undisturbed(r, before));
        assert!(order.acquire(r, LockMode::Exclusive, LANE, ticket(1)));
        assert!(!order.undisturbed(r, before));
        let during = order.read_stamp(r);
        order.release(r, LANE, ticket(1), &mut woken);
        assert!(!order.undisturbed(r, during));
        assert!(!order.undisturbed(r, before));
        let after = order.read_stamp(r);
        assert!(order.undisturbed(r, after));
    }

    #[test]
    fn settle_passes_a_deferred_write_and_who_waits_for_it() {
        let order = Order::new(11);
        let mut woken = Vec::new();
        let r = range(0, 8);
        assert!(order.acquire(r, LockMode::Exclusive, LANE, ticket(1)));
        assert!(!order.acquire(r, LockMode::Exclusive, LANE, ticket(2)));
        assert!(!order.acquire(r, LockMode::Settle, LANE, ticket(3)));
        order.defer(r, LANE, ticket(1), &mut woken);
        assert_eq!(woken, [(LANE, ticket(3))]);
        woken.clear();
        // The write that waits is kept out by both.
        order.release(r, LANE, ticket(1), &mut woken);
        assert!(woken.is_empty());
        order.release(r, LANE, ticket(3), &mut woken);
        assert_eq!(woken, [(LANE, ticket(2))]);
    }

    #[test]
    fn announced_parts_keep_their_place_among_other_lanes() {
        let order = Order::new(11);
        let mut woken = Vec::new();
        let (other, whole) = (LaneId(1), [range(0, 4096)]);
        let (first, second) = (range(0, 2048), range(2048, 2048));
        order.announce(&whole, LANE);
        assert!(order.acquire(first, LockMode::Exclusive, LANE, ticket(1)));
        // What is only announced keeps no reads out.
        assert!(order.acquire(second, LockMode::Shared, other, ticket(2)));
        order.release(second, other, ticket(2), &mut woken);
        // Behind the second part, which has not come yet.
        assert!(!order.acquire(second, LockMode::Exclusive, other, ticket(1)));
        assert!(woken.is_empty());
        assert!(order.acquire(second, LockMode::Exclusive, LANE, ticket(2)));
        order.withdraw(&whole, LANE, &mut woken);
        assert!(woken.is_empty());
        order.release(second, LANE, ticket(2), &mut woken);
        assert_eq!(woken, [(other, ticket(1))]);
    }

    #[test]
    fn withdrawing_parts_that_never_came_lets_others_in() {
        let order = Order::new(11);
        let mut woken = Vec::new();
        order.announce(&[range(0, 4096)], LANE);
        assert!(!order.acquire(range(8, 8), LockMode::Exclusive, LaneId(1), ticket(1)));
        order.withdraw(&[range(0, 4096)], LANE, &mut woken);
        assert_eq!(woken, [(LaneId(1), ticket(1))]);
    }

    proptest::proptest! {
        /// Against the obvious model: a list in arrival order, in which a lock is held when
        /// nothing before it conflicts.
        #[test]
        fn order_agrees_with_naive_model(
            steps in proptest::collection::vec((0u64..24, 1u32..8, 0u8..3, 0usize..64), 1..120)
        ) {
            let order = Order::new(11);
            let mut model: Vec<(SectorRange, LockMode, LockTicket)> = Vec::new();
            let held = |model: &[(SectorRange, LockMode, LockTicket)], at: usize| {
                !model[..at].iter().any(|(r, m, _)| {
                    r.overlaps(model[at].0)
                        && (*m == LockMode::Exclusive || model[at].1 == LockMode::Exclusive)
                })
            };
            for (n, (start, count, mode, pick)) in (0u64..).zip(steps) {
                let holders: Vec<usize> = (0..model.len()).filter(|&i| held(&model, i)).collect();
                if mode == 2 && !holders.is_empty() {
                    let at = holders[pick % holders.len()];
                    let waiting: Vec<LockTicket> = (0..model.len())
                        .filter(|&i| !held(&model, i)).map(|i| model[i].2).collect();
                    let (r, _, t) = model.remove(at);
                    let mut woken = Vec::new();
                    order.release(r, LANE, t, &mut woken);
                    let expected: Vec<(LaneId, LockTicket)> = (0..model.len())
                        .filter(|&i| held(&model, i) && waiting.contains(&model[i].2))
                        .map(|i| (LANE, model[i].2)).collect();
                    assert_eq!(woken, expected);
                } else {
                    let mode = if mode == 0 { LockMode::Shared } else { LockMode::Exclusive };
                    let r = range(start, count);
                    model.push((r, mode, ticket(n)));
                    let expected = held(&model, model.len() - 1);
                    assert_eq!(order.acquire(r, mode, LANE, ticket(n)), expected);
                }
            }
            assert_eq!(order.len(), model.len());
        }
    }
}
