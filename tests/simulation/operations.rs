// SPDX-License-Identifier: Apache-2.0
//! Operations on the simulated disks: submitted, checked, spoiled, carried out, completed.

use std::collections::BTreeSet;

use crate::budget::index;
use crate::clock::Happening;
use crate::content::garbled;
use crate::faults::{Candidate, Fault, MS, mask_of, masked};
use crate::landing::Landing;
use crate::quorum::{BufferId, Event, Operation, OperationKind, Outcome};
use crate::trace::{Line, Verdict, violation};
use crate::units::{ReplicaId, SectorRange};
use crate::world::{Breach, World};

/// How long the fault of an ended operation still counts: whoever asked has acted on it by then.
pub const REMEMBERED: u64 = 150 * MS;

/// An activity of a lane: what its operations have in common is all of the number but the
/// replica in its highest bits.
type Activity = (usize, u64);

/// An operation in flight.
#[derive(Clone, Copy)]
pub struct InFlight {
    pub lane: usize,
    activity: Activity,
    pub operation: Operation,
    pub fault: Fault,
    repair: bool,
    /// Sectors that were transferred at submission; the rest are at completion.
    pub transferred: u64,
    pub submitted: u64,
    /// Which one it is of all operations of the run.
    pub number: u64,
}

/// All operations of a run.
pub struct Operations {
    slots: Vec<Option<InFlight>>,
    free: Vec<usize>,
    parked: Vec<usize>,
    /// Writes in flight in each extent.
    writes: Vec<Vec<usize>>,
    /// Which activities repair which replica.
    repairing: BTreeSet<(Activity, usize)>,
    /// Activities that read a replica block by block, since it could not read the whole.
    piecewise: BTreeSet<(Activity, usize)>,
    /// Activities that work on a whole extent, as no request of the guest does.
    reconciling: BTreeSet<Activity>,
    pub late: Vec<Landing>,
    /// Those of them that have not landed.
    pub late_left: usize,
    /// Per replica, when its last successful flush began.
    flushed: Vec<u64>,
    flushing: Vec<usize>,
    /// Operations in flight on each replica.
    outstanding: Vec<usize>,
    count: u64,
}

impl Operations {
    pub fn new(replicas: usize, extents: u64) -> Self {
        Self {
            slots: Vec::new(),
            free: Vec::new(),
            parked: Vec::new(),
            writes: vec![Vec::new(); index(extents)],
            repairing: BTreeSet::new(),
            piecewise: BTreeSet::new(),
            reconciling: BTreeSet::new(),
            late: Vec::new(),
            late_left: 0,
            flushed: vec![0; replicas],
            flushing: vec![0; replicas],
            outstanding: vec![0; replicas],
            count: 0,
        }
    }

    pub fn take_parked(&mut self) -> Vec<usize> {
        std::mem::take(&mut self.parked)
    }

    /// The operation in this slot.
    pub fn flight(&self, slot: usize) -> InFlight {
        *self.slots[slot].as_ref().expect("in flight")
    }

    /// Whether `replica` completed a flush that began at step `since` or later.
    pub fn flushed_since(&self, replica: usize, since: u64) -> bool {
        self.flushed[replica] >= since
    }

    pub fn none_in_flight(&self) -> bool {
        self.free.len() == self.slots.len()
    }

    /// Whether nothing is in flight on the replica.
    pub fn none_on(&self, replica: usize) -> bool {
        self.outstanding[replica] == 0
    }

    /// Replicas that are being written in the extent.
    pub fn written_in(&self, extent: u64) -> impl Iterator<Item = ReplicaId> + '_ {
        let writes = self.writes[index(extent)].iter();
        writes.map(|&slot| {
            let flight = self.slots[slot].as_ref().expect("in flight");
            flight.operation.replica
        })
    }

    /// What is in flight, by slot.
    pub fn in_flight(&self) -> Vec<usize> {
        let slots = self.slots.iter().enumerate();
        slots
            .filter_map(|(slot, operation)| operation.as_ref().map(|_| slot))
            .collect()
    }

    /// Nobody will hear of what is in flight any more.
    pub fn forget_all(&mut self) {
        let (replicas, extents) = (self.flushed.len(), self.writes.len());
        let count = self.count;
        *self = Self::new(replicas, extents as u64);
        self.count = count;
    }

    fn insert(&mut self, operation: InFlight) -> usize {
        self.outstanding[operation.operation.replica.index()] += 1;
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() - 1
        });
        self.slots[slot] = Some(operation);
        slot
    }
}

/// The sectors an operation transfers, and whether it changes the medium.
pub fn target(kind: OperationKind) -> Option<(SectorRange, bool)> {
    match kind {
        OperationKind::Read { range, .. } => Some((range, false)),
        OperationKind::Write { range, .. } | OperationKind::WriteZeroes { range, .. } => {
            Some((range, true))
        }
        OperationKind::Flush => None,
    }
}

/// The buffer an operation uses, and whether it fills it.
fn buffer_of(kind: OperationKind) -> Option<(BufferId, bool)> {
    match kind {
        OperationKind::Read { buffer, .. } => Some((buffer, true)),
        OperationKind::Write { buffer, .. } => Some((buffer, false)),
        OperationKind::WriteZeroes { .. } | OperationKind::Flush => None,
    }
}

impl World {
    pub fn submit(&mut self, lane: usize, operation: Operation) -> Verdict {
        let replica = operation.replica.index();
        let activity = (lane, operation.op.0 & ((1 << 48) - 1));
        if let Some((buffer, fills)) = buffer_of(operation.kind)
            && let Err(misuse) = self.workers[lane].pool.begin(buffer, fills)
        {
            return violation("V7", misuse);
        }
        let mut repair = self.operations.repairing.contains(&(activity, replica));
        if let OperationKind::Write { buffer, range, .. } = operation.kind
            && !self.workers[lane].pool.is_guest(buffer)
        {
            repair = true;
            self.operations.repairing.insert((activity, replica));
            for s in range.start()..range.end() {
                self.repaired_at[index(s)][replica] = self.step;
            }
        }
        if let Some((range, writes)) = target(operation.kind) {
            if !writes && range == self.extent_around(range) {
                self.operations.reconciling.insert(activity);
            }
            if repair {
                self.budget.repair_begins(range, replica);
            }
            self.budget.begins(range, writes);
            self.check_submission(activity, range, writes, repair, operation.replica)?;
        } else {
            self.operations.flushing[replica] += 1;
        }
        let candidate = Candidate {
            replica,
            kind: operation.kind,
            repair,
            may_hang: self.shape.buffers >= 16 + 2 * self.shape.policy.replicas,
        };
        let (rng, budget, tally) = (&mut self.rng, &mut self.budget, &mut self.tally);
        let mut fault = Fault::None;
        if !self.life.attached[replica] || !self.life.present[replica] {
            fault = Fault::Gone;
        } else if !self.calm && self.life.may_fail(replica) {
            let beyond = self.profile.beyond_budget;
            fault = self.plan.fault(rng, &candidate, budget, tally, beyond);
        }
        let latency = match self.calm {
            true => rng.between(10_000, 500_000),
            false if !self.life.may_fail(replica) => rng.between(20_000, 2 * MS),
            false => self.plan.latency(rng, &candidate, budget, tally),
        };
        // An operation meets the medium at any moment of its time, and not all at once.
        let early = match self.rng.below(8) {
            0..4 => 0,
            4..7 => u64::MAX,
            _ => self.rng.next(),
        };
        let early = match fault {
            Fault::Hang => 0,
            // At once, while the budget has room for it elsewhere.
            Fault::Misdirected { .. } => u64::MAX,
            _ => early,
        };
        let slot = self.operations.insert(InFlight {
            lane,
            activity,
            operation,
            fault,
            repair,
            transferred: early,
            submitted: self.step,
            number: self.operations.count,
        });
        self.operations.count += 1;
        if let Some((range, true)) = target(operation.kind) {
            let extent = self.shape.geometry.extent_of(range.start());
            self.operations.writes[index(extent)].push(slot);
        }
        if fault != Fault::None {
            let line = Line::Injected(fault, operation);
            self.trace.note(self.step, self.clock.now(), lane, line);
            self.note_spoiling(fault, operation);
        }
        self.transfer(slot, early);
        if fault == Fault::Hang && self.profile.life.is_none() {
            self.operations.parked.push(slot);
        } else if fault == Fault::Hang {
            let latency = self.rng.between(100 * MS, 4_000 * MS);
            self.clock.after(latency, Happening::Complete { slot });
        } else {
            self.clock.after(latency, Happening::Complete { slot });
        }
        Ok(())
    }

    /// All of the extent that `range` lies in.
    fn extent_around(&self, range: SectorRange) -> SectorRange {
        let geometry = self.shape.geometry;
        geometry.extent_range(geometry.extent_of(range.start()))
    }

    fn note_spoiling(&mut self, fault: Fault, operation: Operation) {
        if let Some((range, _)) = target(operation.kind)
            && fault.is_silent_write()
        {
            for s in range.start()..range.end() {
                self.spoiled_at[index(s)][operation.replica.index()] = self.step;
            }
        }
    }

    /// What must hold when an operation is submitted.
    fn check_submission(
        &self,
        activity: Activity,
        range: SectorRange,
        writes: bool,
        repair: bool,
        replica: ReplicaId,
    ) -> Verdict {
        let extent = self.shape.geometry.extent_of(range.start());
        if range.end() > self.shape.geometry.sectors()
            || self.shape.geometry.extent_of(range.end() - 1) != extent
            || !range.is_aligned(self.shape.geometry.block_sectors())
        {
            return violation("L2", format!("an operation on {range}"));
        }
        // A repair goes on when its replica falls behind meanwhile. What is being brought up to date
        // is read to see where it differs, and a replica that lags to see whether it still does.
        let exempt = repair
            || self.operations.reconciling.contains(&activity)
            || self
                .operations
                .piecewise
                .contains(&(activity, replica.index()))
            || self.shared.membership.lagging().contains(replica);
        if !exempt && self.was_behind(extent, replica) {
            let rule = if writes { "W3" } else { "I6" };
            let what = format!("{replica:?} is behind in extent {extent} and is asked for {range}");
            return violation(rule, what);
        }
        if !writes {
            return Ok(());
        }
        if !self.is_dirty_for_good(extent) {
            return violation(
                "I3",
                format!("a write to {range}, whose extent is not dirty for good"),
            );
        }
        for &slot in &self.operations.writes[index(extent)] {
            let other = self.operations.slots[slot].as_ref().expect("in flight");
            let Some((others, _)) = target(other.operation.kind) else {
                continue;
            };
            // Of an earlier request only operations on replicas that are behind may be left.
            if others.overlaps(range)
                && other.activity != activity
                && !self
                    .shared
                    .membership
                    .is_behind(extent, other.operation.replica)
            {
                let what = format!("{range} is written while {others} is on {replica:?}");
                return violation("I10", what);
            }
        }
        match self.guests.unpublished_write(extent, range) {
            // It changes nothing of what the write that waits for its turn has written.
            _ if repair || self.broken.unseen => Ok(()),
            Some(earlier) => violation(
                "L3",
                format!("{range} is written before the reply to the write of {earlier} is visible"),
            ),
            None => Ok(()),
        }
    }

    /// Moves the sectors in `mask` between buffer and medium.
    pub fn transfer(&mut self, slot: usize, mask: u64) {
        let flight = *self.operations.slots[slot].as_ref().expect("in flight");
        let replica = flight.operation.replica.index();
        match flight.operation.kind {
            OperationKind::Read {
                range,
                buffer,
                skip_bytes,
            } => {
                let skip = index(u64::from(skip_bytes)) / crate::content::SECTOR_LEN;
                let pool = &mut self.workers[flight.lane].pool;
                for (place, sector) in masked(range, mask) {
                    pool.put(buffer, skip + place, self.disks[replica].value(sector));
                }
            }
            OperationKind::Write {
                range,
                buffer,
                skip_bytes,
            } => {
                let skip = index(u64::from(skip_bytes)) / crate::content::SECTOR_LEN;
                let guest = self.workers[flight.lane].pool.is_guest(buffer);
                for (place, sector) in masked(range, mask & landing_mask(flight.fault, range)) {
                    let mut value = self.workers[flight.lane].pool.value(buffer, skip + place);
                    if guest && self.broken.breach == Some(Breach::GuestMemoryNotCopied) {
                        // What is in guest memory at this moment.
                        value = garbled(self.rng.next());
                    }
                    self.land(replica, sector, value, flight.number);
                }
                if let Fault::Misdirected { to } = flight.fault {
                    for (place, sector) in masked(range, mask) {
                        let value = self.workers[flight.lane].pool.value(buffer, skip + place);
                        self.spoil(replica, to + (sector - range.start()), value);
                    }
                }
            }
            OperationKind::WriteZeroes { range, .. } => {
                for (_, sector) in masked(range, mask & landing_mask(flight.fault, range)) {
                    self.land(replica, sector, 0, flight.number);
                }
                if let Fault::Misdirected { to } = flight.fault {
                    for (_, sector) in masked(range, mask) {
                        self.spoil(replica, to + (sector - range.start()), 0);
                    }
                }
            }
            OperationKind::Flush => {}
        }
    }

    pub fn complete(&mut self, slot: usize) -> Verdict {
        let early = self.operations.slots[slot]
            .as_ref()
            .expect("in flight")
            .transferred;
        self.transfer(slot, !early);
        let flight = self.operations.slots[slot].take().expect("in flight");
        self.operations.free.push(slot);
        let operation = flight.operation;
        let replica = operation.replica.index();
        self.operations.outstanding[replica] -= 1;
        if let Some((range, writes)) = target(operation.kind) {
            if writes {
                let extent = self.shape.geometry.extent_of(range.start());
                let writes = &mut self.operations.writes[index(extent)];
                let at = writes
                    .iter()
                    .position(|&other| other == slot)
                    .expect("listed");
                writes.swap_remove(at);
                self.disks[replica].ended(range, flight.number, self.step);
            }
            if let Fault::Late { after } = flight.fault {
                self.postpone(&flight, range, after);
            }
        }
        let outcome = self.outcome(&flight);
        if let Some((buffer, fills)) = buffer_of(operation.kind) {
            self.workers[flight.lane].pool.end(buffer, fills);
        }
        if matches!(operation.kind, OperationKind::Flush) {
            self.operations.flushing[replica] -= 1;
            let well = outcome == Outcome::Done;
            self.disks[replica].flushed(flight.submitted, well, &mut self.rng);
            if well {
                let begun = &mut self.operations.flushed[replica];
                *begun = flight.submitted.max(*begun);
            }
        }
        let op = operation.op;
        if outcome != Outcome::Done && buffer_of(operation.kind).is_some_and(|(_, fills)| fills) {
            self.operations.piecewise.insert((flight.activity, replica));
        }
        self.deliver(flight.lane, Event::Completed { op, outcome })?;
        if let Some((range, writes)) = target(operation.kind) {
            if flight.repair {
                self.budget.repair_ends(range, replica);
            }
            self.budget.ends(range, writes);
        }
        Ok(())
    }

    fn outcome(&mut self, flight: &InFlight) -> Outcome {
        let operation = flight.operation;
        let replica = operation.replica.index();
        let reads = matches!(operation.kind, OperationKind::Read { .. });
        if let Some((range, false)) = target(operation.kind) {
            let forget = Happening::Forget { replica, range };
            if flight.fault.is_of_one_read() {
                self.clock.after(REMEMBERED, forget);
            }
            if !self.disks[replica].is_readable(range) {
                return Outcome::Failed { errno: 5 };
            }
        }
        match flight.fault {
            Fault::Errno { errno, .. } => Outcome::Failed { errno },
            Fault::Gone => Outcome::Failed { errno: 19 },
            Fault::Short => {
                let (range, _) = target(operation.kind).expect("only reads are short");
                let expected = u32::try_from(range.len_bytes()).expect("a short request");
                let got = u32::try_from(self.rng.below(u64::from(expected))).expect("less");
                Outcome::Short { expected, got }
            }
            Fault::Garbled { sector } if reads => {
                if let OperationKind::Read {
                    buffer, skip_bytes, ..
                } = operation.kind
                {
                    let value = garbled(self.rng.next());
                    let skip = index(u64::from(skip_bytes)) / crate::content::SECTOR_LEN;
                    let place = skip + index(u64::from(sector));
                    self.workers[flight.lane].pool.put(buffer, place, value);
                }
                Outcome::Done
            }
            Fault::None
            | Fault::Garbled { .. }
            | Fault::Lost
            | Fault::Torn { .. }
            | Fault::Misdirected { .. }
            | Fault::Late { .. }
            | Fault::Hang => Outcome::Done,
        }
    }
}

/// The sectors of a write that reach the place they were meant for.
pub fn landing_mask(fault: Fault, range: SectorRange) -> u64 {
    match fault {
        Fault::None | Fault::Short | Fault::Garbled { .. } | Fault::Hang => mask_of(range),
        Fault::Errno { landed, .. } | Fault::Torn { landed } => landed,
        Fault::Lost | Fault::Misdirected { .. } | Fault::Late { .. } | Fault::Gone => 0,
    }
}
