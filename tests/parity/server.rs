// SPDX-License-Identifier: Apache-2.0
//! The two sides: the daemon under test, and qemu-storage-daemon with its quorum driver.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::case::Setup;
use crate::image::Image;

/// How long a server may take to start or to stop.
const PATIENCE: Duration = Duration::from_secs(15);

/// Who serves.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Side {
    /// `quorum-blk serve`.
    Ours,
    /// `qemu-storage-daemon`.
    Peer,
}

/// A running server. Killed when dropped.
#[derive(Debug)]
pub struct Server {
    process: Child,
    socket: PathBuf,
}

impl Server {
    /// Starts a server on `images`, or returns what it said when it refused.
    pub fn start(
        side: Side,
        folder: &Path,
        setup: &Setup,
        images: &[Image],
    ) -> Result<Self, String> {
        let socket = folder.join("disk.sock");
        let log_path = folder.join("server.log");
        let log = fs::File::create(&log_path).expect("the folder can be written");
        let mut command = match side {
            Side::Ours => ours(&socket, setup, images),
            Side::Peer => peer(&socket, setup, images),
        };
        let process = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("the server can be run; scripts/install-test-deps installs the peer");
        let mut server = Self { process, socket };
        let deadline = Instant::now() + PATIENCE;
        while !server.socket.exists() {
            if server.exit_status().is_some() {
                return Err(fs::read_to_string(&log_path).unwrap_or_default());
            }
            assert!(Instant::now() < deadline, "{side:?} does not listen");
            thread::sleep(Duration::from_millis(5));
        }
        Ok(server)
    }

    /// Where it listens.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// How it ended, if it did.
    pub fn exit_status(&mut self) -> Option<ExitStatus> {
        self.process.try_wait().expect("it is our child")
    }

    /// Asks it to end and waits for that.
    pub fn stop(mut self) {
        let pid = self.process.id().to_string();
        let asked = Command::new("kill").args(["-TERM", &pid]).status();
        assert!(asked.is_ok_and(|status| status.success()), "kill {pid}");
        let deadline = Instant::now() + PATIENCE;
        while self.exit_status().is_none() {
            assert!(Instant::now() < deadline, "the server does not stop");
            thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Fails if it has ended already, which is as well.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn ours(socket: &Path, setup: &Setup, images: &[Image]) -> Command {
    let on_off = |on: bool| if on { "on" } else { "off" };
    let mut command = Command::new(env!("CARGO_BIN_EXE_quorum-blk"));
    command.arg("serve").arg("--socket-path").arg(socket);
    command.args(["--threshold", &setup.threshold.to_string()]);
    command.args(["--repair", on_off(setup.repair)]);
    // The peer remembers nothing either.
    command.args(["--record", "none"]);
    // What the peer calls every disk.
    command.args(["--serial", "vhost_user_blk"]);
    for image in images {
        let cache = if image.direct { "direct" } else { "buffered" };
        let argument = format!("{},cache={cache}", image.path.display());
        command.args(["--replica", &argument]);
    }
    if setup.fifo {
        command.args(["--read-pattern", "fifo"]);
    }
    if setup.minority {
        command.arg("--allow-minority-threshold");
    }
    if setup.blkverify {
        command.arg("--blkverify");
    }
    if setup.read_only {
        command.arg("--read-only");
    }
    command
}

fn peer(socket: &Path, setup: &Setup, images: &[Image]) -> Command {
    let mut command = Command::new("qemu-storage-daemon");
    let mut children = Vec::new();
    for (index, image) in images.iter().enumerate() {
        let device = image.path.starts_with("/dev");
        let name = format!("replica{index}");
        let node = json!({
            "driver": if device { "host_device" } else { "file" },
            "filename": image.path,
            "node-name": name,
            "cache": { "direct": image.direct },
            "discard": "unmap",
            "read-only": setup.read_only,
        });
        command.args(["--blockdev", &node.to_string()]);
        children.push(name);
    }
    let quorum = json!({
        "driver": "quorum",
        "node-name": "quorum",
        "children": children,
        "vote-threshold": setup.threshold,
        "rewrite-corrupted": setup.repair && !setup.fifo && !setup.read_only,
        "read-pattern": if setup.fifo { "fifo" } else { "quorum" },
        "blkverify": setup.blkverify,
        "read-only": setup.read_only,
    });
    command.args(["--blockdev", &quorum.to_string()]);
    let writable = if setup.read_only { "off" } else { "on" };
    let export = format!(
        "vhost-user-blk,id=export,node-name=quorum,writable={writable},addr.type=unix,addr.path={}",
        socket.display()
    );
    command.args(["--export", &export]);
    command
}
