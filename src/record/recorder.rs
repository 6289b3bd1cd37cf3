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
use super::copies::{Copy, PageSet, Standing, Target, WRITES_PER_COPY_MAX};
use super::error::Refusal;
use super::heads::read_heads;
use super::history::{EpochEntry, EpochId, History};
use super::layout::{BLOCK_BYTES, Block, Layout, Slot};
use super::member::MemberState;
use super::merge::{MergedPages, survey};
#[cfg(test)]
use super::mutation::RecordMutation;
use super::mutation::broken;
use super::opened::Opened;
use super::opening::{ReadBlock, check_numbers};
use super::page::{decode_bits, encode_into};
use super::superblock::{FIRST_EPOCH, Superblock};
use crate::quorum::{Marks, PAGE_WORDS, PageBits, PageName};
use crate::units::Time;

/// A write to a copy that takes longer than this excludes the copy, if the others suffice.
pub const RECORD_WRITE_LIMIT: Duration = Duration::from_secs(5);

/// Clears that nothing follows are written after this time.
pub const RECORD_CLEAR_DELAY: Duration = Duration::from_secs(1);

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
    /// What is in the place of the copy must not be overwritten.
    #[error(transparent)]
    Refused(#[from] Refusal),
}

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
    touched: Vec<PageName>,
    spare: Vec<Arc<Block>>,
    /// A rule that this build breaks on purpose.
    #[cfg(test)]
    pub mutation: Option<RecordMutation>,
}

impl Recorder {
    /// Goes on from an opening. `writable` says of each place whether there is a file of the right
    /// length that can be written now; files that were missing must have been created, full of
    /// zeroes. `run` are random bytes of this run.
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
            ..next
        };
        next.check().expect("a superblock that can be");
        assert!(next.slots() <= self.slots, "every member has a map");
        self.next = next;
        self.pages_precede = false;
        self.change_last += 1;
        let id = ChangeId(self.change_last);
        self.changes.push(id);
        id
    }

    /// Takes an excluded copy back: it is written whole, then an epoch with it begins. `reader`
    /// reads what is in its place: the old file, or one of the right length full of zeroes. Poll
    /// afterwards.
    ///
    /// # Errors
    /// If the copy is in use, an old write to it has not ended, or what is there belongs to
    /// another disk or to a life this record knows nothing of.
    pub fn readmit<R: ReadBlock>(
        &mut self,
        copy: u8,
        name: &str,
        reader: &mut R,
    ) -> Result<(), RecorderError> {
        let place = usize::from(copy);
        let out = |copy: &&Copy| copy.standing == Standing::Out;
        let Some(copy) = self.copies.get(place).filter(out) else {
            return Err(RecorderError::InUse);
        };
        if self.stage != Stage::Serving {
            return Err(RecorderError::InUse);
        }
        if !copy.is_idle() {
            return Err(RecorderError::Busy);
        }
        // Even what cannot be used must be older than what is written over it.
        let mut superblock_slot = Slot::A;
        let (mut epoch, mut sequence) = (0, 0);
        if let Ok(heads) = read_heads(name, reader)? {
            superblock_slot = heads.next_slot();
            if let Some(newest) = heads.newest() {
                check_return(name, newest, &self.wanted)?;
                (epoch, sequence) = (newest.epoch(), newest.sequence);
            }
        }
        let survey = survey(reader, &self.wanted);
        let pages = survey.sequences.iter().copied().max();
        check_numbers(epoch.max(sequence).max(pages.unwrap_or(0)))?;
        self.epoch_max = self.epoch_max.max(epoch);
        self.sequence_max = self.sequence_max.max(sequence);
        for (own, found) in self.sequences.iter_mut().zip(survey.sequences) {
            *own = found.max(*own);
        }
        self.copies[place].join(survey.slots, superblock_slot);
        Ok(())
    }

    /// When to send a [`RecordEvent::Tick`] if nothing else happens before.
    #[must_use]
    pub fn deadline(&self) -> Option<Time> {
        let late = |place: usize| {
            let busy = self.copies[place].busy_since()?;
            self.can_spare(place)
                .then(|| busy.after(RECORD_WRITE_LIMIT))
        };
        let late = (0..self.copies.len()).filter_map(late).min();
        let clears = self
            .clears_since
            .filter(|_| self.job.is_none() && !self.lost);
        let clears = clears.map(|since| since.after(RECORD_CLEAR_DELAY));
        late.into_iter().chain(clears).min()
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

    /// Copies it takes for a job.
    fn needed(&self) -> usize {
        if broken!(self, OneCopyIsEnough) {
            return 1;
        }
        match self.stage {
            Stage::Creating => self.copies.len(),
            Stage::Opening | Stage::Serving => self.wanted.needed(),
        }
    }

    fn level(&self) -> impl Iterator<Item = usize> {
        let sequence = self.wanted.sequence;
        (0..self.copies.len()).filter(move |&place| self.copies[place].is_level(sequence))
    }

    /// The copies that take part, as in a superblock.
    fn good(&self) -> u8 {
        let good = self.copies.iter().filter(|c| c.standing == Standing::Good);
        good.map(|copy| 1 << copy.index).sum()
    }

    /// Whether the copy in this place can be left out if it is late.
    fn can_spare(&self, place: usize) -> bool {
        match self.copies[place].standing {
            Standing::Joining => true,
            Standing::Out => false,
            Standing::Good => {
                self.stage == Stage::Creating
                    || self.level().filter(|&other| other != place).count() >= self.needed()
            }
        }
    }

    fn exclude_late(&mut self, now: Time, actions: &mut Vec<RecordAction>) {
        for place in 0..self.copies.len() {
            let busy = self.copies[place].busy_since();
            let late = busy.is_some_and(|busy| now.since(busy) >= RECORD_WRITE_LIMIT);
            if late && self.can_spare(place) {
                self.exclude(place, None, actions);
            }
        }
    }

    /// Leaves a copy out. If it took part, the epoch rises on the others, and nothing counts that
    /// is not in it (rule R1).
    fn exclude(&mut self, place: usize, errno: Option<i32>, actions: &mut Vec<RecordAction>) {
        let standing = self.copies[place].standing;
        if standing == Standing::Out {
            return;
        }
        self.copies[place].leave();
        let copy = u8::try_from(place).expect("at most 5 copies");
        actions.push(RecordAction::Excluded { copy, errno });
        if standing == Standing::Joining || self.lost {
            return;
        }
        if (self.good().count_ones() as usize) < self.needed() {
            self.lost = true;
            actions.push(RecordAction::Lost);
            return;
        }
        let content = self.wanted.clone();
        self.want(content, true);
        self.job.get_or_insert_default();
    }

    /// The copies are to hold `content`, in a new epoch or the same.
    fn want(&mut self, mut content: Superblock, raise: bool) {
        self.sequence_max += 1;
        content.sequence = self.sequence_max;
        content.included = self.good();
        // Each copy is given its own index; this one is of any that takes part.
        content.copy_index = u8::try_from(content.included.trailing_zeros()).unwrap_or(0);
        content.forced = self.forced && content.included.count_ones() < self.majority();
        if raise && !broken!(self, EpochNotRaised) {
            self.epoch_max += 1;
            content.history.push(self.entry(content.forced));
        } else {
            content.forced = self.wanted.forced;
        }
        // What waits is not written yet, but goes on from here.
        self.next.sequence = content.sequence;
        self.next.included = content.included;
        self.next.copy_index = content.copy_index;
        self.next.forced = content.forced;
        self.next.history = content.history;
        self.wanted = content;
    }

    fn majority(&self) -> u32 {
        u32::from(self.wanted.copies) / 2 + 1
    }

    fn entry(&self, forced: bool) -> EpochEntry {
        EpochEntry {
            epoch: self.epoch_max,
            id: EpochId::derive(self.run, self.epoch_max),
            forced,
            begun: false,
        }
    }

    /// Returns whether the job is done now.
    fn finish_job(&mut self, marks: &Marks, actions: &mut Vec<RecordAction>) -> bool {
        if self.job.is_none() || self.lost || self.level().count() < self.needed() {
            return false;
        }
        if self.stage != Stage::Creating && !self.wanted.history.newest().begun {
            // Enough copies hold the new epoch. Before anything depends on it they say so.
            let mut content = self.wanted.clone();
            content.history.begin();
            self.want(content, false);
            return false;
        }
        let job = self.job.take().expect("looked a moment ago");
        for &number in &job.merged {
            let merged = self.merged.as_ref().expect("kept until the epoch begins");
            let name = self.names[number];
            marks.made_durable(name, merged.bits(name));
        }
        let mut bits = [0; PAGE_WORDS];
        for (number, image) in job.images {
            decode_bits(&image, |word, value| bits[word] = value);
            marks.made_durable(self.names[number], &bits);
            if self.spare.len() < SPARE_BLOCKS_MAX {
                self.spare.push(image);
            }
        }
        if let Some(number) = job.number {
            marks.settle(number);
            actions.push(RecordAction::Settled);
        }
        match self.stage {
            Stage::Creating => self.stage = Stage::Opening,
            Stage::Opening => {
                self.stage = Stage::Serving;
                self.merged = None;
            }
            Stage::Serving => {}
        }
        actions.extend(job.changes.into_iter().map(RecordAction::Changed));
        true
    }

    /// Begins what is due, if nothing is being done. Returns whether a job began.
    fn start_job(&mut self, now: Time, marks: &Marks, actions: &mut Vec<RecordAction>) -> bool {
        if self.take_in(actions) {
            return true;
        }
        if self.job.is_some() || self.lost {
            return false;
        }
        match self.stage {
            Stage::Creating => self.create(marks),
            Stage::Opening => self.begin_epoch(marks, actions),
            Stage::Serving => return self.serve(now, marks, actions),
        }
        true
    }

    /// Copies that have been written whole take part from a new epoch on.
    fn take_in(&mut self, actions: &mut Vec<RecordAction>) -> bool {
        let joined = self.copies.iter().filter(|copy| copy.has_joined()).count();
        let together = self.good().count_ones() as usize + joined;
        let possible = if self.lost {
            together >= self.wanted.needed()
        } else {
            self.job.is_none()
        };
        if joined == 0 || !possible {
            return false;
        }
        for copy in &mut self.copies {
            if copy.has_joined() {
                copy.standing = Standing::Good;
            }
        }
        let content = self.wanted.clone();
        self.want(content, true);
        self.job.get_or_insert_default();
        if std::mem::take(&mut self.lost) {
            actions.push(RecordAction::Regained);
        }
        true
    }

    /// All pages and the first superblock, on all copies.
    fn create(&mut self, marks: &Marks) {
        let mut job = Job::default();
        for number in 0..self.names.len() {
            let image = self.image(number, marks);
            job.images.push((number, image));
        }
        self.epoch_max = FIRST_EPOCH;
        let mut content = self.next.clone();
        content.history = History::new(self.entry(false));
        self.want(content, false);
        self.job = Some(job);
    }

    /// The copies become equal, and the epoch of this run begins.
    fn begin_epoch(&mut self, marks: &Marks, actions: &mut Vec<RecordAction>) {
        let number = self.collect(marks);
        let touched = std::mem::take(&mut self.touched);
        let mut to_write = PageSet::EMPTY;
        for copy in &self.copies {
            (0..self.names.len())
                .filter(|&number| copy.missing.contains(number))
                .for_each(|number| to_write.insert(number));
        }
        let merged = self.merged.take().expect("kept until the epoch begins");
        let mut job = Job {
            number: Some(number),
            changes: std::mem::take(&mut self.changes),
            ..Job::default()
        };
        let mut bits = [0; PAGE_WORDS];
        for &name in &touched {
            let page = self.layout.number(name, self.slots);
            marks.copy_page(name, &mut bits);
            if bits != *merged.bits(name) {
                to_write.insert(page);
                self.all_lack(page);
            } else if !to_write.contains(page) {
                job.merged.push(page);
            }
        }
        while let Some(page) = to_write.pop() {
            let image = self.image(page, marks);
            job.images.push((page, image));
        }
        self.merged = Some(merged);
        self.touched = touched;
        let mut content = self.next.clone();
        content.clean = false;
        if let Some(known) = self.known.take() {
            content.history = known;
        }
        self.next.clean = false;
        self.want(content, true);
        self.submitted(&job, marks, actions);
        self.job = Some(job);
    }

    /// Pages that were touched, or a superblock.
    fn serve(&mut self, now: Time, marks: &Marks, actions: &mut Vec<RecordAction>) -> bool {
        let nearly_joined = |c: &Copy| c.standing == Standing::Joining && c.missing.is_empty();
        if self.copies.iter().any(nearly_joined) {
            // Its last writes end soon or it is late. With new pages it would never get ready.
            return false;
        }
        let touched = marks.is_touched();
        if !self.changes.is_empty() && (self.pages_precede || !touched) {
            self.begin_change();
            return true;
        }
        let asked = marks.requested() > self.collected;
        if !touched && !asked {
            self.clears_since = None;
            return false;
        }
        let since = *self.clears_since.get_or_insert(now);
        if !asked && self.changes.is_empty() && now.since(since) < RECORD_CLEAR_DELAY {
            return false;
        }
        self.clears_since = None;
        self.begin_pages(marks, actions);
        true
    }

    fn begin_change(&mut self) {
        let content = self.next.clone();
        let raise = changes_members(&self.wanted, &content);
        self.want(content, raise);
        self.pages_precede = false;
        self.job = Some(Job {
            changes: std::mem::take(&mut self.changes),
            ..Job::default()
        });
    }

    fn begin_pages(&mut self, marks: &Marks, actions: &mut Vec<RecordAction>) {
        let mut job = Job {
            number: Some(self.collect(marks)),
            ..Job::default()
        };
        let touched = std::mem::take(&mut self.touched);
        for &name in &touched {
            let page = self.layout.number(name, self.slots);
            let image = self.image(page, marks);
            job.images.push((page, image));
            self.all_lack(page);
        }
        self.touched = touched;
        self.pages_precede = !self.changes.is_empty();
        self.submitted(&job, marks, actions);
        self.job = Some(job);
    }

    /// For a test of rule R6.
    fn submitted(&self, job: &Job, marks: &Marks, actions: &mut Vec<RecordAction>) {
        if !broken!(self, DurableWhenSubmitted) {
            return;
        }
        let mut bits = [0; PAGE_WORDS];
        for (number, image) in &job.images {
            decode_bits(image, |word, value| bits[word] = value);
            marks.made_durable(self.names[*number], &bits);
        }
        if let Some(number) = job.number {
            marks.settle(number);
            actions.push(RecordAction::Settled);
        }
    }

    /// Takes the pages that changed from `marks`, into `touched`.
    fn collect(&mut self, marks: &Marks) -> u64 {
        self.touched.clear();
        self.collected = marks.collect(&mut self.touched);
        self.collected
    }

    fn all_lack(&mut self, page: usize) {
        for copy in &mut self.copies {
            if copy.standing != Standing::Out {
                copy.missing.insert(page);
            }
        }
    }

    /// The newest image of a page.
    fn image(&mut self, page: usize, marks: &Marks) -> Arc<Block> {
        let mut bits = [0; PAGE_WORDS];
        marks.copy_page(self.names[page], &mut bits);
        self.image_of(page, &bits)
    }

    /// An image of a page with these bits.
    fn image_of(&mut self, page: usize, bits: &PageBits) -> Arc<Block> {
        let mut block = self
            .spare
            .pop()
            .unwrap_or_else(|| Arc::new([0; BLOCK_BYTES]));
        if Arc::get_mut(&mut block).is_none() {
            // A slow copy still reads it.
            block = Arc::new([0; BLOCK_BYTES]);
        }
        let into = Arc::get_mut(&mut block).expect("nobody else has it");
        self.sequences[page] += 1;
        let (name, sequence) = (self.names[page], self.sequences[page]);
        encode_into(into, name, sequence, bits, self.wanted.disk);
        block
    }

    /// The image of a page that is to be written to a copy now.
    fn image_for(&mut self, place: usize, page: usize, marks: &Marks) -> Arc<Block> {
        let mut images = self.job.iter().flat_map(|job| &job.images);
        let Some((_, image)) = images.find(|(number, _)| *number == page) else {
            return self.image(page, marks);
        };
        if self.copies[place].standing == Standing::Good {
            return Arc::clone(image);
        }
        // A copy that returns may hold an image with a larger sequence, which this must replace.
        let mut bits = [0; PAGE_WORDS];
        decode_bits(image, |word, value| bits[word] = value);
        self.image_of(page, &bits)
    }

    /// Hands out what a copy lacks next, if it has nothing to do.
    fn feed(&mut self, place: usize, now: Time, marks: &Marks, actions: &mut Vec<RecordAction>) {
        if self.copies[place].standing == Standing::Out || !self.copies[place].is_idle() {
            return;
        }
        for _ in 0..WRITES_PER_COPY_MAX {
            let Some(page) = self.copies[place].missing.pop() else {
                break;
            };
            let bytes = self.image_for(place, page, marks);
            self.write(place, Target::Page(page), bytes, now, actions);
        }
        let sequence = self.wanted.sequence;
        if self.copies[place].is_idle() && self.copies[place].lacks_superblock(sequence) {
            let mut superblock = self.wanted.clone();
            superblock.copy_index = self.copies[place].index;
            let bytes = Arc::new(superblock.encode());
            self.write(place, Target::Superblock(sequence), bytes, now, actions);
        }
    }

    fn write(
        &mut self,
        place: usize,
        target: Target,
        bytes: Arc<Block>,
        now: Time,
        actions: &mut Vec<RecordAction>,
    ) {
        self.write_last += 1;
        let write = WriteId(self.write_last);
        let mut slot = self.copies[place].begin(write, target, now);
        let block = match target {
            Target::Page(page) => {
                if broken!(self, SlotInUseWritten) {
                    slot = Slot::A;
                }
                self.layout.block_of(self.names[page], slot)
            }
            Target::Superblock(_) => Layout::superblock_block(slot),
        };
        actions.push(RecordAction::Write {
            copy: u8::try_from(place).expect("at most 5 copies"),
            write,
            block,
            bytes,
        });
    }
}

/// Whether what is in the place of a copy may be overwritten.
fn check_return(name: &str, found: &Superblock, own: &Superblock) -> Result<(), Refusal> {
    if found.disk != own.disk {
        return Err(Refusal::Foreign {
            copy: name.to_owned(),
            found: found.disk,
            expected: own.disk,
        });
    }
    let unknown = found.history.entries().iter().rfind(|entry| {
        entry.begun && !own.history.knows(**entry) && !own.history.has_forgotten(**entry)
    });
    match unknown {
        Some(entry) => Err(Refusal::Fork {
            first: name.to_owned(),
            second: "what is in use".to_owned(),
            epoch: entry.epoch,
        }),
        None => Ok(()),
    }
}

/// Whether N, T or who the members are differs (rule R7).
fn changes_members(old: &Superblock, new: &Superblock) -> bool {
    let who = |superblock: &Superblock| {
        superblock.members.map(|member| {
            let gone = matches!(member.state, MemberState::Vacant | MemberState::Removed);
            (member.uuid, gone)
        })
    };
    (old.replicas, old.threshold, old.pattern) != (new.replicas, new.threshold, new.pattern)
        || who(old) != who(new)
}
