// SPDX-License-Identifier: Apache-2.0
//! One file that holds a copy of the record, or is to hold one. Everything here may hang where the
//! storage does: it belongs on a thread that is waited for with a limit.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use tracing::warn;

use super::image::RecordImage;
use crate::daemon::file_lock::{self, Locked};
use crate::record::BLOCK_BYTES;

/// How much is written at once when a copy is made.
static ZEROES: [u8; 1 << 16] = [0; 1 << 16];

/// Device and inode.
pub type FileNumber = (u64, u64);

/// A copy that was opened, and what is in it.
#[derive(Debug)]
pub struct OpenCopy {
    /// The file. Every write to it is stable when it is complete (O_DSYNC).
    pub file: File,
    /// Which file it is.
    pub number: FileNumber,
    /// Why it can be read only, if so.
    pub read_only: Option<String>,
    /// Nobody else can have it as long as the file is open.
    pub locked: bool,
    /// What it held when it was opened, or read again.
    pub image: RecordImage,
}

/// What became of opening a copy.
pub enum Opening {
    /// It is open, and locked if that was wanted and can be.
    Done(OpenCopy),
    /// It is the same file as this copy, by its place among those that are open.
    Same(usize),
    /// Somebody else has the lock.
    Held,
    /// It was removed or replaced before we had the lock.
    Moved,
    /// The lock could not be asked for.
    NoLock(io::Error),
    /// It is not there, or cannot be opened.
    Failed(io::Error),
}

/// Opens a copy that is there and reads it; for an owner it is opened for writing if that can be,
/// and locked. `others` are the files that are open already.
pub fn open(path: &Path, owned: bool, others: &[Option<FileNumber>]) -> Opening {
    let opened = if owned {
        open_existing(path, true).map(|file| (file, None))
    } else {
        open_existing(path, false).map(|file| (file, None))
    };
    let opened = match opened {
        Err(error) if owned && is_for_writing_only(&error) => {
            // What it says still counts (rule R5), whether it can be written or not.
            open_existing(path, false).map(|file| (file, Some(error.to_string())))
        }
        other => other,
    };
    let (file, read_only) = match opened {
        Ok(opened) => opened,
        Err(error) => return Opening::Failed(error),
    };
    let number = match number(&file) {
        Ok(number) => number,
        Err(error) => return Opening::Failed(error),
    };
    // Before the lock: our own lock on the other name would look like somebody else's.
    if let Some(other) = others.iter().position(|&other| other == Some(number)) {
        return Opening::Same(other);
    }
    let mut locked = false;
    if owned {
        match lock(&file, path, read_only.is_some()) {
            Ok(Locked::Held) => return Opening::Held,
            Ok(Locked::Yes) => locked = true,
            Ok(Locked::NotSupported) => {}
            Err(error) => return Opening::NoLock(error),
        }
        if !leads_to(path, number) {
            return Opening::Moved;
        }
    }
    match RecordImage::read(&file) {
        Ok(image) => Opening::Done(OpenCopy {
            file,
            number,
            read_only,
            locked,
            image,
        }),
        Err(error) => Opening::Failed(error),
    }
}

/// Makes the file of a copy and locks it. `fresh`: there must be none.
///
/// # Errors
/// `AlreadyExists` if there is one that must not be, `WouldBlock` if somebody else has it.
pub fn make(path: &Path, fresh: bool) -> io::Result<OpenCopy> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o600);
    options.create(true).create_new(fresh);
    options.custom_flags(libc::O_DSYNC | libc::O_NONBLOCK);
    let file = checked(options.open(path)?)?;
    let number = number(&file)?;
    let locked = match lock(&file, path, false)? {
        Locked::Held => return Err(io::ErrorKind::WouldBlock.into()),
        Locked::Yes => true,
        Locked::NotSupported => false,
    };
    Ok(OpenCopy {
        file,
        number,
        read_only: None,
        locked,
        image: RecordImage::default(),
    })
}

/// Opens what is there, through to the medium.
fn open_existing(path: &Path, writes: bool) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(writes);
    // Not blocking: the path may lead to a fifo that nobody has open.
    options.custom_flags(libc::O_DSYNC | libc::O_NONBLOCK);
    checked(options.open(path)?)
}

/// Whether opening failed only because it was for writing.
fn is_for_writing_only(error: &io::Error) -> bool {
    let errno = error.raw_os_error();
    matches!(
        errno,
        Some(libc::EACCES | libc::EPERM | libc::EROFS | libc::ETXTBSY)
    )
}

/// Refuses what cannot hold a copy, and drops clean cached pages: the record is read from the
/// medium, as replicas are (rule F4).
fn checked(file: File) -> io::Result<File> {
    if !file.metadata()?.is_file() {
        let text = "it is not a regular file";
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    drop_cache(&file);
    Ok(file)
}

/// Drops clean cached pages.
pub fn drop_cache(file: &File) {
    if let Err(error) = rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::DontNeed) {
        // A hint; a file system without a page cache has none to drop.
        tracing::debug!("cached pages of the state record are not dropped: {error}");
    }
}

/// Locks a copy; one that cannot be written against writers only.
fn lock(file: &File, path: &Path, read_only: bool) -> io::Result<Locked> {
    let locked = if read_only {
        file_lock::try_lock_shared(file)?
    } else {
        file_lock::try_lock(file)?
    };
    if locked == Locked::NotSupported {
        warn!(
            "the file system of the state record {} has no locks: nothing keeps a second daemon \
             away from it",
            path.display()
        );
    }
    Ok(locked)
}

/// Which file it is.
///
/// # Errors
/// If that cannot be told.
pub fn number(file: &File) -> io::Result<FileNumber> {
    file.metadata()
        .map(|metadata| (metadata.dev(), metadata.ino()))
}

/// Whether the path still leads to what is open.
pub fn leads_to(path: &Path, number: FileNumber) -> bool {
    let there = fs::metadata(path);
    there.is_ok_and(|there| (there.dev(), there.ino()) == number)
}

/// Writes zeroes: an allocation without them would be turned into a written one, with an update
/// of the file system's journal, by the first write to each block. What was in the file is gone;
/// it is stable when this returns, and so is its name.
///
/// # Errors
/// If that cannot be done.
pub fn fill(file: &File, path: &Path, length_bytes: u64) -> io::Result<()> {
    file.set_len(0)?;
    write_zeroes(file, 0, length_bytes)?;
    sync_folder(path)
}

/// Makes the file longer, up to `length_bytes`, in the same way; what is in it stays.
///
/// # Errors
/// If that cannot be done; it may be a part of that longer.
pub fn lengthen(file: &File, length_bytes: u64) -> io::Result<()> {
    let block_bytes = u64::try_from(BLOCK_BYTES).expect("a block is small");
    let has = file.metadata()?.len();
    // A part of a block is left of a lengthening that was cut short.
    write_zeroes(file, has - has % block_bytes, length_bytes)
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
///
/// # Errors
/// If that cannot be done.
pub fn sync_folder(path: &Path) -> io::Result<()> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    File::open(folder)?.sync_all()
}
