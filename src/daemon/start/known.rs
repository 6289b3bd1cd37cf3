// SPDX-License-Identifier: Apache-2.0
//! How a replica is known again (rules R8, S3).
//!
//! After a clean stop its fingerprint must be what it was. After any other end the time of change
//! is of no use, as our own writes moved it: only another inode shows that it is another file. What
//! was not up at the end of the last run is known only if it had not been opened in that run at
//! all; otherwise what was left of it is anybody's guess: a disk that failed, was kicked and then
//! replaced often has a new file of the same inode number.

use crate::record::{Member, MemberState};
use crate::replica::Fingerprint;

use super::super::fingerprints;
use super::super::warden::Left;

/// What the record says of a replica.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Remembered {
    /// Its state when the record was last written.
    pub state: MemberState,
    /// Of the last clean stop while it was up. In a run in which it was up and that has not ended
    /// cleanly its time is zero. `None`: not taken.
    pub fingerprint: Option<Fingerprint>,
}

/// Why what a replica holds cannot be relied on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Doubt {
    /// Somebody wrote to it.
    Changed,
    /// Another file or device.
    Replaced,
    /// It was not there, or not in use, when it was last written down who is who.
    Unknown,
}

/// What has to be equal for a replica to be the same.
enum Mark {
    /// Everything but the number of its device.
    All(Fingerprint),
    /// Only what does not change with writes.
    Inode(Fingerprint),
    /// It cannot be known.
    None,
}

impl Remembered {
    /// What the record says.
    #[must_use]
    pub fn of(member: &Member) -> Self {
        Self {
            state: member.state,
            fingerprint: fingerprints::from_record(&member.fingerprint),
        }
    }

    fn was_up(&self) -> bool {
        matches!(self.state, MemberState::InSync | MemberState::Syncing)
    }

    fn mark(&self, clean: bool) -> Mark {
        match self.fingerprint {
            None => Mark::None,
            Some(kept) if self.was_up() && clean => Mark::All(kept),
            Some(kept) if self.was_up() => Mark::Inode(kept),
            // It was not opened since that was taken.
            Some(kept) if kept.mtime_ns != 0 => Mark::All(kept),
            Some(_) => Mark::None,
        }
    }

    /// Whether what was `found` in the slot is the replica as it was left. `clean`: the last run
    /// ended cleanly.
    #[must_use]
    pub fn doubt(&self, found: &Fingerprint, clean: bool) -> Option<Doubt> {
        match self.mark(clean) {
            Mark::All(kept) if found.is_unchanged_since(&kept) => None,
            Mark::All(kept) if found.inode == kept.inode => Some(Doubt::Changed),
            Mark::Inode(kept) if is_same_inode(&kept, found) => None,
            Mark::All(_) | Mark::Inode(_) => Some(Doubt::Replaced),
            Mark::None => Some(Doubt::Unknown),
        }
    }

    /// What the replica must be like when it comes back, if it is to be the one that left: to be
    /// asked of one that is not there.
    #[must_use]
    pub fn left(&self, clean: bool) -> Left {
        Left {
            same: match self.mark(clean) {
                Mark::All(kept) => Some(kept),
                Mark::Inode(_) | Mark::None => None,
            },
            file: self.fingerprint,
        }
    }

    /// Whether what was `found` in another slot is this replica. `present`: there is something
    /// else in its own slot.
    #[must_use]
    pub fn is_recognised_in(&self, found: &Fingerprint, clean: bool, present: bool) -> bool {
        match self.mark(clean) {
            Mark::All(kept) => found.inode != 0 && found.is_unchanged_since(&kept),
            // Files on different file systems often have the same inode number. That two of them
            // have changed places by chance is another matter.
            Mark::Inode(kept) => {
                found.inode != 0
                    && found.inode == kept.inode
                    && (present || found.device == kept.device)
            }
            Mark::None => false,
        }
    }
}

/// Devices without a name have inode 0: of these only the size can be compared.
fn is_same_inode(kept: &Fingerprint, found: &Fingerprint) -> bool {
    kept.inode == found.inode && (kept.inode != 0 || kept.size_bytes == found.size_bytes)
}

/// What is to be remembered of a replica while it is in use: not the time of its last change,
/// which says nothing until the next clean stop.
#[must_use]
pub fn in_use(found: &Fingerprint) -> Fingerprint {
    Fingerprint {
        mtime_ns: 0,
        ..*found
    }
}
