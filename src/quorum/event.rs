// SPDX-License-Identifier: Apache-2.0
//! What a lane is told and what it asks for: [`Event`] in, [`Action`] out.
//!
//! The types name no file, ring or virtqueue, so that one core runs under io_uring and in the
//! simulator alike.

use crate::units::{ReplicaId, SectorRange};

/// A buffer of the pool that belongs to the same worker as the lane.
///
/// The number means something only to the [`Buffers`](super::Buffers) that handed it out.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct BufferId(pub u32);

/// Name of a request, chosen by whoever submits it and given back with its reply.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct Tag(pub u32);

/// A lane's own name of an operation: slot and generation, so that a completion that arrives
/// for a slot used again is noticed. Fits in the user data of a submission.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct OpId(pub u64);

/// A lane's own name of a request it has replied to; see [`Event::Published`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct RequestId(pub u64);

/// One of the lanes that share a [`Shared`](super::Shared), `0..lanes`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct LaneId(pub u8);

/// What is asked of the disk. Every range lies in one extent, is a multiple of the block size at
/// both ends and is at most [`Geometry::request_sectors_max`](super::Geometry) long; the device
/// cuts what the guest asks for into such requests.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Request {
    /// Read `range`; the reply names the buffer that holds the sectors.
    Read {
        /// Sectors to read.
        range: SectorRange,
    },
    /// Write `data`, which holds exactly the bytes of `range`. The lane owns the buffer from now
    /// on. It was filled from guest memory once, before this event (rule L4).
    Write {
        /// Sectors to write.
        range: SectorRange,
        /// Their content.
        data: BufferId,
    },
    /// Make `range` read back as zeroes on every replica (rule Z1). With `unmap` the space may be
    /// given back.
    WriteZeroes {
        /// Sectors to zero.
        range: SectorRange,
        /// Whether space may be deallocated.
        unmap: bool,
    },
    /// The content of `range` is no longer needed: zeroes on all replicas, or nothing on all
    /// (rule Z2).
    Discard {
        /// Sectors to discard.
        range: SectorRange,
    },
    /// Make all writes whose completion was published before this event durable (rule F1).
    Flush,
    /// Maintenance: settle what is unresolved in the extent (rule Y1) and bring replicas that are up
    /// and behind there up to date (rule Y5). Good if nothing of that kind is left.
    Reconcile {
        /// The extent.
        extent: u64,
    },
    /// Maintenance: read all current copies of `range`, compare, and settle what differs (rule
    /// Y6). The reply has no data.
    Check {
        /// Sectors.
        range: SectorRange,
        /// Whether dissenters are rewritten, if the policy allows it. Otherwise differences are
        /// only reported, except in sectors that are unresolved.
        repair: bool,
    },
    /// Maintenance: read `range` from this replica alone, to see whether it answers.
    Probe {
        /// Whom.
        replica: ReplicaId,
        /// Sectors.
        range: SectorRange,
    },
}

/// What a lane is told.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Event {
    /// A new request. Only when [`Lane::has_room`](super::Lane::has_room) says so.
    Request {
        /// The submitter's name for it.
        tag: Tag,
        /// What to do.
        request: Request,
    },
    /// An operation of this lane has ended.
    Completed {
        /// Which one.
        op: OpId,
        /// How.
        outcome: Outcome,
    },
    /// Another lane did something this lane waits for; see [`Action::Wake`].
    Wake(Wakeup),
    /// The reply to this request is visible to the guest: its used entry is published and its
    /// in-flight mark cleared. Owed for every [`Action::Reply`], once, and only after it; until
    /// then an exclusive lock is kept (rule L3).
    Published {
        /// From the reply.
        request: RequestId,
    },
    /// The reply to this request has to wait for the publication of an earlier request of the same
    /// queue (rule Q3). Owed at most once, between the reply and [`Event::Published`], whenever
    /// publication does not follow at once: the two requests could wait for each other.
    Deferred {
        /// From the reply.
        request: RequestId,
    },
    /// Nothing but the passing of time. Owed when [`Lane::deadline`](super::Lane::deadline) has
    /// passed; harmless at any other moment.
    Tick,
}

/// How an operation ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// All bytes were transferred.
    Done,
    /// Fewer bytes than asked for. It is an error, never zeroes (rule V4).
    Short {
        /// Bytes asked for.
        expected: u32,
        /// Bytes transferred.
        got: u32,
    },
    /// The replica refused with this errno.
    Failed {
        /// Positive errno value.
        errno: i32,
    },
}

/// One I/O on one replica.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Operation {
    /// Comes back with [`Event::Completed`].
    pub op: OpId,
    /// On which replica.
    pub replica: ReplicaId,
    /// What to do.
    pub kind: OperationKind,
}

/// The I/O of an [`Operation`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OperationKind {
    /// Fill `buffer` with `range`, starting `skip_bytes` into it.
    Read {
        /// Sectors.
        range: SectorRange,
        /// Written to by the operation alone until it completes.
        buffer: BufferId,
        /// Where in the buffer the first byte of `range` goes; a multiple of the block size.
        skip_bytes: u32,
    },
    /// Write `range` from `buffer`, starting `skip_bytes` into it. Several operations may read
    /// one buffer at the same time.
    Write {
        /// Sectors.
        range: SectorRange,
        /// Not changed by anybody until the operation completes.
        buffer: BufferId,
        /// Where in the buffer the first byte of `range` is; a multiple of the block size.
        skip_bytes: u32,
    },
    /// Make `range` read back as zeroes, by whatever method the replica has (rule Z1).
    WriteZeroes {
        /// Sectors.
        range: SectorRange,
        /// Whether space may be deallocated.
        unmap: bool,
    },
    /// Make everything written before durable.
    Flush,
}

/// What a lane asks for. Actions are carried out in order, before the next event is handed in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Action {
    /// Start an operation. Its completion is owed as [`Event::Completed`], always.
    Submit(Operation),
    /// The request is finished. For a read that went well, `data` holds the sectors from its
    /// first byte on; it may be read until the next event is handed to the lane.
    /// [`Event::Published`] is owed.
    Reply {
        /// The submitter's name for the request.
        tag: Tag,
        /// For [`Event::Published`].
        request: RequestId,
        /// How it ended.
        status: Status,
        /// The sectors of a successful read, otherwise `None`.
        data: Option<BufferId>,
    },
    /// Hand `wakeup` to another lane (never to the one that asks).
    Wake {
        /// The lane to wake.
        lane: LaneId,
        /// What to hand it.
        wakeup: Wakeup,
    },
    /// Something people should know. Not to be acted on by the data path.
    Report(Report),
    /// A mark waits to become durable: the state record is to be written soon. When more marks are,
    /// or never will be, every lane is owed [`Wakeup::Durable`].
    Record,
    /// The replica is not up any more. Every other lane is owed [`Wakeup::MembersChanged`]; whoever
    /// opens replicas is to take this one from the workers, and to open it again.
    Kicked {
        /// Whom.
        replica: ReplicaId,
        /// Why.
        why: KickCause,
    },
}

/// How a request ended, as the guest sees it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Status {
    /// VIRTIO_BLK_S_OK.
    Ok,
    /// VIRTIO_BLK_S_IOERR.
    IoError,
}

/// How a flush run ended (rule F2, invariant I5).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FlushEnd {
    /// Whatever had been acknowledged before it began is durable on T replicas, and it is remembered
    /// who lacks it.
    Durable,
    /// Enough replicas were flushed, but fewer than T of them are current in this extent: it has to
    /// be brought into order first (rule V6), then another run.
    Lacking {
        /// The first such extent.
        extent: u64,
    },
    /// Too few replicas were flushed, or it cannot be remembered who was not.
    Failed,
}

/// What one lane tells another, by way of [`Action::Wake`] and [`Event::Wake`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Wakeup {
    /// A range lock was granted to the holder of this ticket.
    Granted(LockTicket),
    /// A flush run that covers requests of this lane is this lane's to begin.
    FlushStart,
    /// A flush run that covers requests of this lane has ended.
    FlushDone {
        /// Number of the run.
        run: u64,
        /// How it ended.
        end: FlushEnd,
    },
    /// More marks are durable, or none will be any more.
    Durable,
    /// A replica went or came: requests that wait for answers of one that went do so in vain, and
    /// those that wait for enough replicas may find them.
    MembersChanged,
    /// It is decided what becomes of sectors in U without a majority (rules S4, Y3): reads that
    /// wait for that go on.
    TiesDecided,
    /// Requests that wait for enough replicas are to fail: their queue is being stopped (rule Q4).
    FailPaused,
}

/// Names a lock request to the lane that made it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct LockTicket(pub u64);

/// Why a replica was found wrong or left behind, for people and for events.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Report {
    /// A replica differs from the winner, or could not be read there
    /// (QEMU's QUORUM_REPORT_BAD). Only after arbitration (rule Y2).
    Bad {
        /// The dissenter.
        replica: ReplicaId,
        /// The sectors, exactly.
        range: SectorRange,
        /// What is wrong with them.
        cause: BadCause,
        /// During what kind of operation.
        during: During,
    },
    /// No winner for these sectors, or fewer than T replicas took a write
    /// (QEMU's QUORUM_FAILURE). The request ended with an I/O error.
    Failure {
        /// The sectors nobody agrees on.
        range: SectorRange,
        /// During what kind of operation.
        during: During,
    },
    /// A difference that was gone when all current copies were read again under the lock.
    Transient {
        /// Where it was seen.
        range: SectorRange,
    },
    /// A dissenter was rewritten with the winner's bytes and read back.
    Repaired {
        /// Which replica.
        replica: ReplicaId,
        /// The rewritten sectors.
        range: SectorRange,
    },
    /// A repair could not be written or did not read back; the replica is behind there now.
    RepairFailed {
        /// Which replica.
        replica: ReplicaId,
        /// What was to be rewritten.
        range: SectorRange,
    },
    /// The replica lacks an acknowledged write in this extent and does not vote there any more.
    Behind {
        /// Which replica.
        replica: ReplicaId,
        /// The extent's sectors.
        extent: SectorRange,
        /// The reason.
        why: BehindCause,
    },
    /// A flush of one replica failed; it is behind in all dirty extents (rule F3).
    FlushFailed {
        /// Which replica.
        replica: ReplicaId,
        /// Positive errno value; `ETIMEDOUT` if it did not end in time.
        errno: i32,
        /// Extents in which it is behind because of this.
        extents: u64,
    },
    /// A replica is not up any more, and behind in extents with recent writes.
    Kicked {
        /// Which replica.
        replica: ReplicaId,
        /// The reason.
        why: KickCause,
        /// Extents in which it is behind now.
        extents: u64,
    },
    /// The replica is late so often that nobody waits for it any more (rule W6).
    Lagging {
        /// Which replica.
        replica: ReplicaId,
    },
    /// The copies of these sectors differ since a crash or a failed write and no version has T
    /// votes; every one of them is legal, and this replica's was taken (rule Y3).
    Chosen {
        /// The sectors.
        range: SectorRange,
        /// Whose version it is.
        replica: ReplicaId,
    },
    /// The state record cannot be written on enough of its copies: writes to extents that are not
    /// dirty fail, and no replica can be left behind (rule R1).
    RecordLost,
    /// `--blkverify`: the two copies differ. The daemon stops.
    VerifyFailed {
        /// First difference.
        range: SectorRange,
    },
}

/// What was wrong with sectors of a replica.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BadCause {
    /// They were readable but not what T others hold.
    Differs,
    /// Reading or writing them failed with this errno (positive).
    Error(i32),
    /// Fewer bytes than asked for.
    Short,
}

/// The kind of operation in which a fault was met (QEMU's `type` field).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum During {
    /// Reading for the guest.
    Read,
    /// Reading for maintenance: a scrub, or a resync. No request of the guest waits for it.
    Check,
    /// Writing, zeroing or discarding.
    Write,
    /// Flushing.
    Flush,
}

/// Why a replica was declared not up.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum KickCause {
    /// An operation did not end in time (`io-timeout`).
    Hung,
    /// A flush failed with this errno, or did not end in time (`ETIMEDOUT`); rules F2, F3.
    FlushFailed(i32),
    /// Its file or device is not there any more, or is another one.
    Vanished,
    /// More errors or repairs than its budget allows (CONSISTENCY section 10).
    Budget,
    /// It was not there, or could not be opened, when the disk was started.
    Absent,
    /// The operator does not want it.
    Operator,
}

/// Why a replica is behind in an extent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BehindCause {
    /// A write failed there with this errno (rule W5).
    WriteFailed(i32),
    /// A write was late beyond `write-grace` (rule W6).
    Late,
    /// A repair could not be written or did not read back (rule Y4).
    RepairFailed,
}
