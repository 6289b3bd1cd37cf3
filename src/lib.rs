// SPDX-License-Identifier: Apache-2.0
//! A vhost-user block back-end that keeps one virtual disk on N replicas and returns, sector by
//! sector, what at least T of them agree on.
//!
//! The map, from the inside out; imports point upwards only:
//!
//! - [`units`]: sectors, ranges, replicas, time.
//! - [`quorum`]: the voting core and the keeper of a disk, state machines without I/O.
//! - [`record`]: what the disk remembers of itself: on-disk format, opening, and when what is
//!   written, a state machine without I/O too.
//! - [`io`], [`replica`]: the ring, the buffers, and how an operation becomes I/O on a replica.
//! - [`device`]: the virtio-blk and vhost-user side: descriptor chains, config space, connections.
//! - [`config`]: what the user asked for, checked.
//! - [`control`]: events for people and programs, counters.
//! - [`daemon`]: how a disk is started, workers, maintenance, signals, the life of the process.
//! - [`cli`], [`record_cli`]: the command line; `quorum-blk record`, which looks at a disk's record
//!   while, or before, no daemon has it.
//! - [`ctl`]: `quorum-blk ctl`, the client of a daemon's control socket.
//! - [`front_end`], [`demo`]: a small virtio-blk driver of our own and the demonstration that uses it.

pub mod cli;
pub mod config;
pub mod control;
pub mod ctl;
pub mod daemon;
pub mod demo;
pub mod device;
pub mod front_end;
pub mod io;
pub mod quorum;
pub mod record;
pub mod record_cli;
pub mod replica;
pub mod units;
