// SPDX-License-Identifier: Apache-2.0
//! Passes over the whole disk that compare all current copies: verify, once, and scrub (rules S5,
//! Y6).
//!
//! A pass goes at its rate, one piece at a time while the guest is active and a few when it is
//! idle. How far it has come is saved each GiB.

use std::time::Duration;

use super::super::event::{BadCause, Report, Request, Status};
use super::super::policy::Geometry;
use super::jobs::{Job, Jobs, Turn};
use super::rate::Bucket;
use super::{
    Command, KeeperAction, KeeperConfig, KeeperReport, KeeperStart, PassKind, Refusal, ScrubCounts,
};
use crate::units::{SECTOR_BYTES, SectorRange, Time};

/// Pieces compared at a time while the guest is idle.
const WINDOW: usize = 4;

/// Sectors from one saving of the cursor to the next (rule Y6).
const SAVE_SECTORS: u64 = (1 << 30) / SECTOR_BYTES;

struct Pass {
    kind: PassKind,
    repair: bool,
    /// Told apart from the passes before, whose last pieces may still be under way.
    number: u32,
    /// The first sector that was not asked for.
    issued: u64,
    /// The first sector that is not behind us in the record.
    saved: u64,
    counts: ScrubCounts,
}

/// See the module.
pub(super) struct Scrub {
    interval: Option<Duration>,
    /// To the first scrub, until that is planned.
    first: Option<Duration>,
    repairs: bool,
    rate: Bucket,
    pass: Option<Pass>,
    passes: u32,
    /// A scrub that begins when there is no other pass: from where, and whether it repairs.
    queued: Option<(u64, bool)>,
    /// When the next one begins on its own.
    next_at: Option<Time>,
    resume_at: Option<Time>,
    begun: bool,
}

impl Scrub {
    pub(super) fn new(config: &KeeperConfig, start: &KeeperStart, geometry: &Geometry) -> Self {
        // The record may be of a disk that was longer, or had smaller blocks.
        let clamped = |sector: u64| {
            let last = geometry.sectors() - u64::from(geometry.block_sectors());
            let sector = sector.min(last);
            sector - sector % u64::from(geometry.block_sectors())
        };
        let mut scrub = Self {
            interval: config.scrub_interval,
            first: config.scrub_first,
            repairs: config.scrub_repairs,
            rate: Bucket::new(config.scrub_bytes_per_s),
            pass: None,
            passes: 0,
            queued: start
                .scrub_cursor
                .map(|sector| (clamped(sector), config.scrub_repairs)),
            next_at: None,
            resume_at: None,
            begun: false,
        };
        if let Some(sector) = start.verify_cursor {
            scrub.begin(PassKind::Verify, clamped(sector), true);
        }
        scrub
    }

    fn begin(&mut self, kind: PassKind, sector: u64, repair: bool) {
        self.passes = self.passes.wrapping_add(1);
        self.begun = false;
        self.pass = Some(Pass {
            kind,
            repair,
            number: self.passes,
            issued: sector,
            saved: sector,
            counts: ScrubCounts::default(),
        });
    }

    pub(super) fn deadline(&self) -> Option<Time> {
        let waits = self.pass.is_none() && self.queued.is_none();
        let next_at = self.next_at.filter(|_| waits);
        [self.resume_at, next_at].into_iter().flatten().min()
    }

    /// How far the pass of this kind is behind us for good; `None`: none is under way or queued.
    pub(super) fn cursor(&self, kind: PassKind) -> Option<u64> {
        let queued = self.queued.filter(|_| kind == PassKind::Scrub);
        let pass = self.pass.as_ref().filter(|pass| pass.kind == kind);
        pass.map(|pass| pass.saved)
            .or(queued.map(|(sector, _)| sector))
    }

    /// Kind, first sector not asked for, and counts of the pass that is under way.
    pub(super) fn progress(&self) -> Option<(PassKind, u64, ScrubCounts)> {
        let pass = self.pass.as_ref()?;
        Some((pass.kind, pass.issued, pass.counts))
    }

    /// Counts of the pass, if a report is about what it compares at the moment.
    pub(super) fn reported(&mut self, jobs: &Jobs, report: &Report) {
        let Some(pass) = &mut self.pass else { return };
        let in_hand = |range: SectorRange| -> u64 {
            let shared = jobs.iter().filter_map(|job| match job {
                Job::Check { pass: of, range } if of == pass.number => Some(range),
                _ => None,
            });
            shared.map(|checked| overlap(checked, range)).sum()
        };
        match *report {
            Report::Bad { range, cause, .. } => match cause {
                BadCause::Differs => pass.counts.differing += in_hand(range),
                BadCause::Error(_) | BadCause::Short => pass.counts.unreadable += in_hand(range),
            },
            Report::Repaired { range, .. } => pass.counts.repaired += in_hand(range),
            Report::Failure { range, .. } => pass.counts.unresolved += in_hand(range),
            Report::Transient { .. }
            | Report::RepairFailed { .. }
            | Report::Behind { .. }
            | Report::FlushFailed { .. }
            | Report::Kicked { .. }
            | Report::Lagging { .. }
            | Report::Chosen { .. }
            | Report::RecordLost
            | Report::VerifyFailed { .. } => {}
        }
    }

    /// A piece was compared. Returns whether there is something to save.
    pub(super) fn replied(
        &mut self,
        turn: &mut Turn<'_>,
        jobs: &Jobs,
        number: u32,
        range: SectorRange,
        status: Status,
    ) -> bool {
        let Some(pass) = self.pass.as_mut().filter(|pass| pass.number == number) else {
            return false;
        };
        let sectors = u64::from(range.count());
        match status {
            Status::Ok => pass.counts.compared += sectors,
            Status::IoError => pass.counts.failed += sectors,
        }
        let in_hand = jobs.iter().filter_map(|job| match job {
            Job::Check { pass, range } if pass == number => Some(range.start()),
            _ => None,
        });
        let done = in_hand.min().unwrap_or(pass.issued);
        if done >= turn.shared.geometry.sectors() {
            let (kind, counts) = (pass.kind, pass.counts);
            self.end(turn, KeeperReport::PassDone { kind, counts });
            return true;
        }
        let gibibytes = done - done % SAVE_SECTORS;
        let due = gibibytes > pass.saved;
        if due {
            pass.saved = gibibytes;
        }
        due
    }

    fn end(&mut self, turn: &mut Turn<'_>, report: KeeperReport) {
        self.pass = None;
        self.schedule(turn.now);
        turn.actions.push(KeeperAction::Report(report));
    }

    fn schedule(&mut self, now: Time) {
        self.resume_at = None;
        let first = self.first.take();
        let next = self.interval.map(|interval| first.unwrap_or(interval));
        self.next_at = next.map(|next| now.after(next));
    }

    /// Carries a command out. Returns whether there is something to save.
    pub(super) fn command(&mut self, turn: &mut Turn<'_>, command: Command) -> bool {
        let scrubs = |pass: &&mut Pass| pass.kind == PassKind::Scrub;
        match command {
            Command::Scrub { repair } => {
                if let Some(pass) = self.pass.as_mut().filter(scrubs) {
                    pass.repair = repair;
                    return false;
                }
                self.queued = Some((0, repair));
                true
            }
            Command::StopScrub => {
                if self.queued.take().is_some() {
                    return true;
                }
                let Some(pass) = self.pass.as_mut().filter(scrubs) else {
                    let why = Refusal::NoScrub;
                    let report = KeeperReport::Refused { command, why };
                    turn.actions.push(KeeperAction::Report(report));
                    return false;
                };
                let (kind, counts) = (pass.kind, pass.counts);
                self.end(turn, KeeperReport::PassStopped { kind, counts });
                true
            }
            Command::Clear { .. } | Command::ForceCurrent { .. } | Command::Fail { .. } => false,
        }
    }

    /// Starts what may be started. `idle_at`: when the guest counts as idle, if it does not yet.
    /// `allowed`: nothing more urgent is left to do. Returns whether there is something to save.
    pub(super) fn advance(
        &mut self,
        turn: &mut Turn<'_>,
        jobs: &mut Jobs,
        idle_at: Option<Time>,
        allowed: bool,
    ) -> bool {
        if self.next_at.is_none() {
            self.schedule(turn.now);
        }
        let mut changed = false;
        if self.pass.is_none() {
            if let Some((sector, repair)) = self.queued.take() {
                self.begin(PassKind::Scrub, sector, repair);
            } else if self.next_at.is_some_and(|at| at <= turn.now) {
                self.begin(PassKind::Scrub, 0, self.repairs);
                changed = true;
            }
        }
        self.resume_at = None;
        let Some(pass) = &mut self.pass else {
            return changed;
        };
        if !self.begun {
            self.begun = true;
            let (kind, sector, repair) = (pass.kind, pass.issued, pass.repair);
            let report = KeeperReport::PassBegun {
                kind,
                sector,
                repair,
            };
            turn.actions.push(KeeperAction::Report(report));
        }
        let (shared, sectors) = (turn.shared, turn.shared.geometry.sectors());
        let window = if idle_at.is_some() { 1 } else { WINDOW };
        // With fewer than T replicas up there is nothing to be learnt, and much to be failed.
        let enough = shared.membership.up().count() >= shared.policy.threshold;
        while allowed && enough && pass.issued < sectors {
            let busy = |job: &Job| matches!(job, Job::Check { .. });
            if jobs.iter().filter(busy).count() >= window || !jobs.has_room() {
                break;
            }
            if let Some(opens_at) = self.rate.opens_at(turn.now) {
                self.resume_at = Some(opens_at);
                break;
            }
            let left = u32::try_from(sectors - pass.issued).unwrap_or(u32::MAX);
            let rest = SectorRange::new(pass.issued, left).expect("inside the disk");
            let range = shared.geometry.first_piece(rest);
            self.rate.charge(turn.now, range.len_bytes() as u64);
            pass.issued = range.end();
            let (pass, repair) = (pass.number, pass.repair);
            let job = Job::Check { pass, range };
            jobs.start(turn, job, Request::Check { range, repair });
        }
        changed
    }
}

/// Sectors in both ranges.
fn overlap(a: SectorRange, b: SectorRange) -> u64 {
    let start = a.start().max(b.start());
    a.end().min(b.end()).saturating_sub(start)
}
