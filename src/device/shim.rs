// SPDX-License-Identifier: Apache-2.0
//! Stands between the front-end's socket and the crate: reads whole messages, refuses what must
//! not get through, passes the rest on, and carries replies back.
//!
//! It touches the control path only. [`Session`] is the place that sees every message: what the
//! crate cannot do is answered there.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use thiserror::Error;

use super::front_end_line::FrontEndLine;
use super::message::{Message, MessageLimits, Refusal, Request, TransportError};

/// Most regions of guest memory: the number of slots the crate answers GET_MAX_MEM_SLOTS with.
/// It does not enforce it.
pub const MEMORY_REGIONS_MAX: usize = 509;

/// Why the relay ended.
#[derive(Debug, Error)]
pub enum RelayEnd {
    /// The front-end closed its socket, or it was shut down.
    #[error("the front-end disconnected")]
    FrontEndClosed,
    /// The crate ended the connection: it refused a message.
    #[error("the back-end ended the connection")]
    BackEndClosed,
    /// The front-end sent a message that is not taken.
    #[error("the front-end's message was refused")]
    Refused(#[from] Refusal),
    /// The front-end's socket failed, or what came was no message.
    #[error("the front-end's socket cannot be used any more")]
    FrontEnd(#[source] TransportError),
    /// The socket to the crate failed.
    #[error("the private socket cannot be used any more")]
    BackEnd(#[source] TransportError),
    /// Waiting failed.
    #[error("waiting for messages failed")]
    Poll(#[source] io::Error),
}

/// What is known of one connection from the messages seen so far.
#[derive(Debug)]
pub struct Session {
    limits: MessageLimits,
    /// Regions of guest memory; each holds a descriptor and a mapping of ours.
    regions: usize,
    /// The socket on which we may tell the front-end something.
    line: FrontEndLine,
}

impl Session {
    /// A connection on which nothing was said; `line` is for the socket on which the front-end may
    /// be told something.
    #[must_use]
    pub fn new(limits: MessageLimits, line: FrontEndLine) -> Self {
        Self {
            limits,
            regions: 0,
            line,
        }
    }

    /// Looks at a message of the front-end before it is passed on.
    ///
    /// # Errors
    /// If it must not be.
    pub fn inspect(&mut self, message: &Message) -> Result<(), Refusal> {
        match message.check(self.limits)? {
            Request::SetBackendReqFd => {
                let copy = message.descriptors[0].try_clone();
                let copy = copy.map_err(|source| Refusal::Exhausted { source })?;
                self.line.set(copy);
            }
            Request::SetMemTable => self.regions = message.descriptors.len(),
            Request::AddMemReg if self.regions >= MEMORY_REGIONS_MAX => {
                return Err(Refusal::Regions);
            }
            Request::AddMemReg => self.regions += 1,
            // One that is not there ends the connection in the crate.
            Request::RemMemReg => self.regions = self.regions.saturating_sub(1),
            Request::GetFeatures
            | Request::SetFeatures
            | Request::SetOwner
            | Request::ResetOwner
            | Request::SetVringNum
            | Request::SetVringAddr
            | Request::SetVringBase
            | Request::GetVringBase
            | Request::SetVringKick
            | Request::SetVringCall
            | Request::SetVringErr
            | Request::GetProtocolFeatures
            | Request::SetProtocolFeatures
            | Request::GetQueueNum
            | Request::SetVringEnable
            | Request::GetConfig
            | Request::SetConfig
            | Request::ResetDevice
            | Request::GetMaxMemSlots => {}
        }
        Ok(())
    }
}

/// Carries messages both ways until one side ends it. Shutting either socket down ends it from
/// outside.
pub fn relay(front_end: &UnixStream, back_end: &UnixStream, session: &mut Session) -> RelayEnd {
    loop {
        let (front_ready, back_ready) = match wait(front_end, back_end) {
            Ok(ready) => ready,
            Err(error) => return RelayEnd::Poll(error),
        };
        // Replies first: they belong to messages that are older.
        let passed = if back_ready {
            pass_reply(front_end, back_end)
        } else if front_ready {
            pass_message(front_end, back_end, session)
        } else {
            Ok(())
        };
        if let Err(end) = passed {
            return end;
        }
    }
}

fn wait(front_end: &UnixStream, back_end: &UnixStream) -> io::Result<(bool, bool)> {
    let mut fds = [front_end, back_end].map(|s| PollFd::from_borrowed_fd(s.as_fd(), PollFlags::IN));
    match poll(&mut fds, None) {
        Ok(_) => {
            let [front, back] = fds.each_ref().map(|fd| !fd.revents().is_empty());
            Ok((front, back))
        }
        Err(Errno::INTR) => Ok((false, false)),
        Err(error) => Err(error.into()),
    }
}

fn pass_reply(front_end: &UnixStream, back_end: &UnixStream) -> Result<(), RelayEnd> {
    let reply = Message::read(back_end).map_err(|error| match error {
        TransportError::Closed => RelayEnd::BackEndClosed,
        error => RelayEnd::BackEnd(error),
    })?;
    reply.write(front_end).map_err(front_end_failed)
}

fn pass_message(
    front_end: &UnixStream,
    back_end: &UnixStream,
    session: &mut Session,
) -> Result<(), RelayEnd> {
    let message = Message::read(front_end).map_err(front_end_failed)?;
    session.inspect(&message)?;
    message.write(back_end).map_err(|error| match error {
        // The crate shut its end down; why is what it reports.
        TransportError::Io(error) if error.kind() == io::ErrorKind::BrokenPipe => {
            RelayEnd::BackEndClosed
        }
        error => RelayEnd::BackEnd(error),
    })
}

fn front_end_failed(error: TransportError) -> RelayEnd {
    match error {
        TransportError::Closed => RelayEnd::FrontEndClosed,
        TransportError::Io(error) if error.kind() == io::ErrorKind::BrokenPipe => {
            RelayEnd::FrontEndClosed
        }
        error => RelayEnd::FrontEnd(error),
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use super::*;

    #[test]
    fn memory_regions_are_counted() {
        let mut session = Session::new(
            MessageLimits {
                queues: 1,
                queue_size: 128,
            },
            FrontEndLine::default(),
        );
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        let region = |code, fds: usize| Message {
            code,
            flags: 1,
            body: [0u64, 0, 4096, 0, 0]
                .iter()
                .flat_map(|word| word.to_ne_bytes())
                .collect(),
            descriptors: (0..fds)
                .map(|_| OwnedFd::from(file.try_clone().unwrap()))
                .collect(),
        };
        for _ in 0..MEMORY_REGIONS_MAX {
            session.inspect(&region(37, 1)).unwrap();
        }
        let refused = session.inspect(&region(37, 1));
        assert!(matches!(refused, Err(Refusal::Regions)));
        session.inspect(&region(38, 0)).unwrap();
        session.inspect(&region(37, 1)).unwrap();
    }
}
