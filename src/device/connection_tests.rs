// SPDX-License-Identifier: Apache-2.0
use std::fs;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::device::config_space::feature;
use crate::device::test_support::{
    DriverRing, TestDisk, TestWorker, device, device_of, options, write_header,
};
use crate::device::{GuestMemory, QueueCommand, WorkerMailbox};

#[path = "lifecycle_tests.rs"]
mod lifecycle;
#[path = "logging_tests.rs"]
mod logging;

const MEMORY_BYTES: u64 = 0x20_0000;
const DATA: u64 = 0x10_0000;

/// A front-end with guest memory in a file, over a socket pair.
struct Vmm {
    frontend: Frontend,
    memory: GuestMemory,
    handle: ConnectionHandle,
}

fn memory_file() -> fs::File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(MEMORY_BYTES).unwrap();
    file
}

fn regions(memory: &GuestMemory) -> Vec<VhostUserMemoryRegionInfo> {
    memory
        .iter()
        .map(|region| VhostUserMemoryRegionInfo::from_guest_region(region).unwrap())
        .collect()
}

impl Vmm {
    fn connect(device: &Arc<Device>) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let file = FileOffset::new(memory_file(), 0);
        let range = (
            GuestAddress(0),
            usize::try_from(MEMORY_BYTES).unwrap(),
            Some(file),
        );
        Self {
            frontend: Frontend::from_stream(ours, 64),
            memory: GuestMemory::from_ranges_with_files([range]).unwrap(),
            handle: Connection::serve(theirs, Arc::clone(device)).unwrap(),
        }
    }

    fn negotiate(&mut self, features: u64) {
        let offered = self.frontend.get_features().unwrap();
        self.frontend.set_owner().unwrap();
        let protocol = self.frontend.get_protocol_features().unwrap();
        self.frontend
            .set_protocol_features(protocol & !VhostUserProtocolFeatures::REPLY_ACK)
            .unwrap();
        let features = features | feature::PROTOCOL_FEATURES | feature::VERSION_1;
        assert_eq!(features & !offered, 0);
        self.frontend.set_features(features).unwrap();
    }

    fn send_memory(&mut self) {
        self.frontend.set_mem_table(&regions(&self.memory)).unwrap();
    }

    /// Sets ring `index` up like QEMU does; `base` is what SET_VRING_BASE says.
    fn start_ring(&mut self, index: usize, ring: &DriverRing, base: u16) -> Wires {
        let wires = Wires {
            kick: EventFd::new(0).unwrap(),
            call: EventFd::new(EFD_NONBLOCK).unwrap(),
        };
        let host = self.memory.iter().next().unwrap();
        let host = host
            .get_host_address(MemoryRegionAddress(0))
            .unwrap()
            .addr() as u64;
        let config = VringConfigData {
            queue_max_size: 256,
            queue_size: ring.size,
            flags: 0,
            desc_table_addr: host + ring.rings.descriptors,
            used_ring_addr: host + ring.rings.used,
            avail_ring_addr: host + ring.rings.available,
            log_addr: None,
        };
        let frontend = &mut self.frontend;
        frontend.set_vring_call(index, &wires.call).unwrap();
        frontend.set_vring_num(index, ring.size).unwrap();
        frontend.set_vring_base(index, base).unwrap();
        frontend.set_vring_addr(index, &config).unwrap();
        frontend.set_vring_kick(index, &wires.kick).unwrap();
        frontend.set_vring_enable(index, true).unwrap();
        wires
    }

    /// Ends the connection from this side and returns how it ended on the other.
    fn disconnect(self) -> ConnectionEnd {
        let Self {
            frontend, handle, ..
        } = self;
        drop(frontend);
        handle.join()
    }
}

struct Wires {
    kick: EventFd,
    call: EventFd,
}

fn wait_for(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !condition() {
        assert!(Instant::now() < deadline, "waited for: {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// Offers one request and waits until it is used. Returns its status.
fn submit(vmm: &Vmm, ring: &mut DriverRing, kick: Option<&EventFd>, kind: u32, sector: u64) -> u8 {
    let status = offer(vmm, ring, kick, kind, sector);
    let expected = ring.avail;
    wait_for("a used request", || {
        ring.used_index(&vmm.memory) == expected
    });
    vmm.memory.read_obj(GuestAddress(status)).unwrap()
}

/// Offers one request. Returns where its status will be.
fn offer(vmm: &Vmm, ring: &mut DriverRing, kick: Option<&EventFd>, kind: u32, sector: u64) -> u64 {
    let memory = &vmm.memory;
    write_header(memory, DATA, kind, sector);
    let status = DATA + 0x2000;
    memory.write_obj(0xffu8, GuestAddress(status)).unwrap();
    let writable = kind == 0;
    let buffers = [
        (DATA, 16, false),
        (DATA + 0x1000, 512, writable),
        (status, 1, true),
    ];
    let head = ring.chain(memory, &buffers);
    ring.offer(memory, head);
    if let Some(kick) = kick {
        kick.write(1).unwrap();
    }
    status
}

fn setup(workers: usize) -> (Arc<Device>, TestDisk, Vec<TestWorker>) {
    device(options(), workers)
}

#[test]
fn connection_serves_writes_and_reads_over_several_workers() {
    let (device, disk, _workers) = setup(2);
    let mut vmm = Vmm::connect(&device);
    vmm.negotiate(feature::EVENT_IDX | feature::INDIRECT_DESC);
    vmm.send_memory();
    for index in 0..3u8 {
        let mut ring = DriverRing::new(0x1_0000 * u64::from(index), 16);
        let wires = vmm.start_ring(index.into(), &ring, 0);
        // The call descriptor is signalled when it arrives.
        wait_for("the first call", || wires.call.read().is_ok());
        let fill = [index + 1; 512];
        vmm.memory
            .write_slice(&fill, GuestAddress(DATA + 0x1000))
            .unwrap();
        let sector = u64::from(index);
        assert_eq!(submit(&vmm, &mut ring, Some(&wires.kick), 1, sector), 0);
        wait_for("a call", || wires.call.read().is_ok());
        vmm.memory
            .write_slice(&[0; 512], GuestAddress(DATA + 0x1000))
            .unwrap();
        assert_eq!(submit(&vmm, &mut ring, Some(&wires.kick), 0, sector), 0);
        let mut data = [0u8; 512];
        vmm.memory
            .read_slice(&mut data, GuestAddress(DATA + 0x1000))
            .unwrap();
        assert_eq!(data, fill);
        assert_eq!(ring.used_element(&vmm.memory, 1).1, 513);
    }
    assert_eq!(disk.running.load(Ordering::SeqCst), 3);
    assert!(matches!(vmm.disconnect(), ConnectionEnd::Disconnected));
    assert_eq!(
        disk.running.load(Ordering::SeqCst),
        0,
        "all queues are stopped when the end is announced"
    );
}

#[test]
fn ring_is_looked_at_when_it_starts_without_a_kick() {
    let (device, _disk, _workers) = setup(1);
    let mut vmm = Vmm::connect(&device);
    vmm.negotiate(0);
    vmm.send_memory();
    let mut ring = DriverRing::new(0, 16);
    let memory = &vmm.memory;
    write_header(memory, DATA, 4, 0);
    let head = ring.chain(memory, &[(DATA, 16, false), (DATA + 16, 1, true)]);
    ring.offer(memory, head);
    vmm.start_ring(0, &ring, 0);
    wait_for("the request", || ring.used_index(&vmm.memory) == 1);
}

#[test]
fn position_comes_from_the_used_index_and_stop_returns_the_next_one() {
    let (device, disk, _workers) = setup(1);
    let mut vmm = Vmm::connect(&device);
    vmm.negotiate(0);
    vmm.send_memory();
    let mut ring = DriverRing::new(0, 16);
    // A ring that was used before, and a front-end with the wrong idea of it.
    ring.avail = 65530;
    ring.set_used_index(&vmm.memory, 65530);
    ring.set_avail_index(&vmm.memory, 65530);
    let wires = vmm.start_ring(0, &ring, 7);
    for _ in 0..10 {
        assert_eq!(submit(&vmm, &mut ring, Some(&wires.kick), 0, 0), 0);
    }
    vmm.frontend.set_vring_enable(0, false).unwrap();
    assert_eq!(vmm.frontend.get_vring_base(0).unwrap(), 4);
    assert_eq!(disk.running.load(Ordering::SeqCst), 0);
    // A ring that does not run answers what it was told.
    vmm.frontend.set_vring_base(1, 9).unwrap();
    assert_eq!(vmm.frontend.get_vring_base(1).unwrap(), 9);
}

#[test]
fn firmware_then_linux_on_one_connection() {
    let (device, disk, _workers) = setup(2);
    let mut vmm = Vmm::connect(&device);
    vmm.negotiate(0);
    vmm.send_memory();
    let mut firmware = DriverRing::new(0, 8);
    let wires = vmm.start_ring(0, &firmware, 0);
    assert_eq!(submit(&vmm, &mut firmware, Some(&wires.kick), 0, 0), 0);
    vmm.frontend.set_vring_enable(0, false).unwrap();
    assert_eq!(vmm.frontend.get_vring_base(0).unwrap(), 1);

    // Other features, other rings, no memory message.
    let features = feature::EVENT_IDX | feature::FLUSH | feature::VERSION_1;
    vmm.frontend
        .set_features(features | feature::PROTOCOL_FEATURES)
        .unwrap();
    let mut rings: Vec<_> = (0..2u64)
        .map(|i| DriverRing::new(0x4_0000 + i * 0x1_0000, 64))
        .collect();
    for (index, ring) in rings.iter_mut().enumerate() {
        let wires = vmm.start_ring(index, ring, 0);
        assert_eq!(submit(&vmm, ring, Some(&wires.kick), 1, 1), 0);
    }
    assert_eq!(disk.running.load(Ordering::SeqCst), 2);

    vmm.frontend.reset_device().unwrap();
    // The next message is handled after the reset.
    vmm.frontend.get_features().unwrap();
    assert_eq!(disk.running.load(Ordering::SeqCst), 0);
    let mut again = DriverRing::new(0x8_0000, 32);
    vmm.frontend
        .set_features(features | feature::PROTOCOL_FEATURES)
        .unwrap();
    let wires = vmm.start_ring(0, &again, 0);
    assert_eq!(submit(&vmm, &mut again, Some(&wires.kick), 0, 1), 0);
}

#[test]
fn disabled_ring_waits_and_replaced_kick_is_followed() {
    let (device, disk, _workers) = setup(1);
    let mut vmm = Vmm::connect(&device);
    vmm.negotiate(0);
    vmm.send_memory();
    let mut ring = DriverRing::new(0, 16);
    let wires = vmm.start_ring(0, &ring, 0);
    assert_eq!(submit(&vmm, &mut ring, Some(&wires.kick), 0, 0), 0);

    // The old descriptor is drained by somebody else while it is replaced.
    wires.kick.write(1).unwrap();
    let kick = EventFd::new(0).unwrap();
    vmm.frontend.set_vring_kick(0, &kick).unwrap();
    assert_eq!(submit(&vmm, &mut ring, Some(&kick), 0, 0), 0);

    vmm.frontend.set_vring_enable(0, false).unwrap();
    vmm.frontend.get_features().unwrap();
    wait_for("the pause", || {
        disk.commands.lock().unwrap().iter().any(|c| c == "Pause")
    });
    let served = disk.served.load(Ordering::SeqCst);
    write_header(&vmm.memory, DATA, 4, 0);
    let head = ring.chain(&vmm.memory, &[(DATA, 16, false), (DATA + 16, 1, true)]);
    ring.offer(&vmm.memory, head);
    kick.write(1).unwrap();
    thread::sleep(Duration::from_millis(50));
    assert_eq!(disk.served.load(Ordering::SeqCst), served);
    vmm.frontend.set_vring_enable(0, true).unwrap();
    wait_for("the request", || {
        disk.served.load(Ordering::SeqCst) == served + 1
    });
}

#[test]
fn probing_connections_leak_no_descriptor() {
    let (device, _disk, _workers) = setup(2);
    let count = || fs::read_dir("/proc/self/fd").unwrap().count();
    let probe = |index: usize| {
        let mut vmm = Vmm::connect(&device);
        if index.is_multiple_of(2) {
            vmm.negotiate(0);
            let space = [0u8; 60];
            let flags = VhostUserConfigFlags::empty();
            let (_, config) = vmm.frontend.get_config(0, 60, flags, &space).unwrap();
            assert_eq!(config[..8], 2048u64.to_le_bytes());
        }
        if index.is_multiple_of(4) {
            vmm.send_memory();
            vmm.start_ring(0, &DriverRing::new(0, 16), 0);
        }
        assert!(matches!(vmm.disconnect(), ConnectionEnd::Disconnected));
    };
    probe(0);
    let before = count();
    for index in 0..200 {
        probe(index);
    }
    // Other tests of this process open and close descriptors meanwhile.
    wait_for("descriptors to be closed", || count() < before + 60);
}

#[test]
fn config_of_any_size_is_answered_with_zeroes_beyond_its_end() {
    let (device, _disk, _workers) = setup(1);
    let mut vmm = Vmm::connect(&device);
    vmm.negotiate(0);
    for size in [8, 57, 60, 256] {
        let space = vec![0u8; size as usize];
        let flags = VhostUserConfigFlags::empty();
        let (_, config) = vmm.frontend.get_config(0, size, flags, &space).unwrap();
        assert_eq!(config.len(), size as usize);
        assert_eq!(config[..8], 2048u64.to_le_bytes());
        assert!(config.iter().skip(60).all(|&byte| byte == 0));
    }
    // A guest that writes the configuration does not cost the connection.
    let flags = VhostUserConfigFlags::WRITABLE;
    vmm.frontend.set_config(32, flags, &[0]).unwrap();
    assert_eq!(vmm.frontend.get_queue_num().unwrap(), 4);
}

#[test]
fn memory_can_be_taken_away_and_given_back() {
    let (device, disk, _workers) = setup(2);
    let mut vmm = Vmm::connect(&device);
    vmm.negotiate(0);
    let region = regions(&vmm.memory)[0];
    vmm.frontend.add_mem_region(&region).unwrap();
    let ring = DriverRing::new(0, 16);
    let wires = vmm.start_ring(0, &ring, 0);
    wait_for("the queue", || disk.running.load(Ordering::SeqCst) == 1);
    vmm.frontend.remove_mem_region(&region).unwrap();
    wires.kick.write(1).unwrap();
    vmm.frontend.get_features().unwrap();
    // The queue's ring is gone: it stops alone, and can be set up again.
    vmm.frontend.get_vring_base(0).unwrap();
    vmm.frontend.add_mem_region(&region).unwrap();
    let mut ring = DriverRing::new(0, 16);
    let wires = vmm.start_ring(0, &ring, 0);
    assert_eq!(submit(&vmm, &mut ring, Some(&wires.kick), 0, 0), 0);
}

#[test]
fn refused_messages_close_the_connection_and_the_next_one_works() {
    let (device, _disk, _workers) = setup(1);
    let vmm = Vmm::connect(&device);
    vmm.frontend.set_owner().unwrap();
    // The crate's front-end does not check it.
    vmm.frontend.set_vring_num(0, 96).unwrap();
    let Vmm {
        frontend, handle, ..
    } = vmm;
    let end = handle.join();
    let ConnectionEnd::Refused(why) = end else {
        panic!("{end:?}");
    };
    assert!(format!("{why:?}").contains("QueueSize"), "{why:?}");
    assert!(frontend.get_features().is_err());

    let vmm = Vmm::connect(&device);
    vmm.frontend.set_owner().unwrap();
    vmm.frontend.set_owner().unwrap();
    let Vmm {
        frontend: _keep,
        handle,
        ..
    } = vmm;
    assert!(matches!(handle.join(), ConnectionEnd::Failed(_)));

    let mut vmm = Vmm::connect(&device);
    vmm.negotiate(0);
    assert!(matches!(vmm.disconnect(), ConnectionEnd::Disconnected));
}

#[test]
fn shutdown_stops_queues_and_is_announced() {
    let (device, disk, _workers) = setup(1);
    let mut vmm = Vmm::connect(&device);
    vmm.negotiate(0);
    vmm.send_memory();
    vmm.start_ring(0, &DriverRing::new(0, 16), 0);
    wait_for("the queue", || disk.running.load(Ordering::SeqCst) == 1);
    let mut fds = [rustix::event::PollFd::new(
        &vmm.handle.control.ended,
        rustix::event::PollFlags::IN,
    )];
    let now = rustix::event::Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    assert_eq!(rustix::event::poll(&mut fds, Some(&now)), Ok(0));
    vmm.handle.shutdown();
    assert_eq!(rustix::event::poll(&mut fds, None), Ok(1));
    assert_eq!(disk.running.load(Ordering::SeqCst), 0);
    assert!(vmm.handle.ended().as_raw_fd() >= 0);
    assert!(matches!(vmm.handle.join(), ConnectionEnd::ShutDown));
}

#[test]
fn private_socket_holds_our_connection_and_no_other() {
    let (listener, private) = private_socket().unwrap();
    let intruder = socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::NONBLOCK,
        None,
    )
    .unwrap();
    let address = getsockname(&listener).unwrap();
    assert_eq!(connect(&intruder, &address), Err(Errno::AGAIN));
    let (accepted, _) = listener.accept().unwrap();
    std::io::Write::write_all(&mut &private, b"ours").unwrap();
    let mut got = [0u8; 4];
    std::io::Read::read_exact(&mut &accepted, &mut got).unwrap();
    assert_eq!(&got, b"ours");
}

/// A worker that does nothing by itself.
#[derive(Default)]
struct Recorder(std::sync::Mutex<Vec<QueueCommand>>);

impl WorkerMailbox for Recorder {
    fn send(&self, command: QueueCommand) {
        match command {
            QueueCommand::Memory { ack, .. } => ack.send(()),
            command => self.0.lock().unwrap().push(command),
        }
    }
}

#[test]
fn stopping_a_ring_waits_for_its_worker_and_answers_its_position() {
    let recorder = Arc::new(Recorder::default());
    let worker = Arc::clone(&recorder) as Arc<dyn WorkerMailbox>;
    let mut vmm = Vmm::connect(&Arc::new(device_of(options(), vec![worker])));
    vmm.negotiate(feature::EVENT_IDX);
    vmm.send_memory();
    vmm.start_ring(2, &DriverRing::new(0, 16), 0);
    wait_for("the start", || !recorder.0.lock().unwrap().is_empty());
    let start = recorder.0.lock().unwrap().remove(0);
    let QueueCommand::Start { queue, setup, .. } = start else {
        panic!("{start:?}");
    };
    assert_eq!((queue, setup.index, setup.size), (2, 2, 16));
    assert_ne!(setup.features & feature::EVENT_IDX, 0);
    assert!(setup.call.is_some());

    let mut frontend = vmm.frontend.clone();
    let stop = thread::spawn(move || frontend_base(&mut frontend));
    wait_for("the stop", || !recorder.0.lock().unwrap().is_empty());
    thread::sleep(Duration::from_millis(30));
    assert!(!stop.is_finished(), "requests are still being completed");
    let command = recorder.0.lock().unwrap().remove(0);
    let QueueCommand::Stop { queue: 2, ack } = command else {
        panic!("{command:?}");
    };
    ack.send(1234);
    assert_eq!(stop.join().unwrap(), 1234);
}

fn frontend_base(frontend: &mut Frontend) -> u32 {
    frontend.get_vring_base(2).unwrap()
}

#[test]
fn ring_starts_when_all_is_there_whatever_the_order() {
    let (device, disk, _workers) = setup(1);
    let mut vmm = Vmm::connect(&device);
    vmm.negotiate(0);
    let kick = EventFd::new(0).unwrap();
    vmm.frontend.set_vring_kick(0, &kick).unwrap();
    vmm.frontend.set_vring_enable(0, true).unwrap();
    vmm.frontend.get_features().unwrap();
    assert_eq!(disk.commands.lock().unwrap().len(), 0, "no rings, no size");
    vmm.send_memory();
    let mut ring = DriverRing::new(0, 16);
    let wires = vmm.start_ring(0, &ring, 0);
    assert_eq!(submit(&vmm, &mut ring, Some(&wires.kick), 0, 0), 0);
    let commands = disk.commands.lock().unwrap();
    let starts = commands.iter().filter(|name| *name == "Start").count();
    assert_eq!(starts, 1, "{commands:?}");
}

#[test]
fn connection_without_a_worker_ends_and_says_so() {
    let mailbox = Arc::new(crate::device::Mailbox::<QueueCommand>::new().unwrap());
    mailbox.close();
    let mut vmm = Vmm::connect(&Arc::new(device_of(options(), vec![mailbox])));
    vmm.negotiate(0);
    vmm.send_memory();
    assert!(vmm.frontend.get_features().is_err());
    assert!(matches!(vmm.handle.join(), ConnectionEnd::Worker(_)));
}
