// SPDX-License-Identifier: Apache-2.0
//! Damage and loss: cut after every sector, flip every byte, any subset of copies, forks, and
//! copies in the wrong place (rules R5, R9, S6; I13).

use super::support::*;
use crate::quorum::{PAGE_WORDS, PageName};
use crate::record::*;
use crate::units::SECTOR_LEN;

fn force() -> OpenOptions {
    OpenOptions {
        force: true,
        ..OpenOptions::default()
    }
}

/// A record of three copies with a few bits in it.
fn filled(copies: usize) -> Machine {
    let mut machine = Machine::create(copies, 100);
    machine.set(d(), 1);
    machine.set(b(1), 2);
    machine.set(d(), 3);
    machine
}

/// Every sector of every write that an update takes may be the last one that reached the medium,
/// in any order of the copies: what is opened then is the old state or the new one.
#[test]
fn cut_after_any_sector_leaves_the_old_or_the_new_state() {
    for copies in [1, 3] {
        let mut machine = filled(copies);
        for update in 0..6 {
            let before: Vec<u64> = machine.marks.iter(d()).collect();
            let epoch = machine.recorder.superblock().epoch();
            match update {
                0 | 3 => {
                    machine.marks.set(d(), 90 + update);
                }
                1 => {
                    machine.recorder.change(|s| s.threshold = 3);
                }
                2 => {
                    machine.marks.clear(d(), 1);
                    machine.marks.set(d(), 50);
                }
                _ => {
                    machine.recorder.change(|s| s.cold = !s.cold);
                }
            }
            machine.poll();
            let after: Vec<u64> = machine.marks.iter(d()).collect();
            let mut cuts = 0;
            while !machine.pending.is_empty() {
                let pending = machine.pending[0].clone();
                let file = usize::from(pending.copy);
                for sectors in 0..=BLOCK_BYTES / SECTOR_LEN {
                    let mut files = machine.files.clone();
                    put(
                        &mut files[file],
                        pending.block,
                        &pending.bytes[..sectors * SECTOR_LEN],
                    );
                    let opened = open_all(&files).expect("a cut is no reason to refuse");
                    assert_eq!(opened.pages_lost(), 0);
                    let found = set_bits(&opened, d());
                    let merged = before.iter().chain(&after);
                    let is_between = found
                        .iter()
                        .all(|extent| merged.clone().any(|e| e == extent))
                        && after
                            .iter()
                            .all(|e| found.contains(e) || !before.contains(e));
                    assert!(is_between, "update {update}: {found:?}");
                    assert_eq!(set_bits(&opened, b(1)), [2]);
                    assert!(opened.superblock.epoch() >= epoch);
                    cuts += 1;
                }
                machine.finish(0, None);
            }
            assert!(cuts >= 9 * copies, "an update writes to every copy");
            assert_eq!(set_bits(&open_all(&machine.files).unwrap(), d()), after);
        }
    }
}

/// The blocks of a copy that hold something.
fn used_blocks(file: &[u8]) -> Vec<usize> {
    let blocks = file.chunks(BLOCK_BYTES).enumerate();
    blocks
        .filter(|(_, block)| block.iter().any(|&byte| byte != 0))
        .map(|(index, _)| index)
        .collect()
}

/// With the other copies at hand no byte of one copy matters; alone, a damaged page is all set and
/// a damaged superblock leaves the one before.
#[test]
fn flip_of_any_byte_never_hides_a_bit() {
    for copies in [1, 3] {
        let machine = filled(copies);
        let blocks = used_blocks(&machine.files[0]);
        assert!(blocks.len() >= 6);
        // That every byte of a block counts is shown where blocks are read. Here: all of a page's
        // header, and a sample of the rest.
        let offsets = (0..32).chain((32..1792).step_by(11));
        let offsets = offsets.chain((1792..BLOCK_BYTES).step_by(331));
        let mut files = machine.files.clone();
        for block in blocks {
            for at in offsets.clone() {
                files[0].copy_from_slice(&machine.files[0]);
                files[0][block * BLOCK_BYTES + at] ^= 0x55;
                let opened = open_all(&files).expect("one byte is no reason to refuse");
                let what = || format!("{copies} copies, block {block}, byte {at}");
                let holds = |map, extent| set_bits(&opened, map).contains(&extent);
                if copies == 3 {
                    assert_eq!(set_bits(&opened, d()), [1, 3], "{}", what());
                    assert_eq!(set_bits(&opened, b(1)), [2], "{}", what());
                    assert_eq!(opened.superblock.epoch(), 2, "{}", what());
                } else if block < 2 {
                    assert!(
                        holds(d(), 1) && holds(d(), 3) && holds(b(1), 2),
                        "{}",
                        what()
                    );
                } else {
                    // Damage to the newer image of a lone copy cannot be told from a torn write.
                    assert!(holds(d(), 1) || block == 2 || block == 3, "{}", what());
                }
            }
        }
    }
}

#[test]
fn file_cut_at_any_block_opens_or_is_refused() {
    for copies in [1, 3] {
        let machine = filled(copies);
        for length in (0..machine.files[0].len()).step_by(BLOCK_BYTES / 2) {
            let mut files = machine.files.clone();
            files[0].truncate(length);
            match open_all(&files) {
                Ok(opened) => {
                    assert!(set_bits(&opened, d()).contains(&1), "{length}");
                    assert!(set_bits(&opened, b(1)).contains(&2), "{length}");
                }
                Err(refusal) => {
                    assert!(
                        copies == 1 && length < 2 * BLOCK_BYTES,
                        "{length}: {refusal}"
                    );
                    assert!(!refusal.to_string().is_empty());
                }
            }
        }
    }
}

#[test]
fn any_subset_of_copies_opens_if_and_only_if_it_is_a_majority() {
    for copies in [1, 3, 5_u32] {
        let machine = filled(usize::try_from(copies).unwrap());
        for present in 0..1 << copies {
            let opened = open_some(&machine.files, present, &OpenOptions::default());
            let count = u32::count_ones(present);
            match opened {
                Ok(opened) => {
                    assert!(count > copies / 2);
                    assert_eq!(set_bits(&opened, d()), [1, 3]);
                }
                Err(Refusal::NoRecord { .. }) => assert_eq!(count, 0),
                Err(Refusal::Minority {
                    readable, needed, ..
                }) => {
                    assert!(count <= copies / 2);
                    assert_eq!(u32::try_from(readable), Ok(count));
                    assert_eq!(u32::try_from(needed), Ok(copies / 2 + 1));
                }
                Err(other) => panic!("{other}"),
            }
            if count > 0 {
                let opened = open_some(&machine.files, present, &force()).unwrap();
                assert_eq!(set_bits(&opened, d()), [1, 3]);
            }
        }
    }
}

/// A page that too few copies have is lost as a whole: no bit is missing.
#[test]
fn page_lost_on_too_many_copies_is_all_set() {
    let machine = filled(3);
    let superblock = machine.recorder.superblock().clone();
    let name = crate::quorum::PageName {
        bitmap: d(),
        page: 0,
    };
    let mut files = machine.files.clone();
    for file in &mut files[..2] {
        for slot in Slot::BOTH {
            put(
                file,
                superblock.layout().block_of(name, slot),
                &[9; BLOCK_BYTES],
            );
        }
    }
    let opened = open_all(&files).unwrap();
    assert!(opened.notes.contains(&Note::PageLost(name)));
    assert_eq!(set_bits(&opened, d()).len(), 100);
    assert_eq!(set_bits(&opened, b(1)), [2]);
    // It is whole again on all copies afterwards.
    let mut machine = Machine::open(files, 2).unwrap();
    machine.poll();
    machine.run();
    let opened = open_all(&machine.files).unwrap();
    assert_eq!(opened.pages_lost(), 0);
    assert_eq!(set_bits(&opened, d()).len(), 100);
}

/// Two sides that each went on by force, and one that did not need it.
#[test]
fn fork_is_refused_whatever_side_is_larger() {
    let machine = filled(3);
    let apart = |present: u32, run: u8, starts: usize| {
        let mut files = machine.files.clone();
        for _ in 0..starts {
            let opened = open_some(&files, present, &force()).unwrap();
            let writable: Vec<bool> = (0..3).map(|place| present & (1 << place) != 0).collect();
            let mut side = Machine::from_opened(files, opened, &writable, run).unwrap();
            side.poll();
            side.run();
            assert!(!side.recorder.is_lost());
            files = side.files;
        }
        files
    };
    for starts in [1, 2, 5] {
        let lone = apart(1, 11, starts);
        let pair = apart(6, 22, 2);
        let files = vec![lone[0].clone(), pair[1].clone(), pair[2].clone()];
        let Err(Refusal::Fork { first, second, .. }) = open_all(&files) else {
            panic!("a fork after {starts} starts was not noticed");
        };
        assert_ne!(first, second);
        // Without the lone side the pair is as good as ever.
        let opened = open_some(&files, 6, &OpenOptions::default()).unwrap();
        assert!(!opened.superblock.forced);
        // Forced alone, it is not a fork: the others come back as stale copies.
        let files = vec![
            lone[0].clone(),
            machine.files[1].clone(),
            machine.files[2].clone(),
        ];
        let opened = open_all(&files).unwrap();
        assert!(opened.superblock.forced && opened.superblock.history.newest().forced);
        assert_eq!(opened.state(1), &CopyState::Stale);
        let mut machine = Machine::open(files, 33).unwrap();
        machine.poll();
        machine.run();
        assert!(!machine.recorder.superblock().forced);
        assert_eq!(machine.recorder.superblock().included, 7);
    }
}

#[test]
fn returning_copy_that_lived_apart_is_not_overwritten() {
    let mut machine = filled(3);
    let old = machine.files.clone();
    machine.marks.set(d(), 9);
    machine.poll();
    machine.finish(0, Some(5));
    machine.run();
    // Meanwhile somebody forced the copy open elsewhere.
    let opened = open_some(&old, 1, &force()).unwrap();
    let mut other = Machine::from_opened(old, opened, &[true, false, false], 44).unwrap();
    other.poll();
    other.run();
    machine.files[0] = other.files[0].clone();
    let refused = machine.readmit(0);
    assert!(matches!(
        refused,
        Err(RecorderError::Refused(Refusal::Fork { .. }))
    ));
    // Of another disk: no better.
    let mut foreign = machine.recorder.superblock().clone();
    foreign.disk = DiskUuid([9; 16]);
    put(&mut machine.files[0], 0, &foreign.encode());
    put(&mut machine.files[0], 1, &foreign.encode());
    let refused = machine.readmit(0);
    assert!(matches!(
        refused,
        Err(RecorderError::Refused(Refusal::Foreign { .. }))
    ));
}

#[test]
fn copies_in_the_wrong_place_are_refused_by_name() {
    let machine = filled(3);
    let good = &machine.files;
    let mut foreign = machine.recorder.superblock().clone();
    foreign.disk = DiskUuid([9; 16]);
    foreign.copy_index = 2;
    let mut files = good.clone();
    put(&mut files[2], 0, &foreign.encode());
    put(&mut files[2], 1, &foreign.encode());
    let refusal = open_all(&files).err().unwrap();
    assert!(
        refusal
            .to_string()
            .starts_with("copy2 is the state record of disk 0909"),
        "{refusal}"
    );

    let twice = vec![good[0].clone(), good[1].clone(), good[1].clone()];
    assert!(matches!(
        open_all(&twice),
        Err(Refusal::Twice { index: 1, .. })
    ));

    let few = vec![good[0].clone()];
    let expected = Refusal::Copies {
        recorded: 3,
        configured: 1,
    };
    assert_eq!(open_all(&few).err(), Some(expected));

    // In another order they are as good.
    let turned = vec![good[2].clone(), good[0].clone(), good[1].clone()];
    assert_eq!(set_bits(&open_all(&turned).unwrap(), d()), [1, 3]);

    let mut newer = good.clone();
    let block: &mut Block = (&mut newer[1][..BLOCK_BYTES]).try_into().unwrap();
    block[16] = 1;
    crate::record::fields::seal(block, crate::record::superblock::SUPERBLOCK_CRC_AT);
    assert!(matches!(open_all(&newer), Err(Refusal::Unsupported { .. })));
}

#[test]
fn configuration_that_contradicts_the_record_is_refused() {
    let machine = filled(3);
    let cases = [
        Expected {
            sectors: Some(808),
            ..Expected::default()
        },
        Expected {
            replicas: Some(4),
            ..Expected::default()
        },
        Expected {
            threshold: Some(1),
            ..Expected::default()
        },
    ];
    for expected in cases {
        let options = OpenOptions {
            expected,
            ..OpenOptions::default()
        };
        let opened = open_some(&machine.files, 7, &options);
        assert!(
            matches!(opened, Err(Refusal::Contradiction { .. })),
            "{expected:?}"
        );
    }
    let expected = Expected {
        disk: Some(DISK),
        sectors: Some(800),
        replicas: Some(3),
        threshold: Some(2),
    };
    let options = OpenOptions {
        expected,
        ..OpenOptions::default()
    };
    assert!(open_some(&machine.files, 7, &options).is_ok());
    let expected = Expected {
        disk: Some(DiskUuid([1; 16])),
        ..expected
    };
    let options = OpenOptions {
        expected,
        ..OpenOptions::default()
    };
    assert!(matches!(
        open_some(&machine.files, 7, &options),
        Err(Refusal::Foreign { .. })
    ));
}

#[test]
fn record_that_was_never_finished_says_so() {
    assert!(matches!(
        open_all(&files(3, 100)),
        Err(Refusal::NoRecord { .. })
    ));
    let mut machine = Machine::created(3, 100);
    machine.poll();
    while machine.pending.iter().all(|write| write.block >= 2) {
        machine.finish(0, None);
    }
    machine.finish(
        machine.pending.iter().position(|w| w.block < 2).unwrap(),
        None,
    );
    let refusal = open_all(&machine.files).err().unwrap();
    assert!(matches!(refusal, Refusal::Unfinished { .. }), "{refusal}");
}

#[test]
fn too_few_writable_copies_are_refused() {
    let machine = filled(3);
    let opened = open_all(&machine.files).unwrap();
    let refused = Recorder::new(opened, &[true, false, false], [2; 16]).err();
    let expected = RecorderError::TooFew {
        writable: 1,
        needed: 2,
    };
    assert_eq!(refused, Some(expected));
}

/// A copy that was on its way back has pages that are numbered ahead of those of the others and know
/// less. With a damaged superblock slot it may pass for one that took part.
#[test]
fn damaged_copy_on_its_way_back_takes_no_bit_away() {
    let mut machine = filled(3);
    // It fails and is left out; the next run takes it in, but its writes hang.
    let _ = machine.marks.ask(d(), 4);
    machine.poll();
    let failing = machine.pending.iter().position(|p| p.copy == 1).unwrap();
    machine.finish(failing, Some(5));
    machine.run();
    let mut machine = Machine::open(machine.files, 2).unwrap();
    machine.poll();
    machine.run_without(&[1]);
    assert_eq!(machine.recorder.superblock().included, 7);
    let mut files = machine.files;
    let name = PageName {
        bitmap: d(),
        page: 0,
    };
    let page = PageImage {
        name,
        sequence: 1000,
        bits: Box::new([0; PAGE_WORDS]),
    };
    put(&mut files[1], 2, &page.encode(DISK));
    let newest = [0, 1].map(|slot| {
        let block = &files[1][slot * BLOCK_BYTES..(slot + 1) * BLOCK_BYTES];
        Superblock::decode(block.try_into().unwrap()).map_or(0, |s| s.sequence)
    });
    let older = usize::from(newest[0] > newest[1]);
    files[1][older * BLOCK_BYTES..][..BLOCK_BYTES].fill(0xee);
    let opened = open_all(&files).unwrap();
    assert_eq!(opened.superblock.included, 7);
    assert_eq!(set_bits(&opened, d()), [1, 3, 4]);
}
