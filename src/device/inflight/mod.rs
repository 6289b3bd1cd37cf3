// SPDX-License-Identifier: Apache-2.0
//! What is in flight, remembered by the front-end: a buffer of its memory in which every request
//! is marked from the moment it is fetched until the guest has seen its end (rules Q1, Q2). A
//! back-end that was killed leaves the marks behind; the next one executes what is marked again.
//!
//! The front-end can write anything to the buffer at any time. What is in it is read once, when a
//! queue starts, and checked; afterwards the queue keeps its own account and only writes.
//!
//! - [`layout`]: where things are. [`mapping`]: the shared memory, and the order of stores.
//! - [`page`]: our private page, which tells whose buffer it is.
//! - [`marks`]: the marks of one running queue. [`recovery`]: reading what was left behind.

#[cfg(test)]
pub mod crash;
pub mod layout;
mod mapping;
pub mod marks;
mod page;
pub mod recovery;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use thiserror::Error;
use tracing::info;

use super::disk::{Began, DiskIdentity};
pub use layout::{Description, Shape};
use mapping::Mapping;
pub use marks::Marks;
use page::Page;
pub use recovery::InflightFault;

/// A buffer that is not taken from a front-end. It costs the front-end the connection.
#[derive(Debug, Error)]
pub enum InflightError {
    /// Impossible number of queues, or of descriptors.
    #[error(
        "an in-flight buffer for {queues} queues of {queue_size} is not possible; the device has \
         {queues_max} queues of up to {queue_size_max}"
    )]
    Shape {
        /// As in the message.
        queues: u16,
        /// As in the message.
        queue_size: u16,
        /// Queues of the device.
        queues_max: u16,
        /// Largest queue size.
        queue_size_max: u16,
    },
    /// Too short for its queues.
    #[error("an in-flight buffer of {size} bytes is too short; its queues need {needed}")]
    Size {
        /// As in the message.
        size: u64,
        /// For the regions of all its queues.
        needed: u64,
    },
    /// It begins where nothing can be mapped.
    #[error("an in-flight buffer at byte {offset} of its file does not begin at a page")]
    Offset {
        /// As in the message.
        offset: u64,
    },
    /// It ends beyond the end of its file.
    #[error(
        "an in-flight buffer of {size} bytes at byte {offset} does not fit in its file of {file_len}"
    )]
    Short {
        /// As in the message.
        offset: u64,
        /// As in the message.
        size: u64,
        /// Length of the file in bytes.
        file_len: u64,
    },
    /// Its descriptor is of something that has no length.
    #[error("the descriptor of an in-flight buffer is no regular file")]
    NoFile,
    /// Made for other queues than the front-end says: its marks would be misread.
    #[error(
        "the front-end hands in an in-flight buffer for {} queues of {} that was made for {} of {}",
        .described.queues, .described.queue_size, .made.queues, .made.queue_size
    )]
    OtherShape {
        /// As in the message.
        described: Shape,
        /// As in its private page.
        made: Shape,
    },
    /// Made for another disk: its requests must not be executed on this one.
    #[error(
        "the front-end hands in what was in flight on another disk ({theirs:032x}; this one is \
         {ours:032x}): it was connected to the socket of that disk before; connect it to that one \
         again, or restart the guest",
        theirs = u128::from_be_bytes(*.theirs), ours = u128::from_be_bytes(*.ours)
    )]
    OtherDisk {
        /// UUID in the private page.
        theirs: [u8; 16],
        /// UUID of the disk that is served.
        ours: [u8; 16],
    },
    /// No new buffer can be made.
    #[error("no memory for an in-flight buffer")]
    Create(#[source] io::Error),
    /// The file cannot be looked at.
    #[error("the file of an in-flight buffer cannot be examined")]
    Examine(#[source] io::Error),
    /// It cannot be mapped.
    #[error("an in-flight buffer cannot be mapped")]
    Map(#[source] io::Error),
}

/// A buffer that a front-end has handed in. Shared by the queues that are marked in it.
#[derive(Debug)]
pub struct InflightBuffer {
    mapping: Mapping,
    shape: Shape,
    /// Where our page is, if there is room for one.
    page_at: Option<usize>,
    /// What our page said when the buffer came, or what we have written since; `None`: there is
    /// none.
    page: Mutex<Option<Page>>,
}

/// Checks that a device of `queues` queues can have such a buffer.
fn check_shape(shape: Shape, queues: u16) -> Result<(), InflightError> {
    if shape.is_possible(queues) {
        return Ok(());
    }
    Err(InflightError::Shape {
        queues: shape.queues,
        queue_size: shape.queue_size,
        queues_max: queues,
        queue_size_max: super::config_space::QUEUE_SIZE_MAX,
    })
}

/// A new buffer for GET_INFLIGHT_FD, on which nothing is in flight. It counts when the front-end
/// hands it in. `queues` are those of the device.
///
/// # Errors
/// If the shape is impossible or there is no memory.
pub fn create(
    shape: Shape,
    queues: u16,
    disk: DiskIdentity,
) -> Result<(Description, OwnedFd), InflightError> {
    check_shape(shape, queues)?;
    let len = shape.buffer_bytes();
    let size = len as u64;
    let file = mapping::create_file(len).map_err(InflightError::Create)?;
    let copy = file.try_clone().map_err(InflightError::Create)?;
    let page = Page {
        shape,
        uuid: disk.uuid,
        // Marked when a ring is started with it: until then nobody need know of it.
        run: [0; 16],
    };
    page.write(&Mapping::new(copy, 0, size, len)?, len - layout::PAGE_BYTES);
    let description = Description {
        size,
        offset: 0,
        shape,
    };
    Ok((description, file))
}

impl InflightBuffer {
    /// A buffer that came with SET_INFLIGHT_FD, for a device of `queues` queues.
    ///
    /// # Errors
    /// If it is impossible, or was made for something else.
    pub fn open(
        file: OwnedFd,
        description: Description,
        queues: u16,
        disk: DiskIdentity,
    ) -> Result<Self, InflightError> {
        let Description {
            size,
            offset,
            shape,
        } = description;
        check_shape(shape, queues)?;
        let needed = shape.regions_bytes() as u64;
        if size < needed {
            return Err(InflightError::Size { size, needed });
        }
        // A buffer that another back-end has made has no page of ours, and maybe no room for one.
        let page_at = shape.page_of(size);
        let len = match page_at {
            Some(at) => at + layout::PAGE_BYTES,
            None => shape.regions_bytes(),
        };
        let mapping = Mapping::new(file, offset, size, len)?;
        let page = page_at.and_then(|at| Page::read(&mapping, at));
        if let Some(page) = page {
            if page.shape != shape {
                return Err(InflightError::OtherShape {
                    described: shape,
                    made: page.shape,
                });
            }
        } else {
            info!("the in-flight buffer was made by another back-end, or is damaged");
        }
        let buffer = Self {
            mapping,
            shape,
            page_at,
            page: Mutex::new(page),
        };
        buffer.began(disk)?;
        Ok(buffer)
    }

    /// How `disk` begins with this buffer: warm if it was the last that was used with it.
    ///
    /// # Errors
    /// If it was made for another disk.
    pub fn began(&self, disk: DiskIdentity) -> Result<Began, InflightError> {
        let page = *self.page();
        match page {
            Some(page) if page.is_of_another(disk) => Err(InflightError::OtherDisk {
                theirs: page.uuid,
                ours: disk.uuid,
            }),
            Some(page) if page.is_of_last_run(disk) => Ok(Began::Warm),
            Some(_) | None => Ok(Began::Cold),
        }
    }

    /// Marks the buffer as that of this run, if it has our page. Once what follows from
    /// [`InflightBuffer::began`] is durable, and before a ring starts with it.
    pub fn stamp(&self, disk: DiskIdentity) {
        let new = Page {
            shape: self.shape,
            uuid: disk.uuid,
            run: disk.run,
        };
        let mut page = self.page();
        if let (Some(at), Some(old)) = (self.page_at, *page)
            && old != new
        {
            new.write(&self.mapping, at);
            *page = Some(new);
        }
    }

    fn page(&self) -> MutexGuard<'_, Option<Page>> {
        self.page.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The part of queue `queue`; `None` if the buffer is for fewer.
    #[must_use]
    pub fn region(self: &Arc<Self>, queue: u16) -> Option<QueueRegion> {
        (queue < self.shape.queues).then(|| QueueRegion {
            buffer: Arc::clone(self),
            at: self.shape.region_bytes() * usize::from(queue),
        })
    }
}

/// The part of a buffer that belongs to one queue.
#[derive(Clone, Debug)]
pub struct QueueRegion {
    buffer: Arc<InflightBuffer>,
    /// Where it begins.
    at: usize,
}

impl QueueRegion {
    /// Descriptors for which there is room.
    #[must_use]
    pub fn descriptors(&self) -> u16 {
        self.buffer.shape.queue_size
    }

    /// Takes all marks away: the driver has reset the device, and no queue uses the region.
    pub fn forget(&self) {
        for head in 0..self.descriptors() {
            self.store(layout::mark_at(head), 0u8);
        }
    }

    /// Whether `head` is marked, as the region stands.
    #[cfg(test)]
    pub fn is_marked(&self, head: u16) -> bool {
        self.load::<u8>(layout::mark_at(head)) != 0
    }

    fn load<T: vm_memory::AtomicAccess>(&self, at: usize) -> T {
        self.buffer.mapping.load(self.at + at)
    }

    fn store<T: vm_memory::AtomicAccess>(&self, at: usize, value: T) {
        self.buffer.mapping.store(self.at + at, value);
    }
}

#[cfg(test)]
mod tests;
