// SPDX-License-Identifier: Apache-2.0
//! The few primitives that lanes share, in one place, so that a model checker of threads can be
//! put under them: `tests/concurrency.rs` compiles their users beside a module of this name that
//! has shuttle's primitives instead.

pub(super) use std::sync::{
    Mutex,
    atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering, fence},
};
