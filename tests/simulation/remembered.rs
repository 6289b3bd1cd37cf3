// SPDX-License-Identifier: Apache-2.0
//! Watches the marks: whoever is cleared must deserve it (invariant I4, rules W8, Y5).

use crate::budget::REPLICAS;
use crate::quorum::{Bitmap, Marks};
use crate::trace::{Verdict, violation};
use crate::units::{ReplicaId, ReplicaSet};
use crate::world::World;

/// The marks after an event, a bit an extent.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct Seen {
    dirty: u64,
    behind: [u64; REPLICAS],
    up: ReplicaSet,
    unresolved: u64,
}

impl Seen {
    /// Whether the replica was behind in the extent, as far as it was up.
    pub fn is_behind(&self, extent: u64, replica: ReplicaId) -> bool {
        self.behind[replica.index()] >> extent & 1 > 0
    }
}

fn mask(marks: &Marks, bitmap: Bitmap) -> u64 {
    marks.iter(bitmap).map(|extent| 1 << extent).sum()
}

fn bits(mut mask: u64) -> impl Iterator<Item = u64> {
    std::iter::from_fn(move || {
        if mask == 0 {
            return None;
        }
        let bit = mask.trailing_zeros();
        mask &= mask - 1;
        Some(u64::from(bit))
    })
}

impl World {
    fn look(&self) -> Seen {
        let members = &self.shared.membership;
        let marks = members.marks();
        let mut seen = Seen {
            dirty: mask(marks, Bitmap::Dirty),
            behind: [0; REPLICAS],
            up: members.up(),
            unresolved: 0,
        };
        for replica in members.replicas().iter() {
            if marks.count(Bitmap::Behind(replica)) > 0 {
                seen.behind[replica.index()] = mask(marks, Bitmap::Behind(replica));
            }
        }
        let unresolved = &self.shared.unresolved;
        if unresolved.extents() > 0 || unresolved.sectors() > 0 {
            let geometry = self.shape.geometry;
            let open = |&extent: &u64| unresolved.touches(geometry.extent_range(extent));
            let extents = (0..geometry.extents()).filter(open);
            seen.unresolved = extents.map(|extent| 1 << extent).sum();
        }
        seen
    }

    /// Whether the replica was behind before the event that is being handled, and still is. What
    /// one event leads to has no order between its parts: a mark may be younger than an operation.
    pub fn was_behind(&self, extent: u64, replica: ReplicaId) -> bool {
        let behind = self.before.behind[replica.index()] >> extent & 1 > 0;
        let members = &self.shared.membership;
        (behind || !self.before.up.contains(replica)) && !members.current(extent).contains(replica)
    }

    /// Takes the marks as they are, whatever they were.
    pub fn take_marks(&mut self) {
        self.seen = self.look();
        self.before = self.seen;
        self.tell_budget();
    }

    /// Looks what has been marked, and checks what is not marked any more.
    pub fn note_marks(&mut self) -> Verdict {
        let now = self.look();
        let before = self.seen;
        self.before = before;
        if now == before {
            return Ok(());
        }
        self.seen = now;
        self.tell_budget();
        for extent in bits(before.dirty & !now.dirty) {
            self.tally.count("extents cleaned");
            self.check_clean(extent)?;
        }
        for replica in self.shared.membership.replicas().iter() {
            let slot = replica.index();
            for extent in bits(before.behind[slot] & !now.behind[slot]) {
                self.tally.count("extents resynced");
                self.check_returned(extent, replica)?;
            }
        }
        Ok(())
    }

    fn tell_budget(&mut self) {
        let replicas = self.shared.membership.replicas();
        let gone = replicas.minus(self.seen.up).bits();
        for extent in 0..self.shape.geometry.extents() {
            let mut absent = gone;
            for (replica, behind) in self.seen.behind.iter().enumerate() {
                if behind >> extent & 1 > 0 {
                    absent |= 1 << replica;
                }
            }
            let frozen = self.seen.unresolved >> extent & 1 > 0;
            self.budget.set_absent(extent, absent, frozen);
        }
    }

    /// I4, W8: all copies that are not behind are equal and durable.
    fn check_clean(&self, extent: u64) -> Verdict {
        let members = &self.shared.membership;
        let behind = |replica: ReplicaId| members.is_behind(extent, replica);
        if let Some(replica) = self.operations.written_in(extent).find(|&r| !behind(r)) {
            let what = format!("extent {extent} is called clean while {replica:?} is written");
            return violation("I4", what);
        }
        self.check_copies(extent, "I4", behind, true)
    }

    /// Y5: the copy that came back is equal to the others, and durable.
    fn check_returned(&self, extent: u64, replica: ReplicaId) -> Verdict {
        let members = &self.shared.membership;
        let behind = |other: ReplicaId| other != replica && members.is_behind(extent, other);
        self.check_copies(extent, "Y5", behind, false)?;
        let mut sectors = self.sectors_of(extent);
        let volatile = |&sector: &u64| !self.disks[replica.index()].is_durable(sector);
        match sectors.find(volatile) {
            Some(sector) => violation(
                "Y5",
                format!("{replica:?} is current in extent {extent}, sector {sector} not flushed"),
            ),
            None => Ok(()),
        }
    }

    fn sectors_of(&self, extent: u64) -> std::ops::Range<u64> {
        let range = self.shape.geometry.extent_range(extent);
        range.start()..range.end()
    }

    /// All copies but those that are `behind` hold the same, something the guest may see, and
    /// durably if that is asked for. Silent faults are excused.
    fn check_copies(
        &self,
        extent: u64,
        rule: &'static str,
        behind: impl Fn(ReplicaId) -> bool,
        durable: bool,
    ) -> Verdict {
        if self.profile.excess > 0 {
            // What is right nobody may know any more; reads are checked.
            return Ok(());
        }
        let members = self.shared.membership.replicas();
        let copies: Vec<ReplicaId> = members.iter().filter(|&r| !behind(r)).collect();
        for sector in self.sectors_of(extent) {
            let mut known = None;
            for &replica in &copies {
                let slot = replica.index();
                if self.budget.is_tainted(sector, slot) {
                    continue;
                }
                let value = self.disks[slot].value(sector);
                let what = if *known.get_or_insert(value) != value {
                    "differs from another copy"
                } else if durable && !self.disks[slot].is_durable(sector) {
                    "is not flushed"
                } else {
                    continue;
                };
                let what = format!("{replica:?} in sector {sector} ({value:#x}) {what}");
                return violation(rule, format!("extent {extent}: {what}"));
            }
            if let Some(value) = known
                && !self.model.is_legal_now(sector, value)
            {
                let what = format!("all current copies hold {value:#x} in sector {sector}");
                return violation(rule, what);
            }
        }
        Ok(())
    }

    /// What a record must say when it is opened, whatever happened (I4, I8): in clean extents all
    /// copies that are not behind are equal and durable, and nowhere is such a copy stale.
    pub fn check_opened(&self, marks: &Marks) -> Verdict {
        if self.profile.excess > 0 {
            return Ok(());
        }
        for extent in 0..self.shape.geometry.extents() {
            let behind = |replica| marks.is_set(Bitmap::Behind(replica), extent);
            if !marks.is_set(Bitmap::Dirty, extent) {
                self.check_copies(extent, "I4", behind, true)?;
                continue;
            }
            let members = self.shared.membership.replicas();
            for replica in members.iter().filter(|&replica| !behind(replica)) {
                for sector in self.sectors_of(extent) {
                    let slot = replica.index();
                    let value = self.disks[slot].value(sector);
                    if !self.budget.is_tainted(sector, slot)
                        && !self.model.is_legal_now(sector, value)
                    {
                        let what = format!("{replica:?} holds {value:#x} in sector {sector}");
                        let legal = self.model.describe(sector);
                        return violation("I8", format!("{what} and is not behind; {legal}"));
                    }
                }
            }
        }
        Ok(())
    }

    /// Whether a copy that is not behind must be told from the others after a crash: sectors of
    /// which one copy is silently wrong are decided by the others, so these must agree.
    pub fn agree_where_tainted(&mut self) {
        for sector in 0..self.shape.geometry.sectors() {
            let tainted = self.budget.tainted_copies(sector);
            if tainted == 0 {
                continue;
            }
            let replicas = 0..self.disks.len();
            let sound: Vec<usize> = replicas
                .filter(|&r| tainted >> r & 1 == 0)
                .filter(|&r| self.model.is_legal_now(sector, self.disks[r].value(sector)))
                .collect();
            if sound.is_empty() {
                continue;
            }
            let value = self.disks[self.rng.pick(&sound)].value(sector);
            for &replica in &sound {
                if self.disks[replica].value(sector) != value {
                    self.disks[replica].rot(sector, value);
                }
            }
        }
    }

    /// Heals silent faults where more copies are bad than may be: a record may remember more
    /// replicas as behind than there were.
    pub fn stay_within_budget(&mut self) {
        for sector in 0..self.shape.geometry.sectors() {
            if !self.budget.is_overdrawn(sector) {
                continue;
            }
            let extent = self.shape.geometry.extent_of(sector);
            let members = self.shared.membership.replicas();
            let tainted = self.budget.tainted_copies(sector);
            let mut sound = members.iter().filter(|&replica| {
                let value = self.disks[replica.index()].value(sector);
                tainted >> replica.index() & 1 == 0
                    && self.seen.behind[replica.index()] >> extent & 1 == 0
                    && self.model.is_legal_now(sector, value)
            });
            let Some(source) = sound.next() else { continue };
            let value = self.disks[source.index()].value(sector);
            for replica in 0..self.disks.len() {
                if tainted >> replica & 1 > 0 {
                    self.disks[replica].rot(sector, value);
                    self.budget.cleanse(sector, replica);
                }
                if self.disks[replica].mend(sector) {
                    self.budget.unshade(sector, replica);
                }
            }
        }
    }

    /// Extents in which some replica is behind, dirty extents, and whether anything is in U.
    pub fn is_in_order(&self) -> bool {
        let members = &self.shared.membership;
        let behind = self.seen.behind.iter().any(|&behind| behind > 0);
        !behind
            && self.seen.dirty == 0
            && self.seen.unresolved == 0
            && members.up() == members.replicas()
            && members.lagging().is_empty()
    }

    /// What keeps the disk from being in order, for people.
    pub fn list_disorder(&self) -> String {
        let members = &self.shared.membership;
        format!(
            "dirty {:#x}, behind {:x?}, unresolved {:#x}, up {:?}, lagging {:?}",
            self.seen.dirty,
            &self.seen.behind[..self.disks.len()],
            self.seen.unresolved,
            members.up(),
            members.lagging()
        )
    }

    /// An extent as an index of the budget.
    pub fn is_dirty_for_good(&self, extent: u64) -> bool {
        let marks = self.shared.membership.marks();
        marks.is_durable(Bitmap::Dirty, extent)
    }

    /// Whether everybody who is not in `holders` is behind for good.
    pub fn are_behind_for_good(&self, extent: u64, holders: &[usize]) -> bool {
        let marks = self.shared.membership.marks();
        let mut replicas = self.shared.membership.replicas().iter();
        replicas.all(|replica| {
            holders.contains(&replica.index()) || marks.is_durable(Bitmap::Behind(replica), extent)
        })
    }
}
