// SPDX-License-Identifier: Apache-2.0
//! A worker: the thread that owns some of the queues, a lane, a ring and buffers, and binds them.
//!
//! It takes chains from its queues, hands them to the lane cut into parts, carries out what the
//! lane asks for, copies what was read to the guest, and publishes. Everything is done in
//! batches: one look at each queue, one entry into the ring, one update of a used index and at
//! most one signal a queue.
//!
//! Two orders matter. All parts of a request go to the lane before the next request is fetched,
//! and their places among the requests of other workers are taken in one step: locks are then
//! queued for in the order of the ring, and requests that publish in that order cannot wait for
//! each other in a circle. And a reply is carried out before the lane hears of
//! anything else, because the data it names may be used again after that.

mod guests;
mod polling;
mod queues;

use std::hint::spin_loop;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, sync_channel};
use std::thread;
use std::time::Duration;

use thiserror::Error;

use super::clock::Clock;
use super::copy_warden::CopyBack;
use super::event_loop::{EventLoop, Token};
use super::process_age::process_age;
use super::warden::Reopened;
use crate::config::Polling;
use crate::control::counters::{RequestKind as Kind, WorkerCounters};
use crate::control::events::EventData;
use crate::control::{DiskFacts, ReportSender};
use crate::device::mailbox::{Ack, Mailbox, QueueCommand};
use crate::device::queue::Answer;
use crate::device::{Began, BlockStatus, Fetched, GuestMemory};
use crate::io::RingError;
use crate::quorum::{
    Action, BufferId, Buffers, Command, Event, KickCause, Lane, LaneCounters, LaneId, Purpose,
    Report, Request, RequestId, Shared, Status, Tag, Wakeup,
};
use crate::replica::{Executor, ExecutorConfig, ExecutorError, Replica};
use crate::units::{ReplicaId, ReplicaSet, Time};
use guests::{Guests, Piece};
use polling::Poller;
use queues::Queues;

/// Requests a worker takes on at once; more stay in their rings.
const GUESTS_MAX: usize = 2048;

/// A batch ends with the request that brings it to this many bytes of the disk. Three copies and
/// the guest's buffer of these fit in a processor's second cache together, so that votes and the
/// copy to the guest find there what was read: large reads take a sixth less processor time.
const BATCH_BYTES: u64 = 192 << 10;

/// Batches after which a busy worker looks whether another queue was kicked or a message came.
const BATCHES_PER_LOOK: u32 = 4;

/// Turns of a worker that polls after which it does the same: some microseconds.
const POLLS_PER_LOOK: u32 = 64;

const TOKEN_RING: Token = u64::MAX;
const TOKEN_MAILBOX: Token = u64::MAX - 1;

/// What threads of the data path, maintenance included, tell each other.
#[derive(Debug)]
pub enum Message {
    /// To a worker: about one of its queues, or guest memory.
    Queue(QueueCommand),
    /// From another lane.
    Wake(Wakeup),
    /// To a worker: the replica was kicked. [`Message::Detached`] is owed when no operation on it
    /// is under way any more.
    Detach(ReplicaId),
    /// To a worker: the replica is back. [`Message::Attached`] is owed.
    Attach(ReplicaId, Arc<Replica>),
    /// To maintenance: marks wait to become durable.
    Record,
    /// To maintenance: a lane found that the replica cannot be relied on any more.
    Kicked {
        /// Which replica.
        replica: ReplicaId,
        /// Why.
        why: KickCause,
    },
    /// To maintenance: what a lane reported, if it is about the reliability of a replica.
    Report(Report),
    /// To maintenance: a worker has let go of the replica.
    Detached {
        /// Which replica.
        replica: ReplicaId,
    },
    /// To maintenance: a worker has the replica.
    Attached {
        /// Which replica.
        replica: ReplicaId,
    },
    /// To maintenance, from a warden: the replica's file or device is not there any more.
    Vanished {
        /// Which replica.
        replica: ReplicaId,
    },
    /// To maintenance, from a warden: the replica was opened, or could not be.
    Opened {
        /// Which replica.
        replica: ReplicaId,
        /// `None`: not yet.
        reopened: Option<Reopened>,
    },
    /// To maintenance, from the warden of a copy of the record: the copy can be used again.
    CopyBack {
        /// Place of the copy in the configuration.
        copy: u8,
        /// The copy.
        back: CopyBack,
    },
    /// To maintenance: what the operator wants.
    Command(Command),
    /// To maintenance: how is the disk?
    Status(Ack<DiskFacts>),
    /// To a worker: end when nothing is in flight any more.
    Shutdown,
    /// To maintenance: how the disk begins to be used, once. To be acknowledged when what follows
    /// from it is durable; the first ring starts after that.
    Began(Began, Ack<()>),
    /// To maintenance: close the disk.
    Close {
        /// All workers have ended: what they had under way is on replicas that were kicked.
        workers_ended: bool,
    },
}

impl From<QueueCommand> for Message {
    fn from(command: QueueCommand) -> Self {
        Self::Queue(command)
    }
}

/// What a worker is made of.
pub struct WorkerSetup {
    /// Its number, which is also that of its lane.
    pub index: u8,
    /// What the lanes share.
    pub shared: Arc<Shared>,
    /// The replicas, in the order of their slots; `None` where one is missing.
    pub replicas: Vec<Option<Arc<Replica>>>,
    /// Ring and buffers.
    pub executor: ExecutorConfig,
    /// The mailboxes of all workers, this one's at `index`.
    pub mailboxes: Vec<Arc<Mailbox<Message>>>,
    /// What it does with nothing to do.
    pub polling: Polling,
    /// Where reports go.
    pub reports: ReportSender,
    /// What it counts in.
    pub counters: Arc<WorkerCounters>,
    /// The time.
    pub clock: Clock,
    /// Where it tells that it has ended.
    pub ended: Sender<()>,
}

/// A worker that cannot be started.
#[derive(Debug, Error)]
pub enum WorkerError {
    /// No thread.
    #[error("cannot start a worker thread")]
    Thread(#[source] std::io::Error),
    /// No ring or no buffers.
    #[error("cannot set up a worker")]
    Executor(#[from] ExecutorError),
    /// No descriptor to wait with.
    #[error("cannot set up waiting in a worker")]
    Wait(#[source] std::io::Error),
    /// The thread ended before it was ready.
    #[error("a worker ended before it was ready")]
    Gone,
}

/// Starts a worker and waits until it is ready. Its end is told by `ended` and by nothing else: the
/// thread must not be waited for, since it stays where operations hang.
///
/// # Errors
/// [`WorkerError`].
pub fn spawn(setup: WorkerSetup) -> Result<(), WorkerError> {
    let (ready, started) = sync_channel(1);
    let ended = setup.ended.clone();
    thread::Builder::new()
        .name(format!("worker{}", setup.index))
        .spawn(move || {
            // The ring belongs to the thread that makes it.
            match Worker::new(setup) {
                Ok(mut worker) => {
                    // Ends before the worker does: the process is gone before anybody is told of
                    // the end of its queues, or a ring is taken down with operations in flight.
                    let _abort = AbortOnPanic;
                    // Nobody waits any more only if the start was given up.
                    let _ = ready.send(Ok(()));
                    worker.run();
                    if worker.executor.in_flight() > 0 {
                        let _ = ended.send(());
                        worker.outlive_operations();
                        return;
                    }
                    // The ring is gone, and what it kept of the replicas, before that is told.
                    drop(worker);
                    let _ = ended.send(());
                }
                Err(error) => {
                    let _ = ready.send(Err(error));
                }
            }
        })
        .map_err(WorkerError::Thread)?;
    wait_until_ready(&started)
}

fn wait_until_ready(started: &Receiver<Result<(), WorkerError>>) -> Result<(), WorkerError> {
    started.recv().map_err(|_| WorkerError::Gone)?
}

/// Requests to fetch at once from a queue whose driver keeps `depth` in flight: half of them. While
/// the driver looks at one half, the worker has the other. With all of them in one batch the two
/// only wait for each other, and the driver has to be woken every time (half the requests a second
/// at a depth of 16); with batches much smaller the signals cost more than they bring.
fn batch_requests(depth: u16) -> u16 {
    depth.div_ceil(2).max(1)
}

/// A broken invariant ends the process: a worker that has lost track of a request must not leave
/// the others to acknowledge more.
pub(super) struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if thread::panicking() {
            std::process::abort();
        }
    }
}

struct Worker {
    lane: Lane,
    shared: Arc<Shared>,
    executor: Executor,
    mailboxes: Vec<Arc<Mailbox<Message>>>,
    index: usize,
    reports: ReportSender,
    counters: Arc<WorkerCounters>,
    counted: LaneCounters,
    counted_enters: u64,
    clock: Clock,
    /// The time of the batch: looked up once, not for every event.
    now: Time,
    events: EventLoop,
    queues: Queues,
    poller: Poller,
    memory: Arc<GuestMemory>,
    guests: Guests,
    /// Replicas that were kicked and have operations under way.
    leaving: ReplicaSet,
    /// A request that was fetched and not handed to the lane whole, for want of room or buffers.
    stalled: Option<u32>,
    /// The last look at the queues ended for want of room or buffers: looking again is of no use
    /// before something has happened.
    blocked: bool,
    shutting_down: bool,
    /// No request of a guest has been completed yet.
    fresh: bool,
    // Reused from batch to batch.
    actions: Vec<Action>,
    outcomes: Vec<(crate::quorum::OpId, crate::quorum::Outcome)>,
    messages: Vec<Message>,
    ready: Vec<Token>,
    replied: Vec<u32>,
    copied: Vec<RequestId>,
    published: Vec<u32>,
}

impl Worker {
    fn new(setup: WorkerSetup) -> Result<Self, WorkerError> {
        let executor = Executor::new(&setup.replicas, setup.executor)?;
        let index = usize::from(setup.index);
        let events = EventLoop::new().map_err(WorkerError::Wait)?;
        events
            .add_edge(&executor.wake_fd(), TOKEN_RING)
            .map_err(WorkerError::Wait)?;
        events
            .add(&setup.mailboxes[index].as_fd(), TOKEN_MAILBOX)
            .map_err(WorkerError::Wait)?;
        Ok(Self {
            lane: Lane::new(LaneId(setup.index)),
            shared: setup.shared,
            executor,
            mailboxes: setup.mailboxes,
            index,
            reports: setup.reports,
            counters: setup.counters,
            counted: LaneCounters::default(),
            counted_enters: 0,
            clock: setup.clock,
            now: setup.clock.now(),
            events,
            queues: Queues::default(),
            poller: Poller::new(setup.polling),
            memory: Arc::new(GuestMemory::new()),
            guests: Guests::default(),
            leaving: ReplicaSet::EMPTY,
            stalled: None,
            blocked: false,
            shutting_down: false,
            fresh: true,
            actions: Vec::with_capacity(256),
            outcomes: Vec::with_capacity(256),
            messages: Vec::with_capacity(64),
            ready: Vec::with_capacity(64),
            replied: Vec::with_capacity(256),
            copied: Vec::with_capacity(256),
            published: Vec::with_capacity(256),
        })
    }

    fn run(&mut self) {
        let mut turns: u32 = 0;
        loop {
            let busy = self
                .turn()
                .expect("the ring of a worker works as long as the worker");
            if self.shutting_down && self.is_idle() {
                break;
            }
            if busy {
                self.poller.found(self.now);
            }
            self.queues.polled = !busy && self.poller.goes_on(self.now);
            let turns_per_look = match (busy, self.queues.polled) {
                (true, _) => BATCHES_PER_LOOK,
                (false, true) => POLLS_PER_LOOK,
                (false, false) if self.has_more() => BATCHES_PER_LOOK,
                (false, false) => {
                    turns = 0;
                    self.sleep();
                    continue;
                }
            };
            turns = turns.wrapping_add(1);
            if turns.is_multiple_of(turns_per_look) {
                self.wait(Some(Duration::ZERO));
            } else if self.queues.polled {
                spin_loop();
            }
        }
        self.mailboxes[self.index].close();
    }

    /// After the end, waits for operations that hang. Leaving the thread and taking the ring down
    /// would both block in the kernel until the storage answers, and the disk may be opened again
    /// by this process as soon as they have let go of their files (rule K2). The end of the process
    /// ends the wait.
    fn outlive_operations(&mut self) {
        // Nothing is taken out of it any more, and it may be readable.
        let _ = self.events.remove(&self.mailboxes[self.index].as_fd());
        while self.executor.in_flight() > 0 {
            let works = "the ring of a worker works as long as the worker";
            self.executor.submit().expect(works);
            let limit = self.executor.wait_limit().expect(works);
            self.events
                .wait(limit, &mut self.ready)
                .expect("waiting does not fail");
            self.ready.clear();
            self.executor.reap(&mut self.outcomes).expect(works);
            self.outcomes.clear();
        }
    }

    /// Tells maintenance of the replicas that nothing is under way on any more.
    fn let_go(&mut self) {
        for replica in self.leaving.iter() {
            if self.executor.is_detached(replica) {
                self.leaving.remove(replica);
                self.maintenance().post(Message::Detached { replica });
            }
        }
    }

    /// Requests that wait for replicas to come back would hold up who stops their queue, or the
    /// end of the daemon (rule Q4).
    fn fail_paused(&mut self) {
        if self.lane.has_paused() && (self.shutting_down || self.queues.any_stopping()) {
            self.tell(Event::Wake(Wakeup::FailPaused));
        }
    }

    /// Whether nothing is to be waited for. Operations on replicas that were kicked may hang for
    /// ever.
    fn is_idle(&self) -> bool {
        let lost: u64 = (self.leaving.iter())
            .map(|replica| u64::from(self.executor.in_flight_on(replica)))
            .sum();
        let awaited = self.executor.in_flight() as u64 - lost;
        self.guests.len() == 0 && awaited == 0 && (lost > 0 || self.lane.is_idle())
    }

    /// One batch. Returns whether there may be more to do at once: whatever the lane hears after
    /// the look at the queues may have made room for more.
    fn turn(&mut self) -> Result<bool, RingError> {
        self.now = self.clock.now();
        let fetched = self.fetch();
        self.executor.submit()?;
        let mut outcomes = std::mem::take(&mut self.outcomes);
        self.executor.reap(&mut outcomes)?;
        let mut busy = fetched || !outcomes.is_empty();
        for (op, outcome) in outcomes.drain(..) {
            self.tell(Event::Completed { op, outcome });
        }
        self.outcomes = outcomes;
        if self
            .lane
            .deadline()
            .is_some_and(|deadline| deadline <= self.now)
        {
            self.tell(Event::Tick);
            busy = true;
        }
        self.fail_paused();
        busy |= self.publish();
        self.executor.submit()?;
        if !self.leaving.is_empty() {
            self.let_go();
        }
        self.count_batch();
        Ok(busy)
    }

    /// Hands an event to the lane and carries out what it asks for.
    fn tell(&mut self, event: Event) {
        let mut next = Some(event);
        while let Some(event) = next {
            let mut actions = std::mem::take(&mut self.actions);
            self.lane.handle(
                self.now,
                event,
                &self.shared,
                self.executor.pool_mut(),
                &mut actions,
            );
            for action in actions.drain(..) {
                self.carry_out(action);
            }
            self.actions = actions;
            next = self
                .copied
                .pop()
                .map(|request| Event::Published { request });
        }
    }

    fn carry_out(&mut self, action: Action) {
        match action {
            Action::Submit(operation) => {
                self.counters.replica(operation.replica).operations.add(1);
                self.executor.start(&operation);
            }
            Action::Reply {
                tag,
                request,
                status,
                data,
            } => self.take_reply(tag.0, request, status, data),
            Action::Wake { lane, wakeup } => {
                self.mailboxes[usize::from(lane.0)].post(Message::Wake(wakeup));
            }
            Action::Report(report) => self.report(report),
            Action::Record => self.maintenance().post(Message::Record),
            Action::Kicked { replica, why } => {
                for (index, mailbox) in self.mailboxes.iter().enumerate() {
                    if index != self.index {
                        mailbox.post(Message::Wake(Wakeup::MembersChanged));
                    }
                }
                self.maintenance().post(Message::Kicked { replica, why });
            }
        }
    }

    /// The mailbox of the maintenance thread.
    fn maintenance(&self) -> &Mailbox<Message> {
        self.mailboxes.last().expect("the last of the mailboxes")
    }

    /// Copies what was read to the guest, and notes that the part is done.
    fn take_reply(
        &mut self,
        slot: u32,
        request: RequestId,
        status: Status,
        data: Option<BufferId>,
    ) {
        let part = self.guests.part(slot);
        let (guest, lead, len, data_offset) = (part.guest, part.lead, part.len, part.data_offset);
        let owner = self.guests.get(guest);
        if status == Status::IoError {
            owner.status = BlockStatus::IoError;
        } else if let Some(buffer) = data {
            let bytes = &self.executor.pool().bytes(buffer)[lead..lead + len];
            let copied = owner
                .request
                .copy_to_guest(&self.memory, data_offset, bytes);
            // Memory that the front-end has taken away is its own affair.
            if copied.is_err() {
                owner.status = BlockStatus::IoError;
            }
        }
        owner.outstanding -= 1;
        if owner.kind() == Kind::Read {
            // A read holds no lock that publication has to be waited for (rule L3). Its buffers
            // go back now: a large read needs them for its later parts.
            self.copied.push(request);
        } else {
            self.guests.part(slot).replied = Some(request);
        }
        self.replied.push(slot);
    }

    fn report(&self, report: Report) {
        self.counters.count_report(&report);
        if concerns_reliability(&report) {
            self.maintenance().post(Message::Report(report));
        }
        self.reports.send(EventData::Report(report));
    }

    /// Takes requests from the queues and hands them to the lane. Returns whether there were any.
    fn fetch(&mut self) -> bool {
        self.blocked = true;
        if let Some(guest) = self.stalled.take()
            && !self.issue(guest)
        {
            return false;
        }
        let memory = Arc::clone(&self.memory);
        let mut any = false;
        self.queues.rotate();
        for at in 0..self.queues.active_len() {
            let queue = self.queues.active(at);
            let batch = batch_requests(self.queues.get(queue).virtqueue.depth());
            let mut fetched = 0;
            let mut bytes = 0;
            while fetched < batch && bytes < BATCH_BYTES {
                if self.guests.len() >= GUESTS_MAX || !self.lane.has_room() {
                    return any;
                }
                let guest = self.guests.take();
                let slot = self.guests.get(guest);
                let entry = self.queues.get(queue);
                let repeats = entry.virtqueue.repeats() > 0;
                match entry.virtqueue.fetch(&memory, &mut slot.request) {
                    Fetched::Request(ticket) => {
                        slot.begin(queue, ticket, entry.virtqueue.write_through());
                        slot.repeats = repeats && slot.changes_sectors();
                        let over = repeats && !slot.repeats;
                        fetched += 1;
                        bytes += slot.bytes();
                        any = true;
                        if over {
                            self.end_repeat();
                        }
                        self.announce(guest);
                        if !self.issue(guest) {
                            return any;
                        }
                    }
                    Fetched::Answered(answer) => {
                        entry.to_publish = true;
                        fetched += 1;
                        any = true;
                        self.guests.free(guest);
                        self.count_answer(answer);
                        if repeats {
                            self.end_repeat();
                        }
                    }
                    Fetched::Empty => {
                        self.guests.free(guest);
                        break;
                    }
                }
            }
            self.queues.looked_at(queue, fetched > 0, &memory);
        }
        self.queues.drop_quiet();
        self.blocked = false;
        any
    }

    /// A request of before the end of the last daemon makes no difference to any sector any more.
    fn end_repeat(&mut self) {
        if self.shared.end_repeat() {
            for (index, mailbox) in self.mailboxes.iter().enumerate() {
                if index != self.index {
                    mailbox.post(Message::Wake(Wakeup::TiesDecided));
                }
            }
            self.tell(Event::Wake(Wakeup::TiesDecided));
        }
    }

    fn count_answer(&self, answer: Answer) {
        match answer {
            Answer::Malformed(_) => self.counters.malformed.add(1),
            Answer::Status(BlockStatus::Unsupported) => self.counters.unsupported.add(1),
            Answer::Status(BlockStatus::Ok) => self.counters.add_request(Kind::GetId, 0, true),
            Answer::Status(BlockStatus::IoError) => self.counters.refused.add(1),
        }
    }

    /// Before the first of several parts that write: other lanes must not come in between.
    fn announce(&mut self, guest: u32) {
        let geometry = &self.shared.geometry;
        let owner = self.guests.get(guest);
        if owner.writes_in_parts(geometry) {
            self.lane.announce(owner.ranges(), &self.shared);
        }
    }

    /// Hands the parts of a request to the lane. Returns whether all are; otherwise the request
    /// is stalled, and nothing else is fetched before it goes on.
    fn issue(&mut self, guest: u32) -> bool {
        while let Some(piece) = self.guests.get(guest).next_piece(&self.shared.geometry) {
            if !self.lane.has_room() {
                self.stalled = Some(guest);
                return false;
            }
            let (request, lead, len, data_offset) = match piece {
                Piece::Read {
                    range,
                    lead,
                    len,
                    data_offset,
                } => (Request::Read { range }, lead, len, data_offset),
                Piece::Write { range, data_offset } => {
                    let len = range.len_bytes();
                    let pool = self.executor.pool_mut();
                    let Some(data) = pool.take(len, Purpose::Guest) else {
                        self.counters.buffer_waits.add(1);
                        self.stalled = Some(guest);
                        return false;
                    };
                    // Rule L4: the only copy, before any replica sees the data.
                    let bytes = &mut pool.bytes_mut(data)[..len];
                    let owner = self.guests.get(guest);
                    if owner
                        .request
                        .copy_from_guest(&self.memory, data_offset, bytes)
                        .is_err()
                    {
                        pool.give(data);
                        owner.abandon();
                        break;
                    }
                    (Request::Write { range, data }, 0, len, data_offset)
                }
                Piece::Plain(request) => (request, 0, 0, 0),
            };
            self.guests.get(guest).advance(&piece);
            let part = self.guests.add_part(guest, lead, len, data_offset);
            self.tell(Event::Request {
                tag: Tag(part),
                request,
            });
        }
        let mut actions = std::mem::take(&mut self.actions);
        self.lane.all_parts_told(&self.shared, &mut actions);
        for action in actions.drain(..) {
            self.carry_out(action);
        }
        self.actions = actions;
        if self.guests.get(guest).is_complete() {
            self.complete(guest);
        }
        true
    }

    /// All parts are replied to: the request is complete, unless a flush is owed first.
    fn complete(&mut self, guest: u32) {
        let owner = self.guests.get(guest);
        if owner.take_owed_flush() {
            let part = self.guests.add_part(guest, 0, 0, 0);
            self.tell(Event::Request {
                tag: Tag(part),
                request: Request::Flush,
            });
            return;
        }
        let ok = owner.status == BlockStatus::Ok;
        self.counters.add_request(owner.kind(), owner.bytes(), ok);
        let len = owner.request.finish(&self.memory, owner.status);
        let ticket = owner.ticket.take().expect("a request is completed once");
        let queue = owner.queue;
        let entry = self.queues.get(queue);
        entry.virtqueue.complete(ticket, len, guest);
        entry.to_publish = true;
    }

    /// Completes what was replied to, publishes, and tells the lane what the guest can see. Returns
    /// whether there was anything to tell.
    fn publish(&mut self) -> bool {
        let mut replied = std::mem::take(&mut self.replied);
        let mut at = 0;
        while at < replied.len() {
            let guest = self.guests.part(replied[at]).guest;
            // Once for the last of its parts; a flush owed may add one more.
            let owner = self.guests.get(guest);
            if owner.is_complete() && owner.ticket.is_some() {
                self.complete(guest);
                replied.append(&mut self.replied);
            }
            at += 1;
        }
        let memory = Arc::clone(&self.memory);
        let mut published = std::mem::take(&mut self.published);
        let mut any = !replied.is_empty();
        for queue in self.queues.all() {
            let Some(entry) = self.queues.try_get(queue) else {
                continue;
            };
            if std::mem::take(&mut entry.to_publish)
                && entry.virtqueue.publish(&memory, &mut published)
            {
                entry.virtqueue.signal();
                self.counters.calls.add(1);
            }
        }
        any |= !published.is_empty();
        if self.fresh && !published.is_empty() {
            self.tell_first_request();
        }
        for guest in published.drain(..) {
            let mut part = self.guests.last_part(guest);
            while let Some(slot) = part {
                if let Some(request) = self.guests.part(slot).replied.take() {
                    self.tell(Event::Published { request });
                }
                part = self.guests.part_before(slot);
            }
            if self.guests.get(guest).repeats {
                self.end_repeat();
            }
            self.guests.free(guest);
        }
        self.published = published;
        // What stays unpublished waits for an earlier request of its queue; who holds a lock
        // meanwhile must let settlements pass.
        for part in replied.drain(..) {
            if let Some(request) = self.guests.part(part).replied {
                self.tell(Event::Deferred { request });
            }
        }
        // Replies that came of these events are for the next turn.
        replied.append(&mut self.replied);
        self.replied = replied;
        self.queues.drain_stopped(&self.events);
        any
    }

    /// The guest can see the first request completed by this worker. Which worker was the first of
    /// all is found out where reports go.
    #[cold]
    fn tell_first_request(&mut self) {
        self.fresh = false;
        if let Some(age) = process_age() {
            let ms_after_exec = u64::try_from(age.as_millis()).unwrap_or(u64::MAX);
            self.reports.send(EventData::FirstRequest { ms_after_exec });
        }
    }

    /// Passes on what ring and lane have counted since the last batch.
    fn count_batch(&mut self) {
        let enters = self.executor.ring_enters();
        self.counters.ring_enters.add(enters - self.counted_enters);
        self.counted_enters = enters;
        let now = *self.lane.counters();
        let before = std::mem::replace(&mut self.counted, now);
        if now == before {
            return;
        }
        self.counters
            .early_replies
            .add(now.early_replies - before.early_replies);
        self.counters
            .arbitrations
            .add(now.arbitrations - before.arbitrations);
        self.counters
            .transients
            .add(now.transient - before.transient);
        self.counters.failures.add(now.failures - before.failures);
        self.counters.buffer_waits.add(now.starved - before.starved);
    }

    /// Whether there is something to do without waiting. Asks the drivers to kick for what comes
    /// next. Blocked, it is not for the drivers to end the wait: what waits in their rings would
    /// make it a spin.
    fn has_more(&mut self) -> bool {
        !self.replied.is_empty() || !self.blocked && self.queues.ask_for_kicks(&self.memory)
    }

    /// Sleeps until a kick, a completion, a message or a deadline.
    fn sleep(&mut self) {
        let limit = self
            .executor
            .wait_limit()
            .expect("the ring works as long as the worker");
        let deadline = self
            .lane
            .deadline()
            .map(|deadline| deadline.since(self.clock.now()));
        let timeout = [limit, deadline].into_iter().flatten().min();
        self.wait(timeout);
    }

    /// Waits for kicks, messages and completions, at most for `timeout`.
    fn wait(&mut self, timeout: Option<Duration>) {
        let mut ready = std::mem::take(&mut self.ready);
        self.events
            .wait(timeout, &mut ready)
            .expect("waiting does not fail");
        for token in ready.drain(..) {
            match token {
                TOKEN_RING => {}
                TOKEN_MAILBOX => self.take_messages(),
                queue => {
                    self.counters.kicks.add(1);
                    self.queues.kicked(queue, &self.memory);
                }
            }
        }
        self.ready = ready;
    }
}

/// Whether a report is about how far a replica can be relied on.
fn concerns_reliability(report: &Report) -> bool {
    match report {
        Report::Bad { .. }
        | Report::Repaired { .. }
        | Report::RepairFailed { .. }
        | Report::Behind { .. }
        | Report::FlushFailed { .. } => true,
        Report::Failure { .. }
        | Report::Transient { .. }
        | Report::Kicked { .. }
        | Report::Lagging { .. }
        | Report::Chosen { .. }
        | Report::RecordLost
        | Report::VerifyFailed { .. } => false,
    }
}
