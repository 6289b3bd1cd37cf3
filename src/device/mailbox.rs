// SPDX-License-Identifier: Apache-2.0
//! How the threads of a connection tell workers what to do with their queues.
//!
//! A worker owns its queues and takes no lock on the data path; everything that happens to a
//! queue from outside comes as a [`QueueCommand`]. Commands of one sender arrive in order.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::{read, write};
use thiserror::Error;

use super::GuestMemory;
use super::notify::{Call, Kick};
use super::queue::QueueSetup;

/// Messages a mailbox holds before [`Mailbox::send`] waits: a front-end that floods us fills its
/// own socket instead of our memory and descriptor table.
pub const MAILBOX_MESSAGES_MAX: usize = 256;

/// What a worker is to do. `queue` is the index of a queue it owns: `index % workers`.
#[derive(Debug)]
pub enum QueueCommand {
    /// Build a [`VirtQueue`](super::VirtQueue) and look at its ring, without waiting for a kick.
    Start {
        /// Which queue; it is not running.
        queue: u16,
        /// Everything it needs.
        setup: Box<QueueSetup>,
        /// The guest memory from now on.
        memory: Arc<GuestMemory>,
    },
    /// Fetch nothing more, complete and publish everything fetched, drop the queue, then
    /// acknowledge with its next available index (rule Q4).
    Stop {
        /// Which queue; it is running or paused.
        queue: u16,
        /// Owed always.
        ack: Ack<u16>,
    },
    /// Fetch nothing from now on until [`QueueCommand::Resume`], and acknowledge at once; complete
    /// what was fetched.
    Pause {
        /// Which queue.
        queue: u16,
        /// Owed always.
        ack: Ack<()>,
    },
    /// Fetch again, and look at the ring.
    Resume {
        /// Which queue.
        queue: u16,
    },
    /// The driver kicks here from now on; look at the ring, a kick may have been missed.
    SetKick {
        /// Which queue.
        queue: u16,
        /// The new descriptor.
        kick: Arc<Kick>,
    },
    /// Signal here from now on, and once at once; `None`: do not signal.
    SetCall {
        /// Which queue.
        queue: u16,
        /// The new descriptor.
        call: Option<Arc<Call>>,
    },
    /// The driver's feature bits changed while the queue runs.
    SetFeatures {
        /// Which queue.
        queue: u16,
        /// Acknowledged features.
        features: u64,
    },
    /// Use this guest memory and let go of the old one, then acknowledge: the front-end may be
    /// waiting to take its memory away. Goes to every worker, whatever queues it runs.
    Memory {
        /// The guest memory from now on.
        memory: Arc<GuestMemory>,
        /// Owed always.
        ack: Ack<()>,
    },
}

/// The other end of an answer somebody waits for. Dropping it tells them there is none.
pub struct Ack<T>(SyncSender<T>);

impl<T> Ack<T> {
    /// An acknowledgement to hand out, and the end to wait at.
    #[must_use]
    pub fn new() -> (Self, AckWait<T>) {
        let (sender, receiver) = sync_channel(1);
        (Self(sender), AckWait(receiver))
    }

    /// Answers. Whoever waited may be gone; that is no error.
    pub fn send(self, value: T) {
        let _ = self.0.try_send(value);
    }
}

impl<T> fmt::Debug for Ack<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Ack")
    }
}

/// Where an [`Ack`] is waited for.
#[derive(Debug)]
pub struct AckWait<T>(Receiver<T>);

impl<T> AckWait<T> {
    /// Waits for the answer.
    ///
    /// # Errors
    /// If the worker dropped the command: it is gone.
    pub fn wait(self) -> Result<T, WorkerGone> {
        self.0.recv().map_err(|_| WorkerGone)
    }
}

/// A worker that does not answer any more.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
#[error("the worker of the queue has ended")]
pub struct WorkerGone;

/// Where commands for a worker go.
pub trait WorkerMailbox: Send + Sync {
    /// Hands `command` to the worker and wakes it. Waits while the mailbox is full. A command
    /// for a worker that has ended is dropped.
    fn send(&self, command: QueueCommand);
}

/// A bounded queue of messages with an eventfd that is readable while there are some.
#[derive(Debug)]
pub struct Mailbox<T> {
    state: Mutex<State<T>>,
    taken: Condvar,
    event: OwnedFd,
}

#[derive(Debug)]
struct State<T> {
    messages: Vec<T>,
    closed: bool,
}

impl<T> Mailbox<T> {
    /// An empty mailbox.
    ///
    /// # Errors
    /// If there is no descriptor left.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            state: Mutex::new(State {
                // Who posts is in the middle of the data path, and should not have to allocate.
                messages: Vec::with_capacity(MAILBOX_MESSAGES_MAX),
                closed: false,
            }),
            taken: Condvar::new(),
            event: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        })
    }

    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds `message`, waiting while the mailbox is full. Dropped if the mailbox is closed.
    /// Not for threads that must not wait for the worker: other workers use [`Mailbox::post`].
    pub fn send(&self, message: T) {
        let mut state = self.lock();
        while state.messages.len() >= MAILBOX_MESSAGES_MAX && !state.closed {
            state = self
                .taken
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        self.add(state, message);
    }

    /// Adds `message` without waiting, beyond the bound if need be: for messages whose number
    /// is bounded by what they are about. Dropped if the mailbox is closed.
    pub fn post(&self, message: T) {
        self.add(self.lock(), message);
    }

    fn add(&self, mut state: MutexGuard<'_, State<T>>, message: T) {
        if state.closed {
            return;
        }
        let first = state.messages.is_empty();
        state.messages.push(message);
        drop(state);
        if first {
            // Full means readable already.
            let _ = write(&self.event, &1u64.to_ne_bytes());
        }
    }

    /// Moves all messages to the end of `into`, in order.
    pub fn take(&self, into: &mut Vec<T>) {
        // Before the messages: a message that comes in between sets it again.
        let mut count = [0u8; 8];
        let _ = read(&self.event, &mut count);
        let mut state = self.lock();
        into.append(&mut state.messages);
        drop(state);
        self.taken.notify_all();
    }

    /// Drops all messages, now and from now on. For a worker that ends: those who wait for it
    /// are told.
    pub fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        let messages = std::mem::take(&mut state.messages);
        drop(state);
        drop(messages);
        self.taken.notify_all();
    }
}

impl<T> AsFd for Mailbox<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

impl<T: From<QueueCommand> + Send> WorkerMailbox for Mailbox<T> {
    fn send(&self, command: QueueCommand) {
        Mailbox::send(self, command.into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;
    use std::time::Duration;

    #[test]
    fn take_returns_messages_in_order_and_quiets_the_event() {
        let mailbox = Mailbox::new().unwrap();
        mailbox.send(1);
        mailbox.post(2);
        let mut got = vec![0];
        mailbox.take(&mut got);
        assert_eq!(got, [0, 1, 2]);
        let mut count = [0u8; 8];
        assert!(read(&mailbox.event, &mut count).is_err(), "nothing to read");
        mailbox.send(3);
        assert_eq!(read(&mailbox.event, &mut count), Ok(8));
    }

    #[test]
    fn send_to_a_full_mailbox_waits_until_it_is_emptied() {
        let mailbox = Arc::new(Mailbox::new().unwrap());
        for i in 0..MAILBOX_MESSAGES_MAX {
            mailbox.send(i);
        }
        let sender = Arc::clone(&mailbox);
        let thread = thread::spawn(move || sender.send(usize::MAX));
        thread::sleep(Duration::from_millis(30));
        assert!(!thread.is_finished());
        let mut got = Vec::new();
        mailbox.take(&mut got);
        thread.join().unwrap();
        mailbox.take(&mut got);
        assert_eq!(got.len(), MAILBOX_MESSAGES_MAX + 1);
    }

    #[test]
    fn close_tells_those_who_wait_for_an_answer() {
        let mailbox: Mailbox<QueueCommand> = Mailbox::new().unwrap();
        let (ack, wait) = Ack::new();
        mailbox.send(QueueCommand::Stop { queue: 0, ack });
        mailbox.close();
        assert_eq!(wait.wait(), Err(WorkerGone));
        let (ack, wait) = Ack::new();
        mailbox.send(QueueCommand::Stop { queue: 0, ack });
        assert_eq!(wait.wait(), Err(WorkerGone));
    }
}
