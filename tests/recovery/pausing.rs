// SPDX-License-Identifier: Apache-2.0
//! Too few replicas are left: with `--on-lost-quorum pause` requests wait for them to come back,
//! without they fail; and those that wait hold up neither the guest's leaving nor the daemon's end
//! (rule Q4).

use std::time::{Duration, Instant};

use quorum_blk::front_end::{FrontEnd, Options, Request, Status};

use crate::common::{SECTOR, Signal};
use crate::site::Site;

/// How long what must not be held up may take.
const END_MAX: Duration = Duration::from_secs(15);
const READ: Request<'_> = Request::Read {
    sector: 64,
    len: SECTOR,
};

fn connect(site: &Site) -> FrontEnd {
    let options = Options {
        timeout: Duration::from_secs(30),
        ..Options::default()
    };
    FrontEnd::connect(&site.socket, &options).expect("the daemon serves")
}

/// A disk of which two of three replicas hang and are not counted on any more.
fn without_quorum(policy: &str) -> (Site, FrontEnd) {
    let site = Site::faulty(&[1, 2], &["--io-timeout", "1", "--on-lost-quorum", policy]);
    let mut front_end = connect(&site);
    let queue = front_end.queue(0);
    queue.write_data(64, &[1; SECTOR]).expect("a write");
    queue.flush().expect("a flush");
    site.fault(1).tell("hang");
    site.fault(2).tell("hang");
    (site, front_end)
}

fn await_kicked(site: &Site) {
    for name in ["replica1", "replica2"] {
        site.await_event("QUORUM_BLK_REPLICA_KICKED", |data| data["replica"] == name);
    }
}

fn assert_no_answer(front_end: &mut FrontEnd) {
    let until = Instant::now() + Duration::from_secs(1);
    while Instant::now() < until {
        let completion = front_end.queue(0).poll().expect("the daemon lives");
        assert!(completion.is_none(), "{completion:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn requests_wait_for_replicas_to_come_back() {
    let (mut site, mut front_end) = without_quorum("pause");
    let data = [2; SECTOR];
    let write = Request::Write {
        sector: 128,
        data: &data,
    };
    // This one finds out that the replicas hang, the other one begins without them.
    front_end.queue(0).submit(&READ).expect("room");
    await_kicked(&site);
    front_end.queue(0).submit(&write).expect("room");
    assert_no_answer(&mut front_end);
    site.fault(1).tell("resume");
    site.fault(2).tell("resume");
    for _ in 0..2 {
        let completion = front_end.queue(0).wait_any().expect("an answer");
        assert_eq!(completion.status, Status::Ok);
    }
    let mut found = [0; SECTOR];
    front_end.queue(0).read(128, &mut found).expect("a read");
    assert!(found == data);
    front_end.queue(0).read(64, &mut found).expect("a read");
    assert!(found == [1; SECTOR]);
    site.await_healthy();
    drop(front_end);
    site.await_equal();
    site.stop();
}

#[test]
fn requests_fail_where_they_are_not_to_wait() {
    let (site, mut front_end) = without_quorum("error");
    let data = [2; SECTOR];
    let write = Request::Write {
        sector: 128,
        data: &data,
    };
    for request in [&write, &READ] {
        let completion = front_end.queue(0).run(request).expect("an answer");
        assert_eq!(completion.status, Status::IoError, "{request:?}");
    }
    await_kicked(&site);
}

#[test]
fn a_front_end_that_leaves_does_not_wait_for_its_paused_requests() {
    let (site, mut front_end) = without_quorum("pause");
    front_end.queue(0).submit(&READ).expect("room");
    await_kicked(&site);
    assert_no_answer(&mut front_end);
    // Stopping the queue waits until the daemon has answered all it took.
    let begun = Instant::now();
    front_end.stop().expect("an answer");
    assert!(begun.elapsed() < END_MAX, "{:?}", begun.elapsed());
    drop(front_end);
    // The next one is served.
    let begun = Instant::now();
    let mut front_end = connect(&site);
    front_end.queue(0).submit(&READ).expect("room");
    assert_no_answer(&mut front_end);
    // And this one goes without a word.
    drop(front_end);
    drop(connect(&site));
    assert!(begun.elapsed() < END_MAX, "{:?}", begun.elapsed());
}

#[test]
fn the_end_of_the_daemon_does_not_wait_for_paused_requests() {
    let (mut site, mut front_end) = without_quorum("pause");
    front_end.queue(0).submit(&READ).expect("room");
    await_kicked(&site);
    assert_no_answer(&mut front_end);
    site.process().signal(Signal::Terminate);
    let deadline = Instant::now() + END_MAX;
    while !site.log().contains("counters") || site.socket.exists() {
        assert!(Instant::now() < deadline, "it goes on: {}", site.log());
        std::thread::sleep(Duration::from_millis(10));
    }
    let log = site.log();
    assert!(!log.contains("in time"), "{log}");
    site.fault(1).tell("resume");
    site.fault(2).tell("resume");
    let status = site.process().wait(END_MAX);
    assert_eq!(status.code(), Some(0), "{status}: {}", site.log());
}
