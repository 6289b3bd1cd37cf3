// SPDX-License-Identifier: Apache-2.0
//! By what a replica is known again (rules R3, S3), and whether it is still where it was.
//!
//! Nothing here opens anything: opening a device has effects of its own. But a file system that is
//! not local is asked, so all of it can take as long as storage hangs. (The kernel would also give
//! what it remembers, which is not what is to be found out.)

use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, UNIX_EPOCH};

use crate::replica::identity::{Identity, backing_file, sysfs_directory};

/// What of a replica changes when somebody else writes to it or puts another in its place.
///
/// Of a regular file: its size, time of last change and inode. Of a loop device: the time and
/// inode of the file behind it. Of another block device: a number made of the name that the
/// hardware or the device mapper gives it; times of device nodes say nothing, and their inodes and
/// device numbers are given out anew at each boot. What cannot be found out is zero.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fingerprint {
    /// Size in bytes.
    pub size_bytes: u64,
    /// Time of the last change in nanoseconds since 1970; 0 for most block devices.
    pub mtime_ns: i128,
    /// Number of the inode, mixed with the time of the file's birth where the file system keeps it;
    /// or a number that stands for the device's name. The first file on a fresh file system has the
    /// same inode on all of them, and images on disks of their own are just that.
    pub inode: u64,
    /// Number of the device that the file is on, or that the device has. Only good until the next
    /// boot, or mount of that file system.
    pub device: u64,
}

impl Fingerprint {
    /// The fingerprint of the regular file or block device that `path` leads to.
    ///
    /// # Errors
    /// Of `stat`; [`io::ErrorKind::InvalidInput`] if it is something else.
    pub fn of_path(path: &Path) -> io::Result<Self> {
        Self::of(&fs::metadata(path)?)
    }

    /// The fingerprint of an open file or device.
    ///
    /// # Errors
    /// Of `fstat`; [`io::ErrorKind::InvalidInput`] if it is something else.
    pub(super) fn of_file(file: &File) -> io::Result<Self> {
        Self::of(&file.metadata()?)
    }

    /// Whether this is the same replica with nothing written to it since, as far as that shows.
    /// The device is left out: the same disk may have another number after a boot.
    #[must_use]
    pub fn is_unchanged_since(&self, earlier: &Self) -> bool {
        (self.size_bytes, self.mtime_ns, self.inode)
            == (earlier.size_bytes, earlier.mtime_ns, earlier.inode)
    }

    fn of(metadata: &Metadata) -> io::Result<Self> {
        let identity = Identity::of(metadata).ok_or(io::ErrorKind::InvalidInput)?;
        let Some(number) = identity.device_number() else {
            return Ok(Self {
                size_bytes: metadata.len(),
                mtime_ns: mtime_ns(metadata),
                inode: file_number(metadata),
                device: metadata.dev(),
            });
        };
        let backing = backing_file(number).and_then(|path| fs::metadata(path).ok());
        let (mtime_ns, inode) = match backing {
            Some(backing) => (mtime_ns(&backing), file_number(&backing)),
            None => (0, name_number(number)),
        };
        Ok(Self {
            size_bytes: device_size(number)?,
            mtime_ns,
            inode,
            device: number,
        })
    }
}

/// A number for a file that another one does not have, on whatever file system it is.
fn file_number(metadata: &Metadata) -> u64 {
    let born = metadata.created().ok();
    let since_epoch = born.and_then(|born| born.duration_since(UNIX_EPOCH).ok());
    mixed(metadata.ino(), since_epoch)
}

fn mixed(inode: u64, born: Option<Duration>) -> u64 {
    let Some(born) = born else { return inode };
    // Spread over all bits, so that inodes and times near each other do not meet.
    let nanos = born.as_secs().wrapping_mul(1_000_000_000) + u64::from(born.subsec_nanos());
    inode ^ nanos.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(32)
}

fn mtime_ns(metadata: &Metadata) -> i128 {
    i128::from(metadata.mtime()) * 1_000_000_000 + i128::from(metadata.mtime_nsec())
}

/// Whether a replica's path still leads to what is open.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Presence {
    /// It does, and nothing is missing at its end.
    There,
    /// The path leads nowhere, or what is open was removed. Writes still succeed, into something
    /// that disappears when it is closed.
    Gone,
    /// The path leads to another file or device.
    Replaced,
    /// It is shorter than it was when it was opened.
    Shrunk {
        /// Its length now.
        length_bytes: u64,
    },
}

/// Compares what is open with what `path` leads to now.
///
/// # Errors
/// If that cannot be found out, such as for want of a permission: then nothing is known.
pub(super) fn presence(
    file: &File,
    path: &Path,
    identity: &Identity,
    length_bytes: u64,
) -> io::Result<Presence> {
    let (there, open) = match (fs::metadata(path), file.metadata()) {
        (Ok(there), Ok(open)) => (there, open),
        (Err(error), _) | (_, Err(error)) if leads_nowhere(&error) => return Ok(Presence::Gone),
        (Err(error), _) | (_, Err(error)) => return Err(error),
    };
    if !Identity::of(&there).is_some_and(|there| identity.may_be(&there)) {
        return Ok(Presence::Replaced);
    }
    let device = identity.device_number();
    // A file that was removed can still be reached where it is mounted on another.
    if device.is_none() && open.nlink() == 0 {
        return Ok(Presence::Gone);
    }
    let now_bytes = match device {
        Some(number) => match device_size(number) {
            Err(error) if leads_nowhere(&error) => return Ok(Presence::Gone),
            other => other?,
        },
        None => open.len(),
    };
    if now_bytes < length_bytes {
        return Ok(Presence::Shrunk {
            length_bytes: now_bytes,
        });
    }
    Ok(Presence::There)
}

/// Whether an error means that there is nothing, rather than that we cannot see it.
fn leads_nowhere(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(
            libc::ENOENT
                | libc::ENOTDIR
                | libc::ENXIO
                | libc::ENODEV
                | libc::ESTALE
                // A FUSE file system whose server has died.
                | libc::ENOTCONN
        )
    )
}

/// The size of a block device, which its node does not tell, in bytes.
fn device_size(number: u64) -> io::Result<u64> {
    let text = fs::read_to_string(sysfs_directory(number) + "/size")?;
    // Always in units of 512 bytes, whatever the device's blocks are.
    let sectors: u64 = text
        .trim()
        .parse()
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
    Ok(sectors.saturating_mul(512))
}

/// A number for the name that stays with a block device over boots: 0 if it has none.
fn name_number(number: u64) -> u64 {
    let mut directory = sysfs_directory(number);
    // A partition is known by its number on its disk.
    let partition = fs::read_to_string(format!("{directory}/partition")).unwrap_or_default();
    if !partition.is_empty() {
        directory += "/..";
    }
    let name = ["dm/uuid", "wwid", "device/wwid", "serial", "device/serial"]
        .iter()
        .filter_map(|file| fs::read_to_string(format!("{directory}/{file}")).ok())
        .find(|name| !name.trim().is_empty());
    match name {
        Some(name) => fnv1a(format!("{}/{}", name.trim(), partition.trim()).as_bytes()),
        None => 0,
    }
}

/// FNV-1a, 64 bits: short, and the same for ever, as what is in the state record must be.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests;
