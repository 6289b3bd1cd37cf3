// SPDX-License-Identifier: Apache-2.0
//! The warden of a replica: a thread for what may block on its file or device. It looks now and
//! then whether the replica is still where it was, and opens it again after it was lost.
//!
//! The maintenance thread gives orders and is told by mail; it never waits for a warden, which may
//! hang on a dead network file system for as long as that pleases.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Weak};
use std::thread;
use std::time::Duration;

use tracing::{debug, info, warn};

use super::worker::Message;
use crate::device::mailbox::Mailbox;
use crate::replica::{Fingerprint, Presence, RawOptions, Replica, lengthen, open_one_beside};
use crate::units::{ReplicaId, SECTOR_BYTES};

/// From one look to the next.
const LOOK_INTERVAL: Duration = Duration::from_secs(2);

/// What the maintenance thread wants of a warden.
pub enum Order {
    /// The replica is in use: look after it.
    Watch(Weak<Replica>),
    /// The last operation on the replica has landed: remember what it is like and close it. It is
    /// the last reference there is.
    Close(Arc<Replica>),
    /// Open the replica, beside these.
    Open(Vec<Option<Arc<Replica>>>),
}

/// A replica that was opened again.
#[derive(Debug)]
pub struct Reopened {
    /// The replica.
    pub replica: Arc<Replica>,
    /// Whether it is the one that was lost, and nobody wrote to it meanwhile.
    pub same: bool,
}

/// What is known of a replica that is not open.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Left {
    /// What it must be like to be the one that left, with nothing written to it since.
    pub same: Option<Fingerprint>,
    /// What was last written down of its file or device, whatever became of it since.
    pub file: Option<Fingerprint>,
}

/// What a warden needs to know.
pub struct WardenSetup {
    /// The slot of the replica.
    pub id: ReplicaId,
    /// How it is opened.
    pub options: RawOptions,
    /// What it was like when it was left, if it is not open.
    pub left: Left,
    /// Sectors of the disk.
    pub sectors: u64,
    /// Logical blocks of the disk, in bytes.
    pub block_bytes: u32,
    /// Where it reports.
    pub maintenance: Arc<Mailbox<Message>>,
}

/// Starts a warden. It ends when the sender of its orders is dropped; nobody waits for that.
///
/// # Errors
/// If there is no thread to be had.
pub fn spawn(setup: WardenSetup) -> std::io::Result<Sender<Order>> {
    let (orders, inbox) = channel();
    thread::Builder::new()
        .name(format!("warden{}", setup.id.index()))
        .spawn(move || Warden::new(setup).run(&inbox))?;
    Ok(orders)
}

struct Warden {
    setup: WardenSetup,
    watched: Weak<Replica>,
    /// What the replica was like when it was closed.
    left: Option<Fingerprint>,
    /// Attempts to open it that failed since it was lost: only the first is worth a warning.
    failures: u32,
}

impl Warden {
    fn new(setup: WardenSetup) -> Self {
        Self {
            left: setup.left.same,
            setup,
            watched: Weak::new(),
            failures: 0,
        }
    }

    fn run(mut self, inbox: &Receiver<Order>) {
        loop {
            match inbox.recv_timeout(LOOK_INTERVAL) {
                Ok(Order::Watch(replica)) => {
                    self.watched = replica;
                    self.failures = 0;
                }
                Ok(Order::Close(replica)) => {
                    self.watched = Weak::new();
                    self.left = replica.fingerprint().ok();
                }
                Ok(Order::Open(others)) => self.open(&others),
                Err(RecvTimeoutError::Timeout) => self.look(),
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    fn look(&mut self) {
        // Not kept longer than the look takes: whoever drops the last reference closes the file,
        // and with it gives up the locks.
        let Some(replica) = self.watched.upgrade() else {
            return;
        };
        let what = match replica.is_still_there() {
            Ok(Presence::There) => return,
            Ok(Presence::Gone) => "its file or device is gone".to_owned(),
            Ok(Presence::Replaced) => "another file or device is in its place".to_owned(),
            Ok(Presence::Shrunk { .. }) => "it has become shorter".to_owned(),
            // A path that cannot be looked at says nothing about the file that is open.
            Err(error) => {
                debug!(replica = replica.name(), %error, "cannot look after the replica");
                return;
            }
        };
        warn!(
            replica = replica.name(),
            "replica {}: {what}",
            replica.name()
        );
        self.watched = Weak::new();
        let replica = self.setup.id;
        self.setup.maintenance.post(Message::Vanished { replica });
    }

    /// A file that was cut short, or missed that the disk became longer (rule Z3), gets the length of
    /// the disk: it is the one that was lost, and what is missing in it is copied to it like all
    /// that it missed. Returns whether it was, until then, as it was left.
    fn restore_length(&self, others: &[Option<Arc<Replica>>]) -> bool {
        let path = &self.setup.options.path;
        let length_bytes = self.setup.sectors * SECTOR_BYTES;
        let Ok(now) = Fingerprint::of_path(path) else {
            return false;
        };
        // Where less is known of it, its length must be what it was: else it is not certain that
        // all it lacks is what was added.
        let file = self.setup.left.file;
        let file = file.filter(|file| file.size_bytes == now.size_bytes);
        let Some(left) = self.left.or(file) else {
            return false;
        };
        let ours = (now.inode, now.device) == (left.inode, left.device);
        if !ours || now.size_bytes >= length_bytes || self.setup.options.read_only {
            return false;
        }
        let restored = lengthen(&self.setup.options, others, length_bytes);
        if restored.is_ok() {
            let name = &self.setup.options.name;
            info!(
                replica = name,
                "replica {name} was {} bytes long and has the length of the disk again",
                now.size_bytes
            );
        }
        restored.is_ok() && self.left.is_some_and(|left| now.is_unchanged_since(&left))
    }

    fn open(&mut self, others: &[Option<Arc<Replica>>]) {
        let untouched = self.restore_length(others);
        let setup = &self.setup;
        let name = &setup.options.name;
        let opened = open_one_beside(&setup.options, others, setup.sectors, setup.block_bytes);
        let reopened = match opened {
            Ok((replica, note)) => {
                if let Some(note) = note {
                    info!("{note}");
                }
                let found = replica.found();
                let same = untouched
                    || self
                        .left
                        .is_some_and(|left| found.is_unchanged_since(&left));
                info!(
                    replica = name,
                    "replica {name} is back{}",
                    if same {
                        ""
                    } else {
                        ", but changed or another one: it is compared as a whole and rewritten \
                         where it differs"
                    }
                );
                Some(Reopened { replica, same })
            }
            Err(error) => {
                if self.failures == 0 {
                    warn!(replica = name, "{error}; it is tried again");
                } else {
                    debug!(replica = name, "{error}");
                }
                self.failures = self.failures.saturating_add(1);
                None
            }
        };
        let replica = setup.id;
        setup
            .maintenance
            .post(Message::Opened { replica, reopened });
    }
}
