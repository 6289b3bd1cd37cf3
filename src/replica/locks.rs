// SPDX-License-Identifier: Apache-2.0
//! The locks that keep QEMU, its tools and a second daemon away from a replica (rule K1).
//!
//! QEMU gives every permission on an image a byte of the file: byte 100 + p is locked (shared) by
//! who uses permission p, byte 200 + p by who does not allow others to use it. Having locked its
//! own bytes, a process looks whether anybody else has locked a byte that contradicts them. We do
//! the same, with the same bytes, so that each side is refused by the other. The locks are of the
//! *open file description* kind: they belong to what the I/O goes to, not to the process, so they
//! last until the last operation has landed even if the process is killed (rule K2), and closing
//! an unrelated descriptor of the same file does not drop them as it does with POSIX locks.
#![allow(unsafe_code, reason = "calls fcntl with a lock description")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use thiserror::Error;

/// QEMU's permissions, by number.
const CONSISTENT_READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;

/// First byte of "I use this permission".
const USED: i64 = 100;
/// First byte of "nobody else may use this permission".
const BARRED: i64 = 200;

/// What a lock that somebody else holds means.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Holder {
    /// Writes to the image.
    Writes,
    /// May change the size of the image.
    Resizes,
    /// Reads the image and allows nobody to write to it.
    BarsWriters,
    /// Makes changes during which nobody may read the image.
    BarsReaders,
}

impl std::fmt::Display for Holder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Writes => "which holds QEMU's write lock",
            Self::Resizes => "which holds QEMU's resize lock",
            Self::BarsWriters => "which reads it and holds QEMU's lock against writers",
            Self::BarsReaders => "which holds QEMU's lock against readers",
        })
    }
}

/// Why the locks were not had.
#[derive(Debug, Error)]
pub(super) enum LockError {
    #[error("locked by another process")]
    Held { holder: Holder, pid: Option<i32> },
    #[error("the storage has no locks")]
    NotSupported(#[source] io::Error),
    #[error("cannot lock")]
    Failed(#[source] io::Error),
}

/// Takes the locks of a reader, or of a reader and writer, on an open file, and looks whether
/// anybody objects. They last as long as the open file description. Never waits.
pub(super) fn acquire(fd: BorrowedFd<'_>, writes: bool) -> Result<(), LockError> {
    // Readers too allow nobody to write or resize: a vote on a moving image means nothing.
    take(fd, USED + CONSISTENT_READ, Holder::BarsReaders)?;
    if writes {
        take(fd, USED + WRITE, Holder::BarsWriters)?;
    }
    take(fd, BARRED + WRITE, Holder::Writes)?;
    take(fd, BARRED + RESIZE, Holder::Resizes)?;
    // Only after taking ours: of two that start together, at least one sees the other.
    refuse_if_held(fd, BARRED + CONSISTENT_READ, Holder::BarsReaders)?;
    refuse_if_held(fd, USED + WRITE, Holder::Writes)?;
    refuse_if_held(fd, USED + RESIZE, Holder::Resizes)?;
    if writes {
        refuse_if_held(fd, BARRED + WRITE, Holder::BarsWriters)?;
    }
    Ok(())
}

/// Locks one byte, shared. Somebody with an exclusive lock there is not QEMU, but in our way.
fn take(fd: BorrowedFd<'_>, byte: i64, holder: Holder) -> Result<(), LockError> {
    let mut lock = description(libc::F_RDLCK, byte);
    match control(fd, libc::F_OFD_SETLK, &mut lock) {
        Ok(()) => Ok(()),
        Err(error) => match error.raw_os_error() {
            Some(libc::EAGAIN | libc::EACCES) => Err(LockError::Held { holder, pid: None }),
            Some(libc::ENOLCK | libc::EOPNOTSUPP | libc::EINVAL | libc::ENOSYS) => {
                Err(LockError::NotSupported(error))
            }
            _ => Err(LockError::Failed(error)),
        },
    }
}

/// Asks whether an exclusive lock on one byte could be had. Our own locks do not count.
fn refuse_if_held(fd: BorrowedFd<'_>, byte: i64, holder: Holder) -> Result<(), LockError> {
    let mut lock = description(libc::F_WRLCK, byte);
    control(fd, libc::F_OFD_GETLK, &mut lock).map_err(LockError::Failed)?;
    if lock.l_type == short(libc::F_UNLCK) {
        return Ok(());
    }
    // Locks of the kind used here have no process; the kernel then says -1.
    let pid = (lock.l_pid > 0).then_some(lock.l_pid);
    Err(LockError::Held { holder, pid })
}

fn description(kind: i32, byte: i64) -> libc::flock {
    // SAFETY: a structure of integers, for which zero is a value.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = short(kind);
    lock.l_whence = short(libc::SEEK_SET);
    lock.l_start = byte;
    lock.l_len = 1;
    lock
}

fn short(value: i32) -> i16 {
    i16::try_from(value).expect("lock constants are small")
}

fn control(fd: BorrowedFd<'_>, command: i32, lock: &mut libc::flock) -> io::Result<()> {
    loop {
        // SAFETY: the descriptor is open, and the lock description is valid and ours.
        if unsafe { libc::fcntl(fd.as_raw_fd(), command, std::ptr::from_mut(lock)) } == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;

    use super::*;

    fn open(path: &std::path::Path) -> File {
        File::options().read(true).write(true).open(path).unwrap()
    }

    #[test]
    fn acquire_conflicts_between_readers_and_writers() {
        // (first writes, second writes, second is refused because the first ...)
        let cases = [
            (true, true, Some(Holder::Writes)),
            (true, false, Some(Holder::Writes)),
            (false, true, Some(Holder::BarsWriters)),
            (false, false, None),
        ];
        for (first_writes, second_writes, expected) in cases {
            let image = tempfile::NamedTempFile::new().unwrap();
            let first = open(image.path());
            acquire(first.as_fd(), first_writes).unwrap();
            let second = open(image.path());
            let got = match acquire(second.as_fd(), second_writes) {
                Ok(()) => None,
                Err(LockError::Held { holder, .. }) => Some(holder),
                Err(other) => panic!("{other}"),
            };
            assert_eq!(got, expected, "{first_writes} {second_writes}");
        }
    }

    #[test]
    fn acquire_after_the_holder_closed_succeeds() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let first = open(image.path());
        acquire(first.as_fd(), true).unwrap();
        // A descriptor of the same open file description keeps the locks (rule K2).
        let duplicate = first.try_clone().unwrap();
        drop(first);
        let second = open(image.path());
        assert!(acquire(second.as_fd(), true).is_err());
        drop(second);
        drop(duplicate);
        acquire(open(image.path()).as_fd(), true).unwrap();
    }

    #[test]
    fn acquire_ignores_an_unrelated_close() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let first = open(image.path());
        acquire(first.as_fd(), true).unwrap();
        drop(open(image.path()));
        assert!(acquire(open(image.path()).as_fd(), true).is_err());
    }

    #[test]
    fn acquire_names_the_process_of_a_posix_lock() {
        let image = tempfile::NamedTempFile::new().unwrap();
        // A POSIX lock of this process conflicts with an open file description lock of it too.
        let first = open(image.path());
        let mut lock = description(libc::F_WRLCK, USED + RESIZE);
        control(first.as_fd(), libc::F_SETLK, &mut lock).unwrap();
        let second = open(image.path());
        let own = i32::try_from(std::process::id()).unwrap();
        match acquire(second.as_fd(), true) {
            Err(LockError::Held { holder, pid }) => {
                assert_eq!((holder, pid), (Holder::Resizes, Some(own)));
            }
            other => panic!("{other:?}"),
        }
    }
}
