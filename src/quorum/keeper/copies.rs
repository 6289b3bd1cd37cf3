// SPDX-License-Identifier: Apache-2.0
//! Who holds what: whether the disk can do without a replica, and what is done where no replica is
//! current any more (CONSISTENCY section 10, last paragraph).

use super::super::marks::Bitmap;
use super::super::shared::Shared;
use crate::units::{ReplicaId, ReplicaSet};

/// Whether the disk can do without `replica`: at least T others are up, and no extent has it for
/// its last current copy (CONSISTENCY section 10, last paragraph).
pub(super) fn can_spare(shared: &Shared, replica: ReplicaId) -> bool {
    let membership = &shared.membership;
    let mut others = membership.up();
    others.remove(replica);
    if others.count() < shared.policy.threshold {
        return false;
    }
    // Where the one that lacks least is current, there is another copy.
    let best = others.iter().min_by_key(|&r| membership.behind_extents(r));
    let best = best.expect("T is at least 1");
    let mut lacking = membership.marks().iter(Bitmap::Behind(best));
    lacking.all(|extent| {
        membership.is_behind(extent, replica)
            || others.iter().any(|r| !membership.is_behind(extent, r))
    })
}

/// Takes the copy of `replica`, which is up, wherever everybody is behind but those that are
/// `gone`, who are from now on. The extents are resolved, and the others brought up to date from
/// it. Returns how many there are.
pub(super) fn force(shared: &Shared, replica: ReplicaId, gone: ReplicaSet) -> u64 {
    let (membership, marks) = (&shared.membership, shared.membership.marks());
    let others = membership.replicas().minus(gone);
    let mut extents = 0;
    for extent in marks.iter(Bitmap::Behind(replica)) {
        if !others.iter().all(|r| membership.is_behind(extent, r)) {
            continue;
        }
        for lost in gone.iter() {
            marks.set(Bitmap::Behind(lost), extent);
        }
        // In this order: nobody is shown the copy before it is resolved.
        marks.set(Bitmap::Dirty, extent);
        shared.unresolved.insert_extent(extent);
        let counter = membership.counter(replica);
        extents += u64::from(membership.clear_behind(extent, replica, counter));
    }
    extents
}
