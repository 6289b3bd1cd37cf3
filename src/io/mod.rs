// SPDX-License-Identifier: Apache-2.0
//! Memory that the kernel may read and write, and the ring it is told through.
//!
//! Nothing here knows what a sector or a vote is. The parts:
//!
//! - [`Pool`]: one mapping cut into buffers, last in first out; the [`Buffers`](crate::quorum::Buffers)
//!   of a lane.
//! - [`Ring`]: io_uring, one system call a batch.
//! - [`BlockWriter`]: blocks on their way to files, for the state record.
//! - [`detour`]: files on which nothing may be tried on the submitting thread.
//! - [`within`]: work that may hang, on a thread of its own.
//! - [`zeroes`]: memory that is zero and stays zero.

mod arena;
mod block_writer;
mod buddy;
pub mod detour;
mod pool;
mod ring;
mod within;
pub mod zeroes;

pub use block_writer::{BlockWriter, WRITER_BLOCK_BYTES, Written};
pub use buddy::{BLOCK_BYTES_MAX, BLOCK_BYTES_MIN};
pub use pool::{Access, Pool, PoolError};
pub use ring::{Completion, Ring, RingError};
pub use within::{Unfinished, within};
