// SPDX-License-Identifier: Apache-2.0
//! A limit on how long an answer may take: the `vhost` crate waits for ever, and it takes a
//! receive timeout of the socket for a reason to try again.

use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Shuts a socket down when what was started is not finished in time.
#[derive(Debug)]
pub(super) struct Watchdog {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Idle,
    Armed(Instant),
    Fired,
    Ended,
}

impl Watchdog {
    /// Watches over `socket`, idle at first.
    pub(super) fn new(socket: UnixStream) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            state: Mutex::new(State::Idle),
            changed: Condvar::new(),
        });
        let watched = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("front-end-watchdog".to_owned())
            .spawn(move || watched.watch(&socket))?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// Runs `work`; if it takes longer than `limit`, the socket is shut down under it. Returns
    /// its result and whether that happened, now or before.
    pub(super) fn limit<T>(&self, limit: Duration, work: impl FnOnce() -> T) -> (T, bool) {
        self.set(State::Armed(Instant::now() + limit));
        let result = work();
        self.set(State::Idle);
        let fired = *self.shared.lock() == State::Fired;
        (result, fired)
    }

    fn set(&self, state: State) {
        let mut current = self.shared.lock();
        if *current != State::Fired || state == State::Ended {
            *current = state;
        }
        drop(current);
        self.shared.changed.notify_one();
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.set(State::Ended);
        if let Some(thread) = self.thread.take() {
            // A panic of the watchdog has been printed; there is nothing left to protect.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn watch(&self, socket: &UnixStream) {
        let mut state = self.lock();
        loop {
            state = match *state {
                State::Ended => return,
                State::Armed(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        *state = State::Fired;
                        // It may be closed already; either way the wait ends.
                        let _ = socket.shutdown(Shutdown::Both);
                        continue;
                    }
                    let waited = self.changed.wait_timeout(state, left);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
                State::Idle | State::Fired => {
                    let waited = self.changed.wait(state);
                    waited.unwrap_or_else(PoisonError::into_inner)
                }
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn watchdog_ends_a_read_that_gets_no_answer() {
        let (mut ours, _theirs) = UnixStream::pair().unwrap();
        let dog = Watchdog::new(ours.try_clone().unwrap()).unwrap();
        let (sum, fired) = dog.limit(Duration::from_secs(60), || 1 + 1);
        assert_eq!((sum, fired), (2, false));
        let mut byte = [0];
        let (read, fired) = dog.limit(Duration::from_millis(20), || ours.read(&mut byte));
        assert_eq!(read.unwrap(), 0);
        assert!(fired);
    }
}
