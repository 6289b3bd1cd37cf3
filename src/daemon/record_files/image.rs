// SPDX-License-Identifier: Apache-2.0
//! What is in a copy of the record, read whole into memory: at most 4.6 MB, by a thread of its own
//! where the storage may hang. Nobody has to ask the storage again then.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::record::{BLOCK_BYTES, Block, LENGTH_BYTES_MAX, ReadBlock};

/// Bytes that are read at once.
const PIECE_BYTES: usize = 64 * BLOCK_BYTES;

/// The whole blocks of a copy.
#[derive(Clone, Default)]
pub struct RecordImage {
    bytes: Vec<u8>,
    /// Length of the file.
    file_bytes: u64,
    /// Blocks that cannot be read, and what the system said.
    unreadable: BTreeMap<usize, i32>,
}

impl fmt::Debug for RecordImage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RecordImage({} bytes)", self.file_bytes)
    }
}

impl RecordImage {
    /// Reads the file from its beginning, as far as a copy can reach. Blocks that cannot be read
    /// are remembered as such.
    ///
    /// # Errors
    /// If the length of the file cannot be told.
    pub fn read(file: &File) -> io::Result<Self> {
        let file_bytes = file.metadata()?.len();
        let len = file_bytes.min(LENGTH_BYTES_MAX);
        let blocks = usize::try_from(len).expect("a few megabytes") / BLOCK_BYTES;
        let mut image = Self {
            bytes: vec![0; blocks * BLOCK_BYTES],
            file_bytes,
            unreadable: BTreeMap::new(),
        };
        for (number, piece) in image.bytes.chunks_mut(PIECE_BYTES).enumerate() {
            let first = number * (PIECE_BYTES / BLOCK_BYTES);
            if read_at(file, first, piece).is_ok() {
                continue;
            }
            for (index, block) in piece.chunks_mut(BLOCK_BYTES).enumerate() {
                if let Err(errno) = read_at(file, first + index, block) {
                    image.unreadable.insert(first + index, errno);
                }
            }
        }
        Ok(image)
    }

    /// How long the file was.
    #[must_use]
    pub fn file_bytes(&self) -> u64 {
        self.file_bytes
    }

    /// Whether every block could be read.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.unreadable.is_empty()
    }

    /// The last block and its number; `None` if there is none.
    #[must_use]
    pub fn last_block(&self) -> Option<(u64, &[u8])> {
        let number = u64::try_from(self.bytes.len() / BLOCK_BYTES).ok()?;
        let block = self.bytes.chunks(BLOCK_BYTES).next_back()?;
        Some((number - 1, block))
    }
}

fn read_at(file: &File, block: usize, into: &mut [u8]) -> Result<(), i32> {
    let offset = u64::try_from(block * BLOCK_BYTES).expect("a few megabytes");
    // The end of the file inside a block has no errno of its own.
    let errno = |error: io::Error| error.raw_os_error().unwrap_or(libc::EIO);
    file.read_exact_at(into, offset).map_err(errno)
}

impl ReadBlock for &RecordImage {
    fn read_block(&mut self, block: u64, into: &mut Block) -> Result<(), i32> {
        let number = usize::try_from(block).map_err(|_| libc::EIO)?;
        if let Some(&errno) = self.unreadable.get(&number) {
            return Err(errno);
        }
        (&self.bytes[..]).read_block(block, into)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_blocks_are_read_and_nothing_beyond() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("copy");
        let mut bytes = vec![3; 70 * BLOCK_BYTES];
        bytes[69 * BLOCK_BYTES..].fill(4);
        bytes.extend([5; 100]);
        std::fs::write(&path, bytes).unwrap();
        let image = RecordImage::read(&File::open(path).unwrap()).unwrap();
        assert_eq!(image.file_bytes(), 70 * 4096 + 100);
        assert_eq!(image.last_block(), Some((69, &[4; BLOCK_BYTES][..])));
        assert!(image.is_whole());
        let mut block = [0; BLOCK_BYTES];
        let mut reader = &image;
        assert_eq!(reader.read_block(69, &mut block), Ok(()));
        assert_eq!(block, [4; BLOCK_BYTES]);
        assert_eq!(reader.read_block(70, &mut block), Err(libc::EIO));
        assert_eq!(reader.read_block(u64::MAX, &mut block), Err(libc::EIO));
    }

    #[test]
    fn blocks_that_cannot_be_read_do_not_take_others_along() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("copy");
        std::fs::write(&path, [1; 2 * BLOCK_BYTES]).unwrap();
        // Opened for writing only: no block of it can be read.
        let file = File::options().write(true).open(path).unwrap();
        let image = RecordImage::read(&file).unwrap();
        let mut reader = &image;
        let mut block = [0; BLOCK_BYTES];
        assert_eq!(reader.read_block(0, &mut block), Err(libc::EBADF));
        assert_eq!(image.unreadable.len(), 2);
    }
}
