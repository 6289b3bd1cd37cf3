// SPDX-License-Identifier: Apache-2.0
//! Everything a daemon does before it serves (CONSISTENCY section 9).
//!
//! The order is that of rule S1: the copies of the record are locked, then read; then the replicas
//! are opened and compared with what is remembered of them; then it is decided who takes part, and
//! the change of the record is prepared that begins the epoch of this run. Nothing is written but
//! copies of the record that are missing; the maintenance thread writes the rest before the disk is
//! served.
//!
//! - `replicas`: opening them; `known`: how one is known again;
//! - `copies`: the copies of the record;
//! - `decision`: what follows, a pure function; `marking`: the marks that follow from that;
//! - `settled`: what the record and the keeper begin with;
//! - `growing`: a disk that becomes longer;
//! - `advice`: what the operator is told; `error`: why a disk is not served.

mod advice;
mod copies;
mod decision;
mod error;
mod growing;
mod known;
mod marking;
mod replicas;
mod settled;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::Duration;

use super::fingerprints;
use super::first_use::{self, RunIds};
use super::maintenance::OpenRecord;
use super::record_files::{self, Access, RecordFiles};
use super::warden::Left;
use crate::config::{Config, FirstUse, RecordConfig, RecordPlaces, beside_all};
use crate::device::DiskIdentity;
use crate::quorum::{Bitmap, Geometry, KeeperStart, KeeperState, Marks, Policy, Shared};
use crate::record::{
    DiskUuid, MemberState, OpenOptions, Opened, Recorder, Refusal, Superblock, open,
};
use crate::replica::{
    Format, RawOptions, RawReplica, Replica, SetShape, check_distinct_within, check_set,
};
use crate::units::{ReplicaId, ReplicaSet};
use advice::Advice;
use decision::{Candidate, Decision, Facts, Past, Refused, Wanted};
pub use error::StartError;
use growing::ReadyDisk;
pub use growing::{Grow, GrowError};
use known::Remembered;
use replicas::Waits;
use settled::{ReplicaFiles, SettledDisk};

/// Looks at a record that another daemon writes, before what is seen is believed to be wrong.
const LOOK_ATTEMPTS: u32 = 10;

/// Pause between two of them.
const LOOK_PAUSE: Duration = Duration::from_millis(50);

/// A disk that is ready to be served, as soon as the opening change of its record is durable.
pub struct Start {
    /// What the lanes share: marks as they were recorded and decided, who is up, what is
    /// unresolved.
    pub shared: Arc<Shared>,
    /// The replicas that are up, by slot: open, locked, and fit for the disk.
    pub replicas: Vec<Option<Arc<Replica>>>,
    /// How each of them is opened again.
    pub options: Vec<RawOptions>,
    /// What each of those that are not up must be like to be the one that left.
    pub left: Vec<Left>,
    /// The disk that they make.
    pub shape: SetShape,
    /// Its record, locked, with its opening change prepared. `None`: nothing is remembered.
    pub record: Option<OpenRecord>,
    /// What the keeper begins with.
    pub keeper: KeeperStart,
    /// Which disk it is, and which run of the daemon.
    pub identity: DiskIdentity,
}

/// Opens the disk of `config`, and decides how it is to be served. Takes as long as its storage
/// does, and up to twice [`Config::lock_timeout`] for locks, which are not waited for any longer once
/// `given_up` is set.
///
/// # Errors
/// The first thing that stands in the way; all that was opened is closed again.
pub fn start(config: &Config, grow: Grow, given_up: &AtomicBool) -> Result<Start, StartError> {
    let options = replicas::options_of(config);
    // Before anything is made of a record: the mistake is in the command line.
    check_distinct_within(&options, config.patience.io_timeout)?;
    let places = config
        .record
        .places(&config.replicas, record_files::is_file)?;
    let start = match places {
        None if matches!(grow, Grow::To(_)) => return Err(GrowError::NoRecord.into()),
        None => without_record(config, options, given_up),
        Some(_)
            if options.iter().all(|options| options.read_only) && matches!(grow, Grow::To(_)) =>
        {
            return Err(GrowError::NoRecord.into());
        }
        Some(places) if options.iter().all(|options| options.read_only) => {
            only_reading(config, options, &places, given_up)
        }
        Some(places) => with_record(config, options, &places, grow, given_up),
    }?;
    replicas::describe(&start.replicas, &start.shape, config.read_only);
    Ok(start)
}

/// Nothing is remembered: all replicas must be there, and all of them vote.
fn without_record(
    config: &Config,
    options: Vec<RawOptions>,
    given_up: &AtomicBool,
) -> Result<Start, StartError> {
    let left_behind = beside_all(&config.replicas, record_files::is_file);
    if let Some(path) = left_behind.into_iter().find(|path| path.exists())
        && !config.read_only
    {
        return Err(StartError::RecordLeftBehind { path });
    }
    let replicas = replicas::open_all_waiting(&options, Waits::of(config, given_up))?;
    let block_bytes = config.block_size.map(|size| size.bytes());
    let shape = check_set(&replicas, config.threshold, block_bytes, None)?;
    let geometry = Geometry::new(shape.sectors, shape.block_bytes / 512)?;
    let shared = Shared::new(geometry, policy(config, config.threshold, &shape))?;
    Ok(Start {
        shared: Arc::new(shared),
        left: vec![Left::default(); replicas.len()],
        replicas,
        options,
        shape,
        record: None,
        keeper: KeeperState::fresh(),
        identity: DiskIdentity::NONE,
    })
}

/// Nothing is written, also not to the record: it only tells who is behind where (rule Z4).
fn only_reading(
    config: &Config,
    options: Vec<RawOptions>,
    places: &RecordPlaces,
    given_up: &AtomicBool,
) -> Result<Start, StartError> {
    // Whoever writes the record has the replicas for himself: it does not change from here on.
    let answer = config.patience.io_timeout;
    let mut files = RecordFiles::open_within(places, Access::Look, answer, given_up)?;
    let Some(opened) = read(config, &files)? else {
        Advice::ReadOnlyWithoutRecord.tell();
        return without_record(config, options, given_up);
    };
    let set = open_replicas(config, options, &opened.superblock, given_up)?;
    // What was read before the replicas were locked may be old already.
    files.read_again(answer);
    let Some(opened) = read(config, &files)? else {
        return Err(gone(places));
    };
    let ids = RunIds::new().map_err(StartError::Random)?;
    let disk = settle(config, set, &opened, ids, false);
    let disk = in_place(config, &files, &opened, disk)?;
    let keeper = KeeperState {
        verify_cursor: None,
        scrub_cursor: None,
        ..disk.keeper_start(&opened.superblock)
    };
    Ok(disk.into_start(None, keeper, DiskIdentity::NONE))
}

fn with_record(
    config: &Config,
    options: Vec<RawOptions>,
    places: &RecordPlaces,
    grow: Grow,
    given_up: &AtomicBool,
) -> Result<Start, StartError> {
    let answer = config.patience.io_timeout;
    let mut files =
        RecordFiles::open_within(places, Access::Own(config.lock_timeout), answer, given_up)?;
    let Some(mut opened) = read(config, &files)? else {
        return first_time(config, options, files, given_up);
    };
    if config.first_use != FirstUse::Verify {
        Advice::FirstUseIgnored.tell();
    }
    let set = open_replicas(config, options, &opened.superblock, given_up)?;
    if !files.are_locked() {
        // Whoever had the replicas until now may have written to the record since it was read.
        files.read_again(answer);
        opened = read(config, &files)?.ok_or_else(|| gone(places))?;
    }
    let ids = RunIds::new().map_err(StartError::Random)?;
    let disk = settle(config, set, &opened, ids, true);
    let disk = in_place(config, &files, &opened, disk)?;
    let growth = match growing::wanted(grow, &disk) {
        Ok(growth) => growth,
        // Nobody waits for an answer.
        Err(why) if grow == Grow::Found => {
            Advice::NotGrown {
                why: why.to_string(),
            }
            .tell();
            None
        }
        Err(why) => return Err(why.into()),
    };
    let keeper = disk.keeper_start(&opened.superblock);
    let identity = identity(&opened.superblock, ids);
    // From here on the copies that are missing are made.
    let (writable, advice) =
        copies::prepare(&mut files, &opened, config.record == RecordConfig::Beside);
    advice.iter().for_each(Advice::tell);
    let recorder = Recorder::new(opened, &writable, ids.run)?;
    let ready = ReadyDisk {
        disk,
        keeper,
        recorder,
        files,
        writable,
    };
    let ReadyDisk {
        disk,
        keeper,
        recorder,
        files,
        writable,
    } = match growth {
        None => ready,
        Some(growth) => ready.grow(&growth, config, ids)?,
    };
    let record = disk.open_record(config, recorder, files, &writable, ids);
    Ok(disk.into_start(Some(record), keeper, identity))
}

/// What was settled, if the copies of the record say that the replicas are in their order. What the
/// replicas themselves say of that comes first: it tells what the right order is.
fn in_place(
    config: &Config,
    files: &RecordFiles,
    opened: &Opened,
    disk: Result<SettledDisk, StartError>,
) -> Result<SettledDisk, StartError> {
    let by_replica = matches!(
        config.record,
        RecordConfig::Beside | RecordConfig::Folder(_)
    );
    match &disk {
        Err(StartError::Refused(Refused::Order { .. })) => {}
        _ if !by_replica => {}
        // Every replica is known to be the one that belongs in its place: only files were moved.
        Ok(settled) if settled.decision.is_as_left() => {
            if let Err(moved) = copies::check_places(files, opened) {
                let text = moved.to_string();
                Advice::Copy { text }.tell();
            }
        }
        _ => copies::check_places(files, opened)?,
    }
    disk
}

/// Rule S5: plain images.
fn first_time(
    config: &Config,
    options: Vec<RawOptions>,
    mut files: RecordFiles,
    given_up: &AtomicBool,
) -> Result<Start, StartError> {
    let replicas = replicas::open_all_waiting(&options, Waits::of(config, given_up))
        .map_err(StartError::FirstUse)?;
    let block_bytes = config.block_size.map(|size| size.bytes());
    let shape = check_set(&replicas, config.threshold, block_bytes, None)?;
    let geometry = Geometry::new(shape.sectors, shape.block_bytes / 512)?;
    let policy = policy(config, config.threshold, &shape);
    let mut prints = Vec::with_capacity(replicas.len());
    for replica in replicas.iter().flatten() {
        let print = replica.fingerprint();
        let print = print.map_err(|source| StartError::Fingerprint {
            name: replica.name().to_owned(),
            source,
        })?;
        prints.push(fingerprints::to_record(&print));
    }
    let ids = RunIds::new().map_err(StartError::Random)?;
    let superblock = first_use::superblock(&geometry, &policy, config.first_use, ids, &prints)
        .map_err(StartError::Random)?;
    let marks = Marks::new(replicas.len(), geometry.extents(), true);
    first_use::mark(config.first_use, replicas.len(), &marks);
    let disk = SettledDisk {
        set: ReplicaFiles {
            left: vec![Left::default(); replicas.len()],
            replicas,
            options,
            shape,
        },
        shared: Arc::new(Shared::with_marks(geometry, policy, marks)?),
        decision: Decision::of_first_use(config.threshold),
    };
    let keeper = disk.keeper_start(&superblock);
    let identity = DiskIdentity {
        uuid: superblock.disk.0,
        run: ids.run,
        // Nobody has served it before.
        previous_run: ids.run,
    };

    let count = files.files().len();
    let writable = vec![true; count];
    let length_bytes = superblock.layout().length_bytes();
    let made = (0..count).try_for_each(|copy| files.create(copy, length_bytes));
    let recorder = made.map_err(StartError::from).and_then(|()| {
        let opened = Opened::create(superblock, count);
        Ok(Recorder::new(opened, &writable, ids.run)?)
    });
    let recorder = match recorder {
        Ok(recorder) => recorder,
        Err(error) => {
            // Nothing depends on it yet: half a record would only be in the way.
            files.remove()?;
            return Err(error);
        }
    };
    let paths = files.files().iter().map(|file| file.path().display());
    let places = paths.map(|path| path.to_string()).collect::<Vec<_>>();
    Advice::FirstUse {
        places: places.join(", "),
        how: match config.first_use {
            FirstUse::Verify => {
                "all replicas vote, and they are compared once in the background (--assume-clean \
                 spares that, --adopt-from NAME overwrites all others with one)"
            }
            FirstUse::AssumeClean => "all replicas are taken to be equal",
            FirstUse::AdoptFrom(_) => "all others are overwritten with the one that is adopted",
        },
    }
    .tell();
    let record = disk.open_record(config, recorder, files, &writable, ids);
    Ok(disk.into_start(Some(record), keeper, identity))
}

/// Which disk has this record, and which runs are its last and this one.
fn identity(before: &Superblock, ids: RunIds) -> DiskIdentity {
    // An epoch that was not begun is of a run that never served.
    let mut epochs = before.history.entries().iter();
    let last = epochs.find(|entry| entry.begun);
    DiskIdentity {
        uuid: before.disk.0,
        run: ids.run,
        previous_run: last.map_or(ids.run, |entry| entry.run()),
    }
}

/// What the copies say together; `None`: nothing, there is no record.
fn read(config: &Config, files: &RecordFiles) -> Result<Option<Opened>, Refusal> {
    if files.is_absent() {
        return Ok(None);
    }
    let options = OpenOptions {
        force: config.force,
        ..OpenOptions::default()
    };
    match open(&mut files.sources(), &options) {
        Ok(opened) => Ok(Some(opened)),
        // Files that were made, and the daemon ended before it had written the first state to all
        // of them: nothing depends on that yet.
        Err(Refusal::NoRecord { .. } | Refusal::Unfinished { .. }) => Ok(None),
        Err(refusal) => Err(refusal),
    }
}

/// What a disk that is not opened yet is going to be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Looks {
    /// Sectors of the disk.
    pub sectors: u64,
    /// Logical blocks, in bytes.
    pub block_bytes: u32,
    /// UUID of the disk, from its record; zeroes without one, or if nothing is written.
    pub uuid: [u8; 16],
}

impl fmt::Display for Looks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let uuid = DiskUuid(self.uuid);
        let (sectors, block_bytes) = (self.sectors, self.block_bytes);
        write!(
            f,
            "disk {uuid} of {sectors} sectors in blocks of {block_bytes} bytes"
        )
    }
}

/// Looks at the disk of `config` without locking or writing anything, while another daemon may have
/// it: the destination of a live migration has to tell its front-end what it is going to serve.
///
/// # Errors
/// If that cannot be told, or the disk could not be opened here anyway.
pub fn look(config: &Config) -> Result<Looks, StartError> {
    let options = replicas::options_of(config);
    check_distinct_within(&options, config.patience.io_timeout)?;
    let places = config
        .record
        .places(&config.replicas, record_files::is_file)?;
    let Some(places) = places else {
        let looked = options
            .iter()
            .map(|options| RawReplica::look(options).map(|raw| Some(Arc::new(Replica::Raw(raw)))));
        let replicas = looked.collect::<Result<Vec<_>, _>>()?;
        let block_bytes = config.block_size.map(|size| size.bytes());
        let shape = check_set(&replicas, config.threshold, block_bytes, None)?;
        return Ok(Looks {
            sectors: shape.sectors,
            block_bytes: shape.block_bytes,
            uuid: DiskIdentity::NONE.uuid,
        });
    };
    let only_reads = options.iter().all(|options| options.read_only);
    let superblock = look_at_record(config, &places)?.superblock;
    decision::check_count(usize::from(superblock.replicas), options.len())?;
    Ok(Looks {
        sectors: superblock.sectors,
        block_bytes: u32::from(superblock.block_sectors) * 512,
        uuid: match only_reads {
            true => DiskIdentity::NONE.uuid,
            false => superblock.disk.0,
        },
    })
}

/// Reads the record while another daemon writes to it: what looks damaged may have been looked at in
/// the middle of a write.
fn look_at_record(config: &Config, places: &RecordPlaces) -> Result<Opened, StartError> {
    let mut attempts = LOOK_ATTEMPTS;
    loop {
        attempts -= 1;
        let files = RecordFiles::open(places, Access::Look)?;
        match read(config, &files) {
            Ok(Some(opened)) => return Ok(opened),
            Ok(None) if attempts == 0 => {
                let copies = copies_text(places);
                return Err(StartError::IncomingWithoutRecord { copies });
            }
            Err(refusal) if attempts == 0 => return Err(refusal.into()),
            Ok(None) | Err(_) => thread::sleep(LOOK_PAUSE),
        }
    }
}

fn copies_text(places: &RecordPlaces) -> String {
    let names = places.copies.iter().map(|path| path.display().to_string());
    names.collect::<Vec<_>>().join(", ")
}

fn gone(places: &RecordPlaces) -> StartError {
    let copies = copies_text(places);
    StartError::Record(Refusal::NoRecord { copies })
}

/// Replicas that were opened and not compared yet.
struct Opening {
    replicas: Vec<Option<Arc<Replica>>>,
    options: Vec<RawOptions>,
    candidates: Vec<Candidate>,
    block_bytes: u32,
}

/// Opens the replicas of a disk that has a record, as far as it goes.
fn open_replicas(
    config: &Config,
    mut options: Vec<RawOptions>,
    superblock: &Superblock,
    given_up: &AtomicBool,
) -> Result<Opening, StartError> {
    decision::check_count(usize::from(superblock.replicas), options.len())?;
    let block_bytes = u32::from(superblock.block_sectors) * 512;
    let asked = config.block_size.map(|size| size.bytes());
    if let Some(configured) = asked.filter(|&asked| asked != block_bytes) {
        return Err(StartError::BlockSize {
            recorded: block_bytes,
            configured,
        });
    }
    // They were raw when the disk was first served, whatever the guest has written to its first
    // sector since.
    for options in &mut options {
        options.format.get_or_insert(Format::Raw);
    }
    let slots = (0..options.len()).map(ReplicaId::new);
    let is_out = |slot: &ReplicaId| {
        let state = superblock.members[slot.index()].state;
        matches!(state, MemberState::Failed | MemberState::Removed)
    };
    let out: ReplicaSet = slots.filter(is_out).collect();
    let results = replicas::open_waiting(&options, out, Waits::of(config, given_up))?;
    let mut opening = Opening {
        replicas: Vec::with_capacity(options.len()),
        candidates: Vec::with_capacity(options.len()),
        options,
        block_bytes,
    };
    for (result, options) in results.into_iter().zip(&opening.options) {
        let name = options.name.clone();
        let fit = match result {
            Some(result) => replicas::fit(result, superblock.sectors, block_bytes),
            None => Err(format!("replica '{name}' is failed")),
        };
        let found = match &fit {
            Ok(replica) => Ok(replica.found()),
            Err(why) => Err(why.clone()),
        };
        opening.candidates.push(Candidate { name, found });
        opening.replicas.push(fit.ok());
    }
    Ok(opening)
}

/// Decides how the disk is served and brings it into the state that follows. `recorded`: marks are
/// written to the record.
fn settle(
    config: &Config,
    opening: Opening,
    opened: &Opened,
    ids: RunIds,
    recorded: bool,
) -> Result<SettledDisk, StartError> {
    let superblock = &opened.superblock;
    let count = opening.options.len();
    let geometry = Geometry::with_extent_shift(
        superblock.sectors,
        superblock.block_sectors.into(),
        superblock.extent_shift.into(),
    )?;
    let marks = Marks::new(count, geometry.extents(), recorded);
    opened.load(&marks);
    let members: Vec<Remembered> = superblock.members[..count]
        .iter()
        .map(Remembered::of)
        .collect();
    let left = members.iter().map(|member| member.left(superblock.clean));
    let left = left.collect();
    let decision = decision::decide(&Facts {
        wanted: Wanted {
            threshold: config.threshold,
            pattern: config.read_pattern,
            force: config.force,
            read_only: !recorded,
        },
        past: Past {
            threshold: superblock.threshold.into(),
            pattern: superblock.pattern,
            clean: superblock.clean,
            same_boot: superblock.boot_id == ids.boot,
            dirty: marks.count(Bitmap::Dirty),
            minority: opened.is_minority(),
            members,
        },
        replicas: opening.candidates,
    })?;
    let shape = check_set(
        &opening.replicas,
        // How few are enough is decided.
        1,
        Some(opening.block_bytes),
        Some(superblock.sectors),
    )?;
    // Whoever makes it longer has told what there is to tell at its old size.
    if !opened.has_grown() {
        decision.advice.iter().for_each(Advice::tell);
    }
    let advice = marking::apply(&decision, &marks, count);
    advice.iter().for_each(Advice::tell);
    let policy = policy(config, decision.threshold, &shape);
    let shared = Shared::with_marks(geometry, policy, marks)?;
    if decision.resolve {
        shared.resolve_dirty();
    }
    // Without a record nobody could remember that the start was cold.
    if opened.has_grown() {
        // All that is unresolved is new: no guest has anything there.
        shared.begin_cold();
    } else if recorded && shared.unresolved.extents() > 0 {
        shared.await_front_end(superblock.cold);
    }
    for replica in decision.absent.iter() {
        shared.membership.leave_out(replica);
    }
    Ok(SettledDisk {
        set: ReplicaFiles {
            replicas: opening.replicas,
            left,
            options: opening.options,
            shape,
        },
        shared: Arc::new(shared),
        decision,
    })
}

/// The policy of this run. A threshold that a minority can reach takes force (rule S6).
fn policy(config: &Config, threshold: usize, shape: &SetShape) -> Policy {
    let policy = config.policy();
    Policy {
        allow_minority_threshold: policy.allow_minority_threshold || threshold < policy.threshold,
        threshold,
        discard_zeroes: shape.can_zero_exactly,
        ..policy
    }
}
