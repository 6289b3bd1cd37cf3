// SPDX-License-Identifier: Apache-2.0
//! A kill between two stores, for tests: from a store on, nothing this thread does reaches shared
//! memory any more.

use std::cell::Cell;

thread_local! {
    static STORES_LEFT: Cell<Option<u32>> = const { Cell::new(None) };
}

/// The thread dies after `stores` more; `None`: it lives.
pub fn set_stores_left(stores: Option<u32>) {
    STORES_LEFT.set(stores);
}

/// To be asked once before every store: whether it does not happen any more.
pub fn is_dead() -> bool {
    match STORES_LEFT.get() {
        None => false,
        Some(0) => true,
        Some(left) => {
            STORES_LEFT.set(Some(left - 1));
            false
        }
    }
}

/// Whether the thread has died.
pub fn has_died() -> bool {
    STORES_LEFT.get() == Some(0)
}
