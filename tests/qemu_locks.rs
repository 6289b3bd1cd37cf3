// SPDX-License-Identifier: Apache-2.0
//! Rule K1 against the real QEMU tools: each side refuses an image that the other one has.
//!
//! `qemu-img info` is no test of it: on a raw image it reads no data, asks for no permission, and
//! succeeds whoever holds what, beside a VM of QEMU's own too.
#![allow(
    clippy::unwrap_used,
    reason = "everything in this file is test code, helpers included"
)]

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use quorum_blk::replica::{OpenError, RawOptions, RawReplica};

/// A raw image of 1 MiB in a folder of its own.
struct Image {
    folder: tempfile::TempDir,
    path: PathBuf,
}

impl Image {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk.img");
        std::fs::write(&path, vec![0; 1 << 20]).unwrap();
        Self { folder, path }
    }

    fn open(&self, read_only: bool) -> Result<RawReplica, OpenError> {
        RawReplica::open(&RawOptions {
            read_only,
            ..RawOptions::new("a", &self.path)
        })
    }
}

/// A child that does not outlive the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Copies an image with `qemu-img`; with `share` it puts up with writers.
fn qemu_img_copy(image: &Image, share: bool) -> Output {
    let mut command = Command::new("qemu-img");
    command.arg("convert");
    if share {
        command.arg("-U");
    }
    let copy = image.folder.path().join("copy.img");
    let output = command
        .args(["-f", "raw", "-O", "raw"])
        .args([&image.path, &copy])
        .output();
    output.expect("qemu-img is installed")
}

fn stderr(output: &Output) -> String {
    assert!(!output.status.success());
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// `qemu-io` that has opened an image for writing and waits for commands.
fn qemu_io_holding(path: &Path) -> Running {
    let child = Command::new("qemu-io")
        .args(["-f", "raw"])
        .arg(path)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("qemu-io is installed");
    let mut running = Running(child);
    // It answers only once the image is open.
    let stdin = running.0.stdin.as_mut().unwrap();
    stdin.write_all(b"length\n").unwrap();
    let stdout = running.0.stdout.as_mut().unwrap();
    let mut output = Vec::new();
    while !output.ends_with(b"1 MiB") {
        let mut byte = [0];
        assert_eq!(stdout.read(&mut byte).unwrap(), 1, "qemu-io ended");
        output.push(byte[0]);
    }
    running
}

#[test]
fn qemu_img_on_a_writable_replica_is_refused_without_share() {
    let image = Image::new();
    assert!(qemu_img_copy(&image, false).status.success());
    let replica = image.open(false).unwrap();
    let text = stderr(&qemu_img_copy(&image, false));
    assert!(
        text.contains("Failed to get shared \"write\" lock"),
        "{text}"
    );
    assert!(qemu_img_copy(&image, true).status.success());
    let resize = Command::new("qemu-img")
        .args(["resize", "-f", "raw"])
        .arg(&image.path)
        .arg("2M")
        .output()
        .unwrap();
    let text = stderr(&resize);
    assert!(text.contains("lock"), "{text}");
    drop(replica);
    assert!(qemu_img_copy(&image, false).status.success());
}

#[test]
fn qemu_img_on_a_read_only_replica_may_read_but_not_write() {
    let image = Image::new();
    let _replica = image.open(true).unwrap();
    assert!(qemu_img_copy(&image, false).status.success());
    let write = Command::new("qemu-io")
        .args(["-f", "raw", "-c", "write 0 512"])
        .arg(&image.path)
        .output()
        .unwrap();
    let text = stderr(&write);
    assert!(text.contains("Failed to get \"write\" lock"), "{text}");
}

#[test]
fn an_image_that_qemu_io_writes_is_refused_until_it_ends() {
    let image = Image::new();
    let holder = qemu_io_holding(&image.path);
    for read_only in [false, true] {
        let error = image.open(read_only).unwrap_err();
        assert!(error.is_in_use(), "{error}");
        assert!(error.to_string().contains("QEMU's write lock"), "{error}");
    }
    drop(holder);
    image.open(false).unwrap();
}

#[test]
fn an_image_that_qemu_img_copies_can_be_read_but_not_written() {
    let image = Image::new();
    // Data, not holes: the rate limit counts what is copied.
    std::fs::write(&image.path, vec![1; 4 << 20]).unwrap();
    let copy = image.folder.path().join("copy.img");
    let child = Command::new("qemu-img")
        .args(["convert", "-r", "64K", "-f", "raw", "-O", "raw"])
        .args([&image.path, &copy])
        .spawn()
        .expect("qemu-img is installed");
    let _copying = Running(child);
    // The source is open, and locked, before the copy is made.
    let start = Instant::now();
    while !copy.exists() {
        assert!(start.elapsed() < Duration::from_secs(20), "no copy");
        std::thread::sleep(Duration::from_millis(5));
    }
    let error = image.open(false).unwrap_err();
    assert!(error.is_in_use(), "{error}");
    let text = error.to_string();
    assert!(text.contains("lock against writers"), "{text}");
    image.open(true).unwrap();
}

#[test]
fn an_image_that_a_storage_daemon_exports_is_refused() {
    let image = Image::new();
    let inside = |name: &str| image.folder.path().join(name).display().to_string();
    let child = Command::new("qemu-storage-daemon")
        .arg("--blockdev")
        .arg(format!(
            "driver=file,node-name=file,filename={}",
            image.path.display()
        ))
        .args(["--blockdev", "driver=raw,node-name=disk,file=file"])
        .arg("--nbd-server")
        .arg(format!("addr.type=unix,addr.path={}", inside("nbd.sock")))
        .args(["--export", "nbd,id=e,node-name=disk,writable=on"])
        .arg("--chardev")
        .arg(format!(
            "socket,id=qmp,path={},server=on,wait=off",
            inside("qmp.sock")
        ))
        .args(["--monitor", "chardev=qmp"])
        .spawn()
        .expect("qemu-storage-daemon is installed");
    let daemon = Running(child);
    // Options are acted on in order, so its export is up when its monitor greets.
    wait_for_greeting(Path::new(&inside("qmp.sock")));
    let error = image.open(false).unwrap_err();
    assert!(error.is_in_use(), "{error}");
    drop(daemon);
    image.open(false).unwrap();
}

fn wait_for_greeting(socket: &Path) {
    let start = Instant::now();
    loop {
        if let Ok(stream) = UnixStream::connect(socket) {
            let mut line = String::new();
            let read = BufReader::new(stream).read_line(&mut line);
            if read.is_ok() && line.contains("QMP") {
                return;
            }
        }
        assert!(start.elapsed() < Duration::from_secs(20), "no greeting");
        std::thread::sleep(Duration::from_millis(20));
    }
}
