// SPDX-License-Identifier: Apache-2.0
//! The log of writes to guest memory that a live migration needs (vhost-user, "Migration"): the
//! front-end shares a bitmap with a bit for each page of guest physical memory, and copies again
//! what is marked there.
//!
//! Everything that is written to guest memory goes through `vm-memory`, which marks the bitmap of
//! the region after the write: data, status bytes, used rings, `avail_event`. In that order the
//! front-end cannot clear a mark and then copy what was not written yet.
//!
//! The bitmap of the crate neither stops nor knows memory that comes later, and costs a lock with
//! every write. [`GuestBitmap`] is ours: one relaxed load while nothing is logged. The shim answers
//! the messages, because the answer to SET_LOG_BASE may be given only when all workers know of the
//! log. The crate never sees them.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use rustix::fs::{FileType, fstat};
use thiserror::Error;
use tracing::warn;
use vhost_user_backend::bitmap::BitmapReplace;
use vm_memory::bitmap::{Bitmap, RefSlice, WithBitmapSlice};
use vm_memory::mmap::NewBitmap;
use vm_memory::{
    Address, FileOffset, GuestMemoryBackend, GuestMemoryRegion, MmapRegion, VolatileMemory,
};

use super::GuestMemory;
use super::notify::Call;

/// Bytes of guest memory that a bit of the log stands for (VHOST_LOG_PAGE).
pub const LOG_PAGE_BYTES: u64 = 4096;

/// A log that cannot be used.
#[derive(Debug, Error)]
pub enum LogError {
    /// Empty, or it ends beyond all addresses.
    #[error("a log of {size} bytes at offset {offset} is empty or wraps around")]
    Empty {
        /// Bytes of the log.
        size: u64,
        /// Where it begins in the file.
        offset: u64,
    },
    /// Only whole pages are mapped.
    #[error("a log begins at offset {offset}, which is not a multiple of 4096")]
    Offset {
        /// Where it begins in the file.
        offset: u64,
    },
    /// Its file is shorter: writing there would end the process.
    #[error("the log ends at byte {end} of a file that has {file_len}")]
    Short {
        /// Where it ends in the file.
        end: u64,
        /// Length of the file in bytes.
        file_len: u64,
    },
    /// No file that can be mapped.
    #[error("the log is no regular file")]
    NoFile,
    /// The file cannot be looked at or mapped.
    #[error("the log cannot be mapped")]
    Map(#[source] io::Error),
}

/// The bitmap of a front-end, mapped.
#[derive(Debug)]
pub struct DirtyLog(MmapRegion<()>);

impl DirtyLog {
    /// Maps the `size` bytes at `offset` of `file`: what SET_LOG_BASE says.
    ///
    /// # Errors
    /// If they are not in the file, or cannot be mapped.
    pub fn map(file: OwnedFd, size: u64, offset: u64) -> Result<Self, LogError> {
        let end = offset.checked_add(size).filter(|_| size > 0);
        let end = end.ok_or(LogError::Empty { size, offset })?;
        if !offset.is_multiple_of(LOG_PAGE_BYTES) {
            return Err(LogError::Offset { offset });
        }
        let stat = fstat(&file).map_err(|errno| LogError::Map(errno.into()))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(LogError::NoFile);
        }
        let file_len = u64::try_from(stat.st_size).unwrap_or(0);
        if end > file_len {
            return Err(LogError::Short { end, file_len });
        }
        let too_large = || LogError::Map(io::ErrorKind::OutOfMemory.into());
        let size = usize::try_from(size).map_err(|_| too_large())?;
        let file = FileOffset::new(File::from(file), offset);
        let mapping = MmapRegion::from_file(file, size);
        let mapping = mapping.map_err(|error| LogError::Map(io::Error::other(error)))?;
        Ok(Self(mapping))
    }

    /// Whether there is a bit for every page below `end`.
    fn covers(&self, end: u64) -> bool {
        let bytes = end.div_ceil(LOG_PAGE_BYTES).div_ceil(8);
        usize::try_from(bytes).is_ok_and(|bytes| bytes <= self.0.size())
    }

    /// The byte of the log that has the bit of `page`, and the bit.
    fn bit(&self, page: u64) -> Option<(&AtomicU8, u8)> {
        let at = usize::try_from(page / 8).ok()?;
        let byte = self.0.get_atomic_ref::<AtomicU8>(at).ok()?;
        Some((byte, 1 << (page % 8)))
    }

    /// Marks the pages of `len` bytes at guest physical address `address`; those that the log has
    /// no bit for are left out.
    fn mark(&self, address: u64, len: u64) {
        let Some(last) = len.checked_sub(1) else {
            return;
        };
        let pages = address / LOG_PAGE_BYTES..=address.saturating_add(last) / LOG_PAGE_BYTES;
        for page in pages {
            let Some((byte, bit)) = self.bit(page) else {
                return;
            };
            byte.fetch_or(bit, Ordering::Release);
        }
    }

    fn is_marked(&self, address: u64) -> bool {
        let found = self.bit(address / LOG_PAGE_BYTES);
        found.is_some_and(|(byte, bit)| byte.load(Ordering::Acquire) & bit != 0)
    }
}

/// Where a region's writes are logged.
#[derive(Clone, Debug)]
struct Target {
    log: Arc<DirtyLog>,
    /// Told of every mark, if the front-end asked for that (SET_LOG_FD).
    call: Option<Arc<Call>>,
    /// Guest physical address of the region.
    start: u64,
}

/// What is written to one region of guest memory.
#[derive(Default, Debug)]
pub struct RegionWrites {
    /// Looked at with every write; whoever sets it waits until all workers have seen it.
    logged: AtomicBool,
    target: RwLock<Option<Target>>,
}

impl RegionWrites {
    fn set(&self, target: Option<Target>) {
        let logged = target.is_some();
        *self.target.write().unwrap_or_else(PoisonError::into_inner) = target;
        self.logged.store(logged, Ordering::Relaxed);
    }

    #[cold]
    fn note(&self, offset: usize, len: usize) {
        let target = self.target.read().unwrap_or_else(PoisonError::into_inner);
        let Some(target) = &*target else { return };
        // A region that ends beyond all addresses is refused when it comes.
        let offset = u64::try_from(offset).unwrap_or(u64::MAX);
        let len = u64::try_from(len).unwrap_or(u64::MAX);
        target.log.mark(target.start.saturating_add(offset), len);
        if let Some(call) = &target.call {
            call.signal();
        }
    }
}

impl<'a> WithBitmapSlice<'a> for RegionWrites {
    type S = RefSlice<'a, Self>;
}

impl Bitmap for RegionWrites {
    #[inline]
    fn mark_dirty(&self, offset: usize, len: usize) {
        if self.logged.load(Ordering::Relaxed) {
            self.note(offset, len);
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        let target = self.target.read().unwrap_or_else(PoisonError::into_inner);
        let offset = u64::try_from(offset).unwrap_or(u64::MAX);
        (target.as_ref())
            .is_some_and(|target| target.log.is_marked(target.start.saturating_add(offset)))
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, Self> {
        RefSlice::new(self, offset)
    }
}

/// How `vm-memory` tells of writes to a region of guest memory. Clones are the same region.
#[derive(Clone, Default, Debug)]
pub struct GuestBitmap(Arc<RegionWrites>);

impl<'a> WithBitmapSlice<'a> for GuestBitmap {
    type S = RefSlice<'a, RegionWrites>;
}

impl Bitmap for GuestBitmap {
    #[inline]
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.0.mark_dirty(offset, len);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.0.dirty_at(offset)
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, RegionWrites> {
        self.0.slice_at(offset)
    }
}

impl NewBitmap for GuestBitmap {
    fn with_len(_len: usize) -> Self {
        Self::default()
    }
}

/// Asked for by the crate, for the SET_LOG_BASE that it is never shown.
impl BitmapReplace for GuestBitmap {
    type InnerBitmap = ();

    fn replace(&self, (): ()) {}
}

/// What the front-end of a connection wants to be logged, and where.
#[derive(Default, Debug)]
pub struct Logging {
    state: Mutex<State>,
}

#[derive(Default, Debug)]
struct State {
    log: Option<Arc<DirtyLog>>,
    call: Option<Arc<Call>>,
    /// LOG_ALL is acknowledged.
    wanted: bool,
}

impl Logging {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether writes are to be logged.
    #[must_use]
    pub fn is_wanted(&self) -> bool {
        self.lock().wanted
    }

    /// Takes another log for the one there is. [`Logging::apply`] it, and let the workers know.
    pub fn set_log(&self, log: DirtyLog) {
        self.lock().log = Some(Arc::new(log));
    }

    /// Takes what is to be signalled after marks.
    pub fn set_call(&self, call: Call) {
        self.lock().call = Some(Arc::new(call));
    }

    /// Notes whether LOG_ALL is acknowledged. Returns whether that is news.
    pub fn set_wanted(&self, wanted: bool) -> bool {
        std::mem::replace(&mut self.lock().wanted, wanted) != wanted
    }

    /// Brings the regions of `memory` in line with what is wanted: also those that are new.
    pub fn apply(&self, memory: &GuestMemory) {
        let state = self.lock();
        let log = state.log.as_ref().filter(|_| state.wanted);
        if state.wanted && log.is_none() {
            warn!("LOG_ALL was acknowledged, and there is no log: nothing is logged");
        }
        for region in memory.iter() {
            let target = log.map(|log| {
                let end = region.last_addr().raw_value().saturating_add(1);
                if !log.covers(end) {
                    warn!(
                        end,
                        "the log has no room for all of guest memory: pages are not migrated"
                    );
                }
                Target {
                    log: Arc::clone(log),
                    call: state.call.clone(),
                    start: region.start_addr().raw_value(),
                }
            });
            let mapping: &MmapRegion<GuestBitmap> = region;
            mapping.bitmap().0.set(target);
        }
    }
}

#[cfg(test)]
#[path = "dirty_log_tests.rs"]
mod tests;
