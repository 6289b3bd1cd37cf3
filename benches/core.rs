// SPDX-License-Identifier: Apache-2.0
//! What the core costs, without any I/O: range locks (rule L5), votes, whole cycles of a lane.

use std::hint::black_box;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use quorum_blk::quorum::{
    Action, Ballots, BufferId, Buffers, Event, Geometry, Lane, LaneId, LockMode, LockTicket, OpId,
    Order, Outcome, Policy, Purpose, Request, RequestId, Rule, Shared, Tag,
};
use quorum_blk::units::{ReplicaId, SECTOR_LEN, SectorRange, Time};

fn range(start: u64, count: u32) -> SectorRange {
    SectorRange::new(start, count).expect("not empty")
}

fn range_lock(c: &mut Criterion) {
    let order = Order::new(11);
    let mut woken = Vec::new();
    let mut start = 0;
    c.bench_function("range lock, acquire and release", |b| {
        b.iter(|| {
            start = (start + 8) % (1 << 20);
            let range = range(start, 8);
            let held = order.acquire(range, LockMode::Exclusive, LaneId(0), LockTicket(start));
            assert!(black_box(held));
            order.release(range, LaneId(0), LockTicket(start), &mut woken);
        });
    });
    c.bench_function("range lock, beside 32 others in the shard", |b| {
        let order = Order::new(11);
        for other in 0..32u64 {
            let range = range(other * 16, 8);
            assert!(order.acquire(range, LockMode::Exclusive, LaneId(0), LockTicket(other)));
        }
        let mine = range(1024, 8);
        b.iter(|| {
            let held = order.acquire(mine, LockMode::Exclusive, LaneId(0), LockTicket(99));
            assert!(black_box(held));
            order.release(mine, LaneId(0), LockTicket(99), &mut woken);
        });
    });
    c.bench_function("read stamp, taken and looked at", |b| {
        b.iter(|| {
            start = (start + 8) % (1 << 20);
            let range = range(start, 8);
            let stamp = order.read_stamp(range);
            black_box(order.undisturbed(range, stamp))
        });
    });
}

/// Three ballots of `sectors` sectors: compared as a whole, which is what a read does, and voted
/// on sector by sector, which is what a difference costs.
fn vote(c: &mut Criterion, name: &str, sectors: usize) {
    let ballots: Vec<Vec<u8>> = (0..3).map(|_| vec![0x5A; sectors * SECTOR_LEN]).collect();
    let mut group = c.benchmark_group(name);
    group.throughput(Throughput::Bytes((3 * sectors * SECTOR_LEN) as u64));
    group.bench_function("compare", |b| {
        b.iter(|| {
            let [first, second, third] = [&ballots[0], &ballots[1], &ballots[2]];
            black_box(black_box(first) == second && black_box(first) == third)
        });
    });
    group.bench_function("vote", |b| {
        b.iter(|| {
            let mut election = Ballots::new();
            for (replica, ballot) in ballots.iter().enumerate() {
                election.add(ReplicaId::new(replica), ballot);
            }
            (0..sectors)
                .filter(|&index| election.elect(index, Rule::Threshold(2)).count() == 3)
                .count()
        });
    });
    group.finish();
}

fn votes(c: &mut Criterion) {
    vote(c, "4 KiB x 3", 8);
    vote(c, "128 KiB x 3", 256);
}

/// The plainest pool.
struct Pool {
    memory: Vec<Vec<u8>>,
    free: Vec<u32>,
}

impl Pool {
    fn new() -> Self {
        Self {
            memory: vec![vec![0; 4096]; 64],
            free: (0..64).collect(),
        }
    }
}

impl Buffers for Pool {
    fn take(&mut self, _: usize, _: Purpose) -> Option<BufferId> {
        self.free.pop().map(BufferId)
    }

    fn give(&mut self, buffer: BufferId) {
        self.free.push(buffer.0);
    }

    fn bytes(&self, buffer: BufferId) -> &[u8] {
        &self.memory[buffer.0 as usize]
    }

    fn bytes_mut(&mut self, buffer: BufferId) -> &mut [u8] {
        &mut self.memory[buffer.0 as usize]
    }
}

/// A lane over replicas that answer at once.
struct Bench {
    lane: Lane,
    shared: Shared,
    pool: Pool,
    actions: Vec<Action>,
    operations: Vec<OpId>,
    replies: Vec<RequestId>,
}

impl Bench {
    fn new() -> Self {
        let geometry = Geometry::new(1 << 21, 8).expect("1 GiB");
        Self {
            lane: Lane::new(LaneId(0)),
            shared: Shared::new(geometry, Policy::new(3)).expect("the defaults are valid"),
            pool: Pool::new(),
            actions: Vec::with_capacity(16),
            operations: Vec::with_capacity(16),
            replies: Vec::with_capacity(16),
        }
    }

    fn tell(&mut self, event: Event) {
        let (pool, actions) = (&mut self.pool, &mut self.actions);
        self.lane
            .handle(Time::default(), event, &self.shared, pool, actions);
        for action in self.actions.drain(..) {
            match action {
                Action::Submit(operation) => self.operations.push(operation.op),
                Action::Reply { request, .. } => self.replies.push(request),
                Action::Wake { .. }
                | Action::Report(_)
                | Action::Record
                | Action::Kicked { .. } => unreachable!("nothing is amiss"),
            }
        }
    }

    /// A request from its arrival until nothing is left of it.
    fn cycle(&mut self, request: Request) {
        let tag = Tag(0);
        self.tell(Event::Request { tag, request });
        while let Some(op) = self.operations.pop() {
            let outcome = Outcome::Done;
            self.tell(Event::Completed { op, outcome });
        }
        while let Some(request) = self.replies.pop() {
            self.tell(Event::Published { request });
        }
        assert!(self.lane.is_idle());
    }
}

fn cycles(c: &mut Criterion) {
    let mut bench = Bench::new();
    let mut start = 0;
    c.bench_function("lane, 4 KiB read from three replicas", |b| {
        b.iter(|| {
            start = (start + 8) % (1 << 20);
            let range = range(start, 8);
            bench.cycle(Request::Read { range });
        });
    });
    c.bench_function("lane, 4 KiB write to three replicas", |b| {
        b.iter(|| {
            start = (start + 8) % (1 << 20);
            let range = range(start, 8);
            let data = bench.pool.take(4096, Purpose::Guest).expect("all are free");
            bench.cycle(Request::Write { range, data });
        });
    });
    c.bench_function("lane, made", |b| {
        b.iter_batched(|| (), |()| Lane::new(LaneId(0)), BatchSize::PerIteration);
    });
}

criterion_group!(benches, range_lock, votes, cycles);
criterion_main!(benches);
