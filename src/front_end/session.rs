// SPDX-License-Identifier: Apache-2.0
//! A connection to a back-end: negotiation, start, stop, and the messages in between.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures,
    VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VringConfigData};
use vm_memory::GuestMemoryMmap;

use super::config::{CONFIG_BYTES, Config};
use super::error::FrontEndError;
use super::memory::{Arena, GuestRam, Half};
use super::options::{Manners, MemoryBy, Options, features};
use super::queue::{Parts, Queue};
use super::ring::Ring;
use super::watchdog::Watchdog;

/// Protocol features this front-end can use.
const PROTOCOL: VhostUserProtocolFeatures = VhostUserProtocolFeatures::MQ
    .union(VhostUserProtocolFeatures::REPLY_ACK)
    .union(VhostUserProtocolFeatures::CONFIG)
    .union(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS)
    .union(VhostUserProtocolFeatures::INFLIGHT_SHMFD)
    .union(VhostUserProtocolFeatures::LOG_SHMFD)
    .union(VhostUserProtocolFeatures::BACKEND_REQ)
    .union(VhostUserProtocolFeatures::RESET_DEVICE);

/// The driver of one disk, and the front-end in front of it.
pub struct FrontEnd {
    // The queues hold descriptors the back-end watches: they go first.
    queues: Vec<Queue>,
    ram: GuestRam,
    protocol: Frontend,
    watchdog: Watchdog,
    socket: UnixStream,
    /// Our end of the back-end request channel.
    requests: Option<UnixStream>,
    inflight: Option<(VhostUserInflight, File)>,
    options: Options,
    offered: u64,
    protocol_features: VhostUserProtocolFeatures,
    queues_offered: u64,
    memory_told: bool,
    /// Told of every message before it is sent.
    observer: Option<Observer>,
}

type Observer = Box<dyn FnMut(&'static str) + Send>;

impl FrontEnd {
    /// Connects to a back-end, negotiates, and starts the device.
    ///
    /// # Errors
    /// If nobody listens, or the back-end refuses or cannot do something the options ask for.
    pub fn connect(socket: &Path, options: &Options) -> Result<Self, FrontEndError> {
        let mut front_end = Self::negotiate(socket, options)?;
        front_end.start()?;
        Ok(front_end)
    }

    /// Connects to a back-end and negotiates, as a VMM does before its guest runs; the guest's
    /// memory is not told and no ring is started. Dropping the front-end then is a probe.
    ///
    /// # Errors
    /// If nobody listens, or the back-end refuses or cannot do something the options ask for.
    pub fn negotiate(socket: &Path, options: &Options) -> Result<Self, FrontEndError> {
        let stream = connected(socket)?;
        Self::negotiate_on(stream, options)
    }

    /// Like [`FrontEnd::negotiate`] on a socket that is connected already.
    ///
    /// # Errors
    /// If the back-end refuses or cannot do something the options ask for.
    pub fn negotiate_on(stream: UnixStream, options: &Options) -> Result<Self, FrontEndError> {
        Self::negotiate_observed(stream, options, None)
    }

    /// Like [`FrontEnd::connect`]; from the first message on, `observer` is given the name of each
    /// before it is sent.
    ///
    /// # Errors
    /// As [`FrontEnd::connect`].
    pub fn connect_observed(
        socket: &Path,
        options: &Options,
        observer: impl FnMut(&'static str) + Send + 'static,
    ) -> Result<Self, FrontEndError> {
        let stream = connected(socket)?;
        let observer: Observer = Box::new(observer);
        let mut front_end = Self::negotiate_observed(stream, options, Some(observer))?;
        front_end.start()?;
        Ok(front_end)
    }

    /// From now on `observer` is given the name of each message before it is sent.
    pub fn observe(&mut self, observer: impl FnMut(&'static str) + Send + 'static) {
        self.observer = Some(Box::new(observer));
    }

    fn negotiate_observed(
        stream: UnixStream,
        options: &Options,
        observer: Option<Observer>,
    ) -> Result<Self, FrontEndError> {
        let (protocol, watchdog) = on(&stream, options)?;
        let mut front_end = Self {
            queues: Vec::new(),
            ram: GuestRam::new(options.memory_bytes)?,
            protocol,
            watchdog,
            socket: stream,
            requests: None,
            inflight: None,
            options: *options,
            offered: 0,
            protocol_features: VhostUserProtocolFeatures::empty(),
            queues_offered: 1,
            memory_told: false,
            observer,
        };
        front_end.exchange_features()?;
        Ok(front_end)
    }

    fn exchange_features(&mut self) -> Result<(), FrontEndError> {
        let polite = self.options.manners == Manners::CloudHypervisor;
        if polite {
            self.send("SET_OWNER", |protocol| protocol.set_owner())?;
        }
        self.offered = self.send("GET_FEATURES", |protocol| protocol.get_features())?;
        if self.offered & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0 {
            let feature = "VHOST_USER_F_PROTOCOL_FEATURES";
            return Err(FrontEndError::Missing { feature });
        }
        let offered = self.send("GET_PROTOCOL_FEATURES", |protocol| {
            protocol.get_protocol_features()
        })?;
        let mut wanted = PROTOCOL & offered;
        if !self.options.inflight {
            wanted.remove(VhostUserProtocolFeatures::INFLIGHT_SHMFD);
        }
        if !wanted.contains(VhostUserProtocolFeatures::CONFIG) {
            let feature = "VHOST_USER_PROTOCOL_F_CONFIG";
            return Err(FrontEndError::Missing { feature });
        }
        self.send("SET_PROTOCOL_FEATURES", |protocol| {
            protocol.set_protocol_features(wanted)
        })?;
        self.protocol_features = wanted;
        if wanted.contains(VhostUserProtocolFeatures::MQ) {
            self.queues_offered =
                self.send("GET_QUEUE_NUM", |protocol| protocol.get_queue_num())?;
        }
        if self.queues_offered < u64::from(self.options.queues) {
            return Err(FrontEndError::TooFewQueues {
                wanted: self.options.queues,
                offered: self.queues_offered,
            });
        }
        if polite {
            self.ask_replies(true);
            return Ok(());
        }
        if wanted.contains(VhostUserProtocolFeatures::BACKEND_REQ) {
            let pair = UnixStream::pair().map_err(failed("create a socket pair"))?;
            self.send("SET_BACKEND_REQ_FD", |protocol| {
                protocol.set_backend_request_fd(&pair.1)
            })?;
            self.requests = Some(pair.0);
        }
        self.send("SET_OWNER", |protocol| protocol.set_owner())
    }

    /// Starts the device with fresh rings, as a driver does that has just found it.
    ///
    /// # Errors
    /// If the back-end refuses a message or the memory is too small for the rings.
    pub fn start(&mut self) -> Result<(), FrontEndError> {
        self.make_queues()?;
        // What was in flight was in flight on other rings.
        self.inflight = None;
        self.resume(self.options.wrong_base.unwrap_or(self.options.first_index))
    }

    /// Connects again after the back-end has gone, and starts the rings where they are: with the
    /// memory, the requests and the in-flight buffer of before. Requests the old back-end did not
    /// complete are the new one's. Where it fails it may be called again.
    ///
    /// SET_VRING_BASE says what VMMs say: QEMU the used index, cloud-hypervisor the available one.
    /// Neither kicks.
    ///
    /// # Errors
    /// If nobody listens yet, or the back-end refuses, offers less than before, or ends.
    pub fn reconnect(&mut self, socket: &Path) -> Result<(), FrontEndError> {
        let stream = connected(socket)?;
        let acked = self.acked();
        let cloned = || stream.try_clone().map_err(failed("clone the socket"));
        self.watchdog = Watchdog::new(cloned()?).map_err(failed("start a thread"))?;
        self.protocol = Frontend::from_stream(cloned()?, u64::from(self.options.queues));
        for queue in &mut self.queues {
            queue.replace_socket(OwnedFd::from(cloned()?))?;
        }
        self.socket = stream;
        self.requests = None;
        self.memory_told = false;
        self.exchange_features()?;
        if self.offered & acked != acked {
            let feature = "a feature that the driver uses";
            return Err(FrontEndError::Missing { feature });
        }
        let rings = self.queues.iter().map(Queue::ring);
        let bases = match self.options.manners {
            Manners::Qemu => rings.map(Ring::used_index).collect::<Result<Vec<_>, _>>()?,
            Manners::CloudHypervisor => rings.map(Ring::avail_index).collect(),
        };
        self.resume_at(&bases)
    }

    /// Starts the device again with other options of the rings, on the same connection and
    /// memory: what an operating system does after the firmware. The memory is not told again.
    ///
    /// # Errors
    /// As [`FrontEnd::start`].
    pub fn start_with(&mut self, options: &Options) -> Result<(), FrontEndError> {
        self.options = *options;
        self.start()
    }

    /// Starts the rings as they are, with `base` as what SET_VRING_BASE says for all of them:
    /// what a VMM does when a paused guest goes on.
    ///
    /// # Errors
    /// If the back-end refuses a message.
    pub fn resume(&mut self, base: u16) -> Result<(), FrontEndError> {
        self.resume_at(&vec![base; self.queues.len()])
    }

    /// The same with a base for each ring.
    fn resume_at(&mut self, bases: &[u16]) -> Result<(), FrontEndError> {
        let wanted = self.acked() | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        self.send("SET_FEATURES", |protocol| protocol.set_features(wanted))?;
        self.share_inflight()?;
        match self.options.manners {
            Manners::Qemu => self.start_like_qemu(bases),
            Manners::CloudHypervisor => self.start_like_cloud_hypervisor(bases),
        }
    }

    fn start_like_qemu(&mut self, bases: &[u16]) -> Result<(), FrontEndError> {
        for index in 0..self.queues.len() {
            self.tell_call(index)?;
        }
        // A second time: QEMU does so when it starts to log and when it is done with it.
        let wanted = self.acked() | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        self.send("SET_FEATURES", |protocol| protocol.set_features(wanted))?;
        self.ask_replies(true);
        self.tell_memory()?;
        self.ask_replies(false);
        for (index, &base) in bases.iter().enumerate() {
            self.tell_size(index)?;
            self.tell_base(index, base)?;
            self.tell_addresses(index)?;
            self.tell_kick(index)?;
        }
        self.ask_replies(true);
        self.enable_all(true)?;
        self.ask_replies(false);
        Ok(())
    }

    fn start_like_cloud_hypervisor(&mut self, bases: &[u16]) -> Result<(), FrontEndError> {
        self.tell_memory()?;
        for index in 0..self.queues.len() {
            self.tell_size(index)?;
        }
        for (index, &base) in bases.iter().enumerate() {
            self.tell_addresses(index)?;
            self.tell_base(index, base)?;
            self.tell_call(index)?;
            self.tell_kick(index)?;
        }
        self.enable_all(true)
    }

    /// Stops all rings. Returns, for each, the index at which the back-end would go on.
    ///
    /// # Errors
    /// If the back-end refuses a message.
    pub fn stop(&mut self) -> Result<Vec<u32>, FrontEndError> {
        self.enable_all(false)?;
        let queues = 0..self.queues.len();
        queues
            .map(|index| self.send("GET_VRING_BASE", |protocol| protocol.get_vring_base(index)))
            .collect()
    }

    /// RESET_DEVICE, if the back-end knows it.
    ///
    /// # Errors
    /// If it does not or refuses.
    pub fn reset(&mut self) -> Result<(), FrontEndError> {
        self.send("RESET_DEVICE", |protocol| protocol.reset_device())
    }

    /// The first `size` bytes of the configuration space.
    ///
    /// # Errors
    /// If the back-end refuses.
    pub fn config_bytes(&mut self, size: u32) -> Result<Vec<u8>, FrontEndError> {
        let zeroes = vec![0; usize::try_from(size).expect("sizes fit in an address space")];
        let flags = VhostUserConfigFlags::WRITABLE;
        let (_, bytes) = self.send("GET_CONFIG", |protocol| {
            protocol.get_config(0, size, flags, &zeroes)
        })?;
        Ok(bytes)
    }

    /// The configuration space.
    ///
    /// # Errors
    /// If the back-end refuses or knows fewer fields.
    pub fn config(&mut self) -> Result<Config, FrontEndError> {
        Config::parse(&self.config_bytes(CONFIG_BYTES)?)
    }

    /// Virtio features the back-end offers.
    #[must_use]
    pub fn offered(&self) -> u64 {
        self.offered
    }

    /// Virtio features that are agreed on.
    #[must_use]
    pub fn acked(&self) -> u64 {
        self.offered & self.options.features
    }

    /// Protocol features that are agreed on.
    #[must_use]
    pub fn protocol_features(&self) -> VhostUserProtocolFeatures {
        self.protocol_features
    }

    /// Number of queues the back-end offers.
    #[must_use]
    pub fn queues_offered(&self) -> u64 {
        self.queues_offered
    }

    /// Queue `index`.
    ///
    /// # Panics
    /// If there is no such queue.
    pub fn queue(&mut self, index: usize) -> &mut Queue {
        &mut self.queues[index]
    }

    /// All queues, to be driven by as many threads.
    pub fn queues(&mut self) -> &mut [Queue] {
        &mut self.queues
    }

    /// The guest memory.
    #[must_use]
    pub fn memory(&self) -> GuestMemoryMmap<()> {
        self.ram.map().clone()
    }

    /// The file behind the guest memory.
    #[must_use]
    pub fn memory_file(&self) -> &File {
        self.ram.file()
    }

    /// The buffer in which the back-end marks what is in flight, if it does, for whoever wants to
    /// look at it or do it harm.
    #[must_use]
    pub fn inflight_file(&self) -> Option<&File> {
        self.inflight.as_ref().map(|(_, file)| file)
    }

    /// What the back-end is told of the in-flight buffer at the next start of the rings, to be
    /// changed by whoever wants to lie.
    pub fn inflight_mut(&mut self) -> Option<&mut (VhostUserInflight, File)> {
        self.inflight.as_mut()
    }

    /// Our end of the channel on which the back-end sends requests, if it has one.
    #[must_use]
    pub fn requests(&self) -> Option<&UnixStream> {
        self.requests.as_ref()
    }

    /// The connection, for bytes no sane front-end sends.
    #[must_use]
    pub fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// Sends any message of the `vhost` crate under the time limit of the options; `message` is
    /// its name for error messages.
    ///
    /// # Errors
    /// What the message ends with, or that there was no answer in time.
    pub fn send<T>(
        &mut self,
        message: &'static str,
        body: impl FnOnce(&mut Frontend) -> vhost::Result<T>,
    ) -> Result<T, FrontEndError> {
        if let Some(observer) = &mut self.observer {
            observer(message);
        }
        let after = self.options.timeout;
        let protocol = &mut self.protocol;
        let (result, fired) = self.watchdog.limit(after, || body(protocol));
        result.map_err(|source| {
            if fired {
                FrontEndError::NoAnswer { message, after }
            } else {
                FrontEndError::Message { message, source }
            }
        })
    }

    /// Whether the next messages ask for a reply.
    pub fn ask_replies(&mut self, ask: bool) {
        let flag = if ask {
            VhostUserHeaderFlag::NEED_REPLY
        } else {
            VhostUserHeaderFlag::empty()
        };
        self.protocol.set_hdr_flags(flag);
    }

    /// Gives a running ring a new kick descriptor, as a VMM does when it takes over or gives up
    /// polling for the guest.
    ///
    /// # Errors
    /// If the back-end refuses.
    pub fn replace_kick(&mut self, index: usize) -> Result<(), FrontEndError> {
        self.queues[index].replace_kick()?;
        self.tell_kick(index)
    }

    /// Gives a running ring a new call descriptor.
    ///
    /// # Errors
    /// If the back-end refuses.
    pub fn replace_call(&mut self, index: usize) -> Result<(), FrontEndError> {
        self.queues[index].replace_call()?;
        self.tell_call(index)
    }

    /// SET_VRING_ENABLE for all rings.
    ///
    /// # Errors
    /// If the back-end refuses.
    pub fn enable_all(&mut self, enable: bool) -> Result<(), FrontEndError> {
        (0..self.queues.len()).try_for_each(|index| {
            self.send("SET_VRING_ENABLE", |protocol| {
                protocol.set_vring_enable(index, enable)
            })
        })
    }

    /// SET_VRING_NUM with the ring's size.
    ///
    /// # Errors
    /// If the back-end refuses.
    pub fn tell_size(&mut self, index: usize) -> Result<(), FrontEndError> {
        let size = self.queues[index].ring().size();
        self.send("SET_VRING_NUM", |protocol| {
            protocol.set_vring_num(index, size)
        })
    }

    /// SET_VRING_BASE.
    ///
    /// # Errors
    /// If the back-end refuses.
    pub fn tell_base(&mut self, index: usize, base: u16) -> Result<(), FrontEndError> {
        self.send("SET_VRING_BASE", |protocol| {
            protocol.set_vring_base(index, base)
        })
    }

    /// SET_VRING_ADDR with the ring's addresses in this process.
    ///
    /// # Errors
    /// If the back-end refuses.
    pub fn tell_addresses(&mut self, index: usize) -> Result<(), FrontEndError> {
        let ring = self.queues[index].ring();
        let [table, avail, used] = ring.addresses();
        let config = VringConfigData {
            queue_max_size: ring.size(),
            queue_size: ring.size(),
            flags: 0,
            desc_table_addr: self.ram.host_address(table)?,
            used_ring_addr: self.ram.host_address(used)?,
            avail_ring_addr: self.ram.host_address(avail)?,
            log_addr: None,
        };
        self.send("SET_VRING_ADDR", |protocol| {
            protocol.set_vring_addr(index, &config)
        })
    }

    fn tell_kick(&mut self, index: usize) -> Result<(), FrontEndError> {
        let event = clone_event(self.queues[index].kick_event())?;
        self.send("SET_VRING_KICK", |protocol| {
            protocol.set_vring_kick(index, &event)
        })
    }

    fn tell_call(&mut self, index: usize) -> Result<(), FrontEndError> {
        let Some(event) = self.queues[index].call_event() else {
            return Ok(());
        };
        let event = clone_event(event)?;
        self.send("SET_VRING_CALL", |protocol| {
            protocol.set_vring_call(index, &event)
        })
    }

    /// Tells the back-end of the guest memory, once for a connection.
    fn tell_memory(&mut self) -> Result<(), FrontEndError> {
        if self.memory_told {
            return Ok(());
        }
        let regions = self.ram.regions();
        let slots = VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS;
        if self.options.memory_by == MemoryBy::Table || !self.protocol_features.contains(slots) {
            self.send("SET_MEM_TABLE", |protocol| protocol.set_mem_table(&regions))?;
        } else {
            for region in &regions {
                self.send("ADD_MEM_REG", |protocol| protocol.add_mem_region(region))?;
            }
        }
        self.memory_told = true;
        Ok(())
    }

    /// Asks for an in-flight buffer the first time, and hands it back every time.
    fn share_inflight(&mut self) -> Result<(), FrontEndError> {
        let tracked = VhostUserProtocolFeatures::INFLIGHT_SHMFD;
        if !self.protocol_features.contains(tracked) {
            return Ok(());
        }
        let (queues, size) = (self.options.queues, self.options.queue_size);
        let fits = |(shape, _): &(VhostUserInflight, File)| {
            (shape.num_queues, shape.queue_size) == (queues, size)
        };
        if !self.inflight.as_ref().is_some_and(fits) {
            let shape = VhostUserInflight::new(0, 0, queues, size);
            let (mut shape, file) = self.send("GET_INFLIGHT_FD", |protocol| {
                protocol.get_inflight_fd(&shape)
            })?;
            // The back-end says how large the buffer is and where; the shape stays ours.
            shape.num_queues = queues;
            shape.queue_size = size;
            self.inflight = Some((shape, file));
        }
        let Some((shape, file)) = self.inflight.take() else {
            return Ok(());
        };
        let sent = self.send("SET_INFLIGHT_FD", |protocol| {
            protocol.set_inflight_fd(&shape, file.as_raw_fd())
        });
        self.inflight = Some((shape, file));
        sent
    }

    fn make_queues(&mut self) -> Result<(), FrontEndError> {
        self.queues.clear();
        self.ram.release_all();
        let options = self.options;
        let too_small = FrontEndError::MemoryTooSmall {
            memory_bytes: options.memory_bytes,
            queues: options.queues,
            queue_size: options.queue_size,
        };
        let Some(share) = arena_bytes(self.ram.half_bytes(), &options) else {
            return Err(too_small);
        };
        for index in 0..options.queues {
            // Rings in one region and buffers in both, so that every translation is exercised.
            let half = if index % 2 == 0 {
                Half::High
            } else {
                Half::Low
            };
            let start = self.ram.take(Half::Low, Ring::bytes(options.queue_size));
            let buffers = self.ram.take(half, share);
            let (Some(start), Some(buffers)) = (start, buffers) else {
                return Err(too_small);
            };
            let ring = Ring::new(
                self.ram.map().clone(),
                start,
                options.queue_size,
                options.first_index,
                self.acked() & features::EVENT_IDX != 0,
            )?;
            let socket = self
                .socket
                .try_clone()
                .map_err(failed("clone the socket"))?;
            self.queues.push(Queue::new(Parts {
                index,
                memory: self.ram.map().clone(),
                ring,
                arena: Arena::new(buffers, share),
                indirect: self.acked() & features::INDIRECT != 0,
                timeout: options.timeout,
                with_call: options.call,
                socket: OwnedFd::from(socket),
            })?);
        }
        Ok(())
    }
}

/// An even share of a region for every queue that has its buffers there, in whole pages, after
/// all rings have taken theirs. `None` if that is less than a page.
fn arena_bytes(half_bytes: u64, options: &Options) -> Option<u64> {
    let page = 4096;
    let queues = u64::from(options.queues);
    let rings = queues * Ring::bytes(options.queue_size).next_multiple_of(page);
    let share = half_bytes.checked_sub(rings)? / queues.div_ceil(2).max(1) / page * page;
    (share >= page).then_some(share)
}

fn connected(socket: &Path) -> Result<UnixStream, FrontEndError> {
    UnixStream::connect(socket).map_err(|source| FrontEndError::Connect {
        path: socket.to_owned(),
        source,
    })
}

/// The two halves of a conversation on `stream`: messages, and the limit on waiting for answers.
fn on(stream: &UnixStream, options: &Options) -> Result<(Frontend, Watchdog), FrontEndError> {
    let cloned = || stream.try_clone().map_err(failed("clone the socket"));
    let watchdog = Watchdog::new(cloned()?).map_err(failed("start a thread"))?;
    let protocol = Frontend::from_stream(cloned()?, u64::from(options.queues));
    Ok((protocol, watchdog))
}

fn clone_event(
    event: &vmm_sys_util::eventfd::EventFd,
) -> Result<vmm_sys_util::eventfd::EventFd, FrontEndError> {
    event
        .try_clone()
        .map_err(failed("clone an event descriptor"))
}

fn failed(what: &'static str) -> impl Fn(io::Error) -> FrontEndError {
    move |source| FrontEndError::System { what, source }
}
