// SPDX-License-Identifier: Apache-2.0
//! The demonstration: three replicas in a temporary folder, a real daemon in front of them, a
//! virtio block driver in front of that, and damage done under the daemon's feet.
//!
//! It needs nothing but the program itself. Everything is checked: each byte that is read, each
//! replica that is blamed, each sector that is repaired, and in the end the files themselves.
//!
//! - `story`: what is done, in which order, and what must come of it.
//! - `daemon`: the child process that serves the disk.
//! - `replicas`: the files, spoiled and compared behind the daemon's back; the events it wrote.
//! - `load`: many requests at once on several queues.
//! - `pattern`: what every sector must hold.
//! - `report`: lines with aligned columns.

mod daemon;
mod load;
mod pattern;
mod replicas;
mod report;
mod story;

use std::io;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::time::Duration;

use thiserror::Error;

use crate::front_end::FrontEndError;

pub use story::run;

/// What the demonstration works with.
#[derive(Clone, Debug)]
pub struct DemoOptions {
    /// The program that is started with `serve`.
    pub program: PathBuf,
    /// Where the folder of the demonstration is made.
    pub parent: PathBuf,
    /// Whether the folder is left there in the end.
    pub keep: bool,
    /// Number of replicas, 3 to [`REPLICAS_MAX`](crate::units::REPLICAS_MAX); fewer become 3, more become that.
    pub replicas: usize,
    /// Size of the disk in bytes, rounded down to whole MiB, at least 4 MiB.
    pub disk_bytes: u64,
    /// Decides the data and the order of requests.
    pub seed: u64,
}

impl DemoOptions {
    /// This program, three replicas of 64 MiB in the system's temporary folder, removed in the
    /// end.
    ///
    /// # Errors
    /// If the program does not know where it is.
    pub fn of_this_program() -> Result<Self, DemoError> {
        let program = std::env::current_exe().map_err(|source| DemoError::Program { source })?;
        Ok(Self {
            program,
            parent: std::env::temp_dir(),
            keep: false,
            replicas: 3,
            disk_bytes: 64 << 20,
            seed: 1,
        })
    }
}

/// Why the demonstration could not go on. What it found wrong with the data is no error but its
/// result.
#[derive(Debug, Error)]
pub enum DemoError {
    /// The path of the running program is unknown.
    #[error("cannot find the program to serve with")]
    Program {
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// Something with a file went wrong.
    #[error("cannot {what} {}", path.display())]
    File {
        /// What was attempted.
        what: &'static str,
        /// With which file.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// The daemon did not begin to serve.
    #[error("the daemon did not serve within {after:?}; it said:\n{said}")]
    NotServing {
        /// How long was waited.
        after: Duration,
        /// Its standard error.
        said: String,
    },
    /// The daemon ended before it was told to.
    #[error("the daemon ended with {status}; it said:\n{said}")]
    Ended {
        /// How.
        status: ExitStatus,
        /// Its standard error.
        said: String,
    },
    /// The daemon did not end after SIGTERM.
    #[error("the daemon did not end within {after:?} of SIGTERM; it said:\n{said}")]
    NotEnding {
        /// How long was waited.
        after: Duration,
        /// Its standard error.
        said: String,
    },
    /// The driver met something it cannot cope with.
    #[error("the disk failed")]
    FrontEnd(#[from] FrontEndError),
    /// The report could not be written.
    #[error("cannot write the report")]
    Output(#[source] io::Error),
}
