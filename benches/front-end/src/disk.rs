// SPDX-License-Identifier: Apache-2.0
//! A virtio disk by way of libblkio: one queue, one buffer for each request in flight.

use std::mem::MaybeUninit;
use std::path::Path;

use anyhow::{Context, bail, ensure};
use blkio::{Blkio, Blkioq, Completion, ReqFlags};

/// The driver and the version of its socket.
const DRIVER: &str = "virtio-blk-vhost-user";

/// A started disk. Request `slot` owns buffer `slot`.
pub struct Disk {
    // Goes before the driver, and the driver before the memory it maps.
    queue: Blkioq,
    _driver: Blkio,
    buffers: *mut u8,
    /// Of each.
    buffer_bytes: usize,
    depth: usize,
    bytes: u64,
    completions: Vec<MaybeUninit<Completion>>,
}

impl Disk {
    /// Connects to the back-end at `socket` for `depth` requests of at most `buffer_bytes` at a
    /// time.
    pub fn open(socket: &Path, depth: usize, buffer_bytes: usize) -> anyhow::Result<Self> {
        ensure!(depth > 0, "the depth must be at least 1");
        ensure!(
            buffer_bytes > 0 && buffer_bytes.is_multiple_of(512),
            "a request must be a multiple of 512 bytes"
        );
        let mut driver = Blkio::new(DRIVER).map_err(plain)?;
        let path = socket.to_str().context("the path is no text")?;
        driver.set_str("path", path).map_err(plain)?;
        driver.connect().map_err(plain)?;
        driver.set_i32("num-queues", 1).map_err(plain)?;
        let alignment = usize::try_from(driver.get_u64("mem-region-alignment").map_err(plain)?)?;
        let memory_bytes = (depth * buffer_bytes).next_multiple_of(alignment);
        let outcome = driver.start().map_err(plain)?;
        let region = driver.alloc_mem_region(memory_bytes).map_err(plain)?;
        driver.map_mem_region(&region).map_err(plain)?;
        let buffers = region.addr as *mut u8;
        // SAFETY: the region is mapped readable and writable for `memory_bytes` bytes, nobody
        // else uses it yet, and it lives as long as the driver in this struct.
        let memory = unsafe { std::slice::from_raw_parts_mut(buffers, memory_bytes) };
        for (index, byte) in memory.iter_mut().enumerate() {
            // Not all the same, for back-ends that look for zeroes.
            *byte = (index % 251) as u8;
        }
        let bytes = driver.get_u64("capacity").map_err(plain)?;
        ensure!(
            bytes >= buffer_bytes as u64,
            "the disk is smaller than one request"
        );
        let Some(queue) = outcome.queues.into_iter().next() else {
            bail!("the driver has no queue");
        };
        Ok(Self {
            queue,
            _driver: driver,
            buffers,
            buffer_bytes,
            depth,
            bytes,
            completions: (0..depth).map(|_| MaybeUninit::uninit()).collect(),
        })
    }

    /// Requests that may be in flight.
    pub fn depth(&self) -> usize {
        self.depth
    }

    /// Size of the disk.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Begins to read `len` bytes at `offset` into the buffer of `slot`.
    pub fn read(&mut self, slot: usize, offset: u64, len: usize) {
        let buffer = self.buffer(slot, len);
        self.queue
            .read(offset, buffer, len, slot, ReqFlags::empty());
    }

    /// Begins to write `len` bytes at `offset` from the buffer of `slot`.
    pub fn write(&mut self, slot: usize, offset: u64, len: usize) {
        let buffer = self.buffer(slot, len);
        self.queue
            .write(offset, buffer, len, slot, ReqFlags::empty());
    }

    /// Begins to flush.
    pub fn flush(&mut self, slot: usize) {
        self.queue.flush(slot, ReqFlags::empty());
    }

    /// Sends what was begun, sleeps until at least one request is complete, and tells which are.
    pub fn wait(&mut self, done: &mut Vec<usize>) -> anyhow::Result<()> {
        let count = self
            .queue
            .do_io(&mut self.completions, 1, None, None)
            .map_err(plain)?;
        for completion in &self.completions[..count] {
            // SAFETY: `do_io` has filled the first `count` completions.
            let completion = unsafe { completion.assume_init_ref() };
            ensure!(
                completion.ret == 0,
                "request failed with status {}",
                completion.ret
            );
            done.push(completion.user_data);
        }
        Ok(())
    }

    fn buffer(&self, slot: usize, len: usize) -> *mut u8 {
        assert!(slot < self.depth && len <= self.buffer_bytes);
        self.buffers.wrapping_add(slot * self.buffer_bytes)
    }
}

/// The library's error as one of ours.
fn plain(error: blkio::Error) -> anyhow::Error {
    anyhow::anyhow!("{} ({})", error.message(), error.errno())
}
