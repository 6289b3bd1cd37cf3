// SPDX-License-Identifier: Apache-2.0
//! Carries out the operations of one worker on all replicas, through one ring.
#![allow(
    unsafe_code,
    reason = "hands addresses of pinned buffers to the kernel"
)]

use std::os::fd::BorrowedFd;
use std::sync::{Arc, Once};
use std::time::Duration;

use io_uring::{opcode, squeue, types};
use thiserror::Error;

use crate::io::zeroes::{ZEROES_BYTES, zeroes};
use crate::io::{Access, Completion, Pool, PoolError, Ring, RingError};
use crate::quorum::{BufferId, OpId, Operation, Outcome};
use crate::replica::Replica;
use crate::replica::flight::{Flight, Flights, Next, Work, ZeroMethod};
use crate::replica::slot::Slot;
use crate::units::ReplicaId;

/// The kernel registers at most this much memory as one piece.
const PIECE_BYTES: usize = 1 << 30;

/// Operations that can be in flight for each ring entry before a table grows.
const FLIGHTS_PER_ENTRY: u32 = 4;

/// What becomes of operations on a slot without a replica.
const NO_REPLICA: Outcome = Outcome::Failed {
    errno: libc::ENODEV,
};

/// What an executor is made with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ExecutorConfig {
    /// Bytes of buffers for guests' requests.
    pub pool_budget_bytes: usize,
    /// Bytes of buffers more that only arbitration, repair and resync may use.
    pub reserve_bytes: usize,
    /// Submissions that go to the kernel in one system call, 1 to 32768.
    pub ring_entries: u32,
}

impl Default for ExecutorConfig {
    /// 16 MiB of buffers, 2 MiB in reserve, 256 submissions a batch.
    fn default() -> Self {
        Self {
            pool_budget_bytes: 16 << 20,
            reserve_bytes: 2 << 20,
            ring_entries: 256,
        }
    }
}

/// An executor that cannot be made or has stopped working. The fault of a replica is never one
/// of these: it is the [`Outcome`] of an operation.
#[derive(Debug, Error)]
pub enum ExecutorError {
    /// No ring.
    #[error(transparent)]
    Ring(#[from] RingError),
    /// No buffers.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// No zeroes.
    #[error("cannot map a page of zeroes")]
    Zeroes(#[source] std::io::Error),
}

/// The ring, the buffers and the operations in flight of one worker.
///
/// Made and used on the worker's thread. A loop around it is: [`Executor::reap`], hand the
/// outcomes to the lane, [`Executor::start`] what it asks for, [`Executor::submit`], and, with
/// nothing left to do, wait on [`Executor::wake_fd`] for at most [`Executor::wait_limit`].
///
/// The number of slots is fixed; the replicas in them come and go with [`Executor::attach`] and
/// [`Executor::detach`]. Everybody who has an [`Arc`] of a replica keeps its open file description
/// and with it the locks; the executor gives its own away only when the last operation has landed
/// (rule K2), so the file closes when the last worker is done with it.
#[derive(Debug)]
pub struct Executor {
    // The order of the fields is the order of their end: first the ring, then the memory that
    // it uses, then the files.
    ring: Ring,
    pool: Pool,
    slots: Box<[Slot]>,
    flights: Flights,
    /// Operations on slots without a replica, which end with the next [`Executor::reap`].
    refused: Vec<OpId>,
    completions: Vec<Completion>,
    zeroes: &'static [u8],
    /// Whether the buffers are registered with the ring.
    registered: bool,
}

impl Executor {
    /// An executor for `replicas`, in the order of their slots; `None` where one is missing.
    ///
    /// # Errors
    /// [`ExecutorError`] if the kernel refuses the ring or the memory.
    pub fn new(
        replicas: &[Option<Arc<Replica>>],
        config: ExecutorConfig,
    ) -> Result<Self, ExecutorError> {
        let pool = Pool::new(config.pool_budget_bytes, config.reserve_bytes)?;
        let mut ring = Ring::new(config.ring_entries)?;
        let files: Vec<Option<BorrowedFd<'_>>> = replicas
            .iter()
            .map(|replica| replica.as_ref().map(|replica| replica.data_fd()))
            .collect();
        ring.register_files(&files)?;
        // SAFETY: the pool is dropped after the ring, and keeps its memory mapped for ever if
        // operations are in flight then.
        let registered = match unsafe { ring.register_memory(pool.pieces(PIECE_BYTES)) } {
            Ok(()) => true,
            Err(error) => {
                // The limit is the process's: one worker says it for all.
                static SAID: Once = Once::new();
                SAID.call_once(|| {
                    tracing::info!(
                        %error,
                        bytes_per_worker = pool.capacity_bytes(),
                        "buffers are not registered with io_uring, which costs some speed; \
                         raise RLIMIT_MEMLOCK"
                    );
                });
                false
            }
        };
        let in_flight_max = config.ring_entries.saturating_mul(FLIGHTS_PER_ENTRY);
        Ok(Self {
            ring,
            pool,
            slots: replicas.iter().cloned().map(Slot::new).collect(),
            flights: Flights::new(in_flight_max),
            refused: Vec::with_capacity(in_flight_max as usize),
            completions: Vec::with_capacity(in_flight_max as usize),
            zeroes: zeroes().map_err(ExecutorError::Zeroes)?,
            registered,
        })
    }

    /// Queues an operation for the next [`Executor::submit`]. Its completion comes from
    /// [`Executor::reap`], always, once. On a slot that has no replica, or whose replica is being
    /// detached, it ends with the next reap, with `ENODEV` and without touching its buffer.
    ///
    /// # Panics
    /// If the buffer was not handed out by this executor's pool, is too short, or is used by
    /// another operation in a conflicting way; if there is no such slot.
    pub fn start(&mut self, operation: &Operation) {
        let Some(methods) = self.slots[operation.replica.index()].begin() else {
            self.refused.push(operation.op);
            return;
        };
        let flight = Flight::new(operation, methods);
        match flight.work {
            Work::Read { buffer, .. } => self.pool.pin(buffer, Access::KernelWrites),
            Work::Write { buffer, .. } => self.pool.pin(buffer, Access::KernelReads),
            Work::Zero { .. } | Work::Flush => {}
        }
        let number = self.flights.insert(flight);
        self.push(number);
    }

    /// Hands all queued operations to the kernel in one system call; none if nothing is queued.
    ///
    /// # Errors
    /// [`RingError::Enter`]: the ring is of no use any more.
    pub fn submit(&mut self) -> Result<(), RingError> {
        self.ring.submit()
    }

    /// Starts nothing on `replica` any more. What is in flight there stays so, its buffers pinned,
    /// until the kernel lets it end; of a transfer that was cut short the rest is not submitted,
    /// it ends with `ENODEV`. With the last of them the executor unregisters the file and drops
    /// its [`Arc`]: [`Executor::is_detached`] tells. A slot without a replica stays as it is.
    ///
    /// # Errors
    /// [`RingError::Exchange`]: the ring is of no use any more.
    ///
    /// # Panics
    /// If there is no such slot.
    pub fn detach(&mut self, replica: ReplicaId) -> Result<(), RingError> {
        self.slots[replica.index()].leave();
        self.vacate_if_done(replica)
    }

    /// Whether the slot has no replica: nothing is in flight, the file is not registered and the
    /// executor has no [`Arc`].
    ///
    /// # Panics
    /// If there is no such slot.
    #[must_use]
    pub fn is_detached(&self, replica: ReplicaId) -> bool {
        self.slots[replica.index()].is_empty()
    }

    /// Puts a replica into a slot that has none. Operations may be started on it at once.
    ///
    /// # Errors
    /// [`RingError::Exchange`]: the slot has no replica still; trying again later makes sense.
    ///
    /// # Panics
    /// If there is no such slot or it is not [detached](Executor::is_detached): an operation of
    /// the earlier replica could be taken for one of this (section 10 of the consistency rules).
    pub fn attach(&mut self, replica: ReplicaId, opened: Arc<Replica>) -> Result<(), RingError> {
        assert!(
            self.is_detached(replica),
            "{replica:?} is attached while its slot is in use"
        );
        let file = Some(opened.data_fd());
        self.ring.exchange_file(file_index(replica), file)?;
        self.slots[replica.index()] = Slot::new(Some(opened));
        Ok(())
    }

    /// Appends what has ended since the last call to `out`. Transfers that were cut short are
    /// continued with the next [`Executor::submit`].
    ///
    /// # Errors
    /// [`RingError::Enter`], [`RingError::Exchange`]: the ring is of no use any more.
    pub fn reap(&mut self, out: &mut Vec<(OpId, Outcome)>) -> Result<(), RingError> {
        let refused = self.refused.drain(..);
        out.extend(refused.map(|op| (op, NO_REPLICA)));
        let mut completions = std::mem::take(&mut self.completions);
        let mut result = self.ring.reap(&mut completions);
        for completion in completions.drain(..) {
            result = result.and(self.settle(completion, out));
        }
        self.completions = completions;
        result
    }

    /// Becomes readable when there is something to reap, if [`Executor::wait_limit`] was asked
    /// before. Watch it with `EPOLLIN | EPOLLET` and never read it.
    #[must_use]
    pub fn wake_fd(&self) -> BorrowedFd<'_> {
        self.ring.wake_fd()
    }

    /// To be asked last before sleeping: for how long at most. `None`: until
    /// [`Executor::wake_fd`] tells. Zero: there is something to reap now.
    ///
    /// # Errors
    /// [`RingError::Enter`]: the ring is of no use any more.
    pub fn wait_limit(&mut self) -> Result<Option<Duration>, RingError> {
        if !self.refused.is_empty() {
            return Ok(Some(Duration::ZERO));
        }
        self.ring.wait_limit()
    }

    /// The buffers.
    #[must_use]
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// The buffers, to take, fill and give back.
    pub fn pool_mut(&mut self) -> &mut Pool {
        &mut self.pool
    }

    /// System calls made for the ring so far.
    #[must_use]
    pub fn ring_enters(&self) -> u64 {
        self.ring.enters()
    }

    /// Operations that were started and whose end was not reaped yet.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.flights.len() + self.refused.len()
    }

    /// Operations that the kernel has, or is about to be handed, for one replica: zero as soon as
    /// it is [detached](Executor::is_detached).
    ///
    /// # Panics
    /// If there is no such slot.
    #[must_use]
    pub fn in_flight_on(&self, replica: ReplicaId) -> u32 {
        self.slots[replica.index()].in_flight()
    }

    /// The slots in order; those being detached still have their replica.
    pub fn replicas(&self) -> impl Iterator<Item = Option<&Arc<Replica>>> {
        self.slots.iter().map(Slot::replica)
    }

    fn settle(
        &mut self,
        completion: Completion,
        out: &mut Vec<(OpId, Outcome)>,
    ) -> Result<(), RingError> {
        let number = u32::try_from(completion.user_data).expect("user data is a flight's number");
        let flight = self.flights.get_mut(number);
        let replica = flight.replica;
        let slot = &mut self.slots[replica.index()];
        let next = flight.advance(
            completion.result,
            slot.alignment_bytes,
            &mut slot.zero_methods,
        );
        let Flight { op, work, .. } = *flight;
        match next {
            Next::Again if slot.is_attached() => {
                self.push(number);
                Ok(())
            }
            Next::Again | Next::Ended(_) => {
                self.flights.remove(number);
                slot.end();
                match work {
                    Work::Read { buffer, .. } => self.pool.unpin(buffer, Access::KernelWrites),
                    Work::Write { buffer, .. } => self.pool.unpin(buffer, Access::KernelReads),
                    Work::Zero { .. } | Work::Flush => {}
                }
                out.push(match next {
                    Next::Ended(outcome) => (op, outcome),
                    // The rest would be a new operation on a replica that is being detached.
                    Next::Again => (op, NO_REPLICA),
                });
                self.vacate_if_done(replica)
            }
        }
    }

    /// Gives away a replica that is being detached if its last operation has ended.
    fn vacate_if_done(&mut self, replica: ReplicaId) -> Result<(), RingError> {
        let slot = &mut self.slots[replica.index()];
        if !slot.is_done() {
            return Ok(());
        }
        // The ring first: if ours is the last `Arc`, dropping it closes the file and ends the
        // locks now and here, not when the kernel gets round to it.
        self.ring.exchange_file(file_index(replica), None)?;
        *slot = Slot::new(None);
        Ok(())
    }

    /// Queues what is left of an operation.
    fn push(&mut self, number: u32) {
        let flight = *self.flights.get_mut(number);
        let flags = self.slots[flight.replica.index()].flags;
        let entry = self.entry(&flight).flags(flags);
        let entry = entry.user_data(u64::from(number));
        // SAFETY: the entry points to a buffer that stays pinned, and so mapped and unused by
        // others, until the completion is settled; or to the zeroes, which live for ever.
        unsafe { self.ring.push(entry) };
    }

    fn entry(&self, flight: &Flight) -> squeue::Entry {
        let file = types::Fixed(file_index(flight.replica));
        let offset = flight.rest_offset();
        let len = flight.rest_bytes();
        match flight.work {
            Work::Read { buffer, skip_bytes } => {
                let start = self.memory(buffer, skip_bytes + flight.done_bytes(), len);
                if self.registered {
                    opcode::ReadFixed::new(file, start, len, self.piece(buffer))
                        .offset(offset)
                        .build()
                } else {
                    opcode::Read::new(file, start, len).offset(offset).build()
                }
            }
            Work::Write { buffer, skip_bytes } => {
                let start = self.memory(buffer, skip_bytes + flight.done_bytes(), len);
                if self.registered {
                    opcode::WriteFixed::new(file, start, len, self.piece(buffer))
                        .offset(offset)
                        .build()
                } else {
                    opcode::Write::new(file, start, len).offset(offset).build()
                }
            }
            Work::Zero { method } => {
                let mode = match method {
                    ZeroMethod::Punch => libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
                    // Not keeping the size: on a file that was cut short this brings the range
                    // back, as a write would.
                    ZeroMethod::ZeroRange => libc::FALLOC_FL_ZERO_RANGE,
                    ZeroMethod::Write => {
                        let len = len.min(ZEROES_BYTES);
                        return opcode::Write::new(file, self.zeroes.as_ptr(), len)
                            .offset(offset)
                            .build();
                    }
                };
                opcode::Fallocate::new(file, u64::from(len))
                    .offset(offset)
                    .mode(mode)
                    .build()
            }
            Work::Flush => opcode::Fsync::new(file)
                .flags(types::FsyncFlags::DATASYNC)
                .build(),
        }
    }

    fn memory(&self, buffer: BufferId, offset: u32, len: u32) -> *mut u8 {
        self.pool.pointer(buffer, offset as usize, len as usize)
    }

    /// Under which number the buffer's memory is registered.
    fn piece(&self, buffer: BufferId) -> u16 {
        let piece = self.pool.piece_of(buffer, PIECE_BYTES);
        u16::try_from(piece).expect("the kernel registers at most 16384 pieces")
    }
}

/// Where a replica's file is registered: by slot.
fn file_index(replica: ReplicaId) -> u32 {
    u32::try_from(replica.index()).expect("at most 16 replicas")
}

#[cfg(test)]
mod tests;
