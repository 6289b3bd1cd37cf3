// SPDX-License-Identifier: Apache-2.0
//! What the integration tests share: the real daemon on images in a folder of its own, looked at
//! from outside, with a limit on every wait. A daemon whose test fails has its log printed.

#![allow(
    dead_code,
    unused_imports,
    reason = "every test binary uses its own part of this"
)]

mod faulty;
mod process;
mod random;

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use quorum_blk::front_end::{FrontEnd, FrontEndError, Options};
use serde_json::Value;

pub use faulty::FaultyFile;
pub use process::{Process, Signal};
pub use random::Random;

/// Bytes in a sector.
pub const SECTOR: usize = 512;

/// How long anything may take that has no reason to take long.
pub const PATIENCE: Duration = Duration::from_secs(5);

/// What to serve.
#[derive(Clone, Debug)]
pub struct Setup {
    replicas: usize,
    bytes: u64,
    arguments: Vec<OsString>,
}

impl Setup {
    /// Three replicas of 8 MiB, served with the default settings.
    pub fn new() -> Self {
        Self {
            replicas: 3,
            bytes: 8 << 20,
            arguments: Vec::new(),
        }
    }

    /// Another number of replicas.
    pub fn replicas(mut self, replicas: usize) -> Self {
        self.replicas = replicas;
        self
    }

    /// Another size.
    pub fn bytes(mut self, bytes: u64) -> Self {
        self.bytes = bytes;
        self
    }

    /// More arguments of `serve`.
    pub fn arguments(mut self, arguments: &[&str]) -> Self {
        self.arguments.extend(arguments.iter().map(OsString::from));
        self
    }

    /// Makes the images and starts the daemon on them.
    pub fn start(self) -> Disk {
        let folder = temporary_folder();
        let images: Vec<PathBuf> = (0..self.replicas)
            .map(|index| folder.path().join(format!("replica{index}.img")))
            .collect();
        for image in &images {
            let file = File::create(image).expect("an image");
            file.set_len(self.bytes).expect("a sparse image");
        }
        let mut disk = Disk {
            socket: folder.path().join("disk.sock"),
            events: folder.path().join("events.jsonl"),
            images,
            arguments: self.arguments,
            process: None,
            folder,
        };
        disk.start_again();
        disk
    }
}

/// A disk that is served by a daemon, or was.
pub struct Disk {
    // Before the folder, so that the daemon is gone when its files are removed.
    process: Option<Process>,
    /// Where it listens.
    pub socket: PathBuf,
    /// Where it writes events.
    pub events: PathBuf,
    /// The replicas.
    pub images: Vec<PathBuf>,
    arguments: Vec<OsString>,
    folder: tempfile::TempDir,
}

impl Disk {
    /// The folder of everything.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The arguments of `serve` but for the socket.
    pub fn serve_arguments(&self) -> Vec<OsString> {
        let mut arguments: Vec<OsString> = vec!["serve".into()];
        for image in &self.images {
            arguments.extend(["--replica".into(), image.into()]);
        }
        arguments.extend(["--events".into(), self.events.clone().into()]);
        if !direct_possible(&self.images[0]) {
            arguments.extend(["--cache".into(), "buffered".into()]);
        }
        // New images are compared in the background, which finds what a test means to be found by
        // something else. Whoever has a say about the record of its own has it.
        let own = ["--record", "--adopt-from", "--assume-clean", "--config"];
        let said = |argument: &OsString| {
            let argument = argument.to_string_lossy();
            own.iter().any(|own| argument.starts_with(own))
        };
        if !self.arguments.iter().any(said) {
            arguments.push("--assume-clean".into());
        }
        arguments.extend(self.arguments.iter().cloned());
        arguments
    }

    /// Other arguments of `serve` from the next start on.
    pub fn set_arguments(&mut self, arguments: &[&str]) {
        self.arguments = arguments.iter().map(OsString::from).collect();
    }

    /// Starts the daemon on the images as they are, which it must refuse. Returns what it says.
    pub fn refusal(&mut self) -> String {
        let mut arguments = self.serve_arguments();
        arguments.extend(["--socket-path".into(), self.socket.clone().into()]);
        self.process = None;
        let before = std::fs::read_to_string(self.folder().join("daemon.log"));
        let before = before.unwrap_or_default().len();
        let mut process = Process::start(self.folder(), &arguments);
        let status = process.wait(PATIENCE);
        let log = process.log();
        self.process = Some(process);
        assert_eq!(status.code(), Some(1), "{log}");
        log[before..].to_owned()
    }

    /// Starts the daemon on the images as they are and waits until it serves.
    pub fn start_again(&mut self) {
        let mut arguments = self.serve_arguments();
        arguments.extend(["--socket-path".into(), self.socket.clone().into()]);
        let process = Process::start(self.folder(), &arguments);
        self.process = Some(process);
        let deadline = Instant::now() + PATIENCE;
        loop {
            match FrontEnd::negotiate(&self.socket, &Options::default()) {
                Ok(_) => return,
                Err(FrontEndError::Connect { .. }) => {}
                Err(error) => panic!("the daemon does not negotiate: {error:?}"),
            }
            self.assert_alive();
            assert!(Instant::now() < deadline, "the daemon does not listen");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// The running daemon.
    pub fn process(&mut self) -> &mut Process {
        self.process.as_mut().expect("the daemon was started")
    }

    /// Fails if the daemon has ended.
    pub fn assert_alive(&mut self) {
        let ended = self.process().ended();
        assert!(ended.is_none(), "the daemon ended with {ended:?}");
    }

    /// A front-end that fails soon.
    pub fn connect(&self, options: &Options) -> FrontEnd {
        let options = Options {
            timeout: PATIENCE,
            ..*options
        };
        FrontEnd::connect(&self.socket, &options).expect("the daemon serves")
    }

    /// Sends a signal and waits for the end.
    pub fn end(&mut self, signal: Signal) -> ExitStatus {
        let process = self.process();
        process.signal(signal);
        process.wait(PATIENCE)
    }

    /// Ends the daemon as a service manager does; it must end well.
    pub fn stop(&mut self) {
        let status = self.end(Signal::Terminate);
        assert_eq!(status.code(), Some(0), "{status}");
    }

    /// Stops the daemon and checks that all replicas hold exactly `expected`; see
    /// [`Disk::punctual`].
    pub fn stop_and_expect(&mut self, expected: &[u8]) {
        self.stop();
        for image in self.punctual() {
            let bytes = std::fs::read(image).expect("an image");
            assert_same(image, &bytes, expected);
        }
    }

    /// Stops the daemon and checks that all replicas are equal; see [`Disk::punctual`]. Returns
    /// what they hold.
    pub fn stop_and_compare(&mut self) -> Vec<u8> {
        self.stop();
        let images = self.punctual();
        let first = std::fs::read(images[0]).expect("an image");
        for image in &images[1..] {
            let bytes = std::fs::read(image).expect("an image");
            assert_same(image, &bytes, &first);
        }
        first
    }

    /// The replicas that were never late. A replica that needs 20 ms more than the others for a
    /// write is left behind (rule W6), which on a machine that runs many tests is the machine's
    /// fault. More than half of them must always be on time.
    fn punctual(&self) -> Vec<&Path> {
        let behind = self.events_named("QUORUM_BLK_REPLICA_BEHIND");
        let late: Vec<&str> = behind
            .iter()
            .filter(|event| is_late(event))
            .filter_map(|event| event["data"]["replica"].as_str())
            .collect();
        let images = self.images.iter().enumerate();
        let punctual: Vec<&Path> = images
            .filter(|(index, _)| !late.contains(&format!("replica{index}").as_str()))
            .map(|(_, image)| image.as_path())
            .collect();
        assert!(2 * punctual.len() > self.images.len(), "late: {late:?}");
        punctual
    }

    /// The bytes of some sectors in a replica's file.
    pub fn sectors_of(&self, replica: usize, sector: u64, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count * SECTOR];
        let file = File::open(&self.images[replica]).expect("an image");
        file.read_exact_at(&mut bytes, sector * SECTOR as u64)
            .expect("sectors inside the image");
        bytes
    }

    /// Writes `byte` all over some sectors of a replica's file.
    pub fn spoil(&self, replica: usize, sector: u64, count: usize, byte: u8) {
        let file = OpenOptions::new().write(true).open(&self.images[replica]);
        let file = file.expect("an image");
        file.write_all_at(&vec![byte; count * SECTOR], sector * SECTOR as u64)
            .expect("sectors inside the image");
        file.sync_data().expect("an image on a disk");
    }

    /// Waits until a replica's file has these bytes in these sectors.
    pub fn await_sectors(&self, replica: usize, sector: u64, expected: &[u8]) {
        let found = eventually(|| {
            let bytes = self.sectors_of(replica, sector, expected.len() / SECTOR);
            (bytes == expected).then_some(())
        });
        assert!(found.is_some(), "replica {replica} is not repaired");
    }

    /// All events so far.
    pub fn all_events(&self) -> Vec<Value> {
        let text = std::fs::read_to_string(&self.events).unwrap_or_default();
        let whole = text.rsplit_once('\n').map_or("", |(lines, _)| lines);
        whole
            .lines()
            .map(|line| serde_json::from_str(line).expect("an event is a line of JSON"))
            .collect()
    }

    /// Events of one name so far.
    pub fn events_named(&self, name: &str) -> Vec<Value> {
        let mut events = self.all_events();
        events.retain(|event| event["event"] == name);
        events
    }

    /// Waits for an event of this name whose data are right.
    pub fn await_event(&self, name: &str, right: impl Fn(&Value) -> bool) -> Value {
        let found = eventually(|| {
            let mut events = self.events_named(name).into_iter();
            events.find(|event| right(&event["data"]))
        });
        found.unwrap_or_else(|| panic!("no such {name} among {:#?}", self.all_events()))
    }

    /// Fails if the daemon blamed a replica or gave a request up (rule I15: not without faults).
    /// Being late is excused; see [`Disk::punctual`].
    pub fn assert_nothing_reported(&self) {
        let mut reported = [
            self.events_named("QUORUM_REPORT_BAD"),
            self.events_named("QUORUM_FAILURE"),
            self.events_named("QUORUM_BLK_REPLICA_BEHIND"),
        ]
        .concat();
        reported.retain(|event| !is_late(event));
        assert!(reported.is_empty(), "{reported:#?}");
    }

    /// Fails unless a fresh connection can write, read and close.
    pub fn assert_serves(&mut self) {
        self.assert_alive();
        let mut front_end = self.connect(&Options::default());
        let data = vec![0xa5; 2 * SECTOR];
        let queue = front_end.queue(0);
        queue.write_data(3, &data).expect("a write");
        let mut back = vec![0; 2 * SECTOR];
        queue.read(3, &mut back).expect("a read");
        assert!(back == data, "the data differ");
    }
}

/// A sector number or length as an index into a disk's content.
pub fn index(number: u64) -> usize {
    usize::try_from(number).expect("test disks fit in memory")
}

/// The lowest byte, to fill a buffer with.
pub fn low_byte(number: usize) -> u8 {
    number.to_le_bytes()[0]
}

/// The value, once there is one, unless that takes too long.
pub fn eventually<T>(mut value: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let found = value();
        if found.is_some() || Instant::now() >= deadline {
            return found;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Fails with the first difference, not with megabytes of numbers.
#[track_caller]
pub fn assert_same(what: &Path, bytes: &[u8], expected: &[u8]) {
    assert_eq!(bytes.len(), expected.len(), "length of {}", what.display());
    let differs = bytes.iter().zip(expected).position(|(a, b)| a != b);
    if let Some(at) = differs {
        panic!(
            "{}: sector {} differs at byte {}: {:#x} instead of {:#x}",
            what.display(),
            at / SECTOR,
            at % SECTOR,
            bytes[at],
            expected[at]
        );
    }
}

/// A folder in memory if there is such a place: a replica whose disk is busy with something else
/// for 20 ms is rightly left behind (rule W6), and these tests are not about that.
pub fn temporary_folder() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm")
        .or_else(|_| tempfile::tempdir())
        .expect("a temporary folder")
}

fn is_late(event: &Value) -> bool {
    event["data"]["cause"] == "late"
}

fn direct_possible(image: &Path) -> bool {
    let mut options = OpenOptions::new();
    options.read(true).custom_flags(libc::O_DIRECT);
    options.open(image).is_ok()
}
