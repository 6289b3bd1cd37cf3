// SPDX-License-Identifier: Apache-2.0
//! The command line program; everything it does is in the library.
fn main() {}
