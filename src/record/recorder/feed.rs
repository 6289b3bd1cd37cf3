// SPDX-License-Identifier: Apache-2.0
//! Images, and who is given which when.

use std::sync::Arc;

use super::{RecordAction, Recorder};
use crate::quorum::{Marks, PAGE_WORDS, PageBits};
use crate::record::copies::{Standing, Target, WRITES_PER_COPY_MAX, WriteId};
use crate::record::layout::{BLOCK_BYTES, Block, Layout, Slot};
use crate::record::mutation::broken;
use crate::record::page::{decode_bits, encode_into};
use crate::units::Time;

impl Recorder {
    /// The newest image of a page.
    pub(super) fn image(&mut self, page: usize, marks: &Marks) -> Arc<Block> {
        let mut bits = [0; PAGE_WORDS];
        marks.copy_page(self.names[page], &mut bits);
        self.image_of(page, &bits)
    }

    /// An image of a page with these bits.
    pub(super) fn image_of(&mut self, page: usize, bits: &PageBits) -> Arc<Block> {
        let mut block = self
            .spare
            .pop()
            .unwrap_or_else(|| Arc::new([0; BLOCK_BYTES]));
        if Arc::get_mut(&mut block).is_none() {
            // A slow copy still reads it.
            block = Arc::new([0; BLOCK_BYTES]);
        }
        let into = Arc::get_mut(&mut block).expect("nobody else has it");
        self.sequences[page] += 1;
        let (name, sequence) = (self.names[page], self.sequences[page]);
        encode_into(into, name, sequence, bits, self.wanted.disk);
        block
    }

    /// The image of a page that is to be written to a copy now.
    pub(super) fn image_for(&mut self, place: usize, page: usize, marks: &Marks) -> Arc<Block> {
        let mut images = self.job.iter().flat_map(|job| &job.images);
        let Some((_, image)) = images.find(|(number, _)| *number == page) else {
            return self.image(page, marks);
        };
        if self.copies[place].standing == Standing::Good {
            return Arc::clone(image);
        }
        // A copy that returns may hold an image with a larger sequence, which this must replace.
        let mut bits = [0; PAGE_WORDS];
        decode_bits(image, |word, value| bits[word] = value);
        self.image_of(page, &bits)
    }

    /// Hands out what a copy lacks next, if it has nothing to do.
    pub(super) fn feed(
        &mut self,
        place: usize,
        now: Time,
        marks: &Marks,
        actions: &mut Vec<RecordAction>,
    ) {
        if self.copies[place].standing == Standing::Out || !self.copies[place].is_idle() {
            return;
        }
        for _ in 0..WRITES_PER_COPY_MAX {
            let Some(page) = self.copies[place].missing.pop() else {
                break;
            };
            let bytes = self.image_for(place, page, marks);
            self.write(place, Target::Page(page), bytes, now, actions);
        }
        let sequence = self.wanted.sequence;
        if self.copies[place].is_idle() && self.copies[place].lacks_superblock(sequence) {
            let mut superblock = self.wanted.clone();
            superblock.copy_index = self.copies[place].index;
            let bytes = Arc::new(superblock.encode());
            self.write(place, Target::Superblock(sequence), bytes, now, actions);
        }
    }

    pub(super) fn write(
        &mut self,
        place: usize,
        target: Target,
        bytes: Arc<Block>,
        now: Time,
        actions: &mut Vec<RecordAction>,
    ) {
        self.write_last += 1;
        let write = WriteId(self.write_last);
        let mut slot = self.copies[place].begin(write, target, now);
        let block = match target {
            Target::Page(page) => {
                if broken!(self, SlotInUseWritten) {
                    slot = Slot::A;
                }
                self.layout.block_of(self.names[page], slot)
            }
            Target::Superblock(_) => Layout::superblock_block(slot),
        };
        actions.push(RecordAction::Write {
            copy: u8::try_from(place).expect("at most 5 copies"),
            write,
            block,
            bytes,
        });
    }
}
