// SPDX-License-Identifier: Apache-2.0
//! Blocks on disk: round trips, the vectors of the documentation, and what is refused (rule R9).

use proptest::prelude::*;

use super::support::*;
use crate::quorum::{Bitmap, PAGE_WORDS, PageName, ReadPattern};
use crate::record::fields::seal;
use crate::record::history::ENTRY_BYTES;
use crate::record::page::PAGE_CRC_AT;
use crate::record::superblock::SUPERBLOCK_CRC_AT;
use crate::record::*;

/// What other programs are tested against, too.
const DOCUMENT: &str = include_str!("../../../docs/record-format.md");

/// The superblock of the documentation.
fn documented_superblock() -> Superblock {
    let mut superblock = superblock(40_000);
    superblock.disk = DiskUuid(*b"0123456789abcdef");
    superblock.copy_index = 1;
    superblock.copies = 3;
    superblock.included = 7;
    superblock.sequence = 9;
    superblock.clean = true;
    superblock.boot_id = [0xB0; 16];
    superblock.verify_cursor = VERIFIED;
    superblock.members[2].suspect = true;
    superblock.members[2].state = MemberState::Syncing;
    superblock.members[0].epoch_in_sync = 4;
    superblock.members[0].fingerprint = Fingerprint {
        size_bytes: 163_840_000,
        mtime_seconds: 1_700_000_000,
        mtime_nanos: 123_456_789,
        inode: 77,
        device: 2049,
    };
    let entry = |epoch: u8, begun| EpochEntry {
        epoch: epoch.into(),
        id: EpochId([epoch; 16]),
        forced: false,
        begun,
    };
    superblock.history = History::new(entry(1, false));
    superblock.history.push(entry(2, true));
    superblock.history.push(entry(5, true));
    superblock
}

/// The page of the documentation.
fn documented_page() -> PageImage {
    let mut bits = Box::new([0; PAGE_WORDS]);
    bits[0] = 1;
    bits[507] = 1 << 63;
    PageImage {
        name: PageName {
            bitmap: b(2),
            page: 1,
        },
        sequence: 12,
        bits,
    }
}

/// The bytes that are not zero, 16 a line: `offset: bytes`.
fn hex(block: &Block) -> String {
    let mut text = String::new();
    for (index, line) in block.chunks(16).enumerate() {
        if line.iter().any(|&byte| byte != 0) {
            let bytes: String = line.iter().map(|byte| format!(" {byte:02x}")).collect();
            text.push_str(&format!("{:04x}:{bytes}\n", index * 16));
        }
    }
    text
}

#[test]
fn documented_vectors_are_what_is_written() {
    let superblock = documented_superblock();
    let page = documented_page();
    let disk = superblock.disk;
    for block in [superblock.encode(), page.encode(disk)] {
        let hex = hex(&block);
        assert!(DOCUMENT.contains(&hex), "not documented:\n{hex}");
    }
    assert_eq!(Superblock::decode(&superblock.encode()), Ok(superblock));
    assert_eq!(
        PageImage::decode(&page.encode(disk), page.name, disk),
        Ok(page)
    );
}

prop_compose! {
    fn any_history()(
        steps in prop::collection::vec((0_u64..9, any::<[u8; 16]>(), any::<bool>()), 1..24),
        forced in any::<bool>(),
    ) -> History {
        let entry = |epoch, &(_, id, begun): &(u64, [u8; 16], bool)| EpochEntry {
            epoch,
            id: EpochId(id),
            forced,
            begun,
        };
        let mut epoch = 1 + steps[0].0;
        let mut history = History::new(entry(epoch, &steps[0]));
        for step in &steps[1..] {
            epoch += 1 + step.0;
            history.push(entry(epoch, step));
        }
        history
    }
}

prop_compose! {
    fn any_member()(
        uuid in any::<[u8; 16]>(),
        state in 0_usize..6,
        suspect in any::<bool>(),
        epoch_in_sync in any::<u64>(),
        size_bytes in any::<u64>(),
        mtime_seconds in any::<i64>(),
        mtime_nanos in 0_u32..1_000_000_000,
        inode in any::<u64>(),
        device in any::<u64>(),
    ) -> Member {
        let states = [
            MemberState::Vacant,
            MemberState::InSync,
            MemberState::Syncing,
            MemberState::Missing,
            MemberState::Failed,
            MemberState::Removed,
        ];
        let fingerprint = Fingerprint { size_bytes, mtime_seconds, mtime_nanos, inode, device };
        Member { uuid, state: states[state], suspect, epoch_in_sync, fingerprint }
    }
}

prop_compose! {
    fn any_superblock()(
        (disk, boot_id) in any::<([u8; 16], [u8; 16])>(),
        (copies, copy) in (prop::sample::select(vec![1_u8, 3, 5]), any::<u8>()),
        included in any::<u8>(),
        sequence in 1_u64..1 << 63,
        (extents, extent_shift) in (1_u64..=1 << 20, 3_u8..30),
        (replicas, threshold) in (1_u8..=16, any::<u8>()),
        (clean, cold, assume_clean, fifo) in any::<(bool, bool, bool, bool)>(),
        (verified, cursor) in any::<(bool, u64)>(),
        members in prop::array::uniform16(any_member()),
        history in any_history(),
        growing in any::<Option<(u64, u64)>>(),
    ) -> Superblock {
        let sectors = extents << extent_shift;
        let copy_index = copy % copies;
        Superblock {
            disk: DiskUuid(disk),
            copy_index,
            copies,
            included: included & ((1 << copies) - 1) | 1 << copy_index,
            sequence,
            sectors,
            extent_shift,
            block_sectors: 8,
            replicas,
            threshold: 1 + threshold % replicas,
            pattern: if fifo { ReadPattern::Fifo } else { ReadPattern::Quorum },
            clean,
            cold,
            forced: history.newest().forced,
            few_replicas: clean != assume_clean,
            assume_clean,
            scrubbed_at: cursor,
            boot_id,
            verify_cursor: if verified { VERIFIED } else { cursor % sectors },
            scrub_cursor: VERIFIED,
            members,
            growing: growing.filter(|_| extents > 1).map(|(from, epoch)| Growing {
                from_sectors: (1 + from % (extents - 1)) << extent_shift,
                epoch: 1 + epoch % history.newest().epoch,
            }),
            history,
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn superblock_round_trip(superblock in any_superblock()) {
        prop_assert_eq!(Superblock::decode(&superblock.encode()), Ok(superblock));
    }

    #[test]
    fn page_round_trip(
        disk in any::<[u8; 16]>(),
        map in 0_usize..=16,
        page in 0_usize..33,
        sequence in 1_u64..1 << 63,
        words in prop::collection::vec(any::<u64>(), PAGE_WORDS),
    ) {
        let bits: Box<[u64; PAGE_WORDS]> = words.into_boxed_slice().try_into().unwrap();
        let name = PageName { bitmap: Bitmap::from_number(map), page };
        let image = PageImage { name, sequence, bits };
        let block = image.encode(DiskUuid(disk));
        prop_assert_eq!(PageImage::decode(&block, name, DiskUuid(disk)), Ok(image));
    }

    /// Whatever one byte becomes, with the checksum put right: a superblock within its bounds, or
    /// a refusal, and never a panic.
    #[test]
    fn sealed_nonsense_is_within_bounds_or_refused(
        superblock in any_superblock(),
        changes in prop::collection::vec((0_usize..2048, any::<u8>()), 1..6),
    ) {
        let mut block = superblock.encode();
        for (at, value) in changes {
            block[at] = value;
        }
        seal(&mut block, SUPERBLOCK_CRC_AT);
        if let Ok(found) = Superblock::decode(&block) {
            prop_assert_eq!(found.check(), Ok(()));
            prop_assert!(found.layout().length_bytes() <= 1124 * 4096);
            prop_assert!(found.slots() <= 16);
            prop_assert!((1..=3).contains(&found.needed()));
        }
    }
}

#[test]
fn superblock_fields_out_of_bounds_are_refused() {
    let field = |field| FormatError::Field { field };
    let history = 128 + 16 * 72;
    let cases: &[(usize, &[u8], FormatError)] = &[
        (0, b"Q", FormatError::Magic),
        (8, &[2], FormatError::Version { version: 2 }),
        (16, &[4], FormatError::Features { features: 4 }),
        (48, &[6], field("epoch")),
        (56, &[0; 8], field("sequence")),
        (56, &[255; 8], field("sequence")),
        (64, &[0; 8], field("size")),
        (64, &[255; 8], field("size")),
        (64, &[1], field("size")),
        (72, &[0, 0, 0, 0, 1, 0, 0, 0], field("cursor")),
        (80, &[0, 0, 0, 0, 1, 0, 0, 0], field("cursor")),
        (104, &[3], field("index of the copy")),
        (104, &[255], field("index of the copy")),
        (105, &[0], field("number of copies")),
        (105, &[2], field("number of copies")),
        (105, &[7], field("number of copies")),
        (106, &[5], field("index of the copy")),
        (106, &[15], field("copies that take part")),
        (107, &[0], field("extent shift")),
        (107, &[255], field("extent shift")),
        (108, &[3], field("block size")),
        (108, &[0], field("block size")),
        (109, &[0], field("number of replicas")),
        (109, &[17], field("number of replicas")),
        (110, &[0], field("vote threshold")),
        (110, &[4], field("vote threshold")),
        (111, &[2], field("read pattern")),
        (112, &[32], field("flags")),
        (112, &[5], field("history of epochs")),
        (124, &[1], field("reserved")),
        (128 + 16, &[1], field("slot of a member")),
        (128 + 17, &[6], field("state of a member")),
        (128 + 18, &[2], field("flags of a member")),
        (128 + 19, &[1], field("flags of a member")),
        (128 + 48, &[255; 4], field("fingerprint of a member")),
        (128 + 52, &[1], field("fingerprint of a member")),
        (history, &[0; ENTRY_BYTES], field("history of epochs")),
        (history + 24, &[4], field("history of epochs")),
        (history + 28, &[1], field("history of epochs")),
        (history + ENTRY_BYTES, &[6], field("history of epochs")),
        (history + ENTRY_BYTES, &[0], field("history of epochs")),
        (history + 15 * ENTRY_BYTES, &[1], field("history of epochs")),
        (1792, &[8], field("growth")),
        (1800, &[1], field("growth")),
        (1792, &[1, 0, 0, 0, 0, 0, 0, 0, 5], field("growth")),
        (1792, &[8, 0, 0, 0, 0, 0, 0, 0, 6], field("growth")),
        (1792, &[0, 0xe2, 4, 0, 0, 0, 0, 0, 5], field("growth")),
        (1808, &[1], field("reserved")),
        (4095, &[1], field("reserved")),
    ];
    for (at, bytes, expected) in cases {
        let mut superblock = documented_superblock();
        if *at == 107 {
            // With the smallest extents this disk would have too many of them.
            superblock.sectors = 40_000_000;
            superblock.extent_shift = 8;
        }
        let mut block = superblock.encode();
        block[*at..*at + bytes.len()].copy_from_slice(bytes);
        seal(&mut block, SUPERBLOCK_CRC_AT);
        assert_eq!(
            Superblock::decode(&block),
            Err(*expected),
            "{bytes:?} at {at}"
        );
    }
    assert_eq!(
        Superblock::decode(&[0; BLOCK_BYTES]),
        Err(FormatError::Blank)
    );
}

#[test]
fn unknown_hint_is_passed_over_with_what_it_uses() {
    let superblock = documented_superblock();
    let mut block = superblock.encode();
    (block[24], block[125], block[1808], block[4095]) = (1, 2, 3, 4);
    seal(&mut block, SUPERBLOCK_CRC_AT);
    assert_eq!(Superblock::decode(&block), Ok(superblock));
}

#[test]
fn pages_that_belong_elsewhere_are_refused() {
    let page = documented_page();
    let block = page.encode(DISK);
    let name = |bitmap, page| PageName { bitmap, page };
    let decode = |name, disk| PageImage::decode(&block, name, disk);
    assert_eq!(decode(name(b(1), 1), DISK), Err(FormatError::Misplaced));
    assert_eq!(decode(name(b(2), 0), DISK), Err(FormatError::Misplaced));
    let other = DiskUuid([8; 16]);
    assert_eq!(decode(page.name, other), Err(FormatError::OtherDisk));
    let cases: &[(usize, &[u8], FormatError)] = &[
        (0, &[0], FormatError::Magic),
        (6, &[1], FormatError::Field { field: "reserved" }),
        (20, &[0; 8], FormatError::Field { field: "sequence" }),
        (20, &[255; 8], FormatError::Field { field: "sequence" }),
    ];
    for (at, bytes, expected) in cases {
        let mut block = block;
        block[*at..*at + bytes.len()].copy_from_slice(bytes);
        seal(&mut block, PAGE_CRC_AT);
        assert_eq!(
            PageImage::decode(&block, page.name, DISK),
            Err(*expected),
            "{at}"
        );
    }
}

/// One byte of a block that is not zero is enough to notice: every change of a byte is.
#[test]
fn every_flipped_byte_of_a_block_is_noticed() {
    let superblock = documented_superblock().encode();
    let page = documented_page();
    let image = page.encode(DISK);
    for at in 0..BLOCK_BYTES {
        for flip in [1, 0x80, 0xFF] {
            let (mut one, mut other) = (superblock, image);
            one[at] ^= flip;
            other[at] ^= flip;
            assert!(Superblock::decode(&one).is_err(), "superblock byte {at}");
            assert!(
                PageImage::decode(&other, page.name, DISK).is_err(),
                "page byte {at}"
            );
        }
    }
}

#[test]
fn document_vectors_can_be_printed() {
    // For whoever changes the format: the text to put into the document.
    println!("{}", hex(&documented_superblock().encode()));
    println!(
        "{}",
        hex(&documented_page().encode(documented_superblock().disk))
    );
}
