// SPDX-License-Identifier: Apache-2.0
//! Entries for fuzzers. Not an interface of the library.
