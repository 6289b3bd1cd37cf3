// SPDX-License-Identifier: Apache-2.0
//! The configuration the daemon runs with: every value decided, every choice checked.

use std::collections::BTreeSet;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use super::error::ConfigError;
use super::inherited::InheritedSocket;
use super::record::{FirstUse, RecordConfig, named};
use super::settings::Settings;
use super::upkeep::{Patience, Upkeep};
use super::values::{
    BlockSize, ByteSize, Cache, EventsTarget, Format, GrowMode, LogFormat, LogLevel, Polling,
    ReadPatternName,
};
use crate::quorum::{Policy, PolicyError, ReadPattern};
use crate::units::ReplicaId;

/// Queues offered unless the user says otherwise: QEMU wants one per virtual CPU and does not
/// start with fewer.
const NUM_QUEUES_DEFAULT: u16 = 64;
/// A vhost-user kick or call message has eight bits for the number of the queue.
pub(super) const NUM_QUEUES_MAX: u16 = 256;
/// Largest queue accepted unless the user says otherwise.
const QUEUE_SIZE_DEFAULT: u16 = 256;
/// Front-ends announce two segments fewer than the queue has entries; at least two must be left.
pub(super) const QUEUE_SIZE_MIN: u16 = 4;
/// What QEMU and Linux go up to.
pub(super) const QUEUE_SIZE_MAX: u16 = 1024;
/// More threads than this do not make one disk faster; the default stops here.
const WORKERS_DEFAULT_MAX: u16 = 4;
/// A worker is a lane, and lanes are numbered by a byte of which the top half is kept free.
pub(super) const WORKERS_MAX: u16 = 63;
/// Memory for requests in flight unless the user says otherwise.
const BUFFER_MEMORY_DEFAULT: ByteSize = ByteSize(64 << 20);
/// More is never in flight at once, and the kernel pins all of it at the start: a slip of the pen
/// must not take the host's memory away.
pub(super) const BUFFER_MEMORY_MAX: ByteSize = ByteSize(4 << 30);
/// The longest piece of a request that is worked on at once.
const PIECE_BYTES_MAX: u64 = 256 << 10;
/// Seconds. A killed daemon's last operations land within milliseconds on storage that works.
const LOCK_TIMEOUT: u16 = 5;
/// Seconds. The source of a migration has drained, flushed and closed the disk when the guest is told
/// to run elsewhere, unless its storage is slow.
const LOCK_TIMEOUT_INCOMING: u16 = 30;
/// The most characters virtio has for a serial number.
pub(super) const SERIAL_LEN_MAX: usize = 20;

/// One disk, as the user wants it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Config {
    /// Where the front-end comes from.
    pub front_end: FrontEnd,
    /// The replicas, in order of configuration, 1 to 16, with different names.
    pub replicas: Vec<Replica>,
    /// How many equal sectors make a winner, T.
    pub threshold: usize,
    /// Whether T may be N/2 or less (rule V3).
    pub allow_minority_threshold: bool,
    /// Who is asked on a read.
    pub read_pattern: ReadPattern,
    /// Whether dissenters are rewritten. The default is yes, but for a read-only disk.
    pub repair: bool,
    /// Whether the first difference of two replicas stops the daemon.
    pub blkverify: bool,
    /// Whether the guest may not write.
    pub read_only: bool,
    /// Serial number for the guest and name of the disk in events: 1 to 20 printable ASCII
    /// characters.
    pub serial: String,
    /// Logical block size, or `None` for the largest smallest block of any replica.
    pub block_size: Option<BlockSize>,
    /// Queues offered, 1 to 256.
    pub num_queues: u16,
    /// Largest queue accepted: a power of two, 4 to 1024.
    pub queue_size: u16,
    /// Worker threads, 1 to `num_queues`.
    pub workers: u16,
    /// How long a worker with nothing to do looks for more before it sleeps.
    pub polling: Polling,
    /// Memory for data of requests in flight, over all workers, in bytes.
    pub buffer_memory_bytes: u64,
    /// How long a replica that somebody else has locked is waited for when the disk is opened (rule
    /// S2).
    pub lock_timeout: Duration,
    /// Whether the disk is opened only when its first ring starts: its guest is still being served
    /// by another daemon (rule Q5).
    pub incoming: bool,
    /// What becomes of a disk whose replicas are longer than it when it is opened (rule Z3).
    pub grow: GrowMode,
    /// Where commands are taken.
    pub control: Option<PathBuf>,
    /// Where events go, besides the log.
    pub events: Option<EventsTarget>,
    /// How the log is written.
    pub log_format: LogFormat,
    /// What is logged.
    pub log_level: LogLevel,
    /// Where the disk remembers who missed what.
    pub record: RecordConfig,
    /// What images without a record are taken for (rule S5).
    pub first_use: FirstUse,
    /// A replica that is to have another chance.
    pub clear: Option<ReplicaId>,
    /// The replica that is believed where none is current any more.
    pub force_current: Option<ReplicaId>,
    /// Whether a minority of the record copies or replicas is enough to start (rule S6).
    pub force: bool,
    /// How long replicas are waited for.
    pub patience: Patience,
    /// How replicas are looked after.
    pub upkeep: Upkeep,
}

/// Where the front-end comes from.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum FrontEnd {
    /// A Unix socket to listen on.
    SocketPath(PathBuf),
    /// A descriptor of the parent process: a listening or a connected Unix stream socket.
    Fd(i32),
    /// The socket a service manager passes (sd_listen_fds(3)).
    Systemd,
}

/// One replica.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Replica {
    /// 1 to 32 of `A-Z a-z 0-9 . _ -`, different from all others of the disk.
    pub name: String,
    /// The image.
    pub path: PathBuf,
    /// Past the page cache or through it.
    pub cache: Cache,
    /// The format of the image, if it was said. Otherwise it is taken for raw, unless it looks
    /// like another format.
    pub format: Option<Format>,
}

impl Config {
    /// Decides what the settings leave open and checks the whole.
    ///
    /// # Errors
    /// The first thing that does not fit, by the name of its flag, and the cure.
    pub fn from_settings(settings: Settings) -> Result<Self, ConfigError> {
        let front_end = front_end(settings.socket_path.clone(), settings.fd)?;
        Self::with_front_end(front_end, settings)
    }

    /// The same for a disk that is looked at and not served: what the settings say about the
    /// front-end does not matter, and the [`FrontEnd`] is a descriptor that nobody has.
    ///
    /// # Errors
    /// As [`Config::from_settings`].
    pub fn without_front_end(settings: Settings) -> Result<Self, ConfigError> {
        Self::with_front_end(FrontEnd::Fd(-1), settings)
    }

    fn with_front_end(front_end: FrontEnd, settings: Settings) -> Result<Self, ConfigError> {
        let replicas = replicas(&settings.replica, settings.cache.unwrap_or_default())?;
        let policy = Policy::new(replicas.len());
        let num_queues = settings.num_queues.unwrap_or(NUM_QUEUES_DEFAULT);
        if !(1..=NUM_QUEUES_MAX).contains(&num_queues) {
            return Err(ConfigError::NumQueues(num_queues));
        }
        let queue_size = settings.queue_size.unwrap_or(QUEUE_SIZE_DEFAULT);
        if !queue_size.is_power_of_two() || !(QUEUE_SIZE_MIN..=QUEUE_SIZE_MAX).contains(&queue_size)
        {
            return Err(ConfigError::QueueSize(queue_size));
        }
        let workers = workers(settings.workers, num_queues)?;
        let buffer_memory_bytes = buffer_memory(settings.buffer_memory, workers, replicas.len())?;
        let read_only = settings.read_only.unwrap_or(false);
        let repair = settings.repair.map_or(!read_only, |repair| repair.is_on());
        let incoming = settings.incoming.unwrap_or(false);
        let lock_timeout = settings.lock_timeout.unwrap_or(match incoming {
            true => LOCK_TIMEOUT_INCOMING,
            false => LOCK_TIMEOUT,
        });
        let votes = settings.read_pattern != Some(ReadPatternName::Fifo);
        let config = Self {
            record: RecordConfig::from_settings(&settings, &replicas)?,
            first_use: FirstUse::from_settings(&settings, &replicas)?,
            clear: (settings.clear.as_deref())
                .map(|name| named("--clear", name, &replicas))
                .transpose()?,
            force_current: (settings.force_current.as_deref())
                .map(|name| named("--force-current", name, &replicas))
                .transpose()?,
            force: settings.force.unwrap_or(false),
            patience: Patience::from_settings(&settings)?,
            upkeep: Upkeep::from_settings(&settings, repair, votes)?,
            front_end,
            threshold: settings.threshold.map_or(policy.threshold, usize::from),
            allow_minority_threshold: settings.allow_minority_threshold.unwrap_or(false),
            read_pattern: match settings.read_pattern.unwrap_or_default() {
                ReadPatternName::Quorum => ReadPattern::Quorum,
                ReadPatternName::Fifo => ReadPattern::Fifo,
            },
            repair,
            blkverify: settings.blkverify.unwrap_or(false),
            read_only,
            serial: serial(settings.serial, &replicas)?,
            replicas,
            block_size: settings.block_size,
            num_queues,
            queue_size,
            workers,
            polling: settings.poll_us.unwrap_or_default(),
            buffer_memory_bytes,
            lock_timeout: Duration::from_secs(lock_timeout.into()),
            incoming,
            grow: settings.grow.unwrap_or_default(),
            control: settings.control,
            events: settings.events,
            log_format: settings.log_format.unwrap_or_default(),
            log_level: settings.log_level.unwrap_or_default(),
        };
        config.policy().validate().map_err(policy_error)?;
        Ok(config)
    }

    /// How the replica set decides. What only the opened replicas can tell is left at its
    /// default.
    #[must_use]
    pub fn policy(&self) -> Policy {
        Policy {
            threshold: self.threshold,
            allow_minority_threshold: self.allow_minority_threshold,
            read_pattern: self.read_pattern,
            repair: self.repair,
            blkverify: self.blkverify,
            write_grace_min: self.patience.write_grace_min,
            write_grace_max: self.patience.write_grace_max,
            flush_grace: self.patience.flush_grace,
            io_timeout: self.patience.io_timeout,
            pause: self.patience.pause,
            crash_tie_error: self.upkeep.crash_tie_error,
            ..Policy::new(self.replicas.len())
        }
    }

    /// The names of the replicas, in order of configuration.
    #[must_use]
    pub fn replica_names(&self) -> Vec<String> {
        let names = self.replicas.iter().map(|replica| replica.name.clone());
        names.collect()
    }
}

/// The core knows no flags: what it says about the threshold is said again with its flag.
fn policy_error(error: PolicyError) -> ConfigError {
    match error {
        PolicyError::Threshold {
            threshold,
            replicas,
        } => ConfigError::Threshold {
            threshold,
            replicas,
            least: replicas / 2 + 1,
        },
        other => other.into(),
    }
}

fn front_end(
    socket_path: Option<PathBuf>,
    fd: Option<InheritedSocket>,
) -> Result<FrontEnd, ConfigError> {
    match (socket_path, fd) {
        (None, None) => Err(ConfigError::NoFrontEnd),
        (Some(_), Some(_)) => Err(ConfigError::TwoFrontEnds),
        (None, Some(InheritedSocket::Fd(fd))) if fd < 0 => Err(ConfigError::Fd(fd)),
        (None, Some(InheritedSocket::Fd(fd))) => Ok(FrontEnd::Fd(fd)),
        (None, Some(InheritedSocket::Systemd)) => Ok(FrontEnd::Systemd),
        (Some(path), None) if path.as_os_str().is_empty() => Err(ConfigError::EmptySocketPath),
        (Some(path), None) => Ok(FrontEnd::SocketPath(path)),
    }
}

fn replicas(
    arguments: &[super::ReplicaArgument],
    cache: Cache,
) -> Result<Vec<Replica>, ConfigError> {
    if arguments.is_empty() {
        return Err(ConfigError::NoReplica);
    }
    let mut names = BTreeSet::new();
    let mut replicas = Vec::with_capacity(arguments.len());
    for (index, argument) in arguments.iter().enumerate() {
        let name = argument.name.clone();
        let name = name.unwrap_or_else(|| format!("replica{index}"));
        if !names.insert(name.clone()) {
            return Err(ConfigError::SameName(name));
        }
        replicas.push(Replica {
            name,
            path: argument.path.clone(),
            cache: argument.cache.unwrap_or(cache),
            format: argument.format,
        });
    }
    Ok(replicas)
}

fn workers(given: Option<u16>, num_queues: u16) -> Result<u16, ConfigError> {
    let Some(workers) = given else {
        let cpus = thread::available_parallelism().map_or(1, usize::from);
        let cpus = u16::try_from(cpus).unwrap_or(WORKERS_DEFAULT_MAX);
        return Ok(cpus.min(WORKERS_DEFAULT_MAX).min(num_queues));
    };
    if !(1..=WORKERS_MAX).contains(&workers) {
        return Err(ConfigError::Workers(workers));
    }
    if workers > num_queues {
        return Err(ConfigError::IdleWorkers {
            workers,
            num_queues,
        });
    }
    Ok(workers)
}

/// Each worker must be able to hold one longest piece for every replica and one copy of what the
/// guest writes, and the same again for settling a difference meanwhile.
fn buffer_memory(
    given: Option<ByteSize>,
    workers: u16,
    replicas: usize,
) -> Result<u64, ConfigError> {
    let given = given.unwrap_or(BUFFER_MEMORY_DEFAULT);
    let pieces = u64::try_from(replicas + 1).unwrap_or(u64::MAX);
    let least = ByteSize((u64::from(workers) * 2 * PIECE_BYTES_MAX).saturating_mul(pieces));
    if given < least {
        return Err(ConfigError::BufferMemory {
            given,
            least,
            workers,
            replicas,
        });
    }
    if given > BUFFER_MEMORY_MAX {
        return Err(ConfigError::BufferMemoryTooLarge(given));
    }
    Ok(given.0)
}

fn serial(given: Option<String>, replicas: &[Replica]) -> Result<String, ConfigError> {
    match given {
        None => Ok(serial_of(&replicas[0].path)),
        Some(serial) => {
            let printable = serial.bytes().all(|byte| matches!(byte, b' '..=b'~'));
            if !printable || !(1..=SERIAL_LEN_MAX).contains(&serial.len()) {
                return Err(ConfigError::Serial(serial));
            }
            Ok(serial)
        }
    }
}

/// A serial number that stays the same over restarts and differs between two disks: a hash
/// (FNV-1a, 64 bits) of the absolute path of the first replica.
fn serial_of(path: &Path) -> String {
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for &byte in absolute.as_os_str().as_bytes() {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    }
    format!("qb{hash:016x}")
}

#[cfg(test)]
mod tests {
    use super::super::{CrashTie, OnLostQuorum, OnOff, RecordMode, ReplicaArgument};
    use super::*;

    fn settings(replicas: usize) -> Settings {
        Settings {
            socket_path: Some("/run/s".into()),
            replica: (0..replicas)
                .map(|index| ReplicaArgument::from_path(format!("/r{index}").into()))
                .collect(),
            ..Settings::default()
        }
    }

    fn refusal(change: impl FnOnce(&mut Settings)) -> String {
        let mut settings = settings(3);
        change(&mut settings);
        Config::from_settings(settings).unwrap_err().to_string()
    }

    #[test]
    fn config_decides_what_is_left_open() {
        let config = Config::from_settings(settings(3)).unwrap();
        assert_eq!(config.front_end, FrontEnd::SocketPath("/run/s".into()));
        assert_eq!(config.replica_names(), ["replica0", "replica1", "replica2"]);
        assert_eq!(
            (config.threshold, config.num_queues, config.queue_size),
            (2, 64, 256)
        );
        assert!((1..=4).contains(&config.workers));
        assert_eq!(config.buffer_memory_bytes, 64 << 20);
        assert!(config.repair && !config.blkverify && !config.read_only);
        assert_eq!(config.replicas[0].cache, Cache::Direct);
        assert_eq!(config.policy(), Policy::new(3));
        for (replicas, threshold) in [(1, 1), (2, 2), (4, 3), (5, 3), (16, 9)] {
            let config = Config::from_settings(settings(replicas)).unwrap();
            assert_eq!(config.threshold, threshold);
        }
    }

    #[test]
    fn config_serial_is_stable_and_differs_between_disks() {
        let serial = |path: &str| {
            let mut settings = settings(2);
            settings.replica[0].path = path.into();
            Config::from_settings(settings).unwrap().serial
        };
        assert_eq!(serial("/a"), serial("/a"));
        assert_ne!(serial("/a"), serial("/b"));
        assert!(serial("/a").len() <= SERIAL_LEN_MAX);
    }

    #[test]
    fn config_that_does_not_fit_names_flag_and_cure() {
        type Change = fn(&mut Settings);
        let cases: [(&str, Change); 25] = [
            ("--record none and --record-dir exclude each other", |s| {
                s.record = Some(RecordMode::None);
                s.record_dir = Some("/r".into());
            }),
            ("--record none and --force exclude each other", |s| {
                s.record = Some(RecordMode::None);
                s.force = Some(true);
            }),
            ("--record-dir and record= of a replica exclude", |s| {
                s.replica[0].record = Some("/r".into());
                s.record_dir = Some("/r".into());
            }),
            ("record= is given for 2 replicas", |s| {
                s.replica[0].record = Some("/x".into());
                s.replica[1].record = Some("/y".into());
            }),
            (
                "--adopt-from `x` is no replica; the names are: replica0, replica1, replica2",
                |s| s.adopt_from = Some("x".to_owned()),
            ),
            (
                "--assume-clean (all replicas are equal) and --adopt-from",
                |s| {
                    s.adopt_from = Some("replica0".to_owned());
                    s.assume_clean = Some(true);
                },
            ),
            ("give --socket-path PATH, or --fd N", |s| {
                s.socket_path = None
            }),
            ("--socket-path and --fd exclude each other", |s| {
                s.fd = Some(InheritedSocket::Fd(3))
            }),
            ("--fd -1 is no descriptor", |s| {
                s.socket_path = None;
                s.fd = Some(InheritedSocket::Fd(-1));
            }),
            ("--socket-path is empty", |s| {
                s.socket_path = Some("".into())
            }),
            ("give --replica PATH once per replica, 1 to 16 times", |s| {
                s.replica.clear()
            }),
            ("17 replicas given; a disk has 1 to 16", |s| {
                *s = Settings {
                    workers: Some(1),
                    ..settings(17)
                };
            }),
            ("two replicas are named `replica2`", |s| {
                s.replica[0].name = Some("replica2".to_owned());
            }),
            (
                "--threshold 4 is impossible when the number of replicas is 3; give 2 to 3",
                |s| s.threshold = Some(4),
            ),
            ("--threshold 0 is impossible", |s| s.threshold = Some(0)),
            (
                "give --threshold 2 or more, or --allow-minority-threshold",
                |s| {
                    s.threshold = Some(1);
                },
            ),
            ("--blkverify compares exactly two replicas", |s| {
                s.blkverify = Some(true)
            }),
            ("--serial `` is not possible; give 1 to 20 printable", |s| {
                s.serial = Some(String::new());
            }),
            ("--serial `123456789012345678901`", |s| {
                s.serial = Some("123456789012345678901".to_owned());
            }),
            ("--num-queues 0 is not possible; give 1 to 256", |s| {
                s.num_queues = Some(0)
            }),
            (
                "--queue-size 100 is not possible; give a power of two from 4 to 1024",
                |s| {
                    s.queue_size = Some(100);
                },
            ),
            ("--workers 0 is not possible; give 1 to 63", |s| {
                s.workers = Some(0)
            }),
            ("give at most --workers 2, or more queues", |s| {
                s.num_queues = Some(2);
                s.workers = Some(3);
            }),
            ("give at least 2 MiB, or fewer --workers", |s| {
                s.workers = Some(1);
                s.buffer_memory = Some(ByteSize(1 << 20));
            }),
            (
                "--buffer-memory 5 GiB is too much; give at most 4 GiB",
                |s| {
                    s.buffer_memory = Some(ByteSize(5 << 30));
                },
            ),
        ];
        for (message, change) in cases {
            let refused = refusal(change);
            assert!(refused.contains(message), "expected {message:?}: {refused}");
        }
    }

    #[test]
    fn flags_win_over_the_file() {
        let mut file = settings(3);
        file.threshold = Some(3);
        file.repair = Some(OnOff::Off);
        file.read_only = Some(true);
        file.record = Some(RecordMode::None);
        file.assume_clean = Some(false);
        let flags = Settings {
            fd: Some(InheritedSocket::Fd(7)),
            replica: vec![ReplicaArgument::from_path("/x".into())],
            read_only: Some(false),
            threshold: Some(1),
            record_dir: Some("/v".into()),
            ..Settings::default()
        };
        let config = Config::from_settings(flags.over(file)).unwrap();
        assert_eq!(config.front_end, FrontEnd::Fd(7));
        assert_eq!(config.replicas.len(), 1);
        assert_eq!(config.threshold, 1);
        assert!(!config.repair && !config.read_only);
        assert_eq!(config.record, RecordConfig::Folder("/v".into()));
    }

    #[test]
    fn policy_has_what_was_asked_for() {
        let mut settings = settings(3);
        settings.write_grace = Some(50);
        settings.flush_grace = Some(2);
        settings.io_timeout = Some(7);
        settings.on_lost_quorum = Some(OnLostQuorum::Pause);
        settings.crash_tie = Some(CrashTie::Error);
        let policy = Config::from_settings(settings).unwrap().policy();
        assert_eq!(policy.write_grace_max, Duration::from_millis(50));
        assert_eq!(policy.flush_grace, Duration::from_secs(2));
        assert_eq!(policy.io_timeout, Duration::from_secs(7));
        assert!(policy.pause && policy.crash_tie_error);
    }
}
