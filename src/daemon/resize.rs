// SPDX-License-Identifier: Apache-2.0
//! Making the disk longer while a guest has it (rule Z3).
//!
//! The rings are drained, the disk is closed cleanly and opened again at its new size
//! ([`start::growing`](super::start)), the rings run again, and the front-end is told. If it cannot
//! be opened at its new size it is opened at the old one: a disk does not stay closed for that.

use thiserror::Error;
use tracing::info;

use super::disk::{Disk, DiskError};
use crate::device::{Device, SuspendError, Told};
use crate::record::GrowthError;
use crate::units::SECTOR_BYTES;

/// A disk that has the size that was asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Resized {
    /// Its size in bytes.
    pub bytes: u64,
    /// Whether the front-end was told. One that was not sees the size when it reads the
    /// configuration the next time: when it reconnects, or the guest starts again.
    pub told: Told,
}

/// A disk that was not resized.
#[derive(Debug, Error)]
pub enum ResizeError {
    /// No whole number of sectors.
    #[error("{bytes} bytes are no whole number of sectors: give a multiple of 512")]
    Unaligned {
        /// As asked for.
        bytes: u64,
    },
    /// The size is not possible.
    #[error(transparent)]
    Size(#[from] GrowthError),
    /// It is not open, so nobody needs it longer now.
    #[error("the disk is closed and waits for its guest: resize it when it runs")]
    Closed,
    /// Somebody else is at it.
    #[error("the disk is being resized already: try again when that is done")]
    Busy,
    /// It was opened at its old size again.
    #[error("the disk keeps its size")]
    Kept(#[source] DiskError),
    /// It could not be opened again, also not at its old size.
    #[error("the disk could not be opened again; the next start of a ring tries it again")]
    Suspended(#[from] SuspendError),
}

/// Gives the disk behind `device` the size of `bytes` bytes. Takes as long as draining, closing and
/// opening do; the guest waits meanwhile. On a thread that nobody waits for.
///
/// # Errors
/// [`ResizeError`]; the disk has its old size then, unless the record already said otherwise.
pub fn resize(disk: &Disk, device: &Device, bytes: u64) -> Result<Resized, ResizeError> {
    if !bytes.is_multiple_of(SECTOR_BYTES) {
        return Err(ResizeError::Unaligned { bytes });
    }
    let _turn = disk.turn_to_resize().ok_or(ResizeError::Busy)?;
    let growth = disk.growth_to(bytes / SECTOR_BYTES)?;
    if growth.is_some() {
        info!("the disk is resized to {bytes} bytes: the guest waits until that is done");
        let given_up = disk.given_up();
        let suspended = device.lifecycle().suspended(given_up, || ());
        let closed = disk.withdraw_growth();
        suspended?;
        if closed {
            // Its guest went elsewhere in the meantime.
            return Err(ResizeError::Closed);
        }
        let is_longer = disk.looks().sectors == bytes / SECTOR_BYTES;
        if let Some(refused) = disk.take_refusal().filter(|_| !is_longer) {
            return Err(ResizeError::Kept(refused));
        }
    }
    let told = match growth {
        Some(_) => device.line().config_changed(),
        None => Told::No,
    };
    info!(
        "the disk has {bytes} bytes{}",
        match told {
            Told::Yes => ", and the front-end was told",
            Told::No => "",
        }
    );
    Ok(Resized { bytes, told })
}
