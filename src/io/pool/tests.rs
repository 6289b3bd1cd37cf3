// SPDX-License-Identifier: Apache-2.0
//! The pool by cases, and against a list of who holds what.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

const BLOCK: usize = BLOCK_BYTES_MAX;

#[test]
fn take_for_guest_leaves_the_reserve() {
    let mut pool = Pool::new(2 * BLOCK, BLOCK).unwrap();
    assert_eq!(pool.capacity_bytes(), 3 * BLOCK);
    let guest: Vec<_> = (0..2)
        .map(|_| pool.take(BLOCK, Purpose::Guest).unwrap())
        .collect();
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
fn drop_of_a_busy_pool_keeps_its_memory_mapped() {
    let mut pool = Pool::new(BLOCK, 0).unwrap();
    let buffer = pool.take(BLOCK, Purpose::Guest).unwrap();
    pool.pin(buffer, Access::KernelWrites);
    let start = pool.pointer(buffer, 0, BLOCK);
    drop(pool);
    let mut resident = [0u8; BLOCK / 4096];
    // SAFETY: asks about an address range and fails if nothing is mapped there; the answer has a
    // byte for every page.
    let result = unsafe { libc::mincore(start.cast(), BLOCK, resident.as_mut_ptr()) };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
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
        Self {
            pool,
            base,
            held: Vec::new(),
            guest_blocks,
        }
    }

    fn used(&self, reserve: bool) -> usize {
        let zone = self.held.iter().filter(|held| held.reserve == reserve);
        zone.map(|held| held.len).sum()
    }

    /// Whether an aligned hole of `len` exists among `blocks` from `start`.
    fn hole(&self, start: usize, blocks: usize, len: usize) -> bool {
        let taken: BTreeMap<usize, usize> = self
            .held
            .iter()
            .map(|held| (self.offset(held), held.len))
            .collect();
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
                || (purpose == Purpose::Settle && self.hole(guest_end, reserve_blocks, rounded)));
        let Some(id) = self.pool.take(len, purpose) else {
            assert!(
                !fits,
                "refused {len} for {purpose:?} though there is a hole"
            );
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
        let candidates: Vec<usize> = (0..self.held.len())
            .filter(|&i| !self.held[i].given)
            .collect();
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
        assert_eq!(
            self.pool.reserve_available_bytes(),
            reserve - self.used(true)
        );
        let busy = self
            .held
            .iter()
            .filter(|held| !held.pins.is_empty())
            .count();
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
