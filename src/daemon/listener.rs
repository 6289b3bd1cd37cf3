// SPDX-License-Identifier: Apache-2.0
//! Where front-ends come from: a socket of our own by path, or one that the parent left open.
//!
//! A socket file outlives a daemon that was killed; it must not prevent a restart, and a socket
//! somebody listens on must not be stolen. Whether somebody does is found out by connecting.
//! Looking, removing and binding are three steps; daemons of this kind that start at the same
//! time in one folder take turns by a lock on that folder (no lock file is left behind).
//!
//! A daemon that takes over from another one waits for the locks of the replicas first and for the
//! socket afterwards. Who has the locks knows that the old one's last write has landed (rule K2)
//! and can serve a front-end at once; with the socket first, front-ends would wait at a daemon that
//! may never get the disk, while the old one goes on. The old one lets go in the opposite order: it
//! stops listening before it drains, so the socket is free long before the locks are, and the wait
//! here is for daemons that do otherwise.
#![allow(
    unsafe_code,
    reason = "socket options and a connect that does not wait need libc"
)]

use std::fs::{self, File, TryLockError};
use std::io;
use std::mem::{MaybeUninit, offset_of};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use thiserror::Error;
use tracing::info;

use crate::config::FrontEnd;

/// The longest path a Unix socket can have, without the NUL at its end.
const PATH_LEN_MAX: usize = 107;

/// How long to wait for another daemon that starts in the same folder. Its steps take
/// microseconds; whoever holds the lock longer is something else, and is not waited for.
const FOLDER_LOCK_WAIT: Duration = Duration::from_secs(2);

/// How often the file of a socket that is in use is looked at. Nobody sees that, unlike a look at
/// the socket itself, and front-ends are without a disk until it is found.
const FILE_LOOK_INTERVAL: Duration = Duration::from_millis(5);

/// How often whoever listens is connected to meanwhile: a daemon that is killed leaves the file as
/// it is. The owner takes it for a front-end that only looks.
const SOCKET_LOOK_INTERVAL: Duration = Duration::from_millis(500);

/// No front-end can reach us.
#[derive(Debug, Error)]
pub enum ListenerError {
    /// The path does not fit in a socket address.
    #[error(
        "the socket path {} has {} bytes, {PATH_LEN_MAX} are possible; give a shorter --socket-path",
        path.display(), path.as_os_str().len()
    )]
    PathTooLong {
        /// The socket.
        path: PathBuf,
    },
    /// Somebody answers there.
    #[error(
        "another process is listening on {} and did not stop within {} s (--lock-timeout); \
         stop it, or give another --socket-path",
        path.display(), waited.as_secs()
    )]
    InUse {
        /// The socket.
        path: PathBuf,
        /// How long its end was waited for.
        waited: Duration,
    },
    /// Something else has that name.
    #[error(
        "{} exists and is not a socket; it is left alone: give another --socket-path, or remove it",
        path.display()
    )]
    NotASocket {
        /// The file.
        path: PathBuf,
    },
    /// Whether somebody listens there cannot be found out.
    #[error("cannot find out whether somebody listens on {}", path.display())]
    Probe {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The socket cannot be made.
    #[error(
        "cannot listen on {} (--socket-path); its folder must exist and be writable",
        path.display()
    )]
    Bind {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// No service manager has passed a socket.
    #[error(
        "no socket was passed to this process (--fd systemd); start it by its .socket unit with \
         systemctl, or give --socket-path PATH"
    )]
    NoneActivated,
    /// A service manager has passed several sockets.
    #[error(
        "{count} sockets were passed to this process (--fd systemd), and a disk has one; give \
         the .socket unit a single ListenStream="
    )]
    SeveralActivated {
        /// How many.
        count: usize,
    },
    /// What a service manager has passed cannot be understood.
    #[error("the environment of --fd systemd (LISTEN_FDS, LISTEN_PID) makes no sense")]
    Activation(#[source] io::Error),
    /// The descriptor is not one we can use.
    #[error("descriptor {fd} (--fd) {what}; give a listening or connected Unix stream socket")]
    Fd {
        /// The descriptor.
        fd: RawFd,
        /// What is wrong with it.
        what: &'static str,
        /// What the system says.
        #[source]
        source: Option<io::Error>,
    },
}

/// Where connections come from.
#[derive(Debug)]
pub enum FrontEndSource {
    /// One after the other, for ever.
    Listener(Listener),
    /// This one only; the daemon ends after it.
    Connected(UnixStream),
}

impl FrontEndSource {
    /// Opens what the configuration names. With a descriptor it must be called once only: it
    /// takes the descriptor over. A process that listens on the socket path has `patience` to stop.
    ///
    /// # Errors
    /// If no front-end could come that way.
    pub fn open(front_end: &FrontEnd, patience: Duration) -> Result<Self, ListenerError> {
        match front_end {
            FrontEnd::SocketPath(path) => Listener::bind(path, patience).map(Self::Listener),
            FrontEnd::Fd(fd) => inherited(*fd),
            FrontEnd::Systemd => inherited(activated()?),
        }
    }
}

/// A listening socket. The file of one that was bound here is removed when it is dropped, unless
/// somebody has put another in its place.
#[derive(Debug)]
pub struct Listener {
    socket: UnixListener,
    bound: Option<Bound>,
}

/// The socket file that is ours to remove.
#[derive(Debug)]
struct Bound {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl Listener {
    /// Listens at `path`. A socket file that nobody listens on any more is replaced; somebody who
    /// does listen has `patience` to stop.
    ///
    /// # Errors
    /// If somebody goes on listening there, something else has that name, or the system refuses.
    pub fn bind(path: &Path, patience: Duration) -> Result<Self, ListenerError> {
        if path.as_os_str().len() > PATH_LEN_MAX {
            return Err(ListenerError::PathTooLong {
                path: path.to_owned(),
            });
        }
        let until = Instant::now() + patience;
        let mut told = false;
        loop {
            match Self::bind_now(path) {
                Err(ListenerError::InUse { path, .. }) => {
                    if Instant::now() >= until {
                        let waited = patience;
                        return Err(ListenerError::InUse { path, waited });
                    }
                    if !std::mem::replace(&mut told, true) {
                        let (path, seconds) = (path.display(), patience.as_secs());
                        info!(
                            "another process listens on {path}: waiting up to {seconds} s for it"
                        );
                    }
                    await_change(&path, until);
                }
                bound => return bound,
            }
        }
    }

    fn bind_now(path: &Path) -> Result<Self, ListenerError> {
        let refuse = |source| ListenerError::Bind {
            path: path.to_owned(),
            source,
        };
        let turn = lock_folder(path);
        remove_stale(path)?;
        let socket = UnixListener::bind(path).map_err(|source| {
            // Somebody else came between looking and binding.
            if source.kind() == io::ErrorKind::AddrInUse {
                in_use(path)
            } else {
                refuse(source)
            }
        })?;
        let metadata = fs::symlink_metadata(path).map_err(refuse)?;
        drop(turn);
        let bound = Some(Bound {
            path: path.to_owned(),
            device: metadata.dev(),
            inode: metadata.ino(),
        });
        let listener = Self { socket, bound };
        listener.socket.set_nonblocking(true).map_err(refuse)?;
        Ok(listener)
    }

    /// The next front-end that waits, or `None` if there is none.
    ///
    /// # Errors
    /// If the system is out of descriptors or memory: try again later, not at once.
    pub fn accept(&self) -> io::Result<Option<UnixStream>> {
        loop {
            match self.socket.accept() {
                Ok((stream, _)) => {
                    stream.set_nonblocking(false)?;
                    return Ok(Some(stream));
                }
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => return Ok(None),
                    // It went away before we came.
                    io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted => {}
                    _ => return Err(error),
                },
            }
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let Some(bound) = &self.bound else {
            return;
        };
        let turn = lock_folder(&bound.path);
        if let Ok(metadata) = fs::symlink_metadata(&bound.path)
            && (metadata.dev(), metadata.ino()) == (bound.device, bound.inode)
            && let Err(error) = fs::remove_file(&bound.path)
        {
            let path = bound.path.display();
            tracing::warn!("cannot remove the socket {path}: {error}");
        }
        drop(turn);
    }
}

/// A lock on the folder of `path`, or nothing if it cannot be had: it only makes a race between
/// two starting daemons less likely to end badly.
fn lock_folder(path: &Path) -> Option<File> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let folder = File::open(folder).ok()?;
    let begin = Instant::now();
    loop {
        match folder.try_lock() {
            Ok(()) => return Some(folder),
            Err(TryLockError::WouldBlock) if begin.elapsed() < FOLDER_LOCK_WAIT => {
                thread::sleep(Duration::from_millis(1));
            }
            Err(_) => return None,
        }
    }
}

/// Somebody listens there now.
fn in_use(path: &Path) -> ListenerError {
    ListenerError::InUse {
        path: path.to_owned(),
        waited: Duration::ZERO,
    }
}

/// Waits until another look at the socket at `path` is worth it: its file has gone or is another
/// one, or some time has passed.
fn await_change(path: &Path, until: Instant) {
    let identity = || {
        let metadata = fs::symlink_metadata(path).ok()?;
        Some((metadata.dev(), metadata.ino()))
    };
    let before = identity();
    let until = until.min(Instant::now() + SOCKET_LOOK_INTERVAL);
    while before.is_some() && Instant::now() < until && identity() == before {
        thread::sleep(FILE_LOOK_INTERVAL);
    }
}

/// Removes the socket file at `path` if nobody listens on it.
fn remove_stale(path: &Path) -> Result<(), ListenerError> {
    let refuse = |source| ListenerError::Probe {
        path: path.to_owned(),
        source,
    };
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(refuse(error)),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(ListenerError::NotASocket {
                path: path.to_owned(),
            });
        }
        Ok(_) => {}
    }
    match probe(path) {
        // A backlog that is full belongs to somebody; so does a socket of another type.
        Ok(()) | Err(libc::EAGAIN | libc::EPROTOTYPE) => Err(in_use(path)),
        Err(libc::ENOENT) => Ok(()),
        Err(libc::ECONNREFUSED) => match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(ListenerError::Bind {
                path: path.to_owned(),
                source: error,
            }),
            _ => Ok(()),
        },
        Err(errno) => Err(refuse(io::Error::from_raw_os_error(errno))),
    }
}

/// Connects to the socket at `path` and closes at once, without ever waiting. The errno if that
/// fails. A back-end takes such a connection for a front-end that only looks.
fn probe(path: &Path) -> Result<(), i32> {
    let last_errno = || {
        io::Error::last_os_error()
            .raw_os_error()
            .unwrap_or(libc::EIO)
    };
    let flags = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: `socket` touches no memory.
    let fd = unsafe { libc::socket(libc::AF_UNIX, flags, 0) };
    if fd < 0 {
        return Err(last_errno());
    }
    // SAFETY: the descriptor was just made for us and nobody else knows it.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let family = libc::sa_family_t::try_from(libc::AF_UNIX).expect("AF_UNIX is 1");
    let mut address = libc::sockaddr_un {
        sun_family: family,
        sun_path: [0; 108],
    };
    for (slot, byte) in address.sun_path.iter_mut().zip(path.as_os_str().as_bytes()) {
        *slot = libc::c_char::from_ne_bytes([*byte]);
    }
    let len = offset_of!(libc::sockaddr_un, sun_path) + path.as_os_str().len() + 1;
    let len = libc::socklen_t::try_from(len).map_err(|_| libc::ENAMETOOLONG)?;
    let address = (&raw const address).cast();
    // SAFETY: the address is valid for `len` bytes: the path was checked to leave room for a NUL.
    if unsafe { libc::connect(socket.as_raw_fd(), address, len) } < 0 {
        return Err(last_errno());
    }
    Ok(())
}

/// The descriptor that a service manager has left open for us: the only one from 3 on.
fn activated() -> Result<RawFd, ListenerError> {
    let mut passed = sd_notify::listen_fds().map_err(ListenerError::Activation)?;
    match (passed.len(), passed.next()) {
        (1, Some(fd)) => Ok(fd),
        (0, _) | (_, None) => Err(ListenerError::NoneActivated),
        (count, Some(_)) => Err(ListenerError::SeveralActivated { count }),
    }
}

/// Finds out whether there is a socket at all where the service manager is to pass it. The rest is
/// found out when the disk is open, which takes its time; this mistake is in the command line.
///
/// # Errors
/// If there is none, or more than one.
pub fn check(front_end: &FrontEnd) -> Result<(), ListenerError> {
    match front_end {
        FrontEnd::Systemd => activated().map(drop),
        FrontEnd::SocketPath(_) | FrontEnd::Fd(_) => Ok(()),
    }
}

/// Takes over descriptor `fd` of the parent.
fn inherited(fd: RawFd) -> Result<FrontEndSource, ListenerError> {
    let refuse = |what, source| ListenerError::Fd { fd, what, source };
    // SAFETY: fcntl with F_GETFD touches no memory and takes any number.
    if unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
        return Err(refuse("is not open", Some(io::Error::last_os_error())));
    }
    // SAFETY: fcntl has just shown that it is open, and nothing else uses it yet.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    let option = |name| socket_option(borrowed, name);
    match option(libc::SO_DOMAIN) {
        Ok(libc::AF_UNIX) => {}
        Ok(_) => return Err(refuse("is a socket of another family", None)),
        Err(error) => return Err(refuse("is not a socket", Some(error))),
    }
    if option(libc::SO_TYPE).ok() != Some(libc::SOCK_STREAM) {
        return Err(refuse("is a socket of another type", None));
    }
    let listens = option(libc::SO_ACCEPTCONN).is_ok_and(|value| value != 0);
    // SAFETY: the parent left it to us by naming it; nothing else in this process owns it.
    let owned = unsafe { OwnedFd::from_raw_fd(fd) };
    // Not to be inherited once more, by a child of ours.
    // SAFETY: fcntl with F_SETFD touches no memory.
    unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) };
    if listens {
        let socket = UnixListener::from(owned);
        let nonblocking = socket.set_nonblocking(true);
        nonblocking.map_err(|error| refuse("cannot be used", Some(error)))?;
        let bound = None;
        return Ok(FrontEndSource::Listener(Listener { socket, bound }));
    }
    let stream = UnixStream::from(owned);
    if let Err(error) = stream.peer_addr() {
        return Err(refuse("neither listens nor is connected", Some(error)));
    }
    let blocking = stream.set_nonblocking(false);
    blocking.map_err(|error| refuse("cannot be used", Some(error)))?;
    Ok(FrontEndSource::Connected(stream))
}

fn socket_option(fd: BorrowedFd, name: libc::c_int) -> io::Result<libc::c_int> {
    let mut value = MaybeUninit::<libc::c_int>::zeroed();
    let size = size_of::<libc::c_int>();
    let mut len = libc::socklen_t::try_from(size).expect("an int has four bytes");
    let pointer = value.as_mut_ptr().cast();
    // SAFETY: `value` has room for `len` bytes and both live for the length of the call.
    let result = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            name,
            pointer,
            &raw mut len,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: zeroed at first and any bytes are a valid int.
    Ok(unsafe { value.assume_init() })
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::fd::IntoRawFd;
    use std::os::unix::net::UnixDatagram;

    use super::*;

    fn inherit(fd: impl IntoRawFd) -> Result<FrontEndSource, ListenerError> {
        FrontEndSource::open(&FrontEnd::Fd(fd.into_raw_fd()), Duration::ZERO)
    }

    #[test]
    fn listener_accepts_and_removes_its_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let listener = Listener::bind(&path, Duration::ZERO).unwrap();
        assert!(listener.accept().unwrap().is_none());
        let mut client = UnixStream::connect(&path).unwrap();
        let mut server = listener.accept().unwrap().unwrap();
        client.write_all(b"x").unwrap();
        let mut byte = [0];
        server.read_exact(&mut byte).unwrap();
        drop(listener);
        assert!(!path.exists());
    }

    #[test]
    fn listener_replaces_a_stale_socket() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let _listener = Listener::bind(&path, Duration::ZERO).unwrap();
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn listener_does_not_steal_a_live_socket() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let live = UnixListener::bind(&path).unwrap();
        let error = Listener::bind(&path, Duration::ZERO).unwrap_err();
        assert!(
            error
                .to_string()
                .contains("another process is listening on")
        );
        UnixStream::connect(&path).unwrap();
        drop(live);
        let datagram = folder.path().join("d");
        let _live = UnixDatagram::bind(&datagram).unwrap();
        assert!(matches!(
            Listener::bind(&datagram, Duration::ZERO),
            Err(ListenerError::InUse { .. })
        ));
    }

    #[test]
    fn listener_with_a_full_backlog_is_live() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let live = UnixListener::bind(&path).unwrap();
        // SAFETY: `listen` touches no memory.
        assert_eq!(unsafe { libc::listen(live.as_raw_fd(), 0) }, 0);
        // One connection fits; what comes after it would have to wait.
        assert_eq!(probe(&path), Ok(()));
        assert_eq!(probe(&path), Err(libc::EAGAIN));
        assert!(matches!(
            Listener::bind(&path, Duration::ZERO),
            Err(ListenerError::InUse { .. })
        ));
    }

    #[test]
    fn listener_leaves_other_files_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image.raw");
        fs::write(&path, "data").unwrap();
        let error = Listener::bind(&path, Duration::ZERO).unwrap_err();
        assert!(matches!(error, ListenerError::NotASocket { .. }));
        assert_eq!(fs::read(&path).unwrap(), b"data");
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(matches!(
            Listener::bind(&link, Duration::ZERO),
            Err(ListenerError::NotASocket { .. })
        ));
    }

    #[test]
    fn listener_keeps_the_file_of_its_successor() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let listener = Listener::bind(&path, Duration::ZERO).unwrap();
        fs::remove_file(&path).unwrap();
        let _successor = Listener::bind(&path, Duration::ZERO).unwrap();
        drop(listener);
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn listener_paths_that_cannot_be_are_refused() {
        let long = PathBuf::from(format!("/tmp/{}", "x".repeat(120)));
        let error = Listener::bind(&long, Duration::ZERO)
            .unwrap_err()
            .to_string();
        assert!(error.contains("125 bytes, 107 are possible"), "{error}");
        let missing = Listener::bind(Path::new("/nonexistent/s"), Duration::ZERO);
        assert!(matches!(missing, Err(ListenerError::Bind { .. })));
    }

    #[test]
    fn daemons_that_start_together_leave_one_reachable() {
        for _ in 0..20 {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("s");
            drop(UnixListener::bind(&path).unwrap());
            let threads: Vec<_> = (0..4)
                .map(|_| {
                    let path = path.clone();
                    thread::spawn(move || Listener::bind(&path, Duration::ZERO))
                })
                .collect();
            let results: Vec<_> = threads
                .into_iter()
                .map(|thread| thread.join().unwrap())
                .collect();
            assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 1);
            UnixStream::connect(&path).unwrap();
        }
    }

    #[test]
    fn inherited_sockets_are_told_apart() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let listening = UnixListener::bind(&path).unwrap();
        let source = inherit(listening).unwrap();
        assert!(matches!(source, FrontEndSource::Listener(_)));
        drop(source);
        assert!(
            path.exists(),
            "the file of an inherited socket is the parent's"
        );
        let (connected, _peer) = UnixStream::pair().unwrap();
        assert!(matches!(
            inherit(connected),
            Ok(FrontEndSource::Connected(_))
        ));
    }

    #[test]
    fn inherited_descriptors_of_other_kinds_are_refused() {
        let refused =
            |result: Result<FrontEndSource, ListenerError>| result.unwrap_err().to_string();
        let closed = FrontEndSource::open(&FrontEnd::Fd(9998), Duration::ZERO);
        assert!(refused(closed).contains("descriptor 9998 (--fd) is not open"));
        let file = tempfile::tempfile().unwrap();
        assert!(refused(inherit(file)).contains("is not a socket"));
        let (datagram, _peer) = UnixDatagram::pair().unwrap();
        assert!(refused(inherit(datagram)).contains("another type"));
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        assert!(refused(inherit(tcp)).contains("another family"));
    }

    #[test]
    fn listener_takes_the_socket_of_one_that_stops() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let before = Listener::bind(&path, Duration::ZERO).unwrap();
        let waiting = thread::spawn({
            let path = path.clone();
            move || Listener::bind(&path, Duration::from_secs(60))
        });
        // It has looked when somebody has connected.
        while before.accept().unwrap().is_none() {
            thread::sleep(Duration::from_millis(1));
        }
        drop(before);
        let after = waiting.join().unwrap().unwrap();
        let _client = UnixStream::connect(&path).unwrap();
        assert!(after.accept().unwrap().is_some());
    }

    #[test]
    fn listener_takes_the_socket_of_one_that_dies_and_leaves_its_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let before = UnixListener::bind(&path).unwrap();
        let waiting = thread::spawn({
            let path = path.clone();
            move || Listener::bind(&path, Duration::from_secs(60))
        });
        before.accept().unwrap();
        drop(before);
        assert!(waiting.join().unwrap().is_ok());
    }

    #[test]
    fn listener_gives_up_on_one_that_stays() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let _before = UnixListener::bind(&path).unwrap();
        let begin = Instant::now();
        let error = Listener::bind(&path, Duration::from_secs(1)).unwrap_err();
        assert!(begin.elapsed() >= Duration::from_secs(1));
        assert!(error.to_string().contains("did not stop within 1 s"));
    }
}
