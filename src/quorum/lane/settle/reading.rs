// SPDX-License-Identifier: Apache-2.0
//! Settlements: reading all current copies, whole and then block by block.

use super::super::super::event::{BadCause, OperationKind, Outcome};
use super::super::super::mutation::broken;
use super::super::super::{Buffers, Purpose};
use super::super::{Lane, ReplicaBuffers, SlotId, Turn};
use super::{Phase, sectors_of};
use crate::units::{ReplicaId, ReplicaSet, SECTOR_LEN};

impl Lane {
    pub(in super::super) fn settle_take_buffers<B: Buffers>(
        &mut self,
        turn: &mut Turn<'_, B>,
        slot: SlotId,
    ) -> bool {
        let shared = turn.shared;
        let range = self.settle_mut(slot).matter.range;
        let mut current = shared
            .membership
            .current(shared.geometry.extent_of(range.start()));
        if broken!(shared, BehindVotes) {
            current = shared.membership.replicas();
        }
        // A target may have gone, or become current by another settlement's doing, meanwhile.
        let settle = self.settle_mut(slot);
        let gone = settle.targets.minus(shared.membership.up());
        settle.lost = settle.lost.union(gone);
        settle.targets = settle.targets.minus(gone).minus(current);
        let asked = current.union(settle.targets);
        let len = range.len_bytes();
        let purpose = Purpose::Settle;
        let Some(mut ballots) = ReplicaBuffers::take(turn.buffers, asked, len, purpose) else {
            return false;
        };
        let Some(result) = turn.buffers.take(len, purpose) else {
            ballots.give_all(turn.buffers);
            return false;
        };
        let until = turn.now.after(shared.policy.write_grace_max);
        self.arm(turn.now);
        let settle = self.settle_mut(slot);
        settle.phase = Phase::Reading;
        settle.ballots = ballots;
        settle.result = Some(result);
        settle.pending = asked;
        settle.asked_at = turn.now;
        settle.open = sectors_of(range)
            .map(|sector| shared.unresolved.touches(sector))
            .collect();
        settle.unread = vec![ReplicaSet::EMPTY; settle.open.len()];
        settle.deadline = Some(until);
        for replica in asked.iter() {
            let buffer = ballots.of(replica);
            let kind = OperationKind::Read {
                range,
                buffer,
                skip_bytes: 0,
            };
            turn.submit(slot, replica, kind);
        }
        if asked.is_empty() {
            self.settle_decide(turn, slot);
            self.settle_wind_up(turn, slot);
        }
        true
    }

    /// Decides once everybody has answered who is still up.
    pub(super) fn settle_all_read<B: Buffers>(&mut self, turn: &mut Turn<'_, B>, slot: SlotId) {
        let up = turn.shared.membership.up();
        let settle = self.settle_mut(slot);
        if settle.pending.intersection(up).is_empty() {
            // Whoever was being read block by block has no vote.
            settle.good = settle.good.minus(settle.pending);
            settle.lost = settle
                .lost
                .union(settle.targets.intersection(settle.pending));
            self.settle_decide(turn, slot);
        }
    }

    /// Takes the answer of a replica, or to one block of it, and reads the next block if it has
    /// come to that.
    pub(super) fn settle_read_step<B: Buffers>(
        &mut self,
        turn: &mut Turn<'_, B>,
        slot: SlotId,
        replica: ReplicaId,
        outcome: Outcome,
    ) {
        let block_sectors = turn.shared.geometry.block_sectors();
        let silenced = broken!(turn.shared, OneBadBlockSilences);
        let settle = self.settle_mut(slot);
        let count = settle.matter.range.count();
        let cause = match outcome {
            Outcome::Done => None,
            Outcome::Short { .. } => Some(BadCause::Short),
            Outcome::Failed { errno } => Some(BadCause::Error(errno)),
        };
        if let Some(cause) = cause {
            settle.causes[replica.index()] = cause;
        }
        let next = match (settle.piecewise[replica.index()], cause) {
            (None, None) => {
                settle.good.insert(replica);
                return;
            }
            (None, Some(_)) if count <= block_sectors || silenced => {
                settle.failed.insert(replica);
                return;
            }
            (None, Some(_)) => 0,
            (Some(first), cause) => {
                let end = (first + block_sectors).min(count);
                if cause.is_none() {
                    settle.good.insert(replica);
                } else {
                    for unread in &mut settle.unread[first as usize..end as usize] {
                        unread.insert(replica);
                    }
                }
                end
            }
        };
        if next == count {
            if !settle.good.contains(replica) {
                settle.failed.insert(replica);
            }
            return;
        }
        settle.piecewise[replica.index()] = Some(next);
        settle.pending.insert(replica);
        settle.asked_at = turn.now;
        let range = settle.sub_range(next, (next + block_sectors).min(count));
        let buffer = settle.ballots.of(replica);
        let skip_bytes = next * u32::try_from(SECTOR_LEN).expect("512");
        let kind = OperationKind::Read {
            range,
            buffer,
            skip_bytes,
        };
        turn.submit(slot, replica, kind);
    }
}
