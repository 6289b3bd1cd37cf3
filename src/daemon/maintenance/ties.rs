// SPDX-License-Identifier: Apache-2.0
//! After an unclean end: what becomes of sectors in U that no version has a majority for, once the
//! front-end has shown whether the start is warm or cold (rules S4, Y3).
//!
//! ```text
//! Awaiting --cold--> Recording (until `cold` is durable) --> Decided (choice, or the policy)
//!     |
//!     +-----warm--> Gathering (until every ring has begun) --> Repeating --> Decided (error)
//! ```
//!
//! `Cold` is remembered before anything is chosen and before a ring begins, and until U is empty: the
//! daemon may be killed before that, and the next start, warm as it will be, finds differences that
//! no repetition of requests removes.

use std::time::Duration;

use tracing::{info, warn};

use super::{Event, KeeperEvent, Maintenance, RecordEvent};
use crate::device::Began;
use crate::device::mailbox::Ack;
use crate::quorum::{CrashTie, Wakeup};
use crate::record::ChangeId;
use crate::units::Time;

/// How long after the first ring of a front-end the others may begin, so that all requests that are
/// repeated are known: they follow within milliseconds. Only a read that finds a tie waits for it.
const GATHERING: Duration = Duration::from_secs(1);

/// How long repeated requests are waited for before a tie is an error all the same: as long as
/// other requests wait for replicas (rule V6).
const REPEATING_MAX: Duration = Duration::from_secs(10);

/// How far the decision is.
#[derive(Debug, Default)]
pub(super) enum Ties {
    /// There is nothing to decide, or it is decided.
    #[default]
    Decided,
    /// No front-end has begun a ring.
    Awaiting,
    /// The ring begins when that is durable.
    Recording(ChangeId, Ack<()>),
    Gathering {
        until: Time,
    },
    Repeating {
        until: Time,
    },
}

impl Ties {
    pub(super) fn new(tie: CrashTie) -> Self {
        match tie {
            CrashTie::MajorityOnly => Self::Awaiting,
            CrashTie::Choose | CrashTie::Error => Self::Decided,
        }
    }

    pub(super) fn deadline(&self) -> Option<Time> {
        match self {
            Self::Decided | Self::Awaiting | Self::Recording(..) => None,
            Self::Gathering { until } | Self::Repeating { until } => Some(*until),
        }
    }
}

impl Maintenance {
    /// A front-end is about to begin the first ring of this run. `known`: owed once all that
    /// follows from it is durable.
    pub(super) fn began(&mut self, began: Began, known: Ack<()>) {
        match began {
            Began::Warm => info!("warm start: the front-end brought what was in flight"),
            Began::Cold => info!("cold start: nothing is known of what was in flight"),
        }
        match (&self.ties, began) {
            (Ties::Awaiting, Began::Warm) => {
                let until = self.now.after(GATHERING);
                self.ties = Ties::Gathering { until };
                known.send(());
            }
            (Ties::Awaiting, Began::Cold) => self.begin_cold(known),
            (Ties::Decided | Ties::Recording(..), _)
            | (Ties::Gathering { .. } | Ties::Repeating { .. }, _) => known.send(()),
        }
    }

    fn begin_cold(&mut self, known: Ack<()>) {
        let unresolved = self.shared.unresolved.extents() > 0;
        match &mut self.record {
            Some(record) if unresolved && !record.cold => {
                record.cold = true;
                let change = record.recorder.change(|superblock| superblock.cold = true);
                self.ties = Ties::Recording(change, known);
                self.tell_recorder(RecordEvent::Poll);
            }
            Some(_) | None => {
                self.choose();
                known.send(());
            }
        }
    }

    fn choose(&mut self) {
        self.shared.begin_cold();
        self.ties_decided();
    }

    /// Everybody who waits for the decision goes on.
    fn ties_decided(&mut self) {
        self.ties = Ties::Decided;
        self.wake_all(Wakeup::TiesDecided);
        self.tell_keeper(KeeperEvent::Tick);
    }

    /// A worker has repeated the last request.
    pub(super) fn note_ties_decided(&mut self) {
        self.ties = Ties::Decided;
        self.tell_lane(Event::Wake(Wakeup::TiesDecided));
        self.tell_keeper(KeeperEvent::Tick);
    }

    /// Goes on with the decision, if it is time.
    pub(super) fn advance_ties(&mut self) {
        match std::mem::take(&mut self.ties) {
            Ties::Recording(change, known) => {
                let record = self.record.as_ref().expect("it is being written");
                // Nothing that is chosen stays, or is shown, if the record is lost.
                if record.durable >= Some(change) || record.recorder.is_lost() {
                    self.choose();
                    known.send(());
                } else {
                    self.ties = Ties::Recording(change, known);
                }
            }
            Ties::Gathering { until } if until <= self.now => {
                if self.shared.begin_warm() {
                    self.ties_decided();
                } else {
                    let until = self.now.after(REPEATING_MAX);
                    self.ties = Ties::Repeating { until };
                }
            }
            Ties::Repeating { until } if until <= self.now => {
                warn!(
                    "requests that were in flight when the last run ended are still not repeated: \
                     sectors without a majority are errors from now on"
                );
                if self.shared.end_repeats() {
                    self.ties_decided();
                }
            }
            ties @ (Ties::Decided
            | Ties::Awaiting
            | Ties::Gathering { .. }
            | Ties::Repeating { .. }) => self.ties = ties,
        }
    }
}
