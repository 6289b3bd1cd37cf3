// SPDX-License-Identifier: Apache-2.0
//! A disk that becomes longer while it is opened (rule Z3).
//!
//! 1. The disk is opened at its old size, and the epoch of this run begins: from here on the record
//!    says that it is in use, so what is done to the replicas is not taken for a change by
//!    somebody else if we are killed.
//! 2. The replicas that are up are made longer, or are long enough. One that cannot be is left out.
//! 3. The copies of the record are made longer.
//! 4. The record is read again, and everything is settled anew, at the new size and with all that
//!    is new dirty. The epoch that begins then has the new size.
//!
//! Killed before the end of that, the disk has its old size, and files that are longer than it is:
//! which is no harm, the rest of them is not used. Only a disk of which nothing is dirty grows, so
//! that all that is unresolved afterwards is new, and may be chosen (rule Y3).

use std::os::unix::fs::FileExt;
use std::sync::Arc;

use thiserror::Error;
use tracing::{info, warn};

use super::advice::names_of;
use super::decision::Candidate;
use super::settled::{ReplicaFiles, SettledDisk};
use super::{Opening, StartError, copies, read, settle};
use crate::config::{Config, RecordConfig};
use crate::daemon::first_use::RunIds;
use crate::daemon::record_files::RecordFiles;
use crate::quorum::{Bitmap, KeeperStart, Marks};
use crate::record::{BLOCK_BYTES, Growth, GrowthError, RecordAction, RecordEvent, Recorder};
use crate::replica::Replica;
use crate::units::{SECTOR_BYTES, Time};

/// What is to become of the size of the disk when it is opened.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Grow {
    /// It stays.
    #[default]
    No,
    /// It stays, but may be found longer than it was: to become so was tried.
    Kept,
    /// It becomes what the shortest of the replicas that are up has.
    Found,
    /// It becomes so many sectors, and regular files are made longer for that.
    To(u64),
}

/// A disk that was not made longer.
#[derive(Debug, Error)]
pub enum GrowError {
    /// The size is not possible.
    #[error(transparent)]
    Size(#[from] GrowthError),
    /// Nobody would know which part is new.
    #[error(
        "a disk without a state record (--record none), or one that is only read (--read-only \
         without --repair), is not made longer while it is served: stop it, make the images \
         longer and start it again"
    )]
    NoRecord,
    /// What is dirty for another reason must not be chosen.
    #[error(
        "{dirty} extents of the disk are still being made equal after its last run, and until that \
         is done it is not made longer: try again later (the status tells how far it is)"
    )]
    Dirty {
        /// Extents.
        dirty: u64,
    },
    /// Too few of the replicas can have that size.
    #[error("only {long} of the replicas can have that size, and {needed} are needed: {why}")]
    TooFew {
        /// Replicas that can.
        long: usize,
        /// T.
        needed: usize,
        /// Why the others cannot.
        why: String,
    },
}

/// A disk that can be served as soon as the change is durable with which its record begins.
pub struct ReadyDisk {
    /// The disk.
    pub disk: SettledDisk,
    /// What the keeper begins with.
    pub keeper: KeeperStart,
    /// Its record, before its first event.
    pub recorder: Recorder,
    /// The copies of the record.
    pub files: RecordFiles,
    /// Which of them can be written.
    pub writable: Vec<bool>,
}

/// How the disk is to grow. `None`: it has the size it is to have.
///
/// # Errors
/// If it cannot.
pub fn wanted(grow: Grow, disk: &SettledDisk) -> Result<Option<Growth>, GrowError> {
    let geometry = &disk.shared.geometry;
    let to = match grow {
        Grow::No | Grow::Kept => return Ok(None),
        Grow::To(sectors) => sectors,
        Grow::Found => {
            let up = disk.set.replicas.iter().flatten();
            let bytes = up.map(|replica| replica.length_bytes()).min();
            let sectors = bytes.map_or(0, |bytes| bytes / SECTOR_BYTES);
            let whole = sectors - sectors % u64::from(geometry.block_sectors());
            whole.max(geometry.sectors())
        }
    };
    let Some(growth) = Growth::of(geometry, to)? else {
        return Ok(None);
    };
    match disk.shared.membership.marks().count(Bitmap::Dirty) {
        0 => Ok(Some(growth)),
        dirty => Err(GrowError::Dirty { dirty }),
    }
}

impl ReadyDisk {
    /// The disk at another size, up to the epoch with the new size, which is for the maintenance
    /// thread to begin. `ids` are the numbers of this run.
    ///
    /// # Errors
    /// If the disk cannot be opened at the new size. At its old size it still can.
    pub fn grow(
        mut self,
        growth: &Growth,
        config: &Config,
        ids: RunIds,
    ) -> Result<Self, StartError> {
        let disk = &self.disk;
        let marks = disk.shared.membership.marks();
        self.recorder
            .change(|superblock| disk.begin(config, superblock, ids));
        begin_epoch(&mut self.recorder, &self.files, marks)?;
        let threshold = disk.decision.threshold;
        let opening = lengthen_replicas(self.disk, growth, threshold)?;
        let length_bytes = growth.layout().length_bytes();
        for copy in 0..self.files.files().len() {
            if self.writable[copy]
                && let Err(error) = self.files.lengthen(copy, length_bytes)
            {
                // It is too short for the new size then, and left out with the rest of those.
                warn!("{error}");
            }
        }
        self.files.read_again(config.patience.io_timeout);
        let opened = read(config, &self.files)?;
        let mut opened = opened.expect("its epoch has just begun");
        opened.grow(growth, &mut self.files.sources());
        let disk = settle(config, opening, &opened, ids, true)?;
        let keeper = disk.keeper_start(&opened.superblock);
        let beside = config.record == RecordConfig::Beside;
        let (writable, advice) = copies::prepare(&mut self.files, &opened, beside);
        advice.iter().for_each(super::Advice::tell);
        let recorder = Recorder::new(opened, &writable, ids.run)?;
        info!(
            "the disk grows from {} to {} bytes: the {} extents that are new are compared on all \
             replicas while it is served",
            growth.from_sectors * SECTOR_BYTES,
            growth.to_sectors * SECTOR_BYTES,
            growth.extents(),
        );
        Ok(Self {
            disk,
            keeper,
            recorder,
            files: self.files,
            writable,
        })
    }
}

/// Writes the record until the epoch of this run has begun at the old size.
fn begin_epoch(
    recorder: &mut Recorder,
    files: &RecordFiles,
    marks: &Marks,
) -> Result<(), StartError> {
    // Nothing is ever late here: every write is waited for.
    let now = Time::from_nanos(0);
    let opening = recorder.opening();
    let mut begun = false;
    let mut actions = Vec::new();
    recorder.handle(now, RecordEvent::Poll, marks, &mut actions);
    while !actions.is_empty() {
        for action in std::mem::take(&mut actions) {
            let (copy, write, block, bytes) = match action {
                RecordAction::Write {
                    copy,
                    write,
                    block,
                    bytes,
                } => (copy, write, block, bytes),
                RecordAction::Changed(change) => {
                    begun |= change == opening;
                    continue;
                }
                _ => continue,
            };
            let file = files.files()[usize::from(copy)].file();
            let block_bytes = u64::try_from(BLOCK_BYTES).expect("a block is small");
            let written = file.map_or(Err(libc::EBADF), |file| {
                let written = file.write_all_at(&bytes[..], block * block_bytes);
                written.map_err(|error| error.raw_os_error().unwrap_or(libc::EIO))
            });
            let errno = written.err();
            let event = RecordEvent::Written { copy, write, errno };
            recorder.handle(now, event, marks, &mut actions);
        }
    }
    if begun {
        Ok(())
    } else {
        Err(StartError::RecordNotWritten)
    }
}

/// Makes the replicas that are up as long as the disk is to be. Those that cannot be are closed.
fn lengthen_replicas(
    disk: SettledDisk,
    growth: &Growth,
    threshold: usize,
) -> Result<Opening, StartError> {
    let SettledDisk { set, shared, .. } = disk;
    let block_bytes = shared.geometry.block_sectors() * 512;
    // Nobody else has the replicas yet; they are told their new length.
    drop(shared);
    let length_bytes = growth.to_sectors * SECTOR_BYTES;
    let ReplicaFiles {
        replicas, options, ..
    } = set;
    let mut opening = Opening {
        replicas: Vec::with_capacity(options.len()),
        candidates: Vec::with_capacity(options.len()),
        options,
        block_bytes,
    };
    let mut reasons = Vec::new();
    for (replica, options) in replicas.into_iter().zip(&opening.options) {
        let name = options.name.clone();
        let fit = match replica {
            Some(replica) => lengthen(replica, length_bytes),
            None => Err(format!(
                "replica {} is not there",
                names_of([name.clone()].into_iter())
            )),
        };
        let found = match &fit {
            Ok(replica) => Ok(replica.found()),
            Err(why) => {
                reasons.push(why.clone());
                Err(why.clone())
            }
        };
        opening.candidates.push(Candidate { name, found });
        opening.replicas.push(fit.ok());
    }
    let long = opening.replicas.iter().flatten().count();
    if long < threshold {
        let why = reasons.join("; ");
        return Err(StartError::Grow(GrowError::TooFew {
            long,
            needed: threshold,
            why,
        }));
    }
    Ok(opening)
}

fn lengthen(mut replica: Arc<Replica>, length_bytes: u64) -> Result<Arc<Replica>, String> {
    let own = Arc::get_mut(&mut replica).expect("nobody has seen it yet");
    match own.lengthen(length_bytes) {
        Ok(()) => Ok(replica),
        Err(error) => {
            let (name, path) = (replica.name(), replica.path().display());
            let has = replica.length_bytes();
            Err(format!(
                "replica '{name}' ({path}) has {has} bytes and cannot be made {length_bytes} bytes \
                 long: {error}"
            ))
        }
    }
}
