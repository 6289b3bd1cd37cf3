// SPDX-License-Identifier: Apache-2.0
//! What the copies of a record say together, or why they cannot be used (rules R1, R5, S6).
//!
//! More than K/2 copies must be readable, so that at least one of them has whatever was made
//! durable. The epoch is chosen first ([`lineage`](super::lineage)); the maps are then the OR over
//! the copies of that epoch, page by page ([`merge`](super::merge)).

use super::error::Refusal;
use super::growth::Growth;
use super::heads::{Heads, read_heads};
use super::layout::{BLOCK_BYTES, Block, Slot};
use super::lineage::{Decision, Holds, Life, decide};
use super::merge::{PageSource, merge};
#[cfg(test)]
use super::mutation::RecordMutation;
use super::mutation::broken;
use super::opened::{CopyState, Note, Opened, OpenedCopy};
use super::superblock::{DiskUuid, FIRST_EPOCH, Growing, SEQUENCE_LIMIT, Superblock, VERIFIED};

/// Reads blocks of a copy: a file, or memory.
pub trait ReadBlock {
    /// Reads block `block` whole.
    ///
    /// # Errors
    /// The errno if that does not work; a block beyond the end of the copy is one (EIO).
    fn read_block(&mut self, block: u64, into: &mut Block) -> Result<(), i32>;
}

/// EIO, for what is shorter than it should be.
const SHORT: i32 = 5;

impl ReadBlock for &[u8] {
    fn read_block(&mut self, block: u64, into: &mut Block) -> Result<(), i32> {
        let start = usize::try_from(block).ok();
        let start = start.and_then(|block| block.checked_mul(BLOCK_BYTES));
        let end = start.and_then(|start| start.checked_add(BLOCK_BYTES));
        let bytes = start.zip(end).and_then(|(start, end)| self.get(start..end));
        into.copy_from_slice(bytes.ok_or(SHORT)?);
        Ok(())
    }
}

/// What is at the place of a copy.
pub enum Found<R> {
    /// A file that can be read.
    Present(R),
    /// Nothing: it was never created, or its device is not there.
    Missing,
    /// Something that cannot be opened, and why.
    Unreadable(String),
}

/// A configured copy.
pub struct CopySource<R> {
    /// What people call it: its path.
    pub name: String,
    /// What is there.
    pub found: Found<R>,
}

/// What the configuration says. `None`: whatever the record says.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Expected {
    /// The disk.
    pub disk: Option<DiskUuid>,
    /// Its sectors.
    pub sectors: Option<u64>,
    /// N.
    pub replicas: Option<u8>,
    /// T.
    pub threshold: Option<u8>,
}

/// How to open.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct OpenOptions {
    /// What the configuration says.
    pub expected: Expected,
    /// Take a minority of the copies as the truth (rule S6). The next epoch says so.
    pub force: bool,
    /// A rule that this build breaks on purpose.
    #[cfg(test)]
    pub mutation: Option<RecordMutation>,
}

/// A configured copy, and what its superblocks tell.
struct Candidate<'a, R> {
    name: &'a str,
    reader: Option<&'a mut R>,
    state: CopyState,
    /// None: nothing in it can be used to decide.
    heads: Option<Heads>,
    superblock_slot: Slot,
    /// Its pages are merged.
    holder: bool,
    /// It may as well be one of before that was not written whole yet.
    uncertain: bool,
}

impl<R> Candidate<'_, R> {
    fn newest(&self) -> Option<&Superblock> {
        self.heads.as_ref().and_then(Heads::newest)
    }
}

/// Decides what the copies say together. Nothing is written.
///
/// # Errors
/// A [`Refusal`], for people.
pub fn open<R: ReadBlock>(
    sources: &mut [CopySource<R>],
    options: &OpenOptions,
) -> Result<Opened, Refusal> {
    let mut candidates = Vec::with_capacity(sources.len());
    for source in sources {
        candidates.push(inspect(source)?);
    }
    check_identity(&candidates, options)?;
    drop_forgotten(&mut candidates);
    let (superblock, forced) = choose(&mut candidates, options)?;
    check_expected(&superblock, &options.expected)?;
    if broken!(options, CopiesNotMerged) {
        keep_newest_holder(&mut candidates);
    }

    let heads = || candidates.iter().filter_map(Candidate::newest);
    let known: u8 = heads().map(|head| 1 << head.copy_index).sum();
    let sequence_max = heads().map(|head| head.sequence).max().unwrap_or(0);
    let mut history = superblock.history;
    heads().for_each(|head| history.join(&head.history));
    let absent = (superblock.included & !known).count_ones() as usize;
    let allowed = if forced {
        usize::MAX
    } else {
        superblock.needed() - 1
    };
    let mut pages: Vec<PageSource<'_, R>> = Vec::with_capacity(candidates.len());
    for candidate in &mut candidates {
        let index = candidate.newest().map(|head| head.copy_index);
        pages.push(PageSource {
            reader: candidate.reader.as_deref_mut(),
            holder: candidate.holder,
            uncertain: candidate.uncertain,
            counts: index.is_some_and(|index| superblock.included & (1 << index) != 0),
        });
    }
    let merged = merge(&mut pages, &superblock, absent, allowed);
    drop(pages);
    let largest = merged.pages.sequences().iter().copied().max();
    let largest = sequence_max
        .max(history.newest().epoch)
        .max(largest.unwrap_or(0));
    check_numbers(largest)?;

    let mut notes = Vec::new();
    let mut free = (0..superblock.copies).filter(|index| known & (1 << index) == 0);
    let mut copies = Vec::with_capacity(candidates.len());
    for (candidate, found) in candidates.into_iter().zip(merged.copies) {
        let copy = candidate.name.to_owned();
        if candidate.state != CopyState::Current {
            let state = candidate.state.clone();
            notes.push(Note::NotUsed { copy, state });
        } else if found.damaged > 0 {
            let count = found.damaged;
            notes.push(Note::DamagedSlots { copy, count });
        }
        let index = match candidate.newest() {
            Some(head) => head.copy_index,
            None => free.next().expect("as many places as copies"),
        };
        copies.push(OpenedCopy {
            index,
            superblock_slot: candidate.superblock_slot,
            state: candidate.state,
            slots: found.slots,
            matches: found.matches,
        });
    }
    notes.extend(merged.lost.into_iter().map(Note::PageLost));
    Ok(Opened {
        growth: Growth::under_way(&superblock),
        superblock,
        notes,
        force: options.force,
        minority: forced,
        fresh: false,
        known: history,
        sequence_max,
        copies,
        pages: merged.pages,
    })
}

/// Looks at what is in the place of a copy.
fn inspect<R: ReadBlock>(source: &mut CopySource<R>) -> Result<Candidate<'_, R>, Refusal> {
    let mut candidate = Candidate {
        name: &source.name,
        reader: None,
        state: CopyState::Missing,
        heads: None,
        superblock_slot: Slot::A,
        holder: false,
        uncertain: false,
    };
    match &mut source.found {
        Found::Missing => {}
        Found::Unreadable(why) => candidate.state = CopyState::Unreadable(why.clone()),
        Found::Present(reader) => {
            match read_heads(candidate.name, reader)? {
                Ok(heads) => {
                    candidate.state = if heads.newest().is_some() {
                        CopyState::Stale
                    } else {
                        CopyState::Blank
                    };
                    candidate.superblock_slot = heads.next_slot();
                    candidate.heads = heads.newest().is_some().then_some(heads);
                }
                Err(why) => candidate.state = CopyState::Unreadable(why),
            }
            candidate.reader = Some(reader);
        }
    }
    Ok(candidate)
}

/// All copies are of one disk, of the one that is configured, and no two are the same copy.
fn check_identity<R>(
    candidates: &[Candidate<'_, R>],
    options: &OpenOptions,
) -> Result<(), Refusal> {
    let heads = || {
        candidates
            .iter()
            .filter_map(|c| c.newest().map(|head| (c, head)))
    };
    // If they differ among themselves the odd one is named.
    let votes = |disk| heads().filter(|(_, head)| head.disk == disk).count();
    let usual = heads()
        .map(|(_, head)| head.disk)
        .max_by_key(|&disk| votes(disk));
    let expected = options.expected.disk.or(usual);
    let Some(expected) = expected else {
        return Ok(());
    };
    let mut owners = [None; 8];
    for (candidate, head) in heads() {
        if head.disk != expected {
            return Err(Refusal::Foreign {
                copy: candidate.name.to_owned(),
                found: head.disk,
                expected,
            });
        }
        let owner = &mut owners[usize::from(head.copy_index)];
        if let Some(first) = owner.replace(candidate.name) {
            return Err(Refusal::Twice {
                first: str::to_owned(first),
                second: candidate.name.to_owned(),
                index: head.copy_index,
            });
        }
    }
    let newest = heads()
        .map(|(_, head)| head)
        .max_by_key(|head| (head.epoch(), head.sequence));
    match newest.map(|head| usize::from(head.copies)) {
        Some(recorded) if recorded != candidates.len() => Err(Refusal::Copies {
            recorded,
            configured: candidates.len(),
        }),
        _ => Ok(()),
    }
}

/// A copy that is older than all that another one remembers cannot be judged: it may be a fork.
/// It decides nothing.
fn drop_forgotten<R>(candidates: &mut [Candidate<'_, R>]) {
    let newest = candidates.iter().filter_map(Candidate::newest);
    let Some(newest) = newest.max_by_key(|head| head.epoch()).cloned() else {
        return;
    };
    for candidate in candidates {
        let own = candidate.newest().map(|head| head.history.newest());
        if own.is_some_and(|own| newest.history.has_forgotten(own)) {
            candidate.heads = None;
        }
    }
}

/// Chooses the superblock to go on with and marks the copies whose pages hold what was durable.
/// The second value: that took force.
fn choose<R>(
    candidates: &mut [Candidate<'_, R>],
    options: &OpenOptions,
) -> Result<(Superblock, bool), Refusal> {
    let copies = candidates.len();
    let places: Vec<usize> = (0..copies)
        .filter(|&place| candidates[place].newest().is_some())
        .collect();
    let needed = copies / 2 + 1;
    let forced = places.len() < needed;
    if places.is_empty() || (forced && !options.force) {
        return Err(minority(candidates, places.len(), needed));
    }
    let lives: Vec<Life> = places
        .iter()
        .filter_map(|&place| life(&candidates[place]))
        .collect();
    let (epoch, holders) = match decide(&lives) {
        Decision::Epoch(entry, holders) => (entry, holders),
        Decision::Fork(first, second, epoch) => {
            let name = |life: usize| candidates[places[life]].name.to_owned();
            return Err(Refusal::Fork {
                first: name(first),
                second: name(second),
                epoch,
            });
        }
    };
    // The newest of that very epoch; if a raise that never counted has taken its place
    // everywhere, what that says.
    let slots = candidates.iter().filter_map(|c| c.heads.as_ref());
    let superblocks = slots.flat_map(|heads| heads.valid.iter().flatten());
    let chosen = superblocks
        .filter(|superblock| superblock.history.knows(epoch))
        .max_by_key(|superblock| {
            let exact = superblock.history.newest().is_same(epoch);
            (exact, superblock.epoch(), superblock.sequence)
        })
        .cloned();
    let mut chosen = chosen.expect("a copy that knows the epoch");
    if broken!(options, GrowthForgotten) {
        chosen.growing = None;
    }
    if let Some(growing) = chosen.growing
        && (!epoch.begun || epoch.epoch < growing.epoch)
    {
        take_size_of_before(&mut chosen, growing);
    }
    for (&place, holds) in places.iter().zip(holders) {
        let index = candidates[place].newest().map_or(0, |head| head.copy_index);
        candidates[place].uncertain = matches!(holds, Holds::Perhaps);
        candidates[place].holder = match holds {
            Holds::Yes => true,
            Holds::Perhaps => chosen.included & (1 << index) != 0,
            Holds::No => false,
        };
        if candidates[place].holder {
            candidates[place].state = CopyState::Current;
        }
    }
    Ok((chosen, forced))
}

/// A raise that never counted was to make the disk longer. Nothing depends on that.
fn take_size_of_before(chosen: &mut Superblock, growing: Growing) {
    chosen.sectors = growing.from_sectors;
    chosen.growing = None;
    for cursor in [&mut chosen.verify_cursor, &mut chosen.scrub_cursor] {
        if *cursor != VERIFIED {
            *cursor = chosen.sectors.min(*cursor);
        }
    }
}

fn life<R>(candidate: &Candidate<'_, R>) -> Option<Life> {
    let heads = candidate.heads.as_ref()?;
    Some(Life {
        history: heads.newest()?.history,
        uncertain: heads.uncertain,
    })
}

/// Why fewer copies than needed can be used.
fn minority<R>(candidates: &[Candidate<'_, R>], readable: usize, needed: usize) -> Refusal {
    let names = |wanted: fn(&CopyState) -> bool| {
        let found = candidates.iter().filter(|c| wanted(&c.state));
        found.map(|c| c.name).collect::<Vec<_>>().join(", ")
    };
    let is_empty = |state: &CopyState| matches!(state, CopyState::Blank | CopyState::Missing);
    if candidates.iter().all(|c| is_empty(&c.state)) {
        let copies = names(|_| true);
        return Refusal::NoRecord { copies };
    }
    // The first epoch is durable on every copy before anything else happens.
    let mut heads = candidates.iter().filter_map(Candidate::newest);
    let others_blank = candidates
        .iter()
        .all(|c| c.newest().is_some() || c.state == CopyState::Blank);
    if readable > 0 && others_blank && heads.all(|head| head.epoch() == FIRST_EPOCH) {
        let written = names(|state| *state == CopyState::Stale);
        return Refusal::Unfinished { written };
    }
    let problems = candidates.iter().filter(|c| c.newest().is_none()).map(|c| {
        let why = match &c.state {
            CopyState::Blank => "holds nothing",
            CopyState::Missing => "is not there",
            CopyState::Unreadable(why) => why,
            CopyState::Stale | CopyState::Current => "is older than anything the others remember",
        };
        format!("{}: {why}", c.name)
    });
    Refusal::Minority {
        readable,
        copies: candidates.len(),
        needed,
        problems: problems.collect::<Vec<_>>().join("; "),
    }
}

/// There are numbers left for what is to be written.
pub(super) fn check_numbers(number: u64) -> Result<(), Refusal> {
    if number > SEQUENCE_LIMIT {
        return Err(Refusal::Exhausted { number });
    }
    Ok(())
}

/// The record and the configuration agree.
fn check_expected(superblock: &Superblock, expected: &Expected) -> Result<(), Refusal> {
    let checks = [
        ("sectors", superblock.sectors, expected.sectors),
        (
            "replicas",
            superblock.replicas.into(),
            expected.replicas.map(u64::from),
        ),
        (
            "a vote threshold of",
            superblock.threshold.into(),
            expected.threshold.map(u64::from),
        ),
    ];
    for (what, recorded, configured) in checks {
        if let Some(configured) = configured.filter(|&configured| configured != recorded) {
            return Err(Refusal::Contradiction {
                what,
                recorded,
                configured,
            });
        }
    }
    Ok(())
}

/// For a test of rule R5: one copy alone is believed.
fn keep_newest_holder<R>(candidates: &mut [Candidate<'_, R>]) {
    let key = |c: &Candidate<'_, R>| {
        let head = c.newest().filter(|_| c.holder);
        head.map(|head| (head.epoch(), head.sequence))
    };
    let newest = candidates.iter().map(key).max().flatten();
    let mut found = false;
    for candidate in candidates {
        candidate.holder = !found && candidate.holder && key(candidate) == newest;
        found |= candidate.holder;
    }
}
