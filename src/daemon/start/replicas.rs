// SPDX-License-Identifier: Apache-2.0
//! Opening the replicas of a disk: as many as there are, with patience for locks (rules K2, S2).

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use tracing::{info, warn};

use crate::config::{self, Config};
use crate::replica::{
    Cache, Format, OpenError, RawOptions, Replica, SetShape, check_distinct_within, check_member,
    common_order, open_each, open_within,
};
use crate::units::{ReplicaId, ReplicaSet};

/// Pause between two looks at a lock, as short as that for the record's.
const LOCK_RETRY: Duration = Duration::from_millis(4);

/// How long anything is waited for.
#[derive(Clone, Copy, Debug)]
pub struct Waits<'a> {
    /// A lock that somebody else has (rule S2).
    pub lock: Duration,
    /// Set when locks are not to be waited for any longer.
    pub given_up: &'a AtomicBool,
    /// Storage that does not answer.
    pub answer: Duration,
}

impl<'a> Waits<'a> {
    /// What the configuration says.
    #[must_use]
    pub fn of(config: &Config, given_up: &'a AtomicBool) -> Self {
        Self {
            lock: config.lock_timeout,
            given_up,
            answer: config.patience.io_timeout,
        }
    }
}

/// What became of opening a replica.
pub type OpenResult = Result<Arc<Replica>, OpenError>;

/// How each replica of `config` is opened, in order.
#[must_use]
pub fn options_of(config: &Config) -> Vec<RawOptions> {
    let options = |replica: &config::Replica| {
        let mut options = RawOptions::new(replica.name.clone(), PathBuf::from(&replica.path));
        options.cache = match replica.cache {
            config::Cache::Direct => Cache::Direct,
            config::Cache::Buffered => Cache::Buffered,
        };
        options.format = replica.format.map(|format| match format {
            config::Format::Raw => Format::Raw,
        });
        // Rule Z4: a disk that is read-only to the guest is repaired only where that was asked for.
        options.read_only = config.read_only && !config.repair;
        options
    };
    config.replicas.iter().map(options).collect()
}

/// Opens the replicas, but for those in `skipped`, waiting for those that somebody else has locked:
/// a daemon that was killed keeps its locks until its last operation has landed. The results are in the order of `options`; `None` for those that were skipped.
///
/// # Errors
/// If two of them are the same storage (rule V8), or one is still locked when the wait is given up;
/// nothing stays open.
pub fn open_waiting(
    options: &[RawOptions],
    skipped: ReplicaSet,
    waits: Waits<'_>,
) -> Result<Vec<Option<OpenResult>>, OpenError> {
    let timeout = waits.lock;
    let begin = Instant::now();
    let wanted: Vec<usize> = (0..options.len())
        .filter(|&slot| !skipped.contains(ReplicaId::new(slot)))
        .collect();
    let subset: Vec<RawOptions> = wanted.iter().map(|&slot| options[slot].clone()).collect();
    let mut results = open_each(&subset, waits.answer)?;
    let busy = |result: &Result<Arc<Replica>, OpenError>| matches!(result, Err(error) if error.is_in_use());
    for error in results.iter().filter_map(|result| result.as_ref().err()) {
        if error.is_in_use() && !timeout.is_zero() {
            info!("{error}; waiting up to {} s for it", timeout.as_secs());
        }
    }
    // Those that are open stay open, so that nobody else gets hold of them meanwhile.
    let patient = || begin.elapsed() < timeout && !waits.given_up.load(Ordering::Relaxed);
    while results.iter().any(busy) && patient() {
        thread::sleep(LOCK_RETRY);
        for at in 0..results.len() {
            if !busy(&results[at]) {
                continue;
            }
            let open: Vec<_> = results.iter().flatten().cloned().collect();
            results[at] = open_within(&subset[at], &open, waits.answer);
        }
    }
    // Who has given up wants no disk, least of all one that others fall behind on.
    if waits.given_up.load(Ordering::Relaxed)
        && let Some(at) = results.iter().position(busy)
        && let Err(error) = results.swap_remove(at)
    {
        return Err(error);
    }
    let mut all: Vec<_> = options.iter().map(|_| None).collect();
    for (slot, result) in wanted.into_iter().zip(results) {
        all[slot] = Some(result);
    }
    Ok(all)
}

/// Opens the replicas if all of them are needed, waiting for locks as [`open_waiting`] does. Two
/// daemons that start on plain images at the same time have nothing to lock but those: they open
/// them in the same order, so that one gets all and the other one none.
///
/// # Errors
/// Of the first one that cannot be opened; nothing stays open.
pub fn open_all_waiting(
    options: &[RawOptions],
    waits: Waits<'_>,
) -> Result<Vec<Option<Arc<Replica>>>, OpenError> {
    let begin = Instant::now();
    let patient = || begin.elapsed() < waits.lock && !waits.given_up.load(Ordering::Relaxed);
    check_distinct_within(options, waits.answer)?;
    let mut open: Vec<Option<Arc<Replica>>> = vec![None; options.len()];
    for slot in common_order(options, waits.answer) {
        let others: Vec<_> = open.iter().flatten().cloned().collect();
        let mut told = false;
        open[slot] = Some(loop {
            match open_within(&options[slot], &others, waits.answer) {
                Err(error) if error.is_in_use() && patient() => {
                    if !std::mem::replace(&mut told, true) {
                        info!("{error}; waiting up to {} s for it", waits.lock.as_secs());
                    }
                    thread::sleep(LOCK_RETRY);
                }
                opened => break opened?,
            }
        });
    }
    Ok(open)
}

/// Closes a replica that cannot serve a disk of `sectors` sectors (rules Z3, L2). The error names
/// it and says why.
pub fn fit(result: OpenResult, sectors: u64, block_bytes: u32) -> Result<Arc<Replica>, String> {
    let replica = result.map_err(|error| error.to_string())?;
    match check_member(&replica, sectors, block_bytes) {
        Ok(_) => Ok(replica),
        Err(error) => Err(error.to_string()),
    }
}

/// Tells what is served.
pub fn describe(replicas: &[Option<Arc<Replica>>], shape: &SetShape, guest_is_reader: bool) {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_that_is_given_up_opens_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let options: Vec<_> = ["a", "b", "c"]
            .iter()
            .map(|name| {
                let path = folder.path().join(name);
                let file = std::fs::File::create(&path).unwrap();
                file.set_len(1 << 20).unwrap();
                let mut options = RawOptions::new((*name).to_owned(), path);
                options.cache = Cache::Buffered;
                options.format = Some(Format::Raw);
                options
            })
            .collect();
        let open = |lock, given_up: &AtomicBool| {
            let answer = Duration::from_secs(10);
            let waits = Waits {
                lock,
                given_up,
                answer,
            };
            open_waiting(&options, ReplicaSet::EMPTY, waits)
        };
        let somebody = open_each(&options[1..2], Duration::from_secs(10)).unwrap();
        assert!(somebody[0].is_ok());

        let given_up = open(Duration::from_secs(60), &AtomicBool::new(true));
        assert!(given_up.is_err_and(|error| error.is_in_use()));
        // Without one that is locked for too long the others are served (rule S2).
        let without = open(Duration::ZERO, &AtomicBool::new(false)).unwrap();
        let good = without.iter().flatten().map(Result::is_ok);
        assert_eq!(good.collect::<Vec<_>>(), [true, false, true]);
        drop((without, somebody));
        // Nobody is in the way of who is not asked to wait.
        let all = open(Duration::ZERO, &AtomicBool::new(true)).unwrap();
        assert!(all.iter().flatten().all(Result::is_ok));
    }
}
