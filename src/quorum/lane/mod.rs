// SPDX-License-Identifier: Apache-2.0
//! A lane: one worker's share of the core, its requests in flight and what they wait for.
//!
//! A lane is a state machine. [`Lane::handle`] is given one event and the time and appends
//! actions; it never blocks and never looks at the world. Parts:
//!
//! - `read`: ask the current copies, compare, reply at T equal, look at late ballots too; checks.
//! - `write`: lock, wait until the intent is durable, write to all current copies, leave behind
//!   who fails or is late, wait until that is durable, reply.
//! - `settle`: arbitration under the exclusive lock, repair, resolving of sectors in U.
//! - `reconcile`: a whole extent brought into order: after a crash, and for replicas behind in it.
//! - `flush`: flush runs over all replicas.
//! - `probe`: a read of one replica, to see whether it answers.
//! - `durable`: who waits for marks; `members`: replicas that hang, and who waits for one that went.
//!
//! A request waits for locks, for operations, for marks to become durable ([`Action::Record`],
//! [`Wakeup::Durable`]), for its extent to be reconciled, for replicas to come back
//! ([`Wakeup::MembersChanged`]), or until it is known what becomes of ties after a crash
//! ([`Wakeup::TiesDecided`]); nobody waits for a replica that is not up.
//!
//! Every request and every settlement is an *activity* in a slot. An activity lives until it has
//! been replied to, the reply is published, and its last operation has completed: a buffer is
//! never given back while somebody may still use it (rule V7).

mod durable;
mod flush;
mod members;
mod probe;
mod read;
mod reconcile;
mod settle;
mod write;

use std::collections::VecDeque;
use std::time::Duration;

use super::event::{
    Action, BufferId, During, Event, LaneId, LockTicket, OpId, Operation, OperationKind, Outcome,
    Report, Request, RequestId, Status, Tag, Wakeup,
};
use super::shared::Shared;
use super::slab::{Slab, SlotId};
use super::{Buffers, LockMode};
use crate::units::{REPLICAS_MAX, ReplicaId, ReplicaSet, SectorRange, Time};

use flush::{FlushFor, FlushRequest, FlushRun};
use probe::Probe;
use read::Read;
use reconcile::{Reconcile, Waiter};
use settle::Settle;
use write::Write;

/// Activities of a lane at once, an upper bound on its memory.
const ACTIVITIES_MAX: u16 = 8192;

/// Slots that guest requests leave free for background settlements and flush runs.
const ACTIVITIES_RESERVED: usize = 256;

/// Slots that may be taken when another request comes: a read that goes to arbitration while an
/// answer is still out needs a second one, and a third if it has to be flushed.
const REQUESTS_MAX: usize = (ACTIVITIES_MAX as usize - ACTIVITIES_RESERVED) / 3;

/// How often deadlines are looked at while there are any. Deadlines are at least 20 ms away.
const TICK: Duration = Duration::from_millis(5);

/// How often it is looked whether an operation takes longer than `io-timeout`. The timeout is
/// seconds.
const LOOK: Duration = Duration::from_millis(500);

/// A replica with more unanswered reads than this behind replies that were given is not asked
/// while T others can be; it would only pile up buffers.
const STRAGGLERS_MAX: u32 = 64;

/// Everything one call of [`Lane::handle`] works with.
struct Turn<'a, B> {
    now: Time,
    shared: &'a Shared,
    buffers: &'a mut B,
    actions: &'a mut Vec<Action>,
}

impl<B: Buffers> Turn<'_, B> {
    fn submit(&mut self, slot: SlotId, replica: ReplicaId, kind: OperationKind) {
        let op = OpName { slot, replica }.pack();
        self.actions
            .push(Action::Submit(Operation { op, replica, kind }));
    }

    fn report(&mut self, report: Report) {
        self.actions.push(Action::Report(report));
    }

    /// How much longer those that are late are waited for, when the others took from `started`
    /// until now (rule W6).
    fn grace(&self, started: Time) -> Duration {
        let policy = &self.shared.policy;
        let took = self.now.since(started);
        (took * 4).clamp(policy.write_grace_min, policy.write_grace_max)
    }

    fn give(&mut self, buffer: Option<BufferId>) {
        if let Some(buffer) = buffer {
            self.buffers.give(buffer);
        }
    }
}

/// What an [`OpId`] is made of. An activity has at most one operation in flight on a replica.
#[derive(Clone, Copy)]
struct OpName {
    slot: SlotId,
    replica: ReplicaId,
}

impl OpName {
    fn pack(self) -> OpId {
        OpId(self.slot.pack() | (self.replica.index() as u64) << 48)
    }

    fn unpack(op: OpId) -> Self {
        let replica = usize::try_from(op.0 >> 48).expect("16 bits");
        Self {
            slot: SlotId::unpack(op.0),
            replica: ReplicaId::new(replica),
        }
    }
}

/// The buffers of an activity, one a replica.
#[derive(Clone, Copy, Default)]
struct ReplicaBuffers([Option<BufferId>; REPLICAS_MAX]);

impl ReplicaBuffers {
    /// Takes a buffer of `len_bytes` for each of `replicas`, or none at all.
    fn take<B: Buffers>(
        buffers: &mut B,
        replicas: ReplicaSet,
        len_bytes: usize,
        purpose: super::Purpose,
    ) -> Option<Self> {
        let mut taken = Self::default();
        for replica in replicas.iter() {
            match buffers.take(len_bytes, purpose) {
                Some(buffer) => taken.0[replica.index()] = Some(buffer),
                None => {
                    taken.give_all(buffers);
                    return None;
                }
            }
        }
        Some(taken)
    }

    fn of(&self, replica: ReplicaId) -> BufferId {
        self.0[replica.index()].expect("the activity took a buffer for each replica it asks")
    }

    fn give_all<B: Buffers>(&mut self, buffers: &mut B) {
        for buffer in &mut self.0 {
            if let Some(buffer) = buffer.take() {
                buffers.give(buffer);
            }
        }
    }

    fn give_except<B: Buffers>(&mut self, buffers: &mut B, kept: ReplicaSet) {
        for (index, buffer) in self.0.iter_mut().enumerate() {
            if !kept.contains(ReplicaId::new(index))
                && let Some(buffer) = buffer.take()
            {
                buffers.give(buffer);
            }
        }
    }
}

enum Activity {
    Read(Read),
    Write(Write),
    /// Rare and large, hence on the heap.
    Settle(Box<Settle>),
    /// As rare.
    Reconcile(Box<Reconcile>),
    FlushRequest(FlushRequest),
    FlushRun(FlushRun),
    Probe(Probe),
    /// Replied to without any I/O; waits for its publication.
    Replied,
}

/// What a lane has counted since it was made. Read by whoever owns the lane.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
pub struct LaneCounters {
    /// Reads answered before every replica asked had answered.
    pub early_replies: u64,
    /// Reads and background checks that went to arbitration.
    pub arbitrations: u64,
    /// Differences that were gone when looked at again under the lock.
    pub transient: u64,
    /// Sectors rewritten on dissenters and read back.
    pub repaired_sectors: u64,
    /// Requests that had to wait for buffers.
    pub starved: u64,
    /// Requests that ended with an I/O error.
    pub failures: u64,
    /// Background checks not made because too many waited; the next read finds them again.
    pub settles_dropped: u64,
    /// Reads for which a slow replica was not asked.
    pub reads_without_laggard: u64,
    /// Extents in which a replica was brought up to date, counted once for each replica.
    pub resynced_extents: u64,
    /// Sectors compared on all current copies by checks.
    pub checked_sectors: u64,
}

/// One worker's share of the core.
pub struct Lane {
    id: LaneId,
    activities: Slab<Activity>,
    /// Reads that wait for buffers, in order of arrival.
    starved: VecDeque<SlotId>,
    /// Settlements that hold their lock and wait for buffers.
    settles_starved: VecDeque<SlotId>,
    /// Settlements under way, to notice that one for the same range is already there.
    settles: Vec<SlotId>,
    /// Extents to be brought into order, being that, or waiting for their lock.
    reconciles: Vec<SlotId>,
    /// Those that have their lock and wait for their turn.
    reconciles_queued: VecDeque<SlotId>,
    /// Those whose turn it is.
    reconciling: usize,
    /// Activities that wait until the marks up to a number are durable. Numbers rise, but for those
    /// of settlements, which are noted before they are waited for; these then wait a little longer
    /// than they would have to.
    waits: VecDeque<(u64, SlotId)>,
    /// Requests that wait for replicas to come back.
    paused: Vec<Waiter>,
    /// Requests whose extent is to be brought into order once more.
    retries: Vec<Waiter>,
    /// Reads that wait until it is known what becomes of ties after a crash.
    undecided: Vec<Waiter>,
    /// Reads that gave their slots back and wait.
    parked_reads: usize,
    /// A replica went or came, and not every activity has been told.
    members_changed: bool,
    /// When to look for operations that take too long.
    next_look: Option<Time>,
    /// Flush requests that wait for a run.
    flushes: Vec<SlotId>,
    /// The next flush run is this lane's to begin.
    run_due: bool,
    /// Locks granted to this lane by its own releases.
    granted: VecDeque<LockTicket>,
    /// What was announced and not withdrawn.
    announced: Vec<SectorRange>,
    /// Reused by releases.
    woken: Vec<(LaneId, LockTicket)>,
    /// Reused by ticks.
    swept: Vec<SlotId>,
    /// Activities with a deadline.
    timed: usize,
    next_tick: Option<Time>,
    /// Reads of each replica that are still out although their request was replied to.
    stragglers: [u32; REPLICAS_MAX],
    counters: LaneCounters,
}

impl Lane {
    /// A lane without requests. At most 64 lanes share a disk.
    #[must_use]
    pub fn new(id: LaneId) -> Self {
        assert!(id.0 < 64);
        Self {
            id,
            activities: Slab::new(ACTIVITIES_MAX),
            starved: VecDeque::with_capacity(usize::from(ACTIVITIES_MAX)),
            settles_starved: VecDeque::with_capacity(ACTIVITIES_RESERVED),
            settles: Vec::with_capacity(ACTIVITIES_RESERVED),
            reconciles: Vec::with_capacity(ACTIVITIES_RESERVED),
            reconciles_queued: VecDeque::new(),
            reconciling: 0,
            waits: VecDeque::with_capacity(ACTIVITIES_RESERVED),
            paused: Vec::new(),
            retries: Vec::new(),
            undecided: Vec::new(),
            parked_reads: 0,
            members_changed: false,
            next_look: None,
            flushes: Vec::with_capacity(ACTIVITIES_RESERVED),
            run_due: false,
            granted: VecDeque::with_capacity(64),
            announced: Vec::new(),
            woken: Vec::with_capacity(64),
            swept: Vec::with_capacity(usize::from(ACTIVITIES_MAX)),
            timed: 0,
            next_tick: None,
            stragglers: [0; REPLICAS_MAX],
            counters: LaneCounters::default(),
        }
    }

    /// Whether another request may be submitted now. Otherwise some completion comes first.
    #[must_use]
    pub fn has_room(&self) -> bool {
        let taken = usize::from(ACTIVITIES_MAX) - self.activities.room();
        self.starved.is_empty() && taken + self.parked_reads < REQUESTS_MAX
    }

    /// Whether no request and no operation is left.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.activities.is_empty()
    }

    /// When [`Event::Tick`] is owed at the latest.
    #[must_use]
    pub fn deadline(&self) -> Option<Time> {
        [self.next_tick, self.next_look].into_iter().flatten().min()
    }

    /// Whether requests wait for replicas to come back. They fail with [`Wakeup::FailPaused`].
    #[must_use]
    pub fn has_paused(&self) -> bool {
        !(self.paused.is_empty() && self.retries.is_empty())
    }

    /// What was counted so far.
    #[must_use]
    pub fn counters(&self) -> &LaneCounters {
        &self.counters
    }

    /// Before the first of several writing parts of one request of the guest, which cover
    /// `ranges`: their places among the requests of all lanes are taken in one step. Owed then is
    /// [`Lane::all_parts_told`], before the parts of another request.
    ///
    /// # Panics
    /// If the parts of another request were announced and are not all told.
    pub fn announce(&mut self, ranges: impl Iterator<Item = SectorRange>, shared: &Shared) {
        assert!(self.announced.is_empty(), "one request at a time");
        self.announced.extend(ranges);
        shared.order.announce(&self.announced, self.id);
    }

    /// No more parts of the request that was announced, if one was, will come. Appends what is to
    /// be done about it.
    pub fn all_parts_told(&mut self, shared: &Shared, actions: &mut Vec<Action>) {
        if self.announced.is_empty() {
            return;
        }
        shared
            .order
            .withdraw(&self.announced, self.id, &mut self.woken);
        self.announced.clear();
        self.wake(actions);
    }

    /// Takes note of `event` at `now` and appends what is to be done about it, in order.
    pub fn handle<B: Buffers>(
        &mut self,
        now: Time,
        event: Event,
        shared: &Shared,
        buffers: &mut B,
        actions: &mut Vec<Action>,
    ) {
        let turn = &mut Turn {
            now,
            shared,
            buffers,
            actions,
        };
        match event {
            Event::Request { tag, request } => self.begin(turn, tag, request),
            Event::Completed { op, outcome } => self.completed(turn, op, outcome),
            Event::Published { request } => self.published(turn, SlotId::unpack(request.0)),
            Event::Deferred { request } => self.deferred(turn, SlotId::unpack(request.0)),
            Event::Wake(Wakeup::Granted(ticket)) => self.granted.push_back(ticket),
            Event::Wake(Wakeup::FlushStart) => self.run_due = true,
            Event::Wake(Wakeup::FlushDone { run, end }) => self.flush_answer(turn, run, end),
            // What they wait for is looked at below.
            Event::Wake(Wakeup::Durable) => {}
            Event::Wake(Wakeup::MembersChanged) => self.members_changed = true,
            Event::Wake(Wakeup::TiesDecided) => self.resume_undecided(turn),
            Event::Wake(Wakeup::FailPaused) => self.fail_paused(turn),
            Event::Tick => self.tick(turn),
        }
        self.run_ready(turn);
        if self.activities.is_empty() && self.retries.is_empty() {
            self.next_look = None;
        } else if self.next_look.is_none() {
            self.next_look = Some(now.after(LOOK));
        }
    }

    fn begin<B: Buffers>(&mut self, turn: &mut Turn<'_, B>, tag: Tag, request: Request) {
        match request {
            Request::Read { range } => {
                assert!(
                    turn.shared.geometry.admits(range),
                    "read of {range} is not cut right"
                );
                self.read_begin(turn, tag, range);
            }
            Request::Write { range, data } => {
                self.write_begin(turn, tag, range, write::Content::Data(data));
            }
            Request::WriteZeroes { range, unmap } => {
                self.write_begin(turn, tag, range, write::Content::Zeroes { unmap });
            }
            // Rule Z2: zeroes on every replica, or nothing on any.
            Request::Discard { range } if turn.shared.policy.discard_zeroes => {
                self.write_begin(turn, tag, range, write::Content::Zeroes { unmap: true });
            }
            Request::Discard { .. } => self.reply_at_once(turn, tag, Status::Ok),
            Request::Flush => self.flush_for(turn, FlushFor::Request(tag)),
            Request::Reconcile { extent } => {
                self.reconcile_begin(turn, extent, Some(tag));
            }
            Request::Check { range, repair } => self.check_begin(turn, tag, range, repair),
            Request::Probe { replica, range } => self.probe_begin(turn, tag, replica, range),
        }
    }

    fn completed<B: Buffers>(&mut self, turn: &mut Turn<'_, B>, op: OpId, outcome: Outcome) {
        let OpName { slot, replica } = OpName::unpack(op);
        match self
            .activities
            .get_mut(slot)
            .expect("an activity outlives its operations")
        {
            Activity::Read(_) => self.read_completed(turn, slot, replica, outcome),
            Activity::Write(_) => self.write_completed(turn, slot, replica, outcome),
            Activity::Settle(_) => self.settle_completed(turn, slot, replica, outcome),
            Activity::FlushRun(_) => self.flush_completed(turn, slot, replica, outcome),
            Activity::Probe(_) => self.probe_completed(turn, slot, outcome),
            Activity::Reconcile(_) | Activity::FlushRequest(_) | Activity::Replied => {
                unreachable!("activities without operations")
            }
        }
    }

    fn published<B: Buffers>(&mut self, turn: &mut Turn<'_, B>, slot: SlotId) {
        match self
            .activities
            .get_mut(slot)
            .expect("a request lives until it is published")
        {
            Activity::Read(_) => self.read_published(turn, slot),
            Activity::Write(_) => self.write_published(turn, slot),
            Activity::Settle(_) => self.settle_published(turn, slot),
            Activity::FlushRun(_) => unreachable!("a flush run has no reply"),
            Activity::Probe(_)
            | Activity::Reconcile(_)
            | Activity::FlushRequest(_)
            | Activity::Replied => {
                self.activities.remove(slot);
            }
        }
    }

    fn deferred<B: Buffers>(&mut self, turn: &mut Turn<'_, B>, slot: SlotId) {
        match self
            .activities
            .get_mut(slot)
            .expect("a request lives until it is published")
        {
            Activity::Write(_) => self.write_deferred(turn, slot),
            Activity::FlushRun(_) => unreachable!("a flush run has no reply"),
            // These hold no lock once they are replied to.
            Activity::Read(_)
            | Activity::Settle(_)
            | Activity::Reconcile(_)
            | Activity::FlushRequest(_)
            | Activity::Probe(_)
            | Activity::Replied => {}
        }
    }

    fn tick<B: Buffers>(&mut self, turn: &mut Turn<'_, B>) {
        if self.next_look.is_some_and(|look| look <= turn.now) {
            self.next_look = None;
            self.look_for_hung(turn);
            self.retry(turn);
        }
        let mut swept = std::mem::take(&mut self.swept);
        swept.clear();
        swept.extend(self.activities.ids());
        for &slot in &swept {
            match self.activities.get_mut(slot) {
                Some(Activity::Read(read)) if read.is_late(turn.now) => {
                    self.read_late(turn, slot);
                }
                Some(Activity::Write(write)) if write.is_late(turn.now) => {
                    self.write_late(turn, slot);
                }
                Some(Activity::Settle(settle)) if settle.is_late(turn.now) => {
                    self.settle_late(turn, slot);
                }
                Some(Activity::FlushRun(run)) if run.is_late(turn.now) => {
                    self.flush_late(turn, slot);
                }
                _ => {}
            }
        }
        self.swept = swept;
        self.next_tick = (self.timed > 0).then(|| turn.now.after(TICK));
    }

    /// Does what became possible: locks granted within the lane, flush runs, reads that waited
    /// for buffers.
    fn run_ready<B: Buffers>(&mut self, turn: &mut Turn<'_, B>) {
        loop {
            if let Some(ticket) = self.granted.pop_front() {
                self.lock_granted(turn, SlotId::unpack(ticket.0));
            } else if let Some(slot) = self.take_durable(turn) {
                self.run_durable(turn, slot);
            } else if std::mem::take(&mut self.members_changed) {
                self.tell_members_changed(turn);
            } else if self.reconcile_next(turn) {
                // It may have ended at once, and made room for the next.
            } else if std::mem::take(&mut self.run_due) {
                self.flush_begin(turn);
            } else if let Some(&slot) = self.settles_starved.front()
                && self.settle_take_buffers(turn, slot)
            {
                self.settles_starved.pop_front();
            } else if let Some(&slot) = self.starved.front()
                && self.read_take_buffers(turn, slot)
            {
                self.starved.pop_front();
            } else {
                return;
            }
        }
    }

    fn lock_granted<B: Buffers>(&mut self, turn: &mut Turn<'_, B>, slot: SlotId) {
        match self
            .activities
            .get_mut(slot)
            .expect("who waits for a lock lives")
        {
            Activity::Read(_) => self.read_ask(turn, slot),
            Activity::Write(_) => self.write_granted(turn, slot),
            Activity::Settle(_) => self.settle_granted(turn, slot),
            Activity::Reconcile(_) => self.reconcile_granted(turn, slot),
            Activity::FlushRequest(_)
            | Activity::FlushRun(_)
            | Activity::Probe(_)
            | Activity::Replied => {
                unreachable!("activities without locks")
            }
        }
    }

    fn lock<B: Buffers>(
        &mut self,
        turn: &mut Turn<'_, B>,
        slot: SlotId,
        range: SectorRange,
        mode: LockMode,
    ) -> bool {
        turn.shared
            .order
            .acquire(range, mode, self.id, LockTicket(slot.pack()))
    }

    fn unlock<B: Buffers>(&mut self, turn: &mut Turn<'_, B>, slot: SlotId, range: SectorRange) {
        let ticket = LockTicket(slot.pack());
        turn.shared
            .order
            .release(range, self.id, ticket, &mut self.woken);
        self.wake(turn.actions);
    }

    /// Passes on the locks that were granted by what this lane did.
    fn wake(&mut self, actions: &mut Vec<Action>) {
        for (lane, ticket) in self.woken.drain(..) {
            if lane == self.id {
                self.granted.push_back(ticket);
            } else {
                actions.push(Action::Wake {
                    lane,
                    wakeup: Wakeup::Granted(ticket),
                });
            }
        }
    }

    fn reply<B: Buffers>(
        &mut self,
        turn: &mut Turn<'_, B>,
        slot: SlotId,
        tag: Tag,
        status: Status,
        data: Option<BufferId>,
    ) {
        if status == Status::IoError {
            self.counters.failures += 1;
        }
        let request = RequestId(slot.pack());
        turn.actions.push(Action::Reply {
            tag,
            request,
            status,
            data,
        });
    }

    /// Replies to a request that needs no I/O.
    fn reply_at_once<B: Buffers>(&mut self, turn: &mut Turn<'_, B>, tag: Tag, status: Status) {
        let slot = self.activities.insert(Activity::Replied);
        self.reply(turn, slot, tag, status, None);
    }

    /// Replies with an error to a request for which too few copies are current (rules V6, W1).
    fn refuse<B: Buffers>(
        &mut self,
        turn: &mut Turn<'_, B>,
        tag: Tag,
        range: SectorRange,
        during: During,
    ) {
        turn.report(Report::Failure { range, during });
        self.reply_at_once(turn, tag, Status::IoError);
    }

    /// One more activity has a deadline.
    fn arm(&mut self, now: Time) {
        self.timed += 1;
        self.next_tick.get_or_insert(now.after(TICK));
    }

    /// One activity fewer has a deadline.
    fn disarm(&mut self) {
        self.timed = self
            .timed
            .checked_sub(1)
            .expect("only what was armed is disarmed");
    }
}

/// The errno that stands for an outcome that is not [`Outcome::Done`]; a short transfer is an
/// error like any other (rule V4).
fn errno_of(outcome: Outcome) -> Option<i32> {
    match outcome {
        Outcome::Done => None,
        Outcome::Short { .. } => Some(EIO),
        Outcome::Failed { errno } => Some(errno),
    }
}

/// Linux errno values, spelled out so that the core needs no C library.
const EIO: i32 = 5;
const ETIMEDOUT: i32 = 110;
