// SPDX-License-Identifier: Apache-2.0
//! `quorum-blk record`: what people do with a state record while, or before, no daemon has it.
//!
//! - `view`: what the copies say together, as one structure, which is also the JSON;
//! - `forecast`: what a start would do now;
//! - `table`: the same for people;
//! - `create`: a record for plain images.

mod create;
mod forecast;
mod table;
mod view;

use std::io::{self, Write};
use std::path::PathBuf;
use std::time::Duration;

use thiserror::Error;

use crate::cli::{RecordCommand, RecordTarget};
use crate::config::{Config, RecordPlaceError, RecordPlaces};
use crate::daemon::record_files::{self, Access, RecordFileError, RecordFiles};
use crate::record::{RecorderError, Refusal};
use crate::replica::{OpenError, SetError};
use view::View;

/// How long a daemon that has just ended, or was killed, may keep its locks (rule K2).
const PATIENCE: Duration = Duration::from_secs(1);

/// A command about a state record that was not carried out.
#[derive(Debug, Error)]
pub enum RecordCliError {
    /// There is no place for the record.
    #[error(transparent)]
    Place(#[from] RecordPlaceError),
    /// Its files cannot be used.
    #[error(transparent)]
    Files(#[from] RecordFileError),
    /// It cannot be opened.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// It cannot be written.
    #[error(transparent)]
    Recorder(#[from] RecorderError),
    /// There is none.
    #[error(
        "there is no state record at {places}; `serve` makes one when the disk is served for the \
         first time, `quorum-blk record create` does it now"
    )]
    Absent {
        /// Where it was looked for.
        places: String,
    },
    /// There is one already.
    #[error(
        "there is a state record already, at {place}; `quorum-blk record show` prints it, \
         `quorum-blk record forget` removes it"
    )]
    Exists {
        /// A place of it.
        place: String,
    },
    /// The images cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The images make no disk.
    #[error(transparent)]
    Set(#[from] SetError),
    /// The disk cannot be described.
    #[error(transparent)]
    Shape(#[from] crate::quorum::PolicyError),
    /// A replica cannot be made stable and looked at.
    #[error("cannot flush replica '{name}'")]
    Fingerprint {
        /// Its name.
        name: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A copy was not written.
    #[error("cannot write the state record {}", path.display())]
    Write {
        /// The copy.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The system gave no random bytes.
    #[error("the system gives no random bytes")]
    Random(#[source] io::Error),
    /// `forget` without `--yes`.
    #[error(
        "nothing was removed. Without the state record the disk forgets which replica missed \
         what: at the next start all of them vote, also one with old data, and sectors that were \
         being written may get I/O errors. Before that, `quorum-blk record show` says who is \
         behind; rewrite those from a good one. To remove {places}, say --yes"
    )]
    NotSure {
        /// What would be removed.
        places: String,
    },
    /// The output cannot be written.
    #[error("cannot write the output")]
    Output(#[from] io::Error),
}

/// Carries out a command; what it has to say goes to `out`.
///
/// # Errors
/// If it cannot be carried out.
pub fn run(command: &RecordCommand, out: &mut impl Write) -> Result<(), RecordCliError> {
    match command {
        RecordCommand::Show { target, json } => {
            let view = match target {
                RecordTarget::Files(paths) => View::of_files(paths)?,
                RecordTarget::Disk(config) => View::of_disk(config, &places(config)?)?,
            };
            if *json {
                writeln!(out, "{}", view.to_json())?;
            } else {
                write!(out, "{}", table::text(&view))?;
            }
            Ok(())
        }
        RecordCommand::Create(config) => create::create(config, &places(config)?, out),
        RecordCommand::Forget { config, yes } => forget(&places(config)?, *yes, out),
    }
}

/// Where the record of the disk is.
fn places(config: &Config) -> Result<RecordPlaces, RecordCliError> {
    let places = config
        .record
        .places(&config.replicas, record_files::is_file)?;
    Ok(places.expect("the command line refuses a disk without a record"))
}

fn forget(places: &RecordPlaces, yes: bool, out: &mut impl Write) -> Result<(), RecordCliError> {
    let files = RecordFiles::open(places, Access::Own(PATIENCE))?;
    if files.is_absent() {
        return Err(RecordCliError::Absent {
            places: names(places),
        });
    }
    if !yes {
        return Err(RecordCliError::NotSure {
            places: names(places),
        });
    }
    for path in files.remove()? {
        writeln!(out, "removed {}", path.display())?;
    }
    Ok(())
}

/// The places of the copies, for people.
fn names(places: &RecordPlaces) -> String {
    let names = places.copies.iter().map(|path| path.display().to_string());
    names.collect::<Vec<_>>().join(", ")
}
