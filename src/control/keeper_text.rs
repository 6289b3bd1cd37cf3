// SPDX-License-Identifier: Apache-2.0
//! What the keeper of a disk has to say, as a line of the log.

use tracing::{info, warn};

use super::event_text::{Suppressed, kick_text};
use super::events::{Names, command_name, pass_name, state_name};
use crate::config::ByteSize;
use crate::quorum::{KeeperReport, PassKind, Refusal, ReplicaState, ScrubCounts, StateCause};

/// Writes a report of the keeper to the log; `more` tells how many such reports have no line.
pub(super) fn log(report: &KeeperReport, names: &Names, more: &Suppressed) {
    match *report {
        KeeperReport::State {
            replica,
            from,
            to,
            why,
        } => {
            let name = names.replica(replica);
            // Of a kick there was a warning already.
            let is_news_to_act_on = match to {
                ReplicaState::InSync | ReplicaState::Missing => false,
                ReplicaState::Syncing => why == StateCause::Behind,
                ReplicaState::Failed | ReplicaState::Removed => true,
            };
            let (from, state, why) = (state_name(from), state_name(to), state_text(why));
            if is_news_to_act_on {
                warn!(
                    replica = name,
                    state, "replica {name} is {state} now, after {from}: {why}{more}"
                );
            } else {
                info!(
                    replica = name,
                    state, "replica {name} is {state} now, after {from}: {why}{more}"
                );
            }
        }
        KeeperReport::Suspect { replica } => {
            let name = names.replica(replica);
            warn!(
                replica = name,
                "replica {name} is suspect: half of an error budget is spent (--max-write-errors, \
                 --max-kicks, --max-repairs); it votes but decides no tie{more}"
            );
        }
        KeeperReport::Kept { replica, why } => {
            let name = names.replica(replica);
            let why = kick_text(why);
            warn!(
                replica = name,
                "replica {name} stays in use although {why}: too few others hold what it holds; \
                 bring them back{more}"
            );
        }
        KeeperReport::ResyncBegun {
            replica,
            bytes_left,
        } => {
            let name = names.replica(replica);
            info!(
                replica = name,
                bytes_left,
                "resync of replica {name} begins: {} to go{more}",
                size(bytes_left)
            );
        }
        KeeperReport::ResyncProgress {
            replica,
            bytes_left,
            bytes_done,
        } => {
            let name = names.replica(replica);
            info!(
                replica = name,
                bytes_left,
                bytes_done,
                "resync of replica {name}: {} done, {} to go{more}",
                size(bytes_done),
                size(bytes_left)
            );
        }
        KeeperReport::ResyncDone {
            replica,
            bytes_done,
        } => {
            let name = names.replica(replica);
            info!(
                replica = name,
                bytes_done,
                "replica {name} lacks nothing any more; {} were brought up to date{more}",
                size(bytes_done)
            );
        }
        KeeperReport::Prompt { replica } => {
            let name = names.replica(replica);
            info!(
                replica = name,
                "replica {name} answers in time again; what it missed is copied now{more}"
            );
        }
        KeeperReport::PassBegun {
            kind,
            sector,
            repair,
        } => {
            let what = if repair { "repaired" } else { "only reported" };
            info!(
                "{} begins at sector {sector}; differences are {what}{more}",
                pass_text(kind)
            );
        }
        KeeperReport::PassDone { kind, counts } => pass_ended(kind, "is done", counts, more),
        KeeperReport::PassStopped { kind, counts } => {
            pass_ended(kind, "was stopped", counts, more);
        }
        KeeperReport::Forced { replica, extents } => {
            let name = names.replica(replica);
            warn!(
                replica = name,
                "the operator has taken the copy of replica {name} for right in {extents} extents \
                 that nobody else held{more}"
            );
        }
        KeeperReport::Refused { command, why } => {
            warn!(
                "the command {} was not carried out: {}{more}",
                command_name(command),
                refusal_text(why)
            );
        }
    }
}

fn pass_ended(kind: PassKind, how: &str, counts: ScrubCounts, more: &Suppressed) {
    let text = counts_text(&counts);
    let bad = counts.differing + counts.unreadable + counts.unresolved + counts.failed;
    let kind_name = pass_name(kind);
    if bad == 0 {
        info!(kind = kind_name, "{} {how}: {text}{more}", pass_text(kind));
    } else {
        warn!(kind = kind_name, "{} {how}: {text}{more}", pass_text(kind));
    }
}

/// What a pass met, for people.
pub(super) fn counts_text(counts: &ScrubCounts) -> String {
    format!(
        "{} sectors compared, {} differing, {} unreadable, {} repaired, {} unresolved, {} passed \
         over",
        counts.compared,
        counts.differing,
        counts.unreadable,
        counts.repaired,
        counts.unresolved,
        counts.failed
    )
}

fn pass_text(kind: PassKind) -> &'static str {
    match kind {
        PassKind::Verify => "the first comparison of all replicas",
        PassKind::Scrub => "the scrub of all replicas",
    }
}

fn state_text(why: StateCause) -> String {
    match why {
        StateCause::Behind => "it lacks writes".to_owned(),
        StateCause::CaughtUp => "it lacks nothing".to_owned(),
        StateCause::Kicked(why) => kick_text(why),
        StateCause::Reopened => "it was opened again, as it was left".to_owned(),
        StateCause::Replaced => {
            "it was opened, but is not what it was when it was left; all of it is compared and \
             copied"
                .to_owned()
        }
        StateCause::Cleared => "the operator cleared it".to_owned(),
    }
}

fn refusal_text(why: Refusal) -> &'static str {
    match why {
        Refusal::NoSuchReplica => "there is no such replica",
        Refusal::NotUp => "the replica is not in use",
        Refusal::Needed => "too few other replicas hold what this one holds",
        Refusal::NoScrub => "no scrub is under way",
        Refusal::NothingLost => "every extent has a current copy, or one that may come back",
    }
}

/// Bytes for people: to a tenth of the unit that fits.
pub(super) fn size(bytes: u64) -> String {
    for (shift, unit) in [(40, "TiB"), (30, "GiB"), (20, "MiB")] {
        if bytes >> shift != 0 {
            let tenths = (u128::from(bytes) * 10) >> shift;
            return if tenths.is_multiple_of(10) {
                format!("{} {unit}", tenths / 10)
            } else {
                format!("{}.{} {unit}", tenths / 10, tenths % 10)
            };
        }
    }
    ByteSize(bytes).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_a_tenth_of_the_unit_that_fits() {
        let cases = [
            (0, "0 bytes"),
            (513, "513 bytes"),
            (4096, "4 KiB"),
            (1 << 20, "1 MiB"),
            ((1 << 20) + (1 << 19), "1.5 MiB"),
            ((5 << 30) - 1, "4.9 GiB"),
            (u64::MAX, "16777215.9 TiB"),
        ];
        for (bytes, text) in cases {
            assert_eq!(size(bytes), text);
        }
    }
}
