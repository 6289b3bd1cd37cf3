// SPDX-License-Identifier: Apache-2.0
//! How long the end of the daemon may take, and the end of its last connection.
//!
//! A guest's request ends within a limit whatever hangs: its replica is taken out after
//! `--io-timeout`, a record of which too many copies hang is given up after
//! [`RECORD_HANG_LIMIT`], and requests that wait for replicas to come back fail when their queue is
//! stopped (rule Q4). So the wait for the connection needs no limit if all of that works; it has
//! one, because a daemon that does not end holds locks that a successor needs.

use std::time::Duration;

use tracing::warn;

use super::clock::Clock;
use super::control_loop::{ControlLoop, Wakeup};
use super::disk;
use crate::config::Config;
use crate::device::ConnectionHandle;
use crate::record::RECORD_HANG_LIMIT;

/// For a machine that does other things, and for the ten seconds a request may try to have its
/// extent resynced (rule V6).
const DRAIN_MARGIN: Duration = Duration::from_secs(20);

/// Then the front-end is shown the end, whether requests have completed or not: it may be what they
/// wait for. It does not matter to the others: what is completed after it stands in its rings.
const CUT_AFTER: Duration = Duration::from_secs(2);

/// How long requests that were fetched may take to complete: one wait for replicas, one for the
/// record.
#[must_use]
pub fn drain_limit(config: &Config) -> Duration {
    config.patience.io_timeout + RECORD_HANG_LIMIT + DRAIN_MARGIN
}

/// How long the whole end may take.
#[must_use]
pub fn limit(config: &Config) -> Duration {
    drain_limit(config) + disk::stop_limit(config)
}

/// Ends a connection, which must be watched by `control`: queues complete what was fetched and show
/// it to the guest first. Whoever wants to know how the disk is meanwhile is told by `show`, and
/// events go out. One that does not end within `limit` is left behind, for the end of the process.
/// Returns whether it has ended.
#[must_use]
pub fn drain(
    control: &mut ControlLoop,
    handle: ConnectionHandle,
    clock: Clock,
    limit: Duration,
    mut show: impl FnMut(),
) -> bool {
    handle.shutdown();
    let end = clock.now().after(limit);
    let mut until = end.min(clock.now().after(CUT_AFTER));
    loop {
        match control.wait_until(Some(until)) {
            Ok(Some(Wakeup::Ready(_))) => {
                // It is over, and has said in the log how.
                let _ = control.remove(&handle.ended());
                let _ = handle.join();
                return true;
            }
            Ok(Some(Wakeup::ShowCounters)) => show(),
            // The end has been asked for; nothing else matters any more.
            Ok(Some(
                Wakeup::Terminate | Wakeup::VerifyFailed | Wakeup::Scrub | Wakeup::Connection(_),
            )) => {}
            Ok(None) if until < end => {
                handle.cut();
                until = end;
            }
            Ok(None) => {
                warn!(
                    "requests of the guest did not complete in time: it has to repeat them at the \
                     next daemon"
                );
                return false;
            }
            Err(error) => {
                warn!("cannot wait for the end of the connection: {error}");
                return false;
            }
        }
    }
}
