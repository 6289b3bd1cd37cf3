// SPDX-License-Identifier: Apache-2.0
//! The buffers of a worker: one arena, handed out last in first out.
#![allow(unsafe_code, reason = "lends slices of memory that the kernel also uses")]

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
                assert!(!used.kernel_writes, "buffer {} is being read into", buffer.0);
                used.kernel_reads += 1;
            }
            Access::KernelWrites => {
                assert!(!was_busy, "buffer {} is used by another operation", buffer.0);
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
        (buffer.0 as usize * BLOCK_BYTES_MIN, BLOCK_BYTES_MIN << order)
    }

    /// The place in `uses` of a buffer that somebody has.
    fn taken(&self, buffer: BufferId) -> usize {
        let _ = self.buddy.taken_order(buffer.0);
        let index = buffer.0 as usize;
        assert!(!self.uses[index].given, "buffer {} was given back", buffer.0);
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
        assert!(!self.uses[index].busy(), "buffer {} changed while an operation uses it", buffer.0);
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
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    const BLOCK: usize = BLOCK_BYTES_MAX;

    #[test]
    fn take_for_guest_leaves_the_reserve() {
        let mut pool = Pool::new(2 * BLOCK, BLOCK).unwrap();
        assert_eq!(pool.capacity_bytes(), 3 * BLOCK);
        let guest: Vec<_> = (0..2).map(|_| pool.take(BLOCK, Purpose::Guest).unwrap()).collect();
        assert_eq!(pool.take(1, Purpose::Guest), None);
        assert_eq!(pool.available_bytes(), 0);
        let settle = pool.take(BLOCK, Purpose::Settle).unwrap();
        assert_eq!(pool.take(1, Purpose::Settle), None);
        pool.give(settle);
        assert_eq!(pool.take(1, Purpose::Guest), None);
        pool.give(guest[0]);
        assert!(pool.take(1, Purpose::Guest).is_some());
    }

    #[test]
    fn take_longer_than_the_largest_block_is_refused() {
        let mut pool = Pool::new(4 * BLOCK, 0).unwrap();
        assert_eq!(pool.take(BLOCK + 1, Purpose::Settle), None);
    }

    #[test]
    fn give_of_a_busy_buffer_waits_for_the_last_operation() {
        let mut pool = Pool::new(BLOCK, 0).unwrap();
        let buffer = pool.take(BLOCK, Purpose::Guest).unwrap();
        pool.pin(buffer, Access::KernelReads);
        pool.pin(buffer, Access::KernelReads);
        pool.give(buffer);
        assert_eq!(pool.take(1, Purpose::Guest), None);
        pool.unpin(buffer, Access::KernelReads);
        assert_eq!(pool.take(1, Purpose::Guest), None);
        assert_eq!(pool.busy_buffers(), 1);
        pool.unpin(buffer, Access::KernelReads);
        assert_eq!(pool.busy_buffers(), 0);
        assert!(pool.take(1, Purpose::Guest).is_some());
    }

    #[test]
    fn bytes_while_the_kernel_reads_is_allowed() {
        let mut pool = Pool::new(BLOCK, 0).unwrap();
        let buffer = pool.take(512, Purpose::Guest).unwrap();
        pool.bytes_mut(buffer)[..3].copy_from_slice(b"abc");
        pool.pin(buffer, Access::KernelReads);
        assert_eq!(&pool.bytes(buffer)[..3], b"abc");
        pool.unpin(buffer, Access::KernelReads);
    }

    #[test]
    #[should_panic(expected = "while an operation writes to it")]
    fn bytes_while_the_kernel_writes_panics() {
        let mut pool = Pool::new(BLOCK, 0).unwrap();
        let buffer = pool.take(512, Purpose::Guest).unwrap();
        pool.pin(buffer, Access::KernelWrites);
        let _ = pool.bytes(buffer);
    }

    #[test]
    #[should_panic(expected = "while an operation uses it")]
    fn bytes_mut_while_the_kernel_reads_panics() {
        let mut pool = Pool::new(BLOCK, 0).unwrap();
        let buffer = pool.take(512, Purpose::Guest).unwrap();
        pool.pin(buffer, Access::KernelReads);
        let _ = pool.bytes_mut(buffer);
    }

    #[test]
    #[should_panic(expected = "was given back")]
    fn pin_of_a_buffer_given_back_panics() {
        let mut pool = Pool::new(BLOCK, 0).unwrap();
        let buffer = pool.take(512, Purpose::Guest).unwrap();
        pool.pin(buffer, Access::KernelReads);
        pool.give(buffer);
        pool.pin(buffer, Access::KernelReads);
    }

    #[test]
    fn pieces_cover_the_memory_and_hold_whole_buffers() {
        let mut pool = Pool::new(3 * BLOCK, 0).unwrap();
        let pieces: Vec<_> = pool.pieces(2 * BLOCK).collect();
        let lens: Vec<_> = pieces.iter().map(|piece| piece.1).collect();
        assert_eq!(lens, [2 * BLOCK, BLOCK]);
        while let Some(buffer) = pool.take(BLOCK, Purpose::Guest) {
            let (start, len) = pieces[pool.piece_of(buffer, 2 * BLOCK)];
            let offset = pool.pointer(buffer, 0, BLOCK).addr() - start.addr();
            assert!(offset + BLOCK <= len);
        }
    }

    #[derive(Clone, Debug)]
    enum Call {
        Take { len: usize, purpose: Purpose },
        Give { which: usize },
        Pin { which: usize, access: Access },
        Unpin { which: usize },
    }

    fn call() -> impl Strategy<Value = Call> {
        let len = prop_oneof![
            4 => 1usize..9000,
            2 => 1usize..=BLOCK,
            1 => Just(BLOCK),
            1 => Just(BLOCK + 1),
        ];
        let purpose = prop_oneof![3 => Just(Purpose::Guest), 1 => Just(Purpose::Settle)];
        let access = prop_oneof![Just(Access::KernelReads), Just(Access::KernelWrites)];
        prop_oneof![
            5 => (len, purpose).prop_map(|(len, purpose)| Call::Take { len, purpose }),
            4 => any::<usize>().prop_map(|which| Call::Give { which }),
            2 => (any::<usize>(), access).prop_map(|(which, access)| Call::Pin { which, access }),
            2 => any::<usize>().prop_map(|which| Call::Unpin { which }),
        ]
    }

    /// One buffer as the obvious model sees it.
    #[derive(Debug)]
    struct Held {
        id: BufferId,
        len: usize,
        reserve: bool,
        fill: u8,
        pins: Vec<Access>,
        given: bool,
    }

    /// The pool beside a list of who holds what: no cleverness in it at all.
    struct Model {
        pool: Pool,
        base: usize,
        held: Vec<Held>,
        guest_blocks: usize,
    }

    impl Model {
        fn new(guest_blocks: usize, reserve_blocks: usize) -> Self {
            let pool = Pool::new(guest_blocks * BLOCK, reserve_blocks * BLOCK).unwrap();
            let base = pool.pieces(BLOCK).next().unwrap().0.addr();
            Self { pool, base, held: Vec::new(), guest_blocks }
        }

        fn used(&self, reserve: bool) -> usize {
            let zone = self.held.iter().filter(|held| held.reserve == reserve);
            zone.map(|held| held.len).sum()
        }

        /// Whether an aligned hole of `len` exists among `blocks` from `start`.
        fn hole(&self, start: usize, blocks: usize, len: usize) -> bool {
            let taken: BTreeMap<usize, usize> =
                self.held.iter().map(|held| (self.offset(held), held.len)).collect();
            (start..start + blocks * BLOCK).step_by(len).any(|at| {
                let before = taken.range(..at + len).next_back();
                before.is_none_or(|(&other, &other_len)| other + other_len <= at)
            })
        }

        fn offset(&self, held: &Held) -> usize {
            held.id.0 as usize * BLOCK_BYTES_MIN
        }

        fn take(&mut self, len: usize, purpose: Purpose, fill: u8) {
            let rounded = len.max(BLOCK_BYTES_MIN).next_power_of_two();
            let guest_end = self.guest_blocks * BLOCK;
            let reserve_blocks = self.pool.capacity_bytes() / BLOCK - self.guest_blocks;
            let fits = len <= BLOCK
                && (self.hole(0, self.guest_blocks, rounded)
                    || (purpose == Purpose::Settle
                        && self.hole(guest_end, reserve_blocks, rounded)));
            let Some(id) = self.pool.take(len, purpose) else {
                assert!(!fits, "refused {len} for {purpose:?} though there is a hole");
                return;
            };
            assert!(fits, "{len} for {purpose:?} came from nowhere");
            let bytes = self.pool.bytes_mut(id);
            assert_eq!(bytes.len(), rounded);
            let offset = bytes.as_ptr().addr() - self.base;
            assert_eq!(offset % rounded, 0);
            bytes.fill(fill);
            let reserve = offset >= guest_end;
            assert!(!reserve || purpose == Purpose::Settle);
            for other in &self.held {
                let other_start = self.offset(other);
                assert!(offset + rounded <= other_start || other_start + other.len <= offset);
            }
            self.held.push(Held {
                id,
                len: rounded,
                reserve,
                fill,
                pins: Vec::new(),
                given: false,
            });
        }

        fn give(&mut self, which: usize) {
            let candidates: Vec<usize> =
                (0..self.held.len()).filter(|&i| !self.held[i].given).collect();
            if candidates.is_empty() {
                return;
            }
            let index = candidates[which % candidates.len()];
            let held = &mut self.held[index];
            if !held.pins.contains(&Access::KernelWrites) {
                let bytes = self.pool.bytes(held.id);
                assert!(bytes.iter().all(|&byte| byte == held.fill), "overwritten");
            }
            self.pool.give(held.id);
            if held.pins.is_empty() {
                self.held.swap_remove(index);
            } else {
                held.given = true;
            }
        }

        fn pin(&mut self, which: usize, access: Access) {
            if self.held.is_empty() {
                return;
            }
            let index = which % self.held.len();
            let held = &mut self.held[index];
            let allowed = match access {
                Access::KernelReads => !held.pins.contains(&Access::KernelWrites),
                Access::KernelWrites => held.pins.is_empty(),
            };
            if allowed && !held.given {
                self.pool.pin(held.id, access);
                held.pins.push(access);
            }
        }

        fn unpin(&mut self, which: usize) {
            if self.held.is_empty() {
                return;
            }
            let index = which % self.held.len();
            let held = &mut self.held[index];
            if let Some(access) = held.pins.pop() {
                self.pool.unpin(held.id, access);
                if held.pins.is_empty() && held.given {
                    self.held.swap_remove(index);
                }
            }
        }

        fn check(&self) {
            let guest_free = self.guest_blocks * BLOCK - self.used(false);
            assert_eq!(self.pool.available_bytes(), guest_free);
            let reserve = self.pool.capacity_bytes() - self.guest_blocks * BLOCK;
            assert_eq!(self.pool.reserve_available_bytes(), reserve - self.used(true));
            let busy = self.held.iter().filter(|held| !held.pins.is_empty()).count();
            assert_eq!(self.pool.busy_buffers(), busy);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn pool_behaves_like_a_list_of_holders(
            guest_blocks in 1usize..4,
            reserve_blocks in 0usize..3,
            calls in proptest::collection::vec(call(), 1..300),
        ) {
            let mut model = Model::new(guest_blocks, reserve_blocks);
            for (number, call) in calls.into_iter().enumerate() {
                let fill = u8::try_from(number % 251).unwrap();
                match call {
                    Call::Take { len, purpose } => model.take(len, purpose, fill),
                    Call::Give { which } => model.give(which),
                    Call::Pin { which, access } => model.pin(which, access),
                    Call::Unpin { which } => model.unpin(which),
                }
                model.check();
            }
            while !model.held.is_empty() {
                model.unpin(0);
                if model.held.first().is_some_and(|held| held.pins.is_empty()) {
                    model.give(0);
                }
            }
            model.check();
            // Everything is back, and whole: every largest block can be had again.
            let blocks = guest_blocks + reserve_blocks;
            for _ in 0..blocks {
                prop_assert!(model.pool.take(BLOCK, Purpose::Settle).is_some());
            }
        }
    }
}
