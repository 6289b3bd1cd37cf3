// SPDX-License-Identifier: Apache-2.0
//! Work that may hang, such as opening a file on dead storage, done by a thread of its own.

use std::io;
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::thread;
use std::time::Duration;

/// Why something was not done.
#[derive(Debug)]
pub enum Unfinished {
    /// It takes too long.
    Late,
    /// There was nobody to do it.
    NoThread(io::Error),
}

/// Does something that may hang on a thread of its own, called `name`, and waits for it no longer
/// than `limit`. What it ends with after that is dropped.
///
/// # Errors
/// [`Unfinished`].
///
/// # Panics
/// If the work does.
pub fn within<T: Send + 'static>(
    name: &str,
    limit: Duration,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Unfinished> {
    let (sender, receiver) = sync_channel(1);
    let worker = thread::Builder::new().name(name.to_owned());
    worker
        .spawn(move || {
            // Nobody waits any more if it took too long.
            let _ = sender.send(work());
        })
        .map_err(Unfinished::NoThread)?;
    receiver.recv_timeout(limit).map_err(|error| match error {
        RecvTimeoutError::Timeout => Unfinished::Late,
        RecvTimeoutError::Disconnected => panic!("the work of a thread panicked"),
    })
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn work_is_waited_for_up_to_the_limit() {
        let done = within("test", Duration::from_secs(20), || 7);
        assert!(matches!(done, Ok(7)));
        let (go_on, waiting) = channel::<()>();
        let late = within("test", Duration::from_millis(1), move || waiting.recv());
        assert!(matches!(late, Err(Unfinished::Late)));
        drop(go_on);
    }
}
