// SPDX-License-Identifier: Apache-2.0
//! The buffers of a worker: one arena, handed out last in first out.
#![allow(
    unsafe_code,
    reason = "lends slices of memory that the kernel also uses"
)]

use std::io;

use thiserror::Error;

use crate::io::arena::Arena;
use crate::io::buddy::{BLOCK_BYTES_MAX, BLOCK_BYTES_MIN, Buddy, UNITS_MAX};
use crate::quorum::{BufferId, Buffers, Purpose};

/// Where guests' buffers are.
const GUEST_ZONE: usize = 0;
/// What is held back for [`Purpose::Settle`].
const RESERVE_ZONE: usize = 1;

/// What the kernel does to a buffer while an operation uses it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// Reads it: the operation writes to a replica. Several at a time are allowed.
    KernelReads,
    /// Writes to it: the operation reads from a replica. It must be the only one.
    KernelWrites,
}

/// A pool that cannot be made.
#[derive(Debug, Error)]
pub enum PoolError {
    /// The budget is not addressable with the pool's buffer numbers.
    #[error("a buffer budget of {bytes} bytes is too large; at most 8 TiB can be managed")]
    TooLarge {
        /// Budget and reserve together.
        bytes: usize,
    },
    /// The memory could not be had.
    #[error("cannot map {bytes} bytes of buffers; lower the memory budget or raise RLIMIT_AS")]
    Map {
        /// Budget and reserve together.
        bytes: usize,
        /// From `mmap`.
        #[source]
        source: io::Error,
    },
}

/// What goes on in a buffer that was handed out.
#[derive(Clone, Copy, Default, Debug)]
struct Use {
    /// Operations in which the kernel reads it.
    kernel_reads: u16,
    /// Whether there is an operation in which the kernel writes to it.
    kernel_writes: bool,
    /// Given back while busy; free once it is not.
    given: bool,
}

impl Use {
    fn busy(self) -> bool {
        self.kernel_writes || self.kernel_reads > 0
    }
}

/// Aligned private buffers of 4 KiB to 256 KiB in powers of two, from memory taken once.
///
/// A [`BufferId`] is the number of the buffer's first 4 KiB unit. Two things are kept apart: who
/// *has* a buffer (the lane, from `take` to `give`), and whether the kernel *uses* it (the
/// executor says so with [`Pool::pin`] and [`Pool::unpin`]). A buffer is handed out again only
/// when it is given back and unused, so memory is safe even if the lane were wrong about what is
/// still in flight.
#[derive(Debug)]
pub struct Pool {
    arena: Arena,
    buddy: Buddy,
    uses: Box<[Use]>,
    busy: usize,
    prefaulted: bool,
}

impl Pool {
    /// A pool of `budget_bytes` for everybody and `reserve_bytes` more that only
    /// [`Purpose::Settle`] may use, each rounded up to a multiple of 256 KiB; the budget is at
    /// least one such block. The memory is taken from the system now.
    ///
    /// # Errors
    /// [`PoolError`].
    pub fn new(budget_bytes: usize, reserve_bytes: usize) -> Result<Self, PoolError> {
        let bytes = budget_bytes.saturating_add(reserve_bytes);
        let too_large = || PoolError::TooLarge { bytes };
        let units = |bytes: usize| -> Result<u32, PoolError> {
            u32::try_from(bytes.div_ceil(BLOCK_BYTES_MAX))
                .ok()
                .and_then(|blocks| blocks.checked_mul(UNITS_MAX))
                .filter(|&units| units <= u32::MAX / 2)
                .ok_or_else(too_large)
        };
        let guest_units = units(budget_bytes.max(1))?;
        let reserve_units = units(reserve_bytes)?;
        let total_units = guest_units
            .checked_add(reserve_units)
            .filter(|&units| units < u32::MAX)
            .ok_or_else(too_large)? as usize;
        let mut arena = Arena::new(total_units * BLOCK_BYTES_MIN)
            .map_err(|source| PoolError::Map { bytes, source })?;
        let prefaulted = arena.prefault().is_ok();
        Ok(Self {
            arena,
            buddy: Buddy::new(&[guest_units, reserve_units]),
            uses: vec![Use::default(); total_units].into_boxed_slice(),
            busy: 0,
            prefaulted,
        })
    }

    /// Bytes that guests' requests can still have. A request of that size may yet be refused if
    /// they do not lie together.
    #[must_use]
    pub fn available_bytes(&self) -> usize {
        self.buddy.free_units(GUEST_ZONE) as usize * BLOCK_BYTES_MIN
    }

    /// Bytes of the reserve that are not in use.
    #[must_use]
    pub fn reserve_available_bytes(&self) -> usize {
        self.buddy.free_units(RESERVE_ZONE) as usize * BLOCK_BYTES_MIN
    }

    /// Budget and reserve, in bytes.
    #[must_use]
    pub fn capacity_bytes(&self) -> usize {
        self.arena.len()
    }

    /// Whether all memory was backed at the start, so that no request pays for page faults.
    #[must_use]
    pub fn is_prefaulted(&self) -> bool {
        self.prefaulted
    }

    /// Buffers that the kernel uses at this moment.
    #[must_use]
    pub fn busy_buffers(&self) -> usize {
        self.busy
    }

    /// Notes that an operation on `buffer` begins.
    ///
    /// # Panics
    /// If the buffer was not handed out or was given back, or if the kernel would write to it
    /// beside another operation.
    pub fn pin(&mut self, buffer: BufferId, access: Access) {
        let index = self.taken(buffer);
        let used = &mut self.uses[index];
        let was_busy = used.busy();
        match access {
            Access::KernelReads => {
                assert!(
                    !used.kernel_writes,
                    "buffer {} is being read into",
                    buffer.0
                );
                used.kernel_reads += 1;
            }
            Access::KernelWrites => {
                assert!(
                    !was_busy,
                    "buffer {} is used by another operation",
                    buffer.0
                );
                used.kernel_writes = true;
            }
        }
        if !was_busy {
            self.busy += 1;
        }
    }

    /// Notes that an operation on `buffer` has ended; undoes one [`Pool::pin`].
    ///
    /// # Panics
    /// If there was no such operation.
    pub fn unpin(&mut self, buffer: BufferId, access: Access) {
        let used = &mut self.uses[buffer.0 as usize];
        match access {
            Access::KernelReads => {
                assert!(used.kernel_reads > 0, "buffer {} has no reader", buffer.0);
                used.kernel_reads -= 1;
            }
            Access::KernelWrites => {
                assert!(used.kernel_writes, "buffer {} has no writer", buffer.0);
                used.kernel_writes = false;
            }
        }
        if used.busy() {
            return;
        }
        self.busy -= 1;
        if std::mem::take(&mut used.given) {
            self.buddy.give(buffer.0);
        }
    }

    /// The address of byte `offset` of a buffer, from which `len` bytes belong to it. It stays
    /// valid while the buffer is pinned.
    ///
    /// # Panics
    /// If the buffer was not handed out or is too short.
    #[must_use]
    pub fn pointer(&self, buffer: BufferId, offset: usize, len: usize) -> *mut u8 {
        let (start, buffer_len) = self.extent(buffer);
        let inside = offset.checked_add(len).is_some_and(|end| end <= buffer_len);
        assert!(inside, "{offset}+{len} is outside a buffer of {buffer_len}");
        self.arena.pointer(start + offset, len)
    }

    /// The whole memory in pieces of at most `piece_bytes` (a multiple of the largest buffer):
    /// no buffer lies in two of them.
    pub fn pieces(&self, piece_bytes: usize) -> impl Iterator<Item = (*mut u8, usize)> {
        assert_eq!(piece_bytes % BLOCK_BYTES_MAX, 0);
        let total = self.arena.len();
        (0..total).step_by(piece_bytes).map(move |start| {
            let len = piece_bytes.min(total - start);
            (self.arena.pointer(start, len), len)
        })
    }

    /// Which of the [`Pool::pieces`] of `piece_bytes` holds `buffer`.
    #[must_use]
    pub fn piece_of(&self, buffer: BufferId, piece_bytes: usize) -> usize {
        buffer.0 as usize * BLOCK_BYTES_MIN / piece_bytes
    }

    /// Offset in the arena and length of a buffer that was handed out.
    fn extent(&self, buffer: BufferId) -> (usize, usize) {
        let order = self.buddy.taken_order(buffer.0);
        (
            buffer.0 as usize * BLOCK_BYTES_MIN,
            BLOCK_BYTES_MIN << order,
        )
    }

    /// The place in `uses` of a buffer that somebody has.
    fn taken(&self, buffer: BufferId) -> usize {
        let _ = self.buddy.taken_order(buffer.0);
        let index = buffer.0 as usize;
        assert!(
            !self.uses[index].given,
            "buffer {} was given back",
            buffer.0
        );
        index
    }
}

impl Buffers for Pool {
    fn take(&mut self, len_bytes: usize, purpose: Purpose) -> Option<BufferId> {
        let order = Buddy::order_of(len_bytes)?;
        let block = match purpose {
            Purpose::Guest => self.buddy.take(GUEST_ZONE, order)?,
            Purpose::Settle => self
                .buddy
                .take(GUEST_ZONE, order)
                .or_else(|| self.buddy.take(RESERVE_ZONE, order))?,
        };
        debug_assert!(!self.uses[block as usize].busy());
        Some(BufferId(block))
    }

    fn give(&mut self, buffer: BufferId) {
        let index = self.taken(buffer);
        if self.uses[index].busy() {
            self.uses[index].given = true;
        } else {
            self.buddy.give(buffer.0);
        }
    }

    fn bytes(&self, buffer: BufferId) -> &[u8] {
        let index = self.taken(buffer);
        assert!(
            !self.uses[index].kernel_writes,
            "buffer {} looked at while an operation writes to it",
            buffer.0
        );
        let (start, len) = self.extent(buffer);
        // SAFETY: no operation writes to it (asserted), none can begin while the pool is
        // borrowed (`pin` takes it mutably), and `bytes_mut` cannot be called either.
        unsafe { self.arena.slice(start, len) }
    }

    fn bytes_mut(&mut self, buffer: BufferId) -> &mut [u8] {
        let index = self.taken(buffer);
        assert!(
            !self.uses[index].busy(),
            "buffer {} changed while an operation uses it",
            buffer.0
        );
        let (start, len) = self.extent(buffer);
        // SAFETY: no operation uses it (asserted), and none can begin while the pool is borrowed.
        unsafe { self.arena.slice_mut(start, len) }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        if self.busy > 0 {
            // An operation that hangs in the kernel may still write there, after the memory was
            // unmapped and its addresses were given to somebody else. Losing the addresses is
            // the only safe end.
            tracing::warn!(
                buffers = self.busy,
                "buffers are still used by operations that did not end; keeping their memory"
            );
            self.arena.leak();
        }
    }
}

#[cfg(test)]
mod tests;
