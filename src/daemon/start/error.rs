// SPDX-License-Identifier: Apache-2.0
//! Why a disk is not served.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use super::decision::Refused;
use super::growing::GrowError;
use crate::config::RecordPlaceError;
use crate::daemon::record_files::RecordFileError;
use crate::quorum::PolicyError;
use crate::record::{RecorderError, Refusal};
use crate::replica::{OpenError, SetError};

/// A disk that cannot be served.
#[derive(Debug, Error)]
pub enum StartError {
    /// There is no place for the record.
    #[error(transparent)]
    Place(#[from] RecordPlaceError),
    /// The files of the record cannot be used.
    #[error(transparent)]
    Files(#[from] RecordFileError),
    /// The record cannot be opened.
    #[error(transparent)]
    Record(#[from] Refusal),
    /// The record cannot be written.
    #[error(transparent)]
    Recorder(#[from] RecorderError),
    /// The record and the replicas do not go together.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// A replica cannot be opened, and all are needed.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// A replica cannot be opened, and nothing is known about it (rule S5).
    #[error(
        "the disk has no state record yet, and the first time all of its replicas must be there"
    )]
    FirstUse(#[source] OpenError),
    /// The replicas do not make a disk.
    #[error(transparent)]
    Set(#[from] SetError),
    /// The policy contradicts itself.
    #[error(transparent)]
    Policy(#[from] PolicyError),
    /// A record that nobody would keep up to date any more.
    #[error(
        "there is a state record at {}: with --record none it would not learn what is written now, \
         and be believed again later. Serve the disk with it, or remove it first ('quorum-blk record \
         forget')",
        path.display()
    )]
    RecordLeftBehind {
        /// A copy of it.
        path: PathBuf,
    },
    /// The destination of a migration has to know what the source knows.
    #[error(
        "there is no state record at {copies}, and --incoming needs the one of the daemon that the \
         guest comes from: put it where both see it (beside shared replicas, or --record-dir)"
    )]
    IncomingWithoutRecord {
        /// Where it was looked for.
        copies: String,
    },
    /// Blocks of a disk stay as they are.
    #[error(
        "the disk has blocks of {recorded} bytes, and --block-size says {configured}: leave it \
         out, the blocks of a disk stay as they were when it was first served"
    )]
    BlockSize {
        /// By the record.
        recorded: u32,
        /// By the configuration.
        configured: u32,
    },
    /// A replica cannot be looked at.
    #[error("cannot examine replica '{name}'")]
    Fingerprint {
        /// Its name.
        name: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It cannot be made longer.
    #[error(transparent)]
    Grow(#[from] GrowError),
    /// Too few copies took the epoch of this run.
    #[error(
        "the state record cannot be written on enough of its copies: look at the file systems they \
         are on"
    )]
    RecordNotWritten,
    /// No random bytes.
    #[error("the system gives no random bytes")]
    Random(#[source] io::Error),
}
