// SPDX-License-Identifier: Apache-2.0
//! Which replicas are current where: the behind bits B and the dirty bits D.
//!
//! Reading is a few relaxed loads. Marking a replica behind is rare and goes through one mutex,
//! because the decision "T copies remain without it" and the mark must be one step for all lanes
//! (rules W4, W5).

use super::sync::{AtomicU32, AtomicU64, Mutex, Ordering};
use crate::units::{ReplicaId, ReplicaSet};

/// One bit an extent.
struct ExtentBits {
    words: Box<[AtomicU64]>,
    count: AtomicU64,
}

impl ExtentBits {
    fn new(extents: u64) -> Self {
        let words = usize::try_from(extents.div_ceil(64)).expect("at most 2^20 extents");
        Self {
            words: (0..words).map(|_| AtomicU64::new(0)).collect(),
            count: AtomicU64::new(0),
        }
    }

    fn place(extent: u64) -> (usize, u64) {
        (
            usize::try_from(extent / 64).expect("at most 2^20 extents"),
            1 << (extent % 64),
        )
    }

    fn get(&self, extent: u64) -> bool {
        let (word, bit) = Self::place(extent);
        self.words[word].load(Ordering::Acquire) & bit != 0
    }

    /// Returns whether the bit was clear. Does not write to memory if it was set.
    fn set(&self, extent: u64) -> bool {
        let (word, bit) = Self::place(extent);
        if self.words[word].load(Ordering::Acquire) & bit != 0 {
            return false;
        }
        let was_clear = self.words[word].fetch_or(bit, Ordering::AcqRel) & bit == 0;
        if was_clear {
            self.count.fetch_add(1, Ordering::AcqRel);
        }
        was_clear
    }

    fn iter(&self) -> impl Iterator<Item = u64> + '_ {
        self.words.iter().zip(0u64..).flat_map(|(word, index)| {
            let mut bits = word.load(Ordering::Acquire);
            std::iter::from_fn(move || {
                if bits == 0 {
                    return None;
                }
                let bit = bits.trailing_zeros();
                bits &= bits - 1;
                Some(index * 64 + u64::from(bit))
            })
        })
    }
}

/// The replicas of a disk and where each of them is current.
pub struct Membership {
    replicas: ReplicaSet,
    threshold: usize,
    dirty: ExtentBits,
    behind: Box<[ExtentBits]>,
    /// Replicas with at least one behind bit: spares the look at the maps in the healthy case.
    any_behind: AtomicU32,
    /// Serialises "enough others?" with the mark that follows from it.
    marking: Mutex<()>,
}

impl Membership {
    /// `replicas` replicas, all current everywhere, on a disk of `extents` extents.
    #[must_use]
    pub fn new(replicas: usize, threshold: usize, extents: u64) -> Self {
        Self {
            replicas: ReplicaSet::first(replicas),
            threshold,
            dirty: ExtentBits::new(extents),
            behind: (0..replicas).map(|_| ExtentBits::new(extents)).collect(),
            any_behind: AtomicU32::new(0),
            marking: Mutex::new(()),
        }
    }

    /// All configured replicas.
    #[must_use]
    pub fn replicas(&self) -> ReplicaSet {
        self.replicas
    }

    /// `Cur(extent)`: the replicas that vote and are a source there.
    #[must_use]
    pub fn current(&self, extent: u64) -> ReplicaSet {
        let any_behind = self.any_behind.load(Ordering::Acquire);
        if any_behind == 0 {
            return self.replicas;
        }
        let mut current = self.replicas;
        for replica in self.replicas.iter() {
            if any_behind & (1 << replica.index()) != 0 && self.behind[replica.index()].get(extent)
            {
                current.remove(replica);
            }
        }
        current
    }

    /// Sets D for the extent; must precede every write in it (rule W2). Without a record the bit
    /// is as durable as it will ever be at once.
    pub fn make_dirty(&self, extent: u64) {
        self.dirty.set(extent);
    }

    /// Whether D is set for the extent.
    #[must_use]
    pub fn is_dirty(&self, extent: u64) -> bool {
        self.dirty.get(extent)
    }

    /// Marks every configured replica outside `holders` behind in `extent`, provided that at
    /// least T current copies are in `holders` (rules W4, W5). Otherwise changes nothing and
    /// returns `None`. Returns the newly marked.
    pub fn settle_for(&self, extent: u64, holders: ReplicaSet) -> Option<ReplicaSet> {
        // The usual case needs no lock: whoever lacks the write is behind already. Marks of other
        // lanes cannot undo that, since they leave at least T current copies, all in `holders`.
        let current = self.current(extent);
        if holders.contains_all(current) && current.count() >= self.threshold {
            return Some(ReplicaSet::EMPTY);
        }
        let _one_decision = self.marking.lock().expect("no panic under this lock");
        let current = self.current(extent);
        if current.intersection(holders).count() < self.threshold {
            return None;
        }
        Some(self.mark(extent, self.replicas.minus(holders)))
    }

    /// Marks `replica` behind in `extent` unless fewer than T current copies would remain: a
    /// policy never takes a disk's last copies away. Returns `None` if it refused, otherwise
    /// whether the mark is new.
    pub fn mark_behind(&self, extent: u64, replica: ReplicaId) -> Option<bool> {
        let _one_decision = self.marking.lock().expect("no panic under this lock");
        let mut remaining = self.current(extent);
        remaining.remove(replica);
        if remaining.count() < self.threshold {
            return None;
        }
        let alone = std::iter::once(replica).collect();
        Some(!self.mark(extent, alone).is_empty())
    }

    /// The flush of `replica` failed or did not end: it is behind in every dirty extent (rule
    /// F3). Returns the number of newly marked extents and whether every dirty extent has the
    /// mark now; it has not where fewer than T current copies would remain.
    pub fn mark_behind_where_dirty(&self, replica: ReplicaId) -> (u64, bool) {
        let mut marked = 0;
        let mut complete = true;
        for extent in self.dirty.iter() {
            match self.mark_behind(extent, replica) {
                Some(true) => marked += 1,
                Some(false) => {}
                None => complete = self.behind[replica.index()].get(extent) && complete,
            }
        }
        (marked, complete)
    }

    fn mark(&self, extent: u64, replicas: ReplicaSet) -> ReplicaSet {
        let mut marked = ReplicaSet::EMPTY;
        for replica in replicas.iter() {
            self.any_behind
                .fetch_or(1 << replica.index(), Ordering::AcqRel);
            if self.behind[replica.index()].set(extent) {
                marked.insert(replica);
            }
        }
        marked
    }

    /// Extents in which `replica` is behind.
    #[must_use]
    pub fn behind_extents(&self, replica: ReplicaId) -> u64 {
        self.behind[replica.index()].count.load(Ordering::Acquire)
    }

    /// Whether B is set for the replica in the extent.
    #[must_use]
    pub fn is_behind(&self, extent: u64, replica: ReplicaId) -> bool {
        self.behind[replica.index()].get(extent)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(replicas: &[usize]) -> ReplicaSet {
        replicas.iter().map(|&i| ReplicaId::new(i)).collect()
    }

    #[test]
    fn settle_for_marks_all_others_only_if_enough_hold() {
        let members = Membership::new(3, 2, 100);
        assert_eq!(members.settle_for(70, set(&[1])), None);
        assert_eq!(members.current(70), set(&[0, 1, 2]));
        assert_eq!(members.settle_for(70, set(&[1, 2])), Some(set(&[0])));
        assert_eq!(members.current(70), set(&[1, 2]));
        assert_eq!(members.current(71), set(&[0, 1, 2]));
        // A copy that is behind does not count as a holder, even if it took the write.
        assert_eq!(members.settle_for(70, set(&[0, 1])), None);
        assert_eq!(members.mark_behind(70, ReplicaId::new(1)), None);
    }

    #[test]
    fn flush_failure_marks_dirty_extents_only() {
        let members = Membership::new(3, 2, 200);
        for extent in [3, 64, 199] {
            members.make_dirty(extent);
        }
        assert_eq!(
            members.mark_behind_where_dirty(ReplicaId::new(2)),
            (3, true)
        );
        assert_eq!(
            members.mark_behind_where_dirty(ReplicaId::new(2)),
            (0, true)
        );
        assert_eq!(
            members.mark_behind_where_dirty(ReplicaId::new(1)),
            (0, false)
        );
        assert_eq!(members.behind_extents(ReplicaId::new(2)), 3);
        assert_eq!(members.current(64), set(&[0, 1]));
        assert_eq!(members.current(65), set(&[0, 1, 2]));
    }
}
