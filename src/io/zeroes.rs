// SPDX-License-Identifier: Apache-2.0
//! Zeroes to write from, shared by all workers.
#![allow(unsafe_code, reason = "maps a page range that is never writable")]

use std::io;
use std::ptr;
use std::sync::OnceLock;

/// How many zero bytes there are: 1 MiB, the default extent. They cost no memory: a private
/// mapping that is only ever read is one and the same page many times over.
pub const ZEROES_BYTES: u32 = 1 << 20;

/// Page-aligned memory of [`ZEROES_BYTES`] zeroes, for ever. It is mapped read-only, so that no
/// stray write in this process can put anything else on a replica.
///
/// # Errors
/// `ENOMEM` the first time, if nothing can be mapped.
pub fn zeroes() -> io::Result<&'static [u8]> {
    static MAPPED: OnceLock<&'static [u8]> = OnceLock::new();
    if let Some(&mapped) = MAPPED.get() {
        return Ok(mapped);
    }
    let made = map()?;
    // If another thread was quicker, this mapping stays unused; that happens once at most.
    Ok(MAPPED.get_or_init(|| made))
}

fn map() -> io::Result<&'static [u8]> {
    let len = ZEROES_BYTES as usize;
    // SAFETY: an anonymous mapping at an address of the kernel's choice touches nothing that
    // exists.
    let address = unsafe {
        libc::mmap(
            ptr::null_mut(),
            len,
            libc::PROT_READ,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    if address == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the mapping is `len` bytes of zeroes, is never unmapped, and cannot be written.
    Ok(unsafe { std::slice::from_raw_parts(address.cast::<u8>(), len) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeroes_are_zero_aligned_and_shared() {
        let first = zeroes().unwrap();
        assert_eq!(first.len(), ZEROES_BYTES as usize);
        assert_eq!(first.as_ptr().align_offset(4096), 0);
        assert!(first.iter().all(|&byte| byte == 0));
        assert_eq!(first.as_ptr(), zeroes().unwrap().as_ptr());
    }
}
