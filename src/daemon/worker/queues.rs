// SPDX-License-Identifier: Apache-2.0
//! The queues of one worker: which of them are looked at without being kicked, and what the
//! connection's threads tell about them.

use std::os::fd::AsFd;
use std::sync::Arc;

use tracing::error;

use super::{Message, Worker};
use crate::daemon::event_loop::{EventLoop, Token};
use crate::device::mailbox::{Ack, QueueCommand};
use crate::device::{GuestMemory, VirtQueue};
use crate::quorum::Event;

/// Looks at an empty queue before its driver is asked to kick again.
const QUIET_LOOKS: u32 = 16;

/// One queue.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) virtqueue: VirtQueue,
    /// There are completions the driver cannot see yet.
    pub(super) to_publish: bool,
    /// Looked at in every batch; its driver does not kick.
    active: bool,
    /// Looks in a row that found nothing.
    quiet: u32,
    /// Who waits for it to stop.
    stop: Option<Ack<u16>>,
}

/// The queues of a worker, by their index on the device.
#[derive(Debug, Default)]
pub(super) struct Queues {
    entries: Vec<Option<Entry>>,
    active: Vec<usize>,
    stopping: usize,
    /// The worker looks instead of sleeping: looks that find nothing do not count.
    pub(super) polled: bool,
}

impl Queues {
    /// The queue, which runs.
    pub(super) fn get(&mut self, queue: usize) -> &mut Entry {
        self.try_get(queue).expect("a queue with requests is there")
    }

    /// The queue, if it runs.
    pub(super) fn try_get(&mut self, queue: usize) -> Option<&mut Entry> {
        self.entries.get_mut(queue)?.as_mut()
    }

    /// Indices that queues have or had.
    pub(super) fn all(&self) -> std::ops::Range<usize> {
        0..self.entries.len()
    }

    /// Lets the next queue be the first to be looked at: where there is no room for the requests
    /// of all, each gets its turn.
    pub(super) fn rotate(&mut self) {
        if self.active.len() > 1 {
            self.active.rotate_left(1);
        }
    }

    /// Number of queues to look at.
    pub(super) fn active_len(&self) -> usize {
        self.active.len()
    }

    /// The queue to look at as number `at`.
    pub(super) fn active(&self, at: usize) -> usize {
        self.active[at]
    }

    /// Notes whether a look at `queue` found something. One that stays empty goes back to kicks.
    pub(super) fn looked_at(&mut self, queue: usize, found: bool, memory: &GuestMemory) {
        let polled = self.polled;
        let entry = self.get(queue);
        entry.quiet = match (found, polled) {
            (true, _) => 0,
            (false, true) => return,
            (false, false) => entry.quiet + 1,
        };
        if entry.quiet > QUIET_LOOKS && !entry.virtqueue.enable_kicks(memory) {
            entry.active = false;
        }
    }

    /// Forgets the queues that went back to kicks.
    pub(super) fn drop_quiet(&mut self) {
        let entries = &self.entries;
        self.active
            .retain(|&queue| entries[queue].as_ref().is_some_and(|entry| entry.active));
    }

    /// Looks at `queue` from now on, without kicks.
    fn activate(&mut self, queue: usize, memory: &GuestMemory) {
        let Some(entry) = self.entries.get_mut(queue).and_then(Option::as_mut) else {
            return;
        };
        entry.quiet = 0;
        if !entry.active {
            entry.active = true;
            entry.virtqueue.disable_kicks(memory);
            self.active.push(queue);
        }
    }

    /// The driver of the queue kicked.
    pub(super) fn kicked(&mut self, token: Token, memory: &GuestMemory) {
        let queue = usize::try_from(token).expect("tokens of queues are their indices");
        if let Some(entry) = self.try_get(queue) {
            entry.virtqueue.kick().drain();
            self.activate(queue, memory);
        }
    }

    /// Before sleeping: asks all drivers to kick. Returns whether some queue is not empty.
    pub(super) fn ask_for_kicks(&mut self, memory: &GuestMemory) -> bool {
        let mut more = false;
        for at in 0..self.active.len() {
            let entry = self.entries[self.active[at]].as_mut();
            let Some(entry) = entry else { continue };
            if entry.virtqueue.enable_kicks(memory) {
                more = true;
            } else {
                entry.active = false;
            }
        }
        self.drop_quiet();
        more
    }

    fn insert(&mut self, queue: usize, virtqueue: VirtQueue) {
        if self.entries.len() <= queue {
            self.entries.resize_with(queue + 1, || None);
        }
        let before = self.entries[queue].replace(Entry {
            virtqueue,
            to_publish: false,
            active: false,
            quiet: 0,
            stop: None,
        });
        assert!(before.is_none(), "queue {queue} was started twice");
    }

    /// Whether a queue is being stopped and owes its driver something.
    pub(super) fn any_stopping(&self) -> bool {
        self.stopping > 0
    }

    /// Lets go of the queues that were stopped and owe their driver nothing any more.
    pub(super) fn drain_stopped(&mut self, events: &EventLoop) {
        if self.stopping == 0 {
            return;
        }
        for (index, slot) in self.entries.iter_mut().enumerate() {
            let Some(entry) = slot else { continue };
            if entry.stop.is_none() || entry.to_publish || entry.virtqueue.in_flight() > 0 {
                continue;
            }
            let position = entry.virtqueue.next_avail();
            let mut entry = slot.take().expect("looked at just now");
            // It was added when the queue was started.
            let _ = events.remove(&entry.virtqueue.kick().as_fd());
            self.active.retain(|&queue| queue != index);
            self.stopping -= 1;
            if let Some(ack) = entry.stop.take() {
                ack.send(position);
            }
        }
    }
}

impl Worker {
    pub(super) fn take_messages(&mut self) {
        let mut messages = std::mem::take(&mut self.messages);
        self.mailboxes[self.index].take(&mut messages);
        for message in messages.drain(..) {
            match message {
                Message::Queue(command) => self.obey(command),
                Message::Wake(wakeup) => self.tell(Event::Wake(wakeup)),
                Message::Detach(replica) => {
                    self.executor
                        .detach(replica)
                        .expect("the ring works as long as the worker");
                    self.leaving.insert(replica);
                    self.let_go();
                }
                Message::Attach(replica, opened) => {
                    self.executor
                        .attach(replica, opened)
                        .expect("the slot is free since the replica left");
                    self.maintenance().post(Message::Attached { replica });
                }
                Message::Record
                | Message::Kicked { .. }
                | Message::Report(_)
                | Message::Detached { .. }
                | Message::Attached { .. }
                | Message::Vanished { .. }
                | Message::Opened { .. }
                | Message::CopyBack { .. }
                | Message::Command(_)
                | Message::Status(_)
                | Message::Began(..)
                | Message::Close { .. } => unreachable!("for the maintenance thread"),
                Message::Shutdown => self.shutting_down = true,
            }
        }
        self.messages = messages;
    }

    fn obey(&mut self, command: QueueCommand) {
        match command {
            QueueCommand::Start {
                queue,
                setup,
                memory,
            } => {
                self.memory = memory;
                let virtqueue = VirtQueue::new(*setup, &self.memory);
                self.shared.expect_repeats(virtqueue.repeats() as u64);
                self.watch(&virtqueue, queue);
                self.queues.insert(usize::from(queue), virtqueue);
                self.queues.activate(usize::from(queue), &self.memory);
            }
            QueueCommand::Stop { queue, ack } => {
                // A queue that is not there needs no stopping; dropping the answer says so.
                if let Some(entry) = self.queues.try_get(usize::from(queue)) {
                    entry.virtqueue.stop();
                    entry.to_publish = true;
                    if entry.stop.replace(ack).is_none() {
                        self.queues.stopping += 1;
                    }
                }
            }
            QueueCommand::Pause { queue, ack } => {
                if let Some(entry) = self.queues.try_get(usize::from(queue)) {
                    entry.virtqueue.pause();
                }
                ack.send(());
            }
            QueueCommand::Resume { queue } => {
                if let Some(entry) = self.queues.try_get(usize::from(queue)) {
                    entry.virtqueue.resume();
                }
                self.queues.activate(usize::from(queue), &self.memory);
            }
            QueueCommand::SetKick { queue, kick } => {
                let Some(entry) = self.queues.try_get(usize::from(queue)) else {
                    return;
                };
                let old = Arc::clone(entry.virtqueue.kick());
                entry.virtqueue.set_kick(Arc::clone(&kick));
                let _ = self.events.remove(&old.as_fd());
                if let Err(error) = self.events.add(&kick.as_fd(), Token::from(queue)) {
                    error!(queue, %error, "the driver's kicks cannot be waited for");
                }
                self.queues.activate(usize::from(queue), &self.memory);
            }
            QueueCommand::SetCall { queue, call } => {
                if let Some(entry) = self.queues.try_get(usize::from(queue)) {
                    entry.virtqueue.set_call(call);
                }
            }
            QueueCommand::SetFeatures { queue, features } => {
                if let Some(entry) = self.queues.try_get(usize::from(queue)) {
                    entry.virtqueue.set_features(features);
                }
                self.queues.activate(usize::from(queue), &self.memory);
            }
            QueueCommand::Memory { memory, ack } => {
                self.memory = memory;
                ack.send(());
            }
        }
    }

    fn watch(&self, virtqueue: &VirtQueue, queue: u16) {
        if let Err(error) = self
            .events
            .add(&virtqueue.kick().as_fd(), Token::from(queue))
        {
            error!(queue, %error, "the driver's kicks cannot be waited for");
        }
    }
}
