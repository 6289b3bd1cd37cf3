// SPDX-License-Identifier: Apache-2.0
//! Requests of the virtio block device as the driver writes them, and how they end
//! (virtio 1.2, section 5.2.6).

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};

/// Length of the request header: type (4), reserved (4), sector (8), all little-endian.
pub const HEADER_BYTES: usize = 16;

/// Length of one segment of a discard or write zeroes request.
const SEGMENT_BYTES: usize = 16;

/// What is asked of the device.
#[derive(Clone, Copy, Debug)]
pub enum Request<'a> {
    /// Read `len` bytes from `sector` on.
    Read {
        /// First sector.
        sector: u64,
        /// Bytes; the device refuses what is no multiple of 512.
        len: usize,
    },
    /// Write `data` from `sector` on.
    Write {
        /// First sector.
        sector: u64,
        /// The bytes; the device refuses what is no multiple of 512 long.
        data: &'a [u8],
    },
    /// Make completed writes durable.
    Flush,
    /// Tell that these sectors are no longer needed.
    Discard(&'a [Segment]),
    /// Make these sectors read back as zeroes.
    WriteZeroes(&'a [Segment]),
    /// Ask for the serial number, 20 bytes.
    GetId,
    /// Any type with any payload, for what a well-behaved driver never sends.
    Raw {
        /// The type field.
        kind: u32,
        /// The sector field.
        sector: u64,
        /// Bytes the device may read after the header.
        out: &'a [u8],
        /// Bytes the device may write before the status byte.
        in_len: usize,
    },
}

impl Request<'_> {
    /// Name for messages.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Read { .. } => "read",
            Self::Write { .. } => "write",
            Self::Flush => "flush",
            Self::Discard(_) => "discard",
            Self::WriteZeroes(_) => "write zeroes",
            Self::GetId => "get-id",
            Self::Raw { .. } => "raw",
        }
    }

    /// First sector, 0 where the request has none.
    #[must_use]
    pub fn sector(&self) -> u64 {
        match self {
            Self::Read { sector, .. } | Self::Write { sector, .. } | Self::Raw { sector, .. } => {
                *sector
            }
            Self::Discard(segments) | Self::WriteZeroes(segments) => {
                segments.first().map_or(0, |segment| segment.sector)
            }
            Self::Flush | Self::GetId => 0,
        }
    }

    /// The header. Discard and write zeroes carry their sectors in segments and leave the
    /// header's sector 0 (section 5.2.6.1).
    pub(super) fn header(&self) -> [u8; HEADER_BYTES] {
        let (kind, sector) = match self {
            Self::Read { sector, .. } => (VIRTIO_BLK_T_IN, *sector),
            Self::Write { sector, .. } => (VIRTIO_BLK_T_OUT, *sector),
            Self::Flush => (VIRTIO_BLK_T_FLUSH, 0),
            Self::Discard(_) => (VIRTIO_BLK_T_DISCARD, 0),
            Self::WriteZeroes(_) => (VIRTIO_BLK_T_WRITE_ZEROES, 0),
            Self::GetId => (VIRTIO_BLK_T_GET_ID, 0),
            Self::Raw { kind, sector, .. } => (*kind, *sector),
        };
        let mut header = [0; HEADER_BYTES];
        header[0..4].copy_from_slice(&kind.to_le_bytes());
        header[8..16].copy_from_slice(&sector.to_le_bytes());
        header
    }

    /// What the device reads after the header.
    pub(super) fn payload(&self) -> Vec<u8> {
        match self {
            Self::Write { data, .. } => data.to_vec(),
            Self::Raw { out, .. } => out.to_vec(),
            Self::Discard(segments) | Self::WriteZeroes(segments) => {
                segments.iter().flat_map(Segment::encode).collect()
            }
            Self::Read { .. } | Self::Flush | Self::GetId => Vec::new(),
        }
    }

    /// Bytes the device writes before the status byte.
    pub(super) fn in_len(&self) -> usize {
        match self {
            Self::Read { len, .. } => *len,
            Self::GetId => VIRTIO_BLK_ID_BYTES as usize,
            Self::Raw { in_len, .. } => *in_len,
            Self::Write { .. } | Self::Flush | Self::Discard(_) | Self::WriteZeroes(_) => 0,
        }
    }
}

/// A run of sectors in a discard or write zeroes request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Segment {
    /// First sector.
    pub sector: u64,
    /// Number of sectors.
    pub sectors: u32,
    /// Bit 0: the device may deallocate (write zeroes only); the others are reserved.
    pub flags: u32,
}

impl Segment {
    /// `sectors` sectors from `sector` on, no flags.
    #[must_use]
    pub fn new(sector: u64, sectors: u32) -> Self {
        Self {
            sector,
            sectors,
            flags: 0,
        }
    }

    fn encode(&self) -> [u8; SEGMENT_BYTES] {
        let mut bytes = [0; SEGMENT_BYTES];
        bytes[0..8].copy_from_slice(&self.sector.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.sectors.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.flags.to_le_bytes());
        bytes
    }
}

/// Names a request from its submission until its completion is taken.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Token(pub(super) u64);

/// The last byte the device writes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Status {
    /// VIRTIO_BLK_S_OK.
    Ok,
    /// VIRTIO_BLK_S_IOERR.
    IoError,
    /// VIRTIO_BLK_S_UNSUPP.
    Unsupported,
    /// No status the specification knows. [`Status::UNTOUCHED`] if the device wrote none.
    Unknown(u8),
}

impl Status {
    /// What stands in the status byte until the device overwrites it.
    pub const UNTOUCHED: u8 = 0xee;

    pub(super) fn from_byte(byte: u8) -> Self {
        match u32::from(byte) {
            VIRTIO_BLK_S_OK => Self::Ok,
            VIRTIO_BLK_S_IOERR => Self::IoError,
            VIRTIO_BLK_S_UNSUPP => Self::Unsupported,
            _ => Self::Unknown(byte),
        }
    }
}

/// How a request ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Completion {
    /// From the submission.
    pub token: Token,
    /// What the device wrote last.
    pub status: Status,
    /// The length in the used ring: bytes the device says it wrote, status included.
    pub used_bytes: u32,
    /// What stands in the device-writable part before the status byte.
    pub data: Vec<u8>,
}

/// How a request is cut into descriptors. Any cut is legal since the legacy layout was given up
/// (virtio 1.2, section 2.7.4): the device must take the bytes in order and ignore the borders.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Framing {
    /// The header is cut into pieces of at most this many bytes, at least 1.
    pub header_piece: usize,
    /// The payload is cut into pieces of at most this many bytes, at least 1.
    pub data_piece: usize,
    /// No border between header and payload, and none between payload and status byte: a read of
    /// one sector becomes a descriptor of 16 bytes and one of 513. Pieces are then of
    /// `data_piece` bytes throughout.
    pub joined: bool,
    /// Bytes left free between two pieces, so that they are not contiguous in memory.
    pub gap: usize,
    /// Distance of the first byte from a 512-byte boundary.
    pub skew: usize,
}

impl Default for Framing {
    /// As Linux does it: header, contiguous aligned payload, status.
    fn default() -> Self {
        Self {
            header_piece: HEADER_BYTES,
            data_piece: usize::MAX,
            joined: false,
            gap: 0,
            skew: 0,
        }
    }
}

impl Framing {
    /// Lengths of the device-readable pieces for a payload of `payload` bytes.
    pub(super) fn readable(&self, payload: usize) -> Vec<usize> {
        if self.joined {
            return cut(HEADER_BYTES + payload, self.data_piece);
        }
        let mut pieces = cut(HEADER_BYTES, self.header_piece);
        pieces.extend(cut(payload, self.data_piece));
        pieces
    }

    /// Lengths of the device-writable pieces for `in_len` bytes before the status byte.
    pub(super) fn writable(&self, in_len: usize) -> Vec<usize> {
        if self.joined {
            return cut(in_len + 1, self.data_piece);
        }
        let mut pieces = cut(in_len, self.data_piece);
        pieces.push(1);
        pieces
    }
}

/// `len` as a sum of pieces of at most `piece`.
fn cut(len: usize, piece: usize) -> Vec<usize> {
    let mut pieces = Vec::new();
    let mut left = len;
    while left > 0 {
        let next = left.min(piece.max(1));
        pieces.push(next);
        left -= next;
    }
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_of_a_write_is_little_endian() {
        let request = Request::Write {
            sector: 0x0102_0304_0506,
            data: &[],
        };
        let header = request.header();
        assert_eq!(header[..8], [1, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(header[8..], [6, 5, 4, 3, 2, 1, 0, 0]);
    }

    #[test]
    fn framing_cuts_any_way() {
        let linux = Framing::default();
        assert_eq!(linux.readable(1024), [16, 1024]);
        assert_eq!(linux.writable(512), [512, 1]);
        assert_eq!(linux.writable(0), [1]);
        let joined = Framing {
            joined: true,
            ..linux
        };
        assert_eq!(joined.readable(512), [528]);
        assert_eq!(joined.writable(512), [513]);
        let pieces = Framing {
            header_piece: 7,
            data_piece: 100,
            ..linux
        };
        assert_eq!(pieces.readable(250), [7, 7, 2, 100, 100, 50]);
    }
}
