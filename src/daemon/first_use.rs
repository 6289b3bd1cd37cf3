// SPDX-License-Identifier: Apache-2.0
//! The record of images that have none (rule S5): what is in it at first, and the numbers that
//! make it one of a kind.

use std::fs;
use std::io;

use crate::config::FirstUse;
use crate::quorum::{Bitmap, Geometry, Marks, Policy};
use crate::record::{
    DiskUuid, EpochEntry, EpochId, Fingerprint, History, Member, MemberState, Superblock, VERIFIED,
};
use crate::units::{REPLICAS_MAX, ReplicaId};

/// Random numbers of one run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RunIds {
    /// Of the epochs of this run (rule R7).
    pub run: [u8; 16],
    /// Boot of the host.
    pub boot: [u8; 16],
}

impl RunIds {
    /// Numbers for this run of the process.
    ///
    /// # Errors
    /// If the system gives no random bytes.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            run: random_bytes()?,
            boot: boot_id(),
        })
    }
}

/// 16 random bytes.
///
/// # Errors
/// If the system has none.
pub fn random_bytes() -> io::Result<[u8; 16]> {
    let mut bytes = [0; 16];
    let mut filled = 0;
    while filled < bytes.len() {
        filled +=
            rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty())?;
    }
    Ok(bytes)
}

/// The kernel's number of this boot; zero where it tells none (`/proc` is not mounted): every boot
/// then looks like the same.
fn boot_id() -> [u8; 16] {
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    parse_uuid(text.trim_end()).unwrap_or_default()
}

fn parse_uuid(text: &str) -> Option<[u8; 16]> {
    let digits: String = text.chars().filter(|&c| c != '-').collect();
    if digits.len() != 32 {
        return None;
    }
    u128::from_str_radix(&digits, 16)
        .ok()
        .map(u128::to_be_bytes)
}

/// The first superblock of a disk. `fingerprints` are those of the replicas by slot, as they will
/// be found when they are opened next; the disk counts as stopped cleanly. `Opened::create` of
/// [`crate::record`] completes what it says of copies and sequences.
///
/// # Errors
/// If the system gives no random bytes.
pub fn superblock(
    geometry: &Geometry,
    policy: &Policy,
    first_use: FirstUse,
    ids: RunIds,
    fingerprints: &[Fingerprint],
) -> io::Result<Superblock> {
    let mut members = [Member::default(); REPLICAS_MAX];
    for (slot, (member, fingerprint)) in members.iter_mut().zip(fingerprints).enumerate() {
        let current = is_current(first_use, ReplicaId::new(slot));
        *member = Member {
            uuid: random_bytes()?,
            state: if current {
                MemberState::InSync
            } else {
                MemberState::Syncing
            },
            suspect: false,
            epoch_in_sync: u64::from(current),
            fingerprint: *fingerprint,
        };
    }
    let small = |value: usize| u8::try_from(value).expect("at most 16 replicas");
    let first = EpochEntry {
        epoch: 1,
        id: EpochId::derive(ids.run, 1),
        forced: false,
        begun: true,
    };
    Ok(Superblock {
        disk: DiskUuid(random_bytes()?),
        copy_index: 0,
        copies: 1,
        included: 1,
        sequence: 1,
        sectors: geometry.sectors(),
        extent_shift: u8::try_from(geometry.extent_shift()).expect("extents are at most 64 MiB"),
        block_sectors: u8::try_from(geometry.block_sectors()).expect("blocks are at most 4 KiB"),
        replicas: small(policy.replicas),
        threshold: small(policy.threshold),
        pattern: policy.read_pattern,
        clean: true,
        cold: false,
        forced: false,
        few_replicas: false,
        assume_clean: first_use == FirstUse::AssumeClean,
        boot_id: ids.boot,
        // Where the others are overwritten there is nothing to compare.
        verify_cursor: match first_use {
            FirstUse::Verify => 0,
            FirstUse::AssumeClean | FirstUse::AdoptFrom(_) => VERIFIED,
        },
        scrub_cursor: VERIFIED,
        scrubbed_at: 0,
        members,
        history: History::new(first),
        growing: None,
    })
}

/// Marks what the first use of the images says of them: all others are behind the one that is
/// adopted.
pub fn mark(first_use: FirstUse, replicas: usize, marks: &Marks) {
    for replica in (0..replicas).map(ReplicaId::new) {
        if !is_current(first_use, replica) {
            marks.set_all(Bitmap::Behind(replica));
        }
    }
}

fn is_current(first_use: FirstUse, replica: ReplicaId) -> bool {
    match first_use {
        FirstUse::Verify | FirstUse::AssumeClean => true,
        FirstUse::AdoptFrom(right) => replica == right,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn superblock_says_what_the_first_use_means() {
        let geometry = Geometry::new(1 << 20, 8).unwrap();
        let policy = Policy::new(3);
        let prints = [Fingerprint::default(); 3];
        let ids = RunIds::new().unwrap();
        let of = |first_use| superblock(&geometry, &policy, first_use, ids, &prints).unwrap();
        let verify = of(FirstUse::Verify);
        verify.check().unwrap();
        assert_eq!((verify.replicas, verify.threshold), (3, 2));
        assert_eq!(verify.verify_cursor, 0);
        assert!(verify.clean && !verify.assume_clean);
        assert_eq!(verify.members[3], Member::default());
        assert_ne!(verify.members[0].uuid, verify.members[1].uuid);
        assert_ne!(verify.disk, of(FirstUse::Verify).disk);
        let assumed = of(FirstUse::AssumeClean);
        assert!(assumed.assume_clean);
        assert_eq!(assumed.verify_cursor, VERIFIED);
        let adopted = of(FirstUse::AdoptFrom(ReplicaId::new(1)));
        let states = adopted.members[..3].iter().map(|member| member.state);
        assert!(states.eq([
            MemberState::Syncing,
            MemberState::InSync,
            MemberState::Syncing
        ]));
        assert_eq!(adopted.members[0].epoch_in_sync, 0);
    }

    #[test]
    fn adopting_marks_the_others_behind_everywhere() {
        let marks = Marks::new(3, 10, true);
        mark(FirstUse::Verify, 3, &marks);
        assert_eq!(marks.count(Bitmap::Behind(ReplicaId::new(0))), 0);
        mark(FirstUse::AdoptFrom(ReplicaId::new(1)), 3, &marks);
        let counts = [0, 1, 2].map(|slot| marks.count(Bitmap::Behind(ReplicaId::new(slot))));
        assert_eq!(counts, [10, 0, 10]);
    }

    #[test]
    fn boot_id_is_that_of_the_kernel() {
        let text = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
        let uuid = DiskUuid(boot_id()).to_string();
        assert_eq!(uuid, text.trim_end());
        assert_eq!(parse_uuid("x"), None);
    }
}
