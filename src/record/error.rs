// SPDX-License-Identifier: Apache-2.0
//! What can be wrong with a block, and why a record is not opened.

use thiserror::Error;

use super::superblock::{DiskUuid, FORMAT_VERSION};

/// A block that cannot be used.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum FormatError {
    /// Nothing was ever written there.
    #[error("the block is empty")]
    Blank,
    /// It begins with something else.
    #[error("the block is not of a state record")]
    Magic,
    /// It is torn or damaged.
    #[error("the checksum is wrong: the block is torn or damaged")]
    Checksum,
    /// Another version wrote it.
    #[error(
        "format version {version} is not known, only {FORMAT_VERSION}: use the release that wrote it"
    )]
    Version {
        /// The version.
        version: u32,
    },
    /// It uses what this version does not know and must not ignore.
    #[error("incompatible features {features:#x} are not known: use the release that wrote it")]
    Features {
        /// The unknown bits.
        features: u64,
    },
    /// It is a page, but not the one that belongs there: a misdirected write.
    #[error("the block belongs to another place")]
    Misplaced,
    /// It is a page of another disk.
    #[error("the block belongs to another disk")]
    OtherDisk,
    /// A field is out of its bounds although the checksum is right.
    #[error("the {field} is impossible")]
    Field {
        /// Which one.
        field: &'static str,
    },
}

impl FormatError {
    /// Whether another version of the program would understand the block.
    #[must_use]
    pub fn is_newer(self) -> bool {
        match self {
            Self::Version { .. } | Self::Features { .. } => true,
            Self::Blank
            | Self::Magic
            | Self::Checksum
            | Self::Misplaced
            | Self::OtherDisk
            | Self::Field { .. } => false,
        }
    }
}

/// Why the copies of a record are not opened (rules R1, R5, S6). The text tells an operator what
/// was found and what can be done.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum Refusal {
    /// No copy holds anything: there is no record yet (rule S5).
    #[error("there is no state record at {copies}")]
    NoRecord {
        /// Where it was looked for.
        copies: String,
    },
    /// The first creation was cut short, before anything depended on the record.
    #[error(
        "the state record was never finished: {written} holds its first state and the other \
         copies nothing; nothing was written to the replicas under it. Remove the copies and \
         start again"
    )]
    Unfinished {
        /// The copies that hold something.
        written: String,
    },
    /// Half of the copies or more cannot be read.
    #[error(
        "only {readable} of {copies} copies of the state record can be used, {needed} are needed: \
         {problems}. Bring them back; or, if they are lost for good, start with --force, which \
         takes what is left as the truth"
    )]
    Minority {
        /// Copies that can be used.
        readable: usize,
        /// K.
        copies: usize,
        /// More than half of K.
        needed: usize,
        /// What is wrong with the others.
        problems: String,
    },
    /// A copy belongs to another disk.
    #[error(
        "{copy} is the state record of disk {found}, not of {expected}: a record or a replica was \
         put in the wrong place"
    )]
    Foreign {
        /// Which copy.
        copy: String,
        /// Its disk.
        found: DiskUuid,
        /// The disk of the others, or the one that is configured.
        expected: DiskUuid,
    },
    /// Two copies have lived apart (rule R5).
    #[error(
        "{first} and {second} of the state record have lived apart since epoch {epoch}: the disk \
         was opened twice, each time with other copies. Find out which side holds the data that \
         count, remove {first} or {second}, whichever is of the other side, and start again: the \
         replicas of that side are then rewritten where they differ"
    )]
    Fork {
        /// A copy.
        first: String,
        /// One that contradicts it.
        second: String,
        /// Where they part.
        epoch: u64,
    },
    /// A copy was written by a version that knows more.
    #[error("{copy} of the state record cannot be read by this version")]
    Unsupported {
        /// Which copy.
        copy: String,
        /// What is not known.
        source: FormatError,
    },
    /// A number is so large that there is no next one.
    #[error(
        "the state record counts to {number}, which no program of ours does: a block of it was \
         forged. Move the copies away; the replicas are then verified against each other"
    )]
    Exhausted {
        /// The number.
        number: u64,
    },
    /// Two files are the same copy.
    #[error(
        "{first} and {second} are both copy {index} of the state record: one was made by copying \
         the other. Move the one that does not belong away"
    )]
    Twice {
        /// A file.
        first: String,
        /// The other.
        second: String,
        /// Their index.
        index: u8,
    },
    /// The record has another number of copies.
    #[error(
        "the state record has {recorded} copies and {configured} are configured: give all replicas \
         that the disk had, in the same order, or name all copies"
    )]
    Copies {
        /// K of the record.
        recorded: usize,
        /// How many were looked at.
        configured: usize,
    },
    /// The record and the configuration contradict each other.
    #[error("the state record says {what} {recorded}, the configuration {configured}")]
    Contradiction {
        /// What.
        what: &'static str,
        /// In the record.
        recorded: u64,
        /// In the configuration.
        configured: u64,
    },
}
