// SPDX-License-Identifier: Apache-2.0
//! Hostile front-ends: whatever is sent, the worst that happens is the end of that connection.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use quorum_blk::front_end::{FrontEnd, FrontEndError, Options, Request, Status};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{OFlags, fcntl_setfl};
use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};
use vhost::{VhostBackend, VringConfigData};
use vmm_sys_util::epoll::Epoll;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;
use vmm_sys_util::timerfd::TimerFd;

use crate::common::{Disk, PATIENCE, Random, SECTOR, Setup, Signal, eventually};

/// Numbers of messages (vhost-user specification).
mod message {
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_LOG_BASE: u32 = 6;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const SET_BACKEND_REQ_FD: u32 = 21;
    pub const GET_CONFIG: u32 = 24;
    pub const SET_CONFIG: u32 = 25;
    pub const GET_INFLIGHT_FD: u32 = 31;
    pub const SET_INFLIGHT_FD: u32 = 32;
    pub const ADD_MEM_REG: u32 = 37;
    pub const REM_MEM_REG: u32 = 38;
}

/// Protocol features every connection of these tests acknowledges: MQ, REPLY_ACK, BACKEND_REQ,
/// CONFIG, CONFIGURE_MEM_SLOTS.
const PROTOCOL: u64 = 1 | 1 << 3 | 1 << 5 | 1 << 9 | 1 << 15;

/// Bytes on the socket, without anybody's idea of what is allowed.
struct Wire {
    socket: UnixStream,
}

impl Wire {
    fn connect(disk: &Disk) -> Self {
        let socket = UnixStream::connect(&disk.socket).expect("a listener");
        socket.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        socket.set_write_timeout(Some(PATIENCE)).expect("a timeout");
        Self { socket }
    }

    /// A connection with features negotiated as far as a front-end goes before the guest runs.
    fn negotiated(disk: &Disk) -> Self {
        let mut wire = Self::connect(disk);
        wire.send(message::SET_OWNER, &[], &[]);
        wire.send(message::GET_FEATURES, &[], &[]);
        assert!(wire.answers(), "GET_FEATURES has an answer");
        wire.send(message::SET_PROTOCOL_FEATURES, &PROTOCOL.to_le_bytes(), &[]);
        let features: u64 = 1 << 32 | 1 << 30;
        wire.send(message::SET_FEATURES, &features.to_le_bytes(), &[]);
        wire
    }

    fn send(&mut self, request: u32, body: &[u8], fds: &[RawFd]) {
        let len = u32::try_from(body.len()).expect("small");
        self.send_as(request, len, body, fds);
    }

    /// Version 1, reply wanted, any length in the header. The back-end may be gone already.
    fn send_as(&mut self, request: u32, len: u32, body: &[u8], fds: &[RawFd]) {
        let bytes = [
            &request.to_le_bytes()[..],
            &(1u32 | 8).to_le_bytes(),
            &len.to_le_bytes(),
            body,
        ]
        .concat();
        // A refused connection may end while the bytes are on their way.
        let _ = self.socket.send_with_fds(&[&bytes[..]], fds);
    }

    /// Waits for an answer or the end of the connection; whether there is an answer.
    fn answers(&mut self) -> bool {
        let mut bytes = [0; 4096];
        match self.socket.read(&mut bytes) {
            Ok(len) => len > 0,
            Err(error) if error.kind() == ErrorKind::ConnectionReset => false,
            Err(error) => panic!("neither an answer nor an end: {error}"),
        }
    }

    /// Nothing more is said; everything sent has its effect or ends the connection.
    fn hang_up(self) {
        // The back-end may be first.
        let _ = self.socket.shutdown(std::net::Shutdown::Write);
        let mut rest = Vec::new();
        let mut socket = &self.socket;
        match socket.read_to_end(&mut rest) {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
            Err(error) => panic!("the daemon keeps a connection that is over: {error}"),
        }
    }
}

fn words(values: &[u64]) -> Vec<u8> {
    values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect()
}

/// A vring state: index and number.
fn state(index: u32, number: u32) -> Vec<u8> {
    [index.to_le_bytes(), number.to_le_bytes()].concat()
}

/// A memory region for ADD_MEM_REG: guest address, size, user address, offset in the file.
fn region(guest: u64, size: u64, user: u64, offset: u64) -> Vec<u8> {
    words(&[0, guest, size, user, offset])
}

fn memory_file(bytes: u64) -> File {
    let file = tempfile::tempfile().expect("a file");
    file.set_len(bytes).expect("a sparse file");
    file
}

/// Messages, each with its body and the descriptors that come with it.
type Script<'a> = Vec<(u32, Vec<u8>, Vec<RawFd>)>;

/// Runs each script on a connection of its own. The daemon must serve the next one every time.
fn survive(disk: &mut Disk, scripts: Vec<(&str, Script)>) {
    for (what, script) in scripts {
        for negotiate in [false, true] {
            let mut wire = if negotiate {
                Wire::negotiated(disk)
            } else {
                Wire::connect(disk)
            };
            for (request, body, fds) in &script {
                wire.send(*request, body, fds);
            }
            wire.hang_up();
            eprintln!("after: {what}, negotiated: {negotiate}");
            disk.assert_alive();
        }
        disk.assert_serves();
    }
}

#[test]
fn messages_of_wrong_size_end_at_most_the_connection() {
    let mut disk = Setup::new().start();
    let all = (0..48).collect::<Vec<u32>>();
    for len in [0, 1, 7, 9, 4096, 4097, 1 << 20, u32::MAX] {
        for &request in &all {
            let mut wire = Wire::negotiated(&disk);
            let body = vec![0xff; usize::try_from(len).expect("small").min(5000)];
            wire.send_as(request, len, &body, &[]);
            wire.hang_up();
        }
        disk.assert_serves();
    }
}

#[test]
fn random_bytes_end_at_most_the_connection() {
    let mut disk = Setup::new().start();
    let mut random = Random::new(21);
    for round in 0..100 {
        let mut wire = if round % 2 == 0 {
            Wire::connect(&disk)
        } else {
            Wire::negotiated(&disk)
        };
        let len = 1 + random.below(300);
        let bytes = random.bytes(len);
        // The daemon may hang up before everything is written.
        let _ = wire.socket.write_all(&bytes);
        wire.hang_up();
    }
    disk.assert_serves();
}

#[test]
fn random_messages_end_at_most_the_connection() {
    let mut disk = Setup::new().start();
    let mut random = Random::new(22);
    let memory = memory_file(1 << 20);
    for _ in 0..60 {
        let mut wire = Wire::negotiated(&disk);
        for _ in 0..12 {
            let request = u32::try_from(random.below(46)).expect("small");
            let len = random.pick(&[0, 8, 8, 8, 12, 24, 40, 40, 48, 72]);
            let mut body = random.bytes(len);
            // Small numbers get further than large ones.
            for byte in &mut body {
                *byte &= random.pick(&[0, 0, 1, 0xff]);
            }
            let fds = vec![memory.as_raw_fd(); random.pick(&[0, 0, 1, 1, 2])];
            wire.send(request, &body, &fds);
        }
        wire.hang_up();
    }
    disk.assert_serves();
    disk.stop_and_compare();
}

#[test]
fn messages_out_of_order_end_at_most_the_connection() {
    let mut disk = Setup::new().start();
    let event = EventFd::new(0).expect("an event descriptor");
    let event = event.as_raw_fd();
    let address = words(&[0, 0x1000, 0x3000, 0x2000, 0]);
    let inflight = [words(&[0, 0]), vec![1, 0, 128, 0, 0, 0, 0, 0]].concat();
    let scripts: Vec<(&str, Script)> = vec![
        (
            "addresses before memory",
            vec![(message::SET_VRING_ADDR, address, vec![])],
        ),
        (
            "kick before anything",
            vec![(message::SET_VRING_KICK, words(&[0]), vec![event])],
        ),
        (
            "call before anything",
            vec![(message::SET_VRING_CALL, words(&[0]), vec![event])],
        ),
        (
            "enable before anything",
            vec![(message::SET_VRING_ENABLE, state(0, 1), vec![])],
        ),
        (
            "kick and enable without a ring",
            vec![
                (message::SET_VRING_KICK, words(&[0]), vec![event]),
                (message::SET_VRING_ENABLE, state(0, 1), vec![]),
                (message::SET_VRING_ENABLE, state(0, 0), vec![]),
                (message::SET_VRING_ENABLE, state(0, 1), vec![]),
            ],
        ),
        (
            "base of a ring that never ran",
            vec![(message::GET_VRING_BASE, state(0, 0), vec![])],
        ),
        (
            "base of rings that are not there",
            vec![
                (message::GET_VRING_BASE, state(64, 0), vec![]),
                (message::GET_VRING_BASE, state(u32::MAX, 0), vec![]),
                (message::SET_VRING_BASE, state(255, 0), vec![]),
            ],
        ),
        (
            "second owner",
            vec![
                (message::SET_OWNER, vec![], vec![]),
                (message::SET_OWNER, vec![], vec![]),
            ],
        ),
        (
            "features nobody offered",
            vec![
                (message::SET_FEATURES, words(&[u64::MAX]), vec![]),
                (message::SET_PROTOCOL_FEATURES, words(&[u64::MAX]), vec![]),
            ],
        ),
        (
            "log without the feature",
            vec![(message::SET_LOG_BASE, words(&[4096, 0]), vec![event])],
        ),
        (
            "in-flight buffer before memory",
            vec![
                (message::GET_INFLIGHT_FD, inflight.clone(), vec![]),
                (message::SET_INFLIGHT_FD, inflight, vec![event]),
            ],
        ),
        (
            "memory taken away that never came",
            vec![(message::REM_MEM_REG, region(0, 4096, 0x1000, 0), vec![])],
        ),
        (
            "configuration beyond its end",
            vec![
                (
                    message::GET_CONFIG,
                    [&[250, 0, 0, 0, 60, 0, 0, 0, 0, 0, 0, 0][..], &[0; 60]].concat(),
                    vec![],
                ),
                (
                    message::SET_CONFIG,
                    [&[0, 0, 0, 0, 60, 0, 0, 0, 0, 0, 0, 0][..], &[255; 60]].concat(),
                    vec![],
                ),
            ],
        ),
    ];
    survive(&mut disk, scripts);
}

#[test]
fn missing_or_surplus_descriptors_end_at_most_the_connection() {
    let mut disk = Setup::new().start();
    let event = EventFd::new(0).expect("an event descriptor");
    let many = vec![event.as_raw_fd(); 9];
    let one_region = [words(&[1]), words(&[0, 4096, 0x1000, 0])].concat();
    let inflight = [words(&[4096, 0]), vec![1, 0, 128, 0, 0, 0, 0, 0]].concat();
    let bodies = [
        (message::SET_MEM_TABLE, one_region),
        (message::ADD_MEM_REG, region(0, 4096, 0x1000, 0)),
        (message::SET_VRING_KICK, words(&[0])),
        (message::SET_VRING_CALL, words(&[0])),
        (message::SET_BACKEND_REQ_FD, vec![]),
        (message::SET_INFLIGHT_FD, inflight),
        (message::SET_FEATURES, words(&[1 << 32])),
        (message::GET_FEATURES, vec![]),
    ];
    let descriptors = disk.process().descriptors();
    let mut scripts = Vec::new();
    for (request, body) in bodies {
        scripts.push(("no descriptor", vec![(request, body.clone(), vec![])]));
        scripts.push(("nine descriptors", vec![(request, body, many.clone())]));
    }
    survive(&mut disk, scripts);
    // The last connections may be ending still.
    let few = eventually(|| (disk.process().descriptors() <= descriptors + 8).then_some(()));
    let now = disk.process().descriptors();
    assert!(few.is_some(), "{descriptors} descriptors became {now}");
}

#[test]
fn impossible_memory_ends_at_most_the_connection() {
    let mut disk = Setup::new().start();
    let file = memory_file(8192);
    let fd = file.as_raw_fd();
    let event = EventFd::new(0).expect("an event descriptor");
    let regions = [
        ("longer than its file", region(0, 1 << 20, 0x10_0000, 0)),
        ("beyond its file", region(0, 4096, 0x10_0000, 1 << 20)),
        ("huge", region(0, 1 << 46, 0x10_0000, 0)),
        ("all there is", region(0, u64::MAX, 0x10_0000, 0)),
        ("empty", region(0, 0, 0x10_0000, 0)),
        ("ragged", region(0, 1000, 0x10_0000, 7)),
        (
            "past the last guest address",
            region(u64::MAX - 100, 4096, 0x10_0000, 0),
        ),
        (
            "past the last user address",
            region(0, 4096, u64::MAX - 100, 0),
        ),
        (
            "past the last offset",
            region(0, 4096, 0x10_0000, u64::MAX - 100),
        ),
    ];
    let mut scripts: Vec<(&str, Script)> = Vec::new();
    for (what, body) in regions {
        let table = [&words(&[1])[..], &body[8..]].concat();
        // Rings are then put there and kicked, so that whatever was mapped is looked at.
        let user = u64::from_le_bytes(body[24..32].try_into().expect("8 bytes"));
        let addresses = words(&[0, user, user.wrapping_add(2048), user.wrapping_add(1024), 0]);
        let use_it: Script = vec![
            (message::SET_VRING_NUM, state(0, 16), vec![]),
            (message::SET_VRING_BASE, state(0, 0), vec![]),
            (message::SET_VRING_ADDR, addresses, vec![]),
            (
                message::SET_VRING_KICK,
                words(&[0]),
                vec![event.as_raw_fd()],
            ),
            (message::SET_VRING_ENABLE, state(0, 1), vec![]),
            (message::GET_VRING_BASE, state(0, 0), vec![]),
        ];
        event.write(1).expect("a kick");
        for first in [
            (message::ADD_MEM_REG, body, vec![fd]),
            (message::SET_MEM_TABLE, table, vec![fd]),
        ] {
            scripts.push((what, [&[first][..], &use_it].concat()));
        }
    }
    let twice = region(0, 4096, 0x10_0000, 0);
    scripts.push((
        "same region twice",
        vec![
            (message::ADD_MEM_REG, twice.clone(), vec![fd]),
            (message::ADD_MEM_REG, twice, vec![fd]),
        ],
    ));
    scripts.push((
        "file that cannot be mapped",
        vec![(
            message::ADD_MEM_REG,
            region(0, 4096, 0x10_0000, 0),
            vec![event.as_raw_fd()],
        )],
    ));
    scripts.push((
        "more regions than slots",
        (0..600)
            .map(|at| {
                (
                    message::ADD_MEM_REG,
                    region(at << 13, 4096, at << 13, 0),
                    vec![fd],
                )
            })
            .collect(),
    ));
    survive(&mut disk, scripts);
}

#[test]
fn impossible_queue_sizes_are_refused() {
    let mut disk = Setup::new().start();
    for size in [0, 1, 100, 255, 257, 4096, 32_768, 65_535, 65_536, u32::MAX] {
        let mut wire = Wire::negotiated(&disk);
        wire.send(message::SET_VRING_NUM, &state(0, size), &[]);
        wire.hang_up();
        disk.assert_alive();
    }
    // As part of an otherwise perfect start.
    for queue_size in [100, 4096] {
        let options = Options {
            queue_size,
            timeout: PATIENCE,
            ..Options::cloud_hypervisor()
        };
        let started = FrontEnd::connect(&disk.socket, &options);
        assert!(started.is_err(), "a queue of {queue_size} was accepted");
        disk.assert_serves();
    }
    disk.assert_serves();
}

#[test]
fn rings_outside_memory_are_refused() {
    let mut disk = Setup::new().start();
    for (table, avail, used) in [
        (0x1000, 0, 0),
        (0, 0x1000, 0),
        (0, 0, 0x1000),
        (8, 0, 0),
        (0, 1, 0),
        (0, 0, 2),
        (u64::MAX - 15, u64::MAX - 1, u64::MAX - 3),
    ] {
        let mut front_end = disk.connect(&Options::cloud_hypervisor());
        front_end.stop().expect("the ring stops");
        let good = front_end.queue(0).ring_mut().addresses()[0];
        let memory = front_end.memory();
        let host = vm_memory::GuestMemoryBackend::get_host_address(&memory, good);
        let host = u64::try_from(host.expect("guest memory").addr()).expect("64 bits");
        let mixed = |address: u64| match address {
            0..=15 => host + address,
            _ => address,
        };
        let config = VringConfigData {
            queue_max_size: 256,
            queue_size: 256,
            flags: 0,
            desc_table_addr: mixed(table),
            used_ring_addr: mixed(used),
            avail_ring_addr: mixed(avail),
            log_addr: None,
        };
        let told = front_end.send("SET_VRING_ADDR", |protocol| {
            protocol.set_vring_addr(0, &config)
        });
        if told.is_ok() {
            // Accepted: then starting on it must be harmless.
            let kicked = front_end.replace_kick(0);
            let enabled = front_end.enable_all(true);
            eprintln!("{table:#x} {avail:#x} {used:#x}: {told:?} {kicked:?} {enabled:?}");
            front_end.queue(0).kick().expect("a kick");
            std::thread::sleep(Duration::from_millis(5));
        }
        drop(front_end);
        disk.assert_serves();
    }
    disk.stop_and_compare();
}

#[test]
fn descriptors_that_are_no_eventfds_are_refused() {
    let mut disk = Setup::new().start();
    let (reader, writer) = std::io::pipe().expect("a pipe");
    let (socket, _peer) = UnixStream::pair().expect("sockets");
    let file = memory_file(4096);
    let poll = Epoll::new().expect("an epoll descriptor");
    let timer = TimerFd::new().expect("a timer");
    let others = [
        ("a pipe to read", reader.as_raw_fd()),
        ("a pipe to write", writer.as_raw_fd()),
        ("a socket", socket.as_raw_fd()),
        ("a file", file.as_raw_fd()),
        ("an epoll descriptor", poll.as_raw_fd()),
        ("a timer", timer.as_raw_fd()),
    ];
    for (what, fd) in others {
        for request in [message::SET_VRING_KICK, message::SET_VRING_CALL] {
            let mut wire = Wire::negotiated(&disk);
            wire.send(request, &words(&[0]), &[fd]);
            let ended = wire.socket.read_to_end(&mut Vec::new());
            let refused = match ended {
                Ok(_) => true,
                Err(error) => error.kind() == ErrorKind::ConnectionReset,
            };
            assert!(refused, "{what} was taken by message {request}");
        }
    }
    disk.assert_serves();
}

/// The flag that keeps a write from waiting belongs to both sides of a shared descriptor.
#[test]
fn call_descriptor_that_blocks_later_holds_nobody_up() {
    let mut disk = Setup::new().start();
    let mut front_end = disk.connect(&Options::default());
    let call = eventfd(0, EventfdFlags::NONBLOCK).expect("an event descriptor");
    let bytes = [
        &message::SET_VRING_CALL.to_le_bytes()[..],
        &[1, 0, 0, 0, 8, 0, 0, 0],
        &[0; 8],
    ];
    front_end
        .socket()
        .send_with_fds(&[&bytes.concat()[..]], &[call.as_raw_fd()])
        .expect("a socket");
    let mut count = [0; 8];
    let signalled = eventually(|| rustix::io::read(&call, &mut count).ok());
    assert!(signalled.is_some(), "it is signalled when it comes");
    // Time for the second signal, by the worker.
    std::thread::sleep(Duration::from_millis(50));
    let _ = rustix::io::read(&call, &mut count);
    fcntl_setfl(&call, OFlags::empty()).expect("flags");
    rustix::io::write(&call, &(u64::MAX - 1).to_ne_bytes()).expect("room for that");
    let request = Request::Read {
        sector: 0,
        len: SECTOR,
    };
    let queue = front_end.queue(0);
    queue.enqueue(&request).expect("room");
    queue.publish().expect("a kick");
    std::thread::sleep(Duration::from_millis(50));
    drop(front_end);
    disk.assert_serves();
    disk.stop();
}

#[test]
fn lack_of_descriptors_costs_connections_and_not_the_daemon() {
    let mut disk = Setup::new().start();
    let pid = i32::try_from(disk.process().id()).expect("a process number");
    let pid = Pid::from_raw(pid);
    let before = getrlimit(Resource::Nofile);
    for spare in 1..12 {
        let open = eventually(|| {
            // Until the connection of before is gone altogether.
            let open = disk.process().descriptors();
            std::thread::sleep(Duration::from_millis(5));
            (open == disk.process().descriptors()).then_some(open)
        });
        let open = u64::try_from(open.expect("an idle daemon")).expect("small");
        let few = Rlimit {
            current: Some(open + spare),
            ..before
        };
        prlimit(pid, Resource::Nofile, few).expect("a limit");
        let wire = Wire::connect(&disk);
        std::thread::sleep(Duration::from_millis(20));
        prlimit(pid, Resource::Nofile, before).expect("the limit of before");
        wire.hang_up();
        disk.assert_alive();
    }
    disk.assert_serves();
}

/// Changes of a ring by the thousand, while it works.
#[test]
fn storm_of_messages_about_running_rings_loses_no_request() {
    let mut disk = Setup::new().start();
    let options = Options {
        queues: 4,
        ..Options::default()
    };
    let mut front_end = disk.connect(&options);
    let descriptors = disk.process().descriptors();
    let data = vec![0x42; 8 * SECTOR];
    for round in 0..100u64 {
        let mut tokens = Vec::new();
        for index in 0..4 {
            let queue = front_end.queue(index);
            let sector = 8 * (4 * round + index as u64);
            let request = Request::Write {
                sector,
                data: &data,
            };
            tokens.push(queue.enqueue(&request).expect("room"));
            queue.publish().expect("a kick");
        }
        for _ in 0..3 {
            front_end.enable_all(false).expect("disabled");
            front_end.enable_all(true).expect("enabled");
        }
        for index in 0..4 {
            front_end.replace_kick(index).expect("a kick descriptor");
            front_end.replace_call(index).expect("a call descriptor");
            front_end.tell_addresses(index).expect("addresses");
            front_end.tell_size(index).expect("a size");
            // A lie, which must not be believed.
            front_end.tell_base(index, 999).expect("a base");
        }
        for (index, token) in tokens.into_iter().enumerate() {
            let completion = front_end.queue(index).wait(token).expect("an end");
            assert_eq!(completion.status, Status::Ok);
        }
    }
    let now = disk.process().descriptors();
    assert!(
        now <= descriptors + 8,
        "{descriptors} descriptors became {now}"
    );
    drop(front_end);
    disk.assert_serves();
    disk.stop_and_compare();
}

#[test]
fn half_a_message_holds_nobody_up_after_it_is_over() {
    let mut disk = Setup::new().start();
    for len in [1, 11, 12, 15] {
        let wire = Wire::connect(&disk);
        let bytes = [
            &message::SET_FEATURES.to_le_bytes()[..],
            &[1, 0, 0, 0, 8, 0, 0, 0],
            &[0; 8],
        ];
        (&wire.socket)
            .write_all(&bytes.concat()[..len])
            .expect("a socket");
        std::thread::sleep(Duration::from_millis(5));
        wire.hang_up();
        disk.assert_serves();
    }
    // And it does not keep the daemon from ending.
    let wire = Wire::connect(&disk);
    (&wire.socket).write_all(&[2, 0, 0]).expect("a socket");
    std::thread::sleep(Duration::from_millis(20));
    let status = disk.end(Signal::Terminate);
    assert_eq!(status.code(), Some(0), "{status}");
}

#[test]
fn front_end_that_reads_no_replies_holds_nobody_up() {
    let mut disk = Setup::new().start();
    let mut wire = Wire::negotiated(&disk);
    let limit = Some(Duration::from_millis(100));
    wire.socket.set_write_timeout(limit).expect("a timeout");
    let question = [
        message::GET_FEATURES.to_le_bytes(),
        1u32.to_le_bytes(),
        0u32.to_le_bytes(),
    ];
    let question = question.concat();
    // Until nothing more fits on either way.
    while wire.socket.write_all(&question).is_ok() {}
    let status = disk.end(Signal::Terminate);
    assert_eq!(status.code(), Some(0), "{status}");
    disk.start_again();
    disk.assert_serves();
}

#[test]
fn memory_file_cut_short_costs_no_data() {
    let mut disk = Setup::new().start();
    let mut front_end = disk.connect(&Options::default());
    let data = Random::new(1).bytes(64 * SECTOR);
    front_end.queue(0).write_data(0, &data).expect("a write");
    front_end.queue(0).flush().expect("a flush");
    let queue = front_end.queue(0);
    for at in 0..40 {
        let request = Request::Write {
            sector: 1000 + at,
            data: &data[..SECTOR],
        };
        queue.enqueue(&request).expect("room");
    }
    queue.publish().expect("a kick");
    let file = front_end.memory_file().try_clone().expect("a file");
    file.set_len(0).expect("a shorter file");
    // The daemon may end of it (rule G2), but only like this, and without harm to the replicas.
    front_end.queue(0).kick().expect("a kick");
    std::thread::sleep(Duration::from_millis(100));
    let ended = disk.process().ended();
    // The rings of this process are gone too: nothing of them may be touched.
    drop(front_end);
    if ended.is_some() {
        disk.start_again();
    }
    let mut front_end = disk.connect(&Options::default());
    let mut back = vec![0; data.len()];
    front_end.queue(0).read(0, &mut back).expect("a read");
    assert!(back == data, "acknowledged and flushed data are lost");
    drop(front_end);
    disk.stop();
}

#[test]
fn unanswered_client_gives_up_by_itself() {
    // Not of the daemon but of the front-end all these tests trust: it never hangs.
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("silent.sock");
    let _silent = std::os::unix::net::UnixListener::bind(&path).expect("a listener");
    let options = Options {
        timeout: Duration::from_millis(100),
        ..Options::default()
    };
    let refused = FrontEnd::connect(&path, &options).err();
    assert!(
        matches!(refused, Some(FrontEndError::NoAnswer { .. })),
        "{refused:?}"
    );
}
