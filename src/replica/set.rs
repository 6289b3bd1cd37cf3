// SPDX-License-Identifier: Apache-2.0
//! Whether several replicas together make a disk, and which.

use std::fmt;
use std::sync::Arc;

use thiserror::Error;

use crate::replica::{Identity, Replica};
use crate::units::{ReplicaId, SECTOR_BYTES};

/// The disk that a set of replicas makes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SetShape {
    /// Sectors of the disk: a multiple of the block size.
    pub sectors: u64,
    /// Logical block size in bytes: 512 or 4096 (rule L2).
    pub block_bytes: u32,
    /// Whether every replica that serves it can zero exact ranges, so that a discard may zero
    /// (rule Z2). One that comes later and cannot is sent the zeroes.
    pub can_zero_exactly: bool,
    /// Replicas that are open but cannot serve this disk: they are to be closed and to be missing.
    /// Always empty if the size of the disk was not known before.
    pub unfit: Vec<Unfit>,
    /// What people should know but need not act on.
    pub notes: Vec<SetNote>,
}

/// A replica that cannot serve the disk.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Unfit {
    /// Its slot.
    pub replica: ReplicaId,
    /// Why, for people.
    pub error: SetError,
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
#[derive(Clone, Debug, Error, PartialEq, Eq)]
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
    /// Fewer replicas that can be used than votes needed (rule S2).
    #[error(
        "only {present} of {replicas} replicas can be used, and {threshold} equal votes are \
         needed; bring back what is missing"
    )]
    TooFewPresent {
        /// Those that are open and fit.
        present: usize,
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
    /// The size that the disk is known to have does not go with the block size.
    #[error(
        "the disk has {disk_bytes} bytes, which is not a multiple of blocks of {block_bytes}; \
         give --block-size 512, or cache=buffered for replicas that need larger blocks"
    )]
    NotWholeBlocks {
        /// Its size.
        disk_bytes: u64,
        /// Logical block size.
        block_bytes: u32,
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

impl<'a> Member<'a> {
    fn of(replica: &'a Replica) -> Self {
        Self {
            name: replica.name(),
            path: replica.path().display().to_string(),
            identity: replica.identity(),
            length_bytes: replica.length_bytes(),
            alignment_bytes: replica.direct_alignment_bytes(),
            can_zero_exactly: replica.can_zero_exactly(),
        }
    }

    /// The smallest logical block it can do. 1024 and 2048 exist as alignments but not as block
    /// sizes that guests expect.
    fn block_bytes(&self) -> u32 {
        if self.alignment_bytes > 512 {
            4096
        } else {
            512
        }
    }

    fn can_do_blocks(&self, asked_bytes: u32) -> Result<(), SetError> {
        let needed_bytes = self.block_bytes();
        if needed_bytes <= asked_bytes {
            return Ok(());
        }
        Err(SetError::BlockSize {
            name: self.name.to_owned(),
            needed_bytes,
            asked_bytes,
        })
    }

    /// Rule Z3.
    fn holds(&self, disk_bytes: u64) -> Result<Option<SetNote>, SetError> {
        if self.length_bytes < disk_bytes {
            return Err(SetError::TooShort {
                name: self.name.to_owned(),
                path: self.path.clone(),
                length_bytes: self.length_bytes,
                disk_bytes,
                is_device: self.identity.device_number().is_some(),
            });
        }
        Ok((self.length_bytes > disk_bytes).then(|| SetNote::Longer {
            name: self.name.to_owned(),
            length_bytes: self.length_bytes,
            disk_bytes,
        }))
    }
}

/// Finds the disk that `replicas`, in the order of their slots, make; `None` where one is missing.
///
/// Its block size is `block_bytes` if given, or else the smallest that all of them can do. What
/// follows depends on whether the size of the disk is known from the state record:
///
/// - `expected_sectors` is `None`: the size is the largest that at least `threshold` replicas
///   have, in whole blocks, and a replica that is shorter, or cannot do the blocks, is an error:
///   it should be put right before the disk exists.
/// - `expected_sectors` is given: a replica that is shorter, or cannot do `block_bytes`, is
///   [`SetShape::unfit`], and the disk is served without it. `block_bytes` should be given then,
///   as a disk's blocks must not change under a guest.
///
/// At least `threshold` replicas have to be there and fit (rule S2). To open a minority by force
/// (rule S6), give the number of those that are there as the threshold, with the known size.
///
/// # Errors
/// [`SetError`]: two that are the same storage, too few, or what is said above.
pub fn check_set(
    replicas: &[Option<Arc<Replica>>],
    threshold: usize,
    block_bytes: Option<u32>,
    expected_sectors: Option<u64>,
) -> Result<SetShape, SetError> {
    let members: Vec<Option<Member<'_>>> = replicas
        .iter()
        .map(|replica| replica.as_deref().map(Member::of))
        .collect();
    check(&members, threshold, block_bytes, expected_sectors)
}

/// Whether one replica can serve a disk of `sectors` sectors in blocks of `block_bytes`: to be
/// asked of one that comes back while the disk is served. Says if it is longer than needed.
///
/// # Errors
/// [`SetError::TooShort`] (rule Z3), [`SetError::BlockSize`] (rule L2).
pub fn check_member(
    replica: &Replica,
    sectors: u64,
    block_bytes: u32,
) -> Result<Option<SetNote>, SetError> {
    let member = Member::of(replica);
    member.can_do_blocks(block_bytes)?;
    member.holds(sectors.saturating_mul(SECTOR_BYTES))
}

fn check(
    slots: &[Option<Member<'_>>],
    threshold: usize,
    asked_bytes: Option<u32>,
    expected_sectors: Option<u64>,
) -> Result<SetShape, SetError> {
    if threshold == 0 || threshold > slots.len() {
        return Err(SetError::TooFew {
            replicas: slots.len(),
            threshold,
        });
    }
    let present: Vec<&Member<'_>> = slots.iter().flatten().collect();
    refuse_duplicates(&present)?;
    let block_bytes = block_size(&present, asked_bytes)?;
    let known = expected_sectors.map(|sectors| sectors.saturating_mul(SECTOR_BYTES));
    if known.is_none() {
        for member in &present {
            member.can_do_blocks(block_bytes)?;
        }
    }
    let too_few = |present| SetError::TooFewPresent {
        present,
        replicas: slots.len(),
        threshold,
    };
    let disk_bytes = match known {
        Some(disk_bytes) => disk_bytes,
        None => agreed_length(&present, threshold).ok_or(too_few(present.len()))?,
    };
    let disk_bytes = whole_blocks(disk_bytes, block_bytes, known.is_some())?;

    let mut shape = SetShape {
        sectors: disk_bytes / SECTOR_BYTES,
        block_bytes,
        can_zero_exactly: true,
        unfit: Vec::new(),
        notes: Vec::new(),
    };
    for (index, member) in slots.iter().enumerate() {
        let Some(member) = member else { continue };
        let fits = member
            .can_do_blocks(block_bytes)
            .and_then(|()| member.holds(disk_bytes));
        match fits {
            Ok(note) => {
                shape.notes.extend(note);
                shape.can_zero_exactly &= member.can_zero_exactly;
            }
            Err(error) if known.is_some() => shape.unfit.push(Unfit {
                replica: ReplicaId::new(index),
                error,
            }),
            Err(error) => return Err(error),
        }
    }
    let fit = present.len() - shape.unfit.len();
    if fit < threshold {
        return Err(too_few(fit));
    }
    Ok(shape)
}

fn refuse_duplicates(members: &[&Member<'_>]) -> Result<(), SetError> {
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

fn block_size(members: &[&Member<'_>], asked_bytes: Option<u32>) -> Result<u32, SetError> {
    match asked_bytes {
        None => Ok(members
            .iter()
            .map(|member| member.block_bytes())
            .max()
            .unwrap_or(512)),
        Some(asked_bytes @ (512 | 4096)) => Ok(asked_bytes),
        Some(asked_bytes) => Err(SetError::BadBlockSize { asked_bytes }),
    }
}

/// The largest length that at least `threshold` members have; `None` if there are not so many.
fn agreed_length(members: &[&Member<'_>], threshold: usize) -> Option<u64> {
    let mut lengths: Vec<u64> = members.iter().map(|member| member.length_bytes).collect();
    lengths.sort_unstable_by(|a, b| b.cmp(a));
    lengths.get(threshold.checked_sub(1)?).copied()
}

/// The size in whole blocks: a size that is known is not cut, one that is found is.
fn whole_blocks(disk_bytes: u64, block_bytes: u32, known: bool) -> Result<u64, SetError> {
    let rest = disk_bytes % u64::from(block_bytes);
    if known && rest != 0 {
        return Err(SetError::NotWholeBlocks {
            disk_bytes,
            block_bytes,
        });
    }
    match disk_bytes - rest {
        0 => Err(SetError::Empty { block_bytes }),
        whole => Ok(whole),
    }
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
        let lengths: Vec<Option<u64>> = lengths.iter().copied().map(Some).collect();
        shape_with_missing(&lengths, alignments, threshold, asked, None)
    }

    /// A length of `None` is a replica that is missing.
    fn shape_with_missing(
        lengths: &[Option<u64>],
        alignments: &[u32],
        threshold: usize,
        asked: Option<u32>,
        expected_sectors: Option<u64>,
    ) -> Result<SetShape, SetError> {
        let directory = tempfile::tempdir().unwrap();
        let identities = identities(directory.path());
        let members: Vec<Option<Member<'_>>> = lengths
            .iter()
            .enumerate()
            .map(|(index, length_bytes)| {
                length_bytes.map(|length_bytes| Member {
                    name: NAMES[index],
                    path: format!("/{}", NAMES[index]),
                    identity: &identities[index],
                    length_bytes,
                    alignment_bytes: alignments[index],
                    can_zero_exactly: NAMES[index] != "d",
                })
            })
            .collect();
        check(&members, threshold, asked, expected_sectors)
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
    fn check_with_some_missing_takes_the_size_that_is_known() {
        let lengths = [Some(9000), None, Some(8192)];
        let found = shape_with_missing(&lengths, &[1; 3], 2, Some(512), Some(16)).unwrap();
        assert_eq!((found.sectors, found.block_bytes), (16, 512));
        assert_eq!(found.unfit, []);
        assert!(matches!(&found.notes[..], [SetNote::Longer { name, .. }] if name == "a"));
        // Without a known size those that are there decide.
        let found = shape_with_missing(&lengths, &[1; 3], 2, None, None).unwrap();
        assert_eq!(found.sectors, 16);
    }

    #[test]
    fn check_of_a_known_disk_leaves_out_what_does_not_fit() {
        let lengths = [Some(8192), Some(4096), Some(8192), Some(8192)];
        let alignments = [1, 1, 4096, 1];
        let found = shape_with_missing(&lengths, &alignments, 2, Some(512), Some(16)).unwrap();
        assert_eq!((found.sectors, found.block_bytes), (16, 512));
        let unfit: Vec<usize> = found.unfit.iter().map(|one| one.replica.index()).collect();
        assert_eq!(unfit, [1, 2]);
        assert!(matches!(found.unfit[0].error, SetError::TooShort { .. }));
        assert!(matches!(found.unfit[1].error, SetError::BlockSize { .. }));
        assert!(!found.can_zero_exactly, "d cannot, and serves");
        let error = shape_with_missing(&lengths, &alignments, 3, Some(512), Some(16)).unwrap_err();
        let expected = SetError::TooFewPresent {
            present: 2,
            replicas: 4,
            threshold: 3,
        };
        assert_eq!(error, expected);
    }

    #[test]
    fn check_asks_only_those_that_serve_whether_they_can_zero() {
        let lengths = [Some(8192), Some(8192), Some(8192), Some(4096)];
        let found = shape_with_missing(&lengths, &[1; 4], 2, Some(512), Some(16)).unwrap();
        assert_eq!(found.unfit.len(), 1);
        assert!(found.can_zero_exactly, "d cannot, and does not serve");
    }

    #[test]
    fn check_of_a_known_size_in_blocks_it_cannot_have_is_refused() {
        let error = shape_with_missing(&[Some(8192)], &[1], 1, Some(4096), Some(9)).unwrap_err();
        let expected = SetError::NotWholeBlocks {
            disk_bytes: 4608,
            block_bytes: 4096,
        };
        assert_eq!(error, expected);
    }

    #[test]
    fn check_with_too_many_missing_says_how_many_there_are() {
        for expected_sectors in [None, Some(16)] {
            let lengths = [Some(8192), None, None];
            let result = shape_with_missing(&lengths, &[1; 3], 2, Some(512), expected_sectors);
            let text = result.unwrap_err().to_string();
            assert!(text.contains("only 1 of 3 replicas"), "{text}");
        }
        // By force (rule S6).
        let lengths = [Some(8192), None, None];
        let found = shape_with_missing(&lengths, &[1; 3], 1, Some(512), Some(16)).unwrap();
        assert_eq!(found.sectors, 16);
    }
}
