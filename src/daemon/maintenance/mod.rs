// SPDX-License-Identifier: Apache-2.0
//! The maintenance thread: a lane without queues, the keeper that decides what is to be done, and
//! the writer of the state record.
//!
//! Three state machines without I/O are bound to the world here: the lane (operations on
//! replicas), the keeper (resync, scrub, states of replicas) and the recorder (marks that become
//! durable). What one of them asks for may be news for another; so actions are collected, and
//! carried out in turns until there are none.
//!
//! - [`copies`]: copies of the record that are left out and come back.
//! - [`roster`]: which replicas are open, and how they leave all workers and come back to them.
//! - [`scrub_times`]: when the last scrub ended.
//! - [`stop`]: the clean end (rule R8).
//! - [`ties`]: what a warm or a cold start decides (rules S4, Y3).

mod copies;
mod roster;
mod scrub_times;
mod stop;
mod ties;

use std::fs::File;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Sender, SyncSender, sync_channel};
use std::thread;
use std::time::Duration;

use thiserror::Error;
use tracing::{debug, info};

use super::clock::Clock;
use super::event_loop::{EventLoop, Token};
use super::warden::{self, Left, WardenSetup};
use super::worker::{AbortOnPanic, Message};
use crate::control::events::EventData;
use crate::control::{Counters, DiskFacts, ReportSender};
use crate::device::mailbox::Mailbox;
use crate::io::{BlockWriter, RingError, Written};
use crate::quorum::{
    Action, Event, Keeper, KeeperAction, KeeperConfig, KeeperEvent, KeeperReport, KeeperStart,
    KeeperState, Lane, LaneId, OpId, Outcome, PassKind, Report, Shared, Tag, Wakeup,
};
use crate::record::{ChangeId, RecordAction, RecordEvent, Recorder, WriteId};
use crate::replica::{Executor, ExecutorConfig, ExecutorError, RawOptions, Replica};
use crate::units::{ReplicaId, Time};
use copies::Copies;
use roster::Roster;
pub use stop::STOP_LIMIT;
use stop::Stop;
use ties::Ties;

/// How often the keeper is told how much the guest asks for.
const GUEST_LOOK: Duration = Duration::from_millis(500);

/// How long the record may take to begin the epoch of this run.
const OPENING_LIMIT: Duration = Duration::from_secs(30);

const TOKEN_RING: Token = u64::MAX;
const TOKEN_RECORD: Token = u64::MAX - 1;
const TOKEN_MAILBOX: Token = u64::MAX - 2;

/// The record, ready to be written.
pub struct OpenRecord {
    /// Its state machine, before its first event.
    pub recorder: Recorder,
    /// The copies that can be written, in their order, locked, O_DSYNC.
    pub files: Vec<Option<File>>,
    /// Where they are.
    pub paths: Vec<PathBuf>,
    /// Beside replicas: none is made where the replica is missing.
    pub beside: bool,
}

/// What the thread is made of.
pub struct MaintenanceSetup {
    /// What the lanes share.
    pub shared: Arc<Shared>,
    /// The replicas that are open, by slot.
    pub replicas: Vec<Option<Arc<Replica>>>,
    /// How each of them is opened.
    pub options: Vec<RawOptions>,
    /// What those that are not open were like when they were left.
    pub left: Vec<Left>,
    /// Logical blocks of the disk, in bytes.
    pub block_bytes: u32,
    /// Ring and buffers.
    pub executor: ExecutorConfig,
    /// The mailboxes of all lanes; this one's is the last.
    pub mailboxes: Vec<Arc<Mailbox<Message>>>,
    /// Where reports go.
    pub reports: ReportSender,
    /// Tell how busy the guest is.
    pub counters: Counters,
    /// The time.
    pub clock: Clock,
    /// What the keeper may spend.
    pub keeper_config: KeeperConfig,
    /// What the disk remembers for it.
    pub keeper: KeeperStart,
    /// `None`: nothing is remembered.
    pub record: Option<OpenRecord>,
    /// Where the end of the thread is told.
    pub ended: Sender<()>,
}

/// A maintenance thread that cannot be started.
#[derive(Debug, Error)]
pub enum MaintenanceError {
    /// No thread.
    #[error("cannot start the maintenance thread")]
    Thread(#[source] std::io::Error),
    /// No ring or no buffers.
    #[error("cannot set up the maintenance thread")]
    Executor(#[from] ExecutorError),
    /// No ring for the record.
    #[error("cannot set up the writer of the state record")]
    Writer(#[from] RingError),
    /// No descriptor to wait with.
    #[error("cannot set up waiting in the maintenance thread")]
    Wait(#[source] std::io::Error),
    /// The record does not take the epoch of this run.
    #[error(
        "the state record cannot be written on enough of its copies; see the log for which, and \
         look at the file systems they are on"
    )]
    Record,
    /// The thread ended before it was ready.
    #[error("the maintenance thread ended before it was ready")]
    Gone,
}

/// Starts the thread and waits until the epoch of this run has begun (rule R7): before that nothing
/// may be written to a replica. Its end is told by `ended` and by nothing else: the thread must not
/// be waited for, since it stays where operations hang.
///
/// # Errors
/// [`MaintenanceError`].
pub fn spawn(setup: MaintenanceSetup) -> Result<(), MaintenanceError> {
    let (ready, started) = sync_channel(1);
    let ended = setup.ended.clone();
    thread::Builder::new()
        .name("maintenance".to_owned())
        .spawn(move || match Maintenance::new(setup) {
            Ok(mut maintenance) => {
                let _abort = AbortOnPanic;
                maintenance.run(&ready);
                maintenance.release_locks();
                if maintenance.has_operations() {
                    let _ = ended.send(());
                    maintenance.outlive_operations();
                    return;
                }
                // The rings are gone, and the files they kept, before that is told.
                drop(maintenance);
                let _ = ended.send(());
            }
            Err(error) => {
                let _ = ready.send(Err(error));
            }
        })
        .map_err(MaintenanceError::Thread)?;
    started.recv().map_err(|_| MaintenanceError::Gone)?
}

/// A write of the record: to which copy, and the recorder's name for it.
type RecordWrite = (u8, WriteId);

struct Record {
    recorder: Recorder,
    writer: BlockWriter<RecordWrite>,
    /// Second descriptors of the files, for their locks.
    files: Vec<Option<File>>,
    /// Writes under way, by copy.
    under_way: Vec<u32>,
    paths: Vec<PathBuf>,
    copies: Copies,
    /// The change that was last found durable.
    durable: Option<ChangeId>,
    /// It says, or is to say, that U is of a cold start.
    cold: bool,
}

struct Maintenance {
    lane: Lane,
    shared: Arc<Shared>,
    executor: Executor,
    keeper: Keeper,
    record: Option<Record>,
    roster: Roster,
    mailboxes: Vec<Arc<Mailbox<Message>>>,
    reports: ReportSender,
    counters: Counters,
    clock: Clock,
    now: Time,
    events: EventLoop,
    next_guest_look: Time,
    stop: Stop,
    ties: Ties,
    /// Something was in U when this run began, and is, as far as was said.
    unresolved: bool,
    // What is to be carried out, and reused.
    lane_actions: Vec<Action>,
    keeper_actions: Vec<KeeperAction>,
    record_actions: Vec<RecordAction>,
    outcomes: Vec<(OpId, Outcome)>,
    written: Vec<Written<RecordWrite>>,
    messages: Vec<Message>,
    ready: Vec<Token>,
}

impl Maintenance {
    fn new(setup: MaintenanceSetup) -> Result<Self, MaintenanceError> {
        let lane = setup.mailboxes.len() - 1;
        let mailbox = &setup.mailboxes[lane];
        let executor = Executor::new(&setup.replicas, setup.executor)?;
        let events = EventLoop::new().map_err(MaintenanceError::Wait)?;
        let wait = MaintenanceError::Wait;
        events
            .add_edge(&executor.wake_fd(), TOKEN_RING)
            .map_err(wait)?;
        events.add(&mailbox.as_fd(), TOKEN_MAILBOX).map_err(wait)?;
        let mut keeper_config = setup.keeper_config;
        let mut record = setup.record;
        if let (Some(record), Some(interval)) = (&mut record, keeper_config.scrub_interval) {
            keeper_config.scrub_first = Some(scrub_times::first(&mut record.recorder, interval));
        }
        let record = record
            .map(|open| -> Result<Record, MaintenanceError> {
                let copies = Copies::new(&open, mailbox).map_err(MaintenanceError::Thread)?;
                let files = open.files.iter();
                let files = files
                    .map(|file| file.as_ref().map(File::try_clone).transpose())
                    .collect::<Result<Vec<_>, _>>()
                    .map_err(MaintenanceError::Wait)?;
                let writer = BlockWriter::new(open.files)?;
                events
                    .add_edge(&writer.wake_fd(), TOKEN_RECORD)
                    .map_err(wait)?;
                Ok(Record {
                    cold: open.recorder.superblock().cold,
                    recorder: open.recorder,
                    writer,
                    under_way: vec![0; files.len()],
                    files,
                    paths: open.paths,
                    copies,
                    durable: None,
                })
            })
            .transpose()?;
        let mut wardens = Vec::with_capacity(setup.options.len());
        let options = setup.options.into_iter().zip(setup.left);
        for (index, (options, left)) in options.enumerate() {
            let setup = WardenSetup {
                id: ReplicaId::new(index),
                options,
                left,
                sectors: setup.shared.geometry.sectors(),
                block_bytes: setup.block_bytes,
                maintenance: Arc::clone(mailbox),
            };
            wardens.push(warden::spawn(setup).map_err(MaintenanceError::Thread)?);
        }
        let keeper = Keeper::new(keeper_config, setup.keeper, &setup.shared);
        let ties = Ties::new(setup.shared.crash_tie());
        let unresolved = setup.shared.unresolved.extents() > 0;
        Ok(Self {
            lane: Lane::new(LaneId(u8::try_from(lane).expect("at most 64 lanes"))),
            roster: Roster::new(setup.replicas, wardens, setup.mailboxes.len() - 1),
            shared: setup.shared,
            executor,
            keeper,
            record,
            mailboxes: setup.mailboxes,
            reports: setup.reports,
            counters: setup.counters,
            clock: setup.clock,
            now: setup.clock.now(),
            events,
            next_guest_look: setup.clock.now(),
            stop: Stop::default(),
            ties,
            unresolved,
            lane_actions: Vec::new(),
            keeper_actions: Vec::new(),
            record_actions: Vec::new(),
            outcomes: Vec::new(),
            written: Vec::new(),
            messages: Vec::new(),
            ready: Vec::new(),
        })
    }

    fn run(&mut self, ready: &SyncSender<Result<(), MaintenanceError>>) {
        let begun = self.begin_epoch();
        let failed = begun.is_err();
        // Nobody waits any more only if the start was given up.
        let _ = ready.send(begun);
        if failed {
            return;
        }
        // Those that were not there at the start have left before the keeper came.
        for replica in self.roster.missing() {
            self.tell_keeper(KeeperEvent::Detached { replica });
        }
        while !self.stop.is_done() {
            self.turn()
                .expect("the rings of the maintenance thread work as long as it");
            if !self.stop.is_done() {
                self.sleep();
            }
        }
        self.mailboxes[self.own()].close();
    }

    fn own(&self) -> usize {
        self.mailboxes.len() - 1
    }

    /// Writes the record until the epoch of this run is durable.
    fn begin_epoch(&mut self) -> Result<(), MaintenanceError> {
        let Some(record) = &self.record else {
            return Ok(());
        };
        let opening = record.recorder.opening();
        let until = self.clock.now().after(OPENING_LIMIT);
        self.tell_recorder(RecordEvent::Poll);
        loop {
            self.now = self.clock.now();
            self.move_record()?;
            self.carry_out_record();
            let record = self.record.as_mut().expect("looked at above");
            if record.durable >= Some(opening) {
                return Ok(());
            }
            if record.recorder.is_lost() || self.now >= until {
                return Err(MaintenanceError::Record);
            }
            record.writer.submit()?;
            let limit = record.writer.wait_limit()?;
            let tick = Duration::from_millis(100);
            self.events
                .wait(Some(limit.unwrap_or(tick).min(tick)), &mut self.ready)
                .map_err(MaintenanceError::Wait)?;
            self.ready.clear();
            self.tell_recorder(RecordEvent::Tick);
        }
    }

    /// Takes what has happened and does what follows from it.
    fn turn(&mut self) -> Result<(), RingError> {
        self.now = self.clock.now();
        self.take_messages();
        self.executor.submit()?;
        let mut outcomes = std::mem::take(&mut self.outcomes);
        self.executor.reap(&mut outcomes)?;
        for (op, outcome) in outcomes.drain(..) {
            self.tell_lane(Event::Completed { op, outcome });
        }
        self.outcomes = outcomes;
        self.move_record()?;
        self.move_copies()?;
        self.pass_time();
        self.carry_out();
        self.move_replicas();
        self.carry_out();
        self.advance_ties();
        self.advance_stop();
        self.carry_out();
        self.executor.submit()?;
        if let Some(record) = &mut self.record {
            record.writer.submit()?;
        }
        Ok(())
    }

    fn pass_time(&mut self) {
        if self.lane.deadline().is_some_and(|at| at <= self.now) {
            self.tell_lane(Event::Tick);
        }
        if self.next_guest_look <= self.now {
            self.next_guest_look = self.now.after(GUEST_LOOK);
            let totals = self.counters.totals();
            let total = totals.requests.iter().map(|kind| kind.requests).sum();
            self.tell_keeper(KeeperEvent::GuestRequests { total });
            self.note_resolved();
        }
        if self.keeper.deadline().is_some_and(|at| at <= self.now) {
            self.tell_keeper(KeeperEvent::Tick);
        }
        let record = self.record.as_ref();
        if record.is_some_and(|record| record.recorder.deadline().is_some_and(|at| at <= self.now))
        {
            self.tell_recorder(RecordEvent::Tick);
        }
    }

    /// Once nothing of the last crash is unresolved, the record need not know of it (rule S4).
    fn note_resolved(&mut self) {
        if self.shared.unresolved.extents() > 0 {
            return;
        }
        if std::mem::take(&mut self.unresolved) {
            info!("everything that was unresolved since the last end of the daemon is resolved");
        }
        let Some(record) = &mut self.record else {
            return;
        };
        if std::mem::take(&mut record.cold) {
            record.recorder.change(|superblock| superblock.cold = false);
            self.tell_recorder(RecordEvent::Poll);
        }
    }

    fn sleep(&mut self) {
        let ring = self
            .executor
            .wait_limit()
            .expect("the ring works as long as the thread");
        let record = self.record.as_mut().and_then(|record| {
            let limit = record.writer.wait_limit();
            limit.expect("the ring works as long as the thread")
        });
        let now = self.clock.now();
        let until = |at: Option<Time>| at.map(|at| at.since(now));
        let recorder = self.record.as_ref().map(|record| &record.recorder);
        let limits = [
            ring,
            record,
            until(self.lane.deadline()),
            until(self.keeper.deadline()),
            until(recorder.and_then(Recorder::deadline)),
            until(Some(self.next_guest_look)),
            until(self.stop.deadline()),
            until(self.ties.deadline()),
        ];
        let timeout = limits.into_iter().flatten().min();
        self.events
            .wait(timeout, &mut self.ready)
            .expect("waiting does not fail");
        self.ready.clear();
    }

    fn tell_lane(&mut self, event: Event) {
        let pool = self.executor.pool_mut();
        self.lane
            .handle(self.now, event, &self.shared, pool, &mut self.lane_actions);
    }

    fn tell_keeper(&mut self, event: KeeperEvent) {
        if self.stop.is_begun() && !matches!(event, KeeperEvent::Kicked { .. }) {
            // Nothing new is begun any more.
            return;
        }
        self.keeper
            .handle(self.now, event, &self.shared, &mut self.keeper_actions);
    }

    fn tell_recorder(&mut self, event: RecordEvent) {
        if let Some(record) = &mut self.record {
            let marks = self.shared.membership.marks();
            record
                .recorder
                .handle(self.now, event, marks, &mut self.record_actions);
        }
    }

    /// Carries out what the three ask for, until they ask for nothing any more.
    fn carry_out(&mut self) {
        while !(self.lane_actions.is_empty()
            && self.keeper_actions.is_empty()
            && self.record_actions.is_empty())
        {
            for action in std::mem::take(&mut self.lane_actions) {
                self.carry_out_for_lane(action);
            }
            for action in std::mem::take(&mut self.keeper_actions) {
                self.carry_out_for_keeper(action);
            }
            self.carry_out_record();
        }
    }

    fn carry_out_for_lane(&mut self, action: Action) {
        match action {
            Action::Submit(operation) => {
                let counters = &self.counters.maintenance().lane;
                counters.replica(operation.replica).operations.add(1);
                self.executor.start(&operation);
            }
            Action::Reply {
                tag,
                request,
                status,
                ..
            } => {
                self.tell_lane(Event::Published { request });
                if !self.stop.take_reply(tag, status) {
                    self.tell_keeper(KeeperEvent::Replied { tag, status });
                }
            }
            Action::Wake { lane, wakeup } => self.wake(usize::from(lane.0), wakeup),
            Action::Report(report) => {
                self.counters.maintenance().lane.count_report(&report);
                self.reports.send(EventData::Report(report));
                self.tell_keeper(KeeperEvent::Report(report));
            }
            Action::Record => self.tell_recorder(RecordEvent::Poll),
            Action::Kicked { replica, why } => {
                self.wake_others(Wakeup::MembersChanged);
                self.tell_keeper(KeeperEvent::Kicked { replica, why });
                self.take_away(replica);
            }
        }
    }

    fn carry_out_for_keeper(&mut self, action: KeeperAction) {
        match action {
            KeeperAction::Request { tag, request } => {
                self.tell_lane(Event::Request { tag, request });
            }
            KeeperAction::Kicked { replica, why } => {
                let extents = self.shared.membership.behind_extents(replica);
                let report = Report::Kicked {
                    replica,
                    why,
                    extents,
                };
                self.counters.maintenance().lane.count_report(&report);
                self.reports.send(EventData::Report(report));
                self.wake_all(Wakeup::MembersChanged);
                self.take_away(replica);
            }
            KeeperAction::Reopen { replica } => self.roster.open(replica),
            KeeperAction::Admitted { .. } | KeeperAction::MembersChanged => {
                self.wake_all(Wakeup::MembersChanged);
            }
            KeeperAction::Record => self.tell_recorder(RecordEvent::Poll),
            KeeperAction::Report(report) => {
                let kind = PassKind::Scrub;
                if matches!(report, KeeperReport::PassDone { kind: of, .. } if of == kind) {
                    self.note_scrubbed();
                }
                self.counters.maintenance().count_keeper_report(&report);
                self.reports.send(EventData::Keeper(report));
            }
            KeeperAction::Save(state) => self.save(state),
        }
    }

    fn carry_out_record(&mut self) {
        for action in std::mem::take(&mut self.record_actions) {
            let Some(record) = &mut self.record else {
                return;
            };
            match action {
                RecordAction::Write {
                    copy,
                    write,
                    block,
                    bytes,
                } => {
                    self.counters.maintenance().record_writes.add(1);
                    record.under_way[usize::from(copy)] += 1;
                    record
                        .writer
                        .write(usize::from(copy), block, bytes, (copy, write));
                }
                RecordAction::Settled => self.wake_waiting(),
                RecordAction::Changed(change) => {
                    record.durable = record.durable.max(Some(change));
                }
                RecordAction::Excluded {
                    copy,
                    errno,
                    took_part,
                } => {
                    let path = record.paths[usize::from(copy)].display();
                    let why = match errno {
                        Some(errno) => std::io::Error::from_raw_os_error(errno).to_string(),
                        None => "a write to it takes too long".to_owned(),
                    };
                    // Until the epoch has begun nobody reads the reports.
                    if record.durable.is_none() {
                        tracing::warn!("the copy {path} of the state record is left out: {why}");
                    } else {
                        debug!("the copy {path} of the state record is left out: {why}");
                    }
                    if took_part {
                        self.counters.maintenance().record_copies_lost.add(1);
                        let errno = errno.unwrap_or(libc::ETIMEDOUT);
                        self.reports.send(EventData::RecordCopyLost { copy, errno });
                    }
                }
                RecordAction::Returned { copy } => {
                    self.counters.maintenance().record_copies_returned.add(1);
                    self.reports.send(EventData::RecordCopyReturned { copy });
                }
                RecordAction::Lost => {
                    self.shared.lose_record();
                    self.reports.send(EventData::Report(Report::RecordLost));
                    self.wake_waiting();
                }
                RecordAction::Regained => {
                    self.shared.regain_record();
                    self.reports.send(EventData::RecordRegained);
                    self.wake_waiting();
                }
            }
        }
    }

    /// Takes the ends of writes of the record.
    fn move_record(&mut self) -> Result<(), RingError> {
        let Some(record) = &mut self.record else {
            return Ok(());
        };
        record.writer.submit()?;
        let mut written = std::mem::take(&mut self.written);
        record.writer.reap(&mut written)?;
        for Written { name, .. } in &written {
            record.under_way[usize::from(name.0)] -= 1;
        }
        for Written { name, errno } in written.drain(..) {
            let (copy, write) = name;
            self.tell_recorder(RecordEvent::Written { copy, write, errno });
        }
        self.written = written;
        Ok(())
    }

    fn wake(&mut self, lane: usize, wakeup: Wakeup) {
        if lane == self.own() {
            self.tell_lane(Event::Wake(wakeup));
        } else {
            self.mailboxes[lane].post(Message::Wake(wakeup));
        }
    }

    /// Every lane but this thread's.
    fn wake_others(&self, wakeup: Wakeup) {
        for mailbox in &self.mailboxes[..self.own()] {
            mailbox.post(Message::Wake(wakeup));
        }
    }

    fn wake_all(&mut self, wakeup: Wakeup) {
        self.wake_others(wakeup);
        self.tell_lane(Event::Wake(wakeup));
    }

    /// Lanes with requests that wait for marks.
    fn wake_waiting(&mut self) {
        for lane in self.shared.take_waiting() {
            self.wake(usize::from(lane.0), Wakeup::Durable);
        }
    }

    fn take_messages(&mut self) {
        let mut messages = std::mem::take(&mut self.messages);
        self.mailboxes[self.own()].take(&mut messages);
        let mut record = false;
        for message in messages.drain(..) {
            match message {
                Message::Wake(Wakeup::TiesDecided) => self.note_ties_decided(),
                Message::Wake(wakeup) => self.tell_lane(Event::Wake(wakeup)),
                Message::Began(began, known) => self.began(began, known),
                // Many at once need one look.
                Message::Record => record = true,
                Message::Kicked { replica, why } => {
                    self.tell_lane(Event::Wake(Wakeup::MembersChanged));
                    self.tell_keeper(KeeperEvent::Kicked { replica, why });
                    self.take_away(replica);
                }
                Message::Report(report) => self.tell_keeper(KeeperEvent::Report(report)),
                Message::Vanished { replica } => {
                    self.tell_keeper(KeeperEvent::Vanished { replica });
                }
                Message::Detached { replica } => self.roster.left(replica),
                Message::Attached { replica } => self.roster.joined(replica),
                Message::Opened { replica, reopened } => self.opened(replica, reopened),
                Message::Command(command) => self.tell_keeper(KeeperEvent::Command(command)),
                Message::CopyBack { copy, back } => self
                    .copy_back(copy, back)
                    .expect("the ring works as long as the thread"),
                Message::Status(ask) => ask.send(DiskFacts {
                    keeper: self.keeper.status(&self.shared),
                    record: self.standings(),
                }),
                Message::Close { workers_ended } => self.begin_stop(workers_ended),
                Message::Queue(_)
                | Message::Detach(_)
                | Message::Attach(..)
                | Message::Shutdown => {
                    unreachable!("for workers")
                }
            }
        }
        self.messages = messages;
        if record {
            self.tell_recorder(RecordEvent::Poll);
        }
    }

    /// Writes to the superblock what the keeper wants remembered.
    fn save(&mut self, state: KeeperState) {
        let Some(record) = &mut self.record else {
            return;
        };
        let shared = &self.shared;
        record
            .recorder
            .change(|superblock| stop::describe(superblock, &state, shared));
        self.tell_recorder(RecordEvent::Poll);
    }
}

/// The tag of requests that the end of the thread makes. The keeper numbers its own from 0.
const STOP_TAG: Tag = Tag(u32::MAX);
