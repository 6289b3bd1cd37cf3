// SPDX-License-Identifier: Apache-2.0
//! Where the copies of the state record are kept, and what the first use of plain images means.
//!
//! How many copies there are follows rule R1: three, beside the first three replicas that are
//! files; one if fewer of them are; as many as paths were given, which must be an odd number so
//! that one half can never be newer than the other. Nothing here looks at a file: whether a
//! replica is one is told by the caller.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::disk::Replica;
use super::error::ConfigError;
use super::settings::Settings;
use super::values::RecordMode;
use crate::units::ReplicaId;

/// Copies of the record where nothing else was said and three replicas are files.
const COPIES_DEFAULT: usize = 3;

/// The ending of a file that holds a copy of the record.
pub const RECORD_EXTENSION: &str = "qrec";

/// Whether there is a state record, and where its copies are.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum RecordConfig {
    /// None: after a restart every replica votes again, also one that missed writes.
    None,
    /// `IMAGE.qrec` beside the images.
    Beside,
    /// `NAME.qrec` in this folder.
    Folder(PathBuf),
    /// In these files, 1, 3 or 5 of them, all different.
    Paths(Vec<PathBuf>),
}

/// What images without a record are taken for (rule S5).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FirstUse {
    /// Probably equal: they vote, and are compared in the background once.
    Verify,
    /// Equal: they are not compared.
    AssumeClean,
    /// Only this one holds the disk; the others are overwritten with it.
    AdoptFrom(ReplicaId),
}

/// There is no place for the record.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum RecordPlaceError {
    /// All replicas are devices.
    #[error(
        "no replica is a file, so there is no place beside one for the state record; give \
         --record-dir FOLDER (on a disk that outlives a restart), or record=PATH with 1, 3 or 5 \
         replicas"
    )]
    NoFile,
    /// Two copies in one file.
    #[error(
        "two copies of the state record would be in {}; give every replica its own path and name",
        path.display()
    )]
    SamePath {
        /// The file.
        path: PathBuf,
    },
    /// A copy in the file of a replica.
    #[error(
        "{} is a replica and cannot hold the state record; give another path",
        path.display()
    )]
    IsReplica {
        /// The file.
        path: PathBuf,
    },
}

/// The files of the record.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RecordPlaces {
    /// Where the K copies are kept: 1, 3 or 5 different paths. Copy k is at `copies[k]`.
    pub copies: Vec<PathBuf>,
    /// Where else there would be copies: with the replicas in another order, or beside the images
    /// though they are looked for somewhere else now. Each once, and none of the copies. A record
    /// that is found only there belongs to this disk all the same.
    pub elsewhere: Vec<PathBuf>,
}

impl RecordConfig {
    /// Decides from the settings.
    pub(super) fn from_settings(
        settings: &Settings,
        replicas: &[Replica],
    ) -> Result<Self, ConfigError> {
        let given: Vec<PathBuf> = settings
            .replica
            .iter()
            .filter_map(|replica| replica.record.clone())
            .collect();
        let folder = settings.record_dir.clone();
        if settings.record == Some(RecordMode::None) {
            let contradicting = [
                ("--record-dir", folder.is_some()),
                ("record= of a replica", !given.is_empty()),
                ("--force", settings.force == Some(true)),
                ("--assume-clean", settings.assume_clean == Some(true)),
                ("--adopt-from", settings.adopt_from.is_some()),
            ];
            let other = contradicting.iter().find(|(_, given)| *given);
            return match other {
                Some((other, _)) => Err(ConfigError::NoRecord { other }),
                None => Ok(Self::None),
            };
        }
        let config = match (given.len(), folder) {
            (0, None) => Self::Beside,
            (0, Some(folder)) if folder.as_os_str().is_empty() => {
                return Err(ConfigError::EmptyRecordDir);
            }
            (0, Some(folder)) => Self::Folder(folder),
            (_, Some(_)) => return Err(ConfigError::TwoRecordPlaces),
            (1 | 3 | 5, None) => Self::Paths(given),
            (copies, None) => return Err(ConfigError::RecordCopies(copies)),
        };
        // Of the other kinds the paths are known only when it is known which replicas are files.
        if matches!(config, Self::Paths(_)) {
            config.places(replicas, |_| true)?;
        }
        Ok(config)
    }

    /// Where the copies are, for these replicas; `is_file` tells whether a replica is a file
    /// rather than a device. `None` without a record.
    ///
    /// # Errors
    /// If there is no place, or one place for two things.
    pub fn places(
        &self,
        replicas: &[Replica],
        is_file: impl Fn(&Path) -> bool,
    ) -> Result<Option<RecordPlaces>, RecordPlaceError> {
        let is_file = &is_file;
        let mut files = replicas.iter().filter(|replica| is_file(&replica.path));
        let candidates: Vec<PathBuf> = match self {
            Self::None => return Ok(None),
            Self::Paths(paths) => paths.clone(),
            Self::Beside => files.map(|replica| beside(&replica.path)).collect(),
            Self::Folder(folder) => {
                let in_folder =
                    |replica: &Replica| folder.join(format!("{}.{RECORD_EXTENSION}", replica.name));
                if files.next().is_none() {
                    // Only devices: one copy, by the name of the first.
                    replicas.iter().map(in_folder).collect()
                } else {
                    replicas
                        .iter()
                        .filter(|replica| is_file(&replica.path))
                        .map(in_folder)
                        .collect()
                }
            }
        };
        let count = match self {
            Self::Paths(paths) => paths.len(),
            _ if replicas.iter().filter(|r| is_file(&r.path)).count() >= COPIES_DEFAULT => {
                COPIES_DEFAULT
            }
            _ => 1,
        };
        if candidates.is_empty() {
            return Err(RecordPlaceError::NoFile);
        }
        let mut copies = candidates;
        let mut elsewhere = copies.split_off(count.min(copies.len()));
        // A record beside the images is this disk's, wherever it is looked for now.
        elsewhere.extend(beside_all(replicas, is_file));
        // One path for two replicas is refused when they are opened; here it would only be in the
        // way of that.
        let mut listed = BTreeSet::new();
        elsewhere.retain(|path| !copies.contains(path) && listed.insert(path.clone()));
        let mut seen = BTreeSet::new();
        for path in &copies {
            if !seen.insert(path.as_path()) {
                return Err(RecordPlaceError::SamePath { path: path.clone() });
            }
            if replicas.iter().any(|replica| replica.path == *path) {
                return Err(RecordPlaceError::IsReplica { path: path.clone() });
            }
        }
        Ok(Some(RecordPlaces { copies, elsewhere }))
    }
}

/// Where a record beside the images would be, for every replica that is a file.
pub fn beside_all(replicas: &[Replica], is_file: impl Fn(&Path) -> bool) -> Vec<PathBuf> {
    let files = replicas.iter().filter(|replica| is_file(&replica.path));
    files.map(|replica| beside(&replica.path)).collect()
}

impl FirstUse {
    /// Decides from the settings.
    pub(super) fn from_settings(
        settings: &Settings,
        replicas: &[Replica],
    ) -> Result<Self, ConfigError> {
        let assume_clean = settings.assume_clean.unwrap_or(false);
        match &settings.adopt_from {
            Some(_) if assume_clean => Err(ConfigError::TwoFirstUses),
            Some(name) => named("--adopt-from", name, replicas).map(Self::AdoptFrom),
            None if assume_clean => Ok(Self::AssumeClean),
            None => Ok(Self::Verify),
        }
    }
}

/// `IMAGE.qrec`, also if the name of the image is no text.
fn beside(image: &Path) -> PathBuf {
    let mut path = OsString::from(image);
    path.push(".");
    path.push(RECORD_EXTENSION);
    PathBuf::from(path)
}

/// The replica that the value of `flag` names.
pub(super) fn named(
    flag: &'static str,
    name: &str,
    replicas: &[Replica],
) -> Result<ReplicaId, ConfigError> {
    let slot = replicas.iter().position(|replica| replica.name == name);
    let known = || {
        let names = replicas.iter().map(|replica| replica.name.as_str());
        names.collect::<Vec<_>>().join(", ")
    };
    slot.map(ReplicaId::new)
        .ok_or_else(|| ConfigError::NoSuchReplica {
            flag,
            name: name.to_owned(),
            known: known(),
        })
}

#[cfg(test)]
mod tests {
    use super::super::{Cache, ReplicaArgument};
    use super::*;

    fn replica(name: &str, path: &str) -> Replica {
        Replica {
            name: name.to_owned(),
            path: path.into(),
            cache: Cache::Direct,
            format: None,
        }
    }

    fn set() -> Vec<Replica> {
        [
            ("a", "/1/a"),
            ("b", "/dev/b"),
            ("c", "/3/c"),
            ("d", "/4/d"),
            ("e", "/5/e"),
        ]
        .map(|(name, path)| replica(name, path))
        .to_vec()
    }

    fn is_file(path: &Path) -> bool {
        !path.starts_with("/dev")
    }

    fn paths(config: &RecordConfig, replicas: &[Replica]) -> (Vec<String>, Vec<String>) {
        let text = |paths: Vec<PathBuf>| -> Vec<String> {
            paths
                .iter()
                .map(|path| path.display().to_string())
                .collect()
        };
        let places = config.places(replicas, is_file).unwrap().unwrap();
        (text(places.copies), text(places.elsewhere))
    }

    #[test]
    fn places_are_beside_the_first_three_files() {
        let set = set();
        let (copies, elsewhere) = paths(&RecordConfig::Beside, &set);
        assert_eq!(copies, ["/1/a.qrec", "/3/c.qrec", "/4/d.qrec"]);
        assert_eq!(elsewhere, ["/5/e.qrec"]);
        let (copies, elsewhere) = paths(&RecordConfig::Beside, &set[1..4]);
        assert_eq!(copies, ["/3/c.qrec"], "two files have one copy");
        assert_eq!(elsewhere, ["/4/d.qrec"]);
        let none = RecordConfig::Beside.places(&set[1..2], is_file);
        assert_eq!(none, Err(RecordPlaceError::NoFile));
        assert_eq!(RecordConfig::None.places(&set, is_file), Ok(None));
    }

    #[test]
    fn places_in_a_folder_have_the_names_of_the_replicas() {
        let set = set();
        let folder = RecordConfig::Folder("/var".into());
        let (copies, elsewhere) = paths(&folder, &set);
        assert_eq!(copies, ["/var/a.qrec", "/var/c.qrec", "/var/d.qrec"]);
        assert_eq!(
            elsewhere,
            [
                "/var/e.qrec",
                "/1/a.qrec",
                "/3/c.qrec",
                "/4/d.qrec",
                "/5/e.qrec"
            ],
            "a record beside the images is the same disk's"
        );
        let (copies, _) = paths(&folder, &set[1..2]);
        assert_eq!(copies, ["/var/b.qrec"], "devices have one copy");
    }

    #[test]
    fn places_that_serve_two_things_are_refused() {
        let twice = [replica("a", "/a"), replica("b", "/a"), replica("c", "/c")];
        let refused = RecordConfig::Beside.places(&twice, is_file).unwrap_err();
        assert!(refused.to_string().contains("in /a.qrec"), "{refused}");
        let paths = RecordConfig::Paths(vec!["/1/a".into()]);
        let refused = paths.places(&set(), is_file).unwrap_err();
        assert!(
            refused.to_string().contains("/1/a is a replica"),
            "{refused}"
        );
    }

    fn settings(change: impl FnOnce(&mut Settings)) -> (Settings, Vec<Replica>) {
        let mut settings = Settings {
            replica: (0..5)
                .map(|index| ReplicaArgument::from_path(format!("/r{index}").into()))
                .collect(),
            ..Settings::default()
        };
        change(&mut settings);
        let replicas = (0..5).map(|i| replica(&format!("replica{i}"), &format!("/r{i}")));
        let replicas = replicas.collect();
        (settings, replicas)
    }

    #[test]
    fn record_follows_from_the_settings() {
        type Change = fn(&mut Settings);
        let cases: [(Change, RecordConfig); 4] = [
            (|_| {}, RecordConfig::Beside),
            (|s| s.record = Some(RecordMode::None), RecordConfig::None),
            (
                |s| s.record_dir = Some("/v".into()),
                RecordConfig::Folder("/v".into()),
            ),
            (
                |s| s.replica[3].record = Some("/x".into()),
                RecordConfig::Paths(vec!["/x".into()]),
            ),
        ];
        for (change, expected) in cases {
            let (settings, replicas) = settings(change);
            let got = RecordConfig::from_settings(&settings, &replicas);
            assert_eq!(got, Ok(expected));
        }
    }

    #[test]
    fn record_takes_an_odd_number_of_paths() {
        for copies in 1..=5 {
            let (settings, replicas) = settings(|s| {
                for (index, replica) in s.replica.iter_mut().take(copies).enumerate() {
                    replica.record = Some(format!("/x{index}").into());
                }
            });
            let got = RecordConfig::from_settings(&settings, &replicas);
            if copies % 2 == 1 {
                assert!(matches!(got, Ok(RecordConfig::Paths(paths)) if paths.len() == copies));
            } else {
                assert_eq!(got, Err(ConfigError::RecordCopies(copies)));
            }
        }
    }

    #[test]
    fn first_use_follows_from_the_settings() {
        type Change = fn(&mut Settings);
        let cases: [(Change, FirstUse); 3] = [
            (|_| {}, FirstUse::Verify),
            (|s| s.assume_clean = Some(true), FirstUse::AssumeClean),
            (
                |s| s.adopt_from = Some("replica2".to_owned()),
                FirstUse::AdoptFrom(ReplicaId::new(2)),
            ),
        ];
        for (change, expected) in cases {
            let (settings, replicas) = settings(change);
            assert_eq!(FirstUse::from_settings(&settings, &replicas), Ok(expected));
        }
    }
}
