// SPDX-License-Identifier: Apache-2.0
//! A record for plain images, made without serving them (rule S5).

use std::io::Write;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::{PATIENCE, RecordCliError, names};
use crate::config::{self, Config, FirstUse, RecordPlaces};
use crate::daemon::fingerprints;
use crate::daemon::first_use::{self, RunIds};
use crate::daemon::record_files::{Access, RecordFiles};
use crate::quorum::{Geometry, Marks};
use crate::record::{BLOCK_BYTES, Opened, RecordAction, RecordEvent, Recorder, Superblock};
use crate::replica::{Cache, Format, RawOptions, Replica, check_set, open_set};
use crate::units::Time;

/// Makes the record of the disk of `config`, and says so on `out`.
pub(super) fn create(
    config: &Config,
    places: &RecordPlaces,
    out: &mut impl Write,
) -> Result<(), RecordCliError> {
    let mut files = RecordFiles::open(places, Access::Own(PATIENCE))?;
    if let Some(there) = files.files().iter().find(|file| file.file().is_some()) {
        return Err(RecordCliError::Exists {
            place: there.path().display().to_string(),
        });
    }
    let options: Vec<RawOptions> = config.replicas.iter().map(raw_options).collect();
    let replicas: Vec<Option<Arc<Replica>>> = open_set(&options)?.into_iter().map(Some).collect();
    let block_bytes = config.block_size.map(|size| size.bytes());
    let shape = check_set(&replicas, config.threshold, block_bytes, None)?;
    let geometry = Geometry::new(shape.sectors, shape.block_bytes / 512)?;
    let mut found_as = Vec::with_capacity(replicas.len());
    for replica in replicas.iter().flatten() {
        let found = replica.durable_fingerprint();
        let found = found.map_err(|source| RecordCliError::Fingerprint {
            name: replica.name().to_owned(),
            source,
        })?;
        found_as.push(fingerprints::to_record(&found));
    }
    let ids = RunIds::new().map_err(RecordCliError::Random)?;
    let policy = config.policy();
    let superblock = first_use::superblock(&geometry, &policy, config.first_use, ids, &found_as)
        .map_err(RecordCliError::Random)?;
    let result = write(&mut files, &superblock, config.first_use, ids);
    if result.is_err() {
        // Nothing depends on it yet: half a record would only be in the way.
        files.remove()?;
        return result;
    }
    writeln!(out, "created the state record of disk {}:", superblock.disk)?;
    writeln!(out, "  {}", names(places))?;
    Ok(())
}

/// Writes the record whole and ends the run that made it.
fn write(
    files: &mut RecordFiles,
    superblock: &Superblock,
    first_use: FirstUse,
    ids: RunIds,
) -> Result<(), RecordCliError> {
    let count = files.files().len();
    for copy in 0..count {
        files.create(copy, superblock.layout().length_bytes())?;
    }
    let replicas = usize::from(superblock.replicas);
    let marks = Marks::new(replicas, superblock.extents(), true);
    first_use::mark(first_use, replicas, &marks);
    let opened = Opened::create(superblock.clone(), count);
    let mut recorder = Recorder::new(opened, &vec![true; count], ids.run)?;
    drive(&mut recorder, files, &marks)?;
    recorder.change(|superblock| superblock.clean = true);
    drive(&mut recorder, files, &marks)
}

/// Carries out what the recorder asks for until it asks for nothing more. A copy that cannot be
/// written is an error: a record begins with all of them.
fn drive(
    recorder: &mut Recorder,
    files: &RecordFiles,
    marks: &Marks,
) -> Result<(), RecordCliError> {
    // Nothing is ever late here: every write is waited for.
    let now = Time::from_nanos(0);
    let mut actions = Vec::new();
    recorder.handle(now, RecordEvent::Poll, marks, &mut actions);
    while !actions.is_empty() {
        for action in std::mem::take(&mut actions) {
            let RecordAction::Write {
                copy,
                write,
                block,
                bytes,
            } = action
            else {
                continue;
            };
            let place = &files.files()[usize::from(copy)];
            let refuse = |source| RecordCliError::Write {
                path: place.path().to_owned(),
                source,
            };
            let file = place.file().expect("the copy was created before");
            let block_bytes = u64::try_from(BLOCK_BYTES).expect("a block is small");
            file.write_all_at(&bytes[..], block * block_bytes)
                .map_err(refuse)?;
            let event = RecordEvent::Written {
                copy,
                write,
                errno: None,
            };
            recorder.handle(now, event, marks, &mut actions);
        }
    }
    assert!(recorder.is_idle(), "all writes were answered");
    Ok(())
}

fn raw_options(replica: &config::Replica) -> RawOptions {
    let mut options = RawOptions::new(replica.name.clone(), replica.path.clone());
    options.cache = match replica.cache {
        config::Cache::Direct => Cache::Direct,
        config::Cache::Buffered => Cache::Buffered,
    };
    options.format = replica.format.map(|format| match format {
        config::Format::Raw => Format::Raw,
    });
    options
}
