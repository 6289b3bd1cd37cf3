// SPDX-License-Identifier: Apache-2.0
//! Deliberate breaches of single rules. They exist in test builds only: the simulator runs with
//! each of them and must notice, which is the proof that it looks.

/// A rule to break.
#[cfg(test)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mutation {
    /// V1: replicas that are behind vote.
    BehindVotes,
    /// V2: a read is answered one vote short of T.
    EarlyReplyBelowThreshold,
    /// V4: a replica that cannot read one block of a range has no vote in all of it.
    OneBadBlockSilences,
    /// V5: a read without a winner fails at once, without arbitration.
    NoArbitration,
    /// V7: ballots that arrive after the reply are not looked at.
    LateBallotsIgnored,
    /// V7: buffers are given back while operations still use them.
    BuffersGivenBackEarly,
    /// L1: writes take no lock.
    WritesUnordered,
    /// L3: the lock of a write is released before its reply is published.
    LockReleasedBeforePublication,
    /// Q3: a complete write that is published later keeps settlements out until then.
    DeferredIgnored,
    /// W3: writes also go to replicas that are behind, and make them current again.
    WriteClearsBehind,
    /// W4: a write is acknowledged with fewer than T copies.
    AcknowledgeBelowThreshold,
    /// W5: a replica that failed a write stays current.
    FailedWriteNotMarked,
    /// W6: a replica that is late stays current although nobody waits for it.
    LateWriteNotMarked,
    /// W7: a write with fewer than T copies is not put into U.
    FailedWriteNotUnresolved,
    /// F2: a flush succeeds although a replica without it stays current.
    FailedFlushNotMarked,
    /// I5: a flush succeeds although fewer than T of the replicas flushed are current in an extent.
    FlushOfCopiesBehind,
    /// W2: a write does not wait until its extent is dirty for good.
    WriteBeforeIntent,
    /// W4: a write is acknowledged before the behind marks of the others are durable.
    AcknowledgeBeforeBehind,
    /// W8: an extent is marked clean although its last writes were not flushed.
    CleanBeforeFlush,
    /// F3: a replica whose flush failed counts as flushed with its next good flush.
    FlushErrorForgotten,
    /// Y1: what was resolved is shown before it is flushed.
    ResolveNotFlushed,
    /// Y3: after a crash the first replica is believed, not the largest group.
    FirstReplicaBelieved,
    /// Y5: a replica that was resynced is current before it is flushed.
    ResyncNotFlushed,
    /// Y5: a replica is current after a resync although it was kicked meanwhile.
    ResyncCounterIgnored,
    /// S4: after a crash nothing is resolved.
    DirtyNotResolved,
    /// Y4: a repair is not read back.
    RepairNotReadBack,
    /// Y2: a repair is written after the lock is released.
    RepairUnlocked,
}

/// Whether this build breaks one of the named rules: never, outside of tests.
macro_rules! broken {
    ($shared:expr, $($mutation:ident)|+) => {{
        #[cfg(test)]
        {
            matches!($shared.mutation, $(Some($crate::quorum::Mutation::$mutation))|+)
        }
        #[cfg(not(test))]
        {
            let _ = &$shared;
            false
        }
    }};
}
pub(super) use broken;
