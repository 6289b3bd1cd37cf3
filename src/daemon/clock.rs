// SPDX-License-Identifier: Apache-2.0
//! The one clock of the process: all threads tell the core the time from the same origin.

use std::time::Instant;

use crate::units::Time;

/// The monotonic clock since the daemon started. A copy tells the same time.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    origin: Instant,
}

impl Clock {
    /// A clock that begins now.
    #[must_use]
    pub fn start() -> Self {
        Self {
            origin: Instant::now(),
        }
    }

    /// The time.
    #[must_use]
    pub fn now(&self) -> Time {
        Time::default().after(self.origin.elapsed())
    }
}
