// SPDX-License-Identifier: Apache-2.0
//! A disk becomes longer while a guest has it (rule Z3), and the daemon is killed in the middle.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use quorum_blk::front_end::{FrontEnd, Options};
use serde_json::{Value, json};

use crate::common::{Random, SECTOR, Signal};
use crate::site::{SECTORS, SETTLED, Site};

const MIB: u64 = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(30);

/// A disk of 8 MiB with a control socket.
fn site(arguments: &[&str]) -> (Site, String) {
    let folder = tempfile::tempdir().expect("a folder");
    // Unix sockets have short paths; the folder goes with the process.
    let control = folder.keep().join("control");
    let control = control.to_str().expect("a plain path").to_owned();
    let arguments = [&["--control", &control, "--cache", "buffered"], arguments].concat();
    (Site::new(&arguments), control)
}

/// A client of the control socket.
struct Control {
    lines: BufReader<UnixStream>,
}

impl Control {
    fn connect(path: &str) -> Self {
        let deadline = Instant::now() + PATIENCE;
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(error) => assert!(Instant::now() < deadline, "{path}: {error}"),
            }
            thread::sleep(Duration::from_millis(5));
        };
        stream.set_read_timeout(Some(PATIENCE)).expect("a limit");
        let mut control = Self {
            lines: BufReader::new(stream),
        };
        assert!(control.next()["QMP"].is_object());
        assert_eq!(control.ask("qmp_capabilities", json!({})), Ok(json!({})));
        control
    }

    fn next(&mut self) -> Value {
        let mut line = String::new();
        self.lines.read_line(&mut line).expect("a line");
        serde_json::from_str(&line).expect("JSON")
    }

    fn send(&mut self, command: &str, arguments: Value) {
        let request = json!({"execute": command, "arguments": arguments, "id": 7});
        let stream = self.lines.get_mut();
        // The daemon may be dead by now.
        let _ = stream.write_all(request.to_string().as_bytes());
    }

    fn ask(&mut self, command: &str, arguments: Value) -> Result<Value, String> {
        self.send(command, arguments);
        loop {
            let mut answer = self.next();
            if answer.get("event").is_some() {
                continue;
            }
            assert_eq!(answer["id"], 7);
            return match answer.get("error") {
                Some(error) => Err(error["desc"].as_str().expect("a text").to_owned()),
                None => Ok(answer["return"].take()),
            };
        }
    }

    fn resize(&mut self, bytes: u64) -> Result<Value, String> {
        self.ask("block_resize", json!({"size": bytes}))
    }

    fn size(&mut self) -> u64 {
        let status = self.ask("query-status", json!({})).expect("a status");
        status["size"].as_u64().expect("a number")
    }

    /// Waits until nothing is to be settled any more.
    fn await_settled(&mut self) {
        let deadline = Instant::now() + SETTLED;
        loop {
            let status = self.ask("query-status", json!({})).expect("a status");
            let disk = &status["disk"];
            if disk["health"] == "healthy" && disk["unresolved-extents"] == 0 {
                return;
            }
            assert!(Instant::now() < deadline, "{status}");
            thread::sleep(Duration::from_millis(50));
        }
    }
}

fn guest(site: &Site) -> FrontEnd {
    let options = Options {
        timeout: PATIENCE,
        ..Options::default()
    };
    FrontEnd::connect(&site.socket, &options).expect("the daemon serves")
}

fn pattern(seed: u64) -> Vec<u8> {
    Random::new(seed).bytes(16 * SECTOR)
}

fn expect_pattern(front_end: &mut FrontEnd, sector: u64, seed: u64) {
    let mut back = vec![0; 16 * SECTOR];
    front_end.queue(0).read(sector, &mut back).expect("a read");
    assert!(back == pattern(seed), "pattern {seed} at sector {sector}");
}

#[test]
fn guest_is_told_of_the_new_size_and_uses_it() {
    let (mut site, path) = site(&[]);
    let mut control = Control::connect(&path);
    let mut front_end = guest(&site);
    let old = SECTORS as u64;
    for (sector, seed) in [(0, 1), (old - 16, 2)] {
        let written = front_end.queue(0).write_data(sector, &pattern(seed));
        written.expect("a write");
    }
    let size = 20 * MIB + 4096;
    let answer = control.resize(size).expect("a resize");
    assert_eq!(answer, json!({"size": size, "front-end-told": true}));
    let mut message = [0; 12];
    let mut requests = front_end.requests().expect("a channel");
    requests.read_exact(&mut message).expect("a message");
    assert_eq!(message[0], 2, "CONFIG_CHANGE");
    let sectors = size / 512;
    assert_eq!(
        front_end.config().expect("a config").capacity_sectors,
        sectors
    );

    let mut back = vec![1; 16 * SECTOR];
    front_end.queue(0).read(old, &mut back).expect("a read");
    assert!(back.iter().all(|&byte| byte == 0), "what is new is zero");
    for (sector, seed) in [(old, 3), (sectors - 16, 4)] {
        let written = front_end.queue(0).write_data(sector, &pattern(seed));
        written.expect("a write where there was nothing");
    }
    let beyond = front_end.queue(0).write_data(sectors, &pattern(9));
    assert!(beyond.is_err(), "there is an end still");
    for (sector, seed) in [(0, 1), (old - 16, 2), (old, 3), (sectors - 16, 4)] {
        expect_pattern(&mut front_end, sector, seed);
    }
    control.await_settled();
    // Again, and over the page of the record that there was.
    control.resize(64 << 30).expect("a resize");
    expect_pattern(&mut front_end, old, 3);
    let last = (64 << 30) / 512 - 16;
    front_end
        .queue(0)
        .write_data(last, &pattern(5))
        .expect("a write");
    expect_pattern(&mut front_end, last, 5);
    assert_eq!(control.size(), 64 << 30);
    site.assert_no_failure();
    drop(front_end);
    site.kill();
    site.start();
    let mut front_end = guest(&site);
    for (sector, seed) in [
        (0, 1),
        (old - 16, 2),
        (old, 3),
        (sectors - 16, 4),
        (last, 5),
    ] {
        expect_pattern(&mut front_end, sector, seed);
    }
    for image in &site.images {
        let file = File::open(image).expect("an image");
        let metadata = file.metadata().expect("its metadata");
        assert_eq!(metadata.len(), 64 << 30);
        let allocated = std::os::unix::fs::MetadataExt::blocks(&metadata) * 512;
        assert!(allocated < 64 * MIB, "sparse stays sparse: {allocated}");
    }
}

#[test]
fn sizes_that_cannot_be_are_refused_and_nothing_happens() {
    let (mut site, path) = site(&[]);
    let mut control = Control::connect(&path);
    let mut front_end = guest(&site);
    let cases = [
        (4 * MIB, "cannot be made shorter"),
        (8 * MIB + 1, "a multiple of 512"),
        (2 << 40, "with which it can describe"),
    ];
    for (size, expected) in cases {
        let refused = control.resize(size).expect_err("a refusal");
        assert!(refused.contains(expected), "{refused}");
    }
    assert_eq!(control.resize(8 * MIB).expect("the same")["size"], 8 * MIB);
    assert_eq!(control.size(), 8 * MIB);
    front_end
        .queue(0)
        .write_data(0, &pattern(1))
        .expect("a write");
    assert!(!site.log().contains("opening the disk"), "{}", site.log());
    drop(front_end);
    site.stop();
}

/// A block device, whose size is not for the daemon to change.
struct Loop(String);

impl Loop {
    fn new(image: &Path) -> Self {
        let output = Command::new("losetup")
            .args(["--find", "--show"])
            .arg(image)
            .output()
            .expect("losetup runs");
        let device = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        assert!(
            output.status.success(),
            "this test needs root and loop devices"
        );
        Self(device)
    }

    fn take_new_size(&self) {
        let status = Command::new("losetup")
            .args(["--set-capacity", &self.0])
            .status();
        assert!(status.expect("losetup runs").success());
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}

#[test]
fn disk_that_cannot_grow_comes_back_at_its_size() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("control");
    let path = path.to_str().expect("a plain path");
    let mut site = Site::bare(&["--control", path, "--cache", "buffered"]);
    let devices: Vec<Loop> = site.images[1..]
        .iter()
        .map(|image| Loop::new(image))
        .collect();
    for (path, device) in site.paths[1..].iter_mut().zip(&devices) {
        *path = device.0.clone().into();
    }
    site.start_with(&["--assume-clean"]);
    let mut control = Control::connect(path);
    let mut front_end = guest(&site);
    front_end
        .queue(0)
        .write_data(0, &pattern(1))
        .expect("a write");
    let refused = control.resize(12 * MIB).expect_err("a refusal");
    assert!(
        refused.contains("a block device is made longer by"),
        "{refused}"
    );
    assert_eq!(control.size(), 8 * MIB);
    expect_pattern(&mut front_end, 0, 1);
    let capacity = front_end.config().expect("a config").capacity_sectors;
    assert_eq!(capacity, SECTORS as u64);
    // As `lvextend` does it.
    for (device, image) in devices.iter().zip(&site.images[1..]) {
        let file = File::options().write(true).open(image).expect("an image");
        file.set_len(12 * MIB).expect("it becomes longer");
        device.take_new_size();
    }
    control.resize(12 * MIB).expect("a size that can be");
    let end = 12 * MIB / 512 - 16;
    front_end
        .queue(0)
        .write_data(end, &pattern(2))
        .expect("a write");
    expect_pattern(&mut front_end, 0, 1);
    expect_pattern(&mut front_end, end, 2);
    drop(front_end);
    site.stop();
    drop(devices);
    site.await_equal();
}

#[test]
fn disk_that_cannot_be_opened_again_grows_later() {
    let (site, path) = site(&[]);
    let mut control = Control::connect(&path);
    let mut front_end = guest(&site);
    front_end
        .queue(0)
        .write_data(0, &pattern(1))
        .expect("a write");
    let aside = |image: &Path| image.with_extension("aside");
    for image in &site.images[1..] {
        fs::rename(image, aside(image)).expect("it goes");
    }
    let failed = control.resize(12 * MIB).expect_err("too few replicas");
    assert!(failed.contains("could not be opened again"), "{failed}");
    let closed = control.resize(12 * MIB).expect_err("it is closed");
    assert!(closed.contains("is closed"), "{closed}");
    drop(front_end);
    for image in &site.images[1..] {
        fs::rename(aside(image), image).expect("it comes back");
    }
    let mut front_end = guest(&site);
    expect_pattern(&mut front_end, 0, 1);
    assert_eq!(control.size(), 8 * MIB);
    control.await_settled();
    // What stood in the way of the first attempt is not told of this one.
    control.resize(12 * MIB).expect("a resize");
    let capacity = front_end.config().expect("a config").capacity_sectors;
    assert_eq!(capacity, 12 * MIB / 512);
    expect_pattern(&mut front_end, 0, 1);
}

#[test]
fn replica_that_was_away_is_made_longer_when_it_is_back() {
    let (mut site, path) = site(&[]);
    site.stop();
    let aside = site.images[2].with_extension("aside");
    fs::rename(&site.images[2], &aside).expect("it goes");
    site.start();
    let mut control = Control::connect(&path);
    let mut front_end = guest(&site);
    control.resize(16 * MIB).expect("a resize");
    let old = SECTORS as u64;
    for (sector, seed) in [(0, 1), (old + 100, 2)] {
        let written = front_end.queue(0).write_data(sector, &pattern(seed));
        written.expect("a write");
    }
    fs::rename(&aside, &site.images[2]).expect("it comes back");
    control.await_settled();
    for (sector, seed) in [(0, 1), (old + 100, 2)] {
        expect_pattern(&mut front_end, sector, seed);
    }
    drop(front_end);
    site.stop();
    assert_eq!(
        fs::metadata(&site.images[2]).expect("it is there").len(),
        16 * MIB
    );
    site.await_equal();
}

#[test]
fn files_found_longer_are_used_only_when_asked() {
    let (mut site, path) = site(&[]);
    let mut front_end = guest(&site);
    front_end
        .queue(0)
        .write_data(0, &pattern(1))
        .expect("a write");
    drop(front_end);
    for (image, mib) in site.images.iter().zip([12, 13, 14]) {
        let file = File::options().write(true).open(image).expect("an image");
        file.set_len(mib * MIB).expect("it becomes longer");
    }
    site.stop();
    site.start();
    assert_eq!(Control::connect(&path).size(), 8 * MIB);
    site.stop();
    site.start_with(&["--grow", "found"]);
    let mut control = Control::connect(&path);
    assert_eq!(control.size(), 12 * MIB);
    let mut front_end = guest(&site);
    expect_pattern(&mut front_end, 0, 1);
    let end = 12 * MIB / 512 - 16;
    front_end
        .queue(0)
        .write_data(end, &pattern(2))
        .expect("a write");
    control.await_settled();
    drop(front_end);
    site.stop();
}

#[test]
fn what_lay_in_longer_replicas_becomes_equal() {
    // As block devices have it: each holds something else where the disk was not.
    let (mut site, path) = site(&[]);
    for (index, image) in site.images.iter().enumerate() {
        let file = File::options().write(true).open(image).expect("an image");
        let garbage =
            Random::new(index as u64 + 10).bytes(usize::try_from(4 * MIB).expect("small"));
        std::os::unix::fs::FileExt::write_all_at(&file, &garbage, 8 * MIB).expect("a write");
    }
    let mut control = Control::connect(&path);
    let mut front_end = guest(&site);
    control.resize(12 * MIB).expect("a resize");
    let mut first = vec![0; 16 * SECTOR];
    let sector = SECTORS as u64 + 64;
    front_end.queue(0).read(sector, &mut first).expect("a read");
    control.await_settled();
    let mut second = vec![0; 16 * SECTOR];
    front_end
        .queue(0)
        .read(sector, &mut second)
        .expect("a read");
    assert!(first == second, "once read it does not change");
    site.assert_no_failure();
    drop(front_end);
    site.stop();
    site.await_equal();
}

#[test]
fn killed_while_it_grows_it_has_the_old_size_or_the_new_one() {
    let (mut site, path) = site(&[]);
    let mut random = Random::new(3);
    let mut patterns: Vec<(u64, u64)> = vec![(0, 1), (SECTORS as u64 - 16, 2)];
    let mut front_end = guest(&site);
    for &(sector, seed) in &patterns {
        let written = front_end.queue(0).write_data(sector, &pattern(seed));
        written.expect("a write");
    }
    drop(front_end);
    let (mut size, mut grown) = (8 * MIB, 0);
    let mut longest = Duration::from_millis(100);
    for round in 0..30 {
        let new = size + (1 + random.below(64) as u64) * 64 * 1024;
        let mut control = Control::connect(&path);
        let mut front_end = guest(&site);
        let begin = Instant::now();
        control.send("block_resize", json!({"size": new}));
        // Every third is let through, which tells how long it takes.
        if round % 3 == 2 {
            while control.next().get("return").is_none() {}
            longest = begin.elapsed();
        } else {
            let moment = u32::try_from(random.below(1000)).expect("small");
            thread::sleep(longest * moment / 1000);
        }
        site.process().signal(Signal::Kill);
        site.process().wait(PATIENCE);
        drop(front_end);
        site.start();
        let mut control = Control::connect(&path);
        let found = control.size();
        assert!(found == size || found == new, "{size} -> {new}: {found}");
        assert!(round % 3 != 2 || found == new, "what was answered counts");
        grown += usize::from(found == new);
        size = found;
        front_end = guest(&site);
        for &(sector, seed) in &patterns {
            expect_pattern(&mut front_end, sector, seed);
        }
        let (sector, seed) = (size / 512 - 16, round + 10);
        if patterns.iter().all(|&(other, _)| other + 16 <= sector) {
            let written = front_end.queue(0).write_data(sector, &pattern(seed));
            written.expect("a write at the end");
            patterns.push((sector, seed));
        }
        control.await_settled();
    }
    assert!((10..30).contains(&grown), "{grown} of 30 counted");
    site.assert_no_failure();
    site.signal(Signal::Terminate);
    site.process().wait(PATIENCE);
    let mut images = site.images.iter().map(|image| {
        let mut bytes = fs::read(image).expect("an image");
        bytes.truncate(usize::try_from(size).expect("small"));
        bytes
    });
    let first = images.next().expect("three images");
    for other in images {
        assert!(first == other, "replicas differ");
    }
}
