// SPDX-License-Identifier: Apache-2.0
//! Connections and processes, from their start to their end.

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Command;
use std::time::Duration;

use quorum_blk::front_end::{FrontEnd, Options, Request, Status, features};

use crate::common::{Disk, PATIENCE, Process, Random, SECTOR, Setup, Signal, eventually, low_byte};

fn write_and_read(front_end: &mut FrontEnd, sector: u64, seed: u64) {
    let data = Random::new(seed).bytes(4 * SECTOR);
    front_end
        .queue(0)
        .write_data(sector, &data)
        .expect("a write");
    let mut back = vec![0; data.len()];
    front_end.queue(0).read(sector, &mut back).expect("a read");
    assert!(data == back);
}

/// Runs the daemon where it must not start. Returns what it says.
fn refused(disk: &Disk, arguments: &[OsString]) -> String {
    let folder = tempfile::tempdir_in(disk.folder()).expect("a folder");
    let mut process = Process::start(folder.path(), arguments);
    let status = process.wait(PATIENCE);
    assert!(!status.success(), "it started: {}", process.log());
    process.log()
}

#[test]
fn probes_may_come_and_go() {
    let mut disk = Setup::new().start();
    disk.assert_serves();
    let descriptors = disk.process().descriptors();
    let memory = disk.process().resident_kib();
    for round in 0..100 {
        match round % 4 {
            0 => drop(UnixStream::connect(&disk.socket).expect("a listener")),
            1 => {
                let options = Options {
                    timeout: PATIENCE,
                    ..Options::default()
                };
                let mut probe = FrontEnd::negotiate(&disk.socket, &options).expect("a probe");
                probe.config().expect("a configuration space");
            }
            2 => drop(disk.connect(&Options::default())),
            _ => drop(disk.connect(&Options::cloud_hypervisor())),
        }
    }
    disk.assert_serves();
    let settled = eventually(|| (disk.process().descriptors() <= descriptors + 8).then_some(()));
    let now = disk.process().descriptors();
    assert!(settled.is_some(), "{descriptors} descriptors became {now}");
    let grown = disk.process().resident_kib().saturating_sub(memory);
    assert!(grown < 16 << 10, "{grown} KiB more than before");
    disk.stop_and_compare();
}

#[test]
fn firmware_then_linux_on_one_connection() {
    for reset in [false, true] {
        let mut disk = Setup::new().start();
        let firmware = Options {
            features: features::FIRMWARE,
            timeout: PATIENCE,
            queue_size: 16,
            ..Options::default()
        };
        let linux = Options {
            queues: 4,
            ..Options::default()
        };
        let mut front_end = FrontEnd::negotiate(&disk.socket, &linux).expect("a connection");
        for round in 0..3 {
            front_end
                .start_with(&firmware)
                .expect("the firmware starts");
            let mut first = [0; SECTOR];
            front_end
                .queue(0)
                .read(0, &mut first)
                .expect("a boot sector");
            front_end.stop().expect("the firmware stops");
            if reset {
                front_end.reset().expect("RESET_DEVICE is offered");
            }
            front_end.start_with(&linux).expect("Linux starts");
            for queue in 0..4 {
                let data = [low_byte(queue); SECTOR];
                front_end
                    .queue(queue)
                    .write_data(9, &data)
                    .expect("a write");
                front_end.queue(queue).flush().expect("a flush");
            }
            write_and_read(&mut front_end, 100, round);
            front_end.stop().expect("Linux stops");
        }
        drop(front_end);
        disk.stop_and_compare();
    }
}

#[test]
fn data_survive_reconnections() {
    let mut disk = Setup::new().start();
    let mut model = vec![0; 8 << 20];
    let mut random = Random::new(1);
    for round in 0..30 {
        let manners = if round % 2 == 0 {
            Options::default()
        } else {
            Options::cloud_hypervisor()
        };
        let mut front_end = disk.connect(&manners);
        let mut back = vec![0; 64 * SECTOR];
        front_end.queue(0).read(0, &mut back).expect("a read");
        assert!(back == model[..back.len()], "round {round}");
        let data = random.bytes(SECTOR);
        let sector = random.below(64);
        front_end
            .queue(0)
            .write_data(sector as u64, &data)
            .expect("a write");
        model[sector * SECTOR..][..SECTOR].copy_from_slice(&data);
        if round % 3 == 0 {
            front_end.stop().expect("the ring stops");
        }
    }
    disk.stop_and_expect(&model);
}

#[test]
fn connection_may_end_with_requests_in_flight() {
    let mut disk = Setup::new().start();
    for round in 0..15 {
        let mut front_end = disk.connect(&Options::default());
        let queue = front_end.queue(0);
        for at in 0..80 {
            let data = vec![round; 16 * SECTOR];
            let sector = at * 16;
            let request = match at % 3 {
                0 => Request::Read {
                    sector,
                    len: data.len(),
                },
                1 => Request::Write {
                    sector,
                    data: &data,
                },
                _ => Request::Flush,
            };
            queue.submit(&request).expect("room");
        }
    }
    disk.assert_serves();
    disk.stop_and_compare();
    disk.assert_nothing_reported();
}

#[test]
fn second_client_waits_for_the_first_to_leave() {
    let disk = Setup::new().start();
    let mut first = disk.connect(&Options::default());
    std::thread::scope(|scope| {
        let second = scope.spawn(|| {
            let mut second = disk.connect(&Options::default());
            write_and_read(&mut second, 50, 2);
        });
        for round in 0..20 {
            write_and_read(&mut first, 10, round);
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(!second.is_finished(), "two front-ends at once");
        drop(first);
        second.join().expect("the second is served");
    });
}

#[test]
fn signals_end_the_daemon_well() {
    for signal in [Signal::Terminate, Signal::Interrupt] {
        for connected in [false, true] {
            let mut disk = Setup::new().start();
            let front_end = connected.then(|| {
                let mut front_end = disk.connect(&Options::default());
                write_and_read(&mut front_end, 5, 5);
                front_end
            });
            let status = disk.end(signal);
            assert_eq!(status.code(), Some(0), "{signal:?}: {status}");
            assert!(!disk.socket.exists(), "the socket is left behind");
            drop(front_end);
        }
    }
}

#[test]
fn sigterm_drains_what_is_in_flight() {
    let mut disk = Setup::new().start();
    let mut front_end = disk.connect(&Options {
        queues: 2,
        ..Options::default()
    });
    let mut submitted = Vec::new();
    for at in 0..100usize {
        let data = [1 + low_byte(at); 8 * SECTOR];
        let queue = front_end.queue(at % 2);
        let sector = at as u64 * 8;
        submitted.push(
            queue
                .submit(&Request::Write {
                    sector,
                    data: &data,
                })
                .expect("room"),
        );
    }
    let status = disk.end(Signal::Terminate);
    assert_eq!(status.code(), Some(0), "{status}");
    let mut acknowledged = [false; 100];
    for queue in 0..2 {
        while let Some(completion) = front_end.queue(queue).poll().expect("a ring") {
            assert_eq!(completion.status, Status::Ok);
            let at = (0..100).find(|&at| at % 2 == queue && submitted[at] == completion.token);
            acknowledged[at.expect("one of ours")] = true;
        }
    }
    let content = std::fs::read(&disk.images[0]).expect("an image");
    for image in &disk.images {
        assert!(
            std::fs::read(image).expect("an image") == content,
            "replicas differ"
        );
    }
    for (at, _) in acknowledged.iter().enumerate().filter(|(_, done)| **done) {
        let expected = [1 + low_byte(at); 8 * SECTOR];
        assert!(
            content[at * 8 * SECTOR..][..8 * SECTOR] == expected,
            "write {at} is lost"
        );
    }
}

#[test]
fn stale_socket_is_replaced() {
    let mut disk = Setup::new().start();
    disk.assert_serves();
    assert!(!disk.end(Signal::Kill).success());
    assert!(disk.socket.exists(), "killed, it could not clean up");
    disk.start_again();
    disk.assert_serves();
    disk.stop();
    assert!(!disk.socket.exists());
}

#[test]
fn live_socket_is_not_stolen() {
    let mut disk = Setup::new().start();
    let other = Setup::new().start();
    let mut arguments = other.serve_arguments();
    arguments.extend(["--socket-path".into(), disk.socket.clone().into()]);
    arguments.push("--lock-timeout=1".into());
    // Its replicas must be free, so that the socket is all there is to complain about.
    let mut other = other;
    other.stop();
    let said = refused(&disk, &arguments);
    assert!(said.contains(&disk.socket.display().to_string()), "{said}");
    disk.assert_serves();
}

#[test]
fn other_files_are_not_taken_for_a_socket() {
    let mut disk = Setup::new().start();
    disk.stop();
    let precious = disk.folder().join("precious");
    std::fs::write(&precious, "data").expect("a file");
    let mut arguments = disk.serve_arguments();
    arguments.extend(["--socket-path".into(), precious.clone().into()]);
    let said = refused(&disk, &arguments);
    assert!(said.contains("precious"), "{said}");
    assert_eq!(std::fs::read(&precious).expect("a file"), b"data");
}

#[test]
fn served_replicas_are_locked() {
    let mut disk = Setup::new().start();
    let mut arguments = disk.serve_arguments();
    let socket = disk.folder().join("other.sock");
    arguments.extend(["--socket-path".into(), socket.into()]);
    arguments.push("--lock-timeout=1".into());
    let said = refused(&disk, &arguments);
    assert!(said.contains("replica0"), "{said}");
    assert!(said.contains("waiting up to 1 s"), "{said}");
    disk.assert_serves();
}

#[test]
fn replica_given_twice_is_refused() {
    let mut disk = Setup::new().start();
    disk.stop();
    let link = disk.folder().join("link.img");
    std::fs::hard_link(&disk.images[1], &link).expect("a link");
    for twice in [&disk.images[1], &link] {
        let mut arguments = disk.serve_arguments();
        arguments.extend(["--socket-path".into(), disk.socket.clone().into()]);
        arguments.extend(["--replica".into(), twice.into()]);
        let said = refused(&disk, &arguments);
        assert!(said.contains("replica1"), "{said}");
    }
}

#[test]
fn longer_replica_is_accepted_and_its_rest_ignored() {
    let mut disk = Setup::new().start();
    disk.stop();
    let file = std::fs::OpenOptions::new()
        .append(true)
        .open(&disk.images[2]);
    let mut file = file.expect("an image");
    std::io::Write::write_all(&mut file, &[0x5a; 4096]).expect("a longer image");
    disk.start_again();
    let mut front_end = disk.connect(&Options::default());
    let config = front_end.config().expect("a configuration space");
    assert_eq!(config.capacity_sectors, (8 << 20) / 512);
    write_and_read(&mut front_end, config.capacity_sectors - 4, 3);
    drop(front_end);
    disk.stop();
    let bytes = std::fs::read(&disk.images[2]).expect("an image");
    assert_eq!(bytes[8 << 20..], [0x5a; 4096]);
}

#[test]
fn inherited_listening_socket_is_served() {
    let mut disk = Setup::new().start();
    disk.stop();
    let path = disk.folder().join("inherited.sock");
    let listener = UnixListener::bind(&path).expect("a listener");
    // The client may be there before the daemon is.
    let early = UnixStream::connect(&path).expect("a place in the queue");
    let mut arguments = disk.serve_arguments();
    arguments.extend(["--fd".into(), "3".into()]);
    let folder = tempfile::tempdir_in(disk.folder()).expect("a folder");
    let mut process =
        Process::start_with_socket(folder.path(), OwnedFd::from(listener), &arguments);
    let options = Options {
        timeout: PATIENCE,
        ..Options::default()
    };
    let mut front_end = FrontEnd::negotiate_on(early, &options).expect("negotiation");
    front_end.start().expect("a start");
    write_and_read(&mut front_end, 1, 1);
    drop(front_end);
    for round in 0..3 {
        let mut front_end = FrontEnd::connect(&path, &options).expect("a connection");
        write_and_read(&mut front_end, round, round);
    }
    process.signal(Signal::Terminate);
    assert_eq!(process.wait(PATIENCE).code(), Some(0));
}

#[test]
fn inherited_connected_socket_is_served() {
    let mut disk = Setup::new().start();
    disk.stop();
    let (ours, theirs) = UnixStream::pair().expect("a socket pair");
    let mut arguments = disk.serve_arguments();
    arguments.extend(["--fd".into(), "3".into()]);
    let folder = tempfile::tempdir_in(disk.folder()).expect("a folder");
    let mut process = Process::start_with_socket(folder.path(), OwnedFd::from(theirs), &arguments);
    let options = Options {
        timeout: PATIENCE,
        ..Options::default()
    };
    let mut front_end = FrontEnd::negotiate_on(ours, &options).expect("negotiation");
    front_end.start().expect("a start");
    write_and_read(&mut front_end, 1, 1);
    drop(front_end);
    // There is nobody else who could ever connect.
    assert_eq!(process.wait(PATIENCE).code(), Some(0));
}

#[test]
fn capabilities_are_printed_whatever_else_is_asked() {
    let output = Command::new(env!("CARGO_BIN_EXE_quorum-blk"))
        .args(["--socket-path", "/nowhere/x", "--print-capabilities"])
        .output()
        .expect("the program runs");
    assert!(output.status.success());
    let value: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(
        value,
        serde_json::json!({"type": "block", "features": ["read-only", "blk-file"]})
    );
}

#[test]
fn counters_are_told_on_sigusr1_and_the_daemon_goes_on() {
    let mut disk = Setup::new().start();
    disk.assert_serves();
    let before = disk.process().log().len();
    disk.process().signal(Signal::User1);
    let told = eventually(|| (disk.process().log().len() > before).then_some(()));
    assert!(told.is_some(), "nothing was printed");
    disk.assert_serves();
    disk.stop();
}

/// Rule F5: a driver that did not take FLUSH never flushes, so each write is made stable on every
/// replica before it completes. One that took it decides by itself.
#[test]
fn writes_of_a_driver_without_flush_are_flushed() {
    const WRITES: u64 = 10;
    for (features, operations) in [
        (features::LINUX, WRITES),
        (features::LINUX & !features::FLUSH, 2 * WRITES),
    ] {
        // The disk is flushed once more when it is closed.
        let operations = operations + 1;
        let mut disk = Setup::new().start();
        let mut front_end = disk.connect(&Options {
            features,
            ..Options::default()
        });
        for number in 0..WRITES {
            let queue = front_end.queue(0);
            queue
                .write_data(number * 8, &[0x5a; 4096])
                .expect("a write");
        }
        drop(front_end);
        disk.stop();
        let log = disk.process().log();
        let row = log
            .lines()
            .rev()
            .find(|line| line.trim_start().starts_with("replica0"));
        let counted = row.and_then(|row| row.split_whitespace().nth(1));
        assert_eq!(counted, Some(operations.to_string().as_str()), "{log}");
    }
}

/// Rule W2, and its price: the first write to a clean extent costs one update of each copy of the
/// record, later ones nothing.
#[test]
fn first_write_to_an_extent_costs_one_update_of_the_record() {
    const COPIES: u64 = 3;
    const EXTENT_SECTORS: u64 = 2048;
    let blocks_written = |extents: u64, writes_each: u64| -> u64 {
        let mut disk = Setup::new().bytes(16 << 20).start();
        let mut front_end = disk.connect(&Options::default());
        for extent in 0..extents {
            for write in 0..writes_each {
                let sector = extent * EXTENT_SECTORS + 8 * write;
                let queue = front_end.queue(0);
                queue.write_data(sector, &[0x5a; 4096]).expect("a write");
            }
        }
        drop(front_end);
        disk.stop();
        let log = disk.process().log();
        let line = log.lines().rev().find(|line| line.starts_with("record: "));
        let count = line.and_then(|line| line.split_whitespace().nth(1));
        count
            .and_then(|count| count.parse().ok())
            .expect("a count of blocks")
    };
    let few = blocks_written(2, 1);
    assert_eq!(blocks_written(12, 1), few + 10 * COPIES);
    assert_eq!(blocks_written(2, 40), few);
}
