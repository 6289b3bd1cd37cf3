// SPDX-License-Identifier: Apache-2.0
use std::fs::File;
use std::io::Write;
use std::thread;

use rustix::event::{EventfdFlags, eventfd};

use super::*;

const LIMITS: MessageLimits = MessageLimits {
    queues: 4,
    queue_size: 256,
};

fn file(len: u64) -> OwnedFd {
    let file = tempfile::tempfile().unwrap();
    file.set_len(len).unwrap();
    file.into()
}

fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC).unwrap()
}

fn message(code: u32, body: &[u8], descriptors: Vec<OwnedFd>) -> Message {
    Message {
        code,
        flags: 1,
        body: body.to_vec(),
        descriptors,
    }
}

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

fn pair(low: u32, high: u32) -> Vec<u8> {
    [low.to_ne_bytes(), high.to_ne_bytes()].concat()
}

#[test]
fn message_comes_out_as_it_went_in() {
    let (a, b) = UnixStream::pair().unwrap();
    let sent = message(5, &[7; 4096], (0..32).map(|_| file(1)).collect());
    let writer = thread::spawn(move || sent.write(&a).unwrap());
    let got = Message::read(&b).unwrap();
    writer.join().unwrap();
    assert_eq!((got.code, got.flags, got.body), (5, 1, vec![7; 4096]));
    assert_eq!(got.descriptors.len(), 32);
    let lens = got
        .descriptors
        .into_iter()
        .map(|fd| File::from(fd).metadata().unwrap().len());
    assert!(lens.into_iter().all(|len| len == 1));
    assert!(matches!(Message::read(&b), Err(TransportError::Closed)));
}

#[test]
fn message_in_pieces_is_read_whole_and_half_a_message_is_none() {
    let (mut a, b) = UnixStream::pair().unwrap();
    let bytes: Vec<u8> = [2u32, 1, 8, 5, 6]
        .iter()
        .flat_map(|word| word.to_ne_bytes())
        .collect();
    let writer = thread::spawn(move || {
        for byte in &bytes {
            a.write_all(&[*byte]).unwrap();
        }
        a.write_all(&bytes[..14]).unwrap();
    });
    let got = Message::read(&b).unwrap();
    assert_eq!((got.code, got.body), (2, pair(5, 6)));
    writer.join().unwrap();
    assert!(matches!(Message::read(&b), Err(TransportError::Truncated)));
}

#[test]
fn oversized_payload_is_refused_before_it_is_read() {
    for size in [4097u32, u32::MAX] {
        let (mut a, b) = UnixStream::pair().unwrap();
        for word in [2, 1, size] {
            a.write_all(&word.to_ne_bytes()).unwrap();
        }
        let error = Message::read(&b).unwrap_err();
        assert!(matches!(error, TransportError::Oversized { size: s } if s == size));
    }
}

#[test]
fn too_many_descriptors_are_refused_and_closed() {
    let (a, b) = UnixStream::pair().unwrap();
    let fds: Vec<_> = (0..64).map(|_| file(0)).collect();
    let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(&borrowed)));
    let part = [IoSlice::new(&[0; HEADER_LEN])];
    sendmsg(&a, &part, &mut control, SendFlags::NOSIGNAL).unwrap();
    assert!(matches!(
        Message::read(&b),
        Err(TransportError::Descriptors)
    ));
}

#[test]
fn good_messages_are_taken() {
    let region = |size: u64, offset: u64| [0x1000, size, 0x7f00_0000_0000, offset];
    let table: Vec<u8> = [
        pair(2, 0),
        words(&region(4096, 0)),
        words(&region(8192, 4096)),
    ]
    .concat();
    let single: Vec<u8> = [words(&[0]), words(&region(4096, 0))].concat();
    let config: Vec<u8> = [pair(0, 60), vec![0; 4], vec![0; 60]].concat();
    let cases = [
        (message(1, &[], vec![]), Request::GetFeatures),
        (message(2, &words(&[1 << 30]), vec![]), Request::SetFeatures),
        (
            message(5, &table, vec![file(4096), file(12288)]),
            Request::SetMemTable,
        ),
        (
            message(6, &words(&[1, 0]), vec![file(1)]),
            Request::SetLogBase,
        ),
        (message(7, &[], vec![event()]), Request::SetLogFd),
        (message(8, &pair(3, 256), vec![]), Request::SetVringNum),
        (message(10, &pair(3, 65535), vec![]), Request::SetVringBase),
        (
            message(12, &words(&[3]), vec![event()]),
            Request::SetVringKick,
        ),
        (
            message(14, &words(&[3]), vec![event()]),
            Request::SetVringErr,
        ),
        (message(13, &words(&[0x103]), vec![]), Request::SetVringCall),
        (message(18, &pair(0, 1), vec![]), Request::SetVringEnable),
        (message(21, &[], vec![file(0)]), Request::SetBackendReqFd),
        (message(24, &config, vec![]), Request::GetConfig),
        (message(37, &single, vec![file(4096)]), Request::AddMemReg),
        (message(38, &single, vec![]), Request::RemMemReg),
        (message(38, &single, vec![file(0)]), Request::RemMemReg),
    ];
    for (mut message, request) in cases {
        assert_eq!(message.check(LIMITS).unwrap(), request);
        message.flags |= FLAG_NEED_REPLY;
        assert_eq!(message.check(LIMITS).unwrap(), request);
        for flags in [0, 2, 1 | FLAG_REPLY, 1 | 16] {
            message.flags = flags;
            let refusal = message.check(LIMITS).unwrap_err();
            assert!(matches!(refusal, Refusal::Flags { .. }), "{flags:#x}");
        }
    }
}

#[test]
fn bad_messages_are_refused_for_what_is_wrong() {
    let single = |region: [u64; 4]| [words(&[0]), words(&region)].concat();
    let table = |count: u32, regions: usize| {
        let regions = words(&[0x1000, 4096, 0, 0]).repeat(regions);
        [pair(count, 0), regions].concat()
    };
    let config = |size: u32, len: usize| [pair(0, size), vec![0; 4 + len]].concat();
    let cases: Vec<(Message, &str)> = vec![
        (message(0, &[], vec![]), "Unknown"),
        (message(6, &words(&[0, 0]), vec![]), "Descriptors"),
        (message(6, &words(&[0]), vec![file(0)]), "Length"),
        (message(7, &[], vec![]), "Descriptors"),
        (message(7, &[], vec![file(0)]), "NoEventfd"),
        (message(19, &words(&[0]), vec![]), "Unknown"),
        (message(40, &words(&[0, 0]), vec![]), "Unknown"),
        (message(31, &words(&[0, 0]), vec![]), "Length"),
        (
            message(31, &words(&[0, 0, 0]), vec![file(1)]),
            "Descriptors",
        ),
        (message(32, &words(&[0, 0, 0]), vec![]), "Descriptors"),
        (message(99, &[], vec![]), "Unknown"),
        (message(1, &[0], vec![]), "Length"),
        (message(1, &[], vec![file(0)]), "Descriptors"),
        (message(2, &[0; 7], vec![]), "Length"),
        (message(2, &[0; 16], vec![]), "Length"),
        (message(5, &table(0, 0), vec![]), "Descriptors"),
        (message(5, &[], vec![]), "Length"),
        (message(5, &table(1, 1), vec![]), "Descriptors"),
        (message(5, &table(2, 1), vec![file(4096)]), "Length"),
        (message(5, &table(u32::MAX, 1), vec![file(4096)]), "Length"),
        (message(5, &table(1, 1), vec![file(4095)]), "RegionShort"),
        (message(8, &pair(4, 128), vec![]), "Queue {"),
        (message(8, &pair(0, 0), vec![]), "QueueSize"),
        (message(8, &pair(0, 96), vec![]), "QueueSize"),
        (message(8, &pair(0, 512), vec![]), "QueueSize"),
        (message(8, &pair(0, 0x1_0080), vec![]), "QueueSize"),
        (message(9, &words(&[4, 0, 0, 0, 0]), vec![]), "Queue {"),
        (message(10, &pair(0, 0x1_0000), vec![]), "Value"),
        (message(11, &pair(u32::MAX, 0), vec![]), "Queue {"),
        (message(12, &words(&[0]), vec![]), "Descriptors"),
        (message(12, &words(&[0x100]), vec![file(0)]), "Descriptors"),
        (
            message(12, &words(&[0]), vec![file(0), file(0)]),
            "Descriptors",
        ),
        (message(12, &words(&[0]), vec![file(0)]), "NoEventfd"),
        (message(13, &words(&[0]), vec![file(0)]), "NoEventfd"),
        (message(14, &words(&[0]), vec![file(0)]), "NoEventfd"),
        (message(13, &words(&[0x104]), vec![]), "Queue {"),
        (message(13, &words(&[0x1_0000_0100]), vec![]), "Queue {"),
        (message(18, &pair(0, 2), vec![]), "Value"),
        (message(21, &[], vec![]), "Descriptors"),
        (message(24, &config(61, 60), vec![]), "Length"),
        (message(24, &config(300, 300), vec![]), "Length"),
        (message(25, &[0; 5], vec![]), "Length"),
        (
            message(37, &single([0, 0, 0, 0]), vec![file(1)]),
            "Region {",
        ),
        (
            message(37, &single([u64::MAX, 1, 0, 0]), vec![file(1)]),
            "Region {",
        ),
        (
            message(37, &single([0, 2, u64::MAX, 0]), vec![file(1)]),
            "Region {",
        ),
        (
            message(37, &single([0, 1, 0, u64::MAX]), vec![file(1)]),
            "Region {",
        ),
        (
            message(37, &single([0, 4096, 0, 4096]), vec![file(8191)]),
            "RegionShort",
        ),
        (message(37, &single([0, 1, 0, 0]), vec![]), "Descriptors"),
        (message(38, &single([0, 0, 0, 0]), vec![]), "Region {"),
    ];
    for (message, expected) in cases {
        let refusal = message.check(LIMITS).unwrap_err();
        let got = format!("{refusal:?}");
        assert!(got.starts_with(expected), "{message:?}: {got}");
    }
}
