// SPDX-License-Identifier: Apache-2.0
//! The life of the replicas: who leaves and why, who comes back and when (CONSISTENCY section 10).

use std::time::Duration;

use super::super::event::KickCause;
use super::super::marks::Bitmap;
use super::super::shared::Shared;
use super::budget::{Budgets, Fault, Spent};
use super::copies::{self, can_spare};
use super::jobs::Turn;
use super::life::{Change, ReplicaState};
use super::progress::Resync;
use super::rate::Backoff;
use super::{KeeperAction, KeeperConfig, KeeperReport, KeeperStart, Refusal, StateCause};
use crate::units::{REPLICAS_MAX, ReplicaId, ReplicaSet, Time};

/// From one look to the next whether behind marks, or their clearing, are durable.
const MARKS_INTERVAL: Duration = Duration::from_millis(100);

/// How far the return of a replica that is Missing has come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Reopening {
    /// It is to be opened at this time, or when it is detached.
    At(Time),
    /// It is being opened.
    Asked,
    /// It was opened but is another one: it is admitted once it is behind everywhere, for good.
    Marking {
        /// The last of the marks.
        number: u64,
        /// When to look again.
        look_at: Time,
    },
}

/// What is known of one replica beyond the membership.
struct Member {
    state: ReplicaState,
    budgets: Budgets,
    /// While it is Missing.
    reopening: Option<Reopening>,
    backoff: Backoff,
    up_since: Time,
    /// No operation from before its last kick is outstanding.
    detached: bool,
    /// It should leave, but is needed.
    leaving: Option<KickCause>,
    resync: Resync,
    /// It lacks nothing; it is InSync once the record says so as well.
    caught_up: Option<CaughtUp>,
}

/// A replica that is Syncing lacks nothing any more.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct CaughtUp {
    /// Its behind marks are clear in the record once the marks up to this number are durable.
    number: u64,
    /// When to look again.
    look_at: Time,
}

/// See the module.
pub(super) struct Members {
    each: Vec<Member>,
    backoff: Backoff,
    suspects: ReplicaSet,
    /// A state has changed that is to be saved at once.
    changed: bool,
}

/// Whether a replica that leaves for this reason stays away until the operator clears it.
fn is_final(why: KickCause) -> bool {
    match why {
        KickCause::Budget | KickCause::Operator => true,
        KickCause::Hung | KickCause::FlushFailed(_) | KickCause::Vanished | KickCause::Absent => {
            false
        }
    }
}

impl Members {
    pub(super) fn new(config: &KeeperConfig, start: &KeeperStart, shared: &Shared) -> Self {
        let backoff = Backoff::new(config.reopen_delay_min, config.reopen_delay_max);
        let membership = &shared.membership;
        let member = |replica: ReplicaId| {
            let saved = start.states[replica.index()];
            let state = if membership.up().contains(replica) {
                if membership.behind_extents(replica) == 0 {
                    ReplicaState::InSync
                } else {
                    ReplicaState::Syncing
                }
            } else if matches!(saved, ReplicaState::Failed | ReplicaState::Removed) {
                saved
            } else {
                ReplicaState::Missing
            };
            let missing = state == ReplicaState::Missing;
            Member {
                state,
                budgets: Budgets::new(config),
                reopening: missing.then_some(Reopening::At(Time::default())),
                backoff,
                up_since: Time::default(),
                detached: true,
                leaving: None,
                resync: Resync::default(),
                caught_up: None,
            }
        };
        let suspects = start.suspects.intersection(membership.replicas());
        shared.set_suspects(suspects);
        Self {
            each: membership.replicas().iter().map(member).collect(),
            backoff,
            suspects,
            changed: false,
        }
    }

    fn of(&mut self, replica: ReplicaId) -> &mut Member {
        &mut self.each[replica.index()]
    }

    pub(super) fn contains(&self, replica: ReplicaId) -> bool {
        replica.index() < self.each.len()
    }

    pub(super) fn state(&self, replica: ReplicaId) -> ReplicaState {
        self.each[replica.index()].state
    }

    /// States by slot; those beyond N as in [`KeeperStart::fresh`](super::KeeperState::fresh).
    pub(super) fn states(&self) -> [ReplicaState; REPLICAS_MAX] {
        let mut states = [ReplicaState::InSync; REPLICAS_MAX];
        for (state, member) in states.iter_mut().zip(&self.each) {
            *state = member.state;
        }
        states
    }

    pub(super) fn suspects(&self) -> ReplicaSet {
        self.suspects
    }

    /// When the replica is opened again, as far as that is known.
    pub(super) fn reopens_at(&self, replica: ReplicaId) -> Option<Time> {
        match self.each[replica.index()].reopening {
            Some(Reopening::At(time)) => Some(time),
            Some(Reopening::Asked | Reopening::Marking { .. }) | None => None,
        }
    }

    /// Bytes brought up to date since the replica began to lack something.
    pub(super) fn resynced_bytes(&self, shared: &Shared, replica: ReplicaId) -> u64 {
        let resync = &self.each[replica.index()].resync;
        resync.bytes_done(shared, replica)
    }

    /// Whether a state has changed that is to be saved at once.
    pub(super) fn take_changed(&mut self) -> bool {
        std::mem::take(&mut self.changed)
    }

    pub(super) fn deadline(&self) -> Option<Time> {
        let times = self.each.iter().filter_map(|member| {
            let syncing = member.state == ReplicaState::Syncing;
            match member.reopening {
                Some(Reopening::At(time)) => member.detached.then_some(time),
                Some(Reopening::Marking { look_at, .. }) => Some(look_at),
                Some(Reopening::Asked) => None,
                None => match member.caught_up {
                    Some(caught_up) => Some(caught_up.look_at),
                    None => syncing.then_some(member.resync.tell_at()),
                },
            }
        });
        times.min()
    }

    fn change(&mut self, turn: &mut Turn<'_>, replica: ReplicaId, by: Change, why: StateCause) {
        let member = self.of(replica);
        let from = member.state;
        let to = from.after(by);
        member.state = to;
        // How much a replica lacks is in the marks; that alone can wait for a while.
        self.changed |= from.is_up() != to.is_up() || !from.is_up();
        turn.actions.push(KeeperAction::Report(KeeperReport::State {
            replica,
            from,
            to,
            why,
        }));
    }

    /// Counts a fault of a replica that is up. Returns whether it left because of it.
    pub(super) fn fault(&mut self, turn: &mut Turn<'_>, replica: ReplicaId, fault: Fault) -> bool {
        let member = self.of(replica);
        if !member.state.is_up() {
            return false;
        }
        member.budgets.note(turn.now, fault);
        // Whether it can be spared by now is not looked at with every fault.
        let known = member.leaving.is_some_and(is_final);
        self.judge(turn, replica) == Spent::All
            && !known
            && self.leave(turn, replica, KickCause::Budget)
    }

    /// Looks at the budgets, and doubts the replica if they say so.
    fn judge(&mut self, turn: &mut Turn<'_>, replica: ReplicaId) -> Spent {
        let spent = self.of(replica).budgets.spent(turn.now);
        if spent != Spent::Little && !self.suspects.contains(replica) {
            self.suspects.insert(replica);
            turn.shared.set_suspects(self.suspects);
            self.changed = true;
            let report = KeeperReport::Suspect { replica };
            turn.actions.push(KeeperAction::Report(report));
        }
        spent
    }

    /// The replica is to leave: it is kicked if the disk can do without it, otherwise when it can.
    /// Returns whether it was kicked.
    pub(super) fn leave(
        &mut self,
        turn: &mut Turn<'_>,
        replica: ReplicaId,
        why: KickCause,
    ) -> bool {
        let membership = &turn.shared.membership;
        let member = &mut self.each[replica.index()];
        if !member.state.is_up() {
            return false;
        }
        // Of several reasons a final one counts.
        let why = member.leaving.filter(|&old| is_final(old)).unwrap_or(why);
        if membership.up().contains(replica) && !can_spare(turn.shared, replica) {
            if member.leaving.replace(why).is_none() {
                let report = KeeperReport::Kept { replica, why };
                turn.actions.push(KeeperAction::Report(report));
            }
            return false;
        }
        if membership.kick(replica).is_none() {
            // A lane was quicker, and is about to say so.
            member.leaving = Some(why);
            return false;
        }
        turn.actions.push(KeeperAction::Kicked { replica, why });
        turn.actions.push(KeeperAction::Record);
        self.left(turn, replica, why);
        true
    }

    /// Tries again with those that should leave and could not. Returns whether one did.
    pub(super) fn leave_now(&mut self, turn: &mut Turn<'_>) -> bool {
        let mut any = false;
        for replica in turn.shared.membership.replicas().iter() {
            let member = self.of(replica);
            let Some(why) = member.leaving else { continue };
            if why == KickCause::Budget && member.budgets.spent(turn.now) != Spent::All {
                member.leaving = None;
            } else {
                any |= self.leave(turn, replica, why);
            }
        }
        any
    }

    /// A lane kicked the replica.
    pub(super) fn kicked(&mut self, turn: &mut Turn<'_>, replica: ReplicaId, why: KickCause) {
        let up = turn.shared.membership.up().contains(replica);
        if !up && self.state(replica).is_up() {
            self.left(turn, replica, why);
        }
    }

    /// The replica is not up any more.
    fn left(&mut self, turn: &mut Turn<'_>, replica: ReplicaId, why: KickCause) {
        let member = self.of(replica);
        let mut wish = member.leaving.take().filter(|&why| is_final(why));
        if is_final(why) {
            wish = Some(why);
        } else {
            member.budgets.note(turn.now, Fault::Kick);
            if self.judge(turn, replica) == Spent::All {
                wish = wish.or(Some(KickCause::Budget));
            }
        }
        // One that is needed comes back, and is looked at again.
        let spared = can_spare(turn.shared, replica);
        let (change, why) = match wish {
            Some(wish) if spared => (Change::Condemned, wish),
            Some(_) | None => (Change::Kicked, why),
        };
        self.change(turn, replica, change, StateCause::Kicked(why));
        let member = self.of(replica);
        member.leaving = wish.filter(|_| !spared);
        member.detached = false;
        member.resync = Resync::new(turn.shared, replica);
        member.caught_up = None;
        if turn.now.since(member.up_since) >= member.backoff.most() {
            member.backoff.reset();
        }
        if member.state == ReplicaState::Missing {
            let at = turn.now.after(member.backoff.take());
            member.reopening = Some(Reopening::At(at));
        }
    }

    /// No operation from before the last kick is outstanding.
    pub(super) fn detached(&mut self, replica: ReplicaId) {
        self.of(replica).detached = true;
    }

    /// The replica was opened.
    pub(super) fn opened(&mut self, turn: &mut Turn<'_>, replica: ReplicaId, same: bool) {
        let member = self.of(replica);
        let asked = member.reopening == Some(Reopening::Asked);
        assert!(asked, "replicas are opened when the keeper asks for it");
        if same {
            self.admit(turn, replica, StateCause::Reopened);
            return;
        }
        // It must not vote for what it never had, nor after a restart.
        let marks = turn.shared.membership.marks();
        marks.set_all(Bitmap::Behind(replica));
        turn.actions.push(KeeperAction::Record);
        let (number, look_at) = (marks.requested(), turn.now);
        member.reopening = Some(Reopening::Marking { number, look_at });
    }

    /// The replica could not be opened.
    pub(super) fn open_failed(&mut self, turn: &Turn<'_>, replica: ReplicaId) {
        let member = self.of(replica);
        let asked = member.reopening == Some(Reopening::Asked);
        assert!(asked, "replicas are opened when the keeper asks for it");
        let at = turn.now.after(member.backoff.take());
        member.reopening = Some(Reopening::At(at));
    }

    fn admit(&mut self, turn: &mut Turn<'_>, replica: ReplicaId, why: StateCause) {
        let member = self.of(replica);
        assert!(member.detached, "nothing of before is outstanding");
        member.reopening = None;
        member.up_since = turn.now;
        member.resync = Resync::new(turn.shared, replica);
        turn.shared.membership.admit(replica);
        turn.actions.push(KeeperAction::Admitted { replica });
        self.change(turn, replica, Change::Returned, why);
    }

    /// The operator clears the replica.
    pub(super) fn clear(
        &mut self,
        turn: &mut Turn<'_>,
        config: &KeeperConfig,
        replica: ReplicaId,
    ) -> Result<(), Refusal> {
        let backoff = self.backoff;
        let member = self.of(replica);
        if member.state == ReplicaState::Removed {
            return Err(Refusal::NoSuchReplica);
        }
        member.budgets = Budgets::new(config);
        member.leaving = member.leaving.filter(|&why| !is_final(why));
        member.backoff = backoff;
        let soon = Some(Reopening::At(turn.now));
        match member.state {
            ReplicaState::Failed => {
                member.reopening = soon;
                self.change(turn, replica, Change::Cleared, StateCause::Cleared);
            }
            ReplicaState::Missing if matches!(member.reopening, Some(Reopening::At(_))) => {
                member.reopening = soon;
            }
            ReplicaState::InSync
            | ReplicaState::Syncing
            | ReplicaState::Missing
            | ReplicaState::Removed => {}
        }
        if self.suspects.contains(replica) {
            self.suspects.remove(replica);
            turn.shared.set_suspects(self.suspects);
            self.changed = true;
        }
        Ok(())
    }

    /// The operator wants to do without the replica.
    pub(super) fn fail(&mut self, turn: &mut Turn<'_>, replica: ReplicaId) -> Result<(), Refusal> {
        if !self.state(replica).is_up() {
            return Err(Refusal::NotUp);
        }
        if turn.shared.membership.up().contains(replica) && !can_spare(turn.shared, replica) {
            return Err(Refusal::Needed);
        }
        self.leave(turn, replica, KickCause::Operator);
        Ok(())
    }

    /// The operator names `replica`'s copy the right one wherever no copy is current and none can
    /// come to be: everybody who may come back is behind. It is resolved, then the others are
    /// brought up to date from it. Returns in how many extents.
    pub(super) fn force_current(
        &mut self,
        turn: &mut Turn<'_>,
        replica: ReplicaId,
    ) -> Result<u64, Refusal> {
        let shared = turn.shared;
        let membership = &shared.membership;
        if !membership.up().contains(replica) {
            return Err(Refusal::NotUp);
        }
        let gone = |r: &ReplicaId| {
            let state = self.state(*r);
            matches!(state, ReplicaState::Failed | ReplicaState::Removed)
        };
        let gone: ReplicaSet = membership.replicas().iter().filter(gone).collect();
        let extents = copies::force(shared, replica, gone);
        if extents == 0 {
            return Err(Refusal::NothingLost);
        }
        turn.actions.push(KeeperAction::Record);
        turn.actions.push(KeeperAction::MembersChanged);
        Ok(extents)
    }

    /// Does what is due. Returns whether somebody was admitted.
    pub(super) fn advance(&mut self, turn: &mut Turn<'_>) -> bool {
        let mut admitted = false;
        for replica in turn.shared.membership.replicas().iter() {
            let member = self.of(replica);
            match member.reopening {
                Some(Reopening::At(time)) if member.detached && time <= turn.now => {
                    member.reopening = Some(Reopening::Asked);
                    turn.actions.push(KeeperAction::Reopen { replica });
                }
                Some(Reopening::Marking { number, .. }) => {
                    if turn.shared.membership.marks().is_settled(number) {
                        self.admit(turn, replica, StateCause::Replaced);
                        admitted = true;
                    } else {
                        let look_at = turn.now.after(MARKS_INTERVAL);
                        member.reopening = Some(Reopening::Marking { number, look_at });
                    }
                }
                Some(Reopening::At(_) | Reopening::Asked) | None => {}
            }
            self.watch(turn, replica);
        }
        admitted
    }

    /// Follows how much a replica that is up lacks.
    fn watch(&mut self, turn: &mut Turn<'_>, replica: ReplicaId) {
        let membership = &turn.shared.membership;
        // One that was kicked a moment ago is heard of soon.
        if !self.state(replica).is_up() || !membership.up().contains(replica) {
            return;
        }
        let lacks = membership.behind_extents(replica) > 0;
        if lacks && self.state(replica) == ReplicaState::InSync {
            self.change(turn, replica, Change::FellBehind, StateCause::Behind);
        }
        if self.state(replica) == ReplicaState::InSync {
            return;
        }
        if !lacks {
            if !self.is_caught_up(turn, replica) {
                return;
            }
            let next = Resync::new(turn.shared, replica);
            let resync = std::mem::replace(&mut self.of(replica).resync, next);
            self.change(turn, replica, Change::CaughtUp, StateCause::CaughtUp);
            if let Some(report) = resync.done(turn.shared, replica) {
                turn.actions.push(KeeperAction::Report(report));
            }
            return;
        }
        self.of(replica).caught_up = None;
        if let Some(report) = self.of(replica).resync.told(turn, replica) {
            turn.actions.push(KeeperAction::Report(report));
        }
    }

    /// Whether the record, too, knows that the replica lacks nothing (CONSISTENCY section 10: InSync
    /// is durable). Clears are lazy; this one is waited for.
    fn is_caught_up(&mut self, turn: &mut Turn<'_>, replica: ReplicaId) -> bool {
        let marks = turn.shared.membership.marks();
        let look_at = turn.now.after(MARKS_INTERVAL);
        let behind = Bitmap::Behind(replica);
        let member = self.of(replica);
        // It may have fallen behind and caught up again since.
        let asked = member.caught_up.map(|caught_up| caught_up.number);
        match asked.filter(|&number| marks.last_asked(behind) < number) {
            Some(number) if marks.is_settled(number) => member.caught_up = None,
            Some(number) => member.caught_up = Some(CaughtUp { number, look_at }),
            None => {
                member.caught_up = marks
                    .ask_clears()
                    .map(|number| CaughtUp { number, look_at });
                if member.caught_up.is_some() {
                    turn.actions.push(KeeperAction::Record);
                }
            }
        }
        member.caught_up.is_none()
    }
}
