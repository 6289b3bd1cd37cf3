// SPDX-License-Identifier: Apache-2.0
//! What a back-end left behind in the region of a queue, read as hostile input.

use thiserror::Error;

use super::QueueRegion;
use super::layout::{
    DESC_NUM_AT, FEATURES_AT, LAST_BATCH_HEAD_AT, USED_IDX_AT, VERSION, VERSION_AT, counter_at,
    mark_at, next_at,
};

/// Counters from here on are refused: nobody counts that far, and what is added to those below
/// never overflows.
const COUNTER_MAX: u64 = 1 << 63;

/// Why the region of a queue cannot be what a back-end has left. The queue stops.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum InflightFault {
    /// Features that are not known.
    #[error("in-flight region: unknown features {features:#x}")]
    Features {
        /// As read.
        features: u64,
    },
    /// Another version, or none with marks.
    #[error("in-flight region: unknown version {version}")]
    Version {
        /// As read.
        version: u16,
    },
    /// Not the number of descriptors that the buffer is for.
    #[error("in-flight region: for {got} descriptors, in a buffer for {expected}")]
    Descriptors {
        /// As read.
        got: u16,
        /// Of the buffer.
        expected: u16,
    },
    /// The queue is larger than its region.
    #[error("a queue of {size} has an in-flight region for {descriptors} descriptors")]
    Size {
        /// Size of the queue.
        size: u16,
        /// Of the region.
        descriptors: u16,
    },
    /// A mark that is neither set nor clear.
    #[error("in-flight region: the mark of head {head} is {mark}")]
    Mark {
        /// Which.
        head: u16,
        /// As read.
        mark: u8,
    },
    /// A mark of a descriptor that the queue does not have.
    #[error("in-flight region: head {head} is marked in a queue of {size}")]
    Head {
        /// Which.
        head: u16,
        /// Size of the queue.
        size: u16,
    },
    /// A counter nobody can have reached.
    #[error("in-flight region: the counter of head {head} is {counter}")]
    Counter {
        /// Which.
        head: u16,
        /// As read.
        counter: u64,
    },
    /// More published than the queue has descriptors.
    #[error("in-flight region: used index {recorded} is recorded, the driver sees {used}")]
    Used {
        /// As read.
        recorded: u16,
        /// In the used ring.
        used: u16,
    },
    /// The list of what was published last leads out of the queue.
    #[error(
        "in-flight region: the list of the last batch goes to head {head} in a queue of {size}"
    )]
    BatchHead {
        /// Where to.
        head: u16,
        /// Size of the queue.
        size: u16,
    },
    /// The list of what was published last is a circle.
    #[error("in-flight region: the list of the last batch comes to head {head} twice")]
    BatchCircle {
        /// Where it closes.
        head: u16,
    },
}

/// What was left behind.
#[derive(Debug)]
pub struct Left {
    /// Marked heads, in the order in which they were fetched.
    pub heads: Vec<u16>,
    /// The counter of the next request.
    pub counter_next: u64,
    /// Where the list of the last batch begins.
    pub last_batch_head: u16,
}

/// Reads the region of a queue of `size` whose driver sees the used index `used`, and finishes the
/// last publication if that was interrupted.
///
/// # Errors
/// If the region is impossible. It is left as it is.
pub fn recover(region: &QueueRegion, size: u16, used: u16) -> Result<Left, InflightFault> {
    let descriptors = region.descriptors();
    if size > descriptors {
        return Err(InflightFault::Size { size, descriptors });
    }
    let mut marked = read_marks(region, size)?;
    let fresh = check_header(region, &marked)?;
    if fresh {
        begin(region, used);
    } else if !marked.is_empty() {
        // Without marks there is nothing that could be wrong with them, whatever the list says:
        // the buffer may have rested while another back-end used the rings.
        let recorded = region.load(USED_IDX_AT);
        let published = read_batch(region, size, recorded, used)?;
        for &head in &published {
            region.store(mark_at(head), 0u8);
        }
        marked.retain(|(_, head)| !published.contains(head));
    }
    region.store(USED_IDX_AT, used);
    // Equal counters are no back-end's; what was in flight together has no order the guest could
    // rely on, so any will do, if only it is the same each time.
    marked.sort_unstable();
    Ok(Left {
        counter_next: marked.last().map_or(0, |&(counter, _)| counter + 1),
        heads: marked.into_iter().map(|(_, head)| head).collect(),
        last_batch_head: region.load(LAST_BATCH_HEAD_AT),
    })
}

/// Marked heads with their counters.
fn read_marks(region: &QueueRegion, size: u16) -> Result<Vec<(u64, u16)>, InflightFault> {
    let mut marked = Vec::new();
    for head in 0..region.descriptors() {
        let mark: u8 = region.load(mark_at(head));
        match mark {
            0 => continue,
            1 if head < size => {}
            1 => return Err(InflightFault::Head { head, size }),
            mark => return Err(InflightFault::Mark { head, mark }),
        }
        let counter: u64 = region.load(counter_at(head));
        if counter >= COUNTER_MAX {
            return Err(InflightFault::Counter { head, counter });
        }
        marked.push((counter, head));
    }
    Ok(marked)
}

/// Returns whether the region was never used: its version is written last when it is begun.
fn check_header(region: &QueueRegion, marked: &[(u64, u16)]) -> Result<bool, InflightFault> {
    let features: u64 = region.load(FEATURES_AT);
    if features != 0 {
        return Err(InflightFault::Features { features });
    }
    let version: u16 = region.load(VERSION_AT);
    if version == 0 && marked.is_empty() {
        return Ok(true);
    }
    if version != VERSION {
        return Err(InflightFault::Version { version });
    }
    let got = region.load(DESC_NUM_AT);
    let expected = region.descriptors();
    if got != expected {
        return Err(InflightFault::Descriptors { got, expected });
    }
    Ok(false)
}

fn begin(region: &QueueRegion, used: u16) {
    region.store(DESC_NUM_AT, region.descriptors());
    region.store(LAST_BATCH_HEAD_AT, 0u16);
    region.store(USED_IDX_AT, used);
    region.store(VERSION_AT, VERSION);
}

/// Heads that the driver has seen published while their marks may still be set: as many of the
/// list as the used index is ahead.
fn read_batch(
    region: &QueueRegion,
    size: u16,
    recorded: u16,
    used: u16,
) -> Result<Vec<u16>, InflightFault> {
    let count = used.wrapping_sub(recorded);
    if count > size {
        return Err(InflightFault::Used { recorded, used });
    }
    let mut heads = Vec::with_capacity(usize::from(count));
    let mut seen = vec![false; usize::from(size)];
    let mut next = LAST_BATCH_HEAD_AT;
    for _ in 0..count {
        let head: u16 = region.load(next);
        match seen.get_mut(usize::from(head)) {
            Some(seen @ false) => *seen = true,
            Some(true) => return Err(InflightFault::BatchCircle { head }),
            None => return Err(InflightFault::BatchHead { head, size }),
        }
        heads.push(head);
        next = next_at(head);
    }
    Ok(heads)
}
