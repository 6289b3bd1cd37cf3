// SPDX-License-Identifier: Apache-2.0
//! Two daemons on the same replicas: the guest of one is on its way to the other (rule Q5).

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use quorum_blk::front_end::{FrontEnd, FrontEndError, Options, Request, Status};
use vhost::{VhostBackend, VhostUserDirtyLogRegion};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::common::{Disk, PATIENCE, Process, Random, SECTOR, Setup, Signal, eventually, index};

/// A daemon that waits for the guest of another one, on the same replicas.
struct Destination {
    process: Process,
    socket: PathBuf,
    _folder: tempfile::TempDir,
}

impl Destination {
    fn start(disk: &Disk, arguments: &[&str]) -> Self {
        let folder = tempfile::tempdir_in(disk.folder()).expect("a folder");
        let socket = folder.path().join("disk.sock");
        let events = folder.path().join("events.jsonl");
        let mut line: Vec<OsString> = disk.serve_arguments();
        let at = line.iter().position(|argument| argument == "--events");
        line[at.expect("it writes events") + 1] = events.into();
        line.extend(["--incoming".into(), "--socket-path".into()]);
        line.push(socket.clone().into());
        line.extend(arguments.iter().map(OsString::from));
        let process = Process::start(folder.path(), &line);
        let destination = Self {
            process,
            socket,
            _folder: folder,
        };
        let listens = eventually(|| destination.socket.exists().then_some(()));
        assert!(listens.is_some(), "{}", destination.process.log());
        destination
    }

    /// A front-end that waits as long as the destination waits for locks.
    fn connect(&self) -> Result<FrontEnd, FrontEndError> {
        let options = Options {
            timeout: Duration::from_secs(30),
            ..Options::default()
        };
        FrontEnd::connect(&self.socket, &options)
    }

    fn await_log(&self, text: &str) {
        let found = eventually(|| self.process.log().contains(text).then_some(()));
        assert!(found.is_some(), "no '{text}' in {}", self.process.log());
    }

    fn stop(&mut self) {
        self.process.signal(Signal::Terminate);
        let status = self.process.wait(PATIENCE);
        assert_eq!(status.code(), Some(0), "{}", self.process.log());
    }
}

#[test]
fn destination_looks_and_opens_when_its_first_ring_starts() {
    let mut disk = Setup::new().start();
    let data = Random::new(1).bytes(8 * SECTOR);
    let mut source = disk.connect(&Options::default());
    source.queue(0).write_data(7, &data).expect("a write");

    let mut destination = Destination::start(&disk, &[]);
    let probe = Options {
        timeout: PATIENCE,
        ..Options::default()
    };
    let mut front_end = FrontEnd::negotiate(&destination.socket, &probe).expect("a connection");
    let capacity = front_end
        .config()
        .expect("a configuration")
        .capacity_sectors;
    assert_eq!(capacity, (8 << 20) / 512, "the size is known");
    drop(front_end);
    destination.process.signal(Signal::User1);
    destination.await_log("closed: waiting for the guest");
    destination.process.signal(Signal::User2);
    destination.await_log("no scrub is begun");
    source.queue(0).write_data(100, &data).expect("a write");

    // Its ring starts while the source still has the locks.
    let begin = Instant::now();
    let (front_end, waited) = thread::scope(|scope| {
        let connecting = scope.spawn(|| (destination.connect(), begin.elapsed()));
        destination.await_log("waiting up to 30 s");
        destination.process.signal(Signal::User1);
        destination.await_log("being opened or closed");
        drop(source);
        disk.stop();
        connecting.join().expect("no panic")
    });
    let mut front_end = front_end.expect("the source let go");
    assert!(waited < Duration::from_secs(30));
    for sector in [7, 100] {
        let mut back = vec![0; data.len()];
        front_end.queue(0).read(sector, &mut back).expect("a read");
        assert!(back == data, "what the source wrote to {sector} differs");
    }
    front_end
        .queue(0)
        .write_data(7, &data[SECTOR..])
        .expect("a write");
    drop(front_end);
    destination.stop();
    let log = destination.process.log();
    assert!(log.contains("closed: every extent is clean"), "{log}");
    disk.start_again();
    disk.assert_nothing_reported();
    disk.stop_and_compare();
}

#[test]
fn destination_that_cannot_have_the_disk_ends_the_connection_and_tries_again() {
    let mut disk = Setup::new().start();
    disk.assert_serves();
    let mut destination = Destination::start(&disk, &["--lock-timeout", "1"]);
    for _ in 0..2 {
        assert!(destination.connect().is_err(), "the source has the locks");
    }
    destination.await_log("the guest cannot have its disk");
    destination.await_log("is served already");
    // The source has noticed nothing.
    disk.assert_serves();
    disk.stop();
    let mut front_end = destination.connect().expect("the source is gone");
    front_end
        .queue(0)
        .write_data(0, &[1; SECTOR])
        .expect("a write");
    drop(front_end);
    destination.stop();
    disk.start_again();
    disk.stop_and_compare();
}

#[test]
fn destination_that_never_gets_its_guest_has_touched_nothing() {
    let mut disk = Setup::new().start();
    disk.assert_serves();
    let record = disk.images[0].with_extension("img.qrec");
    disk.stop();
    let before = std::fs::read(&record).expect("a record");
    let mut destination = Destination::start(&disk, &[]);
    let probe = Options {
        timeout: PATIENCE,
        ..Options::default()
    };
    drop(FrontEnd::negotiate(&destination.socket, &probe).expect("a connection"));
    destination.stop();
    assert!(std::fs::read(&record).expect("a record") == before);
}

#[test]
fn destination_that_waits_for_locks_can_be_stopped() {
    let mut disk = Setup::new().start();
    disk.assert_serves();
    let mut destination = Destination::start(&disk, &[]);
    thread::scope(|scope| {
        let connecting = scope.spawn(|| destination.connect().is_err());
        destination.await_log("waiting up to 30 s");
        destination.process.signal(Signal::Terminate);
        assert!(connecting.join().expect("no panic"), "it got the disk");
    });
    destination.stop();
    disk.assert_serves();
}

#[test]
fn destination_of_a_disk_without_a_record_is_refused() {
    let disk = Setup::new().start();
    for copy in 0..3 {
        let record = disk.images[copy].with_extension("img.qrec");
        std::fs::remove_file(record).expect("a record");
    }
    let folder = tempfile::tempdir_in(disk.folder()).expect("a folder");
    let mut line = disk.serve_arguments();
    line.push("--incoming".into());
    line.extend(["--socket-path".into(), folder.path().join("s").into()]);
    let mut process = Process::start(folder.path(), &line);
    assert_eq!(process.wait(PATIENCE).code(), Some(1));
    let log = process.log();
    assert!(log.contains("--incoming needs the one"), "{log}");
}

/// LOG_ALL and VHOST_USER_F_PROTOCOL_FEATURES.
const LOG_ALL: u64 = 1 << 26;
const PROTOCOL_FEATURES: u64 = 1 << 30;
const PAGE: usize = 4096;

/// SET_FEATURES, done when this returns.
fn set_logging(front_end: &mut FrontEnd, on: bool) {
    let features = front_end.acked() | PROTOCOL_FEATURES | if on { LOG_ALL } else { 0 };
    front_end.ask_replies(true);
    front_end
        .send("SET_FEATURES", |protocol| protocol.set_features(features))
        .expect("features that are offered");
    front_end.ask_replies(false);
}

#[test]
fn guest_that_moves_takes_the_disk_along_and_may_return() {
    let mut disk = Setup::new().start();
    let mut destination = Destination::start(&disk, &[]);
    let data = Random::new(2).bytes(4 * SECTOR);
    let mut here = disk.connect(&Options::default());
    here.queue(0).write_data(7, &data).expect("a write");
    set_logging(&mut here, true);
    here.queue(0).write_data(20, &data).expect("a write");
    let bases = here.stop().expect("all rings are taken away");
    assert_eq!(bases[0], 2);
    // The locks are free when the last answer is there.
    disk.process().signal(Signal::User1);
    let log = |disk: &mut Disk| disk.process().log();
    let closed = eventually(|| {
        log(&mut disk)
            .contains("closed: waiting for the guest")
            .then_some(())
    });
    assert!(closed.is_some(), "{}", log(&mut disk));

    let mut there = destination.connect().expect("the source has let go");
    assert!(!destination.process.log().contains("waiting up to"));
    for sector in [7, 20] {
        let mut back = vec![0; data.len()];
        there.queue(0).read(sector, &mut back).expect("a read");
        assert!(back == data, "sector {sector} differs");
    }
    there.queue(0).write_data(40, &data).expect("a write");
    set_logging(&mut there, true);
    there.stop().expect("all rings are taken away");

    // Back again: the rings here are what they were.
    set_logging(&mut here, false);
    here.resume(2).expect("the disk is free again");
    let mut back = vec![0; data.len()];
    here.queue(0).read(40, &mut back).expect("a read");
    assert!(back == data, "what was written there differs");
    drop((here, there));
    destination.stop();
    disk.assert_nothing_reported();
    disk.stop_and_compare();
}

/// All pages of the guest's memory, by their number.
fn snapshot(front_end: &FrontEnd) -> BTreeMap<u64, Vec<u8>> {
    let memory = front_end.memory();
    let mut pages = BTreeMap::new();
    for region in memory.iter() {
        for offset in (0..region.len()).step_by(PAGE) {
            let address = region.start_addr().unchecked_add(offset);
            let mut page = vec![0; PAGE];
            memory.read_slice(&mut page, address).expect("its memory");
            pages.insert(address.raw_value() / PAGE as u64, page);
        }
    }
    pages
}

/// The pages of `len` bytes from `address` on.
fn pages_of(address: GuestAddress, len: u64) -> impl Iterator<Item = u64> {
    let page = PAGE as u64;
    address.raw_value() / page..=(address.raw_value() + len - 1) / page
}

#[test]
fn log_has_exactly_the_pages_that_the_daemon_has_written() {
    let disk = Setup::new().start();
    let options = Options {
        queues: 2,
        ..Options::default()
    };
    let mut front_end = disk.connect(&options);
    for at in 0..8 {
        let content = Random::new(at).bytes(256 * SECTOR);
        let queue = front_end.queue(0);
        queue.write_data(at * 256, &content).expect("a write");
    }
    let before = snapshot(&front_end);
    let last = *before.keys().last().expect("it has memory");
    let log = tempfile::tempfile().expect("a file");
    let log_bytes = last / 8 + 1;
    log.set_len(log_bytes).expect("a file");
    let region = VhostUserDirtyLogRegion {
        mmap_size: log_bytes,
        mmap_offset: 0,
        mmap_handle: log.as_raw_fd(),
    };
    front_end
        .send("SET_LOG_BASE", |protocol| {
            protocol.set_log_base(0, Some(region))
        })
        .expect("an answer");
    let marked = || -> BTreeSet<u64> {
        let mut bits = vec![0; usize::try_from(log_bytes).expect("small")];
        log.read_exact_at(&mut bits, 0).expect("the log");
        let is_marked = |page: &u64| bits[index(page / 8)] >> (page % 8) & 1 == 1;
        (0..=last).filter(is_marked).collect()
    };
    let mut sector = vec![0; SECTOR];
    front_end.queue(0).read(0, &mut sector).expect("a read");
    assert!(marked().is_empty(), "nothing is to be logged yet");
    set_logging(&mut front_end, true);

    let mut random = Random::new(4);
    let mut tokens = Vec::new();
    for number in 0..24 {
        let len = (1 + random.below(120)) * SECTOR;
        let sector = u64::try_from(random.below(2048 - 120)).expect("small");
        let request = Request::Read { sector, len };
        let queue = front_end.queue(number % 2);
        tokens.push((number % 2, queue.enqueue(&request).expect("room")));
    }
    // What changes from here on is the daemon's, but for indices that the driver writes.
    let before = snapshot(&front_end);
    let (mut drivers, mut used) = (BTreeSet::new(), BTreeSet::new());
    for queue in front_end.queues() {
        let ring = queue.ring_mut();
        let size = u64::from(ring.size());
        let [_, available, ring] = ring.addresses();
        drivers.extend(pages_of(available, 6 + 2 * size));
        used.extend(pages_of(ring, 6 + 8 * size));
        queue.publish().expect("a kick");
    }
    for (queue, token) in tokens {
        let completion = front_end.queue(queue).wait(token).expect("a completion");
        assert_eq!(completion.status, Status::Ok);
    }
    set_logging(&mut front_end, false);
    let after = snapshot(&front_end);
    let changed = before.iter().filter(|(page, bytes)| after[page] != **bytes);
    let changed: BTreeSet<u64> = changed.map(|(page, _)| *page).collect();
    let found = marked();
    assert!(changed.len() > 100, "only {} pages changed", changed.len());
    let lost: Vec<_> = changed.difference(&found).collect();
    assert!(
        lost.iter().all(|page| drivers.contains(page)),
        "changed and not marked: {lost:?}"
    );
    let spurious: Vec<_> = found.difference(&changed).collect();
    assert!(
        spurious.iter().all(|page| used.contains(page)),
        "marked and not written: {spurious:?}"
    );
    // It has stopped.
    log.write_all_at(&vec![0; index(log_bytes)], 0)
        .expect("the log");
    front_end.queue(0).read(0, &mut sector).expect("a read");
    front_end.stop().expect("all rings are taken away");
    assert!(marked().is_empty(), "{:?}", marked());
}
