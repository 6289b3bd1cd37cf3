// SPDX-License-Identifier: Apache-2.0
//! Where things are in an in-flight buffer (vhost-user, "Inflight I/O tracking", split
//! virtqueues), and what front-ends say about one.
//!
//! ```text
//! queue region: a header, then a state for each descriptor; all regions one after another
//!   0  u64 features        0
//!   8  u16 version         1; 0: not begun
//!  10  u16 desc_num        states that follow
//!  12  u16 last_batch_head head of the list of heads published last
//!  14  u16 used_idx        used index up to which marks are cleared
//!  16  state of descriptor 0
//!        0  u8  inflight   1: the request with this head is in flight
//!        1  5 bytes        unused
//!        6  u16 next       next in the list that `last_batch_head` begins
//!        8  u64 counter    requests were fetched in this order
//! ```
//!
//! All in the machine's byte order: both sides are on one machine. Our private page is the last of
//! the buffer: it is found whatever the front-end says the regions are.

use crate::device::config_space::QUEUE_SIZE_MAX;

/// `features` of a region.
pub const FEATURES_AT: usize = 0;
/// `version` of a region.
pub const VERSION_AT: usize = 8;
/// `desc_num` of a region.
pub const DESC_NUM_AT: usize = 10;
/// `last_batch_head` of a region.
pub const LAST_BATCH_HEAD_AT: usize = 12;
/// `used_idx` of a region.
pub const USED_IDX_AT: usize = 14;

/// Bytes of a region before its states.
const HEADER_BYTES: usize = 16;
/// Bytes of a state.
const STATE_BYTES: usize = 16;
/// Regions begin at multiples of this: no two workers write to one cache line.
const REGION_ALIGN: usize = 64;

/// The version of regions that we read and write.
pub const VERSION: u16 = 1;

/// Alignment of the private page, and of a buffer in its file: what can be mapped.
pub const PAGE_BYTES: usize = 4096;

/// Bytes of the largest buffer that we make: 256 queues of [`QUEUE_SIZE_MAX`].
pub const BUFFER_BYTES_MAX: usize = 5 << 20;

/// Offset of the mark of `head` in its region.
pub fn mark_at(head: u16) -> usize {
    HEADER_BYTES + STATE_BYTES * usize::from(head)
}

/// Offset of `next` of `head` in its region.
pub fn next_at(head: u16) -> usize {
    mark_at(head) + 6
}

/// Offset of the counter of `head` in its region.
pub fn counter_at(head: u16) -> usize {
    mark_at(head) + 8
}

/// For how many queues of how many descriptors a buffer is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Shape {
    /// Number of queues, 1 to 256.
    pub queues: u16,
    /// Descriptors of each, 1 to [`QUEUE_SIZE_MAX`].
    pub queue_size: u16,
}

impl Shape {
    /// Whether there is such a buffer for a device of `queues` queues.
    #[must_use]
    pub fn is_possible(self, queues: u16) -> bool {
        (1..=queues).contains(&self.queues) && (1..=QUEUE_SIZE_MAX).contains(&self.queue_size)
    }

    /// Distance from one region to the next.
    #[must_use]
    pub fn region_bytes(self) -> usize {
        mark_at(self.queue_size).next_multiple_of(REGION_ALIGN)
    }

    /// Bytes of all regions: what a buffer has at least.
    #[must_use]
    pub fn regions_bytes(self) -> usize {
        self.region_bytes() * usize::from(self.queues)
    }

    /// Bytes of a buffer with our private page. At most [`BUFFER_BYTES_MAX`].
    #[must_use]
    pub fn buffer_bytes(self) -> usize {
        self.regions_bytes().next_multiple_of(PAGE_BYTES) + PAGE_BYTES
    }

    /// Where our private page is in a buffer of `size` bytes, if there is room for one and it is
    /// no larger than any that we make.
    #[must_use]
    pub fn page_of(self, size: u64) -> Option<usize> {
        let size = usize::try_from(size).ok()?;
        let possible = size.is_multiple_of(PAGE_BYTES) && size <= BUFFER_BYTES_MAX;
        let at = size.checked_sub(PAGE_BYTES)?;
        (possible && at >= self.regions_bytes()).then_some(at)
    }
}

/// A buffer as GET_INFLIGHT_FD and SET_INFLIGHT_FD describe it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Description {
    /// Its length in bytes.
    pub size: u64,
    /// Where in its file it begins.
    pub offset: u64,
    /// What it is for.
    pub shape: Shape,
}

impl Description {
    /// Bytes of the payload without padding. Front-ends that send a C structure (QEMU, the
    /// `vhost` crate) send [`Description::PADDED_BYTES`].
    pub const BYTES: usize = 20;

    /// Bytes of the payload padded to a multiple of 8.
    pub const PADDED_BYTES: usize = 24;

    /// Reads a payload; `None` if it is too short.
    #[must_use]
    pub fn parse(body: &[u8]) -> Option<Self> {
        let (size, rest) = body.split_first_chunk()?;
        let (offset, rest) = rest.split_first_chunk()?;
        let (queues, rest) = rest.split_first_chunk()?;
        let (queue_size, _) = rest.split_first_chunk()?;
        Some(Self {
            size: u64::from_ne_bytes(*size),
            offset: u64::from_ne_bytes(*offset),
            shape: Shape {
                queues: u16::from_ne_bytes(*queues),
                queue_size: u16::from_ne_bytes(*queue_size),
            },
        })
    }

    /// A payload of `len` bytes, as long as the one that is answered.
    ///
    /// # Panics
    /// If that is shorter than [`Description::BYTES`].
    #[must_use]
    pub fn encode(self, len: usize) -> Vec<u8> {
        let mut body = vec![0; len];
        body[0..8].copy_from_slice(&self.size.to_ne_bytes());
        body[8..16].copy_from_slice(&self.offset.to_ne_bytes());
        body[16..18].copy_from_slice(&self.shape.queues.to_ne_bytes());
        body[18..20].copy_from_slice(&self.shape.queue_size.to_ne_bytes());
        body
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_and_page_are_where_the_specification_leaves_room() {
        let shape = Shape {
            queues: 4,
            queue_size: 128,
        };
        assert_eq!((mark_at(0), next_at(0), counter_at(0)), (16, 22, 24));
        assert_eq!((mark_at(127), counter_at(127)), (2048, 2056));
        assert_eq!(shape.region_bytes(), 2112);
        assert_eq!(shape.buffer_bytes(), 16384);
        assert_eq!(shape.page_of(16384), Some(12288));
        assert_eq!(shape.page_of(20480), Some(16384), "always the last");
        assert_eq!(shape.page_of(12288), None, "no room behind the regions");
        assert_eq!(shape.page_of(16385), None);
        assert_eq!(shape.page_of(1 << 40), None);
        let largest = Shape {
            queues: 256,
            queue_size: 1024,
        };
        assert!(largest.is_possible(256) && largest.buffer_bytes() <= BUFFER_BYTES_MAX);
    }

    #[test]
    fn descriptions_come_with_and_without_padding() {
        let description = Description {
            size: 0x1122_3344_5566_7788,
            offset: 0x1000,
            shape: Shape {
                queues: 3,
                queue_size: 256,
            },
        };
        for len in [Description::BYTES, Description::PADDED_BYTES] {
            let body = description.encode(len);
            assert_eq!(body.len(), len);
            assert_eq!(Description::parse(&body), Some(description));
        }
        assert_eq!(Description::parse(&[0; 19]), None);
    }
}
