// SPDX-License-Identifier: Apache-2.0
//! One run: lanes over simulated disks, driven by the clock, with everything they do checked.

use crate::budget::{Budget, REPLICAS, index};
use crate::clock::{Clock, Happening};
use crate::disk::Disk;
use crate::faults::{MS, Plan};
use crate::guest::{GuestRequest, Guests};
use crate::model::Model;
use crate::operations::{Landing, Operations, REMEMBERED};
use crate::pool::Pool;
use crate::profile::{Ailment, Profile, Shape};
use crate::quorum::{Action, Event, Lane, LaneId, Mutation, Request, Shared, Wakeup};
use crate::rings::{Planned, Rings};
use crate::rng::Rng;
use crate::trace::{Line, Tally, Trace, Verdict, violation};
use crate::units::{ReplicaId, ReplicaSet, SectorRange, Time};

/// Virtual time without a reply after which the run counts as stuck.
const STUCK_AFTER: u64 = 5_000 * MS;

/// A rule of the device, not of the core, that this run breaks on purpose.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Breach {
    /// L4: the guest's own memory is written to the replicas, and the guest changes it meanwhile.
    GuestMemoryNotCopied,
    /// L1: the parts of a request are queued for one by one.
    PartsNotAnnounced,
}

/// What a run is to break.
#[derive(Clone, Copy, Default, Debug)]
pub struct Broken {
    pub mutation: Option<Mutation>,
    pub breach: Option<Breach>,
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
    pub model: Model,
    pub trace: Trace,
    pub tally: Tally,
    /// Steps of the last silent fault and of the last repair of a sector, per replica.
    pub spoiled_at: Vec<[u64; REPLICAS]>,
    pub repaired_at: Vec<[u64; REPLICAS]>,
    /// No new faults: the run is being wound up.
    pub calm: bool,
    /// Who was behind in each extent after the last event, and how many such marks there were.
    behind: Vec<ReplicaSet>,
    behind_marks: u64,
    actions: Vec<Action>,
    last_reply: u64,
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
        let ailing = profile.ailment != Ailment::None;
        let guest_buffers = shape.buffers + if ailing { 800 } else { 0 };
        let workers = (0..shape.lanes)
            .map(|lane| Worker {
                lane: Lane::new(LaneId(u8::try_from(lane).expect("few lanes"))),
                pool: Pool::new(guest_buffers, replicas + 1),
                rings: Rings::new(usize::try_from(rng.between(1, 3)).expect("few")),
                tick_pending: false,
            })
            .collect();
        Self {
            budget: Budget::new(profile.budget(policy), &geometry),
            plan: Plan::new(profile.rates),
            operations: Operations::new(replicas, geometry.extents()),
            guests: Guests::new(shape.lanes, requests, geometry.extents()),
            model: Model::new(sectors, false),
            disks: (0..replicas).map(|_| Disk::new(sectors, false)).collect(),
            spoiled_at: vec![[0; REPLICAS]; index(sectors)],
            repaired_at: vec![[0; REPLICAS]; index(sectors)],
            profile,
            broken,
            rng,
            clock: Clock::default(),
            step: 0,
            shared,
            workers,
            trace: Trace::new(),
            tally: Tally::default(),
            calm: false,
            behind: vec![ReplicaSet::EMPTY; index(geometry.extents())],
            behind_marks: 0,
            actions: Vec::new(),
            last_reply: 0,
            shape,
        }
    }

    /// The whole run.
    pub fn run(&mut self) -> Verdict {
        for lane in 0..self.workers.len() {
            for _ in 0..self.shape.depth {
                let delay = self.rng.below(MS);
                self.clock.after(delay, Happening::Guest { lane });
            }
        }
        while !self.guests.all_replied() || self.workers.iter().any(|w| !w.rings.all_sent()) {
            if !self.advance()? {
                let waiting = self.guests.list_waiting();
                return violation("I14", format!("nothing will happen any more{waiting}"));
            }
            if self.clock.now() - self.last_reply > STUCK_AFTER {
                let waiting = self.guests.list_waiting();
                return violation("I14", format!("no reply for a long time{waiting}"));
            }
        }
        self.calm = true;
        self.release_hung();
        while self.advance()? {}
        self.check_idle()?;
        self.final_pass()?;
        self.check_idle()?;
        self.check_end()?;
        self.collect();
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
            lane = (lane + 1) % self.workers.len();
            let request = GuestRequest::read(range, self.model.floors(range), self.step);
            let part = Planned {
                guest: request,
                request: Request::Read { range },
            };
            self.begin(lane, vec![part])?;
            while self.advance()? {}
            if !self.workers[lane].rings.is_idle() {
                return violation("I9", format!("the last read of {range} got no reply"));
            }
        }
        Ok(())
    }

    /// Handles the next happening. Returns whether there was one.
    fn advance(&mut self) -> Verdict<bool> {
        let Some(what) = self.clock.next() else {
            return Ok(false);
        };
        self.step += 1;
        match what {
            Happening::Guest { lane } => self.guest_turn(lane)?,
            Happening::Complete { slot } => self.complete(slot)?,
            Happening::Publish { lane } => self.publish(lane)?,
            Happening::Resume { lane } => self.send_parts(lane)?,
            Happening::Wake { lane, wakeup } => self.deliver(lane, Event::Wake(wakeup))?,
            Happening::Tick { lane } => {
                self.workers[lane].tick_pending = false;
                self.deliver(lane, Event::Tick)?;
            }
            Happening::Land { late } => self.land_late(late),
            Happening::Forget { replica, range } => self.budget.release(range, replica),
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
        self.carry_out(lane, &actions)?;
        actions.clear();
        self.actions = actions;
        self.note_behind();
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
                Action::Report(report) => self.check_report(report)?,
                Action::Record => {
                    return violation("record", "there is none");
                }
                Action::Kicked { .. } => {
                    for other in (0..self.workers.len()).filter(|&other| other != lane) {
                        let delay = self.rng.below(200_000);
                        let wakeup = Wakeup::MembersChanged;
                        let wake = Happening::Wake {
                            lane: other,
                            wakeup,
                        };
                        self.clock.after(delay, wake);
                    }
                }
            }
        }
        Ok(())
    }

    /// Whether the replica was behind before the event that is being handled. What one event
    /// leads to has no order between its parts: a mark may be younger than an operation.
    pub fn was_behind(&self, extent: u64, replica: ReplicaId) -> bool {
        self.behind[index(extent)].contains(replica)
    }

    fn note_behind(&mut self) {
        let members = &self.shared.membership;
        let marks = members
            .replicas()
            .iter()
            .map(|r| members.behind_extents(r))
            .sum();
        if marks != self.behind_marks {
            self.behind_marks = marks;
            for (extent, behind) in (0..).zip(&mut self.behind) {
                *behind = members.replicas().minus(members.current(extent));
            }
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

    /// A write that was called complete long ago reaches the medium, on top of what is there.
    fn land_late(&mut self, late: usize) {
        let &Landing { replica, range, .. } = self.operations.landing(late);
        if !self.budget.admits_landing(range, replica) {
            self.clock.after(MS, Happening::Land { late });
            return;
        }
        for (place, sector) in (range.start()..range.end()).enumerate() {
            let landing = self.operations.landing(late);
            let (value, seen) = (landing.values[place], landing.landings[place]);
            let overtaken = self.disks[replica].landings(sector) != seen;
            self.put_on_medium(replica, sector, value, u64::MAX);
            self.spoiled_at[index(sector)][replica] = self.step;
            if overtaken {
                self.budget.taint(sector, replica);
            } else {
                self.budget.cleanse(sector, replica);
            }
        }
        self.disks[replica].ended(range, u64::MAX, self.step);
        // Who has read what was there before may still speak of it.
        let forget = Happening::Forget { replica, range };
        self.clock.after(REMEMBERED, forget);
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
