// SPDX-License-Identifier: Apache-2.0
//! Guest memory that comes and goes while the disk is used (memory hot-plug), in as many pieces as
//! may be; and a device that is reset in the middle of its work.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use quorum_blk::front_end::{Descriptor, FrontEnd, Options, Queue, Request, Status, Used};
use rustix::fs::{MemfdFlags, memfd_create};
use vhost::VhostUserMemoryRegionInfo;
use vhost::vhost_user::VhostUserFrontend;
use vm_memory::{Bytes, GuestAddress};

use crate::common::{Disk, Random, SECTOR, Setup};

/// Bytes of a region of hot-plugged memory.
const REGION_BYTES: usize = 64 << 10;
/// Guest address of the first of them, and the distance of one from the next.
const REGIONS_BASE: u64 = 1 << 40;
const REGIONS_STRIDE: u64 = 2 << 20;
/// The slots that GET_MAX_MEM_SLOTS promises, and those that the front-end needs for itself.
const SLOTS: usize = 509;
const SLOTS_USED: usize = 2;

/// How long a request may take on a machine that does other things.
const PATIENCE: Duration = Duration::from_secs(20);

/// Pieces of one file, each of them a region of guest memory.
struct Regions {
    file: File,
}

impl Regions {
    fn new(count: usize) -> Self {
        let file = memfd_create("hot-plugged", MemfdFlags::CLOEXEC).expect("a memory file");
        let file = File::from(file);
        file.set_len((count * REGION_BYTES) as u64)
            .expect("a memory file");
        Self { file }
    }

    fn address(at: usize) -> u64 {
        REGIONS_BASE + at as u64 * REGIONS_STRIDE
    }

    fn info(&self, at: usize) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: Self::address(at),
            memory_size: REGION_BYTES as u64,
            // Nothing is mapped here: only rings are found by such addresses.
            userspace_addr: Self::address(at),
            mmap_offset: (at * REGION_BYTES) as u64,
            mmap_handle: self.file.as_raw_fd(),
        }
    }

    fn add(&self, front_end: &mut FrontEnd, at: usize) {
        let info = self.info(at);
        let added = front_end.send("ADD_MEM_REG", |protocol| protocol.add_mem_region(&info));
        added.unwrap_or_else(|error| panic!("region {at}: {error:?}"));
    }

    fn remove(&self, front_end: &mut FrontEnd, at: usize) {
        let info = self.info(at);
        let removed = front_end.send("REM_MEM_REG", |protocol| protocol.remove_mem_region(&info));
        removed.unwrap_or_else(|error| panic!("region {at}: {error:?}"));
    }

    fn write(&self, at: usize, bytes: &[u8]) {
        let offset = (at * REGION_BYTES) as u64;
        self.file.write_all_at(bytes, offset).expect("memory");
    }

    fn read(&self, at: usize, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let offset = (at * REGION_BYTES) as u64;
        self.file.read_exact_at(&mut bytes, offset).expect("memory");
        bytes
    }
}

#[derive(Clone, Copy)]
enum Kind {
    Read = 0,
    Write = 1,
}

/// Asks for `len` bytes at `sector`, with the data in memory that the front-end knows nothing of.
/// Returns where the status will be, and the descriptors.
fn ask(
    front_end: &mut FrontEnd,
    kind: Kind,
    sector: u64,
    address: u64,
    len: usize,
) -> (GuestAddress, Vec<u16>) {
    let memory = front_end.memory();
    let queue = front_end.queue(1);
    let header = queue.take_memory(512).expect("room");
    let status = GuestAddress(header.0 + 16);
    let mut bytes = [0; 17];
    bytes[0] = kind as u8;
    bytes[8..16].copy_from_slice(&sector.to_le_bytes());
    bytes[16] = Status::UNTOUCHED;
    memory.write_slice(&bytes, header).expect("guest memory");
    let write = match kind {
        Kind::Read => Descriptor::WRITE,
        Kind::Write => 0,
    };
    let ring = queue.ring_mut();
    let taken = ring.take_descriptors(3).expect("room");
    let len = u32::try_from(len).expect("a short request");
    let chain = [
        (header.0, 16, Descriptor::NEXT, taken[1]),
        (address, len, Descriptor::NEXT | write, taken[2]),
        (status.0, 1, Descriptor::WRITE, 0),
    ];
    for (&at, (address, len, flags, next)) in taken.iter().zip(chain) {
        let descriptor = Descriptor {
            address,
            len,
            flags,
            next,
        };
        ring.write_descriptor(at, &descriptor)
            .expect("guest memory");
    }
    ring.push_head(taken[0]).expect("guest memory");
    queue.publish().expect("a kick");
    (status, taken)
}

fn used(queue: &mut Queue) -> Used {
    queue.wait_used(PATIENCE).expect("every request ends")
}

/// The same, and waits for its end.
#[track_caller]
fn carry_out(front_end: &mut FrontEnd, kind: Kind, sector: u64, address: u64, len: usize) -> u8 {
    let (status, taken) = ask(front_end, kind, sector, address, len);
    used(front_end.queue(1));
    let ring = front_end.queue(1).ring_mut();
    ring.give_back_descriptors(&taken);
    let memory = front_end.memory();
    memory.read_obj(status).expect("guest memory")
}

fn connect(disk: &Disk) -> FrontEnd {
    let mut front_end = disk.connect(&Options {
        queues: 2,
        timeout: PATIENCE,
        ..Options::default()
    });
    front_end.ask_replies(true);
    front_end
}

#[test]
fn memory_in_509_pieces_is_used_and_no_more_is_taken() {
    let mut disk = Setup::new().start();
    let descriptors = disk.process().descriptors();
    let mut front_end = connect(&disk);
    let slots = front_end.send("GET_MAX_MEM_SLOTS", |protocol| protocol.get_max_mem_slots());
    assert_eq!(slots.expect("an answer"), SLOTS as u64);

    let count = SLOTS - SLOTS_USED;
    let regions = Regions::new(count + 1);
    let mut random = Random::new(1);
    for at in 0..count {
        regions.add(&mut front_end, at);
    }
    // The first, one in the middle, and the last; from one to the other through the disk.
    let mut expected = Vec::new();
    for (at, to) in [(0, count / 2), (count / 2, count - 1), (count - 1, 0)] {
        let data = random.bytes(8 * SECTOR);
        regions.write(at, &data);
        let sector = 16 * at as u64;
        let (from, to_address) = (Regions::address(at), Regions::address(to));
        let written = carry_out(&mut front_end, Kind::Write, sector, from, data.len());
        assert_eq!(written, 0, "a write from region {at}");
        let read = carry_out(&mut front_end, Kind::Read, sector, to_address, data.len());
        assert_eq!(read, 0, "a read to region {to}");
        assert!(regions.read(to, data.len()) == data, "{at} to {to}");
        expected.push((sector, data));
    }
    // A buffer over the end of one of them is no buffer.
    let over = Regions::address(3) + REGION_BYTES as u64 - SECTOR as u64;
    assert_ne!(
        carry_out(&mut front_end, Kind::Read, 0, over, 2 * SECTOR),
        0
    );

    // There is no slot for another: not with a crash, not with silence.
    let info = regions.info(count);
    let more = front_end.send("ADD_MEM_REG", |protocol| protocol.add_mem_region(&info));
    assert!(more.is_err());
    drop(front_end);
    let log = disk.process().log();
    assert!(
        log.contains("more memory regions than there are slots"),
        "{log}"
    );
    // The next front-end has all of them for itself, and what was acknowledged is there.
    let mut front_end = connect(&disk);
    for at in 0..count {
        regions.add(&mut front_end, at);
    }
    for (sector, data) in &expected {
        let mut back = vec![0; data.len()];
        front_end.queue(0).read(*sector, &mut back).expect("a read");
        assert!(back == *data, "sector {sector}");
    }
    for at in (0..count).rev() {
        regions.remove(&mut front_end, at);
    }
    drop(front_end);
    disk.assert_serves();
    let now = disk.process().descriptors();
    assert!(now <= descriptors + 64, "{descriptors} became {now}");
    disk.stop_and_compare();
}

/// A queue full of writes, each of a region of the disk of its own.
fn fill(front_end: &mut FrontEnd, round: u8) -> usize {
    let mut count = 0;
    for at in 0..60 {
        let data = vec![round.wrapping_add(at); 16 * SECTOR];
        let sector = 4096 + 16 * u64::from(at);
        let write = Request::Write {
            sector,
            data: &data,
        };
        let submitted = front_end.queue(0).submit(&write);
        submitted.expect("room");
        count += 1;
    }
    count
}

#[test]
fn regions_come_and_go_while_requests_run() {
    let mut disk = Setup::new().start();
    let mut front_end = connect(&disk);
    let regions = Regions::new(4);
    let mut random = Random::new(2);
    for round in 0..60u8 {
        let count = fill(&mut front_end, round);
        // In the middle of them.
        let at = usize::from(round % 4);
        let address = Regions::address(at);
        regions.add(&mut front_end, at);
        let data = random.bytes(8 * SECTOR);
        regions.write(at, &data);
        let sector = 64 + 8 * u64::from(round);
        let written = carry_out(&mut front_end, Kind::Write, sector, address, data.len());
        assert_eq!(written, 0, "round {round}");
        regions.write(at, &vec![0; data.len()]);
        let read = carry_out(&mut front_end, Kind::Read, sector, address, data.len());
        assert_eq!(read, 0, "round {round}");
        assert!(regions.read(at, data.len()) == data, "round {round}");
        regions.remove(&mut front_end, at);
        let gone = carry_out(&mut front_end, Kind::Read, sector, address, data.len());
        assert_ne!(gone, 0, "round {round}: it is not there any more");
        for _ in 0..count {
            let completion = front_end.queue(0).wait_any().expect("a completion");
            assert_eq!(completion.status, Status::Ok, "round {round}");
        }
        let mut back = vec![0; 16 * SECTOR];
        front_end.queue(0).read(4096, &mut back).expect("a read");
        assert!(back == vec![round; 16 * SECTOR], "round {round}");
    }
    drop(front_end);
    disk.stop_and_compare();
    disk.assert_nothing_reported();
}

/// When REM_MEM_REG is answered the memory is the front-end's again: nobody writes into it any
/// more, whatever was under way. Requests that meant it end, well or not.
#[test]
fn memory_that_was_taken_away_is_not_written_to() {
    let mut disk = Setup::new().start();
    let mut front_end = connect(&disk);
    front_end
        .queue(0)
        .write_data(0, &vec![0x11; REGION_BYTES])
        .expect("a write");
    let regions = Regions::new(1);
    let marks = vec![0xee; REGION_BYTES];
    for round in 0..100 {
        regions.add(&mut front_end, 0);
        let reads = 1 + round % 20;
        let mut all_taken = Vec::new();
        for _ in 0..reads {
            let (_, taken) = ask(
                &mut front_end,
                Kind::Read,
                0,
                Regions::address(0),
                8 * SECTOR,
            );
            all_taken.extend(taken);
        }
        regions.remove(&mut front_end, 0);
        regions.write(0, &marks);
        let queue = front_end.queue(1);
        for _ in 0..reads {
            used(queue);
        }
        queue.ring_mut().give_back_descriptors(&all_taken);
        assert!(regions.read(0, REGION_BYTES) == marks, "round {round}");
        // Buffers by hand are never given back.
        if round % 10 == 9 {
            drop(front_end);
            front_end = connect(&disk);
        }
    }
    drop(front_end);
    disk.stop_and_compare();
    disk.assert_nothing_reported();
}

/// RESET_DEVICE completes what was fetched, and when it is answered nothing of the old rings is
/// touched any more: the next driver may have put anything there.
#[test]
fn a_device_is_reset_in_the_middle_of_its_work() {
    let mut disk = Setup::new().start();
    let options = Options {
        queues: 2,
        timeout: PATIENCE,
        ..Options::default()
    };
    let mut front_end = disk.connect(&options);
    for round in 0..40u8 {
        let mut tokens = Vec::new();
        for at in 0..80u8 {
            let data = vec![1 + (round ^ at) % 100; 8 * SECTOR];
            let sector = 8 * u64::from(at);
            let request = match at % 4 {
                0 => Request::Read {
                    sector,
                    len: data.len(),
                },
                1 => Request::Flush,
                _ => Request::Write {
                    sector,
                    data: &data,
                },
            };
            let queue = front_end.queue(usize::from(at % 2));
            tokens.push(queue.submit(&request).expect("room"));
        }
        front_end.ask_replies(true);
        front_end.reset().expect("RESET_DEVICE is offered");
        front_end.ask_replies(false);
        let indices = |front_end: &mut FrontEnd| -> Vec<u16> {
            let queues = front_end.queues().iter_mut();
            queues
                .map(|queue| queue.ring_mut().used_index().expect("a ring"))
                .collect()
        };
        let before = indices(&mut front_end);
        let mut completed = 0;
        for queue in 0..2 {
            while let Some(completion) = front_end.queue(queue).poll().expect("a ring") {
                assert_eq!(completion.status, Status::Ok, "round {round}");
                completed += 1;
            }
        }
        assert!(completed <= tokens.len());
        let until = Instant::now() + Duration::from_millis(3);
        while Instant::now() < until {
            assert_eq!(indices(&mut front_end), before, "round {round}");
        }
        // The next driver on the same connection, with fresh rings in the same place.
        front_end.start_with(&options).expect("a start");
        let data = [round; 8 * SECTOR];
        for queue in 0..2 {
            let queue = front_end.queue(queue);
            queue.write_data(4096, &data).expect("a write");
            let mut back = [0; 8 * SECTOR];
            queue.read(4096, &mut back).expect("a read");
            assert!(back == data);
        }
    }
    drop(front_end);
    disk.stop_and_compare();
    disk.assert_nothing_reported();
}
