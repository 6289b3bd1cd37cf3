// SPDX-License-Identifier: Apache-2.0
//! Which parts of an arena are free: a buddy allocator over unit numbers, without the memory.
//!
//! A *unit* is 4 KiB. A block of order k is 2^k units and begins at a multiple of its size. Free
//! blocks of an order form a list that is used last in first out, because the block given back
//! last is the one still in the processor's cache. For the same reason halves are put together
//! only when a request could not be met otherwise: a steady load of one size never splits or
//! merges anything.

/// Size of the smallest block: 4 KiB, the largest alignment a replica may ask for.
pub const BLOCK_BYTES_MIN: usize = 4 << 10;

/// Size of the largest block: 256 KiB, the longest request of a lane.
pub const BLOCK_BYTES_MAX: usize = 256 << 10;

/// Number of block sizes.
const ORDERS: usize = 7;

/// Units in the largest block.
pub(super) const UNITS_MAX: u32 = 1 << (ORDERS - 1);

const _: () = assert!(BLOCK_BYTES_MIN * UNITS_MAX as usize == BLOCK_BYTES_MAX);

/// No unit: the end of a list.
const NONE: u32 = u32::MAX;

/// What a unit is. Only the first unit of a block says something about the block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    /// Not the first unit of a block.
    Inside,
    /// First unit of a block on a free list.
    Free,
    /// First unit of a block that was handed out.
    Taken,
}

#[derive(Clone, Copy, Debug)]
struct Unit {
    state: State,
    order: u8,
    next: u32,
    previous: u32,
}

/// A run of units with its own free lists. Blocks never cross from one zone to another, so what
/// is held back in one zone cannot be worn down to crumbs by the users of the other.
#[derive(Debug)]
struct Zone {
    first: u32,
    end: u32,
    heads: [u32; ORDERS],
    free_units: u32,
}

/// The allocator. Zones are numbered in the order of [`Buddy::new`].
#[derive(Debug)]
pub(super) struct Buddy {
    units: Box<[Unit]>,
    zones: Box<[Zone]>,
}

impl Buddy {
    /// Zones of the given numbers of units, one after the other; each a multiple of
    /// [`UNITS_MAX`]. Allocates here and never again.
    pub(super) fn new(zone_units: &[u32]) -> Self {
        let total: u32 = zone_units.iter().sum();
        let unit = Unit {
            state: State::Inside,
            order: 0,
            next: NONE,
            previous: NONE,
        };
        let mut buddy = Self {
            units: vec![unit; total as usize].into_boxed_slice(),
            zones: Box::default(),
        };
        let mut first = 0;
        let mut zones = Vec::with_capacity(zone_units.len());
        for &units in zone_units {
            assert_eq!(units % UNITS_MAX, 0, "a zone is a number of largest blocks");
            zones.push(Zone {
                first,
                end: first + units,
                heads: [NONE; ORDERS],
                free_units: units,
            });
            first += units;
        }
        buddy.zones = zones.into_boxed_slice();
        for zone in 0..buddy.zones.len() {
            let (start, end) = (buddy.zones[zone].first, buddy.zones[zone].end);
            // Backwards, so that the lowest addresses are used first.
            for block in (start / UNITS_MAX..end / UNITS_MAX).rev() {
                buddy.push(zone, block * UNITS_MAX, ORDERS - 1);
            }
        }
        buddy
    }

    /// The order of the smallest block that holds `len_bytes`, or `None` if no block is so large.
    pub(super) fn order_of(len_bytes: usize) -> Option<usize> {
        let units = len_bytes.div_ceil(BLOCK_BYTES_MIN).max(1);
        let order = units.next_power_of_two().trailing_zeros() as usize;
        (order < ORDERS).then_some(order)
    }

    /// Units not handed out in `zone`.
    pub(super) fn free_units(&self, zone: usize) -> u32 {
        self.zones[zone].free_units
    }

    /// The order of a block that was handed out.
    ///
    /// # Panics
    /// If there is no such block.
    pub(super) fn taken_order(&self, block: u32) -> usize {
        let unit = self.units.get(block as usize);
        match unit {
            Some(unit) if unit.state == State::Taken => usize::from(unit.order),
            _ => panic!("buffer {block} was not handed out"),
        }
    }

    /// Hands out a block of `order` from `zone`.
    pub(super) fn take(&mut self, zone: usize, order: usize) -> Option<u32> {
        if self.zones[zone].free_units < 1 << order {
            return None;
        }
        let block = match self.take_or_split(zone, order) {
            Some(block) => block,
            None => {
                self.merge_up_to(zone, order);
                self.pop(zone, order)?
            }
        };
        self.set(block, State::Taken, order);
        self.zones[zone].free_units -= 1 << order;
        Some(block)
    }

    /// Takes back a block that was handed out.
    ///
    /// # Panics
    /// If it was not.
    pub(super) fn give(&mut self, block: u32) {
        let order = self.taken_order(block);
        let zone = self
            .zones
            .iter()
            .position(|zone| zone.first <= block && block < zone.end)
            .expect("every unit belongs to a zone");
        self.zones[zone].free_units += 1 << order;
        self.push(zone, block, order);
    }

    /// A free block of `order`, cut out of the smallest one that is large enough.
    fn take_or_split(&mut self, zone: usize, order: usize) -> Option<u32> {
        let found = (order..ORDERS).find(|&larger| self.zones[zone].heads[larger] != NONE)?;
        let block = self.pop(zone, found)?;
        for half in (order..found).rev() {
            self.push(zone, block + (1 << half), half);
        }
        Some(block)
    }

    /// Puts free halves together, smallest first, up to blocks of `order`. Takes time in
    /// proportion to the number of free blocks below `order`.
    fn merge_up_to(&mut self, zone: usize, order: usize) {
        for lower in 0..order {
            let mut block = self.zones[zone].heads[lower];
            while block != NONE {
                let mut next = self.units[block as usize].next;
                let buddy = block ^ (1 << lower);
                let other = self.units[buddy as usize];
                if other.state == State::Free && usize::from(other.order) == lower {
                    if next == buddy {
                        next = other.next;
                    }
                    self.unlink(zone, block);
                    self.unlink(zone, buddy);
                    self.push(zone, block.min(buddy), lower + 1);
                }
                block = next;
            }
        }
    }

    fn set(&mut self, block: u32, state: State, order: usize) {
        let unit = &mut self.units[block as usize];
        unit.state = state;
        unit.order = u8::try_from(order).expect("there are seven orders");
        unit.next = NONE;
        unit.previous = NONE;
    }

    fn push(&mut self, zone: usize, block: u32, order: usize) {
        self.set(block, State::Free, order);
        let head = self.zones[zone].heads[order];
        self.units[block as usize].next = head;
        if head != NONE {
            self.units[head as usize].previous = block;
        }
        self.zones[zone].heads[order] = block;
    }

    fn pop(&mut self, zone: usize, order: usize) -> Option<u32> {
        let block = self.zones[zone].heads[order];
        if block == NONE {
            return None;
        }
        self.unlink(zone, block);
        Some(block)
    }

    fn unlink(&mut self, zone: usize, block: u32) {
        let Unit {
            state,
            order,
            next,
            previous,
        } = self.units[block as usize];
        debug_assert_eq!(state, State::Free);
        if previous == NONE {
            self.zones[zone].heads[usize::from(order)] = next;
        } else {
            self.units[previous as usize].next = next;
        }
        if next != NONE {
            self.units[next as usize].previous = previous;
        }
        self.set(block, State::Inside, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_of_lengths() {
        let cases = [
            (0, Some(0)),
            (1, Some(0)),
            (4096, Some(0)),
            (4097, Some(1)),
            (8192, Some(1)),
            (8193, Some(2)),
            (256 << 10, Some(6)),
            ((256 << 10) + 1, None),
            (usize::MAX, None),
        ];
        for (len, order) in cases {
            assert_eq!(Buddy::order_of(len), order, "{len}");
        }
    }

    #[test]
    fn take_after_give_returns_the_same_block() {
        let mut buddy = Buddy::new(&[2 * UNITS_MAX]);
        let first = buddy.take(0, 0).unwrap();
        let second = buddy.take(0, 0).unwrap();
        buddy.give(first);
        buddy.give(second);
        assert_eq!(buddy.take(0, 0), Some(second));
        assert_eq!(buddy.take(0, 0), Some(first));
    }

    #[test]
    fn take_of_a_large_block_puts_crumbs_together() {
        let mut buddy = Buddy::new(&[UNITS_MAX]);
        let crumbs: Vec<u32> = (0..UNITS_MAX).map(|_| buddy.take(0, 0).unwrap()).collect();
        assert_eq!(buddy.take(0, 0), None);
        for block in crumbs.iter().rev() {
            buddy.give(*block);
        }
        assert_eq!(buddy.take(0, ORDERS - 1), Some(0));
        assert_eq!(buddy.free_units(0), 0);
    }

    #[test]
    #[should_panic(expected = "was not handed out")]
    fn give_twice_panics() {
        let mut buddy = Buddy::new(&[UNITS_MAX]);
        let block = buddy.take(0, 1).unwrap();
        buddy.give(block);
        buddy.give(block);
    }
}
