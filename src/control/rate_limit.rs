// SPDX-License-Identifier: Apache-2.0
//! How often an event may be written: as QEMU's monitor does it, once a second per key.
//!
//! The first event of a key passes at once and opens a window. Events that come within the
//! window are held; the last of them passes at its end and opens the next one. Nothing is
//! forgotten silently: neighbours are joined, and what was replaced is counted.

use std::collections::BTreeMap;
use std::time::Duration;

use super::events::{Event, EventKey};
use crate::units::Time;

/// Length of a window: what QEMU gives QUORUM_REPORT_BAD and QUORUM_FAILURE.
pub const WINDOW: Duration = Duration::from_secs(1);

/// Decides when an event passes. Knows no clock; it is told the time.
#[derive(Debug, Default)]
pub struct RateLimiter {
    windows: BTreeMap<EventKey, Window>,
}

#[derive(Debug)]
struct Window {
    end: Time,
    held: Option<Event>,
}

impl RateLimiter {
    /// Takes an event in. It comes back if it may be written now; otherwise it is held.
    #[must_use]
    pub fn offer(&mut self, now: Time, event: Event) -> Option<Event> {
        let key = event.data.key();
        let Some(window) = self.windows.get_mut(&key) else {
            let window = Window {
                end: now.after(WINDOW),
                held: None,
            };
            self.windows.insert(key, window);
            return Some(event);
        };
        window.held = Some(match window.held.take() {
            None => event,
            Some(held) => replaced(&held, event),
        });
        if window.end > now {
            return None;
        }
        // The window is over and nobody has called `due` yet.
        window.end = now.after(WINDOW);
        window.held.take()
    }

    /// The held events whose window is over at `now`, in the order they happened.
    #[must_use]
    pub fn due(&mut self, now: Time) -> Vec<Event> {
        let mut events = Vec::new();
        self.windows.retain(|_, window| {
            if window.end > now {
                return true;
            }
            match window.held.take() {
                None => false,
                Some(event) => {
                    events.push(event);
                    window.end = now.after(WINDOW);
                    true
                }
            }
        });
        events.sort_by_key(|event| event.at);
        events
    }

    /// When [`RateLimiter::due`] has something to do next.
    #[must_use]
    pub fn deadline(&self) -> Option<Time> {
        self.windows.values().map(|window| window.end).min()
    }

    /// All held events, in the order they happened, at the end of the process.
    #[must_use]
    pub fn drain(&mut self) -> Vec<Event> {
        let windows = std::mem::take(&mut self.windows).into_values();
        let mut events: Vec<Event> = windows.filter_map(|window| window.held).collect();
        events.sort_by_key(|event| event.at);
        events
    }
}

/// What is held when `later` comes while `held` waits.
fn replaced(held: &Event, later: Event) -> Event {
    let earlier = held.suppressed;
    match held.data.merged(later.data) {
        Some(data) => Event {
            data,
            suppressed: earlier + later.suppressed,
            ..later
        },
        None => Event {
            suppressed: earlier + later.suppressed + 1,
            ..later
        },
    }
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use proptest::prelude::*;

    use super::super::events::EventData;
    use super::*;
    use crate::quorum::{BadCause, During, Report};
    use crate::units::{ReplicaId, SectorRange};

    fn at_millis(millis: u64) -> Time {
        Time::from_nanos(millis * 1_000_000)
    }

    fn bad(replica: usize, sector: u64) -> Event {
        let report = Report::Bad {
            replica: ReplicaId::new(replica),
            range: SectorRange::new(sector, 1).unwrap(),
            cause: BadCause::Differs,
            during: During::Read,
        };
        Event::new(EventData::Report(report), UNIX_EPOCH)
    }

    fn range(event: &Event) -> SectorRange {
        match event.data {
            EventData::Report(Report::Bad { range, .. }) => range,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn limiter_passes_the_first_and_keeps_the_last_of_the_second() {
        let mut limiter = RateLimiter::default();
        assert_eq!(limiter.deadline(), None);
        assert_eq!(limiter.offer(at_millis(0), bad(0, 0)), Some(bad(0, 0)));
        assert_eq!(limiter.offer(at_millis(10), bad(0, 10)), None);
        assert_eq!(limiter.offer(at_millis(20), bad(0, 20)), None);
        assert_eq!(limiter.offer(at_millis(30), bad(0, 30)), None);
        assert_eq!(limiter.deadline(), Some(at_millis(1000)));
        assert!(limiter.due(at_millis(999)).is_empty());
        let due = limiter.due(at_millis(1000));
        let suppressed = 2;
        assert_eq!(
            due,
            [Event {
                suppressed,
                ..bad(0, 30)
            }]
        );
        // The held one opened a window of its own, which passes empty.
        assert_eq!(limiter.offer(at_millis(1500), bad(0, 40)), None);
        assert_eq!(limiter.due(at_millis(2000)), [bad(0, 40)]);
        assert!(limiter.due(at_millis(3000)).is_empty());
        assert_eq!(limiter.deadline(), None);
        assert_eq!(limiter.offer(at_millis(3001), bad(0, 1)), Some(bad(0, 1)));
    }

    #[test]
    fn limiter_keeps_replicas_apart() {
        let mut limiter = RateLimiter::default();
        assert!(limiter.offer(at_millis(0), bad(0, 0)).is_some());
        assert!(limiter.offer(at_millis(0), bad(1, 0)).is_some());
        assert!(limiter.offer(at_millis(1), bad(1, 0)).is_none());
    }

    #[test]
    fn limiter_joins_neighbours_while_it_holds() {
        let mut limiter = RateLimiter::default();
        assert!(limiter.offer(at_millis(0), bad(0, 100)).is_some());
        for sector in 0..50 {
            assert!(limiter.offer(at_millis(1), bad(0, sector)).is_none());
        }
        let due = limiter.due(at_millis(1000));
        assert_eq!(due.len(), 1);
        assert_eq!((range(&due[0]).start(), range(&due[0]).count()), (0, 50));
        assert_eq!(due[0].suppressed, 0);
    }

    #[test]
    fn limiter_passes_when_due_was_called_late() {
        let mut limiter = RateLimiter::default();
        assert!(limiter.offer(at_millis(0), bad(0, 0)).is_some());
        assert!(limiter.offer(at_millis(1), bad(0, 5)).is_none());
        let passed = limiter.offer(at_millis(2000), bad(0, 9)).unwrap();
        assert_eq!((range(&passed).start(), passed.suppressed), (9, 1));
    }

    #[test]
    fn limiter_gives_held_events_in_the_order_they_happened() {
        let mut limiter = RateLimiter::default();
        for (replica, second) in [(0, 0), (1, 0), (1, 1), (0, 2)] {
            let event = Event {
                at: UNIX_EPOCH + Duration::from_secs(second),
                ..bad(replica, second * 10)
            };
            let passed = limiter.offer(at_millis(second), event);
            assert_eq!(passed.is_some(), second == 0);
        }
        let mut later = limiter.due(at_millis(1000));
        assert_eq!(
            later.iter().map(|e| range(e).start()).collect::<Vec<_>>(),
            [10, 20]
        );
        for event in later.drain(..).rev() {
            assert!(limiter.offer(at_millis(1001), event).is_none());
        }
        let drained = limiter.drain();
        assert_eq!(
            drained.iter().map(|e| range(e).start()).collect::<Vec<_>>(),
            [10, 20]
        );
    }

    #[test]
    fn limiter_drained_gives_what_it_holds() {
        let mut limiter = RateLimiter::default();
        assert!(limiter.offer(at_millis(0), bad(0, 0)).is_some());
        assert!(limiter.offer(at_millis(1), bad(0, 7)).is_none());
        assert_eq!(limiter.drain(), [bad(0, 7)]);
        assert_eq!(limiter.deadline(), None);
    }

    proptest! {
        /// Nothing is lost: every event passes or is counted, and no key passes twice a window.
        #[test]
        fn limiter_accounts_for_every_event(
            steps in proptest::collection::vec((0u64..700, 0usize..3, any::<bool>()), 1..80),
        ) {
            let mut limiter = RateLimiter::default();
            let (mut now, mut offered, mut accounted) = (0, 0u64, 0u64);
            let mut last_passed = [None::<u64>; 3];
            for (index, (pause, replica, tick)) in steps.into_iter().enumerate() {
                now += pause;
                let mut passed = if tick { limiter.due(at_millis(now)) } else { Vec::new() };
                // Sectors far apart, so that nothing is joined.
                let event = bad(replica, index as u64 * 10);
                offered += 1;
                passed.extend(limiter.offer(at_millis(now), event));
                for event in passed {
                    accounted += 1 + event.suppressed;
                    let EventData::Report(Report::Bad { replica, .. }) = event.data else {
                        unreachable!()
                    };
                    let last = &mut last_passed[replica.index()];
                    prop_assert!(last.is_none_or(|last| now - last >= 1000));
                    *last = Some(now);
                }
            }
            for event in limiter.drain() {
                accounted += 1 + event.suppressed;
            }
            prop_assert_eq!(offered, accounted);
        }
    }
}
