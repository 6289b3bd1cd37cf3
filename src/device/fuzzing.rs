// SPDX-License-Identifier: Apache-2.0
//! Entry of the fuzzer of descriptor chains. Not an interface of the library.
