// SPDX-License-Identifier: Apache-2.0
//! A disk and the daemons that serve it one after the other, or wait for each other.

use std::ffi::OsString;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::common::{FaultyFile, Process, SECTOR, Signal, temporary_folder};

/// How long anything may take on a machine that does other things too. What has a bound of its own
/// is measured.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// Sectors of a disk: eight extents of 1 MiB.
pub const SECTORS: usize = 16 << 10;

/// Replicas, a place for a socket, and a record that says that all replicas are equal.
pub struct Site {
    // First: what hangs fails when its server ends.
    faulty: Vec<Option<FaultyFile>>,
    /// Where the bytes are.
    images: Vec<PathBuf>,
    /// What is served.
    pub paths: Vec<PathBuf>,
    /// Where front-ends look for the disk.
    pub socket: PathBuf,
    arguments: Vec<OsString>,
    folder: tempfile::TempDir,
}

/// A daemon with a log of its own.
pub struct Daemon {
    process: Process,
    events: PathBuf,
}

impl Site {
    /// Three fresh replicas, of which some go wrong on command.
    pub fn new(faulty: &[usize], arguments: &[&str]) -> Self {
        let folder = temporary_folder();
        let images: Vec<PathBuf> = (0..3)
            .map(|index| folder.path().join(format!("{index}.img")))
            .collect();
        for image in &images {
            let file = File::create(image).unwrap();
            file.set_len((SECTORS * SECTOR) as u64).unwrap();
        }
        let mut site = Self {
            faulty: images.iter().map(|_| None).collect(),
            paths: images.clone(),
            images,
            socket: folder.path().join("disk.sock"),
            arguments: arguments.iter().map(OsString::from).collect(),
            folder,
        };
        for &index in faulty {
            let file = FaultyFile::new(&site.images[index]);
            site.paths[index].clone_from(&file.path);
            site.faulty[index] = Some(file);
        }
        site
    }

    /// The folder of everything.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// A replica that was made to go wrong.
    pub fn fault(&self, index: usize) -> &FaultyFile {
        self.faulty[index].as_ref().expect("a faulty replica")
    }

    /// What the daemon is started with, but for where it listens. `name` is that of its log.
    pub fn serve_arguments(&self, name: &str) -> Vec<OsString> {
        let mut arguments: Vec<OsString> = vec!["serve".into(), "--assume-clean".into()];
        for path in &self.paths {
            arguments.extend(["--replica".into(), path.into()]);
        }
        arguments.extend(["--events".into(), self.events_of(name).into()]);
        arguments.extend(self.arguments.iter().cloned());
        arguments
    }

    /// The same as a file. The record says already that all replicas are equal if it was served
    /// before.
    pub fn config_file(&self, name: &str) -> PathBuf {
        let quoted = |path: &Path| serde_json::to_string(path).expect("a path in a test is text");
        let replicas: Vec<String> = self.paths.iter().map(|path| quoted(path)).collect();
        let text = format!(
            "assume-clean = true\nreplica = [{}]\nevents = {}\n",
            replicas.join(", "),
            quoted(&self.events_of(name)),
        );
        let file = self.folder().join("disk.toml");
        fs::write(&file, text).unwrap();
        file
    }

    /// The folder for the log of a daemon.
    pub fn folder_of(&self, name: &str) -> PathBuf {
        let folder = self.folder().join(name);
        fs::create_dir_all(&folder).unwrap();
        folder
    }

    fn events_of(&self, name: &str) -> PathBuf {
        self.folder_of(name).join("events.jsonl")
    }

    /// Starts a daemon on the socket and does not wait for it.
    pub fn launch(&self, name: &str, more: &[&str]) -> Daemon {
        let mut arguments = self.serve_arguments(name);
        arguments.extend(["--socket-path".into(), self.socket.clone().into()]);
        arguments.extend(more.iter().map(OsString::from));
        let process = Process::start(&self.folder_of(name), &arguments);
        self.daemon(name, process)
    }

    /// A daemon that was started otherwise.
    pub fn daemon(&self, name: &str, process: Process) -> Daemon {
        Daemon {
            process,
            events: self.events_of(name),
        }
    }

    /// Starts a daemon and waits until it serves.
    pub fn start(&self, name: &str) -> Daemon {
        let mut daemon = self.launch(name, &[]);
        daemon.await_log("ready for a front-end");
        daemon
    }

    /// Waits until all replicas hold the same bytes; the guest must not write meanwhile.
    #[track_caller]
    pub fn await_equal(&self) {
        let equal = || {
            let first = fs::read(&self.images[0]).unwrap();
            let mut others = self.images[1..].iter();
            others.all(|image| fs::read(image).unwrap() == first)
        };
        await_that("the replicas are equal", equal);
    }
}

impl Daemon {
    /// What it has said.
    pub fn log(&self) -> String {
        self.process.log()
    }

    /// Waits until it says this.
    #[track_caller]
    pub fn await_log(&mut self, text: &str) {
        let deadline = Instant::now() + PATIENCE;
        while !self.log().contains(text) {
            let ended = self.process.ended();
            assert!(ended.is_none(), "it ended with {ended:?}: {}", self.log());
            assert!(Instant::now() < deadline, "no {text:?}: {}", self.log());
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        self.process.signal(signal);
    }

    /// Whether it is still there.
    pub fn is_running(&mut self) -> bool {
        self.process.ended().is_none()
    }

    /// Waits for its end after it was terminated, which must be a good one.
    #[track_caller]
    pub fn ends_well(&mut self) {
        let status = self.process.wait(PATIENCE);
        assert_eq!(status.code(), Some(0), "{status}: {}", self.log());
    }

    /// Waits for its end where it must not go on. Returns what it says.
    #[track_caller]
    pub fn refuses(&mut self) -> String {
        let status = self.process.wait(PATIENCE);
        assert_eq!(status.code(), Some(1), "{status}: {}", self.log());
        self.log()
    }

    /// Kills it and waits for its end.
    pub fn kill(&mut self) {
        self.process.signal(Signal::Kill);
        self.process.wait(PATIENCE);
    }

    /// Ends it; all extents must be clean afterwards.
    #[track_caller]
    pub fn stop(&mut self) {
        self.signal(Signal::Terminate);
        self.ends_well();
        let log = self.log();
        assert!(log.contains("every extent is clean"), "{log}");
    }

    /// The data of its events of one name.
    pub fn events(&self, name: &str) -> Vec<Value> {
        let text = fs::read_to_string(&self.events).unwrap_or_default();
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

    /// Fails if a request found no quorum.
    #[track_caller]
    pub fn assert_no_failure(&self) {
        let failures = self.events("QUORUM_FAILURE");
        assert!(failures.is_empty(), "{failures:#?}\n{}", self.log());
    }
}

/// Waits for something.
#[track_caller]
pub fn await_that(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "not in {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}
