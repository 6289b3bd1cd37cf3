// SPDX-License-Identifier: Apache-2.0
//! The memory a lane votes on: private buffers, never guest memory (rule V1).

use super::event::BufferId;

/// What a buffer is wanted for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Purpose {
    /// A request of the guest. May be refused: the request then waits.
    Guest,
    /// Arbitration, repair, resync. May also use what is held back from guests, so that a pool
    /// full of waiting requests cannot keep the work that would let them end from running.
    Settle,
}

/// Private buffers by number. Implemented by the worker's pool and by the simulator.
pub trait Buffers {
    /// A buffer of at least `len_bytes` with undefined content, or `None` if there is none left
    /// for `purpose`.
    fn take(&mut self, len_bytes: usize, purpose: Purpose) -> Option<BufferId>;

    /// Gives a buffer back. Its memory is used again only after every operation on it has
    /// completed; the caller has waited for that.
    fn give(&mut self, buffer: BufferId);

    /// The content. Never called while an operation may be writing to the buffer.
    fn bytes(&self, buffer: BufferId) -> &[u8];

    /// The content, to change. Never called while any operation uses the buffer.
    fn bytes_mut(&mut self, buffer: BufferId) -> &mut [u8];
}
