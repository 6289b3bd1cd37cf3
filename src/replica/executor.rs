// SPDX-License-Identifier: Apache-2.0
//! Carries out the operations of one worker on all replicas, through one ring.
#![allow(
    unsafe_code,
    reason = "hands addresses of pinned buffers to the kernel"
)]

use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::{Arc, Once};
use std::time::Duration;

use io_uring::{opcode, squeue, types};
use thiserror::Error;

use crate::io::zeroes::{ZEROES_BYTES, zeroes};
use crate::io::{Access, Completion, Pool, PoolError, Ring, RingError};
use crate::quorum::{BufferId, OpId, Operation, Outcome};
use crate::replica::Replica;
use crate::replica::flight::{Flight, Flights, Next, Work, ZeroMethod, ZeroMethods};

/// The kernel registers at most this much memory as one piece.
const PIECE_BYTES: usize = 1 << 30;

/// Operations that can be in flight for each ring entry before a table grows.
const FLIGHTS_PER_ENTRY: u32 = 4;

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
#[derive(Debug)]
pub struct Executor {
    // The order of the fields is the order of their end: first the ring, then the memory that
    // it uses, then the files.
    ring: Ring,
    pool: Pool,
    replicas: Box<[Member]>,
    flights: Flights,
    completions: Vec<Completion>,
    zeroes: &'static [u8],
    /// Whether the buffers are registered with the ring.
    registered: bool,
}

/// What the executor knows of a replica.
#[derive(Debug)]
struct Member {
    /// Keeps the files open.
    replica: Arc<Replica>,
    alignment_bytes: u32,
    zero_methods: ZeroMethods,
}

impl Executor {
    /// An executor for `replicas`, in the order of their slots.
    ///
    /// # Errors
    /// [`ExecutorError`] if the kernel refuses the ring or the memory.
    pub fn new(replicas: &[Arc<Replica>], config: ExecutorConfig) -> Result<Self, ExecutorError> {
        let pool = Pool::new(config.pool_budget_bytes, config.reserve_bytes)?;
        let mut ring = Ring::new(config.ring_entries)?;
        let files: Vec<RawFd> = replicas
            .iter()
            .map(|replica| replica.data_fd().as_raw_fd())
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
        let members = replicas.iter().map(|replica| Member {
            replica: Arc::clone(replica),
            alignment_bytes: replica.direct_alignment_bytes(),
            zero_methods: ZeroMethods {
                punch: replica.can_zero_exactly(),
                zero_range: true,
            },
        });
        Ok(Self {
            ring,
            pool,
            replicas: members.collect(),
            flights: Flights::new(config.ring_entries.saturating_mul(FLIGHTS_PER_ENTRY)),
            completions: Vec::with_capacity(
                config.ring_entries.saturating_mul(FLIGHTS_PER_ENTRY) as usize
            ),
            zeroes: zeroes().map_err(ExecutorError::Zeroes)?,
            registered,
        })
    }

    /// Queues an operation for the next [`Executor::submit`]. Its completion comes from
    /// [`Executor::reap`], always, once.
    ///
    /// # Panics
    /// If the buffer was not handed out by this executor's pool, is too short, or is used by
    /// another operation in a conflicting way; if there is no such replica.
    pub fn start(&mut self, operation: &Operation) {
        let methods = self.replicas[operation.replica.index()].zero_methods;
        let flight = Flight::new(operation, methods);
        match flight.work {
            Work::Read { buffer, .. } => self.pool.pin(buffer, Access::KernelWrites),
            Work::Write { buffer, .. } => self.pool.pin(buffer, Access::KernelReads),
            Work::Zero { .. } | Work::Flush => {}
        }
        let slot = self.flights.insert(flight);
        self.push(slot);
    }

    /// Hands all queued operations to the kernel in one system call; none if nothing is queued.
    ///
    /// # Errors
    /// [`RingError::Enter`]: the ring is of no use any more.
    pub fn submit(&mut self) -> Result<(), RingError> {
        self.ring.submit()
    }

    /// Appends what has ended since the last call to `out`. Transfers that were cut short are
    /// continued with the next [`Executor::submit`].
    ///
    /// # Errors
    /// [`RingError::Enter`]: the ring is of no use any more.
    pub fn reap(&mut self, out: &mut Vec<(OpId, Outcome)>) -> Result<(), RingError> {
        let mut completions = std::mem::take(&mut self.completions);
        let result = self.ring.reap(&mut completions);
        for completion in completions.drain(..) {
            self.settle(completion, out);
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

    /// Operations that were started and have not ended.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.flights.len()
    }

    /// The replicas, in the order of their slots.
    pub fn replicas(&self) -> impl Iterator<Item = &Replica> {
        self.replicas.iter().map(|member| &*member.replica)
    }

    fn settle(&mut self, completion: Completion, out: &mut Vec<(OpId, Outcome)>) {
        let slot = u32::try_from(completion.user_data).expect("user data is a slot");
        let flight = self.flights.get_mut(slot);
        let member = &mut self.replicas[flight.replica.index()];
        let next = flight.advance(
            completion.result,
            member.alignment_bytes,
            &mut member.zero_methods,
        );
        let Flight { op, work, .. } = *flight;
        match next {
            Next::Again => self.push(slot),
            Next::Ended(outcome) => {
                self.flights.remove(slot);
                match work {
                    Work::Read { buffer, .. } => self.pool.unpin(buffer, Access::KernelWrites),
                    Work::Write { buffer, .. } => self.pool.unpin(buffer, Access::KernelReads),
                    Work::Zero { .. } | Work::Flush => {}
                }
                out.push((op, outcome));
            }
        }
    }

    /// Queues what is left of the operation in `slot`.
    fn push(&mut self, slot: u32) {
        let flight = *self.flights.get_mut(slot);
        let entry = self.entry(&flight).user_data(u64::from(slot));
        // SAFETY: the entry points to a buffer that stays pinned, and so mapped and unused by
        // others, until the completion is settled; or to the zeroes, which live for ever.
        unsafe { self.ring.push(entry) };
    }

    fn entry(&self, flight: &Flight) -> squeue::Entry {
        let file = u32::try_from(flight.replica.index()).expect("at most 16 replicas");
        let file = types::Fixed(file);
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

#[cfg(test)]
mod tests;
