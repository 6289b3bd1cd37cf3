// SPDX-License-Identifier: Apache-2.0
//! What workers count, and how the sums are shown (SIGUSR1, end of the process).
//!
//! A worker adds to counters of its own, which no other thread writes: a relaxed load and store,
//! without a locked instruction. The control thread adds the workers up when it is asked.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;

use crate::quorum::{BadCause, KeeperReport, Report, ScrubCounts};
use crate::units::{REPLICAS_MAX, ReplicaId};

/// A number with one writer and any readers.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `count`. Only ever called by the thread that owns the counter: two writers would
    /// lose counts.
    pub fn add(&self, count: u64) {
        let sum = self.0.load(Ordering::Relaxed).wrapping_add(count);
        self.0.store(sum, Ordering::Relaxed);
    }

    /// The number now.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What guests ask for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum RequestKind {
    /// Read sectors.
    Read,
    /// Write sectors.
    Write,
    /// Make writes durable.
    Flush,
    /// Content no longer needed.
    Discard,
    /// Make sectors zero.
    WriteZeroes,
    /// The serial number.
    GetId,
}

impl RequestKind {
    /// All of them, in the order they are shown.
    pub const ALL: [Self; 6] = [
        Self::Read,
        Self::Write,
        Self::Flush,
        Self::Discard,
        Self::WriteZeroes,
        Self::GetId,
    ];

    /// How it is written in tables and JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Flush => "flush",
            Self::Discard => "discard",
            Self::WriteZeroes => "write-zeroes",
            Self::GetId => "get-id",
        }
    }
}

/// Requests of one kind.
#[derive(Debug, Default)]
pub struct RequestCounters {
    /// Requests that were completed.
    pub requests: Counter,
    /// Bytes they covered.
    pub bytes: Counter,
    /// Those that ended with an error status.
    pub errors: Counter,
}

/// What was met on one replica.
#[derive(Debug, Default)]
pub struct ReplicaCounters {
    /// Operations that were completed, well or not.
    pub operations: Counter,
    /// Operations that failed or were short.
    pub errors: Counter,
    /// Times it differed from the winner after arbitration.
    pub dissents: Counter,
    /// Times it was rewritten with the winner's bytes.
    pub repairs: Counter,
    /// Extents it fell behind in.
    pub behind: Counter,
    /// Times it was declared not up.
    pub kicks: Counter,
    /// Bytes in extents that were brought up to date.
    pub resynced_bytes: Counter,
}

/// What one worker counts. Aligned so that two workers never write to one cache line, nor to
/// neighbours that are fetched in pairs.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct WorkerCounters {
    read: RequestCounters,
    write: RequestCounters,
    flush: RequestCounters,
    discard: RequestCounters,
    write_zeroes: RequestCounters,
    get_id: RequestCounters,
    replicas: [ReplicaCounters; REPLICAS_MAX],
    /// Requests of a type we do not know.
    pub unsupported: Counter,
    /// Requests refused before any replica was asked: past the end, read-only, not aligned.
    pub refused: Counter,
    /// Descriptor chains that broke the rules of virtio.
    pub malformed: Counter,
    /// Kicks received.
    pub kicks: Counter,
    /// Calls sent.
    pub calls: Counter,
    /// Reads answered before all replicas had (rule V2).
    pub early_replies: Counter,
    /// Reads that were voted on again under the lock (rule Y2).
    pub arbitrations: Counter,
    /// Differences that were gone then.
    pub transients: Counter,
    /// Requests that ended without a winner, or with too few replicas written.
    pub failures: Counter,
    /// Times one of several legal versions was chosen (rule Y3).
    pub choices: Counter,
    /// Times a request had to wait for buffer memory.
    pub buffer_waits: Counter,
    /// Calls of `io_uring_enter`.
    pub ring_enters: Counter,
}

impl WorkerCounters {
    /// The counters of one kind of request.
    #[must_use]
    pub fn requests(&self, kind: RequestKind) -> &RequestCounters {
        match kind {
            RequestKind::Read => &self.read,
            RequestKind::Write => &self.write,
            RequestKind::Flush => &self.flush,
            RequestKind::Discard => &self.discard,
            RequestKind::WriteZeroes => &self.write_zeroes,
            RequestKind::GetId => &self.get_id,
        }
    }

    /// The counters of one replica.
    #[must_use]
    pub fn replica(&self, replica: ReplicaId) -> &ReplicaCounters {
        &self.replicas[replica.index()]
    }

    /// Counts what a report says.
    pub fn count_report(&self, report: &Report) {
        match *report {
            Report::Bad { replica, cause, .. } => match cause {
                BadCause::Differs => self.replica(replica).dissents.add(1),
                BadCause::Error(_) | BadCause::Short => self.replica(replica).errors.add(1),
            },
            Report::Behind { replica, .. } => self.replica(replica).behind.add(1),
            Report::FlushFailed {
                replica, extents, ..
            } => {
                self.replica(replica).errors.add(1);
                self.replica(replica).behind.add(extents);
            }
            Report::Repaired { replica, .. } => self.replica(replica).repairs.add(1),
            Report::Kicked {
                replica, extents, ..
            } => {
                self.replica(replica).kicks.add(1);
                self.replica(replica).behind.add(extents);
            }
            Report::Chosen { .. } => self.choices.add(1),
            Report::Failure { .. }
            | Report::Transient { .. }
            | Report::RepairFailed { .. }
            | Report::Lagging { .. }
            | Report::RecordLost
            | Report::VerifyFailed { .. } => {}
        }
    }

    /// Counts a request that was completed.
    pub fn add_request(&self, kind: RequestKind, bytes: u64, ok: bool) {
        let counters = self.requests(kind);
        counters.requests.add(1);
        counters.bytes.add(bytes);
        if !ok {
            counters.errors.add(1);
        }
    }
}

/// What the maintenance thread counts.
#[derive(Debug, Default)]
pub struct MaintenanceCounters {
    /// What its lane meets.
    pub lane: WorkerCounters,
    /// Blocks written to copies of the state record.
    pub record_writes: Counter,
    /// Copies of the state record that were given up.
    pub record_copies_lost: Counter,
    /// Copies that were taken back.
    pub record_copies_returned: Counter,
    /// Passes over the whole disk that came to its end: scrubs, and the first comparison.
    pub passes: Counter,
    /// What they met, in sectors; see [`ScrubCounts`].
    pub compared_sectors: Counter,
    /// See `compared_sectors`.
    pub differing_sectors: Counter,
    /// See `compared_sectors`.
    pub unreadable_sectors: Counter,
    /// See `compared_sectors`.
    pub repaired_sectors: Counter,
    /// See `compared_sectors`.
    pub unresolved_sectors: Counter,
    /// See `compared_sectors`.
    pub failed_sectors: Counter,
}

impl MaintenanceCounters {
    /// Counts what a report of the keeper says.
    pub fn count_keeper_report(&self, report: &KeeperReport) {
        match *report {
            KeeperReport::ResyncDone {
                replica,
                bytes_done,
            } => self.lane.replica(replica).resynced_bytes.add(bytes_done),
            KeeperReport::PassDone { counts, .. } => {
                self.passes.add(1);
                self.count_pass(&counts);
            }
            KeeperReport::PassStopped { counts, .. } => self.count_pass(&counts),
            KeeperReport::State { .. }
            | KeeperReport::Suspect { .. }
            | KeeperReport::Kept { .. }
            | KeeperReport::ResyncBegun { .. }
            | KeeperReport::ResyncProgress { .. }
            | KeeperReport::Prompt { .. }
            | KeeperReport::PassBegun { .. }
            | KeeperReport::Forced { .. }
            | KeeperReport::Refused { .. } => {}
        }
    }

    fn count_pass(&self, counts: &ScrubCounts) {
        self.compared_sectors.add(counts.compared);
        self.differing_sectors.add(counts.differing);
        self.unreadable_sectors.add(counts.unreadable);
        self.repaired_sectors.add(counts.repaired);
        self.unresolved_sectors.add(counts.unresolved);
        self.failed_sectors.add(counts.failed);
    }
}

/// The counters of all workers and of maintenance.
#[derive(Clone, Debug)]
pub struct Counters {
    workers: Vec<Arc<WorkerCounters>>,
    maintenance: Arc<MaintenanceCounters>,
    replica_names: Vec<String>,
}

impl Counters {
    /// Counters for `workers` workers over replicas of these names, all zero.
    #[must_use]
    pub fn new(workers: usize, replica_names: Vec<String>) -> Self {
        assert!(replica_names.len() <= REPLICAS_MAX);
        Self {
            workers: (0..workers).map(|_| Arc::default()).collect(),
            maintenance: Arc::default(),
            replica_names,
        }
    }

    /// What worker `index` counts in. It must be the only one that does.
    #[must_use]
    pub fn worker(&self, index: usize) -> Arc<WorkerCounters> {
        Arc::clone(&self.workers[index])
    }

    /// What the maintenance thread counts in. It must be the only one that does.
    #[must_use]
    pub fn maintenance(&self) -> &MaintenanceCounters {
        &self.maintenance
    }

    /// The sums over all threads. Each is exact for some moment during the call.
    #[must_use]
    pub fn totals(&self) -> Totals {
        let sum = |pick: &dyn Fn(&WorkerCounters) -> &Counter| -> u64 {
            let numbers = self.workers.iter().map(|worker| pick(worker).get());
            numbers.fold(pick(&self.maintenance.lane).get(), u64::wrapping_add)
        };
        let requests = RequestKind::ALL.map(|kind| RequestTotals {
            kind: kind.name(),
            requests: sum(&|worker| &worker.requests(kind).requests),
            bytes: sum(&|worker| &worker.requests(kind).bytes),
            errors: sum(&|worker| &worker.requests(kind).errors),
        });
        let replica_totals = |(index, name): (usize, &String)| {
            let replica = ReplicaId::new(index);
            ReplicaTotals {
                name: name.clone(),
                operations: sum(&|worker| &worker.replica(replica).operations),
                errors: sum(&|worker| &worker.replica(replica).errors),
                dissents: sum(&|worker| &worker.replica(replica).dissents),
                repairs: sum(&|worker| &worker.replica(replica).repairs),
                behind: sum(&|worker| &worker.replica(replica).behind),
                kicks: sum(&|worker| &worker.replica(replica).kicks),
                resynced_bytes: sum(&|worker| &worker.replica(replica).resynced_bytes),
            }
        };
        let maintenance = &self.maintenance;
        Totals {
            requests: requests.to_vec(),
            replicas: self
                .replica_names
                .iter()
                .enumerate()
                .map(replica_totals)
                .collect(),
            unsupported: sum(&|worker| &worker.unsupported),
            refused: sum(&|worker| &worker.refused),
            malformed: sum(&|worker| &worker.malformed),
            kicks: sum(&|worker| &worker.kicks),
            calls: sum(&|worker| &worker.calls),
            early_replies: sum(&|worker| &worker.early_replies),
            arbitrations: sum(&|worker| &worker.arbitrations),
            transients: sum(&|worker| &worker.transients),
            failures: sum(&|worker| &worker.failures),
            choices: sum(&|worker| &worker.choices),
            buffer_waits: sum(&|worker| &worker.buffer_waits),
            ring_enters: sum(&|worker| &worker.ring_enters),
            record: RecordTotals {
                writes: maintenance.record_writes.get(),
                copies_lost: maintenance.record_copies_lost.get(),
                copies_returned: maintenance.record_copies_returned.get(),
            },
            scrub: ScrubTotals {
                passes: maintenance.passes.get(),
                compared_sectors: maintenance.compared_sectors.get(),
                differing_sectors: maintenance.differing_sectors.get(),
                unreadable_sectors: maintenance.unreadable_sectors.get(),
                repaired_sectors: maintenance.repaired_sectors.get(),
                unresolved_sectors: maintenance.unresolved_sectors.get(),
                failed_sectors: maintenance.failed_sectors.get(),
            },
        }
    }
}

/// Sums over all workers; shown as a table, or as JSON by `serde`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Totals {
    /// By kind, in the order of [`RequestKind::ALL`].
    pub requests: Vec<RequestTotals>,
    /// By replica, in order of configuration.
    pub replicas: Vec<ReplicaTotals>,
    /// See [`WorkerCounters::unsupported`].
    pub unsupported: u64,
    /// See [`WorkerCounters::refused`].
    pub refused: u64,
    /// See [`WorkerCounters::malformed`].
    pub malformed: u64,
    /// See [`WorkerCounters::kicks`].
    pub kicks: u64,
    /// See [`WorkerCounters::calls`].
    pub calls: u64,
    /// See [`WorkerCounters::early_replies`].
    pub early_replies: u64,
    /// See [`WorkerCounters::arbitrations`].
    pub arbitrations: u64,
    /// See [`WorkerCounters::transients`].
    pub transients: u64,
    /// See [`WorkerCounters::failures`].
    pub failures: u64,
    /// See [`WorkerCounters::choices`].
    pub choices: u64,
    /// See [`WorkerCounters::buffer_waits`].
    pub buffer_waits: u64,
    /// See [`WorkerCounters::ring_enters`].
    pub ring_enters: u64,
    /// The state record.
    pub record: RecordTotals,
    /// Passes over the whole disk that have ended.
    pub scrub: ScrubTotals,
}

/// What was written to the state record.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct RecordTotals {
    /// See [`MaintenanceCounters::record_writes`].
    pub writes: u64,
    /// See [`MaintenanceCounters::record_copies_lost`].
    pub copies_lost: u64,
    /// See [`MaintenanceCounters::record_copies_returned`].
    pub copies_returned: u64,
}

/// What passes over the whole disk have met; see [`ScrubCounts`].
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct ScrubTotals {
    /// See [`MaintenanceCounters::passes`].
    pub passes: u64,
    /// Sectors compared.
    pub compared_sectors: u64,
    /// Sectors that one replica held otherwise.
    pub differing_sectors: u64,
    /// Sectors that one replica could not read.
    pub unreadable_sectors: u64,
    /// Sectors rewritten.
    pub repaired_sectors: u64,
    /// Sectors nobody agrees on.
    pub unresolved_sectors: u64,
    /// Sectors passed over.
    pub failed_sectors: u64,
}

/// Sums of one kind of request.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct RequestTotals {
    /// [`RequestKind::name`].
    pub kind: &'static str,
    /// See [`RequestCounters::requests`].
    pub requests: u64,
    /// See [`RequestCounters::bytes`].
    pub bytes: u64,
    /// See [`RequestCounters::errors`].
    pub errors: u64,
}

/// Sums of one replica.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct ReplicaTotals {
    /// The replica's name.
    pub name: String,
    /// See [`ReplicaCounters::operations`].
    pub operations: u64,
    /// See [`ReplicaCounters::errors`].
    pub errors: u64,
    /// See [`ReplicaCounters::dissents`].
    pub dissents: u64,
    /// See [`ReplicaCounters::repairs`].
    pub repairs: u64,
    /// See [`ReplicaCounters::behind`].
    pub behind: u64,
    /// See [`ReplicaCounters::kicks`].
    pub kicks: u64,
    /// See [`ReplicaCounters::resynced_bytes`].
    pub resynced_bytes: u64,
}

impl Totals {
    /// The sums as one JSON object.
    #[must_use]
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("sums are texts and numbers")
    }
}

impl fmt::Display for Totals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:<16}{:>14}{:>20}{:>10}",
            "guest", "requests", "bytes", "errors"
        )?;
        for row in &self.requests {
            writeln!(
                f,
                "  {:<14}{:>14}{:>20}{:>10}",
                row.kind, row.requests, row.bytes, row.errors
            )?;
        }
        let width = self.replicas.iter().map(|row| row.name.len()).max();
        let width = width.unwrap_or(0).max(14);
        writeln!(
            f,
            "{:<w$}{:>14}{:>10}{:>10}{:>10}{:>10}{:>7}{:>18}",
            "replica",
            "operations",
            "errors",
            "dissents",
            "repairs",
            "behind",
            "kicks",
            "resynced bytes",
            w = width + 2
        )?;
        for row in &self.replicas {
            writeln!(
                f,
                "  {:<width$}{:>14}{:>10}{:>10}{:>10}{:>10}{:>7}{:>18}",
                row.name,
                row.operations,
                row.errors,
                row.dissents,
                row.repairs,
                row.behind,
                row.kicks,
                row.resynced_bytes
            )?;
        }
        writeln!(
            f,
            "votes: {} answered early, {} arbitrated, {} transient, {} chosen, {} failed",
            self.early_replies, self.arbitrations, self.transients, self.choices, self.failures
        )?;
        writeln!(
            f,
            "record: {} blocks written, {} copies lost, {} returned",
            self.record.writes, self.record.copies_lost, self.record.copies_returned
        )?;
        let scrub = &self.scrub;
        writeln!(
            f,
            "scrub: {} passes, {} sectors compared, {} differing, {} unreadable, {} repaired, \
             {} unresolved, {} passed over",
            scrub.passes,
            scrub.compared_sectors,
            scrub.differing_sectors,
            scrub.unreadable_sectors,
            scrub.repaired_sectors,
            scrub.unresolved_sectors,
            scrub.failed_sectors
        )?;
        write!(
            f,
            "queues: {} kicks, {} calls, {} ring enters, {} waits for memory, \
             {} malformed chains, {} unsupported and {} refused requests",
            self.kicks,
            self.calls,
            self.ring_enters,
            self.buffer_waits,
            self.malformed,
            self.unsupported,
            self.refused
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counted() -> Totals {
        let counters = Counters::new(2, vec!["left".to_owned(), "right".to_owned()]);
        let (one, two) = (counters.worker(0), counters.worker(1));
        one.add_request(RequestKind::Read, 4096, true);
        two.add_request(RequestKind::Read, 512, false);
        two.add_request(RequestKind::Flush, 0, true);
        one.replica(ReplicaId::new(1)).dissents.add(3);
        two.kicks.add(5);
        let maintenance = counters.maintenance();
        maintenance.record_writes.add(6);
        maintenance.count_keeper_report(&KeeperReport::ResyncDone {
            replica: ReplicaId::new(1),
            bytes_done: 4096,
        });
        let counts = ScrubCounts {
            compared: 100,
            ..ScrubCounts::default()
        };
        let kind = crate::quorum::PassKind::Scrub;
        maintenance.count_keeper_report(&KeeperReport::PassDone { kind, counts });
        counters.totals()
    }

    #[test]
    fn totals_add_up_the_workers() {
        let totals = counted();
        let read = &totals.requests[0];
        assert_eq!((read.requests, read.bytes, read.errors), (2, 4608, 1));
        assert_eq!(totals.requests[2].requests, 1);
        assert_eq!(totals.replicas[1].dissents, 3);
        assert_eq!(totals.replicas[0].dissents, 0);
        assert_eq!(totals.kicks, 5);
    }

    #[test]
    fn totals_are_shown_with_names() {
        let totals = counted();
        let table = totals.to_string();
        assert!(table.contains("write-zeroes"), "{table}");
        let right = table.lines().find(|line| line.contains("right")).unwrap();
        assert!(
            right
                .split_whitespace()
                .eq(["right", "0", "0", "3", "0", "0", "0", "4096"]),
            "{table}"
        );
        let json: serde_json::Value = serde_json::from_str(&totals.to_json()).unwrap();
        assert_eq!(json["requests"][0]["kind"], "read");
        assert_eq!(json["replicas"][1]["dissents"], 3);
        assert_eq!(json["kicks"], 5);
        assert_eq!(json["record"]["writes"], 6);
        assert_eq!(json["scrub"]["compared-sectors"], 100);
        assert_eq!(json["replicas"][1]["resynced-bytes"], 4096);
    }

    #[test]
    fn reports_are_counted_where_they_belong() {
        let counters = Counters::new(1, vec!["left".to_owned()]);
        let replica = ReplicaId::new(0);
        let why = crate::quorum::KickCause::Hung;
        let kicked = Report::Kicked {
            replica,
            why,
            extents: 7,
        };
        counters.worker(0).count_report(&kicked);
        counters.maintenance().lane.count_report(&kicked);
        let totals = &counters.totals().replicas[0];
        assert_eq!((totals.kicks, totals.behind, totals.errors), (2, 14, 0));
    }

    #[test]
    fn workers_do_not_share_cache_lines() {
        assert_eq!(align_of::<WorkerCounters>(), 128);
        assert_eq!(size_of::<WorkerCounters>() % 128, 0);
    }
}
