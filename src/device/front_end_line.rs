// SPDX-License-Identifier: Apache-2.0
//! The socket on which we may tell the front-end something (SET_BACKEND_REQ_FD of the vhost-user
//! specification).

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::net::{SendFlags, send};

/// Request VHOST_USER_BACKEND_CONFIG_CHANGE_MSG.
const CONFIG_CHANGE: u32 = 2;

/// Version 1, and no reply is asked for.
const FLAGS: u32 = 1;

/// Whether a front-end heard of something.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Told {
    /// It was sent the message.
    Yes,
    /// There is no front-end, it gave no socket, or does not read from it: it sees what is new when
    /// it asks the next time.
    No,
}

/// The socket of the front-end there is, if it gave one. QEMU takes its closing for a failure, so it
/// is kept until the connection ends.
#[derive(Clone, Debug, Default)]
pub struct FrontEndLine(Arc<Mutex<Option<OwnedFd>>>);

impl FrontEndLine {
    /// The front-end gave this socket.
    pub fn set(&self, socket: OwnedFd) {
        *self.lock() = Some(socket);
    }

    /// The connection has ended.
    pub fn clear(&self) {
        *self.lock() = None;
    }

    /// Tells the front-end to read the configuration space again. Never waits.
    #[must_use]
    pub fn config_changed(&self) -> Told {
        let Some(socket) = &*self.lock() else {
            return Told::No;
        };
        let words = [CONFIG_CHANGE, FLAGS, 0];
        let message = words.map(u32::to_ne_bytes).concat();
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        match send(socket, &message, flags) {
            Ok(sent) if sent == message.len() => Told::Yes,
            Ok(_) | Err(_) => Told::No,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<OwnedFd>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn change_is_told_to_who_gave_a_socket_and_nobody_is_waited_for() {
        let line = FrontEndLine::default();
        assert_eq!(line.config_changed(), Told::No);
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        line.set(ours.into());
        assert_eq!(line.config_changed(), Told::Yes);
        let mut message = [0; 12];
        theirs.read_exact(&mut message).unwrap();
        assert_eq!(message, [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        // One that does not read does not hold us up.
        while line.config_changed() == Told::Yes {}
        drop(theirs);
        assert_eq!(line.config_changed(), Told::No);
        line.clear();
        assert_eq!(line.config_changed(), Told::No);
    }
}
