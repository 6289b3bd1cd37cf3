// SPDX-License-Identifier: Apache-2.0
//! Lines for people: a label, what happened, how long it took.

use std::io::Write;
use std::time::Duration;

use super::DemoError;

/// Writes the report and remembers whether everything was right.
pub(super) struct Report<'a, W: Write> {
    out: &'a mut W,
    right: bool,
}

impl<'a, W: Write> Report<'a, W> {
    pub(super) fn new(out: &'a mut W) -> Self {
        Self { out, right: true }
    }

    /// A line that begins a part.
    pub(super) fn heading(&mut self, text: &str) -> Result<(), DemoError> {
        writeln!(self.out, "\n{text}").map_err(DemoError::Output)
    }

    /// A line that just tells.
    pub(super) fn tell(&mut self, label: &str, text: &str) -> Result<(), DemoError> {
        writeln!(self.out, "  {label:<10} {text}")
            .and_then(|()| self.out.flush())
            .map_err(DemoError::Output)
    }

    /// A line about something that must be so.
    pub(super) fn check(&mut self, label: &str, text: &str, right: bool) -> Result<(), DemoError> {
        self.right &= right;
        let verdict = if right { "ok" } else { "WRONG" };
        self.tell(label, &format!("{text:<66} {verdict}"))
    }

    /// Whether every check so far was right.
    pub(super) fn right(&self) -> bool {
        self.right
    }
}

/// `bytes` in MiB.
pub(super) fn mebibytes(bytes: u64) -> String {
    format!("{} MiB", bytes >> 20)
}

/// Throughput in MiB/s.
pub(super) fn speed(bytes: u64, elapsed: Duration) -> String {
    format!("{} MiB/s", per_second(bytes >> 10, elapsed) >> 10)
}

/// `count` in `elapsed` as a rate per second, rounded down.
pub(super) fn per_second(count: u64, elapsed: Duration) -> u64 {
    let micros = elapsed.as_micros().max(1);
    u64::try_from(u128::from(count) * 1_000_000 / micros).unwrap_or(u64::MAX)
}

/// A duration with a unit that suits it.
pub(super) fn time(elapsed: Duration) -> String {
    if elapsed < Duration::from_millis(10) {
        format!("{} us", elapsed.as_micros())
    } else {
        format!("{} ms", elapsed.as_millis())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_wrong_check_makes_the_report_wrong() {
        let mut text = Vec::new();
        let mut report = Report::new(&mut text);
        report.check("read", "all", true).unwrap();
        assert!(report.right());
        report.check("read", "one", false).unwrap();
        report.check("read", "all", true).unwrap();
        assert!(!report.right());
        let text = String::from_utf8(text).unwrap();
        assert_eq!(text.lines().filter(|line| line.ends_with(" ok")).count(), 2);
        assert_eq!(
            text.lines().filter(|line| line.ends_with("WRONG")).count(),
            1
        );
    }

    #[test]
    fn rates() {
        assert_eq!(per_second(500, Duration::from_millis(500)), 1000);
        assert_eq!(speed(64 << 20, Duration::from_millis(500)), "128 MiB/s");
        assert_eq!(time(Duration::from_micros(120)), "120 us");
    }
}
