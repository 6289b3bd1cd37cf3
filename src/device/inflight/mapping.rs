// SPDX-License-Identifier: Apache-2.0
//! The memory of an in-flight buffer, shared with a front-end that may write to it at any time.
//!
//! # Which orders matter
//! Nobody reads the marks while we write them; the reader is our successor, after we were killed.
//! A kill stops a thread between two instructions: what came before in the program is in the
//! memory, what comes after is not. So the processor needs no ordering, but the compiler must
//! not exchange stores. Every store here is a release store: it stays behind everything before
//! it, and therefore stores stay in the order of the program. On x86 it is a plain `mov`.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;

use rustix::fs::{
    FileType, MemfdFlags, SealFlags, fcntl_add_seals, fstat, ftruncate, memfd_create,
};
use vm_memory::{AtomicAccess, Bytes, FileOffset, MmapRegion, VolatileMemory};

use super::InflightError;
use super::layout::PAGE_BYTES;

/// A mapped part of a file of the front-end's. What is read from it is hostile.
#[derive(Debug)]
pub struct Mapping(MmapRegion<()>);

/// A memory file of `len` zeroes to share. It cannot be made shorter any more: reading beyond the
/// end of its file would end the process.
///
/// # Errors
/// What the kernel says.
pub fn create_file(len: usize) -> io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = memfd_create("quorum-blk-inflight", flags)?;
    let len = u64::try_from(len).expect("a buffer has a few MiB at most");
    ftruncate(&file, len)?;
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::SEAL)?;
    Ok(file)
}

impl Mapping {
    /// Maps the first `len` of `size` bytes at `offset` of `file`.
    ///
    /// # Errors
    /// If they are not in the file, or cannot be mapped.
    pub fn new(file: OwnedFd, offset: u64, size: u64, len: usize) -> Result<Self, InflightError> {
        let stat = fstat(&file).map_err(|errno| InflightError::Examine(errno.into()))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(InflightError::NoFile);
        }
        let file_len = u64::try_from(stat.st_size).unwrap_or(0);
        if !offset.is_multiple_of(PAGE_BYTES as u64) {
            return Err(InflightError::Offset { offset });
        }
        let end = offset.checked_add(size);
        if end.is_none_or(|end| end > file_len) {
            return Err(InflightError::Short {
                offset,
                size,
                file_len,
            });
        }
        let file = FileOffset::new(File::from(file), offset);
        let region = MmapRegion::from_file(file, len);
        region
            .map(Self)
            .map_err(|error| InflightError::Map(io::Error::other(error)))
    }

    /// The value at `at`.
    ///
    /// # Panics
    /// If it is not inside: offsets are computed from a shape that was checked.
    pub fn load<T: AtomicAccess>(&self, at: usize) -> T {
        let memory = self.0.as_volatile_slice();
        memory
            .load(at, Ordering::Acquire)
            .expect("offsets are inside the mapping")
    }

    /// Stores `value` at `at`, after everything before.
    ///
    /// # Panics
    /// If it is not inside: offsets are computed from a shape that was checked.
    pub fn store<T: AtomicAccess>(&self, at: usize, value: T) {
        #[cfg(test)]
        if super::crash::is_dead() {
            return;
        }
        let memory = self.0.as_volatile_slice();
        memory
            .store(value, at, Ordering::Release)
            .expect("offsets are inside the mapping");
    }

    /// Copies bytes out.
    ///
    /// # Panics
    /// If they are not inside.
    pub fn read<const LEN: usize>(&self, at: usize) -> [u8; LEN] {
        let mut bytes = [0; LEN];
        let memory = self.0.as_volatile_slice();
        memory
            .read_slice(&mut bytes, at)
            .expect("offsets are inside the mapping");
        bytes
    }

    /// Copies bytes in, in any order.
    ///
    /// # Panics
    /// If they are not inside.
    pub fn write(&self, at: usize, bytes: &[u8]) {
        let memory = self.0.as_volatile_slice();
        memory
            .write_slice(bytes, at)
            .expect("offsets are inside the mapping");
    }
}
