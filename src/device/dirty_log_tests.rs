// SPDX-License-Identifier: Apache-2.0
use std::collections::BTreeSet;
use std::os::unix::fs::FileExt;

use rustix::event::{EventfdFlags, eventfd};
use vm_memory::{Bytes, GuestAddress, GuestRegionMmap};

use super::*;

/// Guest memory with a hole: pages 0 to 7 and 16 to 23.
fn memory() -> GuestMemory {
    GuestMemory::from_ranges(&[(GuestAddress(0), 0x8000), (GuestAddress(0x1_0000), 0x8000)])
        .unwrap()
}

fn log_file(bytes: u64) -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(bytes).unwrap();
    file
}

fn map(file: &File, size: u64, offset: u64) -> Result<DirtyLog, LogError> {
    DirtyLog::map(file.try_clone().unwrap().into(), size, offset)
}

/// Logging to `file`, as far as `size` bytes at `offset` reach.
fn logging(file: &File, size: u64, offset: u64) -> Logging {
    let logging = Logging::default();
    logging.set_log(map(file, size, offset).unwrap());
    assert!(logging.set_wanted(true));
    logging
}

/// The pages marked in the bytes of `file` from `offset` on.
fn pages(file: &File, offset: u64) -> BTreeSet<u64> {
    let mut bytes = vec![0; usize::try_from(file.metadata().unwrap().len() - offset).unwrap()];
    file.read_exact_at(&mut bytes, offset).unwrap();
    let bit = |page: &u64| bytes[usize::try_from(page / 8).unwrap()] >> (page % 8) & 1 == 1;
    (0..bytes.len() as u64 * 8).filter(bit).collect()
}

fn write(memory: &GuestMemory, at: u64, len: usize) {
    memory.write_slice(&vec![7; len], GuestAddress(at)).unwrap();
}

#[test]
fn writes_mark_exactly_their_pages() {
    for (at, len, expected) in [
        (0, 1, &[0][..]),
        (0xfff, 1, &[0]),
        (0xfff, 2, &[0, 1]),
        (0x1000, 0x1000, &[1]),
        (0x1001, 0x1000, &[1, 2]),
        (0x2000, 0x4001, &[2, 3, 4, 5, 6]),
        (0x7fff, 1, &[7]),
        (0x1_0000, 1, &[16]),
        (0x1_7000, 0x1000, &[23]),
        (0x3000, 0, &[]),
    ] {
        let (memory, file) = (memory(), log_file(4096));
        logging(&file, 3, 0).apply(&memory);
        write(&memory, at, len);
        let expected = expected.iter().copied().collect();
        assert_eq!(pages(&file, 0), expected, "{len} bytes at {at:#x}");
    }
}

#[test]
fn stores_are_marked_and_reads_are_not() {
    let (memory, file) = (memory(), log_file(4096));
    logging(&file, 3, 0).apply(&memory);
    memory
        .store(7u16, GuestAddress(0x5ffe), Ordering::Release)
        .unwrap();
    let mut bytes = [0; 8];
    memory.read_slice(&mut bytes, GuestAddress(0x1000)).unwrap();
    memory
        .load::<u16>(GuestAddress(0x2000), Ordering::Acquire)
        .unwrap();
    assert_eq!(pages(&file, 0), BTreeSet::from([5]));
    let region = memory.find_region(GuestAddress(0)).unwrap();
    let bitmap = GuestMemoryRegion::bitmap(region);
    assert!(bitmap.dirty_at(0x5000) && !bitmap.dirty_at(0x4fff));
}

#[test]
fn log_that_is_too_small_is_not_written_past_its_end() {
    let (memory, file) = (memory(), log_file(8192));
    let logging = logging(&file, 2, 4096);
    logging.apply(&memory);
    for page in (0..8).chain(16..24) {
        write(&memory, page * LOG_PAGE_BYTES, 4096);
    }
    write(&memory, 0x7000, 0x1000);
    assert_eq!(pages(&file, 4096), (0..8).collect(), "pages 16 and up");
    assert_eq!(pages(&file, 0), (0..8).map(|page| page + 0x8000).collect());
    assert!(!map(&file, 2, 0).unwrap().covers(0x1_8000));
    assert!(map(&file, 3, 0).unwrap().covers(0x1_8000));
    assert!(!map(&file, 3, 0).unwrap().covers(0x1_8001));
}

#[test]
fn nothing_is_marked_unless_it_is_wanted_and_there_is_a_log() {
    let (memory, file) = (memory(), log_file(4096));
    write(&memory, 0, 1);
    let logging = Logging::default();
    assert!(!logging.set_wanted(false), "no news");
    logging.apply(&memory);
    write(&memory, 0, 1);
    // Wanted, and no log.
    assert!(logging.set_wanted(true));
    logging.apply(&memory);
    write(&memory, 0, 1);
    // A log, and no longer wanted.
    logging.set_log(map(&file, 3, 0).unwrap());
    assert!(logging.set_wanted(false));
    logging.apply(&memory);
    write(&memory, 0, 1);
    assert_eq!(pages(&file, 0), BTreeSet::new());
    assert!(logging.set_wanted(true));
    logging.apply(&memory);
    write(&memory, 0x1000, 1);
    assert!(logging.set_wanted(false));
    logging.apply(&memory);
    write(&memory, 0x2000, 1);
    assert_eq!(pages(&file, 0), BTreeSet::from([1]));
}

#[test]
fn memory_that_comes_later_is_logged_and_the_old_one_still() {
    let (memory, file) = (memory(), log_file(4096));
    let logging = logging(&file, 16, 0);
    logging.apply(&memory);
    let region = GuestRegionMmap::from_range(GuestAddress(0x2_0000), 0x1000, None).unwrap();
    let grown = memory.insert_region(Arc::new(region)).unwrap();
    write(&grown, 0x2_0000, 1);
    assert_eq!(pages(&file, 0), BTreeSet::new());
    logging.apply(&grown);
    write(&grown, 0x2_0000, 1);
    write(&memory, 0, 1);
    assert_eq!(pages(&file, 0), BTreeSet::from([0, 32]));
}

#[test]
fn another_log_takes_over() {
    let (memory, first, second) = (memory(), log_file(4096), log_file(4096));
    let logging = logging(&first, 3, 0);
    logging.apply(&memory);
    write(&memory, 0, 1);
    logging.set_log(map(&second, 3, 0).unwrap());
    logging.apply(&memory);
    write(&memory, 0x1000, 1);
    assert_eq!(pages(&first, 0), BTreeSet::from([0]));
    assert_eq!(pages(&second, 0), BTreeSet::from([1]));
}

#[test]
fn marks_are_signalled_if_that_is_asked_for() {
    let (memory, file) = (memory(), log_file(4096));
    let logging = logging(&file, 3, 0);
    let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
    logging.set_call(Call::new(event.try_clone().unwrap().into()));
    logging.apply(&memory);
    let mut count = [0; 8];
    assert!(rustix::io::read(&event, &mut count).is_err(), "nothing yet");
    write(&memory, 0, 1);
    assert_eq!(rustix::io::read(&event, &mut count), Ok(8));
}

#[test]
fn logs_that_cannot_be_are_refused() {
    let file = log_file(8192);
    let refusal = |size, offset| map(&file, size, offset).unwrap_err();
    assert!(matches!(refusal(0, 0), LogError::Empty { .. }));
    assert!(matches!(refusal(u64::MAX, 4096), LogError::Empty { .. }));
    assert!(matches!(refusal(8, 8), LogError::Offset { offset: 8 }));
    assert!(matches!(
        refusal(8193, 0),
        LogError::Short { end: 8193, .. }
    ));
    assert!(matches!(refusal(4097, 4096), LogError::Short { .. }));
    assert!(matches!(refusal(1 << 60, 0), LogError::Short { .. }));
    let event = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    assert!(matches!(DirtyLog::map(event, 8, 0), Err(LogError::NoFile)));
    let read_only = File::open("/proc/self/exe").unwrap();
    let refused = DirtyLog::map(read_only.into(), 8, 0);
    assert!(matches!(refused, Err(LogError::Map(_))), "{refused:?}");
}
