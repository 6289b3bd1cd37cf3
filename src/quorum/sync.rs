// SPDX-License-Identifier: Apache-2.0
//! The few primitives that lanes share, in one place, so that a model checker of threads can be
//! put under them: a test that is built with `cfg(shuttle)` runs the same code on shuttle's.

#[cfg(not(shuttle))]
pub(super) use std::sync::{
    Mutex,
    atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering, fence},
};

#[cfg(shuttle)]
pub(super) use shuttle::sync::{
    Mutex,
    atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering, fence},
};
