// SPDX-License-Identifier: Apache-2.0
//! The demonstration, run as a user runs it.

use std::process::{Command, Output};
use std::time::{Duration, Instant};

fn demo(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_quorum-blk"));
    command.arg("demo").args(arguments);
    command.output().expect("the program runs")
}

#[test]
fn demo_ends_well_and_leaves_nothing_behind() {
    let folder = tempfile::tempdir().expect("a folder");
    let parent = folder.path().to_str().expect("a plain path");
    let begun = Instant::now();
    let output = demo(&["--size", "8M", "--dir", parent]);
    assert!(begun.elapsed() < Duration::from_secs(10));
    let report = String::from_utf8(output.stdout).expect("text");
    assert!(output.status.success(), "{report}");
    assert!(report.contains("every byte was right"), "{report}");
    assert!(!report.contains("WRONG"), "{report}");
    assert!(
        !report.contains('\x1b'),
        "no colours where nobody sees them"
    );
    assert!(report.lines().all(|line| line.len() <= 100), "{report}");
    let left = std::fs::read_dir(folder.path()).expect("a folder").count();
    assert_eq!(left, 0);
}

#[test]
fn demo_keeps_identical_replicas_on_request() {
    let folder = tempfile::tempdir().expect("a folder");
    let parent = folder.path().to_str().expect("a plain path");
    let output = demo(&["--size", "4M", "--replicas", "5", "--keep", "--dir", parent]);
    let report = String::from_utf8(output.stdout).expect("text");
    assert!(output.status.success(), "{report}");
    let mut kept = std::fs::read_dir(folder.path()).expect("a folder");
    let kept = kept.next().expect("what was kept").expect("a name").path();
    assert!(report.contains(&kept.display().to_string()), "{report}");
    let read = |index| std::fs::read(kept.join(format!("replica{index}.img")));
    let first = read(0).expect("a replica");
    assert_eq!(first.len(), 4 << 20);
    assert!(first.iter().any(|&byte| byte != 0));
    for index in 1..5 {
        assert!(read(index).expect("a replica") == first, "replica{index}");
    }
}

#[test]
fn demo_that_cannot_be_run_says_why() {
    let output = demo(&["--dir", "/proc/no-such-folder"]);
    assert!(!output.status.success());
    let said = String::from_utf8(output.stderr).expect("text");
    assert!(said.contains("/proc/no-such-folder"), "{said}");
}
