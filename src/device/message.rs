// SPDX-License-Identifier: Apache-2.0
//! vhost-user messages: reading and writing them with their descriptors, and what a front-end
//! may send.
//!
//! The crate checks messages as well; it does not check what would hurt later (memory files
//! shorter than claimed, queue sizes that are no power of two), and it cannot say what was wrong.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::fs::{FileType, fstat};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use thiserror::Error;

use super::config_space::CONFIG_BYTES_MAX;
use super::dirty_log::LogError;
use super::inflight::{Description, InflightError};
use super::mailbox::WorkerGone;
use super::notify::is_eventfd;

/// Bytes of a header: request, flags, size, each 32 bits in the machine's order.
pub const HEADER_LEN: usize = 12;

/// Longest payload. Only memory tables and configuration are of variable length; 4 KiB hold
/// more regions than descriptors can be passed.
pub const PAYLOAD_LEN_MAX: usize = 4096;

/// Most descriptors in one message: one for each region of a memory table.
pub const DESCRIPTORS_MAX: usize = 32;

const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
const FLAG_REPLY: u32 = 1 << 2;
const FLAG_NEED_REPLY: u32 = 1 << 3;

const REGION_LEN: usize = 32;
const TABLE_HEADER_LEN: usize = 8;
const CONFIG_HEADER_LEN: usize = 12;
/// In the payload of SET_VRING_KICK, CALL and ERR: no descriptor is passed.
const NO_DESCRIPTOR: u64 = 1 << 8;

/// What a front-end asks for (vhost-user, "Front-end message types"): those we take.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Request {
    /// VHOST_USER_GET_FEATURES.
    GetFeatures,
    /// VHOST_USER_SET_FEATURES.
    SetFeatures,
    /// VHOST_USER_SET_OWNER.
    SetOwner,
    /// VHOST_USER_RESET_OWNER.
    ResetOwner,
    /// VHOST_USER_SET_MEM_TABLE.
    SetMemTable,
    /// VHOST_USER_SET_LOG_BASE.
    SetLogBase,
    /// VHOST_USER_SET_LOG_FD.
    SetLogFd,
    /// VHOST_USER_SET_VRING_NUM.
    SetVringNum,
    /// VHOST_USER_SET_VRING_ADDR.
    SetVringAddr,
    /// VHOST_USER_SET_VRING_BASE.
    SetVringBase,
    /// VHOST_USER_GET_VRING_BASE.
    GetVringBase,
    /// VHOST_USER_SET_VRING_KICK.
    SetVringKick,
    /// VHOST_USER_SET_VRING_CALL.
    SetVringCall,
    /// VHOST_USER_SET_VRING_ERR.
    SetVringErr,
    /// VHOST_USER_GET_PROTOCOL_FEATURES.
    GetProtocolFeatures,
    /// VHOST_USER_SET_PROTOCOL_FEATURES.
    SetProtocolFeatures,
    /// VHOST_USER_GET_QUEUE_NUM.
    GetQueueNum,
    /// VHOST_USER_SET_VRING_ENABLE.
    SetVringEnable,
    /// VHOST_USER_SET_BACKEND_REQ_FD.
    SetBackendReqFd,
    /// VHOST_USER_GET_CONFIG.
    GetConfig,
    /// VHOST_USER_SET_CONFIG.
    SetConfig,
    /// VHOST_USER_GET_INFLIGHT_FD.
    GetInflightFd,
    /// VHOST_USER_SET_INFLIGHT_FD.
    SetInflightFd,
    /// VHOST_USER_RESET_DEVICE.
    ResetDevice,
    /// VHOST_USER_GET_MAX_MEM_SLOTS.
    GetMaxMemSlots,
    /// VHOST_USER_ADD_MEM_REG.
    AddMemReg,
    /// VHOST_USER_REM_MEM_REG.
    RemMemReg,
}

impl Request {
    fn from_code(code: u32) -> Option<Self> {
        Some(match code {
            1 => Self::GetFeatures,
            2 => Self::SetFeatures,
            3 => Self::SetOwner,
            4 => Self::ResetOwner,
            5 => Self::SetMemTable,
            6 => Self::SetLogBase,
            7 => Self::SetLogFd,
            8 => Self::SetVringNum,
            9 => Self::SetVringAddr,
            10 => Self::SetVringBase,
            11 => Self::GetVringBase,
            12 => Self::SetVringKick,
            13 => Self::SetVringCall,
            14 => Self::SetVringErr,
            15 => Self::GetProtocolFeatures,
            16 => Self::SetProtocolFeatures,
            17 => Self::GetQueueNum,
            18 => Self::SetVringEnable,
            21 => Self::SetBackendReqFd,
            24 => Self::GetConfig,
            25 => Self::SetConfig,
            31 => Self::GetInflightFd,
            32 => Self::SetInflightFd,
            34 => Self::ResetDevice,
            36 => Self::GetMaxMemSlots,
            37 => Self::AddMemReg,
            38 => Self::RemMemReg,
            _ => return None,
        })
    }
}

/// One message with the descriptors that came with it.
#[derive(Debug)]
pub struct Message {
    /// Request code.
    pub code: u32,
    /// Version and flags.
    pub flags: u32,
    /// Payload.
    pub body: Vec<u8>,
    /// Descriptors, in the order sent.
    pub descriptors: Vec<OwnedFd>,
}

/// A message could not be read or written.
#[derive(Debug, Error)]
pub enum TransportError {
    /// The peer closed the connection between two messages.
    #[error("the connection was closed")]
    Closed,
    /// The peer closed the connection inside a message.
    #[error("the connection was closed inside a message")]
    Truncated,
    /// A payload that no message has.
    #[error("a payload of {size} bytes is longer than any message has")]
    Oversized {
        /// As in the header.
        size: u32,
    },
    /// Too many descriptors in one message.
    #[error("a message came with more than {DESCRIPTORS_MAX} descriptors")]
    Descriptors,
    /// The socket failed.
    #[error("the socket failed")]
    Io(#[from] io::Error),
}

impl Message {
    /// Reads one message. Blocks until it is there; shutting the socket down ends that.
    ///
    /// # Errors
    /// If there is no whole message.
    pub fn read(socket: &UnixStream) -> Result<Self, TransportError> {
        let mut descriptors = Vec::new();
        let mut header = [0u8; HEADER_LEN];
        read_exact(socket, &mut header, &mut descriptors, true)?;
        let code = u32_at(&header, 0);
        let flags = u32_at(&header, 4);
        let size = u32_at(&header, 8);
        let oversized = TransportError::Oversized { size };
        let len = usize::try_from(size).ok().filter(|&l| l <= PAYLOAD_LEN_MAX);
        let mut body = vec![0u8; len.ok_or(oversized)?];
        read_exact(socket, &mut body, &mut descriptors, false)?;
        Ok(Self {
            code,
            flags,
            body,
            descriptors,
        })
    }

    /// Writes the message; its descriptors go with its first byte.
    ///
    /// # Errors
    /// If the peer is gone.
    pub fn write(&self, socket: &UnixStream) -> Result<(), TransportError> {
        let size = u32::try_from(self.body.len()).expect("a body has at most 4 KiB");
        let mut bytes = Vec::with_capacity(HEADER_LEN + self.body.len());
        for word in [self.code, self.flags, size] {
            bytes.extend_from_slice(&word.to_ne_bytes());
        }
        bytes.extend_from_slice(&self.body);
        let fds: Vec<BorrowedFd<'_>> = self.descriptors.iter().map(AsFd::as_fd).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&fds)) {
            return Err(TransportError::Descriptors);
        }
        let mut sent = 0;
        while sent < bytes.len() {
            let part = [IoSlice::new(&bytes[sent..])];
            match sendmsg(socket, &part, &mut control, SendFlags::NOSIGNAL) {
                Ok(count) => {
                    sent += count;
                    control.clear();
                }
                Err(Errno::INTR) => {}
                Err(error) => return Err(TransportError::Io(error.into())),
            }
        }
        Ok(())
    }

    /// The answer to this message.
    #[must_use]
    pub fn reply(&self, body: Vec<u8>, descriptors: Vec<OwnedFd>) -> Self {
        Self {
            code: self.code,
            flags: VERSION | FLAG_REPLY,
            body,
            descriptors,
        }
    }

    /// Whether the front-end wants to know that the message was carried out. It is told only if
    /// REPLY_ACK was negotiated.
    #[must_use]
    pub fn needs_reply(&self) -> bool {
        self.flags & FLAG_NEED_REPLY != 0
    }

    /// The payload as a number; 0 if it is shorter.
    #[must_use]
    pub fn value(&self) -> u64 {
        self.u64_or_zero(0)
    }

    /// Checks that a front-end may send this message, as far as it can be told from the message.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn check(&self, limits: MessageLimits) -> Result<Request, Refusal> {
        let code = self.code;
        let flags = self.flags;
        if flags & VERSION_MASK != VERSION
            || flags & FLAG_REPLY != 0
            || flags & !(VERSION_MASK | FLAG_REPLY | FLAG_NEED_REPLY) != 0
        {
            return Err(Refusal::Flags { code, flags });
        }
        let request = Request::from_code(code).ok_or(Refusal::Unknown { code })?;
        self.check_shape(request)?;
        self.check_content(request, limits)?;
        Ok(request)
    }

    /// Length of the payload and number of descriptors.
    fn check_shape(&self, request: Request) -> Result<(), Refusal> {
        let (len, descriptors) = match request {
            Request::GetFeatures
            | Request::SetOwner
            | Request::ResetOwner
            | Request::GetProtocolFeatures
            | Request::GetQueueNum
            | Request::ResetDevice
            | Request::GetMaxMemSlots => (0, 0..=0),
            Request::SetBackendReqFd | Request::SetLogFd => (0, 1..=1),
            Request::SetLogBase => (16, 1..=1),
            Request::SetFeatures
            | Request::SetProtocolFeatures
            | Request::SetVringNum
            | Request::SetVringBase
            | Request::GetVringBase
            | Request::SetVringEnable => (8, 0..=0),
            Request::SetVringAddr => (40, 0..=0),
            Request::SetVringKick | Request::SetVringCall | Request::SetVringErr => {
                let expected = usize::from(self.u64_or_zero(0) & NO_DESCRIPTOR == 0);
                (8, expected..=expected)
            }
            Request::AddMemReg => (8 + REGION_LEN, 1..=1),
            // Older front-ends pass a descriptor that nobody needs.
            Request::RemMemReg => (8 + REGION_LEN, 0..=1),
            Request::GetInflightFd => (self.description_len(), 0..=0),
            Request::SetInflightFd => (self.description_len(), 1..=1),
            Request::SetMemTable => {
                let count = usize::try_from(self.u32_or_zero(0)).unwrap_or(usize::MAX);
                let count = count.min(DESCRIPTORS_MAX + 1);
                (TABLE_HEADER_LEN + count * REGION_LEN, count..=count)
            }
            Request::GetConfig | Request::SetConfig => {
                let count = usize::try_from(self.u32_or_zero(4)).unwrap_or(usize::MAX);
                (CONFIG_HEADER_LEN + count.min(CONFIG_BYTES_MAX), 0..=0)
            }
        };
        if self.body.len() != len {
            let got = self.body.len();
            return Err(Refusal::Length { request, got });
        }
        if !descriptors.contains(&self.descriptors.len()) {
            let got = self.descriptors.len();
            return Err(Refusal::Descriptors { request, got });
        }
        Ok(())
    }

    fn check_content(&self, request: Request, limits: MessageLimits) -> Result<(), Refusal> {
        match request {
            Request::SetVringNum => {
                self.check_queue(u64::from(self.u32_at(0)), limits)?;
                let size = self.u32_at(4);
                if !size.is_power_of_two() || size > u32::from(limits.queue_size) {
                    let max = limits.queue_size;
                    return Err(Refusal::QueueSize { size, max });
                }
            }
            Request::SetVringBase => {
                self.check_queue(u64::from(self.u32_at(0)), limits)?;
                let value = self.u32_at(4);
                if value > u32::from(u16::MAX) {
                    return Err(Refusal::Value { request, value });
                }
            }
            Request::SetVringEnable => {
                self.check_queue(u64::from(self.u32_at(0)), limits)?;
                let value = self.u32_at(4);
                if value > 1 {
                    return Err(Refusal::Value { request, value });
                }
            }
            Request::SetVringAddr | Request::GetVringBase => {
                self.check_queue(u64::from(self.u32_at(0)), limits)?;
            }
            Request::SetVringKick | Request::SetVringCall | Request::SetVringErr => {
                self.check_queue(self.u64_or_zero(0) & !NO_DESCRIPTOR, limits)?;
                self.check_eventfds(request)?;
            }
            Request::SetLogFd => self.check_eventfds(request)?,
            Request::SetMemTable => {
                if self.descriptors.is_empty() {
                    return Err(Refusal::Descriptors { request, got: 0 });
                }
                for (index, file) in self.descriptors.iter().enumerate() {
                    let region = self.region_at(TABLE_HEADER_LEN + index * REGION_LEN);
                    region.check(Some(file.as_fd()))?;
                }
            }
            Request::AddMemReg => {
                let file = self.descriptors.first().map(AsFd::as_fd);
                self.region_at(8).check(file)?;
            }
            Request::RemMemReg => self.region_at(8).check(None)?,
            Request::GetFeatures
            | Request::SetFeatures
            | Request::SetOwner
            | Request::ResetOwner
            | Request::GetProtocolFeatures
            | Request::SetProtocolFeatures
            | Request::GetQueueNum
            | Request::SetBackendReqFd
            | Request::GetConfig
            | Request::SetConfig
            // Buffer and log are checked where they are opened.
            | Request::GetInflightFd
            | Request::SetInflightFd
            | Request::SetLogBase
            | Request::ResetDevice
            | Request::GetMaxMemSlots => {}
        }
        Ok(())
    }

    fn check_eventfds(&self, request: Request) -> Result<(), Refusal> {
        // Anything else might never become quiet, or make us wait.
        if self.descriptors.iter().all(|fd| is_eventfd(fd.as_fd())) {
            Ok(())
        } else {
            Err(Refusal::NoEventfd { request })
        }
    }

    /// Size and offset in the payload of SET_LOG_BASE.
    #[must_use]
    pub fn log_place(&self) -> (u64, u64) {
        (self.u64_or_zero(0), self.u64_or_zero(8))
    }

    /// With or without the padding of a C structure.
    fn description_len(&self) -> usize {
        match self.body.len() {
            Description::BYTES => Description::BYTES,
            _ => Description::PADDED_BYTES,
        }
    }

    fn check_queue(&self, index: u64, limits: MessageLimits) -> Result<(), Refusal> {
        let queues = limits.queues;
        if index < u64::from(queues) {
            Ok(())
        } else {
            Err(Refusal::Queue { index, queues })
        }
    }

    /// Only where the length was checked.
    fn u32_at(&self, at: usize) -> u32 {
        u32_at(&self.body, at)
    }

    fn u32_or_zero(&self, at: usize) -> u32 {
        if self.body.len() < at + 4 {
            0
        } else {
            self.u32_at(at)
        }
    }

    fn u64_or_zero(&self, at: usize) -> u64 {
        let bytes = self.body.get(at..).and_then(<[u8]>::first_chunk);
        bytes.map_or(0, |bytes| u64::from_ne_bytes(*bytes))
    }

    fn region_at(&self, at: usize) -> Region {
        Region {
            guest_addr: self.u64_or_zero(at),
            size: self.u64_or_zero(at + 8),
            user_addr: self.u64_or_zero(at + 16),
            offset: self.u64_or_zero(at + 24),
        }
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let bytes = bytes[at..].first_chunk().expect("the length was checked");
    u32::from_ne_bytes(*bytes)
}

fn read_exact(
    socket: &UnixStream,
    out: &mut [u8],
    descriptors: &mut Vec<OwnedFd>,
    at_boundary: bool,
) -> Result<(), TransportError> {
    let mut filled = 0;
    while filled < out.len() {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut part = [IoSliceMut::new(&mut out[filled..])];
        let received = match recvmsg(socket, &mut part, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Ok(received) => received,
            Err(Errno::INTR) => continue,
            Err(Errno::CONNRESET) if at_boundary && filled == 0 => {
                return Err(TransportError::Closed);
            }
            Err(error) => return Err(TransportError::Io(error.into())),
        };
        // Taken first: they are ours to close, whatever comes next.
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                descriptors.extend(fds);
            }
        }
        if received.flags.contains(ReturnFlags::CTRUNC) || descriptors.len() > DESCRIPTORS_MAX {
            return Err(TransportError::Descriptors);
        }
        if received.bytes == 0 {
            return Err(if at_boundary && filled == 0 {
                TransportError::Closed
            } else {
                TransportError::Truncated
            });
        }
        filled += received.bytes;
    }
    Ok(())
}

/// What messages are checked against.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MessageLimits {
    /// Number of queues.
    pub queues: u16,
    /// Largest queue size.
    pub queue_size: u16,
}

/// A region of guest memory as a message describes it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Region {
    guest_addr: u64,
    size: u64,
    user_addr: u64,
    offset: u64,
}

impl Region {
    fn check(self, file: Option<BorrowedFd<'_>>) -> Result<(), Refusal> {
        let Self {
            guest_addr,
            size,
            user_addr,
            offset,
        } = self;
        let ends = [guest_addr, user_addr, offset].map(|start| start.checked_add(size));
        let [Some(_), Some(_), Some(end)] = ends else {
            return Err(Refusal::Region { guest_addr, size });
        };
        if size == 0 {
            return Err(Refusal::Region { guest_addr, size });
        }
        let Some(file) = file else {
            return Ok(());
        };
        let stat = fstat(file).map_err(|errno| Refusal::RegionFile {
            source: errno.into(),
        })?;
        // Touching a mapping beyond the end of its file is a SIGBUS. Devices have no length.
        let regular = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
        let file_len = u64::try_from(stat.st_size).unwrap_or(0);
        if regular && end > file_len {
            return Err(Refusal::RegionShort { end, file_len });
        }
        Ok(())
    }
}

/// Why a front-end's message is not taken. It costs the front-end the connection.
#[derive(Debug, Error)]
pub enum Refusal {
    /// Wrong version, a reply, or reserved bits.
    #[error("message {code} has impossible flags {flags:#x}")]
    Flags {
        /// Request code.
        code: u32,
        /// As in the header.
        flags: u32,
    },
    /// Not a request we know, or one of a feature that was not offered.
    #[error("message {code} is unknown or of a feature that was not offered")]
    Unknown {
        /// Request code.
        code: u32,
    },
    /// Wrong length of the payload.
    #[error("{request:?} has a payload of {got} bytes, which is wrong")]
    Length {
        /// Which message.
        request: Request,
        /// Bytes received.
        got: usize,
    },
    /// Wrong number of descriptors.
    #[error("{request:?} came with {got} descriptors, which is wrong")]
    Descriptors {
        /// Which message.
        request: Request,
        /// Descriptors received.
        got: usize,
    },
    /// The descriptor of a ring is no eventfd.
    #[error("{request:?} came with a descriptor that is no eventfd")]
    NoEventfd {
        /// Which message.
        request: Request,
    },
    /// No such queue.
    #[error("there is no queue {index}; the device has {queues}")]
    Queue {
        /// As in the message.
        index: u64,
        /// Queues of the device.
        queues: u16,
    },
    /// An impossible queue size.
    #[error("a queue size of {size} is no power of two up to {max}")]
    QueueSize {
        /// As in the message.
        size: u32,
        /// The largest one offered.
        max: u16,
    },
    /// A value out of range.
    #[error("{request:?} has the impossible value {value}")]
    Value {
        /// Which message.
        request: Request,
        /// As in the message.
        value: u32,
    },
    /// A memory region that is empty or wraps around.
    #[error("a memory region of {size} bytes at {guest_addr:#x} is empty or wraps around")]
    Region {
        /// Guest physical address.
        guest_addr: u64,
        /// Length in bytes.
        size: u64,
    },
    /// A memory region whose file is shorter than the region.
    #[error("a memory region ends at byte {end} of a file that has {file_len}")]
    RegionShort {
        /// Where the region ends in the file.
        end: u64,
        /// Length of the file in bytes.
        file_len: u64,
    },
    /// A message of a protocol feature that the front-end did not take.
    #[error("{request:?} is of a protocol feature that the front-end did not acknowledge")]
    NotAcknowledged {
        /// Which message.
        request: Request,
    },
    /// An in-flight buffer that is not taken.
    #[error(transparent)]
    Inflight(#[from] InflightError),
    /// A log of writes to guest memory that is not taken.
    #[error("the log of writes to guest memory is not taken")]
    Log(#[from] LogError),
    /// A worker is gone.
    #[error(transparent)]
    Worker(#[from] WorkerGone),
    /// More regions of guest memory than were announced.
    #[error("the front-end adds more memory regions than there are slots")]
    Regions,
    /// No descriptor left to keep a copy of one that came.
    #[error("no descriptor is left to serve the connection")]
    Exhausted {
        /// What the kernel said.
        source: io::Error,
    },
    /// The file of a memory region cannot be looked at.
    #[error("the file of a memory region cannot be examined")]
    RegionFile {
        /// What the kernel said.
        source: io::Error,
    },
}

#[cfg(test)]
#[path = "message_tests.rs"]
mod tests;
