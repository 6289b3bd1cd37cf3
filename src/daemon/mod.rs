// SPDX-License-Identifier: Apache-2.0
//! The life of the process: start, the control thread, connections one after the other, the end.
//!
//! - [`listener`]: where front-ends come from;
//! - [`signals`]: signals as something to read;
//! - [`event_loop`]: waiting for many descriptors;
//! - [`control_loop`]: what the control thread waits for; `ending`: how long the end may take;
//! - `control_socket`: commands of programs and people; `resize`: the largest of them;
//! - [`clock`]: the time all threads agree on;
//! - [`record_files`], [`file_lock`]: the files of the state record, and their locks;
//! - [`first_use`]: the record of images that have none;
//! - `service_manager`: what systemd is told; `process_age`: since when we run;
//! - `start`: what is found out and decided before anything is served;
//! - `disk`, `worker`: the replicas, and the threads that serve them.

pub mod clock;
pub mod control_loop;
mod control_socket;
mod copy_warden;
mod disk;
mod ending;
pub mod event_loop;
pub mod file_lock;
pub mod fingerprints;
pub mod first_use;
pub mod listener;
mod maintenance;
mod process_age;
pub mod record_files;
mod resize;
mod service_manager;
pub mod signals;
mod start;
mod warden;
mod worker;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use tracing::{info, warn};

use crate::config::{Config, FrontEnd, LogFormat, RecordConfig, RecordPlaceError};
use crate::control::events::Names;
use crate::control::report_channel::REPORTS_MAX;
use crate::control::{
    Counters, DiskStatus, EventSink, Reporter, SinkError, logging, report_channel,
};
use crate::device::{Connection, ConnectionHandle, Device, Storage};
use crate::quorum::Command;
use clock::Clock;
use control_loop::{ControlLoop, Wakeup};
use control_socket::{ControlSocket, Service};
use disk::{Disk, DiskError, DiskSetup, Standing};
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
    /// There can be no control socket.
    #[error("there can be no control socket (--control)")]
    ControlSocket(#[source] ListenerError),
    /// There is no place for the state record.
    #[error(transparent)]
    RecordPlace(#[from] RecordPlaceError),
    /// The disk cannot be served.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// Events cannot be written.
    #[error(transparent)]
    Events(#[from] SinkError),
    /// `--blkverify`: the copies differ.
    #[error(
        "the two replicas differ, and --blkverify stops at the first difference; see the log for the sectors"
    )]
    VerifyFailed,
    /// The control thread cannot wait for what it must.
    #[error("the control thread failed")]
    Control(#[source] io::Error),
}

/// What opening a disk may take beside waiting for locks, for the service manager's patience.
const START_MARGIN: Duration = Duration::from_secs(90);

/// The descriptor that tells that a connection has ended.
const TOKEN_CONNECTION: event_loop::Token = 0;

/// Serves the disk of `config` until a signal ends it, or until the only connection it was given
/// does. The log must have been set up, and no other thread started.
///
/// # Errors
/// If the daemon cannot start or go on.
pub fn run(config: Config) -> Result<(), DaemonError> {
    let places = config
        .record
        .places(&config.replicas, record_files::is_file)?;
    listener::check(&config.front_end)?;
    let signals = Signals::block()?;
    service_manager::starting(start_limit(&config));
    let clock = Clock::start();
    let sink = config.events.as_ref().map(EventSink::open).transpose()?;
    let (sender, receiver) = report_channel(REPORTS_MAX).map_err(DaemonError::Control)?;
    let counters = Counters::new(usize::from(config.workers), config.replica_names());
    let wishes = [
        config.clear.map(|replica| Command::Clear { replica }),
        (config.force_current).map(|replica| Command::ForceCurrent { replica }),
    ];
    let config = Arc::new(config);
    let setup = DiskSetup {
        config: Arc::clone(&config),
        reports: sender,
        counters: counters.clone(),
        clock,
    };
    let (disk, device) = Disk::start(setup, wishes.into_iter().flatten().collect())?;
    warn_of_record(&config.record);
    let names = Names {
        disk: config.serial.clone(),
        replicas: config.replica_names(),
        record_copies: places.map_or(Vec::new(), |places| places.copies),
        disk_sectors: disk.looks().sectors,
    };
    let reporter = Reporter::new(names.clone(), sink);
    let service = Service {
        disk: Arc::clone(&disk),
        device: Arc::clone(&device),
        counters: counters.clone(),
        names: names.clone(),
        threshold: config.threshold,
        hub: reporter.hub().clone(),
    };
    // Last, and with the locks of the replicas in hand (but for --incoming): see `listener`. Whoever waits for the socket
    // to appear may connect at once.
    let patience = config.lock_timeout;
    let control = FrontEndSource::open(&config.front_end, patience)
        .map_err(DaemonError::from)
        .and_then(|source| {
            let socket = config.control.as_deref();
            let socket = socket.map(|path| ControlSocket::open(path, patience, service));
            let socket = socket.transpose().map_err(DaemonError::ControlSocket)?;
            ControlLoop::new(clock, signals, receiver, reporter, source)
                .map(|control| (control, socket))
                .map_err(DaemonError::Control)
        });
    let (mut control, control_socket) = match control {
        Ok(control) => control,
        Err(error) => {
            // A disk that was not even served is no unclean end.
            device.lifecycle().gate().close();
            return Err(error);
        }
    };
    say_ready(&config);
    service_manager::ready();
    let show = Show {
        counters: &counters,
        names: &names,
        threshold: config.threshold,
        format: config.log_format,
    };
    let scrub = Command::Scrub {
        repair: config.upkeep.scrub_repairs,
    };
    let mut connection = None;
    let end = serve(&mut control, &disk, &device, &show, scrub, &mut connection);
    info!("stopping");
    service_manager::stopping(ending::limit(&config));
    // First, so that a successor can take the socket, and front-ends that come back find it there.
    control.stop_listening();
    drop(control_socket);
    disk.give_up();
    let drained = connection.is_none_or(|handle| {
        let limit = ending::drain_limit(&config);
        ending::drain(&mut control, handle, clock, limit, || show.all(&disk))
    });
    show.status(&disk);
    if drained {
        // The last connection has ended: nobody opens it any more.
        device.lifecycle().gate().close();
    } else {
        // It has the gate, and keeps it.
        Storage::close(&*disk);
    }
    control.finish();
    show.counters();
    end
}

/// One connection after the other, until the process is to end. Leaves the connection that is there
/// then in `connection`.
fn serve(
    control: &mut ControlLoop,
    disk: &Disk,
    device: &Arc<Device>,
    show: &Show<'_>,
    scrub: Command,
    connection: &mut Option<ConnectionHandle>,
) -> Result<(), DaemonError> {
    loop {
        match control.wait().map_err(DaemonError::Control)? {
            Wakeup::Connection(stream) => {
                match Connection::serve(stream, Arc::clone(device)) {
                    Ok(handle) => {
                        control
                            .add(&handle.ended(), TOKEN_CONNECTION)
                            .map_err(DaemonError::Control)?;
                        *connection = Some(handle);
                        service_manager::connected(true);
                    }
                    // Out of descriptors or threads for the moment: the next one may be luckier.
                    Err(error) => {
                        warn!("cannot serve a front-end: {error}");
                        if !control.accept_next().map_err(DaemonError::Control)? {
                            break Err(DaemonError::Control(error));
                        }
                    }
                }
            }
            Wakeup::Ready(_) => {
                if let Some(handle) = connection.take() {
                    control
                        .remove(&handle.ended())
                        .map_err(DaemonError::Control)?;
                    // The connection has said in the log how it ended.
                    let _ = handle.join();
                    service_manager::connected(false);
                    if !control.accept_next().map_err(DaemonError::Control)? {
                        break Ok(());
                    }
                }
            }
            Wakeup::Terminate => break Ok(()),
            Wakeup::VerifyFailed => break Err(DaemonError::VerifyFailed),
            Wakeup::Scrub => {
                if !disk.command(scrub) {
                    warn!("no scrub is begun: the disk is closed and waits for the guest");
                }
            }
            Wakeup::ShowCounters => show.all(disk),
        }
    }
}

/// How long the start may take where nothing is wrong: locks of the record, of the replicas and the
/// socket are waited for in turn, beside what storage takes.
fn start_limit(config: &Config) -> Duration {
    3 * config.lock_timeout + START_MARGIN
}

/// Says what a disk without a record cannot do. An operator must not learn it from a guest that
/// reads old data.
fn warn_of_record(record: &RecordConfig) {
    if *record == RecordConfig::None {
        warn!(
            "DANGEROUS: running without a state record (--record none): nothing remembers across \
             a restart which replica missed writes, so one that was behind votes again after a \
             restart; before you restart with a replica that failed, rewrite it from a good one"
        );
    }
}

fn say_ready(config: &Config) {
    let place = match &config.front_end {
        FrontEnd::SocketPath(path) => format!("socket {}", path.display()),
        FrontEnd::Fd(fd) => format!("descriptor {fd}"),
        FrontEnd::Systemd => "the socket of its .socket unit".to_owned(),
    };
    info!(
        serial = config.serial,
        replicas = config.replicas.len(),
        threshold = config.threshold,
        workers = config.workers,
        "ready for a front-end on {place}"
    );
    if config.incoming {
        info!("the disk is closed until the rings of an incoming guest start");
    }
}

/// Writes to the log how the disk is and what was counted: text for people, an object for programs.
struct Show<'a> {
    counters: &'a Counters,
    names: &'a Names,
    /// T.
    threshold: usize,
    format: LogFormat,
}

impl Show<'_> {
    fn all(&self, disk: &Disk) {
        self.status(disk);
        self.counters();
    }

    fn status(&self, disk: &Disk) {
        let status = match disk.status() {
            Standing::Open(status) => status,
            Standing::Silent => {
                return warn!("the maintenance thread does not say how the disk is");
            }
            Standing::Closed => return info!("status\nclosed: waiting for the guest"),
            Standing::Changing => return info!("status\nbeing opened or closed"),
        };
        let status = DiskStatus::new(&status, self.names, self.threshold);
        match self.format {
            LogFormat::Text => info!("status\n{status}"),
            LogFormat::Json => info!(status = status.to_json(), "status"),
        }
    }

    fn counters(&self) {
        let totals = self.counters.totals();
        let lines = logging::foreign_lines_suppressed();
        match self.format {
            LogFormat::Text => info!("counters\n{totals}\nlog: {lines} lines left out"),
            LogFormat::Json => info!(
                counters = totals.to_json(),
                lines_left_out = lines,
                "counters"
            ),
        }
    }
}
