// SPDX-License-Identifier: Apache-2.0
//! Rings as drivers and VMMs use them: framing, feature bits, interrupts, kicks, indices.

use std::time::Duration;

use quorum_blk::front_end::{Framing, FrontEnd, FrontEndError, Options, Request, Status, features};

use crate::common::{Random, SECTOR, Setup, eventually};

/// All four combinations of what a driver may leave out.
fn feature_sets() -> [u64; 4] {
    let all = features::LINUX;
    let (indirect, event) = (features::INDIRECT, features::EVENT_IDX);
    [all, all & !indirect, all & !event, all & !indirect & !event]
}

fn write_and_read(front_end: &mut FrontEnd, random: &mut Random, sectors: usize) {
    let queue = front_end.queue(0);
    let sector = random.below(1000) as u64;
    let data = random.bytes(sectors * SECTOR);
    queue.write_data(sector, &data).expect("a write");
    let mut back = vec![0; data.len()];
    queue.read(sector, &mut back).expect("a read");
    assert!(data == back);
}

#[test]
fn any_framing_is_understood() {
    let disk = Setup::new().start();
    let linux = Framing::default();
    let framings = [
        linux,
        // A read of one sector is then 16 bytes and 513 bytes: data and status in one.
        Framing {
            joined: true,
            ..linux
        },
        Framing {
            joined: true,
            data_piece: 100,
            gap: 3,
            skew: 1,
            ..linux
        },
        Framing {
            header_piece: 1,
            ..linux
        },
        Framing {
            header_piece: 5,
            gap: 9,
            ..linux
        },
        Framing {
            header_piece: 8,
            data_piece: 512,
            gap: 512,
            ..linux
        },
        Framing {
            data_piece: 1000,
            gap: 1,
            skew: 13,
            ..linux
        },
        Framing {
            data_piece: 61,
            ..linux
        },
    ];
    let mut random = Random::new(1);
    for features in feature_sets() {
        let mut front_end = disk.connect(&Options {
            features,
            ..Options::default()
        });
        for framing in framings {
            front_end.queue(0).set_framing(framing);
            for sectors in [1, 2, 8, 9] {
                write_and_read(&mut front_end, &mut random, sectors);
            }
            front_end.queue(0).flush().expect("a flush");
            assert_eq!(front_end.queue(0).get_id().expect("an id").len(), 20);
        }
    }
}

#[test]
fn every_queue_size_and_manner_works() {
    let disk = Setup::new().arguments(&["--queue-size", "1024"]).start();
    let mut random = Random::new(2);
    for queue_size in [4, 16, 128, 1024] {
        for manners in [Options::default(), Options::cloud_hypervisor()] {
            let mut front_end = disk.connect(&Options {
                queue_size,
                ..manners
            });
            for _ in 0..20 {
                write_and_read(&mut front_end, &mut random, 3);
            }
        }
    }
}

#[test]
fn full_ring_of_requests_completes() {
    let disk = Setup::new().start();
    for features in feature_sets() {
        let mut front_end = disk.connect(&Options {
            features,
            ..Options::default()
        });
        let queue = front_end.queue(0);
        for _ in 0..3 {
            let mut submitted = 0;
            loop {
                match queue.enqueue(&Request::Read {
                    sector: submitted % 512,
                    len: SECTOR,
                }) {
                    Ok(_) => submitted += 1,
                    Err(FrontEndError::Full { .. }) => break,
                    Err(error) => panic!("{error:?}"),
                }
            }
            assert!(submitted >= 80, "{submitted} requests in 256 entries");
            queue.publish().expect("a kick");
            for _ in 0..submitted {
                assert_eq!(queue.wait_any().expect("an end").status, Status::Ok);
            }
            assert_eq!(queue.in_flight(), 0);
        }
    }
}

#[test]
fn indices_wrap_around() {
    let disk = Setup::new().start();
    for features in feature_sets() {
        let mut front_end = disk.connect(&Options {
            features,
            first_index: 65_520,
            queue_size: 16,
            ..Options::default()
        });
        let mut random = Random::new(features);
        for _ in 0..40 {
            write_and_read(&mut front_end, &mut random, 1);
        }
        let bases = front_end.stop().expect("the ring stops");
        assert_eq!(bases, [u32::from(65_520u16.wrapping_add(80))]);
    }
}

#[test]
fn wrong_base_is_ignored() {
    let disk = Setup::new().start();
    for (first_index, wrong_base) in [(0, 7), (0, 65_535), (100, 0), (100, 99), (65_530, 3)] {
        for manners in [Options::default(), Options::cloud_hypervisor()] {
            let mut front_end = disk.connect(&Options {
                first_index,
                wrong_base: Some(wrong_base),
                ..manners
            });
            let mut random = Random::new(u64::from(wrong_base));
            for _ in 0..5 {
                write_and_read(&mut front_end, &mut random, 2);
            }
            let bases = front_end.stop().expect("the ring stops");
            assert_eq!(bases, [u32::from(first_index.wrapping_add(10))]);
        }
    }
}

#[test]
fn stopped_ring_goes_on_where_it_was() {
    let mut disk = Setup::new().start();
    let mut front_end = disk.connect(&Options::default());
    let mut random = Random::new(5);
    for round in 0..20 {
        write_and_read(&mut front_end, &mut random, 1 + round % 5);
        let bases = front_end.stop().expect("the ring stops");
        assert_eq!(bases, [2 * (u32::try_from(round).expect("small") + 1)]);
        let base = u16::try_from(bases[0]).expect("16 bits");
        front_end.resume(base).expect("the ring starts");
    }
    drop(front_end);
    disk.stop_and_compare();
}

#[test]
fn stop_waits_for_requests_in_flight() {
    let disk = Setup::new().start();
    let mut front_end = disk.connect(&Options::default());
    for round in 0..10u32 {
        let queue = front_end.queue(0);
        let tokens: Vec<_> = (0..60)
            .map(|at| {
                let data = [1; 8 * SECTOR];
                let request = Request::Write {
                    sector: at * 8,
                    data: &data,
                };
                queue.enqueue(&request).expect("room")
            })
            .collect();
        queue.publish().expect("a kick");
        // The device may or may not have fetched them all; what it has fetched it completes.
        let base = front_end.stop().expect("the ring stops")[0];
        let queue = front_end.queue(0);
        let mut done = 0;
        while queue.poll().expect("a ring").is_some() {
            done += 1;
        }
        assert_eq!(base, round * 60 + done);
        front_end
            .resume(u16::try_from(base).expect("16 bits"))
            .expect("a start");
        let queue = front_end.queue(0);
        for _ in done..60 {
            assert_eq!(queue.wait_any().expect("an end").status, Status::Ok);
        }
        assert_eq!(tokens.len(), 60);
        assert_eq!(queue.in_flight(), 0);
    }
}

#[test]
fn requests_from_before_the_start_need_no_kick() {
    let disk = Setup::new().start();
    for manners in [Options::default(), Options::cloud_hypervisor()] {
        let mut front_end = disk.connect(&manners);
        let base = front_end.stop().expect("the ring stops")[0];
        let queue = front_end.queue(0);
        let token = queue
            .enqueue(&Request::Read {
                sector: 0,
                len: SECTOR,
            })
            .expect("room");
        queue.ring_mut().publish().expect("an index");
        front_end
            .resume(u16::try_from(base).expect("16 bits"))
            .expect("a start");
        let completion = front_end.queue(0).wait(token).expect("an end");
        assert_eq!(completion.status, Status::Ok);
    }
}

#[test]
fn call_is_signalled_when_it_is_set() {
    let disk = Setup::new().start();
    let mut front_end = disk.connect(&Options::default());
    for _ in 0..5 {
        front_end.replace_call(0).expect("a new call descriptor");
        let signalled = eventually(|| front_end.queue(0).take_call().then_some(()));
        assert!(
            signalled.is_some(),
            "SET_VRING_CALL is followed by a signal"
        );
    }
}

#[test]
fn replaced_kick_and_call_descriptors_work() {
    let disk = Setup::new().start();
    let mut front_end = disk.connect(&Options {
        queues: 2,
        ..Options::default()
    });
    let mut random = Random::new(6);
    for round in 0..60 {
        let data = random.bytes(SECTOR);
        let queue = front_end.queue(0);
        let tokens: Vec<_> = (0..8)
            .map(|at| {
                queue
                    .submit(&Request::Write {
                        sector: at,
                        data: &data,
                    })
                    .expect("room")
            })
            .collect();
        if round % 3 != 0 {
            front_end.replace_kick(0).expect("a new kick descriptor");
        }
        if round % 3 != 1 {
            front_end.replace_call(0).expect("a new call descriptor");
        }
        let queue = front_end.queue(0);
        for token in tokens {
            let completion = queue.wait(token).expect("an end");
            assert_eq!(completion.status, Status::Ok);
        }
        write_and_read(&mut front_end, &mut random, 1);
        let mut back = vec![0; SECTOR];
        front_end
            .queue(1)
            .read(2000, &mut back)
            .expect("the other queue lives");
    }
}

#[test]
fn rings_without_call_descriptor_complete() {
    let disk = Setup::new().start();
    for manners in [Options::default(), Options::cloud_hypervisor()] {
        let mut front_end = disk.connect(&Options {
            call: false,
            ..manners
        });
        let mut random = Random::new(7);
        for _ in 0..20 {
            write_and_read(&mut front_end, &mut random, 4);
        }
    }
}

#[test]
fn no_interrupt_comes_unasked() {
    let disk = Setup::new().start();
    for features in feature_sets() {
        let mut front_end = disk.connect(&Options {
            features,
            ..Options::default()
        });
        let queue = front_end.queue(0);
        // The signal that follows SET_VRING_CALL is none of a request.
        eventually(|| queue.take_call().then_some(()));
        for at in 0..20 {
            queue
                .submit(&Request::Read {
                    sector: at,
                    len: SECTOR,
                })
                .expect("room");
        }
        let mut done = 0;
        let all = eventually(|| {
            while queue.poll().expect("a ring").is_some() {
                done += 1;
            }
            (done == 20).then_some(())
        });
        assert!(all.is_some(), "{done} of 20 completed");
        std::thread::sleep(Duration::from_millis(20));
        assert!(
            !queue.take_call(),
            "interrupts were switched off, features {features:#x}"
        );
    }
}

#[test]
fn batch_costs_fewer_interrupts_than_requests() {
    let disk = Setup::new().start();
    let mut front_end = disk.connect(&Options::default());
    let queue = front_end.queue(0);
    eventually(|| queue.take_call().then_some(()));
    let (before, _) = queue.calls_and_kicks();
    for _ in 0..10 {
        for at in 0..64 {
            queue
                .enqueue(&Request::Read {
                    sector: at,
                    len: SECTOR,
                })
                .expect("room");
        }
        queue.publish().expect("a kick");
        for _ in 0..64 {
            assert_eq!(queue.wait_any().expect("an end").status, Status::Ok);
        }
    }
    let (calls, kicks) = queue.calls_and_kicks();
    assert!(calls - before <= 320, "{calls} interrupts for 640 requests");
    assert!(kicks <= 10, "{kicks} kicks for 10 batches");
}

#[test]
fn disabled_ring_serves_nothing_until_it_is_enabled() {
    let disk = Setup::new().start();
    let mut front_end = disk.connect(&Options::default());
    let mut random = Random::new(8);
    write_and_read(&mut front_end, &mut random, 1);
    front_end.ask_replies(true);
    front_end.enable_all(false).expect("a reply");
    let queue = front_end.queue(0);
    let token = queue.enqueue(&Request::Flush).expect("room");
    queue.ring_mut().publish().expect("an index");
    queue.kick().expect("a kick");
    std::thread::sleep(Duration::from_millis(50));
    assert!(
        queue.poll().expect("a ring").is_none(),
        "the ring is disabled"
    );
    front_end.enable_all(true).expect("a reply");
    let completion = front_end.queue(0).wait(token).expect("an end");
    assert_eq!(completion.status, Status::Ok);
}
