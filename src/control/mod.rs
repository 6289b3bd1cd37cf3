// SPDX-License-Identifier: Apache-2.0
//! What people and programs learn of the disk: events, counters, the log.
//!
//! Nothing here takes part in the data path. Workers hand reports over without waiting and count
//! in memory of their own; the control thread does the rest.
//!
//! - [`events`]: every event there is; `event_line`, `event_text`: how they are written;
//! - [`rate_limit`]: how often one may be written;
//! - [`sink`]: where they are written to;
//! - [`report_channel`]: from the workers to the control thread;
//! - [`reporter`]: a report becomes a log line and an event;
//! - [`qmp`]: what clients of the control socket say; [`event_hub`]: events on their way to them;
//! - [`counters`]: what the workers and maintenance count;
//! - [`status`]: how the disk is: states, progress, what is left to do;
//! - [`logging`]: the log itself.

pub mod counters;
pub mod event_hub;
mod event_line;
mod event_text;
pub mod events;
mod keeper_text;
pub mod logging;
pub mod qmp;
pub mod rate_limit;
pub mod report_channel;
pub mod reporter;
pub mod sink;
pub mod status;

pub use counters::{Counters, MaintenanceCounters, RequestKind, Totals, WorkerCounters};
pub use events::{Event, EventData};
pub use rate_limit::RateLimiter;
pub use report_channel::{ReportReceiver, ReportSender, report_channel};
pub use reporter::Reporter;
pub use sink::{EventSink, SinkError};
pub use status::{DiskFacts, DiskStatus};
