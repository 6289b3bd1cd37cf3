// SPDX-License-Identifier: Apache-2.0
//! Probes of lagging replicas (rule W6): nobody waits for them until they answer in time again.

use std::time::Duration;

use super::super::event::{Request, Status};
use super::super::policy::Geometry;
use super::jobs::{Job, Jobs, Turn};
use super::{KeeperAction, KeeperConfig, KeeperReport};
use crate::units::{REPLICAS_MAX, ReplicaId, ReplicaSet, SectorRange, Time};

/// Prompt answers in a row that are believed.
const PROMPT_TIMES: u32 = 4;

/// A probe reads up to 4 KiB.
const PROBE_SECTORS: u32 = 8;

/// From probe to probe the place moves by this many extents, so that no cache answers for the
/// medium. A prime, so that it comes to all of them.
const STRIDE: u64 = 7919;

#[derive(Clone, Copy, Default)]
struct Probe {
    /// Prompt answers in a row.
    prompt: u32,
    next_at: Time,
    asked: bool,
}

/// See the module.
pub(super) struct Probes {
    interval: Duration,
    prompt_ns: u64,
    each: [Probe; REPLICAS_MAX],
    lagging: ReplicaSet,
    /// Probes sent so far.
    sent: u64,
}

impl Probes {
    pub(super) fn new(config: &KeeperConfig) -> Self {
        Self {
            interval: config.probe_interval,
            prompt_ns: config.prompt_ns,
            each: [Probe::default(); REPLICAS_MAX],
            lagging: ReplicaSet::EMPTY,
            sent: 0,
        }
    }

    pub(super) fn deadline(&self) -> Option<Time> {
        let waiting = self.lagging.iter().map(|r| self.each[r.index()]);
        let waiting = waiting.filter(|probe| !probe.asked);
        waiting.map(|probe| probe.next_at).min()
    }

    /// A probe was answered. Returns whether the replica is not lagging any more.
    pub(super) fn replied(
        &mut self,
        turn: &mut Turn<'_>,
        replica: ReplicaId,
        since: Time,
        status: Status,
    ) -> bool {
        let probe = &mut self.each[replica.index()];
        probe.asked = false;
        probe.next_at = turn.now.after(self.interval);
        let took_ns = turn.now.nanos().saturating_sub(since.nanos());
        if status == Status::IoError || took_ns > self.prompt_ns {
            probe.prompt = 0;
            return false;
        }
        probe.prompt += 1;
        let membership = &turn.shared.membership;
        if probe.prompt < PROMPT_TIMES || !membership.lagging().contains(replica) {
            return false;
        }
        membership.note_prompt(replica);
        turn.actions.push(KeeperAction::MembersChanged);
        turn.actions
            .push(KeeperAction::Report(KeeperReport::Prompt { replica }));
        true
    }

    /// Probes who lags and was not probed lately.
    pub(super) fn advance(&mut self, turn: &mut Turn<'_>, jobs: &mut Jobs) {
        let lagging = turn.shared.membership.lagging();
        for replica in lagging.minus(self.lagging).iter() {
            let probe = &mut self.each[replica.index()];
            probe.prompt = 0;
            probe.next_at = turn.now.after(self.interval);
        }
        self.lagging = lagging;
        for replica in lagging.iter() {
            let probe = &mut self.each[replica.index()];
            if probe.asked || probe.next_at > turn.now || !jobs.has_room() {
                continue;
            }
            probe.asked = true;
            let range = place(&turn.shared.geometry, self.sent);
            self.sent += 1;
            let since = turn.now;
            let job = Job::Probe { replica, since };
            jobs.start(turn, job, Request::Probe { replica, range });
        }
    }
}

/// Where the probe of this number reads.
fn place(geometry: &Geometry, number: u64) -> SectorRange {
    let extent = number.wrapping_mul(STRIDE) % geometry.extents();
    let whole = geometry.extent_range(extent);
    let count = whole.count().min(PROBE_SECTORS);
    SectorRange::new(whole.start(), count).expect("the beginning of an extent")
}
