// SPDX-License-Identifier: Apache-2.0
//! The built-in front-end against a back-end that is not ours, QEMU's storage daemon: what these
//! tests establish of the front-end is what the tests of the daemon rely on.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use quorum_blk::front_end::{
    Framing, FrontEnd, FrontEndError, Options, Request, Segment, Status, features,
};

/// QEMU's storage daemon with one raw image; killed when dropped.
struct Peer {
    child: Child,
    socket: PathBuf,
    image: PathBuf,
    _folder: tempfile::TempDir,
}

impl Peer {
    fn start(bytes: u64, queues: u16) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let image = folder.path().join("disk.img");
        let socket = folder.path().join("sock");
        let file = std::fs::File::create(&image).expect("an image");
        file.set_len(bytes).expect("a sparse image");
        let child = Command::new("qemu-storage-daemon")
            .arg("--blockdev")
            .arg(format!(
                "driver=file,node-name=f,discard=unmap,filename={}",
                image.display()
            ))
            .arg("--export")
            .arg(format!(
                "type=vhost-user-blk,id=e,node-name=f,writable=on,num-queues={queues},\
                 addr.type=unix,addr.path={}",
                socket.display()
            ))
            .stdin(Stdio::null())
            .spawn()
            .expect("qemu-storage-daemon is installed (Debian package qemu-system-common)");
        let peer = Self {
            child,
            socket,
            image,
            _folder: folder,
        };
        let deadline = Instant::now() + Duration::from_secs(10);
        while !peer.socket.exists() {
            assert!(Instant::now() < deadline, "the peer made no socket");
            std::thread::sleep(Duration::from_millis(5));
        }
        peer
    }

    fn socket(&self) -> &Path {
        &self.socket
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn pattern(seed: usize, len: usize) -> Vec<u8> {
    (0..len)
        .map(|at| u8::try_from((at * 31 + at / 512 + seed * 7) % 251).expect("below 251"))
        .collect()
}

#[test]
fn qemu_manners_write_then_read() {
    round_trip(&Options::default());
}

#[test]
fn cloud_hypervisor_manners_write_then_read() {
    round_trip(&Options::cloud_hypervisor());
}

#[test]
fn plain_rings_without_call_write_then_read() {
    round_trip(&Options {
        features: features::LINUX & !features::EVENT_IDX & !features::INDIRECT,
        call: false,
        first_index: 65_500,
        queue_size: 64,
        ..Options::default()
    });
}

/// The peer makes its socket a moment before it listens on it.
fn connect(peer: &Peer, options: &Options) -> Result<FrontEnd, FrontEndError> {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        match FrontEnd::connect(peer.socket(), options) {
            Err(FrontEndError::Connect { .. }) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(5));
            }
            end => return end,
        }
    }
}

fn round_trip(options: &Options) {
    let peer = Peer::start(8 << 20, 4);
    let options = Options {
        queues: 4,
        ..*options
    };
    let mut disk = connect(&peer, &options).expect("a connection");
    let config = disk.config().expect("a configuration space");
    assert_eq!(config.capacity_sectors, 16 << 10);
    assert_eq!(config.num_queues, 4);
    for round in 0..80 {
        let queue = disk.queue(round % 4);
        let data = pattern(round, 512 * (1 + round % 9));
        let sector = (round * 64) as u64;
        queue.write_data(sector, &data).expect("a write");
        let mut back = vec![0; data.len()];
        queue.read(sector, &mut back).expect("a read");
        assert_eq!(data, back, "round {round}");
    }
    disk.queue(0).flush().expect("a flush");
    let on_disk = std::fs::read(&peer.image).expect("the image");
    assert_eq!(on_disk[64 * 512..][..1024], pattern(1, 1024));
    disk.queue(1)
        .write_zeroes(&[Segment::new(64, 1)])
        .expect("write zeroes");
    let mut back = vec![1; 1024];
    disk.queue(2).read(64, &mut back).expect("a read");
    assert_eq!(back[..512], [0; 512]);
    assert_eq!(back[512..], pattern(1, 1024)[512..]);
    let bases = disk.stop().expect("the rings stop");
    let expected: Vec<u32> = (0..4u32)
        .map(|queue| {
            let extra = [1, 1, 1, 0][queue as usize];
            u32::from(options.first_index.wrapping_add(40 + extra))
        })
        .collect();
    assert_eq!(bases, expected);
}

#[test]
fn any_framing_is_understood() {
    let peer = Peer::start(1 << 20, 1);
    let base = Framing::default();
    let framings = [
        Framing {
            header_piece: 5,
            ..base
        },
        Framing {
            data_piece: 512,
            gap: 512,
            ..base
        },
        Framing {
            joined: true,
            ..base
        },
        Framing {
            skew: 3,
            data_piece: 700,
            gap: 1,
            ..base
        },
    ];
    let indirect = features::LINUX;
    for features in [indirect, indirect & !features::INDIRECT] {
        let options = Options {
            features,
            ..Options::default()
        };
        let mut disk = connect(&peer, &options).expect("a connection");
        for (round, framing) in framings.iter().enumerate() {
            let queue = disk.queue(0);
            queue.set_framing(*framing);
            let data = pattern(round, 4096);
            queue.write_data(8, &data).expect("a write");
            let mut back = vec![0; 4096];
            queue.read(8, &mut back).expect("a read");
            assert_eq!(data, back, "{framing:?}");
        }
    }
}

#[test]
fn many_requests_in_flight_complete_once_each() {
    let peer = Peer::start(4 << 20, 1);
    let mut disk = connect(&peer, &Options::default()).expect("a connection");
    let queue = disk.queue(0);
    let mut waiting = std::collections::BTreeMap::new();
    let mut submitted = 0;
    while submitted < 2000 || !waiting.is_empty() {
        if submitted < 2000 {
            let sector = (submitted * 13 % 1000) as u64;
            let data = pattern(submitted, 512);
            let request = if submitted % 3 == 0 {
                Request::Write {
                    sector,
                    data: &data,
                }
            } else {
                Request::Read { sector, len: 512 }
            };
            match queue.submit(&request) {
                Ok(token) => {
                    submitted += 1;
                    assert!(
                        waiting
                            .insert(token, if submitted % 3 == 1 { 0 } else { 512 })
                            .is_none()
                    );
                    continue;
                }
                Err(FrontEndError::Full { .. }) => {}
                Err(error) => panic!("submission {submitted}: {error}"),
            }
        }
        let completion = queue.wait_any().expect("a completion");
        let len = waiting
            .remove(&completion.token)
            .expect("a request of ours");
        assert_eq!(completion.status, Status::Ok);
        assert_eq!(completion.data.len(), len);
    }
    assert_eq!(queue.in_flight(), 0);
}

#[test]
fn bad_requests_are_refused_and_the_queue_lives() {
    let peer = Peer::start(1 << 20, 1);
    let mut disk = connect(&peer, &Options::default()).expect("a connection");
    let queue = disk.queue(0);
    let past = Request::Read {
        sector: 2048,
        len: 512,
    };
    assert_eq!(queue.run(&past).expect("an end").status, Status::IoError);
    let unknown = Request::Raw {
        kind: 77,
        sector: 0,
        out: &[],
        in_len: 0,
    };
    assert_eq!(
        queue.run(&unknown).expect("an end").status,
        Status::Unsupported
    );
    queue.flush().expect("a flush");
}

#[test]
fn end_of_the_back_end_is_noticed_while_waiting() {
    let mut peer = Peer::start(1 << 20, 1);
    let mut disk = connect(&peer, &Options::default()).expect("a connection");
    peer.child.kill().expect("a kill");
    peer.child.wait().expect("an end");
    let ended = disk.queue(0).run(&Request::Flush);
    assert!(matches!(ended, Err(FrontEndError::Closed)), "{ended:?}");
}
