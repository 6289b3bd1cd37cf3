// SPDX-License-Identifier: Apache-2.0
//! What the copies of a record say together, as one structure. It is written as JSON as it is;
//! `docs/operation.md` describes the fields.

use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::forecast::{self, Start};
use super::{RecordCliError, names};
use crate::config::{Config, RecordPlaces};
use crate::daemon::fingerprints;
use crate::daemon::record_files::{Access, RecordFiles};
use crate::quorum::{Bitmap, PageName, ReadPattern};
use crate::record::{
    BLOCK_BYTES, CopySource, CopyState, Expected, Found, Member, MemberState, Note, OpenOptions,
    Opened, ReadBlock, Refusal, Superblock, VERIFIED, open,
};
use crate::replica::Fingerprint;
use crate::units::{ReplicaId, SECTOR_BYTES};

/// Who has the record for longer serves the disk.
const IN_USE_DOUBT: Duration = Duration::from_millis(300);

/// How long storage may take to answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);

/// A state record for people and programs.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct View {
    /// UUID of the disk.
    pub disk: String,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// Bytes of an extent; the last may be shorter.
    pub extent_bytes: u64,
    /// Number of extents.
    pub extents: u64,
    /// Bytes of a logical block.
    pub block_bytes: u64,
    /// N.
    pub replicas: u8,
    /// T.
    pub threshold: u8,
    /// `quorum` or `fifo`.
    pub read_pattern: &'static str,
    /// The newest epoch.
    pub epoch: u64,
    /// Number of the newest superblock.
    pub sequence: u64,
    /// The last run ended cleanly.
    pub clean: bool,
    /// After the last crash it is not known what was in flight (rule S4).
    pub cold: bool,
    /// The epoch was begun with `--force`.
    pub forced: bool,
    /// The last run began with `--force` and fewer than T replicas.
    pub few_replicas: bool,
    /// The images were adopted with `--assume-clean`.
    pub assume_clean: bool,
    /// A daemon has the record at this moment.
    pub in_use: bool,
    /// Copies that must be readable for a start.
    pub copies_needed: usize,
    /// The copies.
    pub copies: Vec<CopyView>,
    /// Extents whose replicas may be unequal or not flushed.
    pub dirty: Amount,
    /// The replicas.
    pub members: Vec<MemberView>,
    /// The comparison after adoption.
    pub verify: Cursor,
    /// The scrub.
    pub scrub: Cursor,
    /// Epochs, newest first.
    pub history: Vec<EpochView>,
    /// What is odd about the copies.
    pub notes: Vec<String>,
    /// What a start would do now.
    pub start: Start,
}

/// A copy of the record.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct CopyView {
    /// Where it is.
    pub place: String,
    /// `current`, `stale`, `blank`, `missing` or `unreadable`.
    pub state: &'static str,
    /// Why it cannot be read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
}

/// A part of the disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Amount {
    /// In extents.
    pub extents: u64,
    /// In bytes.
    pub bytes: u64,
}

/// A replica.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct MemberView {
    /// Its place in the order of configuration, from 0.
    pub slot: usize,
    /// Its name, if the configuration is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Where it is, if the configuration is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// Whether it is there now and is what it was, if the configuration is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub found: Option<ReplicaFound>,
    /// `in-sync`, `syncing`, `missing`, `failed` or `removed`, when the record was written.
    pub state: &'static str,
    /// It votes, but never decides a tie.
    pub suspect: bool,
    /// The last epoch in which it was in sync; 0 if it never was.
    pub epoch_in_sync: u64,
    /// What it lacks.
    pub behind: Amount,
}

/// How a replica is found now, compared with the last clean stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ReplicaFound {
    /// As it was left.
    Unchanged,
    /// Somebody wrote to it, or it is another file.
    Changed,
    /// It is there; the last stop was not clean, so it cannot be compared.
    Present,
    /// It is not there.
    Missing,
}

/// How far a reading of the whole disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Cursor {
    /// Whether one is under way.
    pub active: bool,
    /// The first sector it has not seen.
    pub sector: u64,
}

/// An epoch.
#[derive(Debug, Serialize)]
pub struct EpochView {
    /// Its number.
    pub epoch: u64,
    /// Its id, 32 hexadecimal digits.
    pub id: String,
    /// Begun with `--force`.
    pub forced: bool,
}

impl View {
    /// The record in these files, whatever disk they belong to.
    pub fn of_files(paths: &[PathBuf]) -> Result<Self, RecordCliError> {
        let places = RecordPlaces {
            copies: paths.to_vec(),
            elsewhere: Vec::new(),
        };
        let mut files = RecordFiles::open(&places, Access::Look)?;
        wait_for_end(&mut files);
        let mut sources = files.sources();
        // Files that were not named are as good as missing, for a record that has more copies.
        let copies = sources.iter_mut().filter_map(copies_of).max();
        for number in sources.len()..copies.unwrap_or(0) {
            sources.push(CopySource {
                name: format!("copy {} of the record, which was not given", number + 1),
                found: Found::Missing,
            });
        }
        let (opened, refusal) = open_to_look(sources, Expected::default(), &places)?;
        let mut view = Self::new(&opened, &files, refusal, None);
        let given = files.files().len();
        if let Some(copies) = copies.filter(|&copies| copies > given) {
            view.start = forecast::unknown(given, copies);
        }
        Ok(view)
    }

    /// The record of a disk.
    pub fn of_disk(config: &Config, places: &RecordPlaces) -> Result<Self, RecordCliError> {
        let mut files = RecordFiles::open(places, Access::Look)?;
        if files.is_absent() {
            return Err(RecordCliError::Absent {
                places: names(places),
            });
        }
        wait_for_end(&mut files);
        let expected = Expected {
            replicas: u8::try_from(config.replicas.len()).ok(),
            ..Expected::default()
        };
        let (opened, refusal) = open_to_look(files.sources(), expected, places)?;
        Ok(Self::new(&opened, &files, refusal, Some(config)))
    }

    /// The structure as JSON, on several lines.
    pub fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).expect("a view is texts and numbers")
    }

    fn new(
        opened: &Opened,
        files: &RecordFiles,
        refusal: Option<Refusal>,
        config: Option<&Config>,
    ) -> Self {
        let superblock = &opened.superblock;
        let copies = files.files().iter().enumerate();
        let members = (0..superblock.slots())
            .filter(|&slot| superblock.members[slot].state != MemberState::Vacant)
            .map(|slot| member(opened, slot, config));
        let mut view = Self {
            disk: superblock.disk.to_string(),
            size_bytes: superblock.sectors * SECTOR_BYTES,
            extent_bytes: SECTOR_BYTES << superblock.extent_shift,
            extents: superblock.extents(),
            block_bytes: u64::from(superblock.block_sectors) * SECTOR_BYTES,
            replicas: superblock.replicas,
            threshold: superblock.threshold,
            read_pattern: match superblock.pattern {
                ReadPattern::Quorum => "quorum",
                ReadPattern::Fifo => "fifo",
            },
            epoch: superblock.epoch(),
            sequence: superblock.sequence,
            clean: superblock.clean,
            cold: superblock.cold,
            forced: superblock.forced,
            few_replicas: superblock.few_replicas,
            assume_clean: superblock.assume_clean,
            in_use: files.are_in_use(),
            copies_needed: superblock.needed(),
            copies: copies
                .map(|(copy, file)| copy_view(file.path(), opened.state(copy)))
                .collect(),
            dirty: amount(opened, Bitmap::Dirty),
            members: members.collect(),
            verify: cursor(superblock.verify_cursor),
            scrub: cursor(superblock.scrub_cursor),
            history: history(superblock),
            notes: opened.notes.iter().filter_map(note).collect(),
            start: Start::default(),
        };
        view.start = forecast::start(&view, refusal.as_ref());
        view
    }
}

/// A daemon that has just ended may have its locks for a moment longer: it would be a pity to say
/// that it serves.
fn wait_for_end(files: &mut RecordFiles) {
    let begin = Instant::now();
    if !files.are_in_use() {
        return;
    }
    while files.are_in_use() && begin.elapsed() < IN_USE_DOUBT {
        thread::sleep(Duration::from_millis(10));
    }
    files.read_again(ANSWER_LIMIT);
}

/// Opens as a start would. If that is refused although the record can be read, the refusal comes
/// beside what it says.
fn open_to_look<R: ReadBlock>(
    mut sources: Vec<CopySource<R>>,
    expected: Expected,
    places: &RecordPlaces,
) -> Result<(Opened, Option<Refusal>), RecordCliError> {
    let strict = OpenOptions {
        expected,
        ..OpenOptions::default()
    };
    let refusal = match open(&mut sources, &strict) {
        Ok(opened) => return Ok((opened, None)),
        Err(Refusal::NoRecord { .. }) => {
            return Err(RecordCliError::Absent {
                places: names(places),
            });
        }
        Err(refusal) => refusal,
    };
    let lenient = OpenOptions {
        force: true,
        ..OpenOptions::default()
    };
    match open(&mut sources, &lenient) {
        Ok(opened) => Ok((opened, Some(refusal))),
        Err(_) => Err(refusal.into()),
    }
}

/// K, as far as this copy knows.
fn copies_of<R: ReadBlock>(source: &mut CopySource<R>) -> Option<usize> {
    let Found::Present(reader) = &mut source.found else {
        return None;
    };
    let mut block = [0; BLOCK_BYTES];
    let copies = [0, 1].map(|slot| {
        reader.read_block(slot, &mut block).ok()?;
        let superblock = Superblock::decode(&block).ok()?;
        Some(usize::from(superblock.copies))
    });
    copies.into_iter().flatten().max()
}

fn copy_view(path: &Path, state: &CopyState) -> CopyView {
    let (state, why) = match state {
        CopyState::Current => ("current", None),
        CopyState::Stale => ("stale", None),
        CopyState::Blank => ("blank", None),
        CopyState::Missing => ("missing", None),
        CopyState::Unreadable(why) => ("unreadable", Some(why.clone())),
    };
    CopyView {
        place: path.display().to_string(),
        state,
        why,
    }
}

fn member(opened: &Opened, slot: usize, config: Option<&Config>) -> MemberView {
    let member = &opened.superblock.members[slot];
    let replica = config.and_then(|config| config.replicas.get(slot));
    MemberView {
        slot,
        name: replica.map(|replica| replica.name.clone()),
        path: replica.map(|replica| replica.path.clone()),
        found: replica.map(|replica| found(&replica.path, member, opened.superblock.clean)),
        state: match member.state {
            MemberState::Vacant => "vacant",
            MemberState::InSync => "in-sync",
            MemberState::Syncing => "syncing",
            MemberState::Missing => "missing",
            MemberState::Failed => "failed",
            MemberState::Removed => "removed",
        },
        suspect: member.suspect,
        epoch_in_sync: member.epoch_in_sync,
        behind: amount(opened, Bitmap::Behind(ReplicaId::new(slot))),
    }
}

/// Compares a replica with what was recorded at a clean stop. Its path may hang.
fn found(path: &Path, member: &Member, clean: bool) -> ReplicaFound {
    let Ok(now) = Fingerprint::of_path(path) else {
        return ReplicaFound::Missing;
    };
    match fingerprints::from_record(&member.fingerprint) {
        Some(left) if clean && now.is_unchanged_since(&left) => ReplicaFound::Unchanged,
        Some(_) if clean => ReplicaFound::Changed,
        _ => ReplicaFound::Present,
    }
}

/// Bits of a map, and what they stand for.
fn amount(opened: &Opened, bitmap: Bitmap) -> Amount {
    let superblock = &opened.superblock;
    let mut amount = Amount::default();
    let extent_sectors = 1u64 << superblock.extent_shift;
    for page in 0..superblock.layout().pages() {
        let first = crate::quorum::PAGE_EXTENTS * u64::try_from(page).expect("pages are few");
        let bits = opened.bits(PageName { bitmap, page });
        for (&word, extent) in bits.iter().zip((first..).step_by(64)) {
            let mut word = word;
            while word != 0 {
                let start = (extent + u64::from(word.trailing_zeros())) << superblock.extent_shift;
                word &= word - 1;
                // A lost page counts as full, also beyond the end of the disk.
                if start < superblock.sectors {
                    amount.extents += 1;
                    amount.bytes += (superblock.sectors - start).min(extent_sectors) * SECTOR_BYTES;
                }
            }
        }
    }
    amount
}

fn cursor(sector: u64) -> Cursor {
    let active = sector != VERIFIED;
    Cursor {
        active,
        sector: if active { sector } else { 0 },
    }
}

fn history(superblock: &Superblock) -> Vec<EpochView> {
    let entries = superblock.history.entries().iter();
    let epoch = |entry: &crate::record::EpochEntry| EpochView {
        epoch: entry.epoch,
        id: format!("{:?}", entry.id),
        forced: entry.forced,
    };
    entries.map(epoch).collect()
}

/// What an opening has to say beyond the states of the copies.
fn note(note: &Note) -> Option<String> {
    match note {
        // The list of copies tells.
        Note::NotUsed { .. } => None,
        Note::PageLost(name) => {
            let whose = match name.bitmap {
                Bitmap::Dirty => "which extents are dirty".to_owned(),
                Bitmap::Behind(replica) => {
                    format!("what the replica in slot {} lacks", replica.index())
                }
            };
            Some(format!(
                "page {} of the map that tells {whose} is damaged in too many copies: all of it \
                 counts as set",
                name.page
            ))
        }
        Note::DamagedSlots { copy, count } => Some(format!(
            "{copy} has {count} torn or damaged pages, of which there are good ones (one is what \
             a crash leaves behind)"
        )),
    }
}
