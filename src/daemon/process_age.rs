// SPDX-License-Identifier: Apache-2.0
//! How long ago this process began: what a guest waits for after its daemon was replaced begins
//! with the process, not with the first line of our code.
//!
//! The kernel knows the moment (field 22 of /proc/self/stat, proc_pid_stat(5)): that of the fork,
//! which an exec follows at once where a service manager starts a program. It is told in ticks of
//! 10 ms and rounded down, so the age is up to 10 ms too long, never too short.

use std::fs;
use std::time::Duration;

use rustix::param::clock_ticks_per_second;
use rustix::time::{ClockId, clock_gettime};

/// Fields of the line before the moment of the start, counted behind the name, which may hold
/// blanks and brackets itself.
const FIELDS_BEFORE: usize = 19;

/// The age of this process. `None` where /proc is not there.
#[must_use]
pub fn process_age() -> Option<Duration> {
    let begun = since_boot(&fs::read_to_string("/proc/self/stat").ok()?)?;
    let now = clock_gettime(ClockId::Boottime);
    let seconds = u64::try_from(now.tv_sec).ok()?;
    let nanos = u32::try_from(now.tv_nsec).ok()?;
    Some(Duration::new(seconds, nanos).saturating_sub(begun))
}

/// When a process began, by its line in /proc: a time on the clock that began with the host.
fn since_boot(stat: &str) -> Option<Duration> {
    let (_, behind_name) = stat.rsplit_once(')')?;
    let ticks: u64 = (behind_name.split_whitespace().nth(FIELDS_BEFORE)?)
        .parse()
        .ok()?;
    let each = 1_000_000_000 / clock_ticks_per_second();
    Some(Duration::from_nanos(ticks.checked_mul(each)?))
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn moment_is_found_behind_any_name() {
        let line = "7 (a) b (c) S 1 7 7 0 -1 4194304 85 0 0 0 0 0 0 0 20 0 1 0 1234 5 6\n";
        assert_eq!(since_boot(line), Some(Duration::from_millis(12_340)));
        assert_eq!(since_boot("7 (a) S 1"), None);
        assert_eq!(since_boot(""), None);
    }

    #[test]
    fn age_grows_with_the_time() {
        let before = process_age().unwrap();
        thread::sleep(Duration::from_millis(20));
        let grown = process_age().unwrap() - before;
        assert!(grown >= Duration::from_millis(20), "{grown:?}");
    }
}
