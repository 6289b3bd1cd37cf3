// SPDX-License-Identifier: Apache-2.0
//! Which copies take part: leaving out, taking back, and the epochs that go with it (rules R1, R7).

use std::time::Duration;

use super::{RECORD_HANG_LIMIT, RECORD_WRITE_LIMIT, RecordAction, Recorder, RecorderError, Stage};
use crate::record::copies::{Copy, Standing};
use crate::record::error::Refusal;
use crate::record::heads::read_heads;
use crate::record::history::{EpochEntry, EpochId};
use crate::record::layout::Slot;
use crate::record::merge::survey;
use crate::record::mutation::broken;
use crate::record::opening::{ReadBlock, check_numbers};
use crate::record::superblock::Superblock;
use crate::units::Time;

impl Recorder {
    /// Takes an excluded copy back: it is written whole, then an epoch with it begins. `reader`
    /// reads what is in its place: the old file, or one of the right length full of zeroes. Poll
    /// afterwards.
    ///
    /// # Errors
    /// If the copy is in use, an old write to it has not ended, or what is there is damaged,
    /// belongs to another disk or to a life this record knows nothing of.
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
        let heads = read_heads(name, reader)?.map_err(|why| RecorderError::Unusable {
            copy: name.to_owned(),
            why,
        })?;
        if let Some(newest) = heads.newest() {
            superblock_slot = heads.next_slot();
            check_return(name, newest, &self.wanted)?;
            (epoch, sequence) = (newest.epoch(), newest.sequence);
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

    /// Copies it takes for a job.
    pub(super) fn needed(&self) -> usize {
        if broken!(self, OneCopyIsEnough) {
            return 1;
        }
        match self.stage {
            Stage::Creating => self.copies.len(),
            Stage::Opening | Stage::Serving => self.wanted.needed(),
        }
    }

    pub(super) fn level(&self) -> impl Iterator<Item = usize> {
        let sequence = self.wanted.sequence;
        (0..self.copies.len()).filter(move |&place| self.copies[place].is_level(sequence))
    }

    /// The copies that take part, as in a superblock.
    pub(super) fn good(&self) -> u8 {
        let good = self.copies.iter().filter(|c| c.standing == Standing::Good);
        good.map(|copy| 1 << copy.index).sum()
    }

    /// Whether the copy in this place can be left out if it is late.
    pub(super) fn can_spare(&self, place: usize) -> bool {
        match self.copies[place].standing {
            Standing::Joining => true,
            Standing::Out => false,
            Standing::Good => {
                self.stage == Stage::Creating
                    || self.level().filter(|&other| other != place).count() >= self.needed()
            }
        }
    }

    /// How long a write to the copy in this place may take. `None`: for ever, nobody waits for it.
    pub(super) fn patience(&self, place: usize) -> Option<Duration> {
        match self.copies[place].standing {
            Standing::Out => None,
            _ if self.can_spare(place) => Some(RECORD_WRITE_LIMIT),
            _ => Some(RECORD_HANG_LIMIT),
        }
    }

    pub(super) fn exclude_late(&mut self, now: Time, actions: &mut Vec<RecordAction>) {
        for place in 0..self.copies.len() {
            let busy = self.copies[place].busy_since();
            let limits = busy.zip(self.patience(place));
            if limits.is_some_and(|(busy, limit)| now.since(busy) >= limit) {
                self.exclude(place, None, actions);
            }
        }
    }

    /// Leaves a copy out. If it took part, the epoch rises on the others, and nothing counts that
    /// is not in it (rule R1).
    pub(super) fn exclude(
        &mut self,
        place: usize,
        errno: Option<i32>,
        actions: &mut Vec<RecordAction>,
    ) {
        let standing = self.copies[place].standing;
        if standing == Standing::Out {
            return;
        }
        self.copies[place].leave();
        let copy = u8::try_from(place).expect("at most 5 copies");
        let took_part = standing == Standing::Good;
        actions.push(RecordAction::Excluded {
            copy,
            errno,
            took_part,
        });
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
    pub(super) fn want(&mut self, mut content: Superblock, raise: bool) {
        self.sequence_max += 1;
        content.sequence = self.sequence_max;
        content.included = self.good();
        // Each copy is given its own index; this one is of any that takes part.
        content.copy_index = u8::try_from(content.included.trailing_zeros()).unwrap_or(0);
        content.forced = self.forced && content.included.count_ones() < self.majority();
        if raise && !broken!(self, EpochNotRaised) {
            self.epoch_max += 1;
            content.history.push(self.entry(content.forced));
            if let Some(growing) = content.growing.as_mut().filter(|g| g.epoch == 0) {
                growing.epoch = self.epoch_max;
            }
        } else {
            content.forced = self.wanted.forced;
        }
        // What waits is not written yet, but goes on from here.
        self.next.sequence = content.sequence;
        self.next.included = content.included;
        self.next.copy_index = content.copy_index;
        self.next.forced = content.forced;
        self.next.history = content.history;
        // Until a change of its own ends it.
        if self.stage != Stage::Serving {
            self.next.growing = content.growing;
        }
        self.wanted = content;
    }

    pub(super) fn majority(&self) -> u32 {
        u32::from(self.wanted.copies) / 2 + 1
    }

    pub(super) fn entry(&self, forced: bool) -> EpochEntry {
        EpochEntry {
            epoch: self.epoch_max,
            id: EpochId::derive(self.run, self.epoch_max),
            forced,
            begun: false,
        }
    }

    /// Copies that have been written whole take part from a new epoch on.
    pub(super) fn take_in(&mut self, actions: &mut Vec<RecordAction>) -> bool {
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
        for (copy, place) in self.copies.iter_mut().zip(0..) {
            if copy.has_joined() {
                copy.standing = Standing::Good;
                actions.push(RecordAction::Returned { copy: place });
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
