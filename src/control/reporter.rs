// SPDX-License-Identifier: Apache-2.0
//! A report of a lane becomes a line in the log and an event: at most one of a kind a second.

use std::time::SystemTime;

use tracing::{error, info, warn};

use super::events::{Event, EventData, Names, errno_text};
use super::rate_limit::RateLimiter;
use super::sink::{EventSink, SinkError};
use crate::quorum::{BadCause, BehindCause, During, Report};
use crate::units::{SectorRange, Time};

/// Tells people and programs what happened. Lives on the control thread.
#[derive(Debug)]
pub struct Reporter {
    names: Names,
    limiter: RateLimiter,
    sink: Option<EventSink>,
    /// Lines the sink could not take and has not told about yet.
    events_lost_total: u64,
}

impl Reporter {
    /// A reporter for the disk and replicas of `names`; events go to `sink`, if there is one.
    #[must_use]
    pub fn new(names: Names, sink: Option<EventSink>) -> Self {
        Self {
            names,
            limiter: RateLimiter::default(),
            sink,
            events_lost_total: 0,
        }
    }

    /// Takes a report; `now` is for the rate limit, the event carries the wall clock.
    pub fn report(&mut self, now: Time, report: Report) {
        self.offer(now, EventData::Report(report));
    }

    /// Takes note that `count` reports were lost on their way here. Nothing for zero.
    pub fn reports_lost(&mut self, now: Time, count: u64) {
        if count > 0 {
            self.offer(now, EventData::ReportsLost { count });
        }
    }

    /// Tells what was held back until `now`. Owed when [`Reporter::deadline`] has passed.
    pub fn tick(&mut self, now: Time) {
        for event in self.limiter.due(now) {
            self.tell(&event);
        }
    }

    /// When [`Reporter::tick`] has something to do next.
    #[must_use]
    pub fn deadline(&self) -> Option<Time> {
        self.limiter.deadline()
    }

    /// Opens the file of events again.
    ///
    /// # Errors
    /// If it cannot be opened; the one of before stays in use.
    pub fn reopen(&mut self) -> Result<(), SinkError> {
        self.sink.as_mut().map_or(Ok(()), EventSink::reopen)
    }

    /// Tells everything that is still held back, at the end of the process.
    pub fn finish(&mut self) {
        for event in self.limiter.drain() {
            self.tell(&event);
        }
        if let Some(sink) = &mut self.sink
            && sink.has_lost()
        {
            self.events_lost_total += sink.take_lost();
        }
        if self.events_lost_total > 0 {
            warn!(
                count = self.events_lost_total,
                "events were lost: the reader of --events was too slow"
            );
        }
    }

    fn offer(&mut self, now: Time, data: EventData) {
        let event = Event::new(data, SystemTime::now());
        if let Some(event) = self.limiter.offer(now, event) {
            self.tell(&event);
        }
    }

    fn tell(&mut self, event: &Event) {
        self.log(event);
        let Some(sink) = &mut self.sink else {
            return;
        };
        if sink.has_lost() && sink.is_ready() {
            let count = sink.take_lost();
            let lost = Event::new(EventData::EventsLost { count }, event.at);
            if sink.write(&lost.to_line(&self.names)) {
                self.events_lost_total += count;
            } else {
                // The line about lost lines is none of them.
                sink.take_lost();
                sink.lost_again(count);
            }
        }
        sink.write(&event.to_line(&self.names));
    }

    fn log(&self, event: &Event) {
        let more = Suppressed(event.suppressed);
        let report = match event.data {
            EventData::Report(report) => report,
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
                let name = self.names.replica(replica);
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
                During::Write | During::Flush => error!(
                    "too few replicas took a {} of {}: the guest gets an I/O error{more}",
                    during_text(during),
                    Sectors(range)
                ),
            },
            Report::Transient { range } => info!(
                "a difference in {} was gone when all replicas were read again{more}",
                Sectors(range)
            ),
            Report::Repaired { replica, range } => {
                let name = self.names.replica(replica);
                info!(
                    replica = name,
                    "replica {name} was repaired in {}{more}",
                    Sectors(range)
                );
            }
            Report::RepairFailed { replica, range } => {
                let name = self.names.replica(replica);
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
                let name = self.names.replica(replica);
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
                let name = self.names.replica(replica);
                let text = errno_text(errno);
                warn!(
                    replica = name,
                    "replica {name} failed a flush ({text}) and is behind in {extents} extents{more}"
                );
            }
            Report::VerifyFailed { range } => {
                error!(
                    "the two replicas differ in {} (--blkverify)",
                    Sectors(range)
                );
            }
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
struct Suppressed(u64);

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
                during_text(during),
                errno_text(errno)
            )
        }
        BadCause::Short => format!("ended early in a {} of", during_text(during)),
    }
}

fn during_text(during: During) -> &'static str {
    match during {
        During::Read => "read",
        During::Write => "write",
        During::Flush => "flush",
    }
}

fn behind_text(why: BehindCause) -> String {
    match why {
        BehindCause::WriteFailed(errno) => format!("a write failed ({})", errno_text(errno)),
        BehindCause::Late => "a write was not done in time".to_owned(),
        BehindCause::RepairFailed => "a repair failed".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, pipe};
    use std::os::fd::AsRawFd;

    use serde_json::Value;

    use super::*;
    use crate::config::EventsTarget;
    use crate::units::ReplicaId;

    fn names() -> Names {
        Names {
            disk: "disk".to_owned(),
            replicas: vec!["left".to_owned()],
            disk_sectors: 100,
        }
    }

    fn repaired(sector: u64) -> Report {
        Report::Repaired {
            replica: ReplicaId::new(0),
            range: SectorRange::new(sector, 1).unwrap(),
        }
    }

    fn at_millis(millis: u64) -> Time {
        Time::from_nanos(millis * 1_000_000)
    }

    fn lines(path: &std::path::Path) -> Vec<Value> {
        let text = std::fs::read_to_string(path).unwrap();
        text.lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }

    #[test]
    fn reporter_writes_the_first_holds_the_rest_and_tells_at_the_end() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("events");
        let sink = EventSink::open(&EventsTarget::Path(path.clone())).unwrap();
        let mut reporter = Reporter::new(names(), Some(sink));
        for sector in [1, 11, 21] {
            reporter.report(at_millis(0), repaired(sector));
        }
        assert_eq!(lines(&path).len(), 1);
        assert_eq!(reporter.deadline(), Some(at_millis(1000)));
        reporter.tick(at_millis(1000));
        let told = lines(&path);
        assert_eq!(told[0]["data"]["sector-num"], 1);
        assert_eq!(told[1]["data"]["sector-num"], 21);
        assert_eq!(told[1]["data"]["suppressed"], 1);
        reporter.report(at_millis(1500), repaired(31));
        reporter.reports_lost(at_millis(1500), 0);
        reporter.reports_lost(at_millis(1500), 9);
        reporter.finish();
        let told = lines(&path);
        assert_eq!(told[2]["event"], "QUORUM_BLK_REPORTS_LOST");
        assert_eq!(told[2]["data"]["count"], 9);
        assert_eq!(told[3]["data"]["sector-num"], 31);
    }

    #[test]
    fn reporter_tells_how_many_events_a_slow_reader_lost() {
        let (mut reader, writer) = pipe().unwrap();
        let sink = EventSink::open(&EventsTarget::Fd(writer.as_raw_fd())).unwrap();
        let mut reporter = Reporter::new(names(), Some(sink));
        for second in 0..2000 {
            reporter.report(at_millis(second * 2000), repaired(second));
        }
        let mut early = vec![0; 65_536];
        let len = reader.read(&mut early).unwrap();
        assert!(len > 1000);
        reporter.report(at_millis(9_000_000), repaired(0));
        drop((reporter, writer));
        let mut rest = String::new();
        reader.read_to_string(&mut rest).unwrap();
        let (lost, last) = rest.trim_end().rsplit_once('\n').unwrap();
        let lost: Value = serde_json::from_str(lost.rsplit('\n').next().unwrap()).unwrap();
        assert_eq!(lost["event"], "QUORUM_BLK_EVENTS_LOST");
        let written = early[..len].iter().filter(|&&byte| byte == b'\n').count()
            + rest.matches('\n').count()
            - 2;
        assert_eq!(lost["data"]["count"], 2000 - written);
        assert!(last.contains("QUORUM_BLK_REPAIRED"));
    }
}
