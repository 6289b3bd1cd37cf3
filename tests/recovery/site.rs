// SPDX-License-Identifier: Apache-2.0
//! A disk with its daemon, replicas that can be made to fail, and what is seen of them.

use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use quorum_blk::front_end::{FrontEnd, FrontEndError, Options};
use serde_json::Value;

use crate::common::{FaultyFile, Process, SECTOR, Signal, temporary_folder};

/// How long a daemon may need to come up or to end on a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);
/// Within this time after the last fault all replicas are to be alike.
pub const SETTLED: Duration = Duration::from_secs(30);
/// Sectors of a disk: extents of 1 MiB, eight of them.
pub const SECTORS: usize = 16 << 10;

/// Replicas and whoever serves them.
pub struct Site {
    // In this order: what hangs fails when its server ends, and then the daemon can end too.
    faulty: Vec<Option<FaultyFile>>,
    process: Option<Process>,
    /// What the daemon opens.
    pub paths: Vec<PathBuf>,
    /// Where the bytes are.
    pub images: Vec<PathBuf>,
    /// Where it listens.
    pub socket: PathBuf,
    events: PathBuf,
    arguments: Vec<OsString>,
    /// Lengths of log and events when the daemon was last started.
    log_start: usize,
    events_start: usize,
    folder: tempfile::TempDir,
}

impl Site {
    /// Three fresh files, which are taken to be equal.
    pub fn new(arguments: &[&str]) -> Self {
        Self::bare(arguments).adopted(&["--assume-clean"])
    }

    /// Three fresh files that were never served.
    pub fn bare(arguments: &[&str]) -> Self {
        Self::bare_of(3, arguments)
    }

    /// So many fresh files that were never served.
    fn bare_of(count: usize, arguments: &[&str]) -> Self {
        let folder = temporary_folder();
        let images: Vec<PathBuf> = (0..count)
            .map(|index| folder.path().join(format!("{index}.img")))
            .collect();
        for image in &images {
            let file = File::create(image).expect("an image");
            file.set_len((SECTORS * SECTOR) as u64)
                .expect("a sparse image");
        }
        Self {
            faulty: images.iter().map(|_| None).collect(),
            process: None,
            paths: images.clone(),
            images,
            socket: folder.path().join("disk.sock"),
            events: folder.path().join("events.jsonl"),
            arguments: arguments.iter().map(OsString::from).collect(),
            log_start: 0,
            events_start: 0,
            folder,
        }
    }

    /// The same with replicas that go wrong on command.
    pub fn faulty(faulty: &[usize], arguments: &[&str]) -> Self {
        Self::faulty_of(3, faulty, arguments)
    }

    /// The same with so many replicas.
    pub fn faulty_of(count: usize, faulty: &[usize], arguments: &[&str]) -> Self {
        let mut site = Self::bare_of(count, arguments);
        for &index in faulty {
            let file = FaultyFile::new(&site.images[index]);
            site.paths[index].clone_from(&file.path);
            site.faulty[index] = Some(file);
        }
        site.adopted(&["--assume-clean"])
    }

    /// Served for the first time.
    fn adopted(mut self, first: &[&str]) -> Self {
        self.start_with(first);
        self
    }

    /// The folder of everything.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// A replica that was made to go wrong.
    pub fn fault(&self, index: usize) -> &FaultyFile {
        self.faulty[index].as_ref().expect("a faulty replica")
    }

    /// Where a copy of the record is.
    pub fn record(&self, index: usize) -> PathBuf {
        let mut name = self.paths[index].clone().into_os_string();
        name.push(".qrec");
        name.into()
    }

    fn launch(&mut self, more: &[&str]) {
        self.log_start = self.whole_log().len();
        self.events_start = fs::read(&self.events).map_or(0, |bytes| bytes.len());
        let mut arguments: Vec<OsString> = vec!["serve".into()];
        for path in &self.paths {
            arguments.extend(["--replica".into(), path.into()]);
        }
        arguments.extend(["--socket-path".into(), self.socket.clone().into()]);
        arguments.extend(["--events".into(), self.events.clone().into()]);
        arguments.extend(self.arguments.iter().cloned());
        arguments.extend(more.iter().map(OsString::from));
        self.process = Some(Process::start(self.folder.path(), &arguments));
    }

    /// Starts the daemon on what is there.
    pub fn start(&mut self) {
        self.start_with(&[]);
    }

    /// The same with more arguments.
    pub fn start_with(&mut self, more: &[&str]) {
        self.launch(more);
        let deadline = Instant::now() + PATIENCE;
        while !self.is_serving() {
            let ended = self.process().ended();
            assert!(ended.is_none(), "it ended with {ended:?}: {}", self.log());
            assert!(Instant::now() < deadline, "nobody listens: {}", self.log());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Waits until the daemon that was started listens.
    #[track_caller]
    pub fn await_serving(&self) {
        self.wait_for(SETTLED, "listener", || self.is_serving());
    }

    fn is_serving(&self) -> bool {
        match FrontEnd::negotiate(&self.socket, &Options::default()) {
            Ok(_) => true,
            Err(FrontEndError::Connect { .. }) => false,
            Err(error) => panic!("the daemon does not negotiate: {error:?}"),
        }
    }

    /// Starts the daemon and does not wait for it.
    pub fn start_and_leave(&mut self) {
        self.start_and_leave_with(&[]);
    }

    /// The same with more arguments.
    pub fn start_and_leave_with(&mut self, more: &[&str]) {
        self.launch(more);
    }

    /// Starts the daemon where it must not start. Returns what it says.
    #[track_caller]
    pub fn refused(&mut self, more: &[&str]) -> String {
        self.launch(more);
        let status = self.process().wait(PATIENCE);
        assert_eq!(status.code(), Some(1), "{status}: {}", self.log());
        self.process = None;
        self.log()
    }

    /// The running daemon.
    pub fn process(&mut self) -> &mut Process {
        self.process.as_mut().expect("the daemon was started")
    }

    /// Sends the running daemon a signal.
    pub fn signal(&self, signal: Signal) {
        let process = self.process.as_ref();
        process.expect("the daemon was started").signal(signal);
    }

    /// Kills the daemon and waits for its end.
    pub fn kill(&mut self) {
        self.process().signal(Signal::Kill);
        self.process().wait(PATIENCE);
    }

    /// Ends the daemon; that must be a clean end, and say so.
    #[track_caller]
    pub fn stop(&mut self) {
        let log = self.stop_anyhow();
        assert!(log.contains("every extent is clean"), "{log}");
    }

    /// Ends the daemon with status 0. Returns the log.
    #[track_caller]
    pub fn stop_anyhow(&mut self) -> String {
        self.process().signal(Signal::Terminate);
        let status = self.process().wait(Duration::from_secs(40));
        let log = self.log();
        assert_eq!(status.code(), Some(0), "{status}: {log}");
        log
    }

    fn whole_log(&self) -> String {
        let bytes = fs::read(self.folder.path().join("daemon.log"));
        String::from_utf8_lossy(&bytes.unwrap_or_default()).into_owned()
    }

    /// What the daemon that runs, or ran last, has said.
    pub fn log(&self) -> String {
        self.whole_log()[self.log_start..].to_owned()
    }

    /// Waits until it says this.
    #[track_caller]
    pub fn await_log(&self, text: &str) {
        self.wait_for(SETTLED, text, || self.log().contains(text));
    }

    /// Events of one name since it was started, without what they have in common.
    pub fn events(&self, name: &str) -> Vec<Value> {
        let bytes = fs::read(&self.events).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes[self.events_start.min(bytes.len())..]);
        let whole = text.rsplit_once('\n').map_or("", |(lines, _)| lines);
        let events = whole.lines().map(|line| {
            let event: Value = serde_json::from_str(line).expect("a line of JSON");
            event
        });
        events
            .filter(|event| event["event"] == name)
            .map(|event| event["data"].clone())
            .collect()
    }

    /// Waits for an event that is right.
    #[track_caller]
    pub fn await_event(&self, name: &str, right: impl Fn(&Value) -> bool) {
        self.wait_for(SETTLED, name, || self.events(name).iter().any(&right));
    }

    /// Waits until its status finds all replicas in sync.
    #[track_caller]
    pub fn await_healthy(&mut self) {
        let deadline = Instant::now() + SETTLED;
        loop {
            let status = self.status();
            if status.contains("the disk is healthy") {
                return;
            }
            assert!(Instant::now() < deadline, "{status}\n{}", self.log());
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// The state that was last told of a replica, if it has changed since the start.
    pub fn state(&self, index: usize) -> Option<String> {
        let events = self.events("QUORUM_BLK_REPLICA_STATE");
        let name = format!("replica{index}");
        let last = events.iter().rev().find(|data| data["replica"] == *name)?;
        last["to"].as_str().map(str::to_owned)
    }

    /// Waits until a replica was told to be in this state.
    #[track_caller]
    pub fn await_state(&self, index: usize, state: &str) {
        let what = format!("replica{index} {state}");
        self.wait_for(SETTLED, &what, || {
            self.state(index).as_deref() == Some(state)
        });
    }

    /// Fails if a request found no quorum.
    #[track_caller]
    pub fn assert_no_failure(&self) {
        let failures = self.events("QUORUM_FAILURE");
        assert!(failures.is_empty(), "{failures:#?}\n{}", self.log());
    }

    /// The status it writes to its log on SIGUSR1.
    pub fn status(&mut self) -> String {
        let before = self.log().len();
        self.process().signal(Signal::User1);
        let mut status = String::new();
        self.wait_for(PATIENCE, "a status", || {
            status = self.log()[before..].to_owned();
            status.contains("the disk is") && status.contains("counters")
        });
        status
    }

    /// Waits until all replicas hold the same bytes; the guest must not write meanwhile.
    #[track_caller]
    pub fn await_equal(&self) {
        let deadline = Instant::now() + SETTLED;
        while let Some(difference) = self.difference() {
            let log = self.log();
            assert!(Instant::now() < deadline, "{difference}\n{log}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// The first sector in which replicas differ, in words.
    pub fn difference(&self) -> Option<String> {
        let first = fs::read(&self.images[0]).expect("an image");
        for image in &self.images[1..] {
            let other = fs::read(image).expect("an image");
            let sectors = first.chunks(SECTOR).zip(other.chunks(SECTOR));
            let differing = sectors.enumerate().filter(|(_, (a, b))| a != b);
            let differing: Vec<usize> = differing.map(|(at, _)| at).collect();
            if first.len() != other.len() {
                return Some(format!("{} has another length", image.display()));
            }
            if let Some(at) = differing.first() {
                let count = differing.len();
                return Some(format!(
                    "{} differs in {count} sectors from {at} on",
                    image.display()
                ));
            }
        }
        None
    }

    /// Writes `byte` all over some sectors of an image, behind the daemon's back.
    pub fn spoil(&self, index: usize, sector: usize, count: usize, byte: u8) {
        let file = File::options().write(true).open(&self.images[index]);
        file.expect("an image")
            .write_all_at(&vec![byte; count * SECTOR], (sector * SECTOR) as u64)
            .expect("sectors inside the image");
    }

    #[track_caller]
    fn wait_for(&self, limit: Duration, what: &str, mut done: impl FnMut() -> bool) {
        let deadline = Instant::now() + limit;
        while !done() {
            let log = self.log();
            assert!(Instant::now() < deadline, "no {what:?} in {limit:?}: {log}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}
