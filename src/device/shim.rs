// SPDX-License-Identifier: Apache-2.0
//! Stands between the front-end's socket and the crate: reads whole messages, refuses what must
//! not get through, passes the rest on, and carries replies back.
//!
//! It touches the control path only. [`Session`] is the place that sees every message: what the
//! crate cannot do is answered there.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use thiserror::Error;
use vhost::vhost_user::message::VhostUserProtocolFeatures;

use super::dirty_log::DirtyLog;
use super::front_end_line::FrontEndLine;
use super::inflight::{self, Description, InflightBuffer};
use super::message::{Message, MessageLimits, Refusal, Request, TransportError};
use super::notify::Call;
use super::vring::RingContext;

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

/// What becomes of a message.
#[derive(Debug)]
pub enum Verdict {
    /// It is passed on to the crate, which answers it.
    Pass,
    /// It was carried out here; this is the answer, if one is owed.
    Done(Option<Message>),
}

/// What is known of one connection from the messages seen so far.
#[derive(Debug)]
pub struct Session {
    limits: MessageLimits,
    context: Arc<RingContext>,
    /// Protocol features that were acknowledged.
    protocol: VhostUserProtocolFeatures,
    /// Regions of guest memory; each holds a descriptor and a mapping of ours.
    regions: usize,
    /// The socket on which we may tell the front-end something.
    line: FrontEndLine,
}

impl Session {
    /// A connection on which nothing was said.
    #[must_use]
    pub fn new(limits: MessageLimits, context: Arc<RingContext>) -> Self {
        Self {
            limits,
            line: context.device().line().clone(),
            context,
            protocol: VhostUserProtocolFeatures::empty(),
            regions: 0,
        }
    }

    /// Looks at a message of the front-end, and carries out what the crate cannot.
    ///
    /// # Errors
    /// If it is not to be taken.
    pub fn inspect(&mut self, message: &mut Message) -> Result<Verdict, Refusal> {
        match message.check(self.limits)? {
            request @ Request::GetInflightFd => {
                self.check_taken(request, VhostUserProtocolFeatures::INFLIGHT_SHMFD)?;
                return self.make_inflight(message);
            }
            request @ Request::SetInflightFd => {
                self.check_taken(request, VhostUserProtocolFeatures::INFLIGHT_SHMFD)?;
                return self.take_inflight(message);
            }
            request @ Request::SetLogBase => {
                self.check_taken(request, VhostUserProtocolFeatures::LOG_SHMFD)?;
                return self.take_log(message);
            }
            request @ Request::SetLogFd => {
                self.check_taken(request, VhostUserProtocolFeatures::LOG_SHMFD)?;
                let descriptor = message.descriptors.pop().expect("one came with it");
                self.context
                    .logging()
                    .set_call(Call::new(descriptor.into()));
                self.context.share_memory()?;
                return Ok(Verdict::Done(self.acknowledge(message)));
            }
            Request::SetProtocolFeatures => {
                self.protocol = VhostUserProtocolFeatures::from_bits_truncate(message.value());
            }
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
            | Request::GetQueueNum
            | Request::SetVringEnable
            | Request::GetConfig
            | Request::SetConfig
            | Request::ResetDevice
            | Request::GetMaxMemSlots => {}
        }
        Ok(Verdict::Pass)
    }

    /// Whether the front-end has taken the protocol feature that a message belongs to.
    fn check_taken(
        &self,
        request: Request,
        feature: VhostUserProtocolFeatures,
    ) -> Result<(), Refusal> {
        if self.protocol.contains(feature) {
            Ok(())
        } else {
            Err(Refusal::NotAcknowledged { request })
        }
    }

    /// SET_LOG_BASE: writes are logged here from now on, as soon as LOG_ALL is acknowledged. The
    /// answer is owed always; after it nothing is logged where it was before.
    fn take_log(&self, message: &mut Message) -> Result<Verdict, Refusal> {
        let file = message.descriptors.pop().expect("one came with it");
        let (size, offset) = message.log_place();
        self.context
            .logging()
            .set_log(DirtyLog::map(file, size, offset)?);
        self.context.share_memory()?;
        let body = message.body.clone();
        Ok(Verdict::Done(Some(message.reply(body, Vec::new()))))
    }

    /// GET_INFLIGHT_FD: a new buffer, which counts when it is handed in.
    fn make_inflight(&self, message: &Message) -> Result<Verdict, Refusal> {
        let asked = description(message);
        let disk = self.context.device().lifecycle().identity();
        let (made, file) = inflight::create(asked.shape, self.limits.queues, disk)?;
        let body = made.encode(message.body.len());
        Ok(Verdict::Done(Some(message.reply(body, vec![file]))))
    }

    /// SET_INFLIGHT_FD: this buffer, new or of before, for rings that start from now on.
    fn take_inflight(&self, message: &mut Message) -> Result<Verdict, Refusal> {
        let described = description(message);
        let file = message.descriptors.pop().expect("one came with it");
        let disk = self.context.device().lifecycle().identity();
        let buffer = InflightBuffer::open(file, described, self.limits.queues, disk)?;
        self.context.set_inflight(buffer);
        Ok(Verdict::Done(self.acknowledge(message)))
    }

    /// The answer to a message that has none of its own and was carried out here.
    fn acknowledge(&self, message: &Message) -> Option<Message> {
        let owed =
            message.needs_reply() && self.protocol.contains(VhostUserProtocolFeatures::REPLY_ACK);
        owed.then(|| message.reply(0u64.to_ne_bytes().to_vec(), Vec::new()))
    }
}

fn description(message: &Message) -> Description {
    Description::parse(&message.body).expect("the length was checked")
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
    let mut message = Message::read(front_end).map_err(front_end_failed)?;
    if let Verdict::Done(answer) = session.inspect(&mut message)? {
        let sent = answer.map_or(Ok(()), |answer| answer.write(front_end));
        return sent.map_err(front_end_failed);
    }
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
    use crate::device::test_support::{device, options};

    /// A connection on which nothing was said, to a device of four queues.
    fn session() -> Session {
        let limits = MessageLimits {
            queues: 4,
            queue_size: 256,
        };
        let (device, ..) = device(options(), 1);
        Session::new(limits, Arc::new(RingContext::new(device)))
    }

    fn message(code: u32, flags: u32, body: Vec<u8>, descriptors: Vec<OwnedFd>) -> Message {
        Message {
            code,
            flags,
            body,
            descriptors,
        }
    }

    fn acknowledge(session: &mut Session, features: VhostUserProtocolFeatures) {
        let body = features.bits().to_ne_bytes().to_vec();
        let verdict = session.inspect(&mut message(16, 1, body, vec![]));
        assert!(matches!(verdict, Ok(Verdict::Pass)), "the crate is told");
    }

    #[test]
    fn inflight_messages_are_answered_in_kind() {
        let tracked = VhostUserProtocolFeatures::INFLIGHT_SHMFD;
        let asked = Description {
            size: 0,
            offset: 0,
            shape: inflight::Shape {
                queues: 4,
                queue_size: 256,
            },
        };
        // Some front-ends pad the payload; some ask whether SET_INFLIGHT_FD was carried out.
        for (len, need_reply) in [(20, false), (24, false), (20, true), (24, true)] {
            let mut session = session();
            acknowledge(&mut session, tracked | VhostUserProtocolFeatures::REPLY_ACK);
            let mut get = message(31, 1, asked.encode(len), vec![]);
            let Ok(Verdict::Done(Some(answer))) = session.inspect(&mut get) else {
                panic!("no answer");
            };
            assert_eq!((answer.code, answer.flags, answer.body.len()), (31, 5, len));
            let made = Description::parse(&answer.body).unwrap();
            assert_eq!((made.shape, made.offset), (asked.shape, 0));
            assert!(session.context.inflight().is_none(), "it is not handed in");
            let flags = if need_reply { 9 } else { 1 };
            let mut set = message(32, flags, made.encode(len), answer.descriptors);
            let Ok(Verdict::Done(answer)) = session.inspect(&mut set) else {
                panic!("it is not for the crate");
            };
            let answer = answer.map(|answer| (answer.code, answer.flags, answer.body));
            assert_eq!(answer, need_reply.then(|| (32, 5, vec![0; 8])));
            assert!(session.context.inflight().is_some());
        }
    }

    #[test]
    fn inflight_messages_need_their_feature_and_replies_theirs() {
        let mut session = session();
        let asked = [vec![0; 16], vec![1, 0, 0, 1, 0, 0, 0, 0]].concat();
        let refused = session.inspect(&mut message(31, 1, asked.clone(), vec![]));
        assert!(matches!(refused, Err(Refusal::NotAcknowledged { .. })));
        acknowledge(&mut session, VhostUserProtocolFeatures::INFLIGHT_SHMFD);
        let Ok(Verdict::Done(Some(answer))) = session.inspect(&mut message(31, 1, asked, vec![]))
        else {
            panic!("no answer");
        };
        let mut set = message(32, 9, answer.body, answer.descriptors);
        let verdict = session.inspect(&mut set);
        assert!(matches!(verdict, Ok(Verdict::Done(None))), "{verdict:?}");
    }

    #[test]
    fn memory_regions_are_counted() {
        let mut session = session();
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
            session.inspect(&mut region(37, 1)).unwrap();
        }
        let refused = session.inspect(&mut region(37, 1));
        assert!(matches!(refused, Err(Refusal::Regions)));
        session.inspect(&mut region(38, 0)).unwrap();
        session.inspect(&mut region(37, 1)).unwrap();
    }
}
