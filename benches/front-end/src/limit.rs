// SPDX-License-Identifier: Apache-2.0
//! What could be reached: a loop without virtio, memory of a guest, locks or a record that reads
//! three files in one io_uring batch and compares what came, or writes all of them.
//!
//! It is no disk: nothing is ordered and nobody waits for anybody. Whoever does what a disk must do
//! takes longer; how much longer is the question.

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use io_uring::{IoUring, opcode, types};

use crate::load::{Measured, Mix};

/// Where buffers begin, for files that are opened past the page cache.
const ALIGNMENT: usize = 4096;

struct Slot {
    started: Instant,
    write: bool,
    outstanding: usize,
}

/// Three files that are kept busy.
pub struct Limit {
    ring: IoUring,
    files: Vec<File>,
    memory: Vec<u8>,
    /// Where the first buffer begins in `memory`.
    first: usize,
    mix: Mix,
    block_bytes: usize,
    blocks: u64,
    random: u64,
    slots: Vec<Slot>,
}

impl Limit {
    /// Opens `paths`, past the page cache if `direct`.
    pub fn open(
        paths: &[PathBuf],
        direct: bool,
        mix: Mix,
        depth: usize,
        block_bytes: usize,
        seed: u64,
    ) -> anyhow::Result<Self> {
        ensure!(depth > 0 && seed != 0, "depth and seed must not be 0");
        ensure!(
            matches!(mix, Mix::Read | Mix::Write | Mix::Half),
            "only read, write and half have a limit"
        );
        let flags = if direct { libc::O_DIRECT } else { 0 };
        let open = |path: &PathBuf| {
            let mut options = OpenOptions::new();
            options.read(true).write(true).custom_flags(flags);
            options
                .open(path)
                .with_context(|| format!("cannot open {}", path.display()))
        };
        let files: Vec<File> = paths.iter().map(open).collect::<anyhow::Result<_>>()?;
        let shortest = files.iter().map(|file| file.metadata().map(|m| m.len()));
        let shortest = shortest.collect::<Result<Vec<u64>, _>>()?.into_iter().min();
        let blocks = shortest.unwrap_or(0) / block_bytes as u64;
        ensure!(blocks > 0, "the files are smaller than one request");
        let memory = vec![1u8; depth * files.len() * block_bytes + ALIGNMENT];
        let first = memory.as_ptr().align_offset(ALIGNMENT);
        let entries = u32::try_from((depth * files.len()).next_power_of_two())?;
        let ring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .build(entries)
            .context("io_uring is not to be had")?;
        let slot = || Slot {
            started: Instant::now(),
            write: false,
            outstanding: 0,
        };
        Ok(Self {
            ring,
            files,
            memory,
            first,
            mix,
            block_bytes,
            blocks,
            random: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15),
            slots: (0..depth).map(|_| slot()).collect(),
        })
    }

    /// Keeps the files busy for `duration`.
    pub fn run(&mut self, duration: Duration) -> anyhow::Result<Measured> {
        let mut latencies_ns = Vec::with_capacity(1 << 20);
        let begin = Instant::now();
        for slot in 0..self.slots.len() {
            self.begin(slot, begin)?;
        }
        let mut in_flight = self.slots.len();
        let mut now = begin;
        let mut ended = Vec::with_capacity(self.slots.len());
        while in_flight > 0 {
            self.ring.submit_and_wait(1)?;
            for completion in self.ring.completion() {
                ensure!(
                    usize::try_from(completion.result()) == Ok(self.block_bytes),
                    "a transfer ended with {}",
                    completion.result()
                );
                let slot = usize::try_from(completion.user_data())?;
                self.slots[slot].outstanding -= 1;
                if self.slots[slot].outstanding == 0 {
                    ended.push(slot);
                }
            }
            now = Instant::now();
            for slot in ended.drain(..) {
                if !self.slots[slot].write {
                    self.compare(slot)?;
                }
                let latency = now - self.slots[slot].started;
                latencies_ns.push(u64::try_from(latency.as_nanos())?);
                if now - begin < duration {
                    begin_again(
                        &mut self.ring,
                        &mut self.slots[slot],
                        &Transfer {
                            files: &self.files,
                            memory: self.memory.as_mut_ptr().wrapping_add(self.first),
                            block_bytes: self.block_bytes,
                            slot,
                        },
                        choose(&mut self.random, self.mix, self.blocks),
                        now,
                    )?;
                } else {
                    in_flight -= 1;
                }
            }
        }
        Ok(Measured {
            elapsed: now - begin,
            latencies_ns,
        })
    }

    fn begin(&mut self, slot: usize, now: Instant) -> anyhow::Result<()> {
        let transfer = Transfer {
            files: &self.files,
            memory: self.memory.as_mut_ptr().wrapping_add(self.first),
            block_bytes: self.block_bytes,
            slot,
        };
        let choice = choose(&mut self.random, self.mix, self.blocks);
        begin_again(
            &mut self.ring,
            &mut self.slots[slot],
            &transfer,
            choice,
            now,
        )
    }

    fn compare(&self, slot: usize) -> anyhow::Result<()> {
        let count = self.files.len();
        let copy = |file: usize| {
            let start = self.first + (slot * count + file) * self.block_bytes;
            &self.memory[start..start + self.block_bytes]
        };
        let equal = (1..count).all(|file| copy(0) == copy(file));
        // Beside writes, a read may see one file before and another after.
        ensure!(equal || self.mix == Mix::Half, "the files differ");
        Ok(())
    }
}

struct Transfer<'a> {
    files: &'a [File],
    memory: *mut u8,
    block_bytes: usize,
    slot: usize,
}

/// Whether to write, and which block.
fn choose(random: &mut u64, mix: Mix, blocks: u64) -> (bool, u64) {
    // Marsaglia's xorshift with shifts 13, 7, 17.
    *random ^= *random << 13;
    *random ^= *random >> 7;
    *random ^= *random << 17;
    let write = mix == Mix::Write || mix == Mix::Half && *random & 1 == 1;
    (write, (*random >> 1) % blocks)
}

fn begin_again(
    ring: &mut IoUring,
    state: &mut Slot,
    transfer: &Transfer<'_>,
    (write, block): (bool, u64),
    now: Instant,
) -> anyhow::Result<()> {
    state.started = now;
    state.write = write;
    state.outstanding = transfer.files.len();
    let offset = block * transfer.block_bytes as u64;
    let len = u32::try_from(transfer.block_bytes)?;
    for (index, file) in transfer.files.iter().enumerate() {
        let place = transfer.slot * transfer.files.len() + index;
        let buffer = transfer.memory.wrapping_add(place * transfer.block_bytes);
        let fd = types::Fd(file.as_raw_fd());
        let entry = if write {
            opcode::Write::new(fd, buffer, len).offset(offset).build()
        } else {
            opcode::Read::new(fd, buffer, len).offset(offset).build()
        };
        let entry = entry.user_data(transfer.slot as u64);
        // SAFETY: the files and the memory live as long as the ring, every run waits for all
        // transfers, and no two of them that are under way share a buffer.
        unsafe { ring.submission().push(&entry) }.context("the ring is full")?;
    }
    Ok(())
}
