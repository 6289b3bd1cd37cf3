// SPDX-License-Identifier: Apache-2.0
//! Entries for fuzzers. Not an interface of the library.
//!
//! The input spoils the copies of a good record: bytes, whole fields, blocks moved to other
//! places, files cut short; checksums are put right as the input says, so that what is behind them
//! is reached. Whatever comes of it is opened, served and opened again. Nothing may panic, and no
//! bit that was opened may be missing afterwards.

use super::fields::seal;
use super::history::{EpochEntry, EpochId, History};
use super::layout::{BLOCK_BYTES, Block, Layout, Slot};
use super::member::MemberState;
use super::opened::{CopyState, Opened};
use super::opening::{CopySource, Found, OpenOptions, open};
use super::page::{PAGE_CRC_AT, PageImage, decode_header};
use super::recorder::{RecordAction, RecordEvent, Recorder};
use super::superblock::{DiskUuid, SUPERBLOCK_CRC_AT, Superblock};
use crate::quorum::{Geometry, Marks, PAGE_WORDS, PageBits, ReadPattern};
use crate::units::Time;

const DISK: DiskUuid = DiskUuid([5; 16]);

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

    fn below(&mut self, limit: usize) -> usize {
        let value = u16::from_le_bytes([self.byte(), self.byte()]);
        usize::from(value) % limit.max(1)
    }
}

/// One superblock and one page, taken as they come and with their checksums put right.
fn decode_alone(data: &[u8]) {
    let mut block = [0; BLOCK_BYTES];
    let count = data.len().min(BLOCK_BYTES);
    block[..count].copy_from_slice(&data[..count]);
    let names: Vec<_> = Layout::new(1 << 20).names(16).collect();
    let name = names[usize::from(block[4]) * 33 % names.len()];
    let mut page = block;
    let _ = decode_header(&page, name, DISK);
    seal(&mut page, PAGE_CRC_AT);
    let _ = decode_header(&page, name, DISK);
    let _ = Superblock::decode(&block);
    seal(&mut block, SUPERBLOCK_CRC_AT);
    if let Ok(superblock) = Superblock::decode(&block) {
        superblock
            .check()
            .expect("what was read is within its bounds");
        assert!(superblock.layout().blocks() <= 1124);
        let again = Superblock::decode(&superblock.encode());
        assert_eq!(again.as_ref(), Ok(&superblock));
    }
}

/// The copies of a good record whose age the input chooses.
fn good_copies(input: &mut Input<'_>) -> Vec<Vec<u8>> {
    let copies = [1, 3, 3, 5][input.below(4)];
    let extents = [100, 40_000][input.below(2)];
    let geometry = Geometry::with_extent_shift(extents * 8, 8, 3).expect("a disk that can be");
    let mut superblock = Superblock::new(DISK, &geometry, 3, 2, ReadPattern::Quorum);
    superblock.copies = copies;
    superblock.included = (1 << copies) - 1;
    for member in &mut superblock.members[..3] {
        member.state = MemberState::InSync;
    }
    let layout = superblock.layout();
    let length = usize::try_from(layout.length_bytes()).expect("a small disk");
    let mut files = Vec::new();
    for index in 0..copies {
        let mut file = vec![0; length];
        superblock.copy_index = index;
        let epochs = 2 + u64::from(input.byte() % 4);
        let side = input.byte() % 16;
        superblock.history = History::new(entry(1, 0));
        for epoch in 2..=epochs {
            superblock.history.push(entry(epoch, side / 15));
        }
        for slot in Slot::BOTH {
            superblock.sequence = epochs * 2 + slot.index() as u64;
            write_block(
                &mut file,
                Layout::superblock_block(slot),
                &superblock.encode(),
            );
        }
        for name in layout.names(3) {
            let mut bits: Box<PageBits> = Box::new([0; PAGE_WORDS]);
            bits[usize::from(input.byte()) % PAGE_WORDS] = u64::from(input.byte());
            let sequence = 1 + u64::from(input.byte() % 4);
            let image = PageImage {
                name,
                sequence,
                bits,
            };
            let slot = Slot::BOTH[usize::from(side % 2)];
            write_block(&mut file, layout.block_of(name, slot), &image.encode(DISK));
        }
        files.push(file);
    }
    files
}

fn entry(epoch: u64, side: u8) -> EpochEntry {
    EpochEntry {
        epoch,
        id: EpochId([side; 16]),
        forced: false,
        begun: true,
    }
}

fn write_block(file: &mut [u8], block: u64, bytes: &[u8]) {
    let start = usize::try_from(block).expect("a small file") * BLOCK_BYTES;
    if let Some(place) = file.get_mut(start..start + BLOCK_BYTES) {
        place.copy_from_slice(bytes);
    }
}

/// Spoils something.
fn spoil(files: &mut [Vec<u8>], input: &mut Input<'_>) {
    let place = input.below(files.len());
    let file = &mut files[place];
    let blocks = file.len() / BLOCK_BYTES;
    // Mostly superblocks and the first pages.
    let block = input.below(blocks.min(24));
    let start = block * BLOCK_BYTES;
    let Some(bytes) = file.get_mut(start..start + BLOCK_BYTES) else {
        return;
    };
    let bytes: &mut Block = bytes.try_into().expect("as long as it was cut");
    let seal_it = match input.byte() % 8 {
        0 => {
            bytes[input.below(BLOCK_BYTES)] ^= input.byte();
            false
        }
        1..5 => {
            let limit = if block < 2 { 1800 } else { 40 };
            let at = input.below(limit);
            bytes[at] = input.byte();
            true
        }
        5 => {
            let at = input.below(1784);
            let value = [0, u64::MAX, 1 << 62, u64::MAX >> 1][input.below(4)];
            bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
            true
        }
        6 => {
            let other = input.below(blocks) * BLOCK_BYTES;
            file.copy_within(other..other + BLOCK_BYTES, start);
            return;
        }
        _ => {
            let length = input.below(file.len().min(200_000));
            file.truncate(length);
            return;
        }
    };
    if seal_it {
        let crc_at = if block < 2 {
            SUPERBLOCK_CRC_AT
        } else {
            PAGE_CRC_AT
        };
        seal(bytes, crc_at);
    }
}

fn open_copies(files: &[Vec<u8>], absent: usize, force: bool) -> Option<Opened> {
    let source = |(place, file)| CopySource {
        name: format!("copy {place}"),
        found: if place == absent {
            Found::Missing
        } else {
            Found::Present(file)
        },
    };
    let files = files.iter().map(Vec::as_slice).enumerate();
    let mut sources: Vec<CopySource<&[u8]>> = files.map(source).collect();
    let options = OpenOptions {
        force,
        ..OpenOptions::default()
    };
    match open(&mut sources, &options) {
        Ok(opened) => Some(opened),
        Err(refusal) => {
            assert!(!refusal.to_string().is_empty());
            None
        }
    }
}

/// Opens, begins an epoch, and opens again.
fn serve(files: &mut [Vec<u8>], opened: Opened, force: bool) {
    let superblock = opened.superblock.clone();
    let marks = Marks::new(superblock.slots(), superblock.extents(), true);
    opened.load(&marks);
    let length = usize::try_from(superblock.layout().length_bytes()).expect("a bounded file");
    for (place, file) in files.iter_mut().enumerate() {
        if *opened.state(place) == CopyState::Missing {
            file.clear();
        }
        file.resize(length, 0);
    }
    let writable = vec![true; files.len()];
    let Ok(mut recorder) = Recorder::new(opened, &writable, [9; 16]) else {
        return;
    };
    let mut actions = Vec::new();
    recorder.handle(Time::default(), RecordEvent::Poll, &marks, &mut actions);
    let mut answered = 0;
    while answered < actions.len() {
        if let RecordAction::Write {
            copy,
            write,
            block,
            bytes,
        } = actions[answered].clone()
        {
            write_block(&mut files[usize::from(copy)], block, &bytes[..]);
            let errno = None;
            let event = RecordEvent::Written { copy, write, errno };
            recorder.handle(Time::default(), event, &marks, &mut actions);
        }
        answered += 1;
    }
    assert!(recorder.is_idle() && !recorder.is_lost());
    let again = open_copies(files, usize::MAX, force).expect("what was written is opened");
    assert!(again.superblock.epoch() > superblock.epoch());
    let reread = Marks::new(superblock.slots(), superblock.extents(), true);
    again.load(&reread);
    for name in superblock.layout().names(superblock.slots()) {
        let (mut one, mut other) = ([0; PAGE_WORDS], [0; PAGE_WORDS]);
        marks.copy_page(name, &mut one);
        reread.copy_page(name, &mut other);
        assert_eq!(one, other, "{name:?}");
    }
}

/// Decoding and opening of whatever the copies hold.
pub fn fuzz_record(data: &[u8]) {
    decode_alone(data);
    let mut input = Input(data);
    let mut files = good_copies(&mut input);
    for _ in 0..input.below(8) {
        spoil(&mut files, &mut input);
    }
    let flags = input.byte();
    let absent = if flags & 2 == 0 {
        usize::MAX
    } else {
        usize::from(flags >> 4)
    };
    let force = flags & 1 != 0;
    if let Some(opened) = open_copies(&files, absent, force) {
        serve(&mut files, opened, force);
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn any_input_is_survived() {
        let mut seed = 1_u64;
        for length in (0..1200).step_by(7) {
            let mut data = Vec::new();
            for _ in 0..length {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                data.extend(seed.to_le_bytes().last());
            }
            super::fuzz_record(&data);
        }
    }
}
