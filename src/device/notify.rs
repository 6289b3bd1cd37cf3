// SPDX-License-Identifier: Apache-2.0
//! The eventfds of a queue. They are shared with the front-end, which may do anything to them:
//! nothing here blocks, and nothing here changes their flags.

use std::fs::File;
use std::io::IoSliceMut;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_getfl};
use rustix::io::{Errno, ReadWriteFlags, preadv2, read, write};

/// The offset that means "where the file is", for calls that want one.
const CURRENT_POSITION: u64 = u64::MAX;

const NOW: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 0,
};

fn is_ready(fd: BorrowedFd<'_>, flags: PollFlags) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(fd, flags)];
    matches!(poll(&mut fds, Some(&NOW)), Ok(1)) && fds[0].revents().intersects(flags)
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
        // The open file belongs to the front-end as well: O_NONBLOCK is not ours to set.
        let mut buffers = [IoSliceMut::new(&mut count)];
        let result = preadv2(
            &self.0,
            &mut buffers,
            CURRENT_POSITION,
            ReadWriteFlags::NOWAIT,
        );
        if matches!(result, Err(Errno::OPNOTSUPP | Errno::INVAL | Errno::NOSYS))
            && is_ready(self.0.as_fd(), PollFlags::IN)
        {
            let _ = read(&self.0, &mut count);
        }
    }
}

impl AsFd for Kick {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The descriptor on which the device announces used buffers.
#[derive(Debug)]
pub struct Call {
    fd: OwnedFd,
    may_block: bool,
}

impl Call {
    /// Takes the descriptor of SET_VRING_CALL.
    #[must_use]
    pub fn new(file: File) -> Self {
        let fd = OwnedFd::from(file);
        let may_block = fcntl_getfl(&fd).is_ok_and(|flags| !flags.contains(OFlags::NONBLOCK));
        Self { fd, may_block }
    }

    /// Signals once. A counter that is full is signalled already.
    pub fn signal(&self) {
        if self.may_block && !is_ready(self.fd.as_fd(), PollFlags::OUT) {
            return;
        }
        let _ = write(&self.fd, &1u64.to_ne_bytes());
    }
}
