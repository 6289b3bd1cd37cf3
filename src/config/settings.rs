// SPDX-License-Identifier: Apache-2.0
//! What flags and the file may say. One list for both, so that the names cannot drift apart.

use std::path::{Path, PathBuf};

use clap::builder::{OsStringValueParser, TypedValueParser};
use serde::Deserialize;

use super::replica_argument::ReplicaArgument;
use super::values::{
    BlockSize, ByteSize, Cache, EventsTarget, LogFormat, LogLevel, OnOff, ReadPatternName, Record,
    whole_number,
};

/// Every setting of a disk, none of them decided. The comments are the help of the flags.
#[derive(Clone, PartialEq, Eq, Debug, Default, clap::Args, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Settings {
    /// Listen for the front-end on this Unix socket
    ///
    /// A socket file that a killed daemon left behind is replaced; one that somebody listens on
    /// is refused.
    #[arg(long, value_name = "PATH", conflicts_with = "fd")]
    #[arg(help_heading = "Front-end")]
    pub socket_path: Option<PathBuf>,

    /// Use this inherited Unix stream socket, listening or connected
    #[arg(long, value_name = "N", help_heading = "Front-end")]
    #[arg(value_parser = whole_number::<i32>)]
    pub fd: Option<i32>,

    /// A copy of the disk: a raw file or block device; give it once per replica, 1 to 16 times
    ///
    /// Options follow the path: name=NAME (in log and events; default replica0, replica1, ...
    /// in the order given), cache=direct|buffered (instead of --cache), format=raw (says that an
    /// image that looks like qcow2 is meant to be raw all the same). A comma in the path is
    /// written `,,`.
    #[arg(
        long,
        visible_alias = "blk-file",
        value_name = "PATH[,OPTION=VALUE]..."
    )]
    #[arg(value_parser = OsStringValueParser::new().try_map(|text| ReplicaArgument::parse(&text)))]
    #[arg(help_heading = "Replicas")]
    #[serde(alias = "blk-file")]
    pub replica: Vec<ReplicaArgument>,

    /// How replicas are opened: past the page cache (O_DIRECT) or through it [default: direct]
    #[arg(
        long,
        value_name = "HOW",
        hide_possible_values = false,
        help_heading = "Replicas"
    )]
    pub cache: Option<Cache>,

    /// Where the disk remembers which replica missed what [default: none]
    ///
    /// Only `none` is possible: after a restart every replica votes again, also one that missed
    /// writes.
    #[arg(long, value_name = "WHERE", help_heading = "Replicas")]
    pub record: Option<Record>,

    /// How many equal sectors make a winner [default: floor(N/2)+1]
    #[arg(long, value_name = "T", help_heading = "Voting")]
    #[arg(value_parser = whole_number::<u8>)]
    pub threshold: Option<u8>,

    /// Accept a threshold of N/2 or less, where two versions can have enough votes
    ///
    /// Every replica must then answer each read, the largest group wins and a tie is an I/O
    /// error.
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    #[arg(
        require_equals = true,
        hide_possible_values = true,
        help_heading = "Voting"
    )]
    pub allow_minority_threshold: Option<bool>,

    /// Vote on reads, or take the first replica that answers [default: quorum]
    #[arg(long, value_name = "PATTERN", help_heading = "Voting")]
    pub read_pattern: Option<ReadPatternName>,

    /// Rewrite sectors of a replica that was outvoted or could not read them [default: on; off with
    /// --read-only]
    #[arg(long, value_name = "on|off", help_heading = "Voting")]
    pub repair: Option<OnOff>,

    /// Compare two replicas and stop the daemon at the first difference
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    #[arg(
        require_equals = true,
        hide_possible_values = true,
        help_heading = "Voting"
    )]
    pub blkverify: Option<bool>,

    /// Refuse writes of the guest
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    #[arg(
        require_equals = true,
        hide_possible_values = true,
        help_heading = "Device"
    )]
    pub read_only: Option<bool>,

    /// What the guest sees as the disk's serial number, up to 20 characters
    ///
    /// The default follows from the path of the first replica. Set it where the guest finds
    /// its disks by /dev/disk/by-id. It is also the name of the disk in events.
    #[arg(long, value_name = "TEXT", help_heading = "Device")]
    pub serial: Option<String>,

    /// Logical block size the guest is told, 512 or 4096 [default: the largest of the replicas]
    #[arg(long, value_name = "BYTES", help_heading = "Device")]
    pub block_size: Option<BlockSize>,

    /// Queues offered to the front-end, 1 to 256 [default: 64]
    ///
    /// QEMU asks for one per virtual CPU and does not start with fewer.
    #[arg(long, value_name = "COUNT", help_heading = "Device")]
    #[arg(value_parser = whole_number::<u16>)]
    pub num_queues: Option<u16>,

    /// Largest queue accepted, a power of two from 4 to 1024 [default: 256]
    #[arg(long, value_name = "ENTRIES", help_heading = "Device")]
    #[arg(value_parser = whole_number::<u16>)]
    pub queue_size: Option<u16>,

    /// Threads that serve the queues [default: CPUs, at most 4]
    #[arg(long, value_name = "COUNT", help_heading = "Resources")]
    #[arg(value_parser = whole_number::<u16>)]
    pub workers: Option<u16>,

    /// Memory for data of requests in flight, up to 4G; more requests wait [default: 64M]
    #[arg(long, value_name = "SIZE", help_heading = "Resources")]
    pub buffer_memory: Option<ByteSize>,

    /// Seconds to wait at the start for a replica that another process has locked [default: 5]
    ///
    /// A daemon that was killed keeps its locks until its last write has landed.
    #[arg(long, value_name = "SECONDS", help_heading = "Resources")]
    #[arg(value_parser = whole_number::<u16>)]
    pub lock_timeout: Option<u16>,

    /// Append events (JSON lines, as in QMP) to this file or fifo, or to an open descriptor
    ///
    /// A number is a descriptor; a file whose name is a number is written ./3. A reader that is
    /// too slow loses events (their count is told), the disk never waits. SIGHUP opens the file
    /// again.
    #[arg(long, value_name = "PATH|FD", help_heading = "Log and events")]
    pub events: Option<EventsTarget>,

    /// How the log on standard error is written [default: text]
    #[arg(long, value_name = "FORMAT", help_heading = "Log and events")]
    pub log_format: Option<LogFormat>,

    /// The least important lines that are logged [default: info]
    #[arg(long, value_name = "LEVEL", help_heading = "Log and events")]
    pub log_level: Option<LogLevel>,
}

impl Settings {
    /// These settings, and `beneath` where they say nothing. Flags are laid over the file.
    ///
    /// A list of replicas replaces the other one whole, and so does the choice between socket
    /// path and descriptor.
    #[must_use]
    pub fn over(self, beneath: Self) -> Self {
        let front_end_given = self.socket_path.is_some() || self.fd.is_some();
        let (socket_path, fd) = if front_end_given {
            (self.socket_path, self.fd)
        } else {
            (beneath.socket_path, beneath.fd)
        };
        Self {
            socket_path,
            fd,
            replica: if self.replica.is_empty() {
                beneath.replica
            } else {
                self.replica
            },
            cache: self.cache.or(beneath.cache),
            record: self.record.or(beneath.record),
            threshold: self.threshold.or(beneath.threshold),
            allow_minority_threshold: self
                .allow_minority_threshold
                .or(beneath.allow_minority_threshold),
            read_pattern: self.read_pattern.or(beneath.read_pattern),
            repair: self.repair.or(beneath.repair),
            blkverify: self.blkverify.or(beneath.blkverify),
            read_only: self.read_only.or(beneath.read_only),
            serial: self.serial.or(beneath.serial),
            block_size: self.block_size.or(beneath.block_size),
            num_queues: self.num_queues.or(beneath.num_queues),
            queue_size: self.queue_size.or(beneath.queue_size),
            workers: self.workers.or(beneath.workers),
            buffer_memory: self.buffer_memory.or(beneath.buffer_memory),
            lock_timeout: self.lock_timeout.or(beneath.lock_timeout),
            events: self.events.or(beneath.events),
            log_format: self.log_format.or(beneath.log_format),
            log_level: self.log_level.or(beneath.log_level),
        }
    }

    /// Takes relative paths as relative to `folder`: those of a file mean the file's folder, so
    /// that a service manager that starts the daemon in `/` finds them too.
    #[must_use]
    pub fn relative_to(mut self, folder: &Path) -> Self {
        if let Some(path) = &mut self.socket_path {
            *path = folder.join(&*path);
        }
        for replica in &mut self.replica {
            replica.path = folder.join(&replica.path);
        }
        if let Some(EventsTarget::Path(path)) = &mut self.events {
            *path = folder.join(&*path);
        }
        self
    }
}
