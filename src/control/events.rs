// SPDX-License-Identifier: Apache-2.0
//! Every event there is, in the shape QMP gives events.
//!
//! An event is one line of JSON: `{"event": NAME, "data": {...}, "timestamp": {"seconds": ...,
//! "microseconds": ...}}`. QUORUM_REPORT_BAD and QUORUM_FAILURE have QEMU's name and fields
//! (QEMU, qapi/block-core.json) and some more of ours; the other names begin with QUORUM_BLK_.
//! `docs/events.md` describes them for people; keep both in step.

use std::io;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;

use crate::quorum::{BadCause, BehindCause, During, Report};
use crate::units::{ReplicaId, SectorRange};

/// Something that happened to the disk, and when.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Event {
    /// What.
    pub data: EventData,
    /// When, by the clock on the wall.
    pub at: SystemTime,
    /// Reports like this one since the last line about it that got no line of their own.
    pub suppressed: u64,
}

/// The kinds of events with what belongs to each.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum EventData {
    /// What a lane reported.
    Report(Report),
    /// Reports that did not fit in the way from the workers to the control thread.
    ReportsLost {
        /// How many.
        count: u64,
    },
    /// Events that were not written because the reader was too slow.
    EventsLost {
        /// How many.
        count: u64,
    },
}

/// Which events share one allowance of the rate limit: a name and, if the event is about a
/// replica, that one (as QEMU does for QUORUM_REPORT_BAD).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct EventKey {
    name: &'static str,
    /// Faults of different kinds of operations do not hide each other.
    during: &'static str,
    replica: Option<ReplicaId>,
}

/// What the names in an event mean.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Names {
    /// The disk.
    pub disk: String,
    /// The replicas, by slot.
    pub replicas: Vec<String>,
    /// Sectors of the disk: QEMU reports a failed flush for all of them.
    pub disk_sectors: u64,
}

impl Names {
    /// The name of a replica.
    #[must_use]
    pub fn replica(&self, replica: ReplicaId) -> &str {
        self.replicas
            .get(replica.index())
            .map_or("unknown", String::as_str)
    }
}

impl EventData {
    /// The event's name.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Report(report) => match report {
                Report::Bad { .. } | Report::FlushFailed { .. } => "QUORUM_REPORT_BAD",
                Report::Failure { .. } => "QUORUM_FAILURE",
                Report::Transient { .. } => "QUORUM_BLK_TRANSIENT",
                Report::Repaired { .. } => "QUORUM_BLK_REPAIRED",
                Report::RepairFailed { .. } => "QUORUM_BLK_REPAIR_FAILED",
                Report::Behind { .. } => "QUORUM_BLK_REPLICA_BEHIND",
                Report::VerifyFailed { .. } => "QUORUM_BLK_VERIFY_FAILED",
            },
            Self::ReportsLost { .. } => "QUORUM_BLK_REPORTS_LOST",
            Self::EventsLost { .. } => "QUORUM_BLK_EVENTS_LOST",
        }
    }

    /// With which other events it shares an allowance.
    #[must_use]
    pub fn key(&self) -> EventKey {
        let (during, replica) = match self {
            Self::Report(report) => match *report {
                Report::Bad {
                    replica, during, ..
                } => (during_name(during), Some(replica)),
                Report::FlushFailed { replica, .. } => ("flush", Some(replica)),
                Report::Failure { during, .. } => (during_name(during), None),
                Report::Repaired { replica, .. }
                | Report::RepairFailed { replica, .. }
                | Report::Behind { replica, .. } => ("", Some(replica)),
                Report::Transient { .. } | Report::VerifyFailed { .. } => ("", None),
            },
            Self::ReportsLost { .. } | Self::EventsLost { .. } => ("", None),
        };
        EventKey {
            name: self.name(),
            during,
            replica,
        }
    }

    /// The two events as one if that tells all: equal but for ranges that touch or overlap, as
    /// one long read past a damaged stretch makes them.
    #[must_use]
    pub fn merged(self, later: Self) -> Option<Self> {
        let (Self::Report(first), Self::Report(second)) = (self, later) else {
            return None;
        };
        let (first_range, second_range) = (range_of(&first)?, range_of(&second)?);
        let joined = joined(first_range, second_range)?;
        let first = with_range(first, joined);
        let second = with_range(second, joined);
        (first == second).then_some(Self::Report(second))
    }
}

/// The range a report is about, if a longer one could stand for it.
fn range_of(report: &Report) -> Option<SectorRange> {
    match *report {
        Report::Bad { range, .. }
        | Report::Failure { range, .. }
        | Report::Transient { range }
        | Report::Repaired { range, .. }
        | Report::RepairFailed { range, .. }
        | Report::VerifyFailed { range } => Some(range),
        Report::Behind { extent, .. } => Some(extent),
        Report::FlushFailed { .. } => None,
    }
}

fn with_range(mut report: Report, new: SectorRange) -> Report {
    match &mut report {
        Report::Bad { range, .. }
        | Report::Failure { range, .. }
        | Report::Transient { range }
        | Report::Repaired { range, .. }
        | Report::RepairFailed { range, .. }
        | Report::VerifyFailed { range }
        | Report::Behind { extent: range, .. } => *range = new,
        Report::FlushFailed { .. } => {}
    }
    report
}

/// Both ranges as one, if there is no sector between them.
fn joined(a: SectorRange, b: SectorRange) -> Option<SectorRange> {
    if a.start() > b.end() || b.start() > a.end() {
        return None;
    }
    let start = a.start().min(b.start());
    let count = u32::try_from(a.end().max(b.end()) - start).ok()?;
    SectorRange::new(start, count)
}

fn during_name(during: During) -> &'static str {
    match during {
        During::Read => "read",
        During::Write => "write",
        During::Flush => "flush",
    }
}

/// The text of an errno, with its number: what a person reads and what a program can match.
#[must_use]
pub fn errno_text(errno: i32) -> String {
    io::Error::from_raw_os_error(errno).to_string()
}

impl Event {
    /// An event that happens now and stands for itself alone.
    #[must_use]
    pub fn new(data: EventData, at: SystemTime) -> Self {
        Self {
            data,
            at,
            suppressed: 0,
        }
    }

    /// The event as one line of JSON with the newline.
    #[must_use]
    pub fn to_line(&self, names: &Names) -> String {
        let since_epoch = self.at.duration_since(UNIX_EPOCH);
        let since_epoch = since_epoch.unwrap_or(Duration::ZERO);
        let mut data = self.fields(names);
        data.suppressed = (self.suppressed > 0).then_some(self.suppressed);
        let line = Line {
            event: self.data.name(),
            data,
            timestamp: Timestamp {
                seconds: since_epoch.as_secs(),
                microseconds: since_epoch.subsec_micros(),
            },
        };
        let mut text = serde_json::to_string(&line).expect("an event has only texts and numbers");
        text.push('\n');
        text
    }

    fn fields<'a>(&self, names: &'a Names) -> Fields<'a> {
        let report = match self.data {
            EventData::Report(report) => report,
            EventData::ReportsLost { count } | EventData::EventsLost { count } => {
                return Fields {
                    count: Some(count),
                    ..Fields::of_disk(names)
                };
            }
        };
        match report {
            Report::Bad {
                replica,
                range,
                cause,
                during,
            } => Fields {
                kind: Some(during_name(during)),
                error: bad_error(cause),
                cause: Some(bad_cause(cause)),
                errno: bad_errno(cause),
                node_name: Some(names.replica(replica)),
                ..Fields::of_replica(names, replica, range)
            },
            Report::Failure { range, during } => Fields {
                kind: Some(during_name(during)),
                ..Fields::of_range(names, range)
            },
            Report::Transient { range } | Report::VerifyFailed { range } => {
                Fields::of_range(names, range)
            }
            Report::Repaired { replica, range } | Report::RepairFailed { replica, range } => {
                Fields::of_replica(names, replica, range)
            }
            Report::Behind {
                replica,
                extent,
                why,
            } => Fields {
                cause: Some(behind_cause(why)),
                error: behind_errno(why).map(errno_text),
                errno: behind_errno(why),
                ..Fields::of_replica(names, replica, extent)
            },
            Report::FlushFailed {
                replica,
                errno,
                extents,
            } => Fields {
                kind: Some("flush"),
                error: Some(errno_text(errno)),
                cause: Some("error"),
                errno: Some(errno),
                node_name: Some(names.replica(replica)),
                replica: Some(names.replica(replica)),
                sector_num: Some(0),
                sectors_count: Some(names.disk_sectors),
                behind_extents: Some(extents),
                ..Fields::of_disk(names)
            },
        }
    }
}

fn bad_error(cause: BadCause) -> Option<String> {
    match cause {
        BadCause::Differs => None,
        BadCause::Error(errno) => Some(errno_text(errno)),
        BadCause::Short => Some("fewer bytes than asked for".to_owned()),
    }
}

fn bad_errno(cause: BadCause) -> Option<i32> {
    match cause {
        BadCause::Error(errno) => Some(errno),
        BadCause::Differs | BadCause::Short => None,
    }
}

fn bad_cause(cause: BadCause) -> &'static str {
    match cause {
        BadCause::Differs => "differs",
        BadCause::Error(_) => "error",
        BadCause::Short => "short",
    }
}

fn behind_errno(why: BehindCause) -> Option<i32> {
    match why {
        BehindCause::WriteFailed(errno) => Some(errno),
        BehindCause::Late | BehindCause::RepairFailed => None,
    }
}

fn behind_cause(why: BehindCause) -> &'static str {
    match why {
        BehindCause::WriteFailed(_) => "write-failed",
        BehindCause::Late => "late",
        BehindCause::RepairFailed => "repair-failed",
    }
}

#[derive(Serialize)]
struct Line<'a> {
    event: &'static str,
    data: Fields<'a>,
    timestamp: Timestamp,
}

#[derive(Serialize)]
struct Timestamp {
    seconds: u64,
    microseconds: u32,
}

/// All fields any event has, in the order they are written; what is `None` is left out.
#[derive(Default, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Fields<'a> {
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    kind: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    node_name: Option<&'a str>,
    reference: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    replica: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    sector_num: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    sectors_count: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cause: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    errno: Option<i32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    behind_extents: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    count: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    suppressed: Option<u64>,
}

impl<'a> Fields<'a> {
    fn of_disk(names: &'a Names) -> Self {
        Self {
            reference: &names.disk,
            ..Self::default()
        }
    }

    fn of_range(names: &'a Names, range: SectorRange) -> Self {
        Self {
            sector_num: Some(range.start()),
            sectors_count: Some(u64::from(range.count())),
            ..Self::of_disk(names)
        }
    }

    fn of_replica(names: &'a Names, replica: ReplicaId, range: SectorRange) -> Self {
        Self {
            replica: Some(names.replica(replica)),
            ..Self::of_range(names, range)
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn names() -> Names {
        Names {
            disk: "disk-1".to_owned(),
            replicas: vec!["left".to_owned(), "right".to_owned()],
            disk_sectors: 4096,
        }
    }

    fn range(start: u64, count: u32) -> SectorRange {
        SectorRange::new(start, count).unwrap()
    }

    fn written(report: Report, suppressed: u64) -> Value {
        let at = UNIX_EPOCH + Duration::new(1_700_000_000, 123_456_789);
        let event = Event {
            suppressed,
            ..Event::new(EventData::Report(report), at)
        };
        let line = event.to_line(&names());
        assert!(line.ends_with("}\n") && line.matches('\n').count() == 1);
        serde_json::from_str(&line).unwrap()
    }

    #[test]
    fn report_bad_has_the_fields_of_qemu_and_ours() {
        let report = Report::Bad {
            replica: ReplicaId::new(1),
            range: range(8, 3),
            cause: BadCause::Error(libc::EIO),
            during: During::Read,
        };
        let expected = json!({
            "event": "QUORUM_REPORT_BAD",
            "data": {
                "type": "read", "error": "Input/output error (os error 5)",
                "node-name": "right", "sector-num": 8, "sectors-count": 3,
                "reference": "disk-1", "replica": "right", "cause": "error", "errno": 5,
                "suppressed": 7,
            },
            "timestamp": {"seconds": 1_700_000_000, "microseconds": 123_456},
        });
        assert_eq!(written(report, 7), expected);
    }

    #[test]
    fn report_bad_of_a_difference_has_no_error_as_in_qemu() {
        let report = Report::Bad {
            replica: ReplicaId::new(0),
            range: range(0, 1),
            cause: BadCause::Differs,
            during: During::Read,
        };
        let value = written(report, 0);
        assert_eq!(value["data"]["cause"], "differs");
        assert!(value["data"].get("error").is_none());
        assert!(value["data"].get("suppressed").is_none());
    }

    #[test]
    fn flush_failure_is_a_report_bad_over_the_whole_disk_as_in_qemu() {
        let value = written(
            Report::FlushFailed {
                replica: ReplicaId::new(0),
                errno: libc::EIO,
                extents: 2,
            },
            0,
        );
        assert_eq!(value["event"], "QUORUM_REPORT_BAD");
        assert_eq!(value["data"]["type"], "flush");
        assert_eq!(value["data"]["sectors-count"], 4096);
        assert_eq!(value["data"]["behind-extents"], 2);
    }

    #[test]
    fn failure_names_the_disk() {
        let value = written(
            Report::Failure {
                range: range(5, 2),
                during: During::Write,
            },
            0,
        );
        assert_eq!(value["event"], "QUORUM_FAILURE");
        assert_eq!(
            value["data"],
            json!({"type": "write", "reference": "disk-1", "sector-num": 5, "sectors-count": 2})
        );
    }

    #[test]
    fn merged_joins_neighbours_of_one_kind_only() {
        let bad = |start, count, cause| {
            EventData::Report(Report::Bad {
                replica: ReplicaId::new(0),
                range: range(start, count),
                cause,
                during: During::Read,
            })
        };
        let differs = BadCause::Differs;
        assert_eq!(
            bad(0, 4, differs).merged(bad(4, 4, differs)),
            Some(bad(0, 8, differs))
        );
        assert_eq!(
            bad(4, 4, differs).merged(bad(0, 5, differs)),
            Some(bad(0, 8, differs))
        );
        assert_eq!(bad(0, 4, differs).merged(bad(5, 1, differs)), None);
        assert_eq!(bad(0, 4, differs).merged(bad(4, 1, BadCause::Short)), None);
        let lost = EventData::EventsLost { count: 1 };
        assert_eq!(lost.merged(lost), None);
    }
}
