// SPDX-License-Identifier: Apache-2.0
//! What is known of a run: its last steps, what was injected and what the core did about it.

use std::collections::BTreeMap;
use std::fmt;

use crate::faults::Fault;
use crate::life;
use crate::model::Origin;
use crate::quorum::{Action, Event, KeeperAction, Operation};
use crate::units::SectorRange;

/// Lines that a failure shows.
const LINES: usize = 60;

/// A rule that did not hold.
#[derive(Clone, Debug)]
pub struct Violation {
    /// The rule or invariant of CONSISTENCY.md, or `panic`.
    pub rule: &'static str,
    pub what: String,
}

/// The verdict on a step.
pub type Verdict<T = ()> = Result<T, Violation>;

pub fn violation<T>(rule: &'static str, what: impl Into<String>) -> Verdict<T> {
    let what = what.into();
    Err(Violation { rule, what })
}

/// One thing that happened.
#[allow(dead_code, reason = "for people to read: only printed")]
#[derive(Clone, Debug)]
pub enum Line {
    Told(Event),
    Asked(Action),
    Injected(Fault, Operation),
    Spoiled {
        replica: usize,
        sector: u64,
    },
    Lived(life::Event),
    Recorded {
        copy: u8,
        block: u64,
        errno: Option<i32>,
    },
    Ended {
        power: bool,
        marks: String,
    },
    Began {
        missing: u8,
        lacking: u8,
        clean: bool,
        present: u16,
        marks: String,
    },
    Kept(KeeperAction),
    Placed {
        from: Origin,
        range: SectorRange,
        version: u64,
        order: u64,
    },
}

/// The last lines of a run.
pub struct Trace {
    lines: Vec<(u64, u64, usize, Line)>,
    next: usize,
    kept: usize,
}

impl Trace {
    /// Keeps 60 lines, or as many as SIM_TRACE says.
    pub fn new() -> Self {
        let wanted = std::env::var("SIM_TRACE").ok();
        let kept = wanted.and_then(|text| text.parse().ok()).unwrap_or(LINES);
        Self {
            lines: Vec::new(),
            next: 0,
            kept,
        }
    }

    pub fn note(&mut self, step: u64, now: u64, lane: usize, line: Line) {
        let entry = (step, now, lane, line);
        if self.lines.len() < self.kept {
            self.lines.push(entry);
        } else {
            self.lines[self.next % self.kept] = entry;
        }
        self.next += 1;
    }
}

impl fmt::Display for Trace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let oldest = self.next.saturating_sub(self.lines.len());
        for number in oldest..self.next {
            let (step, now, lane, line) = &self.lines[number % self.kept];
            writeln!(f, "{step:>8} {:>10} us  lane {lane}  {line:?}", now / 1000)?;
        }
        Ok(())
    }
}

/// Counts by name.
#[derive(Clone, Default, Debug)]
pub struct Tally(BTreeMap<&'static str, u64>);

impl Tally {
    pub fn count(&mut self, what: &'static str) {
        self.add(what, 1);
    }

    pub fn add(&mut self, what: &'static str, many: u64) {
        *self.0.entry(what).or_default() += many;
    }

    pub fn of(&self, what: &str) -> u64 {
        self.0.get(what).copied().unwrap_or(0)
    }

    pub fn merge(&mut self, other: &Tally) {
        for (what, many) in &other.0 {
            self.add(what, *many);
        }
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (what, many) in &self.0 {
            writeln!(f, "  {what:<28} {many:>10}")?;
        }
        Ok(())
    }
}
