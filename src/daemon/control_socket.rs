// SPDX-License-Identifier: Apache-2.0
//! The control socket: QMP for programs and for `quorum-blk ctl` ([`crate::control::qmp`]).
//!
//! Each client has a thread of its own. What one asks for may take long (a resize drains the disk,
//! a status waits for maintenance), and neither the control thread nor another client is to wait
//! for it. Threads are few: so are clients.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, SystemTime};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;
use serde_json::{Value, json};
use tracing::{debug, info, warn};

use super::disk::{Disk, Standing};
use super::listener::{Listener, ListenerError};
use super::resize::{Resized, resize};
use crate::control::event_hub::{EventHub, EventQueue};
use crate::control::events::Names;
use crate::control::qmp::{self, Ask, Input, QmpError, Request};
use crate::control::{Counters, DiskStatus, Event, EventData};
use crate::device::{Device, Told};

/// Clients at a time: people, a monitoring program, a manager of virtual machines.
const CLIENTS_MAX: usize = 16;

/// How long a client may take to read what it asked for.
const WRITE_LIMIT: Duration = Duration::from_secs(5);

/// After an accept that failed for want of something.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What clients may ask of the disk.
pub struct Service {
    /// The disk.
    pub disk: Arc<Disk>,
    /// What the guest sees of it.
    pub device: Arc<Device>,
    /// What was counted.
    pub counters: Counters,
    /// What the names mean.
    pub names: Names,
    /// T.
    pub threshold: usize,
    /// Where events come from.
    pub hub: EventHub,
}

/// The socket; no new client comes when it is dropped, and its file is removed. Clients that are
/// there stay until the process ends.
pub struct ControlSocket {
    stop: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl ControlSocket {
    /// Takes clients at `path`, which only our own user and root may connect to. A process that
    /// listens there has `patience` to stop.
    ///
    /// # Errors
    /// If there can be no socket.
    pub fn open(path: &Path, patience: Duration, service: Service) -> Result<Self, ListenerError> {
        let refuse = |source| ListenerError::Bind {
            path: path.to_owned(),
            source,
        };
        let listener = Listener::bind(path, patience)?;
        // Who was faster than this is turned away by what it is.
        let mode = std::fs::Permissions::from_mode(0o600);
        std::fs::set_permissions(path, mode).map_err(refuse)?;
        let stop = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let stop = Arc::new(stop.map_err(|errno| refuse(errno.into()))?);
        let thread = thread::Builder::new().name("control".to_owned());
        let thread = thread.spawn({
            let (stop, service) = (Arc::clone(&stop), Arc::new(service));
            move || accept(&listener, stop.as_fd(), &service)
        });
        info!("taking commands on {}", path.display());
        Ok(Self {
            stop,
            thread: Some(thread.map_err(refuse)?),
        })
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        let _ = rustix::io::write(&*self.stop, &1u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Takes clients until told to stop.
fn accept(listener: &Listener, stop: BorrowedFd<'_>, service: &Arc<Service>) {
    let clients = Arc::new(AtomicUsize::new(0));
    loop {
        match wait([listener.as_fd(), stop]) {
            Ok([_, false]) => {}
            Ok([_, true]) => return,
            Err(error) => return warn!("no more clients on the control socket: {error}"),
        }
        match listener.accept() {
            Ok(None) => {}
            Ok(Some(stream)) => admit(stream, &clients, service),
            Err(error) => {
                warn!("cannot accept a client on the control socket, will try again: {error}");
                thread::sleep(ACCEPT_PAUSE);
            }
        }
    }
}

fn admit(stream: UnixStream, clients: &Arc<AtomicUsize>, service: &Arc<Service>) {
    if !is_ours(&stream) {
        return warn!("a client of another user was turned away from the control socket");
    }
    let place = Place(Arc::clone(clients));
    if place.0.fetch_add(1, Ordering::Relaxed) >= CLIENTS_MAX {
        return warn!("a client was turned away from the control socket: {CLIENTS_MAX} are there");
    }
    let service = Arc::clone(service);
    let thread = thread::Builder::new().name("client".to_owned());
    let thread = thread.spawn(move || {
        let _place = place;
        match Client::new(stream, service).and_then(Client::serve) {
            Ok(()) => debug!("a client has left the control socket"),
            Err(error) => debug!("a client of the control socket was lost: {error}"),
        }
    });
    if let Err(error) = thread {
        warn!("cannot serve a client on the control socket: {error}");
    }
}

/// Whether the other end is our own user, or root.
fn is_ours(stream: &UnixStream) -> bool {
    let own = rustix::process::geteuid();
    let peer = rustix::net::sockopt::socket_peercred(stream);
    peer.is_ok_and(|peer| peer.uid == own || peer.uid.is_root())
}

/// One of the places for clients.
struct Place(Arc<AtomicUsize>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Which of two descriptors can be read, or have hung up.
fn wait(fds: [BorrowedFd<'_>; 2]) -> io::Result<[bool; 2]> {
    let mut fds = fds.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
    loop {
        match poll(&mut fds, None) {
            Ok(_) => return Ok(fds.each_ref().map(|fd| !fd.revents().is_empty())),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

struct Client {
    stream: UnixStream,
    service: Arc<Service>,
    events: Arc<EventQueue>,
    input: Input,
    negotiated: bool,
}

impl Client {
    fn new(stream: UnixStream, service: Arc<Service>) -> io::Result<Self> {
        stream.set_write_timeout(Some(WRITE_LIMIT))?;
        Ok(Self {
            events: service.hub.listen()?,
            stream,
            service,
            input: Input::default(),
            negotiated: false,
        })
    }

    fn serve(mut self) -> io::Result<()> {
        self.stream.write_all(qmp::greeting().as_bytes())?;
        let mut bytes = [0; 4096];
        loop {
            let [asked, event] = wait([self.stream.as_fd(), self.events.as_fd()])?;
            if event {
                self.tell_events()?;
            }
            if !asked {
                continue;
            }
            match self.stream.read(&mut bytes) {
                Ok(0) => return Ok(()),
                Ok(count) => self.input.push(&bytes[..count]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
            while let Some(request) = self.input.next(&self.service.names) {
                let line = self.answer(request);
                self.stream.write_all(line.as_bytes())?;
            }
        }
    }

    fn tell_events(&mut self) -> io::Result<()> {
        while let Some((line, lost)) = self.events.take() {
            // As in QEMU: nothing before the negotiation is over.
            if !self.negotiated {
                continue;
            }
            self.stream.write_all(line.as_bytes())?;
            if lost > 0 {
                let lost = EventData::EventsLost { count: lost };
                let lost = Event::new(lost, SystemTime::now());
                let line = lost.to_line(&self.service.names);
                self.stream.write_all(line.as_bytes())?;
            }
        }
        Ok(())
    }

    fn answer(&mut self, request: Request) -> String {
        let done = request.ask.and_then(|ask| {
            qmp::check_negotiated(ask, self.negotiated)?;
            self.negotiated = true;
            self.service.carry_out(ask)
        });
        qmp::answer(done, request.id)
    }
}

impl Service {
    fn carry_out(&self, ask: Ask) -> Result<Value, QmpError> {
        match ask {
            Ask::Capabilities => Ok(json!({})),
            Ask::Commands => Ok(qmp::commands()),
            Ask::Version => Ok(qmp::version()),
            Ask::Name => Ok(json!({"name": self.names.disk})),
            Ask::Status => Ok(self.status()),
            Ask::Counters => Ok(parsed(&self.counters.totals().to_json())),
            Ask::Resize { bytes } => match resize(&self.disk, &self.device, bytes) {
                Ok(Resized { bytes, told }) => Ok(json!({
                    "size": bytes,
                    "front-end-told": told == Told::Yes,
                })),
                Err(error) => Err(QmpError::generic(with_causes(&error))),
            },
            Ask::Command(command) => {
                if self.disk.command(command) {
                    Ok(json!({}))
                } else {
                    let text = "the disk is closed or being opened: try again when it is open";
                    Err(QmpError::generic(text))
                }
            }
        }
    }

    /// With the names of QEMU's `query-status` where they fit.
    fn status(&self) -> Value {
        let bytes = self.disk.looks().sectors * crate::units::SECTOR_BYTES;
        let (status, facts) = match self.disk.status() {
            Standing::Open(facts) => ("running", Some(facts)),
            Standing::Silent => ("internal-error", None),
            Standing::Closed => ("inmigrate", None),
            Standing::Changing => ("paused", None),
        };
        let disk = facts.map(|facts| {
            let status = DiskStatus::new(&facts, &self.names, self.threshold);
            parsed(&status.to_json())
        });
        json!({
            "status": status,
            "running": status == "running",
            "name": self.names.disk,
            "size": bytes,
            "disk": disk,
        })
    }
}

fn parsed(json: &str) -> Value {
    serde_json::from_str(json).expect("it was written a moment ago")
}

/// An error and what led to it, in one line.
fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        // Some pass on the text of what they wrap.
        if !text.ends_with(&next) {
            text.push_str(": ");
            text.push_str(&next);
        }
        cause = error.source();
    }
    text
}
