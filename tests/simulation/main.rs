// SPDX-License-Identifier: Apache-2.0
//! The deterministic simulator of the voting core: several lanes over simulated disks, with a
//! virtual clock, driven by one seed. Whatever the lanes do is checked at every step.
//!
//! # What happens
//!
//! A guest keeps each lane's queue filled with short reads, writes, zeroes, discards and flushes,
//! half of them on the same few sectors, without regard for what is in flight. Operations take
//! from 20 us to 10 ms and complete in any order; sectors of one operation meet the medium at its
//! submission, at its completion, or some at each. Wakeups between lanes and the publication of
//! replies are delayed, timers fire late, pools are small.
//!
//! # What goes wrong
//!
//! | fault | how it is simulated |
//! |---|---|
//! | read error, short read | one operation; or a sector that stays unreadable until it is rewritten |
//! | garbled read | one transfer is wrong, the medium is not |
//! | write error | the data reach the medium in full, in part or not at all |
//! | rot | a sector changes to noise, to an old version, to zeroes, to its neighbour's content |
//! | lost, torn write | called complete; none or some of the sectors reach the medium |
//! | misdirected write | called complete; lands on other sectors, in another extent |
//! | late write | called complete; lands 5 to 400 ms later, on top of what was written since |
//! | hung operation, hung replica | completes when the run ends |
//! | slow operation, slow replica | reads 10 to 70 ms, writes 25 to 300 ms (`write-grace` is 20 to 100 ms) |
//! | flush error, hung flush | as named |
//!
//! Every fault is paid from a budget: at most N-T replicas are bad at a sector at once. A replica
//! counts as bad where it is behind or about to be, where its content is wrong or cannot be read,
//! and for 150 ms after a transfer of it went wrong. Three things are not done, because no vote
//! could stand them: reads that fail on more than N-T replicas because of *different* sectors of
//! one request; content that changes on its own while that sector is being written, since a read
//! without a lock may have shown the new version already; more than one bad copy where the
//! threshold is a minority. One profile (`storm`) goes beyond the budget with write errors alone.
//!
//! # What is checked
//!
//! I1 and I7 against a model of what the guest may see (`model`), I2 at every acknowledgement, I3,
//! I6, I10, L2, L3 and W3 at every submission, I5 and F2 at every flush, I14 at every reply and by
//! progress, I15 in runs without faults, that blame, repair and behind marks are deserved (Y2,
//! Y4), the rules of buffers (V7), one reply a request; at the end that nothing is left over, and
//! that all current copies are equal after every sector was read once more.
//!
//! # Broken builds
//!
//! `broken` runs the core with one rule broken at a time and asserts that a check notices.
//!
//! A failure prints the last steps, the seed and the line that replays it; `SIM_TRACE` sets how
//! many steps. `scripts/simulate` runs for longer.

#[allow(
    dead_code,
    unused_imports,
    reason = "the simulator uses a part of the units"
)]
#[path = "../../src/units.rs"]
mod units;

#[allow(
    dead_code,
    unused_imports,
    reason = "the core has parts only the daemon uses"
)]
#[path = "../../src/quorum/mod.rs"]
mod quorum;

#[allow(
    dead_code,
    unused_imports,
    reason = "the record has parts only the daemon uses"
)]
#[path = "../../src/record/mod.rs"]
mod record;

mod broken;
mod broken_lives;
mod budget;
mod cache;
mod checks;
mod clock;
mod content;
mod copies;
mod crash;
mod disk;
mod faults;
mod guest;
mod life;
mod lives;
mod maintenance;
mod model;
mod operations;
mod pool;
mod profile;
mod remembered;
mod rings;
mod rng;
mod run;
mod scripted;
mod start;
mod trace;
mod world;
