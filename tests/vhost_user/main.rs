// SPDX-License-Identifier: Apache-2.0
//! The real daemon, driven over its socket by a front-end in the test process: what every guest
//! and every VMM relies on, and what no guest and no VMM may be able to do.
//!
//! - `data`: requests of all kinds and sizes; the configuration space.
//! - `statuses`: how requests end that ask for something impossible.
//! - `rings`: framing, feature bits, interrupts, kicks, indices.
//! - `faults`: replicas that lie.
//! - `life`: connections and processes, from their start to their end.
//! - `migration`: two daemons on the same replicas, and the guest on its way.
//! - `inflight`: back-ends that are killed, and what the front-end remembers for the next one.
//! - `memory`: guest memory that comes and goes; a reset in the middle of the work.
//! - `overlaps`: workers that need what others hold.
//! - `guests`: hostile guests.
//! - `front_ends`: hostile front-ends.

#[path = "../common/mod.rs"]
mod common;
mod data;
mod faults;
mod front_ends;
mod guests;
mod inflight;
mod life;
mod memory;
mod migration;
mod overlaps;
mod rings;
mod statuses;
