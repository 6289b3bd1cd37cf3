// SPDX-License-Identifier: Apache-2.0
//! What flags and the file may say. One list for both, so that the names cannot drift apart.

use std::path::{Path, PathBuf};

use clap::builder::{OsStringValueParser, TypedValueParser};
use serde::Deserialize;

use super::inherited::InheritedSocket;
use super::replica_argument::ReplicaArgument;
use super::values::{
    BlockSize, ByteSize, Cache, CrashTie, EventsTarget, GrowMode, Interval, LogFormat, LogLevel,
    OnLostQuorum, OnOff, Polling, ReadPatternName, RecordMode, ScrubMode, whole_number,
};

/// Every setting of a disk, none of them decided. The comments are the help of the flags.
#[derive(Clone, PartialEq, Eq, Debug, Default, clap::Args, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Settings {
    /// Listen for the front-end on this Unix socket
    ///
    /// A socket file that a killed daemon left behind is replaced. Somebody who listens on it has
    /// --lock-timeout to stop, so that the next daemon may be started before the last one has
    /// ended.
    #[arg(long, value_name = "PATH", conflicts_with = "fd")]
    #[arg(help_heading = "Front-end")]
    pub socket_path: Option<PathBuf>,

    /// Use this inherited Unix stream socket: a descriptor number, or `systemd`
    ///
    /// It may be listening or connected. `systemd` is the socket that a .socket unit listens on
    /// (LISTEN_FDS): front-ends then find it also while no daemon runs.
    #[arg(long, value_name = "N|systemd", help_heading = "Front-end")]
    #[arg(value_parser = str::parse::<InheritedSocket>)]
    pub fd: Option<InheritedSocket>,

    /// A copy of the disk: a raw file or block device; give it once per replica, 1 to 16 times
    ///
    /// Options follow the path: name=NAME (in log and events; default replica0, replica1, ...
    /// in the order given), cache=direct|buffered (instead of --cache), format=raw (says that an
    /// image that looks like qcow2 is meant to be raw all the same), record=PATH (a copy of the
    /// state record is kept in that file; give it for 1, 3 or 5 replicas). A comma in a path is
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

    /// Whether the disk remembers which replica missed what [default: auto]
    ///
    /// The state record is a small file of which 3 copies are kept, named IMAGE.qrec, beside the
    /// first three replicas that are files; 1 copy beside the first one if there are fewer. It
    /// is made when plain images are served for the first time. `quorum-blk record show` prints
    /// it.
    #[arg(long, value_name = "MODE", help_heading = "State record")]
    pub record: Option<RecordMode>,

    /// Keep the copies of the state record in this folder, as NAME.qrec by the replicas' names
    ///
    /// Needed when no replica is a file. The folder must exist and outlive a restart of the host;
    /// put it on another disk than the replicas. All copies in one folder are lost with it: where
    /// that matters give record=PATH with the replicas instead.
    #[arg(long, value_name = "FOLDER", help_heading = "State record")]
    pub record_dir: Option<PathBuf>,

    /// Start although only a minority of the record copies, or of the replicas, is there
    ///
    /// Dangerous: what the missing ones hold may be newer and is given up; when they come back
    /// they are overwritten whole. Give it for one start, when the others are lost for good.
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    #[arg(
        require_equals = true,
        hide_possible_values = true,
        help_heading = "State record"
    )]
    pub force: Option<bool>,

    /// First use of plain images: take them for equal, without comparing them in the background
    ///
    /// For images just made (all zero) or copied from one another. Ignored when there is a
    /// record.
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    #[arg(
        require_equals = true,
        hide_possible_values = true,
        help_heading = "State record"
    )]
    pub assume_clean: Option<bool>,

    /// First use of plain images: this replica is right, the others are overwritten with it
    ///
    /// For one image with a system on it and others of the same size with anything. Until they
    /// are copied only this replica votes. Ignored when there is a record.
    #[arg(long, value_name = "NAME", help_heading = "State record")]
    pub adopt_from: Option<String>,

    /// Give this replica another chance: forget what it did wrong, use it again if it failed
    ///
    /// A replica that failed too often (--max-write-errors, --max-kicks, --max-repairs) is left
    /// out, also by later starts, until this is given once. It is then opened, and what it missed
    /// is copied to it.
    #[arg(long, value_name = "NAME", help_heading = "State record")]
    pub clear: Option<String>,

    /// Where no replica is current any more, believe this one
    ///
    /// Such parts of the disk give I/O errors until somebody decides. What the named replica holds
    /// there counts from then on, and is copied to the others; newer data may be lost.
    #[arg(long, value_name = "NAME", help_heading = "State record")]
    pub force_current: Option<String>,

    /// Longest a write waits for the rest once enough replicas hold it, in ms [default: 1000]
    ///
    /// The others get four times as long as the slowest of those took, at least 20 ms and at
    /// most this; who needs more is left behind there and brought up to date later. 20 to 60000.
    #[arg(long, value_name = "MS", help_heading = "Slow and lost replicas")]
    #[arg(value_parser = whole_number::<u32>)]
    pub write_grace: Option<u32>,

    /// Seconds a flush waits for the rest once enough replicas are flushed [default: 5]
    ///
    /// Who needs longer is taken out of the set, opened again and brought up to date.
    #[arg(long, value_name = "SECONDS", help_heading = "Slow and lost replicas")]
    #[arg(value_parser = whole_number::<u16>)]
    pub flush_grace: Option<u16>,

    /// Seconds an operation may take before its replica is taken out of the set [default: 30]
    #[arg(long, value_name = "SECONDS", help_heading = "Slow and lost replicas")]
    #[arg(value_parser = whole_number::<u16>)]
    pub io_timeout: Option<u16>,

    /// What requests get while fewer replicas are up than must agree [default: error]
    #[arg(long, value_name = "WHAT", help_heading = "Slow and lost replicas")]
    pub on_lost_quorum: Option<OnLostQuorum>,

    /// Take a replica out for good after this many failed writes in 60 s; 0 = never [default: 16]
    ///
    /// Half as many make it suspect: it votes, but never decides a tie.
    #[arg(long, value_name = "COUNT", help_heading = "Slow and lost replicas")]
    #[arg(value_parser = whole_number::<u32>)]
    pub max_write_errors: Option<u32>,

    /// Take a replica out for good when it was lost this often in 60 s; 0 = never [default: 4]
    #[arg(long, value_name = "COUNT", help_heading = "Slow and lost replicas")]
    #[arg(value_parser = whole_number::<u32>)]
    pub max_kicks: Option<u32>,

    /// Take a replica out for good after this many repaired sectors in 24 h; 0 = never [default: 256]
    #[arg(long, value_name = "SECTORS", help_heading = "Slow and lost replicas")]
    #[arg(value_parser = whole_number::<u32>)]
    pub max_repairs: Option<u32>,

    /// What to do with sectors that nobody agrees on after a power loss [default: choose]
    #[arg(long, value_name = "WHAT", help_heading = "Resync and scrub")]
    pub crash_tie: Option<CrashTie>,

    /// Bytes per second copied to a replica that is behind while the guest works [default: 128M]
    ///
    /// At least 1M. Beside an idle guest there is no limit.
    #[arg(long, value_name = "SIZE", help_heading = "Resync and scrub")]
    pub resync_rate: Option<ByteSize>,

    /// How often all replicas are read and compared whole, as in 7d or 12h, or off [default: 30d]
    ///
    /// Counted from the start or the end of the last one. It goes on where it was after a restart.
    /// SIGUSR2 begins one at once. With --read-pattern fifo it is off.
    #[arg(long, value_name = "INTERVAL", help_heading = "Resync and scrub")]
    pub scrub_interval: Option<Interval>,

    /// Bytes per second a scrub, or the first comparison, reads of each replica [default: 64M]
    ///
    /// At least 1M; less while the guest is busy.
    #[arg(long, value_name = "SIZE", help_heading = "Resync and scrub")]
    pub scrub_rate: Option<ByteSize>,

    /// What a scrub does about a difference [default: repair; check with --repair off]
    #[arg(long, value_name = "WHAT", help_heading = "Resync and scrub")]
    pub scrub: Option<ScrubMode>,

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

    /// Wait for a guest that comes by live migration: open the disk only when its rings start
    ///
    /// For the destination of a migration, while the daemon of the source still has the replicas.
    /// The disk is looked at (its size is in the state record, which both must see) but neither
    /// locked nor written. When the guest begins to run here, the locks are waited for
    /// (--lock-timeout): the source lets go when the guest has stopped there. If the migration is
    /// cancelled, nothing was touched. The replicas and --serial must be those of the source.
    #[arg(
        long,
        num_args = 0,
        default_missing_value = "true",
        help_heading = "Device"
    )]
    pub incoming: Option<bool>,

    /// What to do when the replicas are longer than the disk: leave it, or make it longer at the
    /// start [default: no]
    ///
    /// With `found` the disk gets the size of the shortest replica that is up. It never becomes
    /// shorter. While it is served, `quorum-blk ctl resize` makes it longer.
    #[arg(long, value_name = "no|found", help_heading = "Device")]
    #[arg(hide_possible_values = true)]
    pub grow: Option<GrowMode>,

    /// Largest queue accepted, a power of two from 4 to 1024 [default: 256]
    #[arg(long, value_name = "ENTRIES", help_heading = "Device")]
    #[arg(value_parser = whole_number::<u16>)]
    pub queue_size: Option<u16>,

    /// Threads that serve the queues [default: CPUs, at most 4]
    #[arg(long, value_name = "COUNT", help_heading = "Resources")]
    #[arg(value_parser = whole_number::<u16>)]
    pub workers: Option<u16>,

    /// Microseconds a worker with nothing to do looks for more before it sleeps [default: adaptive]
    ///
    /// `adaptive` looks for as long as requests and replicas take less than 100 us, and takes no
    /// processor time when the guest is idle; a number, 0 to 1000, always looks that long. More
    /// than 0 makes single requests faster and takes processor time from others.
    #[arg(long, value_name = "US", help_heading = "Resources")]
    pub poll_us: Option<Polling>,

    /// Memory for data of requests in flight, up to 4G; more requests wait [default: 64M]
    #[arg(long, value_name = "SIZE", help_heading = "Resources")]
    pub buffer_memory: Option<ByteSize>,

    /// Seconds to wait for replicas that another process has locked [default: 5, with --incoming 30]
    ///
    /// A daemon that was killed keeps its locks until its last write has landed; the source of a live
    /// migration, until the guest has stopped there. As long again is waited for a process that
    /// listens on --socket-path.
    #[arg(long, value_name = "SECONDS", help_heading = "Resources")]
    #[arg(value_parser = whole_number::<u16>)]
    pub lock_timeout: Option<u16>,

    /// Take commands on this Unix socket: QMP, as from QEMU; `quorum-blk ctl` speaks it
    ///
    /// Whoever may open the socket (its owner: it is made with mode 0600) can ask for the status,
    /// make the disk longer (block_resize), begin scrubs, clear replicas, and is sent all events.
    #[arg(long, value_name = "PATH", help_heading = "Log and events")]
    pub control: Option<PathBuf>,

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
    /// A list of replicas replaces the other one whole, and so do the choices between socket path
    /// and descriptor, between a folder for the record and none, and of what the first use of
    /// plain images means.
    #[must_use]
    pub fn over(self, beneath: Self) -> Self {
        let front_end_given = self.socket_path.is_some() || self.fd.is_some();
        let (socket_path, fd) = if front_end_given {
            (self.socket_path, self.fd)
        } else {
            (beneath.socket_path, beneath.fd)
        };
        let record_given = self.record.is_some() || self.record_dir.is_some();
        let (record, record_dir) = if record_given {
            (self.record, self.record_dir)
        } else {
            (beneath.record, beneath.record_dir)
        };
        let first_use_given = self.assume_clean.is_some() || self.adopt_from.is_some();
        let (assume_clean, adopt_from) = if first_use_given {
            (self.assume_clean, self.adopt_from)
        } else {
            (beneath.assume_clean, beneath.adopt_from)
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
            record,
            record_dir,
            force: self.force.or(beneath.force),
            assume_clean,
            adopt_from,
            clear: self.clear.or(beneath.clear),
            force_current: self.force_current.or(beneath.force_current),
            write_grace: self.write_grace.or(beneath.write_grace),
            flush_grace: self.flush_grace.or(beneath.flush_grace),
            io_timeout: self.io_timeout.or(beneath.io_timeout),
            on_lost_quorum: self.on_lost_quorum.or(beneath.on_lost_quorum),
            max_write_errors: self.max_write_errors.or(beneath.max_write_errors),
            max_kicks: self.max_kicks.or(beneath.max_kicks),
            max_repairs: self.max_repairs.or(beneath.max_repairs),
            crash_tie: self.crash_tie.or(beneath.crash_tie),
            resync_rate: self.resync_rate.or(beneath.resync_rate),
            scrub_interval: self.scrub_interval.or(beneath.scrub_interval),
            scrub_rate: self.scrub_rate.or(beneath.scrub_rate),
            scrub: self.scrub.or(beneath.scrub),
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
            poll_us: self.poll_us.or(beneath.poll_us),
            buffer_memory: self.buffer_memory.or(beneath.buffer_memory),
            lock_timeout: self.lock_timeout.or(beneath.lock_timeout),
            incoming: self.incoming.or(beneath.incoming),
            grow: self.grow.or(beneath.grow),
            control: self.control.or(beneath.control),
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
            if let Some(record) = &mut replica.record {
                *record = folder.join(&*record);
            }
        }
        if let Some(path) = &mut self.record_dir {
            *path = folder.join(&*path);
        }
        if let Some(path) = &mut self.control {
            *path = folder.join(&path);
        }
        if let Some(EventsTarget::Path(path)) = &mut self.events {
            *path = folder.join(&*path);
        }
        self
    }
}
