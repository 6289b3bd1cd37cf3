// SPDX-License-Identifier: Apache-2.0
//! A lane's buffers, and a watch over how the core treats them (rule V7).

use std::cell::Cell;

use crate::content::{SECTOR_LEN, fill_sector, sector_value};
use crate::quorum::{BufferId, Buffers, Purpose};

/// Longest request of the simulated guest, in sectors.
pub const REQUEST_SECTORS: usize = 16;

/// Longest piece of an extent that maintenance works on at once, in sectors.
const PIECE_SECTORS: usize = 64;

struct Buffer {
    bytes: Vec<u8>,
    taken: bool,
    /// Operations that fill it.
    filled_by: u32,
    /// Operations that write from it.
    read_by: u32,
    /// Holds what a guest wrote, not what a settlement decided.
    guest: bool,
}

/// The buffers of one lane.
pub struct Pool {
    buffers: Vec<Buffer>,
    free: Vec<u32>,
    reserve: usize,
    misuse: Cell<Option<&'static str>>,
}

impl Pool {
    /// `guest` buffers for requests and `reserve` more for settlements.
    pub fn new(guest: usize, reserve: usize) -> Self {
        let count = guest + reserve;
        Self {
            buffers: (0..count)
                .map(|_| Buffer {
                    bytes: vec![0xAA; REQUEST_SECTORS * SECTOR_LEN],
                    taken: false,
                    filled_by: 0,
                    read_by: 0,
                    guest: false,
                })
                .collect(),
            free: (0..u32::try_from(count).expect("a small pool"))
                .rev()
                .collect(),
            reserve,
            misuse: Cell::new(None),
        }
    }

    /// The first breach of the rules of buffers since the last call.
    pub fn misuse(&self) -> Option<&'static str> {
        self.misuse.take()
    }

    pub fn all_free(&self) -> bool {
        self.free.len() == self.buffers.len()
    }

    fn get(&mut self, buffer: BufferId) -> &mut Buffer {
        &mut self.buffers[buffer.0 as usize]
    }

    /// A buffer for a guest's write; every sector of it holds what `value` says.
    pub fn take_filled(&mut self, values: impl Iterator<Item = u64>) -> Option<BufferId> {
        let id = self.take(REQUEST_SECTORS * SECTOR_LEN, Purpose::Guest)?;
        let buffer = self.get(id);
        buffer.guest = true;
        for (sector, value) in buffer.bytes.chunks_exact_mut(SECTOR_LEN).zip(values) {
            fill_sector(sector, value);
        }
        Some(id)
    }

    pub fn is_guest(&self, buffer: BufferId) -> bool {
        self.buffers[buffer.0 as usize].guest
    }

    /// An operation begins to fill (`fills`) the buffer or to write from it.
    pub fn begin(&mut self, buffer: BufferId, fills: bool) -> Result<(), &'static str> {
        let buffer = self.get(buffer);
        if !buffer.taken {
            return Err("an operation uses a buffer that was given back");
        }
        if buffer.filled_by > 0 || (fills && buffer.read_by > 0) {
            return Err("two operations use a buffer and one of them fills it");
        }
        let users = if fills {
            &mut buffer.filled_by
        } else {
            &mut buffer.read_by
        };
        *users += 1;
        Ok(())
    }

    pub fn end(&mut self, buffer: BufferId, fills: bool) {
        let buffer = self.get(buffer);
        let users = if fills {
            &mut buffer.filled_by
        } else {
            &mut buffer.read_by
        };
        *users -= 1;
    }

    /// What an operation transfers into the buffer.
    pub fn put(&mut self, buffer: BufferId, index: usize, value: u64) {
        let at = index * SECTOR_LEN;
        fill_sector(&mut self.get(buffer).bytes[at..at + SECTOR_LEN], value);
    }

    /// What an operation finds in the buffer.
    pub fn value(&self, buffer: BufferId, index: usize) -> u64 {
        let at = index * SECTOR_LEN;
        sector_value(&self.buffers[buffer.0 as usize].bytes[at..at + SECTOR_LEN])
    }
}

impl Buffers for Pool {
    fn take(&mut self, len_bytes: usize, purpose: Purpose) -> Option<BufferId> {
        if len_bytes > PIECE_SECTORS * SECTOR_LEN {
            self.misuse
                .set(Some("a buffer longer than any request was taken"));
        }
        let kept_back = if purpose == Purpose::Guest {
            self.reserve
        } else {
            0
        };
        if self.free.len() <= kept_back {
            return None;
        }
        let id = BufferId(self.free.pop()?);
        let buffer = self.get(id);
        if buffer.bytes.len() < len_bytes {
            buffer.bytes.resize(len_bytes, 0xAA);
        }
        buffer.taken = true;
        buffer.guest = false;
        Some(id)
    }

    fn give(&mut self, buffer: BufferId) {
        let known = self.get(buffer);
        let breach = if !known.taken {
            Some("a buffer was given back twice")
        } else if known.filled_by + known.read_by > 0 {
            Some("a buffer was given back while an operation used it")
        } else {
            None
        };
        if breach.is_some() {
            self.misuse.set(breach);
            return;
        }
        known.taken = false;
        self.free.push(buffer.0);
    }

    fn bytes(&self, buffer: BufferId) -> &[u8] {
        let buffer = &self.buffers[buffer.0 as usize];
        if !buffer.taken || buffer.filled_by > 0 {
            self.misuse
                .set(Some("a buffer was looked at while an operation filled it"));
        }
        &buffer.bytes
    }

    fn bytes_mut(&mut self, buffer: BufferId) -> &mut [u8] {
        let known = &self.buffers[buffer.0 as usize];
        if !known.taken || known.filled_by + known.read_by > 0 {
            self.misuse
                .set(Some("a buffer was changed while an operation used it"));
        }
        &mut self.get(buffer).bytes
    }
}
