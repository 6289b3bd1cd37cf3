// SPDX-License-Identifier: Apache-2.0
//! Replicas: opening them, and turning an operation of the core into I/O on one of them.
//!
//! Nothing here votes. The parts:
//!
//! - [`RawReplica`]: a raw file or block device, with [`OpenError`] for what can be wrong with it;
//!   its locks (rule K1), identity (rule V8) and alignment are found out in modules of their own.
//! - [`Fingerprint`] and [`Presence`]: by what a replica is known again, and whether it vanished.
//! - [`open_each`] and [`open_one_beside`]: opening a set as far as it goes, and one of it again.
//! - [`check_set`]: whether several replicas together make a disk, and which.
//! - [`Executor`]: the operations of one worker, in flight on its ring, on the replicas that are
//!   attached to it.

mod executor;
mod fault;
mod fingerprint;
mod flight;
mod identity;
mod locks;
mod opening;
mod probe;
mod raw;
mod set;
mod slot;

use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;

pub use executor::{Executor, ExecutorConfig, ExecutorError};
pub use fault::{OpenError, OpenFault};
pub use fingerprint::{Fingerprint, Presence};
pub use identity::{Identity, Inode};
pub use locks::Holder;
pub use opening::{
    ReopenError, check_distinct, check_distinct_within, common_order, lengthen, open_each,
    open_one_beside, open_set, open_within,
};
pub use raw::{Cache, Format, RawOptions, RawReplica};
pub use set::{SetError, SetNote, SetShape, Unfit, check_member, check_set};

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

    /// Makes it longer; see [`RawReplica::lengthen`].
    ///
    /// # Errors
    /// Of the system calls, or that it cannot be.
    pub fn lengthen(&mut self, length_bytes: u64) -> io::Result<()> {
        match self {
            Self::Raw(raw) => raw.lengthen(length_bytes),
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

    /// Its fingerprint when it was opened; see [`RawReplica::found`].
    #[must_use]
    pub fn found(&self) -> Fingerprint {
        match self {
            Self::Raw(raw) => raw.found(),
        }
    }

    /// By what it is known again; see [`RawReplica::fingerprint`].
    ///
    /// # Errors
    /// Of the system calls that look at it.
    pub fn fingerprint(&self) -> io::Result<Fingerprint> {
        match self {
            Self::Raw(raw) => raw.fingerprint(),
        }
    }

    /// The same after making it stable; see [`RawReplica::durable_fingerprint`].
    ///
    /// # Errors
    /// Of the flush, or of the system calls that look at it.
    pub fn durable_fingerprint(&self) -> io::Result<Fingerprint> {
        match self {
            Self::Raw(raw) => raw.durable_fingerprint(),
        }
    }

    /// Whether it is still where it was opened; see [`RawReplica::is_still_there`].
    ///
    /// # Errors
    /// If that cannot be found out.
    pub fn is_still_there(&self) -> io::Result<Presence> {
        match self {
            Self::Raw(raw) => raw.is_still_there(),
        }
    }

    /// The descriptor its data I/O goes to.
    fn data_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Raw(raw) => raw.fd(),
        }
    }
}
