// SPDX-License-Identifier: Apache-2.0
//! What systemd, or who speaks its protocol, is told about the daemon (sd_notify(3)). Without it
//! nothing is told and nothing is missing.

use std::time::Duration;

use sd_notify::NotifyState;
use tracing::debug;

/// The daemon is starting. It may take `limit` from now on: replicas are opened, and locks are
/// waited for longer than a service manager has patience unless it is asked for.
pub fn starting(limit: Duration) {
    let extended = NotifyState::ExtendTimeoutUsec(micros(limit));
    notify(&[extended, NotifyState::Status("opening the replicas")]);
}

/// Front-ends can connect.
pub fn ready() {
    notify(&[NotifyState::Ready, NotifyState::Status(WAITING)]);
}

/// A front-end has come, or the one that was there has gone.
pub fn connected(connected: bool) {
    let status = if connected {
        "serving a front-end"
    } else {
        WAITING
    };
    notify(&[NotifyState::Status(status)]);
}

/// The daemon ends, which takes `limit` at most.
pub fn stopping(limit: Duration) {
    notify(&[
        NotifyState::Stopping,
        NotifyState::ExtendTimeoutUsec(micros(limit)),
        NotifyState::Status("completing requests and closing the disk"),
    ]);
}

const WAITING: &str = "waiting for a front-end";

/// The protocol has room for 71 minutes.
fn micros(limit: Duration) -> u32 {
    u32::try_from(limit.as_micros()).unwrap_or(u32::MAX)
}

fn notify(states: &[NotifyState<'_>]) {
    // A manager that is gone changes nothing for the guest.
    if let Err(error) = sd_notify::notify(states) {
        debug!("the service manager cannot be told: {error}");
    }
}
