// SPDX-License-Identifier: Apache-2.0
//! The load: a fixed number of requests in flight at random offsets.

use std::time::{Duration, Instant};

use clap::ValueEnum;

use crate::disk::Disk;

/// What is asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Mix {
    /// Reads only.
    Read,
    /// Writes only.
    Write,
    /// Reads and writes in turn, by chance.
    Half,
}

/// What was measured in one run.
pub struct Measured {
    /// From the first to the last look at the clock.
    pub elapsed: Duration,
    /// Of every request that was completed, in nanoseconds.
    pub latencies_ns: Vec<u64>,
}

/// A disk that is kept busy.
pub struct Load {
    disk: Disk,
    mix: Mix,
    random: u64,
    started: Vec<Instant>,
    done: Vec<usize>,
}

impl Load {
    /// Prepares a load on `disk`; `seed` chooses the offsets.
    pub fn new(disk: Disk, mix: Mix, seed: u64) -> anyhow::Result<Self> {
        anyhow::ensure!(seed != 0, "the seed must not be 0");
        let depth = disk.depth();
        Ok(Self {
            disk,
            mix,
            random: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15),
            started: vec![Instant::now(); depth],
            done: Vec::with_capacity(depth),
        })
    }

    /// Keeps the disk busy for `duration`, then lets what is in flight end.
    pub fn run(&mut self, duration: Duration) -> anyhow::Result<Measured> {
        let mut latencies_ns = Vec::with_capacity(1 << 20);
        let begin = Instant::now();
        for slot in 0..self.disk.depth() {
            self.submit(slot, begin);
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
                let latency = now - self.started[slot];
                latencies_ns.push(u64::try_from(latency.as_nanos())?);
                if go_on {
                    self.submit(slot, now);
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

    fn submit(&mut self, slot: usize, now: Instant) {
        let random = self.next_random();
        let block = (random >> 1) % self.disk.blocks();
        let write = match self.mix {
            Mix::Read => false,
            Mix::Write => true,
            Mix::Half => random & 1 == 1,
        };
        self.started[slot] = now;
        if write {
            self.disk.write(slot, block);
        } else {
            self.disk.read(slot, block);
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
