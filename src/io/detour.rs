// SPDX-License-Identifier: Apache-2.0
//! Files on which io_uring must not try an operation on the thread that submits it.
#![allow(unsafe_code, reason = "fstatfs has no safe wrapper here")]

use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};

use io_uring::squeue;

/// Flags for the submission of an operation on `file`.
///
/// The kernel tries an operation at once, on the thread that submits it, and gives it to a thread
/// of its own only if it would have to wait. FUSE waits all the same: a direct write asks for the
/// lock of the file, and an fsync that its server does not answer has that lock. The thread would
/// hang together with the one file, and every other replica with it. So there nothing is tried.
#[must_use]
pub fn submission_flags(file: BorrowedFd<'_>) -> squeue::Flags {
    let mut answer = MaybeUninit::<libc::statfs>::zeroed();
    // SAFETY: the descriptor is open, and the answer has room.
    let result = unsafe { libc::fstatfs(file.as_raw_fd(), answer.as_mut_ptr()) };
    // SAFETY: every bit pattern is a value of it, and it is zero where nothing was written.
    let answer = unsafe { answer.assume_init() };
    if result == 0 && answer.f_type == libc::FUSE_SUPER_MAGIC {
        squeue::Flags::ASYNC
    } else {
        squeue::Flags::empty()
    }
}
