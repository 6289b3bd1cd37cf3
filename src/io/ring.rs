// SPDX-License-Identifier: Apache-2.0
//! One io_uring per worker, entered once a batch.
#![allow(unsafe_code, reason = "hands the kernel addresses and enters the ring")]

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::atomic::{Ordering, fence};
use std::time::Duration;

use io_uring::{EnterFlags, IoUring, squeue};
use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

/// How often a look for completions lets the kernel post more of them before it returns: enough
/// to empty an overflowed queue, few enough that new submissions are not starved.
const REAP_ROUNDS: usize = 4;

/// Threads that the kernel may keep waiting for operations, for each submission entry: as many as
/// there are completion entries.
const BLOCKED_PER_ENTRY: u32 = 4;

/// How long to wait before submissions that the kernel refused for want of memory are tried again.
const RETRY_AFTER: Duration = Duration::from_millis(1);

/// A ring that cannot be made or has stopped working.
#[derive(Debug, Error)]
pub enum RingError {
    /// The kernel refuses io_uring to this process.
    #[error(
        "io_uring is not permitted; set sysctl kernel.io_uring_disabled=0 \
         (in a container: allow io_uring in its seccomp profile)"
    )]
    NotPermitted(#[source] io::Error),
    /// The kernel has no io_uring.
    #[error("this kernel has no io_uring; Linux 5.10 or later is needed")]
    NotSupported(#[source] io::Error),
    /// The ring could not be made for another reason.
    #[error("cannot make an io_uring of {entries} entries")]
    Setup {
        /// Submission queue entries asked for.
        entries: u32,
        /// From `io_uring_setup`.
        #[source]
        source: io::Error,
    },
    /// Files could not be registered.
    #[error("cannot register {count} files with io_uring; raise RLIMIT_NOFILE")]
    Files {
        /// How many.
        count: usize,
        /// From `io_uring_register`.
        #[source]
        source: io::Error,
    },
    /// A registered file could not be exchanged.
    #[error("cannot change registered file {index} of io_uring")]
    Exchange {
        /// Its place in the table.
        index: u32,
        /// From `io_uring_register`.
        #[source]
        source: io::Error,
    },
    /// The eventfd could not be made or registered.
    #[error("cannot make an eventfd for the completions of io_uring")]
    Wake(#[source] io::Error),
    /// Entering the ring failed in a way that no retry cures.
    #[error("io_uring does not work any more")]
    Enter(#[source] io::Error),
}

/// What the kernel says about one submission.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Completion {
    /// From the submission.
    pub user_data: u64,
    /// A count of bytes, or a negative errno.
    pub result: i32,
}

/// How the kernel finishes operations on this ring.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Mode {
    /// When the ring is entered with GETEVENTS, on our thread, in one go (Linux 6.1).
    Deferred,
    /// At the next system call of our thread, without interrupting it (Linux 5.19).
    Cooperative,
    /// Whenever it likes.
    Plain,
}

/// An io_uring with its eventfd and a backlog for what does not fit.
///
/// It must be made and used on one thread: the kernel is told that there is a single issuer. It
/// is therefore not `Send`.
pub struct Ring {
    uring: IoUring,
    wake: EventFd,
    mode: Mode,
    /// Submissions for which the queue had no room, oldest first.
    backlog: VecDeque<squeue::Entry>,
    /// Submissions whose completion was not reaped yet.
    outstanding: usize,
    /// Whether the eventfd is to be signalled. It is only while the worker means to sleep:
    /// signalling costs the kernel an atomic and the worker a wake-up for nothing.
    armed: bool,
    /// System calls made.
    enters: u64,
    /// A raw pointer keeps the ring from being sent to another thread.
    _not_send: std::marker::PhantomData<*mut ()>,
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring")
            .field("mode", &self.mode)
            .field("backlog", &self.backlog.len())
            .finish_non_exhaustive()
    }
}

impl Ring {
    /// A ring with `entries` submission entries (rounded up to a power of two by the kernel) and
    /// four times as many completions, on this thread.
    ///
    /// # Errors
    /// [`RingError`].
    pub fn new(entries: u32) -> Result<Self, RingError> {
        let (uring, mode) = build(entries)?;
        let wake = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(RingError::Wake)?;
        uring
            .submitter()
            .register_eventfd(wake.as_raw_fd())
            .map_err(RingError::Wake)?;
        allow_blocked(&uring, entries.saturating_mul(BLOCKED_PER_ENTRY));
        let mut ring = Self {
            uring,
            wake,
            mode,
            backlog: VecDeque::with_capacity(entries as usize * 4),
            outstanding: 0,
            armed: true,
            enters: 0,
            _not_send: std::marker::PhantomData,
        };
        ring.disarm();
        Ok(ring)
    }

    /// Becomes readable when completions arrive after [`Ring::wait_limit`] said `None`. Watch it
    /// with `EPOLLIN | EPOLLET`: every signal is a new edge, so nobody needs to read it.
    #[must_use]
    pub fn wake_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the eventfd is open as long as `self.wake`, which the result borrows.
        unsafe { BorrowedFd::borrow_raw(self.wake.as_raw_fd()) }
    }

    /// Registers files; submissions name them by their place in `files`, where `None` keeps a
    /// place free for [`Ring::exchange_file`]. The kernel keeps them open as long as the ring
    /// exists or until they are exchanged, whatever happens to the descriptors.
    ///
    /// # Errors
    /// [`RingError::Files`].
    pub fn register_files(&mut self, files: &[Option<BorrowedFd<'_>>]) -> Result<(), RingError> {
        let files: Vec<RawFd> = files.iter().copied().map(raw).collect();
        self.uring
            .submitter()
            .register_files(&files)
            .map_err(|source| RingError::Files {
                count: files.len(),
                source,
            })
    }

    /// Puts another file, or none, into place `index` of the registered files.
    ///
    /// The kernel lets go of the file that was there once no operation uses it any more; before
    /// Linux 6.13 also not before the operations on *other* files that were submitted earlier on
    /// this ring have ended.
    ///
    /// # Errors
    /// [`RingError::Exchange`]: nothing has changed.
    pub fn exchange_file(
        &mut self,
        index: u32,
        file: Option<BorrowedFd<'_>>,
    ) -> Result<(), RingError> {
        let changed = self
            .uring
            .submitter()
            .register_files_update(index, &[raw(file)]);
        match changed {
            Ok(_) => Ok(()),
            Err(source) => Err(RingError::Exchange { index, source }),
        }
    }

    /// Registers memory for `ReadFixed` and `WriteFixed`, each piece at most 1 GiB.
    ///
    /// # Errors
    /// `ENOMEM` beyond `RLIMIT_MEMLOCK`, among others. Everything works without, a little slower.
    ///
    /// # Safety
    /// Each piece is mapped memory that stays mapped as long as operations on it are in flight.
    pub unsafe fn register_memory(
        &mut self,
        pieces: impl Iterator<Item = (*mut u8, usize)>,
    ) -> io::Result<()> {
        let iovecs: Vec<libc::iovec> = pieces
            .map(|(start, len)| libc::iovec {
                iov_base: start.cast(),
                iov_len: len,
            })
            .collect();
        // SAFETY: the caller's promise.
        unsafe { self.uring.submitter().register_buffers(&iovecs) }
    }

    /// Queues a submission for the next [`Ring::submit`]. It cannot fail: what does not fit waits.
    ///
    /// # Safety
    /// The memory the entry points to stays valid, and used by nobody in a conflicting way, until
    /// the completion with its user data was reaped.
    pub unsafe fn push(&mut self, entry: squeue::Entry) {
        self.outstanding += 1;
        if self.backlog.is_empty() {
            // SAFETY: the caller's promise.
            if unsafe { self.uring.submission().push(&entry) }.is_ok() {
                return;
            }
        }
        self.backlog.push_back(entry);
    }

    /// Submissions that the kernel has not taken yet.
    #[must_use]
    pub fn unsubmitted(&mut self) -> usize {
        self.uring.submission().len() + self.backlog.len()
    }

    /// Hands all queued submissions to the kernel, with one system call unless there are more
    /// than the ring has entries; none if nothing is queued. Where the kernel is short of memory
    /// or wants completions reaped first, the rest stays queued: [`Ring::wait_limit`] then says
    /// when to call again.
    ///
    /// # Errors
    /// [`RingError::Enter`]: the ring is of no use any more.
    pub fn submit(&mut self) -> Result<(), RingError> {
        loop {
            self.move_backlog();
            let queued = self.uring.submission().len();
            if queued == 0 {
                return Ok(());
            }
            match self.enter(queued) {
                // Nothing was taken: the kernel is short of something.
                Ok(0) => return Ok(()),
                Ok(_) => {}
                Err(error) => match error.raw_os_error() {
                    Some(libc::EINTR) => {}
                    Some(libc::EAGAIN | libc::EBUSY) => return Ok(()),
                    _ => return Err(RingError::Enter(error)),
                },
            }
        }
    }

    /// Appends the completions there are to `out`. Enters the kernel only if it has results that
    /// it could not post yet.
    ///
    /// # Errors
    /// [`RingError::Enter`]: the ring is of no use any more.
    pub fn reap(&mut self, out: &mut Vec<Completion>) -> Result<(), RingError> {
        self.disarm();
        for _ in 0..REAP_ROUNDS {
            self.collect(out);
            if !self.unposted() {
                return Ok(());
            }
            match self.enter(0) {
                Ok(_) => {}
                Err(error) => match error.raw_os_error() {
                    Some(libc::EINTR | libc::EAGAIN | libc::EBUSY) => {}
                    _ => return Err(RingError::Enter(error)),
                },
            }
        }
        self.collect(out);
        Ok(())
    }

    /// Empties the completion queue.
    fn collect(&mut self, out: &mut Vec<Completion>) {
        let before = out.len();
        out.extend(self.uring.completion().map(|entry| Completion {
            user_data: entry.user_data(),
            result: entry.result(),
        }));
        // Every submission here has one completion: none is of the kind that has several.
        self.outstanding -= out.len() - before;
    }

    /// To be asked last before sleeping: for how long at most. `None` means that
    /// [`Ring::wake_fd`] will tell; zero that completions are there already; something short that
    /// submissions have to be tried again.
    ///
    /// # Errors
    /// [`RingError::Enter`]: the ring is of no use any more.
    pub fn wait_limit(&mut self) -> Result<Option<Duration>, RingError> {
        self.arm()?;
        if !self.uring.completion().is_empty() || self.unposted() {
            return Ok(Some(Duration::ZERO));
        }
        Ok((self.unsubmitted() > 0).then_some(RETRY_AFTER))
    }

    /// Calls of `io_uring_enter` so far.
    #[must_use]
    pub fn enters(&self) -> u64 {
        self.enters
    }

    /// Whether the kernel has results that only an enter brings into the completion queue.
    fn unposted(&mut self) -> bool {
        let submission = self.uring.submission();
        submission.taskrun() || submission.cq_overflow()
    }

    /// Enters the ring to submit `count` entries, to let the kernel finish what it deferred and to
    /// flush what overflowed. Never waits.
    fn enter(&mut self, count: usize) -> io::Result<usize> {
        self.enters += 1;
        let count = u32::try_from(count).expect("a ring has at most 2^15 entries");
        let flags = EnterFlags::GETEVENTS.bits();
        // SAFETY: the count is the number of entries in the queue, and what they point to is
        // valid by the promise of `push`.
        unsafe {
            self.uring
                .submitter()
                .enter::<libc::sigset_t>(count, 0, flags, None)
        }
    }

    fn move_backlog(&mut self) {
        if self.backlog.is_empty() {
            return;
        }
        let mut submission = self.uring.submission();
        while let Some(entry) = self.backlog.front() {
            // SAFETY: the promise of `push`, where the entry came from.
            if unsafe { submission.push(entry) }.is_err() {
                return;
            }
            self.backlog.pop_front();
        }
    }

    /// Asks for signals, so that whatever is not visible now will be signalled.
    fn arm(&mut self) -> Result<(), RingError> {
        if self.armed || self.mode != Mode::Deferred {
            return Ok(());
        }
        self.uring.completion().enable_eventfd();
        self.armed = true;
        // The kernel sets its flag for pending work and then looks whether signals are wanted; we
        // ask for signals and then look at its flag. With a full barrier on both sides one of the
        // two sees the other. The kernel's is a locked instruction on x86; elsewhere only its
        // list of work is fully ordered, and entering looks at that.
        fence(Ordering::SeqCst);
        if cfg!(not(target_arch = "x86_64")) {
            match self.enter(0) {
                Ok(_) => {}
                Err(error) => match error.raw_os_error() {
                    Some(libc::EINTR | libc::EAGAIN | libc::EBUSY) => {}
                    _ => return Err(RingError::Enter(error)),
                },
            }
        }
        Ok(())
    }

    /// Asks for no signals while the worker is awake. Only with deferred completions: in the
    /// other modes the kernel gives no order between posting and looking at the flag.
    fn disarm(&mut self) {
        if self.armed && self.mode == Mode::Deferred {
            self.uring.completion().disable_eventfd();
            self.armed = false;
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // The kernel takes a ring down some time after its descriptor is closed, and would keep
        // the files, and the locks on them, until then: whoever opens them next would be refused.
        // With operations in flight the locks have to stay (rule K2), and kernels before 6.13
        // would wait here for as long as they hang. An error means that nothing is registered.
        if self.outstanding == 0 {
            let _ = self.uring.submitter().unregister_files();
        }
    }
}

/// The descriptor as the kernel wants it: -1 for none.
fn raw(file: Option<BorrowedFd<'_>>) -> RawFd {
    file.map_or(-1, |file| file.as_raw_fd())
}

/// Lets `count` operations of this thread block in the kernel at the same time.
///
/// What cannot be done without waiting (every flush and zeroing, and all I/O on file systems such
/// as FUSE) runs on threads that the kernel keeps for us, by default no more than four for each
/// processor. A replica that hangs would soon hold all of them, and the flushes of the healthy
/// replicas would wait behind it for ever. Threads are made only while others are blocked.
fn allow_blocked(uring: &IoUring, count: u32) {
    // Zero leaves the other kind of thread, for what is not a file, as it is.
    if let Err(error) = uring.submitter().register_iowq_max_workers(&mut [count, 0]) {
        tracing::info!(
            %error,
            "io_uring cannot have more threads (Linux 5.15 is needed): \
             a replica that hangs may delay the others"
        );
    }
}

/// A ring in the best mode this kernel takes.
fn build(entries: u32) -> Result<(IoUring, Mode), RingError> {
    let modes = [Mode::Deferred, Mode::Cooperative, Mode::Plain];
    let mut last = None;
    for mode in modes {
        let mut builder = IoUring::builder();
        builder
            .setup_cqsize(entries.saturating_mul(4))
            .setup_clamp();
        match mode {
            Mode::Deferred => builder
                .setup_single_issuer()
                .setup_defer_taskrun()
                .setup_taskrun_flag()
                .setup_submit_all(),
            Mode::Cooperative => builder
                .setup_coop_taskrun()
                .setup_taskrun_flag()
                .setup_submit_all(),
            Mode::Plain => &mut builder,
        };
        match builder.build(entries) {
            Ok(uring) => {
                if mode != Mode::Deferred {
                    tracing::info!(?mode, "io_uring without deferred completions: slower");
                }
                return Ok((uring, mode));
            }
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => last = Some(error),
            Err(error) => return Err(setup_error(entries, error)),
        }
    }
    let source = last.expect("the loop tried every mode");
    Err(setup_error(entries, source))
}

fn setup_error(entries: u32, source: io::Error) -> RingError {
    match source.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => RingError::NotPermitted(source),
        Some(libc::ENOSYS) => RingError::NotSupported(source),
        _ => RingError::Setup { entries, source },
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use io_uring::{opcode, types};

    use super::*;

    fn poll_in(fd: BorrowedFd<'_>, timeout_ms: i32) -> bool {
        let mut poll = libc::pollfd {
            fd: fd.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one valid entry.
        unsafe { libc::poll(&raw mut poll, 1, timeout_ms) == 1 }
    }

    fn push_nops(ring: &mut Ring, count: u64) {
        for user_data in 0..count {
            let entry = opcode::Nop::new().build().user_data(user_data);
            // SAFETY: a no-op points to no memory.
            unsafe { ring.push(entry) };
        }
    }

    #[test]
    fn submit_of_more_than_the_ring_holds_loses_nothing() {
        let mut ring = Ring::new(8).unwrap();
        // Past the submission queue (8), past the completion queue (32).
        push_nops(&mut ring, 1000);
        assert_eq!(ring.unsubmitted(), 1000);
        let mut out = Vec::new();
        let start = Instant::now();
        while out.len() < 1000 && start.elapsed() < Duration::from_secs(5) {
            ring.submit().unwrap();
            ring.reap(&mut out).unwrap();
        }
        let mut seen: Vec<u64> = out.iter().map(|completion| completion.user_data).collect();
        seen.sort_unstable();
        assert_eq!(seen, (0..1000).collect::<Vec<_>>());
        assert_eq!(ring.unsubmitted(), 0);
        assert_eq!(ring.wait_limit().unwrap(), None);
    }

    #[test]
    fn wait_limit_is_zero_when_a_completion_came_unseen() {
        let mut ring = Ring::new(8).unwrap();
        push_nops(&mut ring, 1);
        ring.submit().unwrap();
        assert_eq!(ring.wait_limit().unwrap(), Some(Duration::ZERO));
        let mut out = Vec::new();
        ring.reap(&mut out).unwrap();
        assert_eq!(out.len(), 1);
    }

    #[test]
    fn wake_fd_is_signalled_when_a_late_completion_arrives() {
        let mut ring = Ring::new(8).unwrap();
        let late = types::Timespec::new().nsec(20_000_000);
        let mut out = Vec::new();
        for round in 0..3 {
            let entry = opcode::Timeout::new(&raw const late)
                .build()
                .user_data(round);
            // SAFETY: `late` outlives the loop, which waits for the completion.
            unsafe { ring.push(entry) };
            ring.submit().unwrap();
            ring.reap(&mut out).unwrap();
            assert!(out.is_empty());
            assert_eq!(ring.wait_limit().unwrap(), None);
            // The counter of the eventfd is read here only to see the next signal alone.
            let _ = ring.wake.read();
            let limit = Instant::now();
            assert!(poll_in(ring.wake_fd(), 5000));
            assert!(limit.elapsed() < Duration::from_secs(4));
            ring.reap(&mut out).unwrap();
            assert_eq!(out.len(), 1);
            assert_eq!(out[0].result, -libc::ETIME);
            out.clear();
        }
    }

    #[test]
    fn wake_fd_stays_silent_while_the_worker_is_awake() {
        let mut ring = Ring::new(8).unwrap();
        if ring.mode != Mode::Deferred {
            return;
        }
        let mut out = Vec::new();
        push_nops(&mut ring, 4);
        ring.submit().unwrap();
        ring.reap(&mut out).unwrap();
        assert_eq!(out.len(), 4);
        assert!(!poll_in(ring.wake_fd(), 0));
    }
}
