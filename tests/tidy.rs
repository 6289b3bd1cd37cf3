// SPDX-License-Identifier: Apache-2.0
//! What lints cannot check: which module may know which, and the shape of files people read.
#![allow(clippy::unwrap_used, reason = "a test that meets the unexpected fails")]

use std::fs;
use std::path::{Path, PathBuf};

/// Each part of the library and the parts it may name. What is not listed is not restricted.
const MAY_NAME: &[(&str, &[&str])] = &[
    ("units", &[]),
    ("quorum", &["units"]),
    ("record", &["units", "quorum"]),
    ("io", &["units", "quorum"]),
    ("config", &["units", "quorum"]),
    ("control", &["units", "quorum", "record", "config"]),
    ("replica", &["units", "quorum", "config", "io"]),
    (
        "device",
        &["units", "quorum", "config", "io", "replica", "control"],
    ),
    ("cli", &["config"]),
    ("ctl", &["cli"]),
    (
        "record_cli",
        &[
            "units", "quorum", "record", "config", "cli", "replica", "daemon",
        ],
    ),
    ("front_end", &["units"]),
    ("demo", &["units", "front_end", "config"]),
    (
        "daemon",
        &[
            "units", "quorum", "record", "config", "io", "replica", "device", "control",
        ],
    ),
];

/// What the core must not use: it is driven by events and a time from outside, and runs the same
/// way twice (docs/consistency.md; ARCHITECTURE.md).
const NOT_IN_THE_CORE: &[&str] = &[
    "std::fs",
    "std::net",
    "std::os",
    "std::thread",
    "std::process",
    "std::env",
    "std::io",
    "Instant",
    "SystemTime",
    "HashMap",
    "HashSet",
    "RandomState",
    "libc::",
    "tracing::",
    "rand::",
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// All files below `folder` whose names end in `.extension`, in order.
fn files(folder: &Path, extension: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let Ok(entries) = fs::read_dir(folder) else {
        return found;
    };
    for entry in entries {
        let path = entry.unwrap().path();
        if path.is_dir() {
            if path.file_name().is_none_or(|name| name != "target") {
                found.extend(files(&path, extension));
            }
        } else if path.extension().is_some_and(|found| found == extension) {
            found.push(path);
        }
    }
    found.sort();
    found
}

fn sources() -> Vec<PathBuf> {
    let folders = ["src", "tests", "benches", "fuzz/fuzz_targets"];
    let found: Vec<_> = folders
        .iter()
        .flat_map(|folder| files(&root().join(folder), "rs"))
        .collect();
    assert!(
        found.len() > 10,
        "the sources are not where this test looks"
    );
    found
}

/// The code of a file without comments and without its tests, which may use more.
fn code(path: &Path) -> String {
    let inside = path.strip_prefix(root().join("src")).unwrap_or(path);
    if inside.components().any(|part| part.as_os_str() == "tests") {
        return String::new();
    }
    let text = fs::read_to_string(path).unwrap();
    let end = text.find("#[cfg(test)]\nmod ").unwrap_or(text.len());
    let lines = text[..end]
        .lines()
        .map(|line| line.split("//").next().unwrap_or(""));
    lines.collect::<Vec<_>>().join("\n")
}

/// The part of the library a file belongs to.
fn part(path: &Path) -> Option<String> {
    let inside = path.strip_prefix(root().join("src")).ok()?;
    let first = inside.components().next()?.as_os_str().to_str()?;
    Some(first.trim_end_matches(".rs").to_owned())
}

/// The parts of the library that `code` names, as `crate::part` or in `use crate::{part, ...}`.
fn named(code: &str) -> Vec<String> {
    let mut parts = Vec::new();
    for (at, prefix) in code.match_indices("crate::") {
        let rest = &code[at + prefix.len()..];
        let before = code[..at].chars().next_back();
        if before.is_some_and(|c| c.is_alphanumeric() || c == '_') {
            continue;
        }
        if let Some(group) = rest.strip_prefix('{') {
            let (mut depth, mut word) = (1, String::new());
            for c in group.chars() {
                match c {
                    '{' => depth += 1,
                    '}' => depth -= 1,
                    _ => {}
                }
                if depth == 1 && (c.is_alphanumeric() || c == '_') {
                    word.push(c);
                } else if depth == 1 && c == ':' && !word.is_empty() {
                    parts.push(std::mem::take(&mut word));
                } else if c == ',' && depth == 1 {
                    word.clear();
                }
                if depth == 0 {
                    break;
                }
            }
        } else {
            let end = rest.find(|c: char| !c.is_alphanumeric() && c != '_');
            parts.push(rest[..end.unwrap_or(rest.len())].to_owned());
        }
    }
    parts
}

#[test]
fn imports_point_one_way() {
    let mut wrong = Vec::new();
    for path in files(&root().join("src"), "rs") {
        let Some(part) = part(&path) else { continue };
        let Some((_, allowed)) = MAY_NAME.iter().find(|(name, _)| *name == part) else {
            continue;
        };
        for other in named(&code(&path)) {
            let is_part = MAY_NAME.iter().any(|(name, _)| *name == other);
            if is_part && other != part && !allowed.contains(&other.as_str()) {
                wrong.push(format!("{}: {part} must not name {other}", path.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn import_reader_finds_what_it_must() {
    let code = "use crate::units::X; use crate::{io::{a, b}, device::c}; my_crate::nothing";
    assert_eq!(named(code), ["units", "io", "device"]);
}

#[test]
fn core_has_no_file_thread_clock_or_chance() {
    let mut wrong = Vec::new();
    let core = ["src/quorum", "src/record"];
    for path in core.iter().flat_map(|part| files(&root().join(part), "rs")) {
        if path.iter().any(|folder| folder == "tests") {
            continue;
        }
        let code = code(&path);
        for word in NOT_IN_THE_CORE {
            if code.contains(word) {
                wrong.push(format!("{}: {word}", path.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn sources_name_their_licence_and_have_no_leftovers() {
    let leftovers = ["FIX", "TO", "XX"].map(|start| {
        let end = if start == "FIX" {
            "ME"
        } else if start == "TO" {
            "DO"
        } else {
            "X"
        };
        format!("{start}{end}")
    });
    let mut wrong = Vec::new();
    for path in sources() {
        let text = fs::read_to_string(&path).unwrap();
        if !text.starts_with("// SPDX-License-Identifier: Apache-2.0\n") {
            wrong.push(format!("{}: no licence in the first line", path.display()));
        }
        for word in &leftovers {
            if text.contains(word.as_str()) {
                wrong.push(format!("{}: {word}", path.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn scripts_name_their_licence_and_can_be_run() {
    use std::os::unix::fs::PermissionsExt;
    let entries = fs::read_dir(root().join("scripts")).unwrap();
    for path in entries.map(|entry| entry.unwrap().path()) {
        let Ok(text) = fs::read_to_string(&path) else {
            continue;
        };
        if !text.starts_with("#!") {
            continue;
        }
        let second = text.lines().nth(1).unwrap_or("");
        assert_eq!(
            second,
            "# SPDX-License-Identifier: Apache-2.0",
            "{}",
            path.display()
        );
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert!(mode & 0o100 != 0, "{} cannot be run", path.display());
    }
}

/// Keep a Changelog: a title, versions from new to old, known headings in each.
#[test]
fn changelog_has_its_shape() {
    let text = fs::read_to_string(root().join("CHANGELOG.md")).unwrap();
    assert!(text.starts_with("# Changelog\n"));
    assert!(text.contains("keepachangelog.com"));
    let versions: Vec<&str> = text
        .lines()
        .filter(|line| line.starts_with("## "))
        .collect();
    assert!(
        versions
            .first()
            .is_some_and(|first| first.starts_with("## [Unreleased]"))
    );
    for version in &versions[1..] {
        let (name, date) = version
            .split_once("] - ")
            .expect("## [VERSION] - YYYY-MM-DD");
        assert!(name.starts_with("## ["), "{version}");
        let numbers: Vec<_> = date.split('-').map(str::len).collect();
        assert_eq!(numbers, [4, 2, 2], "{version}");
    }
    let known = [
        "Added",
        "Changed",
        "Deprecated",
        "Removed",
        "Fixed",
        "Security",
    ];
    for heading in text.lines().filter_map(|line| line.strip_prefix("### ")) {
        assert!(known.contains(&heading), "unknown heading {heading}");
    }
}

/// Every event and every field that can be written is explained.
#[test]
fn events_are_documented() {
    let code = fs::read_to_string(root().join("src/control/events.rs")).unwrap();
    let page = fs::read_to_string(root().join("docs/events.md")).unwrap();
    let names: Vec<&str> = code
        .split('"')
        .filter(|word| word.starts_with("QUORUM_"))
        .collect();
    assert!(names.len() >= 10);
    for name in names {
        assert!(
            page.contains(name),
            "docs/events.md does not explain {name}"
        );
    }
}

/// Rules that the code cites exist.
#[test]
fn cited_rules_exist() {
    let page = fs::read_to_string(root().join("docs/consistency.md")).unwrap();
    for path in files(&root().join("src"), "rs") {
        let text = fs::read_to_string(&path).unwrap();
        for (at, prefix) in text.match_indices("(rule ") {
            let rule: String = text[at + prefix.len()..]
                .chars()
                .take_while(char::is_ascii_alphanumeric)
                .collect();
            let heading = format!("**{rule}**");
            assert!(
                page.contains(&heading),
                "{}: no rule {rule}",
                path.display()
            );
        }
    }
}

/// The examples that are files are accepted by those who read them.
#[test]
fn examples_are_readable() {
    let path = root().join("examples/disk.toml");
    let settings = quorum_blk::config::read_file(&path).unwrap();
    quorum_blk::config::Config::from_settings(settings).unwrap();
    let text = fs::read_to_string(root().join("examples/50-quorum-blk.json")).unwrap();
    let value: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(value["type"], "block");
    assert!(value["binary"].is_string() && value["description"].is_string());
}
