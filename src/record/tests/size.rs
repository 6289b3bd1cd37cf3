// SPDX-License-Identifier: Apache-2.0
//! The largest record that is spoken of: 16 TiB with five replicas.

use std::time::Instant;

use super::support::*;
use crate::quorum::{Geometry, Marks, PAGE_WORDS, ReadPattern};
use crate::record::*;

/// Prints how long the opening of a 16 TiB disk takes (target: 200 ms, optimised build) and checks
/// what it keeps in memory: the bits of the maps in use and a few words a page.
#[test]
fn large_record_opens_within_bounded_memory() {
    let geometry = Geometry::new(16 << 31, 8).unwrap();
    let superblock = Superblock::new(DISK, &geometry, 5, 3, ReadPattern::Quorum);
    assert!(superblock.extents() > 1 << 19);
    let layout = superblock.layout();
    for copies in [3_usize, 5] {
        let length = usize::try_from(layout.length_bytes()).unwrap();
        let opened = Opened::create(superblock.clone(), copies);
        let marks = Marks::new(5, superblock.extents(), true);
        for extent in (0..superblock.extents()).step_by(97) {
            marks.set(d(), extent);
            marks.set(b(4), extent);
        }
        let mut machine = Machine {
            files: vec![vec![0; length]; copies],
            marks,
            recorder: Recorder::new(opened, &vec![true; copies], [1; 16]).unwrap(),
            now: Default::default(),
            pending: Vec::new(),
            said: Vec::new(),
        };
        machine.poll();
        machine.run();
        let begin = Instant::now();
        let opened = open_all(&machine.files).unwrap();
        let marks = Marks::new(5, superblock.extents(), true);
        opened.load(&marks);
        let taken = begin.elapsed();
        eprintln!("16 TiB, 5 replicas, {copies} copies: opened and loaded in {taken:?}");
        assert_eq!(marks.count(d()), machine.marks.count(d()));
        assert!(opened.notes.is_empty());
        let pages = layout.pages() * 6;
        assert_eq!(opened.pages.count(), pages);
        let kept = pages * (PAGE_WORDS * 8 + 16 + copies * 2);
        assert!(kept < 1 << 20, "{kept} bytes");
    }
}
