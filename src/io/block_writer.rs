// SPDX-License-Identifier: Apache-2.0
//! Writes of single blocks to a few files, side by side, on a ring of their own.
#![allow(
    unsafe_code,
    reason = "hands addresses of blocks to the kernel and keeps them until it is done"
)]

use std::fs::File;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use io_uring::{opcode, squeue, types};

use super::detour;
use super::ring::{Completion, Ring, RingError};

/// Bytes of a block.
pub const WRITER_BLOCK_BYTES: usize = 4096;

/// Submissions that go to the kernel in one system call.
const RING_ENTRIES: u32 = 64;

/// A write that has ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Written<T> {
    /// The caller's name for it.
    pub name: T,
    /// Errno if it failed; a short write has failed, with `EIO`.
    pub errno: Option<i32>,
}

/// A write on its way, and the block that the kernel reads.
type Underway<T> = (T, Arc<[u8; WRITER_BLOCK_BYTES]>);

/// Writes blocks to files that were opened for writing through to the medium (`O_DSYNC`).
///
/// Made and used on one thread. A write that hangs keeps its block; everything else goes on.
pub struct BlockWriter<T> {
    /// Dropped by hand: see [`Drop`].
    ring: ManuallyDrop<Ring>,
    /// Keeps the files, and with them their locks, for as long as the writer lives.
    files: Vec<Option<File>>,
    /// How each of them is written to, see [`detour`].
    flags: Vec<squeue::Flags>,
    /// Blocks on their way, by the number of their submission.
    slots: ManuallyDrop<Vec<Option<Underway<T>>>>,
    completions: Vec<Completion>,
}

impl<T: Copy> BlockWriter<T> {
    /// A writer for `files`; writes name them by their place. `None` keeps a place.
    ///
    /// # Errors
    /// [`RingError`].
    pub fn new(files: Vec<Option<File>>) -> Result<Self, RingError> {
        let mut ring = Ring::new(RING_ENTRIES)?;
        let registered: Vec<Option<BorrowedFd<'_>>> = files
            .iter()
            .map(|file| file.as_ref().map(File::as_fd))
            .collect();
        ring.register_files(&registered)?;
        let flags = registered
            .iter()
            .map(|file| file.map_or(squeue::Flags::empty(), detour::submission_flags))
            .collect();
        Ok(Self {
            ring: ManuallyDrop::new(ring),
            files,
            flags,
            slots: ManuallyDrop::new(Vec::new()),
            completions: Vec::new(),
        })
    }

    /// Puts another file, or none, into place `file`. Returns the one that was there, which the
    /// kernel may keep open for a while, see [`Ring::exchange_file`].
    ///
    /// # Errors
    /// [`RingError::Exchange`]: nothing has changed; the new file is dropped.
    ///
    /// # Panics
    /// If there is no such place.
    pub fn exchange(&mut self, file: usize, new: Option<File>) -> Result<Option<File>, RingError> {
        let index = u32::try_from(file).expect("a few files");
        let fd = new.as_ref().map(File::as_fd);
        let flags = fd.map_or(squeue::Flags::empty(), detour::submission_flags);
        self.ring.exchange_file(index, fd)?;
        self.flags[file] = flags;
        Ok(std::mem::replace(&mut self.files[file], new))
    }

    /// Queues the write of `bytes` as block `block` of the file in place `file`.
    ///
    /// # Panics
    /// If there is no file in that place.
    pub fn write(
        &mut self,
        file: usize,
        block: u64,
        bytes: Arc<[u8; WRITER_BLOCK_BYTES]>,
        name: T,
    ) {
        assert!(self.files[file].is_some(), "a file to write to");
        let slot = self
            .slots
            .iter()
            .position(Option::is_none)
            .unwrap_or_else(|| {
                self.slots.push(None);
                self.slots.len() - 1
            });
        let address = bytes.as_ptr();
        self.slots[slot] = Some((name, bytes));
        let flags = self.flags[file];
        let file = types::Fixed(u32::try_from(file).expect("a few files"));
        let len = u32::try_from(WRITER_BLOCK_BYTES).expect("a page");
        let entry = opcode::Write::new(file, address, len)
            .offset(block * WRITER_BLOCK_BYTES as u64)
            .build()
            .flags(flags)
            .user_data(slot as u64);
        // SAFETY: the block is kept, and not changed by anybody while it is shared, until its
        // completion is reaped.
        unsafe { self.ring.push(entry) };
    }

    /// Hands what is queued to the kernel.
    ///
    /// # Errors
    /// [`RingError::Enter`]: the ring is of no use any more.
    pub fn submit(&mut self) -> Result<(), RingError> {
        self.ring.submit()
    }

    /// Appends what has ended.
    ///
    /// # Errors
    /// [`RingError::Enter`]: the ring is of no use any more.
    pub fn reap(&mut self, out: &mut Vec<Written<T>>) -> Result<(), RingError> {
        let result = self.ring.reap(&mut self.completions);
        for completion in self.completions.drain(..) {
            let slot = usize::try_from(completion.user_data).expect("a slot");
            let (name, _) = self.slots[slot].take().expect("a write that is under way");
            let errno = match usize::try_from(completion.result) {
                Ok(WRITER_BLOCK_BYTES) => None,
                Ok(_) => Some(libc::EIO),
                Err(_) => Some(completion.result.saturating_neg()),
            };
            out.push(Written { name, errno });
        }
        result
    }

    /// Becomes readable when there is something to reap, if [`BlockWriter::wait_limit`] was asked
    /// before. Watch it with `EPOLLIN | EPOLLET` and never read it.
    #[must_use]
    pub fn wake_fd(&self) -> BorrowedFd<'_> {
        self.ring.wake_fd()
    }

    /// To be asked last before sleeping; see [`Ring::wait_limit`].
    ///
    /// # Errors
    /// [`RingError::Enter`]: the ring is of no use any more.
    pub fn wait_limit(&mut self) -> Result<Option<Duration>, RingError> {
        self.ring.wait_limit()
    }
}

impl<T> Drop for BlockWriter<T> {
    fn drop(&mut self) {
        // A write that hangs may read its block whenever it goes on: block and ring then stay for
        // ever. It happens at the end of the process only.
        if self.slots.iter().all(Option::is_none) {
            // SAFETY: dropped here and nowhere else.
            unsafe { ManuallyDrop::drop(&mut self.ring) };
            // SAFETY: as before.
            unsafe { ManuallyDrop::drop(&mut self.slots) };
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn files_are_exchanged() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("late");
        std::fs::write(&path, [0; WRITER_BLOCK_BYTES]).unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        let mut writer = BlockWriter::new(vec![None]).unwrap();
        assert!(writer.exchange(0, Some(file)).unwrap().is_none());
        writer.write(0, 0, Arc::new([9; WRITER_BLOCK_BYTES]), ());
        writer.submit().unwrap();
        let mut written = Vec::new();
        while written.is_empty() {
            writer.wait_limit().unwrap();
            writer.reap(&mut written).unwrap();
        }
        assert_eq!(written[0].errno, None);
        assert!(writer.exchange(0, None).unwrap().is_some());
        assert_eq!(std::fs::read(path).unwrap(), [9; WRITER_BLOCK_BYTES]);
    }

    #[test]
    fn blocks_reach_theirfiles_and_errors_are_told() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, writable: bool| {
            let path = folder.path().join(name);
            std::fs::write(&path, [0; 3 * WRITER_BLOCK_BYTES]).unwrap();
            OpenOptions::new()
                .read(true)
                .write(writable)
                .open(path)
                .unwrap()
        };
        let good = file("good", true);
        let files = vec![
            Some(good.try_clone().unwrap()),
            None,
            Some(file("bad", false)),
        ];
        let mut writer = BlockWriter::new(files).unwrap();
        writer.write(0, 2, Arc::new([7; WRITER_BLOCK_BYTES]), 'a');
        writer.write(2, 0, Arc::new([8; WRITER_BLOCK_BYTES]), 'b');
        writer.submit().unwrap();
        let mut written = Vec::new();
        while written.len() < 2 {
            writer.wait_limit().unwrap();
            writer.reap(&mut written).unwrap();
        }
        written.sort_by_key(|written| written.name);
        let [a, b] = written.try_into().unwrap();
        assert_eq!(
            (a, b),
            (
                Written {
                    name: 'a',
                    errno: None
                },
                Written {
                    name: 'b',
                    errno: Some(libc::EBADF)
                },
            )
        );
        let mut back = [0; WRITER_BLOCK_BYTES];
        good.read_exact_at(&mut back, 2 * WRITER_BLOCK_BYTES as u64)
            .unwrap();
        assert_eq!(back, [7; WRITER_BLOCK_BYTES]);
    }
}
