// SPDX-License-Identifier: Apache-2.0
//! Kinds of runs: what the disk looks like, what goes wrong, and what must not.

use std::time::Duration;

use crate::quorum::{Geometry, Policy, ReadPattern};
use crate::rng::Rng;

/// How often each fault is tried, per million operations (or guest requests where said). The
/// budget decides whether it happens.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Rates {
    pub read_error: u64,
    pub read_short: u64,
    /// One transfer is wrong, the medium is not.
    pub read_garbled: u64,
    pub write_error: u64,
    pub write_lost: u64,
    pub write_torn: u64,
    pub write_misdirected: u64,
    /// Called complete, but reaches the medium long after.
    pub write_late: u64,
    pub hang: u64,
    pub slow: u64,
    pub flush_error: u64,
    pub flush_hang: u64,
    /// Per guest request: content changes on its own.
    pub rot: u64,
    /// Per guest request: a sector cannot be read until it is rewritten.
    pub unreadable: u64,
}

/// What a whole replica suffers from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ailment {
    None,
    /// One replica is slow at everything.
    Slow,
    /// From some moment on one replica answers nothing.
    Hung,
}

/// How the daemon lives, where it has a state record and is ended and started again.
#[derive(Clone, Copy, Debug)]
pub struct Lives {
    /// K to choose from.
    pub copies: &'static [usize],
    /// Steps of a daemon, about; 0: one daemon lives all the run.
    pub steps: u64,
    /// Of a thousand ends: losses of power, clean stops. The rest are kills.
    pub power: u64,
    pub stops: u64,
    /// Of a thousand kills: the front-end lives on and hands back what was in flight (rule Q2). If
    /// there are any, what is in flight is tracked.
    pub warm: u64,
    /// Replicas have volatile caches.
    pub volatile: bool,
    /// Per million guest requests: a member leaves for a while.
    pub leaves: u64,
    /// Per million: a member is not there at a start.
    pub left_out: u64,
    /// Per million returns of a member: it is another one, that holds anything.
    pub replaced: u64,
    /// Per million clean stops: somebody changes a member.
    pub changed: u64,
    /// Per million starts: copies of the record are not there.
    pub missing: u64,
    /// Per million writes of the record.
    pub record_faults: u64,
    /// Also on so many copies that no majority is left: requests may fail then.
    pub record_lost: bool,
    /// One replica alone fails.
    pub single: bool,
}

/// A kind of run.
#[derive(Clone, Copy, Debug)]
pub struct Profile {
    pub name: &'static str,
    /// N to choose from.
    pub replicas: &'static [usize],
    /// T is this far above floor(N/2).
    pub threshold_above_half: usize,
    pub pattern: ReadPattern,
    pub repair: bool,
    pub rates: Rates,
    pub ailment: Ailment,
    /// Of a thousand guest requests: reads, zeroes, discards, flushes. The rest are writes.
    pub mix: [u64; 4],
    /// More write errors than any quorum survives; writes may fail, but nothing may go wrong.
    pub beyond_budget: bool,
    /// Copies that may be bad at once beyond what any quorum survives: requests may fail, and what
    /// is silently wrong is counted, if enough bad copies explain it.
    pub excess: usize,
    /// Guest requests of one run.
    pub requests: u64,
    /// If there is a record.
    pub life: Option<Lives>,
}

pub const QUIET: Rates = Rates {
    read_error: 0,
    read_short: 0,
    read_garbled: 0,
    write_error: 0,
    write_lost: 0,
    write_torn: 0,
    write_misdirected: 0,
    write_late: 0,
    hang: 0,
    slow: 0,
    flush_error: 0,
    flush_hang: 0,
    rot: 0,
    unreadable: 0,
};

const MIX: [u64; 4] = [550, 40, 30, 20];

pub const HEALTHY: Profile = Profile {
    name: "healthy",
    replicas: &[1, 2, 3, 3, 3, 4, 5],
    threshold_above_half: 1,
    pattern: ReadPattern::Quorum,
    repair: true,
    rates: QUIET,
    ailment: Ailment::None,
    mix: MIX,
    beyond_budget: false,
    excess: 0,
    requests: 20_000,
    life: None,
};

pub const ERRORS: Profile = Profile {
    name: "errors",
    replicas: &[3, 3, 4, 5],
    rates: Rates {
        read_error: 4_000,
        read_short: 2_000,
        write_error: 2_000,
        unreadable: 4_000,
        ..QUIET
    },
    requests: 6_000,
    ..HEALTHY
};

pub const SILENT: Profile = Profile {
    name: "silent",
    replicas: &[3, 3, 4, 5],
    rates: Rates {
        read_garbled: 2_000,
        write_lost: 1_000,
        write_torn: 1_000,
        write_misdirected: 1_000,
        write_late: 1_000,
        rot: 10_000,
        ..QUIET
    },
    requests: 10_000,
    ..HEALTHY
};

pub const MIXED: Profile = Profile {
    name: "mixed",
    replicas: &[3, 4, 5, 5],
    rates: Rates {
        read_error: 1_000,
        read_short: 500,
        read_garbled: 500,
        write_error: 300,
        write_lost: 500,
        write_torn: 500,
        write_misdirected: 500,
        write_late: 500,
        hang: 100,
        slow: 200,
        flush_error: 500,
        flush_hang: 500,
        rot: 4_000,
        unreadable: 2_000,
    },
    requests: 6_000,
    ..HEALTHY
};

pub const SLOW: Profile = Profile {
    name: "slow",
    replicas: &[3, 3, 5],
    rates: Rates {
        slow: 1_000,
        hang: 200,
        ..QUIET
    },
    ailment: Ailment::Slow,
    requests: 6_000,
    ..HEALTHY
};

pub const HUNG: Profile = Profile {
    name: "hung",
    replicas: &[3, 3, 5],
    rates: Rates {
        rot: 3_000,
        ..QUIET
    },
    ailment: Ailment::Hung,
    mix: [930, 10, 10, 5],
    requests: 20_000,
    ..HEALTHY
};

/// A replica that nobody ever writes to has no reason to fall behind, and is asked again and
/// again although it never answers.
pub const HUNG_READS: Profile = Profile {
    name: "hung-reads",
    rates: QUIET,
    mix: [1000, 0, 0, 0],
    requests: 150_000,
    ..HUNG
};

pub const FLUSHES: Profile = Profile {
    name: "flushes",
    replicas: &[3, 3, 4, 5],
    rates: Rates {
        flush_error: 20_000,
        flush_hang: 10_000,
        write_error: 100,
        ..QUIET
    },
    mix: [350, 40, 30, 200],
    requests: 3_000,
    ..HEALTHY
};

pub const STORM: Profile = Profile {
    name: "storm",
    replicas: &[2, 3, 3, 4, 5],
    rates: Rates {
        write_error: 400_000,
        ..QUIET
    },
    beyond_budget: true,
    requests: 6_000,
    ..HEALTHY
};

pub const MINORITY: Profile = Profile {
    name: "minority",
    replicas: &[4, 5],
    threshold_above_half: 0,
    rates: Rates {
        read_error: 2_000,
        read_garbled: 1_000,
        write_error: 500,
        write_lost: 500,
        rot: 5_000,
        ..QUIET
    },
    requests: 6_000,
    ..HEALTHY
};

pub const FIFO: Profile = Profile {
    name: "fifo",
    replicas: &[2, 3, 4],
    threshold_above_half: 0,
    pattern: ReadPattern::Fifo,
    rates: Rates {
        read_error: 4_000,
        read_short: 2_000,
        write_error: 1_000,
        slow: 200,
        unreadable: 2_000,
        ..QUIET
    },
    requests: 6_000,
    ..HEALTHY
};

pub const REPORT_ONLY: Profile = Profile {
    name: "report-only",
    repair: false,
    ..SILENT
};

pub const ALL: [Profile; 12] = [
    HEALTHY,
    ERRORS,
    SILENT,
    MIXED,
    SLOW,
    HUNG,
    HUNG_READS,
    FLUSHES,
    STORM,
    MINORITY,
    FIFO,
    REPORT_ONLY,
];

/// The disk of one run.
pub struct Shape {
    pub geometry: Geometry,
    pub policy: Policy,
    pub lanes: usize,
    /// Requests a lane has at once.
    pub depth: usize,
    /// Buffers of a lane for guest requests.
    pub buffers: usize,
}

impl Profile {
    /// Whether no replica ever fails in this kind of run (invariant I15).
    pub fn is_faultless(&self) -> bool {
        let ends = self.life.is_some_and(|life| life.steps > 0);
        self.rates == QUIET && self.ailment == Ailment::None && !ends
    }

    /// Whether the front-end keeps a record of what is in flight.
    pub fn is_tracked(&self) -> bool {
        self.life.is_some_and(|life| life.warm > 0)
    }

    /// Copies that may be bad at once. A minority threshold decides by the larger group, and two
    /// bad copies could be equally bad.
    pub fn budget(&self, policy: &Policy) -> usize {
        let spare = policy.replicas - policy.threshold;
        if self.pattern == ReadPattern::Quorum && !policy.majority() {
            spare.min(1) + self.excess
        } else {
            spare + self.excess
        }
    }

    pub fn shape(&self, rng: &mut Rng) -> Shape {
        let replicas = rng.pick(self.replicas);
        let mut policy = Policy::new(replicas);
        policy.threshold = replicas / 2 + self.threshold_above_half;
        policy.allow_minority_threshold = self.threshold_above_half == 0;
        policy.read_pattern = self.pattern;
        policy.repair = self.repair;
        policy.discard_zeroes = rng.chance(700_000);
        policy.write_grace_min = Duration::from_millis(20);
        policy.write_grace_max = Duration::from_millis(100);
        policy.flush_grace = Duration::from_millis(200);
        // Operations hang for the rest of the run, and cost no more than what they are meant to.
        policy.io_timeout = match self.life {
            None => Duration::from_secs(3600),
            Some(_) => Duration::from_secs(1),
        };
        let block_sectors = rng.pick(&[1, 1, 8]);
        let sectors = rng.pick(&[64, 128, 256, 512]);
        let extent_shift = rng.pick(&[4, 5, 6]);
        let geometry = Geometry::with_extent_shift(sectors, block_sectors, extent_shift)
            .expect("a whole number of blocks");
        let depth = rng.pick(&[1, 4, 16, 32]);
        Shape {
            geometry,
            lanes: rng.pick(&[1, 2, 3, 4]),
            depth,
            buffers: rng.pick(&[0, 16, 96]) + 2 * replicas,
            policy,
        }
    }
}
