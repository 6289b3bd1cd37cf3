// SPDX-License-Identifier: Apache-2.0
//! How the resync of a replica goes, told every now and then.

use std::time::Duration;

use super::super::shared::Shared;
use super::KeeperReport;
use super::jobs::Turn;
use super::status::{bytes_behind, bytes_caught_up};
use crate::units::{ReplicaId, Time};

/// From one report of a resync to the next.
const INTERVAL: Duration = Duration::from_secs(10);

/// Progress of one replica, since it began to lack something.
#[derive(Clone, Copy, Default)]
pub(super) struct Resync {
    begun: bool,
    /// Bytes that had been brought up to date before.
    from: u64,
    bytes_told: u64,
    tell_at: Time,
}

impl Resync {
    /// From now on.
    pub(super) fn new(shared: &Shared, replica: ReplicaId) -> Self {
        Self {
            from: bytes_caught_up(shared, replica),
            ..Self::default()
        }
    }

    /// Bytes that were brought up to date since.
    pub(super) fn bytes_done(&self, shared: &Shared, replica: ReplicaId) -> u64 {
        bytes_caught_up(shared, replica).saturating_sub(self.from)
    }

    /// When there may be something to tell.
    pub(super) fn tell_at(&self) -> Time {
        self.tell_at
    }

    /// What there is to tell of a replica that lacks something.
    pub(super) fn told(&mut self, turn: &Turn<'_>, replica: ReplicaId) -> Option<KeeperReport> {
        if self.begun && turn.now < self.tell_at {
            return None;
        }
        self.tell_at = turn.now.after(INTERVAL);
        let bytes_done = self.bytes_done(turn.shared, replica);
        if self.begun && bytes_done == self.bytes_told {
            return None;
        }
        let first = !std::mem::replace(&mut self.begun, true);
        self.bytes_told = bytes_done;
        let bytes_left = bytes_behind(turn.shared, replica);
        Some(if first {
            KeeperReport::ResyncBegun {
                replica,
                bytes_left,
            }
        } else {
            KeeperReport::ResyncProgress {
                replica,
                bytes_left,
                bytes_done,
            }
        })
    }

    /// What there is to tell when it lacks nothing any more.
    pub(super) fn done(self, shared: &Shared, replica: ReplicaId) -> Option<KeeperReport> {
        let bytes_done = self.bytes_done(shared, replica);
        self.begun.then_some(KeeperReport::ResyncDone {
            replica,
            bytes_done,
        })
    }
}
