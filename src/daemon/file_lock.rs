// SPDX-License-Identifier: Apache-2.0
//! An exclusive lock on a whole file, of the *open file description* kind: it lasts until the
//! last descriptor of this opening is closed and the last operation on it has landed, also when
//! the process is killed (rule K2), and no unrelated close drops it.
#![allow(unsafe_code, reason = "calls fcntl with a lock description")]

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// What came of asking for a lock.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Locked {
    /// It is ours.
    Yes,
    /// Another opening of the file has it.
    Held,
    /// The file system has no locks.
    NotSupported,
}

/// Takes the lock, without waiting.
///
/// # Errors
/// If the kernel has no memory for it, or worse.
pub fn try_lock(file: &impl AsFd) -> io::Result<Locked> {
    ask(file, whole_file())
}

/// Takes a lock that only keeps writers away, without waiting: all that can be had of a file that
/// is open for reading.
///
/// # Errors
/// If the kernel has no memory for it, or worse.
pub fn try_lock_shared(file: &impl AsFd) -> io::Result<Locked> {
    let mut lock = whole_file();
    lock.l_type = short(libc::F_RDLCK);
    ask(file, lock)
}

fn ask(file: &impl AsFd, mut lock: libc::flock) -> io::Result<Locked> {
    match control(file, libc::F_OFD_SETLK, &mut lock) {
        Ok(()) => Ok(Locked::Yes),
        Err(error) => match error.raw_os_error() {
            Some(libc::EAGAIN | libc::EACCES) => Ok(Locked::Held),
            Some(libc::ENOLCK | libc::EOPNOTSUPP | libc::EINVAL | libc::ENOSYS) => {
                Ok(Locked::NotSupported)
            }
            _ => Err(error),
        },
    }
}

/// Gives up every lock of this opening of the file, whatever bytes they are on.
///
/// # Errors
/// If the storage does not let go of them; they end with the opening at the latest.
pub fn unlock(file: &impl AsFd) -> io::Result<()> {
    let mut lock = whole_file();
    lock.l_type = short(libc::F_UNLCK);
    control(file, libc::F_OFD_SETLK, &mut lock)
}

/// Whether another opening of the file has the lock. Takes none.
///
/// # Errors
/// If that cannot be asked.
pub fn is_locked(file: &impl AsFd) -> io::Result<bool> {
    let mut lock = whole_file();
    control(file, libc::F_OFD_GETLK, &mut lock)?;
    Ok(lock.l_type != short(libc::F_UNLCK))
}

fn whole_file() -> libc::flock {
    // SAFETY: a structure of integers, for which zero is a value.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = short(libc::F_WRLCK);
    lock.l_whence = short(libc::SEEK_SET);
    lock
}

fn short(value: i32) -> i16 {
    i16::try_from(value).expect("lock constants are small")
}

fn control(file: &impl AsFd, command: i32, lock: &mut libc::flock) -> io::Result<()> {
    let fd = file.as_fd().as_raw_fd();
    loop {
        // SAFETY: the descriptor is borrowed and open, the lock description is valid and ours.
        if unsafe { libc::fcntl(fd, command, std::ptr::from_mut(lock)) } == 0 {
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

    use super::*;

    #[test]
    fn lock_is_exclusive_until_the_last_descriptor_is_closed() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let open = || {
            let mut options = File::options();
            options.read(true).write(true).open(image.path()).unwrap()
        };
        let first = open();
        assert!(!is_locked(&first).unwrap());
        assert_eq!(try_lock(&first).unwrap(), Locked::Yes);
        assert!(!is_locked(&first).unwrap(), "our own lock does not count");
        let second = open();
        assert!(is_locked(&second).unwrap());
        assert_eq!(try_lock(&second).unwrap(), Locked::Held);
        let duplicate = first.try_clone().unwrap();
        drop(first);
        drop(open());
        assert_eq!(try_lock(&second).unwrap(), Locked::Held);
        drop(duplicate);
        assert_eq!(try_lock(&second).unwrap(), Locked::Yes);
        let reader = File::open(image.path()).unwrap();
        assert_eq!(try_lock_shared(&reader).unwrap(), Locked::Held);
        let third = open();
        unlock(&second).unwrap();
        assert_eq!(try_lock_shared(&reader).unwrap(), Locked::Yes);
        assert_eq!(try_lock(&third).unwrap(), Locked::Held);
        drop(reader);
        assert_eq!(try_lock(&third).unwrap(), Locked::Yes);
    }
}
