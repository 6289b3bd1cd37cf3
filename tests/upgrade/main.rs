// SPDX-License-Identifier: Apache-2.0
//! One daemon takes over from another beside a guest that goes on: what is asked of a restart, an
//! upgrade, and of a service manager that does them.
//!
//! - `site`: a disk, the daemons that serve it one after the other.
//! - `guest`: a load that survives its back-end, and believes only what was acknowledged.
//! - `takeover`: the old daemon is terminated or killed while the new one waits.
//! - `hung`: what hangs delays the end of anything only for so long.
//! - `service`: systemd's protocol, its sockets, and the units in `examples/`.
//!
//! Files that hang on command need root and FUSE (`tests/vm/faulty_file.py`); without, those tests
//! fail.
#![allow(
    clippy::unwrap_used,
    reason = "everything in this file is test code, helpers included"
)]

#[path = "../common/mod.rs"]
mod common;
mod guest;
mod hung;
mod service;
mod site;
mod takeover;
