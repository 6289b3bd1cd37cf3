// SPDX-License-Identifier: Apache-2.0
//! What a file or block device can do, found out without changing a byte of it.
#![allow(
    unsafe_code,
    reason = "statx, pread, fallocate and fadvise have no safe wrapper here"
)]

use std::fs::{self, File};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;

use crate::replica::identity::{Identity, sysfs_directory};

/// The largest alignment that is served: a page, which is what buffers are aligned to.
pub(super) const ALIGNMENT_BYTES_MAX: u32 = 4096;

/// Bytes at the start of an image, aligned for O_DIRECT.
#[repr(C, align(4096))]
pub(super) struct FirstPage([u8; 4096]);

/// What offset, length and memory of direct I/O on `file` must be multiples of: 512 or more. It
/// is what the kernel says (Linux 6.1), or else the smallest length at which a read works.
///
/// # Errors
/// `EINVAL` if no direct read works at all; other errors of the first read.
pub(super) fn direct_alignment(file: &File) -> io::Result<u32> {
    if let Some(alignment) = stated_alignment(file) {
        return Ok(alignment.max(512));
    }
    let mut page = FirstPage([0; 4096]);
    let mut last = io::Error::from_raw_os_error(libc::EINVAL);
    for len in [512, 4096] {
        // An address that is a multiple of no more than the length, so that the demands on
        // memory are tried too.
        let start = if len == 512 { 512 } else { 0 };
        match read_start(file, &mut page.0[start..start + len]) {
            Ok(_) => return Ok(u32::try_from(len).expect("512 or 4096")),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => last = error,
            Err(error) => return Err(error),
        }
    }
    Err(last)
}

/// The alignment that `statx` states; `None` if it says nothing.
fn stated_alignment(file: &File) -> Option<u32> {
    let mut answer = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: the descriptor is open, the empty path ends in a zero, and the answer has room.
    let result = unsafe {
        libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            answer.as_mut_ptr(),
        )
    };
    if result != 0 {
        return None;
    }
    // SAFETY: integers, zeroed before and filled in by the kernel.
    let answer = unsafe { answer.assume_init() };
    let alignment = answer.stx_dio_mem_align.max(answer.stx_dio_offset_align);
    // Zero means that direct I/O is not supported; the read that follows finds that out too.
    (answer.stx_mask & libc::STATX_DIOALIGN != 0 && alignment != 0).then_some(alignment)
}

/// The first bytes of `file`, as many as it has up to a page.
///
/// # Errors
/// Of the read.
pub(super) fn first_bytes<'a>(file: &File, page: &'a mut FirstPage) -> io::Result<&'a [u8]> {
    let len = read_start(file, &mut page.0)?;
    Ok(&page.0[..len])
}

impl FirstPage {
    pub(super) fn new() -> Self {
        Self([0; 4096])
    }
}

fn read_start(file: &File, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        match std::os::unix::fs::FileExt::read_at(file, buffer, 0) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

/// Whether an exact range can be zeroed without writing the zeroes. A regular file is asked to
/// punch a hole after its end, which changes nothing in it; a block device says so in sysfs.
pub(super) fn can_zero_exactly(file: &File, identity: &Identity, length_bytes: u64) -> bool {
    match identity.device_number() {
        Some(number) => device_zeroes(number),
        None => {
            let before = file.metadata().and_then(|metadata| metadata.modified());
            let can = punch(file, length_bytes.next_multiple_of(1 << 20));
            // The time of the last change moves even so. It is what tells at the next start
            // whether somebody changed the replica (rule S3), and a start may fail after this.
            if let Ok(time) = before
                && let Err(error) = file.set_modified(time)
            {
                tracing::debug!(%error, "the time of the last change cannot be set back");
            }
            can
        }
    }
}

fn punch(file: &File, offset: u64) -> bool {
    let Ok(offset) = libc::off64_t::try_from(offset) else {
        return false;
    };
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: the descriptor is open; the range lies after the end of the file.
    unsafe { libc::fallocate64(file.as_raw_fd(), mode, offset, 4096) == 0 }
}

/// Makes a regular file of `from_bytes` bytes `to_bytes` long, allocated if the rest of it is, and
/// makes that stable.
///
/// # Errors
/// Of the system calls. The file has its old length then, or the new one.
pub(super) fn lengthen(file: &File, from_bytes: u64, to_bytes: u64) -> io::Result<()> {
    use std::os::unix::fs::MetadataExt;

    let allocated_bytes = file.metadata()?.blocks().saturating_mul(512);
    if allocated_bytes >= from_bytes {
        let from = rustix::fs::FallocateFlags::empty();
        match rustix::fs::fallocate(file, from, from_bytes, to_bytes - from_bytes) {
            // Not every file system can; the writes will allocate then.
            Err(rustix::io::Errno::OPNOTSUPP) => {}
            other => other?,
        }
    }
    if file.metadata()?.len() < to_bytes {
        file.set_len(to_bytes)?;
    }
    file.sync_all()
}

/// Whether the device has a command that writes zeroes. A partition has its disk's queue.
fn device_zeroes(number: u64) -> bool {
    let directory = sysfs_directory(number);
    let limit = ["queue", "../queue"].iter().find_map(|queue| {
        fs::read_to_string(format!("{directory}/{queue}/write_zeroes_max_bytes")).ok()
    });
    limit.is_some_and(|text| text.trim().parse::<u64>().is_ok_and(|bytes| bytes > 0))
}

/// Writes back and drops the cached pages of `file`, so that the next reads ask the medium (rule
/// F4); see [`RawReplica::drop_caches`](super::RawReplica::drop_caches) for what stays.
///
/// # Errors
/// Of `fdatasync`, after which the pages were dropped all the same, or of `posix_fadvise`.
pub(super) fn drop_caches(file: &File) -> io::Result<()> {
    // The advice begins to write dirty pages back, but neither waits for them nor drops them.
    let written = file.sync_data();
    // SAFETY: the descriptor is open; the advice changes no data.
    let errno = unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
    if errno != 0 {
        return Err(io::Error::from_raw_os_error(errno));
    }
    written
}
