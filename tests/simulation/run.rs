// SPDX-License-Identifier: Apache-2.0
//! Running profiles: the quick set, the long one, the replay of a failure.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use crate::lives;
use crate::profile::{self, Profile};
use crate::trace::{Tally, Violation};
use crate::world::{Broken, World};

/// A run that went wrong, and how to see it again.
pub struct Failure {
    pub violation: Violation,
    profile: &'static str,
    seed: u64,
    step: u64,
    trace: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.trace)?;
        writeln!(
            f,
            "{} does not hold: {}\nprofile {}, seed {}, step {}; to replay:\n\
             SIM_SEED={} SIM_PROFILE={} cargo test --release --test simulation replay -- --nocapture",
            self.violation.rule,
            self.violation.what,
            self.profile,
            self.seed,
            self.step,
            self.seed,
            self.profile,
        )
    }
}

impl fmt::Debug for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// One run. A panic of the core is a failure like any other.
pub fn simulate(profile: Profile, seed: u64, broken: Broken) -> Result<Tally, Box<Failure>> {
    let mut world = World::new(profile, seed, profile.requests, broken);
    let violation = match catch_unwind(AssertUnwindSafe(|| world.run())) {
        Ok(Ok(())) => return Ok(world.tally),
        Ok(Err(violation)) => violation,
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string));
            Violation {
                rule: "panic",
                what: text.unwrap_or_else(|| "of unknown kind".to_owned()),
            }
        }
    };
    Err(Box::new(Failure {
        violation,
        profile: profile.name,
        seed,
        step: world.step,
        trace: world.trace.to_string(),
    }))
}

/// Runs of one profile until that many requests were made.
fn campaign(profile: Profile, requests: u64, first_seed: u64) -> Tally {
    let started = Instant::now();
    let mut tally = Tally::default();
    let mut seed = first_seed;
    while tally.of("requests") < requests {
        match simulate(profile, seed, Broken::default()) {
            Ok(run) => tally.merge(&run),
            Err(failure) => panic!("{failure}"),
        }
        seed += 1;
    }
    let rate = tally.of("requests") as f64 / started.elapsed().as_secs_f64();
    println!("{}: {rate:.0} requests/s\n{tally}", profile.name);
    tally
}

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{name}={text} is not a number")),
    )
}

/// What the quick set must have met at least this often, so that a run that exercises nothing is
/// seen. A long run meets more.
const EXERCISED: [(&str, u64); 29] = [
    ("requests", 5_000_000),
    ("flushes", 10_000),
    ("deferred replies", 100_000),
    ("stalled requests", 10_000),
    ("early replies", 1_000_000),
    ("starved requests", 10_000),
    ("arbitrations", 50_000),
    ("bad reports", 5_000),
    ("repairs", 3_000),
    ("failed repairs", 5),
    ("transient differences", 1_000),
    ("behind marks", 1_000),
    ("failed flushes", 200),
    ("I/O errors", 1_000),
    ("reads without laggard", 1_000),
    ("read error", 1_000),
    ("short read", 1_000),
    ("garbled read", 1_000),
    ("unreadable sector", 1_000),
    ("rot", 1_000),
    ("write error", 1_000),
    ("lost write", 500),
    ("torn write", 500),
    ("misdirected write", 200),
    ("late write", 500),
    ("hung operation", 1_000),
    ("slow write", 200),
    ("flush error", 50),
    ("hung flush", 50),
];

/// The same for runs with a record.
const EXERCISED_REMEMBERED: [(&str, u64); 22] = [
    ("requests", 5_000_000),
    ("starts", 5_000),
    ("kills", 4_000),
    ("clean stops", 500),
    ("record writes", 100_000),
    ("extents cleaned", 50_000),
    ("extents resynced", 20_000),
    ("reconciliations", 50_000),
    ("checks", 10_000),
    ("probes", 20),
    ("choices", 1_000),
    ("kicks", 500),
    ("lagging", 1),
    ("members gone", 350),
    ("members back", 1_000),
    ("members left out", 200),
    ("members changed", 10),
    ("copies left out", 50),
    ("copies back", 500),
    ("copy lost", 200),
    ("copy full", 10),
    ("record write error", 20),
];

/// The same for runs in which power is lost as well.
const EXERCISED_HARD: [(&str, u64); 18] = [
    ("requests", 5_000_000),
    ("starts", 45_000),
    ("kills", 20_000),
    ("power losses", 10_000),
    ("clean stops", 2_000),
    ("extents cleaned", 50_000),
    ("extents resynced", 50_000),
    ("choices", 5_000),
    ("kicks", 500),
    ("members gone", 5_000),
    ("members left out", 5_000),
    ("members changed", 100),
    ("copies left out", 500),
    ("copy lost", 1_000),
    ("copy missing", 5_000),
    ("record write hangs", 100),
    ("records lost", 100),
    ("members replaced", 100),
];

/// The same for runs in which the guest outlives the daemon.
const EXERCISED_WARM: [(&str, u64); 4] = [
    ("requests", 2_500_000),
    ("warm starts", 20_000),
    ("re-executed", 500_000),
    ("re-executed overlapping", 200_000),
];

/// Requests of each test. Unoptimised builds make fewer.
const QUICK: u64 = if cfg!(debug_assertions) {
    100_000
} else {
    5_200_000
};

/// Runs of all these profiles, until together they have made a test's share of requests.
fn campaigns(profiles: &[Profile], exercised: &[(&str, u64)]) {
    // The tests share the requests that are wanted.
    let requests = number("SIM_REQUESTS").map_or(QUICK, |all| all / 3);
    let seed = number("SIM_SEED").unwrap_or(1);
    let only = std::env::var("SIM_PROFILE").ok();
    let started = Instant::now();
    let mut total = Tally::default();
    for &profile in profiles {
        if only.as_ref().is_none_or(|only| only == profile.name) {
            let share = match only {
                Some(_) => requests,
                None => requests / profiles.len() as u64,
            };
            total.merge(&campaign(profile, share, seed));
        }
    }
    let seconds = started.elapsed().as_secs_f64();
    println!("together, from seed {seed}: {seconds:.1} s\n{total}");
    if only.is_none() && requests >= 5_000_000 {
        for &(what, least) in exercised {
            let met = total.of(what);
            assert!(met >= least, "{what}: {met}, expected at least {least}");
        }
    }
}

#[test]
fn all_profiles_hold_every_invariant() {
    campaigns(&profile::ALL, &EXERCISED);
}

#[test]
fn remembered_lives_hold_every_invariant() {
    campaigns(&lives::REMEMBERED, &EXERCISED_REMEMBERED);
}

#[test]
fn hard_lives_hold_every_invariant() {
    campaigns(&lives::HARD, &EXERCISED_HARD);
}

#[test]
fn warm_lives_hold_every_invariant() {
    campaigns(&lives::WARM, &EXERCISED_WARM);
}

/// Beyond the budget nothing is promised but that whatever is silently wrong has its reason: more
/// bad copies of that very sector than any quorum survives.
#[test]
fn beyond_the_budget_wrong_data_have_a_reason() {
    let exercised = [("silently wrong sectors", 1), ("I/O errors", 100)];
    campaigns(&lives::BEYOND_ALL, &exercised);
}

/// Repeats one run: SIM_SEED, SIM_PROFILE.
#[test]
fn replay() {
    let (Some(seed), Ok(name)) = (number("SIM_SEED"), std::env::var("SIM_PROFILE")) else {
        return;
    };
    let mut known = profile::ALL
        .into_iter()
        .chain(lives::REMEMBERED)
        .chain(lives::HARD)
        .chain(lives::WARM)
        .chain(lives::BEYOND_ALL);
    let profile = known.find(|p| p.name == name);
    let profile = profile.unwrap_or_else(|| panic!("there is no profile {name}"));
    match simulate(profile, seed, Broken::default()) {
        Ok(tally) => println!("{name}, seed {seed}: nothing wrong\n{tally}"),
        Err(failure) => panic!("{failure}"),
    }
}
