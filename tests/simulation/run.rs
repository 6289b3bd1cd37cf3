// SPDX-License-Identifier: Apache-2.0
//! Running profiles: the quick set, the long one, the replay of a failure.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

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

#[test]
fn campaign_of_all_profiles_holds_every_invariant() {
    let requests = number("SIM_REQUESTS").unwrap_or(5_200_000);
    let seed = number("SIM_SEED").unwrap_or(1);
    let started = Instant::now();
    let mut total = Tally::default();
    let only = std::env::var("SIM_PROFILE").ok();
    for profile in profile::ALL {
        if only.as_ref().is_some_and(|only| only != profile.name) {
            continue;
        }
        let share = requests / profile::ALL.len() as u64;
        total.merge(&campaign(profile, share, seed));
    }
    let seconds = started.elapsed().as_secs_f64();
    println!("all profiles: {seconds:.1} s\n{total}");
}

/// Repeats one run: SIM_SEED, SIM_PROFILE.
#[test]
fn replay() {
    let (Some(seed), Ok(name)) = (number("SIM_SEED"), std::env::var("SIM_PROFILE")) else {
        return;
    };
    let profile = profile::ALL.into_iter().find(|p| p.name == name);
    let profile = profile.unwrap_or_else(|| panic!("there is no profile {name}"));
    match simulate(profile, seed, Broken::default()) {
        Ok(tally) => println!("{name}, seed {seed}: nothing wrong\n{tally}"),
        Err(failure) => panic!("{failure}"),
    }
}
