// SPDX-License-Identifier: Apache-2.0
//! The eventfds of a queue. They are shared with the front-end, which may do anything to them:
//! nothing here blocks, and nothing here changes their flags.

use std::fs::File;
use std::io::IoSliceMut;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{ReadWriteFlags, preadv2, write};

/// The offset that means "where the file is", for calls that want one.
const CURRENT_POSITION: u64 = u64::MAX;

const NOW: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 0,
};

fn is_writable(fd: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::OUT)];
    matches!(poll(&mut fds, Some(&NOW)), Ok(1)) && fds[0].revents().contains(PollFlags::OUT)
}

/// Whether the descriptor is an eventfd. Where the kernel does not say (no `/proc`), it is taken
/// for one.
#[must_use]
pub fn is_eventfd(fd: BorrowedFd<'_>) -> bool {
    match std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())) {
        Ok(name) => name.as_os_str() == "anon_inode:[eventfd]",
        Err(_) => true,
    }
}

/// The descriptor on which the driver announces available descriptor chains.
#[derive(Debug)]
pub struct Kick(OwnedFd);

impl Kick {
    /// Takes the descriptor of SET_VRING_KICK.
    #[must_use]
    pub fn new(file: File) -> Self {
        Self(file.into())
    }

    /// Takes back every kick so far, so that a level-triggered epoll is quiet. Never blocks and
    /// never fails: a descriptor that the front-end has drained or replaced is no error.
    pub fn drain(&self) {
        let mut count = [0u8; 8];
        // The open file belongs to the front-end as well: O_NONBLOCK is not ours to set. What
        // cannot be read without waiting is no eventfd, and is left alone: looking first and
        // reading then would wait if the front-end was quicker.
        let mut buffers = [IoSliceMut::new(&mut count)];
        let _ = preadv2(
            &self.0,
            &mut buffers,
            CURRENT_POSITION,
            ReadWriteFlags::NOWAIT,
        );
    }
}

impl AsFd for Kick {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The descriptor on which the device announces used buffers.
#[derive(Debug)]
pub struct Call(OwnedFd);

impl Call {
    /// Takes the descriptor of SET_VRING_CALL.
    #[must_use]
    pub fn new(file: File) -> Self {
        Self(file.into())
    }

    /// Signals once. A counter that is full is signalled already.
    ///
    /// Looked at every time: a write to a full eventfd waits unless O_NONBLOCK is set, and
    /// whether it is can be changed by the front-end at any time. An eventfd has no write that
    /// never waits, so a front-end that fills the counter between the two calls still can hold
    /// the thread up.
    pub fn signal(&self) {
        if is_writable(self.0.as_fd()) {
            let _ = write(&self.0, &1u64.to_ne_bytes());
        }
    }
}
