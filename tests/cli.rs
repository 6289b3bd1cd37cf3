// SPDX-License-Identifier: Apache-2.0
//! The program as users and management layers meet it: messages, exit codes, signals.
#![allow(clippy::unwrap_used, reason = "a test that meets the unexpected fails")]

use std::io::{BufRead, BufReader, Read};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

const PROGRAM: &str = env!("CARGO_BIN_EXE_quorum-blk");
const PATIENCE: Duration = Duration::from_secs(20);

fn run(arguments: &[&str]) -> Output {
    Command::new(PROGRAM).args(arguments).output().unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// A folder with three images of 1 MiB.
struct Disk {
    folder: tempfile::TempDir,
}

impl Disk {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        for name in ["a", "b", "c"] {
            let file = std::fs::File::create(folder.path().join(name)).unwrap();
            file.set_len(1 << 20).unwrap();
        }
        Self { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// `serve` with the three images, through the page cache: the folder may be a tmpfs.
    fn serve(&self, more: &[&str]) -> Command {
        let mut command = Command::new(PROGRAM);
        command.arg("serve").arg("--cache=buffered");
        for name in ["a", "b", "c"] {
            command.arg("--replica").arg(self.path(name));
        }
        command
            .args(more)
            .stderr(Stdio::piped())
            .stdout(Stdio::null());
        command
    }

    fn start(&self, more: &[&str]) -> Daemon {
        let socket = self.path("s");
        let mut command = self.serve(more);
        command.arg("--socket-path").arg(&socket);
        Daemon {
            child: command.spawn().unwrap(),
        }
    }
}

/// A daemon that is killed if a test fails.
struct Daemon {
    child: Child,
}

impl Daemon {
    fn signal(&self, signal: &str) {
        let pid = self.child.id().to_string();
        let status = Command::new("kill").args([signal, &pid]).status().unwrap();
        assert!(status.success());
    }

    /// The exit code and the rest of the log.
    fn wait(mut self) -> (Option<i32>, String) {
        let begin = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(begin.elapsed() < PATIENCE, "the daemon does not end");
            thread::sleep(Duration::from_millis(5));
        };
        let mut log = String::new();
        if let Some(mut stderr) = self.child.stderr.take() {
            stderr.read_to_string(&mut log).unwrap();
        }
        (status.code(), log)
    }

    /// Reads the log until a line with `text`, which is returned with all before it.
    fn log_until(&mut self, text: &str) -> String {
        let mut reader = BufReader::with_capacity(1, self.child.stderr.as_mut().unwrap());
        let mut log = String::new();
        while !log.contains(text) {
            assert!(
                reader.read_line(&mut log).unwrap() > 0,
                "no {text:?} in: {log}"
            );
        }
        log
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn wait_for_socket(path: &Path) {
    let begin = Instant::now();
    while UnixStream::connect(path).is_err() {
        assert!(
            begin.elapsed() < PATIENCE,
            "no daemon on {}",
            path.display()
        );
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn capabilities_are_printed_whatever_else_is_said() {
    let expected = "{\"type\": \"block\", \"features\": [\"read-only\", \"blk-file\"]}\n";
    let lines: [&[&str]; 4] = [
        &["--print-capabilities"],
        &["serve", "--print-capabilities"],
        &[
            "--socket-path",
            "/nonexistent/s",
            "--print-capabilities",
            "--nonsense",
        ],
        &["serve", "--fd", "x", "--print-capabilities"],
    ];
    for arguments in lines {
        let output = run(arguments);
        assert_eq!(output.status.code(), Some(0), "{arguments:?}");
        assert_eq!(stdout(&output), expected);
        assert_eq!(stderr(&output), "");
    }
}

#[test]
fn help_teaches_and_ends_well() {
    let output = run(&["--help"]);
    assert_eq!(output.status.code(), Some(0));
    assert!(stdout(&output).contains("quorum-blk demo"));
    let output = run(&["serve", "--help"]);
    assert_eq!(output.status.code(), Some(0));
    let help = stdout(&output);
    let wanted = [
        "Front-end:",
        "Replicas:",
        "Voting:",
        "Device:",
        "Resources:",
        "Log and events:",
        "vhost-user-blk-pci",
        "cloud-hypervisor",
        "--blk-file",
        "[default: 64M]",
        "SIGUSR1",
    ];
    for text in wanted {
        assert!(help.contains(text), "no {text:?} in the help:\n{help}");
    }
    assert_eq!(run(&["--version"]).status.code(), Some(0));
}

#[test]
fn wrong_usage_ends_with_2_and_one_message() {
    let cases: [(&[&str], &str); 12] = [
        (&[], "Usage"),
        (&["nonsense"], "nonsense"),
        (&["serve"], "give --socket-path PATH, or --fd N"),
        (
            &["serve", "--fd", "3"],
            "give --replica PATH once per replica",
        ),
        (
            &["serve", "--fd", "3", "--socket-path", "s"],
            "cannot be used with",
        ),
        (
            &["serve", "--replica", "a,cash=x"],
            "known: name, cache, format",
        ),
        (
            &["--fd", "3", "--replica", "a", "--threshold", "2"],
            "--threshold 2 is impossible",
        ),
        (
            &["serve", "--threshold", "two"],
            "invalid value 'two' for '--threshold <T>': `two` is not possible; \
             give a whole number from 0 to 255",
        ),
        (
            &["serve", "--num-queues", "70000"],
            "give a whole number from 0 to 65535",
        ),
        (
            &["--fd", "3", "--replica", "a", "--buffer-memory", "100G"],
            "--buffer-memory 100 GiB is too much; give at most 4 GiB",
        ),
        (
            &["--fd", "3", "--replica", "a", "--queue-size", "300"],
            "power of two",
        ),
        (
            &["serve", "--config", "/nonexistent.toml"],
            "/nonexistent.toml: No such file",
        ),
    ];
    for (arguments, message) in cases {
        let output = run(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        let text = stderr(&output);
        assert_eq!(text.matches(message).count(), 1, "{arguments:?}: {text}");
        assert_eq!(stdout(&output), "");
    }
}

#[test]
fn replicas_that_cannot_be_opened_are_named_with_the_cure() {
    let disk = Disk::new();
    let socket = disk.path("s");
    let cases: [(PathBuf, &str); 3] = [
        (
            disk.path("missing"),
            "correct the path, or create the file with the size of the disk",
        ),
        (disk.folder.path().to_owned(), "is a directory"),
        (disk.path("a"), "is the same storage as replica 'replica0'"),
    ];
    for (path, message) in cases {
        let output = disk
            .serve(&["--replica", path.to_str().unwrap()])
            .arg("--socket-path")
            .arg(&socket)
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(1));
        let text = stderr(&output);
        let begin = format!("quorum-blk: replica 'replica3' ({}): ", path.display());
        assert!(text.starts_with(&begin), "{text}");
        assert_eq!(text.matches(message).count(), 1, "{text}");
        assert_eq!(text.lines().count(), 1, "{text}");
        assert!(!socket.exists());
    }
}

#[test]
fn folder_of_the_socket_that_is_missing_is_named() {
    let disk = Disk::new();
    let output = disk
        .serve(&["--socket-path", "/nonexistent/s"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let text = stderr(&output);
    let message = "cannot listen on /nonexistent/s (--socket-path); its folder must exist";
    assert!(text.contains(message), "{text}");
}

#[test]
fn disk_the_guest_only_reads_is_not_told_about_discards() {
    let disk = Disk::new();
    let mut daemon = disk.start(&["--read-only"]);
    let log = daemon.log_until("ready for a front-end");
    assert!(!log.contains("discard"), "{log}");
    daemon.signal("-TERM");
    assert_eq!(daemon.wait().0, Some(0));
}

#[test]
fn configuration_errors_say_where() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.toml");
    std::fs::write(&path, "threshold = 2\ntreshold = 2\n").unwrap();
    let output = run(&["serve", "--config", path.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(2));
    let text = stderr(&output);
    assert!(
        text.contains("disk.toml:2:1: unknown field `treshold`"),
        "{text}"
    );
}

#[test]
fn daemon_says_what_it_lacks_and_ends_well_on_signals() {
    for signal in ["-TERM", "-INT"] {
        let disk = Disk::new();
        let mut daemon = disk.start(&[]);
        let log = daemon.log_until("ready for a front-end");
        assert!(log.contains("without a state record"), "{log}");
        wait_for_socket(&disk.path("s"));
        daemon.signal("-USR1");
        daemon.log_until("malformed chains");
        daemon.signal("-HUP");
        daemon.signal(signal);
        let (code, log) = daemon.wait();
        assert_eq!(code, Some(0), "{log}");
        assert!(
            log.contains("write-zeroes"),
            "no counters at the end: {log}"
        );
        assert!(!disk.path("s").exists());
    }
}

#[test]
fn log_in_json_is_json_on_every_line() {
    let disk = Disk::new();
    let mut daemon = disk.start(&["--log-format", "json"]);
    let mut log = daemon.log_until("ready for a front-end");
    daemon.signal("-TERM");
    let (code, rest) = daemon.wait();
    assert_eq!(code, Some(0));
    log.push_str(&rest);
    let mut counters = 0;
    for line in log.lines() {
        let value: serde_json::Value = serde_json::from_str(line).unwrap();
        if let Some(text) = value.get("counters") {
            let totals: serde_json::Value = serde_json::from_str(text.as_str().unwrap()).unwrap();
            assert_eq!(totals["replicas"][2]["name"], "replica2");
            counters += 1;
        }
    }
    assert_eq!(counters, 1, "{log}");
}

#[test]
fn stale_socket_is_replaced_and_a_live_one_refused() {
    let disk = Disk::new();
    let socket = disk.path("s");
    drop(UnixListener::bind(&socket).unwrap());
    let mut first = disk.start(&[]);
    first.log_until("ready for a front-end");
    let other = Disk::new();
    let output = other
        .serve(&["--socket-path", socket.to_str().unwrap()])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let text = stderr(&output);
    assert!(text.contains("another process is listening on"), "{text}");
    wait_for_socket(&socket);
    first.signal("-TERM");
    assert_eq!(first.wait().0, Some(0));
}

#[test]
fn other_files_are_not_taken_for_sockets() {
    let disk = Disk::new();
    let output = disk
        .serve(&["--socket-path", disk.path("a").to_str().unwrap()])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("is not a socket"),
        "{}",
        stderr(&output)
    );
    assert_eq!(std::fs::metadata(disk.path("a")).unwrap().len(), 1 << 20);
}

#[test]
fn descriptors_that_are_no_sockets_are_refused() {
    let disk = Disk::new();
    let output = disk
        .serve(&["--fd", "0"])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("descriptor 0 (--fd) is not a socket"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn inherited_listening_socket_is_served() {
    let disk = Disk::new();
    let listener = UnixListener::bind(disk.path("parent")).unwrap();
    let mut command = disk.serve(&["--fd", "0"]);
    command.stdin(Stdio::from(std::os::fd::OwnedFd::from(listener)));
    let mut daemon = Daemon {
        child: command.spawn().unwrap(),
    };
    drop(command);
    daemon.log_until("ready for a front-end");
    wait_for_socket(&disk.path("parent"));
    daemon.signal("-TERM");
    assert_eq!(daemon.wait().0, Some(0));
    assert!(disk.path("parent").exists());
}

#[test]
fn events_that_cannot_be_written_prevent_the_start() {
    let disk = Disk::new();
    let socket = disk.path("s");
    let socket = socket.to_str().unwrap();
    let output = disk
        .serve(&["--socket-path", socket, "--events", "/nonexistent/events"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let text = stderr(&output);
    assert!(
        text.contains("cannot open /nonexistent/events for events"),
        "{text}"
    );
    assert!(!disk.path("s").exists());
}
