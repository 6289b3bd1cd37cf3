// SPDX-License-Identifier: Apache-2.0
//! Buffers that a front-end may hand in, good and bad, each with what becomes of it.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use super::layout::{counter_at, mark_at, next_at};
use super::*;

const QUEUES: u16 = 4;
const SHAPE: Shape = Shape {
    queues: 2,
    queue_size: 8,
};
const PAGE_AT: usize = 4096;
const DISK: DiskIdentity = DiskIdentity {
    uuid: [7; 16],
    run: [2; 16],
    previous_run: [1; 16],
};

fn identity(previous_run: u8, run: u8) -> DiskIdentity {
    DiskIdentity {
        uuid: [7; 16],
        run: [run; 16],
        previous_run: [previous_run; 16],
    }
}

/// A new buffer of the disk, and its file to write to.
fn made() -> (Description, File) {
    let (description, file) = create(SHAPE, QUEUES, DISK).unwrap();
    (description, File::from(file))
}

fn open(file: &File, description: Description) -> Result<Arc<InflightBuffer>, InflightError> {
    let copy = OwnedFd::from(file.try_clone().unwrap());
    InflightBuffer::open(copy, description, QUEUES, DISK).map(Arc::new)
}

/// A region in which heads 2 and 5 are in flight, 5 was fetched first, and the used index 100 was
/// published up to there; in a buffer of the run before.
fn left_behind() -> (Description, File) {
    let (description, file) = made();
    let buffer = open(&file, description).unwrap();
    let (mut marks, again) = Marks::begin(buffer.region(0).unwrap(), 8, 98).unwrap();
    assert!(again.is_empty());
    for head in [0, 5, 1, 2] {
        assert!(marks.mark(head));
    }
    for head in [1, 0] {
        marks.complete(head);
        marks.link(head);
    }
    for head in [1, 0] {
        marks.clear(head);
    }
    marks.end_batch(100);
    buffer.stamp(identity(0, 1));
    (description, file)
}

fn begin(file: &File, description: Description, size: u16, used: u16) -> String {
    let buffer = match open(file, description) {
        Ok(buffer) => buffer,
        Err(error) => return format!("refused: {error}"),
    };
    let began = buffer.began(DISK).unwrap();
    match Marks::begin(buffer.region(0).unwrap(), size, used) {
        Ok((_, again)) => format!("{began:?} {again:?}"),
        Err(fault) => format!("{began:?} stopped: {fault}"),
    }
}

#[test]
fn buffers_end_as_the_table_says() {
    type Spoil = fn(&File, &mut Description);
    fn put(file: &File, at: usize, bytes: &[u8]) {
        file.write_all_at(bytes, at as u64).unwrap();
    }
    /// A file of this length that can be shortened.
    fn exchange(file: &File, len: u64) {
        // What the test hands in is the same file description, so it is the length that changes;
        // ours is sealed against that, which is a test of its own.
        assert!(file.set_len(len).is_err());
    }
    let cases: Vec<(&str, Spoil, &str)> = vec![
        ("as it was left", |_, _| {}, "Warm [5, 2]"),
        // The description.
        (
            "file shorter than described",
            |_, d| d.size += 1,
            "refused: an in-flight buffer of 8193 bytes at byte 0 does not fit in its file of 8192",
        ),
        (
            "offset beyond the file",
            |_, d| d.offset = 1 << 20,
            "refused: an in-flight buffer of 8192 bytes at byte 1048576 does not fit",
        ),
        (
            "offset and size overflow",
            |_, d| d.offset = u64::MAX - 4095,
            "refused: an in-flight buffer of 8192 bytes at byte 18446744073709547520 does not fit",
        ),
        (
            "offset inside a page",
            |_, d| d.offset = 64,
            "refused: an in-flight buffer at byte 64 of its file does not begin at a page",
        ),
        (
            "too short for its queues",
            |_, d| d.size = 100,
            "refused: an in-flight buffer of 100 bytes is too short",
        ),
        (
            "empty",
            |_, d| d.size = 0,
            "refused: an in-flight buffer of 0 bytes is too short",
        ),
        (
            "no queue",
            |_, d| d.shape.queues = 0,
            "refused: an in-flight buffer for 0 queues",
        ),
        (
            "more queues than the device has",
            |_, d| d.shape.queues = 5,
            "refused: an in-flight buffer for 5 queues",
        ),
        (
            "queue of no descriptors",
            |_, d| d.shape.queue_size = 0,
            "refused: an in-flight buffer for 2 queues of 0",
        ),
        (
            "queue too large",
            |_, d| d.shape.queue_size = 1025,
            "refused: an in-flight buffer for 2 queues of 1025",
        ),
        (
            "made for fewer queues",
            |_, d| d.shape.queues = 3,
            "refused: the front-end hands in an in-flight buffer for 3 queues of 8 that was made \
             for 2 of 8",
        ),
        (
            "made for larger queues",
            |_, d| d.shape.queue_size = 4,
            "refused: the front-end hands in an in-flight buffer for 2 queues of 4 that was made \
             for 2 of 8",
        ),
        (
            "exactly the regions, without our page",
            |_, d| d.size = SHAPE.regions_bytes() as u64,
            "Cold [5, 2]",
        ),
        // The private page.
        (
            "foreign private page",
            |f, _| put(f, PAGE_AT, &[0x5a; 64]),
            "Cold [5, 2]",
        ),
        (
            "private page of zeroes",
            |f, _| put(f, PAGE_AT, &[0; 64]),
            "Cold [5, 2]",
        ),
        (
            "page of another version",
            |f, _| put(f, PAGE_AT + 8, &[2]),
            "Cold [5, 2]",
        ),
        (
            "page with a damaged UUID",
            |f, _| put(f, PAGE_AT + 16, &[8]),
            "Cold [5, 2]",
        ),
        (
            "page with a damaged run",
            |f, _| put(f, PAGE_AT + 40, &[9]),
            "Cold [5, 2]",
        ),
        (
            "page with a torn checksum of the run",
            |f, _| put(f, PAGE_AT + 56, &[0; 2]),
            "Cold [5, 2]",
        ),
        // The header of the region.
        (
            "unknown features",
            |f, _| put(f, 0, &[1]),
            "Warm stopped: in-flight region: unknown features 0x1",
        ),
        (
            "no version, but marks",
            |f, _| put(f, 8, &[0, 0]),
            "Warm stopped: in-flight region: unknown version 0",
        ),
        (
            "unknown version",
            |f, _| put(f, 8, &[2, 0]),
            "Warm stopped: in-flight region: unknown version 2",
        ),
        (
            "fewer descriptors than the buffer is for",
            |f, _| put(f, 10, &[4, 0]),
            "Warm stopped: in-flight region: for 4 descriptors, in a buffer for 8",
        ),
        (
            "more descriptors than the buffer is for",
            |f, _| put(f, 10, &[255, 255]),
            "Warm stopped: in-flight region: for 65535 descriptors, in a buffer for 8",
        ),
        // The last batch.
        (
            "used index nine back",
            |f, _| put(f, 14, &[91, 0]),
            "Warm stopped: in-flight region: used index 91 is recorded, the driver sees 100",
        ),
        (
            "used index ahead of the driver's",
            |f, _| put(f, 14, &[101, 0]),
            "Warm stopped: in-flight region: used index 101 is recorded, the driver sees 100",
        ),
        (
            "last batch begins outside",
            |f, _| {
                put(f, 14, &[99, 0]);
                put(f, 12, &[8, 0]);
            },
            "Warm stopped: in-flight region: the list of the last batch goes to head 8 in a queue \
             of 8",
        ),
        (
            "list leads outside",
            |f, _| {
                put(f, 14, &[98, 0]);
                put(f, next_at(0), &[255, 255]);
            },
            "Warm stopped: in-flight region: the list of the last batch goes to head 65535",
        ),
        (
            "list is a circle of one",
            |f, _| {
                put(f, 14, &[98, 0]);
                put(f, next_at(0), &[0, 0]);
            },
            "Warm stopped: in-flight region: the list of the last batch comes to head 0 twice",
        ),
        (
            "list is a circle of two",
            |f, _| {
                put(f, 14, &[97, 0]);
                put(f, next_at(1), &[0, 0]);
            },
            "Warm stopped: in-flight region: the list of the last batch comes to head 0 twice",
        ),
        (
            "batch whose marks are cleared already",
            |f, _| put(f, 14, &[98, 0]),
            "Warm [5, 2]",
        ),
        (
            "batch whose last mark is not cleared",
            |f, _| {
                put(f, 14, &[98, 0]);
                put(f, mark_at(0), &[1]);
            },
            "Warm [5, 2]",
        ),
        (
            "list that takes what is in flight along",
            |f, _| {
                put(f, 14, &[99, 0]);
                put(f, 12, &[5, 0]);
            },
            "Warm [2]",
        ),
        // Marks.
        (
            "mark that is neither set nor clear",
            |f, _| put(f, mark_at(3), &[2]),
            "Warm stopped: in-flight region: the mark of head 3 is 2",
        ),
        (
            "all marks set, all counters equal",
            |f, _| {
                for head in 0..8 {
                    put(f, mark_at(head), &[1]);
                    put(f, counter_at(head), &[3, 0, 0, 0, 0, 0, 0, 0]);
                }
            },
            "Warm [0, 1, 2, 3, 4, 5, 6, 7]",
        ),
        (
            "counters equal",
            |f, _| put(f, counter_at(2), &1u64.to_ne_bytes()),
            "Warm [2, 5]",
        ),
        (
            "counter at its end",
            |f, _| put(f, counter_at(2), &[255; 8]),
            "Warm stopped: in-flight region: the counter of head 2 is 18446744073709551615",
        ),
        (
            "counter in the upper half",
            |f, _| put(f, counter_at(5), &(1u64 << 63).to_ne_bytes()),
            "Warm stopped: in-flight region: the counter of head 5 is 9223372036854775808",
        ),
        (
            "counter as high as can be",
            |f, _| put(f, counter_at(5), &((1u64 << 63) - 1).to_ne_bytes()),
            "Warm [2, 5]",
        ),
        (
            "counters of heads that are not marked are nothing",
            |f, _| put(f, counter_at(7), &[255; 8]),
            "Warm [5, 2]",
        ),
        (
            "sealed against shrinking",
            |f, _| exchange(f, 4096),
            "Warm [5, 2]",
        ),
    ];
    assert_eq!(SHAPE.regions_bytes(), 384);
    for (name, spoil, expected) in cases {
        let (mut description, file) = left_behind();
        spoil(&file, &mut description);
        let got = begin(&file, description, 8, 100);
        assert!(got.starts_with(expected), "{name}: {got}");
    }
}

#[test]
fn queue_of_another_size_stops_where_its_marks_do_not_fit() {
    let (description, file) = left_behind();
    // Head 5 is not in a queue of four; the region is not for one of sixteen.
    for (size, expected) in [
        (
            4,
            "Warm stopped: in-flight region: head 5 is marked in a queue of 4",
        ),
        (
            16,
            "Warm stopped: a queue of 16 has an in-flight region for 8 descriptors",
        ),
        (8, "Warm [5, 2]"),
    ] {
        assert_eq!(begin(&file, description, size, 100), expected);
    }
}

#[test]
fn file_that_is_none_is_refused() {
    let description = made().0;
    for path in ["/dev/zero", "/"] {
        let file = File::open(path).unwrap();
        let got = begin(&file, description, 8, 0);
        assert!(got.contains("no regular file"), "{got}");
    }
    let file = tempfile::tempfile().unwrap();
    let got = begin(&file, description, 8, 0);
    assert!(got.contains("does not fit in its file of 0"), "{got}");
}

#[test]
fn buffer_in_the_middle_of_a_file_is_taken() {
    let (mut description, made) = left_behind();
    let mut bytes = vec![0; usize::try_from(description.size).unwrap()];
    made.read_exact_at(&mut bytes, 0).unwrap();
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(&bytes, 8192).unwrap();
    description.offset = 8192;
    assert_eq!(begin(&file, description, 8, 100), "Warm [5, 2]");
}

#[test]
fn start_is_warm_only_with_the_buffer_of_the_last_run() {
    let none = DiskIdentity::NONE;
    let made_for = |disk: DiskIdentity| {
        let (description, file) = create(SHAPE, QUEUES, disk).unwrap();
        (description, File::from(file))
    };
    let reopen = |file: &File, description, disk| {
        let copy = OwnedFd::from(file.try_clone().unwrap());
        InflightBuffer::open(copy, description, QUEUES, disk)
    };
    // Made in run 1, used in it or not, brought back in a later one.
    for (stamped, next, expected) in [
        (None, identity(1, 2), Began::Cold),
        (Some(identity(0, 1)), identity(0, 1), Began::Warm),
        (Some(identity(0, 1)), identity(1, 2), Began::Warm),
        // Run 2 was served without it.
        (Some(identity(0, 1)), identity(2, 3), Began::Cold),
        (Some(none), identity(1, 2), Began::Cold),
        (Some(identity(0, 1)), none, Began::Cold),
        (Some(none), none, Began::Cold),
    ] {
        let maker = stamped.unwrap_or(identity(0, 1));
        let (description, file) = made_for(maker);
        if let Some(disk) = stamped {
            let buffer = reopen(&file, description, disk).unwrap();
            assert_eq!(buffer.began(disk).unwrap(), Began::Cold, "it is new");
            buffer.stamp(disk);
        }
        let buffer = reopen(&file, description, next).unwrap();
        assert_eq!(
            buffer.began(next).unwrap(),
            expected,
            "{stamped:?} {next:?}"
        );
    }
}

#[test]
fn buffer_of_another_disk_is_refused() {
    let (description, file) = left_behind();
    let other = DiskIdentity {
        uuid: [8; 16],
        ..DISK
    };
    let copy = OwnedFd::from(file.try_clone().unwrap());
    let refused = InflightBuffer::open(copy, description, QUEUES, other).unwrap_err();
    let text = refused.to_string();
    assert!(text.contains("on another disk (07070707"), "{text}");
    // A disk of which nothing was known when the buffer came.
    let copy = OwnedFd::from(file.try_clone().unwrap());
    let buffer = InflightBuffer::open(copy, description, QUEUES, DiskIdentity::NONE).unwrap();
    assert!(buffer.began(other).is_err());
    assert_eq!(buffer.began(DISK).unwrap(), Began::Warm);
}

#[test]
fn a_disk_that_is_opened_again_marks_the_buffer_again() {
    let (description, file) = left_behind();
    let buffer = open(&file, description).unwrap();
    for run in 2..5 {
        buffer.stamp(identity(run - 1, run));
        assert_eq!(buffer.began(identity(run, run + 1)).unwrap(), Began::Warm);
        assert_eq!(
            buffer.began(identity(run + 1, run + 2)).unwrap(),
            Began::Cold
        );
    }
}

#[test]
fn foreign_page_is_left_alone() {
    let (description, file) = left_behind();
    let at = PAGE_AT as u64;
    file.write_all_at(&[0x5a; 64], at).unwrap();
    open(&file, description).unwrap().stamp(DISK);
    let mut bytes = [0; 64];
    file.read_exact_at(&mut bytes, at).unwrap();
    assert_eq!(bytes, [0x5a; 64]);
}

#[test]
fn regions_do_not_touch_each_other() {
    let (description, file) = made();
    let buffer = open(&file, description).unwrap();
    assert!(buffer.region(2).is_none());
    let (mut first, _) = Marks::begin(buffer.region(0).unwrap(), 8, 0).unwrap();
    let (mut second, _) = Marks::begin(buffer.region(1).unwrap(), 8, 0).unwrap();
    for head in 0..8 {
        assert!(first.mark(head));
    }
    assert!(second.mark(3));
    let (_, again) = Marks::begin(buffer.region(1).unwrap(), 8, 0).unwrap();
    assert_eq!(again, [3]);
    let (_, again) = Marks::begin(buffer.region(0).unwrap(), 8, 0).unwrap();
    assert_eq!(again, [0, 1, 2, 3, 4, 5, 6, 7]);
}

#[test]
fn rested_buffer_without_marks_is_taken_at_any_used_index() {
    let (description, file) = made();
    for used in [0, 1, 500, 65_535, 3] {
        assert_eq!(begin(&file, description, 8, used), "Cold []");
    }
}
