// SPDX-License-Identifier: Apache-2.0
//! Kinds of runs with a state record: daemons that are killed, stopped and started again.

use crate::profile::{HEALTHY, Lives, Profile};

/// Kills alone, no faults.
pub const KILLS: Profile = Profile {
    name: "kills",
    requests: 20_000,
    life: Some(Lives {
        copies: &[1, 3, 3, 5],
        steps: 3_000,
        power: 0,
        stops: 100,
        volatile: true,
        leaves: 0,
        left_out: 0,
        changed: 0,
        record_faults: 0,
        single: false,
    }),
    ..HEALTHY
};

pub const ALL: [Profile; 1] = [KILLS];
