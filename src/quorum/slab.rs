// SPDX-License-Identifier: Apache-2.0
//! Slots with generations: a name of something that is gone is noticed, never taken for its
//! successor.

/// Names an entry of a [`Slab`]. Packs into 48 bits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct SlotId {
    index: u16,
    generation: u32,
}

impl SlotId {
    /// The name as a number below 2^48.
    pub(super) fn pack(self) -> u64 {
        u64::from(self.index) | u64::from(self.generation) << 16
    }

    /// The name that [`SlotId::pack`] made `bits` of; bits above 48 are ignored.
    pub(super) fn unpack(bits: u64) -> Self {
        let [i0, i1, g0, g1, g2, g3, ..] = bits.to_le_bytes();
        Self {
            index: u16::from_le_bytes([i0, i1]),
            generation: u32::from_le_bytes([g0, g1, g2, g3]),
        }
    }
}

struct Slot<T> {
    generation: u32,
    value: Option<T>,
}

/// A bounded store of values by [`SlotId`]. All memory is taken at construction.
pub(super) struct Slab<T> {
    slots: Vec<Slot<T>>,
    free: Vec<u16>,
}

impl<T> Slab<T> {
    /// Room for `capacity` values.
    pub(super) fn new(capacity: u16) -> Self {
        Self {
            slots: (0..capacity)
                .map(|_| Slot {
                    generation: 0,
                    value: None,
                })
                .collect(),
            free: (0..capacity).rev().collect(),
        }
    }

    /// Values that can still be inserted.
    pub(super) fn room(&self) -> usize {
        self.free.len()
    }

    /// Whether nothing is stored.
    pub(super) fn is_empty(&self) -> bool {
        self.free.len() == self.slots.len()
    }

    /// Stores `value`.
    ///
    /// # Panics
    /// If there is no room; the caller has asked.
    pub(super) fn insert(&mut self, value: T) -> SlotId {
        let index = self
            .free
            .pop()
            .expect("the caller checked that there is room");
        let slot = &mut self.slots[usize::from(index)];
        assert!(slot.value.is_none());
        slot.value = Some(value);
        SlotId {
            index,
            generation: slot.generation,
        }
    }

    /// The value of that name, or `None` if it is gone.
    pub(super) fn get_mut(&mut self, id: SlotId) -> Option<&mut T> {
        let slot = self.slots.get_mut(usize::from(id.index))?;
        if slot.generation != id.generation {
            return None;
        }
        slot.value.as_mut()
    }

    /// Takes the value out.
    pub(super) fn remove(&mut self, id: SlotId) -> T {
        let slot = &mut self.slots[usize::from(id.index)];
        assert_eq!(slot.generation, id.generation, "removed twice");
        slot.generation = slot.generation.wrapping_add(1);
        self.free.push(id.index);
        slot.value
            .take()
            .expect("generation matched, so the value is there")
    }

    /// Names of all values, in the order of their slots.
    pub(super) fn ids(&self) -> impl Iterator<Item = SlotId> + '_ {
        self.slots
            .iter()
            .enumerate()
            .filter(|(_, slot)| slot.value.is_some())
            .map(|(index, slot)| {
                let index = u16::try_from(index).expect("capacity is a u16");
                SlotId {
                    index,
                    generation: slot.generation,
                }
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slab_reuse_changes_generation() {
        let mut slab = Slab::new(2);
        let a = slab.insert('a');
        assert_eq!(SlotId::unpack(a.pack()), a);
        assert_eq!(slab.remove(a), 'a');
        let b = slab.insert('b');
        assert!(slab.get_mut(a).is_none());
        assert_eq!(slab.get_mut(b), Some(&mut 'b'));
        assert_eq!(slab.room(), 1);
        assert_eq!(slab.ids().count(), 1);
    }
}
