// SPDX-License-Identifier: Apache-2.0
//! Keeps the copies of the record up to date: a state machine without I/O.
//!
//! One *job* at a time: pages that changed, or a new superblock, or both. Every copy is brought
//! to the same state on its own: first the pages it lacks, then the superblock. A copy that has
//! all is *level*; the job is done, and what it holds is durable, when enough copies are level
//! (rule R1). A copy that is not level then goes on at its own pace and is given the newest image
//! of what it lacks.
//!
//! A new epoch takes two superblocks: one with the epoch, and when that is durable one that says
//! so ([`lineage`](super::lineage)). Because pages go before the superblock, a copy that shows an
//! epoch has whatever was durable when the epoch began. Opening depends on both.

use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;

pub use super::copies::WriteId;
use super::copies::{Copy, Standing};
use super::error::Refusal;
use super::history::History;
use super::layout::{Block, Layout};
use super::merge::MergedPages;
#[cfg(test)]
use super::mutation::RecordMutation;
use super::opened::Opened;
use super::superblock::Superblock;
use crate::quorum::{Marks, PageName};
use crate::units::Time;

/// A write to a copy that takes longer than this excludes the copy, if the others suffice.
pub const RECORD_WRITE_LIMIT: Duration = Duration::from_secs(5);

/// A write that takes longer than this excludes the copy even if the others do not suffice: the
/// record is lost then, and requests fail rather than wait for ever.
pub const RECORD_HANG_LIMIT: Duration = Duration::from_secs(30);

/// Clears that nothing follows are written after this time.
pub const RECORD_CLEAR_DELAY: Duration = Duration::from_secs(1);

/// How long new pages wait for the last writes to a copy that returns. Without that pause a copy
/// would never get ready under load; with a longer one a copy that hangs would hold up the guest.
pub const RECORD_JOIN_PAUSE: Duration = Duration::from_millis(500);

/// Blocks kept for the next images.
const SPARE_BLOCKS_MAX: usize = 64;

/// Numbers a change of the superblock.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ChangeId(u64);

/// What the recorder is told.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RecordEvent {
    /// Marks may wait, or a change was asked for.
    Poll,
    /// A write ended, with this errno if it failed. A short write has failed.
    Written {
        /// Place of the copy in the configuration.
        copy: u8,
        /// Which write.
        write: WriteId,
        /// What the system said.
        errno: Option<i32>,
    },
    /// The [deadline](Recorder::deadline) has come.
    Tick,
}

/// What the recorder wants done.
#[derive(Clone, Debug)]
pub enum RecordAction {
    /// Write a block to a copy, through to the medium (rule R2), and tell how it went. Writes to
    /// one copy may be done in any order and at the same time.
    Write {
        /// Place of the copy in the configuration.
        copy: u8,
        /// For the answer.
        write: WriteId,
        /// Which block of the copy.
        block: u64,
        /// What to write.
        bytes: Arc<Block>,
    },
    /// More marks are durable: whoever waits for some must look again.
    Settled,
    /// This change of the superblock is durable.
    Changed(ChangeId),
    /// The copy is not written any more. It must be written no more by anybody until
    /// [`Recorder::readmit`].
    Excluded {
        /// Place of the copy in the configuration.
        copy: u8,
        /// What the system said; none if a write took too long.
        errno: Option<i32>,
        /// It took part. If not it was on its way back, and nothing has changed.
        took_part: bool,
    },
    /// A copy that was left out has been written whole: it takes part again.
    Returned {
        /// Place of the copy in the configuration.
        copy: u8,
    },
    /// Too few copies are left: no new mark will become durable (rule R1).
    Lost,
    /// Enough copies are back.
    Regained,
}

/// Why the recorder does not do something.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum RecorderError {
    /// Too few copies can be written.
    #[error(
        "only {writable} copies of the state record can be written, {needed} are needed: look at \
         the permissions and the free space beside the others"
    )]
    TooFew {
        /// Copies that can be written.
        writable: usize,
        /// How many it takes.
        needed: usize,
    },
    /// The copy is in use.
    #[error("the copy of the state record is in use already")]
    InUse,
    /// A write to the copy that began before it was excluded has not ended.
    #[error("a write to the copy of the state record is still under way: try again later")]
    Busy,
    /// There is something in the place of the copy that is no state record, or a damaged one.
    #[error(
        "what is in the place of {copy} cannot be used ({why}): if nothing else is in it, remove \
         it, and the copy is made anew"
    )]
    Unusable {
        /// Name of the copy.
        copy: String,
        /// What is wrong with it.
        why: String,
    },
    /// What is in the place of the copy must not be overwritten.
    #[error(transparent)]
    Refused(#[from] Refusal),
}

mod feed;
mod jobs;
mod standing;

/// How far the record is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    /// It is being written for the first time. All copies are needed, and nothing depends on it.
    Creating,
    /// The epoch of this run has yet to begin.
    Opening,
    /// It has.
    Serving,
}

/// What is being made durable.
#[derive(Default)]
struct Job {
    /// Pages and their images. A copy that lacks one of them is given this image and no newer
    /// one: what is told durable must be on the copies that are counted.
    images: Vec<(usize, Arc<Block>)>,
    /// Pages that are as they were merged at the opening.
    merged: Vec<usize>,
    /// Marks that are durable afterwards.
    number: Option<u64>,
    /// Changes that are durable afterwards.
    changes: Vec<ChangeId>,
}

/// Keeps the copies up to date.
pub struct Recorder {
    /// What the copies are to hold: what is durable, or is being written.
    wanted: Superblock,
    /// The same with the changes that wait.
    next: Superblock,
    changes: Vec<ChangeId>,
    change_last: u64,
    /// The pages that had changed when the changes were asked for are written.
    pages_precede: bool,
    run: [u8; 16],
    stage: Stage,
    layout: Layout,
    /// Names of the pages by number.
    names: Vec<PageName>,
    slots: usize,
    /// Of the newest image of each page.
    sequences: Vec<u64>,
    /// What the copies held at the opening, until the epoch has begun.
    merged: Option<MergedPages>,
    /// What the copies knew at the opening.
    known: Option<History>,
    /// The largest epoch and sequence of a superblock that were met or given.
    epoch_max: u64,
    sequence_max: u64,
    forced: bool,
    copies: Vec<Copy>,
    job: Option<Job>,
    lost: bool,
    write_last: u64,
    /// Marks that were in the images so far.
    collected: u64,
    clears_since: Option<Time>,
    /// Nothing new is begun before this, see [`RECORD_JOIN_PAUSE`].
    paused_until: Option<Time>,
    touched: Vec<PageName>,
    spare: Vec<Arc<Block>>,
    /// A rule that this build breaks on purpose.
    #[cfg(test)]
    pub mutation: Option<RecordMutation>,
}

impl Recorder {
    /// Goes on from an opening. `writable` says of each place whether there is a file of the right
    /// length that can be written now; what was missing or could not be opened must have been
    /// created anew, full of zeroes. `run` are random bytes of this run.
    ///
    /// Nothing is written before the first event. [`Recorder::opening`] is then the change that
    /// begins the epoch of this run (rule R7); what [`Recorder::change`] is told before the first
    /// event takes part in it. Until it is durable nothing may be written to a replica.
    ///
    /// # Errors
    /// If too few copies can be written.
    pub fn new(opened: Opened, writable: &[bool], run: [u8; 16]) -> Result<Self, RecorderError> {
        let pages = opened.pages;
        let names: Vec<PageName> = pages.names().collect();
        let mut copies = Vec::with_capacity(opened.copies.len());
        for (copy, &writable) in opened.copies.into_iter().zip(writable) {
            let standing = if writable {
                Standing::Good
            } else {
                Standing::Out
            };
            let mut state = Copy::new(copy.index, standing, copy.slots, copy.superblock_slot);
            for (number, matches) in copy.matches.iter().enumerate() {
                if writable && !matches {
                    state.missing.insert(number);
                }
            }
            copies.push(state);
        }
        let good = copies.iter().filter(|copy| copy.standing == Standing::Good);
        let good = good.count();
        let needed = match (opened.fresh, opened.force) {
            (true, _) => copies.len(),
            (false, true) => 1,
            (false, false) => copies.len() / 2 + 1,
        };
        if good < needed {
            let writable = good;
            return Err(RecorderError::TooFew { writable, needed });
        }
        let wanted = opened.superblock;
        Ok(Self {
            next: wanted.clone(),
            changes: vec![ChangeId(0)],
            change_last: 0,
            pages_precede: false,
            run,
            stage: if opened.fresh {
                Stage::Creating
            } else {
                Stage::Opening
            },
            layout: wanted.layout(),
            slots: wanted.slots(),
            names,
            sequences: pages.sequences().to_vec(),
            merged: Some(pages),
            sequence_max: wanted.sequence.max(opened.sequence_max),
            epoch_max: opened.known.newest().epoch,
            known: (!opened.fresh).then_some(opened.known),
            forced: good <= copies.len() / 2,
            copies,
            wanted,
            job: None,
            lost: false,
            write_last: 0,
            collected: 0,
            clears_since: None,
            paused_until: None,
            touched: Vec::new(),
            spare: Vec::new(),
            #[cfg(test)]
            mutation: None,
        })
    }

    /// The change that begins the epoch of this run.
    #[must_use]
    pub fn opening(&self) -> ChangeId {
        ChangeId(0)
    }

    /// What the record says, or will when all that was asked for is done.
    #[must_use]
    pub fn superblock(&self) -> &Superblock {
        &self.next
    }

    /// Whether too few copies are left to make anything durable.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.lost
    }

    /// What part the copies play, in their order.
    pub fn standings(&self) -> impl Iterator<Item = Standing> {
        self.copies.iter().map(|copy| copy.standing)
    }

    /// Whether the copy in this place takes part.
    #[must_use]
    pub fn is_good(&self, copy: u8) -> bool {
        let copy = self.copies.get(usize::from(copy));
        copy.is_some_and(|copy| copy.standing == Standing::Good)
    }

    /// Whether nothing is being written and nothing waits to be, but for clears.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.job.is_none() && self.changes.is_empty() && self.copies.iter().all(Copy::is_idle)
    }

    /// Changes the superblock: at the next opportunity, after the pages that have changed up to
    /// now. What the record manages itself (epoch, sequence, copies) and the shape of the disk
    /// stay. If N, T or who the members are changes, the epoch rises (rule R7). Poll afterwards.
    ///
    /// # Panics
    /// If the outcome is impossible, or has a member in a slot for which there is no map.
    pub fn change(&mut self, change: impl FnOnce(&mut Superblock)) -> ChangeId {
        let mut next = self.next.clone();
        change(&mut next);
        let managed = &self.next;
        next = Superblock {
            disk: managed.disk,
            copy_index: managed.copy_index,
            copies: managed.copies,
            included: managed.included,
            sequence: managed.sequence,
            sectors: managed.sectors,
            extent_shift: managed.extent_shift,
            block_sectors: managed.block_sectors,
            forced: managed.forced,
            history: managed.history,
            growing: managed.growing,
            ..next
        };
        next.check().expect("a superblock that can be");
        assert!(next.slots() <= self.slots, "every member has a map");
        self.next = next;
        self.note_change()
    }

    /// `next` was changed.
    fn note_change(&mut self) -> ChangeId {
        self.pages_precede = false;
        self.change_last += 1;
        let id = ChangeId(self.change_last);
        self.changes.push(id);
        id
    }

    /// When to send a [`RecordEvent::Tick`] if nothing else happens before.
    #[must_use]
    pub fn deadline(&self) -> Option<Time> {
        let late = |place: usize| {
            let busy = self.copies[place].busy_since()?;
            Some(busy.after(self.patience(place)?))
        };
        let late = (0..self.copies.len()).filter_map(late).min();
        let clears = self
            .clears_since
            .filter(|_| self.job.is_none() && !self.lost);
        let clears = clears.map(|since| since.after(RECORD_CLEAR_DELAY));
        let paused = self.paused_until.filter(|_| !self.lost);
        late.into_iter().chain(clears).chain(paused).min()
    }

    /// Takes an event in and appends what is to be done.
    pub fn handle(
        &mut self,
        now: Time,
        event: RecordEvent,
        marks: &Marks,
        actions: &mut Vec<RecordAction>,
    ) {
        if let RecordEvent::Written { copy, write, errno } = event {
            let place = usize::from(copy);
            let known = self.copies.get_mut(place);
            let ours = known.is_some_and(|copy| copy.end(write, errno.is_none()));
            assert!(ours, "an answer to a write of ours");
            if errno.is_some() {
                self.exclude(place, errno, actions);
            }
        }
        loop {
            let finished = self.finish_job(marks, actions);
            self.exclude_late(now, actions);
            let started = self.start_job(now, marks, actions);
            if !finished && !started {
                break;
            }
        }
        for place in 0..self.copies.len() {
            self.feed(place, now, marks, actions);
        }
    }
}
