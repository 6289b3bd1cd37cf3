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
        "State record:",
        "Slow and lost replicas:",
        "Resync and scrub:",
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
    let cases: [(&[&str], &str); 20] = [
        (
            &["--fd=3", "--replica=a", "--record=none", "--record-dir=/r"],
            "--record none and --record-dir exclude each other",
        ),
        (
            &["--fd=3", "--replica=a,record=x", "--replica=b,record=y"],
            "record= is given for 2 replicas; more than half of the copies must always be readable",
        ),
        (
            &["--fd=3", "--replica=a", "--adopt-from=b"],
            "--adopt-from `b` is no replica; the names are: replica0",
        ),
        (
            &["--fd=3", "--replica=a", "--scrub-interval=7"],
            "`7` is no interval; write `off`, or a whole number with s, m, h, d or w",
        ),
        (
            &["--fd=3", "--replica=a", "--write-grace=5"],
            "--write-grace 5 is not possible; give 20 to 60000 milliseconds",
        ),
        (
            &["--fd=3", "--replica=a", "--repair=off", "--scrub=repair"],
            "--scrub repair needs --repair on",
        ),
        (&["record", "show"], "give --replica PATH once per replica"),
        (
            &["record", "show", "a.qrec", "--replica", "a"],
            "cannot be used with",
        ),
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
        let named = format!("replica 'replica3' ({}): ", path.display());
        assert_eq!(text.matches(&named).count(), 1, "{text}");
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
        let mut daemon = disk.start(&["--record=none"]);
        let log = daemon.log_until("ready for a front-end");
        assert!(
            log.contains("DANGEROUS: running without a state record"),
            "{log}"
        );
        wait_for_socket(&disk.path("s"));
        daemon.signal("-USR1");
        let log = daemon.log_until("malformed chains");
        let lines = [
            "the disk is healthy",
            "  replica2  in-sync",
            "record: 0 blocks written",
        ];
        for line in lines {
            assert!(log.contains(line), "no {line:?} in {log}");
        }
        daemon.signal("-USR2");
        let log = daemon.log_until("the scrub of all replicas is done: ");
        assert!(
            log.contains("the scrub of all replicas begins at sector 0"),
            "{log}"
        );
        assert!(
            log.contains("done: 2048 sectors compared, 0 differing"),
            "{log}"
        );
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

/// `record ...` with the three images, through the page cache.
fn record(disk: &Disk, command: &[&str]) -> Output {
    let mut line = Command::new(PROGRAM);
    line.arg("record").args(command);
    for name in ["a", "b", "c"] {
        line.arg("--replica").arg(disk.path(name));
    }
    line.output().unwrap()
}

#[test]
fn record_is_made_shown_and_forgotten() {
    let disk = Disk::new();
    let copies = ["a.qrec", "b.qrec", "c.qrec"].map(|name| disk.path(name));
    let output = record(&disk, &["show"]);
    assert_eq!(output.status.code(), Some(1));
    let text = stderr(&output);
    assert!(text.contains("there is no state record at"), "{text}");

    let output = record(
        &disk,
        &["create", "--cache=buffered", "--adopt-from=replica1"],
    );
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(copies.iter().all(|copy| copy.exists()));
    let output = record(&disk, &["create", "--cache=buffered"]);
    assert_eq!(output.status.code(), Some(1));
    let text = stderr(&output);
    assert!(text.contains("there is a state record already"), "{text}");

    let output = record(&disk, &["show"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let text = stdout(&output);
    let wanted = [
        "2 of 3 replicas must agree",
        "ended cleanly",
        "What a start would do now:",
        "Replica replica0 lacks 1 MiB in 1 extents, where it would not vote until they are copied.",
    ];
    for line in wanted {
        assert!(text.contains(line), "no {line:?} in {text}");
    }
    let output = record(&disk, &["show", "--json"]);
    let value: serde_json::Value = serde_json::from_str(&stdout(&output)).unwrap();
    assert_eq!(value["replicas"], 3);
    assert_eq!(value["start"]["refused"], false);
    let states: Vec<&str> = (0..3)
        .map(|slot| value["members"][slot]["state"].as_str().unwrap())
        .collect();
    assert_eq!(states, ["syncing", "in-sync", "syncing"]);
    assert_eq!(value["members"][1]["found"], "unchanged");
    assert_eq!(value["members"][2]["behind"]["bytes"], 1 << 20);

    let output = record(&disk, &["forget"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("nothing was removed"));
    assert!(copies.iter().all(|copy| copy.exists()));
    let output = record(&disk, &["forget", "--yes"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert_eq!(stdout(&output).lines().count(), 3);
    assert!(!copies.iter().any(|copy| copy.exists()));
}

#[test]
fn disk_that_is_served_makes_its_record_and_needs_most_of_it() {
    let disk = Disk::new();
    let mut daemon = disk.start(&[]);
    let log = daemon.log_until("ready for a front-end");
    assert!(log.contains("served for the first time"), "{log}");
    let output = record(&disk, &["forget", "--yes"]);
    assert_eq!(output.status.code(), Some(1), "{}", stdout(&output));
    daemon.signal("-TERM");
    assert_eq!(daemon.wait().0, Some(0));
    let output = record(&disk, &["show"]);
    let text = stdout(&output);
    assert!(text.contains("The last stop was clean"), "{text}");
    // One copy of three may be lost: it is made anew.
    std::fs::remove_file(disk.path("a.qrec")).unwrap();
    let mut daemon = disk.start(&[]);
    daemon.log_until("ready for a front-end");
    daemon.signal("-TERM");
    assert_eq!(daemon.wait().0, Some(0));
    assert!(disk.path("a.qrec").exists());
    // Two may not, but by force.
    std::fs::remove_file(disk.path("a.qrec")).unwrap();
    std::fs::remove_file(disk.path("c.qrec")).unwrap();
    let socket = disk.path("s");
    let output = disk
        .serve(&["--socket-path", socket.to_str().unwrap()])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let text = stderr(&output);
    assert!(
        text.contains("only 1 of 3 copies of the state record can be used"),
        "{text}"
    );
    assert!(text.contains("--force"), "{text}");
    let mut daemon = disk.start(&["--force"]);
    let log = daemon.log_until("ready for a front-end");
    assert!(log.contains("DANGEROUS: by force a minority"), "{log}");
    daemon.signal("-TERM");
    assert_eq!(daemon.wait().0, Some(0));
    assert!(disk.path("c.qrec").exists());
}

#[test]
fn record_show_tells_what_is_wrong() {
    let disk = Disk::new();
    let output = record(&disk, &["create", "--cache=buffered", "--assume-clean"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    // Somebody writes to one replica, another is away, and so is a copy of the record.
    std::fs::write(disk.path("a"), vec![1; 1 << 20]).unwrap();
    std::fs::remove_file(disk.path("b")).unwrap();
    std::fs::remove_file(disk.path("b.qrec")).unwrap();
    let output = record(&disk, &["show"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let text = stdout(&output);
    let wanted = [
        "not asked for (--assume-clean)",
        "Replica replica0 was changed, or is another file",
        "Replica replica1 is not there",
        "b.qrec   missing",
    ];
    for line in wanted {
        assert!(text.contains(line), "no {line:?} in {text}");
    }
    // A single copy tells what it knows, but not what a start would do.
    let copy = disk.path("c.qrec");
    let output = run(&["record", "show", copy.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let text = stdout(&output);
    assert!(
        text.contains("1 of the 3 copies of the record were given"),
        "{text}"
    );
    // A minority is shown, and a start refused.
    std::fs::remove_file(copy).unwrap();
    let output = record(&disk, &["show"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let text = stdout(&output);
    assert!(
        text.contains("It would be refused: only 1 of 3 copies"),
        "{text}"
    );
    // What is no record is not taken for one.
    std::fs::write(disk.path("a.qrec"), vec![7; 200_000]).unwrap();
    let output = record(&disk, &["show"]);
    assert_eq!(output.status.code(), Some(1), "{}", stdout(&output));
}

#[test]
fn record_of_a_disk_that_is_served_is_not_forgotten() {
    use quorum_blk::config::RecordPlaces;
    use quorum_blk::daemon::record_files::{Access, RecordFiles};

    let disk = Disk::new();
    let output = record(&disk, &["create", "--cache=buffered"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let places = RecordPlaces {
        copies: ["a.qrec", "b.qrec", "c.qrec"]
            .map(|name| disk.path(name))
            .to_vec(),
        elsewhere: Vec::new(),
    };
    let files = RecordFiles::open(&places, Access::Own(Duration::ZERO)).unwrap();
    let output = record(&disk, &["forget", "--yes"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("the disk is served already"));
    assert!(disk.path("a.qrec").exists());
    let output = record(&disk, &["show"]);
    assert_eq!(output.status.code(), Some(0));
    assert!(stdout(&output).contains("is going on: a daemon serves the disk"));
    drop(files);
    let output = record(&disk, &["forget", "--yes"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
}
