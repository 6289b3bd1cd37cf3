// SPDX-License-Identifier: Apache-2.0
//! Deliberate breaches of single rules of the record, in test builds only, as in
//! `quorum/mutation.rs`: the simulator must notice each of them.

/// A rule to break.
#[cfg(test)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RecordMutation {
    /// R1: an update counts as durable when one copy has it.
    OneCopyIsEnough,
    /// R4: a page is written over its newest image instead of the older one.
    SlotInUseWritten,
    /// R5: pages are taken from the newest copy alone, not from all of them.
    CopiesNotMerged,
    /// R6: marks are told durable when their images are submitted.
    DurableWhenSubmitted,
    /// R7: a copy is left out without raising the epoch, and an opening does not raise it.
    EpochNotRaised,
    /// Z3: an opening passes over what a superblock says of a growth under way.
    GrowthForgotten,
}

/// Whether this build breaks the named rule: never, outside of tests. `$owner` has the field
/// `mutation` in test builds.
macro_rules! broken {
    ($owner:expr, $mutation:ident) => {{
        #[cfg(test)]
        {
            matches!(
                $owner.mutation,
                Some($crate::record::mutation::RecordMutation::$mutation)
            )
        }
        #[cfg(not(test))]
        {
            let _ = &$owner;
            false
        }
    }};
}
pub(super) use broken;
