// SPDX-License-Identifier: Apache-2.0
//! Types of single values: how each is written in a flag and in the file.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::ValueEnum;
use serde::Deserialize;
use serde::de::{self, Deserializer, Visitor};
use thiserror::Error;

/// A value that cannot be read.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ValueError {
    /// Not a number of bytes.
    #[error("`{0}` is no size; write bytes, or a number with K, M, G or T (1024-based), as in 64M")]
    Size(String),
    /// Not one of two words.
    #[error("`{0}` is neither `on` nor `off`")]
    OnOff(String),
    /// Not a block size.
    #[error("a block size of {0} is not possible; give 512 or 4096")]
    BlockSize(String),
    /// Not a whole number, or one that the setting has no room for.
    #[error("`{given}` is not possible; give a whole number from 0 to {most}")]
    WholeNumber {
        /// What was written.
        given: String,
        /// The largest the setting has room for.
        most: u64,
    },
    /// Not a stretch of time.
    #[error(
        "`{0}` is no interval; write `off`, or a whole number with s, m, h, d or w, as in 12h or \
         7d, from 1m to 520w"
    )]
    Interval(String),
    /// Neither `adaptive` nor a number of microseconds.
    #[error("`{0}` is no way to poll; give adaptive, or 0 to {most} microseconds", most = Polling::MOST_US)]
    Polling(String),
    /// No place for events.
    #[error("the events target is empty; give a path or the number of an open descriptor")]
    EventsTarget,
}

/// Integers that settings are kept in.
pub trait Whole: FromStr {
    /// The largest.
    const MOST: u64;
}

impl Whole for u8 {
    const MOST: u64 = 0xff;
}

impl Whole for u16 {
    const MOST: u64 = 0xffff;
}

impl Whole for u32 {
    const MOST: u64 = 0xffff_ffff;
}

/// Reads a number that a flag gives. Whether it makes sense is decided with the whole.
///
/// # Errors
/// If it is no number, or one the setting has no room for.
pub fn whole_number<T: Whole>(text: &str) -> Result<T, ValueError> {
    text.parse().map_err(|_| ValueError::WholeNumber {
        given: text.to_owned(),
        most: T::MOST,
    })
}

/// Whether a replica goes through the page cache.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Cache {
    /// O_DIRECT: a vote asks the medium, not the host's memory.
    #[default]
    Direct,
    /// Through the page cache: faster where memory is plenty, blind to what the medium does.
    Buffered,
}

/// The format of a replica's image.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// The bytes of the disk, nothing else. Never guessed: a guest can write any header.
    #[default]
    Raw,
}

/// Who is asked on a read.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum ReadPatternName {
    /// All current replicas; as many equal sectors as the threshold win.
    #[default]
    Quorum,
    /// The first current replica, the next one if it fails; nothing is compared.
    Fifo,
}

/// Whether the disk remembers which replica missed what.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum RecordMode {
    /// In a state record: beside the images, or where --record-dir or `record=` say.
    #[default]
    Auto,
    /// Dangerous: nowhere. After a restart a replica that missed writes votes with old data.
    None,
}

/// What requests get when fewer replicas are up than the threshold asks for (rule V6).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum OnLostQuorum {
    /// An I/O error, at once.
    #[default]
    Error,
    /// Nothing until enough replicas are back: the guest waits.
    Pause,
}

/// What becomes of sectors that no two replicas agree on after a power loss (rule Y3).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum CrashTie {
    /// Take the version most replicas have; each is one the guest wrote and had not flushed.
    #[default]
    Choose,
    /// An I/O error until the guest writes them again.
    Error,
}

/// What a scrub does about a difference (rule Y6).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum ScrubMode {
    /// Report it.
    Check,
    /// Report it and rewrite the replica that was outvoted.
    Repair,
}

/// How the log is written.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// The least important thing that is logged.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum LogLevel {
    /// Requests of the guest that failed, and what ends the daemon.
    Error,
    /// Also things to act on: a replica that lied, failed or fell behind.
    Warn,
    /// Also changes of state: connections, repairs, start and stop.
    #[default]
    Info,
    /// Also single requests, as far as they are unusual.
    Debug,
    /// Everything.
    Trace,
}

/// How long a worker with nothing to do looks for more before it sleeps: `adaptive`, or a number of
/// microseconds.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Polling {
    /// As long as it pays, and not at all on an idle disk.
    #[default]
    Adaptive,
    /// So long each time; zero: not at all.
    UpTo(Duration),
}

impl Polling {
    /// Beyond a millisecond it is no more a question of waking up.
    const MOST_US: u64 = 1000;
}

impl FromStr for Polling {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        if text == "adaptive" {
            return Ok(Self::Adaptive);
        }
        let number = text.parse().ok().filter(|us| *us <= Self::MOST_US);
        let us = number.ok_or_else(|| ValueError::Polling(text.to_owned()))?;
        Ok(Self::UpTo(Duration::from_micros(us)))
    }
}

impl<'de> Deserialize<'de> for Polling {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct PollingVisitor;

        impl Visitor<'_> for PollingVisitor {
            type Value = Polling;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("\"adaptive\" or a number of microseconds")
            }

            fn visit_i64<E: de::Error>(self, us: i64) -> Result<Polling, E> {
                self.visit_str(&us.to_string())
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Polling, E> {
                text.parse().map_err(E::custom)
            }
        }

        deserializer.deserialize_any(PollingVisitor)
    }
}

/// `on` or `off`; the file also takes `true` and `false`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OnOff {
    /// Do it.
    On,
    /// Do not.
    Off,
}

/// What becomes of a disk whose replicas are longer than it when it is opened.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GrowMode {
    /// Its size stays; the rest of the replicas is not used.
    #[default]
    #[value(name = "no")]
    #[serde(rename = "no")]
    Never,
    /// It becomes as long as the shortest of them.
    Found,
}

impl OnOff {
    /// Whether it is [`OnOff::On`].
    #[must_use]
    pub fn is_on(self) -> bool {
        self == Self::On
    }
}

impl FromStr for OnOff {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        match text {
            "on" => Ok(Self::On),
            "off" => Ok(Self::Off),
            other => Err(ValueError::OnOff(other.to_owned())),
        }
    }
}

impl<'de> Deserialize<'de> for OnOff {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct OnOffVisitor;

        impl Visitor<'_> for OnOffVisitor {
            type Value = OnOff;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("\"on\" or \"off\"")
            }

            fn visit_bool<E: de::Error>(self, on: bool) -> Result<OnOff, E> {
                Ok(if on { OnOff::On } else { OnOff::Off })
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<OnOff, E> {
                text.parse().map_err(E::custom)
            }
        }

        deserializer.deserialize_any(OnOffVisitor)
    }
}

/// The logical block size the guest is told.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BlockSize {
    /// 512 bytes.
    Bytes512,
    /// 4096 bytes.
    Bytes4096,
}

impl BlockSize {
    /// The size in bytes.
    #[must_use]
    pub fn bytes(self) -> u32 {
        match self {
            Self::Bytes512 => 512,
            Self::Bytes4096 => 4096,
        }
    }
}

impl FromStr for BlockSize {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        match text {
            "512" => Ok(Self::Bytes512),
            "4096" | "4k" | "4K" => Ok(Self::Bytes4096),
            other => Err(ValueError::BlockSize(other.to_owned())),
        }
    }
}

impl<'de> Deserialize<'de> for BlockSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let number = i64::deserialize(deserializer)?;
        number.to_string().parse().map_err(de::Error::custom)
    }
}

/// A number of bytes, written with a 1024-based suffix if that is shorter.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct ByteSize(pub u64);

impl FromStr for ByteSize {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let refuse = || ValueError::Size(text.to_owned());
        let digits_end = text
            .find(|c: char| !c.is_ascii_digit())
            .unwrap_or(text.len());
        let (digits, suffix) = text.split_at(digits_end);
        let shift = match suffix {
            "" | "B" => 0,
            "K" | "k" | "KiB" => 10,
            "M" | "m" | "MiB" => 20,
            "G" | "g" | "GiB" => 30,
            "T" | "t" | "TiB" => 40,
            _ => return Err(refuse()),
        };
        let number: u64 = digits.parse().map_err(|_| refuse())?;
        number.checked_mul(1 << shift).map(Self).ok_or_else(refuse)
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (shift, unit) in [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")] {
            let number = self.0 >> shift;
            if number != 0 && number << shift == self.0 {
                return write!(f, "{number} {unit}");
            }
        }
        write!(f, "{} bytes", self.0)
    }
}

impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct SizeVisitor;

        impl Visitor<'_> for SizeVisitor {
            type Value = ByteSize;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number of bytes or a text such as \"64M\"")
            }

            fn visit_i64<E: de::Error>(self, number: i64) -> Result<ByteSize, E> {
                u64::try_from(number)
                    .map(ByteSize)
                    .map_err(|_| E::custom(ValueError::Size(number.to_string())))
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<ByteSize, E> {
                text.parse().map_err(E::custom)
            }
        }

        deserializer.deserialize_any(SizeVisitor)
    }
}

/// How often something is done on its own: `off`, or a time of at least a minute such as `7d`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Interval(pub Option<Duration>);

impl Interval {
    /// Shorter ones would be no pause.
    const LEAST: Duration = Duration::from_secs(60);
    /// Ten years: longer ones are a slip of the pen, and sums of them stay far from overflow.
    const MOST: Duration = Duration::from_secs(520 * 7 * 24 * 3600);
}

impl FromStr for Interval {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        if text == "off" {
            return Ok(Self(None));
        }
        let refuse = || ValueError::Interval(text.to_owned());
        let digits_end = text.find(|c: char| !c.is_ascii_digit());
        let (digits, unit) = text.split_at(digits_end.ok_or_else(refuse)?);
        let unit_seconds = match unit {
            "s" => 1,
            "m" => 60,
            "h" => 3600,
            "d" => 24 * 3600,
            "w" => 7 * 24 * 3600,
            _ => return Err(refuse()),
        };
        let number: u64 = digits.parse().map_err(|_| refuse())?;
        let seconds = number.checked_mul(unit_seconds).ok_or_else(refuse)?;
        let interval = Duration::from_secs(seconds);
        if !(Self::LEAST..=Self::MOST).contains(&interval) {
            return Err(refuse());
        }
        Ok(Self(Some(interval)))
    }
}

impl<'de> Deserialize<'de> for Interval {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct IntervalVisitor;

        impl Visitor<'_> for IntervalVisitor {
            type Value = Interval;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("\"off\" or a text such as \"7d\"")
            }

            fn visit_bool<E: de::Error>(self, on: bool) -> Result<Interval, E> {
                if on {
                    return Err(E::invalid_value(de::Unexpected::Bool(on), &self));
                }
                Ok(Interval(None))
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Interval, E> {
                text.parse().map_err(E::custom)
            }
        }

        deserializer.deserialize_any(IntervalVisitor)
    }
}

/// Where events go. A number is a descriptor the parent left open; a file of that name is
/// written `./3`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum EventsTarget {
    /// A file or fifo, appended to.
    Path(PathBuf),
    /// An open descriptor.
    Fd(i32),
}

impl FromStr for EventsTarget {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        if text.is_empty() {
            return Err(ValueError::EventsTarget);
        }
        if text.bytes().all(|byte| byte.is_ascii_digit())
            && let Ok(fd) = text.parse()
        {
            return Ok(Self::Fd(fd));
        }
        Ok(Self::Path(PathBuf::from(text)))
    }
}

impl<'de> Deserialize<'de> for EventsTarget {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TargetVisitor;

        impl Visitor<'_> for TargetVisitor {
            type Value = EventsTarget;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a path or the number of an open descriptor")
            }

            fn visit_i64<E: de::Error>(self, number: i64) -> Result<EventsTarget, E> {
                match i32::try_from(number) {
                    Ok(fd) if fd >= 0 => Ok(EventsTarget::Fd(fd)),
                    _ => Err(E::invalid_value(de::Unexpected::Signed(number), &self)),
                }
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<EventsTarget, E> {
                text.parse().map_err(E::custom)
            }
        }

        deserializer.deserialize_any(TargetVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn byte_size_reads_suffixes_and_refuses_the_rest() {
        let good = [
            ("0", 0),
            ("1", 1),
            ("512B", 512),
            ("64K", 65_536),
            ("64KiB", 65_536),
            ("64M", 64 << 20),
            ("1G", 1 << 30),
            ("2TiB", 2 << 40),
        ];
        for (text, bytes) in good {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
        }
        let bad = [
            "",
            "M",
            "-1",
            "+1",
            "1.5G",
            "64MB",
            "64 M",
            "18446744073709551616",
            "16777216T",
            "é",
        ];
        for text in bad {
            assert_eq!(
                text.parse::<ByteSize>(),
                Err(ValueError::Size(text.to_owned())),
                "{text}"
            );
        }
    }

    #[test]
    fn byte_size_shows_the_largest_whole_unit() {
        assert_eq!(ByteSize(64 << 20).to_string(), "64 MiB");
        assert_eq!(ByteSize((64 << 20) + 1024).to_string(), "65537 KiB");
        assert_eq!(ByteSize(513).to_string(), "513 bytes");
        assert_eq!(ByteSize(0).to_string(), "0 bytes");
    }

    #[test]
    fn interval_reads_units_and_refuses_the_rest() {
        let good = [
            ("off", None),
            ("60s", Some(60)),
            ("1m", Some(60)),
            ("12h", Some(43_200)),
            ("7d", Some(604_800)),
            ("520w", Some(314_496_000)),
        ];
        for (text, seconds) in good {
            let expected = Interval(seconds.map(Duration::from_secs));
            assert_eq!(text.parse(), Ok(expected), "{text}");
        }
        for text in [
            "",
            "7",
            "d",
            "59s",
            "0d",
            "521w",
            "7 d",
            "1.5h",
            "-1d",
            "9999999999999999w",
        ] {
            assert_eq!(
                text.parse::<Interval>(),
                Err(ValueError::Interval(text.to_owned())),
                "{text}"
            );
        }
    }

    #[test]
    fn events_target_takes_digits_for_a_descriptor() {
        assert_eq!("3".parse(), Ok(EventsTarget::Fd(3)));
        assert_eq!("./3".parse(), Ok(EventsTarget::Path("./3".into())));
        assert_eq!("3a".parse(), Ok(EventsTarget::Path("3a".into())));
        assert_eq!("".parse::<EventsTarget>(), Err(ValueError::EventsTarget));
        let long = "99999999999";
        assert_eq!(long.parse(), Ok(EventsTarget::Path(long.into())));
    }
}
