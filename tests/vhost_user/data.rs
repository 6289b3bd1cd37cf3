// SPDX-License-Identifier: Apache-2.0
//! What is written is read, whatever its size, place, framing and queue.

use quorum_blk::front_end::{Framing, Options, Request, Segment, Status, features};

use crate::common::{Disk, Random, SECTOR, Setup, index};

fn random_framing(random: &mut Random) -> Framing {
    Framing {
        header_piece: random.pick(&[16, 16, 1, 8, 5]),
        data_piece: random.pick(&[usize::MAX, 4096, 65536, 16384, 512, 3 * 512 + 7]),
        joined: random.below(4) == 0,
        gap: random.pick(&[0, 0, 1, 512]),
        skew: random.pick(&[0, 0, 1, 8, 511]),
    }
}

/// Pieces so small that a chain of them still fits in the ring.
fn fitting(mut framing: Framing, bytes: usize) -> Framing {
    framing.data_piece = framing.data_piece.max(bytes / 60 + 1);
    framing
}

#[test]
fn random_reads_and_writes_match_a_model() {
    for features in [
        features::LINUX,
        features::LINUX & !features::INDIRECT,
        features::LINUX & !features::EVENT_IDX,
    ] {
        let mut disk = Setup::new().start();
        let mut front_end = disk.connect(&Options {
            queues: 4,
            features,
            ..Options::default()
        });
        let mut random = Random::new(features);
        let mut model = vec![0; 8 << 20];
        for round in 0..250 {
            let queue = front_end.queue(random.below(4));
            let longest = random.pick(&[1, 8, 64, 600, 3000]);
            let sectors = 1 + random.below(longest);
            let sector = random.below(model.len() / SECTOR - sectors + 1);
            let here = sector * SECTOR..(sector + sectors) * SECTOR;
            queue.set_framing(fitting(random_framing(&mut random), here.len()));
            if random.below(2) == 0 {
                let data = random.bytes(here.len());
                queue.write_data(sector as u64, &data).expect("a write");
                model[here].copy_from_slice(&data);
            } else {
                let mut data = vec![0; here.len()];
                queue.read(sector as u64, &mut data).expect("a read");
                assert!(data == model[here], "round {round}: {sector}+{sectors}");
            }
        }
        drop(front_end);
        disk.stop_and_expect(&model);
        disk.assert_nothing_reported();
    }
}

#[test]
fn sixty_four_queues_work_at_once() {
    let mut disk = Setup::new().bytes(64 << 18).start();
    let mut front_end = disk.connect(&Options {
        queues: 64,
        queue_size: 64,
        memory_bytes: 256 << 20,
        ..Options::default()
    });
    assert_eq!(front_end.queues_offered(), 64);
    std::thread::scope(|scope| {
        for queue in front_end.queues() {
            scope.spawn(move || {
                let index = u64::from(queue.index());
                let mut random = Random::new(index);
                let (start, sectors) = (index * 512, 512);
                let mut model = vec![0; sectors * SECTOR];
                for _ in 0..40 {
                    let count = 1 + random.below(32);
                    let at = random.below(sectors - count + 1);
                    let here = at * SECTOR..(at + count) * SECTOR;
                    let data = random.bytes(here.len());
                    let sector = start + at as u64;
                    queue.write_data(sector, &data).expect("a write");
                    model[here].copy_from_slice(&data);
                    let mut back = vec![0; model.len()];
                    queue.read(start, &mut back).expect("a read");
                    assert!(back == model, "queue {index}");
                }
            });
        }
    });
    drop(front_end);
    disk.stop_and_compare();
    disk.assert_nothing_reported();
}

#[test]
fn many_requests_in_flight_keep_their_data_apart() {
    let mut disk = Setup::new().start();
    let mut front_end = disk.connect(&Options::default());
    let queue = front_end.queue(0);
    let mut random = Random::new(4);
    let mut model = vec![0; 8 << 20];
    for _ in 0..8 {
        let mut writes = Vec::new();
        for slot in 0..100 {
            let sector = slot * 160 + random.below(100);
            let sectors = 1 + random.below(60);
            let data = random.bytes(sectors * SECTOR);
            let token = queue.enqueue(&Request::Write {
                sector: sector as u64,
                data: &data,
            });
            writes.push(token.expect("room"));
            model[sector * SECTOR..][..data.len()].copy_from_slice(&data);
        }
        queue.publish().expect("a kick");
        for token in writes {
            assert_eq!(queue.wait(token).expect("an end").status, Status::Ok);
        }
        let mut reads = Vec::new();
        for slot in 0..100 {
            let len = 160 * SECTOR;
            let token = queue.submit(&Request::Read {
                sector: slot * 160,
                len,
            });
            reads.push((token.expect("room"), index(slot) * len, len));
        }
        for (token, at, len) in reads {
            let read = queue.wait(token).expect("an end");
            assert_eq!(read.status, Status::Ok);
            assert_eq!(read.used_bytes as usize, len + 1);
            assert!(read.data == model[at..at + len], "from byte {at}");
        }
    }
    drop(front_end);
    disk.stop_and_expect(&model);
}

#[test]
fn requests_as_large_as_announced_are_served() {
    let mut disk = Setup::new().bytes(24 << 20).start();
    let mut front_end = disk.connect(&Options {
        memory_bytes: 256 << 20,
        ..Options::default()
    });
    let config = front_end.config().expect("a configuration space");
    assert_eq!(front_end.offered() & features::SIZE_MAX, 0, "no SIZE_MAX");
    assert!(front_end.offered() & features::SEG_MAX != 0);
    let segments = config.seg_max as usize;
    assert!((1..=254).contains(&segments), "{segments} with 256 entries");
    let queue = front_end.queue(0);
    let mut random = Random::new(8);
    for piece in [4096, 65536, SECTOR] {
        queue.set_framing(Framing {
            data_piece: piece,
            gap: SECTOR,
            ..Framing::default()
        });
        let data = random.bytes(segments * piece);
        queue.write_data(5, &data).expect("a write");
        let mut back = vec![0; data.len()];
        queue.read(5, &mut back).expect("a read");
        assert!(data == back, "pieces of {piece}");
    }
    queue.set_framing(Framing::default());
    let whole = random.bytes(16 << 20);
    queue.write_data(1, &whole).expect("16 MiB in a piece");
    let mut back = vec![0; whole.len()];
    queue.read(1, &mut back).expect("16 MiB in a piece");
    assert!(whole == back);
    drop(front_end);
    let disk_bytes = disk.stop_and_compare();
    assert!(disk_bytes[SECTOR..][..whole.len()] == whole);
}

#[test]
fn write_zeroes_reads_back_as_zeroes_everywhere() {
    let mut disk = Setup::new().start();
    let mut front_end = disk.connect(&Options::default());
    let config = front_end.config().expect("a configuration space");
    assert!(config.max_write_zeroes_seg >= 2);
    let queue = front_end.queue(0);
    let mut model = Random::new(3).bytes(8 << 20);
    for (at, chunk) in model.chunks(1 << 20).enumerate() {
        queue.write_data(at as u64 * 2048, chunk).expect("a write");
    }
    let unmap = 1;
    let lists = [
        vec![Segment::new(7, 1)],
        vec![Segment::new(100, 3000)],
        vec![Segment {
            flags: unmap,
            ..Segment::new(8192, 4096)
        }],
        vec![
            Segment::new(5000, 5),
            Segment {
                flags: unmap,
                ..Segment::new(5010, 8)
            },
        ],
        vec![Segment::new(16383, 1)],
    ];
    for list in lists {
        queue.write_zeroes(&list).expect("write zeroes");
        for segment in list {
            let start = index(segment.sector) * SECTOR;
            model[start..start + segment.sectors as usize * SECTOR].fill(0);
        }
    }
    for (at, chunk) in model.chunks(1 << 20).enumerate() {
        let mut back = vec![1; chunk.len()];
        queue.read(at as u64 * 2048, &mut back).expect("a read");
        assert!(back == chunk, "MiB {at}");
    }
    drop(front_end);
    disk.stop_and_expect(&model);
    disk.assert_nothing_reported();
}

#[test]
fn discard_does_the_same_to_all_replicas() {
    let mut disk = Setup::new().start();
    let mut front_end = disk.connect(&Options::default());
    let queue = front_end.queue(0);
    let before = Random::new(3).bytes(1 << 20);
    queue.write_data(0, &before).expect("a write");
    let list = [Segment::new(0, 8), Segment::new(64, 1024)];
    queue.discard(&list).expect("a discard");
    let mut back = vec![1; before.len()];
    queue.read(0, &mut back).expect("a read");
    let mut zeroed = before.clone();
    zeroed[..8 * SECTOR].fill(0);
    zeroed[64 * SECTOR..][..1024 * SECTOR].fill(0);
    assert!(back == before || back == zeroed, "neither zero nor kept");
    drop(front_end);
    let after = disk.stop_and_compare();
    assert!(after[..1 << 20] == back, "what was read is what is there");
    disk.assert_nothing_reported();
}

#[test]
fn get_id_is_the_users_serial_and_else_differs() {
    fn id(disk: &Disk) -> Vec<u8> {
        let mut front_end = disk.connect(&Options::default());
        front_end.queue(0).get_id().expect("an id")
    }
    let named = Setup::new()
        .arguments(&["--serial", "disk-of-alice"])
        .start();
    assert_eq!(id(&named), *b"disk-of-alice\0\0\0\0\0\0\0");
    let full = Setup::new()
        .arguments(&["--serial", "12345678901234567890"])
        .start();
    assert_eq!(id(&full), *b"12345678901234567890");
    let (one, other) = (Setup::new().start(), Setup::new().start());
    assert_ne!(id(&one), id(&other));
    assert_eq!(id(&one), id(&one));
}

#[test]
fn config_space_says_what_the_disk_is() {
    let disk = Setup::new()
        .arguments(&["--num-queues", "7", "--block-size", "4096"])
        .start();
    let mut front_end = disk.connect(&Options {
        queues: 7,
        ..Options::default()
    });
    let config = front_end.config().expect("a configuration space");
    assert_eq!(config.capacity_sectors, (8 << 20) / 512);
    assert_eq!(config.num_queues, 7);
    assert_eq!(config.blk_size, 4096);
    assert_eq!(config.writeback, 1, "else Linux never flushes");
    assert!(config.max_discard_sectors > 0 && config.max_discard_seg > 0);
    assert!(config.max_write_zeroes_sectors > 0);
    let whole = front_end.config_bytes(256).expect("256 bytes");
    for size in [1, 8, 57, 60, 96, 255] {
        let part = front_end.config_bytes(size).expect("any size");
        assert_eq!(part, whole[..size as usize]);
    }
    assert!(whole[64..].iter().all(|&byte| byte == 0), "zero-filled");
    let wanted = features::LINUX & !features::RO;
    assert_eq!(front_end.offered() & wanted, wanted);
    let (size_max, config_wce, secure_erase, zoned) = (1 << 1, 1 << 11, 1 << 16, 1 << 17);
    let never = features::RO | size_max | config_wce | secure_erase | zoned;
    assert_eq!(front_end.offered() & never, 0);
}

#[test]
fn read_only_disk_refuses_every_change() {
    let mut disk = Setup::new().arguments(&["--read-only"]).start();
    for replica in 0..3 {
        disk.spoil(replica, 9, 1, 7);
    }
    let mut front_end = disk.connect(&Options::default());
    assert!(front_end.offered() & features::RO != 0);
    let queue = front_end.queue(0);
    let data = [1; SECTOR];
    let segments = [Segment::new(9, 1)];
    let mut back = [0; SECTOR];
    let write = queue.run(&Request::Write {
        sector: 9,
        data: &data,
    });
    assert_eq!(write.expect("an end").status, Status::IoError);
    for request in [Request::WriteZeroes(&segments), Request::Discard(&segments)] {
        let refused = queue.run(&request).expect("an end");
        assert_ne!(refused.status, Status::Ok, "{request:?}");
    }
    queue.flush().expect("a flush");
    queue.read(9, &mut back).expect("a read");
    assert_eq!(back, [7; SECTOR]);
    drop(front_end);
    let after = disk.stop_and_compare();
    assert_eq!(after[9 * SECTOR..10 * SECTOR], [7; SECTOR]);
}

#[test]
fn one_replica_or_sixteen_keep_data() {
    for replicas in [1, 2, 5, 16] {
        let mut disk = Setup::new().replicas(replicas).bytes(1 << 20).start();
        let mut front_end = disk.connect(&Options::default());
        let data = Random::new(9).bytes(1 << 20);
        front_end.queue(0).write_data(0, &data).expect("a write");
        front_end.queue(0).flush().expect("a flush");
        let mut back = vec![0; data.len()];
        front_end.queue(0).read(0, &mut back).expect("a read");
        assert!(back == data, "{replicas} replicas");
        drop(front_end);
        disk.stop_and_expect(&data);
    }
}

#[test]
fn large_blocks_are_the_unit_of_writes() {
    let mut disk = Setup::new().arguments(&["--block-size", "4096"]).start();
    let mut front_end = disk.connect(&Options::default());
    let queue = front_end.queue(0);
    queue.write_data(8, &[1; 8192]).expect("whole blocks");
    for (sector, bytes) in [(8, SECTOR), (9, 4096), (12, 4096)] {
        let data = vec![2; bytes];
        let refused = queue.run(&Request::Write {
            sector,
            data: &data,
        });
        assert_eq!(refused.expect("an end").status, Status::IoError);
    }
    let mut back = vec![0; 8192];
    queue.read(8, &mut back).expect("a read");
    assert!(back == [1; 8192]);
    drop(front_end);
    disk.stop_and_compare();
}
