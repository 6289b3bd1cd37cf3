// SPDX-License-Identifier: Apache-2.0
//! How many faults a replica may have in how much time (CONSISTENCY section 10).

use std::time::Duration;

use super::KeeperConfig;
use crate::units::Time;

/// Parts of a window. Faults are counted per part, so that memory does not grow with them; a window
/// is exact to one part.
const PARTS: usize = 60;

const MINUTE: Duration = Duration::from_secs(60);
const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// What counts against a replica. Nothing the guest or its front-end does is among it (rule G2).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Fault {
    /// A write or a repair failed.
    WriteError,
    /// It was kicked.
    Kick,
    /// This many sectors of it were repaired.
    Repaired(u32),
}

/// How much of a budget is spent.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Spent {
    /// Less than half.
    Little,
    /// Half.
    Half,
    /// All of it.
    All,
}

/// A count of what happened in the last while.
struct Window {
    limit: u32,
    part_ns: u64,
    parts: [u32; PARTS],
    /// Number of the part that was counted in last, from the origin of time.
    last: u64,
}

impl Window {
    fn new(limit: u32, length: Duration) -> Self {
        let length_ns = u64::try_from(length.as_nanos()).expect("a day at most");
        Self {
            limit,
            part_ns: length_ns / PARTS as u64,
            parts: [0; PARTS],
            last: 0,
        }
    }

    /// Forgets what is older than the window.
    fn advance(&mut self, now: Time) {
        let part = now.nanos() / self.part_ns;
        let passed = part.saturating_sub(self.last).min(PARTS as u64);
        for ago in 0..passed {
            self.parts[Self::place(part - ago)] = 0;
        }
        self.last = self.last.max(part);
    }

    fn place(part: u64) -> usize {
        usize::try_from(part % PARTS as u64).expect("less than PARTS")
    }

    fn add(&mut self, now: Time, count: u32) {
        self.advance(now);
        let part = &mut self.parts[Self::place(self.last)];
        *part = part.saturating_add(count);
    }

    fn count(&mut self, now: Time) -> u64 {
        self.advance(now);
        self.parts.iter().map(|&count| u64::from(count)).sum()
    }

    fn spent(&mut self, now: Time) -> Spent {
        let (count, limit) = (self.count(now), u64::from(self.limit));
        if limit == 0 || 2 * count < limit {
            Spent::Little
        } else if count < limit {
            Spent::Half
        } else {
            Spent::All
        }
    }
}

/// The budgets of one replica.
pub(super) struct Budgets {
    write_errors: Window,
    kicks: Window,
    repairs: Window,
}

impl Budgets {
    pub(super) fn new(config: &KeeperConfig) -> Self {
        Self {
            write_errors: Window::new(config.write_errors_max, MINUTE),
            kicks: Window::new(config.kicks_max, MINUTE),
            repairs: Window::new(config.repairs_max, DAY),
        }
    }

    pub(super) fn note(&mut self, now: Time, fault: Fault) {
        match fault {
            Fault::WriteError => self.write_errors.add(now, 1),
            Fault::Kick => self.kicks.add(now, 1),
            Fault::Repaired(sectors) => self.repairs.add(now, sectors),
        }
    }

    /// The most spent of the budgets.
    pub(super) fn spent(&mut self, now: Time) -> Spent {
        let windows = [&mut self.write_errors, &mut self.kicks, &mut self.repairs];
        let spent = windows.map(|window| window.spent(now));
        spent.into_iter().max().expect("three windows")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> Time {
        Time::from_nanos(seconds * 1_000_000_000)
    }

    fn spent(faults: &[(u64, Fault)], when: u64) -> Spent {
        let mut budgets = Budgets::new(&KeeperConfig::default());
        for &(seconds, fault) in faults {
            budgets.note(at(seconds), fault);
        }
        budgets.spent(at(when))
    }

    #[test]
    fn budgets_are_spent_by_the_numbers_of_the_rule() {
        let errors = |count: usize| vec![(100, Fault::WriteError); count];
        let kicks = |count: usize| vec![(100, Fault::Kick); count];
        let hour = 3600;
        let cases = [
            (errors(7), 100, Spent::Little),
            (errors(8), 100, Spent::Half),
            (errors(15), 159, Spent::Half),
            (errors(16), 159, Spent::All),
            (errors(16), 160, Spent::Little),
            (kicks(1), 100, Spent::Little),
            (kicks(2), 100, Spent::Half),
            (kicks(3), 159, Spent::Half),
            (kicks(4), 159, Spent::All),
            (kicks(4), 161, Spent::Little),
            (vec![(1, Fault::Repaired(127))], 1, Spent::Little),
            (vec![(1, Fault::Repaired(128))], 1, Spent::Half),
            (
                vec![(1, Fault::Repaired(200)), (20 * hour, Fault::Repaired(56))],
                23 * hour,
                Spent::All,
            ),
            (
                vec![(1, Fault::Repaired(200)), (20 * hour, Fault::Repaired(56))],
                25 * hour,
                Spent::Little,
            ),
        ];
        for (faults, when, expected) in cases {
            assert_eq!(spent(&faults, when), expected, "{faults:?} at {when}");
        }
    }

    #[test]
    fn budget_of_zero_is_never_spent() {
        let config = KeeperConfig {
            write_errors_max: 0,
            kicks_max: 1,
            ..KeeperConfig::default()
        };
        let mut budgets = Budgets::new(&config);
        for _ in 0..1000 {
            budgets.note(at(5), Fault::WriteError);
        }
        assert_eq!(budgets.spent(at(5)), Spent::Little);
        budgets.note(at(5), Fault::Kick);
        assert_eq!(budgets.spent(at(5)), Spent::All);
    }
}
