// SPDX-License-Identifier: Apache-2.0
//! The last epochs of a record and their ids (rules R3, R5, R7). Two copies whose epochs have the
//! same numbers but other ids have lived apart: a fork.

use std::fmt;

use super::fields::{Reader, Writer};

/// Epochs a superblock tells of.
pub const EPOCHS_REMEMBERED: usize = 16;

/// Bytes of an entry on disk.
pub(super) const ENTRY_BYTES: usize = 32;

/// Bit of an entry on disk: the epoch was begun by force.
const FORCED: u32 = 1;

/// Tells an epoch from one of the same number elsewhere.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct EpochId(pub [u8; 16]);

impl EpochId {
    /// The id of epoch `epoch` in a run whose random bytes are `run`: as unlikely to be met again
    /// as the run's.
    #[must_use]
    pub fn derive(run: [u8; 16], epoch: u64) -> Self {
        let mut id = run;
        for (byte, epoch) in id[8..].iter_mut().zip(epoch.to_le_bytes()) {
            *byte ^= epoch;
        }
        Self(id)
    }
}

impl fmt::Debug for EpochId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// An epoch.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct EpochEntry {
    /// Its number, from 1.
    pub epoch: u64,
    /// Its id.
    pub id: EpochId,
    /// It was begun by force, perhaps without a majority of the copies (rule S6).
    pub forced: bool,
}

/// The newest epoch and up to 15 before it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct History {
    /// Newest first.
    entries: [EpochEntry; EPOCHS_REMEMBERED],
    count: usize,
}

impl History {
    /// Only this epoch.
    #[must_use]
    pub fn new(first: EpochEntry) -> Self {
        let mut entries = [EpochEntry::default(); EPOCHS_REMEMBERED];
        entries[0] = first;
        Self { entries, count: 1 }
    }

    /// Puts an epoch before the others; the oldest may be forgotten.
    ///
    /// # Panics
    /// If its number is not above the newest (I12).
    pub fn push(&mut self, entry: EpochEntry) {
        assert!(entry.epoch > self.newest().epoch, "epochs only rise");
        self.entries.rotate_right(1);
        self.entries[0] = entry;
        self.count = EPOCHS_REMEMBERED.min(self.count + 1);
    }

    /// The newest epoch.
    #[must_use]
    pub fn newest(&self) -> EpochEntry {
        self.entries[0]
    }

    /// Epochs, newest first.
    #[must_use]
    pub fn entries(&self) -> &[EpochEntry] {
        &self.entries[..self.count]
    }

    /// Whether the history has forgotten what was at the time of `epoch`.
    pub(super) fn has_forgotten(&self, epoch: u64) -> bool {
        self.count == EPOCHS_REMEMBERED && epoch < self.entries[EPOCHS_REMEMBERED - 1].epoch
    }

    pub(super) fn encode(&self, writer: &mut Writer<'_>) {
        for entry in self.entries {
            writer.u64(entry.epoch);
            writer.bytes(&entry.id.0);
            writer.u32(if entry.forced { FORCED } else { 0 });
            writer.u32(0);
        }
    }

    /// `None`: they are no history, with falling numbers and nothing after the oldest.
    pub(super) fn decode(reader: &mut Reader<'_>) -> Option<Self> {
        let mut entries = [EpochEntry::default(); EPOCHS_REMEMBERED];
        let mut count = 0;
        let mut last = u64::MAX;
        for (index, entry) in entries.iter_mut().enumerate() {
            entry.epoch = reader.u64();
            entry.id = EpochId(reader.bytes());
            let flags = reader.u32();
            if reader.u32() != 0 || flags & !FORCED != 0 {
                return None;
            }
            entry.forced = flags & FORCED != 0;
            if entry.epoch == 0 {
                if *entry != EpochEntry::default() {
                    return None;
                }
            } else if entry.epoch >= last || index != count {
                return None;
            } else {
                last = entry.epoch;
                count += 1;
            }
        }
        (count > 0).then_some(Self { entries, count })
    }
}
