// SPDX-License-Identifier: Apache-2.0
//! Events on their way to clients of the control socket. Nobody waits for a client: one that is too
//! slow loses events, and is told how many.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use rustix::event::{EventfdFlags, eventfd};

/// Events that wait for one client at most: a burst of some seconds.
const EVENTS_MAX: usize = 256;

/// Hands events to all who listen.
#[derive(Clone, Debug, Default)]
pub struct EventHub(Arc<Mutex<Vec<Weak<EventQueue>>>>);

/// The events for one client.
#[derive(Debug)]
pub struct EventQueue {
    waiting: Mutex<Waiting>,
    wake: OwnedFd,
}

/// What waits.
#[derive(Debug, Default)]
struct Waiting {
    lines: VecDeque<Arc<str>>,
    lost: u64,
}

impl EventHub {
    /// Events from now on, until the queue is dropped.
    ///
    /// # Errors
    /// If there are no descriptors left.
    pub fn listen(&self) -> io::Result<Arc<EventQueue>> {
        let queue = Arc::new(EventQueue {
            waiting: Mutex::default(),
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        });
        lock(&self.0).push(Arc::downgrade(&queue));
        Ok(queue)
    }

    /// Hands out a line, which is made only if somebody listens.
    pub fn publish(&self, line: impl FnOnce() -> String) {
        let mut queues = lock(&self.0);
        queues.retain(|queue| queue.strong_count() > 0);
        if queues.is_empty() {
            return;
        }
        let line: Arc<str> = line().into();
        for queue in queues.iter().filter_map(Weak::upgrade) {
            queue.push(Arc::clone(&line));
        }
    }
}

impl EventQueue {
    fn push(&self, line: Arc<str>) {
        let mut waiting = lock(&self.waiting);
        if waiting.lines.len() < EVENTS_MAX {
            waiting.lines.push_back(line);
        } else {
            waiting.lost += 1;
        }
        // Full only after 2^64 events.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// The next line; the number is that of events that were lost after it.
    #[must_use]
    pub fn take(&self) -> Option<(Arc<str>, u64)> {
        let mut waiting = lock(&self.waiting);
        let line = waiting.lines.pop_front();
        if line.is_none() {
            let _ = rustix::io::read(&self.wake, &mut [0; 8]);
        }
        let lost = if waiting.lines.is_empty() {
            std::mem::take(&mut waiting.lost)
        } else {
            0
        };
        line.map(|line| (line, lost))
    }
}

impl AsFd for EventQueue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listeners_get_what_comes_and_slow_ones_a_count() {
        let hub = EventHub::default();
        hub.publish(|| unreachable!("nobody listens"));
        let queue = hub.listen().unwrap();
        for number in 0..EVENTS_MAX + 3 {
            hub.publish(|| number.to_string());
        }
        for number in 0..EVENTS_MAX {
            let (line, lost) = queue.take().unwrap();
            assert_eq!(*line, number.to_string());
            assert_eq!(lost, if number + 1 < EVENTS_MAX { 0 } else { 3 });
        }
        assert_eq!(queue.take(), None);
        drop(queue);
        hub.publish(|| unreachable!("nobody listens any more"));
    }
}
