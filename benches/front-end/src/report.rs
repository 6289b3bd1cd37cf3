// SPDX-License-Identifier: Apache-2.0
//! What a run amounts to, and what the process that served it took.

use std::fs;
use std::ops::Sub;
use std::time::Duration;

use anyhow::{Context, ensure};
use serde::Serialize;

use crate::load::Measured;

/// One run in numbers.
#[derive(Serialize)]
pub struct Report {
    requests: usize,
    requests_per_second: f64,
    latency_us_mean: f64,
    latency_us_p50: f64,
    latency_us_p99: f64,
    latency_us_p999: f64,
    latency_us_max: f64,
    /// Of the server, user and system together; absent if it was not asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    cpu_us_per_request: Option<f64>,
    /// Share of one processor that the server took while nothing was asked of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    idle_cpu_percent: Option<f64>,
    /// Most memory the server ever had resident.
    #[serde(skip_serializing_if = "Option::is_none")]
    server_rss_mib: Option<f64>,
}

/// What the server took.
#[derive(Default)]
pub struct Server {
    /// Processor time during the run.
    pub cpu: Option<Duration>,
    /// See [`Report`].
    pub idle_cpu_percent: Option<f64>,
    /// See [`Report`].
    pub rss_mib: Option<f64>,
}

/// Sums up a run.
pub fn summarize(measured: Measured, server: &Server) -> Report {
    let mut latencies = measured.latencies_ns;
    latencies.sort_unstable();
    let requests = latencies.len();
    let micros = |nanos: u64| nanos as f64 / 1e3;
    let rank = |share: f64| micros(latencies[((requests - 1) as f64 * share) as usize]);
    Report {
        requests,
        requests_per_second: requests as f64 / measured.elapsed.as_secs_f64(),
        latency_us_mean: micros(latencies.iter().sum()) / requests as f64,
        latency_us_p50: rank(0.5),
        latency_us_p99: rank(0.99),
        latency_us_p999: rank(0.999),
        latency_us_max: rank(1.0),
        cpu_us_per_request: (server.cpu).map(|cpu| cpu.as_secs_f64() * 1e6 / requests as f64),
        idle_cpu_percent: server.idle_cpu_percent,
        server_rss_mib: server.rss_mib,
    }
}

/// Reads the processor time of a process, all its threads included (proc(5), `stat`).
pub struct ServerClock {
    pid: u32,
}

/// Processor time since the process began.
#[derive(Clone, Copy)]
pub struct CpuTime(Duration);

impl ServerClock {
    /// The clock of process `pid`.
    pub fn new(pid: u32) -> Self {
        Self { pid }
    }

    /// Most memory it has had resident (proc(5), `status`).
    pub fn rss_mib(&self) -> anyhow::Result<f64> {
        let text = self.file("status")?;
        let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let line = line.context("status has no VmHWM")?;
        let kib: f64 = line.trim().trim_end_matches(" kB").parse()?;
        Ok(kib / 1024.0)
    }

    fn file(&self, name: &str) -> anyhow::Result<String> {
        fs::read_to_string(format!("/proc/{}/{name}", self.pid)).context("the server is gone")
    }

    /// The time now.
    pub fn read(&self) -> anyhow::Result<CpuTime> {
        let text = self.file("stat")?;
        // The second field is the name in parentheses, which may hold anything.
        let (_, fields) = text.rsplit_once(')').context("stat has no name")?;
        let fields: Vec<&str> = fields.split_ascii_whitespace().collect();
        // Fields 14 and 15 of the whole line, user and system time in ticks.
        ensure!(fields.len() > 12, "stat is too short");
        let ticks = fields[11].parse::<u64>()? + fields[12].parse::<u64>()?;
        Ok(CpuTime(Duration::from_secs_f64(
            ticks as f64 / ticks_per_second()?,
        )))
    }
}

impl Sub for CpuTime {
    type Output = Duration;

    fn sub(self, earlier: Self) -> Duration {
        self.0.saturating_sub(earlier.0)
    }
}

fn ticks_per_second() -> anyhow::Result<f64> {
    // SAFETY: `sysconf` reads no memory of ours.
    let ticks = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
    ensure!(ticks > 0, "the system does not tell its clock ticks");
    Ok(ticks as f64)
}
