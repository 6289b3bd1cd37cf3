// SPDX-License-Identifier: Apache-2.0
//! A guest that writes, reads and flushes, and believes only its model.

use std::time::{Duration, Instant};

use quorum_blk::front_end::{Completion, FrontEnd, FrontEndError, Options, Request, Status, Token};

use crate::common::{Random, SECTOR};
use crate::model::{Model, Version, content};
use crate::site::Site;

/// Most sectors of one write of the load.
const WRITE_SECTORS_MAX: usize = 24;
/// Sectors of one read of [`Guest::check_all`].
const READ_SECTORS: usize = 128;
/// How long anything may take on a machine that does other things too. What has a bound of its own
/// is measured.
const PATIENCE: Duration = Duration::from_secs(20);

/// What is under way.
struct InFlight {
    token: Token,
    start: usize,
    count: usize,
    /// Of a write.
    version: Option<Version>,
    begun: Instant,
}

/// The connection is gone: the daemon was killed.
#[derive(Debug)]
pub struct Gone;

/// A guest on one queue.
pub struct Guest {
    front_end: FrontEnd,
    in_flight: Vec<InFlight>,
    /// How long requests took since the last [`Guest::take_latencies`].
    latencies: Vec<Duration>,
}

impl Guest {
    /// Boots.
    pub fn connect(site: &Site) -> Self {
        let options = Options {
            timeout: PATIENCE,
            ..Options::default()
        };
        let front_end = FrontEnd::connect(&site.socket, &options).expect("the daemon serves");
        Self {
            front_end,
            in_flight: Vec::new(),
            latencies: Vec::new(),
        }
    }

    /// Requests for as long as `go_on` says, `depth` of them at a time: nine of ten write. Then
    /// waits for those under way.
    pub fn work(
        &mut self,
        model: &mut Model,
        random: &mut Random,
        depth: usize,
        mut go_on: impl FnMut(usize) -> bool,
    ) -> Result<(), Gone> {
        let mut done = 0;
        while go_on(done) {
            while self.in_flight.len() < depth {
                if !self.submit(model, random)? {
                    break;
                }
            }
            self.complete(model)?;
            done += 1;
        }
        while !self.in_flight.is_empty() {
            self.complete(model)?;
        }
        Ok(())
    }

    /// Starts something in sectors where nothing is under way. False: no such place was found.
    fn submit(&mut self, model: &mut Model, random: &mut Random) -> Result<bool, Gone> {
        let count = 1 + random.below(WRITE_SECTORS_MAX);
        let start = random.below(model.sectors() - count);
        let free =
            |other: &InFlight| start + count <= other.start || other.start + other.count <= start;
        if !self.in_flight.iter().all(free) {
            return Ok(false);
        }
        let queue = self.front_end.queue(0);
        let (version, submitted) = if random.below(10) == 0 {
            let len = count * SECTOR;
            let sector = start as u64;
            (None, queue.submit(&Request::Read { sector, len }))
        } else {
            let version = model.begin(start, count);
            let data = content(start, count, version);
            let write = Request::Write {
                sector: start as u64,
                data: &data,
            };
            (Some(version), queue.submit(&write))
        };
        self.in_flight.push(InFlight {
            token: submitted.map_err(gone)?,
            start,
            count,
            version,
            begun: Instant::now(),
        });
        Ok(true)
    }

    /// Waits for one completion.
    fn complete(&mut self, model: &mut Model) -> Result<(), Gone> {
        match self.front_end.queue(0).wait_any() {
            Ok(completion) => {
                self.take(model, &completion);
                Ok(())
            }
            Err(error) => {
                let gone = gone(error);
                // What was published before the end counts.
                while let Ok(Some(completion)) = self.front_end.queue(0).poll() {
                    self.take(model, &completion);
                }
                Err(gone)
            }
        }
    }

    fn take(&mut self, model: &mut Model, completion: &Completion) {
        let mut all = self.in_flight.iter();
        let at = all.position(|request| request.token == completion.token);
        let request = self.in_flight.swap_remove(at.expect("a request of ours"));
        let InFlight { start, count, .. } = request;
        let status = completion.status;
        assert_eq!(status, Status::Ok, "{count} sectors from {start} on");
        self.latencies.push(request.begun.elapsed());
        match request.version {
            Some(version) => model.acknowledge(start, count, version),
            None => model.see(start, &completion.data, false),
        }
    }

    /// Writes one run of sectors. Returns how long it took.
    pub fn write(&mut self, model: &mut Model, start: usize, count: usize) -> Duration {
        let begun = Instant::now();
        let version = model.begin(start, count);
        let data = content(start, count, version);
        let written = self.front_end.queue(0).write_data(start as u64, &data);
        written.expect("a write");
        model.acknowledge(start, count, version);
        begun.elapsed()
    }

    /// Reads some sectors and checks them. Returns how long it took.
    pub fn read(&mut self, model: &mut Model, start: usize, count: usize) -> Duration {
        let begun = Instant::now();
        let mut bytes = vec![0; count * SECTOR];
        let queue = self.front_end.queue(0);
        queue.read(start as u64, &mut bytes).expect("a read");
        model.see(start, &bytes, false);
        begun.elapsed()
    }

    /// The same after an unclean end, of which the read settles what it touches.
    pub fn read_resolving(&mut self, model: &mut Model, start: usize, count: usize) {
        let mut bytes = vec![0; count * SECTOR];
        let queue = self.front_end.queue(0);
        queue.read(start as u64, &mut bytes).expect("a read");
        model.see(start, &bytes, true);
    }

    /// How a read of one sector ends.
    pub fn status_of_read(&mut self, sector: usize) -> Status {
        let request = Request::Read {
            sector: sector as u64,
            len: SECTOR,
        };
        let completion = self.front_end.queue(0).run(&request);
        completion.expect("an answer").status
    }

    /// How a write of zeroes ends. The model is not told: the sectors are zero before.
    pub fn status_of_write(&mut self, start: usize, count: usize) -> Status {
        let request = Request::Write {
            sector: start as u64,
            data: &vec![0; count * SECTOR],
        };
        let completion = self.front_end.queue(0).run(&request);
        completion.expect("an answer").status
    }

    /// Flushes. Returns how long it took.
    pub fn flush(&mut self, model: &mut Model) -> Duration {
        assert!(self.in_flight.is_empty(), "the model needs quiet");
        let begun = Instant::now();
        self.front_end.queue(0).flush().expect("a flush");
        model.flush();
        begun.elapsed()
    }

    /// Reads every sector and checks it. `resolving`: after an unclean end.
    pub fn check_all(&mut self, model: &mut Model, resolving: bool) {
        let sectors = model.sectors();
        let mut bytes = vec![0; READ_SECTORS * SECTOR];
        for start in (0..sectors).step_by(READ_SECTORS) {
            let count = READ_SECTORS.min(sectors - start);
            let bytes = &mut bytes[..count * SECTOR];
            let queue = self.front_end.queue(0);
            queue.read(start as u64, bytes).expect("a read");
            model.see(start, bytes, resolving);
        }
    }

    /// How long requests of the load took, shortest first.
    pub fn take_latencies(&mut self) -> Vec<Duration> {
        let mut latencies = std::mem::take(&mut self.latencies);
        latencies.sort_unstable();
        latencies
    }
}

/// The one way in which a daemon may leave its guest.
#[track_caller]
fn gone(error: FrontEndError) -> Gone {
    assert!(matches!(error, FrontEndError::Closed), "{error:?}");
    Gone
}
