// SPDX-License-Identifier: Apache-2.0
//! Which socket of the parent process is meant: one that has a number, or the one that systemd
//! passes to a service with a `.socket` unit.

use std::fmt;
use std::str::FromStr;

use serde::Deserialize;
use serde::de::{self, Deserializer, Visitor};
use thiserror::Error;

/// The word for the socket that a service manager passes.
const SYSTEMD: &str = "systemd";

/// The value of `--fd`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum InheritedSocket {
    /// A descriptor.
    Fd(i32),
    /// Whatever LISTEN_FDS says (sd_listen_fds(3)).
    Systemd,
}

/// Neither.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
#[error(
    "`{0}` is no descriptor; give the number of an open one, or `{SYSTEMD}` for the socket of a \
     .socket unit"
)]
pub struct InheritedSocketError(String);

impl FromStr for InheritedSocket {
    type Err = InheritedSocketError;

    fn from_str(text: &str) -> Result<Self, InheritedSocketError> {
        if text == SYSTEMD {
            return Ok(Self::Systemd);
        }
        let number = text.parse().map(Self::Fd);
        number.map_err(|_| InheritedSocketError(text.to_owned()))
    }
}

impl<'de> Deserialize<'de> for InheritedSocket {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct SocketVisitor;

        impl Visitor<'_> for SocketVisitor {
            type Value = InheritedSocket;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "the number of an open descriptor or \"{SYSTEMD}\"")
            }

            fn visit_i64<E: de::Error>(self, number: i64) -> Result<InheritedSocket, E> {
                let fd = i32::try_from(number).map(InheritedSocket::Fd);
                fd.map_err(|_| E::invalid_value(de::Unexpected::Signed(number), &self))
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<InheritedSocket, E> {
                text.parse().map_err(E::custom)
            }
        }

        deserializer.deserialize_any(SocketVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn number_and_word_are_read_and_the_rest_is_refused() {
        assert_eq!("3".parse(), Ok(InheritedSocket::Fd(3)));
        assert_eq!("-1".parse(), Ok(InheritedSocket::Fd(-1)));
        assert_eq!("systemd".parse(), Ok(InheritedSocket::Systemd));
        for text in ["", "x", "3 ", "Systemd", "4294967296"] {
            let error = text.parse::<InheritedSocket>().unwrap_err().to_string();
            assert!(error.contains("or `systemd`"), "{error}");
        }
    }
}
