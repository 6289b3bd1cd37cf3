// SPDX-License-Identifier: Apache-2.0
//! A record for people: what matters first, then tables.

use std::fmt::Write;

use comfy_table::{Cell, CellAlignment, Table, presets};

use super::forecast::position;
use super::view::{MemberView, ReplicaFound, View};
use crate::config::ByteSize;

/// The view as text, with a newline at its end.
pub(super) fn text(view: &View) -> String {
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = head(view, &mut text);
    let _ = writeln!(text, "\n{}\n", replicas(view));
    let _ = writeln!(text, "{}", copies(view));
    for note in &view.notes {
        let _ = writeln!(text, "note: {note}");
    }
    let _ = writeln!(text, "\nWhat a start would do now:");
    for step in &view.start.steps {
        let _ = writeln!(text, "  - {step}");
    }
    text
}

fn head(view: &View, text: &mut String) -> std::fmt::Result {
    writeln!(text, "disk        {}", view.disk)?;
    writeln!(
        text,
        "size        {} ({} bytes), blocks of {}, {} extents of {}",
        ByteSize(view.size_bytes),
        view.size_bytes,
        view.block_bytes,
        view.extents,
        ByteSize(view.extent_bytes)
    )?;
    let voting = match view.read_pattern {
        "fifo" => ", reads take the first that answers",
        _ => "",
    };
    writeln!(
        text,
        "voting      {} of {} replicas must agree{voting}",
        view.threshold, view.replicas
    )?;
    let forced = match (view.forced, view.few_replicas) {
        (true, false) => ", begun by --force",
        (_, true) => ", begun by --force with too few replicas",
        (false, false) => "",
    };
    writeln!(text, "epoch       {}{forced}", view.epoch)?;
    let last = match (view.in_use, view.clean, view.cold) {
        (true, ..) => "is going on: a daemon serves the disk",
        (false, true, _) => "ended cleanly",
        (false, false, false) => "did not end cleanly",
        (false, false, true) => "did not end cleanly; before it power was lost, or the guest reset",
    };
    writeln!(text, "last run    {last}")?;
    writeln!(
        text,
        "dirty       {} extents ({})",
        view.dirty.extents,
        ByteSize(view.dirty.bytes)
    )?;
    let verify = match (view.verify.active, view.assume_clean) {
        (true, _) => format!("at {}", position(view, view.verify.sector)),
        (false, true) => "not asked for (--assume-clean)".to_owned(),
        (false, false) => "done, or not needed".to_owned(),
    };
    writeln!(text, "verify      {verify}")?;
    if view.scrub.active {
        writeln!(text, "scrub       at {}", position(view, view.scrub.sector))?;
    }
    let epochs = view.history.iter().map(|entry| {
        let forced = if entry.forced { " forced" } else { "" };
        format!("{}:{}{forced}", entry.epoch, &entry.id[..8])
    });
    let epochs: Vec<String> = epochs.collect();
    writeln!(text, "history     {}", epochs.join(" "))
}

fn replicas(view: &View) -> Table {
    let mut table = table(&["slot", "replica", "state", "in sync in", "behind", "found"]);
    for member in &view.members {
        let state = if member.suspect {
            format!("{}, suspect", member.state)
        } else {
            member.state.to_owned()
        };
        table.add_row([
            number(member.slot.to_string()),
            Cell::new(member.name.as_deref().unwrap_or("-")),
            Cell::new(state),
            number(match member.epoch_in_sync {
                0 => "never".to_owned(),
                epoch => format!("epoch {epoch}"),
            }),
            number(behind(member)),
            Cell::new(found(member)),
        ]);
    }
    table
}

fn behind(member: &MemberView) -> String {
    match member.behind.extents {
        0 => "-".to_owned(),
        extents => format!("{} in {extents} extents", ByteSize(member.behind.bytes)),
    }
}

fn found(member: &MemberView) -> &'static str {
    match member.found {
        None => "-",
        Some(ReplicaFound::Unchanged) => "as it was left",
        Some(ReplicaFound::Changed) => "changed",
        Some(ReplicaFound::Present) => "there",
        Some(ReplicaFound::Missing) => "missing",
    }
}

fn copies(view: &View) -> Table {
    let mut table = table(&["copy of the record", "state"]);
    for copy in &view.copies {
        let state = match &copy.why {
            None => copy.state.to_owned(),
            Some(why) => format!("{}: {why}", copy.state),
        };
        table.add_row([Cell::new(&copy.place), Cell::new(state)]);
    }
    table
}

fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_BORDERS_ONLY);
    table.set_header(header);
    table
}

fn number(text: String) -> Cell {
    Cell::new(text).set_alignment(CellAlignment::Right)
}
