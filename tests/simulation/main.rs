// SPDX-License-Identifier: Apache-2.0
//! The deterministic simulator of the voting core.

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

mod broken;
mod budget;
mod checks;
mod clock;
mod content;
mod disk;
mod faults;
mod guest;
mod model;
mod operations;
mod pool;
mod profile;
mod rng;
mod run;
mod trace;
mod world;
