// SPDX-License-Identifier: Apache-2.0
//! Signals as something to read. They are blocked in every thread and come out of a signalfd, so
//! that no handler ever runs in the middle of something.
#![allow(
    unsafe_code,
    reason = "signalfd(2) and the disposition of SIGPIPE have no safe form"
)]

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use thiserror::Error;
use vmm_sys_util::signal::{block_signal, create_sigset};

/// What the daemon listens to.
const SIGNALS: [libc::c_int; 5] = [
    libc::SIGTERM,
    libc::SIGINT,
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGHUP,
];

/// What a signal asks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Signal {
    /// SIGTERM, SIGINT: finish what was begun and end.
    Terminate,
    /// SIGUSR1: show states, progress and counters.
    ShowCounters,
    /// SIGUSR2: begin a scrub.
    Scrub,
    /// SIGHUP: open the file of events again. Not an end: a terminal that is closed must not
    /// take a guest's disk away.
    Reopen,
}

/// Signals cannot be received.
#[derive(Debug, Error)]
pub enum SignalError {
    /// A signal could not be blocked.
    #[error("cannot block signal {0}")]
    Block(libc::c_int, #[source] io::Error),
    /// No signalfd.
    #[error("cannot make a signalfd")]
    SignalFd(#[source] io::Error),
}

/// Receives the signals of the process.
#[derive(Debug)]
pub struct Signals {
    fd: OwnedFd,
}

impl Signals {
    /// Blocks the signals and makes them readable. Must come before any thread is started:
    /// threads inherit what is blocked, and one that does not would be killed by the signal.
    ///
    /// A signal that the parent ignores (`nohup`) stays ignored.
    ///
    /// # Errors
    /// If there are no descriptors left.
    pub fn block() -> Result<Self, SignalError> {
        for signal in SIGNALS {
            match block_signal(signal) {
                Ok(()) | Err(vmm_sys_util::signal::Error::SignalAlreadyBlocked(_)) => {}
                Err(error) => {
                    return Err(SignalError::Block(
                        signal,
                        io::Error::other(error.to_string()),
                    ));
                }
            }
        }
        ignore_sigpipe()?;
        let set = create_sigset(&SIGNALS)
            .map_err(|error| SignalError::SignalFd(io::Error::from(error)))?;
        let flags = libc::SFD_CLOEXEC | libc::SFD_NONBLOCK;
        // SAFETY: `set` is an initialised signal set for the length of the call.
        let fd = unsafe { libc::signalfd(-1, &raw const set, flags) };
        if fd < 0 {
            return Err(SignalError::SignalFd(io::Error::last_os_error()));
        }
        // SAFETY: the descriptor was just made for us and nobody else knows it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Self { fd })
    }

    /// The next signal that has arrived, if there is one.
    #[must_use]
    pub fn next(&self) -> Option<Signal> {
        let mut info = MaybeUninit::<libc::signalfd_siginfo>::uninit();
        let len = size_of::<libc::signalfd_siginfo>();
        loop {
            // SAFETY: the buffer has room for `len` bytes.
            let got = unsafe { libc::read(self.fd.as_raw_fd(), info.as_mut_ptr().cast(), len) };
            if usize::try_from(got) != Ok(len) {
                return None;
            }
            // SAFETY: the kernel has filled all of it, and any bytes are a valid value.
            let info = unsafe { info.assume_init_ref() };
            match i32::try_from(info.ssi_signo) {
                Ok(libc::SIGTERM | libc::SIGINT) => return Some(Signal::Terminate),
                Ok(libc::SIGUSR1) => return Some(Signal::ShowCounters),
                Ok(libc::SIGUSR2) => return Some(Signal::Scrub),
                Ok(libc::SIGHUP) => return Some(Signal::Reopen),
                _ => {}
            }
        }
    }
}

impl AsRawFd for Signals {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

/// A peer that closes a socket or pipe gives an error to the write, not a death to the process.
/// Rust's start does this for programs in Rust; this holds wherever the library is used.
fn ignore_sigpipe() -> Result<(), SignalError> {
    // SAFETY: SIG_IGN runs no code.
    let before = unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
    if before == libc::SIG_ERR {
        let error = io::Error::last_os_error();
        return Err(SignalError::Block(libc::SIGPIPE, error));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_come_out_in_turn_and_do_not_kill() {
        // Directed at this thread: other tests run in this process.
        let signals = Signals::block().unwrap();
        assert_eq!(signals.next(), None);
        let sent = [
            (libc::SIGUSR1, Signal::ShowCounters),
            (libc::SIGUSR2, Signal::Scrub),
            (libc::SIGTERM, Signal::Terminate),
            (libc::SIGHUP, Signal::Reopen),
            (libc::SIGINT, Signal::Terminate),
        ];
        for (number, signal) in sent {
            // SAFETY: `raise` sends a signal to the calling thread, where it is blocked.
            assert_eq!(unsafe { libc::raise(number) }, 0);
            assert_eq!(signals.next(), Some(signal));
        }
        assert_eq!(signals.next(), None);
    }
}
