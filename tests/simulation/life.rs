// SPDX-License-Identifier: Apache-2.0
//! The life around a daemon: members that leave and come back, copies of the record that fail, and
//! the end of the daemon itself. [`crash`](crate::crash) ends it, [`start`](crate::start) begins
//! the next.

use crate::clock::Happening;
use crate::content::{garbled, written};
use crate::faults::MS;
use crate::maintenance::Maintenance;
use crate::profile::Profile;
use crate::quorum::{CrashTie, KeeperEvent};
use crate::rng::Rng;
use crate::trace::{Line, Verdict};
use crate::units::ReplicaId;
use crate::world::{Breach, World};

/// What happens in the life of a daemon, at a point of virtual time.
#[derive(Clone, Copy, Debug)]
pub enum Event {
    /// The recorder looks what there is to write.
    Poll,
    /// The recorder's timer fires.
    RecordTick,
    /// A write to a copy of the record ends.
    Written { place: usize },
    /// A copy that was left out is tried again.
    Readmit { copy: u8 },
    /// The keeper's timer fires.
    KeeperTick,
    /// The attempt to open a member ends.
    Opened { replica: usize },
    /// It is noticed that a member is not there any more.
    Vanished { replica: usize },
    /// A member is there again.
    Return { replica: usize },
    /// The front-end connects.
    Connect,
    /// Every ring that has requests to repeat has said so.
    Gathered,
    /// A replica that was slow or hung is not any more.
    Relieve,
    /// A write of a daemon that was killed lands (a breach of rule K2).
    Stray { number: usize },
}

/// How far a clean stop has come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stop {
    No,
    /// The guest sends nothing more.
    Draining,
    /// Everything is being flushed.
    Flushing,
    /// The clean flag is being written.
    Marking,
}

/// What outlives a daemon, and what is to become of it.
pub struct Life {
    /// Members whose file is there.
    pub present: Vec<bool>,
    /// Members that the daemon has open.
    pub attached: Vec<bool>,
    /// Members that were kicked and may have operations in flight.
    pub detaching: Vec<bool>,
    /// Members that are not known yet: they were put in the place of others.
    pub foreign: Vec<bool>,
    /// Changes when a member is changed by somebody else.
    pub fingerprints: Vec<u64>,
    /// The only one that ever fails.
    pub faulty: Option<usize>,
    /// The step in which the daemon ends; `u64::MAX`: never.
    pub crash_at: u64,
    pub stop: Stop,
    /// The last clean stop found everything clean.
    pub stopped_clean: bool,
    /// Daemons so far.
    pub daemons: u64,
    /// The front-end of the last daemon lives on, with what was in flight.
    pub warm: bool,
    /// A front-end has connected to this daemon.
    pub connected: bool,
    /// Some daemon has come to serve.
    pub served: bool,
    /// The epoch that this daemon has found, and one that no later daemon may fall behind.
    pub opened: u64,
    pub epoch: u64,
    /// Writes of a daemon that was killed, if they are let live: replica, sector, content.
    pub strays: Vec<Vec<(usize, u64, u64)>>,
}

impl Life {
    pub fn new(profile: &Profile, replicas: usize, rng: &mut Rng) -> Self {
        let single = profile.life.is_some_and(|life| life.single);
        Self {
            present: vec![true; replicas],
            attached: vec![true; replicas],
            detaching: vec![false; replicas],
            foreign: vec![false; replicas],
            fingerprints: vec![1; replicas],
            faulty: single.then(|| rng.index(replicas)),
            crash_at: u64::MAX,
            stop: Stop::No,
            stopped_clean: false,
            daemons: 0,
            served: false,
            warm: false,
            connected: false,
            opened: 0,
            epoch: 0,
            strays: Vec::new(),
        }
    }

    pub fn crash_is_due(&self, step: u64) -> bool {
        step >= self.crash_at
    }

    /// Whether this replica may fail.
    pub fn may_fail(&self, replica: usize) -> bool {
        self.faulty.is_none_or(|faulty| faulty == replica)
    }
}

impl World {
    pub fn live(&mut self, what: Event) -> Verdict {
        self.note(Line::Lived(what));
        match what {
            Event::Poll => self.record_event(crate::record::RecordEvent::Poll),
            Event::RecordTick => self.record_tick(),
            Event::Written { place } => self.record_written(place),
            Event::Readmit { copy } => self.readmit(copy),
            Event::KeeperTick => {
                self.keeper_tick();
                Ok(())
            }
            Event::Opened { replica } => {
                self.opened(replica);
                Ok(())
            }
            Event::Vanished { replica } => {
                if !self.life.present[replica] {
                    let replica = ReplicaId::new(replica);
                    self.tell_keeper(KeeperEvent::Vanished { replica });
                }
                Ok(())
            }
            Event::Return { replica } => {
                self.life.present[replica] = true;
                Ok(())
            }
            Event::Connect => self.front_end_connects(),
            Event::Gathered => {
                if self.shared.begin_warm() {
                    self.tell_ties_decided();
                }
                Ok(())
            }
            Event::Stray { number } => {
                for (replica, sector, value) in std::mem::take(&mut self.life.strays[number]) {
                    self.put_on_medium(replica, sector, value, u64::MAX);
                }
                Ok(())
            }
            Event::Relieve => {
                self.plan.slow = None;
                self.plan.hung = None;
                Ok(())
            }
        }
    }

    /// Rules S4, Y3: a warm front-end repeats what was in flight; that the start is cold is remembered
    /// before its first ring begins.
    fn front_end_connects(&mut self) -> Verdict {
        self.life.connected = true;
        if self.shared.crash_tie() != CrashTie::MajorityOnly {
            return self.begin_rings();
        }
        if self.life.warm {
            self.begin_warm();
            return self.begin_rings();
        }
        let cold =
            |staff: &Maintenance| staff.recorder.superblock().cold || staff.recorder.is_lost();
        let known = self.maintenance.as_ref().is_none_or(cold);
        if known || self.shared.unresolved.extents() == 0 {
            return self.begin_cold();
        }
        let staff = self.maintenance.as_mut().expect("looked at above");
        let change = staff.recorder.change(|superblock| superblock.cold = true);
        staff.cold = Some(change);
        self.tally.count("cold starts remembered");
        self.poll_record()
    }

    /// It is remembered that the start is cold.
    pub fn begin_cold(&mut self) -> Verdict {
        self.shared.begin_cold();
        self.tell_ties_decided();
        self.begin_rings()
    }

    fn begin_rings(&mut self) -> Verdict {
        self.last_reply = self.clock.now();
        self.connect();
        Ok(())
    }

    /// For people.
    pub fn note(&mut self, line: Line) {
        let lane = self.shape.lanes;
        self.trace.note(self.step, self.clock.now(), lane, line);
    }

    /// A member's file is gone for a while: whatever is asked of it fails.
    pub fn leave(&mut self, replica: usize) {
        let away = self.rng.between(MS, 300 * MS);
        let time = self.clock.now() + away + 600 * MS;
        if !self.life.present[replica] || !self.budget.doom_until(replica, time) {
            return;
        }
        self.tally.count("members gone");
        self.life.present[replica] = false;
        if self.rng.chance(500_000) {
            let noticed = self.rng.below(20 * MS);
            let what = Event::Vanished { replica };
            self.clock.after(noticed, Happening::Life(what));
        }
        self.clock
            .after(away, Happening::Life(Event::Return { replica }));
    }

    /// The attempt to open a member ends.
    fn opened(&mut self, replica: usize) {
        let id = ReplicaId::new(replica);
        if !self.life.present[replica] {
            self.tell_keeper(KeeperEvent::OpenFailed { replica: id });
            return;
        }
        let odds = self.profile.life.map_or(0, |life| life.replaced);
        if !self.calm && self.rng.chance(odds) {
            self.replace(replica);
        }
        self.open_member(replica);
        self.tally.count("members back");
        let same = !self.life.foreign[replica];
        self.tell_keeper(KeeperEvent::Opened { replica: id, same });
    }

    /// There is another file in the place of the member's.
    fn replace(&mut self, replica: usize) {
        self.tally.count("members replaced");
        self.life.foreign[replica] = true;
        for sector in 0..self.shape.geometry.sectors() {
            let value = match self.rng.below(3) {
                0 => 0,
                1 => written(1, sector),
                _ => garbled(self.rng.next()),
            };
            self.disks[replica].rot(sector, value);
        }
    }

    /// F4: what was in the cache of the host is not believed.
    pub fn open_member(&mut self, replica: usize) {
        if !self.broken.is(Breach::CacheKept) {
            for sector in self.disks[replica].drop_clean() {
                let value = self.disks[replica].value(sector);
                if !self.model.is_legal_now(sector, value) {
                    self.budget.taint(sector, replica);
                }
            }
        }
        self.life.attached[replica] = true;
    }
}
