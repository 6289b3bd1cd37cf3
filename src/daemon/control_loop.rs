// SPDX-License-Identifier: Apache-2.0
//! The control thread's loop: front-ends that come, signals, reports of workers, and what else
//! is registered. It takes no part in guest I/O.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use tracing::{error, warn};

use super::clock::Clock;
use super::event_loop::{EventLoop, Token};
use super::listener::{FrontEndSource, Listener};
use super::signals::{Signal, Signals};
use crate::control::events::EventData;
use crate::control::{ReportReceiver, Reporter};
use crate::quorum::Report;
use crate::units::Time;

/// How long to leave front-ends waiting when the system has no descriptors left.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

/// Tokens from here on are the loop's own.
pub const TOKEN_END: Token = u64::MAX - 2;
const TOKEN_SIGNALS: Token = TOKEN_END;
const TOKEN_REPORTS: Token = TOKEN_END + 1;
const TOKEN_LISTENER: Token = TOKEN_END + 2;

/// What the owner of the loop has to act on.
#[derive(Debug)]
pub enum Wakeup {
    /// A front-end has come. No other is accepted before [`ControlLoop::accept_next`].
    Connection(UnixStream),
    /// SIGTERM or SIGINT.
    Terminate,
    /// SIGUSR1.
    ShowCounters,
    /// SIGUSR2.
    Scrub,
    /// Two replicas under `--blkverify` differ.
    VerifyFailed,
    /// A registered descriptor is readable.
    Ready(Token),
}

/// Everything the control thread waits for.
pub struct ControlLoop {
    events: EventLoop,
    clock: Clock,
    signals: Signals,
    reports: ReportReceiver,
    reporter: Reporter,
    listener: Option<Listener>,
    /// The system refused to accept; try again then.
    accept_again: Option<Time>,
    /// A worker has told of its first request: those of the others are no news.
    first_request_told: bool,
    pending: VecDeque<Wakeup>,
}

impl ControlLoop {
    /// A loop over what is given. The first front-end is accepted at once.
    ///
    /// # Errors
    /// If there are no descriptors left.
    pub fn new(
        clock: Clock,
        signals: Signals,
        reports: ReportReceiver,
        reporter: Reporter,
        source: FrontEndSource,
    ) -> io::Result<Self> {
        let events = EventLoop::new()?;
        events.add(&signals, TOKEN_SIGNALS)?;
        events.add(&reports, TOKEN_REPORTS)?;
        let mut pending = VecDeque::new();
        let listener = match source {
            FrontEndSource::Connected(stream) => {
                pending.push_back(Wakeup::Connection(stream));
                None
            }
            FrontEndSource::Listener(listener) => {
                events.add(&listener, TOKEN_LISTENER)?;
                Some(listener)
            }
        };
        Ok(Self {
            events,
            clock,
            signals,
            reports,
            reporter,
            listener,
            accept_again: None,
            first_request_told: false,
            pending,
        })
    }

    /// Reports `token` (below [`TOKEN_END`]) whenever `fd` is readable.
    ///
    /// # Errors
    /// If it is registered already or cannot be waited on.
    pub fn add(&self, fd: &impl AsRawFd, token: Token) -> io::Result<()> {
        assert!(token < TOKEN_END, "token {token} is one of the loop's own");
        self.events.add(fd, token)
    }

    /// Takes `fd` out again, before it is closed.
    ///
    /// # Errors
    /// If it is not registered.
    pub fn remove(&self, fd: &impl AsRawFd) -> io::Result<()> {
        self.events.remove(fd)
    }

    /// Accepts one more front-end, now that the one of before has gone. Whether there can be
    /// one: not where the daemon was given a connection.
    ///
    /// # Errors
    /// If the listener cannot be waited on.
    pub fn accept_next(&mut self) -> io::Result<bool> {
        let Some(listener) = &self.listener else {
            return Ok(false);
        };
        self.accept_again = None;
        self.events.add(listener, TOKEN_LISTENER)?;
        Ok(true)
    }

    /// Takes no more front-ends: they find nobody at the socket, and its file is gone. Those who
    /// waited are sent away, to come back to a successor.
    pub fn stop_listening(&mut self) {
        if let Some(listener) = self.listener.take() {
            // It is not waited on while a front-end is connected.
            let _ = self.events.remove(&listener);
        }
        self.accept_again = None;
        self.pending
            .retain(|wakeup| !matches!(wakeup, Wakeup::Connection(_)));
    }

    /// Waits for something to act on. Reports are told meanwhile.
    ///
    /// # Errors
    /// If waiting itself fails, which it does not in practice.
    pub fn wait(&mut self) -> io::Result<Wakeup> {
        loop {
            if let Some(wakeup) = self.wait_until(None)? {
                return Ok(wakeup);
            }
        }
    }

    /// The same until a moment at most; `None` if nothing came.
    ///
    /// # Errors
    /// If waiting itself fails, which it does not in practice.
    pub fn wait_until(&mut self, until: Option<Time>) -> io::Result<Option<Wakeup>> {
        loop {
            if let Some(wakeup) = self.pending.pop_front() {
                return Ok(Some(wakeup));
            }
            if until.is_some_and(|until| until <= self.clock.now()) {
                return Ok(None);
            }
            self.turn(until)?;
        }
    }

    /// Tells all reports that have arrived or were held back. At the end, when the workers have
    /// stopped.
    pub fn finish(mut self) {
        self.take_reports();
        self.reporter.finish();
    }

    /// Waits once, at most until then, and handles what came.
    fn turn(&mut self, until: Option<Time>) -> io::Result<()> {
        let now = self.clock.now();
        let deadlines = [self.reporter.deadline(), self.accept_again, until];
        let deadline = deadlines.into_iter().flatten().min();
        let mut ready = Vec::new();
        let timeout = deadline.map(|deadline| deadline.since(now));
        self.events.wait(timeout, &mut ready)?;
        for token in ready {
            match token {
                TOKEN_SIGNALS => self.take_signals(),
                TOKEN_REPORTS => self.take_reports(),
                TOKEN_LISTENER => self.accept()?,
                other => self.pending.push_back(Wakeup::Ready(other)),
            }
        }
        let now = self.clock.now();
        self.reporter.tick(now);
        if self.accept_again.is_some_and(|again| again <= now) {
            self.accept_next()?;
        }
        Ok(())
    }

    fn take_signals(&mut self) {
        while let Some(signal) = self.signals.next() {
            match signal {
                Signal::Terminate => self.pending.push_back(Wakeup::Terminate),
                Signal::ShowCounters => self.pending.push_back(Wakeup::ShowCounters),
                Signal::Scrub => self.pending.push_back(Wakeup::Scrub),
                Signal::Reopen => {
                    if let Err(error) = self.reporter.reopen() {
                        error!("{error}; the file of before stays in use");
                    }
                }
            }
        }
    }

    fn take_reports(&mut self) {
        let mut reports = Vec::new();
        let lost = self.reports.drain(&mut reports);
        let now = self.clock.now();
        for report in reports {
            if matches!(report, EventData::Report(Report::VerifyFailed { .. })) {
                self.pending.push_back(Wakeup::VerifyFailed);
            }
            let first_request = matches!(report, EventData::FirstRequest { .. });
            if first_request && std::mem::replace(&mut self.first_request_told, true) {
                continue;
            }
            self.reporter.offer(now, report);
        }
        self.reporter.reports_lost(now, lost);
    }

    fn accept(&mut self) -> io::Result<()> {
        let Some(listener) = &self.listener else {
            return Ok(());
        };
        match listener.accept() {
            Ok(None) => Ok(()),
            Ok(Some(stream)) => {
                self.pending.push_back(Wakeup::Connection(stream));
                self.events.remove(listener)
            }
            Err(error) => {
                // The front-end stays in the backlog and keeps the socket readable: without a
                // pause the loop would spin.
                warn!("cannot accept a front-end, will try again: {error}");
                self.accept_again = Some(self.clock.now().after(ACCEPT_PAUSE));
                self.events.remove(listener)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    use super::*;
    use crate::config::EventsTarget;
    use crate::control::events::Names;
    use crate::control::{EventSink, ReportSender, report_channel};
    use crate::units::SectorRange;

    struct Setup {
        folder: tempfile::TempDir,
        sender: ReportSender,
        control: ControlLoop,
    }

    fn setup() -> Setup {
        let folder = tempfile::tempdir().unwrap();
        let listener = Listener::bind(&folder.path().join("s"), Duration::ZERO).unwrap();
        let events = EventsTarget::Path(folder.path().join("events"));
        let sink = EventSink::open(&events).unwrap();
        let names = Names {
            disk: "disk".to_owned(),
            replicas: Vec::new(),
            record_copies: Vec::new(),
            disk_sectors: 1,
        };
        let (sender, receiver) = report_channel(16).unwrap();
        let control = ControlLoop::new(
            Clock::start(),
            Signals::block().unwrap(),
            receiver,
            Reporter::new(names, Some(sink)),
            FrontEndSource::Listener(listener),
        );
        Setup {
            folder,
            sender,
            control: control.unwrap(),
        }
    }

    fn transient(sector: u64) -> EventData {
        EventData::Report(Report::Transient {
            range: SectorRange::new(sector, 1).unwrap(),
        })
    }

    #[test]
    fn front_ends_are_taken_one_at_a_time() {
        let Setup {
            folder,
            mut control,
            ..
        } = setup();
        let path = folder.path().join("s");
        let _first = UnixStream::connect(&path).unwrap();
        let _second = UnixStream::connect(&path).unwrap();
        assert!(matches!(control.wait().unwrap(), Wakeup::Connection(_)));
        let eventfd = EventFd::new(EFD_NONBLOCK).unwrap();
        control.add(&eventfd, 7).unwrap();
        eventfd.write(1).unwrap();
        assert!(matches!(control.wait().unwrap(), Wakeup::Ready(7)));
        control.remove(&eventfd).unwrap();
        assert!(control.accept_next().unwrap());
        assert!(matches!(control.wait().unwrap(), Wakeup::Connection(_)));
    }

    #[test]
    fn reports_are_told_while_waiting_also_those_held_back() {
        let Setup {
            folder,
            sender,
            mut control,
        } = setup();
        let eventfd = EventFd::new(EFD_NONBLOCK).unwrap();
        control.add(&eventfd, 7).unwrap();
        let waker = eventfd.try_clone().unwrap();
        let worker = thread::spawn(move || {
            sender.send(transient(1));
            sender.send(transient(10));
            thread::sleep(Duration::from_millis(1300));
            waker.write(1).unwrap();
            sender.send(transient(20));
        });
        assert!(matches!(control.wait().unwrap(), Wakeup::Ready(7)));
        let told = || std::fs::read_to_string(folder.path().join("events")).unwrap();
        assert_eq!(told().lines().count(), 2);
        worker.join().unwrap();
        control.finish();
        assert_eq!(told().lines().count(), 3);
    }
}
