// SPDX-License-Identifier: Apache-2.0
//! How the disk is, for people and programs.

use super::super::marks::Bitmap;
use super::super::shared::Shared;
use super::life::ReplicaState;
use super::{Keeper, PassKind, ScrubCounts};
use crate::units::{ReplicaId, SECTOR_BYTES, Time};

/// The whole disk.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct KeeperStatus {
    /// One of each configured replica, in the order of configuration.
    pub replicas: Vec<ReplicaStatus>,
    /// Extents whose copies may differ, or are not flushed.
    pub dirty_extents: u64,
    /// Extents that are unresolved as a whole since a crash (rule S4).
    pub unresolved_extents: u64,
    /// Unresolved sectors of writes that failed (rule W7).
    pub unresolved_sectors: u64,
    /// The pass that is under way.
    pub pass: Option<PassStatus>,
}

/// One replica.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ReplicaStatus {
    /// Which one.
    pub replica: ReplicaId,
    /// Its state.
    pub state: ReplicaState,
    /// Nobody waits for it (rule W6).
    pub lagging: bool,
    /// It never decides a tie.
    pub suspect: bool,
    /// Extents in which it is behind.
    pub behind_extents: u64,
    /// Bytes in them.
    pub behind_bytes: u64,
    /// Bytes that were brought up to date since it began to lack something.
    pub resynced_bytes: u64,
    /// When it is opened again, if it is Missing and waits for that.
    pub reopens_at: Option<Time>,
}

/// A pass over the disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PassStatus {
    /// Which kind.
    pub kind: PassKind,
    /// The first sector that was not read yet.
    pub sector: u64,
    /// Sectors of the disk.
    pub sectors: u64,
    /// What it met so far.
    pub counts: ScrubCounts,
}

/// Bytes in the extents in which `replica` is behind.
pub(super) fn bytes_behind(shared: &Shared, replica: ReplicaId) -> u64 {
    let membership = &shared.membership;
    let whole = 1u64 << shared.geometry.extent_shift();
    let last = shared.geometry.extents() - 1;
    let mut sectors = membership.behind_extents(replica).saturating_mul(whole);
    // The last extent may be shorter.
    if membership.marks().is_set(Bitmap::Behind(replica), last) {
        let count = u64::from(shared.geometry.extent_range(last).count());
        sectors = sectors.saturating_sub(whole - count);
    }
    sectors.saturating_mul(SECTOR_BYTES)
}

/// Bytes of `replica` that were brought up to date, by the keeper or by requests that could not
/// wait for it.
pub(super) fn bytes_caught_up(shared: &Shared, replica: ReplicaId) -> u64 {
    let (extents, last) = shared.membership.caught_up(replica);
    let whole = 1u64 << shared.geometry.extent_shift();
    let of_last = shared.geometry.extent_range(shared.geometry.extents() - 1);
    let missing = whole - u64::from(of_last.count());
    let sectors = extents.saturating_mul(whole);
    let sectors = sectors.saturating_sub(last.saturating_mul(missing));
    sectors.saturating_mul(SECTOR_BYTES)
}

impl Keeper {
    /// How the disk is now.
    #[must_use]
    pub fn status(&self, shared: &Shared) -> KeeperStatus {
        let membership = &shared.membership;
        let of = |replica: ReplicaId| ReplicaStatus {
            replica,
            state: self.members.state(replica),
            lagging: membership.lagging().contains(replica),
            suspect: self.members.suspects().contains(replica),
            behind_extents: membership.behind_extents(replica),
            behind_bytes: bytes_behind(shared, replica),
            resynced_bytes: self.members.resynced_bytes(shared, replica),
            reopens_at: self.members.reopens_at(replica),
        };
        let pass = self.scrub.progress();
        KeeperStatus {
            replicas: membership.replicas().iter().map(of).collect(),
            dirty_extents: membership.marks().count(Bitmap::Dirty),
            unresolved_extents: shared.unresolved.extents(),
            unresolved_sectors: shared.unresolved.sectors(),
            pass: pass.map(|(kind, sector, counts)| PassStatus {
                kind,
                sector,
                sectors: shared.geometry.sectors(),
                counts,
            }),
        }
    }
}
