// SPDX-License-Identifier: Apache-2.0
//! Entries for fuzzers. Not an interface of the library.
//!
//! Bytes are decoded into structure first (descriptors that mostly point somewhere, tables that
//! mostly exist), so that a fuzzer spends its time behind the first check and not in front of it.
//! Whatever the bytes, nothing may panic, run on, or reach outside guest memory.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::event::{EventfdFlags, eventfd};
use vm_memory::{Bytes, GuestAddress};

use super::GuestMemory;
use super::chain::{CHAIN_DESCRIPTORS_MAX, DescriptorTable, is_inside};
use super::config_space::{DISCARD_SEGMENTS_MAX, DeviceOptions, feature};
use super::disk::DiskIdentity;
use super::inflight::{self, InflightBuffer, Shape, layout};
use super::message::{Message, MessageLimits};
use super::notify::Kick;
use super::queue::{Fetched, PublishOrder, QueueSetup, RingAddresses, VirtQueue};
use super::request::{BlockStatus, GuestRequest, Parsed, RequestKind, RequestRules, Segment};
use crate::units::SectorRange;

const TABLE: u64 = 0;
const INDIRECT_TABLE: u64 = 0x1000;
const HEADER: u64 = 0x2000;
/// Segments of a discard, if the data are there.
const SEGMENTS: u64 = 0x3000;
/// Where the first region ends and a hole begins.
const HOLE: u64 = 0x8000;
const SECOND_REGION: u64 = 0x1_0000;
const REGION_BYTES: usize = 0x8000;
const SECTORS: u64 = 2048;

/// Takes bytes from the front; zeroes when there are none left.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn byte(&mut self) -> u8 {
        let Some((&first, rest)) = self.0.split_first() else {
            return 0;
        };
        self.0 = rest;
        first
    }

    fn word(&mut self) -> u16 {
        u16::from_le_bytes([self.byte(), self.byte()])
    }

    fn address(&mut self) -> u64 {
        let offset = u64::from(self.word());
        match self.byte() % 64 {
            0 => HEADER + offset % 32,
            1 => HOLE - 16 + offset % 64,
            2 => SECOND_REGION - 16 + offset % 64,
            3 => u64::MAX - offset,
            4 => INDIRECT_TABLE + offset % 256,
            5 => offset << 48,
            6..36 => SECOND_REGION + offset % 0x4000,
            _ => SEGMENTS,
        }
    }

    fn len(&mut self) -> u32 {
        let value = u32::from(self.word());
        match self.byte() % 32 {
            0 => 1,
            1 => 16 * (value % 64),
            2 => u32::MAX - value,
            3 => 0,
            4 => value,
            5..16 => 16,
            _ => 512 * (1 + value % 4),
        }
    }

    /// Descriptor `index` of `count`: of a good request of this direction (header, data, status)
    /// but for what the input spoils.
    fn descriptor(&mut self, index: u16, count: u16, writable: bool) -> [u8; 16] {
        let spoil = self.byte();
        let last = index + 1 >= count;
        let (mut addr, mut len, mut flags) = if index == 0 {
            (HEADER, 16, 1)
        } else if last {
            (SECOND_REGION, 1, 2)
        } else {
            (self.address(), self.len(), if writable { 3 } else { 1 })
        };
        let mut next = index + 1;
        match spoil {
            0..4 => addr = self.address(),
            4..8 => len = self.len(),
            8..12 => flags = u16::from(self.byte() % 8),
            12..16 => next = self.word(),
            16..24 => {
                // The rest is in the other table.
                let entries = u32::from(self.byte() % 16);
                (addr, len, flags) = (INDIRECT_TABLE, 16 * entries, 4);
            }
            _ => {}
        }
        let mut raw = [0u8; 16];
        raw[..8].copy_from_slice(&addr.to_le_bytes());
        raw[8..12].copy_from_slice(&len.to_le_bytes());
        raw[12..14].copy_from_slice(&flags.to_le_bytes());
        raw[14..].copy_from_slice(&next.to_le_bytes());
        raw
    }

    fn segment(&mut self) -> [u8; 16] {
        let mut raw = [0u8; 16];
        raw[..8].copy_from_slice(&(u64::from(self.word()) % 2100).to_le_bytes());
        raw[8] = self.byte() & 0x78;
        raw[11] = u8::from(self.byte() == 255);
        raw[12] = [0, 0, 1, 2][usize::from(self.byte() % 4)];
        raw
    }

    fn rules(&mut self) -> RequestRules {
        let bits = self.byte();
        let acked = u64::from(bits);
        let options = DeviceOptions {
            sectors: SECTORS,
            block_bytes: if bits & 1 == 0 { 512 } else { 4096 },
            read_only: bits & 14 == 14,
            serial: "fuzz".to_owned(),
            queues: 1,
            queue_size: 256,
        };
        // Every combination of what a driver may have negotiated.
        options.rules((acked & 0x30) << (feature::DISCARD.trailing_zeros() - 4))
    }
}

thread_local! {
    static MEMORY: GuestMemory = GuestMemory::from_ranges(&[
        (GuestAddress(0), REGION_BYTES),
        (GuestAddress(SECOND_REGION), REGION_BYTES),
    ])
    .expect("two small regions that do not overlap");
}

/// One descriptor chain of a hostile guest, parsed and answered.
///
/// # Panics
/// If something is wrong with the parser.
pub fn fuzz_chain(data: &[u8]) {
    MEMORY.with(|memory| {
        run_chain(memory, &mut Input(data));
    });
}

fn put(memory: &GuestMemory, bytes: &[u8], at: u64) {
    memory
        .write_slice(bytes, GuestAddress(at))
        .expect("the first region holds both tables and the header");
}

/// Returns what the chain was taken for.
fn run_chain(memory: &GuestMemory, input: &mut Input<'_>) -> (Parsed, RequestKind) {
    let rules = input.rules();
    let size = [16, 32, 128, 4][usize::from(input.byte() % 4)];
    let head = u16::from(input.byte() / 32);
    let mut header = [0u8; 16];
    header[0] = [0, 1, 4, 8, 11, 13, 2, 255][usize::from(input.byte() % 8)];
    header[8..].copy_from_slice(&(u64::from(input.word()) % 2100).to_le_bytes());
    header[15] = u8::from(input.byte() == 255);
    put(memory, &header, HEADER);
    for index in 0..4 {
        put(memory, &input.segment(), SEGMENTS + 16 * index);
    }
    // From GET_ID and IN the guest wants data, of the others it brings them.
    let writable = matches!(header[0], 0 | 8);
    for table in [TABLE, INDIRECT_TABLE] {
        let count = 2 + u16::from(input.byte() % 8);
        for index in 0..count {
            // The chain may begin anywhere in the queue's table.
            let shift = if table == TABLE { head } else { 0 };
            let mut raw = input.descriptor(index, count, writable);
            let next = u16::from_le_bytes([raw[14], raw[15]]);
            raw[14..].copy_from_slice(&next.wrapping_add(shift).to_le_bytes());
            put(memory, &raw, table + 16 * u64::from(index + shift));
        }
    }
    let table = DescriptorTable {
        addr: TABLE,
        count: size,
    };
    let mut request = GuestRequest::new();
    let parsed = request.parse(memory, table, head, &rules);
    match parsed {
        Parsed::Request => {
            check_request(memory, &mut request, &rules);
            assert!(request.finish(memory, BlockStatus::Ok) >= 1);
        }
        Parsed::Answer(status) => assert!(request.finish(memory, status) >= 1),
        Parsed::Malformed { status_addr, .. } => {
            if let Some(addr) = status_addr {
                assert!(is_inside(memory, addr, 1));
            }
        }
    }
    (parsed, request.kind())
}

fn check_request(memory: &GuestMemory, request: &mut GuestRequest, rules: &RequestRules) {
    assert!(request.pieces().len() <= CHAIN_DESCRIPTORS_MAX as usize);
    for piece in request.pieces() {
        assert!(is_inside(memory, piece.addr, piece.len));
    }
    let inside = |range: SectorRange| range.end() <= rules.sectors;
    match request.kind() {
        RequestKind::Read { range } => {
            assert!(inside(range));
            let bytes = vec![0x5a; range.len_bytes()];
            let copied = request.copy_to_guest(memory, 0, &bytes);
            assert!(copied.is_ok(), "the memory was checked");
            assert!(request.copy_to_guest(memory, 1, &bytes).is_err());
        }
        RequestKind::Write { range } => {
            assert!(inside(range) && range.is_aligned(rules.block_sectors) && !rules.read_only);
            let mut bytes = vec![0; range.len_bytes()];
            let copied = request.copy_from_guest(memory, 0, &mut bytes);
            assert!(copied.is_ok(), "the memory was checked");
            assert!(request.copy_from_guest(memory, 1, &mut bytes).is_err());
        }
        RequestKind::Flush => {}
        RequestKind::Discard | RequestKind::WriteZeroes => {
            let segments = request.segments();
            assert!(!segments.is_empty() && segments.len() <= DISCARD_SEGMENTS_MAX as usize);
            assert!(segments.iter().all(|segment| inside(segment.range)));
            let apart = |pair: &[Segment]| pair[0].range.end() <= pair[1].range.start();
            assert!(segments.windows(2).all(apart));
            assert!(!rules.read_only);
        }
    }
}

/// One message of a hostile front-end, without descriptors, checked.
pub fn fuzz_message(data: &[u8]) {
    let mut input = Input(data);
    let limits = MessageLimits {
        queues: 1 + u16::from(input.byte()),
        queue_size: 1 << (input.byte() % 11),
    };
    let message = Message {
        code: u32::from(input.byte()),
        flags: u32::from(input.byte()),
        body: input.0.to_vec(),
        descriptors: Vec::new(),
    };
    // Refused or not: it has no effect by itself.
    let _ = message.check(limits);
}

/// Descriptors of the queue whose in-flight buffer is hostile.
const TRACKED: u16 = 8;
/// Where its status bytes are: nothing else of the guest's is written, but for the used ring.
const STATUSES: u64 = 0x2000;

/// What a back-end left behind, but for what the input spoils: in-flight buffer, indices, table.
///
/// # Panics
/// If something is wrong with recovery.
pub fn fuzz_inflight(data: &[u8]) {
    MEMORY.with(|memory| {
        run_inflight(memory, &mut Input(data));
    });
}

/// A buffer for one queue, with words of it exchanged. `None` if it is refused.
fn hostile_buffer(input: &mut Input<'_>) -> Option<Arc<InflightBuffer>> {
    let disk = DiskIdentity::NONE;
    let shape = Shape {
        queues: 1,
        queue_size: TRACKED,
    };
    let (mut description, file) = inflight::create(shape, 1, disk).expect("a small memory file");
    let buffer = File::from(file);
    let put = |at: usize, bytes: &[u8]| {
        let written = buffer.write_all_at(bytes, at as u64);
        written.expect("inside the memory file");
    };
    put(layout::VERSION_AT, &1u16.to_ne_bytes());
    put(layout::DESC_NUM_AT, &TRACKED.to_ne_bytes());
    put(layout::USED_IDX_AT, &input.word().to_ne_bytes());
    put(
        layout::LAST_BATCH_HEAD_AT,
        &(input.word() % 10).to_ne_bytes(),
    );
    for head in 0..TRACKED {
        let bits = input.byte();
        put(layout::mark_at(head), &[bits & 1]);
        put(layout::next_at(head), &(u16::from(bits) / 16).to_ne_bytes());
        let counter = u64::from(input.byte()) << if bits & 14 == 14 { 56 } else { 0 };
        put(layout::counter_at(head), &counter.to_ne_bytes());
    }
    for _ in 0..input.byte() % 4 {
        let at = usize::from(input.word()) % (shape.buffer_bytes() - 2);
        put(at, &input.word().to_ne_bytes());
    }
    match input.byte() {
        0 => description.size = u64::from(input.word()),
        1 => description.offset = u64::from(input.word()),
        2 => description.shape.queues = input.word(),
        3 => description.shape.queue_size = input.word(),
        _ => {}
    }
    let opened = InflightBuffer::open(buffer.into(), description, 1, disk);
    opened.ok().map(Arc::new)
}

/// Returns how many requests were executed again; `None` if queue or buffer were refused.
fn run_inflight(memory: &GuestMemory, input: &mut Input<'_>) -> Option<u16> {
    let buffer = hostile_buffer(input)?;
    let rings = RingAddresses {
        descriptors: TABLE,
        available: 0x400,
        used: 0x800,
    };
    put(memory, &[0x5a; 0x1000], STATUSES);
    let (used, ahead) = (input.word(), input.word() % 12);
    put(
        memory,
        &used.wrapping_add(ahead).to_le_bytes(),
        rings.available + 2,
    );
    put(memory, &used.to_le_bytes(), rings.used + 2);
    for index in 0..TRACKED {
        let slot = rings.available + 4 + 2 * u64::from(index);
        put(memory, &u16::from(input.byte() % 9).to_le_bytes(), slot);
        // A chain of a status byte alone: answered at once, or malformed.
        let mut raw = [0u8; 16];
        raw[..8].copy_from_slice(&(STATUSES + 16 * u64::from(index)).to_le_bytes());
        raw[8] = 1;
        raw[12] = 2;
        put(memory, &raw, TABLE + 16 * u64::from(index));
    }
    let event = eventfd(0, EventfdFlags::CLOEXEC).expect("a descriptor");
    let setup = QueueSetup {
        index: 0,
        size: TRACKED,
        rings,
        features: 0,
        options: Arc::new(DeviceOptions {
            sectors: SECTORS,
            block_bytes: 512,
            read_only: false,
            serial: String::new(),
            queues: 1,
            queue_size: TRACKED,
        }),
        order: PublishOrder::Ring,
        inflight: buffer.region(0),
        kick: Arc::new(Kick::new(File::from(event))),
        call: None,
    };
    let mut queue = VirtQueue::new(setup, memory);
    let again = queue.in_flight();
    let mut fetched = 0u16;
    let mut request = GuestRequest::new();
    loop {
        match queue.fetch(memory, &mut request) {
            Fetched::Empty => break,
            Fetched::Answered(_) => fetched += 1,
            Fetched::Request(_) => unreachable!("no chain has a header"),
        }
        assert!(fetched <= TRACKED, "no more than there are descriptors");
    }
    assert_eq!(queue.in_flight(), fetched);
    let mut tags = Vec::new();
    let _ = queue.publish(memory, &mut tags);
    assert!(queue.is_drained() && tags.is_empty());
    let shown: u16 = memory
        .load(GuestAddress(rings.used + 2), Ordering::Acquire)
        .expect("the ring is in memory");
    let published = if queue.is_broken() { 0 } else { fetched };
    assert_eq!(u16::from_le(shown), used.wrapping_add(published));
    let mut bytes = [0u8; 0x1000];
    memory
        .read_slice(&mut bytes, GuestAddress(STATUSES))
        .expect("the region holds them");
    let changed = |&(at, &byte): &(usize, &u8)| byte != 0x5a && !(at % 16 == 0 && at < 128);
    assert!(!bytes.iter().enumerate().any(|pair| changed(&pair)));
    (!queue.is_broken()).then_some(again)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(20_000))]

        #[test]
        fn chains_do_no_harm(data in prop::collection::vec(any::<u8>(), 0..200)) {
            fuzz_chain(&data);
        }

        #[test]
        fn messages_do_no_harm(data in prop::collection::vec(any::<u8>(), 0..120)) {
            fuzz_message(&data);
        }
    }

    proptest! {
        // Each takes a memory file and a mapping.
        #![proptest_config(ProptestConfig::with_cases(2_000))]

        #[test]
        fn inflight_buffers_do_no_harm(data in prop::collection::vec(any::<u8>(), 0..80)) {
            fuzz_inflight(&data);
        }
    }

    fn noise(seed: &mut u64, len: usize) -> Vec<u8> {
        let step = |_| {
            *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            seed.to_le_bytes()[6]
        };
        (0..len).map(step).collect()
    }

    #[test]
    fn bytes_reach_recovery() {
        // Indices far apart are noticed first; the input has to say that they are near.
        let mut seed = 7u64;
        let mut again = std::collections::BTreeMap::new();
        for _ in 0..20_000 {
            let mut data = noise(&mut seed, 60);
            data[1] = 0;
            data[0] = 2;
            let at = 4 + 2 * usize::from(TRACKED);
            data[at] = 0;
            data[at + 1] = 9;
            data[at + 2] = 2 + data[at + 2] % 4;
            data[at + 3] = 0;
            let got = MEMORY.with(|memory| run_inflight(memory, &mut Input(&data)));
            *again.entry(got).or_insert(0) += 1;
        }
        assert!(again[&None] > 100, "{again:?}");
        assert!(again.keys().flatten().any(|&count| count > 2), "{again:?}");
    }

    #[test]
    fn bytes_reach_every_kind_of_request() {
        // If decoding were too wild, the fuzzer would see nothing but malformed chains.
        let mut seed = 1u64;
        let mut kinds = std::collections::BTreeMap::new();
        for _ in 0..50_000 {
            let data = noise(&mut seed, 160);
            let (parsed, kind) = MEMORY.with(|memory| run_chain(memory, &mut Input(&data)));
            let name = match parsed {
                Parsed::Request => match kind {
                    RequestKind::Read { .. } => "read",
                    RequestKind::Write { .. } => "write",
                    RequestKind::Flush => "flush",
                    RequestKind::Discard => "discard",
                    RequestKind::WriteZeroes => "write zeroes",
                },
                Parsed::Answer(_) => "answer",
                Parsed::Malformed { .. } => "malformed",
            };
            *kinds.entry(name).or_insert(0) += 1;
        }
        assert_eq!(kinds.len(), 7, "{kinds:?}");
        assert!(kinds.values().all(|&count| count >= 10), "{kinds:?}");
    }
}
