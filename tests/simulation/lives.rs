// SPDX-License-Identifier: Apache-2.0
//! Kinds of runs with a state record: daemons that are killed, stopped and started again.

use crate::profile::{
    Ailment, ERRORS, FIFO, FLUSHES, HEALTHY, Lives, MINORITY, MIXED, Profile, QUIET, Rates, SILENT,
    SLOW, STORM,
};

/// Nobody leaves, nothing fails, nothing ends.
const PEACE: Lives = Lives {
    copies: &[1, 3, 3, 5],
    steps: 0,
    power: 0,
    stops: 0,
    warm: 0,
    volatile: true,
    leaves: 0,
    left_out: 0,
    replaced: 0,
    changed: 0,
    missing: 300_000,
    record_faults: 0,
    record_lost: false,
    single: false,
};

/// A daemon with a record, and no faults at all.
pub const RECORDED: Profile = Profile {
    name: "recorded",
    requests: 20_000,
    life: Some(PEACE),
    ..HEALTHY
};

/// Kills alone.
pub const KILLS: Profile = Profile {
    name: "kills",
    life: Some(Lives {
        steps: 2_500,
        stops: 100,
        ..PEACE
    }),
    ..RECORDED
};

/// Losses of power alone.
pub const POWER: Profile = Profile {
    name: "power",
    life: Some(Lives {
        steps: 2_500,
        power: 600,
        stops: 100,
        ..PEACE
    }),
    mix: [500, 40, 30, 60],
    ..RECORDED
};

/// What a replica may do wrong without being silently wrong.
const LOUD: Rates = Rates {
    read_error: 1_000,
    read_short: 300,
    write_error: 1_000,
    hang: 50,
    slow: 500,
    flush_error: 5_000,
    flush_hang: 1_000,
    unreadable: 1_000,
    ..QUIET
};

/// One replica does what it can.
pub const FAULTY: Profile = Profile {
    name: "faulty",
    replicas: &[3, 3, 4, 5],
    rates: Rates {
        read_garbled: 300,
        write_lost: 300,
        write_torn: 300,
        write_misdirected: 300,
        write_late: 300,
        rot: 3_000,
        ..LOUD
    },
    life: Some(Lives {
        leaves: 1_000,
        record_faults: 2_000,
        single: true,
        ..PEACE
    }),
    mix: [500, 40, 30, 40],
    requests: 10_000,
    ..HEALTHY
};

/// The same, and kills.
pub const FAULTY_KILLS: Profile = Profile {
    name: "faulty-kills",
    life: Some(Lives {
        steps: 2_500,
        stops: 150,
        leaves: 1_000,
        left_out: 150_000,
        replaced: 100_000,
        changed: 300_000,
        record_faults: 2_000,
        single: true,
        ..PEACE
    }),
    ..FAULTY
};

/// Rot and writes that get lost, and kills.
pub const SILENT_KILLS: Profile = Profile {
    name: "silent-kills",
    rates: Rates {
        read_garbled: 1_000,
        write_lost: 1_000,
        write_torn: 500,
        write_misdirected: 500,
        rot: 10_000,
        ..QUIET
    },
    life: Some(Lives {
        steps: 2_500,
        stops: 50,
        ..PEACE
    }),
    ..FAULTY
};

/// Up to N-T replicas, and not always the same.
pub const ROTATING: Profile = Profile {
    name: "rotating",
    replicas: &[3, 4, 5, 5],
    ailment: Ailment::Slow,
    life: Some(Lives {
        steps: 2_500,
        stops: 100,
        leaves: 1_500,
        left_out: 100_000,
        replaced: 100_000,
        changed: 300_000,
        record_faults: 2_000,
        ..PEACE
    }),
    ..FAULTY
};

/// The same, and losses of power.
pub const ROTATING_POWER: Profile = Profile {
    name: "rotating-power",
    life: Some(Lives {
        steps: 2_500,
        power: 400,
        stops: 100,
        leaves: 1_500,
        left_out: 100_000,
        replaced: 100_000,
        changed: 300_000,
        record_faults: 2_000,
        ..PEACE
    }),
    ..ROTATING
};

/// Short lives: most daemons end during their start or the resync after it.
pub const HASTY: Profile = Profile {
    name: "hasty",
    rates: LOUD,
    life: Some(Lives {
        steps: 300,
        power: 300,
        stops: 50,
        leaves: 3_000,
        left_out: 200_000,
        changed: 300_000,
        record_faults: 10_000,
        ..PEACE
    }),
    requests: 4_000,
    ..ROTATING
};

/// Copies of the record that are slow, full, lost, missing, while members come and go.
pub const FORGETFUL: Profile = Profile {
    name: "forgetful",
    rates: Rates {
        write_error: 3_000,
        flush_error: 10_000,
        ..QUIET
    },
    ailment: Ailment::None,
    life: Some(Lives {
        copies: &[3, 3, 5],
        steps: 800,
        power: 300,
        stops: 50,
        leaves: 10_000,
        left_out: 150_000,
        replaced: 100_000,
        changed: 300_000,
        record_faults: 100_000,
        ..PEACE
    }),
    ..ROTATING
};

/// The same life for a profile whose front-end survives so many of a thousand kills.
const fn warm(profile: Profile, name: &'static str, warm: u64) -> Profile {
    let Some(life) = profile.life else {
        panic!("a profile with a record")
    };
    Profile {
        name,
        life: Some(Lives { warm, ..life }),
        ..profile
    }
}

/// More write errors than any quorum survives, and kills.
pub const STORM_KILLS: Profile = Profile {
    name: "storm-kills",
    life: Some(Lives {
        steps: 2_500,
        ..PEACE
    }),
    ..STORM
};

/// So many copies of the record fail that no mark can be set any more: writes fail, reads do not.
pub const RECORD_LOST: Profile = Profile {
    name: "record-lost",
    beyond_budget: true,
    life: Some(Lives {
        steps: 2_500,
        power: 300,
        record_faults: 100_000,
        record_lost: true,
        ..PEACE
    }),
    ..RECORDED
};

/// A profile of the time before records, with one.
const fn recorded(profile: Profile, name: &'static str) -> Profile {
    Profile {
        name,
        life: Some(PEACE),
        ..profile
    }
}

/// One bad copy more than any quorum survives.
pub const BEYOND: Profile = Profile {
    name: "beyond",
    replicas: &[3, 4, 5],
    excess: 1,
    rates: Rates {
        read_error: 2_000,
        read_garbled: 1_000,
        write_error: 1_000,
        write_lost: 1_000,
        write_torn: 500,
        flush_error: 2_000,
        rot: 300_000,
        unreadable: 4_000,
        ..QUIET
    },
    life: Some(PEACE),
    requests: 6_000,
    ..HEALTHY
};

/// The same, and kills and losses of power.
pub const BEYOND_POWER: Profile = Profile {
    name: "beyond-power",
    life: Some(Lives {
        steps: 2_500,
        power: 400,
        leaves: 1_500,
        left_out: 100_000,
        ..PEACE
    }),
    ..BEYOND
};

/// Runs in which nothing but the daemon is lost.
pub const REMEMBERED: [Profile; 14] = [
    RECORDED,
    KILLS,
    FAULTY,
    FAULTY_KILLS,
    SILENT_KILLS,
    STORM_KILLS,
    recorded(ERRORS, "errors-recorded"),
    recorded(SILENT, "silent-recorded"),
    recorded(MIXED, "mixed-recorded"),
    recorded(SLOW, "slow-recorded"),
    recorded(FLUSHES, "flushes-recorded"),
    recorded(STORM, "storm-recorded"),
    recorded(MINORITY, "minority-recorded"),
    recorded(FIFO, "fifo-recorded"),
];

/// Runs in which everything happens.
pub const HARD: [Profile; 6] = [
    POWER,
    ROTATING,
    ROTATING_POWER,
    HASTY,
    FORGETFUL,
    RECORD_LOST,
];

/// Runs in which front-ends live on when daemons are killed.
pub const WARM: [Profile; 6] = [
    warm(KILLS, "warm-kills", 900),
    warm(FAULTY_KILLS, "warm-faulty", 900),
    warm(SILENT_KILLS, "warm-silent", 900),
    warm(ROTATING, "warm-rotating", 1000),
    warm(ROTATING_POWER, "warm-rotating-power", 800),
    warm(HASTY, "warm-hasty", 800),
];

/// Runs with more bad copies than any quorum survives.
pub const BEYOND_ALL: [Profile; 2] = [BEYOND, BEYOND_POWER];
