// SPDX-License-Identifier: Apache-2.0
//! Writes to guest memory are logged for a front-end that migrates its guest.

use std::collections::BTreeSet;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use vhost::VhostUserDirtyLogRegion;

use super::*;
use crate::device::test_support::{INDIRECT, NEXT, WRITE, write_descriptor};

/// The page of the rings of the tests.
const RING: u64 = 0;
/// The page of their status bytes.
const STATUS: u64 = 0x110;
/// Pages that nothing but what is said is in.
const PAGE: u64 = 0x120;

/// The log of a front-end, of `pages` pages.
struct Log(fs::File);

impl Log {
    fn new(pages: u64) -> Self {
        let file = tempfile::tempfile().unwrap();
        file.set_len(pages.div_ceil(8)).unwrap();
        Self(file)
    }

    /// SET_LOG_BASE, which is answered.
    fn tell(&self, vmm: &Vmm) {
        let region = VhostUserDirtyLogRegion {
            mmap_size: self.0.metadata().unwrap().len(),
            mmap_offset: 0,
            mmap_handle: self.0.as_raw_fd(),
        };
        vmm.frontend.set_log_base(0, Some(region)).unwrap();
    }

    /// Waits until exactly these pages are marked, and clears them.
    fn expect(&self, what: &str, expected: &[u64]) {
        let expected: BTreeSet<u64> = expected.iter().copied().collect();
        let mut bytes = vec![0; usize::try_from(self.0.metadata().unwrap().len()).unwrap()];
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            self.0.read_exact_at(&mut bytes, 0).unwrap();
            let bit = |page: &u64| bytes[usize::try_from(page / 8).unwrap()] >> (page % 8) & 1 == 1;
            let marked: BTreeSet<u64> = (0..bytes.len() as u64 * 8).filter(bit).collect();
            if marked == expected {
                break;
            }
            assert!(Instant::now() < deadline, "{what}: {marked:x?}");
            thread::sleep(Duration::from_millis(1));
        }
        self.clear();
    }

    fn clear(&self) {
        let len = usize::try_from(self.0.metadata().unwrap().len()).unwrap();
        self.0.write_all_at(&vec![0; len], 0).unwrap();
    }
}

fn set_features(vmm: &Vmm, features: u64) {
    let features = features | feature::PROTOCOL_FEATURES | feature::VERSION_1;
    vmm.frontend
        .set_features(features | feature::INDIRECT_DESC)
        .unwrap();
    // Answered after that was done.
    vmm.frontend.get_features().unwrap();
}

/// A connection with one ring.
fn start() -> (Vmm, DriverRing, Wires, Vec<TestWorker>) {
    let (device, _disk, workers) = setup(1);
    let mut vmm = Vmm::connect(&device);
    vmm.negotiate(feature::INDIRECT_DESC);
    vmm.send_memory();
    let ring = DriverRing::new(RING * 4096, 16);
    let wires = vmm.start_ring(0, &ring, 0);
    (vmm, ring, wires, workers)
}

/// Offers a chain and waits until it is used.
fn run(vmm: &Vmm, ring: &mut DriverRing, wires: &Wires, head: u16) {
    ring.offer(&vmm.memory, head);
    wires.kick.write(1).unwrap();
    let expected = ring.avail;
    wait_for("a used request", || {
        ring.used_index(&vmm.memory) == expected
    });
}

#[test]
fn requests_of_all_kinds_mark_what_they_write() {
    let (vmm, mut ring, wires, _workers) = start();
    let log = Log::new(MEMORY_BYTES / 4096);
    log.tell(&vmm);
    set_features(&vmm, feature::LOG_ALL);
    let header = DATA;
    let status = (STATUS * 4096 + 7, 1, true);
    let at = |page: u64, offset: u64| page * 4096 + offset;
    // Read, write, flush, GET_ID, an unknown request, a read past the end of the disk.
    for (what, kind, sector, data, marked) in [
        ("a read", 0, 0, Some((at(PAGE, 0), 512, true)), &[PAGE][..]),
        (
            "two pages",
            0,
            0,
            Some((at(PAGE, 0xe00), 1024, true)),
            &[PAGE, PAGE + 1],
        ),
        ("a write", 1, 0, Some((at(PAGE, 0), 512, false)), &[]),
        ("a flush", 4, 0, None, &[]),
        (
            "an id",
            8,
            0,
            Some((at(PAGE + 4, 9), 20, true)),
            &[PAGE + 4],
        ),
        ("an unknown one", 77, 0, Some((at(PAGE, 0), 512, true)), &[]),
        (
            "one past the end",
            0,
            1 << 40,
            Some((at(PAGE, 0), 512, true)),
            &[],
        ),
    ] {
        write_header(&vmm.memory, header, kind, sector);
        let buffers: Vec<_> = [Some((header, 16, false)), data, Some(status)]
            .into_iter()
            .flatten()
            .collect();
        let head = ring.chain(&vmm.memory, &buffers);
        run(&vmm, &mut ring, &wires, head);
        log.expect(what, &[&[RING, STATUS], marked].concat());
    }
    // A chain without a status byte, which is used all the same.
    let head = ring.chain(&vmm.memory, &[(header, 16, false)]);
    run(&vmm, &mut ring, &wires, head);
    log.expect("a malformed one", &[RING]);
    // A read whose descriptors are in a table of their own: the table is only read.
    write_header(&vmm.memory, header, 0, 0);
    let table = at(PAGE + 8, 0);
    let data = at(PAGE + 10, 0);
    write_descriptor(&vmm.memory, table, 0, (header, 16, NEXT, 1));
    write_descriptor(&vmm.memory, table, 1, (data, 0x1800, NEXT | WRITE, 2));
    write_descriptor(&vmm.memory, table, 2, (status.0, 1, WRITE, 0));
    let head = 15;
    let descriptors = ring.rings.descriptors;
    write_descriptor(&vmm.memory, descriptors, head, (table, 48, INDIRECT, 0));
    run(&vmm, &mut ring, &wires, head);
    log.expect("an indirect one", &[RING, STATUS, PAGE + 10, PAGE + 11]);

    // Off again: nothing.
    set_features(&vmm, 0);
    log.expect("the end", &[]);
    let head = ring.chain(
        &vmm.memory,
        &[(header, 16, false), (data, 512, true), status],
    );
    run(&vmm, &mut ring, &wires, head);
    // A queue that has stopped writes nothing any more.
    assert_eq!(
        vmm.frontend.get_vring_base(0).unwrap(),
        u32::from(ring.avail)
    );
    log.expect("nothing is logged", &[]);
}

#[test]
fn memory_and_logs_that_come_while_logging_are_used() {
    let (mut vmm, mut ring, wires, _workers) = start();
    let small = Log::new(MEMORY_BYTES / 4096);
    small.tell(&vmm);
    set_features(&vmm, feature::LOG_ALL);
    // More memory behind what there is, for which there is a larger log, as QEMU does it.
    let large = Log::new(2 * MEMORY_BYTES / 4096);
    large.tell(&vmm);
    let range = (
        GuestAddress(MEMORY_BYTES),
        usize::try_from(MEMORY_BYTES).unwrap(),
        Some(FileOffset::new(memory_file(), 0)),
    );
    let more = GuestMemory::from_ranges_with_files([range]).unwrap();
    // The ring was written to when the features changed.
    small.clear();
    let region = more.iter().next().unwrap();
    let info = VhostUserMemoryRegionInfo::from_guest_region(region).unwrap();
    vmm.frontend.add_mem_region(&info).unwrap();
    vmm.frontend.get_features().unwrap();
    write_header(&vmm.memory, DATA, 0, 0);
    let status = (STATUS * 4096, 1, true);
    let data = (MEMORY_BYTES + 0x3000, 512, true);
    let head = ring.chain(&vmm.memory, &[(DATA, 16, false), data, status]);
    run(&vmm, &mut ring, &wires, head);
    let page = MEMORY_BYTES / 4096 + 3;
    large.expect("memory that came", &[RING, STATUS, page]);
    small.expect("the old log", &[]);
}

#[test]
fn log_messages_out_of_place_end_the_connection() {
    // Without the protocol feature.
    let (device, _disk, _workers) = setup(1);
    let mut vmm = Vmm::connect(&device);
    let log = Log::new(8);
    let region = || VhostUserDirtyLogRegion {
        mmap_size: 1,
        mmap_offset: 0,
        mmap_handle: log.0.as_raw_fd(),
    };
    vmm.frontend.get_features().unwrap();
    vmm.frontend.set_owner().unwrap();
    let protocol = vmm.frontend.get_protocol_features().unwrap();
    assert!(protocol.contains(VhostUserProtocolFeatures::LOG_SHMFD));
    let event = EventFd::new(0).unwrap();
    let _ = vmm.frontend.set_log_fd(event.as_raw_fd());
    assert!(matches!(vmm.handle.join(), ConnectionEnd::Refused(_)));
    // A log that is not in its file.
    let mut vmm = Vmm::connect(&device);
    vmm.negotiate(0);
    let beyond = VhostUserDirtyLogRegion {
        mmap_size: 2,
        ..region()
    };
    assert!(vmm.frontend.set_log_base(0, Some(beyond)).is_err());
    assert!(matches!(vmm.handle.join(), ConnectionEnd::Refused(_)));
    // One that is.
    let mut vmm = Vmm::connect(&device);
    vmm.negotiate(0);
    vmm.frontend.set_log_base(0, Some(region())).unwrap();
    vmm.frontend.set_log_fd(event.as_raw_fd()).unwrap();
    vmm.frontend.get_features().unwrap();
    assert!(matches!(vmm.disconnect(), ConnectionEnd::Disconnected));
}
