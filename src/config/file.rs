// SPDX-License-Identifier: Apache-2.0
//! The configuration file: TOML, the same names as the flags, unknown names refused.

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::settings::Settings;

/// The largest file that is read: 16 replicas with the longest paths fit many times.
const FILE_LEN_MAX: u64 = 1 << 20;

/// A configuration file that cannot be used.
#[derive(Debug, Error)]
pub enum FileError {
    /// It cannot be read.
    #[error("cannot read the configuration file {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is far larger than any configuration.
    #[error(
        "{} has {len_bytes} bytes; a configuration file has at most {FILE_LEN_MAX}",
        path.display()
    )]
    TooLong {
        /// The file.
        path: PathBuf,
        /// Its length.
        len_bytes: u64,
    },
    /// It is not TOML, or says what is not understood.
    #[error("{}:{line}:{column}: {message}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// Column in characters, from 1.
        column: usize,
        /// What is wrong there.
        message: String,
    },
}

/// Reads the file at `path`. Relative paths in it are relative to its folder.
///
/// # Errors
/// If it cannot be read or understood; the message says where in the file.
pub fn read_file(path: &Path) -> Result<Settings, FileError> {
    let refuse = |source| FileError::Read {
        path: path.to_owned(),
        source,
    };
    let len_bytes = std::fs::metadata(path).map_err(refuse)?.len();
    if len_bytes > FILE_LEN_MAX {
        return Err(FileError::TooLong {
            path: path.to_owned(),
            len_bytes,
        });
    }
    let text = std::fs::read_to_string(path).map_err(refuse)?;
    let settings = parse_file(&text, path)?;
    Ok(match path.parent() {
        Some(folder) => settings.relative_to(folder),
        None => settings,
    })
}

/// Reads `text`, the content of the file at `path` (which is only named in messages).
///
/// # Errors
/// If it cannot be understood; the message says where.
pub fn parse_file(text: &str, path: &Path) -> Result<Settings, FileError> {
    toml::from_str(text).map_err(|error| {
        let start = error.span().map_or(0, |span| span.start);
        let (line, column) = position(text, start);
        FileError::Content {
            path: path.to_owned(),
            line,
            column,
            message: explained(error.message(), text.lines().nth(line - 1)),
        }
    })
}

/// The parser's message on one line. Where it speaks of types it does not name the setting and
/// says what Rust calls them; people get the line and a range.
fn explained(message: &str, line: Option<&str>) -> String {
    let message = message.trim_end().replace('\n', "; ");
    if !message.starts_with("invalid ") {
        return message;
    }
    let ranges = [
        ("expected u8", "expected a whole number from 0 to 255"),
        ("expected u16", "expected a whole number from 0 to 65535"),
        (
            "expected u32",
            "expected a whole number from 0 to 4294967295",
        ),
        (
            "expected i32",
            "expected a whole number from 0 to 2147483647",
        ),
    ];
    let mut message = message;
    for (ours, theirs) in ranges {
        if let Some(start) = message.strip_suffix(ours) {
            message = format!("{start}{theirs}");
        }
    }
    match line.map(str::trim) {
        Some(line) if !line.is_empty() => format!("{message}, in `{line}`"),
        _ => message,
    }
}

/// Line and column, from 1, of the byte `offset` of `text`.
fn position(text: &str, offset: usize) -> (usize, usize) {
    let before = text.get(..offset).unwrap_or(text);
    let line = before.matches('\n').count() + 1;
    let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
    (line, before[line_start..].chars().count() + 1)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::super::values::*;
    use super::super::{InheritedSocket, ReplicaArgument, fuzzing};
    use super::*;

    fn parse(text: &str) -> Result<Settings, String> {
        parse_file(text, Path::new("disk.toml")).map_err(|error| error.to_string())
    }

    #[test]
    fn file_with_every_setting_reads() {
        let text = r#"
socket-path = "/run/disk.sock"
replica = [
    "a.img,name=left",
    { path = "b,c.img", name = "right", cache = "buffered", format = "raw", record = "b.qrec" },
]
cache = "direct"
record = "none"
record-dir = "records"
force = true
assume-clean = true
adopt-from = "left"
clear = "left"
force-current = "right"
write-grace = 250
flush-grace = 3
io-timeout = 20
on-lost-quorum = "pause"
crash-tie = "error"
resync-rate = "256M"
scrub-rate = "32M"
scrub-interval = "7d"
scrub = "check"
max-write-errors = 1
max-kicks = 2
max-repairs = 0
threshold = 2
allow-minority-threshold = false
read-pattern = "fifo"
repair = "off"
blkverify = false
read-only = true
serial = "disk-1"
block-size = 4096
num-queues = 8
queue-size = 128
workers = 2
poll-us = 50
buffer-memory = "32M"
lock-timeout = 0
incoming = true
grow = "found"
control = "control.sock"
events = "events.jsonl"
log-format = "json"
log-level = "warn"
"#;
        let settings = parse(text).unwrap();
        let mut left = ReplicaArgument::from_path("a.img".into());
        left.name = Some("left".to_owned());
        let right = ReplicaArgument {
            path: "b,c.img".into(),
            name: Some("right".to_owned()),
            cache: Some(Cache::Buffered),
            format: Some(Format::Raw),
            record: Some("b.qrec".into()),
        };
        let expected = Settings {
            socket_path: Some("/run/disk.sock".into()),
            fd: None,
            replica: vec![left, right],
            cache: Some(Cache::Direct),
            record: Some(RecordMode::None),
            record_dir: Some("records".into()),
            force: Some(true),
            assume_clean: Some(true),
            adopt_from: Some("left".to_owned()),
            clear: Some("left".to_owned()),
            force_current: Some("right".to_owned()),
            write_grace: Some(250),
            flush_grace: Some(3),
            io_timeout: Some(20),
            on_lost_quorum: Some(OnLostQuorum::Pause),
            crash_tie: Some(CrashTie::Error),
            resync_rate: Some(ByteSize(256 << 20)),
            scrub_rate: Some(ByteSize(32 << 20)),
            scrub_interval: Some(Interval(Some(Duration::from_secs(7 * 86_400)))),
            scrub: Some(ScrubMode::Check),
            max_write_errors: Some(1),
            max_kicks: Some(2),
            max_repairs: Some(0),
            threshold: Some(2),
            allow_minority_threshold: Some(false),
            read_pattern: Some(ReadPatternName::Fifo),
            repair: Some(OnOff::Off),
            blkverify: Some(false),
            read_only: Some(true),
            serial: Some("disk-1".to_owned()),
            block_size: Some(BlockSize::Bytes4096),
            num_queues: Some(8),
            queue_size: Some(128),
            workers: Some(2),
            poll_us: Some(Polling::UpTo(Duration::from_micros(50))),
            buffer_memory: Some(ByteSize(32 << 20)),
            lock_timeout: Some(0),
            incoming: Some(true),
            grow: Some(GrowMode::Found),
            control: Some("control.sock".into()),
            events: Some(EventsTarget::Path("events.jsonl".into())),
            log_format: Some(LogFormat::Json),
            log_level: Some(LogLevel::Warn),
        };
        assert_eq!(settings, expected);
    }

    #[test]
    fn file_takes_tables_and_the_other_spellings() {
        let settings = parse("[[replica]]\npath = \"a\"\n[[replica]]\npath = \"b\"\n").unwrap();
        assert_eq!(settings.replica.len(), 2);
        let settings = parse("blk-file = [\"a\"]\nrepair = true\nevents = 3\nfd = 4").unwrap();
        assert_eq!(settings.replica.len(), 1);
        assert_eq!(settings.repair, Some(OnOff::On));
        assert_eq!(settings.events, Some(EventsTarget::Fd(3)));
        assert_eq!(settings.fd, Some(InheritedSocket::Fd(4)));
        assert_eq!(
            parse("fd = \"systemd\"").unwrap().fd,
            Some(InheritedSocket::Systemd)
        );
        assert_eq!(
            parse("buffer-memory = 4096").unwrap().buffer_memory,
            Some(ByteSize(4096))
        );
    }

    #[test]
    fn file_that_is_wrong_says_where_and_what() {
        let cases = [
            (
                "treshold = 2",
                "disk.toml:1:1: unknown field `treshold`, expected one of",
            ),
            (
                "\nread_only = true",
                "disk.toml:2:1: unknown field `read_only`",
            ),
            (
                "threshold = \"2\"",
                "disk.toml:1:13: invalid type: string \"2\"",
            ),
            (
                "threshold = -1",
                "expected a whole number from 0 to 255, in `threshold = -1`",
            ),
            (
                "serial = \"x\"\nnum-queues = 70000",
                "disk.toml:2:14: invalid value: integer `70000`, expected a whole number from 0 to \
                 65535, in `num-queues = 70000`",
            ),
            (
                "cache = \"none\"",
                "disk.toml:1:9: unknown variant `none`, expected `direct`",
            ),
            (
                "repair = \"yes\"",
                "disk.toml:1:10: `yes` is neither `on` nor `off`",
            ),
            ("repair = 1", "expected \"on\" or \"off\""),
            (
                "block-size = 1024",
                "disk.toml:1:14: a block size of 1024 is not possible",
            ),
            ("buffer-memory = \"64MB\"", "`64MB` is no size"),
            ("buffer-memory = -1", "`-1` is no size"),
            ("scrub-interval = \"7\"", "`7` is no interval"),
            ("scrub-interval = 7", "expected \"off\" or a text such as"),
            (
                "max-repairs = -1",
                "expected a whole number from 0 to 4294967295",
            ),
            ("events = -1", "expected a path or the number"),
            (
                "replica = [\"a,cash=x\"]",
                "disk.toml:1:12: `cash` is no option of a replica",
            ),
            ("replica = [{ name = \"x\" }]", "missing field `path`"),
            ("replica = [{ path = \"\" }]", "has no path"),
            (
                "replica = [{ path = \"a\", nam = \"x\" }]",
                "unknown field `nam`",
            ),
            ("replica = [{ path = \"a\", name = \"x y\" }]", "1 to 32 of"),
            (
                "replica = [3]",
                "a text \"PATH[,OPTION=VALUE]...\" or a table",
            ),
            ("replica = \"a\"", "expected a sequence"),
            ("a = [", "disk.toml:1:"),
            ("fd = 1\nfd = 2", "disk.toml:2:1: duplicate key"),
            (
                "replica = [\"a\"]\nblk-file = [\"b\"]",
                "duplicate field `replica`",
            ),
        ];
        for (text, message) in cases {
            let error = parse(text).unwrap_err();
            assert!(error.contains(message), "{text:?}: {error}");
            assert!(!error.contains('\n'), "{text:?}: {error}");
        }
    }

    #[test]
    fn file_paths_are_relative_to_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk.toml");
        let text = "socket-path = \"s\"\nevents = \"e\"\nrecord-dir = \"r\"\n\
                    replica = [\"a,record=a.qrec\", \"/b\"]";
        std::fs::write(&path, text).unwrap();
        let settings = read_file(&path).unwrap();
        assert_eq!(settings.socket_path, Some(folder.path().join("s")));
        assert_eq!(settings.replica[0].path, folder.path().join("a"));
        assert_eq!(settings.replica[1].path, Path::new("/b"));
        let record = folder.path().join("a.qrec");
        assert_eq!(settings.replica[0].record, Some(record));
        assert_eq!(settings.record_dir, Some(folder.path().join("r")));
        let events = EventsTarget::Path(folder.path().join("e"));
        assert_eq!(settings.events, Some(events));
    }

    #[test]
    fn file_that_cannot_be_read_is_named() {
        let error = read_file(Path::new("/nonexistent/disk.toml")).unwrap_err();
        assert!(matches!(error, FileError::Read { .. }));
        assert!(error.to_string().contains("/nonexistent/disk.toml"));
    }

    #[test]
    fn position_counts_lines_and_characters() {
        assert_eq!(position("ab\ncd", 0), (1, 1));
        assert_eq!(position("ab\ncd", 4), (2, 2));
        assert_eq!(position("é=x", 3), (1, 3));
        assert_eq!(position("ab", 99), (1, 3));
    }

    proptest! {
        #[test]
        fn file_of_any_text_does_not_panic(
            keys in proptest::collection::vec(
                ("(threshold|replica|fd|repair|events|cache|serial|[a-z-]{1,8})", "\\PC{0,20}"),
                0..6),
        ) {
            let text: String = keys.iter().map(|(key, value)| format!("{key} = {value}\n")).collect();
            fuzzing::fuzz_config_toml(text.as_bytes());
        }
    }
}
