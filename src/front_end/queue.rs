// SPDX-License-Identifier: Apache-2.0
//! A request queue: descriptor chains built from requests, kicks, calls, completions.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::error::FrontEndError;
use super::memory::Arena;
use super::request::{Completion, Framing, Request, Segment, Status, Token};
use super::ring::{Descriptor, Ring, Used};

/// How long to sleep between two looks at the used ring of a queue without a call descriptor.
const POLL_INTERVAL: Duration = Duration::from_micros(50);

/// A piece of guest memory and who may write it.
#[derive(Clone, Copy, Debug)]
pub struct Buffer {
    /// Where it begins.
    pub address: GuestAddress,
    /// Its length in bytes.
    pub len: u32,
    /// Whether the device writes it.
    pub writable: bool,
}

/// A request the device has not completed yet.
#[derive(Debug)]
struct InFlight {
    token: Token,
    descriptors: Vec<u16>,
    buffers: Vec<Buffer>,
    start: GuestAddress,
    bytes: u64,
}

/// One request queue. Queues are independent and may be given to different threads.
#[derive(Debug)]
pub struct Queue {
    index: u16,
    memory: GuestMemoryMmap<()>,
    ring: Ring,
    arena: Arena,
    indirect: bool,
    /// Whether chains stand in the ring's table although they need not.
    direct: bool,
    framing: Framing,
    timeout: Duration,
    kick: EventFd,
    call: Option<EventFd>,
    epoll: Epoll,
    /// The connection, to learn of its end while waiting: epoll knows it only as long as it is
    /// open here.
    socket: OwnedFd,
    /// By the head of the descriptor chain.
    in_flight: Vec<Option<InFlight>>,
    done: VecDeque<Completion>,
    next_token: u64,
    calls: u64,
    kicks: u64,
}

/// What a queue is made of.
pub(super) struct Parts {
    pub index: u16,
    pub memory: GuestMemoryMmap<()>,
    pub ring: Ring,
    pub arena: Arena,
    pub indirect: bool,
    pub timeout: Duration,
    pub with_call: bool,
    pub socket: OwnedFd,
}

impl Queue {
    pub(super) fn new(parts: Parts) -> Result<Self, FrontEndError> {
        let epoll = Epoll::new().map_err(failed("create an epoll instance"))?;
        watch_connection(&epoll, &parts.socket)?;
        let size = usize::from(parts.ring.size());
        let mut queue = Self {
            index: parts.index,
            memory: parts.memory,
            ring: parts.ring,
            arena: parts.arena,
            indirect: parts.indirect,
            direct: false,
            framing: Framing::default(),
            timeout: parts.timeout,
            kick: new_event()?,
            call: None,
            epoll,
            socket: parts.socket,
            in_flight: (0..size).map(|_| None).collect(),
            done: VecDeque::new(),
            next_token: 0,
            calls: 0,
            kicks: 0,
        };
        if parts.with_call {
            queue.replace_call()?;
        }
        Ok(queue)
    }

    /// Index of the queue.
    #[must_use]
    pub fn index(&self) -> u16 {
        self.index
    }

    /// How the next requests are cut into descriptors.
    pub fn set_framing(&mut self, framing: Framing) {
        self.framing = framing;
    }

    /// Whether the descriptors of the next requests stand in the ring's own table also where
    /// INDIRECT is agreed on: a driver may choose for every chain anew (virtio 1.2, section
    /// 2.7.5.3).
    pub fn set_direct(&mut self, direct: bool) {
        self.direct = direct;
    }

    /// How long [`Queue::wait`] and the blocking requests wait.
    pub fn set_timeout(&mut self, timeout: Duration) {
        self.timeout = timeout;
    }

    /// Number of requests the device has not completed yet.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.in_flight.iter().flatten().count()
    }

    /// How often the device signalled the call descriptor, as far as it was looked at, and how
    /// often it was kicked.
    #[must_use]
    pub fn calls_and_kicks(&self) -> (u64, u64) {
        (self.calls, self.kicks)
    }

    /// The ring, for whoever wants to write it by hand.
    pub fn ring_mut(&mut self) -> &mut Ring {
        &mut self.ring
    }

    /// Takes guest memory for buffers written by hand; it is never given back.
    ///
    /// # Errors
    /// If the queue has no such piece left.
    pub fn take_memory(&mut self, bytes: usize) -> Result<GuestAddress, FrontEndError> {
        let wanted = u64::try_from(bytes).map_err(|_| FrontEndError::TooLong { bytes })?;
        let queue = self.index;
        self.arena.take(wanted).ok_or(FrontEndError::Full { queue })
    }

    /// Makes a request available to the device and kicks it if it wants to be kicked.
    ///
    /// # Errors
    /// [`FrontEndError::Full`] if there is no room: take a completion first.
    pub fn submit(&mut self, request: &Request) -> Result<Token, FrontEndError> {
        let token = self.enqueue(request)?;
        self.publish()?;
        Ok(token)
    }

    /// Like [`Queue::submit`], but the device sees the request only with the next
    /// [`Queue::publish`].
    ///
    /// # Errors
    /// [`FrontEndError::Full`] if there is no room: take a completion first.
    pub fn enqueue(&mut self, request: &Request) -> Result<Token, FrontEndError> {
        let payload = request.payload();
        let readable = self.framing.readable(payload.len());
        let writable = self.framing.writable(request.in_len());
        let queue = self.index;
        let (start, bytes, buffers) = self.place(&readable, &writable)?;
        let Some(descriptors) = self.link(&buffers, start, bytes)? else {
            self.arena.give_back(start, bytes);
            return Err(FrontEndError::Full { queue });
        };
        let out = [&request.header()[..], &payload].concat();
        let mut out = &out[..];
        for buffer in &buffers {
            if buffer.writable {
                self.write(buffer.address, &vec![Status::UNTOUCHED; as_len(buffer.len)])?;
            } else {
                let (piece, rest) = out.split_at(as_len(buffer.len));
                self.write(buffer.address, piece)?;
                out = rest;
            }
        }
        let head = descriptors[0];
        let token = Token(self.next_token);
        self.next_token += 1;
        self.in_flight[usize::from(head)] = Some(InFlight {
            token,
            descriptors,
            buffers,
            start,
            bytes,
        });
        self.ring.push_head(head)?;
        Ok(token)
    }

    /// Shows everything enqueued to the device, and kicks it if it wants to be kicked.
    ///
    /// # Errors
    /// If the ring is outside the guest memory or the kick fails.
    pub fn publish(&mut self) -> Result<(), FrontEndError> {
        if self.ring.publish()? {
            self.kick()?;
        }
        Ok(())
    }

    /// Kicks the device whether it wants it or not.
    ///
    /// # Errors
    /// If the event descriptor cannot be written.
    pub fn kick(&mut self) -> Result<(), FrontEndError> {
        self.kicks += 1;
        self.kick.write(1).map_err(failed("kick the device"))
    }

    /// The pieces of guest memory a request in flight uses, in the order of its descriptors.
    #[must_use]
    pub fn buffers(&self, token: Token) -> Option<&[Buffer]> {
        let mut all = self.in_flight.iter().flatten();
        all.find(|request| request.token == token)
            .map(|request| &request.buffers[..])
    }

    /// A completion, if there is one now.
    ///
    /// # Errors
    /// [`FrontEndError::UnknownHead`] if the device completed what was not in flight.
    pub fn poll(&mut self) -> Result<Option<Completion>, FrontEndError> {
        self.collect()?;
        Ok(self.done.pop_front())
    }

    /// The next completion, whichever request it is of. Waits for the device's interrupt, if
    /// there is a call descriptor: one that does not come is an error even when the completion is
    /// there.
    ///
    /// # Errors
    /// [`FrontEndError::NoCompletion`], [`FrontEndError::LostInterrupt`],
    /// [`FrontEndError::Closed`], [`FrontEndError::UnknownHead`].
    pub fn wait_any(&mut self) -> Result<Completion, FrontEndError> {
        let deadline = Instant::now() + self.timeout;
        loop {
            if let Some(completion) = self.poll()? {
                return Ok(completion);
            }
            self.sleep(deadline)?;
        }
    }

    /// The completion of one request; those of others are kept for later.
    ///
    /// # Errors
    /// As [`Queue::wait_any`], and [`FrontEndError::UnknownToken`].
    pub fn wait(&mut self, token: Token) -> Result<Completion, FrontEndError> {
        let deadline = Instant::now() + self.timeout;
        loop {
            self.collect()?;
            if let Some(at) = self.done.iter().position(|done| done.token == token) {
                return Ok(self.done.remove(at).expect("the position was just found"));
            }
            if self.buffers(token).is_none() {
                return Err(FrontEndError::UnknownToken { queue: self.index });
            }
            self.sleep(deadline)?;
        }
    }

    /// The next used element as it stands in the ring, for chains written by hand.
    ///
    /// # Errors
    /// [`FrontEndError::NoCompletion`], [`FrontEndError::LostInterrupt`],
    /// [`FrontEndError::Closed`].
    pub fn wait_used(&mut self, timeout: Duration) -> Result<Used, FrontEndError> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(used) = self.ring.pop_used()? {
                return Ok(used);
            }
            self.sleep(deadline)?;
        }
    }

    /// Submits a request and waits for its end, whatever it is.
    ///
    /// # Errors
    /// As [`Queue::submit`] and [`Queue::wait`].
    pub fn run(&mut self, request: &Request) -> Result<Completion, FrontEndError> {
        let token = self.submit(request)?;
        self.wait(token)
    }

    /// Fills `data` from `sector` on, in one request.
    ///
    /// # Errors
    /// As [`Queue::run`], and [`FrontEndError::Refused`].
    pub fn read(&mut self, sector: u64, data: &mut [u8]) -> Result<(), FrontEndError> {
        let len = data.len();
        let completion = self.run_ok(&Request::Read { sector, len })?;
        data.copy_from_slice(&completion.data);
        Ok(())
    }

    /// Writes `data` from `sector` on, in one request.
    ///
    /// # Errors
    /// As [`Queue::run`], and [`FrontEndError::Refused`].
    pub fn write_data(&mut self, sector: u64, data: &[u8]) -> Result<(), FrontEndError> {
        self.run_ok(&Request::Write { sector, data }).map(drop)
    }

    /// Makes completed writes durable.
    ///
    /// # Errors
    /// As [`Queue::run`], and [`FrontEndError::Refused`].
    pub fn flush(&mut self) -> Result<(), FrontEndError> {
        self.run_ok(&Request::Flush).map(drop)
    }

    /// Tells that the sectors are no longer needed.
    ///
    /// # Errors
    /// As [`Queue::run`], and [`FrontEndError::Refused`].
    pub fn discard(&mut self, segments: &[Segment]) -> Result<(), FrontEndError> {
        self.run_ok(&Request::Discard(segments)).map(drop)
    }

    /// Makes the sectors read back as zeroes.
    ///
    /// # Errors
    /// As [`Queue::run`], and [`FrontEndError::Refused`].
    pub fn write_zeroes(&mut self, segments: &[Segment]) -> Result<(), FrontEndError> {
        self.run_ok(&Request::WriteZeroes(segments)).map(drop)
    }

    /// The serial number: 20 bytes, padded with NUL.
    ///
    /// # Errors
    /// As [`Queue::run`], and [`FrontEndError::Refused`].
    pub fn get_id(&mut self) -> Result<Vec<u8>, FrontEndError> {
        Ok(self.run_ok(&Request::GetId)?.data)
    }

    pub(super) fn kick_event(&self) -> &EventFd {
        &self.kick
    }

    pub(super) fn call_event(&self) -> Option<&EventFd> {
        self.call.as_ref()
    }

    pub(super) fn ring(&self) -> &Ring {
        &self.ring
    }

    /// A new kick descriptor; the back-end must be told.
    pub(super) fn replace_kick(&mut self) -> Result<(), FrontEndError> {
        self.kick = new_event()?;
        Ok(())
    }

    /// A new call descriptor; the back-end must be told.
    pub(super) fn replace_call(&mut self) -> Result<(), FrontEndError> {
        if let Some(old) = self.call.take() {
            let none = EpollEvent::default();
            self.epoll
                .ctl(ControlOperation::Delete, old.as_raw_fd(), none)
                .map_err(failed("forget a call descriptor"))?;
        }
        let call = new_event()?;
        let readable = EpollEvent::new(EventSet::IN, CALL);
        self.epoll
            .ctl(ControlOperation::Add, call.as_raw_fd(), readable)
            .map_err(failed("watch a call descriptor"))?;
        self.call = Some(call);
        Ok(())
    }

    /// The connection of a back-end that came after another.
    pub(super) fn replace_socket(&mut self, socket: OwnedFd) -> Result<(), FrontEndError> {
        watch_connection(&self.epoll, &socket)?;
        let none = EpollEvent::default();
        self.epoll
            .ctl(ControlOperation::Delete, self.socket.as_raw_fd(), none)
            .map_err(failed("forget the connection"))?;
        self.socket = socket;
        Ok(())
    }

    fn run_ok(&mut self, request: &Request) -> Result<Completion, FrontEndError> {
        let completion = self.run(request)?;
        if completion.status == Status::Ok {
            return Ok(completion);
        }
        Err(FrontEndError::Refused {
            request: request.name(),
            sector: request.sector(),
            status: completion.status,
        })
    }

    /// Finds guest memory for pieces of these lengths.
    fn place(
        &mut self,
        readable: &[usize],
        writable: &[usize],
    ) -> Result<(GuestAddress, u64, Vec<Buffer>), FrontEndError> {
        let mut offset = self.framing.skew;
        let mut pieces = Vec::with_capacity(readable.len() + writable.len());
        // The payload first, so that it is as aligned as a driver's pages are; the header and
        // what else is short after it.
        let lens = readable
            .iter()
            .map(|&len| (len, false))
            .chain(writable.iter().map(|&len| (len, true)));
        for (len, writable) in lens {
            let len32 = u32::try_from(len).map_err(|_| FrontEndError::TooLong { bytes: len })?;
            pieces.push((len32, writable));
        }
        let mut order: Vec<usize> = (0..pieces.len()).collect();
        order.sort_by_key(|&at| std::cmp::Reverse(pieces[at].0));
        let mut buffers: Vec<Buffer> = pieces
            .iter()
            .map(|&(len, writable)| Buffer {
                address: GuestAddress(0),
                len,
                writable,
            })
            .collect();
        for at in order {
            buffers[at].address = GuestAddress(to_u64(offset));
            offset += as_len(buffers[at].len) + self.framing.gap;
        }
        // The table of an indirect chain stands behind the buffers.
        let table = offset.next_multiple_of(16);
        let bytes = to_u64(table + 16 * buffers.len());
        let queue = self.index;
        let start = self.arena.take(bytes);
        let start = start.ok_or(FrontEndError::Full { queue })?;
        for buffer in &mut buffers {
            buffer.address.0 += start.0;
        }
        Ok((start, bytes, buffers))
    }

    /// Writes the descriptors of a chain, in the ring's table or in one of its own at the end of
    /// the memory of the request. `None` if the ring has too few.
    fn link(
        &mut self,
        buffers: &[Buffer],
        start: GuestAddress,
        bytes: u64,
    ) -> Result<Option<Vec<u16>>, FrontEndError> {
        let indirect = self.indirect && !self.direct && buffers.len() > 1;
        let wanted = if indirect { 1 } else { buffers.len() };
        let Some(taken) = self.ring.take_descriptors(wanted) else {
            return Ok(None);
        };
        let table_len = u32::try_from(16 * buffers.len()).map_err(|_| FrontEndError::TooLong {
            bytes: buffers.len(),
        })?;
        let table = GuestAddress(start.0 + bytes - u64::from(table_len));
        for (at, buffer) in buffers.iter().enumerate() {
            let next = if indirect {
                u16::try_from(at + 1).ok()
            } else {
                taken.get(at + 1).copied()
            };
            let next = next.filter(|_| at + 1 < buffers.len());
            let descriptor = Descriptor {
                address: buffer.address.0,
                len: buffer.len,
                flags: if buffer.writable {
                    Descriptor::WRITE
                } else {
                    0
                } | next.map_or(0, |_| Descriptor::NEXT),
                next: next.unwrap_or(0),
            };
            if indirect {
                let entry = GuestAddress(table.0 + 16 * to_u64(at));
                self.write(entry, &descriptor.encode())?;
            } else {
                self.ring.write_descriptor(taken[at], &descriptor)?;
            }
        }
        if indirect {
            let descriptor = Descriptor {
                address: table.0,
                len: table_len,
                flags: Descriptor::INDIRECT,
                next: 0,
            };
            self.ring.write_descriptor(taken[0], &descriptor)?;
        }
        Ok(Some(taken))
    }

    /// Takes everything out of the used ring.
    fn collect(&mut self) -> Result<(), FrontEndError> {
        while let Some(used) = self.ring.pop_used()? {
            let completion = self.complete(used)?;
            self.done.push_back(completion);
        }
        Ok(())
    }

    fn complete(&mut self, used: Used) -> Result<Completion, FrontEndError> {
        let at = usize::try_from(used.id).ok();
        let slot = at.and_then(|at| self.in_flight.get_mut(at));
        let request = slot
            .and_then(Option::take)
            .ok_or(FrontEndError::UnknownHead {
                queue: self.index,
                head: used.id,
            })?;
        let mut data = Vec::new();
        for buffer in request.buffers.iter().filter(|buffer| buffer.writable) {
            let mut bytes = vec![0; as_len(buffer.len)];
            self.memory
                .read_slice(&mut bytes, buffer.address)
                .map_err(|_| outside(buffer.address))?;
            data.append(&mut bytes);
        }
        let status = data.pop().unwrap_or(Status::UNTOUCHED);
        self.ring.give_back_descriptors(&request.descriptors);
        self.arena.give_back(request.start, request.bytes);
        Ok(Completion {
            token: request.token,
            status: Status::from_byte(status),
            used_bytes: used.len,
            data,
        })
    }

    /// Waits until there may be something in the used ring.
    fn sleep(&mut self, deadline: Instant) -> Result<(), FrontEndError> {
        if self.call.is_none() {
            if Instant::now() >= deadline {
                return Err(self.nothing(false));
            }
            std::thread::sleep(POLL_INTERVAL);
            return Ok(());
        }
        if self.ring.enable_interrupts()? {
            return self.ring.disable_interrupts();
        }
        let mut events = [EpollEvent::default(); 2];
        let count = loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let millis = i32::try_from(left.as_millis()).unwrap_or(i32::MAX);
            match self.epoll.wait(millis, &mut events) {
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                other => break other.map_err(failed("wait for an interrupt"))?,
            }
        };
        if count == 0 {
            let lost = self.ring.enable_interrupts()?;
            return Err(self.nothing(lost));
        }
        self.ring.disable_interrupts()?;
        if self.take_call() {
            return Ok(());
        }
        // Completions published before the connection ended are still good.
        let called = events[..count].iter().any(|event| event.data() == CALL);
        if called || self.ring.enable_interrupts()? {
            return Ok(());
        }
        Err(FrontEndError::Closed)
    }

    /// Resets the call descriptor. Returns whether it was signalled since the last look.
    pub fn take_call(&mut self) -> bool {
        let count = self.call.as_ref().and_then(|call| call.read().ok());
        self.calls += count.unwrap_or(0);
        count.is_some()
    }

    fn nothing(&self, lost: bool) -> FrontEndError {
        let (queue, after) = (self.index, self.timeout);
        if lost {
            FrontEndError::LostInterrupt { queue, after }
        } else {
            FrontEndError::NoCompletion { queue, after }
        }
    }

    fn write(&self, address: GuestAddress, bytes: &[u8]) -> Result<(), FrontEndError> {
        self.memory
            .write_slice(bytes, address)
            .map_err(|_| outside(address))
    }
}

/// Marks of what is watched while waiting.
const CLOSED: u64 = 0;
const CALL: u64 = 1;

/// Has `epoll` tell of the end of the connection.
fn watch_connection(epoll: &Epoll, socket: &OwnedFd) -> Result<(), FrontEndError> {
    let closed = EpollEvent::new(EventSet::READ_HANG_UP | EventSet::HANG_UP, CLOSED);
    epoll
        .ctl(ControlOperation::Add, socket.as_raw_fd(), closed)
        .map_err(failed("watch the connection"))
}

fn new_event() -> Result<EventFd, FrontEndError> {
    EventFd::new(EFD_NONBLOCK).map_err(failed("create an event descriptor"))
}

fn failed(what: &'static str) -> impl Fn(std::io::Error) -> FrontEndError {
    move |source| FrontEndError::System { what, source }
}

fn outside(address: GuestAddress) -> FrontEndError {
    FrontEndError::OutsideMemory { address: address.0 }
}

fn as_len(len: u32) -> usize {
    usize::try_from(len).expect("a descriptor's length fits in an address space")
}

fn to_u64(len: usize) -> u64 {
    u64::try_from(len).expect("lengths have at most 64 bits")
}
