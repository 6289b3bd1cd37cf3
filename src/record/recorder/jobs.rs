// SPDX-License-Identifier: Apache-2.0
//! What is done next, and what follows when it is done.

use super::{
    Job, RECORD_CLEAR_DELAY, RECORD_JOIN_PAUSE, RecordAction, Recorder, SPARE_BLOCKS_MAX, Stage,
};
use crate::quorum::{Marks, PAGE_WORDS};
use crate::record::copies::{Copy, PageSet, Standing};
use crate::record::history::History;
use crate::record::member::MemberState;
use crate::record::mutation::broken;
use crate::record::page::decode_bits;
use crate::record::superblock::{FIRST_EPOCH, Superblock};
use crate::units::Time;

impl Recorder {
    /// Returns whether the job is done now.
    pub(super) fn finish_job(&mut self, marks: &Marks, actions: &mut Vec<RecordAction>) -> bool {
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
                // From here on every opening meets the new size, so what the maps say counts.
                if self.next.growing.take().is_some() {
                    self.note_change();
                }
            }
            Stage::Serving => {}
        }
        actions.extend(job.changes.into_iter().map(RecordAction::Changed));
        true
    }

    /// Begins what is due, if nothing is being done. Returns whether a job began.
    pub(super) fn start_job(
        &mut self,
        now: Time,
        marks: &Marks,
        actions: &mut Vec<RecordAction>,
    ) -> bool {
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

    /// All pages and the first superblock, on all copies.
    pub(super) fn create(&mut self, marks: &Marks) {
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
    pub(super) fn begin_epoch(&mut self, marks: &Marks, actions: &mut Vec<RecordAction>) {
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
    pub(super) fn serve(
        &mut self,
        now: Time,
        marks: &Marks,
        actions: &mut Vec<RecordAction>,
    ) -> bool {
        self.paused_until = self.join_pause(now);
        if self.paused_until.is_some() {
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

    /// Until when nothing new is begun for the sake of a copy that returns and whose last writes
    /// are under way. Once for each return: a copy that is slow with every write would have the
    /// others wait again and again.
    fn join_pause(&mut self, now: Time) -> Option<Time> {
        let soon = |c: &&mut Copy| c.is_joining_soon() && !c.waited_for;
        let mut pause = None;
        for copy in self.copies.iter_mut().filter(soon) {
            let until = copy.busy_since()?.after(RECORD_JOIN_PAUSE);
            copy.waited_for = until <= now;
            if !copy.waited_for {
                pause = pause.max(Some(until));
            }
        }
        pause
    }

    pub(super) fn begin_change(&mut self) {
        let content = self.next.clone();
        let raise = changes_members(&self.wanted, &content);
        self.want(content, raise);
        self.pages_precede = false;
        self.job = Some(Job {
            changes: std::mem::take(&mut self.changes),
            ..Job::default()
        });
    }

    pub(super) fn begin_pages(&mut self, marks: &Marks, actions: &mut Vec<RecordAction>) {
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
    pub(super) fn submitted(&self, job: &Job, marks: &Marks, actions: &mut Vec<RecordAction>) {
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
    pub(super) fn collect(&mut self, marks: &Marks) -> u64 {
        self.touched.clear();
        self.collected = marks.collect(&mut self.touched);
        self.collected
    }

    pub(super) fn all_lack(&mut self, page: usize) {
        for copy in &mut self.copies {
            if copy.standing != Standing::Out {
                copy.missing.insert(page);
            }
        }
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
