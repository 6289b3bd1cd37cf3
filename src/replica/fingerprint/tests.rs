// SPDX-License-Identifier: Apache-2.0
//! Fingerprints and presence of real files.

use std::os::unix::fs::symlink;
use std::path::PathBuf;

use super::*;
use crate::replica::{Cache, RawOptions, RawReplica};

const IMAGE_BYTES: usize = 8192;

fn image(folder: &Path) -> (RawReplica, PathBuf) {
    let path = folder.join("a");
    fs::write(&path, vec![1; IMAGE_BYTES]).unwrap();
    let options = RawOptions {
        cache: Cache::Buffered,
        ..RawOptions::new("a", &path)
    };
    (RawReplica::open(&options).unwrap(), path)
}

#[test]
fn fingerprint_of_a_file_is_the_same_by_path_and_stays_over_a_reopening() {
    let folder = tempfile::tempdir().unwrap();
    let (replica, path) = image(folder.path());
    let first = replica.durable_fingerprint().unwrap();
    assert_eq!(first.size_bytes, 8192);
    assert!(first.inode != 0 && first.mtime_ns > 1_500_000_000_000_000_000);
    assert_eq!(Fingerprint::of_path(&path).unwrap(), first);
    drop(replica);
    let again = RawReplica::open(&RawOptions {
        cache: Cache::Buffered,
        ..RawOptions::new("a", &path)
    });
    let again = again.unwrap();
    assert_eq!(again.found(), first);
    // Nor did the opening leave a trace.
    assert_eq!(again.fingerprint().unwrap(), first);
}

#[test]
fn fingerprint_shows_a_write_a_new_size_and_another_file() {
    let folder = tempfile::tempdir().unwrap();
    let (replica, path) = image(folder.path());
    let first = replica.fingerprint().unwrap();
    // Times are as fine as the kernel's tick.
    std::thread::sleep(std::time::Duration::from_millis(20));

    let copy = folder.path().join("copy");
    fs::copy(&path, &copy).unwrap();
    let file = File::options().write(true).open(&path).unwrap();
    std::os::unix::fs::FileExt::write_at(&file, b"x", 0).unwrap();
    let written = replica.fingerprint().unwrap();
    assert!(!written.is_unchanged_since(&first));
    assert_eq!(written.inode, first.inode);

    file.set_len(4096).unwrap();
    file.set_modified(std::time::UNIX_EPOCH).unwrap();
    let cut = replica.fingerprint().unwrap();
    assert_eq!((cut.size_bytes, cut.mtime_ns), (4096, 0));

    fs::rename(&copy, &path).unwrap();
    let other = Fingerprint::of_path(&path).unwrap();
    assert_ne!(other.inode, first.inode);
    assert!(!other.is_unchanged_since(&first));
}

#[test]
fn fingerprint_comparison_leaves_out_the_device_only() {
    let first = Fingerprint {
        size_bytes: 1,
        mtime_ns: -2,
        inode: 3,
        device: 4,
    };
    let cases = [
        (Fingerprint { device: 9, ..first }, true),
        (
            Fingerprint {
                size_bytes: 9,
                ..first
            },
            false,
        ),
        (
            Fingerprint {
                mtime_ns: 9,
                ..first
            },
            false,
        ),
        (Fingerprint { inode: 9, ..first }, false),
    ];
    for (other, same) in cases {
        assert_eq!(other.is_unchanged_since(&first), same, "{other:?}");
    }
}

#[test]
fn fingerprint_of_what_cannot_be_a_replica_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let error = Fingerprint::of_path(folder.path()).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    let error = Fingerprint::of_path(&folder.path().join("missing")).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::NotFound);
}

#[test]
fn presence_follows_the_life_of_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let (replica, path) = image(folder.path());
    let aside = folder.path().join("aside");
    assert_eq!(replica.is_still_there().unwrap(), Presence::There);

    let file = File::options().write(true).open(&path).unwrap();
    file.set_len(9000).unwrap();
    assert_eq!(replica.is_still_there().unwrap(), Presence::There);
    file.set_len(100).unwrap();
    let shrunk = Presence::Shrunk { length_bytes: 100 };
    assert_eq!(replica.is_still_there().unwrap(), shrunk);
    file.set_len(8192).unwrap();

    fs::rename(&path, &aside).unwrap();
    assert_eq!(replica.is_still_there().unwrap(), Presence::Gone);
    symlink(&aside, &path).unwrap();
    assert_eq!(replica.is_still_there().unwrap(), Presence::There);
    fs::remove_file(&path).unwrap();
    fs::copy(&aside, &path).unwrap();
    assert_eq!(replica.is_still_there().unwrap(), Presence::Replaced);
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    assert_eq!(replica.is_still_there().unwrap(), Presence::Replaced);
    fs::remove_dir(&path).unwrap();
    fs::remove_file(&aside).unwrap();
    assert_eq!(replica.is_still_there().unwrap(), Presence::Gone);
}

#[test]
fn presence_of_a_removed_file_that_is_still_to_be_reached_is_gone() {
    let folder = tempfile::tempdir().unwrap();
    let (replica, path) = image(folder.path());
    // The descriptor's own name leads to it for ever.
    let identity = replica.identity().clone();
    let file = File::open(&path).unwrap();
    fs::remove_file(&path).unwrap();
    let name = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    let found = presence(&file, Path::new(&name), &identity, 8192).unwrap();
    assert_eq!(found, Presence::Gone);
}

#[test]
fn fnv1a_is_the_published_one() {
    assert_eq!(fnv1a(b""), 0xcbf2_9ce4_8422_2325);
    assert_eq!(fnv1a(b"a"), 0xaf63_dc4c_8601_ec8c);
    assert_eq!(fnv1a(b"foobar"), 0x8594_4171_f739_67e8);
}

#[test]
fn files_with_one_inode_on_two_file_systems_have_numbers_of_their_own() {
    let at = |nanos: u64| Some(Duration::from_nanos(1_900_000_000_000_000_000 + nanos));
    let numbers = [
        mixed(12, at(0)),
        mixed(12, at(1)),
        mixed(13, at(0)),
        mixed(13, at(1)),
        mixed(12, None),
    ];
    for (index, number) in numbers.iter().enumerate() {
        assert!(!numbers[..index].contains(number), "{index}");
    }
    // Without a time of birth there is only the inode.
    assert_eq!(mixed(12, None), 12);
}

#[test]
fn fingerprint_tells_a_file_from_its_copy_and_knows_it_by_another_name() {
    let folder = tempfile::tempdir().unwrap();
    let (_, path) = image(folder.path());
    let first = Fingerprint::of_path(&path).unwrap();
    let moved = folder.path().join("moved");
    fs::rename(&path, &moved).unwrap();
    assert_eq!(Fingerprint::of_path(&moved).unwrap(), first);
    fs::copy(&moved, &path).unwrap();
    assert_ne!(Fingerprint::of_path(&path).unwrap().inode, first.inode);
}
