// SPDX-License-Identifier: Apache-2.0
//! A replica in a raw file or on a block device.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::replica::fault::{OpenError, OpenFault};
use crate::replica::fingerprint::{self, Fingerprint, Presence};
use crate::replica::identity::Identity;
use crate::replica::locks::{self, LockError};
use crate::replica::probe::{self, ALIGNMENT_BYTES_MAX, FirstPage};
use crate::units::SECTOR_BYTES;

/// The first four bytes of a qcow2 image.
const QCOW2_MAGIC: &[u8] = b"QFI\xfb";

/// Whether the host's page cache stands between us and the medium.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Cache {
    /// No (O_DIRECT): a vote asks the medium.
    #[default]
    Direct,
    /// Yes. Faster if the host has memory to spare, but pages that went bad on the medium after
    /// they were cached are not noticed.
    Buffered,
}

/// What the bytes of a file are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Format {
    /// The disk's sectors, one after the other.
    Raw,
}

/// How to open a raw replica.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RawOptions {
    /// Stable name, unique in the set.
    pub name: String,
    /// A regular file or block device.
    pub path: PathBuf,
    /// O_DIRECT or not.
    pub cache: Cache,
    /// Open for reading only: nothing is ever written.
    pub read_only: bool,
    /// The user said what it is. `None` refuses what looks like another format.
    pub format: Option<Format>,
}

impl RawOptions {
    /// A writable replica with O_DIRECT.
    #[must_use]
    pub fn new(name: impl Into<String>, path: impl Into<PathBuf>) -> Self {
        Self {
            name: name.into(),
            path: path.into(),
            cache: Cache::Direct,
            read_only: false,
            format: None,
        }
    }
}

/// An open, locked raw file or block device.
#[derive(Debug)]
pub struct RawReplica {
    name: String,
    path: PathBuf,
    file: File,
    identity: Identity,
    length_bytes: u64,
    direct_alignment_bytes: u32,
    can_zero_exactly: bool,
    read_only: bool,
    found: Fingerprint,
}

impl RawReplica {
    /// Opens and locks a replica. Nothing is written to it.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open(options: &RawOptions) -> Result<Self, OpenError> {
        Self::open_beside(options, std::iter::empty())
    }

    /// Like [`RawReplica::open`], beside others that are open already: to find the same storage
    /// given twice (rule V8) before our own lock on it is mistaken for somebody else's.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open_beside<'a>(
        options: &RawOptions,
        others: impl Iterator<Item = (&'a str, &'a Identity)>,
    ) -> Result<Self, OpenError> {
        open(options, others, Claim::Lock).map_err(|fault| OpenError {
            name: options.name.clone(),
            path: options.path.clone(),
            fault,
        })
    }

    /// Opens a replica only to see what it is, also while somebody else has it: nothing is locked,
    /// claimed, written or dropped from caches. What is seen may change as soon as it was seen.
    ///
    /// # Errors
    /// [`OpenError`], never for a lock.
    pub fn look(options: &RawOptions) -> Result<Self, OpenError> {
        let options = RawOptions {
            read_only: true,
            ..options.clone()
        };
        open(&options, std::iter::empty(), Claim::None).map_err(|fault| OpenError {
            name: options.name,
            path: options.path,
            fault,
        })
    }

    /// Its stable name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where it is, as configured.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its length when it was opened, or since it was made longer, in bytes.
    #[must_use]
    pub fn length_bytes(&self) -> u64 {
        self.length_bytes
    }

    /// Makes the file longer, up to `length_bytes`; never shorter. What is new reads as zeroes, and
    /// is allocated if all of the rest is. The length is stable afterwards.
    ///
    /// # Errors
    /// Of the system calls. `InvalidInput` for a block device that is too short: only whoever made
    /// it can make it longer.
    pub fn lengthen(&mut self, length_bytes: u64) -> io::Result<()> {
        if self.length_bytes >= length_bytes {
            return Ok(());
        }
        if self.identity.device_number().is_some() {
            let text = "a block device is made longer by what made it (lvextend, for example)";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        probe::lengthen(&self.file, self.length_bytes, length_bytes)?;
        self.length_bytes = length_bytes;
        self.found = Fingerprint::of_file(&self.file)?;
        Ok(())
    }

    /// What offset, length and memory of its I/O must be multiples of, in bytes: 512 to 4096 with
    /// O_DIRECT, otherwise 1.
    #[must_use]
    pub fn direct_alignment_bytes(&self) -> u32 {
        self.direct_alignment_bytes
    }

    /// Whether holes can be punched in exact ranges (rule Z2).
    #[must_use]
    pub fn can_zero_exactly(&self) -> bool {
        self.can_zero_exactly
    }

    /// Whether it was opened for reading only.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// What it is stored on.
    #[must_use]
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// The open file description that holds the locks; all I/O goes through it (rule K2).
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Its fingerprint as it was found: locked, and before anything was tried on it. This is what
    /// is to be compared with that of the last clean stop (rule S3): finding out whether holes can
    /// be punched moves the time of the last change, which only the owner of the file can set
    /// back.
    #[must_use]
    pub fn found(&self) -> Fingerprint {
        self.found
    }

    /// By what it is known again: its size, time of last change and place at this moment.
    ///
    /// The time also changes with our own writes, so this says most after the last operation has
    /// landed and before the file is closed (rule S3); see
    /// [`RawReplica::durable_fingerprint`] for one that is to survive a power loss.
    ///
    /// # Errors
    /// Of `fstat`, or of reading the size of a device that is not there any more.
    pub fn fingerprint(&self) -> io::Result<Fingerprint> {
        Fingerprint::of_file(&self.file)
    }

    /// Makes everything about it stable and returns the fingerprint it will then have after a
    /// power loss too (rule R8). A flush alone leaves the time of the last change in memory:
    /// after a power loss an older one would come back, and the replica would be taken for one
    /// that somebody changed.
    ///
    /// Takes as long as the storage does, for ever if it hangs.
    ///
    /// # Errors
    /// Of `fsync`, and of [`RawReplica::fingerprint`].
    pub fn durable_fingerprint(&self) -> io::Result<Fingerprint> {
        self.file.sync_all()?;
        self.fingerprint()
    }

    /// Whether the configured path still leads to what is open here, in its full length. What is
    /// [`Presence::Gone`] takes writes without an error and loses them all when it is closed.
    ///
    /// Takes as long as the storage does, for ever if it hangs.
    ///
    /// # Errors
    /// If it cannot be found out, for want of a permission or of memory; that says nothing about
    /// the replica.
    pub fn is_still_there(&self) -> io::Result<Presence> {
        fingerprint::presence(&self.file, &self.path, &self.identity, self.length_bytes)
    }

    /// Writes back and drops its cached pages, so that the next reads ask the medium (rule F4).
    /// Done when a replica is opened with [`Cache::Buffered`], a file or a device alike.
    ///
    /// Only clean pages can be dropped, so the dirty ones are written back first. What stays:
    /// pages that became dirty meanwhile, pages that another process has mapped or locked in
    /// memory, everything on a file system without a medium (tmpfs), and caches below the
    /// kernel's, in a controller, a server or the host of a virtual machine. A page whose write
    /// back failed counts as clean and is dropped with the data that never reached the medium:
    /// that is meant, for a vote must not count what is not there.
    ///
    /// # Errors
    /// Of `fdatasync`, in which case the pages were dropped all the same, or of `posix_fadvise`.
    pub fn drop_caches(&self) -> io::Result<()> {
        probe::drop_caches(&self.file)
    }
}

/// What is done so that nobody else changes the replica (rule K1).
#[derive(Clone, Copy, PartialEq, Eq)]
enum Claim {
    /// Locks, and O_EXCL on a device.
    Lock,
    /// Nothing.
    None,
}

fn open<'a>(
    options: &RawOptions,
    mut others: impl Iterator<Item = (&'a str, &'a Identity)>,
    claim: Claim,
) -> Result<RawReplica, OpenFault> {
    // Looked at before it is opened: opening a pipe or a tape drive has effects of its own.
    let before = identify(&options.path)?;
    if let Some((other, _)) = others.find(|(_, identity)| identity.same_storage(&before)) {
        return Err(OpenFault::Duplicate {
            other: other.to_owned(),
        });
    }
    let mut file = open_file(options, &before, claim)?;
    let metadata = file.metadata().map_err(system("examine"))?;
    if Identity::of(&metadata).as_ref() != Some(&before) {
        return Err(OpenFault::Replaced);
    }
    if claim == Claim::Lock {
        lock(&file, options)?;
    }
    let found = Fingerprint::of_file(&file).map_err(system("examine"))?;
    let length_bytes = file
        .seek(SeekFrom::End(0))
        .map_err(system("find the length"))?;
    if length_bytes < SECTOR_BYTES {
        return Err(OpenFault::Empty { length_bytes });
    }
    let direct_alignment_bytes = match options.cache {
        Cache::Direct => alignment(&file)?,
        Cache::Buffered => 1,
    };
    if options.format.is_none() {
        let mut page = FirstPage::new();
        let first = probe::first_bytes(&file, &mut page);
        // A disk whose first sector cannot be read is a case for the vote, not for us.
        if first.is_ok_and(|bytes| bytes.starts_with(QCOW2_MAGIC)) {
            return Err(OpenFault::Qcow2);
        }
    }
    let replica = RawReplica {
        name: options.name.clone(),
        path: options.path.clone(),
        can_zero_exactly: !options.read_only
            && probe::can_zero_exactly(&file, &before, length_bytes),
        file,
        identity: before,
        length_bytes,
        direct_alignment_bytes,
        read_only: options.read_only,
        found,
    };
    if options.cache == Cache::Buffered
        && claim == Claim::Lock
        && let Err(error) = replica.drop_caches()
    {
        // Whose writes those were does not matter: what they left on the medium is now to be
        // seen, and ours are dirty in the state record until a flush of ours succeeds.
        tracing::warn!(
            replica = options.name,
            %error,
            "writes made before it was opened could not be brought to the medium"
        );
    }
    Ok(replica)
}

/// What `path` leads to, without opening it.
pub(super) fn identify(path: &Path) -> Result<Identity, OpenFault> {
    use std::os::unix::fs::FileTypeExt;

    let metadata = fs::metadata(path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => OpenFault::NotFound(error),
        _ => system("open")(error),
    })?;
    Identity::of(&metadata).ok_or_else(|| {
        let kind = metadata.file_type();
        OpenFault::WrongKind {
            kind: if kind.is_dir() {
                "directory"
            } else if kind.is_fifo() {
                "pipe"
            } else if kind.is_char_device() {
                "character device"
            } else if kind.is_socket() {
                "socket"
            } else {
                "file of an unknown kind"
            },
        }
    })
}

fn open_file(options: &RawOptions, identity: &Identity, claim: Claim) -> Result<File, OpenFault> {
    let direct = options.cache == Cache::Direct;
    let device = identity.device_number().is_some();
    // The standard library adds O_CLOEXEC. O_EXCL without O_CREAT claims a block device: the
    // kernel then refuses mounts and other claims, and refuses us if there is one (rule K1).
    let mut flags = 0;
    if direct {
        flags |= libc::O_DIRECT;
    }
    if device && claim == Claim::Lock {
        flags |= libc::O_EXCL;
    }
    OpenOptions::new()
        .read(true)
        .write(!options.read_only)
        .custom_flags(flags)
        .open(&options.path)
        .map_err(|error| match error.raw_os_error() {
            Some(libc::EBUSY) if device => OpenFault::DeviceBusy,
            Some(libc::EINVAL) if direct => OpenFault::DirectRefused,
            Some(libc::EACCES | libc::EPERM | libc::EROFS) if !options.read_only => {
                OpenFault::NotWritable(error)
            }
            _ => system("open")(error),
        })
}

fn lock(file: &File, options: &RawOptions) -> Result<(), OpenFault> {
    match locks::acquire(file.as_fd(), !options.read_only) {
        Ok(()) => Ok(()),
        Err(LockError::Held { holder, pid }) => Err(OpenFault::InUse { holder, pid }),
        Err(LockError::Failed(error)) => Err(system("lock")(error)),
        Err(LockError::NotSupported(error)) => {
            tracing::warn!(
                replica = options.name,
                %error,
                "the storage has no locks: nothing keeps other programs from writing there"
            );
            Ok(())
        }
    }
}

fn alignment(file: &File) -> Result<u32, OpenFault> {
    let alignment_bytes = match probe::direct_alignment(file) {
        Ok(alignment_bytes) => alignment_bytes,
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            return Err(OpenFault::DirectRefused);
        }
        Err(error) => return Err(system("read")(error)),
    };
    if alignment_bytes > ALIGNMENT_BYTES_MAX || !alignment_bytes.is_power_of_two() {
        return Err(OpenFault::Alignment { alignment_bytes });
    }
    Ok(alignment_bytes)
}

fn system(action: &'static str) -> impl Fn(io::Error) -> OpenFault {
    move |error| OpenFault::System { action, error }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn image(directory: &Path, name: &str, bytes: usize) -> RawOptions {
        let path = directory.join(name);
        fs::write(&path, vec![0; bytes]).unwrap();
        RawOptions::new(name, path)
    }

    fn buffered(options: RawOptions) -> RawOptions {
        RawOptions {
            cache: Cache::Buffered,
            ..options
        }
    }

    #[test]
    fn file_is_made_longer_as_it_was_made() {
        use std::os::unix::fs::MetadataExt;

        let directory = tempfile::tempdir().unwrap();
        let dense = image(directory.path(), "dense", 1 << 20);
        let sparse = RawOptions::new("sparse", directory.path().join("sparse"));
        let file = File::create(&sparse.path).unwrap();
        file.set_len(1 << 20).unwrap();
        for (options, allocated) in [(dense, true), (sparse, false)] {
            let mut replica = RawReplica::open(&buffered(options)).unwrap();
            replica.lengthen(1 << 19).unwrap();
            assert_eq!(replica.length_bytes(), 1 << 20);
            replica.lengthen(1 << 22).unwrap();
            assert_eq!(replica.length_bytes(), 1 << 22);
            assert_eq!(replica.found().size_bytes, 1 << 22);
            let metadata = fs::metadata(replica.path()).unwrap();
            assert_eq!(metadata.len(), 1 << 22);
            assert_eq!(metadata.blocks() * 512 >= 1 << 22, allocated);
            assert_eq!(replica.is_still_there().unwrap(), Presence::There);
        }
    }

    #[test]
    fn open_of_a_file_tells_length_and_alignment() {
        let directory = tempfile::tempdir().unwrap();
        let options = image(directory.path(), "a", 10_000);
        let direct = RawReplica::open(&options).unwrap();
        assert_eq!(direct.length_bytes(), 10_000);
        assert!([512, 1024, 2048, 4096].contains(&direct.direct_alignment_bytes()));
        drop(direct);
        let replica = RawReplica::open(&buffered(options)).unwrap();
        assert_eq!(replica.direct_alignment_bytes(), 1);
    }

    #[test]
    fn open_does_not_change_the_file() {
        let directory = tempfile::tempdir().unwrap();
        let options = image(directory.path(), "a", 10_000);
        let content: Vec<u8> = (0..=255).cycle().take(10_000).collect();
        fs::write(&options.path, &content).unwrap();
        drop(RawReplica::open(&options).unwrap());
        assert!(fs::read(&options.path).unwrap() == content);
    }

    #[test]
    fn open_twice_is_refused_as_in_use() {
        let directory = tempfile::tempdir().unwrap();
        let options = image(directory.path(), "a", 4096);
        let first = RawReplica::open(&options).unwrap();
        let error = RawReplica::open(&options).unwrap_err();
        assert!(error.is_in_use());
        let text = error.to_string();
        assert!(text.starts_with("replica 'a' (/"), "{text}");
        assert!(
            text.contains("another process which holds QEMU's write lock"),
            "{text}"
        );
        drop(first);
        RawReplica::open(&options).unwrap();
    }

    #[test]
    fn open_read_only_twice_is_allowed() {
        let directory = tempfile::tempdir().unwrap();
        let options = RawOptions {
            read_only: true,
            ..image(directory.path(), "a", 4096)
        };
        let first = RawReplica::open(&options).unwrap();
        let second = RawReplica::open(&options).unwrap();
        assert!(first.is_read_only() && second.is_read_only());
        assert!(!first.can_zero_exactly());
        assert!(first.identity().same_storage(second.identity()));
    }

    #[test]
    fn open_beside_itself_is_a_duplicate_even_through_a_link() {
        let directory = tempfile::tempdir().unwrap();
        let options = image(directory.path(), "a", 4096);
        let first = RawReplica::open(&options).unwrap();
        let link = directory.path().join("b");
        std::os::unix::fs::symlink(&options.path, &link).unwrap();
        let others = [(first.name(), first.identity())].into_iter();
        let error = RawReplica::open_beside(&RawOptions::new("b", link), others).unwrap_err();
        assert!(matches!(&error.fault, OpenFault::Duplicate { other } if other == "a"));
    }

    #[test]
    fn open_of_qcow2_is_refused_unless_format_is_given() {
        let directory = tempfile::tempdir().unwrap();
        let options = image(directory.path(), "a", 8192);
        let mut file = File::options().write(true).open(&options.path).unwrap();
        file.write_all(b"QFI\xfb\0\0\0\x03").unwrap();
        drop(file);
        let error = RawReplica::open(&options).unwrap_err();
        assert!(matches!(error.fault, OpenFault::Qcow2));
        assert!(error.to_string().contains("format=raw"));
        let forced = RawOptions {
            format: Some(Format::Raw),
            ..options
        };
        RawReplica::open(&forced).unwrap();
    }

    #[test]
    fn open_of_what_cannot_hold_a_replica_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let missing = RawOptions::new("m", directory.path().join("missing"));
        let text = RawReplica::open(&missing).unwrap_err().to_string();
        assert!(text.contains("No such file"), "{text}");
        let cases = [
            (directory.path().to_path_buf(), "directory"),
            (PathBuf::from("/dev/null"), "character device"),
        ];
        for (path, expected) in cases {
            let error = RawReplica::open(&RawOptions::new("x", path)).unwrap_err();
            let OpenFault::WrongKind { kind } = error.fault else {
                panic!("{error}");
            };
            assert_eq!(kind, expected);
        }
        let empty = image(directory.path(), "e", 511);
        let error = RawReplica::open(&empty).unwrap_err();
        assert!(matches!(
            error.fault,
            OpenFault::Empty { length_bytes: 511 }
        ));
    }
}
