// SPDX-License-Identifier: Apache-2.0
//! The marks that follow from a decision.

use super::advice::Advice;
use super::decision::Decision;
use crate::quorum::{Bitmap, Marks};
use crate::units::{ReplicaId, ReplicaSet};

/// Marks replicas behind that lack everything, in `marks` as they were loaded for `replicas`
/// replicas. To be called before anybody else has the marks.
///
/// What was changed is not marked where nobody else has a copy, up or not: the last one is never
/// taken away (CONSISTENCY section 10). What is written off is marked everywhere (rule S6).
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
        let mut last_copies = 0;
        for extent in 0..marks.extents() {
            if has_copy(extent, trusted) {
                for replica in decision.changed.iter() {
                    marks.set(Bitmap::Behind(replica), extent);
                }
            } else if has_copy(extent, decision.changed) {
                last_copies += 1;
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
    fn replica_that_is_written_off_is_behind_everywhere_even_as_the_last_copy() {
        let marks = Marks::new(3, 100, true);
        marks.set(Bitmap::Behind(ReplicaId::new(0)), 7);
        let advice = apply(&decision(&[], &[1, 2]), &marks, 3);
        assert_eq!(advice, [Advice::NoCopy { extents: 1 }]);
        assert_eq!(counts(&marks), [1, 100, 100]);
    }
}
