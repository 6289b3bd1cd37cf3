// SPDX-License-Identifier: Apache-2.0
//! Hostile guests: whatever stands in the rings and buffers, the daemon lives, other queues live,
//! memory stays bounded, and replicas stay identical (rules G1, G2, L).

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use quorum_blk::front_end::{
    Descriptor, FrontEnd, FrontEndError, HIGH_BASE, Options, Queue, Request, Segment, Status,
    features,
};
use vm_memory::{Bytes, GuestAddress};

use crate::common::{Disk, PATIENCE, Random, SECTOR, Setup, eventually};

const NEXT: u16 = Descriptor::NEXT;
const WRITE: u16 = Descriptor::WRITE;
const INDIRECT: u16 = Descriptor::INDIRECT;

/// Guest memory with a good header for a read or write, a data buffer and a status byte in it.
#[derive(Clone, Copy)]
struct Parts {
    read: u64,
    write: u64,
    data: u64,
    status: u64,
    table: u64,
}

fn parts(front_end: &mut FrontEnd) -> Parts {
    let memory = front_end.memory();
    let page = front_end.queue(0).take_memory(64 << 10).expect("room").0;
    let parts = Parts {
        read: page,
        write: page + 512,
        data: page + 4096,
        status: page + 1024,
        table: page + 2048,
    };
    let write_header = |address, kind: u32| {
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        memory
            .write_slice(&header, GuestAddress(address))
            .expect("guest memory");
    };
    write_header(parts.read, 0);
    write_header(parts.write, 1);
    parts
}

fn descriptor(address: u64, len: u32, flags: u16, next: u16) -> Descriptor {
    Descriptor {
        address,
        len,
        flags,
        next,
    }
}

/// Puts descriptors at 0, 1, 2, ... and makes 0 available.
fn push(queue: &mut Queue, chain: &[Descriptor]) {
    let ring = queue.ring_mut();
    for (index, descriptor) in (0..).zip(chain) {
        ring.write_descriptor(index, descriptor)
            .expect("guest memory");
    }
    ring.push_head(0).expect("guest memory");
    ring.publish().expect("guest memory");
    queue.kick().expect("a kick");
}

/// A malformed chain costs one request: it comes back, unsuccessful, and the queue goes on.
#[track_caller]
fn costs_one_request(front_end: &mut FrontEnd, parts: Parts, what: &str, chain: &[Descriptor]) {
    let memory = front_end.memory();
    // The status is the last byte the device may write: of the data where nothing follows them.
    let places = [parts.status, parts.data + 511].map(GuestAddress);
    for place in places {
        memory
            .write_obj(Status::UNTOUCHED, place)
            .expect("guest memory");
    }
    let queue = front_end.queue(0);
    push(queue, chain);
    let used = queue
        .wait_used(PATIENCE)
        .unwrap_or_else(|error| panic!("{what}: {error}"));
    assert_eq!(used.id, 0, "{what}");
    let bytes = places.map(|place| memory.read_obj::<u8>(place).expect("guest memory"));
    let written = bytes.into_iter().find(|&byte| byte != Status::UNTOUCHED);
    let status = written.unwrap_or(Status::UNTOUCHED);
    assert!(
        status == 1 || status == 2 || (status == Status::UNTOUCHED && used.len == 0),
        "{what}: status {status:#x}, used length {}",
        used.len
    );
    // Heads taken by the requests below must not be the one that was just misused.
    let mut back = [0; SECTOR];
    front_end
        .queue(0)
        .read(8, &mut back)
        .unwrap_or_else(|error| panic!("after {what}: {error}"));
    assert_eq!(back, [0x31; SECTOR], "after {what}");
}

fn start(features: u64) -> (Disk, FrontEnd) {
    start_tracked(features, true)
}

fn start_tracked(features: u64, inflight: bool) -> (Disk, FrontEnd) {
    let disk = Setup::new().start();
    let mut front_end = disk.connect(&Options {
        features,
        inflight,
        queues: 2,
        ..Options::default()
    });
    let content = vec![0x31; 1 << 20];
    front_end.queue(0).write_data(0, &content).expect("a write");
    (disk, front_end)
}

/// Every replica still holds what [`start`] wrote, and nothing was blamed on any.
fn unharmed(mut disk: Disk, front_end: FrontEnd) {
    drop(front_end);
    disk.assert_serves();
    let content = disk.stop_and_compare();
    assert!(
        content[5 * SECTOR..1 << 20]
            .iter()
            .all(|&byte| byte == 0x31)
    );
    disk.assert_nothing_reported();
}

#[test]
fn malformed_chains_cost_one_request_each() {
    let (disk, mut front_end) = start(features::LINUX & !features::INDIRECT);
    let p = parts(&mut front_end);
    let header = descriptor(p.read, 16, NEXT, 1);
    let data = descriptor(p.data, 512, NEXT | WRITE, 2);
    let status = descriptor(p.status, 1, WRITE, 0);
    let outside = 3 << 32;
    let hole = HIGH_BASE - 512;
    let low_end = (64 << 20) / 2;
    let cases: Vec<(&str, Vec<Descriptor>)> = vec![
        (
            "chain that loops on itself",
            vec![descriptor(p.read, 16, NEXT, 0)],
        ),
        (
            "chain that loops",
            vec![header, descriptor(p.data, 512, NEXT | WRITE, 0), status],
        ),
        ("no status", vec![descriptor(p.read, 16, 0, 0)]),
        (
            "header too short",
            vec![descriptor(p.read, 15, NEXT, 1), data, status],
        ),
        (
            "empty header",
            vec![descriptor(p.read, 0, NEXT, 1), data, status],
        ),
        (
            "header the device may write",
            vec![descriptor(p.read, 16, NEXT | WRITE, 1), data, status],
        ),
        (
            "status the device may not write",
            vec![header, data, descriptor(p.status, 1, 0, 0)],
        ),
        (
            "empty status",
            vec![header, data, descriptor(p.status, 0, WRITE, 0)],
        ),
        (
            "readable after writable",
            vec![
                header,
                data,
                descriptor(p.data, 512, NEXT, 3),
                descriptor(p.status, 1, WRITE, 0),
            ],
        ),
        (
            "header outside memory",
            vec![descriptor(outside, 16, NEXT, 1), data, status],
        ),
        (
            "header at the end of the address space",
            vec![descriptor(u64::MAX - 7, 16, NEXT, 1), data, status],
        ),
        (
            "data outside memory",
            vec![header, descriptor(outside, 512, NEXT | WRITE, 2), status],
        ),
        (
            "data in the hole",
            vec![header, descriptor(hole, 512, NEXT | WRITE, 2), status],
        ),
        (
            "data across the end of a region",
            vec![
                header,
                descriptor(low_end - 256, 512, NEXT | WRITE, 2),
                status,
            ],
        ),
        (
            "data at the end of the address space",
            vec![
                header,
                descriptor(u64::MAX - 255, 512, NEXT | WRITE, 2),
                status,
            ],
        ),
        (
            "written data outside memory",
            vec![
                descriptor(p.write, 16, NEXT, 1),
                descriptor(outside, 512, NEXT, 2),
                status,
            ],
        ),
        (
            "status outside memory",
            vec![header, data, descriptor(outside, 1, WRITE, 0)],
        ),
        (
            "data as long as can be said",
            vec![
                header,
                descriptor(p.data, u32::MAX, NEXT | WRITE, 2),
                status,
            ],
        ),
        (
            "sum of lengths beyond 32 bits",
            vec![
                header,
                descriptor(p.data, 0xffff_fe00, NEXT | WRITE, 2),
                descriptor(p.data, 0xffff_fe00, NEXT | WRITE, 3),
                status,
            ],
        ),
        (
            "next beyond the table",
            vec![descriptor(p.read, 16, NEXT, 256), data, status],
        ),
        (
            "next far beyond the table",
            vec![descriptor(p.read, 16, NEXT, 65_535), data, status],
        ),
        (
            "table without INDIRECT",
            vec![descriptor(p.table, 32, INDIRECT, 0)],
        ),
    ];
    for (what, chain) in &cases {
        costs_one_request(&mut front_end, p, what, chain);
    }
    unharmed(disk, front_end);
}

#[test]
fn malformed_indirect_tables_cost_one_request_each() {
    let (disk, mut front_end) = start(features::LINUX);
    let p = parts(&mut front_end);
    let header = descriptor(p.read, 16, NEXT, 1);
    let data = descriptor(p.data, 512, NEXT | WRITE, 2);
    let status = descriptor(p.status, 1, WRITE, 0);
    let good = vec![header, data, status];
    let nested = descriptor(p.table, 48, INDIRECT, 0);
    let cases: Vec<(&str, Descriptor, Vec<Descriptor>)> = vec![
        (
            "empty table",
            descriptor(p.table, 0, INDIRECT, 0),
            good.clone(),
        ),
        (
            "ragged table",
            descriptor(p.table, 47, INDIRECT, 0),
            good.clone(),
        ),
        (
            "table of half a descriptor",
            descriptor(p.table, 8, INDIRECT, 0),
            good.clone(),
        ),
        (
            "table outside memory",
            descriptor(3 << 32, 48, INDIRECT, 0),
            good.clone(),
        ),
        (
            "table at the end",
            descriptor(u64::MAX - 15, 48, INDIRECT, 0),
            good.clone(),
        ),
        (
            "endless table",
            descriptor(p.table, u32::MAX - 15, INDIRECT, 0),
            vec![descriptor(p.read, 16, NEXT, 65_535)],
        ),
        (
            "table too short for its chain",
            descriptor(p.table, 32, INDIRECT, 0),
            good.clone(),
        ),
        ("table in a table", nested, vec![nested, data, status]),
        (
            "table in a table later",
            nested,
            vec![header, descriptor(p.table, 48, INDIRECT | NEXT, 2), status],
        ),
        (
            "table that loops",
            nested,
            vec![header, descriptor(p.data, 512, NEXT | WRITE, 0)],
        ),
        (
            "table that loops on itself",
            nested,
            vec![descriptor(p.read, 16, NEXT, 0)],
        ),
        (
            "table that goes on in the ring",
            descriptor(p.table, 48, INDIRECT | NEXT, 9),
            vec![descriptor(p.read, 15, NEXT, 1), data, status],
        ),
    ];
    let memory = front_end.memory();
    for (what, head, table) in &cases {
        for (index, entry) in table.iter().enumerate() {
            let mut bytes = [0; 16];
            bytes[..8].copy_from_slice(&entry.address.to_le_bytes());
            bytes[8..12].copy_from_slice(&entry.len.to_le_bytes());
            bytes[12..14].copy_from_slice(&entry.flags.to_le_bytes());
            bytes[14..].copy_from_slice(&entry.next.to_le_bytes());
            let address = GuestAddress(p.table + 16 * index as u64);
            memory.write_slice(&bytes, address).expect("guest memory");
        }
        costs_one_request(&mut front_end, p, what, &[*head]);
    }
    unharmed(disk, front_end);
}

#[test]
fn empty_buffers_are_harmless_or_refused() {
    let (disk, mut front_end) = start(features::LINUX & !features::INDIRECT);
    let p = parts(&mut front_end);
    let memory = front_end.memory();
    let empty = |flags, next| descriptor(p.data, 0, flags, next);
    let chains = [
        // Between header and data, between data and status, and nothing at all to transfer.
        vec![
            descriptor(p.read, 16, NEXT, 1),
            empty(NEXT, 2),
            descriptor(p.data, 512, NEXT | WRITE, 3),
            empty(NEXT | WRITE, 4),
            descriptor(p.status, 1, WRITE, 0),
        ],
        vec![
            descriptor(p.read, 16, NEXT, 1),
            descriptor(p.status, 1, WRITE, 0),
        ],
        vec![
            descriptor(p.write, 16, NEXT, 1),
            descriptor(p.status, 1, WRITE, 0),
        ],
        vec![
            empty(NEXT, 1),
            descriptor(p.read, 16, NEXT, 2),
            descriptor(p.data, 512, NEXT | WRITE, 3),
            descriptor(p.status, 1, NEXT | WRITE, 4),
            empty(WRITE, 0),
        ],
    ];
    for (at, chain) in chains.iter().enumerate() {
        memory
            .write_obj(Status::UNTOUCHED, GuestAddress(p.status))
            .expect("guest memory");
        let queue = front_end.queue(0);
        push(queue, chain);
        let used = queue.wait_used(PATIENCE).expect("an end");
        assert_eq!(used.id, 0, "chain {at}");
        let mut back = [0; SECTOR];
        queue.read(8, &mut back).expect("the queue goes on");
        assert_eq!(back, [0x31; SECTOR]);
    }
    unharmed(disk, front_end);
}

#[test]
fn head_beyond_the_queue_harms_no_other_queue() {
    for head in [256, 999, 65_535] {
        let (disk, mut front_end) = start(features::LINUX);
        let ring = front_end.queue(0).ring_mut();
        ring.push_head(head).expect("guest memory");
        ring.publish().expect("guest memory");
        front_end.queue(0).kick().expect("a kick");
        std::thread::sleep(Duration::from_millis(20));
        let mut back = [0; SECTOR];
        front_end
            .queue(1)
            .read(8, &mut back)
            .expect("the other queue lives");
        assert_eq!(back, [0x31; SECTOR]);
        // A driver that is started anew gets all its queues back.
        front_end.stop().expect("the rings stop");
        front_end.start().expect("the rings start");
        front_end
            .queue(0)
            .read(8, &mut back)
            .expect("the queue is back");
        unharmed(disk, front_end);
    }
}

/// A request would be lost or done twice after a restart if two had the same mark.
#[test]
fn head_made_available_twice_stops_that_queue_alone_where_it_is_tracked() {
    for tracked in [false, true] {
        let (mut disk, mut front_end) = start_tracked(features::LINUX, tracked);
        let p = parts(&mut front_end);
        let chain = [
            descriptor(p.read, 16, NEXT, 1),
            descriptor(p.data, 512, NEXT | WRITE, 2),
            descriptor(p.status, 1, WRITE, 0),
        ];
        let queue = front_end.queue(0);
        queue.ring_mut().push_head(0).expect("guest memory");
        push(queue, &chain);
        let seen = (0..2).map_while(|_| queue.wait_used(Duration::from_secs(1)).ok());
        let seen = seen.count();
        // The first may have ended before the second is fetched: then it is nothing special.
        let log = disk.process().log();
        let stopped = log.contains("is made available while it is in flight");
        assert!(seen == 2 || tracked && stopped, "{seen} came back: {log}");
        let mut back = [0; SECTOR];
        front_end
            .queue(1)
            .read(8, &mut back)
            .expect("the other queue lives");
        assert_eq!(back, [0x31; SECTOR]);
        front_end.stop().expect("the rings stop");
        front_end.start().expect("the rings start");
        front_end
            .queue(0)
            .read(8, &mut back)
            .expect("the queue is back");
        unharmed(disk, front_end);
    }
}

#[test]
fn impossible_available_index_stops_that_queue_alone() {
    for jump in [257, 1000, 32_768, 65_535] {
        let (disk, mut front_end) = start(features::LINUX);
        let queue = front_end.queue(0);
        let index = queue.ring_mut().avail_index().wrapping_add(jump);
        queue
            .ring_mut()
            .set_avail_index(index)
            .expect("guest memory");
        queue.kick().expect("a kick");
        let used = queue.wait_used(Duration::from_millis(100));
        assert!(
            matches!(used, Err(FrontEndError::NoCompletion { .. })),
            "{jump}: {used:?}"
        );
        let mut back = [0; SECTOR];
        front_end
            .queue(1)
            .read(8, &mut back)
            .expect("the other queue lives");
        front_end.stop().expect("the rings stop");
        front_end.start().expect("the rings start");
        front_end
            .queue(0)
            .read(8, &mut back)
            .expect("the queue is back");
        assert_eq!(back, [0x31; SECTOR]);
        unharmed(disk, front_end);
    }
}

#[test]
fn random_garbage_in_the_table_harms_nobody() {
    for tracked in [false, true] {
        random_garbage(tracked);
    }
}

/// Where what is in flight is tracked, no head is made available twice: that would stop the queue.
fn random_garbage(tracked: bool) {
    let (disk, mut front_end) = start_tracked(features::LINUX, tracked);
    let p = parts(&mut front_end);
    let mut random = Random::new(99);
    for _ in 0..200 {
        let queue = front_end.queue(0);
        for index in 0..64 {
            let address = match random.below(4) {
                0 => random.next(),
                1 => p.read,
                2 => p.table,
                _ => p.data + random.below(4096) as u64,
            };
            let entry = Descriptor {
                address,
                // A write header with real data behind it must not change what others check.
                len: u32::try_from(random.below(3000)).expect("small"),
                flags: u16::try_from(random.below(8)).expect("small"),
                next: u16::try_from(random.below(70)).expect("small"),
            };
            queue
                .ring_mut()
                .write_descriptor(index, &entry)
                .expect("guest memory");
        }
        let first = random.below(64);
        for at in 0..8 {
            let head = if tracked {
                (first + 7 * at) % 64
            } else {
                random.below(64)
            };
            let head = u16::try_from(head).expect("small");
            queue.ring_mut().push_head(head).expect("guest memory");
        }
        queue.ring_mut().publish().expect("guest memory");
        queue.kick().expect("a kick");
        for _ in 0..8 {
            queue.wait_used(PATIENCE).expect("every head comes back");
        }
    }
    let mut back = [0; SECTOR];
    front_end
        .queue(1)
        .read(8, &mut back)
        .expect("the other queue lives");
    drop(front_end);
    let mut disk = disk;
    disk.assert_serves();
    disk.stop_and_compare();
    disk.assert_nothing_reported();
}

#[test]
fn write_buffers_that_change_in_flight_leave_replicas_identical() {
    let mut disk = Setup::new().start();
    let mut front_end = disk.connect(&Options::default());
    let memory = front_end.memory();
    let queue = front_end.queue(0);
    let p = parts_for_writes(queue);
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let over = &over;
        let scribble = memory.clone();
        scope.spawn(move || {
            let mut random = Random::new(5);
            while !over.load(Ordering::Relaxed) {
                let offset = random.below((64 << 10) / 8) as u64 * 8;
                let value = random.next();
                scribble
                    .write_obj(value, GuestAddress(p.data + offset))
                    .expect("guest memory");
            }
        });
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            for round in 0..60u64 {
                for slot in 0..16 {
                    let mut header = [0; 16];
                    header[0] = 1;
                    header[8..].copy_from_slice(&(slot * 128 + round).to_le_bytes());
                    memory
                        .write_slice(&header, GuestAddress(p.write + 16 * slot))
                        .expect("guest memory");
                    let index = u16::try_from(slot * 3).expect("small");
                    let status = p.status + slot;
                    let ring = queue.ring_mut();
                    let chain = [
                        descriptor(p.write + 16 * slot, 16, NEXT, index + 1),
                        descriptor(p.data, 64 << 10, NEXT, index + 2),
                        descriptor(status, 1, WRITE, 0),
                    ];
                    for (at, descriptor) in (index..).zip(&chain) {
                        ring.write_descriptor(at, descriptor).expect("guest memory");
                    }
                    ring.push_head(index).expect("guest memory");
                }
                queue.ring_mut().publish().expect("guest memory");
                queue.kick().expect("a kick");
                for _ in 0..16 {
                    queue.wait_used(PATIENCE).expect("an end");
                }
            }
        }));
        over.store(true, Ordering::Relaxed);
        if let Err(panic) = outcome {
            std::panic::resume_unwind(panic);
        }
    });
    let mut back = vec![0; 1 << 20];
    front_end.queue(0).read(0, &mut back).expect("a read");
    drop(front_end);
    disk.stop_and_compare();
    disk.assert_nothing_reported();
}

/// A page for headers, 64 KiB of data, and status bytes.
fn parts_for_writes(queue: &mut Queue) -> Parts {
    let page = queue.take_memory(80 << 10).expect("room").0;
    Parts {
        read: page,
        write: page + 512,
        data: page + 4096,
        status: page + 2048,
        table: page + 3072,
    }
}

#[test]
fn overlapping_writes_from_several_queues_leave_replicas_identical() {
    let mut disk = Setup::new().start();
    let mut front_end = disk.connect(&Options {
        queues: 8,
        ..Options::default()
    });
    std::thread::scope(|scope| {
        for queue in front_end.queues() {
            scope.spawn(move || {
                let mut random = Random::new(u64::from(queue.index()));
                for _ in 0..25 {
                    let mut tokens = Vec::new();
                    for _ in 0..12 {
                        let sector = random.below(64) as u64;
                        let sectors = 1 + random.below(64);
                        let data = vec![random.next().to_le_bytes()[0]; sectors * SECTOR];
                        let zeroed = [Segment::new(sector, 5)];
                        let request = match random.below(8) {
                            0 => Request::WriteZeroes(&zeroed),
                            1 => Request::Discard(&zeroed),
                            2 | 3 => Request::Read {
                                sector,
                                len: data.len(),
                            },
                            _ => Request::Write {
                                sector,
                                data: &data,
                            },
                        };
                        tokens.push(queue.enqueue(&request).expect("room"));
                    }
                    queue.publish().expect("a kick");
                    for token in tokens {
                        let completion = queue.wait(token).expect("an end");
                        assert_eq!(completion.status, Status::Ok);
                        // No sector is ever half of one write and half of another.
                        for sector in completion.data.chunks(SECTOR) {
                            assert!(sector.iter().all(|&byte| byte == sector[0]), "torn");
                        }
                    }
                }
            });
        }
    });
    drop(front_end);
    disk.stop_and_compare();
    disk.assert_nothing_reported();
}

/// Each worker has fewer buffers than its queue has writes, and each write waits for one of the
/// other worker's: a worker that is short of buffers must still hear from the other.
#[test]
fn overlapping_writes_beyond_the_buffers_of_two_workers_end() {
    let arguments = ["--workers", "2", "--buffer-memory", "16M"];
    let mut disk = Setup::new().arguments(&arguments).start();
    let mut front_end = disk.connect(&Options {
        queues: 2,
        ..Options::default()
    });
    std::thread::scope(|scope| {
        for queue in front_end.queues() {
            scope.spawn(move || {
                let data = vec![u8::try_from(queue.index()).expect("small"); 256 << 10];
                for _ in 0..3 {
                    let request = Request::Write {
                        sector: 0,
                        data: &data,
                    };
                    let tokens: Vec<_> = (0..80)
                        .map(|_| queue.enqueue(&request).expect("room"))
                        .collect();
                    queue.publish().expect("a kick");
                    for token in tokens {
                        let completion = queue.wait(token).expect("an end");
                        assert_eq!(completion.status, Status::Ok);
                    }
                }
            });
        }
    });
    drop(front_end);
    disk.stop_and_compare();
}

/// Every part of a request holds its lock until the request is published (rule L3).
#[test]
fn segments_of_one_request_that_overlap_do_not_wait_for_each_other() {
    let mut disk = Setup::new().start();
    let mut front_end = disk.connect(&Options::default());
    let queue = front_end.queue(0);
    queue.write_data(0, &[0x77; 256 * SECTOR]).expect("a write");
    let segments = [
        Segment::new(64, 64),
        Segment::new(0, 32),
        Segment::new(64, 64),
        Segment::new(96, 64),
        Segment::new(100, 8),
        Segment::new(0, 8),
    ];
    queue.write_zeroes(&segments).expect("an end");
    queue.discard(&segments).expect("an end");
    let mut back = vec![0; 256 * SECTOR];
    queue.read(0, &mut back).expect("a read");
    for (at, sector) in back.chunks(SECTOR).enumerate() {
        let zeroed = at < 32 || (64..160).contains(&at);
        let expected = if zeroed { 0 } else { 0x77 };
        assert!(sector.iter().all(|&byte| byte == expected), "sector {at}");
    }
    drop(front_end);
    disk.stop_and_compare();
}

/// The locks of a large write are taken one after the other. Another queue's requests may take
/// some of them in between, and are published in an order of their own.
#[test]
fn large_write_and_small_ones_in_the_opposite_order_end() {
    let arguments = ["--workers", "2", "--buffer-memory", "16M"];
    let setup = Setup::new().bytes(32 << 20).arguments(&arguments);
    let mut disk = setup.start();
    let mut front_end = disk.connect(&Options {
        queues: 2,
        memory_bytes: 128 << 20,
        ..Options::default()
    });
    let data = vec![0x11; 20 << 20];
    let write = |sector, len: usize| Request::Write {
        sector,
        data: &data[..len],
    };
    for _ in 0..8 {
        let large = front_end.queue(0).enqueue(&write(0, data.len()));
        let low = front_end.queue(1).enqueue(&write(0, 4096));
        let high = front_end.queue(1).enqueue(&write(19 << 11, 4096));
        front_end.queue(0).publish().expect("a kick");
        // The large one has its first locks and not its last.
        std::thread::sleep(Duration::from_millis(1));
        front_end.queue(1).publish().expect("a kick");
        for (queue, token) in [(0, large), (1, low), (1, high)] {
            let completion = front_end.queue(queue).wait(token.expect("room"));
            assert_eq!(completion.expect("an end").status, Status::Ok);
        }
    }
    drop(front_end);
    disk.stop_and_compare();
}

/// As above, with the segments of requests that name the same ranges.
#[test]
fn requests_of_many_segments_from_two_queues_end() {
    let mut disk = Setup::new().arguments(&["--workers", "2"]).start();
    let mut front_end = disk.connect(&Options {
        queues: 2,
        ..Options::default()
    });
    std::thread::scope(|scope| {
        for queue in front_end.queues() {
            scope.spawn(move || {
                let ranges = (0..8).map(|at| Segment::new(1000 * at, 64));
                let segments: Vec<Segment> = ranges.collect();
                for _ in 0..100 {
                    let mut tokens = Vec::new();
                    for at in 0..4 {
                        let request = Request::WriteZeroes(&segments);
                        tokens.push(queue.enqueue(&request).expect("room"));
                        let single = &segments[7 - at..8 - at];
                        let request = Request::WriteZeroes(single);
                        tokens.push(queue.enqueue(&request).expect("room"));
                    }
                    queue.publish().expect("a kick");
                    for token in tokens {
                        let completion = queue.wait(token).expect("an end");
                        assert_eq!(completion.status, Status::Ok);
                    }
                }
            });
        }
    });
    drop(front_end);
    disk.stop_and_compare();
}

#[test]
fn greedy_guest_gets_bounded_memory() {
    let setup = Setup::new()
        .bytes(16 << 20)
        .arguments(&["--buffer-memory", "16M"]);
    let mut disk = setup.start();
    let mut front_end = disk.connect(&Options {
        queues: 8,
        ..Options::default()
    });
    let before = disk.process().resident_kib();
    // All requests of a queue share one buffer of 512 KiB: it costs the guest nothing.
    let per_queue = 80u16;
    for index in 0..8 {
        let memory = front_end.memory();
        let queue = front_end.queue(index);
        let page = queue.take_memory((512 << 10) + 4096).expect("room").0;
        memory
            .write_slice(&[0; 16], GuestAddress(page))
            .expect("guest memory");
        let ring = queue.ring_mut();
        for request in 0..per_queue {
            let at = request * 3;
            let chain = [
                descriptor(page, 16, NEXT, at + 1),
                descriptor(page + 4096, 512 << 10, NEXT | WRITE, at + 2),
                descriptor(page + 512, 1, WRITE, 0),
            ];
            for (at, descriptor) in (at..).zip(&chain) {
                ring.write_descriptor(at, descriptor).expect("guest memory");
            }
            ring.push_head(at).expect("guest memory");
        }
        ring.publish().expect("guest memory");
        queue.kick().expect("a kick");
    }
    let mut highest = 0;
    let mut done = vec![0; 8];
    let all = eventually(|| {
        highest = highest.max(disk.process().resident_kib());
        for (index, done) in done.iter_mut().enumerate() {
            while front_end
                .queue(index)
                .ring_mut()
                .pop_used()
                .expect("a ring")
                .is_some()
            {
                *done += 1;
            }
        }
        done.iter().all(|&done| done == per_queue).then_some(())
    });
    assert!(all.is_some(), "completed: {done:?}");
    let limit = 64 << 10;
    assert!(
        highest < before + limit,
        "{highest} KiB, {before} KiB before, for 320 MiB of requests"
    );
    drop(front_end);
    disk.assert_serves();
}
