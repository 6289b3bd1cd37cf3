// SPDX-License-Identifier: Apache-2.0
//! A virtio-blk request: parsed from a descriptor chain into a slot that is used again, checked
//! against the disk, and later answered.
//!
//! Header, lengths and addresses are read once (rule L4); whatever the guest does to its memory
//! afterwards changes the content of its own data at most.

use std::ops::Range;

use thiserror::Error;
use vm_memory::{Bytes, GuestAddress};

use super::GuestMemory;
use super::chain::{self, ChainError, DescriptorTable, Piece};
use super::config_space::{
    DISCARD_SECTORS_MAX, DISCARD_SEGMENTS_MAX, REQUEST_BYTES_MAX, SERIAL_BYTES,
    WRITE_ZEROES_SECTORS_MAX, WRITE_ZEROES_SEGMENTS_MAX,
};
use crate::units::{SECTOR_BYTES, SectorRange};

const HEADER_BYTES: u64 = 16;
const SEGMENT_BYTES: u64 = 16;
const FLAG_UNMAP: u32 = 1;

const TYPE_IN: u32 = 0;
const TYPE_OUT: u32 = 1;
const TYPE_FLUSH: u32 = 4;
const TYPE_GET_ID: u32 = 8;
const TYPE_DISCARD: u32 = 11;
const TYPE_WRITE_ZEROES: u32 = 13;

/// The status byte of a request (virtio 1.2, section 5.2.6).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BlockStatus {
    /// VIRTIO_BLK_S_OK.
    Ok,
    /// VIRTIO_BLK_S_IOERR.
    IoError,
    /// VIRTIO_BLK_S_UNSUPP.
    Unsupported,
}

impl BlockStatus {
    /// The byte the guest sees.
    #[must_use]
    pub fn byte(self) -> u8 {
        match self {
            Self::Ok => 0,
            Self::IoError => 1,
            Self::Unsupported => 2,
        }
    }
}

/// What requests are checked against.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RequestRules {
    /// Sectors of the disk.
    pub sectors: u64,
    /// Sectors in a logical block: a power of two, 1 to 8.
    pub block_sectors: u32,
    /// Whether writes, discards and write zeroes are refused (rule Z4).
    pub read_only: bool,
    /// Whether the driver negotiated DISCARD.
    pub discard: bool,
    /// Whether the driver negotiated WRITE_ZEROES.
    pub write_zeroes: bool,
    /// Answer to GET_ID, NUL-padded.
    pub serial: [u8; SERIAL_BYTES],
}

/// What a request asks of the disk. Ranges are inside the disk; all but those of reads begin
/// and end at multiples of the block size.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RequestKind {
    /// Fill the data with `range`, which need not be aligned to the block size.
    Read {
        /// Sectors, exactly as many as the data has room for.
        range: SectorRange,
    },
    /// Write the data to `range`.
    Write {
        /// Sectors, exactly as many as there are data.
        range: SectorRange,
    },
    /// Make earlier writes durable.
    Flush,
    /// Discard each of [`GuestRequest::segments`], of which there is at least one.
    Discard,
    /// Zero each of [`GuestRequest::segments`], of which there is at least one.
    WriteZeroes,
}

/// A range of a discard or of write zeroes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Segment {
    /// Sectors.
    pub range: SectorRange,
    /// Whether space may be given back; never set for a discard.
    pub unmap: bool,
}

/// What became of a descriptor chain.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Parsed {
    /// A request for the disk: see [`GuestRequest::kind`].
    Request,
    /// Nothing for the disk to do: to be finished with this status at once. The data of a
    /// GET_ID are in guest memory already.
    Answer(BlockStatus),
    /// No request at all. It fails alone (rule G1): with an I/O error where there is a status
    /// byte, else with a used length of zero.
    Malformed {
        /// What is wrong.
        error: RequestError,
        /// Guest address of the status byte, if the chain has one.
        status_addr: Option<u64>,
    },
}

/// Why a descriptor chain is no request.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum RequestError {
    /// The chain cannot be followed.
    #[error(transparent)]
    Chain(#[from] ChainError),
    /// A buffer to read after one to write (virtio 1.2, section 2.7.4.2).
    #[error("a device-readable buffer follows a device-writable one")]
    Order,
    /// Less than a header.
    #[error("the request has {len} readable bytes, fewer than a header")]
    Header {
        /// Readable bytes of the chain.
        len: u64,
    },
    /// No byte for the status.
    #[error("the request has no writable byte for its status")]
    NoStatus,
}

/// Guest memory that was there when the request came is gone now.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
#[error("{len} bytes at offset {offset} of the request's data are not in guest memory")]
pub struct DataError {
    /// Offset in the data, in bytes.
    pub offset: u64,
    /// Length in bytes.
    pub len: usize,
}

/// A request, in a slot that is used again: after the first few requests no parse allocates.
#[derive(Debug)]
pub struct GuestRequest {
    /// All buffers of the chain; first and last one of the data are trimmed.
    pieces: Vec<Piece>,
    /// Which of them hold the data.
    data: Range<usize>,
    data_len: u64,
    kind: RequestKind,
    segments: Vec<Segment>,
    status_addr: u64,
    written: u32,
}

impl Default for GuestRequest {
    fn default() -> Self {
        Self {
            pieces: Vec::new(),
            data: 0..0,
            data_len: 0,
            kind: RequestKind::Flush,
            segments: Vec::new(),
            status_addr: 0,
            written: 0,
        }
    }
}

impl GuestRequest {
    /// An empty slot.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Reads the chain at `head` into this slot and checks it against `rules`.
    pub fn parse(
        &mut self,
        memory: &GuestMemory,
        table: DescriptorTable,
        head: u16,
        rules: &RequestRules,
    ) -> Parsed {
        self.pieces.clear();
        self.segments.clear();
        self.data = 0..0;
        self.data_len = 0;
        self.written = 0;
        if let Err(error) = chain::walk(memory, table, head, &mut self.pieces) {
            // Where a chain cannot be followed, its last byte is not known.
            let error = error.into();
            return Parsed::Malformed {
                error,
                status_addr: None,
            };
        }
        match self.read_header(memory) {
            Ok((kind, sector)) => self.interpret(memory, kind, sector, rules),
            Err(error) => Parsed::Malformed {
                error,
                status_addr: self.last_writable_byte(),
            },
        }
    }

    /// What is asked. Only after [`Parsed::Request`].
    #[must_use]
    pub fn kind(&self) -> RequestKind {
        self.kind
    }

    /// The ranges of a discard or of write zeroes, in ascending order: none is empty, and no two
    /// overlap.
    #[must_use]
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// Bytes of data to be read or written.
    #[must_use]
    pub fn data_len(&self) -> u64 {
        self.data_len
    }

    /// The buffers of the chain, those that hold the data trimmed to it.
    pub(super) fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// Copies data of the guest, from byte `offset` of the request's data on. The one copy of
    /// rule L4: call it once for every byte.
    ///
    /// # Errors
    /// If the range is not all in the data and in guest memory.
    pub fn copy_from_guest(
        &self,
        memory: &GuestMemory,
        offset: u64,
        out: &mut [u8],
    ) -> Result<(), DataError> {
        let error = DataError {
            offset,
            len: out.len(),
        };
        let mut rest = out;
        for (addr, len) in self.locate(offset) {
            if rest.is_empty() {
                break;
            }
            let (now, later) = rest.split_at_mut(len.min(rest.len()));
            memory
                .read_slice(now, GuestAddress(addr))
                .map_err(|_| error)?;
            rest = later;
        }
        if rest.is_empty() { Ok(()) } else { Err(error) }
    }

    /// Copies `bytes` to the guest, to byte `offset` of the request's data.
    ///
    /// # Errors
    /// If the range is not all in the data and in guest memory.
    pub fn copy_to_guest(
        &mut self,
        memory: &GuestMemory,
        offset: u64,
        bytes: &[u8],
    ) -> Result<(), DataError> {
        let error = DataError {
            offset,
            len: bytes.len(),
        };
        let mut rest = bytes;
        for (addr, len) in self.locate(offset) {
            if rest.is_empty() {
                break;
            }
            let (now, later) = rest.split_at(len.min(rest.len()));
            memory
                .write_slice(now, GuestAddress(addr))
                .map_err(|_| error)?;
            rest = later;
        }
        if !rest.is_empty() {
            return Err(error);
        }
        let len = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        self.written = self.written.saturating_add(len);
        Ok(())
    }

    /// Writes the status byte. Returns the used length: bytes written to guest memory, this one
    /// included, or zero if the memory of the status byte is gone.
    pub fn finish(&mut self, memory: &GuestMemory, status: BlockStatus) -> u32 {
        let addr = GuestAddress(self.status_addr);
        match memory.write_slice(&[status.byte()], addr) {
            Ok(()) => self.written.saturating_add(1),
            Err(_) => 0,
        }
    }

    /// The parts of guest memory from byte `offset` of the data on.
    fn locate(&self, offset: u64) -> impl Iterator<Item = (u64, usize)> {
        let mut skip = offset;
        self.pieces[self.data.clone()]
            .iter()
            .filter_map(move |piece| {
                let len = u64::from(piece.len);
                if skip >= len {
                    skip -= len;
                    return None;
                }
                let addr = piece.addr + skip;
                let len = usize::try_from(len - skip).expect("a u32 fits in a usize");
                skip = 0;
                Some((addr, len))
            })
    }

    fn last_writable_byte(&self) -> Option<u64> {
        let piece = self.pieces.iter().rev().find(|piece| piece.writable)?;
        Some(piece.addr + u64::from(piece.len) - 1)
    }

    /// Splits header and status off, and sets the slot to the data between them: the readable
    /// ones, unless [`GuestRequest::use_writable_data`] is called.
    fn read_header(&mut self, memory: &GuestMemory) -> Result<(u32, u64), RequestError> {
        let readable = self.pieces.iter().take_while(|p| !p.writable).count();
        if self.pieces[readable..].iter().any(|p| !p.writable) {
            return Err(RequestError::Order);
        }
        self.status_addr = self.last_writable_byte().ok_or(RequestError::NoStatus)?;
        self.data = 0..readable;
        self.data_len = self.count_data();
        let error = RequestError::Header { len: self.data_len };
        if self.data_len < HEADER_BYTES {
            return Err(error);
        }
        let mut header = [0u8; 16];
        // The chain's buffers were checked a moment ago, against the same memory.
        self.copy_from_guest(memory, 0, &mut header)
            .map_err(|_| error)?;
        self.trim_front(HEADER_BYTES);
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
        Ok((
            u32::from_le_bytes([t0, t1, t2, t3]),
            u64::from_le_bytes(sector),
        ))
    }

    fn count_data(&self) -> u64 {
        self.pieces[self.data.clone()]
            .iter()
            .map(|piece| u64::from(piece.len))
            .sum()
    }

    fn trim_front(&mut self, bytes: u64) {
        let mut left = bytes;
        self.data_len -= bytes;
        while left > 0 {
            let piece = &mut self.pieces[self.data.start];
            let len = u64::from(piece.len);
            if len <= left {
                left -= len;
                self.data.start += 1;
                continue;
            }
            let cut = u32::try_from(left).expect("less than the length of a piece");
            piece.addr += left;
            piece.len -= cut;
            left = 0;
        }
    }

    /// Sets the slot to the writable data: all writable bytes but the last, the status.
    fn use_writable_data(&mut self) {
        self.data = self.data.end..self.pieces.len();
        let last = self
            .pieces
            .last_mut()
            .expect("there is a writable byte for the status");
        last.len -= 1;
        if last.len == 0 {
            self.data.end -= 1;
        }
        self.data_len = self.count_data();
    }

    fn interpret(
        &mut self,
        memory: &GuestMemory,
        kind: u32,
        sector: u64,
        rules: &RequestRules,
    ) -> Parsed {
        match kind {
            TYPE_IN => {
                self.use_writable_data();
                // An unaligned read is served: whoever reads rounds it out (rule L2).
                self.transfer(sector, rules, 1, |range| RequestKind::Read { range })
            }
            TYPE_OUT if rules.read_only => Parsed::Answer(BlockStatus::IoError),
            TYPE_OUT => self.transfer(sector, rules, rules.block_sectors, |range| {
                RequestKind::Write { range }
            }),
            TYPE_FLUSH => {
                self.kind = RequestKind::Flush;
                Parsed::Request
            }
            TYPE_GET_ID => self.answer_id(memory, rules),
            TYPE_DISCARD if rules.discard => self.ranges(
                memory,
                rules,
                RequestKind::Discard,
                DISCARD_SEGMENTS_MAX,
                DISCARD_SECTORS_MAX,
            ),
            TYPE_WRITE_ZEROES if rules.write_zeroes => self.ranges(
                memory,
                rules,
                RequestKind::WriteZeroes,
                WRITE_ZEROES_SEGMENTS_MAX,
                WRITE_ZEROES_SECTORS_MAX,
            ),
            _ => Parsed::Answer(BlockStatus::Unsupported),
        }
    }

    fn transfer(
        &mut self,
        sector: u64,
        rules: &RequestRules,
        align_sectors: u32,
        kind: impl Fn(SectorRange) -> RequestKind,
    ) -> Parsed {
        if !self.data_len.is_multiple_of(SECTOR_BYTES) || self.data_len > REQUEST_BYTES_MAX {
            return Parsed::Answer(BlockStatus::IoError);
        }
        let count = u32::try_from(self.data_len / SECTOR_BYTES).expect("a chain is below 2^32");
        if count == 0 {
            // Like QEMU: nothing to do is done, if it is inside the disk.
            let inside = sector <= rules.sectors;
            return Parsed::Answer(if inside {
                BlockStatus::Ok
            } else {
                BlockStatus::IoError
            });
        }
        match checked_range(sector, count, rules, align_sectors) {
            Some(range) => {
                self.kind = kind(range);
                Parsed::Request
            }
            None => Parsed::Answer(BlockStatus::IoError),
        }
    }

    fn answer_id(&mut self, memory: &GuestMemory, rules: &RequestRules) -> Parsed {
        self.use_writable_data();
        let len = usize::try_from(self.data_len).map_or(SERIAL_BYTES, |len| len.min(SERIAL_BYTES));
        let status = match self.copy_to_guest(memory, 0, &rules.serial[..len]) {
            Ok(()) => BlockStatus::Ok,
            Err(_) => BlockStatus::IoError,
        };
        Parsed::Answer(status)
    }

    fn ranges(
        &mut self,
        memory: &GuestMemory,
        rules: &RequestRules,
        kind: RequestKind,
        segments_max: u32,
        sectors_max: u32,
    ) -> Parsed {
        if rules.read_only {
            return Parsed::Answer(BlockStatus::IoError);
        }
        if self.data_len > u64::from(segments_max) * SEGMENT_BYTES {
            return Parsed::Answer(BlockStatus::Unsupported);
        }
        if self.data_len == 0 || !self.data_len.is_multiple_of(SEGMENT_BYTES) {
            return Parsed::Answer(BlockStatus::IoError);
        }
        // All segments are checked before any takes effect.
        for index in 0..self.data_len / SEGMENT_BYTES {
            match self.read_segment(memory, index, rules, kind, sectors_max) {
                Ok(segment) => self.segments.extend(segment),
                Err(status) => return Parsed::Answer(status),
            }
        }
        self.sort_segments();
        if self.segments.is_empty() {
            return Parsed::Answer(BlockStatus::Ok);
        }
        self.kind = kind;
        Parsed::Request
    }

    /// Puts the segments in ascending order and cuts off what an earlier one covers. All become
    /// zeroes, in whatever order; but each holds a lock until the whole request is published
    /// (rule L3), so two that overlap would wait for each other for ever.
    fn sort_segments(&mut self) {
        self.segments.sort_unstable_by_key(|s| s.range.start());
        let mut covered = 0;
        self.segments.retain_mut(|segment| {
            let start = segment.range.start().max(covered);
            let left = segment.range.end().saturating_sub(start);
            covered = covered.max(segment.range.end());
            let left = u32::try_from(left).expect("no longer than the segment");
            let rest = SectorRange::new(start, left);
            segment.range = rest.unwrap_or(segment.range);
            rest.is_some()
        });
    }

    /// The order of the checks is QEMU's.
    fn read_segment(
        &self,
        memory: &GuestMemory,
        index: u64,
        rules: &RequestRules,
        kind: RequestKind,
        sectors_max: u32,
    ) -> Result<Option<Segment>, BlockStatus> {
        let mut raw = [0u8; 16];
        self.copy_from_guest(memory, index * SEGMENT_BYTES, &mut raw)
            .map_err(|_| BlockStatus::IoError)?;
        let [s0, s1, s2, s3, s4, s5, s6, s7, c0, c1, c2, c3, flags @ ..] = raw;
        let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
        let count = u32::from_le_bytes([c0, c1, c2, c3]);
        let flags = u32::from_le_bytes(flags);
        if flags & !FLAG_UNMAP != 0 {
            return Err(BlockStatus::Unsupported);
        }
        if count > sectors_max || sector > rules.sectors {
            return Err(BlockStatus::IoError);
        }
        let range = if count == 0 {
            None
        } else {
            let range = checked_range(sector, count, rules, rules.block_sectors);
            Some(range.ok_or(BlockStatus::IoError)?)
        };
        let unmap = flags & FLAG_UNMAP != 0;
        if unmap && kind == RequestKind::Discard {
            return Err(BlockStatus::Unsupported);
        }
        Ok(range.map(|range| Segment { range, unmap }))
    }
}

/// The range, if it lies inside the disk and is aligned.
fn checked_range(
    sector: u64,
    count: u32,
    rules: &RequestRules,
    align_sectors: u32,
) -> Option<SectorRange> {
    let range = SectorRange::new(sector, count)?;
    let aligned = |at: u64| at.is_multiple_of(u64::from(align_sectors));
    (range.end() <= rules.sectors && aligned(range.start()) && aligned(range.end()))
        .then_some(range)
}

#[cfg(test)]
#[path = "request_tests.rs"]
mod tests;
