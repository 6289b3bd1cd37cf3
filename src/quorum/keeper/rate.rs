// SPDX-License-Identifier: Apache-2.0
//! How much in how much time: a token bucket, and a delay that doubles.

use std::time::Duration;

use crate::units::Time;

/// Work that was not done in time is made up for, as far as this goes back.
const BURST: Duration = Duration::from_millis(100);

/// A token bucket in virtual time. It is asked before a piece of work and told its size; a piece
/// may be larger than what is left, the next one then waits the longer.
pub(super) struct Bucket {
    bytes_per_s: u64,
    /// When all that was admitted so far is paid for.
    paid_at: Time,
}

impl Bucket {
    /// Admits `bytes_per_s` bytes in a second, and what [`BURST`] allows; 0: everything.
    pub(super) fn new(bytes_per_s: u64) -> Self {
        Self {
            bytes_per_s,
            paid_at: Time::default(),
        }
    }

    /// When the next piece may begin; `None`: now.
    pub(super) fn opens_at(&self, now: Time) -> Option<Time> {
        (self.paid_at > now).then_some(self.paid_at)
    }

    /// A piece of `bytes` bytes begins.
    pub(super) fn charge(&mut self, now: Time, bytes: u64) {
        if self.bytes_per_s == 0 {
            return;
        }
        let burst = u64::try_from(BURST.as_nanos()).expect("less than a second");
        let earliest = Time::from_nanos(now.nanos().saturating_sub(burst));
        let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(self.bytes_per_s);
        let cost = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        self.paid_at = self.paid_at.max(earliest).after(cost);
    }
}

/// A delay that doubles from attempt to attempt.
#[derive(Clone, Copy, Debug)]
pub(super) struct Backoff {
    next: Duration,
    least: Duration,
    most: Duration,
}

impl Backoff {
    pub(super) fn new(least: Duration, most: Duration) -> Self {
        let next = least;
        Self { next, least, most }
    }

    /// The delay before the next attempt.
    pub(super) fn take(&mut self) -> Duration {
        let delay = self.next;
        self.next = delay.saturating_mul(2).min(self.most);
        delay
    }

    pub(super) fn reset(&mut self) {
        self.next = self.least;
    }

    /// The longest delay.
    pub(super) fn most(&self) -> Duration {
        self.most
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Time {
        Time::from_nanos(ms * 1_000_000)
    }

    /// Bytes admitted from `from` to `to` by somebody who always has a piece of `piece` bytes.
    fn admitted(bucket: &mut Bucket, from: u64, to: u64, piece: u64) -> u64 {
        let mut bytes = 0;
        for ms in from..to {
            while bucket.opens_at(at(ms)).is_none() {
                bucket.charge(at(ms), piece);
                bytes += piece;
            }
        }
        bytes
    }

    #[test]
    fn bucket_admits_its_rate_whatever_the_pieces() {
        for piece in [4096, 1 << 20, 64 << 20] {
            let rate = 128 << 20;
            let mut bucket = Bucket::new(rate);
            let bytes = admitted(&mut bucket, 1000, 11_000, piece);
            let slack = rate / 10 + piece;
            assert!(bytes >= 10 * rate - slack, "{piece}: {bytes}");
            assert!(bytes <= 10 * rate + slack, "{piece}: {bytes}");
            // An idle hour is not saved up.
            let bytes = admitted(&mut bucket, 3_600_000, 3_601_000, piece);
            assert!(bytes <= rate + slack, "{piece}: {bytes}");
        }
    }

    #[test]
    fn bucket_without_limit_is_always_open() {
        let mut bucket = Bucket::new(0);
        bucket.charge(at(1), u64::MAX);
        assert_eq!(bucket.opens_at(at(1)), None);
    }

    #[test]
    fn backoff_doubles_to_its_end() {
        let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(60));
        let delays: Vec<u64> = (0..9).map(|_| backoff.take().as_secs()).collect();
        assert_eq!(delays, [1, 2, 4, 8, 16, 32, 60, 60, 60]);
        backoff.reset();
        assert_eq!(backoff.take().as_secs(), 1);
    }
}
