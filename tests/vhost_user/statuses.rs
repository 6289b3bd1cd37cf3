// SPDX-License-Identifier: Apache-2.0
//! The exact status of every request that cannot be done, and that nothing was done.

use quorum_blk::front_end::{FrontEnd, Options, Request, Segment, Status};

use crate::common::{Disk, SECTOR, Setup};

/// Sectors of the disk.
const SECTORS: u64 = (8 << 20) / 512;

fn start() -> (Disk, FrontEnd, Vec<u8>) {
    let disk = Setup::new().start();
    let mut front_end = disk.connect(&Options::default());
    let content = vec![0x77; 8 << 20];
    front_end.queue(0).write_data(0, &content).expect("a write");
    (disk, front_end, content)
}

#[track_caller]
fn expect(front_end: &mut FrontEnd, request: &Request, status: Status) {
    let completion = front_end.queue(0).run(request).expect("an end");
    assert_eq!(completion.status, status, "{request:?}");
}

#[test]
fn transfers_outside_the_disk_fail_and_change_nothing() {
    let (mut disk, mut front_end, content) = start();
    let places = [
        (SECTORS, SECTOR),
        (SECTORS - 1, 2 * SECTOR),
        (SECTORS - 100, 101 * SECTOR),
        (SECTORS + 1, SECTOR),
        (1 << 55, SECTOR),
        (u64::MAX, SECTOR),
        (u64::MAX - 7, 8 * SECTOR),
        (0, (8 << 20) + SECTOR),
    ];
    for (sector, len) in places {
        let data = vec![1; len];
        expect(
            &mut front_end,
            &Request::Read { sector, len },
            Status::IoError,
        );
        expect(
            &mut front_end,
            &Request::Write {
                sector,
                data: &data,
            },
            Status::IoError,
        );
    }
    drop(front_end);
    disk.stop_and_expect(&content);
    disk.assert_nothing_reported();
}

#[test]
fn odd_lengths_fail_and_change_nothing() {
    let (mut disk, mut front_end, content) = start();
    for len in [1, 511, 513, 1000, 4097] {
        let data = vec![1; len];
        expect(
            &mut front_end,
            &Request::Read { sector: 5, len },
            Status::IoError,
        );
        let write = Request::Write {
            sector: 5,
            data: &data,
        };
        expect(&mut front_end, &write, Status::IoError);
    }
    drop(front_end);
    disk.stop_and_expect(&content);
}

#[test]
fn bad_zeroing_has_the_statuses_of_the_specification() {
    let (mut disk, mut front_end, content) = start();
    let config = front_end.config().expect("a configuration space");
    type Make = for<'a> fn(&'a [Segment]) -> Request<'a>;
    let kinds: [(Make, u32, u32); 2] = [
        (
            |list| Request::Discard(list),
            config.max_discard_seg,
            config.max_discard_sectors,
        ),
        (
            |list| Request::WriteZeroes(list),
            config.max_write_zeroes_seg,
            config.max_write_zeroes_sectors,
        ),
    ];
    for (make, segments_max, sectors_max) in kinds {
        let one = Segment::new(0, 8);
        let too_many = vec![one; segments_max as usize + 1];
        expect(&mut front_end, &make(&too_many), Status::Unsupported);
        if let Some(too_long) = sectors_max.checked_add(1) {
            let request = [Segment::new(0, too_long)];
            expect(&mut front_end, &make(&request), Status::IoError);
        }
        let outside = [
            Segment::new(SECTORS - 7, 8),
            Segment::new(SECTORS + 1, 1),
            Segment::new(u64::MAX, 1),
            Segment::new(u64::MAX - 3, 8),
        ];
        for segment in outside {
            expect(&mut front_end, &make(&[segment]), Status::IoError);
            // No part of a request takes effect before all of it was checked.
            expect(&mut front_end, &make(&[one, segment]), Status::IoError);
        }
        for flags in [2, 0x8000_0000, u32::MAX] {
            let reserved = [Segment { flags, ..one }];
            expect(&mut front_end, &make(&reserved), Status::Unsupported);
        }
    }
    let unmap = [Segment {
        flags: 1,
        ..Segment::new(0, 8)
    }];
    expect(
        &mut front_end,
        &Request::Discard(&unmap),
        Status::Unsupported,
    );
    drop(front_end);
    disk.stop_and_expect(&content);
    disk.assert_nothing_reported();
}

#[test]
fn ragged_segments_fail_and_change_nothing() {
    let (mut disk, mut front_end, content) = start();
    for kind in [11, 13] {
        for len in [0, 1, 15, 17, 31] {
            let out = vec![0; len];
            let request = Request::Raw {
                kind,
                sector: 0,
                out: &out,
                in_len: 0,
            };
            let completion = front_end.queue(0).run(&request).expect("an end");
            assert_ne!(completion.status, Status::Ok, "type {kind}, {len} bytes");
        }
    }
    drop(front_end);
    disk.stop_and_expect(&content);
}

#[test]
fn unknown_types_are_unsupported() {
    let (mut disk, mut front_end, content) = start();
    // SCSI command, secure erase, a zoned type, the legacy barrier bit, nonsense.
    for kind in [2, 3, 14, 15, 99, 0x8000_0000, u32::MAX] {
        for (out, in_len) in [(&[][..], 0), (&[0; 64][..], 0), (&[][..], 64)] {
            let request = Request::Raw {
                kind,
                sector: 0,
                out,
                in_len,
            };
            expect(&mut front_end, &request, Status::Unsupported);
        }
    }
    drop(front_end);
    disk.stop_and_expect(&content);
}

#[test]
fn get_id_writes_at_most_twenty_bytes() {
    let disk = Setup::new()
        .arguments(&["--serial", "abcdefghijklmnopqrst"])
        .start();
    let mut front_end = disk.connect(&Options::default());
    let request = Request::Raw {
        kind: 8,
        sector: 0,
        out: &[],
        in_len: 64,
    };
    let completion = front_end.queue(0).run(&request).expect("an end");
    assert_eq!(completion.status, Status::Ok);
    assert_eq!(completion.data[..20], *b"abcdefghijklmnopqrst");
    assert_eq!(completion.data[20..], [Status::UNTOUCHED; 44]);
}

#[test]
fn used_lengths_count_what_was_written() {
    let (_disk, mut front_end, _) = start();
    let queue = front_end.queue(0);
    let data = [5; 2 * SECTOR];
    let write = queue.run(&Request::Write {
        sector: 1,
        data: &data,
    });
    assert_eq!(write.expect("an end").used_bytes, 1);
    let read = queue.run(&Request::Read {
        sector: 1,
        len: 2 * SECTOR,
    });
    assert_eq!(read.expect("an end").used_bytes, 2 * 512 + 1);
    assert_eq!(queue.run(&Request::Flush).expect("an end").used_bytes, 1);
}
