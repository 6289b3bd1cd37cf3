// SPDX-License-Identifier: Apache-2.0
//! Puts a load on a vhost-user-blk back-end and tells what it did: requests a second, latencies,
//! and the processor time that the back-end took for each request.
//!
//! The front-end is libblkio's virtio driver, so that it knows nothing of how ours works. One
//! queue, a fixed number of requests in flight, random aligned offsets.

mod disk;
mod load;
mod report;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use clap::Parser;

use crate::disk::Disk;
use crate::load::{Load, Mix};
use crate::report::ServerClock;

/// Puts a load on a vhost-user-blk back-end and prints one JSON object.
#[derive(Parser)]
struct Arguments {
    /// Socket of the back-end.
    #[arg(long)]
    socket: PathBuf,
    /// What to ask for.
    #[arg(long, value_enum)]
    mix: Mix,
    /// Bytes of a request, a multiple of 512.
    #[arg(long, default_value_t = 4096)]
    block_bytes: usize,
    /// Requests in flight.
    #[arg(long, default_value_t = 32)]
    depth: usize,
    /// Seconds that are measured.
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,
    /// Seconds before that.
    #[arg(long, default_value_t = 0.3)]
    warm_up_seconds: f64,
    /// Process of the back-end, whose processor time is measured.
    #[arg(long)]
    server: Option<u32>,
    /// Chooses the offsets.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let disk = Disk::open(&arguments.socket, arguments.depth, arguments.block_bytes)
        .with_context(|| format!("cannot use the back-end at {}", arguments.socket.display()))?;
    let clock = arguments.server.map(ServerClock::new);
    let mut load = Load::new(disk, arguments.mix, arguments.seed)?;
    load.run(Duration::from_secs_f64(arguments.warm_up_seconds))?;
    let cpu_before = clock.as_ref().map(ServerClock::read).transpose()?;
    let measured = load.run(Duration::from_secs_f64(arguments.seconds))?;
    let cpu_after = clock.as_ref().map(ServerClock::read).transpose()?;
    let cpu = cpu_after
        .zip(cpu_before)
        .map(|(after, before)| after - before);
    let report = report::summarize(measured, cpu);
    println!("{}", serde_json::to_string(&report)?);
    Ok(())
}
