// SPDX-License-Identifier: Apache-2.0
//! What can be wrong with a replica that is to be opened.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use crate::replica::locks::Holder;

/// A replica that cannot be opened. Every message begins with the replica's name and path.
#[derive(Debug, Error)]
#[error("replica '{name}' ({}): {fault}", path.display())]
pub struct OpenError {
    /// The replica's name.
    pub name: String,
    /// Where it is, as configured.
    pub path: PathBuf,
    /// What is wrong with it.
    pub fault: OpenFault,
}

impl OpenError {
    /// Whether somebody else has the replica now, so that trying again later makes sense: a
    /// daemon that was killed keeps its locks until its last operation has landed (rule K2).
    #[must_use]
    pub fn is_in_use(&self) -> bool {
        matches!(self.fault, OpenFault::InUse { .. } | OpenFault::DeviceBusy)
    }
}

/// What is wrong with a replica that cannot be opened.
#[derive(Debug, Error)]
pub enum OpenFault {
    /// A system call failed.
    #[error("cannot {action}: {error}")]
    System {
        /// What was tried.
        action: &'static str,
        /// Its errno.
        error: io::Error,
    },
    /// Its storage hangs.
    #[error(
        "does not answer: it could not be opened within {seconds} s (--io-timeout); look after \
         the disk or the network that it is on"
    )]
    NoAnswer {
        /// How long was waited.
        seconds: u64,
    },
    /// Nothing has that name.
    #[error("cannot open: {0}; correct the path, or create the file with the size of the disk")]
    NotFound(io::Error),
    /// Not permitted to write.
    #[error("cannot open for writing: {0}; correct its permissions or serve with --read-only")]
    NotWritable(io::Error),
    /// Neither a regular file nor a block device.
    #[error("is a {kind}; a replica is a regular file or a block device")]
    WrongKind {
        /// What it is.
        kind: &'static str,
    },
    /// The path led to something else between two looks.
    #[error("was replaced while it was being opened; try again")]
    Replaced,
    /// The same storage as an earlier replica (rule V8).
    #[error("is the same storage as replica '{other}'; every replica needs its own")]
    Duplicate {
        /// The earlier replica.
        other: String,
    },
    /// QEMU or another daemon has it (rule K1).
    #[error(
        "in use by {} {holder}; stop that VM, tool or daemon first",
        Process(*pid)
    )]
    InUse {
        /// What the other one does with it.
        holder: Holder,
        /// The other process, if the kernel says.
        pid: Option<i32>,
    },
    /// A block device that is mounted or opened exclusively by somebody else.
    #[error("the device is mounted or in use; unmount it or stop what uses it")]
    DeviceBusy,
    /// O_DIRECT is refused.
    #[error(
        "the file system does not support O_DIRECT; \
         give cache=buffered for this replica to use the page cache"
    )]
    DirectRefused,
    /// O_DIRECT in units larger than a page.
    #[error(
        "O_DIRECT needs multiples of {alignment_bytes} bytes, more than 4096; \
         give cache=buffered for this replica"
    )]
    Alignment {
        /// What the kernel says.
        alignment_bytes: u32,
    },
    /// A qcow2 image.
    #[error(
        "is a qcow2 image; raw access would show the guest its metadata. Convert it with \
         'qemu-img convert -O raw', or give format=raw if the guest is meant to see these bytes"
    )]
    Qcow2,
    /// Shorter than a sector.
    #[error("has {length_bytes} bytes, less than one sector; create it with the size of the disk")]
    Empty {
        /// Its length.
        length_bytes: u64,
    },
}

/// "another process", with its number if there is one.
struct Process(Option<i32>);

impl std::fmt::Display for Process {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            Some(pid) => write!(f, "process {pid}"),
            None => f.write_str("another process"),
        }
    }
}
