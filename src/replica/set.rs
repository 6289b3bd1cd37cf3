// SPDX-License-Identifier: Apache-2.0
//! Whether several replicas together make a disk, and which.

use std::fmt;
use std::sync::Arc;

use thiserror::Error;

use crate::replica::raw::{OpenError, RawOptions, RawReplica};
use crate::replica::{Identity, Replica};
use crate::units::SECTOR_BYTES;

/// Opens all replicas of a set, in order. If one cannot be opened, those before it are closed
/// again.
///
/// # Errors
/// [`OpenError`] of the first one that cannot be opened.
pub fn open_set(options: &[RawOptions]) -> Result<Vec<Arc<Replica>>, OpenError> {
    let mut open: Vec<Arc<Replica>> = Vec::with_capacity(options.len());
    for options in options {
        let others = open
            .iter()
            .map(|replica| (replica.name(), replica.identity()));
        let replica = RawReplica::open_beside(options, others)?;
        open.push(Arc::new(Replica::Raw(replica)));
    }
    Ok(open)
}

/// The disk that a set of replicas makes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SetShape {
    /// Sectors of the disk: a multiple of the block size.
    pub sectors: u64,
    /// Logical block size in bytes: 512 or 4096 (rule L2).
    pub block_bytes: u32,
    /// Whether every replica can zero exact ranges, so that a discard may zero (rule Z2).
    pub can_zero_exactly: bool,
    /// What people should know but need not act on.
    pub notes: Vec<SetNote>,
}

/// Something odd about a replica that does no harm.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum SetNote {
    /// A replica is longer than the disk; the rest of it is not used (rule Z3).
    Longer {
        /// Its name.
        name: String,
        /// Its length.
        length_bytes: u64,
        /// The disk's size.
        disk_bytes: u64,
    },
}

impl fmt::Display for SetNote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Longer {
                name,
                length_bytes,
                disk_bytes,
            } => write!(
                f,
                "replica '{name}' has {length_bytes} bytes; the disk has {disk_bytes}, \
                 the rest is not used"
            ),
        }
    }
}

/// Replicas that do not make a disk.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum SetError {
    /// Rule V8.
    #[error("replicas '{first}' and '{second}' are the same storage; every replica needs its own")]
    Duplicate {
        /// The earlier one.
        first: String,
        /// The later one.
        second: String,
    },
    /// Fewer replicas than votes needed.
    #[error("{replicas} replicas cannot give {threshold} equal votes")]
    TooFew {
        /// N.
        replicas: usize,
        /// T.
        threshold: usize,
    },
    /// Rule Z3.
    #[error(
        "replica '{name}' ({path}) has {length_bytes} bytes, but the disk has {disk_bytes}; \
         {}, or leave it out",
        cure(path, *disk_bytes, *is_device)
    )]
    TooShort {
        /// Its name.
        name: String,
        /// Where it is.
        path: String,
        /// Its length.
        length_bytes: u64,
        /// The disk's size.
        disk_bytes: u64,
        /// Whether it is a block device.
        is_device: bool,
    },
    /// Rule L2: there is no read-modify-write.
    #[error(
        "replica '{name}' does O_DIRECT in {needed_bytes}-byte blocks only, not {asked_bytes}; \
         give --block-size {needed_bytes}, or cache=buffered for this replica"
    )]
    BlockSize {
        /// Its name.
        name: String,
        /// What it needs.
        needed_bytes: u32,
        /// What was asked for.
        asked_bytes: u32,
    },
    /// Not a block size.
    #[error("a block size of {asked_bytes} bytes is not served; give 512 or 4096")]
    BadBlockSize {
        /// What was asked for.
        asked_bytes: u32,
    },
    /// Nothing is left of it after rounding down to blocks.
    #[error(
        "the replicas are too short for a disk with blocks of {block_bytes} bytes; \
         grow them to the size of the disk"
    )]
    Empty {
        /// Logical block size.
        block_bytes: u32,
    },
}

/// What helps against a replica that is too short.
fn cure(path: &str, disk_bytes: u64, is_device: bool) -> String {
    if is_device {
        format!("use a device of at least {disk_bytes} bytes")
    } else {
        format!("grow it with 'qemu-img resize -f raw {path} {disk_bytes}'")
    }
}

/// What the set's rules look at.
struct Member<'a> {
    name: &'a str,
    path: String,
    identity: &'a Identity,
    length_bytes: u64,
    alignment_bytes: u32,
    can_zero_exactly: bool,
}

/// Finds the disk that `replicas` make: its size is the largest that at least `threshold` of them
/// have, in whole blocks; its block size is `block_bytes` if given, or else the smallest that all
/// of them can do.
///
/// # Errors
/// [`SetError`]: two that are the same storage, one that is shorter than the disk, or one that
/// cannot do the block size asked for.
pub fn check_set(
    replicas: &[Arc<Replica>],
    threshold: usize,
    block_bytes: Option<u32>,
) -> Result<SetShape, SetError> {
    let members: Vec<Member<'_>> = replicas
        .iter()
        .map(|replica| Member {
            name: replica.name(),
            path: replica.path().display().to_string(),
            identity: replica.identity(),
            length_bytes: replica.length_bytes(),
            alignment_bytes: replica.direct_alignment_bytes(),
            can_zero_exactly: replica.can_zero_exactly(),
        })
        .collect();
    check(&members, threshold, block_bytes)
}

fn check(
    members: &[Member<'_>],
    threshold: usize,
    asked_bytes: Option<u32>,
) -> Result<SetShape, SetError> {
    refuse_duplicates(members)?;
    let block_bytes = block_size(members, asked_bytes)?;
    let disk_bytes = disk_size(members, threshold, block_bytes)?;
    let mut notes = Vec::new();
    for member in members {
        if member.length_bytes < disk_bytes {
            return Err(SetError::TooShort {
                name: member.name.to_owned(),
                path: member.path.clone(),
                length_bytes: member.length_bytes,
                disk_bytes,
                is_device: member.identity.device_number().is_some(),
            });
        }
        if member.length_bytes > disk_bytes {
            notes.push(SetNote::Longer {
                name: member.name.to_owned(),
                length_bytes: member.length_bytes,
                disk_bytes,
            });
        }
    }
    Ok(SetShape {
        sectors: disk_bytes / SECTOR_BYTES,
        block_bytes,
        can_zero_exactly: members.iter().all(|member| member.can_zero_exactly),
        notes,
    })
}

fn refuse_duplicates(members: &[Member<'_>]) -> Result<(), SetError> {
    for (index, second) in members.iter().enumerate() {
        let earlier = &members[..index];
        if let Some(first) = earlier
            .iter()
            .find(|first| first.identity.same_storage(second.identity))
        {
            return Err(SetError::Duplicate {
                first: first.name.to_owned(),
                second: second.name.to_owned(),
            });
        }
    }
    Ok(())
}

fn block_size(members: &[Member<'_>], asked_bytes: Option<u32>) -> Result<u32, SetError> {
    // 1024 and 2048 exist as alignments but not as block sizes that guests expect.
    let needed = |member: &Member<'_>| {
        if member.alignment_bytes > 512 {
            4096
        } else {
            512
        }
    };
    let Some(asked_bytes) = asked_bytes else {
        return Ok(members.iter().map(needed).max().unwrap_or(512));
    };
    if asked_bytes != 512 && asked_bytes != 4096 {
        return Err(SetError::BadBlockSize { asked_bytes });
    }
    match members.iter().find(|member| needed(member) > asked_bytes) {
        None => Ok(asked_bytes),
        Some(member) => Err(SetError::BlockSize {
            name: member.name.to_owned(),
            needed_bytes: needed(member),
            asked_bytes,
        }),
    }
}

fn disk_size(members: &[Member<'_>], threshold: usize, block_bytes: u32) -> Result<u64, SetError> {
    let mut lengths: Vec<u64> = members.iter().map(|member| member.length_bytes).collect();
    lengths.sort_unstable_by(|a, b| b.cmp(a));
    let length = threshold
        .checked_sub(1)
        .and_then(|index| lengths.get(index))
        .ok_or(SetError::TooFew {
            replicas: members.len(),
            threshold,
        })?;
    let disk_bytes = length - length % u64::from(block_bytes);
    if disk_bytes == 0 {
        return Err(SetError::Empty { block_bytes });
    }
    Ok(disk_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAMES: [&str; 4] = ["a", "b", "c", "d"];

    fn identities(directory: &std::path::Path) -> Vec<Identity> {
        let identity = |name| {
            let path = directory.join(name);
            std::fs::write(&path, b"").unwrap();
            Identity::of(&std::fs::metadata(path).unwrap()).unwrap()
        };
        NAMES.map(identity).to_vec()
    }

    fn shape(
        lengths: &[u64],
        alignments: &[u32],
        threshold: usize,
        asked: Option<u32>,
    ) -> Result<SetShape, SetError> {
        let directory = tempfile::tempdir().unwrap();
        let identities = identities(directory.path());
        let members: Vec<Member<'_>> = lengths
            .iter()
            .enumerate()
            .map(|(index, &length_bytes)| Member {
                name: NAMES[index],
                path: format!("/{}", NAMES[index]),
                identity: &identities[index],
                length_bytes,
                alignment_bytes: alignments[index],
                can_zero_exactly: true,
            })
            .collect();
        check(&members, threshold, asked)
    }

    #[test]
    fn check_of_equal_replicas_makes_a_disk_without_notes() {
        let shape = shape(&[8192; 3], &[1, 512, 512], 2, None).unwrap();
        assert_eq!((shape.sectors, shape.block_bytes), (16, 512));
        assert!(shape.can_zero_exactly);
        assert_eq!(shape.notes, []);
    }

    #[test]
    fn check_of_a_longer_replica_notes_it() {
        let shape = shape(&[8192, 8192, 9000], &[1; 3], 2, None).unwrap();
        assert_eq!(shape.sectors, 16);
        assert_eq!(
            shape.notes,
            [SetNote::Longer {
                name: "c".into(),
                length_bytes: 9000,
                disk_bytes: 8192
            }]
        );
    }

    #[test]
    fn check_of_a_shorter_replica_names_it_and_the_cure() {
        let error = shape(&[8192, 4096, 8192], &[1; 3], 2, None).unwrap_err();
        let SetError::TooShort {
            name,
            length_bytes,
            disk_bytes,
            ..
        } = &error
        else {
            panic!("{error}");
        };
        assert_eq!(
            (name.as_str(), *length_bytes, *disk_bytes),
            ("b", 4096, 8192)
        );
        assert!(error.to_string().contains("qemu-img resize -f raw /b 8192"));
    }

    #[test]
    fn check_rounds_to_blocks_before_it_calls_a_replica_short() {
        let shape = shape(&[8192 + 512, 8192 + 512, 8192], &[4096, 1, 1], 2, None).unwrap();
        assert_eq!((shape.sectors, shape.block_bytes), (16, 4096));
        assert_eq!(shape.notes.len(), 2);
    }

    #[test]
    fn check_of_block_sizes() {
        let lengths = [8192; 3];
        let block = |alignments: [u32; 3], asked| {
            shape(&lengths, &alignments, 2, asked).map(|shape| shape.block_bytes)
        };
        assert_eq!(block([1, 512, 1], None), Ok(512));
        assert_eq!(block([1, 1024, 1], None), Ok(4096));
        assert_eq!(block([1, 512, 1], Some(4096)), Ok(4096));
        assert_eq!(
            block([1, 512, 4096], Some(512)),
            Err(SetError::BlockSize {
                name: "c".into(),
                needed_bytes: 4096,
                asked_bytes: 512
            })
        );
        assert_eq!(
            block([1; 3], Some(1024)),
            Err(SetError::BadBlockSize { asked_bytes: 1024 })
        );
    }

    #[test]
    fn check_of_impossible_sets() {
        let cases = [
            (
                vec![8192, 8192],
                3,
                SetError::TooFew {
                    replicas: 2,
                    threshold: 3,
                },
            ),
            (
                vec![8192],
                0,
                SetError::TooFew {
                    replicas: 1,
                    threshold: 0,
                },
            ),
            (vec![100, 100], 2, SetError::Empty { block_bytes: 512 }),
        ];
        for (lengths, threshold, expected) in cases {
            let alignments = vec![1; lengths.len()];
            assert_eq!(shape(&lengths, &alignments, threshold, None), Err(expected));
        }
    }

    #[test]
    fn open_set_finds_one_file_given_twice() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a");
        std::fs::write(&path, [0; 4096]).unwrap();
        let options = [RawOptions::new("a", &path), RawOptions::new("b", &path)];
        let text = open_set(&options).unwrap_err().to_string();
        assert!(text.contains("same storage as replica 'a'"), "{text}");
    }
}
