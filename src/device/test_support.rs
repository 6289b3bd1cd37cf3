// SPDX-License-Identifier: Apache-2.0
//! The driver's half of a queue, and a worker that serves a disk in memory: for tests.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use rustix::event::{PollFd, PollFlags, poll};
use vm_memory::{Bytes, GuestAddress};

use super::config_space::DeviceOptions;
use super::mailbox::{Ack, Mailbox, QueueCommand};
use super::queue::{Fetched, RingAddresses, VirtQueue};
use super::request::{BlockStatus, GuestRequest, RequestKind};
use super::{
    Device, DiskIdentity, GuestMemory, Lifecycle, OpenDisk, OpenFailed, PublishOrder, Storage,
    WorkerMailbox,
};

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// A descriptor as a driver writes it: address, length, flags, next.
pub type RawDescriptor = (u64, u32, u16, u16);

pub fn write_descriptor(memory: &GuestMemory, table: u64, index: u16, raw: RawDescriptor) {
    let mut bytes = [0u8; 16];
    bytes[..8].copy_from_slice(&raw.0.to_le_bytes());
    bytes[8..12].copy_from_slice(&raw.1.to_le_bytes());
    bytes[12..14].copy_from_slice(&raw.2.to_le_bytes());
    bytes[14..].copy_from_slice(&raw.3.to_le_bytes());
    let at = table + 16 * u64::from(index);
    memory.write_slice(&bytes, GuestAddress(at)).unwrap();
}

pub fn options() -> DeviceOptions {
    DeviceOptions {
        sectors: 2048,
        block_bytes: 512,
        read_only: false,
        serial: "test-disk".to_owned(),
        queues: 4,
        queue_size: 256,
    }
}

/// The driver's half of a split queue whose parts lie one after another.
#[derive(Clone, Copy)]
pub struct DriverRing {
    pub size: u16,
    pub rings: RingAddresses,
    pub avail: u16,
    next_free: u16,
}

impl DriverRing {
    /// A queue at `base` (a multiple of 16), which takes less than 64 bytes per descriptor.
    pub fn new(base: u64, size: u16) -> Self {
        let available = base + 16 * u64::from(size);
        Self {
            size,
            rings: RingAddresses {
                descriptors: base,
                available,
                used: (available + 6 + 2 * u64::from(size)).next_multiple_of(4),
            },
            avail: 0,
            next_free: 0,
        }
    }

    /// Writes a direct chain; returns its head.
    pub fn chain(&mut self, memory: &GuestMemory, buffers: &[(u64, u32, bool)]) -> u16 {
        let head = self.next_free;
        let mask = self.size - 1;
        for (i, &(addr, len, writable)) in buffers.iter().enumerate() {
            let index = self.next_free;
            self.next_free = (index + 1) & mask;
            let last = i + 1 == buffers.len();
            let flags = if last { 0 } else { NEXT } | if writable { WRITE } else { 0 };
            let raw = (addr, len, flags, self.next_free);
            write_descriptor(memory, self.rings.descriptors, index, raw);
        }
        head
    }

    /// Makes `head` available.
    pub fn offer(&mut self, memory: &GuestMemory, head: u16) {
        let slot = u64::from(self.avail & (self.size - 1));
        let at = |offset| GuestAddress(self.rings.available + offset);
        memory.write_obj(head.to_le(), at(4 + 2 * slot)).unwrap();
        self.avail = self.avail.wrapping_add(1);
        self.set_avail_index(memory, self.avail);
    }

    pub fn set_avail_index(&self, memory: &GuestMemory, index: u16) {
        let at = GuestAddress(self.rings.available + 2);
        memory.store(index.to_le(), at, Ordering::Release).unwrap();
    }

    pub fn set_avail_flags(&self, memory: &GuestMemory, flags: u16) {
        let at = GuestAddress(self.rings.available);
        memory.write_obj(flags.to_le(), at).unwrap();
    }

    pub fn set_used_event(&self, memory: &GuestMemory, event: u16) {
        let at = self.rings.available + 4 + 2 * u64::from(self.size);
        memory.write_obj(event.to_le(), GuestAddress(at)).unwrap();
    }

    pub fn avail_event(&self, memory: &GuestMemory) -> u16 {
        let at = self.rings.used + 4 + 8 * u64::from(self.size);
        memory.read_obj(GuestAddress(at)).unwrap()
    }

    pub fn used_flags(&self, memory: &GuestMemory) -> u16 {
        memory.read_obj(GuestAddress(self.rings.used)).unwrap()
    }

    pub fn used_index(&self, memory: &GuestMemory) -> u16 {
        let at = GuestAddress(self.rings.used + 2);
        memory.load(at, Ordering::Acquire).unwrap()
    }

    pub fn set_used_index(&self, memory: &GuestMemory, index: u16) {
        let at = GuestAddress(self.rings.used + 2);
        memory.write_obj(index, at).unwrap();
    }

    /// Head and length of the used element at `position`.
    pub fn used_element(&self, memory: &GuestMemory, position: u16) -> (u32, u32) {
        let slot = u64::from(position & (self.size - 1));
        let at = self.rings.used + 4 + 8 * slot;
        let head = memory.read_obj(GuestAddress(at)).unwrap();
        (head, memory.read_obj(GuestAddress(at + 4)).unwrap())
    }
}

/// Writes a request header at `addr`.
pub fn write_header(memory: &GuestMemory, addr: u64, kind: u32, sector: u64) {
    memory.write_obj(kind.to_le(), GuestAddress(addr)).unwrap();
    memory.write_obj(0u32, GuestAddress(addr + 4)).unwrap();
    memory.write_obj(sector, GuestAddress(addr + 8)).unwrap();
}

enum Message {
    Queue(QueueCommand),
    Quit,
}

impl From<QueueCommand> for Message {
    fn from(command: QueueCommand) -> Self {
        Self::Queue(command)
    }
}

/// A worker thread that serves a disk in memory, one request after another.
pub struct TestWorker {
    mailbox: Arc<Mailbox<Message>>,
    thread: Option<JoinHandle<()>>,
}

/// A disk all test workers share, and what they have seen.
#[derive(Clone, Default)]
pub struct TestDisk {
    pub bytes: Arc<Mutex<Vec<u8>>>,
    /// Queues running now.
    pub running: Arc<AtomicUsize>,
    /// Requests served.
    pub served: Arc<AtomicUsize>,
    /// Commands seen, by name.
    pub commands: Arc<Mutex<Vec<String>>>,
}

impl TestDisk {
    /// A disk of zeroes.
    pub fn new(sectors: u64) -> Self {
        let len = usize::try_from(sectors * 512).unwrap();
        Self {
            bytes: Arc::new(Mutex::new(vec![0; len])),
            ..Self::default()
        }
    }
}

/// A device on a disk in memory, with `count` workers.
pub fn device(options: DeviceOptions, count: usize) -> (Arc<Device>, TestDisk, Vec<TestWorker>) {
    let disk = TestDisk::new(options.sectors);
    let (mailboxes, workers) = workers(&disk, count);
    (Arc::new(device_of(options, mailboxes)), disk, workers)
}

/// Workers that serve `disk`, and their mailboxes.
pub fn workers(disk: &TestDisk, count: usize) -> (Vec<Arc<dyn WorkerMailbox>>, Vec<TestWorker>) {
    let workers: Vec<_> = (0..count)
        .map(|_| TestWorker::start(disk.clone()))
        .collect();
    let mailboxes = workers
        .iter()
        .map(|worker| Arc::clone(&worker.mailbox) as Arc<dyn WorkerMailbox>)
        .collect();
    (mailboxes, workers)
}

/// Behind a device that is open and stays so.
struct NoStorage;

impl Storage for NoStorage {
    fn open(&self, _given_up: &AtomicBool) -> Result<OpenDisk, OpenFailed> {
        unreachable!("it is open")
    }

    fn close(&self) {
        unreachable!("nobody closes it")
    }
}

/// A device of these workers, whose disk is open, stays so, and remembers nothing.
pub fn device_of(options: DeviceOptions, workers: Vec<Arc<dyn WorkerMailbox>>) -> Device {
    let lifecycle = Lifecycle::of_open(Arc::new(NoStorage), nameless_disk(workers));
    Device::new(options, PublishOrder::Ring, lifecycle).unwrap()
}

/// An open disk that remembers nothing.
pub fn nameless_disk(workers: Vec<Arc<dyn WorkerMailbox>>) -> OpenDisk {
    OpenDisk::new(workers, DiskIdentity::NONE, Box::new(|_| Ok(())))
}

impl TestWorker {
    fn start(disk: TestDisk) -> Self {
        let mailbox = Arc::new(Mailbox::new().unwrap());
        let thread = thread::spawn({
            let mailbox = Arc::clone(&mailbox);
            move || run(&mailbox, &disk)
        });
        Self {
            mailbox,
            thread: Some(thread),
        }
    }
}

impl Drop for TestWorker {
    fn drop(&mut self) {
        self.mailbox.post(Message::Quit);
        let result = self.thread.take().unwrap().join();
        if !thread::panicking() {
            result.unwrap();
        }
    }
}

fn run(mailbox: &Mailbox<Message>, disk: &TestDisk) {
    let mut queues: BTreeMap<u16, VirtQueue> = BTreeMap::new();
    let mut memory = Arc::new(GuestMemory::new());
    let mut messages = Vec::new();
    loop {
        let mut fds = vec![PollFd::from_borrowed_fd(mailbox.as_fd(), PollFlags::IN)];
        fds.extend(
            queues
                .values()
                .map(|queue| PollFd::from_borrowed_fd(queue.kick().as_fd(), PollFlags::IN)),
        );
        poll(&mut fds, None).unwrap();
        for queue in queues.values_mut() {
            queue.kick().drain();
            serve(queue, &memory, disk);
        }
        mailbox.take(&mut messages);
        for message in messages.drain(..) {
            let Message::Queue(command) = message else {
                mailbox.close();
                return;
            };
            let name = format!("{command:?}");
            let name = name.split_once([' ', '{']).map_or("", |(name, _)| name);
            disk.commands.lock().unwrap().push(name.to_owned());
            obey(command, &mut queues, &mut memory, disk);
        }
    }
}

fn obey(
    command: QueueCommand,
    queues: &mut BTreeMap<u16, VirtQueue>,
    memory: &mut Arc<GuestMemory>,
    disk: &TestDisk,
) {
    match command {
        QueueCommand::Start {
            queue,
            setup,
            memory: new,
        } => {
            *memory = new;
            let before = queues.insert(queue, VirtQueue::new(*setup, memory));
            assert!(before.is_none(), "started twice");
            disk.running.fetch_add(1, Ordering::SeqCst);
        }
        QueueCommand::Stop { queue, ack } => {
            let mut queue = queues.remove(&queue).unwrap();
            queue.stop();
            assert!(queue.is_drained());
            disk.running.fetch_sub(1, Ordering::SeqCst);
            Ack::send(ack, queue.next_avail());
            return;
        }
        QueueCommand::Pause { queue, ack } => {
            queues.get_mut(&queue).unwrap().pause();
            ack.send(());
        }
        QueueCommand::Resume { queue } => queues.get_mut(&queue).unwrap().resume(),
        QueueCommand::SetKick { queue, kick } => queues.get_mut(&queue).unwrap().set_kick(kick),
        QueueCommand::SetCall { queue, call } => queues.get_mut(&queue).unwrap().set_call(call),
        QueueCommand::SetFeatures { queue, features } => {
            queues.get_mut(&queue).unwrap().set_features(features);
        }
        QueueCommand::Memory { memory: new, ack } => {
            *memory = new;
            ack.send(());
        }
    }
    for queue in queues.values_mut() {
        serve(queue, memory, disk);
    }
}

fn serve(queue: &mut VirtQueue, memory: &GuestMemory, disk: &TestDisk) {
    let mut request = GuestRequest::new();
    let mut published = Vec::new();
    queue.disable_kicks(memory);
    loop {
        loop {
            match queue.fetch(memory, &mut request) {
                Fetched::Request(ticket) => {
                    let status = execute(&mut request, memory, disk);
                    let len = request.finish(memory, status);
                    queue.complete(ticket, len, 1);
                    disk.served.fetch_add(1, Ordering::SeqCst);
                }
                Fetched::Answered(_) => {}
                Fetched::Empty => break,
            }
        }
        if queue.publish(memory, &mut published) {
            queue.signal();
        }
        if !queue.enable_kicks(memory) {
            return;
        }
    }
}

fn execute(request: &mut GuestRequest, memory: &GuestMemory, disk: &TestDisk) -> BlockStatus {
    let mut bytes = disk.bytes.lock().unwrap();
    let span = |range: crate::units::SectorRange| {
        let start = usize::try_from(range.offset_bytes()).unwrap();
        start..start + range.len_bytes()
    };
    let result = match request.kind() {
        RequestKind::Read { range } => request.copy_to_guest(memory, 0, &bytes[span(range)]),
        RequestKind::Write { range } => request.copy_from_guest(memory, 0, &mut bytes[span(range)]),
        RequestKind::Flush => Ok(()),
        RequestKind::Discard | RequestKind::WriteZeroes => {
            for segment in request.segments() {
                bytes[span(segment.range)].fill(0);
            }
            Ok(())
        }
    };
    result.map_or(BlockStatus::IoError, |()| BlockStatus::Ok)
}
