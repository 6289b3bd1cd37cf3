// SPDX-License-Identifier: Apache-2.0
//! What must hold of replies and reports, and at the end of a run.

use crate::budget::index;
use crate::content::written;
use crate::guest::{GuestRequest, Kind};
use crate::quorum::{
    BadCause, Bitmap, BufferId, CrashTie, KickCause, ReadPattern, Report, Status, Tag,
};
use crate::trace::{Verdict, violation};
use crate::units::{ReplicaId, SectorRange};
use crate::world::World;

impl World {
    pub fn check_reply(
        &mut self,
        lane: usize,
        tag: Tag,
        status: Status,
        data: Option<BufferId>,
    ) -> Verdict {
        let Some(request) = self.guests.request(lane, tag) else {
            return violation("I11", format!("a reply to {tag:?}, which nobody asked"));
        };
        let extent = self.shape.geometry.extent_of(request.range.start());
        let Some(request) = self.guests.replied(lane, tag, status, extent) else {
            return violation("I11", format!("a second reply to {tag:?}"));
        };
        if status == Status::IoError {
            self.tally.count("I/O errors");
            return self.check_failure(&request);
        }
        match request.kind {
            Kind::Read => {
                let Some(data) = data else {
                    return violation("I1", "a good read without data");
                };
                self.check_data(lane, &request, data)
            }
            Kind::Write => self.check_write(&request),
            Kind::Flush => self.check_flush(lane, tag, &request),
            Kind::Nothing => Ok(()),
        }
    }

    /// I14: no request fails while the faults are within the budget.
    fn check_failure(&mut self, request: &GuestRequest) -> Verdict {
        if request.kind == Kind::Write {
            self.model.failed(request.range, request.order, self.step);
            if self.profile.beyond_budget {
                return Ok(());
            }
        }
        if self.profile.excess > 0 {
            return Ok(());
        }
        if request.kind == Kind::Read && self.may_tie_when_warm() {
            self.tally.count("reads that failed after warm starts");
            return Ok(());
        }
        violation(
            "I14",
            format!("{:?} of {} failed", request.kind, request.range),
        )
    }

    /// Where front-ends outlive daemons, sectors in U without a majority are errors (rule Y3). It is
    /// not checked that every one of them has a reason within the budget: I14 is checked of writes
    /// and flushes only.
    fn may_tie_when_warm(&self) -> bool {
        self.profile.life.is_some_and(|life| life.warm > 0)
    }

    /// I1, also I7: what was returned is legal.
    fn check_data(&mut self, lane: usize, request: &GuestRequest, data: BufferId) -> Verdict {
        let range = request.range;
        for (place, sector) in (range.start()..range.end()).enumerate() {
            let value = self.workers[lane].pool.value(data, place);
            let (floor, began) = (request.floors[place], request.began);
            if let Err(what) = self.model.shown(sector, value, floor, began, self.step) {
                if !self.is_explained(sector) && !self.was_explained(sector, began) {
                    return violation("I1", what);
                }
                self.tally.count("silently wrong sectors");
            }
        }
        Ok(())
    }

    /// Whether more copies of the sector are bad than any quorum survives, where that may be.
    pub fn is_explained(&self, sector: u64) -> bool {
        let bad = |&replica: &usize| {
            let value = self.disks[replica].value(sector);
            self.budget.is_bad(sector, replica) || !self.model.is_legal_now(sector, value)
        };
        let policy = &self.shape.policy;
        let spare = policy.replicas - policy.threshold;
        self.profile.excess > 0 && (0..policy.replicas).filter(bad).count() > spare
    }

    /// The same, at any time since the last write of the sector that was acknowledged and flushed
    /// before the reader began: what was chosen then may have been written to all copies since, and is
    /// what they all hold until the guest writes there.
    fn was_explained(&self, sector: u64, began: u64) -> bool {
        let since = self.model.sound_since(sector, began).max(1);
        self.profile.excess > 0 && self.budget.was_lost(sector, since)
    }

    /// I2: T current copies hold the write, everybody else is behind.
    fn check_write(&mut self, request: &GuestRequest) -> Verdict {
        let current = self.current(request.range);
        if current.len() < self.shape.policy.threshold {
            let what = format!("acknowledged with current copies {current:?} only");
            return violation("I2", what);
        }
        for sector in request.range.start()..request.range.end() {
            let expected = match request.zero {
                true => 0,
                false => written(request.version, sector),
            };
            for &replica in &current {
                let found = self.disks[replica].value(sector);
                if found != expected && !self.budget.is_tainted(sector, replica) {
                    let what = format!(
                        "current replica {replica} holds {found:#x} in sector {sector} when \
                         {expected:#x} is acknowledged"
                    );
                    return violation("I2", what);
                }
            }
        }
        let extent = self.shape.geometry.extent_of(request.range.start());
        if !self.is_dirty_for_good(extent) || !self.are_behind_for_good(extent, &current) {
            let what = "acknowledged before it is remembered who lacks the write";
            return violation("I2", format!("{}: {what}", request.range));
        }
        self.budget.look_at(request.range);
        self.model.acknowledged(request.range, request.order);
        Ok(())
    }

    /// I5, as far as it goes without power loss: T replicas were flushed since the request, the
    /// others are behind wherever a write had completed.
    fn check_flush(&mut self, lane: usize, tag: Tag, request: &GuestRequest) -> Verdict {
        let replicas = self.shape.policy.replicas;
        let mut flushed = 0;
        for replica in 0..replicas {
            if self.operations.flushed_since(replica, request.began) {
                flushed += 1;
                continue;
            }
            for extent in (0..self.shape.geometry.extents()).filter(|e| request.covers >> e & 1 > 0)
            {
                let id = ReplicaId::new(replica);
                let members = &self.shared.membership;
                // Where replicas come back and extents become clean, I5 says all there is to say.
                if self.profile.life.is_none() && !members.is_behind(extent, id) {
                    let what = format!(
                        "a flush is acknowledged, replica {replica} was not flushed and is \
                         current in extent {extent}"
                    );
                    return violation("F2", what);
                }
            }
        }
        if flushed < self.shape.policy.threshold {
            return violation(
                "F2",
                format!("acknowledged with {flushed} replicas flushed"),
            );
        }
        self.tally.count("flushes");
        self.check_durable(request)?;
        if let Some(settled) = self.guests.take_covered(lane, tag) {
            self.check_covered(&settled)?;
            self.model.flushed(&settled);
        }
        Ok(())
    }

    /// I5: whatever had ended before is durable on all copies that are current.
    fn check_durable(&self, request: &GuestRequest) -> Verdict {
        for (replica, disk) in self.disks.iter().enumerate() {
            let id = ReplicaId::new(replica);
            for sector in disk.unflushed(request.began) {
                let extent = self.shape.geometry.extent_of(sector);
                let behind = self.shared.membership.is_behind(extent, id);
                if !behind && !self.budget.is_tainted(sector, replica) {
                    let what =
                        format!("sector {sector} is not durable on {id:?}, which is current");
                    return violation("I5", format!("a flush is acknowledged and {what}"));
                }
            }
        }
        Ok(())
    }

    /// I5, word for word: of every sector the version that was acknowledged when the flush was sent, or
    /// a later one, would survive a loss of power on T replicas, and it is remembered for good who
    /// lacks it. Copies that a silent fault made wrong are the budget's affair.
    fn check_covered(&self, settled: &[u64]) -> Verdict {
        if self.profile.excess > 0 {
            return Ok(());
        }
        let marks = self.shared.membership.marks();
        for (sector, &version) in (0..).zip(settled).filter(|&(_, &version)| version > 0) {
            let extent = self.shape.geometry.extent_of(sector);
            let mut holders = 0;
            for (replica, disk) in self.disks.iter().enumerate() {
                let held = self.budget.is_tainted(sector, replica)
                    || disk
                        .survivors(sector)
                        .all(|value| self.model.is_not_older(sector, value, version));
                let behind = Bitmap::Behind(ReplicaId::new(replica));
                // Another file in its place is a fault; it is not admitted before this is remembered.
                let foreign = self.life.foreign[replica];
                if !held && !foreign && !marks.is_durable(behind, extent) {
                    let what = format!("replica {replica} may lose version {version} of {sector}");
                    return violation("I5", format!("{what}, and that is not remembered"));
                }
                holders += usize::from(held);
            }
            if holders < self.shape.policy.threshold {
                let what = format!("version {version} of sector {sector}");
                let what = format!("{what} is durable on {holders} replicas only");
                return violation("I5", format!("a flush is acknowledged and {what}"));
            }
        }
        Ok(())
    }

    pub fn check_report(&mut self, report: Report) -> Verdict {
        if self.profile.is_faultless() {
            return violation("I15", format!("{report:?} without any fault"));
        }
        match report {
            Report::Bad {
                replica,
                range,
                cause,
                ..
            } => {
                self.tally.count("bad reports");
                self.check_blame(replica, range, cause)
            }
            Report::Failure { range, .. } => {
                // Before it is known whether requests will be repeated, nothing is chosen.
                let early = self.shared.crash_tie() == CrashTie::MajorityOnly;
                let excused = early || self.may_tie_when_warm();
                if self.profile.beyond_budget || self.profile.excess > 0 || excused {
                    return Ok(());
                }
                let disorder = self.list_disorder();
                violation("I14", format!("failure reported at {range}; {disorder}"))
            }
            Report::Transient { .. } => {
                self.tally.count("transient differences");
                Ok(())
            }
            Report::Repaired { replica, range } => {
                self.tally.count("repairs");
                self.check_repaired(replica.index(), range)
            }
            Report::RepairFailed { .. } => {
                self.tally.count("failed repairs");
                Ok(())
            }
            Report::Behind {
                replica, extent, ..
            } => {
                self.tally.count("behind marks");
                self.check_behind(replica, extent)
            }
            Report::FlushFailed { .. } => {
                self.tally.count("failed flushes");
                Ok(())
            }
            Report::Kicked { replica, why, .. } => {
                self.tally.count("kicks");
                if let KickCause::FlushFailed(_) = why {
                    self.tally.count("failed flushes");
                }
                self.check_kick(replica, why)
            }
            Report::Lagging { .. } => {
                self.tally.count("lagging");
                Ok(())
            }
            Report::Chosen { .. } => {
                self.tally.count("choices");
                Ok(())
            }
            Report::RecordLost if self.profile.life.is_some_and(|life| life.record_lost) => Ok(()),
            Report::RecordLost => violation("R1", "the record was lost without a fault"),
            Report::VerifyFailed { .. } => {
                violation("report", format!("{report:?} is impossible here"))
            }
        }
    }

    /// Nobody is called bad who is not.
    fn check_blame(&self, replica: ReplicaId, range: SectorRange, cause: BadCause) -> Verdict {
        let slot = replica.index();
        let guilty = |sector: u64| {
            self.budget.is_tainted(sector, slot) || self.budget.is_doomed(sector, slot)
        };
        let mut sectors = range.start()..range.end();
        let fair = match cause {
            BadCause::Differs => sectors.all(guilty),
            BadCause::Error(_) | BadCause::Short => sectors.any(guilty),
        };
        if fair || self.profile.excess > 0 {
            return Ok(());
        }
        violation(
            "Y2",
            format!("{replica:?} is blamed for {range} ({cause:?}) unjustly"),
        )
    }

    /// Y4: what is reported as repaired holds what it should.
    fn check_repaired(&self, replica: usize, range: SectorRange) -> Verdict {
        for sector in range.start()..range.end() {
            let value = self.disks[replica].value(sector);
            let since = self.repaired_at[index(sector)][replica];
            let spoiled_since = self.spoiled_at[index(sector)][replica] > since;
            let wrong = !self.model.is_legal_now(sector, value);
            if wrong && !spoiled_since && !self.is_explained(sector) {
                let what = format!("replica {replica} holds {value:#x} in sector {sector}");
                return violation("Y4", format!("reported as repaired, but {what}"));
            }
        }
        Ok(())
    }

    /// Only who met a fault is not relied on any more.
    fn check_kick(&self, replica: ReplicaId, why: KickCause) -> Verdict {
        if self.profile.beyond_budget || self.budget.is_doomed_everywhere(replica.index()) {
            return Ok(());
        }
        let what = format!("{replica:?} is kicked ({why:?}) without a fault");
        violation("I15", what)
    }

    /// Only who met a fault falls behind.
    fn check_behind(&self, replica: ReplicaId, extent: SectorRange) -> Verdict {
        if self.profile.beyond_budget || self.budget.is_doomed(extent.start(), replica.index()) {
            return Ok(());
        }
        violation(
            "I15",
            format!("{replica:?} falls behind in {extent} without a fault"),
        )
    }

    /// Nothing is left when nothing is going on.
    pub fn check_idle(&self) -> Verdict {
        for (number, worker) in self.workers.iter().enumerate() {
            if !worker.lane.is_idle() {
                return violation("I9", format!("lane {number} is not idle"));
            }
            if !worker.rings.is_idle() {
                return violation("I11", format!("a reply of lane {number} is not published"));
            }
            if !worker.pool.all_free() {
                return violation(
                    "V7",
                    format!("lane {number} has not given all buffers back"),
                );
            }
        }
        if !self.shared.order.is_empty() {
            return violation("I10", "a range lock is left");
        }
        if !self.operations.none_in_flight() {
            return violation("I9", "an operation is left");
        }
        if !self.inflight.is_quiet() {
            return violation("I11", "the guest waits for a request that nobody knows of");
        }
        Ok(())
    }

    /// I9, as far as it goes without resync: current copies are equal, and nobody is behind
    /// without a fault.
    pub fn check_end(&self) -> Verdict {
        let geometry = self.shape.geometry;
        if self.shared.unresolved.sectors() > 0 {
            return violation("I9", "sectors are left in U");
        }
        let policy = &self.shape.policy;
        let repaired = policy.repair && self.profile.pattern == ReadPattern::Quorum;
        for extent in 0..geometry.extents() {
            let range = geometry.extent_range(extent);
            for replica in policy_replicas(policy.replicas) {
                if self.shared.membership.is_behind(extent, replica) {
                    self.check_behind(replica, range)?;
                }
            }
            let current = self.current(range);
            for sector in range.start()..range.end() {
                let fit = |&&replica: &&usize| repaired || !self.budget.is_tainted(sector, replica);
                let mut values = current
                    .iter()
                    .filter(fit)
                    .map(|&r| self.disks[r].value(sector));
                let Some(first) = values.next() else { continue };
                if self.is_explained(sector) {
                    continue;
                }
                if values.any(|value| value != first) {
                    let what = format!("current copies of sector {sector} differ at the end");
                    return violation("I9", what);
                }
                if !self.model.is_legal_now(sector, first) {
                    return violation("I1", format!("sector {sector} ends as {first:#x}"));
                }
            }
        }
        Ok(())
    }
}

fn policy_replicas(count: usize) -> impl Iterator<Item = ReplicaId> {
    (0..count).map(ReplicaId::new)
}
