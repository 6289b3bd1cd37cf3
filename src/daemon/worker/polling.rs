// SPDX-License-Identifier: Apache-2.0
//! Whether a worker with nothing to do looks again at once, or sleeps.
//!
//! Sleeping and being woken costs some microseconds at each end of a request, which is much beside
//! a fast replica and nothing beside a slow one. The worker measures how long it had nothing to
//! do: as long as that is short, it looks for as long as the next thing usually takes, and the
//! first pause that is not short ends it. An idle disk takes no processor time.

use std::time::Duration;

use crate::config::Polling;
use crate::units::Time;

/// Pauses up to this long are looked through: longer ones are those of storage or guests that a
/// few microseconds make no difference to.
const WORTH_MAX: Duration = Duration::from_micros(100);

/// Short pauses in a row before looking begins, less those that were not short (which count
/// [`LONG_PAUSE_COST`] times).
const BEGIN_AT: u32 = 8;

/// What the count of short pauses goes up to: so many a long one more or less does not end it.
const COUNT_MAX: u32 = 16;

/// A long pause costs as much as so many short ones bring.
const LONG_PAUSE_COST: u32 = 4;

/// Decides, for one worker.
#[derive(Debug)]
pub(super) struct Poller {
    polling: Polling,
    /// Since when there has been nothing to do.
    idle_since: Option<Time>,
    /// Short pauses lately.
    short_pauses: u32,
}

impl Poller {
    pub(super) fn new(polling: Polling) -> Self {
        Self {
            polling,
            idle_since: None,
            short_pauses: 0,
        }
    }

    /// There was something to do at `now`.
    pub(super) fn found(&mut self, now: Time) {
        let Some(since) = self.idle_since.take() else {
            return;
        };
        self.short_pauses = if now.since(since) <= WORTH_MAX {
            (self.short_pauses + 1).min(COUNT_MAX)
        } else {
            self.short_pauses.saturating_sub(LONG_PAUSE_COST)
        };
    }

    /// There was nothing to do at `now`: whether to look again instead of sleeping.
    pub(super) fn goes_on(&mut self, now: Time) -> bool {
        let since = *self.idle_since.get_or_insert(now);
        let limit = match self.polling {
            Polling::Adaptive if self.short_pauses >= BEGIN_AT => WORTH_MAX,
            Polling::Adaptive => return false,
            Polling::UpTo(limit) => limit,
        };
        now.since(since) < limit
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const US: u64 = 1_000;

    fn at(nanos: u64) -> Time {
        Time::default().after(Duration::from_nanos(nanos))
    }

    /// Pauses of `pause_ns`, one after the other; whether the worker looked through the last.
    fn pauses(poller: &mut Poller, begin: &mut u64, count: u32, pause_ns: u64) -> bool {
        let mut went_on = false;
        for _ in 0..count {
            went_on = poller.goes_on(at(*begin));
            *begin += pause_ns;
            poller.found(at(*begin));
            *begin += US;
        }
        went_on
    }

    #[test]
    fn poller_looks_only_after_short_pauses() {
        let mut now = 0;
        let mut poller = Poller::new(Polling::Adaptive);
        assert!(!pauses(&mut poller, &mut now, BEGIN_AT, 60 * US));
        assert!(pauses(&mut poller, &mut now, 1, 60 * US));
    }

    #[test]
    fn poller_gives_up_where_pauses_are_long() {
        let mut now = 0;
        let mut poller = Poller::new(Polling::Adaptive);
        pauses(&mut poller, &mut now, 100, 20 * US);
        assert!(pauses(&mut poller, &mut now, 2, 5_000 * US));
        assert!(!pauses(&mut poller, &mut now, 2, 5_000 * US));
        // One in four is too many, one in twenty is not.
        let mut poller = Poller::new(Polling::Adaptive);
        for _ in 0..50 {
            pauses(&mut poller, &mut now, 19, 20 * US);
            pauses(&mut poller, &mut now, 1, 5_000 * US);
        }
        assert!(pauses(&mut poller, &mut now, 1, 20 * US));
        for _ in 0..50 {
            pauses(&mut poller, &mut now, 3, 20 * US);
            pauses(&mut poller, &mut now, 1, 5_000 * US);
        }
        assert!(!pauses(&mut poller, &mut now, 1, 20 * US));
    }

    #[test]
    fn poller_sleeps_when_a_pause_is_longer_than_any_before() {
        let mut now = 0;
        let mut poller = Poller::new(Polling::Adaptive);
        pauses(&mut poller, &mut now, 100, 20 * US);
        assert!(poller.goes_on(at(now)));
        assert!(poller.goes_on(at(now + 99 * US)));
        assert!(!poller.goes_on(at(now + 100 * US)));
        assert!(!poller.goes_on(at(now + 10_000_000 * US)));
    }

    #[test]
    fn poller_with_a_limit_looks_that_long_always() {
        let mut poller = Poller::new(Polling::UpTo(Duration::from_micros(7)));
        assert!(poller.goes_on(at(0)));
        assert!(poller.goes_on(at(6 * US)));
        assert!(!poller.goes_on(at(7 * US)));
        let mut poller = Poller::new(Polling::UpTo(Duration::ZERO));
        assert!(!poller.goes_on(at(0)));
    }
}
