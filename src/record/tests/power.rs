// SPDX-License-Identifier: Apache-2.0
//! Random histories with power cuts at every point, against a naive model: what was reported
//! durable is there afterwards, whichever majority of the copies is left (rules R1, R4-R7, I12,
//! I13). Each rule of the record is broken once, and the same check notices.

use std::collections::BTreeMap;

use super::support::*;
use crate::quorum::{Bitmap, Geometry};
use crate::record::*;

/// Extents of the disk: two pages a map.
const EXTENTS: u64 = 33_000;

/// Extents that a disk has at most in these stories.
const EXTENTS_MOST: u64 = 70_000;

/// Extents that are played with: few, so that bits are set and cleared often, on both pages and in
/// two sectors of the first, so that an image can be torn.
const PLAYED: [u64; 4] = [0, 63, 20_000, 32_900];

/// The same in what the disk gets when it grows: on the page there was, on a new one, at the end.
const ADDED: [u64; 4] = [33_000, 33_070, 65_030, 69_999];

/// A small generator: the same numbers on every machine.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        x ^ (x >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % limit as u64).unwrap()
    }

    fn one_in(&mut self, chance: usize) -> bool {
        self.below(chance) == 0
    }

    fn bit(&mut self, extents: u64) -> (Bitmap, u64) {
        let played = PLAYED.iter().chain(&ADDED);
        let played: Vec<u64> = played.copied().filter(|&e| e < extents).collect();
        (
            Bitmap::from_number(self.below(4)),
            played[self.below(played.len())],
        )
    }
}

/// What counted in all runs together, so that a test can tell that it tested something.
#[derive(Default, Debug)]
struct Tally {
    cuts: usize,
    promises: usize,
    exclusions: usize,
    returns: usize,
    /// Cuts while the disk was getting longer that left the old size.
    growths_lost: usize,
    /// Growths that counted.
    growths: usize,
}

struct Story {
    random: Random,
    machine: Machine,
    copies: usize,
    mutation: Option<RecordMutation>,
    /// Bits that were asked for and not cleared since, with the number that was given.
    asked: BTreeMap<(usize, u64), u64>,
    run: u8,
    /// Epoch that was durable last.
    epoch: u64,
    /// Extents of the disk that are durable.
    extents: u64,
    /// What it was to have since that was so.
    attempts: Vec<u64>,
    tally: Tally,
}

impl Story {
    fn new(seed: u64, copies: usize, mutation: Option<RecordMutation>) -> Self {
        let mut story = Self {
            random: Random(seed),
            machine: Machine::created(copies, EXTENTS),
            copies,
            mutation,
            asked: BTreeMap::new(),
            run: 1,
            epoch: 0,
            extents: EXTENTS,
            attempts: Vec::new(),
            tally: Tally::default(),
        };
        story.machine.recorder.mutation = mutation;
        story.machine.poll();
        story
    }

    fn play(&mut self, steps: usize) -> Result<(), String> {
        for _ in 0..steps {
            self.step()?;
        }
        Ok(())
    }

    fn step(&mut self) -> Result<(), String> {
        match self.random.below(24) {
            0..8 => self.finish_one(),
            8..13 => {
                let (bitmap, extent) = self.random.bit(self.machine.marks.extents());
                if let Some(number) = self.machine.marks.ask(bitmap, extent) {
                    self.asked.insert((bitmap.number(), extent), number);
                }
                self.machine.poll();
            }
            13..16 => {
                let (bitmap, extent) = self.random.bit(self.machine.marks.extents());
                self.machine.marks.clear(bitmap, extent);
                self.asked.remove(&(bitmap.number(), extent));
                self.machine.poll();
            }
            16 => {
                self.machine.recorder.change(|s| s.cold = !s.cold);
                self.machine.poll();
            }
            17 => {
                let millis = [1, 100, 1500, 5000][self.random.below(4)];
                let later = std::time::Duration::from_millis(millis);
                self.machine.now = self.machine.now.after(later);
                self.machine.tell(RecordEvent::Tick);
            }
            18 => {
                let layout = self.machine.recorder.superblock().layout();
                let length = usize::try_from(layout.length_bytes()).unwrap();
                for place in 0..self.copies {
                    let file = &mut self.machine.files[place];
                    file.resize(length.max(file.len()), 0);
                    if self.machine.readmit(u8::try_from(place).unwrap()).is_ok() {
                        self.tally.returns += 1;
                    }
                }
                self.machine.poll();
            }
            19 => self.settle_down()?,
            20 if self.random.one_in(3) => self.fail_one(),
            21 => self.cut()?,
            _ => self.finish_one(),
        }
        self.check_said();
        Ok(())
    }

    fn finish_one(&mut self) {
        if !self.machine.pending.is_empty() {
            let index = self.random.below(self.machine.pending.len());
            self.machine.finish(index, None);
        }
    }

    /// A write fails, after any part of it.
    fn fail_one(&mut self) {
        if !self.machine.pending.is_empty() {
            let index = self.random.below(self.machine.pending.len());
            self.tear(index);
            self.machine.finish(index, Some(5));
        }
    }

    /// Some sectors of a write reach the medium.
    fn tear(&mut self, index: usize) {
        let pending = self.machine.pending[index].clone();
        let file = &mut self.machine.files[usize::from(pending.copy)];
        let sectors = self.random.next();
        for sector in 0..8 {
            if sectors & (1 << sector) != 0 {
                let at = usize::try_from(pending.block).unwrap() * BLOCK_BYTES + sector * 512;
                let from = &pending.bytes[sector * 512..(sector + 1) * 512];
                file[at..at + 512].copy_from_slice(from);
            }
        }
    }

    fn check_said(&mut self) {
        for action in self.machine.said.drain(..) {
            let excluded = matches!(action, RecordAction::Excluded { .. });
            self.tally.exclusions += usize::from(excluded);
            if matches!(action, RecordAction::Changed(id) if id == self.machine.recorder.opening())
            {
                let extents = self.machine.recorder.superblock().extents();
                self.tally.growths += usize::from(extents > self.extents);
                self.extents = extents;
                self.attempts.clear();
            }
        }
        // What is under way may be a raise that nobody knows yet.
        if self.machine.recorder.is_idle() && !self.machine.recorder.is_lost() {
            self.epoch = self.machine.recorder.superblock().epoch();
        }
    }

    /// Everything is written; the copies that take part then say exactly what holds.
    fn settle_down(&mut self) -> Result<(), String> {
        for _ in 0..3 {
            let later = std::time::Duration::from_secs(2);
            self.machine.now = self.machine.now.after(later);
            self.machine.tell(RecordEvent::Tick);
            self.machine.run();
        }
        self.check_said();
        let machine = &self.machine;
        if machine.recorder.is_lost() || !machine.recorder.is_idle() {
            return Ok(());
        }
        if machine.marks.is_touched() {
            return Err("pages wait although there was time".to_owned());
        }
        let present = self.majority();
        let opened = self
            .open(present)
            .map_err(|refusal| format!("at rest: {refusal}"))?;
        if opened.pages_lost() > 0 {
            return Err("a page was lost at rest".to_owned());
        }
        if opened.superblock != *self.machine.recorder.superblock() {
            let copy_index = self.machine.recorder.superblock().copy_index;
            let found = Superblock {
                copy_index,
                ..opened.superblock.clone()
            };
            if found != *self.machine.recorder.superblock() {
                return Err("another superblock at rest".to_owned());
            }
        }
        for number in 0..4 {
            let bitmap = Bitmap::from_number(number);
            let holds: Vec<u64> = self.machine.marks.iter(bitmap).collect();
            let found = set_bits(&opened, bitmap);
            if holds != found {
                return Err(format!("{bitmap:?} at rest: {found:?}, not {holds:?}"));
            }
        }
        Ok(())
    }

    /// Some majority of the copies. Those that have never been finished do not count; without a
    /// majority of others all are there.
    fn majority(&mut self) -> u32 {
        let finished = |place: &usize| {
            let file = &self.machine.files[*place];
            let mut slots = file.chunks(BLOCK_BYTES).take(2);
            slots.any(|slot| Superblock::decode(slot.try_into().unwrap()).is_ok())
        };
        let finished: u32 = (0..self.copies)
            .filter(finished)
            .map(|place| 1 << place)
            .sum();
        let is_majority = |set: u32| set.count_ones() as usize > self.copies / 2;
        if !is_majority(finished) {
            return u32::MAX;
        }
        loop {
            let present = u32::try_from(self.random.below(1 << self.copies)).unwrap();
            if is_majority(present & finished) {
                return present;
            }
        }
    }

    fn open(&self, present: u32) -> Result<Opened, Refusal> {
        let options = OpenOptions {
            mutation: self.mutation,
            ..OpenOptions::default()
        };
        open_some(&self.machine.files, present, &options)
    }

    /// The power fails, and the disk is opened with some of its copies.
    fn cut(&mut self) -> Result<(), String> {
        self.tally.cuts += 1;
        let marks = &self.machine.marks;
        let promised: Vec<(Bitmap, u64)> = self
            .asked
            .iter()
            .filter(|(_, number)| marks.is_settled(**number))
            .map(|((bitmap, extent), _)| (Bitmap::from_number(*bitmap), *extent))
            .collect();
        self.tally.promises += promised.len();
        let settled = self.machine.marks.is_settled(1);
        for index in 0..self.machine.pending.len() {
            self.tear(index);
        }
        let present = self.majority();
        let opened = match self.open(present) {
            Ok(opened) => opened,
            Err(Refusal::NoRecord { .. } | Refusal::Unfinished { .. }) if !settled => {
                return self.start_again();
            }
            Err(refusal) => return Err(format!("cut: {refusal}")),
        };
        if opened.superblock.epoch() < self.epoch {
            return Err(format!("epoch {} went back", self.epoch));
        }
        if opened.pages_lost() > 0 {
            return Err("a power cut alone loses no page".to_owned());
        }
        self.check_size(&opened)?;
        let found: Vec<Vec<u64>> = (0..4)
            .map(|number| set_bits(&opened, Bitmap::from_number(number)))
            .collect();
        for (bitmap, extent) in promised {
            if !found[bitmap.number()].contains(&extent) {
                return Err(format!("{bitmap:?} of extent {extent} is lost"));
            }
        }
        let before = opened.superblock.epoch();
        let opened = self.maybe_grow(opened, present);
        self.go_on(opened, present)?;
        let now = self.machine.recorder.superblock().epoch();
        if now <= before {
            return Err(format!("opened in epoch {now} after {before}"));
        }
        Ok(())
    }

    /// The disk has the size that counted last, or one that it was to get since. All that is new is
    /// dirty (rule Z3).
    fn check_size(&mut self, opened: &Opened) -> Result<(), String> {
        let found = opened.superblock.extents();
        if found != self.extents && !self.attempts.contains(&found) {
            let (counted, attempts) = (self.extents, &self.attempts);
            return Err(format!("{found} extents, not {counted} or {attempts:?}"));
        }
        let dirty = set_bits(opened, Bitmap::Dirty);
        let new = self.extents..found;
        // Those that are played with may have been cleared by a run that counted on no copy yet.
        let clean = new.filter(|extent| dirty.binary_search(extent).is_err());
        if let Some(clean) = clean.into_iter().find(|extent| !is_played(extent)) {
            return Err(format!("extent {clean} is new and clean"));
        }
        self.tally.growths_lost += usize::from(self.machine.marks.extents() > found);
        Ok(())
    }

    /// Now and then the disk is made longer when it is opened.
    fn maybe_grow(&mut self, mut opened: Opened, present: u32) -> Opened {
        let sizes = [33_001, 33_100, 65_024, 65_025, EXTENTS_MOST];
        let extents = sizes[self.random.below(sizes.len())];
        let grows = opened.superblock.extents() < extents && opened.growth().is_none();
        if !grows || !self.random.one_in(2) {
            return opened;
        }
        let geometry = Geometry::with_extent_shift(opened.superblock.sectors, 8, 3);
        let growth = Growth::of(&geometry.unwrap(), extents * 8);
        let growth = growth.unwrap().expect("it becomes longer");
        let length = usize::try_from(growth.layout().length_bytes()).unwrap();
        for (place, file) in self.machine.files.iter_mut().enumerate() {
            if present & (1 << place) != 0 && file.len() < length {
                file.resize(length, 0);
            }
        }
        let mut sources = sources(&self.machine.files, present);
        opened.grow(&growth, &mut sources);
        self.attempts.push(extents);
        opened
    }

    fn start_again(&mut self) -> Result<(), String> {
        let seed = self.random.next();
        let tally = std::mem::take(&mut self.tally);
        *self = Self::new(seed, self.copies, self.mutation);
        self.tally = tally;
        Ok(())
    }

    fn go_on(&mut self, opened: Opened, present: u32) -> Result<(), String> {
        self.run = self.run.wrapping_add(1);
        let writable: Vec<bool> = (0..self.copies).map(|i| present & (1 << i) != 0).collect();
        // A copy that missed that the disk became longer is made longer when it is used again.
        let length = usize::try_from(opened.superblock.layout().length_bytes()).unwrap();
        let mut files = std::mem::take(&mut self.machine.files);
        for (file, _) in files
            .iter_mut()
            .zip(&writable)
            .filter(|(_, writable)| **writable)
        {
            file.resize(length.max(file.len()), 0);
        }
        let now = self.machine.now;
        self.machine = Machine::from_opened(files, opened, &writable, self.run)
            .map_err(|error| error.to_string())?;
        self.machine.now = now;
        self.machine.recorder.mutation = self.mutation;
        self.asked.clear();
        for number in 0..4 {
            let bitmap = Bitmap::from_number(number);
            let set: Vec<u64> = self.machine.marks.iter(bitmap).collect();
            for extent in set.into_iter().filter(is_played) {
                let number = self.machine.marks.ask(bitmap, extent);
                let number = number.ok_or("durable before the epoch began")?;
                self.asked.insert((bitmap.number(), extent), number);
            }
        }
        self.machine.poll();
        Ok(())
    }
}

fn is_played(extent: &u64) -> bool {
    PLAYED.contains(extent) || ADDED.contains(extent)
}

fn stories() -> u64 {
    let given = std::env::var("RECORD_STORIES").ok();
    given.map_or(20, |given| given.parse().expect("a number of stories"))
}

#[test]
fn durable_marks_survive_power_cuts_with_any_majority() {
    let mut total = Tally::default();
    for copies in [1, 3, 5] {
        for seed in 0..stories() {
            let mut story = Story::new(seed, copies, None);
            if let Err(what) = story.play(400) {
                panic!("{copies} copies, seed {seed}: {what}");
            }
            total.cuts += story.tally.cuts;
            total.promises += story.tally.promises;
            total.exclusions += story.tally.exclusions;
            total.returns += story.tally.returns;
            total.growths += story.tally.growths;
            total.growths_lost += story.tally.growths_lost;
        }
    }
    eprintln!("{total:?}");
    assert!(total.cuts > 500 && total.promises > 1000, "{total:?}");
    assert!(total.exclusions > 50 && total.returns > 50, "{total:?}");
    assert!(total.growths > 20 && total.growths_lost > 20, "{total:?}");
}

#[test]
fn broken_rules_are_noticed() {
    for mutation in [
        RecordMutation::OneCopyIsEnough,
        RecordMutation::SlotInUseWritten,
        RecordMutation::CopiesNotMerged,
        RecordMutation::DurableWhenSubmitted,
        RecordMutation::EpochNotRaised,
        RecordMutation::GrowthForgotten,
    ] {
        // With one copy nothing hides a torn page, with three there are others to forget.
        // It takes three cuts in a row; the stories before do not have them.
        let first = match mutation {
            RecordMutation::GrowthForgotten => 210,
            _ => 0,
        };
        let noticed = (first..first + 400).find_map(|seed| {
            let copies = if seed % 2 == 0 { 3 } else { 1 };
            let mut story = Story::new(seed, copies, Some(mutation));
            story.play(400).err().map(|what| (seed, what))
        });
        let (seed, what) = noticed.unwrap_or_else(|| panic!("{mutation:?} was not noticed"));
        eprintln!("{mutation:?}: seed {seed}: {what}");
    }
}
