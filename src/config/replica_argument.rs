// SPDX-License-Identifier: Apache-2.0
//! The replica argument: `PATH` or `PATH,name=...,cache=...,format=...,record=...`.
//!
//! A comma that belongs to the path or to a value is written `,,`, as in QEMU. What comes first
//! is always the path, so that `a=b.img` is a file and not an option.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use serde::Deserialize;
use serde::de::value::MapAccessDeserializer;
use serde::de::{self, Deserializer, MapAccess, Visitor};
use thiserror::Error;

use super::values::{Cache, Format};

/// The options of a replica argument, for messages and help.
pub const OPTIONS: &[&str] = &["name", "cache", "format", "record"];

/// The longest name of a replica, in bytes.
const NAME_LEN_MAX: usize = 32;

/// A replica as the user wrote it; what is `None` follows from the disk's settings.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ReplicaArgument {
    /// The image: a file or block device.
    pub path: PathBuf,
    /// Its name in the log and in events.
    pub name: Option<String>,
    /// Overrides `--cache`.
    pub cache: Option<Cache>,
    /// The format of the image.
    pub format: Option<Format>,
    /// Where a copy of the state record is kept on account of this replica.
    pub record: Option<PathBuf>,
}

/// A replica argument that cannot be read.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ReplicaArgumentError {
    /// Nothing before the first comma.
    #[error(
        "the replica has no path; write PATH or \
         PATH,name=NAME,cache=direct|buffered,format=raw,record=PATH"
    )]
    NoPath,
    /// Something after a comma that is no option.
    #[error(
        "`{0}` is no option of a replica; known: {known}; a comma in a path is written `,,`",
        known = OPTIONS.join(", ")
    )]
    UnknownOption(String),
    /// An option without `=`.
    #[error("the option `{0}` of a replica needs a value: {0}=VALUE")]
    NoValue(&'static str),
    /// An option given twice.
    #[error("the option `{0}` of a replica is given twice")]
    Twice(&'static str),
    /// A value that is not among the possible ones.
    #[error("`{value}` is not possible for {option}; give {known}")]
    BadValue {
        /// The option.
        option: &'static str,
        /// What was given.
        value: String,
        /// What could be given.
        known: String,
    },
    /// A name that is empty, too long, or has characters that make trouble in logs.
    #[error("the replica name `{0}` is not possible; give 1 to 32 of A-Z a-z 0-9 . _ -")]
    BadName(String),
    /// `nbd://...` and the like.
    #[error(
        "`{0}` is an address; only paths of raw files and block devices can be replicas \
         (a file of that name: ./{0})"
    )]
    Address(String),
    /// A NUL byte, which no path can have.
    #[error("the path of a replica has a NUL byte in it")]
    NulInPath,
    /// A path of a record copy that is empty or has a NUL byte.
    #[error(
        "the option `record` of a replica needs the path of a file, as in record=/var/lib/a.qrec"
    )]
    BadRecord,
}

impl ReplicaArgument {
    /// A replica at `path` with nothing else said.
    #[must_use]
    pub fn from_path(path: PathBuf) -> Self {
        Self {
            path,
            name: None,
            cache: None,
            format: None,
            record: None,
        }
    }

    /// Reads `PATH[,OPTION=VALUE]...`.
    ///
    /// # Errors
    /// What is wrong with it, and the cure.
    pub fn parse(argument: &OsStr) -> Result<Self, ReplicaArgumentError> {
        let mut parts = split_at_commas(argument.as_bytes()).into_iter();
        let path = parts.next().unwrap_or_default();
        let mut replica = Self::from_path(PathBuf::from(OsString::from_vec(path)));
        for part in parts {
            replica.set(&part)?;
        }
        replica.checked()
    }

    /// Writes what [`ReplicaArgument::parse`] reads.
    #[must_use]
    pub fn to_argument(&self) -> OsString {
        let mut bytes = Vec::new();
        push_path(&mut bytes, &self.path);
        let cache = self.cache.map(possible_name);
        let format = self.format.map(possible_name);
        for (option, value) in [("name", &self.name), ("cache", &cache), ("format", &format)] {
            if let Some(value) = value {
                bytes.extend_from_slice(format!(",{option}={value}").as_bytes());
            }
        }
        if let Some(record) = &self.record {
            bytes.extend_from_slice(b",record=");
            push_path(&mut bytes, record);
        }
        OsString::from_vec(bytes)
    }

    /// Takes one `OPTION=VALUE`.
    fn set(&mut self, part: &[u8]) -> Result<(), ReplicaArgumentError> {
        // The value of this one is a path, which need not be text.
        if let Some(path) = part.strip_prefix(b"record=") {
            let path = PathBuf::from(OsString::from_vec(path.to_vec()));
            return set_once(&mut self.record, "record", path);
        }
        let text = String::from_utf8_lossy(part);
        let (option, value) = match text.split_once('=') {
            Some((option, value)) => (option, Some(value)),
            None => (text.as_ref(), None),
        };
        let Some(option) = OPTIONS.iter().copied().find(|known| *known == option) else {
            return Err(ReplicaArgumentError::UnknownOption(option.to_owned()));
        };
        let value = value.ok_or(ReplicaArgumentError::NoValue(option))?;
        match option {
            "name" => set_once(&mut self.name, option, value.to_owned()),
            "cache" => set_once(&mut self.cache, option, choose(option, value)?),
            // `record=` was taken above; without `=` it has no value.
            _ => set_once(&mut self.format, option, choose(option, value)?),
        }
    }

    /// Checks what does not depend on other replicas.
    fn checked(self) -> Result<Self, ReplicaArgumentError> {
        if self.path.as_os_str().is_empty() {
            return Err(ReplicaArgumentError::NoPath);
        }
        if self.path.as_os_str().as_bytes().contains(&0) {
            return Err(ReplicaArgumentError::NulInPath);
        }
        if is_address(&self.path) {
            let address = self.path.to_string_lossy().into_owned();
            return Err(ReplicaArgumentError::Address(address));
        }
        if self
            .record
            .as_deref()
            .is_some_and(|path| !is_record_path(path))
        {
            return Err(ReplicaArgumentError::BadRecord);
        }
        match self.name {
            Some(name) if !is_name(&name) => Err(ReplicaArgumentError::BadName(name)),
            _ => Ok(self),
        }
    }
}

/// Appends a path with its commas doubled.
fn push_path(bytes: &mut Vec<u8>, path: &Path) {
    for &byte in path.as_os_str().as_bytes() {
        bytes.push(byte);
        if byte == b',' {
            bytes.push(b',');
        }
    }
}

/// Whether a copy of the record can be at `path`, as far as its name goes.
fn is_record_path(path: &Path) -> bool {
    path.file_name().is_some() && !path.as_os_str().as_bytes().contains(&0)
}

/// Cuts at single commas; a double one is a comma of the part. As in QEMU, pairs are taken from
/// the left: `a,,,b` is `a,` and `b`.
fn split_at_commas(bytes: &[u8]) -> Vec<Vec<u8>> {
    let mut parts = vec![Vec::new()];
    let mut rest = bytes.iter().copied().peekable();
    while let Some(byte) = rest.next() {
        if byte == b',' && rest.next_if_eq(&b',').is_none() {
            parts.push(Vec::new());
        } else if let Some(part) = parts.last_mut() {
            part.push(byte);
        }
    }
    parts
}

fn set_once<T>(
    slot: &mut Option<T>,
    option: &'static str,
    value: T,
) -> Result<(), ReplicaArgumentError> {
    match slot.replace(value) {
        Some(_) => Err(ReplicaArgumentError::Twice(option)),
        None => Ok(()),
    }
}

fn choose<T: ValueEnum>(option: &'static str, value: &str) -> Result<T, ReplicaArgumentError> {
    T::from_str(value, false).map_err(|_| ReplicaArgumentError::BadValue {
        option,
        value: value.to_owned(),
        known: T::value_variants()
            .iter()
            .cloned()
            .map(possible_name)
            .collect::<Vec<_>>()
            .join(" or "),
    })
}

fn possible_name<T: ValueEnum>(value: T) -> String {
    value
        .to_possible_value()
        .map(|possible| possible.get_name().to_owned())
        .unwrap_or_default()
}

/// Whether `name` can be a replica's name: it ends up in logs, events and metrics.
fn is_name(name: &str) -> bool {
    (1..=NAME_LEN_MAX).contains(&name.len())
        && name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-'))
}

/// Whether the path begins like `scheme://`. Addresses get a meaning in a later version; taking
/// one for a file name today would change under the user's feet then.
fn is_address(path: &Path) -> bool {
    let bytes = path.as_os_str().as_bytes();
    let Some(end) = bytes.windows(3).position(|window| window == b"://") else {
        return false;
    };
    let scheme = &bytes[..end];
    scheme.first().is_some_and(u8::is_ascii_alphabetic)
        && scheme
            .iter()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'-' | b'.'))
}

/// In the file a replica is a text, read like the argument, or a table.
impl<'de> Deserialize<'de> for ReplicaArgument {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(rename_all = "kebab-case", deny_unknown_fields)]
        struct Table {
            path: PathBuf,
            name: Option<String>,
            cache: Option<Cache>,
            format: Option<Format>,
            record: Option<PathBuf>,
        }

        struct ReplicaVisitor;

        impl<'de> Visitor<'de> for ReplicaVisitor {
            type Value = ReplicaArgument;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a text \"PATH[,OPTION=VALUE]...\" or a table with `path`")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<ReplicaArgument, E> {
                ReplicaArgument::parse(OsStr::new(text)).map_err(E::custom)
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<ReplicaArgument, A::Error> {
                let table = Table::deserialize(MapAccessDeserializer::new(map))?;
                ReplicaArgument {
                    path: table.path,
                    name: table.name,
                    cache: table.cache,
                    format: table.format,
                    record: table.record,
                }
                .checked()
                .map_err(de::Error::custom)
            }
        }

        deserializer.deserialize_any(ReplicaVisitor)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(text: &str) -> Result<ReplicaArgument, ReplicaArgumentError> {
        ReplicaArgument::parse(OsStr::new(text))
    }

    #[test]
    fn argument_reads_path_and_options() {
        assert_eq!(
            parse("a.img"),
            Ok(ReplicaArgument::from_path("a.img".into()))
        );
        assert_eq!(
            parse("/d/a.img,name=left,cache=buffered,format=raw"),
            Ok(ReplicaArgument {
                path: "/d/a.img".into(),
                name: Some("left".to_owned()),
                cache: Some(Cache::Buffered),
                format: Some(Format::Raw),
                record: None,
            })
        );
        let record = parse("a,record=/x,,y.qrec,name=a").unwrap().record;
        assert_eq!(record.as_deref(), Some(Path::new("/x,y.qrec")));
        let commas = [
            ("a,,b.img", "a,b.img"),
            ("a,,,,b", "a,,b"),
            (",,", ","),
            ("a,,,name=x", "a,"),
            ("k=v.img", "k=v.img"),
            ("dir://x", "dir://x"),
        ];
        for (text, path) in commas.into_iter().take(5) {
            assert_eq!(parse(text).unwrap().path, Path::new(path), "{text}");
        }
    }

    #[test]
    fn argument_that_is_wrong_names_the_cure() {
        let cases = [
            ("", "has no path"),
            (",name=a", "has no path"),
            (
                "a,b.img",
                "`b.img` is no option of a replica; known: name, cache, format, record",
            ),
            ("a,record", "needs a value: record=VALUE"),
            ("a,record=", "needs the path of a file"),
            ("a,record=x/..", "needs the path of a file"),
            (
                "a,record=x,record=x",
                "`record` of a replica is given twice",
            ),
            ("a,", "`` is no option"),
            ("a,Name=x", "`Name` is no option"),
            ("a,name", "needs a value: name=VALUE"),
            ("a,name=", "the replica name `` is not possible"),
            ("a,name=x y", "1 to 32 of"),
            ("a,name=\u{e9}", "1 to 32 of"),
            ("a,name=x=y", "1 to 32 of"),
            ("a,name=123456789012345678901234567890123", "1 to 32 of"),
            ("a,name=x,name=x", "`name` of a replica is given twice"),
            (
                "a,cache=none",
                "`none` is not possible for cache; give direct or buffered",
            ),
            ("a,cache=Direct", "give direct or buffered"),
            (
                "a,format=qcow2",
                "`qcow2` is not possible for format; give raw",
            ),
            ("nbd://host/disk", "is an address"),
            ("nbd+unix:///disk?socket=/s", "is an address"),
            ("a\0b", "NUL"),
        ];
        for (text, message) in cases {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains(message), "{text:?}: {error}");
        }
        assert!(parse("./nbd://host").is_ok());
        assert!(parse("/a/b://c").is_ok());
    }

    #[test]
    fn argument_path_need_not_be_text() {
        let replica = ReplicaArgument::parse(OsStr::from_bytes(b"\xff.img,name=a")).unwrap();
        assert_eq!(replica.path.as_os_str().as_bytes(), b"\xff.img");
    }

    proptest! {
        #[test]
        fn argument_written_reads_back(
            path in proptest::collection::vec(1u8..=255, 1..40),
            name in proptest::option::of("[A-Za-z0-9._-]{1,32}"),
            cache in proptest::option::of(prop_oneof![Just(Cache::Direct), Just(Cache::Buffered)]),
            format in proptest::option::of(Just(Format::Raw)),
            record in proptest::option::of(proptest::collection::vec(1u8..=255, 1..40)),
        ) {
            let path = PathBuf::from(OsString::from_vec(path));
            prop_assume!(!is_address(&path));
            let record = record.map(|bytes| PathBuf::from(OsString::from_vec(bytes)));
            prop_assume!(record.as_deref().is_none_or(is_record_path));
            let replica = ReplicaArgument { path, name, cache, format, record };
            prop_assert_eq!(ReplicaArgument::parse(&replica.to_argument()), Ok(replica));
        }

        #[test]
        fn argument_of_any_bytes_does_not_panic(
            bytes in proptest::collection::vec(
                prop_oneof![Just(b','), Just(b'='), Just(b'n'), any::<u8>()], 0..60),
        ) {
            super::super::fuzzing::fuzz_replica_argument(&bytes);
        }
    }
}
