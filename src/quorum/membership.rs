// SPDX-License-Identifier: Apache-2.0
//! Which replicas are current where: who is up, who is behind in which extent, who is slow.
//!
//! Reading is a few loads; in the healthy case it is one. Decisions like "T copies hold it, so the
//! others may be left behind" are rare and go through one mutex, because the decision and the
//! marks that follow from it must be one step for all lanes (rules W4, W5).

use super::marks::{Bitmap, Marks};
use super::sync::{AtomicU32, AtomicU64, Mutex, Ordering};
use crate::units::{ReplicaId, ReplicaSet, Time};

/// A replica that is late this often in [`LATE_WINDOW_MS`] is lagging (rule W6).
const LATE_TIMES: u64 = 8;

/// See [`LATE_TIMES`].
const LATE_WINDOW_MS: u64 = 1000;

/// What has to happen before anything may be written in an extent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Intent {
    /// Nothing: D* is set, and B* for everybody who is not written to. These get the write.
    Ready(ReplicaSet),
    /// The marks up to this number become durable (rules W2, W4).
    Wait(u64),
    /// Fewer than T copies are current (rule W1).
    TooFew,
}

/// What becomes of a write that some copies hold.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Settled {
    /// Fewer than T current copies hold it: nothing was marked.
    TooFew,
    /// Everybody else is behind. It may be acknowledged once the marks up to `wait` are durable.
    Held {
        /// Who was not behind before.
        marked: ReplicaSet,
        /// `None`: now.
        wait: Option<u64>,
    },
}

/// A mark that something depends on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Marked {
    /// It was not set before.
    pub new: bool,
    /// It is durable once the marks up to this number are; `None`: now.
    pub wait: Option<u64>,
}

/// What became of marking a replica behind in all dirty extents.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MarkedWhereDirty {
    /// Extents in which it was not behind before.
    pub extents: u64,
    /// Whether it is behind in every dirty extent. It is not where it is the last copy.
    pub complete: bool,
    /// The marks are durable once those up to this number are; `None`: now.
    pub wait: Option<u64>,
}

/// The replicas of a disk and where each of them is current.
pub struct Membership {
    replicas: ReplicaSet,
    threshold: usize,
    /// D and B.
    marks: Marks,
    /// Open, fenced and answering.
    up: AtomicU32,
    /// Nobody waits for these (rule W6).
    lagging: AtomicU32,
    /// Replicas that are not up, lag, or are behind somewhere: spares a closer look in the healthy
    /// case.
    impaired: AtomicU32,
    /// What these read back may never reach their medium: a flush failed and they could not be
    /// opened anew since (rule F3).
    unflushable: AtomicU32,
    /// c(i): raised by every kick.
    counters: Box<[AtomicU32]>,
    /// Of each replica: when it was first late of late, in milliseconds, and how often since.
    late: Box<[(AtomicU64, AtomicU64)]>,
    /// Of each replica: extents that were brought up to date, and how often the last one, which
    /// may be shorter, was among them.
    caught_up: Box<[(AtomicU64, AtomicU64)]>,
    /// Operations on a replica in an extent that nobody waits for any more.
    strays: Mutex<Vec<(ReplicaId, u64)>>,
    /// Serialises "enough others?" with the marks that follow from it.
    marking: Mutex<()>,
}

fn bit(replica: ReplicaId) -> u32 {
    1 << replica.index()
}

fn set_of(bits: u32) -> ReplicaSet {
    ReplicaSet::from_bits(u16::try_from(bits).expect("16 replicas at most"))
}

impl Membership {
    /// `replicas` replicas, all up, and current as far as `marks` says.
    #[must_use]
    pub fn new(replicas: usize, threshold: usize, marks: Marks) -> Self {
        let all = ReplicaSet::first(replicas);
        let members = Self {
            replicas: all,
            threshold,
            marks,
            up: AtomicU32::new(u32::from(all.bits())),
            lagging: AtomicU32::new(0),
            impaired: AtomicU32::new(0),
            unflushable: AtomicU32::new(0),
            counters: (0..replicas).map(|_| AtomicU32::new(0)).collect(),
            late: (0..replicas)
                .map(|_| (AtomicU64::new(0), AtomicU64::new(0)))
                .collect(),
            caught_up: (0..replicas)
                .map(|_| (AtomicU64::new(0), AtomicU64::new(0)))
                .collect(),
            strays: Mutex::new(Vec::new()),
            marking: Mutex::new(()),
        };
        for replica in all.iter() {
            members.look_at(replica);
        }
        members
    }

    /// All configured replicas.
    #[must_use]
    pub fn replicas(&self) -> ReplicaSet {
        self.replicas
    }

    /// D and B.
    #[must_use]
    pub fn marks(&self) -> &Marks {
        &self.marks
    }

    /// Replicas that are open, fenced and answering.
    #[must_use]
    pub fn up(&self) -> ReplicaSet {
        set_of(self.up.load(Ordering::Acquire))
    }

    /// Replicas that nobody waits for (rule W6).
    #[must_use]
    pub fn lagging(&self) -> ReplicaSet {
        set_of(self.lagging.load(Ordering::Acquire))
    }

    /// Replicas whose flush failed since they were opened: what they read back proves nothing about
    /// their medium, so where they are behind they are rewritten without being compared.
    #[must_use]
    pub fn unflushable(&self) -> ReplicaSet {
        set_of(self.unflushable.load(Ordering::Acquire))
    }

    /// A flush of the replica failed, and too few others are up to do without it.
    pub fn note_unflushable(&self, replica: ReplicaId) {
        self.unflushable.fetch_or(bit(replica), Ordering::AcqRel);
        self.counters[replica.index()].fetch_add(1, Ordering::AcqRel);
    }

    /// c(i): a result that was begun under another value proves nothing about the replica.
    #[must_use]
    pub fn counter(&self, replica: ReplicaId) -> u32 {
        self.counters[replica.index()].load(Ordering::Acquire)
    }

    /// `Cur(extent)`: the replicas that vote and are a source there.
    #[must_use]
    pub fn current(&self, extent: u64) -> ReplicaSet {
        let impaired = self.impaired.load(Ordering::Acquire);
        if impaired == 0 {
            return self.replicas;
        }
        let mut current = self.up();
        for replica in set_of(impaired).iter() {
            if self.is_behind(extent, replica) {
                current.remove(replica);
            }
        }
        current
    }

    /// Replicas that are up and behind in `extent`: what a resync of it would bring back.
    #[must_use]
    pub fn returning(&self, extent: u64) -> ReplicaSet {
        if self.impaired.load(Ordering::Acquire) == 0 {
            return ReplicaSet::EMPTY;
        }
        let behind = |&replica: &ReplicaId| self.is_behind(extent, replica);
        self.up().iter().filter(behind).collect()
    }

    /// Whether D is set for the extent.
    #[must_use]
    pub fn is_dirty(&self, extent: u64) -> bool {
        self.marks.is_set(Bitmap::Dirty, extent)
    }

    /// Whether B is set for the replica in the extent.
    #[must_use]
    pub fn is_behind(&self, extent: u64, replica: ReplicaId) -> bool {
        self.marks.is_set(Bitmap::Behind(replica), extent)
    }

    /// Extents in which `replica` is behind.
    #[must_use]
    pub fn behind_extents(&self, replica: ReplicaId) -> u64 {
        self.marks.count(Bitmap::Behind(replica))
    }

    /// Before anything is written in `extent`: sets D, and B for everybody who will not get the
    /// write. Whoever lags is left behind in the same update of the record (rules W2, W6).
    pub fn intend(&self, extent: u64) -> Intent {
        let healthy = self.impaired.load(Ordering::Acquire) == 0;
        if healthy && self.marks.is_durable(Bitmap::Dirty, extent) {
            return Intent::Ready(self.replicas);
        }
        if self.marks.is_durable(Bitmap::Dirty, extent) {
            let targets = self.targets(extent);
            if targets.count() >= self.threshold && self.are_left_behind(extent, targets) {
                return Intent::Ready(targets);
            }
        }
        let _one_decision = self.marking.lock().expect("no panic under this lock");
        let targets = self.targets(extent);
        if targets.count() < self.threshold {
            return Intent::TooFew;
        }
        let dirty = self.marks.ask(Bitmap::Dirty, extent);
        let (_, behind) = self.mark(extent, self.replicas.minus(targets));
        match dirty.max(behind) {
            Some(number) => Intent::Wait(number),
            None => Intent::Ready(targets),
        }
    }

    /// Who gets a write: the current copies, without those that lag if there are enough others.
    fn targets(&self, extent: u64) -> ReplicaSet {
        let current = self.current(extent);
        let prompt = current.minus(self.lagging());
        if prompt.count() >= self.threshold {
            prompt
        } else {
            current
        }
    }

    /// Whether everybody outside `holders` has B*.
    fn are_left_behind(&self, extent: u64, holders: ReplicaSet) -> bool {
        let mut others = self.replicas.minus(holders).iter();
        others.all(|replica| self.marks.is_durable(Bitmap::Behind(replica), extent))
    }

    /// Before a copy is repaired or resynced in `extent`: sets D. `None`: D* is set (rule W2).
    pub fn intend_repair(&self, extent: u64) -> Option<u64> {
        self.marks.ask(Bitmap::Dirty, extent)
    }

    /// Marks every configured replica behind in `extent` that is not a current copy in `holders`,
    /// provided that at least T are (rules W4, W5).
    pub fn settle_for(&self, extent: u64, holders: ReplicaSet) -> Settled {
        // The usual case needs no lock: everybody holds it, and all are current.
        let healthy = self.impaired.load(Ordering::Acquire) == 0;
        if healthy && holders.contains_all(self.replicas) {
            return Settled::Held {
                marked: ReplicaSet::EMPTY,
                wait: None,
            };
        }
        let current = self.current(extent);
        if holders.contains_all(current)
            && current.count() >= self.threshold
            && self.are_left_behind(extent, current)
        {
            let marked = ReplicaSet::EMPTY;
            return Settled::Held { marked, wait: None };
        }
        let _one_decision = self.marking.lock().expect("no panic under this lock");
        let holders = holders.intersection(self.current(extent));
        if holders.count() < self.threshold {
            return Settled::TooFew;
        }
        let (marked, wait) = self.mark(extent, self.replicas.minus(holders));
        Settled::Held { marked, wait }
    }

    /// Marks `replica` behind in `extent` unless fewer than T current copies would remain. `None`:
    /// refused.
    pub fn mark_behind(&self, extent: u64, replica: ReplicaId) -> Option<Marked> {
        let _one_decision = self.marking.lock().expect("no panic under this lock");
        let mut remaining = self.current(extent);
        remaining.remove(replica);
        if remaining.count() < self.threshold && !self.is_behind(extent, replica) {
            return None;
        }
        let (marked, wait) = self.mark(extent, std::iter::once(replica).collect());
        let new = !marked.is_empty();
        Some(Marked { new, wait })
    }

    /// The flush of `replica` failed or did not end, or it is not up: it is behind in every dirty
    /// extent, except where it is the last copy that is not (rules F2, F3).
    pub fn mark_behind_where_dirty(&self, replica: ReplicaId) -> MarkedWhereDirty {
        let _one_decision = self.marking.lock().expect("no panic under this lock");
        let mut result = MarkedWhereDirty {
            extents: 0,
            complete: true,
            wait: None,
        };
        if self.marks.is_covered(replica) {
            return result;
        }
        for extent in self.marks.iter(Bitmap::Dirty) {
            let behind = self.is_behind(extent, replica);
            if !behind && !self.others_remain(extent, replica) {
                result.complete = false;
                continue;
            }
            let (_, wait) = self.mark(extent, std::iter::once(replica).collect());
            result.wait = result.wait.max(wait);
            result.extents += u64::from(!behind);
        }
        result
    }

    /// The first dirty extent among those that `counts` in which fewer than T of `done` are current:
    /// somebody may be flushed and behind (invariant I5). Without a walk over the extents if T of
    /// them are behind nowhere. An extent in which everybody is behind has nothing that a flush could
    /// make durable; it answers requests with errors until a copy is named.
    #[must_use]
    pub fn first_lacking(&self, done: ReplicaSet, counts: impl Fn(u64) -> bool) -> Option<u64> {
        let whole = done.iter().filter(|&r| self.behind_extents(r) == 0);
        if whole.count() >= self.threshold {
            return None;
        }
        let holders = |extent: u64, of: ReplicaSet| {
            let holds = |replica: &ReplicaId| !self.is_behind(extent, *replica);
            of.iter().filter(holds).count()
        };
        let mut dirty = self.marks.iter(Bitmap::Dirty);
        dirty.find(|&extent| {
            holders(extent, done) < self.threshold
                && holders(extent, self.replicas) > 0
                && counts(extent)
        })
    }

    /// Whether some other copy, up or not, is not behind in `extent`.
    fn others_remain(&self, extent: u64, replica: ReplicaId) -> bool {
        let mut others = self.replicas;
        others.remove(replica);
        others.iter().any(|other| !self.is_behind(extent, other))
    }

    fn mark(&self, extent: u64, replicas: ReplicaSet) -> (ReplicaSet, Option<u64>) {
        let mut marked = ReplicaSet::EMPTY;
        let mut wait = None;
        for replica in replicas.iter() {
            let behind = Bitmap::Behind(replica);
            // First this: nobody may see the bit and miss that there is one to be seen.
            self.impaired.fetch_or(bit(replica), Ordering::AcqRel);
            if !self.marks.is_set(behind, extent) {
                marked.insert(replica);
            }
            wait = wait.max(self.marks.ask(behind, extent));
        }
        (marked, wait)
    }

    /// The replica does not answer, is gone, or cannot be relied on: it is not up any more, and
    /// behind wherever writes may be missing on it. `None`: it was not up. Operations on it are not
    /// waited for; it may be [admitted](Membership::admit) when the last of them has ended.
    pub fn kick(&self, replica: ReplicaId) -> Option<MarkedWhereDirty> {
        {
            let _one_decision = self.marking.lock().expect("no panic under this lock");
            if !self.up().contains(replica) {
                return None;
            }
            self.impaired.fetch_or(bit(replica), Ordering::AcqRel);
            self.up.fetch_and(!bit(replica), Ordering::AcqRel);
            self.lagging.fetch_and(!bit(replica), Ordering::AcqRel);
            self.counters[replica.index()].fetch_add(1, Ordering::AcqRel);
        }
        // Who intends to write from here on sees that it is not up, and marks it.
        Some(self.mark_behind_where_dirty(replica))
    }

    /// The replica is open and fenced again, and no operation of before is outstanding.
    pub fn admit(&self, replica: ReplicaId) {
        let _one_decision = self.marking.lock().expect("no panic under this lock");
        self.up.fetch_or(bit(replica), Ordering::AcqRel);
        self.unflushable.fetch_and(!bit(replica), Ordering::AcqRel);
        self.look_at(replica);
    }

    /// At a start: the replica is not there.
    pub fn leave_out(&self, replica: ReplicaId) -> Option<MarkedWhereDirty> {
        self.kick(replica)
    }

    /// The replica holds what the current copies hold in `extent`, durably (rule Y5). `counter` is
    /// c(i) from before the first of the copies was read; if it has changed since, nothing happens.
    /// Returns whether it is current there.
    pub fn clear_behind(&self, extent: u64, replica: ReplicaId, counter: u32) -> bool {
        let _one_decision = self.marking.lock().expect("no panic under this lock");
        if self.counter(replica) != counter
            || !self.up().contains(replica)
            || self.has_stray(extent, replica)
        {
            return false;
        }
        if self.marks.is_set(Bitmap::Behind(replica), extent) {
            let (all, last) = &self.caught_up[replica.index()];
            all.fetch_add(1, Ordering::Relaxed);
            last.fetch_add(
                u64::from(extent + 1 == self.marks.extents()),
                Ordering::Relaxed,
            );
        }
        self.marks.clear(Bitmap::Behind(replica), extent);
        self.look_at(replica);
        true
    }

    /// How many extents of `replica` were brought up to date, by whomever, and how often the last
    /// one was among them.
    #[must_use]
    pub fn caught_up(&self, replica: ReplicaId) -> (u64, u64) {
        let (all, last) = &self.caught_up[replica.index()];
        (all.load(Ordering::Relaxed), last.load(Ordering::Relaxed))
    }

    /// The caller holds `marking`, or nobody else is there yet.
    fn look_at(&self, replica: ReplicaId) {
        let fit = self.up().contains(replica)
            && !self.lagging().contains(replica)
            && self.behind_extents(replica) == 0;
        if fit {
            self.impaired.fetch_and(!bit(replica), Ordering::AcqRel);
        } else {
            self.impaired.fetch_or(bit(replica), Ordering::AcqRel);
        }
    }

    /// The replica was late. Returns whether that makes it lagging: nobody waits for it then.
    pub fn note_late(&self, replica: ReplicaId, now: Time) -> bool {
        let now_ms = now.nanos() / 1_000_000;
        let (since, times) = &self.late[replica.index()];
        let _one_decision = self.marking.lock().expect("no panic under this lock");
        if now_ms.saturating_sub(since.load(Ordering::Acquire)) > LATE_WINDOW_MS {
            since.store(now_ms, Ordering::Release);
            times.store(0, Ordering::Release);
        }
        let often = times.fetch_add(1, Ordering::AcqRel) + 1 >= LATE_TIMES;
        let mut others = self.up().minus(self.lagging());
        others.remove(replica);
        let lags = often
            && others.count() >= self.threshold
            && self.up().contains(replica)
            && !self.lagging().contains(replica);
        if lags {
            self.lagging.fetch_or(bit(replica), Ordering::AcqRel);
            self.look_at(replica);
        }
        lags
    }

    /// The replica answers in time again.
    pub fn note_prompt(&self, replica: ReplicaId) {
        let _one_decision = self.marking.lock().expect("no panic under this lock");
        self.lagging.fetch_and(!bit(replica), Ordering::AcqRel);
        self.late[replica.index()].1.store(0, Ordering::Release);
        self.look_at(replica);
    }

    /// An operation that writes to the replica in `extent` is not waited for any more: it may land
    /// at any time, and the replica cannot be brought up to date there before it has ended.
    pub fn leave_stray(&self, extent: u64, replica: ReplicaId) {
        let mut strays = self.strays.lock().expect("no panic under this lock");
        strays.push((replica, extent));
    }

    /// A stray has ended.
    pub fn end_stray(&self, extent: u64, replica: ReplicaId) {
        let mut strays = self.strays.lock().expect("no panic under this lock");
        let at = strays.iter().position(|&stray| stray == (replica, extent));
        strays.swap_remove(at.expect("every stray was left by somebody"));
    }

    /// Whether an operation of before may still write to the replica in `extent`.
    #[must_use]
    pub fn has_stray(&self, extent: u64, replica: ReplicaId) -> bool {
        let strays = self.strays.lock().expect("no panic under this lock");
        strays.contains(&(replica, extent))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(index: usize) -> ReplicaId {
        ReplicaId::new(index)
    }

    fn set(replicas: &[usize]) -> ReplicaSet {
        replicas.iter().map(|&i| id(i)).collect()
    }

    fn members(recorded: bool) -> Membership {
        Membership::new(3, 2, Marks::new(3, 200, recorded))
    }

    fn held(marked: &[usize]) -> Settled {
        let (marked, wait) = (set(marked), None);
        Settled::Held { marked, wait }
    }

    #[test]
    fn settle_for_marks_all_others_only_if_enough_hold() {
        let members = members(false);
        assert_eq!(members.settle_for(70, set(&[1])), Settled::TooFew);
        assert_eq!(members.current(70), set(&[0, 1, 2]));
        assert_eq!(members.settle_for(70, set(&[1, 2])), held(&[0]));
        assert_eq!(members.current(70), set(&[1, 2]));
        assert_eq!(members.current(71), set(&[0, 1, 2]));
        // A copy that is behind does not count as a holder, even if it took the write.
        assert_eq!(members.settle_for(70, set(&[0, 1])), Settled::TooFew);
        assert_eq!(members.mark_behind(70, id(1)), None);
    }

    #[test]
    fn flush_failure_marks_dirty_extents_but_never_the_last_copy() {
        let members = members(false);
        for extent in [3, 64, 199] {
            assert_eq!(members.intend(extent), Intent::Ready(set(&[0, 1, 2])));
        }
        let first = members.mark_behind_where_dirty(id(2));
        assert_eq!((first.extents, first.complete), (3, true));
        let again = members.mark_behind_where_dirty(id(2));
        assert_eq!((again.extents, again.complete), (0, true));
        assert_eq!(members.mark_behind_where_dirty(id(1)).extents, 3);
        let last = members.mark_behind_where_dirty(id(0));
        assert_eq!((last.extents, last.complete), (0, false));
        assert_eq!(members.current(64), set(&[0]));
        assert_eq!(members.current(65), set(&[0, 1, 2]));
    }

    #[test]
    fn intend_waits_for_the_record() {
        let members = members(true);
        let Intent::Wait(number) = members.intend(5) else {
            panic!("nothing is durable yet");
        };
        let mut pages = Vec::new();
        let marks = members.marks();
        assert!(marks.collect(&mut pages) >= number);
        let mut bits = [0; super::super::marks::PAGE_WORDS];
        marks.copy_page(pages[0], &mut bits);
        marks.made_durable(pages[0], &bits);
        assert_eq!(members.intend(5), Intent::Ready(set(&[0, 1, 2])));
    }

    #[test]
    fn kicked_replica_gets_no_writes_and_is_behind_where_there_are_any() {
        let members = members(false);
        members.intend(1);
        assert_eq!(members.kick(id(0)).map(|marked| marked.extents), Some(1));
        assert_eq!(members.kick(id(0)), None);
        assert_eq!(members.intend(2), Intent::Ready(set(&[1, 2])));
        assert_eq!(members.current(3), set(&[1, 2]));
        let before = members.counter(id(0));
        members.admit(id(0));
        assert_eq!(members.current(3), set(&[0, 1, 2]));
        assert_eq!(members.returning(2), set(&[0]));
        // A result from before the kick proves nothing.
        assert!(!members.clear_behind(2, id(0), before - 1));
        members.leave_stray(2, id(0));
        assert!(!members.clear_behind(2, id(0), before));
        members.end_stray(2, id(0));
        assert!(members.clear_behind(2, id(0), before));
        assert!(members.clear_behind(1, id(0), before));
        assert_eq!(members.intend(2), Intent::Ready(set(&[0, 1, 2])));
    }

    #[test]
    fn replica_that_is_late_often_is_left_out_if_enough_others_are_prompt() {
        let members = members(false);
        let at = |ms: u64| Time::from_nanos(ms * 1_000_000);
        for time in 0..8 {
            assert!(!members.note_late(id(1), at(5000 + 200 * time)));
        }
        for time in 0..7 {
            assert!(!members.note_late(id(1), at(20_000 + time)));
        }
        assert!(members.note_late(id(1), at(20_900)));
        assert_eq!(members.intend(4), Intent::Ready(set(&[0, 2])));
        assert!(members.is_behind(4, id(1)));
        // Two would be too many to do without.
        assert!((0..20).all(|_| !members.note_late(id(2), at(30_000))));
        members.note_prompt(id(1));
        assert_eq!(members.intend(5), Intent::Ready(set(&[0, 1, 2])));
    }
}
