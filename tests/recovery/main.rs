// SPDX-License-Identifier: Apache-2.0
//! The real daemon under a front-end in the test process, and everything a disk meets in its life:
//! replicas that hang, fail, vanish and come back stale, daemons that are killed, hosts that lose
//! power. A model knows what each sector may hold at any moment; afterwards all replicas must
//! become byte-identical.
//!
//! - `site`: the daemon, its replicas, what it says of itself.
//! - `model`: what each sector may hold.
//! - `guest`: writes, reads and flushes, checked against the model.
//! - `failing`: replicas that hang or fail for a while.
//! - `growing`: the disk becomes longer;
//! - `leaving`: files that are taken away, exchanged, cut short.
//! - `kills`: the daemon is killed.
//! - `power`: unflushed writes are lost.
//! - `records`: copies of the state record fail.
//! - `starts`: what a start decides.
//! - `storm`: one fault after the other, and kills in the middle of them.
//! - `pausing`: requests wait for replicas to come back.
//! - `stopping`: the daemon is to end while a replica hangs.
//! - `upkeep`: first comparison, scrub, status.
//!
//! Files that go wrong on command need root and FUSE (`tests/vm/faulty_file.py`); without, those
//! tests fail.

#[path = "../common/mod.rs"]
mod common;
mod failing;
mod growing;
mod guest;
mod kills;
mod leaving;
mod model;
mod pausing;
mod power;
mod records;
mod site;
mod starts;
mod stopping;
mod storm;
mod upkeep;
