// SPDX-License-Identifier: Apache-2.0
//! What the keeper is told and what it asks for: [`KeeperEvent`] in, [`KeeperAction`] out.

use std::time::Duration;

use super::super::event::{KickCause, Report, Request, Status, Tag};
use super::life::ReplicaState;
use crate::units::{REPLICAS_MAX, ReplicaId, ReplicaSet};

/// What maintenance may cost, and how patient it is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct KeeperConfig {
    /// Bytes of the disk resolved or resynced in a second while the guest is active (rule Y7);
    /// 0: no limit. When the guest is idle there is none.
    pub resync_bytes_per_s: u64,
    /// Bytes read from each replica in a second by scrub and verify (rule Y6); 0: no limit.
    pub scrub_bytes_per_s: u64,
    /// From the end of a scrub to the next one; `None`: only when asked.
    pub scrub_interval: Option<Duration>,
    /// From the start to the first one; `None`: the interval.
    pub scrub_first: Option<Duration>,
    /// Whether scrubs that begin on their own, or are resumed at a start, rewrite dissenters.
    pub scrub_repairs: bool,
    /// From one look for extents that may be called clean to the next (rule W8).
    pub sweep_interval: Duration,
    /// How long an extent was not written to before it is called clean (rule W8).
    pub idle_before_clean: Duration,
    /// How long an extent stays dirty for want of a flush before the keeper flushes, and the least
    /// time between two such flushes (rule W8).
    pub flush_interval: Duration,
    /// From the answer of a lagging replica to the next probe of it (rule W6).
    pub probe_interval: Duration,
    /// What counts as an answer in time to a probe, in nanoseconds.
    pub prompt_ns: u64,
    /// From the loss of a replica to the first attempt to open it; doubled with each attempt that
    /// fails. It is also the delay before what could not be resynced is tried again.
    pub reopen_delay_min: Duration,
    /// Where doubling ends.
    pub reopen_delay_max: Duration,
    /// Failed writes in 60 s that make a replica Failed; 0: never.
    pub write_errors_max: u32,
    /// Kicks in 60 s that do; 0: never.
    pub kicks_max: u32,
    /// Repaired sectors in 24 h that do; 0: never.
    pub repairs_max: u32,
}

impl Default for KeeperConfig {
    /// What the rules say (CONSISTENCY sections 5, 10 and 11). No scrub begins on its own.
    fn default() -> Self {
        Self {
            resync_bytes_per_s: 128 << 20,
            scrub_bytes_per_s: 64 << 20,
            scrub_interval: None,
            scrub_first: None,
            scrub_repairs: true,
            sweep_interval: Duration::from_secs(5),
            idle_before_clean: Duration::from_secs(5),
            flush_interval: Duration::from_secs(30),
            probe_interval: Duration::from_millis(500),
            prompt_ns: 20_000_000,
            reopen_delay_min: Duration::from_secs(1),
            reopen_delay_max: Duration::from_secs(60),
            write_errors_max: 16,
            kicks_max: 4,
            repairs_max: 256,
        }
    }
}

/// What the disk remembers for the keeper, in the superblock of its record (rule R3).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct KeeperState {
    /// State of each slot; those beyond N mean nothing.
    pub states: [ReplicaState; REPLICAS_MAX],
    /// Replicas that never decide a tie (CONSISTENCY section 10).
    pub suspects: ReplicaSet,
    /// Every sector below this one was verified since the record was made (rule S5); `None`: all
    /// were, or need not be.
    pub verify_cursor: Option<u64>,
    /// A scrub is under way and has compared every sector below this one; `None`: no scrub is.
    pub scrub_cursor: Option<u64>,
}

impl KeeperState {
    /// A disk of which nothing is known but that it need not be verified.
    #[must_use]
    pub fn fresh() -> Self {
        Self {
            states: [ReplicaState::InSync; REPLICAS_MAX],
            suspects: ReplicaSet::EMPTY,
            verify_cursor: None,
            scrub_cursor: None,
        }
    }
}

/// What the keeper begins with: what was saved. Of the states only Failed and Removed matter, and
/// only for replicas that are not up; all else follows from the membership.
pub type KeeperStart = KeeperState;

/// What the keeper is told.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum KeeperEvent {
    /// Nothing but the passing of time. Owed when [`Keeper::deadline`](super::Keeper::deadline)
    /// has passed; harmless at any other moment.
    Tick,
    /// The reply to a [`KeeperAction::Request`]. Reports that the lane made before it come first.
    Replied {
        /// From the request.
        tag: Tag,
        /// How it ended.
        status: Status,
    },
    /// A lane kicked the replica.
    Kicked {
        /// Whom.
        replica: ReplicaId,
        /// Why.
        why: KickCause,
    },
    /// The file or device of an up replica is not there any more, or is another one.
    Vanished {
        /// Whose.
        replica: ReplicaId,
    },
    /// No operation from before the last kick of the replica is outstanding anywhere, and nobody
    /// will start one before it is admitted again. Owed once after every kick.
    Detached {
        /// Which replica.
        replica: ReplicaId,
    },
    /// The answer to [`KeeperAction::Reopen`]: the replica is open, locked and of the right size.
    Opened {
        /// Which replica.
        replica: ReplicaId,
        /// Whether it is the one that left. Otherwise it lacks everything.
        same: bool,
    },
    /// The answer to [`KeeperAction::Reopen`]: not yet.
    OpenFailed {
        /// Which replica.
        replica: ReplicaId,
    },
    /// Any report of any lane.
    Report(Report),
    /// How many requests guests have made so far, told about once a second or more often: it tells
    /// active from idle.
    GuestRequests {
        /// Only grows.
        total: u64,
    },
    /// What the operator wants.
    Command(Command),
}

/// What an operator may ask of the keeper.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Command {
    /// Begin a scrub from the first sector; after a verify that is under way. If a scrub is under
    /// way, it goes on like this.
    Scrub {
        /// Rewrite dissenters, or only report them.
        repair: bool,
    },
    /// End the scrub that is under way. A verify goes on.
    StopScrub,
    /// Forget what the replica did wrong. One that is Failed is Missing from now on, and opened.
    Clear {
        /// Which replica.
        replica: ReplicaId,
    },
    /// Where no copy is current any more, take this one's, which must be up (CONSISTENCY section
    /// 10, last paragraph).
    ForceCurrent {
        /// Whose.
        replica: ReplicaId,
    },
    /// Do not use the replica any more until it is cleared.
    Fail {
        /// Which replica.
        replica: ReplicaId,
    },
}

/// What the keeper asks for. Actions are carried out in order.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum KeeperAction {
    /// Hand the request to the maintenance lane; there are at most
    /// [`REQUESTS_MAX`](super::REQUESTS_MAX) at a time. [`KeeperEvent::Replied`] is owed.
    Request {
        /// Comes back with the reply.
        tag: Tag,
        /// What to do.
        request: Request,
    },
    /// The keeper kicked the replica. Every lane is owed
    /// [`Wakeup::MembersChanged`](super::super::Wakeup::MembersChanged);
    /// [`KeeperEvent::Detached`] is owed.
    Kicked {
        /// Whom.
        replica: ReplicaId,
        /// Why.
        why: KickCause,
    },
    /// Open the replica, elsewhere; [`KeeperEvent::Opened`] or [`KeeperEvent::OpenFailed`] is owed.
    Reopen {
        /// Which replica.
        replica: ReplicaId,
    },
    /// The replica is up again: from this moment on lanes may submit operations on it. Every lane
    /// is owed [`Wakeup::MembersChanged`](super::super::Wakeup::MembersChanged).
    Admitted {
        /// Which replica.
        replica: ReplicaId,
    },
    /// Who is waited for, or current, has changed: every lane is owed
    /// [`Wakeup::MembersChanged`](super::super::Wakeup::MembersChanged).
    MembersChanged,
    /// The keeper has set or cleared marks: the recorder may have something to write.
    Record,
    /// Something people should know.
    Report(KeeperReport),
    /// What the disk is to remember from now on; in its superblock, after the marks that are set.
    Save(KeeperState),
}

/// Something people should know.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum KeeperReport {
    /// A replica changed its state.
    State {
        /// Which one.
        replica: ReplicaId,
        /// What it was.
        from: ReplicaState,
        /// What it is.
        to: ReplicaState,
        /// The reason.
        why: StateCause,
    },
    /// The replica is doubted: half of a budget is spent. It votes but never decides a tie.
    Suspect {
        /// Which replica.
        replica: ReplicaId,
    },
    /// The replica should leave, but would take the last current copy of an extent with it, or
    /// leave fewer than T replicas up. It leaves when that has changed.
    Kept {
        /// Which replica.
        replica: ReplicaId,
        /// Why it should leave.
        why: KickCause,
    },
    /// The resync of a replica begins, or there is much more to do than there was.
    ResyncBegun {
        /// Which replica.
        replica: ReplicaId,
        /// Bytes in extents where it is behind.
        bytes_left: u64,
    },
    /// The resync of a replica goes on; told every ten seconds.
    ResyncProgress {
        /// Which replica.
        replica: ReplicaId,
        /// Bytes in extents where it is behind.
        bytes_left: u64,
        /// Bytes in extents where it is not any more, since the resync began.
        bytes_done: u64,
    },
    /// The replica is behind nowhere.
    ResyncDone {
        /// Which replica.
        replica: ReplicaId,
        /// Bytes in extents that were brought up to date since the resync began.
        bytes_done: u64,
    },
    /// A lagging replica answers in time again.
    Prompt {
        /// Which replica.
        replica: ReplicaId,
    },
    /// A pass over the disk begins.
    PassBegun {
        /// Which kind.
        kind: PassKind,
        /// From this sector on.
        sector: u64,
        /// Whether dissenters are rewritten.
        repair: bool,
    },
    /// A pass has come to the end of the disk.
    PassDone {
        /// Which kind.
        kind: PassKind,
        /// What it met.
        counts: ScrubCounts,
    },
    /// A scrub was ended by the operator.
    PassStopped {
        /// Which kind.
        kind: PassKind,
        /// What it met so far.
        counts: ScrubCounts,
    },
    /// The operator named this replica's copy the right one in extents that had no current copy.
    Forced {
        /// Whose copy.
        replica: ReplicaId,
        /// In how many extents.
        extents: u64,
    },
    /// A command was not carried out.
    Refused {
        /// Which command.
        command: Command,
        /// Why not.
        why: Refusal,
    },
}

/// Why a replica changed its state.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum StateCause {
    /// It lacks writes in some extent.
    Behind,
    /// It is behind nowhere.
    CaughtUp,
    /// It was kicked.
    Kicked(KickCause),
    /// It was opened, and is the replica that left.
    Reopened,
    /// It was opened, but is not the replica that left: it lacks everything.
    Replaced,
    /// The operator cleared it.
    Cleared,
}

/// Why a command was not carried out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Refusal {
    /// There is no such replica.
    NoSuchReplica,
    /// The replica is not up.
    NotUp,
    /// The replica is not needed less than any other: it holds the last current copy of an extent,
    /// or fewer than T replicas would stay up.
    Needed,
    /// No scrub is under way.
    NoScrub,
    /// Every extent has a current copy, or one that may come back.
    NothingLost,
}

/// A reading of the whole disk, all current copies compared (rule Y6).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PassKind {
    /// Once, after images were adopted that had no record (rule S5). Follows the repair policy.
    Verify,
    /// Whenever the operator or the interval says so.
    Scrub,
}

/// What a pass has met, in sectors.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ScrubCounts {
    /// Read from all current copies and settled.
    pub compared: u64,
    /// Of one replica, not what the others hold; once for each such replica.
    pub differing: u64,
    /// Of one replica, not readable; once for each such replica.
    pub unreadable: u64,
    /// Rewritten and read back; once for each replica.
    pub repaired: u64,
    /// Nobody agrees on them.
    pub unresolved: u64,
    /// Passed over: the comparison ended with an error.
    pub failed: u64,
}
