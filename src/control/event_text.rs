// SPDX-License-Identifier: Apache-2.0
//! An event as a line of the log, for people.
//!
//! What an operator has to act on is a warning; what a guest sees is an error; the rest is for
//! information.

use tracing::{error, info, warn};

use super::events::{Event, EventData, Names, during_name, errno_text};
use super::keeper_text;
use crate::quorum::{BadCause, BehindCause, During, KickCause, Report};
use crate::units::SectorRange;

/// Writes an event to the log.
pub(super) fn log(event: &Event, names: &Names) {
    let more = Suppressed(event.suppressed);
    let report = match event.data {
        EventData::Report(report) => report,
        EventData::RecordCopyLost { copy, errno } => {
            let path = names.record_copy(copy).display();
            warn!(
                "the state record cannot be written to {path} ({}); the record is kept without \
                 the copy until it can{more}",
                errno_text(errno)
            );
            return;
        }
        EventData::RecordCopyReturned { copy } => {
            let path = names.record_copy(copy).display();
            info!("the state record is written to {path} again{more}");
            return;
        }
        EventData::RecordRegained => {
            info!("enough copies of the state record are back: the disk can be written again");
            return;
        }
        EventData::Keeper(report) => {
            keeper_text::log(&report, names, &more);
            return;
        }
        EventData::FirstRequest { ms_after_exec } => {
            info!(
                ms_after_exec,
                "first request completed {ms_after_exec} ms after exec"
            );
            return;
        }
        EventData::ReportsLost { count } => {
            warn!("{count} reports of workers were lost: there were too many at once");
            return;
        }
        EventData::EventsLost { .. } => return,
    };
    match report {
        Report::Bad {
            replica,
            range,
            cause,
            during,
        } => {
            let name = names.replica(replica);
            let what = bad_text(cause, during);
            warn!(
                replica = name,
                "replica {name} {what} {}{more}",
                Sectors(range)
            );
        }
        Report::Failure { range, during } => match during {
            During::Read => {
                error!(
                    "no quorum for {}: the guest gets an I/O error{more}",
                    Sectors(range)
                )
            }
            During::Check => error!(
                "no quorum for {}, met by a scrub or resync: reading it gives an I/O error{more}",
                Sectors(range)
            ),
            During::Write | During::Flush => error!(
                "too few replicas took a {} of {}: the guest gets an I/O error{more}",
                during_name(during),
                Sectors(range)
            ),
        },
        Report::Transient { range } => info!(
            "a difference in {} was gone when all replicas were read again{more}",
            Sectors(range)
        ),
        Report::Repaired { replica, range } => {
            let name = names.replica(replica);
            info!(
                replica = name,
                "replica {name} was repaired in {}{more}",
                Sectors(range)
            );
        }
        Report::RepairFailed { replica, range } => {
            let name = names.replica(replica);
            warn!(
                replica = name,
                "replica {name} could not be repaired in {}{more}",
                Sectors(range)
            );
        }
        Report::Behind {
            replica,
            extent,
            why,
        } => {
            let name = names.replica(replica);
            let why = behind_text(why);
            warn!(
                replica = name,
                "replica {name} is behind in {}, where it does not vote any more: {why}{more}",
                Sectors(extent)
            );
        }
        Report::FlushFailed {
            replica,
            errno,
            extents,
        } => {
            let name = names.replica(replica);
            let text = errno_text(errno);
            warn!(
                replica = name,
                "replica {name} failed a flush ({text}) and is behind in {extents} extents{more}"
            );
        }
        Report::Kicked {
            replica,
            why,
            extents,
        } => {
            let name = names.replica(replica);
            let next = match why {
                KickCause::Budget | KickCause::Operator => "stays out until it is replaced",
                KickCause::Hung
                | KickCause::FlushFailed(_)
                | KickCause::Vanished
                | KickCause::Absent => "will be opened again",
            };
            let why = kick_text(why);
            warn!(
                replica = name,
                behind_extents = extents,
                "replica {name} is not used any more: {why}; it is behind in {extents} extents and \
                 {next}{more}"
            );
        }
        Report::Lagging { replica } => {
            let name = names.replica(replica);
            warn!(
                replica = name,
                "replica {name} is too slow: nobody waits for it until it answers in time, and \
                 what it misses is copied then{more}"
            );
        }
        Report::Chosen { range, replica } => {
            let name = names.replica(replica);
            warn!(
                replica = name,
                "nobody agrees on {}, where writes were under way when the host or a write failed; \
                 the version of replica {name} was taken{more}",
                Sectors(range)
            );
        }
        Report::RecordLost => error!(
            "the state record cannot be written on enough of its copies: writes to parts of the \
             disk that were not written lately get I/O errors until enough copies can be written \
             again"
        ),
        Report::VerifyFailed { range } => {
            error!(
                "the two replicas differ in {} (--blkverify)",
                Sectors(range)
            );
        }
    }
}

/// Sectors for people.
struct Sectors(SectorRange);

impl std::fmt::Display for Sectors {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (start, count) = (self.0.start(), self.0.count());
        if count == 1 {
            write!(f, "sector {start}")
        } else {
            write!(f, "sectors {start} to {} ({count})", self.0.end() - 1)
        }
    }
}

/// How many lines are missing, for people.
pub(super) struct Suppressed(pub(super) u64);

impl std::fmt::Display for Suppressed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            0 => Ok(()),
            count => write!(f, " (and {count} more such reports)"),
        }
    }
}

fn bad_text(cause: BadCause, during: During) -> String {
    match cause {
        BadCause::Differs => "differs from the others in".to_owned(),
        BadCause::Error(errno) => {
            format!(
                "failed a {} ({}) of",
                during_name(during),
                errno_text(errno)
            )
        }
        BadCause::Short => format!("ended early in a {} of", during_name(during)),
    }
}

fn behind_text(why: BehindCause) -> String {
    match why {
        BehindCause::WriteFailed(errno) => format!("a write failed ({})", errno_text(errno)),
        BehindCause::Late => "a write was not done in time".to_owned(),
        BehindCause::RepairFailed => "a repair failed".to_owned(),
    }
}

pub(super) fn kick_text(why: KickCause) -> String {
    match why {
        KickCause::Hung => "an operation did not end within --io-timeout".to_owned(),
        KickCause::FlushFailed(errno) => format!("a flush failed ({})", errno_text(errno)),
        KickCause::Vanished => "its file or device is gone, or is another one".to_owned(),
        KickCause::Budget => "it had more errors than its budget allows".to_owned(),
        KickCause::Absent => "it cannot be opened".to_owned(),
        KickCause::Operator => "the operator does not want it".to_owned(),
    }
}
