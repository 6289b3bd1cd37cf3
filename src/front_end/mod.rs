// SPDX-License-Identifier: Apache-2.0
//! A small virtio block driver with a vhost-user front-end of its own: what a virtual machine
//! and its guest would be to a back-end, in one process and without either.
//!
//! The demonstration drives the daemon with it, and so do the tests, which is why it can also do
//! what no sane driver does. It works with any vhost-user-blk back-end.
//!
//! - `session`: the connection, negotiation, start and stop ([`FrontEnd`]).
//! - `queue`: requests become descriptor chains, and completions come back ([`Queue`]).
//! - `ring`: a split virtqueue in guest memory ([`Ring`]).
//! - `request`, `config`, `options`: the formats of virtio-blk, and what is asked for.
//! - `memory`, `watchdog`: guest memory that is shared; a limit on waiting.

mod config;
mod error;
mod memory;
mod options;
mod queue;
mod request;
mod ring;
mod session;
mod watchdog;

pub use config::{CONFIG_BYTES, Config};
pub use error::FrontEndError;
pub use memory::HIGH_BASE;
pub use options::{Manners, MemoryBy, Options, features};
pub use queue::{Buffer, Queue};
pub use request::{Completion, Framing, HEADER_BYTES, Request, Segment, Status, Token};
pub use ring::{Descriptor, Ring, Used};
pub use session::FrontEnd;
