// SPDX-License-Identifier: Apache-2.0
//! Every event there is, in the shape QMP gives events.
//!
//! An event is one line of JSON: `{"event": NAME, "data": {...}, "timestamp": {"seconds": ...,
//! "microseconds": ...}}`. QUORUM_REPORT_BAD and QUORUM_FAILURE have QEMU's name and fields
//! (QEMU, qapi/block-core.json) and some more of ours; the other names begin with QUORUM_BLK_.
//! `docs/events.md` describes them for people; keep both in step. How they are written is in
//! `event_line` (JSON) and `event_text` (the log).

use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use crate::quorum::{Command, During, KeeperReport, PassKind, ReplicaState, Report};
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
    /// A copy of the state record cannot be written and is not used any more (rule R1).
    RecordCopyLost {
        /// Which copy, from 0.
        copy: u8,
        /// Positive errno value; `ETIMEDOUT` if a write did not end in time.
        errno: i32,
    },
    /// A copy of the state record that was left out is used again.
    RecordCopyReturned {
        /// Which copy, from 0.
        copy: u8,
    },
    /// Enough copies of the state record are back: what has to be remembered can be written again.
    RecordRegained,
    /// What the keeper has to say.
    Keeper(KeeperReport),
    /// The first request of a guest since the process began was completed: how long it was without
    /// a disk, if it had one before.
    FirstRequest {
        /// The age of the process at that moment, in milliseconds.
        ms_after_exec: u64,
    },
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
    /// A copy of the record.
    copy: Option<u8>,
}

/// What the names in an event mean.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Names {
    /// The disk.
    pub disk: String,
    /// The replicas, by slot.
    pub replicas: Vec<String>,
    /// The files of the record's copies.
    pub record_copies: Vec<PathBuf>,
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

    /// The file of a copy of the record.
    #[must_use]
    pub fn record_copy(&self, copy: u8) -> &Path {
        let path = self.record_copies.get(usize::from(copy));
        path.map_or(Path::new("unknown"), PathBuf::as_path)
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
                Report::Kicked { .. } => "QUORUM_BLK_REPLICA_KICKED",
                Report::Lagging { .. } => "QUORUM_BLK_REPLICA_LAGGING",
                Report::Chosen { .. } => "QUORUM_BLK_CHOSEN",
                Report::RecordLost => "QUORUM_BLK_RECORD_LOST",
                Report::VerifyFailed { .. } => "QUORUM_BLK_VERIFY_FAILED",
            },
            Self::Keeper(report) => keeper_name(report),
            Self::RecordCopyLost { .. } => "QUORUM_BLK_RECORD_COPY_LOST",
            Self::FirstRequest { .. } => "QUORUM_BLK_FIRST_REQUEST",
            Self::RecordCopyReturned { .. } => "QUORUM_BLK_RECORD_COPY_RETURNED",
            Self::RecordRegained => "QUORUM_BLK_RECORD_REGAINED",
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
                | Report::Behind { replica, .. }
                | Report::Kicked { replica, .. }
                | Report::Lagging { replica }
                | Report::Chosen { replica, .. } => ("", Some(replica)),
                Report::Transient { .. } | Report::VerifyFailed { .. } | Report::RecordLost => {
                    ("", None)
                }
            },
            Self::Keeper(report) => keeper_key(report),
            Self::RecordCopyLost { .. }
            | Self::FirstRequest { .. }
            | Self::RecordCopyReturned { .. }
            | Self::RecordRegained
            | Self::ReportsLost { .. }
            | Self::EventsLost { .. } => ("", None),
        };
        let copy = match *self {
            Self::RecordCopyLost { copy, .. } | Self::RecordCopyReturned { copy } => Some(copy),
            Self::Report(_)
            | Self::RecordRegained
            | Self::Keeper(_)
            | Self::FirstRequest { .. }
            | Self::ReportsLost { .. }
            | Self::EventsLost { .. } => None,
        };
        EventKey {
            name: self.name(),
            during,
            replica,
            copy,
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

fn keeper_name(report: &KeeperReport) -> &'static str {
    match report {
        KeeperReport::State { .. } => "QUORUM_BLK_REPLICA_STATE",
        KeeperReport::Suspect { .. } => "QUORUM_BLK_REPLICA_SUSPECT",
        KeeperReport::Kept { .. } => "QUORUM_BLK_REPLICA_KEPT",
        KeeperReport::ResyncBegun { .. } => "QUORUM_BLK_RESYNC_BEGUN",
        KeeperReport::ResyncProgress { .. } => "QUORUM_BLK_RESYNC_PROGRESS",
        KeeperReport::ResyncDone { .. } => "QUORUM_BLK_RESYNC_DONE",
        KeeperReport::Prompt { .. } => "QUORUM_BLK_REPLICA_PROMPT",
        KeeperReport::PassBegun { .. } => "QUORUM_BLK_SCRUB_BEGUN",
        KeeperReport::PassDone { .. } => "QUORUM_BLK_SCRUB_DONE",
        KeeperReport::PassStopped { .. } => "QUORUM_BLK_SCRUB_STOPPED",
        KeeperReport::Forced { .. } => "QUORUM_BLK_REPLICA_FORCED",
        KeeperReport::Refused { .. } => "QUORUM_BLK_COMMAND_REFUSED",
    }
}

fn keeper_key(report: &KeeperReport) -> (&'static str, Option<ReplicaId>) {
    match *report {
        KeeperReport::State { replica, .. }
        | KeeperReport::Suspect { replica }
        | KeeperReport::Kept { replica, .. }
        | KeeperReport::ResyncBegun { replica, .. }
        | KeeperReport::ResyncProgress { replica, .. }
        | KeeperReport::ResyncDone { replica, .. }
        | KeeperReport::Prompt { replica }
        | KeeperReport::Forced { replica, .. } => ("", Some(replica)),
        KeeperReport::PassBegun { kind, .. }
        | KeeperReport::PassDone { kind, .. }
        | KeeperReport::PassStopped { kind, .. } => (pass_name(kind), None),
        KeeperReport::Refused { command, .. } => (command_name(command), command_replica(command)),
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
        | Report::Chosen { range, .. }
        | Report::VerifyFailed { range } => Some(range),
        Report::Behind { extent, .. } => Some(extent),
        Report::FlushFailed { .. }
        | Report::Kicked { .. }
        | Report::Lagging { .. }
        | Report::RecordLost => None,
    }
}

fn with_range(mut report: Report, new: SectorRange) -> Report {
    match &mut report {
        Report::Bad { range, .. }
        | Report::Failure { range, .. }
        | Report::Transient { range }
        | Report::Repaired { range, .. }
        | Report::RepairFailed { range, .. }
        | Report::Chosen { range, .. }
        | Report::VerifyFailed { range }
        | Report::Behind { extent: range, .. } => *range = new,
        Report::FlushFailed { .. }
        | Report::Kicked { .. }
        | Report::Lagging { .. }
        | Report::RecordLost => {}
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

/// How a kind of operation is written in events, and in the log.
pub(super) fn during_name(during: During) -> &'static str {
    match during {
        // QEMU knows no other word.
        During::Read | During::Check => "read",
        During::Write => "write",
        During::Flush => "flush",
    }
}

/// How a kind of pass over the disk is written in events and counters.
pub(super) fn pass_name(kind: PassKind) -> &'static str {
    match kind {
        PassKind::Verify => "verify",
        PassKind::Scrub => "scrub",
    }
}

/// How a command is written in events, and in the log.
pub(super) fn command_name(command: Command) -> &'static str {
    match command {
        Command::Scrub { .. } => "scrub",
        Command::StopScrub => "stop-scrub",
        Command::Clear { .. } => "clear",
        Command::ForceCurrent { .. } => "force-current",
        Command::Fail { .. } => "fail",
    }
}

/// The replica a command is about.
pub(super) fn command_replica(command: Command) -> Option<ReplicaId> {
    match command {
        Command::Scrub { .. } | Command::StopScrub => None,
        Command::Clear { replica }
        | Command::ForceCurrent { replica }
        | Command::Fail { replica } => Some(replica),
    }
}

/// How a state of a replica is written, everywhere.
pub(super) fn state_name(state: ReplicaState) -> &'static str {
    match state {
        ReplicaState::InSync => "in-sync",
        ReplicaState::Syncing => "syncing",
        ReplicaState::Missing => "missing",
        ReplicaState::Failed => "failed",
        ReplicaState::Removed => "removed",
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
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quorum::BadCause;

    fn range(start: u64, count: u32) -> SectorRange {
        SectorRange::new(start, count).unwrap()
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
