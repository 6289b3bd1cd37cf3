// SPDX-License-Identifier: Apache-2.0
//! The keeper of a disk: what is maintained, and when. It brings back what was lost, behind or
//! doubtful, and lets go what cannot be relied on.
//!
//! Like a lane it is a state machine without I/O. It is driven by the maintenance thread, hands
//! requests to the lane of that thread, and is told how they end; one keeper serves one disk. Its
//! memory does not grow with what happens.
//!
//! - `interface`: what it is told and asks for.
//! - `life`: the states of a replica; `members`: who changes them; `budget`: what a replica may
//!   do wrong; `copies`: who can be spared.
//! - `pump`: resolve and resync; `scrub`: verify and scrub; `probe`: lagging replicas; `sweep`:
//!   clean extents.
//! - `jobs`: requests under way; `rate`: bytes in time, delays; `progress`, `status`: for people.

mod budget;
mod copies;
mod interface;
mod jobs;
mod life;
mod members;
mod probe;
mod progress;
mod pump;
mod rate;
mod scrub;
mod status;
mod sweep;

use std::time::Duration;

use super::event::{BehindCause, KickCause, Report, Status, Tag};
use super::shared::Shared;
use crate::units::{ReplicaId, Time};
use budget::Fault;
use jobs::{Job, Jobs, Turn};
use members::Members;
use probe::Probes;
use pump::Pump;
use scrub::Scrub;
use sweep::Sweep;

pub use interface::{
    Command, KeeperAction, KeeperConfig, KeeperEvent, KeeperReport, KeeperStart, KeeperState,
    PassKind, Refusal, ScrubCounts, StateCause,
};
pub use jobs::REQUESTS_MAX;
pub use life::{Change, ReplicaState};
pub use status::{KeeperStatus, PassStatus, ReplicaStatus};

/// For so long after its last request the guest counts as active (rule Y7).
const GUEST_ACTIVE: Duration = Duration::from_secs(1);

/// What need not be saved at once is saved after this time.
const SAVE_DELAY: Duration = Duration::from_secs(1);

/// See the module.
pub struct Keeper {
    config: KeeperConfig,
    jobs: Jobs,
    members: Members,
    pump: Pump,
    probes: Probes,
    scrub: Scrub,
    sweep: Sweep,
    guest_requests: u64,
    guest_active_until: Time,
    /// What the record holds, or was asked to.
    saved: KeeperState,
    save_at: Option<Time>,
    /// Something is to be saved at once.
    save_now: bool,
}

impl Keeper {
    /// The keeper of a disk that is as `shared` says. A tick is due at once.
    #[must_use]
    pub fn new(config: KeeperConfig, start: KeeperStart, shared: &Shared) -> Self {
        let members = Members::new(&config, &start, shared);
        Self {
            jobs: Jobs::new(),
            members,
            pump: Pump::new(&config),
            probes: Probes::new(&config),
            scrub: Scrub::new(&config, &start, &shared.geometry),
            sweep: Sweep::new(&config),
            guest_requests: 0,
            guest_active_until: Time::default(),
            saved: start,
            save_at: None,
            save_now: false,
            config,
        }
    }

    /// When a [`KeeperEvent::Tick`] is owed. Always some time: what lanes do without telling is
    /// looked for every now and then.
    #[must_use]
    pub fn deadline(&self) -> Option<Time> {
        let times = [
            Some(self.sweep.deadline()),
            self.members.deadline(),
            self.pump.deadline(),
            self.probes.deadline(),
            self.scrub.deadline(),
            self.save_at,
        ];
        times.into_iter().flatten().min()
    }

    /// Takes note of `event` and appends what is to be done. `now` never goes back.
    ///
    /// # Panics
    /// If the event was not owed: a broken invariant.
    pub fn handle(
        &mut self,
        now: Time,
        event: KeeperEvent,
        shared: &Shared,
        actions: &mut Vec<KeeperAction>,
    ) {
        let mut turn = Turn {
            now,
            shared,
            actions,
        };
        self.take_note(&mut turn, event);
        self.advance(&mut turn);
        self.save(&mut turn);
    }

    fn take_note(&mut self, turn: &mut Turn<'_>, event: KeeperEvent) {
        match event {
            KeeperEvent::Tick => {}
            KeeperEvent::Replied { tag, status } => self.replied(turn, tag, status),
            KeeperEvent::Kicked { replica, why } => {
                self.members.kicked(turn, replica, why);
                self.pump.forgive(turn.now);
            }
            KeeperEvent::Vanished { replica } => {
                self.members.leave(turn, replica, KickCause::Vanished);
            }
            KeeperEvent::Detached { replica } => self.members.detached(replica),
            KeeperEvent::Opened { replica, same } => {
                self.members.opened(turn, replica, same);
                self.pump.forgive(turn.now);
            }
            KeeperEvent::OpenFailed { replica } => self.members.open_failed(turn, replica),
            KeeperEvent::Report(report) => self.reported(turn, report),
            KeeperEvent::GuestRequests { total } => {
                if total > self.guest_requests {
                    self.guest_requests = total;
                    self.guest_active_until = turn.now.after(GUEST_ACTIVE);
                }
            }
            KeeperEvent::Command(command) => self.command(turn, command),
        }
    }

    fn replied(&mut self, turn: &mut Turn<'_>, tag: Tag, status: Status) {
        match self.jobs.end(tag) {
            Job::Reconcile { extent, returning } => {
                self.pump.reconciled(turn, extent, returning, status);
            }
            Job::Resolve { range } => self.pump.resolved(turn, range, status),
            Job::Check { pass, range } => {
                let due = self.scrub.replied(turn, &self.jobs, pass, range, status);
                self.save_now |= due;
            }
            Job::Probe { replica, since } => {
                if self.probes.replied(turn, replica, since, status) {
                    self.pump.forgive(turn.now);
                }
            }
            Job::Flush => self.sweep.flushed(turn.now),
        }
    }

    /// Counts what a lane tells of a replica against its budgets. Resolving and resyncing are no
    /// fault of a replica: lanes report `Repaired` by rule Y4 only.
    fn reported(&mut self, turn: &mut Turn<'_>, report: Report) {
        self.scrub.reported(&self.jobs, &report);
        match report {
            Report::Behind { replica, why, .. } => {
                self.pump.look();
                match why {
                    BehindCause::WriteFailed(_) => self.fault(turn, replica, Fault::WriteError),
                    // A repair that failed is reported as such, too.
                    BehindCause::RepairFailed | BehindCause::Late => {}
                }
            }
            Report::RepairFailed { replica, .. } => {
                self.pump.look();
                self.fault(turn, replica, Fault::WriteError);
            }
            Report::Repaired { replica, range } => {
                self.fault(turn, replica, Fault::Repaired(range.count()));
            }
            Report::FlushFailed { replica, errno, .. } => {
                // Rule F3: it is opened again, whatever the next flush says.
                self.pump.look();
                self.members
                    .leave(turn, replica, KickCause::FlushFailed(errno));
            }
            // A write that failed leaves unresolved sectors.
            Report::Failure { .. } | Report::Lagging { .. } => self.pump.look(),
            Report::Bad { .. }
            | Report::Transient { .. }
            | Report::Kicked { .. }
            | Report::Chosen { .. }
            | Report::RecordLost
            | Report::VerifyFailed { .. } => {}
        }
    }

    fn fault(&mut self, turn: &mut Turn<'_>, replica: ReplicaId, fault: Fault) {
        if self.members.fault(turn, replica, fault) {
            self.pump.forgive(turn.now);
        }
    }

    fn command(&mut self, turn: &mut Turn<'_>, command: Command) {
        let known = |replica: ReplicaId| {
            let known = self.members.contains(replica);
            known.then_some(replica).ok_or(Refusal::NoSuchReplica)
        };
        let done = match command {
            Command::Scrub { .. } | Command::StopScrub => {
                self.save_now |= self.scrub.command(turn, command);
                Ok(())
            }
            Command::Clear { replica } => {
                known(replica).and_then(|replica| self.members.clear(turn, &self.config, replica))
            }
            Command::Fail { replica } => {
                known(replica).and_then(|replica| self.members.fail(turn, replica))
            }
            Command::ForceCurrent { replica } => known(replica)
                .and_then(|replica| self.members.force_current(turn, replica))
                .map(|extents| {
                    let report = KeeperReport::Forced { replica, extents };
                    turn.actions.push(KeeperAction::Report(report));
                }),
        };
        self.pump.forgive(turn.now);
        if let Err(why) = done {
            let report = KeeperReport::Refused { command, why };
            turn.actions.push(KeeperAction::Report(report));
        }
    }

    /// Does what is due, the urgent first.
    fn advance(&mut self, turn: &mut Turn<'_>) {
        let (now, active_until) = (turn.now, self.guest_active_until);
        let idle_at = (now < active_until).then_some(active_until);
        if self.sweep.advance(turn, &mut self.jobs) {
            self.pump.look();
            if self.members.leave_now(turn) {
                self.pump.forgive(now);
            }
        }
        if self.members.advance(turn) {
            self.pump.forgive(now);
        }
        self.probes.advance(turn, &mut self.jobs);
        self.pump.advance(turn, &mut self.jobs, idle_at);
        let allowed = self.pump.is_idle();
        let jobs = &mut self.jobs;
        self.save_now |= self.scrub.advance(turn, jobs, idle_at, allowed);
        // What was done without asking anybody is seen at once.
        self.save_now |= self.members.take_changed();
    }

    /// What the disk is to remember, as things are now.
    #[must_use]
    pub fn state(&self) -> KeeperState {
        KeeperState {
            states: self.members.states(),
            suspects: self.members.suspects(),
            verify_cursor: self.scrub.cursor(PassKind::Verify),
            scrub_cursor: self.scrub.cursor(PassKind::Scrub),
        }
    }

    fn save(&mut self, turn: &mut Turn<'_>) {
        let state = self.state();
        let at_once = std::mem::take(&mut self.save_now);
        if state == self.saved {
            self.save_at = None;
        } else if at_once || self.save_at.is_some_and(|at| at <= turn.now) {
            self.saved = state;
            self.save_at = None;
            turn.actions.push(KeeperAction::Save(state));
        } else if self.save_at.is_none() {
            self.save_at = Some(turn.now.after(SAVE_DELAY));
        }
    }
}

#[cfg(test)]
mod tests;
