// SPDX-License-Identifier: Apache-2.0
//! Many requests at once, one thread and one list of work for each queue.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::pattern::{Pattern, Random};
use crate::front_end::{FrontEndError, Queue, Request, Status, Token};
use crate::units::{SECTOR_BYTES, SectorRange};

/// Requests a queue has in flight.
const DEPTH: usize = 32;

/// What came of some work.
#[derive(Clone, Copy, Default, Debug)]
pub(super) struct Tally {
    /// Requests completed.
    pub requests: u64,
    /// Sectors in them.
    pub sectors: u64,
    /// Requests that ended with an error or with wrong data.
    pub wrong: u64,
    /// Wall clock time.
    pub elapsed: Duration,
}

impl Tally {
    /// Bytes in the requests.
    pub(super) fn bytes(&self) -> u64 {
        self.sectors * SECTOR_BYTES
    }

    fn add(&mut self, other: &Self) {
        self.requests += other.requests;
        self.sectors += other.sectors;
        self.wrong += other.wrong;
        self.elapsed = self.elapsed.max(other.elapsed);
    }
}

/// What every request of some work does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    /// Write the pattern.
    Write,
    /// Read and compare with the pattern.
    Read,
}

/// Runs one list of work on each queue, all at the same time.
pub(super) fn run(
    queues: &mut [Queue],
    work: Vec<Vec<SectorRange>>,
    kind: Kind,
    pattern: Pattern,
    until: Option<Duration>,
) -> Result<Tally, FrontEndError> {
    let mut total = Tally::default();
    let results: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = queues
            .iter_mut()
            .zip(work)
            .map(|(queue, work)| scope.spawn(move || drive(queue, &work, kind, pattern, until)))
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().expect("the threads of the load do not panic"))
            .collect()
    });
    for result in results {
        total.add(&result?);
    }
    Ok(total)
}

/// Every sector from `start` to `end` once, in requests of up to `sectors_max`, shuffled.
pub(super) fn cover(
    start: u64,
    end: u64,
    sectors_max: u32,
    random: &mut Random,
) -> Vec<SectorRange> {
    let mut work = Vec::new();
    let mut at = start;
    while at < end {
        let count = (1 + random.below(u64::from(sectors_max))).min(end - at);
        let count = u32::try_from(count).expect("at most sectors_max");
        work.push(SectorRange::new(at, count).expect("neither empty nor past the end"));
        at += u64::from(count);
    }
    random.shuffle(&mut work);
    work
}

fn drive(
    queue: &mut Queue,
    work: &[SectorRange],
    kind: Kind,
    pattern: Pattern,
    until: Option<Duration>,
) -> Result<Tally, FrontEndError> {
    let mut tally = Tally::default();
    let mut waiting = BTreeMap::new();
    let begun = Instant::now();
    let mut left = work.iter();
    loop {
        while waiting.len() < DEPTH && until.is_none_or(|limit| begun.elapsed() < limit) {
            let Some(&range) = left.as_slice().first() else {
                break;
            };
            match enqueue(queue, range, kind, pattern) {
                Ok(token) => waiting.insert(token, range),
                Err(FrontEndError::Full { .. }) if !waiting.is_empty() => break,
                Err(error) => return Err(error),
            };
            left.next();
        }
        queue.publish()?;
        if waiting.is_empty() {
            break;
        }
        let mut completion = Some(queue.wait_any()?);
        while let Some(done) = completion {
            let range = waiting.remove(&done.token);
            let range = range.ok_or(FrontEndError::UnknownToken {
                queue: queue.index(),
            })?;
            tally.requests += 1;
            tally.sectors += u64::from(range.count());
            let right = done.status == Status::Ok
                && (kind == Kind::Write || pattern.first_wrong(range, &done.data).is_none());
            tally.wrong += u64::from(!right);
            completion = queue.poll()?;
        }
    }
    tally.elapsed = begun.elapsed();
    Ok(tally)
}

fn enqueue(
    queue: &mut Queue,
    range: SectorRange,
    kind: Kind,
    pattern: Pattern,
) -> Result<Token, FrontEndError> {
    let sector = range.start();
    match kind {
        Kind::Read => queue.enqueue(&Request::Read {
            sector,
            len: range.len_bytes(),
        }),
        Kind::Write => queue.enqueue(&Request::Write {
            sector,
            data: &pattern.bytes(range),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cover_has_every_sector_once() {
        let mut work = cover(10, 5000, 64, &mut Random::new(5));
        work.sort_unstable();
        let mut at = 10;
        for range in work {
            assert_eq!(range.start(), at);
            at = range.end();
        }
        assert_eq!(at, 5000);
    }
}
