// SPDX-License-Identifier: Apache-2.0
//! The same images, faults and requests through QEMU's quorum driver and through the daemon.
//!
//! One front-end drives both over a vhost-user socket. Every reply and every image afterwards is
//! compared; whatever is not the same must stand, with its reason, in the table of `differences`,
//! and whatever stands there must still be so. Needs `qemu-storage-daemon`
//! (`scripts/install-test-deps`), and root for loop devices and a small tmpfs.
//!
//! - `case`: what is set up and done, and how it is run on one side.
//! - `server`: the two sides.
//! - `image`: contents that can be recognised, and the places that hold them.
//! - `differences`: the table.

mod case;
mod differences;
mod image;
mod server;

use case::{Case, Step};
use image::Kind;

/// Sectors of a request in most cases: 4 KiB.
const COUNT: u32 = 8;

#[test]
fn replicas_hold_what_was_written_read_and_flushed() {
    Case::new("healthy", 3, 2)
        .step(Step::Read {
            sector: 0,
            count: COUNT,
        })
        .step(Step::Write {
            sector: 3,
            count: 1,
            version: 1,
        })
        .step(Step::Write {
            sector: 16,
            count: 256,
            version: 2,
        })
        .step(Step::Read {
            sector: 0,
            count: 64,
        })
        .step(Step::Flush)
        .step(Step::Write {
            sector: 100,
            count: 3,
            version: 3,
        })
        .step(Step::Read {
            sector: 96,
            count: 16,
        })
        .check();
}

#[test]
fn zeroes_and_discard() {
    Case::new("zeroes", 3, 2)
        .step(Step::WriteZeroes {
            sector: 8,
            count: 24,
            unmap: false,
        })
        .step(Step::WriteZeroes {
            sector: 65,
            count: 5,
            unmap: false,
        })
        .step(Step::WriteZeroes {
            sector: 128,
            count: 64,
            unmap: true,
        })
        .step(Step::Read {
            sector: 0,
            count: 256,
        })
        .step(Step::Discard {
            sector: 256,
            count: 128,
        })
        .step(Step::Read {
            sector: 248,
            count: 160,
        })
        .check();
}

#[test]
fn requests_that_cannot_be_done() {
    Case::new("refusals", 3, 2)
        .step(Step::Read {
            sector: image::SECTORS - 4,
            count: COUNT,
        })
        .step(Step::Write {
            sector: image::SECTORS,
            count: 1,
            version: 1,
        })
        .step(Step::Discard {
            sector: image::SECTORS - 1,
            count: 2,
        })
        .step(Step::WriteZeroesFlags {
            sector: 0,
            count: 1,
            flags: 2,
        })
        .step(Step::DiscardFlags {
            sector: 0,
            count: 1,
            flags: 1,
        })
        .step(Step::Raw { kind: 77 })
        .step(Step::GetId)
        .check();
}

#[test]
fn one_wrong_replica_is_outvoted_and_rewritten() {
    Case::new("one wrong", 3, 2)
        .repair(true)
        .step(Step::Spoil {
            replica: 1,
            sector: 2,
            count: 1,
            version: 7,
        })
        .step(Step::Read {
            sector: 0,
            count: COUNT,
        })
        .settled()
        .check();
}

#[test]
fn one_wrong_replica_is_outvoted_and_left_alone() {
    Case::new("one wrong, no repair", 3, 2)
        .repair(false)
        .step(Step::Spoil {
            replica: 0,
            sector: 2,
            count: 3,
            version: 7,
        })
        .step(Step::Read {
            sector: 0,
            count: COUNT,
        })
        .step(Step::Read {
            sector: 0,
            count: COUNT,
        })
        .settled()
        .check();
}

#[test]
fn first_replica_wrong_in_a_long_request() {
    Case::new("long request", 3, 2)
        .repair(true)
        .step(Step::Spoil {
            replica: 0,
            sector: 40,
            count: 1,
            version: 7,
        })
        .step(Step::Spoil {
            replica: 0,
            sector: 1000,
            count: 10,
            version: 8,
        })
        .step(Step::Read {
            sector: 0,
            count: 1024,
        })
        .settled()
        // A late vote is not counted if something was written near it meanwhile (V7): here
        // the repair of the other half may hide the first half's.
        .step(Step::Read {
            sector: 0,
            count: 1024,
        })
        .settled()
        .check();
}

#[test]
fn two_replicas_wrong_in_different_sectors_of_a_request() {
    Case::new("two wrong, different sectors", 3, 2)
        .repair(true)
        .step(Step::Spoil {
            replica: 0,
            sector: 1,
            count: 1,
            version: 7,
        })
        .step(Step::Spoil {
            replica: 2,
            sector: 5,
            count: 1,
            version: 8,
        })
        .step(Step::Read {
            sector: 0,
            count: COUNT,
        })
        .settled()
        .check();
}

#[test]
fn three_replicas_wrong_in_different_sectors_of_a_request() {
    Case::new("three wrong, different sectors", 3, 2)
        .repair(true)
        .step(Step::Spoil {
            replica: 0,
            sector: 1,
            count: 1,
            version: 7,
        })
        .step(Step::Spoil {
            replica: 1,
            sector: 3,
            count: 1,
            version: 8,
        })
        .step(Step::Spoil {
            replica: 2,
            sector: 5,
            count: 1,
            version: 9,
        })
        .step(Step::Read {
            sector: 0,
            count: COUNT,
        })
        .settled()
        .check();
}

#[test]
fn two_replicas_wrong_in_the_same_sector() {
    Case::new("two wrong, same sector", 3, 2)
        .repair(true)
        .step(Step::Spoil {
            replica: 0,
            sector: 4,
            count: 1,
            version: 7,
        })
        .step(Step::Spoil {
            replica: 1,
            sector: 4,
            count: 1,
            version: 8,
        })
        .step(Step::Read {
            sector: 0,
            count: COUNT,
        })
        .step(Step::Read {
            sector: 0,
            count: 4,
        })
        .step(Step::Write {
            sector: 4,
            count: 1,
            version: 2,
        })
        .step(Step::Read {
            sector: 0,
            count: COUNT,
        })
        .settled()
        .check();
}

#[test]
fn two_replicas_wrong_alike_win() {
    Case::new("two wrong alike", 3, 2)
        .repair(true)
        .step(Step::Spoil {
            replica: 0,
            sector: 4,
            count: 1,
            version: 7,
        })
        .step(Step::Spoil {
            replica: 1,
            sector: 4,
            count: 1,
            version: 7,
        })
        .step(Step::Read {
            sector: 0,
            count: COUNT,
        })
        .settled()
        .check();
}

#[test]
fn all_must_agree_if_the_threshold_is_their_number() {
    Case::new("threshold 3 of 3", 3, 3)
        .step(Step::Spoil {
            replica: 1,
            sector: 2,
            count: 1,
            version: 7,
        })
        .step(Step::Read {
            sector: 0,
            count: COUNT,
        })
        .step(Step::Read {
            sector: 8,
            count: COUNT,
        })
        .settled()
        .check();
}

#[test]
fn two_replicas_that_differ_cannot_be_arbitrated() {
    Case::new("two replicas", 2, 2)
        .step(Step::Spoil {
            replica: 1,
            sector: 2,
            count: 1,
            version: 7,
        })
        .step(Step::Read {
            sector: 0,
            count: COUNT,
        })
        .step(Step::Read {
            sector: 8,
            count: COUNT,
        })
        .settled()
        .check();
}

#[test]
fn five_replicas_two_wrong() {
    Case::new("two wrong of five", 5, 3)
        .repair(true)
        .step(Step::Spoil {
            replica: 1,
            sector: 2,
            count: 1,
            version: 7,
        })
        .step(Step::Spoil {
            replica: 4,
            sector: 2,
            count: 1,
            version: 8,
        })
        .step(Step::Read {
            sector: 0,
            count: COUNT,
        })
        .settled()
        .check();
}

#[test]
fn tie_below_a_majority() {
    Case::new("tie", 4, 2)
        .minority()
        .step(Step::Spoil {
            replica: 2,
            sector: 2,
            count: 1,
            version: 7,
        })
        .step(Step::Spoil {
            replica: 3,
            sector: 2,
            count: 1,
            version: 7,
        })
        .step(Step::Read {
            sector: 0,
            count: COUNT,
        })
        .settled()
        .check();
}

#[test]
fn minority_threshold_must_be_allowed() {
    Case::new("minority threshold", 4, 2)
        .step(Step::Read {
            sector: 0,
            count: COUNT,
        })
        .check();
}

#[test]
fn fifo_asks_the_first_replica_and_compares_nothing() {
    Case::new("fifo", 3, 2)
        .fifo()
        .step(Step::Spoil {
            replica: 0,
            sector: 2,
            count: 1,
            version: 7,
        })
        .step(Step::Spoil {
            replica: 1,
            sector: 3,
            count: 1,
            version: 8,
        })
        .step(Step::Read {
            sector: 0,
            count: COUNT,
        })
        .settled()
        .check();
}

#[test]
fn fifo_asks_the_next_replica_after_an_error() {
    Case::new("fifo, read error", 3, 2)
        .fifo()
        .kind(0, Kind::Loop)
        .step(Step::Truncate {
            replica: 0,
            sectors: 64,
        })
        .step(Step::Read {
            sector: 128,
            count: COUNT,
        })
        .step(Step::Read {
            sector: 0,
            count: COUNT,
        })
        .settled()
        .check();
}

#[test]
fn read_error_of_one_replica() {
    Case::new("read error", 3, 2)
        .repair(true)
        .kind(1, Kind::Loop)
        .step(Step::Truncate {
            replica: 1,
            sectors: 64,
        })
        .step(Step::Read {
            sector: 128,
            count: COUNT,
        })
        .settled()
        .check();
}

#[test]
fn read_error_of_one_replica_without_repair() {
    Case::new("read error, no repair", 3, 2)
        .repair(false)
        .kind(1, Kind::Loop)
        .step(Step::Truncate {
            replica: 1,
            sectors: 64,
        })
        .step(Step::Read {
            sector: 128,
            count: COUNT,
        })
        .settled()
        .check();
}

#[test]
fn read_error_of_two_replicas() {
    Case::new("two read errors", 3, 2)
        .repair(true)
        .kind(1, Kind::Loop)
        .kind(2, Kind::Loop)
        .step(Step::Truncate {
            replica: 1,
            sectors: 64,
        })
        .step(Step::Truncate {
            replica: 2,
            sectors: 64,
        })
        .step(Step::Read {
            sector: 128,
            count: COUNT,
        })
        .step(Step::Read {
            sector: 0,
            count: COUNT,
        })
        .settled()
        .check();
}

#[test]
fn truncated_image() {
    Case::new("truncated", 3, 2)
        .repair(false)
        .step(Step::Truncate {
            replica: 1,
            sectors: 64,
        })
        .step(Step::Read {
            sector: 128,
            count: COUNT,
        })
        .settled()
        .check();
}

#[test]
fn two_truncated_images_do_not_win_with_zeroes() {
    Case::new("two truncated", 3, 2)
        .repair(true)
        .step(Step::Truncate {
            replica: 1,
            sectors: 64,
        })
        .step(Step::Truncate {
            replica: 2,
            sectors: 64,
        })
        .step(Step::Read {
            sector: 128,
            count: COUNT,
        })
        .settled()
        .check();
}

#[test]
fn write_error_of_one_replica() {
    Case::new("write error", 3, 2)
        .repair(true)
        .kind(2, Kind::Full)
        .step(Step::Write {
            sector: 0,
            count: COUNT,
            version: 1,
        })
        .step(Step::Read {
            sector: 0,
            count: COUNT,
        })
        .check();
}

#[test]
fn write_error_of_two_replicas() {
    Case::new("two write errors", 3, 2)
        .repair(true)
        .kind(1, Kind::Full)
        .kind(2, Kind::Full)
        .step(Step::Write {
            sector: 0,
            count: COUNT,
            version: 1,
        })
        .check();
}

#[test]
fn replicas_that_missed_a_write_do_not_win() {
    Case::new("stale majority", 3, 1)
        .minority()
        .repair(false)
        .kind(1, Kind::Full)
        .kind(2, Kind::Full)
        .step(Step::Write {
            sector: 0,
            count: COUNT,
            version: 1,
        })
        .step(Step::Read {
            sector: 0,
            count: COUNT,
        })
        .check();
}

#[test]
fn read_only_disk_is_not_written() {
    Case::new("read only", 3, 2)
        .read_only()
        .step(Step::Write {
            sector: 0,
            count: COUNT,
            version: 1,
        })
        .step(Step::Read {
            sector: 0,
            count: COUNT,
        })
        .check();
}

#[test]
fn verification_of_equal_replicas() {
    Case::new("blkverify, equal", 2, 2)
        .blkverify()
        .step(Step::Write {
            sector: 0,
            count: COUNT,
            version: 1,
        })
        .step(Step::Read {
            sector: 0,
            count: 64,
        })
        .check();
}

#[test]
fn verification_stops_at_a_difference() {
    Case::new("blkverify, different", 2, 2)
        .blkverify()
        .step(Step::Spoil {
            replica: 1,
            sector: 2,
            count: 1,
            version: 7,
        })
        .step(Step::Read {
            sector: 0,
            count: COUNT,
        })
        .check();
}

#[test]
fn replicas_of_unequal_length() {
    Case::new("one longer", 3, 2)
        .longer(2)
        .step(Step::Read {
            sector: 0,
            count: COUNT,
        })
        .check();
}
