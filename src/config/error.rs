// SPDX-License-Identifier: Apache-2.0
//! Why settings cannot be run with: each of them names the flag and the cure.

use thiserror::Error;

use super::disk::{
    BUFFER_MEMORY_MAX, NUM_QUEUES_MAX, QUEUE_SIZE_MAX, QUEUE_SIZE_MIN, SERIAL_LEN_MAX, WORKERS_MAX,
};
use super::record::RecordPlaceError;
use super::values::ByteSize;
use crate::quorum::PolicyError;
use crate::units::REPLICAS_MAX;

/// Settings that cannot be run with.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ConfigError {
    /// No socket at all.
    #[error(
        "no socket for the front-end; give --socket-path PATH, or --fd N for an inherited one, or \
         --fd systemd for the one of a .socket unit"
    )]
    NoFrontEnd,
    /// Both kinds of socket.
    #[error("--socket-path and --fd exclude each other; give one of them")]
    TwoFrontEnds,
    /// A descriptor number below zero.
    #[error("--fd {0} is no descriptor; give the number of an open one")]
    Fd(i32),
    /// A relative or empty socket path that makes no sense.
    #[error("--socket-path is empty; give the path of the socket to listen on")]
    EmptySocketPath,
    /// Nothing to serve.
    #[error("no replica given; give --replica PATH once per replica, 1 to {REPLICAS_MAX} times")]
    NoReplica,
    /// Two replicas of one name.
    #[error(
        "two replicas are named `{0}`; give each its own with --replica PATH,name=NAME \
         (without one a replica is named replica0, replica1, ... by its place)"
    )]
    SameName(String),
    /// More votes wanted than there are replicas, or none.
    #[error(
        "--threshold {threshold} is impossible when the number of replicas is {replicas}; \
         give {least} to {replicas}"
    )]
    Threshold {
        /// T.
        threshold: usize,
        /// N.
        replicas: usize,
        /// The smallest T that lets only one version win.
        least: usize,
    },
    /// The choices about voting do not fit together.
    #[error(transparent)]
    Policy(#[from] PolicyError),
    /// A serial number virtio has no room for.
    #[error(
        "--serial `{0}` is not possible; give 1 to {SERIAL_LEN_MAX} printable ASCII characters"
    )]
    Serial(String),
    /// Too few or too many queues.
    #[error("--num-queues {0} is not possible; give 1 to {NUM_QUEUES_MAX}")]
    NumQueues(u16),
    /// A queue size virtio or front-ends do not take.
    #[error(
        "--queue-size {0} is not possible; give a power of two from {QUEUE_SIZE_MIN} to \
         {QUEUE_SIZE_MAX}"
    )]
    QueueSize(u16),
    /// Too few or too many threads.
    #[error("--workers {0} is not possible; give 1 to {WORKERS_MAX}")]
    Workers(u16),
    /// Threads that would have nothing to do.
    #[error(
        "--workers {workers} with --num-queues {num_queues} leaves workers without a queue; give \
         at most --workers {num_queues}, or more queues"
    )]
    IdleWorkers {
        /// Threads.
        workers: u16,
        /// Queues.
        num_queues: u16,
    },
    /// Not enough memory for one request per worker.
    #[error(
        "--buffer-memory {given} is too little (workers: {workers}, replicas: {replicas}); \
         give at least {least}, or fewer --workers"
    )]
    BufferMemory {
        /// What was given.
        given: ByteSize,
        /// The smallest possible.
        least: ByteSize,
        /// Threads.
        workers: u16,
        /// N.
        replicas: usize,
    },
    /// Something that needs a record, without one.
    #[error(
        "--record none and {other} exclude each other: without a state record nothing is \
         remembered; leave one of them out"
    )]
    NoRecord {
        /// What needs a record.
        other: &'static str,
    },
    /// A folder without a name.
    #[error("--record-dir is empty; give the folder for the copies of the state record")]
    EmptyRecordDir,
    /// A folder for all copies and paths for some.
    #[error(
        "--record-dir and record= of a replica exclude each other; give the folder, or 1, 3 or 5 \
         paths"
    )]
    TwoRecordPlaces,
    /// Half of an even number of copies could be newer than the other.
    #[error(
        "record= is given for {0} replicas; more than half of the copies must always be readable, \
         so give it for 1, 3 or 5"
    )]
    RecordCopies(usize),
    /// There is no place for the record.
    #[error(transparent)]
    RecordPlace(#[from] RecordPlaceError),
    /// The images cannot be equal and different.
    #[error(
        "--assume-clean (all replicas are equal) and --adopt-from (one is right) exclude each \
         other; give one of them"
    )]
    TwoFirstUses,
    /// Nobody of that name.
    #[error("{flag} `{name}` is no replica; the names are: {known}")]
    NoSuchReplica {
        /// The flag.
        flag: &'static str,
        /// What was given.
        name: String,
        /// The names of the replicas.
        known: String,
    },
    /// A timeout out of range.
    #[error("--io-timeout {given} is not possible; give 1 to {most} seconds")]
    IoTimeout {
        /// What was given, in seconds.
        given: u16,
        /// The longest, in seconds.
        most: u16,
    },
    /// A grace out of range.
    #[error("--write-grace {given} is not possible; give {least} to {most} milliseconds")]
    WriteGrace {
        /// What was given, in milliseconds.
        given: u32,
        /// The shortest, in milliseconds.
        least: u32,
        /// The longest, in milliseconds.
        most: u32,
    },
    /// No grace for flushes.
    #[error(
        "--flush-grace 0 is not possible: a replica that is only a little slower would be lost at \
         every flush; give at least 1 second"
    )]
    FlushGrace,
    /// A grace that would never end.
    #[error(
        "{flag} is longer than --io-timeout {io_timeout_s} (seconds), which ends any wait; give \
         less, or a longer --io-timeout"
    )]
    GraceBeyondTimeout {
        /// Which grace.
        flag: &'static str,
        /// The timeout, in seconds.
        io_timeout_s: u16,
    },
    /// A rate at which nothing gets done.
    #[error("{flag} {given} is too slow to get anywhere; give at least {least} per second")]
    Rate {
        /// Which rate.
        flag: &'static str,
        /// What was given, per second.
        given: ByteSize,
        /// The slowest, per second.
        least: ByteSize,
    },
    /// A scrub compares what `fifo` does not.
    #[error(
        "--scrub-interval needs --read-pattern quorum: with fifo replicas are not compared; leave \
         one of them out"
    )]
    ScrubWithoutVotes,
    /// A scrub that repairs where nothing may be repaired.
    #[error("--scrub repair needs --repair on; give --scrub check, or --repair on")]
    ScrubWithoutRepair,
    /// More memory than requests in flight can fill.
    #[error("--buffer-memory {0} is too much; give at most {BUFFER_MEMORY_MAX}")]
    BufferMemoryTooLarge(ByteSize),
}
