// SPDX-License-Identifier: Apache-2.0
//! Puts a load on a vhost-user-blk back-end and tells what it did: requests a second, latencies,
//! and the processor time and memory that the back-end took.
//!
//! The front-end is libblkio's virtio driver, so that it knows nothing of how ours works. One
//! queue, a fixed number of requests in flight, random aligned offsets.

mod disk;
mod limit;
mod load;
mod report;

use std::path::PathBuf;
use std::time::Duration;
use std::{process, thread};

use anyhow::Context;
use clap::Parser;

use crate::disk::Disk;
use crate::limit::Limit;
use crate::load::{Load, Measured, Mix};
use crate::report::{Server, ServerClock};

/// Between the last request and the idle time that is measured.
const SETTLE: Duration = Duration::from_millis(300);

/// Puts a load on a vhost-user-blk back-end and prints one JSON object.
#[derive(Parser)]
struct Arguments {
    /// Socket of the back-end.
    #[arg(long, required_unless_present = "files")]
    socket: Option<PathBuf>,
    /// Instead of a back-end: read these files in one batch and compare them, or write them all.
    #[arg(long, num_args = 2.., conflicts_with = "socket")]
    files: Vec<PathBuf>,
    /// Open the files past the page cache.
    #[arg(long, requires = "files")]
    direct: bool,
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
    /// Process of the back-end, whose processor time and memory are measured.
    #[arg(long)]
    server: Option<u32>,
    /// Seconds without a request after the run, in which the back-end's processor time is measured.
    #[arg(long)]
    idle_seconds: Option<f64>,
    /// Chooses the offsets.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let server = arguments
        .server
        .or_else(|| (!arguments.files.is_empty()).then(process::id));
    let clock = server.map(ServerClock::new);
    let mut load = Busy::new(&arguments)?;
    load.run(Duration::from_secs_f64(arguments.warm_up_seconds))?;
    let cpu_before = clock.as_ref().map(ServerClock::read).transpose()?;
    let measured = load.run(Duration::from_secs_f64(arguments.seconds))?;
    let mut server = Server::default();
    if let Some((clock, before)) = clock.zip(cpu_before) {
        server.cpu = Some(clock.read()? - before);
        server.rss_mib = Some(clock.rss_mib()?);
        if let Some(seconds) = arguments.idle_seconds {
            // What the last requests left to do is not idleness.
            thread::sleep(SETTLE);
            let before = clock.read()?;
            thread::sleep(Duration::from_secs_f64(seconds));
            let used = clock.read()? - before;
            server.idle_cpu_percent = Some(used.as_secs_f64() / seconds * 100.0);
        }
    }
    let report = report::summarize(measured, &server);
    println!("{}", serde_json::to_string(&report)?);
    Ok(())
}

/// What is kept busy.
enum Busy {
    BackEnd(Load),
    Files(Limit),
}

impl Busy {
    fn new(arguments: &Arguments) -> anyhow::Result<Self> {
        let (mix, depth, block_bytes) = (arguments.mix, arguments.depth, arguments.block_bytes);
        let Some(socket) = &arguments.socket else {
            let (files, direct) = (&arguments.files, arguments.direct);
            let limit = Limit::open(files, direct, mix, depth, block_bytes, arguments.seed)?;
            return Ok(Self::Files(limit));
        };
        let disk = Disk::open(socket, depth, mix.bytes_max(block_bytes))
            .with_context(|| format!("cannot use the back-end at {}", socket.display()))?;
        let load = Load::new(disk, mix, block_bytes, arguments.seed)?;
        Ok(Self::BackEnd(load))
    }

    fn run(&mut self, duration: Duration) -> anyhow::Result<Measured> {
        match self {
            Self::BackEnd(load) => load.run(duration),
            Self::Files(limit) => limit.run(duration),
        }
    }
}
