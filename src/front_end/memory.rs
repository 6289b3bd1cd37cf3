// SPDX-License-Identifier: Apache-2.0
#![allow(
    unsafe_code,
    reason = "the memory file that is shared with the back-end has no safe constructor in std"
)]
//! Guest memory: one memory file seen as two regions with a hole between them, as a PC has it.

use std::fs::File;
use std::os::fd::FromRawFd;
use std::sync::Arc;

use vhost::VhostUserMemoryRegionInfo;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::error::FrontEndError;

/// Guest address of the upper region: above the hole that devices occupy below 4 GiB.
pub const HIGH_BASE: u64 = 1 << 32;

/// Pages are what can be mapped.
const PAGE_BYTES: u64 = 4096;

/// The two regions.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Half {
    /// From guest address 0.
    Low,
    /// From [`HIGH_BASE`].
    High,
}

/// The memory of the guest, and who has which part of it.
#[derive(Debug)]
pub(super) struct GuestRam {
    map: GuestMemoryMmap<()>,
    half_bytes: u64,
    low_used: u64,
    high_used: u64,
}

impl GuestRam {
    /// Memory of `bytes` bytes (rounded down to two equal regions of whole pages), all zero.
    pub(super) fn new(bytes: u64) -> Result<Self, FrontEndError> {
        let half_bytes = bytes / 2 / PAGE_BYTES * PAGE_BYTES;
        let failed = |source| FrontEndError::System {
            what: "create the guest memory",
            source,
        };
        // SAFETY: the name is a NUL-terminated string; the flags are plain bits.
        let fd = unsafe { libc::memfd_create(c"guest-memory".as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(failed(std::io::Error::last_os_error()));
        }
        // SAFETY: the descriptor was just created and nobody else knows it.
        let file = unsafe { File::from_raw_fd(fd) };
        file.set_len(half_bytes * 2).map_err(failed)?;
        let file = Arc::new(file);
        let len = usize::try_from(half_bytes).expect("an address space holds the guest memory");
        let low = FileOffset::from_arc(Arc::clone(&file), 0);
        let high = FileOffset::from_arc(file, half_bytes);
        let map = GuestMemoryMmap::from_ranges_with_files([
            (GuestAddress(0), len, Some(low)),
            (GuestAddress(HIGH_BASE), len, Some(high)),
        ])
        .map_err(FrontEndError::Map)?;
        Ok(Self {
            map,
            half_bytes,
            low_used: 0,
            high_used: 0,
        })
    }

    /// The mapping; clones share the memory.
    pub(super) fn map(&self) -> &GuestMemoryMmap<()> {
        &self.map
    }

    /// Bytes in each region.
    pub(super) fn half_bytes(&self) -> u64 {
        self.half_bytes
    }

    /// Hands out `bytes` bytes that begin at a page, or `None` if the region has no more.
    pub(super) fn take(&mut self, half: Half, bytes: u64) -> Option<GuestAddress> {
        let (base, used) = match half {
            Half::Low => (0, &mut self.low_used),
            Half::High => (HIGH_BASE, &mut self.high_used),
        };
        let end = used.checked_add(bytes.next_multiple_of(PAGE_BYTES))?;
        if end > self.half_bytes {
            return None;
        }
        let address = GuestAddress(base + *used);
        *used = end;
        Some(address)
    }

    /// Takes everything back; what was handed out must not be used any more.
    pub(super) fn release_all(&mut self) {
        self.low_used = 0;
        self.high_used = 0;
    }

    /// Both regions as SET_MEM_TABLE and ADD_MEM_REG tell them.
    pub(super) fn regions(&self) -> Vec<VhostUserMemoryRegionInfo> {
        self.map
            .iter()
            .map(|region| {
                VhostUserMemoryRegionInfo::from_guest_region(region)
                    .expect("every region is made from the memory file")
            })
            .collect()
    }

    /// The file behind the regions, for whoever wants to do it harm.
    pub(super) fn file(&self) -> &File {
        let region = self.map.iter().next().expect("there are two regions");
        let offset = region.file_offset();
        offset.expect("every region is made from the file").file()
    }

    /// Where `address` is mapped in this process; ring addresses are told in these.
    pub(super) fn host_address(&self, address: GuestAddress) -> Result<u64, FrontEndError> {
        let pointer = self
            .map
            .get_host_address(address)
            .map_err(|_| FrontEndError::OutsideMemory { address: address.0 })?;
        Ok(u64::try_from(pointer.addr()).expect("addresses have at most 64 bits"))
    }
}

/// A part of the guest memory from which a queue takes its buffers: first fit, merged on return.
#[derive(Debug)]
pub(super) struct Arena {
    /// Free runs, by address: (start, length in bytes), none adjacent.
    free: Vec<(u64, u64)>,
}

/// Buffers begin at multiples of this, as those of a real driver do.
const ARENA_ALIGN: u64 = 512;

impl Arena {
    pub(super) fn new(start: GuestAddress, bytes: u64) -> Self {
        Self {
            free: vec![(start.0, bytes / ARENA_ALIGN * ARENA_ALIGN)],
        }
    }

    /// A run of at least `bytes` bytes, or `None`.
    pub(super) fn take(&mut self, bytes: u64) -> Option<GuestAddress> {
        let bytes = bytes.next_multiple_of(ARENA_ALIGN);
        let at = self.free.iter().position(|&(_, len)| len >= bytes)?;
        let (start, len) = self.free[at];
        if len == bytes {
            self.free.remove(at);
        } else {
            self.free[at] = (start + bytes, len - bytes);
        }
        Some(GuestAddress(start))
    }

    /// Gives a run back; `bytes` as it was taken.
    pub(super) fn give_back(&mut self, start: GuestAddress, bytes: u64) {
        let bytes = bytes.next_multiple_of(ARENA_ALIGN);
        let at = self.free.partition_point(|&(other, _)| other < start.0);
        self.free.insert(at, (start.0, bytes));
        if let Some(&(next, len)) = self.free.get(at + 1)
            && start.0 + bytes == next
        {
            self.free[at].1 += len;
            self.free.remove(at + 1);
        }
        if let Some(before) = at.checked_sub(1)
            && self.free[before].0 + self.free[before].1 == start.0
        {
            self.free[before].1 += self.free[at].1;
            self.free.remove(at);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arena_merges_what_comes_back() {
        let mut arena = Arena::new(GuestAddress(4096), 4096);
        let runs: Vec<_> = (0..8).map(|_| arena.take(500).unwrap()).collect();
        assert!(arena.take(1).is_none());
        for at in [1, 3, 2, 0, 7, 5, 6, 4] {
            arena.give_back(runs[at], 500);
        }
        assert_eq!(arena.take(4096), Some(GuestAddress(4096)));
    }

    #[test]
    fn ram_halves_share_one_file() {
        let mut ram = GuestRam::new(1 << 20).unwrap();
        assert_eq!(ram.take(Half::High, 1), Some(GuestAddress(HIGH_BASE)));
        assert_eq!(
            ram.take(Half::High, 1),
            Some(GuestAddress(HIGH_BASE + 4096))
        );
        assert_eq!(ram.take(Half::Low, 1 << 20), None);
        let regions = ram.regions();
        assert_eq!(regions[0].mmap_handle, regions[1].mmap_handle);
        assert_eq!(regions[1].mmap_offset, 1 << 19);
    }
}
