// SPDX-License-Identifier: Apache-2.0
//! One fault after the other, each on one replica and each while the guest works, and now and then
//! the daemon is killed in the middle of it. No request fails (I14), no read is wrong (I1), and
//! when a fault is over the replica comes back (I9).
//!
//! Rot is not among them: a replica that lies, together with one that was behind a moment ago, or
//! that a busy machine has made late, is one fault more than three replicas can bear.

use std::fs;
use std::time::Duration;

use crate::common::{Random, Signal};
use crate::guest::Guest;
use crate::model::Model;
use crate::site::{SECTORS, Site};

const ROUNDS: usize = 14;

/// What befalls a replica.
#[derive(Clone, Copy, Debug)]
enum Fault {
    Hangs,
    FailsWrites,
    FailsReads,
    FailsFlushes,
    IsFull,
    IsSlow,
    Leaves,
}

/// Replicas 1 and 2 fail on command; replica 0 is a plain file and can be moved away.
const FAULTS: [(Fault, usize); 9] = [
    (Fault::Hangs, 1),
    (Fault::FailsWrites, 2),
    (Fault::FailsReads, 1),
    (Fault::FailsFlushes, 2),
    (Fault::IsFull, 1),
    (Fault::IsSlow, 2),
    (Fault::Leaves, 0),
    (Fault::Hangs, 2),
    (Fault::FailsWrites, 1),
];

impl Fault {
    fn begin(self, site: &Site, replica: usize) {
        match self {
            Self::Hangs => site.fault(replica).tell("hang"),
            Self::FailsWrites => site.fault(replica).tell("eio write on"),
            Self::FailsReads => site.fault(replica).tell("eio read on"),
            Self::FailsFlushes => site.fault(replica).tell("eio fsync on"),
            Self::IsFull => site.fault(replica).tell("enospc on"),
            Self::IsSlow => site.fault(replica).tell("delay 0.2"),
            Self::Leaves => fs::rename(&site.images[replica], away(site)).expect("ours"),
        }
    }

    fn end(self, site: &Site, replica: usize) {
        match self {
            Self::Hangs => site.fault(replica).tell("resume"),
            Self::FailsWrites => site.fault(replica).tell("eio write off"),
            Self::FailsReads => site.fault(replica).tell("eio read off"),
            Self::FailsFlushes => site.fault(replica).tell("eio fsync off"),
            Self::IsFull => site.fault(replica).tell("enospc off"),
            Self::IsSlow => site.fault(replica).tell("delay 0"),
            Self::Leaves => fs::rename(away(site), &site.images[replica]).expect("ours"),
        }
    }
}

fn away(site: &Site) -> std::path::PathBuf {
    site.folder().join("away")
}

fn work(site: &Site, model: &mut Model, random: &mut Random) {
    let mut guest = Guest::connect(site);
    for _ in 0..1 + random.below(3) {
        let requests = 20 + random.below(80);
        let worked = guest.work(model, random, 8, |done| done < requests);
        worked.expect("the daemon lives");
        guest.flush(model);
    }
}

/// Kills the daemon in the middle of work, ends the fault and starts the daemon again.
fn kill(site: &mut Site, model: &mut Model, random: &mut Random, end: impl Fn(&Site)) {
    let mut guest = Guest::connect(site);
    let last = random.below(60);
    let worked = guest.work(model, random, 16, |done| {
        if done == last {
            site.signal(Signal::Kill);
            // What hangs keeps the old daemon, its connection and its locks, until it is answered
            // (rule K2).
            end(site);
        }
        true
    });
    assert!(worked.is_err());
    drop(guest);
    site.kill();
    site.start();
}

#[test]
fn one_fault_after_the_other_and_kills_between_them() {
    let arguments = [
        ["--io-timeout", "2"],
        ["--max-kicks", "0"],
        ["--max-write-errors", "0"],
        ["--max-repairs", "0"],
    ];
    let mut site = Site::faulty(&[1, 2], arguments.as_flattened());
    let mut model = Model::new(SECTORS);
    let mut random = Random::new(91);
    for round in 0..ROUNDS {
        let (fault, replica) = random.pick(&FAULTS);
        let killed = random.below(3) == 0;
        println!("round {round}: replica {replica} {fault:?}, killed: {killed}");
        fault.begin(&site, replica);
        work(&site, &mut model, &mut random);
        if killed {
            kill(&mut site, &mut model, &mut random, |site| {
                fault.end(site, replica);
            });
        } else {
            std::thread::sleep(Duration::from_millis(random.below(2500) as u64));
            work(&site, &mut model, &mut random);
            fault.end(&site, replica);
        }
        work(&site, &mut model, &mut random);
        Guest::connect(&site).check_all(&mut model, killed);
        site.await_healthy();
        site.await_equal();
        site.assert_no_failure();
    }
    site.stop();
    assert_eq!(site.difference(), None);
}
