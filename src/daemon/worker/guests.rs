// SPDX-License-Identifier: Apache-2.0
//! The guest's requests that a worker has fetched, and the parts it has cut them into.
//!
//! A guest's request may be larger than what a lane takes at once; each part is a request of its
//! own to the lane, with its own lock. The guest's request is complete when all its parts are.
//! Slots are used again, so that after the first few requests nothing is allocated.

use crate::control::counters::RequestKind as Kind;
use crate::device::{BlockStatus, GuestRequest, RequestKind, Ticket};
use crate::quorum::{Geometry, Request, RequestId};
use crate::units::SectorRange;

/// What is still to be handed to the lane of a guest's request.
#[derive(Clone, Copy, Debug)]
struct Cursor {
    /// Sectors not handed over yet, of the data or of the current segment.
    rest: Option<SectorRange>,
    /// The segment after the current one.
    next_segment: usize,
    /// Bytes of the guest's data that come before `rest`.
    data_offset: u64,
}

/// A part to be handed to the lane.
#[derive(Clone, Copy, Debug)]
pub(super) enum Piece {
    /// Read `range`; the guest gets `len` bytes of it from byte `lead` on.
    Read {
        range: SectorRange,
        lead: usize,
        len: usize,
        data_offset: u64,
    },
    /// Write `range` with the guest's data from `data_offset` on.
    Write {
        range: SectorRange,
        data_offset: u64,
    },
    /// A request without data.
    Plain(Request),
}

/// One of the guest's requests.
#[derive(Debug)]
pub(super) struct Guest {
    pub(super) request: GuestRequest,
    /// Its queue, as an index among those of the worker.
    pub(super) queue: usize,
    pub(super) ticket: Option<Ticket>,
    pub(super) status: BlockStatus,
    /// Parts the lane has and has not replied to.
    pub(super) outstanding: u32,
    cursor: Cursor,
    /// All parts were handed over.
    issued: bool,
    /// A flush is owed before the completion (rule F5).
    owes_flush: bool,
    /// It was in flight when the last daemon ended, and changes sectors: until it is published, they
    /// may differ (rule Y3).
    pub(super) repeats: bool,
    /// Its parts, linked.
    last_part: Option<u32>,
}

impl Guest {
    fn new() -> Self {
        Self {
            request: GuestRequest::new(),
            queue: 0,
            ticket: None,
            status: BlockStatus::Ok,
            outstanding: 0,
            cursor: Cursor {
                rest: None,
                next_segment: 0,
                data_offset: 0,
            },
            issued: false,
            owes_flush: false,
            repeats: false,
            last_part: None,
        }
    }

    /// Starts to cut the request that was just fetched.
    pub(super) fn begin(&mut self, queue: usize, ticket: Ticket, write_through: bool) {
        let rest = match self.request.kind() {
            RequestKind::Read { range } | RequestKind::Write { range } => Some(range),
            RequestKind::Flush | RequestKind::Discard | RequestKind::WriteZeroes => None,
        };
        self.queue = queue;
        self.ticket = Some(ticket);
        self.status = BlockStatus::Ok;
        self.outstanding = 0;
        self.cursor = Cursor {
            rest,
            next_segment: 0,
            data_offset: 0,
        };
        self.issued = false;
        self.owes_flush = write_through && self.changes_sectors();
        self.repeats = false;
        self.last_part = None;
    }

    /// Whether it is more than a read or a flush.
    pub(super) fn changes_sectors(&self) -> bool {
        !matches!(self.kind(), Kind::Read | Kind::Flush)
    }

    pub(super) fn kind(&self) -> Kind {
        match self.request.kind() {
            RequestKind::Read { .. } => Kind::Read,
            RequestKind::Write { .. } => Kind::Write,
            RequestKind::Flush => Kind::Flush,
            RequestKind::Discard => Kind::Discard,
            RequestKind::WriteZeroes => Kind::WriteZeroes,
        }
    }

    /// Bytes of the disk it is about.
    pub(super) fn bytes(&self) -> u64 {
        match self.request.kind() {
            RequestKind::Read { range } | RequestKind::Write { range } => range.len_bytes() as u64,
            RequestKind::Flush => 0,
            RequestKind::Discard | RequestKind::WriteZeroes => self
                .request
                .segments()
                .iter()
                .map(|s| s.range.len_bytes() as u64)
                .sum(),
        }
    }

    /// The sectors it is about.
    pub(super) fn ranges(&self) -> impl Iterator<Item = SectorRange> + '_ {
        let data = match self.request.kind() {
            RequestKind::Read { range } | RequestKind::Write { range } => Some(range),
            RequestKind::Flush | RequestKind::Discard | RequestKind::WriteZeroes => None,
        };
        let segments = self.request.segments().iter().map(|s| s.range);
        data.into_iter()
            .chain(segments.filter(move |_| data.is_none()))
    }

    /// Whether it writes, and takes more than one part to do so.
    pub(super) fn writes_in_parts(&self, geometry: &Geometry) -> bool {
        let first: fn(&Geometry, SectorRange) -> SectorRange = match self.request.kind() {
            RequestKind::Write { .. } => |geometry, range| geometry.first_piece(range),
            RequestKind::Discard | RequestKind::WriteZeroes => {
                |geometry, range| geometry.first_extent_piece(range)
            }
            RequestKind::Read { .. } | RequestKind::Flush => return false,
        };
        let mut ranges = self.ranges();
        let one = ranges
            .next()
            .is_none_or(|range| first(geometry, range) == range);
        !one || ranges.next().is_some()
    }

    /// Hands nothing more over: the request has failed.
    pub(super) fn abandon(&mut self) {
        self.status = BlockStatus::IoError;
        self.issued = true;
    }

    /// The next part, or `None` when there is no other. It counts as handed over after
    /// [`Guest::advance`].
    pub(super) fn next_piece(&mut self, geometry: &Geometry) -> Option<Piece> {
        if self.issued {
            return None;
        }
        let piece = match self.request.kind() {
            RequestKind::Flush => Some(Piece::Plain(Request::Flush)),
            RequestKind::Read { .. } => {
                self.cursor.rest.map(|rest| self.read_piece(geometry, rest))
            }
            RequestKind::Write { .. } => self.cursor.rest.map(|rest| Piece::Write {
                range: geometry.first_piece(rest),
                data_offset: self.cursor.data_offset,
            }),
            RequestKind::Discard | RequestKind::WriteZeroes => self.segment_piece(geometry),
        };
        self.issued = piece.is_none();
        piece
    }

    /// The guest may read at any sector; replicas are read in whole blocks (rule L2).
    fn read_piece(&self, geometry: &Geometry, rest: SectorRange) -> Piece {
        let block = geometry.block_sectors();
        let range = geometry.first_piece(rest.rounded_out(block));
        let start = range.start().max(rest.start());
        let end = range.end().min(rest.end());
        let bytes = |sectors: u64| {
            usize::try_from(sectors * crate::units::SECTOR_BYTES).expect("a part is small")
        };
        Piece::Read {
            range,
            lead: bytes(start - range.start()),
            len: bytes(end - start),
            data_offset: self.cursor.data_offset,
        }
    }

    fn segment_piece(&mut self, geometry: &Geometry) -> Option<Piece> {
        if self.cursor.rest.is_none() {
            let segment = self.request.segments().get(self.cursor.next_segment)?;
            self.cursor.rest = Some(segment.range);
            self.cursor.next_segment += 1;
        }
        let segment = self.request.segments()[self.cursor.next_segment - 1];
        let range = geometry.first_extent_piece(self.cursor.rest?);
        Some(Piece::Plain(match self.request.kind() {
            RequestKind::Discard => Request::Discard { range },
            _ => Request::WriteZeroes {
                range,
                unmap: segment.unmap,
            },
        }))
    }

    /// `piece` was handed over.
    pub(super) fn advance(&mut self, piece: &Piece) {
        let done = match *piece {
            Piece::Read { range, .. } | Piece::Write { range, .. } => Some(range),
            Piece::Plain(Request::Discard { range } | Request::WriteZeroes { range, .. }) => {
                Some(range)
            }
            Piece::Plain(
                Request::Flush
                | Request::Read { .. }
                | Request::Write { .. }
                | Request::Reconcile { .. }
                | Request::Check { .. }
                | Request::Probe { .. },
            ) => None,
        };
        if let Piece::Read { len, .. } = *piece {
            self.cursor.data_offset += len as u64;
        } else if let Piece::Write { range, .. } = *piece {
            self.cursor.data_offset += range.len_bytes() as u64;
        }
        self.cursor.rest = self.cursor.rest.zip(done).and_then(|(rest, done)| {
            let left = rest.end().checked_sub(done.end())?;
            SectorRange::new(done.end(), u32::try_from(left).ok()?)
        });
        let more_segments = matches!(self.kind(), Kind::Discard | Kind::WriteZeroes)
            && self.cursor.next_segment < self.request.segments().len();
        self.issued = self.cursor.rest.is_none() && !more_segments;
    }

    /// Whether all is replied to. If so and a flush is owed, it is the next part.
    pub(super) fn is_complete(&self) -> bool {
        self.issued && self.outstanding == 0
    }

    /// Takes the flush that is owed, if the request went well (rule F5).
    pub(super) fn take_owed_flush(&mut self) -> bool {
        std::mem::take(&mut self.owes_flush) && self.status == BlockStatus::Ok
    }
}

/// One part in the lane.
#[derive(Clone, Copy, Debug)]
pub(super) struct Part {
    pub(super) guest: u32,
    pub(super) lead: usize,
    pub(super) len: usize,
    pub(super) data_offset: u64,
    /// From the reply; [`Event::Published`](crate::quorum::Event::Published) is owed for it.
    pub(super) replied: Option<RequestId>,
    before: Option<u32>,
}

/// The requests and parts of a worker.
#[derive(Debug, Default)]
pub(super) struct Guests {
    guests: Vec<Guest>,
    free_guests: Vec<u32>,
    parts: Vec<Part>,
    free_parts: Vec<u32>,
}

fn index(id: u32) -> usize {
    usize::try_from(id).expect("a u32 fits in a usize")
}

fn id(index: usize) -> u32 {
    u32::try_from(index).expect("slots are bounded far below 2^32")
}

impl Guests {
    /// A slot to fetch into. Give it back with [`Guests::free`].
    pub(super) fn take(&mut self) -> u32 {
        self.free_guests.pop().unwrap_or_else(|| {
            self.guests.push(Guest::new());
            id(self.guests.len() - 1)
        })
    }

    /// The request in a slot.
    pub(super) fn get(&mut self, guest: u32) -> &mut Guest {
        &mut self.guests[index(guest)]
    }

    /// Requests in slots that are taken.
    pub(super) fn len(&self) -> usize {
        self.guests.len() - self.free_guests.len()
    }

    /// Adds a part to the request in `guest`.
    pub(super) fn add_part(
        &mut self,
        guest: u32,
        lead: usize,
        len: usize,
        data_offset: u64,
    ) -> u32 {
        let owner = &mut self.guests[index(guest)];
        owner.outstanding += 1;
        let before = owner.last_part;
        let part = Part {
            guest,
            lead,
            len,
            data_offset,
            replied: None,
            before,
        };
        let slot = match self.free_parts.pop() {
            Some(slot) => {
                self.parts[index(slot)] = part;
                slot
            }
            None => {
                self.parts.push(part);
                id(self.parts.len() - 1)
            }
        };
        self.guests[index(guest)].last_part = Some(slot);
        slot
    }

    /// A part.
    pub(super) fn part(&mut self, part: u32) -> &mut Part {
        &mut self.parts[index(part)]
    }

    /// The part of the request in `guest` that was added last.
    pub(super) fn last_part(&self, guest: u32) -> Option<u32> {
        self.guests[index(guest)].last_part
    }

    /// The part of the same request that was added before `part`.
    pub(super) fn part_before(&self, part: u32) -> Option<u32> {
        self.parts[index(part)].before
    }

    /// Frees the request and its parts.
    pub(super) fn free(&mut self, guest: u32) {
        let mut part = self.guests[index(guest)].last_part.take();
        while let Some(slot) = part {
            part = self.parts[index(slot)].before;
            self.parts[index(slot)].replied = None;
            self.free_parts.push(slot);
        }
        self.guests[index(guest)].ticket = None;
        self.free_guests.push(guest);
    }
}
