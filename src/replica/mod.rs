// SPDX-License-Identifier: Apache-2.0
//! Replicas: opening them, and turning an operation of the core into I/O on one of them.
//!
//! Nothing here votes. The parts:
//!
//! - [`RawReplica`]: a raw file or block device, with [`OpenError`] for what can be wrong with it;
//!   its locks (rule K1), identity (rule V8) and alignment are found out in modules of their own.
//! - [`check_set`]: whether several replicas together make a disk, and which.
//! - [`Executor`]: the operations of one worker, in flight on its ring.

mod executor;
mod flight;
mod identity;
mod locks;
mod probe;
mod raw;
mod set;

use std::os::fd::BorrowedFd;
use std::path::Path;

pub use executor::{Executor, ExecutorConfig, ExecutorError};
pub use identity::{Identity, Inode};
pub use locks::Holder;
pub use raw::{Cache, Format, OpenError, OpenFault, RawOptions, RawReplica};
pub use set::{SetError, SetNote, SetShape, check_set, open_set};

/// One full copy of the disk, of whatever kind.
#[derive(Debug)]
pub enum Replica {
    /// A raw file or block device.
    Raw(RawReplica),
}

impl Replica {
    /// Its stable name, unique in the set.
    #[must_use]
    pub fn name(&self) -> &str {
        match self {
            Self::Raw(raw) => raw.name(),
        }
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        match self {
            Self::Raw(raw) => raw.path(),
        }
    }

    /// Its length when it was opened, in bytes.
    #[must_use]
    pub fn length_bytes(&self) -> u64 {
        match self {
            Self::Raw(raw) => raw.length_bytes(),
        }
    }

    /// What offsets, lengths and memory of its I/O must be multiples of, in bytes: a power of two
    /// up to 4096, 1 if anything goes.
    #[must_use]
    pub fn direct_alignment_bytes(&self) -> u32 {
        match self {
            Self::Raw(raw) => raw.direct_alignment_bytes(),
        }
    }

    /// Whether it can zero an exact range without being sent the zeroes (rule Z2).
    #[must_use]
    pub fn can_zero_exactly(&self) -> bool {
        match self {
            Self::Raw(raw) => raw.can_zero_exactly(),
        }
    }

    /// Whether it was opened for reading only.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        match self {
            Self::Raw(raw) => raw.is_read_only(),
        }
    }

    /// What it is stored on (rule V8).
    #[must_use]
    pub fn identity(&self) -> &Identity {
        match self {
            Self::Raw(raw) => raw.identity(),
        }
    }

    /// The descriptor its data I/O goes to.
    fn data_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Raw(raw) => raw.fd(),
        }
    }
}
