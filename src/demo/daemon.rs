// SPDX-License-Identifier: Apache-2.0
#![allow(
    unsafe_code,
    reason = "std has no call to send a child process another signal than SIGKILL"
)]
//! The daemon as a child process, from its start to its end.

use std::ffi::OsString;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use super::DemoError;
use crate::front_end::{FrontEnd, Options};

/// How long the daemon may take to begin to serve, and to end.
const PATIENCE: Duration = Duration::from_secs(5);

/// How often to look.
const INTERVAL: Duration = Duration::from_millis(2);

/// A child process that serves a disk. It is killed when it is dropped.
pub(super) struct Daemon {
    child: Child,
    socket: PathBuf,
    errors: PathBuf,
}

impl Daemon {
    /// Starts `program serve` with `arguments` and a socket in `folder`.
    pub(super) fn start(
        program: &Path,
        folder: &Path,
        arguments: &[OsString],
    ) -> Result<Self, DemoError> {
        let socket = folder.join("disk.sock");
        let errors = folder.join("daemon.log");
        let failed = |what, path: &Path| {
            let path = path.to_owned();
            move |source| DemoError::File { what, path, source }
        };
        let log = File::create(&errors).map_err(failed("create", &errors))?;
        let child = Command::new(program)
            .arg("serve")
            .arg("--socket-path")
            .arg(&socket)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .map_err(failed("start", program))?;
        Ok(Self {
            child,
            socket,
            errors,
        })
    }

    /// Process number.
    pub(super) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Connects as soon as the daemon listens.
    pub(super) fn connect(&mut self, options: &Options) -> Result<FrontEnd, DemoError> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let failure = match FrontEnd::connect(&self.socket, options) {
                Ok(front_end) => return Ok(front_end),
                Err(failure) => failure,
            };
            if let Some(status) = self.ended()? {
                let said = self.said();
                return Err(DemoError::Ended { status, said });
            }
            // Until it listens there is no socket; every other failure is final.
            if !matches!(failure, crate::front_end::FrontEndError::Connect { .. }) {
                return Err(failure.into());
            }
            if Instant::now() >= deadline {
                let (after, said) = (PATIENCE, self.said());
                return Err(DemoError::NotServing { after, said });
            }
            std::thread::sleep(INTERVAL);
        }
    }

    /// Ends the daemon as a service manager does. Returns its exit status and whether the socket
    /// is gone.
    pub(super) fn stop(mut self) -> Result<(ExitStatus, bool), DemoError> {
        let process = libc::pid_t::try_from(self.child.id()).expect("process numbers fit");
        // SAFETY: the child was not waited for, so that the number is still its own; kill has no
        // memory effects.
        unsafe { libc::kill(process, libc::SIGTERM) };
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.ended()? {
                return Ok((status, !self.socket.exists()));
            }
            if Instant::now() >= deadline {
                let (after, said) = (PATIENCE, self.said());
                return Err(DemoError::NotEnding { after, said });
            }
            std::thread::sleep(INTERVAL);
        }
    }

    /// What the daemon wrote to its standard error.
    pub(super) fn said(&self) -> String {
        std::fs::read(&self.errors).map_or_else(
            |error| format!("(its log cannot be read: {error})"),
            |bytes| String::from_utf8_lossy(&bytes).into_owned(),
        )
    }

    fn ended(&mut self) -> Result<Option<ExitStatus>, DemoError> {
        self.child.try_wait().map_err(|source| DemoError::File {
            what: "wait for the process that serves",
            path: self.socket.clone(),
            source,
        })
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // After an orderly stop both fail, which is as it should be.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
