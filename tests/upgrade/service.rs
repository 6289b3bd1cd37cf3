// SPDX-License-Identifier: Apache-2.0
//! The daemon as a service: what it tells the service manager, the socket it is passed, and the
//! units in `examples/`.

use std::ffi::OsString;
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use quorum_blk::front_end::{FrontEnd, Options};

use crate::common::{Process, Signal};
use crate::guest::Load;
use crate::site::{Daemon, PATIENCE, Site, await_that};

/// Who is told of states.
struct Manager {
    socket: UnixDatagram,
    path: PathBuf,
}

impl Manager {
    fn new(site: &Site) -> Self {
        let path = site.folder().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        Self { socket, path }
    }

    /// The lines of the next message.
    #[track_caller]
    fn told(&self) -> Vec<String> {
        let mut bytes = [0; 4096];
        let len = self.socket.recv(&mut bytes).expect("a message in time");
        let text = String::from_utf8(bytes[..len].to_vec()).unwrap();
        text.lines().map(str::to_owned).collect()
    }

    /// The next message has this line.
    #[track_caller]
    fn expect(&self, line: &str) -> Vec<String> {
        let told = self.told();
        assert!(told.iter().any(|told| told == line), "{line}: {told:?}");
        told
    }
}

/// The seconds for which the manager is asked to have patience.
#[track_caller]
fn seconds(told: &[String]) -> u64 {
    let mut lines = told.iter();
    let micros = lines.find_map(|line| line.strip_prefix("EXTEND_TIMEOUT_USEC="));
    let micros: u64 = micros.expect("patience is asked for").parse().unwrap();
    micros / 1_000_000
}

#[test]
fn the_service_manager_is_told_of_the_start_of_front_ends_and_of_the_end() {
    let site = Site::new(&[], &["--io-timeout", "3", "--lock-timeout", "7"]);
    let manager = Manager::new(&site);
    let mut arguments = site.serve_arguments("daemon");
    arguments.extend(["--socket-path".into(), site.socket.clone().into()]);
    let folder = site.folder_of("daemon");
    let process = Process::start_as_service(&folder, None, Some(&manager.path), &arguments);
    let mut daemon = site.daemon("daemon", process);
    let starting = manager.expect("STATUS=opening the replicas");
    assert!(seconds(&starting) >= 3 * 7);
    manager.expect("READY=1");
    // It is: nobody has to try twice.
    let options = Options {
        timeout: PATIENCE,
        ..Options::default()
    };
    let mut front_end = FrontEnd::connect(&site.socket, &options).unwrap();
    manager.expect("STATUS=serving a front-end");
    front_end.queue(0).write_data(0, &[1; 512]).unwrap();
    drop(front_end);
    manager.expect("STATUS=waiting for a front-end");
    daemon.signal(Signal::Terminate);
    let stopping = manager.expect("STOPPING=1");
    assert!(seconds(&stopping) >= 2 * 3 + 30);
    daemon.ends_well();
}

/// Nobody listens where the manager should be, or it does not read: that is not the guest's affair.
#[test]
fn a_service_manager_that_is_gone_changes_nothing() {
    let site = Site::new(&[], &[]);
    let mut arguments = site.serve_arguments("daemon");
    arguments.extend(["--socket-path".into(), site.socket.clone().into()]);
    let folder = site.folder_of("daemon");
    let nobody = site.folder().join("nobody");
    let process = Process::start_as_service(&folder, None, Some(&nobody), &arguments);
    let mut daemon = site.daemon("daemon", process);
    daemon.await_log("ready for a front-end");
    let load = Load::start(&site.socket, Options::default(), 1);
    load.await_progress(50);
    load.stop().check_all();
    daemon.stop();
}

/// The line of the unit that starts the daemon, for a configuration somewhere else.
fn unit_arguments(config: &Path) -> Vec<OsString> {
    let unit = fs::read_to_string(example("service")).unwrap();
    let mut lines = unit.lines();
    let line = lines.find_map(|line| line.strip_prefix("ExecStart="));
    let mut words = line.expect("it is started somehow").split(' ');
    assert_eq!(words.next(), Some("/usr/bin/quorum-blk"));
    words
        .map(|word| match word {
            "/etc/quorum-blk/%i.toml" => config.into(),
            word => word.into(),
        })
        .collect()
}

fn example(kind: &str) -> PathBuf {
    let file = format!("examples/quorum-blk@.{kind}");
    Path::new(env!("CARGO_MANIFEST_DIR")).join(file)
}

/// Started as its unit does, with a socket that stays.
fn activated(site: &Site, name: &str, listener: &UnixListener, manager: &Manager) -> Daemon {
    let arguments = unit_arguments(&site.config_file(name));
    let socket = OwnedFd::from(listener.try_clone().unwrap());
    let process = Process::start_as_service(
        &site.folder_of(name),
        Some((socket, 1)),
        Some(&manager.path),
        &arguments,
    );
    site.daemon(name, process)
}

#[track_caller]
fn await_ready(manager: &Manager) {
    while !manager.told().iter().any(|line| line == "READY=1") {}
}

#[test]
fn guests_find_the_socket_of_a_unit_while_the_daemon_is_replaced() {
    let site = Site::new(&[], &[]);
    let manager = Manager::new(&site);
    let listener = UnixListener::bind(&site.socket).unwrap();
    // There before anybody serves.
    let early = UnixStream::connect(&site.socket).unwrap();
    let mut daemon = activated(&site, "daemon0", &listener, &manager);
    await_ready(&manager);
    let options = Options {
        timeout: PATIENCE,
        ..Options::default()
    };
    let mut front_end = FrontEnd::negotiate_on(early, &options).unwrap();
    front_end.start().unwrap();
    front_end.queue(0).write_data(0, &[0; 512]).unwrap();
    drop(front_end);

    let load = Load::start(&site.socket, Options::default(), 2);
    for round in 1..4 {
        load.await_progress(200);
        daemon.signal(Signal::Terminate);
        daemon.ends_well();
        assert!(site.socket.exists(), "it is not ours to remove");
        daemon = activated(&site, &format!("daemon{round}"), &listener, &manager);
        await_ready(&manager);
        load.await_outages(round);
    }
    assert_eq!(load.refused(), 0, "it found nobody at the socket");
    load.stop().check_all();
    daemon.stop();
    site.await_equal();
}

#[test]
fn a_socket_that_is_missing_or_not_the_only_one_is_named_before_anything_is_opened() {
    let site = Site::new(&[], &[]);
    let mut arguments = site.serve_arguments("daemon");
    arguments.extend(["--fd".into(), "systemd".into()]);
    let folder = site.folder_of("daemon");
    let listener = UnixListener::bind(&site.socket).unwrap();
    let twice = Some((OwnedFd::from(listener), 2));
    for (passed, message) in [
        (None, "start it by its .socket unit"),
        (twice, "2 sockets were passed to this process"),
    ] {
        let process = Process::start_as_service(&folder, passed, None, &arguments);
        let said = site.daemon("daemon", process).refuses();
        assert!(said.contains(message), "{said}");
    }
    let made = fs::read_dir(site.folder()).unwrap();
    let record = |name: &OsString| name.to_string_lossy().ends_with(".qrec");
    assert!(
        !made
            .filter_map(Result::ok)
            .any(|entry| record(&entry.file_name())),
        "it had opened the disk"
    );
}

/// The units are good, but for what this version of systemd does not know yet.
#[test]
fn the_units_are_understood_by_systemd() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = Command::new("systemd-analyze");
    command.args(["verify", "--man=no"]);
    for kind in ["service", "socket"] {
        let unit = fs::read_to_string(example(kind)).unwrap();
        // Looked for by systemd-analyze.
        let unit = unit.replace("/usr/bin/quorum-blk", env!("CARGO_BIN_EXE_quorum-blk"));
        let instance = folder.path().join(format!("quorum-blk@disk.{kind}"));
        fs::write(&instance, unit).unwrap();
        command.arg(instance);
    }
    let output = command
        .output()
        .expect("systemd-analyze runs; scripts/install-test-deps installs it");
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{said}");
    let newer = [
        "RestartSteps",
        "RestartMaxDelaySec",
        "PollLimitIntervalSec",
        "PollLimitBurst",
    ];
    for line in said.lines().filter(|line| line.contains("quorum-blk@disk")) {
        let known = newer.iter().any(|key| line.contains(&format!("'{key}'")));
        assert!(known && line.contains("Unknown key"), "{line}");
    }
}

/// What the unit says about time fits to what the daemon needs by default.
#[test]
fn the_unit_has_the_patience_that_the_daemon_asks_for() {
    let site = Site::new(&[], &[]);
    let manager = Manager::new(&site);
    let listener = UnixListener::bind(&site.socket).unwrap();
    let mut daemon = activated(&site, "daemon", &listener, &manager);
    let start = seconds(&manager.told());
    await_ready(&manager);
    daemon.signal(Signal::Terminate);
    let end = seconds(&manager.expect("STOPPING=1"));
    daemon.ends_well();
    let unit = fs::read_to_string(example("service")).unwrap();
    let of = |key: &str| -> u64 {
        let line = unit.lines().find_map(|line| line.strip_prefix(key));
        line.and_then(|value| value.strip_suffix('s')?.parse().ok())
            .expect("whole seconds")
    };
    assert!(
        (start..start + 60).contains(&of("TimeoutStartSec=")),
        "{start}"
    );
    assert!((end..end + 60).contains(&of("TimeoutStopSec=")), "{end}");
    await_that("the service is over", || !daemon.is_running());
    assert!(Duration::from_secs(end) > Duration::from_secs(2 * 30));
}
