// SPDX-License-Identifier: Apache-2.0
//! Copies in memory, a recorder that writes to them, and what a power cut leaves of its writes.

use crate::quorum::{Bitmap, Geometry, Marks, ReadPattern};
use crate::record::*;
use crate::units::{ReplicaId, Time};

pub const DISK: DiskUuid = DiskUuid([7; 16]);

pub fn d() -> Bitmap {
    Bitmap::Dirty
}

pub fn b(replica: usize) -> Bitmap {
    Bitmap::Behind(ReplicaId::new(replica))
}

/// A superblock of a disk of `extents` extents of 8 sectors with three replicas.
pub fn superblock(extents: u64) -> Superblock {
    let geometry = Geometry::with_extent_shift(extents * 8, 8, 3).unwrap();
    let mut superblock = Superblock::new(DISK, &geometry, 3, 2, ReadPattern::Quorum);
    for (slot, member) in superblock.members.iter_mut().take(3).enumerate() {
        member.uuid = [u8::try_from(slot).unwrap() + 1; 16];
        member.state = MemberState::InSync;
    }
    superblock
}

/// The bytes of the copies.
pub type Files = Vec<Vec<u8>>;

pub fn files(copies: usize, extents: u64) -> Files {
    let length = usize::try_from(superblock(extents).layout().length_bytes()).unwrap();
    vec![vec![0; length]; copies]
}

pub fn put(file: &mut [u8], block: u64, bytes: &[u8]) {
    let start = usize::try_from(block).unwrap() * BLOCK_BYTES;
    file[start..start + bytes.len()].copy_from_slice(bytes);
}

/// Opens those of the copies whose bit is set in `present`.
pub fn open_some(files: &Files, present: u32, options: &OpenOptions) -> Result<Opened, Refusal> {
    open(&mut sources(files, present), options)
}

/// Those of the copies whose bit is set in `present`.
pub fn sources(files: &Files, present: u32) -> Vec<CopySource<&[u8]>> {
    files
        .iter()
        .enumerate()
        .map(|(place, file)| CopySource {
            name: format!("copy{place}"),
            found: if present & (1 << place) != 0 {
                Found::Present(file.as_slice())
            } else {
                Found::Missing
            },
        })
        .collect()
}

pub fn open_all(files: &Files) -> Result<Opened, Refusal> {
    open_some(files, u32::MAX, &OpenOptions::default())
}

/// A write the recorder asked for.
#[derive(Clone)]
pub struct Pending {
    pub copy: u8,
    pub write: WriteId,
    pub block: u64,
    pub bytes: std::sync::Arc<Block>,
}

/// A recorder, its marks, and the world it writes to.
pub struct Machine {
    pub files: Files,
    pub marks: Marks,
    pub recorder: Recorder,
    pub now: Time,
    pub pending: Vec<Pending>,
    /// Everything but writes, in order.
    pub said: Vec<RecordAction>,
}

impl Machine {
    /// A record is created and its first epoch begins.
    pub fn create(copies: usize, extents: u64) -> Self {
        let mut machine = Self::created(copies, extents);
        machine.poll();
        machine.run();
        machine
    }

    /// A record that is about to be created.
    pub fn created(copies: usize, extents: u64) -> Self {
        let opened = Opened::create(superblock(extents), copies);
        let writable = vec![true; copies];
        Self::from_opened(files(copies, extents), opened, &writable, 1).unwrap()
    }

    /// What copies say, opened by a run of number `run`.
    pub fn open(files: Files, run: u8) -> Result<Self, Refusal> {
        let opened = open_all(&files)?;
        let writable = vec![true; files.len()];
        Ok(Self::from_opened(files, opened, &writable, run).unwrap())
    }

    pub fn from_opened(
        files: Files,
        opened: Opened,
        writable: &[bool],
        run: u8,
    ) -> Result<Self, RecorderError> {
        let superblock = &opened.superblock;
        let marks = Marks::new(superblock.slots(), superblock.extents(), true);
        opened.load(&marks);
        Ok(Self {
            files,
            marks,
            recorder: Recorder::new(opened, writable, [run; 16])?,
            now: Time::default(),
            pending: Vec::new(),
            said: Vec::new(),
        })
    }

    pub fn tell(&mut self, event: RecordEvent) {
        let mut actions = Vec::new();
        self.recorder
            .handle(self.now, event, &self.marks, &mut actions);
        for action in actions {
            match action {
                RecordAction::Write {
                    copy,
                    write,
                    block,
                    bytes,
                } => self.pending.push(Pending {
                    copy,
                    write,
                    block,
                    bytes,
                }),
                other => self.said.push(other),
            }
        }
    }

    pub fn poll(&mut self) {
        self.tell(RecordEvent::Poll);
    }

    /// Carries out the write at `index` and answers it.
    pub fn finish(&mut self, index: usize, errno: Option<i32>) {
        let pending = self.pending.remove(index);
        if errno.is_none() {
            let file = &mut self.files[usize::from(pending.copy)];
            put(file, pending.block, &pending.bytes[..]);
        }
        let (copy, write) = (pending.copy, pending.write);
        self.tell(RecordEvent::Written { copy, write, errno });
    }

    /// Carries out everything.
    pub fn run(&mut self) {
        while !self.pending.is_empty() {
            self.finish(0, None);
        }
    }

    /// Carries out everything but the writes to these places.
    pub fn run_without(&mut self, places: &[u8]) {
        while let Some(index) = self.pending.iter().position(|p| !places.contains(&p.copy)) {
            self.finish(index, None);
        }
    }

    /// Takes a copy back.
    pub fn readmit(&mut self, copy: u8) -> Result<(), RecorderError> {
        let mut file = self.files[usize::from(copy)].as_slice();
        self.recorder.readmit(copy, "copy", &mut file)
    }

    /// Sets a bit and waits until it is durable.
    pub fn set(&mut self, bitmap: Bitmap, extent: u64) {
        let _ = self.marks.ask(bitmap, extent);
        self.poll();
        self.run();
        assert!(self.marks.is_durable(bitmap, extent));
    }
}

/// Extents set in what was opened.
pub fn set_bits(opened: &Opened, bitmap: Bitmap) -> Vec<u64> {
    let superblock = &opened.superblock;
    let marks = Marks::new(superblock.slots(), superblock.extents(), true);
    opened.load(&marks);
    marks.iter(bitmap).collect()
}
