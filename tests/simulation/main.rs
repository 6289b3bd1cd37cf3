// SPDX-License-Identifier: Apache-2.0
//! The deterministic simulator of the voting core, of its state record and of its keeper: several
//! lanes over simulated disks, with a virtual clock, driven by one seed. Whatever they do is checked
//! at every step.
//!
//! # What happens
//!
//! A guest keeps each lane's queue filled with short reads, writes, zeroes, discards and flushes,
//! half of them on the same few sectors, without regard for what is in flight. Operations take
//! from 20 us to 10 ms and complete in any order; sectors of one operation meet the medium at its
//! submission, at its completion, or some at each. Wakeups between lanes and the publication of
//! replies are delayed, timers fire late, pools are small.
//!
//! Some profiles have no record (`profile`). In the others (`lives`) a daemon has a record of K
//! copies, a recorder, a keeper and a maintenance lane (`maintenance`), which resolve, resync, scrub,
//! probe and clean at a pace that fits the virtual time of a run. A daemon lives until it is killed,
//! stopped or loses power (`crash`); the next one opens the record with what there is of it and
//! leaves out members that are not there (`start`). Guests begin anew (a cold start), or repeat what was
//! in flight (a warm one, `inflight`, in profiles `warm-...`), and now and
//! then nothing but majorities is decided until the front-end has connected (rule S4).
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
//! | hung operation, hung replica | completes when the run ends; with a record 0.1 to 4 s later, and the replica is kicked |
//! | slow operation, slow replica | reads 10 to 70 ms, writes 25 to 300 ms (`write-grace` is 20 to 100 ms) |
//! | flush error, hung flush | as named; a failed flush leaves pages clean that the medium lacks (`cache`, rules F3, F4) |
//! | member gone | for 1 to 300 ms: operations fail, it cannot be opened; then it is back, stale |
//! | member left out | not there when a daemon starts |
//! | member replaced | another file is in its place when it is opened again, or when the next daemon starts |
//! | member changed | somebody writes to it between a clean stop and the next start (rule S3) |
//! | kill | of every operation in flight any sectors land before the next start (rule K2); nothing else is lost |
//! | power loss | of every sector of a replica any unflushed content survives, or the flushed one |
//! | record write | fails and lands in part; takes up to 300 ms; hangs for 5 s; the copy is full until an operator looks |
//! | record copy | lost and replaced by an empty file, or not there at a start |
//! | record, daemon ends | writes in flight land in full, not, or in any 512-byte parts; completed ones survive (O_DSYNC) |
//!
//! Daemons end at any step: during creation, opening, resync, clean stop, twice in a row.
//!
//! Every fault is paid from a budget: at most N-T replicas are bad at a sector at once, and fewer
//! than half of the copies of the record. A replica counts as bad where it is behind, not up or about
//! to be either, where its content is wrong or cannot be read, and for 150 ms after a transfer of it
//! went wrong. Not done, because no vote could stand them, are: reads that fail on more than N-T
//! replicas because of *different* sectors of one request; content that changes on its own while that
//! sector is being written, since a read without a lock may have shown the new version already, or
//! while it is in U; more than one bad copy where the threshold is a minority; unequal sound copies of
//! a sector with a silently wrong one after a crash (CONSISTENCY section 13: the daemon could not tell
//! which version is wrong, so the sound copies are made equal first). Rot that was overwritten does
//! not come back with a loss of power, and a late write is not lost by one. Profiles `storm...` go beyond the
//! budget with write errors alone: requests may fail, nothing may go wrong. Profiles `beyond...` have
//! one bad copy too many: what is silently wrong is counted, and must be explained by more than N-T
//! bad copies of that very sector. In `record-lost` more copies of the record fail than may: writes
//! fail then, reads do not. Where clears that were lost leave an extent without any current copy, a
//! copy that was current is named, as an operator would, and counted.
//!
//! # What is checked
//!
//! I1, I7 and I8 against a model of what the guest may see (`model`), I2 with D* and B* at every
//! acknowledgement, I3 (D*), I6, I10, L2, L3 and W3 at every submission, I5 and F2 at every flush, I14
//! at every reply and by progress, I15 in runs without faults, that blame, repair, kicks and behind
//! marks are deserved (Y2, Y4), the rules of buffers (V7), one reply a request. Whenever D is cleared:
//! all copies that are not behind are equal and durable (I4, W8); whenever B is: the copy is equal to
//! the others and durable (Y5) (`remembered`). Whenever the record is written: the older slot of a page
//! (I13). At every start: that the record opens with any majority of its copies, that epochs rise
//! (I12), I4 for what it calls clean, and that no copy which it does not call behind is stale. At the
//! end that nothing is left over: all members back, B, U and D empty, all copies equal after every
//! sector was read once more (I9).
//!
//! Not simulated: NBD (K3), growing, adding and removing members, suspects and
//! budgets of the keeper, forced opening of a minority, several pages of a map.
//!
//! # Broken builds
//!
//! `broken` and `broken_lives` run the core with one rule broken at a time and assert that a check
//! notices; `scripted` does so for courses that chance seldom makes.
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
mod broken_warm;
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
mod inflight;
mod landing;
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
mod script;
mod scripted;
mod scripted_quorum;
mod start;
mod trace;
mod world;
