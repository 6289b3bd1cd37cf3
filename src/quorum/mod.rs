// SPDX-License-Identifier: Apache-2.0
//! The voting core: a state machine without I/O.
//!
//! A lane is handed events and a time and appends actions; what lanes must agree on is shared,
//! small and in one place. There is no file, socket, thread, clock, random source or unordered
//! map in here, so that the same logic runs under io_uring and in a seeded simulator.
//!
//! - [`Lane`]: requests in flight, settlements, resyncs of extents, flush runs.
//! - [`Keeper`]: what is maintained and when; it sends requests to a lane like a guest.
//! - [`Shared`]: [`Membership`] (who is current where) with [`Marks`] (D and B, wanted and
//!   durable), [`Order`] (range locks), [`Unresolved`] (U), flush runs, and [`Activity`] (what was
//!   flushed since it was written).
//! - [`Policy`], [`Geometry`]: how the disk decides, and its shape.

mod activity;
mod buffers;
mod event;
mod flush_gate;
mod keeper;
mod lane;
mod marks;
mod membership;
mod mutation;
mod order;
mod policy;
mod shared;
mod slab;
mod sync;
mod unresolved;
mod vote;

pub use activity::Activity;
pub use buffers::{Buffers, Purpose};
pub use event::{
    Action, BadCause, BehindCause, BufferId, During, Event, FlushEnd, KickCause, LaneId,
    LockTicket, OpId, Operation, OperationKind, Outcome, Report, Request, RequestId, Status, Tag,
    Wakeup,
};
pub use keeper::{
    Change, Command, Keeper, KeeperAction, KeeperConfig, KeeperEvent, KeeperReport, KeeperStart,
    KeeperState, KeeperStatus, PassKind, PassStatus, REQUESTS_MAX, Refusal, ReplicaState,
    ReplicaStatus, ScrubCounts, StateCause,
};
pub use lane::{Lane, LaneCounters};
pub use marks::{Bitmap, Marks, PAGE_EXTENTS, PAGE_WORDS, PageBits, PageName};
pub use membership::{Intent, Marked, MarkedWhereDirty, Membership, Settled};
#[cfg(test)]
pub use mutation::Mutation;
pub use order::{LockMode, Order};
pub use policy::{Geometry, Policy, PolicyError, ReadPattern};
pub use shared::{CrashTie, Shared};
pub use unresolved::Unresolved;
pub use vote::{Ballot, Ballots, Rule};
