// SPDX-License-Identifier: Apache-2.0
//! The files of the record's copies: where they are, their locks, their creation (rules R1, R2,
//! S1). What is in them is for [`crate::record`].
//!
//! A copy that is missing or cannot be opened is no error here: whether enough of them are left is
//! decided with what they hold. A copy that somebody else has locked is one: the disk is served
//! already, and nothing of it may be touched.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use thiserror::Error;
use tracing::{info, warn};

use super::file_lock::{self, Locked};
use crate::config::RecordPlaces;
use crate::record::{BLOCK_BYTES, Block, CopySource, Found, ReadBlock};

/// Pause between two looks at a lock.
const LOCK_RETRY: Duration = Duration::from_millis(20);

/// Links that are followed from a path to a device that is not there.
const LINKS_MAX: usize = 40;

/// How much is written at once when a copy is made.
static ZEROES: [u8; 1 << 16] = [0; 1 << 16];

/// The files of the record cannot be used.
#[derive(Debug, Error)]
pub enum RecordFileError {
    /// Somebody else has the record.
    #[error(
        "the state record {} is locked by another process: the disk is served already; stop that \
         daemon first (one that was killed keeps its locks until its last write has landed, see \
         --lock-timeout)",
        path.display()
    )]
    InUse {
        /// The copy.
        path: PathBuf,
    },
    /// A lock could not be asked for.
    #[error("cannot lock the state record {}", path.display())]
    Lock {
        /// The copy.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Two paths, one file.
    #[error(
        "{} and {} are one file and cannot be two copies of the state record; remove the link",
        first.display(),
        second.display()
    )]
    SameFile {
        /// A path.
        first: PathBuf,
        /// The other.
        second: PathBuf,
    },
    /// The record is not where it should be, but somewhere else.
    #[error(
        "there is no state record at {}, but one at {}: replicas were given in another order, or \
         have other names, when the disk was last served; give them as before, or say where the \
         record is with record=PATH",
        expected.display(),
        found.display()
    )]
    Elsewhere {
        /// The first place where it should be.
        expected: PathBuf,
        /// Where there is one.
        found: PathBuf,
    },
    /// Somebody made a copy between our look and our turn to make it.
    #[error(
        "the state record {} was made by another process meanwhile: the disk was served since this \
         start began; start again",
        path.display()
    )]
    Appeared {
        /// The copy.
        path: PathBuf,
    },
    /// A copy could not be made.
    #[error(
        "cannot create the state record {} ({length_bytes} bytes); its folder must exist, be \
         writable and have room",
        path.display()
    )]
    Create {
        /// The copy.
        path: PathBuf,
        /// How long it is.
        length_bytes: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A copy could not be made longer.
    #[error(
        "cannot make the state record {} {length_bytes} bytes long; its file system must have room",
        path.display()
    )]
    Lengthen {
        /// The copy.
        path: PathBuf,
        /// How long it was to be.
        length_bytes: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A copy could not be removed.
    #[error("cannot remove the state record {}", path.display())]
    Remove {
        /// The copy.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// What the copies are opened for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// To read and write them; they are locked. Waits this long for who has a lock.
    Own(Duration),
    /// To read them, also while a daemon has them.
    Look,
}

/// A copy of the record, or the place for one.
#[derive(Debug)]
pub struct RecordFile {
    path: PathBuf,
    state: State,
}

#[derive(Debug)]
enum State {
    Open(File),
    Missing,
    Unusable(String),
}

/// All copies of the record of one disk.
#[derive(Debug)]
pub struct RecordFiles {
    files: Vec<RecordFile>,
    elsewhere: Vec<PathBuf>,
    access: Access,
}

/// A copy to be read block by block.
#[derive(Debug)]
pub struct BlockReader<'a>(&'a File);

impl ReadBlock for BlockReader<'_> {
    fn read_block(&mut self, block: u64, into: &mut Block) -> Result<(), i32> {
        let block_bytes = u64::try_from(into.len()).expect("a block is small");
        let offset = block.checked_mul(block_bytes).ok_or(libc::EIO)?;
        // The end of the file inside a block has no errno of its own.
        let errno = |error: io::Error| error.raw_os_error().unwrap_or(libc::EIO);
        self.0.read_exact_at(into, offset).map_err(errno)
    }
}

impl RecordFiles {
    /// Opens what is there and, for [`Access::Own`], locks it. Nothing is created.
    ///
    /// # Errors
    /// If a copy is locked by somebody else, two of them are one file, or none is where it should
    /// be but one where it would be with the replicas in another order.
    pub fn open(places: &RecordPlaces, access: Access) -> Result<Self, RecordFileError> {
        Self::open_unless(places, access, &AtomicBool::new(false))
    }

    /// Like [`RecordFiles::open`], but does not wait for a lock any more once `given_up` is set.
    ///
    /// # Errors
    /// The same.
    pub fn open_unless(
        places: &RecordPlaces,
        access: Access,
        given_up: &AtomicBool,
    ) -> Result<Self, RecordFileError> {
        let begin = Instant::now();
        let mut files: Vec<RecordFile> = Vec::with_capacity(places.copies.len());
        for path in &places.copies {
            let file = RecordFile::open(path, access, begin, given_up, &files)?;
            files.push(file);
        }
        let mut elsewhere = places.elsewhere.clone();
        elsewhere.retain(|path| path.exists());
        let none = files
            .iter()
            .all(|file| matches!(file.state, State::Missing));
        if none && let (Some(found), Some(expected)) = (elsewhere.first(), places.copies.first()) {
            return Err(RecordFileError::Elsewhere {
                expected: expected.clone(),
                found: found.clone(),
            });
        }
        Ok(Self {
            files,
            elsewhere,
            access,
        })
    }

    /// The copies, in their order.
    #[must_use]
    pub fn files(&self) -> &[RecordFile] {
        &self.files
    }

    /// Files of the record that exist where none of the copies should be: left from when the
    /// replicas were given in another order.
    #[must_use]
    pub fn elsewhere(&self) -> &[PathBuf] {
        &self.elsewhere
    }

    /// Whether there is no copy at all: the images are plain (rule S5).
    #[must_use]
    pub fn is_absent(&self) -> bool {
        let missing = |file: &RecordFile| matches!(file.state, State::Missing);
        self.files.iter().all(missing)
    }

    /// What there is to read, for [`crate::record::open`].
    #[must_use]
    pub fn sources(&self) -> Vec<CopySource<BlockReader<'_>>> {
        self.files.iter().map(RecordFile::source).collect()
    }

    /// Makes the file of copy `copy` anew, all zero and `length_bytes` long, every block of it
    /// allocated and written (rule R2: an update of the record must never want for space). What
    /// was in it is gone. It is stable when this returns, and so is its name.
    ///
    /// # Errors
    /// If that cannot be done; the copy then counts as missing or unusable.
    ///
    /// # Panics
    /// If the files were opened for looking only.
    pub fn create(&mut self, copy: usize, length_bytes: u64) -> Result<(), RecordFileError> {
        assert!(
            self.access != Access::Look,
            "nothing is written when only looking"
        );
        let file = &mut self.files[copy];
        let refuse = |path: &Path, source| RecordFileError::Create {
            path: path.to_owned(),
            length_bytes,
            source,
        };
        if !matches!(file.state, State::Open(_)) {
            // What was not there must not be there now: somebody else's record may be in it.
            let fresh = matches!(file.state, State::Missing);
            let open = open_new(&file.path, fresh).map_err(|source| match source.kind() {
                io::ErrorKind::AlreadyExists => RecordFileError::Appeared {
                    path: file.path.clone(),
                },
                _ => refuse(&file.path, source),
            })?;
            lock(&open, &file.path)?;
            file.state = State::Open(open);
        }
        let State::Open(open) = &file.state else {
            unreachable!("it was opened above")
        };
        let written = fill(open, length_bytes).and_then(|()| sync_folder(&file.path));
        written.map_err(|source| {
            let refusal = refuse(&file.path, source);
            file.state = State::Unusable("it could not be written when it was made".to_owned());
            refusal
        })
    }

    /// Makes the file of copy `copy` at least `length_bytes` long, with zeroes that are written as
    /// when it is created. What is in it stays. Nothing for one that is not open.
    ///
    /// # Errors
    /// If that cannot be done; the file may be a part of that longer.
    ///
    /// # Panics
    /// If the files were opened for looking only.
    pub fn lengthen(&mut self, copy: usize, length_bytes: u64) -> Result<(), RecordFileError> {
        assert!(
            self.access != Access::Look,
            "nothing is written when only looking"
        );
        let file = &self.files[copy];
        let State::Open(open) = &file.state else {
            return Ok(());
        };
        let lengthened = open.metadata().and_then(|metadata| {
            // A part of a block is of a lengthening that was cut short.
            let block_bytes = u64::try_from(BLOCK_BYTES).expect("a block is small");
            let whole = metadata.len() - metadata.len() % block_bytes;
            if whole < length_bytes {
                write_zeroes(open, whole, length_bytes)?;
            }
            Ok(())
        });
        lengthened.map_err(|source| RecordFileError::Lengthen {
            path: file.path.clone(),
            length_bytes,
            source,
        })
    }

    /// Removes the copies that are there, and makes that stable. Returns their paths.
    ///
    /// # Errors
    /// If one cannot be removed; those before it are gone.
    ///
    /// # Panics
    /// If the files were opened for looking only.
    pub fn remove(self) -> Result<Vec<PathBuf>, RecordFileError> {
        assert!(
            self.access != Access::Look,
            "nothing is removed when only looking"
        );
        let mut removed = Vec::new();
        for file in self.files {
            if !matches!(file.state, State::Open(_)) {
                continue;
            }
            let path = file.path;
            fs::remove_file(&path)
                .and_then(|()| sync_folder(&path))
                .map_err(|source| RecordFileError::Remove {
                    path: path.clone(),
                    source,
                })?;
            removed.push(path);
        }
        Ok(removed)
    }

    /// The copies in their order: where each of them is, and its open file, if it is usable. The
    /// locks last as long as the files are open.
    pub fn into_files(self) -> impl Iterator<Item = (PathBuf, Option<File>)> {
        self.files.into_iter().map(|file| match file.state {
            State::Open(open) => (file.path, Some(open)),
            State::Missing | State::Unusable(_) => (file.path, None),
        })
    }

    /// Whether a daemon has any of the copies, as far as locks tell.
    #[must_use]
    pub fn are_in_use(&self) -> bool {
        let in_use = |file: &RecordFile| match &file.state {
            State::Open(open) => file_lock::is_locked(open).unwrap_or(false),
            State::Missing | State::Unusable(_) => false,
        };
        self.files.iter().any(in_use)
    }
}

impl RecordFile {
    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The open file, for writing with the ring: every write to it is stable when it is complete
    /// (O_DSYNC). `None` if the copy is missing or unusable.
    #[must_use]
    pub fn file(&self) -> Option<&File> {
        match &self.state {
            State::Open(file) => Some(file),
            State::Missing | State::Unusable(_) => None,
        }
    }

    fn source(&self) -> CopySource<BlockReader<'_>> {
        CopySource {
            name: self.path.display().to_string(),
            found: match &self.state {
                // Nothing can have been in it: there was no room for it when it was made.
                State::Open(open) if is_empty(open) => Found::Missing,
                State::Open(open) => Found::Present(BlockReader(open)),
                State::Missing => Found::Missing,
                State::Unusable(why) => Found::Unreadable(why.clone()),
            },
        }
    }

    fn open(
        path: &Path,
        access: Access,
        begin: Instant,
        given_up: &AtomicBool,
        others: &[RecordFile],
    ) -> Result<Self, RecordFileError> {
        let state = match access {
            Access::Look => match open_existing(path, false) {
                Ok(file) => State::Open(file),
                Err(error) => unusable(&error),
            },
            Access::Own(timeout) => loop {
                let file = match open_existing(path, true) {
                    Ok(file) => file,
                    Err(error) => break unusable(&error),
                };
                // Before the lock: our own lock on the other name would look like somebody else's.
                refuse_same_file(path, &file, others)?;
                match lock(&file, path) {
                    Ok(()) if leads_to(path, &file) => break State::Open(file),
                    // It was removed or replaced before we had the lock.
                    Ok(()) => {}
                    Err(RecordFileError::InUse { .. })
                        if begin.elapsed() < timeout && !given_up.load(Ordering::Relaxed) =>
                    {
                        if begin.elapsed() < LOCK_RETRY {
                            info!(
                                "the state record {} is locked by another process; waiting up to \
                                 {} s for it",
                                path.display(),
                                timeout.as_secs()
                            );
                        }
                        thread::sleep(LOCK_RETRY);
                    }
                    Err(error) => return Err(error),
                }
            },
        };
        if access == Access::Look
            && let State::Open(file) = &state
        {
            refuse_same_file(path, file, others)?;
        }
        Ok(Self {
            path: path.to_owned(),
            state,
        })
    }
}

impl fmt::Display for RecordFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.path.display();
        match &self.state {
            State::Open(_) => write!(f, "{path}"),
            State::Missing => write!(f, "{path} (missing)"),
            State::Unusable(why) => write!(f, "{path} ({why})"),
        }
    }
}

/// Whether a replica is a file rather than a device, which decides where copies of the record
/// are. The answer must stay the same while a replica is missing: a path that leads into `/dev`
/// and nowhere is one of a device.
#[must_use]
pub fn is_file(path: &Path) -> bool {
    match fs::metadata(path) {
        Ok(metadata) => !metadata.file_type().is_block_device(),
        Err(_) => {
            let end = link_end(path);
            !end.starts_with("/dev") || end.starts_with("/dev/shm")
        }
    }
}

/// Where a path leads, whether there is anything or not.
fn link_end(path: &Path) -> PathBuf {
    let mut end = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    for _ in 0..LINKS_MAX {
        match fs::read_link(&end) {
            Ok(next) => end = end.parent().unwrap_or(Path::new("/")).join(next),
            Err(_) => break,
        }
    }
    end
}

fn is_empty(file: &File) -> bool {
    file.metadata().is_ok_and(|metadata| metadata.len() == 0)
}

fn unusable(error: &io::Error) -> State {
    match error.kind() {
        io::ErrorKind::NotFound => State::Missing,
        _ => State::Unusable(error.to_string()),
    }
}

fn open_existing(path: &Path, writes: bool) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(writes);
    // Not blocking: the path may lead to a fifo that nobody has open.
    options.custom_flags(libc::O_DSYNC | libc::O_NONBLOCK);
    checked(options.open(path)?)
}

fn open_new(path: &Path, fresh: bool) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o600);
    options.create(true).create_new(fresh);
    options.custom_flags(libc::O_DSYNC | libc::O_NONBLOCK);
    checked(options.open(path)?)
}

/// Refuses what cannot hold a copy, and drops clean cached pages: the record is read from the
/// medium, as replicas are (rule F4).
fn checked(file: File) -> io::Result<File> {
    if !file.metadata()?.is_file() {
        let text = "it is not a regular file";
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    if let Err(error) = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed) {
        // A hint; a file system without a page cache has none to drop.
        tracing::debug!("cached pages of the state record are not dropped: {error}");
    }
    Ok(file)
}

fn lock(file: &File, path: &Path) -> Result<(), RecordFileError> {
    match file_lock::try_lock(file) {
        Ok(Locked::Yes) => Ok(()),
        Ok(Locked::Held) => Err(RecordFileError::InUse {
            path: path.to_owned(),
        }),
        Ok(Locked::NotSupported) => {
            warn!(
                "the file system of the state record {} has no locks: nothing keeps a second \
                 daemon away from it",
                path.display()
            );
            Ok(())
        }
        Err(source) => Err(RecordFileError::Lock {
            path: path.to_owned(),
            source,
        }),
    }
}

fn refuse_same_file(
    path: &Path,
    file: &File,
    others: &[RecordFile],
) -> Result<(), RecordFileError> {
    let number = |file: &File| file.metadata().map(|data| (data.dev(), data.ino())).ok();
    let own = number(file);
    let same = |other: &&RecordFile| own.is_some() && other.file().and_then(number) == own;
    match others.iter().find(same) {
        None => Ok(()),
        Some(other) => Err(RecordFileError::SameFile {
            first: other.path.clone(),
            second: path.to_owned(),
        }),
    }
}

/// Whether the path still leads to what is open.
fn leads_to(path: &Path, file: &File) -> bool {
    match (fs::metadata(path), file.metadata()) {
        (Ok(there), Ok(open)) => (there.dev(), there.ino()) == (open.dev(), open.ino()),
        _ => false,
    }
}

/// Writes zeroes: an allocation without them would be turned into a written one, with an update
/// of the file system's journal, by the first write to each block.
fn fill(file: &File, length_bytes: u64) -> io::Result<()> {
    file.set_len(0)?;
    write_zeroes(file, 0, length_bytes)
}

/// Writes zeroes from `offset` to `length_bytes` and makes them stable.
fn write_zeroes(file: &File, mut offset: u64, length_bytes: u64) -> io::Result<()> {
    while offset < length_bytes {
        let left = usize::try_from(length_bytes - offset).unwrap_or(usize::MAX);
        let piece = &ZEROES[..left.min(ZEROES.len())];
        file.write_all_at(piece, offset)?;
        offset += u64::try_from(piece.len()).expect("a piece is small");
    }
    file.sync_all()
}

/// Makes the names in the folder of `path` stable.
fn sync_folder(path: &Path) -> io::Result<()> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LENGTH: u64 = 36 * 4096;
    const NOW: Access = Access::Own(Duration::ZERO);

    struct Folder(tempfile::TempDir);

    impl Folder {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        fn path(&self, name: &str) -> PathBuf {
            self.0.path().join(name)
        }

        fn places(&self, copies: &[&str], elsewhere: &[&str]) -> RecordPlaces {
            let paths = |names: &[&str]| names.iter().map(|name| self.path(name)).collect();
            RecordPlaces {
                copies: paths(copies),
                elsewhere: paths(elsewhere),
            }
        }
    }

    #[test]
    fn copies_are_created_whole_and_found_again() {
        let folder = Folder::new();
        let places = folder.places(&["a", "b", "c"], &[]);
        let mut files = RecordFiles::open(&places, NOW).unwrap();
        assert!(files.is_absent());
        for copy in [0, 2] {
            files.create(copy, LENGTH).unwrap();
        }
        for name in ["a", "c"] {
            let metadata = fs::metadata(folder.path(name)).unwrap();
            assert_eq!(metadata.len(), LENGTH);
            assert!(metadata.blocks() * 512 >= LENGTH, "all of it is allocated");
            assert_eq!(metadata.mode() & 0o777, 0o600);
        }
        let block = [7; BLOCK_BYTES];
        let file = files.files()[2].file().unwrap();
        file.write_all_at(&block, 4096).unwrap();
        drop(files);
        let files = RecordFiles::open(&places, NOW).unwrap();
        assert!(!files.is_absent());
        let mut sources = files.sources();
        assert!(matches!(sources[1].found, Found::Missing));
        let Found::Present(reader) = &mut sources[2].found else {
            panic!("the copy is not found")
        };
        let mut read = [0; BLOCK_BYTES];
        assert_eq!(reader.read_block(1, &mut read), Ok(()));
        assert_eq!(read, block);
        assert_eq!(reader.read_block(36, &mut read), Err(libc::EIO));
        assert_eq!(reader.read_block(u64::MAX, &mut read), Err(libc::EIO));
    }

    #[test]
    fn copy_that_is_created_again_forgets_what_was_in_it() {
        let folder = Folder::new();
        fs::write(folder.path("a"), vec![9; 100_000]).unwrap();
        let mut files = RecordFiles::open(&folder.places(&["a"], &[]), NOW).unwrap();
        files.create(0, 8192).unwrap();
        assert_eq!(fs::read(folder.path("a")).unwrap(), vec![0; 8192]);
    }

    #[test]
    fn copy_that_somebody_made_meanwhile_is_left_alone() {
        let folder = Folder::new();
        let places = folder.places(&["a"], &[]);
        let mut late = RecordFiles::open(&places, NOW).unwrap();
        fs::write(folder.path("a"), b"record").unwrap();
        let refused = late.create(0, LENGTH).unwrap_err();
        assert!(matches!(refused, RecordFileError::Appeared { .. }));
        assert!(late.remove().unwrap().is_empty());
        assert_eq!(fs::read(folder.path("a")).unwrap(), b"record");
    }

    #[test]
    fn empty_file_holds_no_copy() {
        let folder = Folder::new();
        fs::write(folder.path("a"), b"").unwrap();
        let mut files = RecordFiles::open(&folder.places(&["a"], &[]), NOW).unwrap();
        assert!(matches!(files.sources()[0].found, Found::Missing));
        files.create(0, 8192).unwrap();
        assert!(matches!(files.sources()[0].found, Found::Present(_)));
    }

    #[test]
    fn copies_are_locked_until_dropped_and_can_be_looked_at_meanwhile() {
        let folder = Folder::new();
        let places = folder.places(&["a"], &[]);
        let mut files = RecordFiles::open(&places, NOW).unwrap();
        files.create(0, LENGTH).unwrap();
        let refused = RecordFiles::open(&places, NOW).unwrap_err().to_string();
        assert!(refused.contains("the disk is served already"), "{refused}");
        let look = RecordFiles::open(&places, Access::Look).unwrap();
        assert!(look.are_in_use());
        assert!(matches!(look.sources()[0].found, Found::Present(_)));
        let waiting = thread::spawn({
            let places = places.clone();
            move || RecordFiles::open(&places, Access::Own(Duration::from_secs(20))).map(drop)
        });
        thread::sleep(Duration::from_millis(50));
        drop(files);
        waiting.join().unwrap().unwrap();
        assert!(!look.are_in_use());
    }

    #[test]
    fn record_that_waited_for_a_lock_is_opened_where_it_is_now() {
        let folder = Folder::new();
        let places = folder.places(&["a"], &[]);
        let mut files = RecordFiles::open(&places, NOW).unwrap();
        files.create(0, LENGTH).unwrap();
        let waiting = thread::spawn({
            let places = places.clone();
            move || RecordFiles::open(&places, Access::Own(Duration::from_secs(20)))
        });
        thread::sleep(Duration::from_millis(50));
        assert_eq!(files.remove().unwrap(), [folder.path("a")]);
        assert!(waiting.join().unwrap().unwrap().is_absent());
    }

    #[test]
    fn what_cannot_hold_a_copy_is_unusable_and_stays_as_it_is() {
        let folder = Folder::new();
        fs::create_dir(folder.path("a")).unwrap();
        rustix::fs::mkfifoat(
            rustix::fs::CWD,
            folder.path("b"),
            rustix::fs::Mode::from_raw_mode(0o600),
        )
        .unwrap();
        let places = folder.places(&["a", "b", "none/c"], &[]);
        let mut files = RecordFiles::open(&places, NOW).unwrap();
        assert!(!files.is_absent());
        let texts: Vec<String> = files.files().iter().map(ToString::to_string).collect();
        assert!(texts[0].contains("directory"), "{texts:?}");
        assert!(
            texts[1].ends_with("(it is not a regular file)"),
            "{texts:?}"
        );
        assert!(texts[2].ends_with("c (missing)"), "{texts:?}");
        let refused = files.create(2, LENGTH).unwrap_err().to_string();
        assert!(refused.contains("its folder must exist"), "{refused}");
    }

    #[test]
    fn two_names_of_one_file_are_refused() {
        let folder = Folder::new();
        fs::write(folder.path("a"), b"x").unwrap();
        fs::hard_link(folder.path("a"), folder.path("b")).unwrap();
        for access in [NOW, Access::Look] {
            let refused = RecordFiles::open(&folder.places(&["a", "b"], &[]), access);
            assert!(matches!(refused, Err(RecordFileError::SameFile { .. })));
        }
    }

    #[test]
    fn record_in_another_place_is_not_taken_for_none() {
        let folder = Folder::new();
        fs::write(folder.path("d"), b"x").unwrap();
        let refused = RecordFiles::open(&folder.places(&["a", "b", "c"], &["d"]), NOW);
        assert!(matches!(refused, Err(RecordFileError::Elsewhere { .. })));
        fs::write(folder.path("b"), b"x").unwrap();
        let files = RecordFiles::open(&folder.places(&["a", "b", "c"], &["d"]), NOW).unwrap();
        assert_eq!(files.elsewhere(), [folder.path("d")]);
    }

    #[test]
    fn files_and_devices_are_told_apart_also_when_missing() {
        let folder = Folder::new();
        fs::write(folder.path("a"), b"x").unwrap();
        std::os::unix::fs::symlink("/dev/nonexistent", folder.path("link")).unwrap();
        let cases = [
            (folder.path("a"), true),
            (folder.path("missing"), true),
            (folder.path("link"), false),
            ("/dev/nonexistent".into(), false),
            ("/dev/shm/nonexistent".into(), true),
        ];
        for (path, expected) in cases {
            assert_eq!(is_file(&path), expected, "{}", path.display());
        }
    }
}
