// SPDX-License-Identifier: Apache-2.0
//! What a replica is stored on, so that nothing is configured twice (rule V8).

use std::fs::{self, Metadata};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::PathBuf;

/// The storage of a replica. Two paths, links or bind mounts to one file have one identity.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Identity {
    /// A regular file.
    File(Inode),
    /// A block device.
    Device {
        /// Its device number.
        number: u64,
        /// The file behind it if it is a loop device.
        backing: Option<Inode>,
    },
}

/// A file, by the file system it is on and its number there.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Inode {
    device: u64,
    number: u64,
}

impl Inode {
    fn of(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            number: metadata.ino(),
        }
    }
}

impl Identity {
    /// The identity of a regular file or block device; `None` for anything else, which cannot
    /// hold a replica.
    #[must_use]
    pub fn of(metadata: &Metadata) -> Option<Self> {
        let kind = metadata.file_type();
        if kind.is_file() {
            Some(Self::File(Inode::of(metadata)))
        } else if kind.is_block_device() {
            let number = metadata.rdev();
            Some(Self::Device {
                number,
                backing: loop_backing(number),
            })
        } else {
            None
        }
    }

    /// Whether writing to one changes the other.
    #[must_use]
    pub fn same_storage(&self, other: &Self) -> bool {
        if self.device_number().is_some() && self.device_number() == other.device_number() {
            return true;
        }
        match (self.inode(), other.inode()) {
            (Some(one), Some(another)) => one == another,
            _ => false,
        }
    }

    /// The number of a block device.
    #[must_use]
    pub fn device_number(&self) -> Option<u64> {
        match self {
            Self::File(_) => None,
            Self::Device { number, .. } => Some(*number),
        }
    }

    /// Whether `now`, to which a path leads, can be what was opened there earlier as this. A loop
    /// device can be given another file without its number changing; where the file cannot be
    /// found out, the number counts.
    pub(super) fn may_be(&self, now: &Self) -> bool {
        if self.device_number() != now.device_number() {
            return false;
        }
        match (self.inode(), now.inode()) {
            (Some(then), Some(now)) => then == now,
            (None, None) => true,
            _ => self.device_number().is_some(),
        }
    }

    /// The file in which the bytes end up, as far as one can tell.
    fn inode(&self) -> Option<Inode> {
        match self {
            Self::File(inode) => Some(*inode),
            Self::Device { backing, .. } => *backing,
        }
    }
}

/// The directory in which the kernel describes a block device.
#[must_use]
pub fn sysfs_directory(number: u64) -> String {
    let (major, minor) = (libc::major(number), libc::minor(number));
    format!("/sys/dev/block/{major}:{minor}")
}

/// The file behind a loop device. A file that was deleted, or lies in another mount namespace, is
/// not found: the check is a help, not a fence (that is what the locks are for).
fn loop_backing(number: u64) -> Option<Inode> {
    let metadata = fs::metadata(backing_file(number)?).ok()?;
    metadata.is_file().then(|| Inode::of(&metadata))
}

/// The path of the file behind a loop device, as it was when the two were joined.
pub(super) fn backing_file(number: u64) -> Option<PathBuf> {
    let text = fs::read_to_string(sysfs_directory(number) + "/loop/backing_file").ok()?;
    Some(PathBuf::from(text.trim_end_matches('\n')))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(device: u64, number: u64) -> Identity {
        Identity::File(Inode { device, number })
    }

    fn device(number: u64, backing: Option<(u64, u64)>) -> Identity {
        let backing = backing.map(|(device, number)| Inode { device, number });
        Identity::Device { number, backing }
    }

    #[test]
    fn same_storage_table() {
        let cases = [
            (file(1, 2), file(1, 2), true),
            (file(1, 2), file(1, 3), false),
            (file(1, 2), file(2, 2), false),
            (file(1, 2), device(5, None), false),
            (file(1, 2), device(5, Some((1, 2))), true),
            (device(5, None), device(5, Some((1, 2))), true),
            (device(5, None), device(6, None), false),
            (device(5, Some((1, 2))), device(6, Some((1, 2))), true),
            (device(5, Some((1, 2))), device(6, Some((1, 4))), false),
        ];
        for (one, other, same) in cases {
            assert_eq!(one.same_storage(&other), same, "{one:?} {other:?}");
            assert_eq!(other.same_storage(&one), same, "{other:?} {one:?}");
        }
    }

    #[test]
    fn may_be_table() {
        let cases = [
            (file(1, 2), file(1, 2), true),
            (file(1, 2), file(1, 3), false),
            (file(1, 2), device(5, Some((1, 2))), false),
            (device(5, Some((1, 2))), device(5, Some((1, 2))), true),
            (device(5, Some((1, 2))), device(5, Some((1, 3))), false),
            (device(5, Some((1, 2))), device(5, None), true),
            (device(5, None), device(6, None), false),
        ];
        for (then, now, expected) in cases {
            assert_eq!(then.may_be(&now), expected, "{then:?} {now:?}");
        }
    }

    #[test]
    fn identity_of_links_is_equal_and_of_a_directory_is_none() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a");
        fs::write(&path, b"x").unwrap();
        let link = directory.path().join("b");
        fs::hard_link(&path, &link).unwrap();
        let of = |path| Identity::of(&fs::metadata(path).unwrap());
        assert!(of(&path).unwrap().same_storage(&of(&link).unwrap()));
        assert_eq!(of(&directory.path().to_path_buf()), None);
    }
}
