// SPDX-License-Identifier: Apache-2.0
//! Where events are written to: a file, a fifo, or a descriptor of the parent. A reader that is
//! too slow, or not there, loses lines; the daemon never waits for it.
#![allow(
    unsafe_code,
    reason = "borrowing an inherited descriptor and poll(2) have no safe form"
)]

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::config::EventsTarget;

/// The longest line: what a pipe takes whole or not at all (POSIX guarantees 512, Linux 4096),
/// so that a line is never torn by a full one.
pub const LINE_LEN_MAX: usize = 4096;

/// Events cannot be written where the user wants them.
#[derive(Debug, Error)]
pub enum SinkError {
    /// The file cannot be opened.
    #[error("cannot open {} for events (--events)", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The descriptor cannot be used.
    #[error("descriptor {fd} (--events) cannot be used; give one that is open for writing")]
    Fd {
        /// The descriptor.
        fd: RawFd,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Appends lines without waiting, and counts those it could not write.
#[derive(Debug)]
pub struct EventSink {
    /// Opened anew on request, and for a fifo that had no reader. `None`: an inherited
    /// descriptor.
    path: Option<PathBuf>,
    /// `None`: a fifo without a reader.
    file: Option<File>,
    /// The last line went out in part: the next one must not be glued to it.
    torn: bool,
    lost: u64,
}

impl EventSink {
    /// Opens the target.
    ///
    /// # Errors
    /// If it cannot be written to. A fifo without a reader is no error; the reader may come.
    pub fn open(target: &EventsTarget) -> Result<Self, SinkError> {
        let (path, file) = match target {
            EventsTarget::Path(path) => {
                let file = open_path(path).map_err(|source| SinkError::Open {
                    path: path.clone(),
                    source,
                })?;
                (Some(path.clone()), file)
            }
            EventsTarget::Fd(fd) => {
                let file = duplicate(*fd).map_err(|source| SinkError::Fd { fd: *fd, source })?;
                (None, Some(file))
            }
        };
        Ok(Self {
            path,
            file,
            torn: false,
            lost: 0,
        })
    }

    /// Opens the file again, after it was renamed by whoever rotates logs. An inherited
    /// descriptor stays as it is.
    ///
    /// # Errors
    /// If it cannot be opened; the file of before stays in use.
    pub fn reopen(&mut self) -> Result<(), SinkError> {
        let Some(path) = &self.path else {
            return Ok(());
        };
        self.file = open_path(path).map_err(|source| SinkError::Open {
            path: path.clone(),
            source,
        })?;
        self.torn = false;
        Ok(())
    }

    /// Writes one line, which ends in a newline. Whether it was written; else it is counted.
    pub fn write(&mut self, line: &str) -> bool {
        debug_assert!(line.len() <= LINE_LEN_MAX && line.ends_with('\n'));
        let written = self.try_write(line);
        if !written {
            self.lost += 1;
        }
        written
    }

    /// Lines that could not be written since the last call.
    pub fn take_lost(&mut self) -> u64 {
        std::mem::take(&mut self.lost)
    }

    /// Counts `count` lines as lost that were taken by [`EventSink::take_lost`] and could not be
    /// told.
    pub fn lost_again(&mut self, count: u64) {
        self.lost += count;
    }

    /// Whether lines were lost since [`EventSink::take_lost`].
    #[must_use]
    pub fn has_lost(&self) -> bool {
        self.lost > 0
    }

    /// Whether a line would be taken now, as far as can be known before.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.file
            .as_ref()
            .is_some_and(|file| poll_fd(file.as_raw_fd(), libc::POLLOUT, 0).unwrap_or(false))
    }

    fn try_write(&mut self, line: &str) -> bool {
        if self.file.is_none()
            && let Some(path) = &self.path
        {
            self.file = open_path(path).unwrap_or(None);
        }
        // The descriptor of a parent may be one that blocks, and its flags are shared with other
        // processes: they are not ours to change. A pipe that polls writable takes a page.
        if !self.is_ready() {
            return false;
        }
        let Some(file) = &mut self.file else {
            return false;
        };
        let mut bytes = Vec::with_capacity(line.len() + 1);
        if self.torn {
            bytes.push(b'\n');
        }
        bytes.extend_from_slice(line.as_bytes());
        match file.write(&bytes) {
            Ok(written) => {
                self.torn = written < bytes.len();
                !self.torn
            }
            Err(error) => {
                if error.kind() == io::ErrorKind::BrokenPipe && self.path.is_some() {
                    // The reader of a fifo went away; the next one finds a new description.
                    self.file = None;
                }
                false
            }
        }
    }
}

/// `None` for a fifo that nobody reads.
fn open_path(path: &Path) -> io::Result<Option<File>> {
    let opened = OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o640)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path);
    match opened {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
        Err(error) => Err(error),
    }
}

/// A descriptor of our own for what the parent opened, so that closing ours does not close 2.
fn duplicate(fd: RawFd) -> io::Result<File> {
    // SAFETY: fcntl with F_GETFL touches no memory and takes any number.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFL) };
    if flags < 0 {
        return Err(io::Error::last_os_error());
    }
    if flags & libc::O_ACCMODE == libc::O_RDONLY {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    // SAFETY: fcntl has just shown that the descriptor is open; it was inherited, so nobody in
    // this process closes it while it is borrowed.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    Ok(File::from(borrowed.try_clone_to_owned()?))
}

/// Waits up to `timeout_ms` for `events` on `fd`; whether they came.
pub(super) fn poll_fd(fd: RawFd, events: libc::c_short, timeout_ms: i32) -> io::Result<bool> {
    let mut poll = libc::pollfd {
        fd,
        events,
        revents: 0,
    };
    // SAFETY: `poll` is one valid pollfd for the length of the call.
    let ready = unsafe { libc::poll(&raw mut poll, 1, timeout_ms) };
    if ready < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(poll.revents & events != 0)
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use vmm_sys_util::signal::block_signal;

    use super::*;

    fn make_fifo(path: &Path) {
        let path = std::ffi::CString::new(path.to_str().unwrap()).unwrap();
        // SAFETY: a valid C string.
        assert_eq!(unsafe { libc::mkfifo(path.as_ptr(), 0o600) }, 0);
    }

    #[test]
    fn sink_appends_to_a_file_and_opens_it_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("events");
        std::fs::write(&path, "before\n").unwrap();
        let mut sink = EventSink::open(&EventsTarget::Path(path.clone())).unwrap();
        assert!(sink.write("one\n"));
        let rotated = folder.path().join("events.1");
        std::fs::rename(&path, &rotated).unwrap();
        sink.reopen().unwrap();
        assert!(sink.write("two\n"));
        assert_eq!(std::fs::read_to_string(rotated).unwrap(), "before\none\n");
        assert_eq!(std::fs::read_to_string(path).unwrap(), "two\n");
    }

    #[test]
    fn sink_loses_lines_of_a_fifo_nobody_reads_and_goes_on_when_somebody_does() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("fifo");
        make_fifo(&path);
        let mut sink = EventSink::open(&EventsTarget::Path(path.clone())).unwrap();
        assert!(!sink.write("nobody\n"));
        assert_eq!(sink.take_lost(), 1);
        let mut reader = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(&path)
            .unwrap();
        assert!(sink.write("somebody\n"));
        let mut text = [0; 64];
        let len = reader.read(&mut text).unwrap();
        assert_eq!(&text[..len], b"somebody\n");
    }

    #[test]
    fn sink_does_not_wait_for_a_slow_reader() {
        let (reader, writer) = std::io::pipe().unwrap();
        let target = EventsTarget::Fd(writer.as_raw_fd());
        let mut sink = EventSink::open(&target).unwrap();
        let line = format!("{}\n", "x".repeat(1000));
        let written = (0..1000).filter(|_| sink.write(&line)).count();
        assert!((10..1000).contains(&written), "{written}");
        assert_eq!(sink.take_lost(), 1000 - u64::try_from(written).unwrap());
        drop((reader, writer));
    }

    #[test]
    fn sink_survives_a_peer_that_went_away() {
        block_signal(libc::SIGPIPE).ok();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut sink = EventSink::open(&EventsTarget::Fd(ours.as_raw_fd())).unwrap();
        assert!(sink.write("one\n"));
        drop(theirs);
        assert!(!sink.write("two\n"));
        assert!(sink.has_lost());
    }

    #[test]
    fn sink_refuses_what_it_cannot_write() {
        let closed = EventSink::open(&EventsTarget::Fd(9999)).unwrap_err();
        assert!(closed.to_string().contains("descriptor 9999"));
        let (reader, _writer) = std::io::pipe().unwrap();
        assert!(EventSink::open(&EventsTarget::Fd(reader.as_raw_fd())).is_err());
        let missing = EventsTarget::Path("/nonexistent/events".into());
        assert!(matches!(
            EventSink::open(&missing),
            Err(SinkError::Open { .. })
        ));
    }
}
