// SPDX-License-Identifier: Apache-2.0
//! The log on standard error: text or JSON lines, and a bridge for the crates that log in a way
//! of their own.
//!
//! Some of those write an error for each malformed thing a guest or front-end sends. A guest
//! must not be able to fill the host's disk with log, so each place in them gets a few lines a
//! second and the rest is counted.

use std::collections::BTreeMap;
use std::io::{IsTerminal, stderr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Instant;

use thiserror::Error;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::Layer;
use tracing_subscriber::layer::SubscriberExt;

use crate::config::{LogFormat, LogLevel};
use crate::units::Time;

/// Lines one place in a foreign crate may write in a second.
const FOREIGN_LINES_PER_SECOND: u32 = 10;
/// Length of the window in which they are counted, in nanoseconds.
const WINDOW_NANOS: u64 = 1_000_000_000;
/// Places remembered at once; a crate has far fewer. Beyond that the oldest knowledge goes.
const PLACES_MAX: usize = 1024;

/// The log cannot be set up.
#[derive(Debug, Error)]
pub enum LogError {
    /// Somebody else in this process did it before.
    #[error("the log was set up twice")]
    Twice,
}

/// Sends all log lines of the process to standard error.
///
/// # Errors
/// If it was done before.
pub fn init(format: LogFormat, level: LogLevel) -> Result<(), LogError> {
    let (filter, foreign_filter) = filters(level);
    let layer = match format {
        LogFormat::Text => tracing_subscriber::fmt::layer()
            .with_writer(stderr)
            .with_ansi(stderr().is_terminal())
            .with_target(false)
            .with_filter(filter)
            .boxed(),
        LogFormat::Json => tracing_subscriber::fmt::layer()
            .json()
            .flatten_event(true)
            .with_current_span(false)
            .with_span_list(false)
            .with_writer(stderr)
            .with_filter(filter)
            .boxed(),
    };
    let subscriber = tracing_subscriber::registry().with(layer);
    tracing::subscriber::set_global_default(subscriber).map_err(|_| LogError::Twice)?;
    log::set_logger(bridge()).map_err(|_| LogError::Twice)?;
    log::set_max_level(foreign_filter);
    Ok(())
}

/// Lines of foreign crates that were not written because there were too many.
#[must_use]
pub fn foreign_lines_suppressed() -> u64 {
    bridge().suppressed_total.load(Ordering::Relaxed)
}

fn filters(level: LogLevel) -> (LevelFilter, log::LevelFilter) {
    match level {
        LogLevel::Error => (LevelFilter::ERROR, log::LevelFilter::Error),
        LogLevel::Warn => (LevelFilter::WARN, log::LevelFilter::Warn),
        LogLevel::Info => (LevelFilter::INFO, log::LevelFilter::Info),
        LogLevel::Debug => (LevelFilter::DEBUG, log::LevelFilter::Debug),
        LogLevel::Trace => (LevelFilter::TRACE, log::LevelFilter::Trace),
    }
}

fn bridge() -> &'static Bridge {
    static BRIDGE: OnceLock<Bridge> = OnceLock::new();
    BRIDGE.get_or_init(|| Bridge {
        origin: Instant::now(),
        places: Mutex::new(LineLimiter::default()),
        suppressed_total: AtomicU64::new(0),
    })
}

/// Passes lines of the `log` crate on to ours.
struct Bridge {
    origin: Instant,
    places: Mutex<LineLimiter>,
    suppressed_total: AtomicU64,
}

impl log::Log for Bridge {
    fn enabled(&self, metadata: &log::Metadata) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &log::Record) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let place = Place {
            file: record.file_static().unwrap_or_default(),
            line: record.line().unwrap_or_default(),
        };
        let now = Time::default().after(self.origin.elapsed());
        let mut places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        let admitted = places.admit(place, now);
        drop(places);
        let Some(suppressed) = admitted else {
            self.suppressed_total.fetch_add(1, Ordering::Relaxed);
            return;
        };
        let (target, text) = (record.target(), record.args());
        if suppressed > 0 {
            tracing::warn!(origin = target, suppressed, "lines from one place left out");
        }
        match record.level() {
            log::Level::Error => tracing::error!(origin = target, "{text}"),
            log::Level::Warn => tracing::warn!(origin = target, "{text}"),
            log::Level::Info => tracing::info!(origin = target, "{text}"),
            log::Level::Debug => tracing::debug!(origin = target, "{text}"),
            log::Level::Trace => tracing::trace!(origin = target, "{text}"),
        }
    }

    fn flush(&self) {}
}

/// A place in a source file that logs.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Place {
    file: &'static str,
    line: u32,
}

/// Which places have written how much lately.
#[derive(Default)]
struct LineLimiter {
    places: BTreeMap<Place, Window>,
}

struct Window {
    start: Time,
    written: u32,
    suppressed: u64,
}

impl LineLimiter {
    /// Whether `place` may write a line now; if so, how many were left out since the last one.
    fn admit(&mut self, place: Place, now: Time) -> Option<u64> {
        if self.places.len() >= PLACES_MAX && !self.places.contains_key(&place) {
            self.places.clear();
        }
        let window = self.places.entry(place).or_insert(Window {
            start: now,
            written: 0,
            suppressed: 0,
        });
        if now.nanos().saturating_sub(window.start.nanos()) >= WINDOW_NANOS {
            window.start = now;
            window.written = 0;
        }
        if window.written >= FOREIGN_LINES_PER_SECOND {
            window.suppressed += 1;
            return None;
        }
        window.written += 1;
        Some(std::mem::take(&mut window.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HERE: Place = Place {
        file: "a.rs",
        line: 1,
    };

    fn at_millis(millis: u64) -> Time {
        Time::from_nanos(millis * 1_000_000)
    }

    #[test]
    fn limiter_admits_ten_a_second_and_counts_the_rest() {
        let mut limiter = LineLimiter::default();
        for _ in 0..10 {
            assert_eq!(limiter.admit(HERE, at_millis(0)), Some(0));
        }
        for _ in 0..25 {
            assert_eq!(limiter.admit(HERE, at_millis(999)), None);
        }
        assert_eq!(limiter.admit(HERE, at_millis(1000)), Some(25));
        assert_eq!(limiter.admit(HERE, at_millis(1001)), Some(0));
    }

    #[test]
    fn limiter_keeps_places_apart_and_stays_small() {
        let mut limiter = LineLimiter::default();
        for line in 0..5000 {
            let place = Place { file: "b.rs", line };
            assert_eq!(limiter.admit(place, at_millis(0)), Some(0));
        }
        assert!(limiter.places.len() <= PLACES_MAX);
    }
}
