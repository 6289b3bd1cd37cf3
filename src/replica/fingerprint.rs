// SPDX-License-Identifier: Apache-2.0
//! By what a replica is known again (rules R3, S3), and whether it is still where it was.
//!
//! Nothing here opens anything: opening a device has effects of its own. The sizes and times are
//! those the kernel has at hand; a file system on the network is not asked for newer ones, which
//! could take as long as it hangs. Following a path can hang all the same.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, FileType, Statx, StatxFlags, makedev, statx};

use crate::replica::identity::{Identity, Inode, backing_file, sysfs_directory};

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
    /// Number of the inode, or a number that stands for the device's name.
    pub inode: u64,
    /// Number of the device that the file is on, or that the device has. Only good until the next
    /// boot, or mount of that file system.
    pub device: u64,
}

impl Fingerprint {
    /// The fingerprint of the regular file or block device that `path` leads to.
    ///
    /// # Errors
    /// Of `statx`; [`io::ErrorKind::InvalidInput`] if it is something else.
    pub fn of_path(path: &Path) -> io::Result<Self> {
        Self::of(&Facts::of_path(path)?)
    }

    /// The fingerprint of an open file or device.
    ///
    /// # Errors
    /// Of `statx`; [`io::ErrorKind::InvalidInput`] if it is something else.
    pub(super) fn of_file(file: &File) -> io::Result<Self> {
        Self::of(&Facts::of_file(file)?)
    }

    /// Whether this is the same replica with nothing written to it since, as far as that shows.
    /// The device is left out: the same disk may have another number after a boot.
    #[must_use]
    pub fn is_unchanged_since(&self, earlier: &Self) -> bool {
        (self.size_bytes, self.mtime_ns, self.inode)
            == (earlier.size_bytes, earlier.mtime_ns, earlier.inode)
    }

    fn of(facts: &Facts) -> io::Result<Self> {
        let plain = Self {
            size_bytes: facts.size_bytes,
            mtime_ns: facts.mtime_ns,
            inode: facts.inode.number,
            device: facts.inode.device,
        };
        match facts.kind {
            FileType::RegularFile => Ok(plain),
            FileType::BlockDevice => {
                let number = facts.device_number;
                let backing = backing_file(number).and_then(|path| Facts::of_path(&path).ok());
                let (mtime_ns, inode) = match backing {
                    Some(backing) => (backing.mtime_ns, backing.inode.number),
                    None => (0, name_number(number)),
                };
                Ok(Self {
                    size_bytes: device_size(number)?,
                    mtime_ns,
                    inode,
                    device: number,
                })
            }
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }
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
    let there = match Facts::of_path(path) {
        Ok(there) => there,
        Err(error) if leads_nowhere(&error) => return Ok(Presence::Gone),
        Err(error) => return Err(error),
    };
    let open = Facts::of_file(file)?;
    let device = identity.device_number();
    let same = match device {
        Some(number) => {
            there.kind == FileType::BlockDevice
                && there.device_number == number
                && identity.is_backed_as(number)
        }
        None => there.inode == open.inode && there.kind == open.kind,
    };
    if !same {
        return Ok(Presence::Replaced);
    }
    // A file that was removed can still be reached where it is mounted on another.
    if device.is_none() && open.links == 0 {
        return Ok(Presence::Gone);
    }
    let now_bytes = match device {
        Some(number) => match device_size(number) {
            Err(error) if leads_nowhere(&error) => return Ok(Presence::Gone),
            other => other?,
        },
        None => open.size_bytes,
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

/// What `statx` says, as far as it is used here.
struct Facts {
    kind: FileType,
    inode: Inode,
    links: u32,
    size_bytes: u64,
    mtime_ns: i128,
    /// Of a device: its own number.
    device_number: u64,
}

impl Facts {
    fn of_path(path: &Path) -> io::Result<Self> {
        let flags = AtFlags::STATX_DONT_SYNC;
        Ok(Self::from(&statx(
            CWD,
            path,
            flags,
            StatxFlags::BASIC_STATS,
        )?))
    }

    fn of_file(file: &File) -> io::Result<Self> {
        let flags = AtFlags::STATX_DONT_SYNC | AtFlags::EMPTY_PATH;
        let answer = statx(file.as_fd(), c"", flags, StatxFlags::BASIC_STATS)?;
        Ok(Self::from(&answer))
    }
}

impl From<&Statx> for Facts {
    fn from(answer: &Statx) -> Self {
        let mtime = answer.stx_mtime;
        let device = makedev(answer.stx_dev_major, answer.stx_dev_minor);
        Self {
            kind: FileType::from_raw_mode(answer.stx_mode.into()),
            inode: Inode {
                device,
                number: answer.stx_ino,
            },
            links: answer.stx_nlink,
            size_bytes: answer.stx_size,
            mtime_ns: i128::from(mtime.tv_sec) * 1_000_000_000 + i128::from(mtime.tv_nsec),
            device_number: makedev(answer.stx_rdev_major, answer.stx_rdev_minor),
        }
    }
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
