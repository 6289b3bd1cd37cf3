// SPDX-License-Identifier: Apache-2.0
//! One run: lanes over simulated disks, driven by the clock, with everything they do checked.

use crate::budget::{Budget, REPLICAS, index};
use crate::clock::{Clock, Happening};
use crate::copies::Copies;
use crate::disk::Disk;
use crate::faults::{MS, Plan};
use crate::guest::{GuestRequest, Guests};
use crate::inflight::Inflight;
use crate::life::Life;
use crate::maintenance::Maintenance;
use crate::model::Model;
use crate::operations::Operations;
use crate::pool::Pool;
use crate::profile::{Ailment, Profile, Shape};
use crate::quorum::{Action, Event, KeeperEvent, Lane, LaneId, Mutation, Request, Shared, Wakeup};
use crate::record::RecordMutation;
use crate::remembered::Seen;
use crate::rings::{Planned, Rings};
use crate::rng::Rng;
use crate::trace::{Line, Tally, Trace, Verdict, violation};
use crate::units::{ReplicaId, SectorRange, Time};

/// Virtual time without a reply after which the run counts as stuck.
const STUCK_AFTER: u64 = 5_000 * MS;

/// The same where replicas come and go, and daemons with them.
const STUCK_IN_LIFE_AFTER: u64 = 120_000 * MS;

/// A rule of the device, not of the core, that this run breaks on purpose.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Breach {
    /// L4: the guest's own memory is written to the replicas, and the guest changes it meanwhile.
    GuestMemoryNotCopied,
    /// L1: the parts of a request are queued for one by one.
    PartsNotAnnounced,
    /// F4: what the cache of the host holds of a replica is believed when it is opened.
    CacheKept,
    /// S3: a replica that was changed while the disk was stopped is believed.
    FingerprintIgnored,
    /// S4: after a kill nothing is resolved.
    DirtyTrusted,
    /// K2: writes of the killed daemon land after the next one has begun.
    FlightOutlivesLock,
    /// L3: a write is published and its lock released while its mark is still set.
    MarksClearedLate,
    /// Q1: the next daemon does not look whether the last batch was published.
    LastBatchForgotten,
    /// Q2: nothing is repeated.
    MarksIgnored,
    /// Q2: what was in flight is repeated after new requests.
    RepeatsComeLast,
    /// Q2: what was in flight is repeated, last things first.
    RepeatsOutOfOrder,
}

/// What a run is to break.
#[derive(Clone, Copy, Default, Debug)]
pub struct Broken {
    pub mutation: Option<Mutation>,
    pub record: Option<RecordMutation>,
    pub breach: Option<Breach>,
    /// The rule that is broken is not looked at itself, so that it shows what it is good for.
    pub unseen: bool,
}

impl Broken {
    /// Whether this rule is broken.
    pub fn is(self, breach: Breach) -> bool {
        self.breach == Some(breach)
    }
}

/// A lane and what belongs to its worker.
pub struct Worker {
    pub lane: Lane,
    pub pool: Pool,
    pub rings: Rings,
    tick_pending: bool,
}

impl Worker {
    fn new(lane: usize, buffers: usize, reserve: usize, rings: Rings) -> Self {
        Self {
            lane: Lane::new(LaneId(u8::try_from(lane).expect("few lanes"))),
            pool: Pool::new(buffers, reserve),
            rings,
            tick_pending: false,
        }
    }
}

/// Everything of one run.
pub struct World {
    pub profile: Profile,
    pub shape: Shape,
    pub broken: Broken,
    pub rng: Rng,
    pub clock: Clock,
    pub step: u64,
    pub shared: Shared,
    pub workers: Vec<Worker>,
    pub disks: Vec<Disk>,
    pub budget: Budget,
    pub plan: Plan,
    pub operations: Operations,
    pub guests: Guests,
    pub inflight: Inflight,
    pub model: Model,
    pub trace: Trace,
    pub tally: Tally,
    /// Steps of the last silent fault and of the last repair of a sector, per replica.
    pub spoiled_at: Vec<[u64; REPLICAS]>,
    pub repaired_at: Vec<[u64; REPLICAS]>,
    /// No new faults: the run is being wound up.
    pub calm: bool,
    /// What was marked after the last event.
    pub seen: Seen,
    /// What was marked before it.
    pub before: Seen,
    /// What outlives a daemon, where daemons end.
    pub life: Life,
    /// The copies of the state record, if there is one.
    pub copies: Option<Copies>,
    /// The maintenance of the daemon, if there is a record.
    pub maintenance: Option<Maintenance>,
    actions: Vec<Action>,
    pub last_reply: u64,
}

impl World {
    pub fn new(profile: Profile, seed: u64, requests: u64, broken: Broken) -> Self {
        let mut rng = Rng::new(seed);
        let shape = profile.shape(&mut rng);
        let (geometry, policy) = (shape.geometry, &shape.policy);
        let mut shared = Shared::new(geometry, policy.clone()).expect("profiles are valid");
        shared.mutation = broken.mutation;
        let replicas = policy.replicas;
        let sectors = geometry.sectors();
        let volatile = profile.life.is_some_and(|life| life.volatile);
        let mut budget = Budget::new(
            profile.budget(policy),
            policy.replicas - policy.threshold,
            &geometry,
        );
        if profile.life.is_some() {
            budget.forget_after(600 * MS);
        }
        let mut world = Self {
            budget,
            plan: Plan::new(profile.rates),
            operations: Operations::new(replicas, geometry.extents()),
            guests: Guests::new(shape.lanes, requests, geometry.extents()),
            inflight: Inflight::default(),
            model: Model::new(sectors, volatile),
            disks: (0..replicas)
                .map(|_| Disk::new(sectors, volatile))
                .collect(),
            spoiled_at: vec![[0; REPLICAS]; index(sectors)],
            repaired_at: vec![[0; REPLICAS]; index(sectors)],
            life: Life::new(&profile, replicas, &mut rng),
            copies: None,
            maintenance: None,
            seen: Seen::default(),
            before: Seen::default(),
            profile,
            broken,
            rng,
            clock: Clock::default(),
            step: 0,
            shared,
            workers: Vec::new(),
            trace: Trace::new(),
            tally: Tally::default(),
            calm: false,
            actions: Vec::new(),
            last_reply: 0,
            shape,
        };
        world.plan.kicks = world.profile.life.is_some();
        world.hire();
        world
    }

    /// New workers: nothing is left of those that were.
    pub fn hire(&mut self) {
        let ailing = self.profile.ailment != Ailment::None;
        let buffers = self.shape.buffers + if ailing { 800 } else { 0 };
        let reserve = self.shape.policy.replicas + 1;
        self.workers.clear();
        let tracked = self.profile.is_tracked();
        if !self.inflight.has_regions() {
            let lanes = 0..self.shape.lanes;
            let rings: Vec<usize> = lanes.map(|_| 1 + self.rng.index(3)).collect();
            self.inflight = Inflight::new(&rings, tracked);
        }
        for lane in 0..self.shape.lanes {
            let rings = Rings::new(self.inflight.rings(lane), tracked);
            self.workers
                .push(Worker::new(lane, buffers, reserve, rings));
        }
        if self.profile.life.is_some() {
            let lane = self.shape.lanes;
            let rings = Rings::new(1, false);
            self.workers.push(Worker::new(lane, 64, reserve, rings));
        }
    }

    /// The whole run.
    pub fn run(&mut self) -> Verdict {
        if self.profile.life.is_some() {
            self.create_record()?;
        } else {
            self.connect();
        }
        while !self.is_served() {
            if !self.advance()? {
                let waiting = self.guests.list_waiting();
                return violation("I14", format!("nothing will happen any more{waiting}"));
            }
            let patience = match self.profile.life {
                None => STUCK_AFTER,
                Some(_) => STUCK_IN_LIFE_AFTER,
            };
            if self.clock.now() - self.last_reply > patience {
                let waiting = self.guests.list_waiting();
                return violation("I14", format!("no reply for a long time{waiting}"));
            }
        }
        self.calm = true;
        if self.profile.excess > 0 {
            // Nobody may know any more what is right.
            self.collect();
            return Ok(());
        }
        self.release_hung();
        self.wind_up()?;
        self.check_idle()?;
        self.final_pass()?;
        self.wind_up()?;
        self.check_idle()?;
        self.check_end()?;
        self.collect();
        Ok(())
    }

    /// Whether all requests were sent and replied to.
    fn is_served(&self) -> bool {
        let repeats = (0..self.shape.lanes).any(|lane| self.inflight.has_repeats(lane));
        self.guests.all_replied() && !repeats && self.workers.iter().all(|w| w.rings.all_sent())
    }

    /// The guest begins to send requests.
    pub fn connect(&mut self) {
        for lane in 0..self.shape.lanes {
            for _ in 0..self.shape.depth {
                let delay = self.rng.below(MS);
                self.clock.after(delay, Happening::Guest { lane });
            }
        }
    }

    /// Lets everything come to its end.
    fn wind_up(&mut self) -> Verdict {
        if self.maintenance.is_some() {
            return self.settle_down();
        }
        while self.advance()? {}
        Ok(())
    }

    /// Reads all of the disk, one request at a time, so that whatever is still wrong is met by a
    /// read that nothing disturbs.
    fn final_pass(&mut self) -> Verdict {
        let geometry = self.shape.geometry;
        let block = geometry.block_sectors();
        let mut start = 0;
        let mut lane = 0;
        while start < geometry.sectors() {
            let count = block * u32::try_from(self.rng.between(1, 2)).expect("1 or 2");
            let left = u32::try_from(geometry.sectors() - start).expect("a small disk");
            let range = SectorRange::new(start, count.min(left)).expect("not empty");
            let range = geometry.first_piece(range);
            start = range.end();
            lane = (lane + 1) % self.shape.lanes;
            let request = GuestRequest::read(range, self.model.floors(range), self.step);
            let part = Planned {
                guest: request,
                request: Request::Read { range },
            };
            self.begin(lane, vec![part])?;
            let asked = self.clock.now();
            while !self.workers[lane].rings.is_idle()
                && self.clock.now() < asked + STUCK_AFTER
                && self.advance()?
            {}
            if !self.workers[lane].rings.is_idle() {
                return violation("I9", format!("the last read of {range} got no reply"));
            }
        }
        Ok(())
    }

    /// Handles the next happening. Returns whether there was one.
    pub fn advance(&mut self) -> Verdict<bool> {
        let Some(what) = self.clock.next() else {
            return Ok(false);
        };
        self.step += 1;
        self.budget.now = self.clock.now();
        self.budget.step = self.step;
        self.model.step = self.step;
        match what {
            Happening::Guest { lane } => self.guest_turn(lane)?,
            Happening::Complete { slot } => self.complete(slot)?,
            Happening::Publish { lane } => self.publish(lane)?,
            Happening::Resume { lane } => self.send_parts(lane)?,
            Happening::Clear { lane, ring } => {
                self.clear(lane, ring)?;
                self.publish(lane)?;
            }
            Happening::Wake { lane, wakeup } => self.deliver(lane, Event::Wake(wakeup))?,
            Happening::Tick { lane } => {
                self.workers[lane].tick_pending = false;
                self.deliver(lane, Event::Tick)?;
            }
            Happening::Land { late } => self.land_late(late),
            Happening::Forget { replica, range } => self.budget.release(range, replica),
            Happening::Life(what) => self.live(what)?,
        }
        if self.maintenance.is_some() {
            if self.step.is_multiple_of(64) {
                self.budget.expire();
            }
            self.maintain()?;
        }
        if self.life.crash_is_due(self.step) && !self.calm {
            self.end_daemon()?;
        }
        Ok(true)
    }

    /// Hands an event to a lane and carries out what it asks for.
    pub fn deliver(&mut self, lane: usize, event: Event) -> Verdict {
        let now = self.clock.now();
        self.trace.note(self.step, now, lane, Line::Told(event));
        let mut actions = std::mem::take(&mut self.actions);
        let worker = &mut self.workers[lane];
        let time = Time::from_nanos(now);
        worker
            .lane
            .handle(time, event, &self.shared, &mut worker.pool, &mut actions);
        if let Some(misuse) = worker.pool.misuse() {
            return violation("V7", misuse);
        }
        self.note_marks()?;
        self.carry_out(lane, &actions)?;
        actions.clear();
        self.actions = actions;
        let worker = &mut self.workers[lane];
        if let Some(deadline) = worker.lane.deadline()
            && !worker.tick_pending
        {
            worker.tick_pending = true;
            let late = self.rng.below(2 * MS);
            let delay = deadline.nanos().saturating_sub(now) + late;
            self.clock.after(delay, Happening::Tick { lane });
        }
        self.release_copied(lane)
    }

    pub fn carry_out(&mut self, lane: usize, actions: &[Action]) -> Verdict {
        let now = self.clock.now();
        for &action in actions {
            self.trace.note(self.step, now, lane, Line::Asked(action));
            match action {
                Action::Submit(operation) => self.submit(lane, operation)?,
                Action::Reply {
                    tag,
                    request,
                    status,
                    data,
                } => {
                    if lane == self.shape.lanes {
                        self.note_maintained(tag, request, status);
                        continue;
                    }
                    self.last_reply = now;
                    self.check_reply(lane, tag, status, data)?;
                    self.note_reply(lane, tag, request);
                }
                Action::Wake { lane: to, wakeup } => {
                    let to = usize::from(to.0);
                    if to == lane || to >= self.workers.len() {
                        return violation("wake", format!("lane {lane} wakes lane {to}"));
                    }
                    let delay = self.rng.below(200_000);
                    self.clock
                        .after(delay, Happening::Wake { lane: to, wakeup });
                }
                Action::Report(report) => {
                    self.check_report(report)?;
                    self.tell_keeper(KeeperEvent::Report(report));
                }
                Action::Record => self.poll_record()?,
                Action::Kicked { replica, why } => {
                    self.tell_members_changed(Some(lane));
                    self.tell_keeper(KeeperEvent::Kicked { replica, why });
                    self.life.detaching[replica.index()] = true;
                }
            }
        }
        Ok(())
    }

    /// Wakes all lanes, but not this one.
    pub fn tell_members_changed(&mut self, except: Option<usize>) {
        for lane in (0..self.workers.len()).filter(|&lane| Some(lane) != except) {
            let delay = self.rng.below(200_000);
            let wakeup = Wakeup::MembersChanged;
            self.clock.after(delay, Happening::Wake { lane, wakeup });
        }
    }

    /// Operations that hung end now, and so do late writes.
    fn release_hung(&mut self) {
        self.plan.hung = None;
        for slot in self.operations.take_parked() {
            let delay = self.rng.below(MS);
            self.clock.after(delay, Happening::Complete { slot });
        }
    }

    /// The current copies of the extent of `range`, as slots.
    pub fn current(&self, range: SectorRange) -> Vec<usize> {
        let extent = self.shape.geometry.extent_of(range.start());
        let current = self.shared.membership.current(extent);
        current.iter().map(ReplicaId::index).collect()
    }

    fn collect(&mut self) {
        for worker in &self.workers {
            let counters = worker.lane.counters();
            self.tally.add("early replies", counters.early_replies);
            self.tally.add("arbitrations", counters.arbitrations);
            self.tally
                .add("repaired sectors", counters.repaired_sectors);
            self.tally.add("starved requests", counters.starved);
            self.tally
                .add("settlements dropped", counters.settles_dropped);
            self.tally
                .add("reads without laggard", counters.reads_without_laggard);
        }
        self.tally.count("runs");
    }
}
