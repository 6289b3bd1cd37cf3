// SPDX-License-Identifier: Apache-2.0
//! The state record: what the disk remembers of itself beyond the life of a process (CONSISTENCY
//! section 8). K copies of one small file hold the maps D and B, the members and the epoch.
//!
//! Everything here is pure: bytes in, decisions and bytes out. Who opens files, and when, is for
//! others. `docs/record-format.md` describes the bytes.
//!
//! - [`Superblock`], [`Member`], [`History`]: what block 0 and 1 of a copy say.
//! - [`PageImage`], [`Layout`]: pages of bits, and where they lie.
//! - [`open`]: what the copies together say ([`Opened`]), or why they cannot be used ([`Refusal`]).
//! - [`Growth`]: what follows when the disk becomes longer.
//! - [`Recorder`]: keeps the copies up to date with [`Marks`](crate::quorum::Marks) afterwards.

mod copies;
mod error;
mod fields;
pub mod fuzzing;
mod growth;
mod heads;
mod history;
mod layout;
mod lineage;
mod member;
mod merge;
mod mutation;
mod opened;
mod opening;
mod page;
mod recorder;
mod superblock;

#[cfg(test)]
mod tests;

pub use copies::Standing as CopyStanding;
pub use error::{FormatError, Refusal};
pub use growth::{Growth, GrowthError};
pub use history::{EPOCHS_REMEMBERED, EpochEntry, EpochId, History};
pub use layout::{BLOCK_BYTES, Block, COPIES_MAX, LENGTH_BYTES_MAX, Layout, PAGES_MAX, Slot};
pub use member::{Fingerprint, Member, MemberState};
#[cfg(test)]
pub use mutation::RecordMutation;
pub use opened::{CopyState, Note, Opened};
pub use opening::{CopySource, Expected, Found, OpenOptions, ReadBlock, open};
pub use page::PageImage;
pub use recorder::{
    ChangeId, RECORD_CLEAR_DELAY, RECORD_HANG_LIMIT, RECORD_JOIN_PAUSE, RECORD_WRITE_LIMIT,
    RecordAction, RecordEvent, Recorder, RecorderError, WriteId,
};
pub use superblock::{DiskUuid, FORMAT_VERSION, Growing, Superblock, VERIFIED};
