// SPDX-License-Identifier: Apache-2.0
//! Tests of the record as a whole.

mod support;

mod basics;
mod damage;
mod format;
mod power;
mod size;
