// SPDX-License-Identifier: Apache-2.0
//! The life of the process: start, the control thread, connections one after the other, the end.
//!
//! - [`listener`]: where front-ends come from;
//! - [`signals`]: signals as something to read;
//! - [`event_loop`]: waiting for many descriptors;
//! - [`control_loop`]: what the control thread waits for;
//! - [`clock`]: the time all threads agree on.

pub mod clock;
pub mod control_loop;
pub mod event_loop;
pub mod listener;
pub mod signals;

use std::io;

use thiserror::Error;
use tracing::{info, warn};

use crate::config::{Config, FrontEnd, LogFormat, Record};
use crate::control::events::Names;
use crate::control::report_channel::REPORTS_MAX;
use crate::control::{Counters, EventSink, Reporter, SinkError, logging, report_channel};
use clock::Clock;
use control_loop::{ControlLoop, Wakeup};
use listener::{FrontEndSource, ListenerError};
use signals::{SignalError, Signals};

/// The daemon cannot start, or cannot go on.
#[derive(Debug, Error)]
pub enum DaemonError {
    /// Signals cannot be received.
    #[error("cannot receive signals")]
    Signals(#[from] SignalError),
    /// No front-end can reach us.
    #[error(transparent)]
    Listener(#[from] ListenerError),
    /// Events cannot be written.
    #[error(transparent)]
    Events(#[from] SinkError),
    /// The control thread cannot wait for what it must.
    #[error("the control thread failed")]
    Control(#[source] io::Error),
}

/// Serves the disk of `config` until a signal ends it, or until the only connection it was given
/// does. The log must have been set up, and no other thread started.
///
/// # Errors
/// If the daemon cannot start or go on.
pub fn run(config: Config) -> Result<(), DaemonError> {
    let signals = Signals::block()?;
    let clock = Clock::start();
    warn_of_record(config.record);
    let sink = config.events.as_ref().map(EventSink::open).transpose()?;
    let (_sender, receiver) = report_channel(REPORTS_MAX).map_err(DaemonError::Control)?;
    let counters = Counters::new(usize::from(config.workers), config.replica_names());
    let names = Names {
        disk: config.serial.clone(),
        replicas: config.replica_names(),
        disk_sectors: 0,
    };
    let reporter = Reporter::new(names, sink);
    // Last: whoever waits for the socket to appear may connect at once.
    let source = FrontEndSource::open(&config.front_end)?;
    say_ready(&config);
    let mut control = ControlLoop::new(clock, signals, receiver, reporter, source)
        .map_err(DaemonError::Control)?;
    loop {
        match control.wait().map_err(DaemonError::Control)? {
            Wakeup::Connection(stream) => {
                drop(stream);
                if !control.accept_next().map_err(DaemonError::Control)? {
                    break;
                }
            }
            Wakeup::Terminate => break,
            Wakeup::ShowCounters => show_counters(&counters, config.log_format),
            Wakeup::Ready(_) => {}
        }
    }
    info!("stopping");
    control.finish();
    show_counters(&counters, config.log_format);
    Ok(())
}

/// Says what a disk without a record cannot do. An operator must not learn it from a guest that
/// reads old data.
fn warn_of_record(record: Record) {
    match record {
        Record::None => warn!(
            "running without a state record: nothing remembers across a restart which replica \
             missed writes, so one that was behind votes again after a restart; before you \
             restart with a replica that failed, rewrite it from a good one"
        ),
    }
}

fn say_ready(config: &Config) {
    let place = match &config.front_end {
        FrontEnd::SocketPath(path) => format!("socket {}", path.display()),
        FrontEnd::Fd(fd) => format!("descriptor {fd}"),
    };
    info!(
        serial = config.serial,
        replicas = config.replicas.len(),
        threshold = config.threshold,
        workers = config.workers,
        "ready for a front-end on {place}"
    );
}

/// Writes the counters to the log: a table for people, an object for programs.
fn show_counters(counters: &Counters, format: LogFormat) {
    let totals = counters.totals();
    let lines = logging::foreign_lines_suppressed();
    match format {
        LogFormat::Text => info!("counters\n{totals}\nlog: {lines} lines left out"),
        LogFormat::Json => info!(
            counters = totals.to_json(),
            lines_left_out = lines,
            "counters"
        ),
    }
}
