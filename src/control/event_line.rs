// SPDX-License-Identifier: Apache-2.0
//! An event as one line of JSON, for programs.

use std::borrow::Cow;
use std::time::{Duration, UNIX_EPOCH};

use serde::Serialize;

use super::events::{
    Event, EventData, Names, command_name, command_replica, during_name, errno_text, pass_name,
    state_name,
};
use crate::quorum::{
    BadCause, BehindCause, KeeperReport, KickCause, Refusal, Report, ScrubCounts, StateCause,
};
use crate::units::{ReplicaId, SectorRange};

impl Event {
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
            EventData::RecordCopyLost { copy, errno } => {
                return Fields {
                    error: Some(errno_text(errno)),
                    errno: Some(errno),
                    copy: Some(copy),
                    path: Some(names.record_copy(copy).to_string_lossy()),
                    ..Fields::of_disk(names)
                };
            }
            EventData::RecordCopyReturned { copy } => {
                return Fields {
                    copy: Some(copy),
                    path: Some(names.record_copy(copy).to_string_lossy()),
                    ..Fields::of_disk(names)
                };
            }
            EventData::RecordRegained => return Fields::of_disk(names),
            EventData::Keeper(report) => return keeper_fields(names, &report),
            EventData::FirstRequest { ms_after_exec } => {
                return Fields {
                    ms_after_exec: Some(ms_after_exec),
                    ..Fields::of_disk(names)
                };
            }
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
            Report::Repaired { replica, range }
            | Report::RepairFailed { replica, range }
            | Report::Chosen { replica, range } => Fields::of_replica(names, replica, range),
            Report::RecordLost => Fields::of_disk(names),
            Report::Lagging { replica } => Fields {
                replica: Some(names.replica(replica)),
                ..Fields::of_disk(names)
            },
            Report::Kicked {
                replica,
                why,
                extents,
            } => Fields {
                error: kick_errno(why).map(errno_text),
                cause: Some(kick_cause(why)),
                errno: kick_errno(why),
                replica: Some(names.replica(replica)),
                behind_extents: Some(extents),
                ..Fields::of_disk(names)
            },
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

/// What the keeper has to say.
fn keeper_fields<'a>(names: &'a Names, report: &KeeperReport) -> Fields<'a> {
    let of = |replica: ReplicaId| Fields {
        replica: Some(names.replica(replica)),
        ..Fields::of_disk(names)
    };
    match *report {
        KeeperReport::State {
            replica,
            from,
            to,
            why,
        } => Fields {
            from: Some(state_name(from)),
            to: Some(state_name(to)),
            cause: Some(state_cause(why)),
            ..of(replica)
        },
        KeeperReport::Suspect { replica } | KeeperReport::Prompt { replica } => of(replica),
        KeeperReport::Kept { replica, why } => Fields {
            cause: Some(kick_cause(why)),
            ..of(replica)
        },
        KeeperReport::ResyncBegun {
            replica,
            bytes_left,
        } => Fields {
            bytes_left: Some(bytes_left),
            ..of(replica)
        },
        KeeperReport::ResyncProgress {
            replica,
            bytes_left,
            bytes_done,
        } => Fields {
            bytes_left: Some(bytes_left),
            bytes_done: Some(bytes_done),
            ..of(replica)
        },
        KeeperReport::ResyncDone {
            replica,
            bytes_done,
        } => Fields {
            bytes_done: Some(bytes_done),
            ..of(replica)
        },
        KeeperReport::PassBegun {
            kind,
            sector,
            repair,
        } => Fields {
            kind: Some(pass_name(kind)),
            sector_num: Some(sector),
            repair: Some(repair),
            ..Fields::of_disk(names)
        },
        KeeperReport::PassDone { kind, counts } | KeeperReport::PassStopped { kind, counts } => {
            Fields {
                kind: Some(pass_name(kind)),
                counts: Some(PassSectors::from(counts)),
                ..Fields::of_disk(names)
            }
        }
        KeeperReport::Forced { replica, extents } => Fields {
            extents: Some(extents),
            ..of(replica)
        },
        KeeperReport::Refused { command, why } => Fields {
            command: Some(command_name(command)),
            replica: command_replica(command).map(|replica| names.replica(replica)),
            cause: Some(refusal_cause(why)),
            ..Fields::of_disk(names)
        },
    }
}

fn state_cause(why: StateCause) -> &'static str {
    match why {
        StateCause::Behind => "behind",
        StateCause::CaughtUp => "caught-up",
        StateCause::Kicked(why) => kick_cause(why),
        StateCause::Reopened => "reopened",
        StateCause::Replaced => "replaced",
        StateCause::Cleared => "cleared",
    }
}

fn refusal_cause(why: Refusal) -> &'static str {
    match why {
        Refusal::NoSuchReplica => "no-such-replica",
        Refusal::NotUp => "not-up",
        Refusal::Needed => "needed",
        Refusal::NoScrub => "no-scrub",
        Refusal::NothingLost => "nothing-lost",
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

fn kick_errno(why: KickCause) -> Option<i32> {
    match why {
        KickCause::FlushFailed(errno) => Some(errno),
        KickCause::Hung
        | KickCause::Vanished
        | KickCause::Budget
        | KickCause::Absent
        | KickCause::Operator => None,
    }
}

fn kick_cause(why: KickCause) -> &'static str {
    match why {
        KickCause::Hung => "hung",
        KickCause::FlushFailed(_) => "flush-failed",
        KickCause::Vanished => "vanished",
        KickCause::Budget => "budget",
        KickCause::Absent => "absent",
        KickCause::Operator => "operator",
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
    copy: Option<u8>,
    #[serde(skip_serializing_if = "Option::is_none")]
    path: Option<Cow<'a, str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    from: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    to: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    bytes_left: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    bytes_done: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    extents: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    repair: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    command: Option<&'static str>,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    counts: Option<PassSectors>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ms_after_exec: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    count: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    suppressed: Option<u64>,
}

/// What a pass over the disk met, in sectors; see [`ScrubCounts`].
#[derive(Clone, Copy, Serialize)]
#[serde(rename_all = "kebab-case")]
struct PassSectors {
    compared_sectors: u64,
    differing_sectors: u64,
    unreadable_sectors: u64,
    repaired_sectors: u64,
    unresolved_sectors: u64,
    failed_sectors: u64,
}

impl From<ScrubCounts> for PassSectors {
    fn from(counts: ScrubCounts) -> Self {
        Self {
            compared_sectors: counts.compared,
            differing_sectors: counts.differing,
            unreadable_sectors: counts.unreadable,
            repaired_sectors: counts.repaired,
            unresolved_sectors: counts.unresolved,
            failed_sectors: counts.failed,
        }
    }
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
    use crate::quorum::{During, PassKind, ReplicaState};

    fn names() -> Names {
        Names {
            disk: "disk-1".to_owned(),
            replicas: vec!["left".to_owned(), "right".to_owned()],
            record_copies: vec!["/a.qrec".into()],
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
    fn kick_names_replica_and_cause() {
        let report = |why| Report::Kicked {
            replica: ReplicaId::new(1),
            why,
            extents: 4,
        };
        let value = written(report(KickCause::FlushFailed(libc::ETIMEDOUT)), 0);
        assert_eq!(value["event"], "QUORUM_BLK_REPLICA_KICKED");
        assert_eq!(
            value["data"],
            json!({
                "error": "Connection timed out (os error 110)", "reference": "disk-1",
                "replica": "right", "cause": "flush-failed", "errno": 110, "behind-extents": 4,
            })
        );
        let value = written(report(KickCause::Hung), 0);
        assert_eq!(value["data"]["cause"], "hung");
        assert!(value["data"].get("errno").is_none());
    }

    #[test]
    fn record_events_name_the_copy() {
        let lost = EventData::RecordCopyLost {
            copy: 0,
            errno: libc::ENOSPC,
        };
        let line = Event::new(lost, UNIX_EPOCH).to_line(&names());
        let value: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(value["event"], "QUORUM_BLK_RECORD_COPY_LOST");
        assert_eq!(
            value["data"],
            json!({
                "error": "No space left on device (os error 28)", "reference": "disk-1",
                "errno": 28, "copy": 0, "path": "/a.qrec",
            })
        );
        let value = written(Report::RecordLost, 0);
        assert_eq!(value["data"], json!({"reference": "disk-1"}));
        let back = EventData::RecordCopyReturned { copy: 0 };
        let line = Event::new(back, UNIX_EPOCH).to_line(&names());
        let value: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(value["event"], "QUORUM_BLK_RECORD_COPY_RETURNED");
        assert_eq!(
            value["data"],
            json!({"reference": "disk-1", "copy": 0, "path": "/a.qrec"})
        );
        let line = Event::new(EventData::RecordRegained, UNIX_EPOCH).to_line(&names());
        let value: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(value["event"], "QUORUM_BLK_RECORD_REGAINED");
        assert_eq!(value["data"], json!({"reference": "disk-1"}));
    }

    #[test]
    fn first_request_tells_how_long_it_took() {
        let first = EventData::FirstRequest { ms_after_exec: 34 };
        let line = Event::new(first, UNIX_EPOCH).to_line(&names());
        let value: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(value["event"], "QUORUM_BLK_FIRST_REQUEST");
        assert_eq!(
            value["data"],
            json!({"reference": "disk-1", "ms-after-exec": 34})
        );
    }

    fn kept(report: KeeperReport) -> Value {
        let line = Event::new(EventData::Keeper(report), UNIX_EPOCH).to_line(&names());
        serde_json::from_str(&line).unwrap()
    }

    #[test]
    fn states_and_progress_of_a_replica_are_told() {
        let replica = ReplicaId::new(0);
        let value = kept(KeeperReport::State {
            replica,
            from: ReplicaState::InSync,
            to: ReplicaState::Missing,
            why: StateCause::Kicked(KickCause::Vanished),
        });
        assert_eq!(value["event"], "QUORUM_BLK_REPLICA_STATE");
        assert_eq!(
            value["data"],
            json!({
                "reference": "disk-1", "replica": "left", "cause": "vanished",
                "from": "in-sync", "to": "missing",
            })
        );
        let value = kept(KeeperReport::ResyncProgress {
            replica,
            bytes_left: 3,
            bytes_done: 4,
        });
        assert_eq!(value["event"], "QUORUM_BLK_RESYNC_PROGRESS");
        assert_eq!(
            value["data"],
            json!({"reference": "disk-1", "replica": "left", "bytes-left": 3, "bytes-done": 4})
        );
    }

    #[test]
    fn scrub_that_is_done_tells_its_counts() {
        let counts = ScrubCounts {
            compared: 1,
            differing: 2,
            unreadable: 3,
            repaired: 4,
            unresolved: 5,
            failed: 6,
        };
        let kind = PassKind::Scrub;
        let value = kept(KeeperReport::PassDone { kind, counts });
        assert_eq!(value["event"], "QUORUM_BLK_SCRUB_DONE");
        assert_eq!(
            value["data"],
            json!({
                "type": "scrub", "reference": "disk-1", "compared-sectors": 1,
                "differing-sectors": 2, "unreadable-sectors": 3, "repaired-sectors": 4,
                "unresolved-sectors": 5, "failed-sectors": 6,
            })
        );
    }
}
