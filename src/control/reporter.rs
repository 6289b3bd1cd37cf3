// SPDX-License-Identifier: Apache-2.0
//! A report of a lane becomes a line in the log and an event: at most one of a kind a second.

use std::time::SystemTime;

use tracing::warn;

use super::event_hub::EventHub;
use super::event_text;
use super::events::{Event, EventData, Names};
use super::rate_limit::RateLimiter;
use super::sink::{EventSink, SinkError};
use crate::units::Time;

/// Tells people and programs what happened. Lives on the control thread.
#[derive(Debug)]
pub struct Reporter {
    names: Names,
    limiter: RateLimiter,
    sink: Option<EventSink>,
    hub: EventHub,
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
            hub: EventHub::default(),
            events_lost_total: 0,
        }
    }

    /// Where clients of the control socket listen.
    #[must_use]
    pub fn hub(&self) -> &EventHub {
        &self.hub
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

    /// Takes an event; `now` is for the rate limit, the event carries the wall clock.
    pub fn offer(&mut self, now: Time, data: EventData) {
        let event = Event::new(data, SystemTime::now());
        if let Some(event) = self.limiter.offer(now, event) {
            self.tell(&event);
        }
    }

    fn tell(&mut self, event: &Event) {
        event_text::log(event, &self.names);
        self.hub.publish(|| event.to_line(&self.names));
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
}

#[cfg(test)]
mod tests {
    use std::io::{Read, pipe};
    use std::os::fd::AsRawFd;

    use serde_json::Value;

    use super::*;
    use crate::config::EventsTarget;
    use crate::quorum::Report;
    use crate::units::{ReplicaId, SectorRange};

    fn names() -> Names {
        Names {
            disk: "disk".to_owned(),
            replicas: vec!["left".to_owned()],
            record_copies: Vec::new(),
            disk_sectors: 100,
        }
    }

    fn repaired(sector: u64) -> EventData {
        EventData::Report(Report::Repaired {
            replica: ReplicaId::new(0),
            range: SectorRange::new(sector, 1).unwrap(),
        })
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
            reporter.offer(at_millis(0), repaired(sector));
        }
        assert_eq!(lines(&path).len(), 1);
        assert_eq!(reporter.deadline(), Some(at_millis(1000)));
        reporter.tick(at_millis(1000));
        let told = lines(&path);
        assert_eq!(told[0]["data"]["sector-num"], 1);
        assert_eq!(told[1]["data"]["sector-num"], 21);
        assert_eq!(told[1]["data"]["suppressed"], 1);
        reporter.offer(at_millis(1500), repaired(31));
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
            reporter.offer(at_millis(second * 2000), repaired(second));
        }
        let mut early = vec![0; 65_536];
        let len = reader.read(&mut early).unwrap();
        assert!(len > 1000);
        reporter.offer(at_millis(9_000_000), repaired(0));
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
