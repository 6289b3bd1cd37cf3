// SPDX-License-Identifier: Apache-2.0
//! The maintenance of a simulated daemon: its recorder, its keeper, and the last of its lanes.

use std::collections::VecDeque;

use crate::clock::Happening;
use crate::faults::MS;
use crate::life::{Event, Stop};
use crate::quorum::{
    Event as LaneEvent, Keeper, KeeperAction, KeeperEvent, KeeperState, Request, RequestId, Status,
    Tag, Wakeup,
};
use crate::record::{ChangeId, RecordAction, RecordEvent, Recorder};
use crate::start::{member_state, state_of_member};
use crate::trace::{Line, Verdict, violation};
use crate::units::Time;
use crate::world::World;

/// The flush of a clean stop.
pub const STOP_TAG: Tag = Tag(u32::MAX);

/// Everything of the maintenance thread but its lane.
pub struct Maintenance {
    pub recorder: Recorder,
    /// There once the epoch of this run has begun.
    pub keeper: Option<Keeper>,
    pub inbox: VecDeque<KeeperEvent>,
    /// The change that begins the epoch, and the one that ends a clean run.
    pub opening: ChangeId,
    pub stop: Option<ChangeId>,
    /// The change that remembers a cold start; rings begin after it.
    pub cold: Option<ChangeId>,
    /// Replicas, cursors and states as the record had them.
    pub saved: KeeperState,
    poll_due: bool,
    record_tick: Option<u64>,
    keeper_tick: Option<u64>,
}

impl Maintenance {
    pub fn new(recorder: Recorder, saved: KeeperState) -> Self {
        Self {
            opening: recorder.opening(),
            recorder,
            keeper: None,
            inbox: VecDeque::new(),
            stop: None,
            cold: None,
            saved,
            poll_due: false,
            record_tick: None,
            keeper_tick: None,
        }
    }
}

/// Whether a timer is to be set for `wanted` although there is one for `known`.
fn is_earlier(wanted: u64, known: Option<u64>) -> bool {
    known.is_none_or(|known| wanted < known)
}

impl World {
    fn time(&self) -> Time {
        Time::from_nanos(self.clock.now())
    }

    fn staff(&mut self) -> &mut Maintenance {
        self.maintenance.as_mut().expect("there is a record")
    }

    pub fn tell_keeper(&mut self, event: KeeperEvent) {
        if let Some(maintenance) = &mut self.maintenance {
            maintenance.inbox.push_back(event);
        }
    }

    /// After each step: whatever the maintenance has been told.
    pub fn maintain(&mut self) -> Verdict {
        for replica in 0..self.life.detaching.len() {
            if self.life.detaching[replica] && self.operations.none_on(replica) {
                self.life.detaching[replica] = false;
                self.life.attached[replica] = false;
                let replica = crate::units::ReplicaId::new(replica);
                self.tell_keeper(KeeperEvent::Detached { replica });
            }
        }
        while let Some(event) = self.staff().inbox.pop_front() {
            self.keeper_event(event)?;
        }
        self.advance_stop()?;
        self.set_timers();
        Ok(())
    }

    fn set_timers(&mut self) {
        let now = self.clock.now();
        let late = self.rng.below(MS);
        let staff = self.maintenance.as_mut().expect("there is a record");
        if let Some(deadline) = staff.recorder.deadline()
            && is_earlier(deadline.nanos(), staff.record_tick)
        {
            staff.record_tick = Some(deadline.nanos());
            let delay = deadline.nanos().saturating_sub(now) + late;
            self.clock.after(delay, Happening::Life(Event::RecordTick));
        }
        if let Some(deadline) = staff.keeper.as_ref().and_then(Keeper::deadline)
            && is_earlier(deadline.nanos(), staff.keeper_tick)
        {
            staff.keeper_tick = Some(deadline.nanos());
            let delay = deadline.nanos().saturating_sub(now) + late;
            self.clock.after(delay, Happening::Life(Event::KeeperTick));
        }
    }

    pub fn keeper_tick(&mut self) {
        let total = self.tally.of("requests");
        self.staff().keeper_tick = None;
        if self.shared.unresolved.extents() == 0
            && self.staff().cold.is_none()
            && self.staff().recorder.superblock().cold
        {
            let recorder = &mut self.staff().recorder;
            recorder.change(|superblock| superblock.cold = false);
        }
        self.tell_keeper(KeeperEvent::GuestRequests { total });
        self.tell_keeper(KeeperEvent::Tick);
    }

    fn keeper_event(&mut self, event: KeeperEvent) -> Verdict {
        let time = self.time();
        if self.life.stop != Stop::No {
            return Ok(());
        }
        let mut actions = Vec::new();
        let shared = &self.shared;
        let staff = self.maintenance.as_mut().expect("there is a record");
        let Some(keeper) = &mut staff.keeper else {
            return Ok(());
        };
        keeper.handle(time, event, shared, &mut actions);
        self.note_marks()?;
        for action in actions {
            self.obey_keeper(action)?;
        }
        Ok(())
    }

    fn obey_keeper(&mut self, action: KeeperAction) -> Verdict {
        self.note(Line::Kept(action));
        match action {
            KeeperAction::Request { tag, request } => {
                self.tally.count(match request {
                    Request::Reconcile { .. } => "reconciliations",
                    Request::Check { .. } => "checks",
                    Request::Probe { .. } => "probes",
                    _ => "flushes of the keeper",
                });
                let lane = self.shape.lanes;
                self.deliver(lane, LaneEvent::Request { tag, request })?;
            }
            KeeperAction::Kicked { replica, .. } => {
                self.tally.count("kicks of the keeper");
                self.life.detaching[replica.index()] = true;
                self.tell_members_changed(None);
            }
            KeeperAction::Reopen { replica } => {
                let replica = replica.index();
                let delay = self.rng.between(MS / 10, 2 * MS);
                self.clock
                    .after(delay, Happening::Life(Event::Opened { replica }));
            }
            KeeperAction::Admitted { replica } => {
                self.life.foreign[replica.index()] = false;
                self.tell_members_changed(None);
            }
            KeeperAction::MembersChanged => {
                self.tell_members_changed(None);
            }
            KeeperAction::Record => self.poll_record()?,
            KeeperAction::Report(_) => {}
            KeeperAction::Save(state) => {
                let replicas = self.disks.len();
                let recorder = &mut self.staff().recorder;
                recorder.change(|superblock| {
                    for slot in 0..replicas {
                        superblock.members[slot].state = member_state(state.states[slot]);
                        let id = crate::units::ReplicaId::new(slot);
                        superblock.members[slot].suspect = state.suspects.contains(id);
                    }
                    superblock.verify_cursor = state.verify_cursor.unwrap_or(u64::MAX);
                    superblock.scrub_cursor = state.scrub_cursor.unwrap_or(u64::MAX);
                });
                self.poll_record()?;
            }
        }
        Ok(())
    }

    /// The maintenance lane has replied.
    pub fn note_maintained(&mut self, tag: Tag, request: RequestId, status: Status) {
        self.workers[self.shape.lanes].rings.note_copied(request);
        if tag == STOP_TAG {
            self.note_stop_flushed(status);
        } else {
            self.tell_keeper(KeeperEvent::Replied { tag, status });
        }
    }

    /// The recorder is to look soon.
    pub fn poll_record(&mut self) -> Verdict {
        let Some(staff) = &mut self.maintenance else {
            return violation("record", "there is none");
        };
        if !std::mem::replace(&mut staff.poll_due, true) {
            let delay = self.rng.below(50_000);
            self.clock.after(delay, Happening::Life(Event::Poll));
        }
        Ok(())
    }

    pub fn record_tick(&mut self) -> Verdict {
        self.staff().record_tick = None;
        self.record_event(RecordEvent::Tick)
    }

    pub fn record_event(&mut self, event: RecordEvent) -> Verdict {
        let time = self.time();
        if event == RecordEvent::Poll {
            self.staff().poll_due = false;
        }
        let mut actions = Vec::new();
        let marks = self.shared.membership.marks();
        let staff = self.maintenance.as_mut().expect("there is a record");
        staff.recorder.handle(time, event, marks, &mut actions);
        for action in actions {
            self.obey_recorder(action)?;
        }
        let staff = self.maintenance.as_ref().expect("there is a record");
        let recorder = &staff.recorder;
        if recorder.is_idle() && staff.keeper.is_some() {
            let copies = self.copies.as_mut().expect("there is a record");
            for copy in 0..copies.count() {
                let number = u8::try_from(copy).expect("at most 5");
                if recorder.is_good(number) && copies.failing >> copy & 1 == 0 {
                    copies.lacking &= !(1 << copy);
                }
            }
        }
        Ok(())
    }

    fn obey_recorder(&mut self, action: RecordAction) -> Verdict {
        match action {
            RecordAction::Write {
                copy,
                write,
                block,
                bytes,
            } => {
                self.tally.count("record writes");
                let (errno, delay) = self.record_fault(usize::from(copy));
                self.note(Line::Recorded { copy, block, errno });
                let copies = self.copies.as_mut().expect("there is a record");
                let place = match copies.begin(copy, write, block, bytes, errno) {
                    Ok(place) => place,
                    Err(what) => return violation("I13", what),
                };
                let what = Event::Written { place };
                self.clock.after(delay, Happening::Life(what));
            }
            RecordAction::Settled => self.wake_waiting(),
            RecordAction::Changed(change) => {
                if change == self.staff().opening {
                    self.serve()?;
                } else if Some(change) == self.staff().cold {
                    self.staff().cold = None;
                    self.begin_cold()?;
                } else if Some(change) == self.staff().stop {
                    self.staff().stop = None;
                    self.life.stop = Stop::Marking;
                    self.life.crash_at = 0;
                }
            }
            RecordAction::Excluded { copy, .. } => {
                self.tally.count("copies left out");
                let copies = self.copies.as_mut().expect("there is a record");
                copies.lacking |= 1 << copy;
                let later = self.rng.between(MS, 50 * MS);
                let what = Event::Readmit { copy };
                self.clock.after(later, Happening::Life(what));
            }
            RecordAction::Lost => {
                self.shared.lose_record();
                self.wake_waiting();
                if !self.profile.life.is_some_and(|life| life.record_lost) {
                    return violation("R1", "the record is lost without a reason");
                }
                self.tally.count("records lost");
                if self.staff().cold.take().is_some() {
                    self.begin_cold()?;
                }
                if self.staff().keeper.is_none() {
                    // It cannot even begin; somebody makes room and starts it again.
                    self.copies.as_mut().expect("there is a record").failing = 0;
                    self.life.crash_at = 0;
                }
            }
            RecordAction::Returned { .. } => {}
            RecordAction::Regained => self.shared.regain_record(),
        }
        Ok(())
    }

    fn wake_waiting(&mut self) {
        for lane in self.shared.take_waiting() {
            let (lane, wakeup) = (usize::from(lane.0), Wakeup::Durable);
            let delay = self.rng.below(100_000);
            self.clock.after(delay, Happening::Wake { lane, wakeup });
        }
    }

    /// What goes wrong with a write to a copy of the record, and how long it takes.
    fn record_fault(&mut self, copy: usize) -> (Option<i32>, u64) {
        let prompt = self.rng.between(20_000, 500_000);
        let rate = self.profile.life.map_or(0, |life| life.record_faults);
        let copies = self.copies.as_mut().expect("there is a record");
        if copies.failing >> copy & 1 > 0 && !self.calm {
            return (Some(28), prompt);
        }
        let fits = copies.admits(copy) || self.profile.life.is_some_and(|life| life.record_lost);
        if self.calm || !self.life.served || !self.rng.chance(rate) || !fits {
            return (None, prompt);
        }
        let copies = self.copies.as_mut().expect("there is a record");
        match self.rng.below(4) {
            0 => {
                self.tally.count("record write error");
                copies.lacking |= 1 << copy;
                (Some(5), prompt)
            }
            1 => {
                self.tally.count("copy full");
                copies.failing |= 1 << copy;
                copies.lacking |= 1 << copy;
                (Some(28), prompt)
            }
            2 => {
                // Past the limit: the copy is left out.
                self.tally.count("record write hangs");
                copies.lacking |= 1 << copy;
                (None, self.rng.between(5_000 * MS, 6_000 * MS))
            }
            _ => {
                self.tally.count("slow record write");
                (None, self.rng.between(5 * MS, 300 * MS))
            }
        }
    }

    pub fn record_written(&mut self, place: usize) -> Verdict {
        let copies = self.copies.as_mut().expect("there is a record");
        let ended = copies.end(place, &mut self.rng);
        self.record_event(RecordEvent::Written {
            copy: ended.copy,
            write: ended.write,
            errno: ended.errno,
        })
    }

    /// An operator has made room, or the daemon tries again.
    pub fn readmit(&mut self, copy: u8) -> Verdict {
        let copies = self.copies.as_mut().expect("there is a record");
        copies.failing &= !(1 << copy);
        let mut reader = copies.reader(usize::from(copy));
        let recorder = &mut self.staff().recorder;
        if recorder.readmit(copy, "a copy", &mut reader).is_err() {
            let later = self.rng.between(MS, 500 * MS);
            let what = Event::Readmit { copy };
            if !self.staff().recorder.is_good(copy) {
                self.clock.after(later, Happening::Life(what));
            }
            return Ok(());
        }
        self.tally.count("copies back");
        self.poll_record()
    }

    /// The epoch of this run has begun: the keeper begins as well, and guests may come.
    fn serve(&mut self) -> Verdict {
        let config = self.keeper_config();
        let saved = self.staff().saved;
        let keeper = Keeper::new(config, saved, &self.shared);
        self.staff().keeper = Some(keeper);
        self.tell_keeper(KeeperEvent::Tick);
        self.life.served = true;
        let (epoch, opened) = (self.staff().recorder.superblock().epoch(), self.life.opened);
        if epoch <= opened {
            let what = format!("serves in epoch {epoch}, which is that of the last daemon");
            return violation("I12", what);
        }
        // This much is on a majority of the copies.
        self.life.epoch = opened + 1;
        let delay = self.rng.below(3 * MS);
        self.clock.after(delay, Happening::Life(Event::Connect));
        Ok(())
    }
}

/// States as the record has them.
pub fn saved_states(superblock: &crate::record::Superblock) -> KeeperState {
    let mut state = KeeperState::fresh();
    for (slot, member) in superblock.members.iter().enumerate() {
        state.states[slot] = state_of_member(member.state);
        if member.suspect {
            state.suspects.insert(crate::units::ReplicaId::new(slot));
        }
    }
    let cursor = |cursor: u64| (cursor != u64::MAX).then_some(cursor);
    state.verify_cursor = cursor(superblock.verify_cursor);
    state.scrub_cursor = cursor(superblock.scrub_cursor);
    state
}
