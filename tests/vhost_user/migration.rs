// SPDX-License-Identifier: Apache-2.0
//! Two daemons on the same replicas: the guest of one is on its way to the other (rule Q5).

use std::ffi::OsString;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use quorum_blk::front_end::{FrontEnd, FrontEndError, Options};

use crate::common::{Disk, PATIENCE, Process, Random, SECTOR, Setup, Signal, eventually};

/// A daemon that waits for the guest of another one, on the same replicas.
struct Destination {
    process: Process,
    socket: PathBuf,
    _folder: tempfile::TempDir,
}

impl Destination {
    fn start(disk: &Disk, arguments: &[&str]) -> Self {
        let folder = tempfile::tempdir_in(disk.folder()).expect("a folder");
        let socket = folder.path().join("disk.sock");
        let events = folder.path().join("events.jsonl");
        let mut line: Vec<OsString> = disk.serve_arguments();
        let at = line.iter().position(|argument| argument == "--events");
        line[at.expect("it writes events") + 1] = events.into();
        line.extend(["--incoming".into(), "--socket-path".into()]);
        line.push(socket.clone().into());
        line.extend(arguments.iter().map(OsString::from));
        let process = Process::start(folder.path(), &line);
        let destination = Self {
            process,
            socket,
            _folder: folder,
        };
        let listens = eventually(|| destination.socket.exists().then_some(()));
        assert!(listens.is_some(), "{}", destination.process.log());
        destination
    }

    /// A front-end that waits as long as the destination waits for locks.
    fn connect(&self) -> Result<FrontEnd, FrontEndError> {
        let options = Options {
            timeout: Duration::from_secs(30),
            ..Options::default()
        };
        FrontEnd::connect(&self.socket, &options)
    }

    fn await_log(&self, text: &str) {
        let found = eventually(|| self.process.log().contains(text).then_some(()));
        assert!(found.is_some(), "no '{text}' in {}", self.process.log());
    }

    fn stop(&mut self) {
        self.process.signal(Signal::Terminate);
        let status = self.process.wait(PATIENCE);
        assert_eq!(status.code(), Some(0), "{}", self.process.log());
    }
}

#[test]
fn destination_looks_and_opens_when_its_first_ring_starts() {
    let mut disk = Setup::new().start();
    let data = Random::new(1).bytes(8 * SECTOR);
    let mut source = disk.connect(&Options::default());
    source.queue(0).write_data(7, &data).expect("a write");

    let mut destination = Destination::start(&disk, &[]);
    let probe = Options {
        timeout: PATIENCE,
        ..Options::default()
    };
    let mut front_end = FrontEnd::negotiate(&destination.socket, &probe).expect("a connection");
    let capacity = front_end
        .config()
        .expect("a configuration")
        .capacity_sectors;
    assert_eq!(capacity, (8 << 20) / 512, "the size is known");
    drop(front_end);
    destination.process.signal(Signal::User1);
    destination.await_log("closed: waiting for the guest");
    destination.process.signal(Signal::User2);
    destination.await_log("no scrub is begun");
    source.queue(0).write_data(100, &data).expect("a write");

    // Its ring starts while the source still has the locks.
    let begin = Instant::now();
    let (front_end, waited) = thread::scope(|scope| {
        let connecting = scope.spawn(|| (destination.connect(), begin.elapsed()));
        destination.await_log("waiting up to 30 s");
        destination.process.signal(Signal::User1);
        destination.await_log("being opened or closed");
        drop(source);
        disk.stop();
        connecting.join().expect("no panic")
    });
    let mut front_end = front_end.expect("the source let go");
    assert!(waited < Duration::from_secs(30));
    for sector in [7, 100] {
        let mut back = vec![0; data.len()];
        front_end.queue(0).read(sector, &mut back).expect("a read");
        assert!(back == data, "what the source wrote to {sector} differs");
    }
    front_end
        .queue(0)
        .write_data(7, &data[SECTOR..])
        .expect("a write");
    drop(front_end);
    destination.stop();
    let log = destination.process.log();
    assert!(log.contains("closed: every extent is clean"), "{log}");
    disk.start_again();
    disk.assert_nothing_reported();
    disk.stop_and_compare();
}

#[test]
fn destination_that_cannot_have_the_disk_ends_the_connection_and_tries_again() {
    let mut disk = Setup::new().start();
    disk.assert_serves();
    let mut destination = Destination::start(&disk, &["--lock-timeout", "1"]);
    for _ in 0..2 {
        assert!(destination.connect().is_err(), "the source has the locks");
    }
    destination.await_log("the guest cannot have its disk");
    destination.await_log("is served already");
    // The source has noticed nothing.
    disk.assert_serves();
    disk.stop();
    let mut front_end = destination.connect().expect("the source is gone");
    front_end
        .queue(0)
        .write_data(0, &[1; SECTOR])
        .expect("a write");
    drop(front_end);
    destination.stop();
    disk.start_again();
    disk.stop_and_compare();
}

#[test]
fn destination_that_never_gets_its_guest_has_touched_nothing() {
    let mut disk = Setup::new().start();
    disk.assert_serves();
    let record = disk.images[0].with_extension("img.qrec");
    disk.stop();
    let before = std::fs::read(&record).expect("a record");
    let mut destination = Destination::start(&disk, &[]);
    let probe = Options {
        timeout: PATIENCE,
        ..Options::default()
    };
    drop(FrontEnd::negotiate(&destination.socket, &probe).expect("a connection"));
    destination.stop();
    assert!(std::fs::read(&record).expect("a record") == before);
}

#[test]
fn destination_that_waits_for_locks_can_be_stopped() {
    let mut disk = Setup::new().start();
    disk.assert_serves();
    let mut destination = Destination::start(&disk, &[]);
    thread::scope(|scope| {
        let connecting = scope.spawn(|| destination.connect().is_err());
        destination.await_log("waiting up to 30 s");
        destination.process.signal(Signal::Terminate);
        assert!(connecting.join().expect("no panic"), "it got the disk");
    });
    destination.stop();
    disk.assert_serves();
}

#[test]
fn destination_of_a_disk_without_a_record_is_refused() {
    let disk = Setup::new().start();
    for copy in 0..3 {
        let record = disk.images[copy].with_extension("img.qrec");
        std::fs::remove_file(record).expect("a record");
    }
    let folder = tempfile::tempdir_in(disk.folder()).expect("a folder");
    let mut line = disk.serve_arguments();
    line.push("--incoming".into());
    line.extend(["--socket-path".into(), folder.path().join("s").into()]);
    let mut process = Process::start(folder.path(), &line);
    assert_eq!(process.wait(PATIENCE).code(), Some(1));
    let log = process.log();
    assert!(log.contains("--incoming needs the one"), "{log}");
}
