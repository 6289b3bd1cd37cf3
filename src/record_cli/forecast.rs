// SPDX-License-Identifier: Apache-2.0
//! What a start would do with the record and the replicas as they are now (rules S1-S6), in
//! sentences.

use serde::Serialize;

use super::view::{MemberView, ReplicaFound, View};
use crate::config::ByteSize;
use crate::record::Refusal;

/// What a start would do.
///
/// Without the configuration it is not known which replicas are there; they count as present.
#[derive(Debug, Default, PartialEq, Eq, Serialize)]
pub struct Start {
    /// Whether it would be refused.
    pub refused: bool,
    /// What would happen, or why not: sentences for people.
    pub steps: Vec<String>,
}

/// Tells what a start would do with what is seen. `refusal`: the record would not be opened.
pub(super) fn start(view: &View, refusal: Option<&Refusal>) -> Start {
    if let Some(refusal) = refusal {
        return Start {
            refused: true,
            steps: vec![format!("It would be refused: {refusal}.")],
        };
    }
    if view.in_use {
        return Start {
            refused: true,
            steps: vec![
                "It would be refused: a daemon serves the disk at this moment, and the record \
                 changes under way."
                    .to_owned(),
            ],
        };
    }
    let here = view.members.iter().filter(|m| is_here(m)).count();
    if here < usize::from(view.threshold) {
        return Start {
            refused: true,
            steps: vec![format!(
                "It would be refused: {here} of {} replicas can be used and {} must agree.",
                view.replicas, view.threshold
            )],
        };
    }
    let mut steps = Vec::new();
    origin(view, &mut steps);
    for member in &view.members {
        steps.extend(of_member(view, member));
    }
    if view.verify.active {
        steps.push(format!(
            "The replicas would be compared in the background, from {} on.",
            position(view, view.verify.sector)
        ));
    }
    if view.scrub.active {
        steps.push(format!(
            "The scrub would go on at {}.",
            position(view, view.scrub.sector)
        ));
    }
    Start {
        refused: false,
        steps,
    }
}

/// What can be told when not all copies were looked at.
pub(super) fn unknown(given: usize, copies: usize) -> Start {
    Start {
        refused: false,
        steps: vec![format!(
            "Not known: {given} of the {copies} copies of the record were given. Give all of \
             them, or the replicas (--replica or --config)."
        )],
    }
}

/// What the end of the last run means.
fn origin(view: &View, steps: &mut Vec<String>) {
    let known: Vec<_> = view.members.iter().filter_map(|m| m.found).collect();
    let changed = |found: &&ReplicaFound| **found == ReplicaFound::Changed;
    if view.clean && !known.is_empty() && known.iter().filter(changed).count() == known.len() {
        steps.push(
            "The last stop was clean, but every replica has changed since: they would be taken \
             for plain images, vote, and be compared once."
                .to_owned(),
        );
    } else if view.clean {
        steps.push("The last stop was clean: nothing has to be settled.".to_owned());
    } else if view.dirty.extents == 0 {
        steps.push(
            "The last run did not stop cleanly, but no extent is dirty: nothing has to be settled."
                .to_owned(),
        );
    } else {
        let size = ByteSize(view.dirty.bytes);
        let extents = view.dirty.extents;
        steps.push(format!(
            "The last run did not stop cleanly: {extents} dirty extents ({size}) would be read \
             from all replicas and made equal, while the guest works; the majority decides."
        ));
        if view.cold {
            steps.push(
                "After the power loss or reset of before, sectors without a majority get the \
                 version most replicas have (--crash-tie)."
                    .to_owned(),
            );
        }
    }
}

fn of_member(view: &View, member: &MemberView) -> Option<String> {
    let who = who(member);
    let whole = ByteSize(view.size_bytes);
    match (member.state, member.found) {
        ("removed", _) => None,
        ("failed", _) => Some(format!(
            "{who} is failed: it would not be used before it is cleared."
        )),
        (_, Some(ReplicaFound::Missing)) => Some(format!(
            "{who} is not there: the disk would be served without it, and it would get what it \
             missed when it is back."
        )),
        (_, Some(ReplicaFound::Changed)) => Some(format!(
            "{who} was changed, or is another file, since the last clean stop: it would not vote \
             and be copied whole ({whole})."
        )),
        _ if member.behind.extents > 0 => Some(format!(
            "{who} lacks {} in {} extents, where it would not vote until they are copied.",
            ByteSize(member.behind.bytes),
            member.behind.extents
        )),
        _ => None,
    }
}

/// Whether a start could use the replica, as far as is known.
fn is_here(member: &MemberView) -> bool {
    !matches!(member.state, "failed" | "removed") && member.found != Some(ReplicaFound::Missing)
}

fn who(member: &MemberView) -> String {
    match &member.name {
        Some(name) => format!("Replica {name}"),
        None => format!("The replica in slot {}", member.slot),
    }
}

/// A place on the disk for people.
pub(super) fn position(view: &View, sector: u64) -> String {
    let sectors = (view.size_bytes / crate::units::SECTOR_BYTES).max(1);
    let percent = u128::from(sector) * 100 / u128::from(sectors);
    format!("sector {sector} ({percent} %)")
}
