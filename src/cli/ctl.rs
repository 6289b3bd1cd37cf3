// SPDX-License-Identifier: Apache-2.0
//! The line of `quorum-blk ctl ...`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use crate::config::ByteSize;

pub(super) const EXAMPLES: &str = "\
Examples:
  How the disk is:
    quorum-blk ctl --control /run/disk.control status

  Make it 20 GiB long while its guest runs; regular files are made longer, devices must be:
    quorum-blk ctl --control /run/disk.control resize 20G

  Compare all replicas now, and only report what differs:
    quorum-blk ctl --control /run/disk.control scrub --check

  What happens, as it happens:
    quorum-blk ctl --control /run/disk.control events

The daemon must have been started with --control. Other programs speak QMP on the same socket.

Exit status: 0  done    1  refused, or nobody answers    2  wrong usage";

/// The options of `quorum-blk ctl`.
#[derive(Clone, PartialEq, Eq, Debug, Args)]
pub struct CtlArgs {
    /// The socket that the daemon was given with --control
    #[arg(long, value_name = "PATH")]
    pub control: PathBuf,

    /// What is to be done.
    #[command(subcommand)]
    pub command: CtlCommand,
}

/// What a daemon is asked for.
#[derive(Clone, PartialEq, Eq, Debug, Subcommand)]
pub enum CtlCommand {
    /// Show how the disk and its replicas are
    Status {
        /// As JSON, with everything there is
        #[arg(long)]
        json: bool,
    },
    /// Make the disk longer; it never becomes shorter
    Resize {
        /// Its size afterwards: bytes, or with K, M, G, T
        #[arg(value_name = "SIZE")]
        size: ByteSize,
    },
    /// Read all replicas and compare them now
    Scrub {
        /// Only report what differs, do not repair it
        #[arg(long)]
        check: bool,
    },
    /// End the scrub that is under way
    StopScrub,
    /// Use a failed or suspect replica again
    Clear {
        /// Its name
        #[arg(value_name = "NAME")]
        replica: String,
    },
    /// Take a replica out of use
    Fail {
        /// Its name
        #[arg(value_name = "NAME")]
        replica: String,
    },
    /// Where every replica lacks what was written last, take this one's content
    ForceCurrent {
        /// Its name
        #[arg(value_name = "NAME")]
        replica: String,
    },
    /// Show what was counted, as JSON
    Counters,
    /// Print events as they come, one JSON object a line, until the daemon ends
    Events,
}
