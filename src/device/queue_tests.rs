// SPDX-License-Identifier: Apache-2.0
use proptest::prelude::*;
use std::fs::File;
use std::os::fd::{FromRawFd, IntoRawFd};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::device::test_support::{DriverRing, options, write_header};

const HEADER: u64 = 0x8_0000;
const STATUS: u64 = 0x9_0000;

pub(super) fn memory() -> GuestMemory {
    GuestMemory::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap()
}

#[allow(unsafe_code, reason = "the crate's eventfd gives no owned descriptor")]
pub(super) fn event_file(event: &EventFd) -> File {
    let copy = event.try_clone().unwrap();
    // SAFETY: `into_raw_fd` hands over a descriptor that nobody else owns.
    unsafe { File::from_raw_fd(copy.into_raw_fd()) }
}

fn setup(ring: &DriverRing, features: u64, order: PublishOrder) -> (QueueSetup, EventFd) {
    let call = EventFd::new(EFD_NONBLOCK).unwrap();
    let kick = EventFd::new(0).unwrap();
    let setup = QueueSetup {
        index: 0,
        size: ring.size,
        rings: ring.rings,
        features,
        options: Arc::new(options()),
        order,
        inflight: None,
        kick: Arc::new(Kick::new(event_file(&kick))),
        call: Some(Arc::new(Call::new(event_file(&call)))),
    };
    (setup, call)
}

fn queue(memory: &GuestMemory, ring: &DriverRing, features: u64, order: PublishOrder) -> VirtQueue {
    VirtQueue::new(setup(ring, features, order).0, memory)
}

/// Offers a flush.
fn offer_flush(memory: &GuestMemory, ring: &mut DriverRing) -> u16 {
    write_header(memory, HEADER, 4, 0);
    let head = ring.chain(memory, &[(HEADER, 16, false), (STATUS, 1, true)]);
    ring.offer(memory, head);
    head
}

fn fetch(queue: &mut VirtQueue, memory: &GuestMemory) -> Ticket {
    match queue.fetch(memory, &mut GuestRequest::new()) {
        Fetched::Request(ticket) => ticket,
        other => panic!("{other:?}"),
    }
}

pub(super) fn is_empty(queue: &mut VirtQueue, memory: &GuestMemory) -> bool {
    queue.fetch(memory, &mut GuestRequest::new()) == Fetched::Empty
}

#[test]
fn publish_shows_a_batch_at_once() {
    let memory = memory();
    let mut ring = DriverRing::new(0, 8);
    let mut queue = queue(&memory, &ring, 0, PublishOrder::Completion);
    let heads: Vec<_> = (0..3).map(|_| offer_flush(&memory, &mut ring)).collect();
    let tickets: Vec<_> = (0..3).map(|_| fetch(&mut queue, &memory)).collect();
    assert!(is_empty(&mut queue, &memory));
    queue.complete(tickets[2], 7, 102);
    queue.complete(tickets[0], 5, 100);
    assert_eq!(ring.used_index(&memory), 0, "nothing is visible yet");
    let mut tags = Vec::new();
    assert!(queue.publish(&memory, &mut tags));
    assert_eq!(tags, [102, 100]);
    assert_eq!(ring.used_index(&memory), 2);
    assert_eq!(ring.used_element(&memory, 0), (heads[2].into(), 7));
    assert_eq!(ring.used_element(&memory, 1), (heads[0].into(), 5));
    assert!(!queue.is_drained());
    queue.complete(tickets[1], 1, 101);
    assert!(queue.publish(&memory, &mut tags));
    assert!(queue.is_drained());
    assert!(!queue.publish(&memory, &mut tags), "nothing to tell");
}

#[test]
fn ring_order_publishes_no_request_before_its_predecessors() {
    let memory = memory();
    let mut ring = DriverRing::new(0, 8);
    let mut queue = queue(&memory, &ring, 0, PublishOrder::Ring);
    let heads: Vec<_> = (0..3).map(|_| offer_flush(&memory, &mut ring)).collect();
    let tickets: Vec<_> = (0..3).map(|_| fetch(&mut queue, &memory)).collect();
    let mut tags = Vec::new();
    queue.complete(tickets[1], 1, 101);
    assert!(!queue.publish(&memory, &mut tags));
    assert_eq!((ring.used_index(&memory), tags.len()), (0, 0));
    queue.complete(tickets[0], 1, 100);
    assert!(queue.publish(&memory, &mut tags));
    assert_eq!((ring.used_index(&memory), &tags[..]), (2, &[100, 101][..]));
    assert_eq!(ring.used_element(&memory, 1).0, u32::from(heads[1]));
    queue.complete(tickets[2], 1, 102);
    assert!(queue.publish(&memory, &mut tags));
    assert!(queue.is_drained());
}

#[test]
fn depth_is_what_the_driver_keeps_in_the_ring_lately() {
    let memory = memory();
    let mut ring = DriverRing::new(0, 8);
    let mut queue = queue(&memory, &ring, 0, PublishOrder::Ring);
    assert_eq!(queue.depth(), 0);
    let mut tags = Vec::new();
    for _ in 0..4 {
        offer_flush(&memory, &mut ring);
    }
    let mut fetched: Vec<_> = (0..2).map(|_| fetch(&mut queue, &memory)).collect();
    // What came after the fetch counts, and so does what is fetched.
    offer_flush(&memory, &mut ring);
    queue.complete(fetched.remove(0), 1, 0);
    assert!(queue.publish(&memory, &mut tags));
    assert_eq!(queue.depth(), 5);
    queue.complete(fetched.remove(0), 1, 0);
    assert!(queue.publish(&memory, &mut tags));
    assert_eq!(queue.depth(), 4, "there were four");
    // A driver that keeps one in flight from now on is soon known to.
    for left in (0..3).rev().chain([0; 4]) {
        let ticket = fetch(&mut queue, &memory);
        queue.complete(ticket, 1, 0);
        assert!(queue.publish(&memory, &mut tags));
        if left == 0 {
            offer_flush(&memory, &mut ring);
        }
    }
    assert_eq!(queue.depth(), 1);
}

#[test]
#[should_panic(expected = "completed twice")]
fn completing_twice_is_our_bug() {
    let memory = memory();
    let mut ring = DriverRing::new(0, 8);
    let mut queue = queue(&memory, &ring, 0, PublishOrder::Ring);
    offer_flush(&memory, &mut ring);
    let ticket = fetch(&mut queue, &memory);
    queue.complete(ticket, 1, 0);
    queue.complete(ticket, 1, 0);
}

#[test]
fn malformed_chain_costs_one_request_and_not_the_queue() {
    let memory = memory();
    let mut ring = DriverRing::new(0, 8);
    let mut queue = queue(&memory, &ring, 0, PublishOrder::Ring);
    memory.write_obj(0xffu8, GuestAddress(STATUS)).unwrap();
    ring.offer(&memory, 8); // no such descriptor
    let short = ring.chain(&memory, &[(HEADER, 15, false), (STATUS, 1, true)]);
    ring.offer(&memory, short);
    let good = offer_flush(&memory, &mut ring);
    let mut request = GuestRequest::new();
    for _ in 0..2 {
        let fetched = queue.fetch(&memory, &mut request);
        assert!(matches!(fetched, Fetched::Answered(Answer::Malformed(_))));
    }
    let ticket = fetch(&mut queue, &memory);
    queue.complete(ticket, 1, 42);
    let mut tags = Vec::new();
    assert!(queue.publish(&memory, &mut tags));
    assert_eq!(tags, [42], "answered requests have no tag");
    assert_eq!(ring.used_index(&memory), 3);
    assert_eq!(ring.used_element(&memory, 0), (8, 0));
    assert_eq!(ring.used_element(&memory, 1), (short.into(), 1));
    assert_eq!(ring.used_element(&memory, 2), (good.into(), 1));
    assert_eq!(memory.read_obj::<u8>(GuestAddress(STATUS)).unwrap(), 1);
    assert!(!queue.is_broken());
}

#[test]
fn impossible_indices_stop_the_queue() {
    // Too far ahead of what is used, and back behind what was fetched.
    for (fetched, index) in [(0, 9), (0, 65535), (2, 1), (2, 9)] {
        let memory = memory();
        let mut ring = DriverRing::new(0, 8);
        let mut queue = queue(&memory, &ring, 0, PublishOrder::Ring);
        let tickets: Vec<_> = (0..fetched)
            .map(|_| {
                offer_flush(&memory, &mut ring);
                fetch(&mut queue, &memory)
            })
            .collect();
        ring.set_avail_index(&memory, index);
        assert!(is_empty(&mut queue, &memory));
        assert!(queue.is_broken(), "{fetched} {index}");
        // What was fetched comes back, invisible to the driver.
        let mut tags = Vec::new();
        for ticket in tickets.into_iter().rev() {
            queue.complete(ticket, 1, 9);
            assert!(!queue.publish(&memory, &mut tags));
        }
        assert_eq!(tags.len(), fetched);
        assert_eq!((queue.in_flight(), ring.used_index(&memory)), (0, 0));
        ring.set_avail_index(&memory, 8);
        assert!(is_empty(&mut queue, &memory), "it stays stopped");
    }
}

#[test]
fn full_queue_is_possible() {
    let memory = memory();
    let mut ring = DriverRing::new(0, 8);
    ring.avail = u16::MAX - 3;
    ring.set_used_index(&memory, ring.avail);
    let mut queue = queue(&memory, &ring, 0, PublishOrder::Ring);
    // The same head eight times: a driver would not, a hostile guest would.
    let head = offer_flush(&memory, &mut ring);
    for _ in 0..7 {
        ring.offer(&memory, head);
    }
    let tickets: Vec<_> = (0..8).map(|_| fetch(&mut queue, &memory)).collect();
    assert!(is_empty(&mut queue, &memory) && !queue.is_broken());
    for ticket in tickets {
        queue.complete(ticket, 1, 0);
    }
    let mut tags = Vec::new();
    assert!(queue.publish(&memory, &mut tags));
    assert_eq!(ring.used_index(&memory), ring.avail);
    assert_eq!(queue.next_avail(), 4);
}

#[test]
fn queues_that_cannot_be_run_are_broken_from_the_start() {
    let memory = memory();
    let good = DriverRing::new(0, 8);
    let spoil: [fn(&mut QueueSetup); 7] = [
        |s| s.size = 0,
        |s| s.size = 6,
        |s| s.size = 2048,
        |s| s.rings.descriptors += 8,
        |s| s.rings.available = 0x10_0000 - 4,
        |s| s.rings.used = u64::MAX - 3,
        |s| s.rings.descriptors = 0xffff_ffff_ffff_fff0,
    ];
    for (i, spoil) in spoil.iter().enumerate() {
        let (mut setup, _call) = setup(&good, 0, PublishOrder::Ring);
        spoil(&mut setup);
        let mut queue = VirtQueue::new(setup, &memory);
        assert!(queue.is_broken(), "{i}");
        assert!(is_empty(&mut queue, &memory));
        queue.disable_kicks(&memory);
        assert!(!queue.enable_kicks(&memory));
        assert!(!queue.publish(&memory, &mut Vec::new()));
    }
}

#[test]
fn kicks_are_asked_for_without_losing_one() {
    for features in [0, feature::EVENT_IDX] {
        let memory = memory();
        let mut ring = DriverRing::new(0, 8);
        let mut queue = queue(&memory, &ring, features, PublishOrder::Ring);
        queue.disable_kicks(&memory);
        assert_eq!(ring.used_flags(&memory), u16::from(features == 0));
        offer_flush(&memory, &mut ring);
        assert!(queue.enable_kicks(&memory), "one came meanwhile");
        let _ticket = fetch(&mut queue, &memory);
        assert!(!queue.enable_kicks(&memory));
        assert_eq!(ring.used_flags(&memory), 0);
        assert_eq!(
            ring.avail_event(&memory),
            u16::from(features != 0),
            "the next place"
        );
    }
}

#[test]
fn no_interrupt_flag_is_honoured_without_event_idx() {
    let memory = memory();
    let mut ring = DriverRing::new(0, 8);
    let mut queue = queue(&memory, &ring, 0, PublishOrder::Ring);
    for (flags, wanted) in [(0, true), (1, false), (0, true)] {
        ring.set_avail_flags(&memory, flags);
        offer_flush(&memory, &mut ring);
        let ticket = fetch(&mut queue, &memory);
        queue.complete(ticket, 1, 0);
        assert_eq!(queue.publish(&memory, &mut Vec::new()), wanted);
    }
}

#[test]
fn pause_and_stop_fetch_nothing_and_complete() {
    let memory = memory();
    let mut ring = DriverRing::new(0, 8);
    let mut queue = queue(&memory, &ring, 0, PublishOrder::Ring);
    offer_flush(&memory, &mut ring);
    offer_flush(&memory, &mut ring);
    let ticket = fetch(&mut queue, &memory);
    queue.pause();
    assert!(is_empty(&mut queue, &memory));
    queue.resume();
    let second = fetch(&mut queue, &memory);
    offer_flush(&memory, &mut ring);
    queue.stop();
    queue.resume();
    assert!(is_empty(&mut queue, &memory) && !queue.is_drained());
    queue.complete(second, 1, 0);
    queue.complete(ticket, 1, 0);
    assert!(queue.publish(&memory, &mut Vec::new()));
    assert!(queue.is_drained());
    assert_eq!((queue.next_avail(), ring.used_index(&memory)), (2, 2));
}

#[test]
fn memory_that_vanishes_breaks_the_queue_and_returns_every_tag() {
    let memory = memory();
    let mut ring = DriverRing::new(0, 8);
    let mut queue = queue(&memory, &ring, 0, PublishOrder::Ring);
    let tickets: Vec<_> = (0..3)
        .map(|_| {
            offer_flush(&memory, &mut ring);
            fetch(&mut queue, &memory)
        })
        .collect();
    let empty = GuestMemory::new();
    let mut tags = Vec::new();
    queue.complete(tickets[2], 1, 102);
    queue.complete(tickets[0], 1, 100);
    assert!(!queue.publish(&empty, &mut tags));
    assert!(queue.is_broken() && !queue.is_drained());
    assert_eq!(tags, [100, 102], "none waits for a turn that never comes");
    queue.complete(tickets[1], 1, 101);
    assert!(!queue.publish(&memory, &mut tags));
    assert!(queue.is_drained());
    assert_eq!((tags.len(), ring.used_index(&memory)), (3, 0));
}

#[test]
fn call_is_signalled_when_it_is_full_or_blocking() {
    for flags in [0, EFD_NONBLOCK] {
        let event = EventFd::new(flags).unwrap();
        let call = Call::new(event_file(&event));
        call.signal();
        call.signal();
        assert_eq!(event.read().unwrap(), 2);
        event.write(u64::MAX - 1).unwrap();
        call.signal(); // does not block
        let kick = Kick::new(event_file(&event));
        kick.drain();
        kick.drain(); // neither does this
        event.write(1).unwrap();
        assert_eq!(event.read().unwrap(), 1, "it was drained");
    }
}

/// The rule in the words of the specification: is there an index, from the old one up to but
/// not including the new one, at which the driver wanted to know?
fn crosses_slowly(event: u16, old: u16, new: u16) -> bool {
    let mut at = old;
    while at != new {
        if at == event {
            return true;
        }
        at = at.wrapping_add(1);
    }
    false
}

proptest! {
    #[test]
    fn crossing_rule_equals_the_slow_one(event: u16, old: u16, count in 0u16..1025) {
        let new = old.wrapping_add(count);
        prop_assert_eq!(crosses(event, old, new), crosses_slowly(event, old, new));
        let near = old.wrapping_add(event % 8).wrapping_sub(4);
        prop_assert_eq!(crosses(near, old, new), crosses_slowly(near, old, new));
    }

    /// A driver and a naive model of the used ring, any order of completion, from any position.
    #[test]
    fn used_ring_equals_a_naive_model(
        start: u16,
        ring_order: bool,
        steps in prop::collection::vec((0u8..4, any::<u16>()), 1..200),
    ) {
        let order = if ring_order { PublishOrder::Ring } else { PublishOrder::Completion };
        let memory = memory();
        let mut ring = DriverRing::new(0, 8);
        ring.avail = start;
        ring.set_used_index(&memory, start);
        ring.set_avail_index(&memory, start);
        let mut queue = queue(&memory, &ring, feature::EVENT_IDX, order);
        // The model: what is offered, fetched, complete and unpublished, published.
        let mut offered = Vec::new();
        let mut fetched: Vec<(Ticket, u32)> = Vec::new();
        let mut complete: Vec<(Ticket, u32)> = Vec::new();
        let mut turn: Vec<u32> = Vec::new();
        let mut used: Vec<(u32, u32)> = Vec::new();
        let mut first = true;
        let mut serial = 0u32;
        for (step, argument) in steps {
            match step {
                0 => {
                    let open = offered.len() + fetched.len() + complete.len();
                    if open < 4 {
                        // Two descriptors each: eight hold four requests.
                        offered.push(offer_flush(&memory, &mut ring));
                    }
                }
                1 => {
                    let got = queue.fetch(&memory, &mut GuestRequest::new());
                    if offered.is_empty() {
                        prop_assert_eq!(got, Fetched::Empty);
                    } else {
                        let Fetched::Request(ticket) = got else { panic!("{got:?}") };
                        prop_assert_eq!(ticket.head(), offered.remove(0));
                        fetched.push((ticket, serial));
                        turn.push(serial);
                        serial += 1;
                    }
                }
                2 if !fetched.is_empty() => {
                    let (ticket, tag) = fetched.remove(usize::from(argument) % fetched.len());
                    queue.complete(ticket, tag + 1, tag);
                    complete.push((ticket, tag));
                }
                3 => {
                    let event = ring.used_index(&memory).wrapping_add(argument % 4).wrapping_sub(1);
                    ring.set_used_event(&memory, event);
                    let mut expected = Vec::new();
                    if ring_order {
                        while let Some(at) = complete.iter().position(|c| Some(&c.1) == turn.first()) {
                            expected.push(complete.remove(at));
                            turn.remove(0);
                        }
                    } else {
                        expected.append(&mut complete);
                    }
                    let old = ring.used_index(&memory);
                    let mut tags = Vec::new();
                    let signal = queue.publish(&memory, &mut tags);
                    let expected_tags: Vec<_> = expected.iter().map(|c| c.1).collect();
                    prop_assert_eq!(tags, expected_tags);
                    used.extend(expected.iter().map(|(t, tag)| (u32::from(t.head()), tag + 1)));
                    let new = ring.used_index(&memory);
                    prop_assert_eq!(usize::from(new.wrapping_sub(old)), expected.len());
                    let wanted = crosses_slowly(event, old, new) || first && old != new;
                    prop_assert_eq!(signal, wanted);
                    first &= old == new;
                }
                _ => {}
            }
            prop_assert!(!queue.is_broken());
        }
        let end = start.wrapping_add(u16::try_from(used.len()).unwrap());
        prop_assert_eq!(ring.used_index(&memory), end);
        for (back, element) in used.iter().rev().take(8).enumerate() {
            let at = end.wrapping_sub(u16::try_from(back).unwrap() + 1);
            prop_assert_eq!(ring.used_element(&memory, at), *element);
        }
    }
}
