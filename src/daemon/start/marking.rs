// SPDX-License-Identifier: Apache-2.0
//! The marks that follow from a decision.

use super::advice::Advice;
use super::decision::Decision;
use crate::quorum::{Bitmap, Marks};
use crate::units::{ReplicaId, ReplicaSet};

/// Marks replicas behind that lack everything, in `marks` as they were loaded for `replicas`
/// replicas. To be called before anybody else has the marks.
///
/// What was changed is not marked where nobody else has a copy, up or not: the last one is not
/// taken away for a change that may mean nothing (CONSISTENCY section 10). What was replaced, or
/// is written off, is marked everywhere (rules S3, S6): where nobody is left then, an operator
/// decides.
#[must_use]
pub fn apply(decision: &Decision, marks: &Marks, replicas: usize) -> Vec<Advice> {
    for replica in decision.written_off.iter() {
        marks.set_all(Bitmap::Behind(replica));
    }
    let mut advice = Vec::new();
    let all = ReplicaSet::first(replicas);
    let has_copy = |extent, among: ReplicaSet| {
        let mut among = among.iter();
        among.any(|replica| !marks.is_set(Bitmap::Behind(replica), extent))
    };
    if !decision.changed.is_empty() {
        let trusted = all.minus(decision.changed);
        let touched = decision.changed.minus(decision.replaced);
        let mut last_copies = 0;
        for extent in 0..marks.extents() {
            let doubted = if has_copy(extent, trusted) {
                decision.changed
            } else {
                last_copies += u64::from(has_copy(extent, touched));
                decision.replaced
            };
            for replica in doubted.iter() {
                marks.set(Bitmap::Behind(replica), extent);
            }
        }
        if last_copies > 0 {
            let extents = last_copies;
            advice.push(Advice::LastCopies { extents });
        }
    }
    let first = Bitmap::Behind(ReplicaId::new(0));
    let lost = marks.iter(first).filter(|&extent| !has_copy(extent, all));
    let extents = u64::try_from(lost.count()).expect("at most 2^20 extents");
    if extents > 0 {
        advice.push(Advice::NoCopy { extents });
    }
    advice
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(replicas: &[usize]) -> ReplicaSet {
        replicas
            .iter()
            .map(|&index| ReplicaId::new(index))
            .collect()
    }

    fn decision(changed: &[usize], written_off: &[usize]) -> Decision {
        Decision {
            threshold: 2,
            forced: false,
            absent: set(written_off),
            changed: set(changed),
            replaced: ReplicaSet::EMPTY,
            written_off: set(written_off),
            resolve: false,
            verify: false,
            advice: Vec::new(),
        }
    }

    fn counts(marks: &Marks) -> [u64; 3] {
        [0, 1, 2].map(|index| marks.count(Bitmap::Behind(ReplicaId::new(index))))
    }

    #[test]
    fn changed_replica_is_behind_wherever_another_copy_is_left() {
        let marks = Marks::new(3, 100, true);
        assert_eq!(apply(&decision(&[1], &[]), &marks, 3), []);
        assert_eq!(counts(&marks), [0, 100, 0]);

        let marks = Marks::new(3, 100, true);
        for extent in [7, 8] {
            marks.set(Bitmap::Behind(ReplicaId::new(0)), extent);
            marks.set(Bitmap::Behind(ReplicaId::new(2)), extent);
        }
        let advice = apply(&decision(&[1], &[]), &marks, 3);
        assert_eq!(advice, [Advice::LastCopies { extents: 2 }]);
        assert_eq!(counts(&marks), [2, 98, 2]);
    }

    #[test]
    fn replica_that_was_replaced_is_behind_everywhere_even_as_the_last_copy() {
        let marks = Marks::new(3, 100, true);
        for extent in [7, 8] {
            marks.set(Bitmap::Behind(ReplicaId::new(0)), extent);
            marks.set(Bitmap::Behind(ReplicaId::new(2)), extent);
        }
        let decision = Decision {
            replaced: set(&[1]),
            ..decision(&[1], &[])
        };
        let advice = apply(&decision, &marks, 3);
        assert_eq!(advice, [Advice::NoCopy { extents: 2 }]);
        assert_eq!(counts(&marks), [2, 100, 2]);
    }

    #[test]
    fn replica_that_is_written_off_is_behind_everywhere_even_as_the_last_copy() {
        let marks = Marks::new(3, 100, true);
        marks.set(Bitmap::Behind(ReplicaId::new(0)), 7);
        let advice = apply(&decision(&[], &[1, 2]), &marks, 3);
        assert_eq!(advice, [Advice::NoCopy { extents: 1 }]);
        assert_eq!(counts(&marks), [1, 100, 100]);
    }
}
