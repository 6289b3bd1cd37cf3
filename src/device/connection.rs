// SPDX-License-Identifier: Apache-2.0
//! One front-end, from connect to disconnect.
//!
//! A thread of its own carries messages between the front-end and the crate, which handles them
//! on a second one. At the end, whatever the reason, all queues are stopped (they complete what
//! was fetched) and guest memory is let go, before the end is announced: the next connection
//! may begin.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::{Errno, write};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, getsockname, listen,
    socket_with,
};
use thiserror::Error;
use tracing::{error, info, warn};
use vhost::vhost_user::Listener;
use vhost_user_backend::VhostUserDaemon;

use super::backend::ConnectionBackend;
use super::disk::Device;
use super::lifecycle::OpenFailed;
use super::mailbox::WorkerGone;
use super::message::MessageLimits;
use super::shim::{self, RelayEnd, Session};
use super::vring::collect_rings;

/// How often somebody else may be faster at connecting to our private socket.
const PRIVATE_SOCKET_ATTEMPTS: usize = 16;

/// How a connection ended. Every way is one a front-end can choose, but for the last five.
#[derive(Debug, Error)]
pub enum ConnectionEnd {
    /// The front-end closed it.
    #[error("the front-end disconnected")]
    Disconnected,
    /// [`ConnectionHandle::shutdown`] was called.
    #[error("the connection was shut down")]
    ShutDown,
    /// The front-end sent something that is not taken.
    #[error("the front-end broke the protocol")]
    Refused(#[source] RelayEnd),
    /// The front-end sent something out of order, or something that failed.
    #[error("a message of the front-end failed: {0}")]
    Failed(vhost_user_backend::Error),
    /// Waiting or the private socket failed.
    #[error("the connection could not be kept up")]
    Relay(#[source] RelayEnd),
    /// A worker is gone: the process cannot serve any more.
    #[error("the connection cannot be served")]
    Worker(#[from] WorkerGone),
    /// The connection could not be set up.
    #[error("the connection could not be set up")]
    Setup(#[source] io::Error),
    /// A ring was to start, and the disk could not be opened.
    #[error("the guest cannot have its disk; the next connection tries again")]
    Disk(#[source] OpenFailed),
    /// The back-end could not be set up.
    #[error("the back-end could not be set up: {0}")]
    BackEnd(vhost_user_backend::Error),
}

/// Serves front-ends.
#[derive(Debug)]
pub struct Connection;

impl Connection {
    /// Serves one front-end until either side ends it, on threads of its own. One connection at
    /// a time: all share the device's workers.
    ///
    /// # Errors
    /// If there are no descriptors or threads left for it.
    pub fn serve(stream: UnixStream, device: Arc<Device>) -> io::Result<ConnectionHandle> {
        // Inherited and accepted sockets come with whatever flags their maker chose.
        stream.set_nonblocking(false)?;
        let control = Arc::new(Control {
            front_end: stream.try_clone()?,
            shut_down: AtomicBool::new(false),
            ended: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        });
        let thread = thread::Builder::new().name("front-end".to_owned()).spawn({
            let control = Arc::clone(&control);
            move || {
                // Announced even if this thread panics: nobody must wait for ever.
                let _announce = Announce(&control);
                run(&stream, &device, &control)
            }
        })?;
        Ok(ConnectionHandle { control, thread })
    }
}

/// What the connection's threads and its handle share.
#[derive(Debug)]
struct Control {
    front_end: UnixStream,
    shut_down: AtomicBool,
    ended: OwnedFd,
}

struct Announce<'a>(&'a Control);

impl Drop for Announce<'_> {
    fn drop(&mut self) {
        let _ = write(&self.0.ended, &1u64.to_ne_bytes());
    }
}

/// A running connection.
#[derive(Debug)]
pub struct ConnectionHandle {
    control: Arc<Control>,
    thread: JoinHandle<ConnectionEnd>,
}

impl ConnectionHandle {
    /// Readable when the connection has ended and [`ConnectionHandle::join`] will not wait.
    #[must_use]
    pub fn ended(&self) -> BorrowedFd<'_> {
        self.control.ended.as_fd()
    }

    /// Begins to end the connection: nothing more is read from the front-end. Queues complete what
    /// was fetched first; messages of the front-end that are being handled are handled to their
    /// end. Only then does the front-end see the end: one that hands the rings to a successor
    /// finds in them what was completed.
    pub fn shutdown(&self) {
        self.close(std::net::Shutdown::Read);
    }

    /// Ends the connection at once as the front-end sees it, where it may be the front-end that
    /// keeps it from ending: one that does not read what it is answered.
    pub fn cut(&self) {
        self.close(std::net::Shutdown::Both);
    }

    fn close(&self, how: std::net::Shutdown) {
        self.control.shut_down.store(true, Ordering::Release);
        // Fails if the front-end was faster; that ends it as well.
        let _ = self.control.front_end.shutdown(how);
    }

    /// Waits for the end.
    #[must_use]
    pub fn join(self) -> ConnectionEnd {
        self.thread.join().unwrap_or_else(|_| {
            ConnectionEnd::Setup(io::Error::other("the thread of the connection panicked"))
        })
    }
}

fn run(stream: &UnixStream, device: &Arc<Device>, control: &Control) -> ConnectionEnd {
    let end = match serve(stream, device) {
        Ok(end) | Err(end) => end,
    };
    // The front-end sees the end when the guest's requests are complete, not before.
    let _ = stream.shutdown(std::net::Shutdown::Both);
    let end = if control.shut_down.load(Ordering::Acquire) && !is_ours(&end) {
        ConnectionEnd::ShutDown
    } else {
        end
    };
    let mut causes = String::new();
    let mut cause = std::error::Error::source(&end);
    while let Some(error) = cause {
        causes.push_str(": ");
        causes.push_str(&error.to_string());
        cause = error.source();
    }
    match &end {
        ConnectionEnd::Disconnected | ConnectionEnd::ShutDown => info!("{end}"),
        end if is_ours(end) => error!("{end}{causes}"),
        end => warn!("{end}{causes}"),
    }
    end
}

/// Whether the end is our failure and not anything the front-end did.
fn is_ours(end: &ConnectionEnd) -> bool {
    match end {
        ConnectionEnd::Relay(_)
        | ConnectionEnd::Worker(_)
        | ConnectionEnd::Setup(_)
        | ConnectionEnd::Disk(_)
        | ConnectionEnd::BackEnd(_) => true,
        ConnectionEnd::Disconnected
        | ConnectionEnd::ShutDown
        | ConnectionEnd::Refused(_)
        | ConnectionEnd::Failed(_) => false,
    }
}

fn serve(stream: &UnixStream, device: &Arc<Device>) -> Result<ConnectionEnd, ConnectionEnd> {
    let backend = Arc::new(ConnectionBackend::new(Arc::clone(device)));
    let context = Arc::clone(backend.context());
    let memory = context.memory().clone();
    let (daemon, rings) = collect_rings(context, || {
        VhostUserDaemon::new("vhost-user".to_owned(), Arc::clone(&backend), memory)
    });
    let mut daemon = daemon.map_err(ConnectionEnd::BackEnd)?;
    backend.set_rings(rings);

    let (listener, private) = private_socket().map_err(ConnectionEnd::Setup)?;
    let mut listener = Listener::from(listener);
    daemon
        .start(&mut listener)
        .map_err(ConnectionEnd::BackEnd)?;
    drop(listener);
    let line = private.try_clone().map_err(ConnectionEnd::Setup)?;
    backend.context().set_line(line);

    let options = device.options();
    let limits = MessageLimits {
        queues: options.queues,
        queue_size: options.queue_size,
    };
    let mut session = Session::new(limits, Arc::clone(backend.context()));
    let relayed = shim::relay(stream, &private, &mut session);
    device.line().clear();
    // Before the back-end is waited for: it may be waiting for locks. What has failed before that
    // is the reason of the end, and not a consequence.
    let failure = backend.context().failure();
    backend.context().give_up();
    let _ = private.shutdown(std::net::Shutdown::Both);
    drop(private);
    let handled = daemon.wait();
    backend.shut_down()?;
    if let Some(failure) = failure {
        return Err(ConnectionEnd::Disk(failure));
    }
    Ok(match relayed {
        RelayEnd::FrontEndClosed => ConnectionEnd::Disconnected,
        RelayEnd::BackEndClosed => match handled {
            Err(error) => ConnectionEnd::Failed(error),
            Ok(()) => ConnectionEnd::Disconnected,
        },
        end @ (RelayEnd::Refused(_) | RelayEnd::FrontEnd(_)) => ConnectionEnd::Refused(end),
        end @ (RelayEnd::BackEnd(_) | RelayEnd::Poll(_)) => ConnectionEnd::Relay(end),
    })
}

/// A listener that has exactly one connection waiting, and the other end of that connection.
///
/// The crate wants to accept; it takes no connected socket. The address is an abstract one that
/// the kernel chooses, which any local process may try to connect to: but a listener with a
/// backlog of zero holds a single connection until it is accepted, and nobody accepts before
/// ours is in. Where somebody was faster, ours fails instead of waiting, and we begin again.
fn private_socket() -> io::Result<(UnixListener, UnixStream)> {
    let stream = || {
        socket_with(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            None,
        )
    };
    for _ in 0..PRIVATE_SOCKET_ATTEMPTS {
        let listener = stream()?;
        bind(&listener, &SocketAddrUnix::new_unnamed())?;
        listen(&listener, 0)?;
        let private = stream()?;
        match connect(&private, &getsockname(&listener)?) {
            Ok(()) => {}
            Err(Errno::AGAIN) => continue,
            Err(error) => return Err(error.into()),
        }
        let private = UnixStream::from(private);
        private.set_nonblocking(false)?;
        return Ok((listener.into(), private));
    }
    Err(io::Error::other(
        "somebody else connects to our private socket all the time",
    ))
}

#[cfg(test)]
#[path = "connection_tests.rs"]
mod tests;
