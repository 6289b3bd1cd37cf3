// SPDX-License-Identifier: Apache-2.0
//! Broken builds of warm starts: what is in flight when a daemon is killed, and what the next one
//! makes of it (rules L3, Q1, Q2, Y3).

use crate::broken::{breach_is_noticed, hold_unbroken, is_noticed};
use crate::lives::{SILENT_KILLS, WARM};
use crate::profile::{Lives, Profile, QUIET, Rates};
use crate::quorum::Mutation;
use crate::world::{Breach, Broken};

/// Nothing goes wrong but that daemons are killed, often; the front-end lives on.
const KILLED: Profile = Profile {
    name: "killed",
    replicas: &[3],
    life: Some(Lives {
        steps: 400,
        warm: 1000,
        volatile: false,
        stops: 0,
        ..match WARM[0].life {
            Some(life) => life,
            None => panic!("a profile with a record"),
        }
    }),
    mix: [300, 40, 30, 10],
    ..WARM[0]
};

/// Copies rot while daemons are killed.
const ROTTEN: Profile = Profile {
    name: "rotten",
    replicas: &[3],
    rates: Rates {
        write_lost: 2_000,
        write_torn: 2_000,
        rot: 300_000,
        ..QUIET
    },
    life: KILLED.life,
    mix: KILLED.mix,
    ..SILENT_KILLS
};

#[test]
fn profiles_of_broken_warm_starts_hold_when_nothing_is_broken() {
    hold_unbroken(&[KILLED, ROTTEN]);
}

#[test]
fn l3_mark_cleared_after_the_lock_is_noticed() {
    breach_is_noticed(Breach::MarksClearedLate, &[KILLED], &["I1", "I8", "I11"]);
}

/// A lock that is given back before the publication costs an acknowledged write, even where nobody
/// sees it happen.
#[test]
fn l3_lock_released_before_publication_loses_a_write() {
    let broken = Broken {
        mutation: Some(Mutation::LockReleasedBeforePublication),
        unseen: true,
        ..Broken::default()
    };
    is_noticed(broken, &[KILLED], &["I1", "I8", "I4"]);
}

#[test]
fn q1_last_batch_forgotten_is_noticed() {
    breach_is_noticed(Breach::LastBatchForgotten, &[KILLED], &["I11"]);
}

#[test]
fn q2_marks_ignored_is_noticed() {
    breach_is_noticed(Breach::MarksIgnored, &[KILLED], &["I11", "I8"]);
}

#[test]
fn q2_repeats_after_new_requests_are_noticed() {
    breach_is_noticed(Breach::RepeatsComeLast, &[KILLED], &["I1", "I8", "I4"]);
}

#[test]
fn q2_repeats_out_of_order_are_noticed() {
    breach_is_noticed(Breach::RepeatsOutOfOrder, &[KILLED], &["I1", "I8", "I4"]);
}
