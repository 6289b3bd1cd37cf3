// SPDX-License-Identifier: Apache-2.0
//! A device whose disk is opened and closed under a connection.

use std::sync::Mutex;
use std::sync::atomic::AtomicUsize;

use super::*;
use crate::device::PublishOrder;
use crate::device::lifecycle::{Lifecycle, OpenDisk, OpenFailed, Storage, SuspendError};
use crate::device::test_support::{TestWorker, nameless_disk, workers};

/// Storage that counts, refuses and waits as it is told.
#[derive(Default)]
struct TestStorage {
    disk: TestDisk,
    workers: Mutex<Vec<TestWorker>>,
    opened: AtomicUsize,
    closed: AtomicUsize,
    refuses: AtomicBool,
    waits: AtomicBool,
}

impl TestStorage {
    fn opened(&self) -> usize {
        self.opened.load(Ordering::SeqCst)
    }

    fn is_open(&self) -> bool {
        self.opened() > self.closed.load(Ordering::SeqCst)
    }
}

impl Storage for TestStorage {
    fn open(&self, given_up: &AtomicBool) -> Result<OpenDisk, OpenFailed> {
        while self.waits.load(Ordering::SeqCst) && !given_up.load(Ordering::SeqCst) {
            thread::sleep(Duration::from_millis(1));
        }
        if self.refuses.load(Ordering::SeqCst) || self.waits.load(Ordering::SeqCst) {
            let error = io::Error::other("somebody has it");
            return Err(OpenFailed(Arc::new(error)));
        }
        let (mailboxes, workers) = workers(&self.disk, 2);
        *self.workers.lock().unwrap() = workers;
        self.opened.fetch_add(1, Ordering::SeqCst);
        Ok(nameless_disk(mailboxes))
    }

    fn close(&self) {
        assert_eq!(self.disk.running.load(Ordering::SeqCst), 0, "a queue runs");
        self.workers.lock().unwrap().clear();
        self.closed.fetch_add(1, Ordering::SeqCst);
    }
}

fn closed_device() -> (Arc<Device>, Arc<TestStorage>) {
    let storage = Arc::new(TestStorage {
        disk: TestDisk::new(options().sectors),
        ..TestStorage::default()
    });
    let lifecycle = Lifecycle::of_closed(Arc::clone(&storage) as Arc<dyn Storage>, [0; 16]);
    let device = Device::new(options(), PublishOrder::Ring, lifecycle).unwrap();
    (Arc::new(device), storage)
}

/// A front-end that has sent all but its rings.
fn connect(device: &Arc<Device>) -> Vmm {
    let mut vmm = Vmm::connect(device);
    vmm.negotiate(0);
    vmm.send_memory();
    // Answered after the memory was taken.
    vmm.frontend.get_features().unwrap();
    vmm
}

static NEVER: AtomicBool = AtomicBool::new(false);

#[test]
fn disk_is_opened_when_the_first_ring_starts_and_stays_open() {
    let (device, storage) = closed_device();
    let mut vmm = connect(&device);
    vmm.send_memory();
    vmm.frontend.get_features().unwrap();
    assert_eq!(storage.opened(), 0, "nothing needs it yet");
    let mut ring = DriverRing::new(0, 16);
    let wires = vmm.start_ring(0, &ring, 0);
    assert_eq!(submit(&vmm, &mut ring, Some(&wires.kick), 0, 0), 0);
    let mut second = DriverRing::new(0x4000, 16);
    let wires = vmm.start_ring(1, &second, 0);
    assert_eq!(submit(&vmm, &mut second, Some(&wires.kick), 0, 0), 0);
    assert_eq!(storage.opened(), 1);
    assert!(matches!(vmm.disconnect(), ConnectionEnd::Disconnected));
    assert!(storage.is_open(), "a front-end that leaves closes nothing");
}

#[test]
fn disk_that_cannot_be_opened_ends_the_connection_and_is_tried_again() {
    let (device, storage) = closed_device();
    storage.refuses.store(true, Ordering::SeqCst);
    let mut vmm = connect(&device);
    vmm.start_ring(0, &DriverRing::new(0, 16), 0);
    assert!(
        vmm.frontend.get_features().is_err(),
        "nothing is answered any more"
    );
    let end = vmm.handle.join();
    let ConnectionEnd::Disk(OpenFailed(why)) = &end else {
        panic!("{end:?}");
    };
    assert_eq!(why.to_string(), "somebody has it");

    storage.refuses.store(false, Ordering::SeqCst);
    let mut vmm = connect(&device);
    let mut ring = DriverRing::new(0, 16);
    let wires = vmm.start_ring(0, &ring, 0);
    assert_eq!(submit(&vmm, &mut ring, Some(&wires.kick), 0, 0), 0);
}

#[test]
fn opening_is_given_up_when_the_front_end_leaves_or_the_connection_is_shut_down() {
    for shut_down in [false, true] {
        let (device, storage) = closed_device();
        storage.waits.store(true, Ordering::SeqCst);
        let mut vmm = connect(&device);
        vmm.start_ring(0, &DriverRing::new(0, 16), 0);
        let end = if shut_down {
            vmm.handle.shutdown();
            vmm.handle.join()
        } else {
            vmm.disconnect()
        };
        let expected = match shut_down {
            true => matches!(end, ConnectionEnd::ShutDown),
            false => matches!(end, ConnectionEnd::Disconnected),
        };
        assert!(expected, "{end:?}");
        assert_eq!(storage.opened(), 0);
    }
}

#[test]
fn suspension_drains_closes_opens_and_goes_on() {
    let (device, storage) = closed_device();
    let mut vmm = connect(&device);
    let mut ring = DriverRing::new(0, 16);
    let wires = vmm.start_ring(0, &ring, 0);
    let mut disabled = DriverRing::new(0x4000, 16);
    let other = vmm.start_ring(1, &disabled, 0);
    assert_eq!(submit(&vmm, &mut ring, Some(&wires.kick), 0, 0), 0);
    vmm.frontend.set_vring_enable(1, false).unwrap();
    vmm.frontend.get_features().unwrap();

    let lifecycle = device.lifecycle();
    let result = lifecycle.suspended(&NEVER, || {
        assert!(!storage.is_open());
        // A request that comes meanwhile waits in the ring.
        offer(&vmm, &mut ring, Some(&wires.kick), 0, 0);
        7
    });
    assert_eq!(result.unwrap(), 7);
    assert_eq!(storage.opened(), 2);
    wait_for("the request of meanwhile", || {
        ring.used_index(&vmm.memory) == ring.avail
    });
    assert_eq!(submit(&vmm, &mut ring, Some(&wires.kick), 0, 0), 0);
    // The other ring is still disabled, and can still be enabled.
    let served = storage.disk.served.load(Ordering::SeqCst);
    offer(&vmm, &mut disabled, Some(&other.kick), 0, 0);
    vmm.frontend.get_features().unwrap();
    assert_eq!(storage.disk.served.load(Ordering::SeqCst), served);
    vmm.frontend.set_vring_enable(1, true).unwrap();
    wait_for("the ring that was enabled", || {
        disabled.used_index(&vmm.memory) == disabled.avail
    });
    // And GET_VRING_BASE knows where it is.
    assert_eq!(vmm.frontend.get_vring_base(0).unwrap(), 3);
}

#[test]
fn suspension_of_a_closed_disk_only_does_the_work() {
    let (device, storage) = closed_device();
    let _vmm = connect(&device);
    assert_eq!(device.lifecycle().suspended(&NEVER, || 7).unwrap(), 7);
    assert_eq!(storage.opened(), 0);
}

#[test]
fn suspension_after_which_the_disk_cannot_be_opened_ends_the_connection() {
    let (device, storage) = closed_device();
    let mut vmm = connect(&device);
    let mut ring = DriverRing::new(0, 16);
    let wires = vmm.start_ring(0, &ring, 0);
    assert_eq!(submit(&vmm, &mut ring, Some(&wires.kick), 0, 0), 0);
    let refuse = || storage.refuses.store(true, Ordering::SeqCst);
    let result = device.lifecycle().suspended(&NEVER, refuse);
    assert!(matches!(result, Err(SuspendError::Open(_))), "{result:?}");
    assert!(matches!(vmm.handle.join(), ConnectionEnd::Disk(_)));
    storage.refuses.store(false, Ordering::SeqCst);
    let mut vmm = connect(&device);
    let mut ring = DriverRing::new(0, 16);
    let wires = vmm.start_ring(0, &ring, 0);
    assert_eq!(submit(&vmm, &mut ring, Some(&wires.kick), 0, 0), 0);
}

#[test]
fn disk_is_let_go_when_all_rings_are_taken_away_while_the_front_end_logs() {
    for logs in [true, false] {
        let (device, storage) = closed_device();
        let mut vmm = Vmm::connect(&device);
        vmm.negotiate(if logs { feature::LOG_ALL } else { 0 });
        vmm.send_memory();
        let mut ring = DriverRing::new(0, 16);
        let wires = vmm.start_ring(0, &ring, 0);
        vmm.start_ring(1, &DriverRing::new(0x4000, 16), 0);
        assert_eq!(submit(&vmm, &mut ring, Some(&wires.kick), 0, 0), 0);
        assert_eq!(vmm.frontend.get_vring_base(1).unwrap(), 0);
        assert!(storage.is_open(), "a ring is left");
        assert_eq!(vmm.frontend.get_vring_base(0).unwrap(), 1);
        assert_eq!(storage.is_open(), !logs);
        // The migration was cancelled: the guest goes on here.
        let wires = vmm.start_ring(0, &ring, 1);
        assert_eq!(submit(&vmm, &mut ring, Some(&wires.kick), 0, 0), 0);
        assert_eq!(storage.opened(), if logs { 2 } else { 1 });
    }
}
