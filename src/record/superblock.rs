// SPDX-License-Identifier: Apache-2.0
//! The superblock: what a copy says of itself and of the disk (rule R3).

use std::fmt;

use super::error::FormatError;
use super::fields::{Reader, Writer, is_sealed, seal};
use super::history::{ENTRY_BYTES, EPOCHS_REMEMBERED, EpochEntry, History};
use super::layout::{BLOCK_BYTES, Block, EXTENTS_MAX, Layout};
use super::member::{MEMBER_BYTES, Member, MemberState};
use crate::quorum::{Geometry, ReadPattern};
use crate::units::REPLICAS_MAX;

/// First bytes of a copy.
pub(super) const MAGIC: [u8; 8] = *b"qblk-rec";

/// The version this code writes, and the only one it reads.
pub const FORMAT_VERSION: u32 = 1;

/// Where the checksum is.
pub(super) const SUPERBLOCK_CRC_AT: usize = 12;

/// Offset of the bytes before the members that mean nothing yet.
const RESERVED_AT: usize = 124;

/// Number of those bytes.
const RESERVED_BYTES: usize = MEMBERS_AT - RESERVED_AT;

/// Offset of the members.
const MEMBERS_AT: usize = 128;

/// Offset of the history.
const HISTORY_AT: usize = MEMBERS_AT + REPLICAS_MAX * MEMBER_BYTES;

/// Offset of the growth that is under way.
const GROWING_AT: usize = HISTORY_AT + EPOCHS_REMEMBERED * ENTRY_BYTES;

/// The first byte that means nothing yet.
pub(super) const MEANINGFUL_BYTES: usize = GROWING_AT + 16;

/// Incompatible features that are known: none yet.
const INCOMPATIBLE_KNOWN: u64 = 0;

/// The epoch of a record that was created and never opened.
pub(super) const FIRST_EPOCH: u64 = 1;

/// Epochs and sequences end here, so that the next one always exists (rule R9).
pub(super) const SEQUENCE_MAX: u64 = u64::MAX >> 1;

/// Up to here no counter comes by itself. Beyond, an opening refuses rather than run out.
pub(super) const SEQUENCE_LIMIT: u64 = SEQUENCE_MAX / 2;

/// Sectors of the largest disk: its bytes can be counted in a file offset.
pub(super) const SECTORS_MAX: u64 = i64::MAX as u64 / 512;

/// The largest extent that is ever needed: with it the largest disk has one.
const EXTENT_SHIFT_MAX: u8 = 54;

/// Value of a cursor when all of the disk has been gone through.
pub const VERIFIED: u64 = u64::MAX;

const CLEAN: u32 = 1;
const COLD: u32 = 2;
const FORCED: u32 = 4;
const ASSUME_CLEAN: u32 = 8;
const FEW_REPLICAS: u32 = 16;

/// The identity of a disk, chosen at random when its record is created.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DiskUuid(pub [u8; 16]);

impl DiskUuid {
    /// The first eight bytes as a number: what a page says of its disk (rule R4).
    #[must_use]
    pub fn low(self) -> u64 {
        let (low, _) = self.0.split_at(8);
        u64::from_le_bytes(low.try_into().expect("eight bytes"))
    }
}

impl fmt::Display for DiskUuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, byte) in self.0.iter().enumerate() {
            if matches!(index, 4 | 6 | 8 | 10) {
                f.write_str("-")?;
            }
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for DiskUuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The disk is becoming longer. It stays in the superblock until an epoch of the new size has begun
/// for good: only then what the maps say of the new part counts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Growing {
    /// Sectors of before.
    pub from_sectors: u64,
    /// The first epoch of the new size. If neither it nor a later one has begun, the disk has its
    /// old size. 0: it is yet to be chosen; never on disk.
    pub epoch: u64,
}

/// What a copy says of itself and of the disk.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Superblock {
    /// Which disk.
    pub disk: DiskUuid,
    /// Which of the K copies this is, from 0.
    pub copy_index: u8,
    /// K: 1, 3 or 5.
    pub copies: u8,
    /// Copies that take part in this epoch, bit i is the copy of index i. The others were shut out
    /// or absent when it began; what they hold is old.
    pub included: u8,
    /// Order among the superblocks of an epoch; rises over epochs too.
    pub sequence: u64,
    /// Sectors of the disk.
    pub sectors: u64,
    /// An extent has `2^extent_shift` sectors.
    pub extent_shift: u8,
    /// Sectors of a logical block: 1, 2, 4 or 8.
    pub block_sectors: u8,
    /// N, 1 to 16.
    pub replicas: u8,
    /// T, 1 to N.
    pub threshold: u8,
    /// How reads are decided.
    pub pattern: ReadPattern,
    /// Set last at a clean stop, cleared when an epoch begins (rule R8).
    pub clean: bool,
    /// The last run ended without in-flight buffer and U is not empty yet (rule S4).
    pub cold: bool,
    /// The epoch was begun by force (rule S6): fewer than a majority of K may have been there, and
    /// a majority of `included` decides.
    pub forced: bool,
    /// The last run began by force with fewer than T replicas (rule S6): those that were not there
    /// are behind everywhere.
    pub few_replicas: bool,
    /// Copies were said to be equal when the record was created (rule S5).
    pub assume_clean: bool,
    /// Boot of the host in which the epoch began.
    pub boot_id: [u8; 16],
    /// First sector the verify after adoption has not seen; [`VERIFIED`] when it is through.
    pub verify_cursor: u64,
    /// First sector the scrub under way has not seen; [`VERIFIED`] when none is.
    pub scrub_cursor: u64,
    /// When the last scrub came to its end, in seconds since 1970; 0: never.
    pub scrubbed_at: u64,
    /// Replicas by slot.
    pub members: [Member; REPLICAS_MAX],
    /// This epoch and those before it.
    pub history: History,
    /// The disk is becoming longer (rule Z3).
    pub growing: Option<Growing>,
}

impl Superblock {
    /// That of a new disk: no members, nothing verified, one copy, no epoch of any weight. It is
    /// for [`Opened::create`](super::Opened::create), which gives it its epoch and copies.
    #[must_use]
    pub fn new(
        disk: DiskUuid,
        geometry: &Geometry,
        replicas: usize,
        threshold: usize,
        pattern: ReadPattern,
    ) -> Self {
        let byte = |value: usize| u8::try_from(value).unwrap_or(u8::MAX);
        Self {
            disk,
            copy_index: 0,
            copies: 1,
            included: 1,
            sequence: 1,
            sectors: geometry.sectors(),
            extent_shift: u8::try_from(geometry.extent_shift()).unwrap_or(u8::MAX),
            block_sectors: u8::try_from(geometry.block_sectors()).unwrap_or(u8::MAX),
            replicas: byte(replicas),
            threshold: byte(threshold),
            pattern,
            clean: false,
            cold: false,
            forced: false,
            few_replicas: false,
            assume_clean: false,
            boot_id: [0; 16],
            verify_cursor: 0,
            scrub_cursor: VERIFIED,
            scrubbed_at: 0,
            members: [Member::default(); REPLICAS_MAX],
            history: History::new(EpochEntry {
                epoch: FIRST_EPOCH,
                ..EpochEntry::default()
            }),
            growing: None,
        }
    }

    /// The epoch.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.history.newest().epoch
    }

    /// Number of extents.
    #[must_use]
    pub fn extents(&self) -> u64 {
        self.sectors.div_ceil(1 << self.extent_shift)
    }

    /// Where everything is in a copy.
    #[must_use]
    pub fn layout(&self) -> Layout {
        Layout::new(self.extents())
    }

    /// Slots of replicas that have a map B: 0 to this, without it.
    #[must_use]
    pub fn slots(&self) -> usize {
        let vacant = |member: &Member| member.state == MemberState::Vacant;
        let used = self.members.iter().rposition(|member| !vacant(member));
        used.map_or(0, |last| last + 1).max(self.replicas.into())
    }

    /// Copies on which an update must be to be durable (rule R1): more than half of K; in an epoch
    /// that was forced more than half of those that take part.
    #[must_use]
    pub fn needed(&self) -> usize {
        if self.forced {
            self.included.count_ones() as usize / 2 + 1
        } else {
            usize::from(self.copies) / 2 + 1
        }
    }

    /// The block to write.
    #[must_use]
    pub fn encode(&self) -> Block {
        let mut block = [0; BLOCK_BYTES];
        let mut writer = Writer::new(&mut block, 0);
        writer.bytes(&MAGIC);
        writer.u32(FORMAT_VERSION);
        writer.u32(0);
        writer.u64(INCOMPATIBLE_KNOWN);
        writer.u64(0);
        writer.bytes(&self.disk.0);
        writer.u64(self.epoch());
        writer.u64(self.sequence);
        writer.u64(self.sectors);
        writer.u64(self.verify_cursor);
        writer.u64(self.scrub_cursor);
        writer.bytes(&self.boot_id);
        writer.u8(self.copy_index);
        writer.u8(self.copies);
        writer.u8(self.included);
        writer.u8(self.extent_shift);
        writer.u8(self.block_sectors);
        writer.u8(self.replicas);
        writer.u8(self.threshold);
        writer.u8(match self.pattern {
            ReadPattern::Quorum => 0,
            ReadPattern::Fifo => 1,
        });
        let flags = [
            (self.clean, CLEAN),
            (self.cold, COLD),
            (self.forced, FORCED),
            (self.assume_clean, ASSUME_CLEAN),
            (self.few_replicas, FEW_REPLICAS),
        ];
        writer.u32(flags.iter().filter(|f| f.0).map(|f| f.1).sum());
        writer.u64(self.scrubbed_at);
        writer.bytes(&[0; RESERVED_BYTES]);
        debug_assert_eq!(writer.at(), MEMBERS_AT);
        for (slot, member) in self.members.iter().enumerate() {
            member.encode(slot, &mut writer);
        }
        debug_assert_eq!(writer.at(), HISTORY_AT);
        self.history.encode(&mut writer);
        debug_assert_eq!(writer.at(), GROWING_AT);
        writer.u64(self.growing.map_or(0, |growing| growing.from_sectors));
        writer.u64(self.growing.map_or(0, |growing| growing.epoch));
        debug_assert_eq!(writer.at(), MEANINGFUL_BYTES);
        seal(&mut block, SUPERBLOCK_CRC_AT);
        block
    }

    /// Reads a block. Every field is within its bounds afterwards (rule R9).
    ///
    /// # Errors
    /// If the block is no superblock, torn or damaged; if a newer version wrote it; if a field
    /// cannot be.
    pub fn decode(block: &Block) -> Result<Self, FormatError> {
        let mut reader = Reader::new(block, 0);
        if reader.bytes() != MAGIC {
            return Err(if block.iter().all(|&byte| byte == 0) {
                FormatError::Blank
            } else {
                FormatError::Magic
            });
        }
        if !is_sealed(block, SUPERBLOCK_CRC_AT) {
            return Err(FormatError::Checksum);
        }
        let version = reader.u32();
        if version != FORMAT_VERSION {
            return Err(FormatError::Version { version });
        }
        let _checksum = reader.u32();
        let features = reader.u64() & !INCOMPATIBLE_KNOWN;
        if features != 0 {
            return Err(FormatError::Features { features });
        }
        // Compatible features are hints: who does not know them passes over what they use of the
        // reserved bytes, and writes zeroes there.
        let hints = reader.u64() != 0;
        let superblock = Self::decode_fields(&mut reader)?;
        superblock.check()?;
        let (gap, rest) = (&block[RESERVED_AT..MEMBERS_AT], &block[MEANINGFUL_BYTES..]);
        if !hints && gap.iter().chain(rest).any(|&byte| byte != 0) {
            return Err(FormatError::Field { field: "reserved" });
        }
        Ok(superblock)
    }

    fn decode_fields(reader: &mut Reader<'_>) -> Result<Self, FormatError> {
        let wrong = |field| FormatError::Field { field };
        let disk = DiskUuid(reader.bytes());
        let epoch = reader.u64();
        let sequence = reader.u64();
        let sectors = reader.u64();
        let verify_cursor = reader.u64();
        let scrub_cursor = reader.u64();
        let boot_id = reader.bytes();
        let copy_index = reader.u8();
        let copies = reader.u8();
        let included = reader.u8();
        let extent_shift = reader.u8();
        let block_sectors = reader.u8();
        let replicas = reader.u8();
        let threshold = reader.u8();
        let pattern = match reader.u8() {
            0 => ReadPattern::Quorum,
            1 => ReadPattern::Fifo,
            _ => return Err(wrong("read pattern")),
        };
        let flags = reader.u32();
        if flags & !(CLEAN | COLD | FORCED | ASSUME_CLEAN | FEW_REPLICAS) != 0 {
            return Err(wrong("flags"));
        }
        let scrubbed_at = reader.u64();
        let _reserved: [u8; RESERVED_BYTES] = reader.bytes();
        debug_assert_eq!(reader.at(), MEMBERS_AT);
        let mut members = [Member::default(); REPLICAS_MAX];
        for (slot, member) in members.iter_mut().enumerate() {
            *member = Member::decode(slot, reader)?;
        }
        let history = History::decode(reader).ok_or(wrong("history of epochs"))?;
        if history.newest().epoch != epoch {
            return Err(wrong("epoch"));
        }
        let growing = match (reader.u64(), reader.u64()) {
            (0, 0) => None,
            (_, 0) | (0, _) => return Err(wrong("growth")),
            (from_sectors, epoch) => Some(Growing {
                from_sectors,
                epoch,
            }),
        };
        Ok(Self {
            disk,
            copy_index,
            copies,
            included,
            sequence,
            sectors,
            extent_shift,
            block_sectors,
            replicas,
            threshold,
            pattern,
            clean: flags & CLEAN != 0,
            cold: flags & COLD != 0,
            forced: flags & FORCED != 0,
            few_replicas: flags & FEW_REPLICAS != 0,
            assume_clean: flags & ASSUME_CLEAN != 0,
            boot_id,
            verify_cursor,
            scrub_cursor,
            scrubbed_at,
            members,
            history,
            growing,
        })
    }

    /// Whether every field is what it may be.
    ///
    /// # Errors
    /// The first field that is not.
    pub fn check(&self) -> Result<(), FormatError> {
        let wrong = |field| Err(FormatError::Field { field });
        let is_cursor = |cursor: u64| cursor <= self.sectors || cursor == VERIFIED;
        if !matches!(self.copies, 1 | 3 | 5) {
            return wrong("number of copies");
        }
        if self.copy_index >= self.copies || self.included & (1 << self.copy_index) == 0 {
            return wrong("index of the copy");
        }
        if self.included >> self.copies != 0 {
            return wrong("copies that take part");
        }
        if self.epoch() > SEQUENCE_MAX {
            return wrong("epoch");
        }
        if !(1..=SEQUENCE_MAX).contains(&self.sequence) {
            return wrong("sequence");
        }
        if !matches!(self.block_sectors, 1 | 2 | 4 | 8) {
            return wrong("block size");
        }
        let blocks = self.sectors.is_multiple_of(self.block_sectors.into());
        if !(1..=SECTORS_MAX).contains(&self.sectors) || !blocks {
            return wrong("size");
        }
        if self.extent_shift > EXTENT_SHIFT_MAX || self.extents() > EXTENTS_MAX {
            return wrong("extent shift");
        }
        if !(1..=REPLICAS_MAX).contains(&self.replicas.into()) {
            return wrong("number of replicas");
        }
        if !(1..=self.replicas).contains(&self.threshold) {
            return wrong("vote threshold");
        }
        if !is_cursor(self.verify_cursor) || !is_cursor(self.scrub_cursor) {
            return wrong("cursor");
        }
        if self.history.newest().forced != self.forced {
            return wrong("history of epochs");
        }
        if self.growing.is_some_and(|growing| {
            let blocks = growing
                .from_sectors
                .is_multiple_of(self.block_sectors.into());
            !(1..self.sectors).contains(&growing.from_sectors)
                || !blocks
                || growing.epoch > self.epoch()
        }) {
            return wrong("growth");
        }
        Ok(())
    }
}
