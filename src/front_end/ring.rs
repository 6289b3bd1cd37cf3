// SPDX-License-Identifier: Apache-2.0
//! The driver's side of one split virtqueue (virtio 1.2, section 2.7), including everything a
//! driver must not do: any descriptor, any head, any index can be written.

use std::num::Wrapping;
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::VRING_USED_F_NO_NOTIFY;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::error::FrontEndError;

/// Bytes of a descriptor: address (8), length (4), flags (2), next (2).
const DESCRIPTOR_BYTES: u64 = 16;
/// Bytes of the available ring before its entries: flags and index.
const AVAIL_HEADER_BYTES: u64 = 4;
/// Bytes of the used ring before its entries: flags and index.
const USED_HEADER_BYTES: u64 = 4;
/// Bytes of a used element: id and length.
const USED_ELEMENT_BYTES: u64 = 8;

/// One entry of a descriptor table (section 2.7.5, flags from there).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Descriptor {
    /// Guest address of the buffer, or of the indirect table.
    pub address: u64,
    /// Its length in bytes.
    pub len: u32,
    /// [`Descriptor::NEXT`], [`Descriptor::WRITE`], [`Descriptor::INDIRECT`].
    pub flags: u16,
    /// Index of the next descriptor if the flag says so.
    pub next: u16,
}

impl Descriptor {
    /// The chain goes on at `next`.
    pub const NEXT: u16 = 1;
    /// The device writes this buffer.
    pub const WRITE: u16 = 2;
    /// The buffer is a table of descriptors.
    pub const INDIRECT: u16 = 4;

    pub(super) fn encode(&self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[0..8].copy_from_slice(&self.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..16].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// One entry of the used ring as the device wrote it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Used {
    /// Head of the descriptor chain; more than 16 bits are the device's mistake.
    pub id: u32,
    /// Bytes the device says it wrote.
    pub len: u32,
}

/// A split virtqueue in guest memory.
#[derive(Debug)]
pub struct Ring {
    memory: GuestMemoryMmap<()>,
    size: u16,
    table: GuestAddress,
    avail: GuestAddress,
    used: GuestAddress,
    event_idx: bool,
    /// Descriptors nobody uses.
    free: Vec<u16>,
    /// Where the next head goes; entries before it may be unpublished still.
    next_avail: Wrapping<u16>,
    /// What the available index in memory is.
    published: Wrapping<u16>,
    /// The next used element to look at.
    next_used: Wrapping<u16>,
}

impl Ring {
    /// Bytes of guest memory a ring of `size` entries takes.
    #[must_use]
    pub fn bytes(size: u16) -> u64 {
        let layout = Layout::new(size);
        layout.used + USED_HEADER_BYTES + USED_ELEMENT_BYTES * u64::from(size) + 2
    }

    /// An empty ring of `size` entries at `start`, whose indices begin at `first_index`.
    ///
    /// # Errors
    /// If it does not lie in the guest memory.
    pub fn new(
        memory: GuestMemoryMmap<()>,
        start: GuestAddress,
        size: u16,
        first_index: u16,
        event_idx: bool,
    ) -> Result<Self, FrontEndError> {
        let layout = Layout::new(size);
        let mut ring = Self {
            memory,
            size,
            table: start,
            avail: GuestAddress(start.0 + layout.avail),
            used: GuestAddress(start.0 + layout.used),
            event_idx,
            free: (0..size).rev().collect(),
            next_avail: Wrapping(first_index),
            published: Wrapping(first_index),
            next_used: Wrapping(first_index),
        };
        let len = usize::try_from(Self::bytes(size)).expect("at most 1.7 MiB");
        ring.write(start.0, &vec![0; len])?;
        ring.set_avail_index(first_index)?;
        ring.write(ring.used.0 + 2, &first_index.to_le_bytes())?;
        ring.disable_interrupts()?;
        Ok(ring)
    }

    /// Number of entries.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Guest addresses of the descriptor table, the available and the used ring.
    #[must_use]
    pub fn addresses(&self) -> [GuestAddress; 3] {
        [self.table, self.avail, self.used]
    }

    /// Number of descriptors nobody uses.
    #[must_use]
    pub fn free_descriptors(&self) -> usize {
        self.free.len()
    }

    /// Takes `count` free descriptors, or none at all.
    pub fn take_descriptors(&mut self, count: usize) -> Option<Vec<u16>> {
        let keep = self.free.len().checked_sub(count)?;
        Some(self.free.split_off(keep))
    }

    /// Gives descriptors back.
    pub fn give_back_descriptors(&mut self, descriptors: &[u16]) {
        self.free.extend_from_slice(descriptors);
    }

    /// Writes entry `index` of the descriptor table; no check is made.
    ///
    /// # Errors
    /// If the entry is outside the guest memory.
    pub fn write_descriptor(
        &mut self,
        index: u16,
        descriptor: &Descriptor,
    ) -> Result<(), FrontEndError> {
        let address = self.table.0 + DESCRIPTOR_BYTES * u64::from(index);
        self.write(address, &descriptor.encode())
    }

    /// Puts `head` into the available ring; the device sees it after [`Ring::publish`]. No check
    /// is made.
    ///
    /// # Errors
    /// If the ring is outside the guest memory.
    pub fn push_head(&mut self, head: u16) -> Result<(), FrontEndError> {
        let slot = u64::from(self.next_avail.0 % self.size);
        self.write(
            self.avail.0 + AVAIL_HEADER_BYTES + 2 * slot,
            &head.to_le_bytes(),
        )?;
        self.next_avail += 1;
        Ok(())
    }

    /// Shows all pushed heads to the device. Returns whether it wants to be kicked for them.
    ///
    /// # Errors
    /// If the ring is outside the guest memory.
    pub fn publish(&mut self) -> Result<bool, FrontEndError> {
        let before = self.published;
        self.set_avail_index(self.next_avail.0)?;
        if before == self.next_avail {
            return Ok(false);
        }
        // The device looks at the index after it has written the wish that is read now.
        fence(Ordering::SeqCst);
        if self.event_idx {
            let last = USED_HEADER_BYTES + USED_ELEMENT_BYTES * u64::from(self.size);
            let wanted = Wrapping(self.load(self.used.0 + last)?);
            // Whether `wanted` is in before..next_avail, modulo 2^16 (section 2.7.10).
            return Ok(self.next_avail - wanted - Wrapping(1) < self.next_avail - before);
        }
        Ok(u32::from(self.load(self.used.0)?) & VRING_USED_F_NO_NOTIFY == 0)
    }

    /// Writes the available index; the next head goes to its slot.
    ///
    /// # Errors
    /// If the ring is outside the guest memory.
    pub fn set_avail_index(&mut self, index: u16) -> Result<(), FrontEndError> {
        self.store(self.avail.0 + 2, index)?;
        self.next_avail = Wrapping(index);
        self.published = self.next_avail;
        Ok(())
    }

    /// The available index as published.
    #[must_use]
    pub fn avail_index(&self) -> u16 {
        self.published.0
    }

    /// The used index as the device wrote it.
    ///
    /// # Errors
    /// If the ring is outside the guest memory.
    pub fn used_index(&self) -> Result<u16, FrontEndError> {
        self.load(self.used.0 + 2)
    }

    /// The next used element, if there is one.
    ///
    /// # Errors
    /// If the ring is outside the guest memory.
    pub fn pop_used(&mut self) -> Result<Option<Used>, FrontEndError> {
        if self.used_index()? == self.next_used.0 {
            return Ok(None);
        }
        let slot = u64::from(self.next_used.0 % self.size);
        let mut bytes = [0; 8];
        let address = self.used.0 + USED_HEADER_BYTES + USED_ELEMENT_BYTES * slot;
        self.memory
            .read_slice(&mut bytes, GuestAddress(address))
            .map_err(|_| FrontEndError::OutsideMemory { address })?;
        self.next_used += 1;
        let [a, b, c, d, e, f, g, h] = bytes;
        Ok(Some(Used {
            id: u32::from_le_bytes([a, b, c, d]),
            len: u32::from_le_bytes([e, f, g, h]),
        }))
    }

    /// Asks for an interrupt for the next used element. Returns whether there is one already: it
    /// may have come before the device could see the wish.
    ///
    /// # Errors
    /// If the ring is outside the guest memory.
    pub fn enable_interrupts(&mut self) -> Result<bool, FrontEndError> {
        if self.event_idx {
            self.store_used_event(self.next_used)?;
        } else {
            self.store(self.avail.0, 0)?;
        }
        fence(Ordering::SeqCst);
        Ok(self.used_index()? != self.next_used.0)
    }

    /// Asks for no interrupts.
    ///
    /// # Errors
    /// If the ring is outside the guest memory.
    pub fn disable_interrupts(&mut self) -> Result<(), FrontEndError> {
        if self.event_idx {
            // As far away as can be: the device must not reach it before the next wish.
            self.store_used_event(self.next_used - Wrapping(1))
        } else {
            self.store(self.avail.0, NO_INTERRUPT)
        }
    }

    fn store_used_event(&self, index: Wrapping<u16>) -> Result<(), FrontEndError> {
        let at = AVAIL_HEADER_BYTES + 2 * u64::from(self.size);
        self.store(self.avail.0 + at, index.0)
    }

    fn write(&self, address: u64, bytes: &[u8]) -> Result<(), FrontEndError> {
        self.memory
            .write_slice(bytes, GuestAddress(address))
            .map_err(|_| FrontEndError::OutsideMemory { address })
    }

    fn store(&self, address: u64, value: u16) -> Result<(), FrontEndError> {
        self.memory
            .store(value.to_le(), GuestAddress(address), Ordering::Release)
            .map_err(|_| FrontEndError::OutsideMemory { address })
    }

    fn load(&self, address: u64) -> Result<u16, FrontEndError> {
        self.memory
            .load(GuestAddress(address), Ordering::Acquire)
            .map(u16::from_le)
            .map_err(|_| FrontEndError::OutsideMemory { address })
    }
}

/// The flag of the available ring that asks for no interrupts (section 2.7.6).
const NO_INTERRUPT: u16 = 1;

/// Distances of the parts from the descriptor table, aligned as section 2.7 demands: the
/// available ring to 2 bytes, the used ring to 4.
struct Layout {
    avail: u64,
    used: u64,
}

impl Layout {
    fn new(size: u16) -> Self {
        let avail = DESCRIPTOR_BYTES * u64::from(size);
        let used = (avail + AVAIL_HEADER_BYTES + 2 * u64::from(size) + 2).next_multiple_of(4);
        Self { avail, used }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ring(first_index: u16, event_idx: bool) -> Ring {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 16)]).unwrap();
        Ring::new(memory, GuestAddress(0), 8, first_index, event_idx).unwrap()
    }

    /// What a device does to complete `id`.
    fn complete(ring: &Ring, id: u32, len: u32) {
        let index = ring.used_index().unwrap();
        let slot = ring.used.0 + 4 + 8 * u64::from(index % ring.size);
        ring.write(slot, &id.to_le_bytes()).unwrap();
        ring.write(slot + 4, &len.to_le_bytes()).unwrap();
        ring.store(ring.used.0 + 2, index.wrapping_add(1)).unwrap();
    }

    #[test]
    fn layout_matches_the_specification() {
        let ring = ring(0, false);
        assert_eq!(ring.addresses().map(|address| address.0), [0, 128, 152]);
        assert_eq!(Ring::bytes(8), ring.used.0 + 4 + 64 + 2);
    }

    #[test]
    fn used_elements_come_in_order_across_the_index_wrap() {
        let mut ring = ring(u16::MAX, false);
        assert_eq!(ring.pop_used().unwrap(), None);
        complete(&ring, 3, 1);
        complete(&ring, 1, 513);
        assert_eq!(ring.pop_used().unwrap(), Some(Used { id: 3, len: 1 }));
        assert_eq!(ring.pop_used().unwrap(), Some(Used { id: 1, len: 513 }));
        assert_eq!(ring.pop_used().unwrap(), None);
    }

    #[test]
    fn publish_kicks_only_when_the_device_asks() {
        let mut plain = ring(0, false);
        plain.push_head(2).unwrap();
        assert!(plain.publish().unwrap());
        assert!(!plain.publish().unwrap(), "nothing new");
        plain.store(plain.used.0, 1).unwrap();
        plain.push_head(3).unwrap();
        assert!(!plain.publish().unwrap(), "NO_NOTIFY");

        let mut event = ring(0, true);
        let avail_event = event.used.0 + 4 + 64;
        event.store(avail_event, 1).unwrap();
        event.push_head(0).unwrap();
        assert!(!event.publish().unwrap(), "index 1 is not passed yet");
        event.push_head(1).unwrap();
        assert!(event.publish().unwrap());
    }

    #[test]
    fn descriptors_are_taken_all_or_none() {
        let mut ring = ring(0, false);
        let taken = ring.take_descriptors(6).unwrap();
        assert!(ring.take_descriptors(3).is_none());
        assert_eq!(ring.free_descriptors(), 2);
        ring.give_back_descriptors(&taken);
        assert_eq!(ring.take_descriptors(8).unwrap().len(), 8);
    }
}
