// SPDX-License-Identifier: Apache-2.0
//! How a daemon starts: the record is opened with what there is of it, and says what is dirty and
//! who is behind; members that are not there are left out; the epoch rises (rules R5, R7, S1-S5).

use std::time::Duration;

use crate::clock::Happening;
use crate::copies::{Copies, DISK};
use crate::faults::MS;
use crate::life::{Event, Stop};
use crate::maintenance::{Maintenance, saved_states};
use crate::quorum::{Bitmap, KeeperConfig, Marks, ReplicaState, Shared};
use crate::record::{
    EpochEntry, EpochId, Expected, History, Member, MemberState, OpenOptions, Opened, Recorder,
    Refusal, Superblock, open,
};
use crate::trace::{Line, Verdict, violation};
use crate::units::ReplicaId;
use crate::world::{Breach, World};

/// State of a member in the record.
pub fn member_state(state: ReplicaState) -> MemberState {
    match state {
        ReplicaState::InSync => MemberState::InSync,
        ReplicaState::Syncing => MemberState::Syncing,
        ReplicaState::Missing => MemberState::Missing,
        ReplicaState::Failed => MemberState::Failed,
        ReplicaState::Removed => MemberState::Removed,
    }
}

/// The same back.
pub fn state_of_member(state: MemberState) -> ReplicaState {
    match state {
        MemberState::Vacant | MemberState::InSync => ReplicaState::InSync,
        MemberState::Syncing => ReplicaState::Syncing,
        MemberState::Missing => ReplicaState::Missing,
        MemberState::Failed => ReplicaState::Failed,
        MemberState::Removed => ReplicaState::Removed,
    }
}

fn small<T: TryFrom<usize>>(number: usize) -> T {
    T::try_from(number).ok().expect("a small number")
}

impl World {
    /// Maintenance as fast as the virtual time of a run asks for.
    pub fn keeper_config(&mut self) -> KeeperConfig {
        let ms = Duration::from_millis;
        let idle = self.rng.pick(&[0, 0, 100]);
        KeeperConfig {
            resync_bytes_per_s: self.rng.pick(&[0, 4 << 20]),
            scrub_bytes_per_s: 16 << 20,
            scrub_interval: self.rng.chance(300_000).then_some(ms(20)),
            scrub_first: None,
            scrub_repairs: self.rng.chance(500_000),
            sweep_interval: ms(self.rng.between(2, 20)),
            idle_before_clean: ms(idle),
            flush_interval: ms(self.rng.pick(&[0, 100])),
            probe_interval: ms(5),
            prompt_ns: 20 * MS,
            reopen_delay_min: ms(1),
            reopen_delay_max: ms(20),
            write_errors_max: 0,
            kicks_max: 0,
            repairs_max: 0,
        }
    }

    /// The first start: the record is created.
    pub fn create_record(&mut self) -> Verdict {
        let life = self.profile.life.expect("a run with a record");
        let copies = self.rng.pick(life.copies);
        let (geometry, policy) = (self.shape.geometry, &self.shape.policy);
        let mut members = [Member::default(); _];
        for (slot, member) in members.iter_mut().enumerate().take(policy.replicas) {
            *member = Member {
                uuid: [small::<u8>(slot) + 1; 16],
                state: MemberState::InSync,
                ..Member::default()
            };
        }
        let verify = if self.rng.chance(300_000) {
            0
        } else {
            u64::MAX
        };
        let superblock = Superblock {
            disk: DISK,
            copy_index: 0,
            copies: small(copies),
            included: 1,
            sequence: 1,
            sectors: geometry.sectors(),
            extent_shift: u8::try_from(geometry.extent_shift()).expect("a small shift"),
            block_sectors: u8::try_from(geometry.block_sectors()).expect("at most 8"),
            replicas: small(policy.replicas),
            threshold: small(policy.threshold),
            pattern: policy.read_pattern,
            clean: false,
            cold: false,
            forced: false,
            few_replicas: false,
            scrubbed_at: 0,
            assume_clean: verify == u64::MAX,
            boot_id: [0; 16],
            verify_cursor: verify,
            scrub_cursor: u64::MAX,
            members,
            history: History::new(EpochEntry {
                epoch: 1,
                id: EpochId([1; 16]),
                forced: false,
                begun: false,
            }),
            growing: None,
        };
        self.copies = Some(Copies::new(copies, superblock.layout()));
        let opened = Opened::create(superblock, copies);
        let marks = self.empty_marks();
        self.begin_daemon(opened, marks, 0, true)
    }

    fn empty_marks(&self) -> Marks {
        let (replicas, extents) = (self.disks.len(), self.shape.geometry.extents());
        Marks::new(replicas, extents, true)
    }

    /// The next start, whatever the end of the last daemon has left.
    pub fn start(&mut self) -> Verdict {
        self.tally.count("starts");
        let missing = self.missing_copies();
        let copies = self.copies.as_mut().expect("there is a record");
        let mut sources = copies.sources(missing);
        let options = OpenOptions {
            expected: Expected {
                disk: Some(DISK),
                sectors: Some(self.shape.geometry.sectors()),
                replicas: Some(small(self.shape.policy.replicas)),
                threshold: Some(small(self.shape.policy.threshold)),
            },
            force: false,
            mutation: self.broken.record,
        };
        let opened = match open(&mut sources, &options) {
            Ok(opened) => opened,
            // Nothing was ever done with it: it is created again.
            Err(Refusal::NoRecord { .. } | Refusal::Unfinished { .. }) if !self.life.served => {
                return self.create_record();
            }
            Err(refusal) => return violation("R5", format!("not opened: {refusal}")),
        };
        if opened.pages_lost() > 0 {
            return violation("I13", format!("pages are lost: {:?}", opened.notes));
        }
        let epoch = opened.superblock.epoch();
        if epoch < self.life.epoch {
            let what = format!("epoch {epoch} after epoch {}", self.life.epoch);
            return violation("I12", what);
        }
        let marks = self.empty_marks();
        opened.load(&marks);
        // A copy may have missed that an extent is clean: it is dirty, but not in doubt.
        let clean = opened.superblock.clean;
        self.begin_daemon(opened, marks, missing, clean)
    }

    /// Copies of the record that are not there this time: never more than may be missing.
    fn missing_copies(&mut self) -> u8 {
        let mut missing = 0u8;
        let copies = self.copies.as_mut().expect("there is a record");
        let odds = self.profile.life.map_or(0, |life| life.missing);
        if !self.life.served || !self.rng.chance(odds) {
            return missing;
        }
        for copy in 0..copies.count() {
            let bad = copies.failing | copies.lacking | missing | 1 << copy;
            if bad.count_ones() <= copies.spare() && self.rng.chance(500_000) {
                if self.rng.chance(200_000) {
                    self.tally.count("copy lost");
                    copies.lose(copy);
                } else {
                    self.tally.count("copy missing");
                    missing |= 1 << copy;
                }
            }
        }
        missing
    }

    /// A daemon begins with what its record says.
    fn begin_daemon(&mut self, opened: Opened, marks: Marks, missing: u8, clean: bool) -> Verdict {
        self.life.daemons += 1;
        self.life.stop = Stop::No;
        self.life.connected = false;
        self.life.opened = opened.superblock.epoch();
        let saved = saved_states(&opened.superblock);
        let members = opened.superblock.members;
        // S3: who was changed while the disk was stopped lacks everything.
        for (replica, member) in members.iter().enumerate().take(self.disks.len()) {
            let known = member.fingerprint.inode;
            let foreign = std::mem::take(&mut self.life.foreign[replica]);
            let changed = clean && known != 0 && known != self.life.fingerprints[replica];
            if foreign || changed && !self.broken.is(Breach::FingerprintIgnored) {
                self.tally.count("members changed");
                marks.set_all(Bitmap::Behind(ReplicaId::new(replica)));
            }
        }
        self.name_current(&marks);
        self.check_opened(&marks)?;
        let (geometry, policy) = (self.shape.geometry, self.shape.policy.clone());
        let mut shared = Shared::with_marks(geometry, policy, marks).expect("a valid profile");
        shared.mutation = self.broken.mutation;
        if !clean && !self.broken.is(Breach::DirtyTrusted) {
            shared.resolve_dirty();
        }
        if shared.unresolved.extents() > 0 {
            shared.await_front_end(opened.superblock.cold);
        }
        self.shared = shared;
        self.take_marks();
        self.stay_within_budget();
        self.hire();
        self.operations.forget_all();
        self.leave_members_out();
        self.take_marks();

        let present = (0..).zip(&self.life.present);
        let present = present.map(|(r, &there)| u16::from(there) << r).sum();
        let copies = self.copies.as_ref().expect("there is a record");
        let lacking = copies.lacking;
        self.note(Line::Began {
            missing,
            lacking,
            clean,
            present,
            marks: self.list_disorder(),
        });
        let copies = self.copies.as_ref().expect("there is a record").count();
        let writable: Vec<bool> = (0..copies).map(|copy| missing >> copy & 1 == 0).collect();
        let mut run = [0; 16];
        run[..8].copy_from_slice(&self.rng.next().to_le_bytes());
        let recorder = Recorder::new(opened, &writable, run);
        let mut recorder = match recorder {
            Ok(recorder) => recorder,
            Err(error) => return violation("R1", format!("cannot go on: {error}")),
        };
        recorder.mutation = self.broken.record;
        for copy in (0..copies).filter(|copy| missing >> copy & 1 > 0) {
            let copy = small(copy);
            let later = self.rng.between(MS, 50 * MS);
            let what = Event::Readmit { copy };
            self.clock.after(later, Happening::Life(what));
            self.copies.as_mut().expect("there is a record").lacking |= 1 << copy;
        }
        self.maintenance = Some(Maintenance::new(recorder, saved));
        self.plan_end();
        self.poll_record()
    }

    /// Clears that were lost may add up until every copy of an extent is behind: an operator has to
    /// name one that is not.
    fn name_current(&mut self, marks: &Marks) {
        for extent in 0..self.shape.geometry.extents() {
            let replicas = (0..self.disks.len()).map(ReplicaId::new);
            let behind = |r: ReplicaId| marks.is_set(Bitmap::Behind(r), extent);
            if !replicas.clone().all(behind) {
                continue;
            }
            self.tally.count("extents without a copy");
            let sound = replicas.clone().find(|&r| !self.seen.is_behind(extent, r));
            if let Some(replica) = sound {
                marks.clear(Bitmap::Behind(replica), extent);
            }
        }
    }

    /// Members that are not there are left out; the others are opened.
    fn leave_members_out(&mut self) {
        let odds = self.profile.life.map_or(0, |life| life.left_out);
        for replica in 0..self.disks.len() {
            self.life.detaching[replica] = false;
            self.life.attached[replica] = false;
            if !self.life.present[replica] {
                self.leave_member_out(replica);
            }
        }
        for replica in 0..self.disks.len() {
            if self.life.present[replica] && self.life.may_fail(replica) && !self.calm {
                if self.rng.chance(odds) {
                    self.leave(replica);
                }
                if !self.life.present[replica] {
                    self.leave_member_out(replica);
                }
            }
            if self.life.present[replica] {
                self.open_member(replica);
            }
        }
    }

    fn leave_member_out(&mut self, replica: usize) {
        self.tally.count("members left out");
        self.shared.membership.leave_out(ReplicaId::new(replica));
        self.take_marks();
    }
}
