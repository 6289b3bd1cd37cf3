// SPDX-License-Identifier: Apache-2.0
use std::os::unix::fs::{FileExt, MetadataExt};

use super::*;
use crate::record::{BLOCK_BYTES, ReadBlock};

const LENGTH: u64 = 36 * 4096;
const NOW: Access = Access::Own(Duration::ZERO);

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn places(&self, copies: &[&str], elsewhere: &[&str]) -> RecordPlaces {
        let paths = |names: &[&str]| names.iter().map(|name| self.path(name)).collect();
        RecordPlaces {
            copies: paths(copies),
            elsewhere: paths(elsewhere),
        }
    }
}

#[test]
fn copies_are_created_whole_and_found_again() {
    let folder = Folder::new();
    let places = folder.places(&["a", "b", "c"], &[]);
    let mut files = RecordFiles::open(&places, NOW).unwrap();
    assert!(files.is_absent());
    for copy in [0, 2] {
        files.create(copy, LENGTH).unwrap();
    }
    for name in ["a", "c"] {
        let metadata = fs::metadata(folder.path(name)).unwrap();
        assert_eq!(metadata.len(), LENGTH);
        assert!(metadata.blocks() * 512 >= LENGTH, "all of it is allocated");
        assert_eq!(metadata.mode() & 0o777, 0o600);
    }
    let block = [7; BLOCK_BYTES];
    let file = files.files()[2].file().unwrap();
    file.write_all_at(&block, 4096).unwrap();
    drop(files);
    let files = RecordFiles::open(&places, NOW).unwrap();
    assert!(!files.is_absent());
    let mut sources = files.sources();
    assert!(matches!(sources[1].found, Found::Missing));
    let Found::Present(reader) = &mut sources[2].found else {
        panic!("the copy is not found")
    };
    let mut read = [0; BLOCK_BYTES];
    assert_eq!(reader.read_block(1, &mut read), Ok(()));
    assert_eq!(read, block);
    assert_eq!(reader.read_block(36, &mut read), Err(libc::EIO));
    assert_eq!(reader.read_block(u64::MAX, &mut read), Err(libc::EIO));
}

#[test]
fn copy_that_is_created_again_forgets_what_was_in_it() {
    let folder = Folder::new();
    fs::write(folder.path("a"), vec![9; 100_000]).unwrap();
    let mut files = RecordFiles::open(&folder.places(&["a"], &[]), NOW).unwrap();
    files.create(0, 8192).unwrap();
    assert_eq!(fs::read(folder.path("a")).unwrap(), vec![0; 8192]);
}

#[test]
fn copy_is_made_longer_and_keeps_what_is_in_it() {
    let folder = Folder::new();
    let places = folder.places(&["a", "b"], &[]);
    let mut files = RecordFiles::open(&places, NOW).unwrap();
    files.create(0, LENGTH).unwrap();
    let block = [7; BLOCK_BYTES];
    let last = LENGTH - 4096;
    files.files()[0]
        .file()
        .unwrap()
        .write_all_at(&block, last)
        .unwrap();
    // A lengthening that was cut short inside a block.
    files.files()[0]
        .file()
        .unwrap()
        .set_len(LENGTH + 100)
        .unwrap();
    files.read_again(Duration::from_secs(10));
    files.lengthen(0, 2 * LENGTH).unwrap();
    files.lengthen(1, 2 * LENGTH).unwrap();
    let metadata = fs::metadata(folder.path("a")).unwrap();
    assert_eq!(metadata.len(), 2 * LENGTH);
    assert!(
        metadata.blocks() * 512 >= 2 * LENGTH,
        "all of it is allocated"
    );
    assert_eq!(files.files()[0].length_bytes(), Some(2 * LENGTH));
    let bytes = fs::read(folder.path("a")).unwrap();
    let (old, new) = bytes.split_at(usize::try_from(LENGTH).unwrap());
    assert!(old.ends_with(&block) && new.iter().all(|&byte| byte == 0));
    assert!(!folder.path("b").exists(), "what is missing stays so");
    files.lengthen(0, LENGTH).unwrap();
    assert_eq!(files.files()[0].length_bytes(), Some(2 * LENGTH));
}

#[test]
fn copy_that_somebody_made_meanwhile_is_left_alone() {
    let folder = Folder::new();
    let places = folder.places(&["a"], &[]);
    let mut late = RecordFiles::open(&places, NOW).unwrap();
    fs::write(folder.path("a"), b"record").unwrap();
    let refused = late.create(0, LENGTH).unwrap_err();
    assert!(matches!(refused, RecordFileError::Appeared { .. }));
    assert!(late.remove().unwrap().is_empty());
    assert_eq!(fs::read(folder.path("a")).unwrap(), b"record");
}

#[test]
fn empty_file_holds_no_copy() {
    let folder = Folder::new();
    fs::write(folder.path("a"), b"").unwrap();
    let mut files = RecordFiles::open(&folder.places(&["a"], &[]), NOW).unwrap();
    assert!(matches!(files.sources()[0].found, Found::Missing));
    files.create(0, 8192).unwrap();
    assert!(matches!(files.sources()[0].found, Found::Present(_)));
}

#[test]
fn copies_are_locked_until_dropped_and_can_be_looked_at_meanwhile() {
    let folder = Folder::new();
    let places = folder.places(&["a"], &[]);
    let mut files = RecordFiles::open(&places, NOW).unwrap();
    files.create(0, LENGTH).unwrap();
    let refused = RecordFiles::open(&places, NOW).unwrap_err().to_string();
    assert!(refused.contains("the disk is served already"), "{refused}");
    let look = RecordFiles::open(&places, Access::Look).unwrap();
    assert!(look.are_in_use());
    assert!(matches!(look.sources()[0].found, Found::Present(_)));
    let waiting = thread::spawn({
        let places = places.clone();
        move || RecordFiles::open(&places, Access::Own(Duration::from_secs(20))).map(drop)
    });
    thread::sleep(Duration::from_millis(50));
    drop(files);
    waiting.join().unwrap().unwrap();
    assert!(!look.are_in_use());
}

#[test]
fn record_that_waited_for_a_lock_is_opened_where_it_is_now() {
    let folder = Folder::new();
    let places = folder.places(&["a"], &[]);
    let mut files = RecordFiles::open(&places, NOW).unwrap();
    files.create(0, LENGTH).unwrap();
    let waiting = thread::spawn({
        let places = places.clone();
        move || RecordFiles::open(&places, Access::Own(Duration::from_secs(20)))
    });
    thread::sleep(Duration::from_millis(50));
    assert_eq!(files.remove().unwrap(), [folder.path("a")]);
    assert!(waiting.join().unwrap().unwrap().is_absent());
}

#[test]
fn what_cannot_hold_a_copy_is_unusable_and_stays_as_it_is() {
    let folder = Folder::new();
    fs::create_dir(folder.path("a")).unwrap();
    rustix::fs::mkfifoat(
        rustix::fs::CWD,
        folder.path("b"),
        rustix::fs::Mode::from_raw_mode(0o600),
    )
    .unwrap();
    let places = folder.places(&["a", "b", "none/c"], &[]);
    let mut files = RecordFiles::open(&places, NOW).unwrap();
    assert!(!files.is_absent());
    let texts: Vec<String> = files.files().iter().map(ToString::to_string).collect();
    assert!(texts[0].contains("directory"), "{texts:?}");
    assert!(
        texts[1].ends_with("(it is not a regular file)"),
        "{texts:?}"
    );
    assert!(texts[2].ends_with("c (missing)"), "{texts:?}");
    let refused = files.create(2, LENGTH).unwrap_err().to_string();
    assert!(refused.contains("its folder must exist"), "{refused}");
}

#[test]
fn two_names_of_one_file_are_refused() {
    let folder = Folder::new();
    fs::write(folder.path("a"), b"x").unwrap();
    fs::hard_link(folder.path("a"), folder.path("b")).unwrap();
    for access in [NOW, Access::Look] {
        let refused = RecordFiles::open(&folder.places(&["a", "b"], &[]), access);
        assert!(matches!(refused, Err(RecordFileError::SameFile { .. })));
    }
}

#[test]
fn record_in_another_place_is_not_taken_for_none() {
    let folder = Folder::new();
    fs::write(folder.path("d"), b"x").unwrap();
    let refused = RecordFiles::open(&folder.places(&["a", "b", "c"], &["d"]), NOW);
    assert!(matches!(refused, Err(RecordFileError::Elsewhere { .. })));
    fs::write(folder.path("b"), b"x").unwrap();
    let files = RecordFiles::open(&folder.places(&["a", "b", "c"], &["d"]), NOW).unwrap();
    assert_eq!(files.elsewhere(), [folder.path("d")]);
}

#[test]
fn files_and_devices_are_told_apart_also_when_missing() {
    let folder = Folder::new();
    fs::write(folder.path("a"), b"x").unwrap();
    std::os::unix::fs::symlink("/dev/nonexistent", folder.path("link")).unwrap();
    let cases = [
        (folder.path("a"), true),
        (folder.path("missing"), true),
        (folder.path("link"), false),
        ("/dev/nonexistent".into(), false),
        ("/dev/shm/nonexistent".into(), true),
    ];
    for (path, expected) in cases {
        assert_eq!(is_file(&path), expected, "{}", path.display());
    }
}
