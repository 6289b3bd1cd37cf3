// SPDX-License-Identifier: Apache-2.0
//! How long anybody waits for a replica, what it may do wrong, and how it is looked after.

use std::time::Duration;

use super::error::ConfigError;
use super::settings::Settings;
use super::values::{ByteSize, CrashTie, OnLostQuorum, ScrubMode};

/// Rule W6: the least grace of a late write, in milliseconds.
const WRITE_GRACE_MIN_MS: u32 = 20;
/// Rule W6: its default cap, in milliseconds.
const WRITE_GRACE_MS: u32 = 1000;
/// A guest waits for nobody longer than a minute because of one slow replica.
const WRITE_GRACE_MAX_MS: u32 = 60_000;
/// Rule F2, in seconds.
const FLUSH_GRACE_S: u16 = 5;
/// In seconds; Linux guests give up a request after 30 s of their own by default.
const IO_TIMEOUT_S: u16 = 30;
/// In seconds: longer is no timeout any more.
const IO_TIMEOUT_MAX_S: u16 = 3600;

/// The slowest that gets anywhere: a disk of 1 TiB then takes twelve days.
const RATE_MIN: ByteSize = ByteSize(1 << 20);
/// Rule Y7, bytes per second.
const RESYNC_RATE: ByteSize = ByteSize(128 << 20);
/// Rule Y6, bytes per second.
const SCRUB_RATE: ByteSize = ByteSize(64 << 20);
/// Rot is found while the other copies are still good: as often as RAID arrays are checked.
const SCRUB_INTERVAL: Duration = Duration::from_secs(30 * 24 * 3600);

/// CONSISTENCY section 10: failed writes in 60 s.
const WRITE_ERRORS_MAX: u32 = 16;
/// CONSISTENCY section 10: kicks in 60 s.
const KICKS_MAX: u32 = 4;
/// CONSISTENCY section 10: repaired sectors in 24 h.
const REPAIRS_MAX: u32 = 256;

/// How long a replica is waited for, and what happens without enough of them.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Patience {
    /// Least grace of a write once T replicas hold it (rule W6); never more than the longest.
    pub write_grace_min: Duration,
    /// Longest grace of such a write, 20 ms to 60 s, at most `io_timeout`.
    pub write_grace_max: Duration,
    /// Grace of a flush once T replicas are flushed (rule F2), at least 1 s, at most
    /// `io_timeout`.
    pub flush_grace: Duration,
    /// How long an operation may take before its replica is kicked: 1 s to 1 h.
    pub io_timeout: Duration,
    /// Whether requests wait while fewer than T replicas are up, instead of failing (rule V6).
    pub pause: bool,
}

/// How replicas are brought up to date, compared, and given up.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Upkeep {
    /// Whether sectors that nobody agrees on after a power loss are an error (rule Y3).
    pub crash_tie_error: bool,
    /// Bytes per second copied while the guest is active (rule Y7), at least 1 MiB.
    pub resync_bytes_per_s: u64,
    /// Bytes per second read of each replica by scrub and verify (rule Y6), at least 1 MiB.
    pub scrub_bytes_per_s: u64,
    /// How often a scrub begins on its own.
    pub scrub_interval: Option<Duration>,
    /// Whether a scrub rewrites dissenters.
    pub scrub_repairs: bool,
    /// Failed writes in 60 s that make a replica Failed; 0 = never.
    pub write_errors_max: u32,
    /// Kicks in 60 s that do; 0 = never.
    pub kicks_max: u32,
    /// Repaired sectors in 24 h that do; 0 = never.
    pub repairs_max: u32,
}

impl Patience {
    /// Decides from the settings.
    pub(super) fn from_settings(settings: &Settings) -> Result<Self, ConfigError> {
        let io_timeout_s = settings.io_timeout.unwrap_or(IO_TIMEOUT_S);
        if !(1..=IO_TIMEOUT_MAX_S).contains(&io_timeout_s) {
            return Err(ConfigError::IoTimeout {
                given: io_timeout_s,
                most: IO_TIMEOUT_MAX_S,
            });
        }
        let io_timeout = Duration::from_secs(io_timeout_s.into());
        if let Some(given) = settings.write_grace
            && !(WRITE_GRACE_MIN_MS..=WRITE_GRACE_MAX_MS).contains(&given)
        {
            return Err(ConfigError::WriteGrace {
                given,
                least: WRITE_GRACE_MIN_MS,
                most: WRITE_GRACE_MAX_MS,
            });
        }
        if settings.flush_grace == Some(0) {
            return Err(ConfigError::FlushGrace);
        }
        let write_grace = settings
            .write_grace
            .map(u64::from)
            .map(Duration::from_millis);
        let flush_grace = settings.flush_grace.map(u64::from).map(Duration::from_secs);
        // What was not said gives way to a short timeout; what was said must make sense with it.
        for (flag, grace) in [
            ("--write-grace", write_grace),
            ("--flush-grace", flush_grace),
        ] {
            if grace.is_some_and(|grace| grace > io_timeout) {
                return Err(ConfigError::GraceBeyondTimeout { flag, io_timeout_s });
            }
        }
        let write_grace_default = Duration::from_millis(WRITE_GRACE_MS.into());
        let flush_grace_default = Duration::from_secs(FLUSH_GRACE_S.into());
        Ok(Self {
            write_grace_min: Duration::from_millis(WRITE_GRACE_MIN_MS.into()),
            write_grace_max: write_grace.unwrap_or(write_grace_default.min(io_timeout)),
            flush_grace: flush_grace.unwrap_or(flush_grace_default.min(io_timeout)),
            io_timeout,
            pause: settings.on_lost_quorum == Some(OnLostQuorum::Pause),
        })
    }
}

impl Upkeep {
    /// Decides from the settings. `repair`: whether dissenters are rewritten at all; `votes`:
    /// whether reads are compared.
    pub(super) fn from_settings(
        settings: &Settings,
        repair: bool,
        votes: bool,
    ) -> Result<Self, ConfigError> {
        let resync_rate = settings.resync_rate.unwrap_or(RESYNC_RATE);
        let scrub_rate = settings.scrub_rate.unwrap_or(SCRUB_RATE);
        for (flag, given) in [("--resync-rate", resync_rate), ("--scrub-rate", scrub_rate)] {
            if given < RATE_MIN {
                let least = RATE_MIN;
                return Err(ConfigError::Rate { flag, given, least });
            }
        }
        let asked = settings.scrub_interval.map(|interval| interval.0);
        if !votes && matches!(asked, Some(Some(_))) {
            return Err(ConfigError::ScrubWithoutVotes);
        }
        if !repair && settings.scrub == Some(ScrubMode::Repair) {
            return Err(ConfigError::ScrubWithoutRepair);
        }
        Ok(Self {
            crash_tie_error: settings.crash_tie == Some(CrashTie::Error),
            resync_bytes_per_s: resync_rate.0,
            scrub_bytes_per_s: scrub_rate.0,
            scrub_interval: asked.unwrap_or(votes.then_some(SCRUB_INTERVAL)),
            scrub_repairs: repair && settings.scrub != Some(ScrubMode::Check),
            write_errors_max: settings.max_write_errors.unwrap_or(WRITE_ERRORS_MAX),
            kicks_max: settings.max_kicks.unwrap_or(KICKS_MAX),
            repairs_max: settings.max_repairs.unwrap_or(REPAIRS_MAX),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::values::Interval;
    use super::*;

    fn patience(change: impl FnOnce(&mut Settings)) -> Result<Patience, String> {
        let mut settings = Settings::default();
        change(&mut settings);
        Patience::from_settings(&settings).map_err(|error| error.to_string())
    }

    fn upkeep(change: impl FnOnce(&mut Settings)) -> Result<Upkeep, String> {
        let mut settings = Settings::default();
        change(&mut settings);
        Upkeep::from_settings(&settings, true, true).map_err(|error| error.to_string())
    }

    #[test]
    fn defaults_are_those_of_the_rules() {
        let patience = patience(|_| {}).unwrap();
        assert_eq!(patience.write_grace_min, Duration::from_millis(20));
        assert_eq!(patience.write_grace_max, Duration::from_secs(1));
        assert_eq!(patience.flush_grace, Duration::from_secs(5));
        assert_eq!(patience.io_timeout, Duration::from_secs(30));
        assert!(!patience.pause);
        let upkeep = upkeep(|_| {}).unwrap();
        assert_eq!(upkeep.resync_bytes_per_s, 128 << 20);
        assert_eq!(upkeep.scrub_bytes_per_s, 64 << 20);
        assert!(upkeep.scrub_repairs && !upkeep.crash_tie_error);
        let budgets = (
            upkeep.write_errors_max,
            upkeep.kicks_max,
            upkeep.repairs_max,
        );
        assert_eq!(budgets, (16, 4, 256));
    }

    #[test]
    fn defaults_give_way_to_a_short_timeout() {
        let patience = patience(|s| s.io_timeout = Some(1)).unwrap();
        assert_eq!(patience.flush_grace, Duration::from_secs(1));
        assert_eq!(patience.write_grace_max, Duration::from_secs(1));
    }

    #[test]
    fn times_that_do_not_fit_name_the_cure() {
        type Change = fn(&mut Settings);
        let cases: [(&str, Change); 6] = [
            ("--io-timeout 0 is not possible; give 1 to 3600", |s| {
                s.io_timeout = Some(0)
            }),
            ("--io-timeout 3601 is", |s| s.io_timeout = Some(3601)),
            ("--write-grace 19 is not possible; give 20 to 60000", |s| {
                s.write_grace = Some(19)
            }),
            ("--flush-grace 0 is not possible", |s| {
                s.flush_grace = Some(0)
            }),
            ("--flush-grace is longer than --io-timeout 4", |s| {
                s.flush_grace = Some(5);
                s.io_timeout = Some(4);
            }),
            ("--write-grace is longer than --io-timeout 1", |s| {
                s.write_grace = Some(1001);
                s.io_timeout = Some(1);
            }),
        ];
        for (message, change) in cases {
            let refused = patience(change).unwrap_err();
            assert!(refused.contains(message), "expected {message:?}: {refused}");
        }
    }

    #[test]
    fn rates_and_scrubs_that_do_not_fit_name_the_cure() {
        let refused = upkeep(|s| s.resync_rate = Some(ByteSize(1000))).unwrap_err();
        assert!(
            refused.contains("--resync-rate 1000 bytes is too slow"),
            "{refused}"
        );
        let settings = Settings {
            scrub: Some(ScrubMode::Repair),
            ..Settings::default()
        };
        let refused = Upkeep::from_settings(&settings, false, true).unwrap_err();
        assert_eq!(refused, ConfigError::ScrubWithoutRepair);
        let settings = Settings {
            scrub_interval: Some(Interval(Some(Duration::from_secs(3600)))),
            ..Settings::default()
        };
        let refused = Upkeep::from_settings(&settings, true, false).unwrap_err();
        assert_eq!(refused, ConfigError::ScrubWithoutVotes);
    }

    #[test]
    fn scrub_follows_from_repair_and_votes() {
        let settings = Settings::default();
        let upkeep = Upkeep::from_settings(&settings, false, false).unwrap();
        assert!(!upkeep.scrub_repairs);
        assert_eq!(upkeep.scrub_interval, None);
        let settings = Settings {
            scrub_interval: Some(Interval(None)),
            ..Settings::default()
        };
        let upkeep = Upkeep::from_settings(&settings, true, true).unwrap();
        assert_eq!(upkeep.scrub_interval, None);
    }
}
