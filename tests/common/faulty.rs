// SPDX-License-Identifier: Apache-2.0
//! A file that goes wrong on command: `tests/vm/faulty_file.py`, which tells the commands.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::PATIENCE;

/// A mounted faulty file. Unmounted when dropped, with errors for whatever still waits.
pub struct FaultyFile {
    server: Child,
    /// The file that goes wrong.
    pub path: PathBuf,
    /// The file that holds what got through.
    pub image: PathBuf,
    control: PathBuf,
}

impl FaultyFile {
    /// Shows `image` as `image.faulty` beside it.
    ///
    /// # Panics
    /// Where it cannot be mounted: a test that cannot run must not look like one that passed.
    pub fn new(image: &Path) -> Self {
        Self::start(image, &[])
    }

    /// The same with the host's page cache above it, which outlives closing and opening.
    pub fn cached(image: &Path) -> Self {
        Self::start(image, &["--cached"])
    }

    /// Shows `image` so that it can be opened for reading only.
    pub fn read_only(image: &Path) -> Self {
        Self::start(image, &["--read-only"])
    }

    /// Shows `image` on a file system that has no locks.
    pub fn without_locks(image: &Path) -> Self {
        Self::start(image, &["--no-locks"])
    }

    fn start(image: &Path, arguments: &[&str]) -> Self {
        let path = image.with_extension("faulty");
        let control = image.with_extension("control");
        File::create(&path).expect("a mount point");
        let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vm/faulty_file.py");
        let mut server = Command::new("python3")
            .arg(program)
            .args(arguments)
            .args([image, &path, &control])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("python3 runs; scripts/install-test-deps installs it");
        let mut line = String::new();
        let output = server.stdout.take().expect("a pipe");
        BufReader::new(output).read_line(&mut line).expect("a line");
        if line != "ready\n" {
            let _ = server.wait();
            panic!(
                "a FUSE file system cannot be mounted here: this test needs root, /dev/fuse and \
                 python3"
            );
        }
        Self {
            server,
            path,
            image: image.to_owned(),
            control,
        }
    }

    /// Carries out a command that gives no value.
    pub fn tell(&self, command: &str) {
        assert_eq!(self.send(command), "ok", "{command}");
    }

    /// The number that a command gives.
    pub fn ask(&self, command: &str) -> u64 {
        let answer = self.send(command);
        let value = answer
            .strip_prefix("ok ")
            .and_then(|value| value.parse().ok());
        value.unwrap_or_else(|| panic!("{command}: {answer}"))
    }

    /// Waits until a command gives `value`.
    pub fn wait_until(&self, command: &str, value: u64) {
        let deadline = Instant::now() + PATIENCE;
        while self.ask(command) != value {
            let now = self.ask(command);
            assert!(Instant::now() < deadline, "{command} is {now}, not {value}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Waits until a command gives `value` or more.
    pub fn wait_until_at_least(&self, command: &str, value: u64) {
        let deadline = Instant::now() + PATIENCE;
        while self.ask(command) < value {
            assert!(Instant::now() < deadline, "{command} is less than {value}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Ends the server: the file is then dead, though mounted.
    pub fn kill(&mut self) {
        self.server.kill().expect("a child of ours");
        self.server.wait().expect("a child of ours");
    }

    fn send(&self, command: &str) -> String {
        let mut connection = UnixStream::connect(&self.control).expect("the server runs");
        connection
            .set_read_timeout(Some(PATIENCE))
            .expect("a limit above zero");
        connection
            .write_all(format!("{command}\n").as_bytes())
            .expect("the server listens");
        let mut answer = String::new();
        BufReader::new(connection)
            .read_line(&mut answer)
            .expect("the server answers");
        answer.trim_end().to_owned()
    }
}

impl Drop for FaultyFile {
    fn drop(&mut self) {
        // Ended first: what still waits for an answer then fails instead of holding the mount.
        let _ = self.server.kill();
        let _ = self.server.wait();
        let _ = Command::new("umount")
            .arg("--lazy")
            .arg(&self.path)
            .status();
    }
}
