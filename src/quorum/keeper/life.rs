// SPDX-License-Identifier: Apache-2.0
//! The states of a replica (CONSISTENCY section 10), and the one function that changes them.
//!
//! ```text
//!                 FellBehind
//!      +--------+ ----------> +---------+   Returned   +---------+
//!      | InSync |             | Syncing | <----------- | Missing |
//!      +--------+ <---------- +---------+              +---------+
//!        |    |    CaughtUp     |    |                   ^  ^  ^
//!        |    |                 |    |       Kicked      |  |  |
//!        |    |                 |    +-------------------+  |  |
//!        |    +-----------------|---------------------------+  |
//!        |                      |            Kicked            |
//!        |      Condemned       v                              |
//!        +-----------------> +--------+        Cleared         |
//!                            | Failed | -----------------------+
//!                            +--------+
//!                                | Retired
//!                                v
//!                            +---------+
//!                            | Removed |
//!                            +---------+
//! ```

/// State of a replica. It votes where it is up and not behind, whatever its name.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum ReplicaState {
    /// Up, and behind nowhere.
    InSync,
    /// Up, and behind somewhere.
    Syncing,
    /// Not up; opened again with a growing delay.
    Missing,
    /// Not up, and not opened before the operator clears it.
    Failed,
    /// Not a member any more.
    Removed,
}

/// What changes a state.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Change {
    /// It lacks a write somewhere.
    FellBehind,
    /// It lacks nothing, durably.
    CaughtUp,
    /// It is not up any more.
    Kicked,
    /// It is not up any more, and not to come back: its budget is spent, or the operator says so.
    Condemned,
    /// It was opened, is fenced, and no operation of before is outstanding.
    Returned,
    /// The operator wants it back.
    Cleared,
    /// It is taken out of the set.
    Retired,
}

impl ReplicaState {
    /// The state after `change`; `None`: the diagram has no such arrow.
    #[must_use]
    pub fn try_after(self, change: Change) -> Option<Self> {
        match (self, change) {
            (Self::InSync, Change::FellBehind) | (Self::Missing, Change::Returned) => {
                Some(Self::Syncing)
            }
            (Self::Syncing, Change::CaughtUp) => Some(Self::InSync),
            (Self::InSync | Self::Syncing, Change::Kicked) | (Self::Failed, Change::Cleared) => {
                Some(Self::Missing)
            }
            (Self::InSync | Self::Syncing, Change::Condemned) => Some(Self::Failed),
            (Self::Failed, Change::Retired) => Some(Self::Removed),
            (
                Self::InSync | Self::Syncing | Self::Missing | Self::Failed | Self::Removed,
                Change::FellBehind
                | Change::CaughtUp
                | Change::Kicked
                | Change::Condemned
                | Change::Returned
                | Change::Cleared
                | Change::Retired,
            ) => None,
        }
    }

    /// The state after `change`.
    ///
    /// # Panics
    /// If the diagram has no such arrow: a broken invariant.
    #[must_use]
    pub fn after(self, change: Change) -> Self {
        self.try_after(change)
            .unwrap_or_else(|| panic!("a replica that is {self:?} cannot change by {change:?}"))
    }

    /// Whether a replica in this state is open and answering.
    #[must_use]
    pub fn is_up(self) -> bool {
        matches!(self, Self::InSync | Self::Syncing)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATES: [ReplicaState; 5] = [
        ReplicaState::InSync,
        ReplicaState::Syncing,
        ReplicaState::Missing,
        ReplicaState::Failed,
        ReplicaState::Removed,
    ];

    /// One row a change, one column a state; `-` where the diagram has no arrow.
    const TABLE: [(Change, &str); 7] = [
        (Change::FellBehind, "S----"),
        (Change::CaughtUp, "-I---"),
        (Change::Kicked, "MM---"),
        (Change::Condemned, "FF---"),
        (Change::Returned, "--S--"),
        (Change::Cleared, "---M-"),
        (Change::Retired, "---R-"),
    ];

    #[test]
    fn changes_are_those_of_the_diagram_and_no_others() {
        for (change, row) in TABLE {
            for (state, cell) in STATES.into_iter().zip(row.chars()) {
                let expected = STATES
                    .into_iter()
                    .find(|state| format!("{state:?}").starts_with(cell));
                assert_eq!(state.try_after(change), expected, "{state:?} by {change:?}");
                let result = std::panic::catch_unwind(|| state.after(change));
                assert_eq!(result.ok(), expected, "{state:?} by {change:?}");
            }
        }
    }
}
