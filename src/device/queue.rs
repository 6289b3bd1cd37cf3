// SPDX-License-Identifier: Apache-2.0
//! A virtqueue (split format), owned by one worker.
//!
//! The available ring is written by a hostile guest: every index is read once and checked.
//! Completions are collected and made visible together: all used elements, then one store of
//! the used index, then at most one signal.
//!
//! Where the front-end keeps a buffer for it, what is in flight is marked in there
//! ([`super::inflight`]). Then the queue begins with what its predecessor had fetched and not
//! published, and publishes in any order.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use thiserror::Error;
use tracing::{info, warn};
use vm_memory::{Bytes, GuestAddress};

use super::GuestMemory;
use super::chain::{DescriptorTable, is_inside};
use super::config_space::{DeviceOptions, QUEUE_SIZE_MAX, feature};
use super::inflight::{InflightFault, Marks, QueueRegion};
use super::notify::{Call, Kick};
use super::request::{BlockStatus, GuestRequest, Parsed, RequestError, RequestRules};

const AVAIL_F_NO_INTERRUPT: u16 = 1;
const USED_F_NO_NOTIFY: u16 = 1;

/// In which order completions are published.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum PublishOrder {
    /// In the order of the available ring, so that the used index is the first request that is
    /// not complete: all that a killed back-end leaves behind where the front-end keeps no
    /// record of what was in flight (rule Q3).
    #[default]
    Ring,
    /// As they complete.
    Completion,
}

/// Where the three parts of a queue are, as guest physical addresses.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RingAddresses {
    /// Descriptor table.
    pub descriptors: u64,
    /// Available ring.
    pub available: u64,
    /// Used ring.
    pub used: u64,
}

/// Everything a worker needs to run a queue.
#[derive(Debug)]
pub struct QueueSetup {
    /// Index of the queue.
    pub index: u16,
    /// Number of descriptors: a power of two, at most [`QUEUE_SIZE_MAX`].
    pub size: u16,
    /// Where it is.
    pub rings: RingAddresses,
    /// Features the driver acknowledged.
    pub features: u64,
    /// What is served.
    pub options: Arc<DeviceOptions>,
    /// In which order completions are published, if nothing is marked.
    pub order: PublishOrder,
    /// Where what is in flight is marked; completions are then published as they come.
    pub inflight: Option<QueueRegion>,
    /// Where the driver kicks.
    pub kick: Arc<Kick>,
    /// Where the driver is signalled, if it wants to be.
    pub call: Option<Arc<Call>>,
}

/// One fetched descriptor chain: its place in the available ring, and its head. The place is
/// what identifies it: a hostile guest can make one head available twice. Not where heads are
/// marked: there a head is fetched once, and what is executed again has no place.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[must_use = "every fetched chain must be completed"]
pub struct Ticket {
    position: u16,
    head: u16,
}

impl Ticket {
    /// Index of the chain's first descriptor.
    #[must_use]
    pub fn head(self) -> u16 {
        self.head
    }
}

/// What [`VirtQueue::fetch`] found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fetched {
    /// A request for the disk. [`VirtQueue::complete`] is owed for the ticket.
    Request(Ticket),
    /// A request that was answered without the disk. It is completed; it becomes visible with
    /// the next [`VirtQueue::publish`].
    Answered(Answer),
    /// Nothing available, or the queue is paused, stopping or broken.
    Empty,
}

/// How a request was answered without the disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Answer {
    /// With this status: GET_ID, a request of no sectors, or one that the rules refuse.
    Status(BlockStatus),
    /// It was no request (rule G1).
    Malformed(RequestError),
}

/// Why a queue stopped.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum QueueFault {
    /// More chains available than there are descriptors.
    #[error("available index {available} is more than {size} ahead of used index {used}")]
    Index {
        /// As read from the ring.
        available: u16,
        /// What the driver was shown.
        used: u16,
        /// Size of the queue.
        size: u16,
    },
    /// A ring is not, or not any more, in guest memory.
    #[error("a ring of the queue is outside guest memory")]
    Memory,
    /// A head that is no descriptor, or is in flight already. Only where heads are marked: it
    /// cannot be, and unmarked it would be lost, or done twice, after a restart.
    #[error("head {head} is made available while it is in flight, or is no descriptor")]
    Head {
        /// As read from the ring.
        head: u16,
    },
    /// More marks than the driver has made available.
    #[error("{marked} requests are marked in flight, but only {available} are not complete")]
    Marked {
        /// Marks found at the start.
        marked: u16,
        /// Chains available and not used.
        available: u16,
    },
    /// The region of the queue in the in-flight buffer is impossible.
    #[error(transparent)]
    Inflight(#[from] InflightFault),
    /// Not a power of two, or too large.
    #[error("a queue size of {size} is not possible")]
    Size {
        /// As set up.
        size: u16,
    },
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Running,
    /// By ENABLE 0: fetches nothing, completes.
    Paused,
    /// By GET_VRING_BASE: fetches nothing, completes.
    Stopping,
    /// By an impossible ring: fetches and publishes nothing.
    Broken,
}

#[derive(Clone, Copy, Debug)]
struct Completion {
    head: u16,
    len: u32,
    tag: Option<u32>,
}

/// A virtqueue and the requests fetched from it.
#[derive(Debug)]
pub struct VirtQueue {
    index: u16,
    size: u16,
    rings: RingAddresses,
    options: Arc<DeviceOptions>,
    rules: RequestRules,
    event_idx: bool,
    write_through: bool,
    order: PublishOrder,
    kick: Arc<Kick>,
    call: Option<Arc<Call>>,
    state: State,
    /// Place in the available ring of the next chain to fetch.
    next_avail: u16,
    /// The available index last read from the ring.
    avail_seen: u16,
    /// The used index the driver can see.
    next_used: u16,
    /// Fetched and not published.
    in_flight: u16,
    /// How many requests the driver has kept in the ring lately.
    depth: u16,
    /// Completed in [`PublishOrder::Ring`], by place in the ring.
    waiting: Box<[Option<Completion>]>,
    /// To be published next, in this order.
    staged: Vec<Completion>,
    /// Where what is in flight is marked.
    marks: Option<Marks>,
    /// Heads of the predecessor that are to be executed again, last first.
    again: Vec<u16>,
    /// Whether to signal at the next publication in any case: what the driver was last
    /// signalled for is not known.
    must_signal: bool,
}

impl VirtQueue {
    /// The queue, at the position the used index in guest memory says: everything before it is
    /// complete, nothing after it has been begun but what is marked in flight (rule Q2). A queue
    /// that cannot be run is broken from the start.
    #[must_use]
    pub fn new(setup: QueueSetup, memory: &GuestMemory) -> Self {
        let QueueSetup {
            index,
            size,
            rings,
            features,
            options,
            order,
            inflight,
            kick,
            call,
        } = setup;
        let rules = options.rules(features);
        let mut queue = Self {
            index,
            size,
            rings,
            options,
            rules,
            event_idx: false,
            write_through: false,
            order,
            kick,
            call,
            state: State::Running,
            next_avail: 0,
            avail_seen: 0,
            next_used: 0,
            in_flight: 0,
            depth: 0,
            waiting: vec![None; usize::from(size)].into(),
            staged: Vec::with_capacity(usize::from(size)),
            marks: None,
            again: Vec::new(),
            must_signal: true,
        };
        queue.set_features(features);
        if !size.is_power_of_two() || size > QUEUE_SIZE_MAX {
            queue.stop_for(QueueFault::Size { size });
        } else if !queue.rings_are_inside(memory) {
            queue.stop_for(QueueFault::Memory);
        } else if let Some(used) = queue.load(memory, queue.used_at(2), Ordering::Acquire) {
            queue.next_used = used;
            queue.next_avail = used;
            queue.avail_seen = used;
            if let Some(region) = inflight {
                queue.recover(region, memory);
            }
        }
        queue
    }

    /// Goes on with what is marked in flight (rule Q2): it has been fetched, so the next chain to
    /// fetch comes after as many.
    fn recover(&mut self, region: QueueRegion, memory: &GuestMemory) {
        let (marks, mut again) = match Marks::begin(region, self.size, self.next_used) {
            Ok(begun) => begun,
            Err(fault) => return self.stop_for(fault.into()),
        };
        let Some(available) = self.load(memory, self.avail_at(2), Ordering::Acquire) else {
            return;
        };
        let marked = u16::try_from(again.len()).expect("at most one for each descriptor");
        let available = available.wrapping_sub(self.next_used);
        if marked > available {
            return self.stop_for(QueueFault::Marked { marked, available });
        }
        if marked > 0 {
            info!(
                queue = self.index,
                marked, "requests in flight are executed again"
            );
        }
        again.reverse();
        self.again = again;
        self.in_flight = marked;
        self.next_avail = self.next_used.wrapping_add(marked);
        self.avail_seen = self.next_avail;
        self.order = PublishOrder::Completion;
        self.marks = Some(marks);
    }

    /// Index of the queue.
    #[must_use]
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Where the driver kicks. Wait for it to be readable, then [`Kick::drain`] it.
    #[must_use]
    pub fn kick(&self) -> &Arc<Kick> {
        &self.kick
    }

    /// Whether every write is to be stable before its completion, because the driver does not
    /// flush (rule F5).
    #[must_use]
    pub fn write_through(&self) -> bool {
        self.write_through
    }

    /// Requests fetched and not yet published, answered ones included.
    #[must_use]
    pub fn in_flight(&self) -> u16 {
        self.in_flight
    }

    /// Requests that a predecessor had fetched and that are to be executed again: the next ones
    /// that [`VirtQueue::fetch`] returns.
    #[must_use]
    pub fn repeats(&self) -> usize {
        self.again.len()
    }

    /// How many requests the driver has kept in the ring lately, fetched or not: the most that
    /// were there at a publication, less one for every publication since. 0 before the first.
    #[must_use]
    pub fn depth(&self) -> u16 {
        self.depth
    }

    /// Whether the queue has stopped for good because of an impossible ring. It completes
    /// nothing any more; the driver must reset it.
    #[must_use]
    pub fn is_broken(&self) -> bool {
        self.state == State::Broken
    }

    /// The next available index: the answer to GET_VRING_BASE once nothing is in flight.
    #[must_use]
    pub fn next_avail(&self) -> u16 {
        self.next_avail
    }

    /// Fetches nothing until [`VirtQueue::resume`].
    pub fn pause(&mut self) {
        if self.state == State::Running {
            self.state = State::Paused;
        }
    }

    /// Fetches again.
    pub fn resume(&mut self) {
        if self.state == State::Paused {
            self.state = State::Running;
        }
    }

    /// Fetches nothing more. The queue is done when [`VirtQueue::is_drained`].
    pub fn stop(&mut self) {
        if self.state != State::Broken {
            self.state = State::Stopping;
        }
    }

    /// Whether nothing that was fetched is outstanding, be it by a predecessor. Also of a broken queue: its requests
    /// are still being worked on, and their tickets must not meet the queue that follows it.
    #[must_use]
    pub fn is_drained(&self) -> bool {
        self.in_flight == 0
    }

    /// Takes a new kick descriptor. Look at the ring afterwards.
    pub fn set_kick(&mut self, kick: Arc<Kick>) {
        self.kick = kick;
    }

    /// Takes a new call descriptor and signals it once: a signal may have gone to the old one.
    pub fn set_call(&mut self, call: Option<Arc<Call>>) {
        self.call = call;
        self.signal();
    }

    /// Takes the features the driver acknowledged.
    pub fn set_features(&mut self, features: u64) {
        self.rules = self.options.rules(features);
        self.event_idx = features & feature::EVENT_IDX != 0;
        self.write_through = features & feature::FLUSH == 0;
        self.must_signal = true;
    }

    /// Fetches the next available chain into `request`. No notification is needed in between:
    /// call until it returns [`Fetched::Empty`] or there is no room for more, publish, and ask
    /// for kicks with [`VirtQueue::enable_kicks`] before waiting for one.
    pub fn fetch(&mut self, memory: &GuestMemory, request: &mut GuestRequest) -> Fetched {
        let Some(ticket) = self.next_ticket(memory) else {
            return Fetched::Empty;
        };
        let head = ticket.head;
        let table = DescriptorTable {
            addr: self.rings.descriptors,
            count: u32::from(self.size),
        };
        match request.parse(memory, table, head, &self.rules) {
            Parsed::Request => Fetched::Request(ticket),
            Parsed::Answer(status) => {
                let len = request.finish(memory, status);
                self.add(ticket, len, None);
                Fetched::Answered(Answer::Status(status))
            }
            Parsed::Malformed { error, status_addr } => {
                let byte = [BlockStatus::IoError.byte()];
                let written = status_addr
                    .is_some_and(|addr| memory.write_slice(&byte, GuestAddress(addr)).is_ok());
                self.add(ticket, u32::from(written), None);
                Fetched::Answered(Answer::Malformed(error))
            }
        }
    }

    /// What was fetched before comes first, also of a queue that is paused or stopping: it was
    /// fetched, and is owed.
    fn next_ticket(&mut self, memory: &GuestMemory) -> Option<Ticket> {
        if let Some(head) = self.again.pop() {
            let position = self.next_used;
            return Some(Ticket { position, head });
        }
        if self.state != State::Running || !self.has_available(memory) {
            return None;
        }
        let slot = u64::from(self.next_avail & (self.size - 1));
        let head = self.load(memory, self.avail_at(4 + 2 * slot), Ordering::Relaxed)?;
        if let Some(marks) = &mut self.marks
            && !marks.mark(head)
        {
            self.stop_for(QueueFault::Head { head });
            return None;
        }
        let position = self.next_avail;
        self.next_avail = self.next_avail.wrapping_add(1);
        self.in_flight += 1;
        Some(Ticket { position, head })
    }

    /// Notes that the request of `ticket` is complete: its data and status are in guest memory,
    /// `len` bytes of them ([`GuestRequest::finish`]). `tag` comes back when the driver can see
    /// it.
    ///
    /// # Panics
    /// If the chain is not in flight: completing twice is our bug.
    pub fn complete(&mut self, ticket: Ticket, len: u32, tag: u32) {
        self.add(ticket, len, Some(tag));
    }

    fn add(&mut self, ticket: Ticket, len: u32, tag: Option<u32>) {
        let head = ticket.head;
        let completion = Completion { head, len, tag };
        if let Some(marks) = &mut self.marks {
            marks.complete(head);
        }
        match self.order {
            PublishOrder::Completion => {
                assert!(self.staged.len() < usize::from(self.in_flight));
                self.staged.push(completion);
            }
            PublishOrder::Ring => {
                let slot = usize::from(ticket.position & (self.size - 1));
                let before = self.waiting[slot].replace(completion);
                assert!(before.is_none(), "{ticket:?} was completed twice");
            }
        }
    }

    /// Makes completions visible to the driver, takes their marks away, and only then appends
    /// their tags to `published`: what holds locks for them lets go (rule L3). Returns whether
    /// the driver is to be told: [`VirtQueue::signal`].
    ///
    /// A broken queue shows the driver nothing, but its tags come back: nothing of them will
    /// ever be visible.
    #[must_use = "a driver that is not signalled waits"]
    pub fn publish(&mut self, memory: &GuestMemory, published: &mut Vec<u32>) -> bool {
        self.measure_depth(memory);
        self.stage(published);
        if self.staged.is_empty() {
            return false;
        }
        let old = self.next_used;
        let shown = self.show(memory);
        if shown {
            self.clear_marks();
        }
        let count = u16::try_from(self.staged.len()).expect("at most a queue of them");
        self.in_flight -= count;
        published.extend(self.staged.drain(..).filter_map(|c| c.tag));
        if !shown {
            // It broke just now: those that waited for their turn will not get one.
            self.stage(published);
            return false;
        }
        self.wants_signal(memory, old, self.next_used)
    }

    /// Makes what is staged visible. Returns whether that could be done.
    fn show(&mut self, memory: &GuestMemory) -> bool {
        if self.state == State::Broken {
            return false;
        }
        if let Some(marks) = &mut self.marks {
            for completion in &self.staged {
                marks.link(completion.head);
            }
        }
        let mut new = self.next_used;
        for completion in &self.staged {
            let slot = u64::from(new & (self.size - 1));
            let mut element = [0u8; 8];
            element[..4].copy_from_slice(&u32::from(completion.head).to_le_bytes());
            element[4..].copy_from_slice(&completion.len.to_le_bytes());
            let at = self.used_at(4 + 8 * slot);
            if memory.write_slice(&element, at).is_err() {
                self.stop_for(QueueFault::Memory);
                return false;
            }
            new = new.wrapping_add(1);
        }
        // Release: whoever sees the index sees data, status bytes and elements; and it is not
        // stored before the list, nor after a mark is cleared.
        let shown = self.store(memory, self.used_at(2), new, Ordering::Release);
        if shown {
            self.next_used = new;
        }
        shown
    }

    /// After what is staged was made visible.
    fn clear_marks(&mut self) {
        if let Some(marks) = &mut self.marks {
            for completion in &self.staged {
                marks.clear(completion.head);
            }
            marks.end_batch(self.next_used);
        }
    }

    /// In the order of the ring, moves what is complete from the first unpublished place on to
    /// `staged`.
    fn stage(&mut self, published: &mut Vec<u32>) {
        if self.order == PublishOrder::Completion {
            return;
        }
        if self.state == State::Broken {
            // Nothing becomes visible any more, so nothing waits for its turn either.
            for completion in self.waiting.iter_mut().filter_map(Option::take) {
                self.in_flight -= 1;
                published.extend(completion.tag);
            }
            return;
        }
        let mut position = self.next_used;
        let mask = self.size - 1;
        while let Some(completion) = self.waiting[usize::from(position & mask)].take() {
            self.staged.push(completion);
            position = position.wrapping_add(1);
        }
    }

    /// Signals the driver once, if it gave a descriptor for it.
    pub fn signal(&self) {
        if let Some(call) = &self.call {
            call.signal();
        }
    }

    /// Asks the driver not to kick: the ring will be looked at anyway.
    pub fn disable_kicks(&mut self, memory: &GuestMemory) {
        // With EVENT_IDX an `avail_event` left behind does it.
        if !self.event_idx && self.state != State::Broken {
            self.store(memory, self.used_at(0), USED_F_NO_NOTIFY, Ordering::Relaxed);
        }
    }

    /// Asks the driver to kick for the next chain. Returns whether there is one already: then
    /// fetch instead of waiting.
    #[must_use = "a chain that came meanwhile is not kicked for"]
    pub fn enable_kicks(&mut self, memory: &GuestMemory) -> bool {
        if !self.again.is_empty() {
            return true;
        }
        if self.state != State::Running {
            return false;
        }
        if self.event_idx {
            let at = self.used_at(4 + 8 * u64::from(self.size));
            self.store(memory, at, self.next_avail, Ordering::Relaxed);
        } else {
            self.store(memory, self.used_at(0), 0, Ordering::Relaxed);
        }
        // The driver writes its index and then reads ours; we write ours and then read its.
        fence(Ordering::SeqCst);
        self.has_available(memory)
    }

    /// Whether there is a chain to fetch, reading the available index only when all that were
    /// announced before are fetched.
    fn has_available(&mut self, memory: &GuestMemory) -> bool {
        if self.state == State::Broken {
            return false;
        }
        if self.avail_seen == self.next_avail {
            self.look(memory);
        }
        self.state != State::Broken && self.avail_seen != self.next_avail
    }

    /// Reads the available index, and stops the queue if it is impossible.
    fn look(&mut self, memory: &GuestMemory) {
        let Some(available) = self.load(memory, self.avail_at(2), Ordering::Acquire) else {
            return;
        };
        let (used, size) = (self.next_used, self.size);
        let ahead = available.wrapping_sub(used);
        let fetched = self.next_avail.wrapping_sub(used);
        // Also bounds what can be in flight, and catches an index that went back.
        if ahead > size || ahead < fetched {
            self.stop_for(QueueFault::Index {
                available,
                used,
                size,
            });
            return;
        }
        self.avail_seen = available;
    }

    /// Before a publication the driver has made up for the one before it, if it keeps up: what is
    /// in the ring then is all it keeps in flight.
    fn measure_depth(&mut self, memory: &GuestMemory) {
        if self.state != State::Broken {
            self.look(memory);
        }
        let now = self.avail_seen.wrapping_sub(self.next_used);
        self.depth = now.max(self.depth.saturating_sub(1));
    }

    fn wants_signal(&mut self, memory: &GuestMemory, old: u16, new: u16) -> bool {
        // The used index must be visible before the driver's wish is read.
        fence(Ordering::SeqCst);
        let must_signal = std::mem::take(&mut self.must_signal);
        if !self.event_idx {
            let flags = self.load(memory, self.avail_at(0), Ordering::Relaxed);
            return flags.is_some_and(|flags| flags & AVAIL_F_NO_INTERRUPT == 0);
        }
        let at = self.avail_at(4 + 2 * u64::from(self.size));
        let event = self.load(memory, at, Ordering::Relaxed);
        event.is_some_and(|event| must_signal || crosses(event, old, new))
    }

    fn rings_are_inside(&self, memory: &GuestMemory) -> bool {
        let size = u32::from(self.size);
        let RingAddresses {
            descriptors,
            available,
            used,
        } = self.rings;
        let aligned = descriptors % 16 == 0 && available % 2 == 0 && used % 4 == 0;
        aligned
            && is_inside(memory, descriptors, 16 * size)
            && is_inside(memory, available, 6 + 2 * size)
            && is_inside(memory, used, 6 + 8 * size)
    }

    // The offsets below cannot overflow: `rings_are_inside` was checked first.
    fn avail_at(&self, offset: u64) -> GuestAddress {
        GuestAddress(self.rings.available + offset)
    }

    fn used_at(&self, offset: u64) -> GuestAddress {
        GuestAddress(self.rings.used + offset)
    }

    fn load(&mut self, memory: &GuestMemory, at: GuestAddress, order: Ordering) -> Option<u16> {
        match memory.load::<u16>(at, order) {
            Ok(value) => Some(u16::from_le(value)),
            Err(_) => {
                self.stop_for(QueueFault::Memory);
                None
            }
        }
    }

    fn store(
        &mut self,
        memory: &GuestMemory,
        at: GuestAddress,
        value: u16,
        order: Ordering,
    ) -> bool {
        #[cfg(test)]
        if super::inflight::crash::is_dead() {
            return true;
        }
        let stored = memory.store(value.to_le(), at, order).is_ok();
        if !stored {
            self.stop_for(QueueFault::Memory);
        }
        stored
    }

    /// Stops the queue for good. Logged here, once: afterwards nothing touches the ring.
    fn stop_for(&mut self, fault: QueueFault) {
        if self.state != State::Broken {
            warn!(queue = self.index, %fault, "the queue stops until the driver resets it");
            self.state = State::Broken;
            // Nobody has begun them. Their marks stay.
            let unbegun = u16::try_from(self.again.len()).expect("at most a queue of them");
            self.in_flight -= unbegun;
            self.again.clear();
        }
    }
}

/// Whether an index that goes from `old` to `new` passes the one after `event`
/// (virtio 1.2, section 2.7.7.2): the driver wants to know when `event` has been used.
fn crosses(event: u16, old: u16, new: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

#[cfg(test)]
#[path = "queue_tests.rs"]
mod tests;

#[cfg(test)]
#[path = "queue_tracking_tests.rs"]
mod tracking_tests;
