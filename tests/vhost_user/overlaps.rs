// SPDX-License-Identifier: Apache-2.0
//! Queues of different workers that write to the same sectors: what they hold together must
//! never keep all of them waiting.

use quorum_blk::front_end::{Options, Request, Status};

use crate::common::{Disk, Random, SECTOR, Setup};

/// Two workers with as few buffers as there may be.
fn two_tight_workers() -> Disk {
    Setup::new()
        .arguments(&["--workers", "2", "--num-queues", "2"])
        .arguments(&["--buffer-memory", "4M"])
        .start()
}

/// Both queues write `rounds` batches of requests that `next` chooses: a sector and a number of
/// sectors.
fn write_from_both(rounds: usize, batch: usize, next: fn(&mut Random) -> (u64, usize)) {
    let mut disk = two_tight_workers();
    let mut front_end = disk.connect(&Options {
        queues: 2,
        ..Options::default()
    });
    std::thread::scope(|scope| {
        for queue in front_end.queues() {
            scope.spawn(move || {
                let mut random = Random::new(u64::from(queue.index()) + 7);
                for _ in 0..rounds {
                    let mut tokens = Vec::new();
                    for _ in 0..batch {
                        let (sector, sectors) = next(&mut random);
                        let data = vec![random.next().to_le_bytes()[0]; sectors * SECTOR];
                        let data = &data;
                        let request = Request::Write { sector, data };
                        tokens.push(queue.submit(&request).expect("room"));
                    }
                    for token in tokens {
                        let completion = queue.wait(token).expect("an end");
                        assert_eq!(completion.status, Status::Ok);
                    }
                }
            });
        }
    });
    drop(front_end);
    disk.stop_and_compare();
}

#[test]
fn large_requests_of_two_workers_do_not_wait_for_each_other() {
    // Up to four parts each, and small ones between them.
    write_from_both(60, 12, |random| match random.below(3) {
        0 => (random.below(3000) as u64, 8),
        _ => (random.below(2000) as u64, 1 + random.below(1536)),
    });
}

#[test]
fn worker_without_buffers_hears_that_a_lock_is_granted() {
    // All of them at the same place, and more in the ring than there are buffers for.
    write_from_both(60, 24, |_| (0, 256));
}
