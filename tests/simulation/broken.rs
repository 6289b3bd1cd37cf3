// SPDX-License-Identifier: Apache-2.0
//! Broken builds: the core with one rule broken on purpose, which the simulator must notice. A
//! check that has never failed is not known to look.

use crate::profile::{ERRORS, FLUSHES, HEALTHY, MIXED, Profile, QUIET, Rates, SILENT, SLOW, STORM};
use crate::quorum::Mutation;
use crate::run::simulate;
use crate::world::{Breach, Broken};

/// Blocks that cannot be read in so many places that a range meets several.
const BAD_BLOCKS: Profile = Profile {
    name: "bad-blocks",
    rates: Rates {
        unreadable: 20_000,
        ..QUIET
    },
    ..ERRORS
};

/// Runs of each profile before a broken rule counts as unnoticed.
const SEEDS: u64 = 40;

/// Requests of such a run; what is broken shows early.
const REQUESTS: u64 = 4_000;

/// Repairs that are lost, for the rule that they are read back.
const LOSSES: Profile = Profile {
    name: "losses",
    rates: Rates {
        write_lost: 100_000,
        rot: 20_000,
        ..QUIET
    },
    ..SILENT
};

/// Nothing but rot, and reads that notice it late.
const ROT: Profile = Profile {
    name: "rot",
    rates: Rates {
        rot: 20_000,
        ..QUIET
    },
    mix: [1000, 0, 0, 0],
    ..SILENT
};

/// Whether the profiles hold every invariant while nothing is broken.
pub fn hold_unbroken(profiles: &[Profile]) {
    for &profile in profiles {
        for seed in 1..=SEEDS {
            let profile = Profile {
                requests: REQUESTS,
                ..profile
            };
            if let Err(failure) = simulate(profile, seed, Broken::default()) {
                panic!("{failure}");
            }
        }
    }
}

#[test]
fn profiles_of_broken_builds_hold_when_nothing_is_broken() {
    hold_unbroken(&[LOSSES, ROT, BAD_BLOCKS]);
}

/// Breaks a rule in random runs until one of `rules` is seen broken.
pub fn is_noticed(broken: Broken, profiles: &[Profile], rules: &[&str]) {
    for seed in 1..=SEEDS {
        for &profile in profiles {
            let profile = Profile {
                requests: REQUESTS,
                ..profile
            };
            let Err(failure) = simulate(profile, seed, broken) else {
                continue;
            };
            assert!(
                rules.contains(&failure.violation.rule),
                "{broken:?} was noticed by another check than {rules:?}:\n{failure}"
            );
            println!(
                "{broken:?}: noticed by {} (profile {}, seed {seed}): {}",
                failure.violation.rule, profile.name, failure.violation.what
            );
            return;
        }
    }
    panic!("{broken:?} was not noticed in {SEEDS} runs of each profile");
}

pub fn mutation_is_noticed(mutation: Mutation, profiles: &[Profile], rules: &[&str]) {
    let broken = Broken {
        mutation: Some(mutation),
        ..Broken::default()
    };
    is_noticed(broken, profiles, rules);
}

pub fn breach_is_noticed(breach: Breach, profiles: &[Profile], rules: &[&str]) {
    let broken = Broken {
        breach: Some(breach),
        ..Broken::default()
    };
    is_noticed(broken, profiles, rules);
}

#[test]
fn v1_replicas_behind_that_vote_are_noticed() {
    mutation_is_noticed(Mutation::BehindVotes, &[ERRORS], &["I6"]);
}

#[test]
fn v2_reply_below_threshold_is_noticed() {
    mutation_is_noticed(Mutation::EarlyReplyBelowThreshold, &[SILENT], &["I1"]);
}

#[test]
fn v4_bad_block_that_silences_a_range_is_noticed() {
    mutation_is_noticed(Mutation::OneBadBlockSilences, &[BAD_BLOCKS], &["I14"]);
}

#[test]
fn v5_missing_arbitration_is_noticed() {
    mutation_is_noticed(Mutation::NoArbitration, &[SILENT, ERRORS], &["I14"]);
}

#[test]
fn v7_late_ballots_not_looked_at_are_noticed() {
    mutation_is_noticed(Mutation::LateBallotsIgnored, &[ROT], &["I9"]);
}

#[test]
fn v7_buffers_given_back_early_are_noticed() {
    mutation_is_noticed(Mutation::BuffersGivenBackEarly, &[HEALTHY], &["V7"]);
}

#[test]
fn l1_writes_without_lock_are_noticed() {
    mutation_is_noticed(Mutation::WritesUnordered, &[HEALTHY], &["I10", "L3"]);
}

#[test]
fn l3_lock_released_before_publication_is_noticed() {
    mutation_is_noticed(Mutation::LockReleasedBeforePublication, &[HEALTHY], &["L3"]);
}

#[test]
fn q3_deferral_ignored_is_noticed() {
    mutation_is_noticed(Mutation::DeferredIgnored, &[SILENT, MIXED], &["I14"]);
}

#[test]
fn l1_parts_queued_for_one_by_one_are_noticed() {
    breach_is_noticed(Breach::PartsNotAnnounced, &[HEALTHY], &["I14", "I1", "I2"]);
}

#[test]
fn l4_guest_memory_written_uncopied_is_noticed() {
    let rules = ["I1", "I2", "I14", "I15"];
    breach_is_noticed(Breach::GuestMemoryNotCopied, &[HEALTHY], &rules);
}

#[test]
fn w3_write_to_replica_behind_is_noticed() {
    mutation_is_noticed(Mutation::WriteClearsBehind, &[ERRORS], &["W3"]);
}

#[test]
fn w4_acknowledgement_below_threshold_is_noticed() {
    mutation_is_noticed(Mutation::AcknowledgeBelowThreshold, &[HEALTHY], &["I2"]);
}

#[test]
fn w5_failed_write_not_marked_is_noticed() {
    mutation_is_noticed(Mutation::FailedWriteNotMarked, &[ERRORS], &["I2"]);
}

#[test]
fn w6_late_write_not_marked_is_noticed() {
    mutation_is_noticed(Mutation::LateWriteNotMarked, &[SLOW], &["I2"]);
}

#[test]
fn w7_failed_write_not_unresolved_is_noticed() {
    mutation_is_noticed(Mutation::FailedWriteNotUnresolved, &[STORM], &["I14", "I1"]);
}

#[test]
fn f2_failed_flush_not_marked_is_noticed() {
    mutation_is_noticed(Mutation::FailedFlushNotMarked, &[FLUSHES, MIXED], &["F2"]);
}

#[test]
fn y2_repair_without_lock_is_noticed() {
    mutation_is_noticed(Mutation::RepairUnlocked, &[SILENT], &["I10", "I15"]);
}

#[test]
fn y4_repair_not_read_back_is_noticed() {
    mutation_is_noticed(Mutation::RepairNotReadBack, &[LOSSES], &["Y4"]);
}
