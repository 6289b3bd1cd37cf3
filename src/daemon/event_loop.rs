// SPDX-License-Identifier: Apache-2.0
//! Waiting for many descriptors at once: an owner around the `epoll` crate, which works on raw
//! descriptors and would close whatever number it is given.
#![allow(
    unsafe_code,
    reason = "taking ownership of the descriptor that the epoll crate makes"
)]

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

use epoll::{ControlOptions, Event, Events};

/// Events fetched by one wait. More stay for the next one.
const EVENTS_PER_WAIT: usize = 64;

/// Names a descriptor to whoever registered it.
pub type Token = u64;

/// A set of descriptors that is waited on.
#[derive(Debug)]
pub struct EventLoop {
    epoll: OwnedFd,
}

impl EventLoop {
    /// An empty set.
    ///
    /// # Errors
    /// If there are no descriptors left.
    pub fn new() -> io::Result<Self> {
        let fd = epoll::create(true)?;
        // SAFETY: the descriptor was just made for us and nobody else knows it.
        let epoll = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Self { epoll })
    }

    /// Reports `token` whenever `fd` is readable or hung up, until it is removed or closed.
    ///
    /// # Errors
    /// If the descriptor is in the set or cannot be waited on (a plain file).
    pub fn add(&self, fd: &impl AsRawFd, token: Token) -> io::Result<()> {
        let event = Event::new(Events::EPOLLIN, token);
        self.control(ControlOptions::EPOLL_CTL_ADD, fd.as_raw_fd(), event)
    }

    /// Reports `token` once whenever `fd` becomes readable, whether or not it is read.
    ///
    /// # Errors
    /// If the descriptor is in the set or cannot be waited on.
    pub fn add_edge(&self, fd: &impl AsRawFd, token: Token) -> io::Result<()> {
        let event = Event::new(Events::EPOLLIN | Events::EPOLLET, token);
        self.control(ControlOptions::EPOLL_CTL_ADD, fd.as_raw_fd(), event)
    }

    /// Takes `fd` out. To be done before it is closed: a duplicate would keep it in the set.
    ///
    /// # Errors
    /// If it is not in the set.
    pub fn remove(&self, fd: &impl AsRawFd) -> io::Result<()> {
        let event = Event::new(Events::empty(), 0);
        self.control(ControlOptions::EPOLL_CTL_DEL, fd.as_raw_fd(), event)
    }

    /// Waits until something is ready or `timeout` is over (`None`: for ever), and appends the
    /// tokens of what is ready. An interrupted wait is an empty one if it had a timeout, so that
    /// the caller looks at its deadlines again; without one it goes on.
    ///
    /// # Errors
    /// Never in practice: the arguments are ours.
    pub fn wait(&self, timeout: Option<Duration>, ready: &mut Vec<Token>) -> io::Result<()> {
        // Rounded up: waking a moment too early would spin until the deadline.
        let timeout_ms = timeout.map_or(-1, |timeout| {
            let millis = timeout.as_nanos().div_ceil(1_000_000);
            i32::try_from(millis).unwrap_or(i32::MAX)
        });
        let mut events = [Event { events: 0, data: 0 }; EVENTS_PER_WAIT];
        let count = loop {
            match epoll::wait(self.epoll.as_raw_fd(), timeout_ms, &mut events) {
                Ok(count) => break count,
                Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
                Err(_) if timeout.is_some() => break 0,
                Err(_) => {}
            }
        };
        ready.extend(events[..count].iter().map(|event| event.data));
        Ok(())
    }

    fn control(&self, how: ControlOptions, fd: RawFd, event: Event) -> io::Result<()> {
        epoll::ctl(self.epoll.as_raw_fd(), how, fd, event)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    use super::*;

    #[test]
    fn event_loop_reports_what_is_ready_until_it_is_removed() {
        let events = EventLoop::new().unwrap();
        let (one, two) = (
            EventFd::new(EFD_NONBLOCK).unwrap(),
            EventFd::new(EFD_NONBLOCK).unwrap(),
        );
        events.add(&one, 1).unwrap();
        events.add(&two, 2).unwrap();
        assert!(events.add(&two, 2).is_err());
        two.write(1).unwrap();
        let mut ready = Vec::new();
        events.wait(None, &mut ready).unwrap();
        assert_eq!(ready, [2]);
        events.remove(&two).unwrap();
        ready.clear();
        events.wait(Some(Duration::ZERO), &mut ready).unwrap();
        assert!(ready.is_empty());
    }

    #[test]
    fn event_loop_waits_no_shorter_than_asked() {
        let events = EventLoop::new().unwrap();
        let begin = Instant::now();
        let timeout = Duration::from_micros(10_500);
        events.wait(Some(timeout), &mut Vec::new()).unwrap();
        assert!(begin.elapsed() >= timeout);
    }
}
