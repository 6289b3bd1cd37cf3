// SPDX-License-Identifier: Apache-2.0
//! Interim: everything a daemon does before it serves.

use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use thiserror::Error;
use tracing::{info, warn};

use super::maintenance::OpenRecord;
use crate::config::{Cache as CacheChoice, Config, Format as FormatChoice};
use crate::quorum::{Geometry, KeeperStart, KeeperState, Policy, PolicyError, Shared};
use crate::replica::{
    Cache, Format, OpenError, RawOptions, Replica, SetError, SetShape, check_set, open_set,
};

/// Pause between two looks at a lock.
const LOCK_RETRY: Duration = Duration::from_millis(20);

#[derive(Debug, Error)]
pub enum StartError {
    /// A replica cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The replicas do not make a disk.
    #[error(transparent)]
    Set(#[from] SetError),
    /// The policy contradicts itself.
    #[error(transparent)]
    Policy(#[from] PolicyError),
}

pub struct Start {
    pub shared: Arc<Shared>,
    pub replicas: Vec<Option<Arc<Replica>>>,
    pub options: Vec<RawOptions>,
    pub shape: SetShape,
    pub record: Option<OpenRecord>,
    pub keeper: KeeperStart,
}

pub fn start(config: &Config) -> Result<Start, StartError> {
    let options: Vec<RawOptions> = config
        .replicas
        .iter()
        .map(|r| raw_options(config, r))
        .collect();
    let replicas = open_when_free(&options, config.lock_timeout)?;
    let block_bytes = config.block_size.map(|size| size.bytes());
    let replicas: Vec<Option<Arc<Replica>>> = replicas.into_iter().map(Some).collect();
    let shape = check_set(&replicas, config.threshold, block_bytes, None)?;
    describe(&replicas, &shape, config.read_only);
    let policy = Policy {
        discard_zeroes: shape.can_zero_exactly,
        ..config.policy()
    };
    let block_sectors = shape.block_bytes / 512;
    let geometry = Geometry::new(shape.sectors, block_sectors)?;
    let shared = Arc::new(Shared::new(geometry, policy)?);
    Ok(Start {
        shared,
        replicas,
        options,
        shape,
        record: None,
        keeper: KeeperState::fresh(),
    })
}

/// Opens the replicas, waiting for those that somebody else has locked: a daemon that was killed
/// keeps its locks until its last operation has landed (rules K2, S2).
fn open_when_free(
    options: &[RawOptions],
    timeout: Duration,
) -> Result<Vec<Arc<Replica>>, OpenError> {
    let begin = Instant::now();
    loop {
        match open_set(options) {
            Err(error) if error.is_in_use() && begin.elapsed() < timeout => {
                if begin.elapsed() < LOCK_RETRY {
                    info!("{error}; waiting up to {} s for it", timeout.as_secs());
                }
                thread::sleep(LOCK_RETRY);
            }
            result => return result,
        }
    }
}

fn raw_options(config: &Config, replica: &crate::config::Replica) -> RawOptions {
    let mut options = RawOptions::new(replica.name.clone(), PathBuf::from(&replica.path));
    options.cache = match replica.cache {
        CacheChoice::Direct => Cache::Direct,
        CacheChoice::Buffered => Cache::Buffered,
    };
    options.format = replica.format.map(|format| match format {
        FormatChoice::Raw => Format::Raw,
    });
    // Rule Z4: a disk that is read-only to the guest is repaired only where that was asked for.
    options.read_only = config.read_only && !config.repair;
    options
}

fn describe(replicas: &[Option<Arc<Replica>>], shape: &SetShape, guest_is_reader: bool) {
    for note in &shape.notes {
        warn!("{note}");
    }
    for replica in replicas.iter().flatten() {
        info!(
            replica = replica.name(),
            path = %replica.path().display(),
            bytes = replica.length_bytes(),
            "opened"
        );
    }
    if !shape.can_zero_exactly && !guest_is_reader {
        info!("discards are ignored: not every replica can zero exact ranges");
    }
}
