// SPDX-License-Identifier: Apache-2.0
//! Walks a descriptor chain of a hostile guest.
//!
//! Every descriptor is read once, the walk is bounded, and a chain that is broken anywhere is an
//! error: it is never taken for a shorter one. (An iterator that just ends where the table stops
//! making sense would turn half a write into a whole one.)

use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::GuestMemory;

/// Most descriptors of one chain, those of an indirect table included.
///
/// A driver must not build chains longer than the queue (virtio 1.2, section 2.7.5.3.1), but
/// Linux does when it has indirect descriptors; this is the largest queue we offer.
pub const CHAIN_DESCRIPTORS_MAX: u32 = 1024;

/// Most bytes of one chain (virtio 1.2, section 2.7.5.2).
pub const CHAIN_BYTES_MAX: u64 = 1 << 32;

/// Bytes of one descriptor.
pub const DESCRIPTOR_BYTES: u32 = 16;

const F_NEXT: u16 = 1;
const F_WRITE: u16 = 2;
const F_INDIRECT: u16 = 4;

/// One buffer of a chain: never empty, and inside guest memory when the chain was walked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Piece {
    /// Guest physical address of the first byte.
    pub addr: u64,
    /// Length in bytes, at least 1.
    pub len: u32,
    /// Whether the device writes it (and else reads it).
    pub writable: bool,
}

/// Where the descriptors of a queue are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DescriptorTable {
    /// Guest physical address.
    pub addr: u64,
    /// Number of descriptors; for a queue this is its size.
    pub count: u32,
}

/// What is wrong with a descriptor chain.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum ChainError {
    /// The head is not in the queue's table.
    #[error("head {head} is outside a table of {count} descriptors")]
    Head {
        /// The index in the available ring.
        head: u16,
        /// Descriptors in the table.
        count: u32,
    },
    /// A `next` field is not in the table.
    #[error("descriptor {next} is outside a table of {count} descriptors")]
    Next {
        /// The index that was followed.
        next: u16,
        /// Descriptors in the table.
        count: u32,
    },
    /// The chain loops or has too many descriptors.
    #[error("the descriptor chain loops or has more than {CHAIN_DESCRIPTORS_MAX} descriptors")]
    TooLong,
    /// The buffers add up to more than 2^32 bytes.
    #[error("the descriptor chain has more than 2^32 bytes")]
    TooLarge,
    /// A descriptor itself is outside guest memory.
    #[error("the descriptor at {addr:#x} is outside guest memory")]
    Descriptor {
        /// Guest physical address.
        addr: u64,
    },
    /// A buffer is outside guest memory.
    #[error("the buffer of {len} bytes at {addr:#x} is outside guest memory")]
    Buffer {
        /// Guest physical address.
        addr: u64,
        /// Length in bytes.
        len: u32,
    },
    /// An indirect descriptor in an indirect table, or one with a successor.
    #[error("an indirect descriptor is nested or not the last one")]
    Indirect,
    /// The length of an indirect table is zero or no multiple of 16.
    #[error("an indirect table of {len} bytes is empty or no multiple of 16")]
    IndirectLength {
        /// Length in bytes.
        len: u32,
    },
}

struct Descriptor {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

fn read_descriptor(
    memory: &GuestMemory,
    table: DescriptorTable,
    index: u16,
) -> Result<Descriptor, ChainError> {
    let outside = |addr| ChainError::Descriptor { addr };
    let offset = u64::from(index) * u64::from(DESCRIPTOR_BYTES);
    let addr = table
        .addr
        .checked_add(offset)
        .filter(|addr| addr.checked_add(u64::from(DESCRIPTOR_BYTES)).is_some())
        .ok_or_else(|| outside(table.addr))?;
    let mut raw = [0u8; 16];
    memory
        .read_slice(&mut raw, GuestAddress(addr))
        .map_err(|_| outside(addr))?;
    let [
        a0,
        a1,
        a2,
        a3,
        a4,
        a5,
        a6,
        a7,
        l0,
        l1,
        l2,
        l3,
        f0,
        f1,
        n0,
        n1,
    ] = raw;
    Ok(Descriptor {
        addr: u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]),
        len: u32::from_le_bytes([l0, l1, l2, l3]),
        flags: u16::from_le_bytes([f0, f1]),
        next: u16::from_le_bytes([n0, n1]),
    })
}

/// Whether `len` bytes at `addr` are guest memory.
pub(super) fn is_inside(memory: &GuestMemory, addr: u64, len: u32) -> bool {
    addr.checked_add(u64::from(len)).is_some()
        && memory.check_range(GuestAddress(addr), len as usize)
}

/// Appends the buffers of the chain that starts at `head` to `pieces`, in the order of the
/// chain and without empty ones. Nothing is read but descriptors.
///
/// # Errors
/// What is wrong with the chain. `pieces` then holds an arbitrary part of it.
pub fn walk(
    memory: &GuestMemory,
    table: DescriptorTable,
    head: u16,
    pieces: &mut Vec<Piece>,
) -> Result<(), ChainError> {
    if u32::from(head) >= table.count {
        return Err(ChainError::Head {
            head,
            count: table.count,
        });
    }
    let mut table = table;
    let mut index = head;
    let mut indirect = false;
    let mut bytes = 0u64;
    let mut descriptors = 0u32;
    loop {
        descriptors += 1;
        // A chain has no more descriptors than its table unless it loops.
        if descriptors > CHAIN_DESCRIPTORS_MAX || (!indirect && descriptors > table.count) {
            return Err(ChainError::TooLong);
        }
        let descriptor = read_descriptor(memory, table, index)?;
        if descriptor.flags & F_INDIRECT != 0 {
            if indirect || descriptor.flags & F_NEXT != 0 {
                return Err(ChainError::Indirect);
            }
            let len = descriptor.len;
            if len == 0 || len % DESCRIPTOR_BYTES != 0 {
                return Err(ChainError::IndirectLength { len });
            }
            indirect = true;
            index = 0;
            table = DescriptorTable {
                addr: descriptor.addr,
                count: len / DESCRIPTOR_BYTES,
            };
            continue;
        }
        bytes += u64::from(descriptor.len);
        if bytes > CHAIN_BYTES_MAX {
            return Err(ChainError::TooLarge);
        }
        if descriptor.len > 0 {
            let Descriptor { addr, len, .. } = descriptor;
            if !is_inside(memory, addr, len) {
                return Err(ChainError::Buffer { addr, len });
            }
            pieces.push(Piece {
                addr,
                len,
                writable: descriptor.flags & F_WRITE != 0,
            });
        }
        if descriptor.flags & F_NEXT == 0 {
            return Ok(());
        }
        index = descriptor.next;
        if u32::from(index) >= table.count {
            return Err(ChainError::Next {
                next: index,
                count: table.count,
            });
        }
    }
}
