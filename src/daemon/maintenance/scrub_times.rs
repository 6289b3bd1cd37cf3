// SPDX-License-Identifier: Apache-2.0
//! When the last scrub came to its end, by the clock on the wall: so that a disk whose daemon is
//! restarted more often than it is scrubbed is scrubbed all the same.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::{Maintenance, RecordEvent};
use crate::record::Recorder;

/// Seconds since 1970; 1 where the clock is before that.
fn now() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |now| now.as_secs()).max(1)
}

/// How long it is to the next scrub, one every `interval`, when the last one ended at
/// `scrubbed_at` and it is `now`, both in seconds since 1970. A clock that was set back does not
/// put it off for longer than the interval.
fn left(interval: Duration, scrubbed_at: u64, now: u64) -> Duration {
    let since = Duration::from_secs(now.saturating_sub(scrubbed_at));
    interval.saturating_sub(since)
}

/// How long it is to the first scrub of this run. Where none was ever made the time is counted from
/// now on, and that is written down; to be asked before the recorder's first event.
pub(super) fn first(recorder: &mut Recorder, interval: Duration) -> Duration {
    let now = now();
    let scrubbed_at = recorder.superblock().scrubbed_at;
    if scrubbed_at == 0 {
        recorder.change(|superblock| superblock.scrubbed_at = now);
        return interval;
    }
    left(interval, scrubbed_at, now)
}

impl Maintenance {
    /// A scrub came to its end.
    pub(super) fn note_scrubbed(&mut self) {
        if let Some(record) = &mut self.record {
            let now = now();
            record
                .recorder
                .change(|superblock| superblock.scrubbed_at = now);
            self.tell_recorder(RecordEvent::Poll);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_to_the_next_scrub_goes_on_over_restarts() {
        let hour = Duration::from_secs(3600);
        for (scrubbed_at, now, expected) in [
            (1000, 1000, 3600),
            (1000, 2000, 2600),
            (1000, 4600, 0),
            (1000, 1 << 40, 0),
            (5000, 1000, 3600),
        ] {
            let expected = Duration::from_secs(expected);
            assert_eq!(
                left(hour, scrubbed_at, now),
                expected,
                "{scrubbed_at} {now}"
            );
        }
    }
}
