// SPDX-License-Identifier: Apache-2.0
//! The load: a fixed number of requests in flight at random offsets.

use std::time::{Duration, Instant};

use clap::ValueEnum;

use crate::disk::Disk;

/// Sizes of a mixed load: as often as they stand here.
const SIZES: [usize; 8] = [
    4 << 10,
    4 << 10,
    4 << 10,
    8 << 10,
    8 << 10,
    16 << 10,
    64 << 10,
    256 << 10,
];

/// Requests of a mixed load that are reads, in tenths.
const READS_OF_TEN: u64 = 7;

/// Pages that a small database writes before it flushes.
const PAGES_A_TRANSACTION: u32 = 4;

/// What is asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Mix {
    /// Reads only.
    Read,
    /// Writes only.
    Write,
    /// Reads and writes in turn, by chance.
    Half,
    /// Reads and writes, seven to three, of 4 KiB to 256 KiB, on multiples of their size.
    Sizes,
    /// Writes, each flushed before the next of its slot; both together are one request.
    WriteFlush,
    /// Four writes, then a flush, as small databases do; the five are one request.
    Database,
}

impl Mix {
    /// The longest single read or write, if the block size does not say it.
    pub fn bytes_max(self, block_bytes: usize) -> usize {
        match self {
            Self::Sizes => SIZES[SIZES.len() - 1],
            Self::Read | Self::Write | Self::Half | Self::WriteFlush | Self::Database => {
                block_bytes
            }
        }
    }
}

/// What was measured in one run.
pub struct Measured {
    /// From the first to the last look at the clock.
    pub elapsed: Duration,
    /// Of every request that was completed, in nanoseconds.
    pub latencies_ns: Vec<u64>,
}

/// A request in flight.
#[derive(Clone, Copy)]
struct Slot {
    started: Instant,
    /// Writes to come before its flush.
    writes_left: u32,
    owes_flush: bool,
}

/// A disk that is kept busy.
pub struct Load {
    disk: Disk,
    mix: Mix,
    block_bytes: usize,
    random: u64,
    slots: Vec<Slot>,
    done: Vec<usize>,
}

impl Load {
    /// Prepares a load on `disk` with requests of `block_bytes`; `seed` chooses the offsets.
    pub fn new(disk: Disk, mix: Mix, block_bytes: usize, seed: u64) -> anyhow::Result<Self> {
        anyhow::ensure!(seed != 0, "the seed must not be 0");
        let depth = disk.depth();
        let slot = Slot {
            started: Instant::now(),
            writes_left: 0,
            owes_flush: false,
        };
        Ok(Self {
            disk,
            mix,
            block_bytes,
            random: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15),
            slots: vec![slot; depth],
            done: Vec::with_capacity(depth),
        })
    }

    /// Keeps the disk busy for `duration`, then lets what is in flight end.
    pub fn run(&mut self, duration: Duration) -> anyhow::Result<Measured> {
        let mut latencies_ns = Vec::with_capacity(1 << 20);
        let begin = Instant::now();
        for slot in 0..self.disk.depth() {
            self.begin(slot, begin);
        }
        let mut in_flight = self.disk.depth();
        let mut now = begin;
        while in_flight > 0 {
            self.done.clear();
            self.disk.wait(&mut self.done)?;
            now = Instant::now();
            let go_on = now - begin < duration;
            for index in 0..self.done.len() {
                let slot = self.done[index];
                if self.go_on(slot) {
                    continue;
                }
                let latency = now - self.slots[slot].started;
                latencies_ns.push(u64::try_from(latency.as_nanos())?);
                if go_on {
                    self.begin(slot, now);
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

    /// Begins a request.
    fn begin(&mut self, slot: usize, now: Instant) {
        let random = self.next_random();
        let choice = random % 1000;
        let (write, len, writes_left, owes_flush) = match self.mix {
            Mix::Read => (false, self.block_bytes, 0, false),
            Mix::Write => (true, self.block_bytes, 0, false),
            Mix::Half => (choice < 500, self.block_bytes, 0, false),
            Mix::Sizes => {
                let size = SIZES[(choice / 10) as usize % SIZES.len()];
                (choice % 10 >= READS_OF_TEN, size, 0, false)
            }
            Mix::WriteFlush => (true, self.block_bytes, 0, true),
            Mix::Database => (true, self.block_bytes, PAGES_A_TRANSACTION - 1, true),
        };
        self.slots[slot] = Slot {
            started: now,
            writes_left,
            owes_flush,
        };
        self.transfer(slot, write, len);
    }

    /// Begins the next step of a request that has several. Returns whether there was one.
    fn go_on(&mut self, slot: usize) -> bool {
        let state = &mut self.slots[slot];
        if state.writes_left > 0 {
            state.writes_left -= 1;
            self.transfer(slot, true, self.block_bytes);
            return true;
        }
        let flushes = std::mem::take(&mut state.owes_flush);
        if flushes {
            self.disk.flush(slot);
        }
        flushes
    }

    fn transfer(&mut self, slot: usize, write: bool, len: usize) {
        let random = self.next_random() >> 10;
        let offset = random % (self.disk.bytes() / len as u64) * len as u64;
        if write {
            self.disk.write(slot, offset, len);
        } else {
            self.disk.read(slot, offset, len);
        }
    }

    /// Marsaglia's xorshift with shifts 13, 7, 17.
    fn next_random(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }
}
