// SPDX-License-Identifier: Apache-2.0
//! What the user asked for, checked: one disk, its replicas, how it votes, where it is served.
//!
//! [`Settings`] is what flags and the file say, every value optional and named alike in both.
//! [`Config`] is what the daemon runs with: complete, and every choice checked against the
//! others. Nothing here opens a replica or a socket.
//!
//! - `settings`: the names, shared by the command line and the file;
//! - `file`: the TOML file;
//! - `inherited`: `--fd`;
//! - `replica_argument`: `PATH,name=...,cache=...`;
//! - `values`: the types of single values;
//! - `record`: where the state record is kept;
//! - `upkeep`: how long a replica is waited for, and how it is looked after;
//! - `disk`: the checked whole; `error`: why settings cannot be run with.

mod disk;
mod error;
mod file;
#[doc(hidden)]
pub mod fuzzing;
mod inherited;
mod record;
mod replica_argument;
mod settings;
mod upkeep;
mod values;

pub use disk::{Config, FrontEnd, Replica};
pub use error::ConfigError;
pub use file::{FileError, parse_file, read_file};
pub use inherited::{InheritedSocket, InheritedSocketError};
pub use record::{
    FirstUse, RECORD_EXTENSION, RecordConfig, RecordPlaceError, RecordPlaces, beside_all,
};
pub use replica_argument::{OPTIONS, ReplicaArgument, ReplicaArgumentError};
pub use settings::Settings;
pub use upkeep::{Patience, Upkeep};
pub use values::{
    BlockSize, ByteSize, Cache, CrashTie, EventsTarget, Format, GrowMode, Interval, LogFormat,
    LogLevel, OnLostQuorum, OnOff, Polling, ReadPatternName, RecordMode, ScrubMode, ValueError,
    whole_number,
};
