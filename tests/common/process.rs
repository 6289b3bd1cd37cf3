// SPDX-License-Identifier: Apache-2.0
//! A daemon process and what can be seen of it from outside.

#![allow(
    unsafe_code,
    reason = "std has no call to send a child process another signal than SIGKILL"
)]

use std::ffi::OsString;
use std::fs::OpenOptions;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// What a daemon may be sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Signal {
    Terminate,
    Interrupt,
    Kill,
    User1,
    User2,
}

/// A daemon. Killed when dropped; its log is printed if a test fails meanwhile.
pub struct Process {
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts the program with these arguments; its standard error goes to a file in `folder`.
    pub fn start(folder: &Path, arguments: &[OsString]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_quorum-blk"));
        command.args(arguments).stdin(Stdio::null());
        Self::spawn(folder, command)
    }

    /// Like [`Process::start`] with a socket as descriptor 3.
    pub fn start_with_socket(folder: &Path, socket: OwnedFd, arguments: &[OsString]) -> Self {
        let mut command = Command::new("sh");
        command
            .args(["-c", "exec \"$0\" \"$@\" 3<&0 0</dev/null"])
            .arg(env!("CARGO_BIN_EXE_quorum-blk"))
            .args(arguments)
            .stdin(socket);
        Self::spawn(folder, command)
    }

    /// Like [`Process::start`] as systemd starts the service of a `.socket` unit: `count` times the
    /// socket from descriptor 3 on, if there is one, and `notify` to tell the state to.
    pub fn start_as_service(
        folder: &Path,
        socket: Option<(OwnedFd, u32)>,
        notify: Option<&Path>,
        arguments: &[OsString],
    ) -> Self {
        let mut command = Command::new("sh");
        let sockets = socket.as_ref().map_or(0, |(_, count)| *count);
        let opened: String = (3..3 + sockets).map(|fd| format!(" {fd}<&0")).collect();
        let line =
            format!("LISTEN_PID=$$; export LISTEN_PID; exec \"$0\" \"$@\"{opened} 0</dev/null");
        command
            .args(["-c", &line])
            .arg(env!("CARGO_BIN_EXE_quorum-blk"))
            .args(arguments)
            .env("LISTEN_FDS", sockets.to_string());
        if let Some((socket, _)) = socket {
            command.stdin(socket);
        }
        if let Some(notify) = notify {
            command.env("NOTIFY_SOCKET", notify);
        }
        Self::spawn(folder, command)
    }

    fn spawn(folder: &Path, mut command: Command) -> Self {
        let log = folder.join("daemon.log");
        let file = OpenOptions::new().create(true).append(true).open(&log);
        let file = file.expect("a log file");
        let child = command
            .stdout(Stdio::null())
            .stderr(file)
            .spawn()
            .expect("the program starts");
        Self { child, log }
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("a child of ours")
    }

    /// Its number.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        let number = match signal {
            Signal::Terminate => libc::SIGTERM,
            Signal::Interrupt => libc::SIGINT,
            Signal::Kill => libc::SIGKILL,
            Signal::User1 => libc::SIGUSR1,
            Signal::User2 => libc::SIGUSR2,
        };
        let process = libc::pid_t::try_from(self.child.id()).expect("process numbers fit");
        // SAFETY: the child has not been waited for, or the number is not in use; kill has no
        // memory effects.
        unsafe { libc::kill(process, number) };
    }

    /// Waits for its end.
    pub fn wait(&mut self, patience: Duration) -> ExitStatus {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(status) = self.ended() {
                return status;
            }
            assert!(Instant::now() < deadline, "the daemon does not end");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// What it wrote to its standard error.
    pub fn log(&self) -> String {
        let bytes = std::fs::read(&self.log).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Memory of its own, without the guest's, in KiB.
    pub fn resident_kib(&self) -> u64 {
        let path = format!("/proc/{}/status", self.child.id());
        let status = std::fs::read_to_string(path).expect("a running process");
        let line = status.lines().find(|line| line.starts_with("RssAnon:"));
        let number = line.and_then(|line| line.split_whitespace().nth(1));
        number.and_then(|text| text.parse().ok()).expect("a number")
    }

    /// Number of open descriptors.
    pub fn descriptors(&self) -> usize {
        let path = format!("/proc/{}/fd", self.child.id());
        std::fs::read_dir(path).expect("a running process").count()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail after its end, which is as it should be.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- log of the daemon\n{}---", self.log());
        }
    }
}
