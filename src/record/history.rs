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

/// Bit of an entry on disk: the epoch was begun.
const BEGUN: u32 = 2;

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
    /// Enough copies hold the epoch, and whoever says so knows. Nothing depends on it before
    /// enough copies say so.
    pub begun: bool,
}

impl EpochEntry {
    /// The random bytes of the run that began it: all epochs of a run have the same.
    #[must_use]
    pub fn run(&self) -> [u8; 16] {
        // The number was added without carry; adding it once more takes it away.
        EpochId::derive(self.id.0, self.epoch).0
    }

    /// Whether it is the same epoch, whatever is known of it.
    #[must_use]
    pub fn is_same(self, other: Self) -> bool {
        (self.epoch, self.id) == (other.epoch, other.id)
    }

    fn flags(self) -> u32 {
        u32::from(self.forced) * FORCED + u32::from(self.begun) * BEGUN
    }
}

/// The newest epoch and up to 15 others that the copies knew of when it was written: those it
/// goes back to, and leftovers beside them of raises that a crash cut short.
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

    /// Takes in what another history knows; what is too old for the room there is is forgotten.
    pub(super) fn join(&mut self, other: &Self) {
        let mut all = self.entries().to_vec();
        for entry in other.entries() {
            match all.iter_mut().find(|own| own.is_same(*entry)) {
                Some(own) => own.begun |= entry.begun,
                None => all.push(*entry),
            }
        }
        all.sort_by(|a, b| b.epoch.cmp(&a.epoch).then(a.id.cmp(&b.id)));
        self.count = all.len().min(EPOCHS_REMEMBERED);
        self.entries[..self.count].copy_from_slice(&all[..self.count]);
    }

    /// Enough copies hold the newest epoch.
    pub(super) fn begin(&mut self) {
        self.entries[0].begun = true;
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

    /// Whether the epoch, or one beside it that never mattered, is in it.
    pub(super) fn knows(&self, entry: EpochEntry) -> bool {
        self.entries().iter().any(|own| own.is_same(entry))
    }

    /// Whether the history does not have the epoch, but may have had.
    pub(super) fn has_forgotten(&self, entry: EpochEntry) -> bool {
        let oldest = self.entries[self.count - 1].epoch;
        self.count == EPOCHS_REMEMBERED && entry.epoch <= oldest && !self.knows(entry)
    }

    pub(super) fn encode(&self, writer: &mut Writer<'_>) {
        for entry in self.entries {
            writer.u64(entry.epoch);
            writer.bytes(&entry.id.0);
            writer.u32(entry.flags());
            writer.u32(0);
        }
    }

    /// `None`: they are no history, with numbers that do not rise and nothing after the oldest.
    pub(super) fn decode(reader: &mut Reader<'_>) -> Option<Self> {
        let mut entries = [EpochEntry::default(); EPOCHS_REMEMBERED];
        let mut count = 0;
        let mut last = u64::MAX;
        for (index, entry) in entries.iter_mut().enumerate() {
            entry.epoch = reader.u64();
            entry.id = EpochId(reader.bytes());
            let flags = reader.u32();
            if reader.u32() != 0 || flags & !(FORCED | BEGUN) != 0 {
                return None;
            }
            entry.forced = flags & FORCED != 0;
            entry.begun = flags & BEGUN != 0;
            if entry.epoch == 0 {
                if *entry != EpochEntry::default() {
                    return None;
                }
            } else if entry.epoch > last || index != count {
                return None;
            } else {
                last = entry.epoch;
                count += 1;
            }
        }
        (count > 0).then_some(Self { entries, count })
    }
}
