// SPDX-License-Identifier: Apache-2.0
//! One ring of a connection: watches what the crate is told about it and turns it into commands
//! for the worker that owns the queue.
//!
//! ```text
//!            ready, addresses, size,               ENABLE 0, no kick
//!            kick and ENABLE 1 are there           ----------------->
//!    Idle -----------------------------> Running                      Paused
//!     ^                                     |      <-----------------   |
//!     |                                     |      ENABLE 1, kick       |
//!     +-------------------------------------+---------------------------+
//!            GET_VRING_BASE, reset, disconnect: waits for the worker
//! ```
//!
//! A queue runs only while the disk is open: the first one that starts opens it (rule Q5). Whatever
//! starts or stops one holds the gate of the device, and takes it before the lock of the ring.
//!
//! A running queue keeps the size, the addresses and the position it was started with; what
//! SET_VRING_BASE says is not used at all (rule Q2).

use std::cell::RefCell;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use tracing::warn;
use vhost_user_backend::{VringMutex, VringState, VringStateGuard, VringStateMutGuard, VringT};
use virtio_queue::Error as VirtQueueError;
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic};

use super::GuestMemory;
use super::config_space::feature;
use super::dirty_log::Logging;
use super::disk::{Began, Device};
use super::inflight::{InflightBuffer, QueueRegion};
use super::lifecycle::{Gate, OpenDisk, OpenFailed};
use super::mailbox::{Ack, AckWait, QueueCommand, WorkerGone, WorkerMailbox};
use super::notify::{Call, Kick};
use super::queue::{QueueSetup, RingAddresses};

/// The guest memory of a connection, replaced as the front-end changes it.
pub type ConnectionMemory = GuestMemoryAtomic<GuestMemory>;

/// What the rings of a connection share.
#[derive(Debug)]
pub struct RingContext {
    device: Arc<Device>,
    memory: ConnectionMemory,
    features: AtomicU64,
    /// What the front-end wants to know of writes to its memory.
    logging: Logging,
    /// The buffer handed in last. A running ring keeps the one it was started with.
    inflight: Mutex<Option<Arc<InflightBuffer>>>,
    /// Shut down when the connection cannot go on.
    line: OnceLock<UnixStream>,
    /// Why it cannot.
    failure: Mutex<Option<OpenFailed>>,
    /// The connection is ending: a disk that is being opened for it is not needed any more.
    given_up: AtomicBool,
}

impl RingContext {
    /// Nothing acknowledged yet.
    #[must_use]
    pub fn new(device: Arc<Device>) -> Self {
        Self {
            device,
            memory: ConnectionMemory::new(GuestMemory::new()),
            features: AtomicU64::new(0),
            logging: Logging::default(),
            inflight: Mutex::new(None),
            line: OnceLock::new(),
            failure: Mutex::new(None),
            given_up: AtomicBool::new(false),
        }
    }

    /// Takes the buffer for rings that start from now on.
    pub fn set_inflight(&self, buffer: InflightBuffer) {
        let mut slot = self.inflight.lock().unwrap_or_else(PoisonError::into_inner);
        *slot = Some(Arc::new(buffer));
    }

    /// The buffer for rings that start from now on.
    #[must_use]
    pub fn inflight(&self) -> Option<Arc<InflightBuffer>> {
        let slot = self.inflight.lock().unwrap_or_else(PoisonError::into_inner);
        slot.clone()
    }

    /// Before a ring starts on `disk` with `buffer`: tells how the disk begins, and then marks the
    /// buffer as one of this run. In this order: a buffer of this run that was cold, and is taken
    /// for warm by the next one, would have that wait for requests nobody executes again.
    fn begin(&self, disk: &OpenDisk, buffer: Option<&InflightBuffer>) -> Result<(), OpenFailed> {
        let identity = disk.identity();
        let began = buffer.map_or(Ok(Began::Cold), |buffer| buffer.began(identity));
        let began = began.map_err(|error| OpenFailed(Arc::new(error)))?;
        if let (Some(buffer), Ok(())) = (buffer, disk.begin(began)) {
            buffer.stamp(identity);
        }
        Ok(())
    }

    /// The memory of the front-end, as it is now.
    #[must_use]
    pub fn memory(&self) -> &ConnectionMemory {
        &self.memory
    }

    /// What the front-end wants to know of writes to its memory. [`RingContext::share_memory`]
    /// after a change.
    #[must_use]
    pub fn logging(&self) -> &Logging {
        &self.logging
    }

    /// Hands the memory there is now to all workers, logged as it is to be logged now. Returns when
    /// none of them uses another one, or logs elsewhere.
    ///
    /// # Errors
    /// If a worker is gone.
    pub fn share_memory(&self) -> Result<(), WorkerGone> {
        let gate = self.device.lifecycle().gate();
        // Looked at with the gate held: two threads do this, and the last one has the newest.
        let memory = self.memory.memory().into_inner();
        self.logging.apply(&memory);
        replace_memory(&gate, &memory)
    }

    /// Notes what is to be shut down if the connection cannot go on; once.
    pub fn set_line(&self, line: UnixStream) {
        let before = self.line.set(line);
        assert!(before.is_ok(), "a connection has one line");
    }

    /// Ends the opening of the disk, if that is what the connection waits for.
    pub fn give_up(&self) {
        self.given_up.store(true, Ordering::Relaxed);
    }

    /// Why the disk could not be opened for this connection.
    #[must_use]
    pub fn failure(&self) -> Option<OpenFailed> {
        let failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        failure.clone()
    }

    /// The connection cannot go on. The crate takes no error where rings start, so its line is
    /// cut: not even the message that started the ring is answered.
    fn fail(&self, why: OpenFailed) {
        let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        failure.get_or_insert(why);
        if let Some(line) = self.line.get() {
            // Fails only if it is cut already.
            let _ = line.shutdown(std::net::Shutdown::Both);
        }
    }

    /// The served device.
    #[must_use]
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }
}

thread_local! {
    /// The connection whose rings are being made on this thread. The crate makes rings through
    /// a constructor that is told neither the device nor the index.
    static MAKING: RefCell<Option<Making>> = const { RefCell::new(None) };
}

struct Making {
    context: Arc<RingContext>,
    rings: Vec<DeviceVring>,
}

/// Runs `make`, in which the crate makes its rings on this thread, and returns them as well.
pub fn collect_rings<R>(
    context: Arc<RingContext>,
    make: impl FnOnce() -> R,
) -> (R, Vec<DeviceVring>) {
    let making = Making {
        context,
        rings: Vec::new(),
    };
    MAKING.set(Some(making));
    let made = make();
    let making = MAKING.take().expect("set above and taken only here");
    (made, making.rings)
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    Idle,
    Running,
    Paused,
}

struct Ring {
    phase: Phase,
    ready: bool,
    enabled: bool,
    size: Option<u16>,
    rings: Option<RingAddresses>,
    kick: Option<Arc<Kick>>,
    call: Option<Arc<Call>>,
    features: u64,
    /// Who owns the queue; only while it is not idle.
    worker: Option<Arc<dyn WorkerMailbox>>,
    /// Where the queue that was started last marks what is in flight.
    inflight: Option<QueueRegion>,
}

impl Ring {
    /// To the worker of a queue that is not idle.
    fn send(&self, command: QueueCommand) {
        if let Some(worker) = &self.worker {
            worker.send(command);
        }
    }
}

impl fmt::Debug for Ring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ring")
            .field("phase", &self.phase)
            .field("ready", &self.ready)
            .field("enabled", &self.enabled)
            .finish_non_exhaustive()
    }
}

/// Hands `memory` to all workers, if there are any, and waits until none of them uses another.
///
/// # Errors
/// If a worker is gone.
pub fn replace_memory(gate: &Gate<'_>, memory: &Arc<GuestMemory>) -> Result<(), WorkerGone> {
    let workers = gate.disk().map_or(&[][..], |disk| disk.workers());
    let waits: Vec<_> = workers
        .iter()
        .map(|worker| {
            let (ack, wait) = Ack::new();
            let memory = Arc::clone(memory);
            worker.send(QueueCommand::Memory { memory, ack });
            wait
        })
        .collect();
    // All are waited for, even if one is gone.
    let mut result = Ok(());
    for wait in waits {
        result = result.and(wait.wait());
    }
    result
}

/// A ring as the crate sees it. Clones are the same ring.
#[derive(Clone)]
pub struct DeviceVring {
    index: u16,
    context: Arc<RingContext>,
    memory: ConnectionMemory,
    /// What the crate reads back: whether there is a kick descriptor, whether it is ready.
    inner: VringMutex<ConnectionMemory>,
    ring: Arc<Mutex<Ring>>,
}

impl fmt::Debug for DeviceVring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceVring")
            .field("index", &self.index)
            .field("ring", &self.ring)
            .finish_non_exhaustive()
    }
}

impl DeviceVring {
    fn lock(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The right to change what runs, and the ring.
    fn enter(&self) -> (Gate<'_>, MutexGuard<'_, Ring>) {
        let gate = self.context.device.lifecycle().gate();
        (gate, self.lock())
    }

    /// Brings the worker in line with what the ring has become.
    fn update(&self, ring: &mut Ring, gate: &mut Gate<'_>) {
        let queue = self.index;
        let wanted = ring.enabled && ring.kick.is_some();
        match ring.phase {
            Phase::Idle => {
                let buffer = self.context.inflight();
                let Some(setup) = self.setup(ring, buffer.as_ref()) else {
                    return;
                };
                if self.context.failure().is_some() {
                    return;
                }
                let disk = match gate.open(&self.context.given_up) {
                    Ok(disk) => disk,
                    Err(why) => return self.context.fail(why),
                };
                if let Err(why) = self.context.begin(&disk, buffer.as_deref()) {
                    return self.context.fail(why);
                }
                ring.worker = Some(Arc::clone(disk.worker_of(queue)));
                ring.phase = Phase::Running;
                ring.features = setup.features;
                ring.inflight.clone_from(&setup.inflight);
                ring.send(QueueCommand::Start {
                    queue,
                    setup: Box::new(setup),
                    memory: self.memory.memory().into_inner(),
                });
            }
            Phase::Running if !wanted => {
                ring.phase = Phase::Paused;
                let (ack, wait) = Ack::new();
                ring.send(QueueCommand::Pause { queue, ack });
                // The front-end takes our answer for the end of fetching. A worker that is gone
                // fetches nothing either.
                let _ = wait.wait();
            }
            Phase::Paused if wanted => {
                ring.phase = Phase::Running;
                ring.send(QueueCommand::Resume { queue });
            }
            Phase::Running | Phase::Paused => {}
        }
    }

    /// What the worker needs, if the ring can run.
    fn setup(&self, ring: &Ring, buffer: Option<&Arc<InflightBuffer>>) -> Option<QueueSetup> {
        if !ring.ready || !ring.enabled {
            return None;
        }
        let device = &self.context.device;
        Some(QueueSetup {
            index: self.index,
            size: ring.size?,
            rings: ring.rings?,
            features: self.context.features.load(Ordering::Relaxed),
            options: device.options(),
            order: device.order(),
            inflight: buffer.and_then(|buffer| buffer.region(self.index)),
            kick: ring.kick.clone()?,
            call: ring.call.clone(),
        })
    }

    /// Tells the worker to stop the queue; the answer is the next available index. `None` if it
    /// does not run.
    fn begin_stop(&self, ring: &mut Ring) -> Option<AckWait<u16>> {
        if ring.phase == Phase::Idle {
            return None;
        }
        ring.phase = Phase::Idle;
        let (ack, wait) = Ack::new();
        let queue = self.index;
        ring.send(QueueCommand::Stop { queue, ack });
        ring.worker = None;
        Some(wait)
    }

    fn end_stop(&self, wait: AckWait<u16>) -> Result<(), WorkerGone> {
        self.inner.set_queue_next_avail(wait.wait()?);
        Ok(())
    }

    /// Stops the queue and waits until everything fetched is complete (rule Q4).
    ///
    /// # Errors
    /// If its worker is gone.
    pub fn stop(&self) -> Result<(), WorkerGone> {
        let (_gate, mut ring) = self.enter();
        let wait = self.begin_stop(&mut ring);
        wait.map_or(Ok(()), |wait| self.end_stop(wait))
    }

    /// Back to the state after connecting, but for the call descriptor: a front-end that reset
    /// the device need not send it again.
    fn forget(&self) {
        {
            let mut ring = self.lock();
            ring.ready = false;
            ring.enabled = false;
            ring.kick = None;
            // A queue that had broken leaves marks behind, and its driver owes them to nobody.
            if let Some(region) = ring.inflight.take() {
                region.forget();
            }
        }
        self.inner.set_queue_ready(false);
        self.inner.set_enabled(false);
        self.inner.set_kick(None);
    }
}

/// Stops all `rings` and waits for all of them. The caller holds the gate.
///
/// # Errors
/// If a worker is gone; the others are waited for.
pub fn stop_all(rings: &[DeviceVring]) -> Result<(), WorkerGone> {
    // Tell all before waiting for the first: they drain at the same time.
    let waits: Vec<_> = rings
        .iter()
        .filter_map(|ring| Some((ring, ring.begin_stop(&mut ring.lock())?)))
        .collect();
    let mut result = Ok(());
    for (ring, wait) in waits {
        result = result.and(ring.end_stop(wait));
    }
    result
}

/// Whether none of the `rings` has a queue at work.
#[must_use]
pub fn are_idle(rings: &[DeviceVring]) -> bool {
    let idle = |ring: &DeviceVring| ring.lock().phase == Phase::Idle;
    rings.iter().all(idle)
}

/// Lets those of the `rings` run that can: all that ran before [`stop_all`], if the front-end has
/// said nothing since.
pub fn start_all(rings: &[DeviceVring], gate: &mut Gate<'_>) {
    for vring in rings {
        let mut ring = vring.lock();
        if ring.phase == Phase::Idle {
            vring.update(&mut ring, gate);
        }
    }
}

/// Ends the connection of the `rings` if one of them should run, since the disk could not be opened
/// again.
pub fn abandon(rings: &[DeviceVring], why: &OpenFailed) {
    let waits = |vring: &&DeviceVring| vring.setup(&vring.lock(), None).is_some();
    if let Some(vring) = rings.iter().find(waits) {
        vring.context.fail(why.clone());
    }
}

/// Stops all `rings` and forgets what the front-end said about them. The caller holds the gate.
///
/// # Errors
/// If a worker is gone.
pub fn reset_all(rings: &[DeviceVring]) -> Result<(), WorkerGone> {
    let result = stop_all(rings);
    for ring in rings {
        ring.forget();
    }
    result
}

/// Notes the features the driver acknowledged, for rings that run and rings to come, and whether
/// writes to its memory are logged from now on.
///
/// # Errors
/// If a worker is gone.
pub fn set_features(
    context: &RingContext,
    rings: &[DeviceVring],
    features: u64,
) -> Result<(), WorkerGone> {
    let gate = context.device.lifecycle().gate();
    context.features.store(features, Ordering::Relaxed);
    for vring in rings {
        let mut ring = vring.lock();
        if ring.phase != Phase::Idle && ring.features != features {
            ring.features = features;
            let queue = vring.index;
            ring.send(QueueCommand::SetFeatures { queue, features });
        }
    }
    drop(gate);
    if context.logging.set_wanted(features & feature::LOG_ALL != 0) {
        context.share_memory()?;
    }
    Ok(())
}

impl<'a> VringStateGuard<'a, ConnectionMemory> for DeviceVring {
    type G = MutexGuard<'a, VringState<ConnectionMemory>>;
}

impl<'a> VringStateMutGuard<'a, ConnectionMemory> for DeviceVring {
    type G = MutexGuard<'a, VringState<ConnectionMemory>>;
}

impl VringT<ConnectionMemory> for DeviceVring {
    fn new(memory: ConnectionMemory, max_queue_size: u16) -> Result<Self, VirtQueueError> {
        let inner = VringMutex::new(memory.clone(), max_queue_size)?;
        MAKING.with_borrow_mut(|making| {
            let making = making.as_mut().ok_or(VirtQueueError::QueueNotReady)?;
            let vring = Self {
                index: u16::try_from(making.rings.len())
                    .map_err(|_| VirtQueueError::QueueNotReady)?,
                context: Arc::clone(&making.context),
                memory,
                inner,
                ring: Arc::new(Mutex::new(Ring {
                    phase: Phase::Idle,
                    ready: false,
                    enabled: false,
                    size: None,
                    rings: None,
                    kick: None,
                    call: None,
                    features: 0,
                    worker: None,
                    inflight: None,
                })),
            };
            making.rings.push(vring.clone());
            Ok(vring)
        })
    }

    fn get_ref(&self) -> MutexGuard<'_, VringState<ConnectionMemory>> {
        self.inner.get_ref()
    }

    fn get_mut(&self) -> MutexGuard<'_, VringState<ConnectionMemory>> {
        self.inner.get_mut()
    }

    fn add_used(&self, desc_index: u16, len: u32) -> Result<(), VirtQueueError> {
        self.inner.add_used(desc_index, len)
    }

    fn signal_used_queue(&self) -> io::Result<()> {
        if let Some(call) = &self.lock().call {
            call.signal();
        }
        Ok(())
    }

    fn enable_notification(&self) -> Result<bool, VirtQueueError> {
        self.inner.enable_notification()
    }

    fn disable_notification(&self) -> Result<(), VirtQueueError> {
        self.inner.disable_notification()
    }

    fn needs_notification(&self) -> Result<bool, VirtQueueError> {
        self.inner.needs_notification()
    }

    fn set_enabled(&self, enabled: bool) {
        self.inner.set_enabled(enabled);
        let (mut gate, mut ring) = self.enter();
        ring.enabled = enabled;
        self.update(&mut ring, &mut gate);
    }

    fn set_queue_info(
        &self,
        desc_table: u64,
        avail_ring: u64,
        used_ring: u64,
    ) -> Result<(), VirtQueueError> {
        self.inner
            .set_queue_info(desc_table, avail_ring, used_ring)?;
        let (mut gate, mut ring) = self.enter();
        ring.rings = Some(RingAddresses {
            descriptors: desc_table,
            available: avail_ring,
            used: used_ring,
        });
        self.update(&mut ring, &mut gate);
        Ok(())
    }

    fn queue_next_avail(&self) -> u16 {
        self.inner.queue_next_avail()
    }

    fn set_queue_next_avail(&self, base: u16) {
        self.inner.set_queue_next_avail(base);
    }

    fn set_queue_next_used(&self, idx: u16) {
        self.inner.set_queue_next_used(idx);
    }

    fn queue_used_idx(&self) -> Result<u16, VirtQueueError> {
        self.inner.queue_used_idx()
    }

    fn set_queue_size(&self, num: u16) {
        let max = self.context.device.options().queue_size;
        let valid = num.is_power_of_two() && num <= max;
        let (mut gate, mut ring) = self.enter();
        // The crate keeps its old size when the new one is impossible; we run without one.
        ring.size = valid.then_some(num);
        if valid {
            self.inner.set_queue_size(num);
        } else {
            warn!(queue = self.index, size = num, "impossible queue size");
        }
        self.update(&mut ring, &mut gate);
    }

    fn set_queue_event_idx(&self, enabled: bool) {
        // The worker learns it from the features.
        self.inner.set_queue_event_idx(enabled);
    }

    fn set_queue_ready(&self, ready: bool) {
        self.inner.set_queue_ready(ready);
        let (mut gate, mut ring) = self.enter();
        ring.ready = ready;
        if ready {
            self.update(&mut ring, &mut gate);
        }
    }

    fn set_kick(&self, file: Option<File>) {
        let copy = file.as_ref().map(File::try_clone).transpose();
        let kick = match copy {
            Ok(copy) => copy.map(|copy| Arc::new(Kick::new(copy))),
            Err(error) => {
                warn!(queue = self.index, %error, "no descriptor left for the queue's kick");
                self.inner.set_kick(None);
                return;
            }
        };
        self.inner.set_kick(file);
        let (mut gate, mut ring) = self.enter();
        ring.kick = kick;
        if let (Phase::Running | Phase::Paused, Some(kick)) = (ring.phase, &ring.kick) {
            ring.send(QueueCommand::SetKick {
                queue: self.index,
                kick: Arc::clone(kick),
            });
        }
        self.update(&mut ring, &mut gate);
    }

    fn read_kick(&self) -> io::Result<bool> {
        let ring = self.lock();
        if let Some(kick) = &ring.kick {
            kick.drain();
        }
        Ok(ring.enabled)
    }

    fn set_call(&self, file: Option<File>) {
        let call = file.map(|file| Arc::new(Call::new(file)));
        if let Some(call) = &call {
            // Clients rely on it, running or not: something may have been used before.
            call.signal();
        }
        let (_gate, mut ring) = self.enter();
        ring.call.clone_from(&call);
        if ring.phase != Phase::Idle {
            let queue = self.index;
            ring.send(QueueCommand::SetCall { queue, call });
        }
    }

    fn set_err(&self, file: Option<File>) {
        self.inner.set_err(file);
    }
}
