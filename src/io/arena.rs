// SPDX-License-Identifier: Apache-2.0
//! One anonymous mapping for all buffers of a worker.
#![allow(
    unsafe_code,
    reason = "owns a memory mapping that the kernel reads and writes"
)]

use std::io;
use std::ptr::{self, NonNull};
use std::slice;

use crate::io::buddy::BLOCK_BYTES_MAX;

/// Alignment of the mapping: the size of a huge page on every machine that has 4 KiB pages.
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// Memory of a fixed length that begins at a huge page boundary and is zero at first.
///
/// The kernel may be told to read and write it. Whoever does that keeps account of it and calls
/// [`Arena::leak`] rather than dropping an arena that a kernel operation may still write to: the
/// addresses would be given to somebody else, and the late write would land there.
#[derive(Debug)]
pub(super) struct Arena {
    base: NonNull<u8>,
    len: usize,
    mapped: bool,
}

impl Arena {
    /// Maps `len` bytes, a multiple of [`BLOCK_BYTES_MAX`], and asks for huge pages.
    ///
    /// # Errors
    /// `ENOMEM` if the address space or the limit on it does not allow so much.
    pub(super) fn new(len: usize) -> io::Result<Self> {
        assert!(
            len > 0 && len.is_multiple_of(BLOCK_BYTES_MAX),
            "arena of {len} bytes"
        );
        let padded = len
            .checked_add(HUGE_PAGE_BYTES)
            .ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))?;
        // SAFETY: an anonymous mapping at an address of the kernel's choice touches nothing that
        // exists.
        let raw = unsafe {
            libc::mmap(
                ptr::null_mut(),
                padded,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if raw == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let raw = raw.cast::<u8>();
        let head = raw.align_offset(HUGE_PAGE_BYTES);
        let base = raw.wrapping_add(head);
        // The ends that alignment leaves over go back.
        unmap(raw, head);
        unmap(base.wrapping_add(len), padded - head - len);
        // SAFETY: the range is part of the mapping above. The advice may be refused, which costs
        // speed only.
        unsafe { libc::madvise(base.cast(), len, libc::MADV_HUGEPAGE) };
        // SAFETY: as above; a child process has no use for the buffers.
        unsafe { libc::madvise(base.cast(), len, libc::MADV_DONTFORK) };
        Ok(Self {
            base: NonNull::new(base).expect("mmap never returns the null page here"),
            len,
            mapped: true,
        })
    }

    /// Length in bytes.
    #[must_use]
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Backs the whole arena with memory now, so that no request pays for a page fault.
    ///
    /// # Errors
    /// What `madvise` says; `EINVAL` before Linux 5.14. The arena works without.
    pub(super) fn prefault(&mut self) -> io::Result<()> {
        // SAFETY: the range is our mapping; populating keeps its content.
        let result = unsafe {
            libc::madvise(
                self.base.as_ptr().cast(),
                self.len,
                libc::MADV_POPULATE_WRITE,
            )
        };
        if result == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }

    /// The bytes `offset..offset + len`.
    ///
    /// # Safety
    /// Nobody, the kernel included, writes to them while the slice lives.
    #[must_use]
    pub(super) unsafe fn slice(&self, offset: usize, len: usize) -> &[u8] {
        let start = self.pointer(offset, len);
        // SAFETY: inside the mapping (checked above), initialised (anonymous memory is zero), and
        // unwritten by the caller's promise.
        unsafe { slice::from_raw_parts(start, len) }
    }

    /// The bytes `offset..offset + len`, to change.
    ///
    /// # Safety
    /// Nobody else, the kernel included, reads or writes them while the slice lives.
    #[must_use]
    pub(super) unsafe fn slice_mut(&mut self, offset: usize, len: usize) -> &mut [u8] {
        let start = self.pointer(offset, len);
        // SAFETY: inside the mapping (checked above), initialised, and ours alone by the caller's
        // promise.
        unsafe { slice::from_raw_parts_mut(start, len) }
    }

    /// The address of byte `offset`, from which at least `len` bytes belong to the arena.
    ///
    /// # Panics
    /// If they do not.
    #[must_use]
    pub(super) fn pointer(&self, offset: usize, len: usize) -> *mut u8 {
        let inside = offset.checked_add(len).is_some_and(|end| end <= self.len);
        assert!(inside, "{offset}+{len} is outside an arena of {}", self.len);
        self.base.as_ptr().wrapping_add(offset)
    }

    /// Gives up the mapping without unmapping it: its addresses are never used again in this
    /// process.
    pub(super) fn leak(&mut self) {
        self.mapped = false;
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        if self.mapped {
            unmap(self.base.as_ptr(), self.len);
        }
    }
}

/// Returns a part of a mapping that is ours and to which no reference is left.
fn unmap(start: *mut u8, len: usize) {
    if len == 0 {
        return;
    }
    // SAFETY: called only with a part of the mapping made in `Arena::new`, either before anybody
    // else knew of it or when the arena, and every borrow of it, has ended.
    let result = unsafe { libc::munmap(start.cast(), len) };
    assert_eq!(
        result,
        0,
        "munmap of our own mapping: {}",
        io::Error::last_os_error()
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arena_new_is_aligned_zero_and_writable() {
        let mut arena = Arena::new(3 * BLOCK_BYTES_MAX).unwrap();
        assert_eq!(arena.pointer(0, 1).align_offset(HUGE_PAGE_BYTES), 0);
        // SAFETY: nobody else knows of this arena.
        let bytes = unsafe { arena.slice_mut(0, 3 * BLOCK_BYTES_MAX) };
        assert!(bytes.iter().all(|&byte| byte == 0));
        bytes.fill(7);
        arena.prefault().unwrap();
        // SAFETY: nobody else knows of this arena.
        let bytes = unsafe { arena.slice(BLOCK_BYTES_MAX, 5) };
        assert_eq!(bytes, [7; 5]);
    }

    #[test]
    #[should_panic(expected = "outside an arena")]
    fn arena_pointer_past_the_end_panics() {
        let arena = Arena::new(BLOCK_BYTES_MAX).unwrap();
        let _ = arena.pointer(BLOCK_BYTES_MAX - 1, 2);
    }
}
