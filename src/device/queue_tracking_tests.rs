// SPDX-License-Identifier: Apache-2.0
//! Queues whose front-end keeps what is in flight, killed at every store they make.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;

use proptest::prelude::*;
use vm_memory::GuestAddress;

use super::tests::{event_file, is_empty, memory};
use super::*;
use crate::device::disk::DiskIdentity;
use crate::device::inflight::{InflightBuffer, Shape, crash, create};
use crate::device::test_support::{DriverRing, options, write_header};

const HEADER: u64 = 0x8_0000;
const STATUS: u64 = 0x9_0000;
const SIZE: u16 = 16;

/// A driver with eight requests of two descriptors each, and its device, which may be killed.
struct Site {
    memory: GuestMemory,
    ring: DriverRing,
    buffer: Arc<InflightBuffer>,
    queue: VirtQueue,
    /// Heads nobody uses.
    free: Vec<u16>,
    /// Heads the device owes, in the order in which it must fetch them.
    to_fetch: VecDeque<u16>,
    /// Heads it has fetched, in order.
    fetched: Vec<u16>,
    open: Vec<Ticket>,
    /// Used elements seen.
    seen: u16,
    completed: usize,
}

fn buffer() -> Arc<InflightBuffer> {
    let shape = Shape {
        queues: 1,
        queue_size: SIZE,
    };
    let (description, file) = create(shape, 1, DiskIdentity::NONE).unwrap();
    let file: OwnedFd = file;
    let buffer = InflightBuffer::open(file, description, 1, DiskIdentity::NONE);
    Arc::new(buffer.unwrap())
}

fn new_queue(memory: &GuestMemory, ring: &DriverRing, buffer: &Arc<InflightBuffer>) -> VirtQueue {
    let kick = vmm_sys_util::eventfd::EventFd::new(0).unwrap();
    let setup = QueueSetup {
        index: 0,
        size: SIZE,
        rings: ring.rings,
        features: 0,
        options: Arc::new(options()),
        order: PublishOrder::Ring,
        inflight: buffer.region(0),
        kick: Arc::new(Kick::new(event_file(&kick))),
        call: None,
    };
    VirtQueue::new(setup, memory)
}

impl Site {
    fn new(start: u16) -> Self {
        crash::set_stores_left(None);
        let memory = memory();
        let mut ring = DriverRing::new(0, SIZE);
        ring.avail = start;
        ring.set_used_index(&memory, start);
        ring.set_avail_index(&memory, start);
        write_header(&memory, HEADER, 4, 0);
        let free = (0..SIZE / 2)
            .map(|_| ring.chain(&memory, &[(HEADER, 16, false), (STATUS, 1, true)]))
            .collect();
        let buffer = buffer();
        let queue = new_queue(&memory, &ring, &buffer);
        Self {
            memory,
            ring,
            buffer,
            queue,
            free,
            to_fetch: VecDeque::new(),
            fetched: Vec::new(),
            open: Vec::new(),
            seen: start,
            completed: 0,
        }
    }

    /// Heads the device was offered and has not completed.
    fn owed(&self) -> usize {
        self.to_fetch.len() + self.fetched.len()
    }

    fn offer(&mut self, choice: usize) {
        if self.free.is_empty() {
            return;
        }
        let head = self.free.swap_remove(choice % self.free.len());
        self.ring.offer(&self.memory, head);
        self.to_fetch.push_back(head);
    }

    fn fetch(&mut self) {
        match self.queue.fetch(&self.memory, &mut GuestRequest::new()) {
            Fetched::Request(ticket) => {
                assert_eq!(Some(ticket.head()), self.to_fetch.pop_front());
                self.fetched.push(ticket.head());
                self.open.push(ticket);
            }
            Fetched::Empty => assert!(self.to_fetch.is_empty() || self.queue.is_broken()),
            other @ Fetched::Answered(_) => panic!("{other:?}"),
        }
    }

    fn complete(&mut self, choice: usize) {
        if self.open.is_empty() {
            return;
        }
        let ticket = self.open.swap_remove(choice % self.open.len());
        self.queue.complete(ticket, 1, u32::from(ticket.head()));
    }

    fn publish(&mut self) {
        let mut tags = Vec::new();
        let _ = self.queue.publish(&self.memory, &mut tags);
        if crash::has_died() {
            return;
        }
        // Whoever gets its tag back may let go of its locks: no trace of it may be left (L3).
        let region = self.buffer.region(0).unwrap();
        assert!(
            !tags
                .iter()
                .any(|&tag| region.is_marked(u16::try_from(tag).unwrap()))
        );
        self.look();
    }

    /// The driver takes what is used.
    fn look(&mut self) {
        let used = self.ring.used_index(&self.memory);
        while self.seen != used {
            let (head, _) = self.ring.used_element(&self.memory, self.seen);
            let at = self.fetched.iter().position(|&own| u32::from(own) == head);
            // I11: it was in flight, and is not any more.
            let head = self.fetched.remove(at.expect("completed once"));
            self.free.push(head);
            self.completed += 1;
            self.seen = self.seen.wrapping_add(1);
        }
    }

    /// The device is killed, and another takes its place.
    fn replace(&mut self) {
        crash::set_stores_left(None);
        self.look();
        self.open.clear();
        // What was fetched is fetched again first, in the same order; what was fetched and not
        // marked is next in the ring.
        while let Some(head) = self.fetched.pop() {
            self.to_fetch.push_front(head);
        }
        self.queue = new_queue(&self.memory, &self.ring, &self.buffer);
        assert!(!self.queue.is_broken());
    }

    /// Everything owed is completed, and nothing is left behind.
    fn finish(&mut self) {
        for _ in 0..2 * SIZE {
            self.fetch();
        }
        assert!(self.to_fetch.is_empty());
        while !self.open.is_empty() {
            self.complete(0);
        }
        self.publish();
        assert_eq!(self.owed(), 0);
        assert!(self.queue.is_drained());
        assert_eq!(self.queue.next_avail(), self.ring.avail);
        assert!(is_empty(&mut self.queue, &self.memory));
        self.replace();
        assert!(self.queue.is_drained(), "all marks are clear");
    }
}

#[test]
fn killed_at_any_store_completes_every_request_once() {
    let mut died = 0;
    for stores in 0..80 {
        let mut site = Site::new(65_530);
        crash::set_stores_left(Some(stores));
        // Two publications, out of order, with requests that outlive both.
        for step in 0..18 {
            match step {
                0..6 | 12 | 13 => site.offer(step),
                6..9 | 14 | 15 => site.fetch(),
                9 | 10 | 16 => site.complete(1),
                _ => site.publish(),
            }
            if crash::has_died() {
                died += 1;
                site.replace();
                break;
            }
        }
        crash::set_stores_left(None);
        site.finish();
        assert!(site.completed >= 1);
    }
    assert!((20..80).contains(&died), "{died} stores");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Any work, killed any number of times between any two stores.
    #[test]
    fn every_request_is_completed_once_whenever_the_device_is_killed(
        start: u16,
        lives in prop::collection::vec(
            (0u32..120, prop::collection::vec((0u8..4, any::<u8>()), 0..60)),
            1..6,
        ),
    ) {
        let mut site = Site::new(start);
        for (stores, steps) in lives {
            crash::set_stores_left(Some(stores));
            for (step, choice) in steps {
                match step {
                    0 => site.offer(choice.into()),
                    1 => site.fetch(),
                    2 => site.complete(choice.into()),
                    _ => site.publish(),
                }
                if crash::has_died() {
                    break;
                }
            }
            site.replace();
        }
        site.finish();
    }
}

#[test]
fn requests_in_flight_come_first_even_where_nothing_is_fetched() {
    for stop in [VirtQueue::pause, VirtQueue::stop] {
        let mut site = Site::new(7);
        for step in 0..4 {
            site.offer(step);
        }
        for _ in 0..3 {
            site.fetch();
        }
        site.replace();
        stop(&mut site.queue);
        assert!(!site.queue.is_drained(), "three are owed");
        assert_eq!(site.queue.in_flight(), 3);
        for _ in 0..3 {
            assert!(site.queue.enable_kicks(&site.memory), "there is one");
            site.fetch();
        }
        assert!(!site.queue.enable_kicks(&site.memory));
        assert!(is_empty(&mut site.queue, &site.memory), "the fourth is new");
        for _ in 0..3 {
            site.complete(0);
        }
        site.publish();
        assert!(site.queue.is_drained());
        assert_eq!(site.queue.next_avail(), 10, "the true next index");
    }
}

#[test]
fn head_in_flight_stops_the_queue_when_it_comes_again() {
    for head in [0, SIZE, 65_535] {
        let mut site = Site::new(0);
        site.offer(0);
        site.fetch();
        let ticket = site.open[0];
        let again = if head == 0 { ticket.head() } else { head };
        site.ring.offer(&site.memory, again);
        assert!(is_empty(&mut site.queue, &site.memory));
        assert!(site.queue.is_broken());
        // What is in flight comes back unseen, and stays marked for whoever starts the queue next.
        site.queue.complete(ticket, 1, 5);
        let mut tags = Vec::new();
        assert!(!site.queue.publish(&site.memory, &mut tags));
        assert_eq!((tags, site.queue.is_drained()), (vec![5], true));
        assert!(site.buffer.region(0).unwrap().is_marked(ticket.head()));
    }
}

#[test]
fn more_marks_than_chains_available_stop_the_queue() {
    let mut site = Site::new(0);
    site.offer(0);
    site.offer(0);
    site.fetch();
    site.fetch();
    site.ring.set_avail_index(&site.memory, 1);
    site.queue = new_queue(&site.memory, &site.ring, &site.buffer);
    assert!(site.queue.is_broken() && site.queue.is_drained());
    assert!(is_empty(&mut site.queue, &site.memory));
    assert!(!site.queue.enable_kicks(&site.memory));
}

#[test]
fn queue_that_breaks_owes_nothing_it_has_not_begun() {
    let mut site = Site::new(0);
    for _ in 0..3 {
        site.offer(0);
        site.fetch();
    }
    site.replace();
    site.fetch();
    // The front-end takes its memory away while two wait to be executed again.
    let ticket = site.open[0];
    site.queue.complete(ticket, 1, 9);
    let mut tags = Vec::new();
    assert!(!site.queue.publish(&GuestMemory::new(), &mut tags));
    assert!(site.queue.is_broken() && site.queue.is_drained());
    assert_eq!(tags, [9]);
    assert!(is_empty(&mut site.queue, &site.memory));
}

#[test]
fn requests_answered_without_the_disk_are_marked_like_others() {
    let mut site = Site::new(0);
    memory_with_bad_request(&site.memory);
    site.offer(0);
    let head = site.to_fetch[0];
    let fetched = site.queue.fetch(&site.memory, &mut GuestRequest::new());
    assert!(matches!(fetched, Fetched::Answered(_)), "{fetched:?}");
    let region = site.buffer.region(0).unwrap();
    assert!(region.is_marked(head));
    assert!(site.queue.publish(&site.memory, &mut Vec::new()));
    assert!(!region.is_marked(head));
}

/// Makes the request that all chains point to one of an unknown type.
fn memory_with_bad_request(memory: &GuestMemory) {
    memory.write_obj(99u32, GuestAddress(HEADER)).unwrap();
}
