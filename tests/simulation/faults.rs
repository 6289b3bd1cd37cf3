// SPDX-License-Identifier: Apache-2.0
//! Which operation meets which fault, as far as the budget goes.

use crate::budget::{Budget, REPLICAS};
use crate::profile::{Ailment, Rates};
use crate::quorum::OperationKind;
use crate::rng::Rng;
use crate::trace::Tally;
use crate::units::SectorRange;

/// Milliseconds in nanoseconds.
pub const MS: u64 = 1_000_000;

/// Latencies above this may cost a write its replica: the core waits at least 20 ms.
const PROMPT_MAX: u64 = 10 * MS;

/// Single operations that hang in one run.
const HANGS_MAX: usize = 4;

/// How long a replica that hangs may not be relied on: it hangs, is kicked, comes back.
const HUNG_COUNTS: u64 = 6_000 * MS;

/// A replica that is late this often in [`LATE_WINDOW`] may be lagging soon.
const LATE_TIMES: u32 = 5;

/// A second, and what the core may count from before.
const LATE_WINDOW: u64 = 2_000 * MS;

/// What happens to one operation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    None,
    /// Ends with this errno; of a write, the sectors in `landed` reach the medium.
    Errno {
        errno: i32,
        landed: u64,
    },
    Short,
    /// What is read of one sector is not what the medium holds.
    Garbled {
        sector: u32,
    },
    /// Called complete; nothing reaches the medium.
    Lost,
    /// Called complete; only these sectors reach the medium.
    Torn {
        landed: u64,
    },
    /// Called complete; the data reach this sector and those after it instead.
    Misdirected {
        to: u64,
    },
    /// Called complete; the data reach the medium this much later.
    Late {
        after: u64,
    },
    /// Ends when the run does.
    Hang,
    /// Nothing is there that could take it.
    Gone,
}

impl Fault {
    /// Whether it spoils one transfer from the medium and nothing else.
    pub fn is_of_one_read(self) -> bool {
        matches!(
            self,
            Fault::Errno { .. } | Fault::Short | Fault::Garbled { .. }
        )
    }

    /// Whether it is a write that says it went well and did not.
    pub fn is_silent_write(self) -> bool {
        matches!(
            self,
            Fault::Lost | Fault::Torn { .. } | Fault::Misdirected { .. } | Fault::Late { .. }
        )
    }
}

/// What the plan wants to know of an operation.
#[derive(Clone, Copy)]
pub struct Candidate {
    pub replica: usize,
    pub kind: OperationKind,
    /// Belongs to a repair: what spoils it costs the replica the extent.
    pub repair: bool,
    /// Buffers enough are left for an operation that never ends.
    pub may_hang: bool,
}

/// Decides about faults.
pub struct Plan {
    pub rates: Rates,
    pub slow: Option<usize>,
    pub hung: Option<usize>,
    hangs: usize,
    /// Replicas that hang are kicked, and those that are late too often are not waited for.
    pub kicks: bool,
    /// Of each replica, when it was first late of late, and how often since.
    late: [(u64, u32); REPLICAS],
    any_read: u64,
    any_write: u64,
    any_flush: u64,
}

impl Plan {
    pub fn new(rates: Rates) -> Self {
        Self {
            any_read: rates.read_error + rates.read_short + rates.read_garbled + rates.hang,
            any_write: rates.write_error
                + rates.write_lost
                + rates.write_torn
                + rates.write_misdirected
                + rates.write_late
                + rates.hang,
            any_flush: rates.flush_error + rates.flush_hang,
            rates,
            slow: None,
            hung: None,
            hangs: 0,
            kicks: false,
            late: [(0, 0); REPLICAS],
        }
    }

    /// Makes a whole replica ail, if the budget has room for that.
    pub fn afflict(&mut self, ailment: Ailment, replica: usize, budget: &mut Budget) -> bool {
        let fits = ailment != Ailment::None && budget.doom_everywhere(replica);
        match ailment {
            Ailment::Slow if fits => self.slow = Some(replica),
            Ailment::Hung if fits => self.hung = Some(replica),
            Ailment::Slow | Ailment::Hung | Ailment::None => {}
        }
        fits
    }

    /// How long the operation takes, in nanoseconds.
    pub fn latency(
        &mut self,
        rng: &mut Rng,
        operation: &Candidate,
        budget: &mut Budget,
        tally: &mut Tally,
    ) -> u64 {
        let ails = self.slow == Some(operation.replica);
        if (ails || rng.chance(self.rates.slow)) && !matches!(operation.kind, OperationKind::Flush)
        {
            match operation.kind {
                OperationKind::Read { .. } => {
                    tally.count("slow read");
                    return rng.between(10 * MS, 70 * MS);
                }
                OperationKind::Write { range, .. } | OperationKind::WriteZeroes { range, .. } => {
                    if self.may_be_late(operation.replica, budget)
                        && budget.doom(range, operation.replica)
                    {
                        tally.count("slow write");
                        return rng.between(25 * MS, 300 * MS);
                    }
                }
                OperationKind::Flush => {}
            }
        }
        match rng.below(100) {
            0..70 => rng.between(20_000, 200_000),
            70..95 => rng.between(200_000, 2 * MS),
            _ => rng.between(2 * MS, PROMPT_MAX),
        }
    }

    /// What goes wrong with the operation.
    pub fn fault(
        &mut self,
        rng: &mut Rng,
        operation: &Candidate,
        budget: &mut Budget,
        tally: &mut Tally,
        beyond_budget: bool,
    ) -> Fault {
        if self.hung == Some(operation.replica) {
            tally.count("hung operation");
            return Fault::Hang;
        }
        match operation.kind {
            OperationKind::Read { range, .. } => {
                if self.any_read == 0 || !rng.chance(self.any_read) {
                    return Fault::None;
                }
                self.read_fault(rng, operation, range, budget, tally)
            }
            OperationKind::Write { range, .. } | OperationKind::WriteZeroes { range, .. } => {
                if self.any_write == 0 || !rng.chance(self.any_write) {
                    return Fault::None;
                }
                if beyond_budget {
                    // A repair that fails would have to be judged; the errors of writes suffice.
                    if operation.repair {
                        return Fault::None;
                    }
                    tally.count("write error");
                    return write_error(rng, range);
                }
                self.write_fault(rng, operation, range, budget, tally)
            }
            OperationKind::Flush => {
                let until = match self.kicks {
                    true => budget.now + HUNG_COUNTS,
                    false => u64::MAX,
                };
                if !rng.chance(self.any_flush) || !budget.doom_until(operation.replica, until) {
                    return Fault::None;
                }
                if rng.below(self.any_flush) < self.rates.flush_error {
                    tally.count("flush error");
                    Fault::Errno {
                        errno: 5,
                        landed: 0,
                    }
                } else {
                    tally.count("hung flush");
                    Fault::Hang
                }
            }
        }
    }

    fn may_hang(&self, operation: &Candidate) -> bool {
        operation.may_hang && (self.kicks || self.hangs < HANGS_MAX)
    }

    /// Whether the budget has room for a replica that hangs.
    fn doom_hung(&self, range: SectorRange, replica: usize, budget: &mut Budget) -> bool {
        if self.kicks {
            return budget.doom_until(replica, budget.now + HUNG_COUNTS);
        }
        budget.doom(range, replica)
    }

    /// Whether one more late write is what the core puts up with, or the budget.
    fn may_be_late(&mut self, replica: usize, budget: &mut Budget) -> bool {
        if !self.kicks {
            return true;
        }
        let (since, times) = &mut self.late[replica];
        if budget.now - *since > LATE_WINDOW {
            (*since, *times) = (budget.now, 0);
        }
        *times += 1;
        *times < LATE_TIMES || budget.doom_until(replica, budget.now + HUNG_COUNTS)
    }

    fn read_fault(
        &mut self,
        rng: &mut Rng,
        operation: &Candidate,
        range: SectorRange,
        budget: &mut Budget,
        tally: &mut Tally,
    ) -> Fault {
        let replica = operation.replica;
        let mut roll = rng.below(self.any_read);
        let mut chosen = |rate: u64| {
            let hit = roll < rate;
            roll = if hit { u64::MAX } else { roll - rate.min(roll) };
            hit
        };
        let rates = &self.rates;
        let hang = chosen(rates.hang);
        let error = chosen(rates.read_error);
        let short = chosen(rates.read_short);
        if hang {
            if !self.may_hang(operation) || !self.doom_hung(range, replica, budget) {
                return Fault::None;
            }
            self.hangs += 1;
            tally.count("hung operation");
            return Fault::Hang;
        }
        let fits = if operation.repair {
            budget.doom(range, replica)
        } else {
            budget.admits(range, replica)
        };
        if !fits {
            return Fault::None;
        }
        budget.hold(range, replica);
        if error {
            tally.count("read error");
            Fault::Errno {
                errno: 5,
                landed: 0,
            }
        } else if short {
            tally.count("short read");
            Fault::Short
        } else {
            tally.count("garbled read");
            let sector = u32::try_from(rng.below(u64::from(range.count()))).expect("a count");
            Fault::Garbled { sector }
        }
    }

    fn write_fault(
        &mut self,
        rng: &mut Rng,
        operation: &Candidate,
        range: SectorRange,
        budget: &mut Budget,
        tally: &mut Tally,
    ) -> Fault {
        let replica = operation.replica;
        let mut roll = rng.below(self.any_write);
        let mut chosen = |rate: u64| {
            let hit = roll < rate;
            roll = if hit { u64::MAX } else { roll - rate.min(roll) };
            hit
        };
        let rates = &self.rates;
        let hang = chosen(rates.hang);
        let error = chosen(rates.write_error);
        let lost = chosen(rates.write_lost);
        let torn = chosen(rates.write_torn);
        let misdirected = chosen(rates.write_misdirected);
        if hang {
            if !self.may_hang(operation) || !self.doom_hung(range, replica, budget) {
                return Fault::None;
            }
            self.hangs += 1;
            tally.count("hung operation");
            return Fault::Hang;
        }
        if error {
            if !budget.doom(range, replica) {
                return Fault::None;
            }
            tally.count("write error");
            return write_error(rng, range);
        }
        // Silent faults: of a repair they are found out at once, and cost the extent.
        if !budget.admits(range, replica) || (operation.repair && !budget.doom(range, replica)) {
            return Fault::None;
        }
        let taint_all = |budget: &mut Budget| {
            for s in range.start()..range.end() {
                budget.taint(s, replica);
            }
        };
        if lost {
            tally.count(if operation.repair {
                "lost repair"
            } else {
                "lost write"
            });
            taint_all(budget);
            return Fault::Lost;
        }
        if torn {
            tally.count("torn write");
            let landed = mask_of(range) & rng.next();
            for (bit, s) in (range.start()..range.end()).enumerate() {
                if landed & (1 << bit) == 0 {
                    budget.taint(s, replica);
                }
            }
            return Fault::Torn { landed };
        }
        if misdirected {
            return match misdirection(rng, range, replica, budget) {
                Some(to) => {
                    tally.count("misdirected write");
                    taint_all(budget);
                    Fault::Misdirected { to }
                }
                None => Fault::None,
            };
        }
        tally.count("late write");
        taint_all(budget);
        budget.hold(range, replica);
        Fault::Late {
            after: rng.between(5 * MS, 400 * MS),
        }
    }
}

/// Where a write may land instead of in `range`.
fn misdirection(
    rng: &mut Rng,
    range: SectorRange,
    replica: usize,
    budget: &mut Budget,
) -> Option<u64> {
    let extent = range.start() >> budget.extent_shift();
    let other = rng.below(budget.sector_count() - u64::from(range.count()));
    let target = SectorRange::new(other, range.count())?;
    // Inside one extent, and not the one of the write itself.
    let landing = other >> budget.extent_shift();
    let whole = (target.end() - 1) >> budget.extent_shift() == landing;
    (landing != extent && whole && budget.admits_rot(target, replica)).then_some(other)
}

fn write_error(rng: &mut Rng, range: SectorRange) -> Fault {
    let landed = match rng.below(3) {
        0 => 0,
        1 => u64::MAX,
        _ => rng.next(),
    };
    Fault::Errno {
        errno: rng.pick(&[5, 28]),
        landed: landed & mask_of(range),
    }
}

/// All sectors of `range`, a bit each.
pub fn mask_of(range: SectorRange) -> u64 {
    u64::MAX >> (64 - range.count())
}

/// The sectors whose bit is set in `mask`, with their place in `range`.
pub fn masked(range: SectorRange, mask: u64) -> impl Iterator<Item = (usize, u64)> {
    (range.start()..range.end())
        .enumerate()
        .filter(move |(bit, _)| mask & (1 << bit) != 0)
}
