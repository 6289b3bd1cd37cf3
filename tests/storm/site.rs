// SPDX-License-Identifier: Apache-2.0
//! Three replicas, and one daemon after the other to serve them.

use std::ffi::OsString;
use std::fs::{self, File};
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::common::{FaultyFile, Process, SECTOR, Signal, temporary_folder};

/// How long anything may take that has no reason to take long, on a machine that is busy.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// Sectors of the disk: 64 extents of 1 MiB.
pub const SECTORS: usize = 64 << 11;
/// The replica that is slow.
const SLOW: usize = 1;
/// The replica that leaves and comes back.
const LEAVING: usize = 2;

/// A longer log is put aside, so that a failure shows the last lives and not thousands.
const LOG_BYTES_MAX: usize = 128 << 10;

/// However often a replica fails, it is not given up.
const LENIENT: [&str; 6] = [
    "--max-write-errors",
    "0",
    "--max-kicks",
    "0",
    "--max-repairs",
    "0",
];

/// Replicas and their daemon.
pub struct Site {
    // First: what is late is answered when its server ends, and then the daemon can end too.
    slow: Option<FaultyFile>,
    process: Option<Process>,
    images: Vec<PathBuf>,
    /// Where it listens.
    pub socket: PathBuf,
    /// What was put aside of the log.
    earlier: String,
    folder: tempfile::TempDir,
}

impl Site {
    /// Three fresh replicas, which are taken to be equal. One of them may be `late` by some
    /// milliseconds with every answer.
    pub fn new(late: Option<u32>) -> Self {
        let folder = temporary_folder();
        let path = |index: usize| folder.path().join(format!("{index}.img"));
        let images: Vec<PathBuf> = (0..3).map(path).collect();
        for image in &images {
            let file = File::create(image).expect("an image");
            file.set_len((SECTORS * SECTOR) as u64)
                .expect("a sparse image");
        }
        let slow = late.map(|late| {
            let file = FaultyFile::new(&images[SLOW]);
            file.tell(&format!("delay 0.{late:03}"));
            file
        });
        Self {
            slow,
            process: None,
            socket: folder.path().join("disk.sock"),
            earlier: String::new(),
            images,
            folder,
        }
    }

    /// What the daemon opens.
    fn paths(&self) -> Vec<PathBuf> {
        let mut paths = self.images.clone();
        if let Some(slow) = &self.slow {
            paths[SLOW].clone_from(&slow.path);
        }
        paths
    }

    /// Starts a daemon and does not wait for it.
    pub fn launch(&mut self) {
        let log = self.log();
        if log.len() > LOG_BYTES_MAX {
            self.earlier.push_str(&log);
            fs::remove_file(self.log_path()).expect("ours");
        }
        let mut arguments: Vec<OsString> = vec!["serve".into(), "--assume-clean".into()];
        for path in self.paths() {
            arguments.extend(["--replica".into(), path.into()]);
        }
        arguments.extend(["--socket-path".into(), self.socket.clone().into()]);
        arguments.extend(["--events".into(), self.events_path().into()]);
        arguments.extend(LENIENT.map(OsString::from));
        // Fewer pages to fault in at every start.
        arguments.extend(["--workers", "2", "--buffer-memory", "16M"].map(OsString::from));
        // What a killed daemon held is closed by one thread of the kernel for all processes of the
        // machine: whatever hangs there holds up the locks of everybody.
        arguments.extend(["--lock-timeout", "25"].map(OsString::from));
        self.process = Some(Process::start(self.folder.path(), &arguments));
    }

    fn process(&mut self) -> &mut Process {
        self.process.as_mut().expect("it was started")
    }

    /// Kills the daemon, which `reap` must wait for.
    pub fn kill(&self) {
        let process = self.process.as_ref();
        process.expect("it was started").signal(Signal::Kill);
    }

    /// Sends the daemon SIGTERM.
    pub fn ask_to_end(&self) {
        let process = self.process.as_ref();
        process.expect("it was started").signal(Signal::Terminate);
    }

    /// Waits for the end of a daemon that was killed, perhaps while it ended as it was asked to.
    pub fn reap(&mut self, asked: bool) {
        let status = self.process().wait(PATIENCE);
        let expected = status.code().is_none() || asked && status.code() == Some(0);
        assert!(expected, "it ended by itself, {status}: {}", self.log());
    }

    /// Ends the daemon kindly. Returns whether every extent was clean then.
    #[track_caller]
    pub fn stop(&mut self) -> bool {
        let before = self.log().len();
        self.process().signal(Signal::Terminate);
        let status = self.process().wait(PATIENCE);
        let log = self.log();
        assert_eq!(status.code(), Some(0), "{status}: {log}");
        log[before..].contains("every extent is clean")
    }

    /// Takes a replica away, or puts it back as it was then.
    pub fn set_away(&self, away: bool) {
        let place = &self.images[LEAVING];
        let aside = place.with_extension("aside");
        let (from, to) = if away {
            (place, &aside)
        } else {
            (&aside, place)
        };
        fs::rename(from, to).expect("ours");
    }

    /// The slow replica answers at once.
    pub fn hurry(&self) {
        if let Some(slow) = &self.slow {
            slow.tell("delay 0");
        }
    }

    fn log_path(&self) -> PathBuf {
        self.folder.path().join("daemon.log")
    }

    /// What the last daemons have said.
    pub fn log(&self) -> String {
        let bytes = fs::read(self.log_path()).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// What all of them have said.
    pub fn whole_log(&self) -> String {
        [&self.earlier[..], &self.log()].concat()
    }

    fn events_path(&self) -> PathBuf {
        self.folder.path().join("events.jsonl")
    }

    /// How often an event of this name was told.
    pub fn count_events(&self, name: &str) -> usize {
        let events = fs::read_to_string(self.events_path()).unwrap_or_default();
        events.matches(&format!("\"{name}\"")).count()
    }

    /// Waits until the daemon says that all replicas are in sync; fails if that takes long.
    #[track_caller]
    pub fn await_healthy(&mut self) {
        self.await_status("the disk is healthy");
    }

    /// Waits until nothing is in doubt any more that an unclean end has left.
    #[track_caller]
    pub fn await_settled(&mut self) {
        self.await_status(", 0 to be settled");
    }

    #[track_caller]
    fn await_status(&mut self, text: &str) {
        let deadline = Instant::now() + 2 * PATIENCE;
        loop {
            let before = self.log().len();
            self.process().signal(Signal::User1);
            let mut status = String::new();
            while !status.contains("counters") && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(5));
                self.log()[before..].clone_into(&mut status);
            }
            if status.contains(text) {
                return;
            }
            assert!(Instant::now() < deadline, "not {text:?}: {status}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits until all replicas hold the same bytes; nobody may write meanwhile. Returns them.
    #[track_caller]
    pub fn await_equal(&self) -> Vec<u8> {
        let deadline = Instant::now() + 2 * PATIENCE;
        loop {
            let read = |image: &PathBuf| fs::read(image).expect("an image");
            let first = read(&self.images[0]);
            let differing = |image: &&PathBuf| read(image) != first;
            let Some(image) = self.images[1..].iter().find(differing) else {
                return first;
            };
            let log = self.log();
            assert!(Instant::now() < deadline, "{}: {log}", image.display());
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// What `record show` prints of a disk that was stopped; it must find nothing wrong.
    #[track_caller]
    pub fn record(&self) -> String {
        let mut command = Command::new(env!("CARGO_BIN_EXE_quorum-blk"));
        command.args(["record", "show"]);
        for path in self.paths() {
            command.arg("--replica").arg(path);
        }
        let output = command.output().expect("the program runs");
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{errors}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }
}
