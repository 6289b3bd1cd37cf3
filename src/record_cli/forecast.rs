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
    if all_changed(view) {
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

/// Whether none of the replicas that are there is as the last clean stop left it (rule S3).
fn all_changed(view: &View) -> bool {
    let here = || view.members.iter().filter(|member| is_here(member));
    let changed = |member: &MemberView| member.found == Some(ReplicaFound::Changed);
    view.clean && here().next().is_some() && here().all(changed)
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
        (_, Some(ReplicaFound::Changed)) if !all_changed(view) => Some(format!(
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

#[cfg(test)]
mod tests {
    use super::super::view::{Amount, Cursor};
    use super::*;

    fn member(slot: usize) -> MemberView {
        MemberView {
            slot,
            name: Some(format!("r{slot}")),
            path: Some(format!("/r{slot}").into()),
            found: Some(ReplicaFound::Unchanged),
            state: "in-sync",
            suspect: false,
            epoch_in_sync: 3,
            behind: Amount::default(),
        }
    }

    fn view() -> View {
        let idle = Cursor {
            active: false,
            sector: 0,
        };
        View {
            disk: String::new(),
            size_bytes: 100 << 20,
            extent_bytes: 1 << 20,
            extents: 100,
            block_bytes: 512,
            replicas: 3,
            threshold: 2,
            read_pattern: "quorum",
            epoch: 3,
            sequence: 9,
            clean: true,
            cold: false,
            forced: false,
            few_replicas: false,
            assume_clean: false,
            in_use: false,
            copies_needed: 2,
            copies: Vec::new(),
            dirty: Amount::default(),
            members: (0..3).map(member).collect(),
            verify: idle,
            scrub: idle,
            history: Vec::new(),
            notes: Vec::new(),
            start: Start::default(),
        }
    }

    /// What a start would do after `change`: whether it is refused, and its steps.
    fn told(change: impl FnOnce(&mut View)) -> (bool, String) {
        let mut view = view();
        change(&mut view);
        let start = start(&view, None);
        (start.refused, start.steps.join(" "))
    }

    fn unclean(view: &mut View) {
        view.clean = false;
        view.dirty = Amount {
            extents: 2,
            bytes: 2 << 20,
        };
        for member in &mut view.members {
            member.found = Some(ReplicaFound::Present);
        }
    }

    #[test]
    fn start_that_would_go_well_tells_its_steps() {
        type Change = fn(&mut View);
        let cases: [(Change, &str); 8] = [
            (
                |_| {},
                "The last stop was clean: nothing has to be settled.",
            ),
            (unclean, "2 dirty extents (2 MiB) would be read"),
            (
                |view| {
                    unclean(view);
                    view.cold = true;
                },
                "get the version most replicas have",
            ),
            (
                |view| view.members[1].found = Some(ReplicaFound::Missing),
                "Replica r1 is not there",
            ),
            (
                |view| view.members[1].found = Some(ReplicaFound::Changed),
                "Replica r1 was changed, or is another file",
            ),
            (
                |view| {
                    view.members[2].behind = Amount {
                        extents: 3,
                        bytes: 3 << 20,
                    }
                },
                "Replica r2 lacks 3 MiB in 3 extents",
            ),
            (
                |view| view.members[0].state = "failed",
                "Replica r0 is failed",
            ),
            (
                |view| {
                    view.verify = Cursor {
                        active: true,
                        sector: 102_400,
                    }
                },
                "compared in the background, from sector 102400 (50 %) on",
            ),
        ];
        for (change, expected) in cases {
            let (refused, text) = told(change);
            assert!(!refused && text.contains(expected), "{expected:?}: {text}");
        }
    }

    #[test]
    fn start_after_all_replicas_changed_takes_them_for_plain() {
        let (refused, text) = told(|view| {
            view.members[0].found = Some(ReplicaFound::Changed);
            view.members[1].found = Some(ReplicaFound::Changed);
            view.members[2].found = Some(ReplicaFound::Missing);
        });
        assert!(
            !refused && text.contains("taken for plain images"),
            "{text}"
        );
        assert!(!text.contains("copied whole"), "{text}");
    }

    #[test]
    fn start_that_would_be_refused_says_why() {
        let (refused, text) = told(|view| view.in_use = true);
        assert!(
            refused && text.contains("a daemon serves the disk"),
            "{text}"
        );
        let (refused, text) = told(|view| {
            view.members[0].found = Some(ReplicaFound::Missing);
            view.members[1].state = "failed";
        });
        assert!(
            refused && text.contains("1 of 3 replicas can be used and 2 must agree"),
            "{text}"
        );
        let start = start(&view(), Some(&Refusal::NoRecord { copies: "x".into() }));
        assert!(start.refused);
    }
}
