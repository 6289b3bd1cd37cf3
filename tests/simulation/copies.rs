// SPDX-License-Identifier: Apache-2.0
//! The copies of the state record, each a file on a faulty disk of its own.
//!
//! A write that was reported complete is on the medium (rule R2). One that is in flight when the
//! daemon ends reaches it in full, in part, or not at all, 512 bytes at a time; so does one that
//! fails. At most a minority of the copies is bad at a time.

use std::sync::Arc;

use crate::quorum::{Bitmap, PageName};
use crate::record::{
    BLOCK_BYTES, Block, CopySource, DiskUuid, Found, Layout, PageImage, ReadBlock, Superblock,
    WriteId,
};
use crate::rng::Rng;
use crate::units::REPLICAS_MAX;

/// The only disk there is.
pub const DISK: DiskUuid = DiskUuid([7; 16]);

/// D and the B of all slots.
const BITMAPS: usize = 1 + REPLICAS_MAX;

/// Bytes that a write changes at once or not at all.
const ATOM: usize = 512;

/// One copy.
#[derive(Clone)]
pub struct Copy {
    blocks: Vec<Arc<Block>>,
}

impl ReadBlock for Copy {
    fn read_block(&mut self, block: u64, into: &mut Block) -> Result<(), i32> {
        let place = usize::try_from(block).map_err(|_| 5)?;
        let found = self.blocks.get(place).ok_or(5)?;
        into.copy_from_slice(&found[..]);
        Ok(())
    }
}

/// A write that has not ended.
struct InFlight {
    copy: usize,
    write: WriteId,
    block: usize,
    bytes: Arc<Block>,
    errno: Option<i32>,
}

/// How a write ended, for the recorder.
pub struct Ended {
    pub copy: u8,
    pub write: WriteId,
    pub errno: Option<i32>,
}

/// All copies.
pub struct Copies {
    copies: Vec<Copy>,
    in_flight: Vec<Option<InFlight>>,
    /// Copies that fail every write, a bit each.
    pub failing: u8,
    /// Copies that lack something: they are behind, or lost what they held.
    pub lacking: u8,
}

impl Copies {
    /// `count` empty files.
    pub fn new(count: usize, layout: Layout) -> Self {
        let blank = Self::blank(layout);
        Self {
            copies: vec![blank; count],
            in_flight: Vec::new(),
            failing: 0,
            lacking: 0,
        }
    }

    fn blank(layout: Layout) -> Copy {
        let blocks = usize::try_from(layout.blocks()).expect("a small disk");
        let zeroes: Arc<Block> = Arc::new([0; BLOCK_BYTES]);
        Copy {
            blocks: vec![zeroes; blocks],
        }
    }

    pub fn count(&self) -> usize {
        self.copies.len()
    }

    /// Copies that may be bad at once.
    pub fn spare(&self) -> u32 {
        u32::try_from((self.copies.len() - 1) / 2).expect("at most 5")
    }

    /// Whether this copy may become bad as well.
    pub fn admits(&self, copy: usize) -> bool {
        (self.failing | self.lacking | 1 << copy).count_ones() <= self.spare()
    }

    /// The file is gone, and an empty one is in its place.
    pub fn lose(&mut self, copy: usize) {
        let blocks = self.copies[copy].blocks.len();
        let zeroes: Arc<Block> = Arc::new([0; BLOCK_BYTES]);
        self.copies[copy].blocks = vec![zeroes; blocks];
        self.lacking |= 1 << copy;
    }

    /// What is in the place of one copy.
    pub fn reader(&self, copy: usize) -> Copy {
        self.copies[copy].clone()
    }

    /// What an opening finds if the copies in `missing` are not there.
    pub fn sources(&self, missing: u8) -> Vec<CopySource<Copy>> {
        let found = |(place, copy): (usize, &Copy)| CopySource {
            name: format!("copy {place}"),
            found: match missing >> place & 1 {
                0 => Found::Present(copy.clone()),
                _ => Found::Missing,
            },
        };
        self.copies.iter().enumerate().map(found).collect()
    }

    /// A write begins; it may fail. Returns its place.
    pub fn begin(
        &mut self,
        copy: u8,
        write: WriteId,
        block: u64,
        bytes: Arc<Block>,
        errno: Option<i32>,
    ) -> Result<usize, String> {
        let (copy, block) = (usize::from(copy), usize::try_from(block).expect("small"));
        let mut others = self.in_flight.iter().flatten();
        if others.any(|other| (other.copy, other.block) == (copy, block)) {
            return Err(format!(
                "block {block} of copy {copy} is written twice at once"
            ));
        }
        if block >= self.copies[copy].blocks.len() {
            return Err(format!("block {block} of copy {copy} does not exist"));
        }
        if let Some(newest) = self.sequence(copy, block)
            && self
                .sequence(copy, block ^ 1)
                .is_none_or(|other| other < newest)
        {
            return Err(format!(
                "block {block} of copy {copy} is the newest there is"
            ));
        }
        let entry = Some(InFlight {
            copy,
            write,
            block,
            bytes,
            errno,
        });
        let free = self.in_flight.iter().position(Option::is_none);
        let place = free.unwrap_or_else(|| {
            self.in_flight.push(None);
            self.in_flight.len() - 1
        });
        self.in_flight[place] = entry;
        Ok(place)
    }

    /// The sequence of what a block holds; `None`: it is torn or empty. The two slots of a page, or
    /// of the superblock, are neighbours.
    fn sequence(&self, copy: usize, block: usize) -> Option<u64> {
        let bytes = &self.copies[copy].blocks[block];
        let Some(place) = (block / 2).checked_sub(1) else {
            return Superblock::decode(bytes).ok().map(|found| found.sequence);
        };
        let name = PageName {
            bitmap: Bitmap::from_number(place % BITMAPS),
            page: place / BITMAPS,
        };
        let image = PageImage::decode(bytes, name, DISK);
        image.ok().map(|image| image.sequence)
    }

    /// A write ends.
    pub fn end(&mut self, place: usize, rng: &mut Rng) -> Ended {
        let ended = self.in_flight[place].take().expect("in flight");
        let errno = ended.errno;
        let copy = u8::try_from(ended.copy).expect("at most 5");
        let write = ended.write;
        if errno.is_some() {
            self.land_in_part(ended, rng);
        } else {
            self.copies[ended.copy].blocks[ended.block] = ended.bytes;
        }
        Ended { copy, write, errno }
    }

    /// The daemon is gone: any part of what was in flight reaches the media.
    pub fn crash(&mut self, rng: &mut Rng) {
        for flight in std::mem::take(&mut self.in_flight).into_iter().flatten() {
            match rng.below(3) {
                0 => {}
                1 => self.copies[flight.copy].blocks[flight.block] = flight.bytes,
                _ => self.land_in_part(flight, rng),
            }
        }
    }

    fn land_in_part(&mut self, flight: InFlight, rng: &mut Rng) {
        let there = &mut self.copies[flight.copy].blocks[flight.block];
        let mut mixed = **there;
        for at in (0..BLOCK_BYTES).step_by(ATOM) {
            if rng.chance(500_000) {
                mixed[at..at + ATOM].copy_from_slice(&flight.bytes[at..at + ATOM]);
            }
        }
        *there = Arc::new(mixed);
    }
}
