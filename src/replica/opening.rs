// SPDX-License-Identifier: Apache-2.0
//! Opening a set of replicas, whole or as far as it goes, and one of them again.
//!
//! Opening takes as long as the storage does, for ever if it hangs: it belongs on a thread that
//! nobody waits for. [`open_each`] and [`open_within`] see to that themselves.

use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;

use crate::io::{Unfinished, within};
use crate::replica::fault::{OpenError, OpenFault};
use crate::replica::raw::{Format, RawOptions, RawReplica, identify};
use crate::replica::set::{SetError, SetNote, check_member};
use crate::replica::{Identity, Replica};

/// Opens all replicas of a set, in order. If one cannot be opened, those before it are closed
/// again.
///
/// # Errors
/// [`OpenError`] of the first one that cannot be opened.
pub fn open_set(options: &[RawOptions]) -> Result<Vec<Arc<Replica>>, OpenError> {
    let mut open: Vec<Arc<Replica>> = Vec::with_capacity(options.len());
    for options in options {
        let replica = RawReplica::open_beside(options, named(&open))?;
        open.push(Arc::new(Replica::Raw(replica)));
    }
    Ok(open)
}

/// Whether no two of the replicas are the same storage, as far as they can be looked at.
///
/// # Errors
/// [`OpenFault::Duplicate`] if two of them are (rule V8).
pub fn check_distinct(options: &[RawOptions]) -> Result<(), OpenError> {
    // Looked at before any is opened: of two that are the same storage the first may fail for a
    // reason of its own, and the second would then be taken for the only one.
    let mut seen: Vec<(&str, Identity)> = Vec::with_capacity(options.len());
    for options in options {
        let Ok(identity) = identify(&options.path) else {
            continue;
        };
        if let Some((other, _)) = seen.iter().find(|(_, seen)| seen.same_storage(&identity)) {
            let other = (*other).to_owned();
            return Err(OpenError {
                name: options.name.clone(),
                path: options.path.clone(),
                fault: OpenFault::Duplicate { other },
            });
        }
        seen.push((&options.name, identity));
    }
    Ok(())
}

/// Like [`check_distinct`], for no longer than `limit`: where a look hangs it is left out, and
/// those that can be opened are compared with each other then.
///
/// # Errors
/// [`OpenFault::Duplicate`] if two of them are the same storage (rule V8).
pub fn check_distinct_within(options: &[RawOptions], limit: Duration) -> Result<(), OpenError> {
    let set = options.to_vec();
    within("opener", limit, move || check_distinct(&set)).unwrap_or(Ok(()))
}

/// The slots of a set in the order in which everybody who wants all of it opens them, whatever
/// order they were given in: by where they are stored. Of two who do so, and wait for what the
/// other one has, one gets everything. What cannot be looked at within `limit` comes last.
#[must_use]
pub fn common_order(options: &[RawOptions], limit: Duration) -> Vec<usize> {
    let storage = |options: &RawOptions| {
        let path = options.path.clone();
        within("opener", limit, move || identify(&path).ok())
            .ok()
            .flatten()
    };
    let storage: Vec<Option<Identity>> = options.iter().map(storage).collect();
    let mut order: Vec<usize> = (0..options.len()).collect();
    order.sort_by_key(|&slot| (storage[slot].is_none(), storage[slot].clone()));
    order
}

/// Opens every replica of a set that can be opened, and tells of each of the others why not; the
/// results are in the order of `options`. Nothing is waited for longer than `limit`, neither a
/// look at the whole set nor the opening of one of them.
///
/// # Errors
/// [`OpenFault::Duplicate`] if two of them are the same storage (rule V8), whether they could be
/// opened or not: that is wrong with the whole set, and nothing stays open.
pub fn open_each(
    options: &[RawOptions],
    limit: Duration,
) -> Result<Vec<Result<Arc<Replica>, OpenError>>, OpenError> {
    check_distinct_within(options, limit)?;
    let mut open: Vec<Arc<Replica>> = Vec::with_capacity(options.len());
    let mut results = Vec::with_capacity(options.len());
    for options in options {
        results.push(match open_within(options, &open, limit) {
            Ok(replica) => {
                open.push(Arc::clone(&replica));
                Ok(replica)
            }
            // What the path leads to has changed since the look.
            Err(error) if matches!(error.fault, OpenFault::Duplicate { .. }) => return Err(error),
            Err(error) => Err(error),
        });
    }
    Ok(results)
}

/// Opens one replica beside `others` that are open, unless its storage takes longer than `limit`:
/// it is then closed again whenever that ends.
///
/// # Errors
/// [`OpenError`], [`OpenFault::NoAnswer`] if it takes too long.
pub fn open_within(
    options: &RawOptions,
    others: &[Arc<Replica>],
    limit: Duration,
) -> Result<Arc<Replica>, OpenError> {
    // Not the replicas themselves: a thread that hangs would keep them open.
    let others: Vec<(String, Identity)> = named(others)
        .map(|(name, identity)| (name.to_owned(), identity.clone()))
        .collect();
    let of = options.clone();
    let opened = within("opener", limit, move || {
        let others = others.iter().map(|(name, identity)| (&**name, identity));
        RawReplica::open_beside(&of, others)
    });
    let fault = match opened {
        Ok(opened) => return Ok(Arc::new(Replica::Raw(opened?))),
        Err(Unfinished::Late) => OpenFault::NoAnswer {
            seconds: limit.as_secs(),
        },
        Err(Unfinished::NoThread(error)) => OpenFault::System {
            action: "start a thread to open it",
            error,
        },
    };
    Err(OpenError {
        name: options.name.clone(),
        path: options.path.clone(),
        fault,
    })
}

/// A replica that cannot come back to a disk that is being served.
#[derive(Debug, Error)]
pub enum ReopenError {
    /// It cannot be opened; [`OpenError::is_in_use`] while an operation of its earlier life is
    /// still under way (rule K2).
    #[error(transparent)]
    Open(#[from] OpenError),
    /// It is open, but cannot serve this disk; it was closed again.
    #[error(transparent)]
    Misfit(#[from] SetError),
}

/// Opens one replica of a disk of `sectors` sectors that is served in blocks of `block_bytes`,
/// beside `others` that are open. It is known to be raw, whatever the guest has written to its
/// first sector.
///
/// That nobody changed it meanwhile is for the caller to find out: [`Replica::found`] has to be
/// the [`Replica::fingerprint`] that was taken after its last operation had landed.
///
/// # Errors
/// [`ReopenError::Open`] if it cannot be opened now; [`ReopenError::Misfit`] if it is too short
/// (rule Z3) or needs larger blocks (rule L2).
pub fn open_one_beside(
    options: &RawOptions,
    others: &[Option<Arc<Replica>>],
    sectors: u64,
    block_bytes: u32,
) -> Result<(Arc<Replica>, Option<SetNote>), ReopenError> {
    let options = RawOptions {
        format: Some(options.format.unwrap_or(Format::Raw)),
        ..options.clone()
    };
    let replica = RawReplica::open_beside(&options, named(others.iter().flatten()))?;
    let replica = Replica::Raw(replica);
    let note = check_member(&replica, sectors, block_bytes)?;
    Ok((Arc::new(replica), note))
}

/// Gives a file that is too short the length of a disk of `length_bytes` bytes, while nobody else
/// has it. What it lacked reads as zeroes.
///
/// # Errors
/// [`OpenError`] if it cannot be opened and locked, or not be made longer.
pub fn lengthen(
    options: &RawOptions,
    others: &[Option<Arc<Replica>>],
    length_bytes: u64,
) -> Result<(), OpenError> {
    let options = RawOptions {
        format: Some(Format::Raw),
        ..options.clone()
    };
    let mut replica = RawReplica::open_beside(&options, named(others.iter().flatten()))?;
    replica.lengthen(length_bytes).map_err(|error| OpenError {
        name: options.name,
        path: options.path,
        fault: OpenFault::System {
            action: "make it longer",
            error,
        },
    })
}

fn named<'a>(
    replicas: impl IntoIterator<Item = &'a Arc<Replica>>,
) -> impl Iterator<Item = (&'a str, &'a Identity)> {
    replicas
        .into_iter()
        .map(|replica| (replica.name(), replica.identity()))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;
    use crate::replica::Cache;

    const LIMIT: Duration = Duration::from_secs(10);

    fn image(folder: &Path, name: &str, bytes: usize) -> RawOptions {
        let path = folder.join(name);
        fs::write(&path, vec![0; bytes]).unwrap();
        RawOptions {
            cache: Cache::Buffered,
            ..RawOptions::new(name, path)
        }
    }

    #[test]
    fn open_set_finds_one_file_given_twice() {
        let folder = tempfile::tempdir().unwrap();
        let a = image(folder.path(), "a", 4096);
        let b = RawOptions::new("b", &a.path);
        let text = open_set(&[a, b]).unwrap_err().to_string();
        assert!(text.contains("same storage as replica 'a'"), "{text}");
    }

    #[test]
    fn open_each_opens_what_it_can_and_names_the_rest() {
        let folder = tempfile::tempdir().unwrap();
        let set = [
            image(folder.path(), "a", 4096),
            RawOptions::new("b", folder.path().join("missing")),
            image(folder.path(), "c", 4096),
        ];
        let results = open_each(&set, LIMIT).unwrap();
        let names: Vec<Result<&str, &str>> = results
            .iter()
            .map(|one| match one {
                Ok(replica) => Ok(replica.name()),
                Err(error) => Err(error.name.as_str()),
            })
            .collect();
        assert_eq!(names, [Ok("a"), Err("b"), Ok("c")]);
    }

    #[test]
    fn open_each_refuses_one_file_given_twice_even_if_it_is_in_use() {
        let folder = tempfile::tempdir().unwrap();
        let a = image(folder.path(), "a", 4096);
        let link = folder.path().join("b");
        fs::hard_link(&a.path, &link).unwrap();
        let _in_use = RawReplica::open(&a).unwrap();
        let set = [a, RawOptions::new("b", link)];
        let error = open_each(&set, LIMIT).unwrap_err();
        assert!(matches!(&error.fault, OpenFault::Duplicate { other } if other == "a"));
        assert_eq!(error.name, "b");
    }

    #[test]
    fn open_one_beside_wants_length_and_blocks_of_the_disk() {
        let folder = tempfile::tempdir().unwrap();
        let a = image(folder.path(), "a", 8192);
        let (_, note) = open_one_beside(&a, &[], 16, 512).unwrap();
        assert_eq!(note, None);
        let (_, note) = open_one_beside(&a, &[], 8, 4096).unwrap();
        assert!(matches!(
            note,
            Some(SetNote::Longer {
                disk_bytes: 4096,
                ..
            })
        ));
        let error = open_one_beside(&a, &[], 17, 512).unwrap_err();
        let ReopenError::Misfit(SetError::TooShort { name, .. }) = &error else {
            panic!("{error}");
        };
        assert_eq!(name, "a");
        // It was closed again.
        RawReplica::open(&a).unwrap();
    }

    #[test]
    fn open_one_beside_knows_the_others_and_its_own_earlier_life() {
        let folder = tempfile::tempdir().unwrap();
        let a = image(folder.path(), "a", 4096);
        let first = open_set(std::slice::from_ref(&a)).unwrap().remove(0);
        let error = open_one_beside(&a, &[None], 8, 512).unwrap_err();
        assert!(
            matches!(&error, ReopenError::Open(open) if open.is_in_use()),
            "{error}"
        );
        let b = RawOptions::new("b", &a.path);
        let error = open_one_beside(&b, &[None, Some(first)], 8, 512).unwrap_err();
        assert!(
            error.to_string().contains("same storage as replica 'a'"),
            "{error}"
        );
    }

    #[test]
    fn open_one_beside_takes_what_the_guest_made_look_like_qcow2() {
        let folder = tempfile::tempdir().unwrap();
        let a = image(folder.path(), "a", 4096);
        fs::write(&a.path, [b"QFI\xfb".as_slice(), &[0; 4092]].concat()).unwrap();
        assert!(RawReplica::open(&a).is_err());
        open_one_beside(&a, &[], 8, 512).unwrap();
    }
}
