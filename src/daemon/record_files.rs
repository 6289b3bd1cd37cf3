// SPDX-License-Identifier: Apache-2.0
//! The files of the record's copies: where they are, their locks, their creation (rules R1, R2,
//! S1). What is in them is for [`crate::record`].
//!
//! A copy that is missing, cannot be opened or does not answer is no error here: whether enough of
//! them are left is decided with what they hold. A copy that somebody else has locked is one: the
//! disk is served already, and nothing of it may be touched.
//!
//! Storage may hang. Every copy is opened, locked and read into memory by a thread of its own,
//! which is waited for with a limit; one copy after the other, so that of two daemons that want
//! the same record one gets all of it.
//!
//! - `file`: one copy; `image`: what is in it; `error`: why they cannot be used.

mod error;
pub(super) mod file;
mod image;

use std::fmt;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use tracing::info;

use super::file_lock;
use crate::config::RecordPlaces;
use crate::io::{Unfinished, within};
use crate::record::{CopySource, Found};
pub use error::RecordFileError;
use file::{FileNumber, OpenCopy, Opening};
pub use image::RecordImage;

/// Pause between two looks at a lock. The kernel lets go of the last ones of a process shortly after
/// its end, and a guest waits for whoever comes next.
const LOCK_RETRY: Duration = Duration::from_millis(4);

/// How long storage may take to answer where nobody said how long.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);

/// Links that are followed from a path to a device that is not there.
const LINKS_MAX: usize = 40;

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
    Open(OpenCopy),
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

impl RecordFiles {
    /// Opens what is there and, for [`Access::Own`], locks it. Nothing is created.
    ///
    /// # Errors
    /// If a copy is locked by somebody else, two of them are one file, or none is where it should
    /// be but one where it would be with the replicas in another order.
    pub fn open(places: &RecordPlaces, access: Access) -> Result<Self, RecordFileError> {
        Self::open_within(places, access, ANSWER_LIMIT, &AtomicBool::new(false))
    }

    /// Like [`RecordFiles::open`]; a copy that takes longer than `answer` to be opened and read
    /// counts as one that cannot be used, and a lock is not waited for any more once `given_up` is
    /// set.
    ///
    /// # Errors
    /// The same.
    pub fn open_within(
        places: &RecordPlaces,
        access: Access,
        answer: Duration,
        given_up: &AtomicBool,
    ) -> Result<Self, RecordFileError> {
        let begin = Instant::now();
        let mut files: Vec<RecordFile> = Vec::with_capacity(places.copies.len());
        for path in &places.copies {
            let file = RecordFile::open(path, access, begin, answer, given_up, &files)?;
            files.push(file);
        }
        let listed = places.elsewhere.clone();
        let there = within("record", answer, move || {
            let there = |path: &PathBuf| path.exists();
            listed.into_iter().filter(there).collect::<Vec<_>>()
        });
        // Where that hangs it cannot be told; a record that is where it should be is enough.
        let elsewhere = there.unwrap_or_default();
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

    /// Reads all copies that are open again, each for no longer than `answer`: what is in them may
    /// have changed where nothing locks them.
    pub fn read_again(&mut self, answer: Duration) {
        for file in &mut self.files {
            let State::Open(open) = &mut file.state else {
                continue;
            };
            let again = open.file.try_clone().map(|same| {
                within("record", answer, move || {
                    file::drop_cache(&same);
                    RecordImage::read(&same)
                })
            });
            match again {
                Ok(Ok(Ok(image))) => open.image = image,
                Ok(Err(Unfinished::Late)) => file.state = no_answer(answer),
                Ok(Ok(Err(error)) | Err(Unfinished::NoThread(error))) | Err(error) => {
                    file.state = State::Unusable(error.to_string());
                }
            }
        }
    }

    /// Whether nobody else can change the copies that are open.
    #[must_use]
    pub fn are_locked(&self) -> bool {
        let open = |file: &RecordFile| match &file.state {
            State::Open(open) => open.locked,
            State::Missing | State::Unusable(_) => true,
        };
        self.files.iter().all(open)
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
    pub fn sources(&self) -> Vec<CopySource<&RecordImage>> {
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
        if !file.is_writable() {
            // What was not there must not be there now: somebody else's record may be in it.
            let fresh = matches!(file.state, State::Missing);
            let path = file.path.clone();
            let open = file::make(&path, fresh).map_err(|source| match source.kind() {
                io::ErrorKind::AlreadyExists => RecordFileError::Appeared { path },
                io::ErrorKind::WouldBlock => RecordFileError::InUse { path },
                _ => refuse(&path, source),
            })?;
            file.state = State::Open(open);
        }
        let State::Open(open) = &mut file.state else {
            unreachable!("it was opened above")
        };
        let written = file::fill(&open.file, &file.path, length_bytes)
            .and_then(|()| RecordImage::read(&open.file));
        match written {
            Ok(image) => {
                open.image = image;
                Ok(())
            }
            Err(source) => {
                let refusal = refuse(&file.path, source);
                let why = "it could not be written when it was made";
                file.state = State::Unusable(why.to_owned());
                Err(refusal)
            }
        }
    }

    /// Makes the file of copy `copy` at least `length_bytes` long, with zeroes that are written as
    /// when it is created. What is in it stays. Nothing for one that cannot be written.
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
        let file = &mut self.files[copy];
        let writable = file.is_writable();
        let State::Open(open) = &mut file.state else {
            return Ok(());
        };
        if !writable || open.image.file_bytes() >= length_bytes {
            return Ok(());
        }
        let lengthened = file::lengthen(&open.file, length_bytes)
            .and_then(|()| RecordImage::read(&open.file))
            .map(|image| open.image = image);
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
                .and_then(|()| file::sync_folder(&path))
                .map_err(|source| RecordFileError::Remove {
                    path: path.clone(),
                    source,
                })?;
            removed.push(path);
        }
        Ok(removed)
    }

    /// The copies in their order: where each of them is, and its open file, if it can be written.
    /// The locks last as long as the files are open.
    pub fn into_files(self) -> impl Iterator<Item = (PathBuf, Option<File>)> {
        self.files.into_iter().map(|file| match file.state {
            State::Open(open) if open.read_only.is_none() => (file.path, Some(open.file)),
            State::Open(_) | State::Missing | State::Unusable(_) => (file.path, None),
        })
    }

    /// Whether a daemon has any of the copies, as far as locks tell.
    #[must_use]
    pub fn are_in_use(&self) -> bool {
        let in_use = |file: &RecordFile| match &file.state {
            State::Open(open) => file_lock::is_locked(&open.file).unwrap_or(false),
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

    /// The open file: every write to it is stable when it is complete (O_DSYNC). `None` if the
    /// copy is missing or unusable.
    #[must_use]
    pub fn file(&self) -> Option<&File> {
        match &self.state {
            State::Open(open) => Some(&open.file),
            State::Missing | State::Unusable(_) => None,
        }
    }

    /// How long the file was when it was read; `None` if the copy is missing or unusable.
    #[must_use]
    pub fn length_bytes(&self) -> Option<u64> {
        match &self.state {
            State::Open(open) => Some(open.image.file_bytes()),
            State::Missing | State::Unusable(_) => None,
        }
    }

    /// Why the copy can be read and not written, if so.
    #[must_use]
    pub fn read_only(&self) -> Option<&str> {
        match &self.state {
            State::Open(open) => open.read_only.as_deref(),
            State::Missing | State::Unusable(_) => None,
        }
    }

    fn is_writable(&self) -> bool {
        matches!(&self.state, State::Open(open) if open.read_only.is_none())
    }

    fn number(&self) -> Option<FileNumber> {
        match &self.state {
            State::Open(open) => Some(open.number),
            State::Missing | State::Unusable(_) => None,
        }
    }

    fn source(&self) -> CopySource<&RecordImage> {
        CopySource {
            name: self.path.display().to_string(),
            found: match &self.state {
                // Nothing can have been in it: there was no room for it when it was made.
                State::Open(open) if open.image.file_bytes() == 0 => Found::Missing,
                State::Open(open) => Found::Present(&open.image),
                State::Missing => Found::Missing,
                State::Unusable(why) => Found::Unreadable(why.clone()),
            },
        }
    }

    fn open(
        path: &Path,
        access: Access,
        begin: Instant,
        answer: Duration,
        given_up: &AtomicBool,
        others: &[Self],
    ) -> Result<Self, RecordFileError> {
        let (owned, patience) = match access {
            Access::Own(patience) => (true, patience),
            Access::Look => (false, Duration::ZERO),
        };
        let mut told = false;
        let state = loop {
            let of = path.to_owned();
            let numbers: Vec<_> = others.iter().map(Self::number).collect();
            let opening = within("record", answer, move || file::open(&of, owned, &numbers));
            match opening {
                Ok(Opening::Done(open)) => break State::Open(open),
                Ok(Opening::Failed(error)) => break unusable(&error),
                Ok(Opening::Moved) => {}
                Ok(Opening::Held)
                    if begin.elapsed() < patience && !given_up.load(Ordering::Relaxed) =>
                {
                    if !std::mem::replace(&mut told, true) {
                        info!(
                            "the state record {} is locked by another process; waiting up to {} s \
                             for it",
                            path.display(),
                            patience.as_secs()
                        );
                    }
                    thread::sleep(LOCK_RETRY);
                }
                Ok(Opening::Held) => {
                    return Err(RecordFileError::InUse {
                        path: path.to_owned(),
                    });
                }
                Ok(Opening::Same(other)) => {
                    return Err(RecordFileError::SameFile {
                        first: others[other].path.clone(),
                        second: path.to_owned(),
                    });
                }
                Ok(Opening::NoLock(source)) => {
                    return Err(RecordFileError::Lock {
                        path: path.to_owned(),
                        source,
                    });
                }
                Err(Unfinished::Late) => break no_answer(answer),
                Err(Unfinished::NoThread(error)) => break unusable(&error),
            }
        };
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
/// and nowhere is one of a device. So must it where the storage does not answer.
#[must_use]
pub fn is_file(path: &Path) -> bool {
    let of = path.to_owned();
    let kind = within("record", ANSWER_LIMIT, move || {
        fs::metadata(&of).map(|metadata| !metadata.file_type().is_block_device())
    });
    match kind {
        Ok(Ok(is_file)) => is_file,
        Ok(Err(_)) | Err(_) => {
            let end = link_end(path);
            !end.starts_with("/dev") || end.starts_with("/dev/shm")
        }
    }
}

/// Whether there is a replica beside which the copy at `path` is. May hang.
pub(super) fn has_replica(path: &Path) -> bool {
    path.with_extension("").exists()
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

fn no_answer(limit: Duration) -> State {
    State::Unusable(format!("it does not answer within {} s", limit.as_secs()))
}

fn unusable(error: &io::Error) -> State {
    match error.kind() {
        io::ErrorKind::NotFound => State::Missing,
        _ => State::Unusable(error.to_string()),
    }
}

#[cfg(test)]
mod tests;
