// SPDX-License-Identifier: Apache-2.0
//! Replicas on block devices: loop devices, which need root. Without it they fail.
#![allow(
    clippy::unwrap_used,
    reason = "everything in this file is test code, helpers included"
)]

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use quorum_blk::quorum::{Buffers, OpId, Operation, OperationKind, Outcome, Purpose};
use quorum_blk::replica::{
    Cache, Executor, ExecutorConfig, Fingerprint, OpenFault, Presence, RawOptions, RawReplica,
    Replica, SetError, check_set, open_set,
};
use quorum_blk::units::{ReplicaId, SectorRange};

const IMAGE_BYTES: u64 = 4 << 20;

/// A loop device over a file in a folder of its own.
struct Loop {
    device: PathBuf,
    backing: PathBuf,
    folder: tempfile::TempDir,
}

impl Loop {
    /// # Panics
    /// Where there is none to be had: a test that cannot run must not look like one that passed.
    fn new(block_bytes: u32) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let backing = folder.path().join("backing.img");
        fs::write(&backing, vec![0x5a; usize::try_from(IMAGE_BYTES).unwrap()]).unwrap();
        let output = Command::new("losetup")
            .args(["-f", "--show", "-b", &block_bytes.to_string()])
            .arg(&backing)
            .output()
            .expect("losetup runs");
        assert!(
            output.status.success(),
            "a loop device cannot be made here, and this test needs one: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        let device = String::from_utf8(output.stdout).unwrap().trim().into();
        Self {
            device,
            backing,
            folder,
        }
    }

    fn options(&self) -> RawOptions {
        RawOptions::new("a", &self.device)
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("-d").arg(&self.device).status();
    }
}

fn executor(options: &RawOptions) -> Executor {
    let replicas = open_set(std::slice::from_ref(options)).unwrap();
    let replicas: Vec<_> = replicas.into_iter().map(Some).collect();
    Executor::new(&replicas, ExecutorConfig::default()).unwrap()
}

fn run(executor: &mut Executor, kind: OperationKind) -> Outcome {
    let operation = Operation {
        op: OpId(1),
        replica: ReplicaId::new(0),
        kind,
    };
    executor.start(&operation);
    let mut ended = Vec::new();
    while ended.is_empty() {
        executor.submit().unwrap();
        executor.reap(&mut ended).unwrap();
    }
    ended[0].1
}

fn range(start: u64, count: u32) -> SectorRange {
    SectorRange::new(start, count).unwrap()
}

#[test]
fn open_of_a_device_finds_length_alignment_and_zeroing() {
    for block_bytes in [512, 4096] {
        let one = Loop::new(block_bytes);
        let replica = RawReplica::open(&one.options()).unwrap();
        assert_eq!(replica.length_bytes(), IMAGE_BYTES);
        assert_eq!(replica.direct_alignment_bytes(), block_bytes);
        assert!(replica.can_zero_exactly());
        let set = [Some(Arc::new(Replica::Raw(replica)))];
        let shape = check_set(&set, 1, None, None).unwrap();
        assert_eq!(shape.block_bytes, block_bytes);
        let asked = check_set(&set, 1, Some(512), None);
        assert_eq!(
            matches!(
                asked,
                Err(SetError::BlockSize {
                    needed_bytes: 4096,
                    ..
                })
            ),
            block_bytes == 4096
        );
    }
}

#[test]
fn open_of_a_device_in_use_is_refused() {
    let one = Loop::new(512);
    let first = RawReplica::open(&one.options()).unwrap();
    let error = RawReplica::open(&one.options()).unwrap_err();
    assert!(matches!(error.fault, OpenFault::DeviceBusy), "{error}");
    assert!(error.is_in_use());
    drop(first);

    let made = Command::new("mkfs.ext4")
        .arg("-q")
        .arg(&one.device)
        .status();
    assert!(made.unwrap().success());
    let folder = one.folder.path().join("mounted");
    fs::create_dir(&folder).unwrap();
    let mounted = Command::new("mount").args([&one.device, &folder]).status();
    assert!(mounted.unwrap().success());
    let error = RawReplica::open(&one.options()).unwrap_err();
    let unmounted = Command::new("umount").arg(&folder).status();
    assert!(unmounted.unwrap().success());
    assert!(error.to_string().contains("mounted or in use"), "{error}");
}

#[test]
fn a_device_and_the_file_behind_it_are_one_storage() {
    let one = Loop::new(512);
    let options = [one.options(), RawOptions::new("b", &one.backing)];
    let error = open_set(&options).unwrap_err();
    assert!(
        matches!(&error.fault, OpenFault::Duplicate { other } if other == "a"),
        "{error}"
    );
}

#[test]
fn write_zeroes_on_a_device_reads_back_zero() {
    for unmap in [false, true] {
        let one = Loop::new(4096);
        let mut executor = executor(&one.options());
        let range = range(16, 64);
        let outcome = run(&mut executor, OperationKind::WriteZeroes { range, unmap });
        assert_eq!(outcome, Outcome::Done);
        let buffer = executor.pool_mut().take(65_536, Purpose::Guest).unwrap();
        let kind = OperationKind::Read {
            range: self::range(0, 128),
            buffer,
            skip_bytes: 0,
        };
        assert_eq!(run(&mut executor, kind), Outcome::Done);
        let mut expected = vec![0x5a; 65_536];
        expected[16 * 512..80 * 512].fill(0);
        assert!(executor.pool().bytes(buffer)[..65_536] == expected);
    }
}

#[test]
fn a_device_whose_file_was_cut_gives_eio_and_works_before_the_cut() {
    let one = Loop::new(512);
    let options = RawOptions {
        cache: Cache::Direct,
        ..one.options()
    };
    let mut executor = executor(&options);
    cut(&one.backing, 1 << 20);
    let buffer = executor.pool_mut().take(4096, Purpose::Guest).unwrap();
    let read = |start| OperationKind::Read {
        range: range(start, 8),
        buffer,
        skip_bytes: 0,
    };
    let errno = libc::EIO;
    assert_eq!(run(&mut executor, read(4096)), Outcome::Failed { errno });
    assert_eq!(run(&mut executor, read(0)), Outcome::Done);
    assert!(
        executor
            .pool()
            .bytes(buffer)
            .iter()
            .all(|&byte| byte == 0x5a)
    );
}

#[test]
fn a_device_is_known_again_by_the_file_behind_it() {
    let one = Loop::new(512);
    let replica = RawReplica::open(&one.options()).unwrap();
    let found = replica.found();
    assert_eq!(found.size_bytes, IMAGE_BYTES);
    let behind = Fingerprint::of_path(&one.backing).unwrap();
    assert_eq!(found.inode, behind.inode);
    drop(replica);
    // The times of the node itself change whenever it is opened or made.
    assert!(
        Command::new("touch")
            .arg(&one.device)
            .status()
            .unwrap()
            .success()
    );
    let replica = RawReplica::open(&one.options()).unwrap();
    assert_eq!(replica.found(), found);
    drop(replica);
    let file = File::options().write(true).open(&one.backing).unwrap();
    file.set_modified(std::time::UNIX_EPOCH).unwrap();
    let replica = RawReplica::open(&one.options()).unwrap();
    assert!(!replica.found().is_unchanged_since(&found));
}

#[test]
fn a_device_that_shrinks_or_loses_its_node_shows() {
    let one = Loop::new(512);
    let node = one.folder.path().join("node");
    std::os::unix::fs::symlink(&one.device, &node).unwrap();
    let options = RawOptions::new("a", &node);
    let replica = RawReplica::open(&options).unwrap();
    assert_eq!(replica.is_still_there().unwrap(), Presence::There);
    cut(&one.backing, 1 << 20);
    let resized = Command::new("losetup").arg("-c").arg(&one.device).status();
    assert!(resized.unwrap().success());
    let length_bytes = 1 << 20;
    let shrunk = Presence::Shrunk { length_bytes };
    assert_eq!(replica.is_still_there().unwrap(), shrunk);
    fs::remove_file(&node).unwrap();
    assert_eq!(replica.is_still_there().unwrap(), Presence::Gone);
    fs::write(&node, b"something else").unwrap();
    assert_eq!(replica.is_still_there().unwrap(), Presence::Replaced);
}

#[test]
fn opening_a_device_drops_its_cached_pages() {
    let one = Loop::new(512);
    let options = RawOptions {
        cache: Cache::Buffered,
        ..one.options()
    };
    // An open descriptor keeps the pages: the last close of a device drops them anyhow.
    let file = |path| File::options().read(true).write(true).open(path).unwrap();
    let (cached, backing) = (file(&one.device), file(&one.backing));
    let at = |file: &File, offset| {
        let mut byte = [0];
        file.read_exact_at(&mut byte, offset).unwrap();
        byte[0]
    };
    let (clean, dirty) = (8192, 65_536);
    assert_eq!(at(&cached, clean), 0x5a);
    backing.write_all_at(&[7; 4096], clean).unwrap();
    assert_eq!(at(&cached, clean), 0x5a, "the cache still has it");
    cached.write_all_at(&[9; 4096], dirty).unwrap();
    assert_eq!(at(&backing, dirty), 0x5a, "it is not written back yet");
    let _replica = RawReplica::open(&options).unwrap();
    assert_eq!(at(&cached, clean), 7);
    // What was dirty has reached the medium, and is not remembered either.
    assert_eq!(at(&backing, dirty), 9);
    backing.write_all_at(&[8; 4096], dirty).unwrap();
    assert_eq!(at(&cached, dirty), 8);
}

fn cut(path: &Path, bytes: u64) {
    let file = File::options().write(true).open(path).unwrap();
    file.set_len(bytes).unwrap();
}
