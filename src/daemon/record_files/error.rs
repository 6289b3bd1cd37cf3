// SPDX-License-Identifier: Apache-2.0
//! Why the files of the record cannot be used.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

/// The files of the record cannot be used.
#[derive(Debug, Error)]
pub enum RecordFileError {
    /// Somebody else has the record.
    #[error(
        "the state record {} is locked by another process: the disk is served already; stop that \
         daemon first (one that was killed keeps its locks until its last write has landed, see \
         --lock-timeout)",
        path.display()
    )]
    InUse {
        /// The copy.
        path: PathBuf,
    },
    /// A lock could not be asked for.
    #[error("cannot lock the state record {}", path.display())]
    Lock {
        /// The copy.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Two paths, one file.
    #[error(
        "{} and {} are one file and cannot be two copies of the state record; remove the link",
        first.display(),
        second.display()
    )]
    SameFile {
        /// A path.
        first: PathBuf,
        /// The other.
        second: PathBuf,
    },
    /// The record is not where it should be, but somewhere else.
    #[error(
        "there is no state record at {}, but one at {}: replicas were given in another order, or \
         have other names, when the disk was last served; give them as before, or say where the \
         record is with record=PATH",
        expected.display(),
        found.display()
    )]
    Elsewhere {
        /// The first place where it should be.
        expected: PathBuf,
        /// Where there is one.
        found: PathBuf,
    },
    /// Somebody made a copy between our look and our turn to make it.
    #[error(
        "the state record {} was made by another process meanwhile: the disk was served since this \
         start began; start again",
        path.display()
    )]
    Appeared {
        /// The copy.
        path: PathBuf,
    },
    /// A copy could not be made.
    #[error(
        "cannot create the state record {} ({length_bytes} bytes); its folder must exist, be \
         writable and have room",
        path.display()
    )]
    Create {
        /// The copy.
        path: PathBuf,
        /// How long it is.
        length_bytes: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A copy could not be made longer.
    #[error(
        "cannot make the state record {} {length_bytes} bytes long; its file system must have room",
        path.display()
    )]
    Lengthen {
        /// The copy.
        path: PathBuf,
        /// How long it was to be.
        length_bytes: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A copy could not be removed.
    #[error("cannot remove the state record {}", path.display())]
    Remove {
        /// The copy.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}
