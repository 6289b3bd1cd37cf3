// SPDX-License-Identifier: Apache-2.0
//! What can go wrong for a front-end: one variant for each way.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use thiserror::Error;

use super::request::Status;

/// A failure seen from the driver's side of the socket.
#[derive(Debug, Error)]
pub enum FrontEndError {
    /// Nobody listens on the socket, or it cannot be reached.
    #[error("cannot connect to the vhost-user socket {}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// A vhost-user message could not be sent, was refused, or was answered with nonsense.
    #[error("vhost-user message {message} failed")]
    Message {
        /// Name of the message as in the vhost-user specification.
        message: &'static str,
        /// What the protocol layer says.
        #[source]
        source: vhost::Error,
    },
    /// The back-end did not answer a message in time; the connection was shut down.
    #[error("no answer to the vhost-user message {message} within {after:?}")]
    NoAnswer {
        /// Name of the message as in the vhost-user specification.
        message: &'static str,
        /// How long was waited.
        after: Duration,
    },
    /// The back-end does not offer what this front-end cannot do without.
    #[error("the back-end does not offer {feature}")]
    Missing {
        /// Name of the feature bit.
        feature: &'static str,
    },
    /// The back-end has fewer queues than wanted.
    #[error("{wanted} queues are wanted, the back-end offers {offered}")]
    TooFewQueues {
        /// From the options.
        wanted: u16,
        /// From GET_QUEUE_NUM.
        offered: u64,
    },
    /// The guest memory cannot hold the rings and an arena for every queue.
    #[error("{memory_bytes} bytes of guest memory are too few for {queues} queues of {queue_size}")]
    MemoryTooSmall {
        /// From the options.
        memory_bytes: u64,
        /// From the options.
        queues: u16,
        /// From the options.
        queue_size: u16,
    },
    /// An address is outside the guest memory.
    #[error("guest address {address:#x} is outside the guest memory")]
    OutsideMemory {
        /// The address.
        address: u64,
    },
    /// Creating the guest memory, an event descriptor or an epoll instance failed.
    #[error("cannot {what}")]
    System {
        /// What was attempted.
        what: &'static str,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// The guest memory could not be mapped.
    #[error("cannot map the guest memory")]
    Map(#[source] vm_memory::mmap::FromRangesError),
    /// No free descriptors or no free memory for another request: wait for one first.
    #[error("queue {queue} is full")]
    Full {
        /// Index of the queue.
        queue: u16,
    },
    /// The request is longer than a descriptor can say.
    #[error("a buffer of {bytes} bytes does not fit in a descriptor")]
    TooLong {
        /// Its length.
        bytes: usize,
    },
    /// The back-end closed the connection.
    #[error("the back-end closed the connection")]
    Closed,
    /// Nothing was completed in time.
    #[error("no request of queue {queue} was completed within {after:?}")]
    NoCompletion {
        /// Index of the queue.
        queue: u16,
        /// How long was waited.
        after: Duration,
    },
    /// A request was completed, but the interrupt that was asked for did not come.
    #[error("queue {queue} has a completion whose interrupt did not come within {after:?}")]
    LostInterrupt {
        /// Index of the queue.
        queue: u16,
        /// How long was waited.
        after: Duration,
    },
    /// The used ring names a descriptor chain that is not in flight: completed twice, or never
    /// submitted.
    #[error("queue {queue}: the used ring names head {head}, which is not in flight")]
    UnknownHead {
        /// Index of the queue.
        queue: u16,
        /// The id found in the used ring.
        head: u32,
    },
    /// A token that no request of this queue has, or that was already waited for.
    #[error("queue {queue} has no request with this token")]
    UnknownToken {
        /// Index of the queue.
        queue: u16,
    },
    /// The device completed the request with a status other than OK.
    #[error("the {request} request at sector {sector} ended with status {status:?}")]
    Refused {
        /// Kind of request.
        request: &'static str,
        /// Its first sector.
        sector: u64,
        /// What the device said.
        status: Status,
    },
    /// The configuration space that was received is too short to be understood.
    #[error("the configuration space has {bytes} bytes, at least {needed} are needed")]
    ShortConfig {
        /// Bytes received.
        bytes: usize,
        /// Bytes needed.
        needed: usize,
    },
}
