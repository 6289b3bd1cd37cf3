// SPDX-License-Identifier: Apache-2.0
//! Broken builds of what the disk remembers: rules of the record, of starts, of resync. The counter
//! c(i) has a script of its own (`scripted`).

use crate::broken::{breach_is_noticed, hold_unbroken, is_noticed, mutation_is_noticed};
use crate::lives::{FAULTY, FAULTY_KILLS, HASTY, KILLS, POWER, SILENT_KILLS};
use crate::profile::{Lives, Profile, QUIET, Rates};
use crate::quorum::Mutation;
use crate::record::RecordMutation;
use crate::world::{Breach, Broken};

/// Flushes that fail.
const FLUSHES: Profile = Profile {
    name: "failing-flushes",
    rates: Rates {
        flush_error: 50_000,
        ..QUIET
    },
    mix: [300, 40, 30, 100],
    ..FAULTY_KILLS
};

/// Short lives, and nothing else that goes wrong.
const SHORT: Profile = Profile {
    name: "short",
    life: Some(Lives {
        steps: 400,
        power: 700,
        ..life(POWER)
    }),
    ..POWER
};

/// Every start has to do without some copies of the record, and some are slow.
const SCATTERED: Profile = Profile {
    name: "scattered",
    life: Some(Lives {
        copies: &[3],
        steps: 500,
        missing: 500_000,
        record_faults: 400_000,
        ..life(KILLS)
    }),
    ..KILLS
};

const fn life(profile: Profile) -> Lives {
    match profile.life {
        Some(life) => life,
        None => panic!("a profile with a record"),
    }
}

fn record_mutation_is_noticed(mutation: RecordMutation, profiles: &[Profile], rules: &[&str]) {
    let broken = Broken {
        record: Some(mutation),
        ..Broken::default()
    };
    is_noticed(broken, profiles, rules);
}

#[test]
fn profiles_of_broken_lives_hold_when_nothing_is_broken() {
    hold_unbroken(&[FLUSHES, SHORT, SCATTERED]);
}

#[test]
fn w2_write_before_intent_is_noticed() {
    mutation_is_noticed(Mutation::WriteBeforeIntent, &[KILLS], &["I3"]);
}

#[test]
fn w4_acknowledgement_before_behind_is_noticed() {
    mutation_is_noticed(Mutation::AcknowledgeBeforeBehind, &[FAULTY], &["I2"]);
}

#[test]
fn w8_clean_before_flush_is_noticed() {
    mutation_is_noticed(Mutation::CleanBeforeFlush, &[KILLS], &["I4"]);
}

#[test]
fn f3_forgotten_flush_error_is_noticed() {
    mutation_is_noticed(
        Mutation::FlushErrorForgotten,
        &[FLUSHES],
        &["I5", "F2", "I4", "Y5"],
    );
}

#[test]
fn f4_cache_kept_at_open_is_noticed() {
    breach_is_noticed(Breach::CacheKept, &[FLUSHES], &["I4", "Y5", "I5"]);
}

#[test]
fn r1_one_copy_is_not_enough() {
    let rules = ["I4", "I8", "I12", "I13", "R5"];
    let profiles = [SCATTERED, HASTY, POWER];
    record_mutation_is_noticed(RecordMutation::OneCopyIsEnough, &profiles, &rules);
}

#[test]
fn r4_slot_in_use_written_is_noticed() {
    record_mutation_is_noticed(RecordMutation::SlotInUseWritten, &[KILLS], &["I13"]);
}

#[test]
fn r5_copies_not_merged_is_noticed() {
    let rules = ["I4", "I8", "I13"];
    record_mutation_is_noticed(RecordMutation::CopiesNotMerged, &[HASTY, KILLS], &rules);
}

#[test]
fn r6_durable_when_submitted_is_noticed() {
    let rules = ["I4", "I8"];
    record_mutation_is_noticed(
        RecordMutation::DurableWhenSubmitted,
        &[HASTY, KILLS],
        &rules,
    );
}

#[test]
fn r7_epoch_not_raised_is_noticed() {
    record_mutation_is_noticed(RecordMutation::EpochNotRaised, &[KILLS], &["I12"]);
}

#[test]
fn s3_changed_member_believed_is_noticed() {
    breach_is_noticed(Breach::FingerprintIgnored, &[FAULTY_KILLS], &["I4"]);
}

#[test]
fn s4_dirty_extents_not_resolved_are_noticed() {
    breach_is_noticed(
        Breach::DirtyTrusted,
        &[KILLS, POWER],
        &["I1", "I4", "I8", "I14", "Y2", "Y5"],
    );
}

#[test]
fn y1_resolved_and_not_flushed_is_noticed() {
    let rules = ["I1", "I8", "I5"];
    mutation_is_noticed(Mutation::ResolveNotFlushed, &[SHORT, POWER], &rules);
}

#[test]
fn y3_first_replica_believed_is_noticed() {
    mutation_is_noticed(
        Mutation::FirstReplicaBelieved,
        &[SILENT_KILLS],
        &["I1", "I8", "Y5", "I4"],
    );
}

#[test]
fn y5_resynced_and_not_flushed_is_noticed() {
    mutation_is_noticed(Mutation::ResyncNotFlushed, &[FAULTY], &["Y5"]);
}

#[test]
fn k2_writes_that_outlive_their_daemon_are_noticed() {
    breach_is_noticed(
        Breach::FlightOutlivesLock,
        &[KILLS],
        &["I1", "I4", "I8", "I2", "I9", "Y2", "I5"],
    );
}
