// SPDX-License-Identifier: Apache-2.0
//! A disk of which everything is decided, and what its record and its keeper begin with.

use std::sync::Arc;

use super::Start;
use super::decision::Decision;
use super::known;
use crate::config::{Config, RecordConfig};
use crate::daemon::fingerprints;
use crate::daemon::first_use::RunIds;
use crate::daemon::maintenance::OpenRecord;
use crate::daemon::record_files::RecordFiles;
use crate::daemon::warden::Left;
use crate::device::DiskIdentity;
use crate::quorum::{KeeperStart, KeeperState, ReplicaState, Shared};
use crate::record::{MemberState, Recorder, Superblock, VERIFIED};
use crate::replica::{RawOptions, Replica, SetShape};
use crate::units::ReplicaId;

/// The replicas of the disk.
pub struct ReplicaFiles {
    /// By slot, those that are up.
    pub replicas: Vec<Option<Arc<Replica>>>,
    /// What each was like when it was left.
    pub left: Vec<Left>,
    /// How each is opened.
    pub options: Vec<RawOptions>,
    /// What they make.
    pub shape: SetShape,
}

/// A disk of which everything is decided.
pub struct SettledDisk {
    /// Its replicas.
    pub set: ReplicaFiles,
    /// What the lanes share, as it was decided.
    pub shared: Arc<Shared>,
    /// What was decided.
    pub decision: Decision,
}

impl SettledDisk {
    /// The record with the change that begins the epoch of this run (rule R7).
    pub fn open_record(
        &self,
        config: &Config,
        mut recorder: Recorder,
        files: RecordFiles,
        writable: &[bool],
        ids: RunIds,
    ) -> OpenRecord {
        recorder.change(|superblock| self.begin(config, superblock, ids));
        let (paths, mut files): (Vec<_>, Vec<_>) = files.into_files().unzip();
        for (file, &writable) in files.iter_mut().zip(writable) {
            file.take_if(|_| !writable);
        }
        OpenRecord {
            recorder,
            files,
            paths,
            beside: config.record == RecordConfig::Beside,
        }
    }

    /// State of a replica that was in state `before` when the record was last written.
    fn state(&self, replica: ReplicaId, before: MemberState) -> MemberState {
        if matches!(before, MemberState::Failed | MemberState::Removed) {
            before
        } else if self.decision.absent.contains(replica) {
            MemberState::Missing
        } else if self.shared.membership.behind_extents(replica) > 0 {
            MemberState::Syncing
        } else {
            MemberState::InSync
        }
    }

    /// What the record of before holds for the keeper.
    pub fn keeper_start(&self, superblock: &Superblock) -> KeeperStart {
        let mut keeper = KeeperState::fresh();
        for replica in self.shared.membership.replicas().iter() {
            let member = &superblock.members[replica.index()];
            keeper.states[replica.index()] = match self.state(replica, member.state) {
                MemberState::Failed => ReplicaState::Failed,
                MemberState::Removed => ReplicaState::Removed,
                MemberState::Missing => ReplicaState::Missing,
                MemberState::Syncing => ReplicaState::Syncing,
                MemberState::InSync | MemberState::Vacant => ReplicaState::InSync,
            };
            if member.suspect {
                keeper.suspects.insert(replica);
            }
        }
        let under_way = |cursor: u64| (cursor != VERIFIED).then_some(cursor);
        keeper.scrub_cursor = under_way(superblock.scrub_cursor);
        keeper.verify_cursor = if self.decision.verify {
            Some(0)
        } else {
            under_way(superblock.verify_cursor)
        };
        keeper
    }

    /// What the record says from the moment on at which the disk is served.
    pub fn begin(&self, config: &Config, superblock: &mut Superblock, ids: RunIds) {
        let decision = &self.decision;
        superblock.clean = false;
        // Set by a cold start alone, and kept until everything is resolved (rule S4).
        superblock.cold &= self.shared.unresolved.extents() > 0;
        superblock.few_replicas = decision.forced;
        superblock.boot_id = ids.boot;
        superblock.threshold = u8::try_from(decision.threshold).expect("at most 16");
        superblock.pattern = config.read_pattern;
        if decision.verify {
            superblock.verify_cursor = 0;
        }
        let members = superblock.members.iter_mut().zip(&self.set.replicas);
        for (slot, (member, replica)) in members.enumerate() {
            member.state = self.state(ReplicaId::new(slot), member.state);
            // That of a replica that is not there stays: nobody has opened it since.
            if let Some(replica) = replica {
                let print = known::in_use(&replica.found());
                member.fingerprint = fingerprints::to_record(&print);
            }
        }
    }

    /// The whole.
    pub fn into_start(
        self,
        record: Option<OpenRecord>,
        keeper: KeeperStart,
        identity: DiskIdentity,
    ) -> Start {
        Start {
            shared: self.shared,
            replicas: self.set.replicas,
            left: self.set.left,
            options: self.set.options,
            shape: self.set.shape,
            record,
            keeper,
            identity,
        }
    }
}
