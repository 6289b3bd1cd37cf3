// SPDX-License-Identifier: Apache-2.0
//! The way of reports from the workers to the control thread. A worker never waits on it: when
//! it is full, reports are counted instead.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::events::EventData;

/// Reports on their way at once. A replica that fails every read of four workers makes some
/// hundred in the time the control thread needs to wake up; the log shows a few a second anyway.
pub const REPORTS_MAX: usize = 4096;

struct Signal {
    eventfd: EventFd,
    /// Whether the eventfd was written since the receiver last looked: one write suffices.
    raised: AtomicBool,
    dropped: AtomicU64,
}

/// A worker's end. Clones share one channel.
#[derive(Clone)]
pub struct ReportSender {
    reports: SyncSender<EventData>,
    signal: Arc<Signal>,
}

/// The control thread's end.
pub struct ReportReceiver {
    reports: Receiver<EventData>,
    capacity: usize,
    signal: Arc<Signal>,
}

/// A channel that holds up to `capacity` reports ([`REPORTS_MAX`] in the daemon).
///
/// # Errors
/// If no eventfd can be had: too many open files.
pub fn report_channel(capacity: usize) -> io::Result<(ReportSender, ReportReceiver)> {
    let (sender, receiver) = sync_channel(capacity);
    let signal = Arc::new(Signal {
        eventfd: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?,
        raised: AtomicBool::new(false),
        dropped: AtomicU64::new(0),
    });
    let sender = ReportSender {
        reports: sender,
        signal: Arc::clone(&signal),
    };
    let receiver = ReportReceiver {
        reports: receiver,
        capacity,
        signal,
    };
    Ok((sender, receiver))
}

impl ReportSender {
    /// Hands a report over without waiting.
    pub fn send(&self, report: EventData) {
        if self.reports.try_send(report).is_err() {
            self.signal.dropped.fetch_add(1, Ordering::Relaxed);
        }
        // After the report is in: whoever clears the flag looks at the channel afterwards, so a
        // report that found the flag raised is seen by that look.
        if !self.signal.raised.swap(true, Ordering::SeqCst) {
            // An eventfd that is full is readable, which is all that is wanted.
            let _ = self.signal.eventfd.write(1);
        }
    }
}

impl ReportReceiver {
    /// Takes what has arrived, up to what the channel holds, and the number of reports that did
    /// not fit since the last call.
    pub fn drain(&self, reports: &mut Vec<EventData>) -> u64 {
        // Nothing to read is fine: the caller may look without having been woken.
        let _ = self.signal.eventfd.read();
        self.signal.raised.store(false, Ordering::SeqCst);
        // Bounded, so that busy workers cannot hold the control thread here.
        reports.extend(self.reports.try_iter().take(self.capacity));
        self.signal.dropped.swap(0, Ordering::Relaxed)
    }
}

impl AsRawFd for ReportReceiver {
    /// Readable when there is something to [`ReportReceiver::drain`].
    fn as_raw_fd(&self) -> RawFd {
        self.signal.eventfd.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;
    use crate::quorum::Report;
    use crate::units::SectorRange;

    fn transient(sector: u64) -> EventData {
        EventData::Report(Report::Transient {
            range: SectorRange::new(sector, 1).unwrap(),
        })
    }

    #[test]
    fn channel_that_is_full_counts() {
        let (sender, receiver) = report_channel(2).unwrap();
        for sector in 0..5 {
            sender.send(transient(sector));
        }
        let mut reports = Vec::new();
        assert_eq!(receiver.drain(&mut reports), 3);
        assert_eq!(reports, [transient(0), transient(1)]);
        assert_eq!(receiver.drain(&mut reports), 0);
    }

    #[test]
    fn channel_wakes_for_every_report() {
        const REPORTS: u64 = 20_000;
        let (sender, receiver) = report_channel(REPORTS_MAX).unwrap();
        let senders: Vec<_> = (0..2)
            .map(|_| {
                let sender = sender.clone();
                thread::spawn(move || {
                    (0..REPORTS).for_each(|sector| sender.send(transient(sector)))
                })
            })
            .collect();
        let (mut reports, mut accounted) = (Vec::new(), 0);
        while accounted < 2 * REPORTS {
            let readable = super::super::sink::poll_fd(receiver.as_raw_fd(), libc::POLLIN, 5000);
            assert!(
                readable.unwrap(),
                "lost a wake-up after {accounted} reports"
            );
            accounted += receiver.drain(&mut reports);
            accounted += u64::try_from(reports.len()).unwrap();
            reports.clear();
        }
        for sender in senders {
            sender.join().unwrap();
        }
        assert_eq!(accounted, 2 * REPORTS);
    }
}
