// SPDX-License-Identifier: Apache-2.0
//! A guest that outlives its back-ends: it keeps its rings, its memory and its in-flight buffer,
//! makes requests as long as somebody serves it and also while nobody does, and keeps an account
//! of every one of them.

use std::path::Path;
use std::time::Instant;

use quorum_blk::front_end::{
    Completion, Framing, FrontEnd, FrontEndError, Options, Request, Segment, Status, Token,
};

use crate::common::{Random, SECTOR};
use crate::model::{Change, Model, Moment, content};
use crate::site::PATIENCE;

/// Sectors in which requests overlap often, on both sides of a border of extents.
const HOT_SECTORS: usize = 96;
const HOT_START: usize = 2048 - 40;
/// Most sectors of a request in them, and elsewhere.
const HOT_COUNT_MAX: usize = 24;
const COLD_COUNT_MAX: usize = 64;

/// Names a message to whoever is told of them.
pub type Observer = Box<dyn FnMut(&'static str) + Send>;

/// A request that was made available and not seen used yet.
#[derive(Debug)]
struct Work {
    queue: usize,
    token: Token,
    /// How many requests this queue had before it.
    number: u64,
    kind: Kind,
    start: usize,
    count: usize,
    begun: Moment,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Change,
    Read,
    Flush,
}

/// What one ring has seen.
#[derive(Clone, Copy, Debug, Default)]
struct Account {
    submitted: u64,
    completed: u64,
}

/// What there was to see, over all guests of a storm.
#[derive(Clone, Copy, Debug, Default)]
pub struct Figures {
    /// Requests completed.
    pub completed: u64,
    /// Of them, those completed before one that was made available earlier in their queue.
    pub overtaking: u64,
    /// Of them, those that were in flight when a daemon was killed.
    pub survived: u64,
}

/// A guest and everything that is in flight.
pub struct Guest {
    front_end: FrontEnd,
    options: Options,
    accounts: Vec<Account>,
    works: Vec<Work>,
    /// Requests that were in flight at the last kill have a smaller number, by queue.
    killed_at: Vec<u64>,
    /// What was seen.
    pub figures: Figures,
}

impl Guest {
    /// Boots: a guest with fresh rings, and a front-end that asks for a new in-flight buffer.
    pub fn boot(
        socket: &Path,
        options: &Options,
        observer: Observer,
        figures: Figures,
    ) -> Result<Self, FrontEndError> {
        let front_end = FrontEnd::connect_observed(socket, options, observer)?;
        let queues = usize::from(options.queues);
        Ok(Self {
            front_end,
            options: *options,
            accounts: vec![Account::default(); queues],
            works: Vec::new(),
            killed_at: vec![0; queues],
            figures,
        })
    }

    /// The front-end finds a back-end again.
    pub fn reconnect(&mut self, socket: &Path, observer: Observer) -> Result<(), FrontEndError> {
        self.front_end.observe(observer);
        self.front_end.reconnect(socket)
    }

    /// The back-end is dead: notes what is in flight.
    pub fn note_kill(&mut self) {
        self.front_end.observe(|_| ());
        self.killed_at = self.accounts.iter().map(|a| a.submitted).collect();
    }

    /// Requests in flight on a queue.
    fn depth(&self, queue: usize) -> usize {
        let account = self.accounts[queue];
        usize::try_from(account.submitted - account.completed).expect("at most a ring of them")
    }

    /// Requests until each queue has `depth` of them in flight, or no room for more.
    pub fn fill(&mut self, model: &mut Model, random: &mut Random, depth: usize) {
        for queue in 0..self.accounts.len() {
            while self.depth(queue) < depth && self.submit(model, random, queue) {}
        }
    }

    /// One more request, of any kind, anywhere, in any form. False: the ring has no room for it.
    fn submit(&mut self, model: &mut Model, random: &mut Random, queue: usize) -> bool {
        let (start, count) = somewhere(random, model.sectors());
        let pieces = random.pick(&[512, 2048, 1 << 20]);
        let ring = self.front_end.queue(queue);
        ring.set_direct(random.below(3) == 0);
        ring.set_framing(Framing {
            data_piece: pieces,
            ..Framing::default()
        });
        let sector = start as u64;
        let segments = [Segment::new(sector, u32::try_from(count).expect("few"))];
        let (kind, begun, submitted) = match random.below(20) {
            0 => (Kind::Flush, 0, ring.submit(&Request::Flush)),
            1 => {
                let begun = model.begin_write(start, count, Change::MaybeZero);
                let discard = Request::Discard(&segments);
                (Kind::Change, begun, ring.submit(&discard))
            }
            2 => {
                let begun = model.begin_write(start, count, Change::To(0));
                let zeroes = Request::WriteZeroes(&segments);
                (Kind::Change, begun, ring.submit(&zeroes))
            }
            3..8 => {
                let begun = model.begin_read(start, count);
                let len = count * SECTOR;
                let read = ring.submit(&Request::Read { sector, len });
                (Kind::Read, begun, read)
            }
            _ => {
                let version = model.new_version();
                let begun = model.begin_write(start, count, Change::To(version));
                let data = content(start, count, version);
                let data = &data;
                let write = ring.submit(&Request::Write { sector, data });
                (Kind::Change, begun, write)
            }
        };
        let token = match submitted {
            Ok(token) => token,
            Err(FrontEndError::Full { .. }) => {
                match kind {
                    Kind::Change => model.cancel_write(start, count, begun),
                    Kind::Read => model.cancel_read(start, count),
                    Kind::Flush => {}
                }
                return false;
            }
            Err(error) => panic!("{error:?}"),
        };
        let account = &mut self.accounts[queue];
        self.works.push(Work {
            queue,
            token,
            number: account.submitted,
            kind,
            start,
            count,
            begun,
        });
        account.submitted += 1;
        true
    }

    /// Takes what is completed. Returns how many that were.
    pub fn collect(&mut self, model: &mut Model) -> usize {
        let mut count = 0;
        for queue in 0..self.accounts.len() {
            self.check_used(queue);
            loop {
                // A head that is not in flight is an error of the front-end.
                let polled = self.front_end.queue(queue).poll();
                let polled = polled.unwrap_or_else(|error| panic!("{error}: {:#?}", self.works));
                let Some(completion) = polled else { break };
                self.take(model, queue, &completion);
                count += 1;
            }
        }
        count
    }

    /// The used index never goes back, and never beyond what is available.
    fn check_used(&mut self, queue: usize) {
        let taken = self.position(self.accounts[queue].completed);
        let in_flight = self.depth(queue);
        let used = self.front_end.queue(queue).ring_mut().used_index();
        let ahead = used.expect("a ring in memory").wrapping_sub(taken);
        assert!(
            usize::from(ahead) <= in_flight,
            "queue {queue}: the used index is {ahead} after {taken}, with {in_flight} in flight"
        );
    }

    /// A ring index after so many requests.
    fn position(&self, requests: u64) -> u16 {
        let wrapped = u16::try_from(requests % (1 << 16)).expect("below 2^16");
        self.options.first_index.wrapping_add(wrapped)
    }

    fn take(&mut self, model: &mut Model, queue: usize, completion: &Completion) {
        let mut all = self.works.iter();
        let at = all.position(|work| work.queue == queue && work.token == completion.token);
        let work = self.works.swap_remove(at.expect("the front-end knows it"));
        assert_eq!(completion.status, Status::Ok, "{work:?}");
        self.accounts[queue].completed += 1;
        self.figures.completed += 1;
        let earlier = |other: &Work| other.queue == queue && other.number < work.number;
        self.figures.overtaking += u64::from(self.works.iter().any(earlier));
        self.figures.survived += u64::from(work.number < self.killed_at[queue]);
        match work.kind {
            Kind::Change => model.end_write(work.start, work.count, work.begun),
            Kind::Read => model.end_read(work.start, work.begun, &completion.data),
            Kind::Flush => {}
        }
    }

    /// Waits, by interrupts, for the end of everything in flight; then no descriptor is missing
    /// and every index is where it must be.
    pub fn drain(&mut self, model: &mut Model) {
        let deadline = Instant::now() + PATIENCE;
        for queue in 0..self.accounts.len() {
            while self.depth(queue) > 0 {
                assert!(Instant::now() < deadline, "{:#?}", self.works);
                let waited = self.front_end.queue(queue).wait_any();
                let completion = waited.unwrap_or_else(|error| panic!("{error}: {self:#?}"));
                self.take(model, queue, &completion);
            }
        }
        self.check_rings();
    }

    fn check_rings(&mut self) {
        for queue in 0..self.accounts.len() {
            let expected = self.position(self.accounts[queue].submitted);
            let size = usize::from(self.options.queue_size);
            let ring = self.front_end.queue(queue).ring_mut();
            assert_eq!(ring.avail_index(), expected, "queue {queue}");
            assert_eq!(ring.used_index().expect("in memory"), expected, "{queue}");
            assert_eq!(ring.free_descriptors(), size, "descriptors are lost");
        }
    }

    /// Stops the rings, of which the back-end must know the positions.
    pub fn stop(&mut self) {
        let positions = self.front_end.stop().expect("the rings stop");
        for (queue, position) in positions.into_iter().enumerate() {
            let expected = self.position(self.accounts[queue].submitted);
            assert_eq!(position, u32::from(expected), "queue {queue}");
        }
    }
}

impl std::fmt::Debug for Guest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Guest")
            .field("accounts", &self.accounts)
            .field("killed_at", &self.killed_at)
            .field("works", &self.works)
            .finish_non_exhaustive()
    }
}

/// Seven of eight are where others are; the rest is all over the disk.
fn somewhere(random: &mut Random, sectors: usize) -> (usize, usize) {
    let (first, area, longest) = if random.below(8) < 7 {
        (HOT_START, HOT_SECTORS, HOT_COUNT_MAX)
    } else {
        (0, sectors, COLD_COUNT_MAX)
    };
    let count = 1 + random.below(longest);
    (first + random.below(area - count), count)
}
