// SPDX-License-Identifier: Apache-2.0
use vm_memory::Bytes;

use super::*;
use crate::device::chain::DESCRIPTOR_BYTES;
use crate::device::test_support::{
    INDIRECT, NEXT, RawDescriptor, WRITE, options, write_descriptor, write_header,
};

const TABLE: u64 = 0;
const INDIRECT_TABLE: u64 = 0x1000;
const HEADER: u64 = 0x8000;
const DATA: u64 = 0x9000;
const STATUS: u64 = 0xf000;
const MEMORY_END: u64 = 0x2_0000;
const SIZE: u32 = 16;

fn memory() -> GuestMemory {
    // Two regions that touch: a buffer may lie across the seam.
    GuestMemory::from_ranges(&[
        (GuestAddress(0), 0x1_0000),
        (GuestAddress(0x1_0000), 0x1_0000),
    ])
    .unwrap()
}

fn rules() -> RequestRules {
    let options = options();
    options.rules(options.features())
}

fn parse_with(
    memory: &GuestMemory,
    chain: &[RawDescriptor],
    rules: &RequestRules,
) -> (Parsed, GuestRequest) {
    for (index, raw) in (0..).zip(chain) {
        write_descriptor(memory, TABLE, index, *raw);
    }
    let mut request = GuestRequest::new();
    let table = DescriptorTable {
        addr: TABLE,
        count: SIZE,
    };
    let parsed = request.parse(memory, table, 0, rules);
    (parsed, request)
}

fn parse(memory: &GuestMemory, chain: &[RawDescriptor]) -> (Parsed, GuestRequest) {
    parse_with(memory, chain, &rules())
}

#[test]
fn any_framing_of_a_write_is_the_same_write() {
    let data: Vec<u8> = (0..1024u32)
        .map(|i| u8::try_from(i % 251).unwrap())
        .collect();
    let header_and_data = HEADER; // header and data lie together here
    let memory = memory();
    write_header(&memory, header_and_data, 1, 8);
    memory
        .write_slice(&data, GuestAddress(header_and_data + 16))
        .unwrap();
    let framings: &[&[RawDescriptor]] = &[
        &[
            (HEADER, 16, NEXT, 1),
            (HEADER + 16, 1024, NEXT, 2),
            (STATUS, 1, WRITE, 0),
        ],
        // Header and data in one.
        &[(HEADER, 1040, NEXT, 1), (STATUS, 1, WRITE, 0)],
        // The header in pieces, an empty buffer between them, data split off the block size.
        &[
            (HEADER, 3, NEXT, 1),
            (0xdead_beef_0000, 0, NEXT, 2),
            (HEADER + 3, 14, NEXT, 3),
            (HEADER + 17, 1000, NEXT, 4),
            (HEADER + 1017, 23, NEXT, 5),
            (STATUS - 7, 8, WRITE, 0),
        ],
    ];
    for (i, chain) in framings.iter().enumerate() {
        let (parsed, mut request) = parse(&memory, chain);
        assert_eq!(parsed, Parsed::Request, "framing {i}");
        let range = SectorRange::new(8, 2).unwrap();
        assert_eq!(request.kind(), RequestKind::Write { range });
        assert_eq!(request.data_len(), 1024);
        let mut got = vec![0u8; 1024];
        request.copy_from_guest(&memory, 0, &mut got).unwrap();
        assert_eq!(got, data, "framing {i}");
        let mut middle = vec![0u8; 100];
        request
            .copy_from_guest(&memory, 950, &mut middle)
            .unwrap_err();
        request.copy_from_guest(&memory, 924, &mut middle).unwrap();
        assert_eq!(middle, data[924..]);
        memory.write_obj(0xffu8, GuestAddress(STATUS)).unwrap();
        assert_eq!(request.finish(&memory, BlockStatus::Ok), 1);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(STATUS)).unwrap(), 0);
    }
}

#[test]
fn any_framing_of_a_read_is_the_same_read() {
    let memory = memory();
    write_header(&memory, HEADER, 0, 3);
    for (index, raw) in [
        (HEADER, 16, NEXT, 1),
        (DATA, 512, NEXT | WRITE, 2),
        (DATA + 512, 1, WRITE, 0),
    ]
    .into_iter()
    .enumerate()
    {
        write_descriptor(&memory, INDIRECT_TABLE, u16::try_from(index).unwrap(), raw);
    }
    let framings: &[&[RawDescriptor]] = &[
        &[
            (HEADER, 16, NEXT, 1),
            (DATA, 512, NEXT | WRITE, 2),
            (DATA + 512, 1, WRITE, 0),
        ],
        // Data and status in one.
        &[(HEADER, 16, NEXT, 1), (DATA, 513, WRITE, 0)],
        // The whole chain in a table, whose descriptor is marked writable: ignored.
        &[(INDIRECT_TABLE, 3 * DESCRIPTOR_BYTES, INDIRECT | WRITE, 0)],
    ];
    for (i, chain) in framings.iter().enumerate() {
        let (parsed, mut request) = parse(&memory, chain);
        assert_eq!(parsed, Parsed::Request, "framing {i}");
        let range = SectorRange::new(3, 1).unwrap();
        assert_eq!(request.kind(), RequestKind::Read { range });
        memory
            .write_slice(&[0xee; 514], GuestAddress(DATA))
            .unwrap();
        request.copy_to_guest(&memory, 0, &[1; 200]).unwrap();
        request.copy_to_guest(&memory, 200, &[2; 312]).unwrap();
        request.copy_to_guest(&memory, 500, &[3; 13]).unwrap_err();
        assert_eq!(request.finish(&memory, BlockStatus::Unsupported), 513);
        let mut got = [0u8; 514];
        memory.read_slice(&mut got, GuestAddress(DATA)).unwrap();
        assert_eq!(got[..200], [1; 200]);
        assert_eq!(got[200..500], [2; 300]);
        assert_eq!(got[512..], [2, 0xee], "status, and nothing behind it");
    }
}

#[test]
fn buffer_across_two_regions_is_copied_whole() {
    let memory = memory();
    write_header(&memory, HEADER, 0, 0);
    let (parsed, mut request) = parse(
        &memory,
        &[(HEADER, 16, NEXT, 1), (0x1_0000 - 100, 513, WRITE, 0)],
    );
    assert_eq!(parsed, Parsed::Request);
    request.copy_to_guest(&memory, 0, &[7; 512]).unwrap();
    let mut got = [0u8; 512];
    memory
        .read_slice(&mut got, GuestAddress(0x1_0000 - 100))
        .unwrap();
    assert_eq!(got, [7; 512]);
}

#[test]
fn malformed_chains_fail_alone() {
    let indirect = |len| (INDIRECT_TABLE, len, INDIRECT, 0);
    let good = (HEADER, 16, NEXT, 1);
    let table16 = 16 * DESCRIPTOR_BYTES;
    type Case<'a> = (
        &'a str,
        &'a [RawDescriptor],
        &'a [RawDescriptor],
        Option<u64>,
    );
    let cases: &[Case<'_>] = &[
        ("loop", &[good, (STATUS, 1, NEXT | WRITE, 0)], &[], None),
        ("next outside", &[(HEADER, 16, NEXT, 16)], &[], None),
        (
            "buffer outside",
            &[good, (MEMORY_END - 1, 2, WRITE, 0)],
            &[],
            None,
        ),
        (
            "buffer wraps",
            &[good, (u64::MAX - 1, 16, WRITE, 0)],
            &[],
            None,
        ),
        (
            "status outside",
            &[good, (MEMORY_END, 1, WRITE, 0)],
            &[],
            None,
        ),
        (
            "more than 2^32 bytes",
            &[(0, u32::MAX, NEXT, 1), (0, u32::MAX, NEXT, 2)],
            &[],
            None,
        ),
        ("empty table", &[indirect(0)], &[], None),
        ("odd table", &[indirect(17)], &[], None),
        (
            "table outside",
            &[(MEMORY_END - 8, 16, INDIRECT, 0)],
            &[],
            None,
        ),
        ("table wraps", &[(u64::MAX - 8, 16, INDIRECT, 0)], &[], None),
        (
            "table with successor",
            &[
                (INDIRECT_TABLE, 16, INDIRECT | NEXT, 1),
                (STATUS, 1, WRITE, 0),
            ],
            &[(HEADER, 16, 0, 0)],
            None,
        ),
        (
            "nested",
            &[indirect(16)],
            &[
                (INDIRECT_TABLE + 16, 32, INDIRECT, 0),
                (HEADER, 16, NEXT, 1),
                (STATUS, 1, WRITE, 0),
            ],
            None,
        ),
        (
            "loop in table",
            &[indirect(table16)],
            &[(HEADER, 16, NEXT, 0)],
            None,
        ),
        (
            "next outside table",
            &[indirect(32)],
            &[(HEADER, 16, NEXT, 2)],
            None,
        ),
        ("no status", &[(HEADER, 600, 0, 0)], &[], None),
        ("nothing", &[(HEADER, 0, 0, 0)], &[], None),
        ("empty status", &[good, (STATUS, 0, WRITE, 0)], &[], None),
        (
            "short header",
            &[(HEADER, 15, NEXT, 1), (STATUS, 1, WRITE, 0)],
            &[],
            Some(STATUS),
        ),
        (
            "only writable",
            &[(DATA, 600, WRITE, 0)],
            &[],
            Some(DATA + 599),
        ),
        (
            "readable after writable",
            &[good, (STATUS, 4, NEXT | WRITE, 2), (DATA, 512, 0, 0)],
            &[],
            Some(STATUS + 3),
        ),
    ];
    for (name, chain, table, status) in cases {
        let memory = memory();
        write_header(&memory, HEADER, 0, 0);
        for (index, raw) in (0..).zip(*table) {
            write_descriptor(&memory, INDIRECT_TABLE, index, *raw);
        }
        match parse(&memory, chain).0 {
            Parsed::Malformed { status_addr, error } => {
                assert_eq!(status_addr, *status, "{name}: {error}");
            }
            other => panic!("{name}: {other:?}"),
        }
    }
}

#[test]
fn head_outside_the_table_is_malformed() {
    let memory = memory();
    let table = DescriptorTable {
        addr: TABLE,
        count: SIZE,
    };
    let parsed = GuestRequest::new().parse(&memory, table, 16, &rules());
    let error = ChainError::Head {
        head: 16,
        count: 16,
    }
    .into();
    let status_addr = None;
    assert_eq!(parsed, Parsed::Malformed { error, status_addr });
}

#[test]
fn longest_chain_is_taken_and_one_more_is_not() {
    let options = options();
    let rules = options.rules(options.features());
    let count = 1024u16;
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x20_0000)]).unwrap();
    let table = 0x10_0000;
    let head = |len: u32| write_descriptor(&memory, TABLE, 0, (table, len, INDIRECT, 0));
    write_header(&memory, HEADER, 0, 0);
    let build = |count: u16| {
        for i in 0..count {
            let (addr, len, flags) = match i {
                0 => (HEADER, 16, 0),
                i if i == count - 1 => (STATUS, 1, WRITE),
                _ => (DATA, 512, WRITE),
            };
            let next = if i == count - 1 { 0 } else { NEXT };
            write_descriptor(&memory, table, i, (addr, len, flags | next, i + 1));
        }
        head(u32::from(count) * DESCRIPTOR_BYTES);
    };
    let queue = DescriptorTable {
        addr: TABLE,
        count: SIZE,
    };
    let mut request = GuestRequest::new();
    build(count - 1); // and the one that holds the table
    assert_eq!(request.parse(&memory, queue, 0, &rules), Parsed::Request);
    assert_eq!(request.data_len(), 1021 * 512);
    build(count);
    let parsed = request.parse(&memory, queue, 0, &rules);
    let error = ChainError::TooLong.into();
    let status_addr = None;
    assert_eq!(parsed, Parsed::Malformed { error, status_addr });
}

#[test]
fn reads_and_writes_are_checked_against_the_disk() {
    use BlockStatus::{IoError, Ok};
    const IN: u32 = TYPE_IN;
    const OUT: u32 = TYPE_OUT;
    let small = rules();
    let large_blocks = RequestRules {
        block_sectors: 8,
        ..small
    };
    let read_only = RequestRules {
        read_only: true,
        ..small
    };
    let cases: &[(&RequestRules, u32, u64, u32, Option<BlockStatus>)] = &[
        (&small, IN, 2047, 512, None),
        (&small, IN, 2047, 1024, Some(IoError)),
        (&small, IN, 2048, 512, Some(IoError)),
        (&small, IN, u64::MAX, 512, Some(IoError)),
        (&small, IN, 0, 511, Some(IoError)),
        (&small, IN, 0, 0, Some(Ok)),
        (&small, IN, 2048, 0, Some(Ok)),
        (&small, IN, 2049, 0, Some(IoError)),
        (&small, OUT, 2047, 512, None),
        (&small, OUT, 2047, 1024, Some(IoError)),
        (&small, OUT, u64::MAX - 1, 1024, Some(IoError)),
        (&small, OUT, 0, 100, Some(IoError)),
        (&large_blocks, IN, 1, 512, None),
        (&large_blocks, OUT, 1, 512, Some(IoError)),
        (&large_blocks, OUT, 8, 512, Some(IoError)),
        (&large_blocks, OUT, 8, 4096, None),
        (&read_only, IN, 0, 512, None),
        (&read_only, OUT, 0, 512, Some(IoError)),
    ];
    for &(rules, kind, sector, len, refused) in cases {
        let memory = memory();
        write_header(&memory, HEADER, kind, sector);
        let writable = if kind == IN { WRITE } else { 0 };
        let chain = [
            (HEADER, 16, NEXT, 1),
            (DATA, len, NEXT | writable, 2),
            (STATUS, 1, WRITE, 0),
        ];
        let (parsed, _) = parse_with(&memory, &chain, rules);
        let expected = refused.map_or(Parsed::Request, Parsed::Answer);
        assert_eq!(parsed, expected, "type {kind} sector {sector} len {len}");
    }
}

/// Segments as the guest writes them: sector, count, flags.
fn parse_segments(
    rules: &RequestRules,
    kind: u32,
    segments: &[(u64, u32, u32)],
    len: u32,
) -> (Parsed, GuestRequest) {
    let memory = memory();
    write_header(&memory, HEADER, kind, 0);
    for (index, (sector, count, flags)) in (0u64..).zip(segments) {
        let at = GuestAddress(DATA + 16 * index);
        memory.write_obj(*sector, at).unwrap();
        memory.write_obj(*count, GuestAddress(at.0 + 8)).unwrap();
        memory.write_obj(*flags, GuestAddress(at.0 + 12)).unwrap();
    }
    let chain = [
        (HEADER, 16, NEXT, 1),
        (DATA, len, NEXT, 2),
        (STATUS, 1, WRITE, 0),
    ];
    parse_with(&memory, &chain, rules)
}

#[test]
fn discard_and_write_zeroes_have_the_statuses_of_qemu() {
    use BlockStatus::{IoError, Ok, Unsupported};
    const D: u32 = TYPE_DISCARD;
    const Z: u32 = TYPE_WRITE_ZEROES;
    let large = RequestRules {
        sectors: 1 << 30,
        ..rules()
    };
    let fresh = RequestRules {
        discard: false,
        write_zeroes: false,
        ..large
    };
    let read_only = RequestRules {
        read_only: true,
        ..large
    };
    let blocks = RequestRules {
        block_sectors: 8,
        ..large
    };
    type Case<'a> = (
        &'a RequestRules,
        u32,
        &'a [(u64, u32, u32)],
        u32,
        Option<BlockStatus>,
    );
    let end = 1u64 << 30;
    let cases: &[Case<'_>] = &[
        (&large, D, &[(0, 8, 0), (64, 8, 0)], 32, None),
        (&large, Z, &[(0, 8, 1), (64, 8, 0)], 32, None),
        (&large, D, &[(0, 8, 1)], 16, Some(Unsupported)),
        (&large, D, &[(0, 8, 2)], 16, Some(Unsupported)),
        (&large, Z, &[(0, 8, 3)], 16, Some(Unsupported)),
        (&large, D, &[(0, 8, 0)], 33 * 16, Some(Unsupported)),
        (&large, Z, &[(0, 8, 0)], 33 * 16, Some(Unsupported)),
        (&large, D, &[(0, 8, 0)], 15, Some(IoError)),
        (&large, D, &[(0, 8, 0)], 17, Some(IoError)),
        (&large, Z, &[], 0, Some(IoError)),
        (&large, D, &[(0, 1 << 17, 0)], 16, None),
        (&large, D, &[(0, (1 << 17) + 1, 0)], 16, Some(IoError)),
        (&large, Z, &[(0, (1 << 17) + 1, 0)], 16, Some(IoError)),
        (&large, Z, &[(end - 8, 9, 0)], 16, Some(IoError)),
        (&large, Z, &[(end, 8, 0)], 16, Some(IoError)),
        (&large, D, &[(u64::MAX, 8, 0)], 16, Some(IoError)),
        // Range before the flag of a discard, reserved flags before the range.
        (&large, D, &[(end, 8, 1)], 16, Some(IoError)),
        (&large, D, &[(end, 8, 4)], 16, Some(Unsupported)),
        // One bad segment spoils all; empty ones do nothing.
        (&large, Z, &[(0, 8, 0), (end, 8, 0)], 32, Some(IoError)),
        (&large, Z, &[(0, 0, 0)], 16, Some(Ok)),
        (&large, Z, &[(end + 1, 0, 0)], 16, Some(IoError)),
        (&blocks, D, &[(0, 4, 0)], 16, Some(IoError)),
        (&blocks, Z, &[(8, 8, 0)], 16, None),
        (&fresh, D, &[(0, 8, 0)], 16, Some(Unsupported)),
        (&fresh, Z, &[(0, 8, 0)], 16, Some(Unsupported)),
        (&read_only, Z, &[(0, 8, 0)], 16, Some(IoError)),
    ];
    for (rules, kind, segments, len, refused) in cases {
        let (parsed, request) = parse_segments(rules, *kind, segments, *len);
        let expected = refused.map_or(Parsed::Request, Parsed::Answer);
        assert_eq!(parsed, expected, "type {kind} {segments:?} len {len}");
        if refused.is_none() {
            assert_eq!(request.segments().len(), segments.len());
        }
    }
    let (_, request) = parse_segments(&large, Z, &[(0, 0, 0), (64, 8, 1)], 32);
    let range = SectorRange::new(64, 8).unwrap();
    assert_eq!(request.segments(), [Segment { range, unmap: true }]);
}

#[test]
fn segments_are_sorted_and_cut_until_none_overlap() {
    let given = [
        (64, 64, 0),
        (0, 32, 1),
        (64, 64, 0),
        (96, 64, 0),
        (100, 8, 0),
        (32, 8, 0),
        (0, 8, 0),
    ];
    let (parsed, request) = parse_segments(&rules(), TYPE_WRITE_ZEROES, &given, 7 * 16);
    assert_eq!(parsed, Parsed::Request);
    let ranges = request.segments().iter().map(|segment| segment.range);
    let expected = [(0, 32), (32, 8), (64, 64), (128, 32)];
    assert!(ranges.eq(expected.map(|(start, count)| SectorRange::new(start, count).unwrap())));
}

#[test]
fn id_flush_and_unknown_types() {
    let memory = memory();
    let chain = |data: u32| {
        [
            (HEADER, 16, NEXT, 1),
            (DATA, data, NEXT | WRITE, 2),
            (STATUS, 1, WRITE, 0),
        ]
    };
    for (len, expected) in [(20, 20), (64, 20), (4, 4), (0, 0)] {
        memory.write_slice(&[0xee; 64], GuestAddress(DATA)).unwrap();
        write_header(&memory, HEADER, TYPE_GET_ID, 0);
        let (parsed, mut request) = parse(&memory, &chain(len));
        assert_eq!(parsed, Parsed::Answer(BlockStatus::Ok));
        let mut got = [0u8; 64];
        memory.read_slice(&mut got, GuestAddress(DATA)).unwrap();
        let mut serial = [0u8; 20];
        serial[..9].copy_from_slice(b"test-disk");
        assert_eq!(got[..expected], serial[..expected]);
        assert!(got[expected..].iter().all(|&byte| byte == 0xee));
        let used = u32::try_from(expected).unwrap() + 1;
        assert_eq!(request.finish(&memory, BlockStatus::Ok), used);
    }
    write_header(&memory, HEADER, TYPE_FLUSH, 0);
    let (parsed, request) = parse(&memory, &[(HEADER, 16, NEXT, 1), (STATUS, 1, WRITE, 0)]);
    assert_eq!(parsed, Parsed::Request);
    assert_eq!(request.kind(), RequestKind::Flush);
    for kind in [2, 3, 5, 9, 10, 12, 14, 0x8000_0000, u32::MAX] {
        write_header(&memory, HEADER, kind, 0);
        let (parsed, _) = parse(&memory, &chain(512));
        assert_eq!(parsed, Parsed::Answer(BlockStatus::Unsupported), "{kind}");
    }
}

#[test]
fn memory_that_vanished_is_an_error_and_no_panic() {
    let memory = memory();
    write_header(&memory, HEADER, 0, 0);
    let chain = [(HEADER, 16, NEXT, 1), (DATA, 513, WRITE, 0)];
    let (parsed, mut request) = parse(&memory, &chain);
    assert_eq!(parsed, Parsed::Request);
    let empty = GuestMemory::new();
    assert!(request.copy_to_guest(&empty, 0, &[0; 512]).is_err());
    assert!(request.copy_from_guest(&empty, 0, &mut [0; 1]).is_err());
    assert_eq!(request.finish(&empty, BlockStatus::IoError), 0);
}
