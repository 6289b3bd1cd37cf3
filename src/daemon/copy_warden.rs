// SPDX-License-Identifier: Apache-2.0
//! The warden of a copy of the state record: a thread for what may block on its file. It brings a
//! copy that was left out back (rule R1): tries again, with growing pauses, to open, read and
//! write it, and makes it anew where it is gone and its folder is there.
//!
//! The maintenance thread hands it the file and is told by mail; it never waits for a warden, which
//! may hang on a dead network file system for as long as that pleases. Whether what was found may
//! be used is for the [`Recorder`](crate::record::Recorder) to say.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use thiserror::Error;
use tracing::{debug, warn};

use super::record_files::file::{self, OpenCopy, Opening};
use super::record_files::{RecordImage, has_replica};
use super::worker::Message;
use crate::device::mailbox::Mailbox;
use crate::record::{BLOCK_BYTES, DiskUuid, Layout, ReadBlock, Slot, Superblock};

/// Pause before the first attempt; each one after that is twice as long (CONSISTENCY section 10).
const PAUSE_LEAST: Duration = Duration::from_secs(1);

/// The longest pause, and how long a copy must have been in use to begin with the shortest again.
const PAUSE_MOST: Duration = Duration::from_secs(60);

/// What the maintenance thread wants of a warden.
pub enum CopyOrder {
    /// The copy is not in use, and nothing is under way on it: bring it back. With the descriptors
    /// of its file, if it was open; they are of one opening.
    Bring(Vec<File>),
}

/// A copy that can be used again.
#[derive(Debug)]
pub struct CopyBack {
    /// Its file, locked.
    pub file: File,
    /// What is in it.
    pub image: RecordImage,
}

/// What a warden needs to know.
pub struct CopyWardenSetup {
    /// Place of the copy in the configuration.
    pub copy: u8,
    /// Where it is.
    pub path: PathBuf,
    /// It is beside a replica, and not to be made where that is missing: its file system may not
    /// be mounted.
    pub beside: bool,
    /// How long a copy is.
    pub length_bytes: u64,
    /// Of which disk.
    pub disk: DiskUuid,
    /// Where it reports.
    pub maintenance: Arc<Mailbox<Message>>,
}

/// Starts a warden. It ends when the sender of its orders is dropped; nobody waits for that.
///
/// # Errors
/// If there is no thread to be had.
pub fn spawn(setup: CopyWardenSetup) -> io::Result<Sender<CopyOrder>> {
    let (orders, inbox) = channel();
    thread::Builder::new()
        .name(format!("copy{}", setup.copy))
        .spawn(move || CopyWarden::new(setup).run(&inbox))?;
    Ok(orders)
}

/// Why a copy is not back yet.
#[derive(Debug, Error)]
enum NotYet {
    /// The replica beside which it belongs is missing as well.
    #[error("it is missing, as its replica is")]
    NoReplica,
    /// Somebody else has it.
    #[error("it is locked by another process")]
    Held,
    /// It can be opened for reading only.
    #[error("it can be read and not written ({0})")]
    ReadOnly(String),
    /// Another file is there every time it is looked at.
    #[error("it was replaced while it was opened")]
    Moved,
    /// Something that is not a copy of this record, or was cut off.
    #[error("it is shorter than it was made: remove it, and it is made anew")]
    Short,
    /// What the system said.
    #[error("{0}")]
    System(#[from] io::Error),
}

struct CopyWarden {
    setup: CopyWardenSetup,
    /// The file as it was open last. Its lock is kept.
    old: Option<File>,
    pause: Duration,
    /// When the next attempt is due; `None` while the copy is in use.
    next: Option<Instant>,
    /// When the copy was handed over.
    handed: Option<Instant>,
    /// An attempt failed since it was in use last: only the first is worth a warning.
    told: bool,
}

impl CopyWarden {
    fn new(setup: CopyWardenSetup) -> Self {
        Self {
            setup,
            old: None,
            pause: PAUSE_LEAST,
            next: None,
            handed: None,
            told: false,
        }
    }

    fn run(mut self, inbox: &Receiver<CopyOrder>) {
        loop {
            let order = match self.next {
                None => inbox.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(at) => inbox.recv_timeout(at.saturating_duration_since(Instant::now())),
            };
            match order {
                Ok(CopyOrder::Bring(files)) => self.bring(files),
                Err(RecvTimeoutError::Timeout) => self.attempt(),
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    fn bring(&mut self, files: Vec<File>) {
        let lasted = self.handed.take().map(|handed| handed.elapsed());
        if lasted.is_some_and(|lasted| lasted >= PAUSE_MOST) {
            self.pause = PAUSE_LEAST;
            self.told = false;
        }
        // All but one are closed, which may hang as well.
        self.old = files.into_iter().next();
        self.plan();
    }

    /// Plans the next attempt.
    fn plan(&mut self) {
        self.next = Some(Instant::now() + self.pause);
        self.pause = self.pause.saturating_mul(2).min(PAUSE_MOST);
    }

    fn attempt(&mut self) {
        let path = self.setup.path.clone();
        let (path, copy) = (path.display(), self.setup.copy);
        match self.try_to_open() {
            Ok(back) => {
                debug!("the copy {path} of the state record can be used again");
                self.next = None;
                self.handed = Some(Instant::now());
                let message = Message::CopyBack { copy, back };
                self.setup.maintenance.post(message);
            }
            Err(error) => {
                if self.told {
                    debug!("the copy {path} of the state record cannot be used yet: {error}");
                } else {
                    warn!(
                        "the copy {path} of the state record cannot be used yet: {error}; it is \
                         tried again"
                    );
                }
                self.told = true;
                self.plan();
            }
        }
    }

    /// Opens the copy, reads it, and writes to it what it holds already: a copy that can be read
    /// but not written must not take part, not even for a moment.
    fn try_to_open(&mut self) -> Result<CopyBack, NotYet> {
        let path = &self.setup.path;
        let file = match self.old.take().filter(|old| is_at(path, old)) {
            Some(old) => {
                file::drop_cache(&old);
                old
            }
            None => match file::open(path, true, &[]) {
                Opening::Done(OpenCopy {
                    read_only: Some(why),
                    ..
                }) => return Err(NotYet::ReadOnly(why)),
                Opening::Done(open) => open.file,
                Opening::Failed(error) if error.kind() == io::ErrorKind::NotFound => {
                    return self.make();
                }
                Opening::Failed(error) | Opening::NoLock(error) => return Err(error.into()),
                Opening::Held => return Err(NotYet::Held),
                Opening::Moved | Opening::Same(_) => return Err(NotYet::Moved),
            },
        };
        let mut image = RecordImage::read(&file)?;
        if image.file_bytes() == 0 {
            // Nothing can have been in it: there was no room for it when it was made.
            file::fill(&file, path, self.setup.length_bytes)?;
            let image = RecordImage::read(&file)?;
            return Ok(CopyBack { file, image });
        }
        if image.file_bytes() < self.setup.length_bytes {
            if !is_whole_copy(&image, self.setup.disk) {
                return Err(NotYet::Short);
            }
            // It was away when the disk became longer (rule Z3).
            file::lengthen(&file, self.setup.length_bytes)?;
            image = RecordImage::read(&file)?;
        }
        let tried = try_to_write(&file, &image);
        if let Err(error) = tried {
            // Kept, so that nobody else gets hold of it meanwhile.
            self.old = Some(file);
            return Err(error.into());
        }
        Ok(CopyBack { file, image })
    }

    fn make(&self) -> Result<CopyBack, NotYet> {
        let path = &self.setup.path;
        if self.setup.beside && !has_replica(path) {
            return Err(NotYet::NoReplica);
        }
        let OpenCopy { file, .. } = file::make(path, true)?;
        file::fill(&file, path, self.setup.length_bytes)?;
        let image = RecordImage::read(&file)?;
        Ok(CopyBack { file, image })
    }
}

fn is_at(path: &std::path::Path, file: &File) -> bool {
    file::number(file).is_ok_and(|number| file::leads_to(path, number))
}

/// Whether it is a copy of the record of this disk, as long as it says itself.
fn is_whole_copy(image: &RecordImage, disk: DiskUuid) -> bool {
    let mut block = [0; BLOCK_BYTES];
    Slot::BOTH.into_iter().any(|slot| {
        let mut reader = image;
        let read = reader.read_block(Layout::superblock_block(slot), &mut block);
        let superblock = read.ok().and_then(|()| Superblock::decode(&block).ok());
        superblock.is_some_and(|superblock| {
            superblock.disk == disk && superblock.layout().length_bytes() <= image.file_bytes()
        })
    })
}

/// Writes the last block as it is.
fn try_to_write(file: &File, image: &RecordImage) -> io::Result<()> {
    let Some((number, block)) = image.last_block().filter(|_| image.is_whole()) else {
        return Err(io::Error::other("it cannot be read"));
    };
    let block_bytes = u64::try_from(BLOCK_BYTES).expect("a block is small");
    file.write_all_at(block, number * block_bytes)
}
