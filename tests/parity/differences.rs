// SPDX-License-Identifier: Apache-2.0
//! Where the daemon and QEMU's quorum driver are meant to differ, and why. The rules named are
//! those of the consistency model.

/// A difference that is meant.
#[derive(Debug)]
pub struct Difference {
    /// Name of the case.
    pub case: &'static str,
    /// Where it shows: a step by number, `replica N afterwards`, `start`, `server`.
    pub place: &'static str,
    /// What the daemon does.
    pub ours: &'static str,
    /// What QEMU 10.0 does.
    pub peer: &'static str,
    /// Why that is right.
    pub reason: &'static str,
}

/// The difference listed for a place of a case.
pub fn listed(case: &str, place: &str) -> Option<&'static Difference> {
    of_case(case).find(|entry| entry.place == place)
}

/// All differences listed for a case.
pub fn of_case(case: &str) -> impl Iterator<Item = &'static Difference> {
    DIFFERENCES.iter().filter(move |entry| entry.case == case)
}

const PER_SECTOR: &str =
    "Votes are counted sector by sector (V1); the peer compares whole requests.";
const TIE: &str =
    "A tie is an error (V3); the peer takes one of the versions and rewrites the others with it.";
const READ_ERROR: &str = "A replica that gave a read error is rewritten (V4); the peer rewrites only what it could read.";
const SHORT: &str =
    "A short read is an error, never zeroes (V4); the peer counts zeroes as a vote.";
const STALE: &str =
    "A replica that missed a write is behind and does not vote (W5); the peer lets it win.";
const DISCARD: &str = "Discarded sectors read back as zeroes on all replicas (Z2); the peer's quorum driver ignores discards.";
const MINORITY: &str = "Half the replicas or fewer may win only if that is asked for (V3).";
const LONGER: &str = "A replica may be longer than the disk (Z3); the peer wants equal lengths.";

const DIFFERENCES: &[Difference] = &[
    Difference {
        case: "fifo, read error",
        place: "replica 0 afterwards",
        ours: "0..64 version 0, 64..128 zeroes, 128..136 version 0",
        peer: "0..64 version 0",
        reason: READ_ERROR,
    },
    Difference {
        case: "two wrong, different sectors",
        place: "step 2",
        ours: "0..8 version 0",
        peer: "IoError",
        reason: PER_SECTOR,
    },
    Difference {
        case: "two wrong, different sectors",
        place: "replica 0 afterwards",
        ours: "0..2048 version 0",
        peer: "0 version 0, 1 version 7, 2..2048 version 0",
        reason: PER_SECTOR,
    },
    Difference {
        case: "two wrong, different sectors",
        place: "replica 2 afterwards",
        ours: "0..2048 version 0",
        peer: "0..5 version 0, 5 version 8, 6..2048 version 0",
        reason: PER_SECTOR,
    },
    Difference {
        case: "three wrong, different sectors",
        place: "step 3",
        ours: "0..8 version 0",
        peer: "IoError",
        reason: PER_SECTOR,
    },
    Difference {
        case: "three wrong, different sectors",
        place: "replica 0 afterwards",
        ours: "0..2048 version 0",
        peer: "0 version 0, 1 version 7, 2..2048 version 0",
        reason: PER_SECTOR,
    },
    Difference {
        case: "three wrong, different sectors",
        place: "replica 1 afterwards",
        ours: "0..2048 version 0",
        peer: "0..3 version 0, 3 version 8, 4..2048 version 0",
        reason: PER_SECTOR,
    },
    Difference {
        case: "three wrong, different sectors",
        place: "replica 2 afterwards",
        ours: "0..2048 version 0",
        peer: "0..5 version 0, 5 version 9, 6..2048 version 0",
        reason: PER_SECTOR,
    },
    Difference {
        case: "tie",
        place: "step 2",
        ours: "IoError",
        peer: "0..2 version 0, 2 version 7, 3..8 version 0",
        reason: TIE,
    },
    Difference {
        case: "tie",
        place: "replica 0 afterwards",
        ours: "0..2048 version 0",
        peer: "0..2 version 0, 2 version 7, 3..2048 version 0",
        reason: TIE,
    },
    Difference {
        case: "tie",
        place: "replica 1 afterwards",
        ours: "0..2048 version 0",
        peer: "0..2 version 0, 2 version 7, 3..2048 version 0",
        reason: TIE,
    },
    Difference {
        case: "minority threshold",
        place: "start",
        ours: "refused",
        peer: "nothing",
        reason: MINORITY,
    },
    Difference {
        case: "minority threshold",
        place: "step 0",
        ours: "nothing",
        peer: "0..8 version 0",
        reason: MINORITY,
    },
    Difference {
        case: "stale majority",
        place: "step 1",
        ours: "0..8 version 1",
        peer: "0..8 zeroes",
        reason: STALE,
    },
    Difference {
        case: "two truncated",
        place: "step 2",
        ours: "IoError",
        peer: "128..136 zeroes",
        reason: SHORT,
    },
    Difference {
        case: "two truncated",
        place: "replica 0 afterwards",
        ours: "0..2048 version 0",
        peer: "0..128 version 0, 128..136 zeroes, 136..2048 version 0",
        reason: SHORT,
    },
    Difference {
        case: "read error",
        place: "replica 1 afterwards",
        ours: "0..64 version 0, 64..128 zeroes, 128..136 version 0",
        peer: "0..64 version 0",
        reason: READ_ERROR,
    },
    Difference {
        case: "zeroes",
        place: "step 5",
        ours: "248..256 version 0, 256..384 zeroes, 384..408 version 0",
        peer: "248..408 version 0",
        reason: DISCARD,
    },
    Difference {
        case: "zeroes",
        place: "replica 0 afterwards",
        ours: "0..8 version 0, 8..32 zeroes, 32..65 version 0, 65..70 zeroes, 70..128 version 0, 128..192 zeroes, 192..256 version 0, 256..384 zeroes, 384..2048 version 0",
        peer: "0..8 version 0, 8..32 zeroes, 32..65 version 0, 65..70 zeroes, 70..128 version 0, 128..192 zeroes, 192..2048 version 0",
        reason: DISCARD,
    },
    Difference {
        case: "zeroes",
        place: "replica 1 afterwards",
        ours: "0..8 version 0, 8..32 zeroes, 32..65 version 0, 65..70 zeroes, 70..128 version 0, 128..192 zeroes, 192..256 version 0, 256..384 zeroes, 384..2048 version 0",
        peer: "0..8 version 0, 8..32 zeroes, 32..65 version 0, 65..70 zeroes, 70..128 version 0, 128..192 zeroes, 192..2048 version 0",
        reason: DISCARD,
    },
    Difference {
        case: "zeroes",
        place: "replica 2 afterwards",
        ours: "0..8 version 0, 8..32 zeroes, 32..65 version 0, 65..70 zeroes, 70..128 version 0, 128..192 zeroes, 192..256 version 0, 256..384 zeroes, 384..2048 version 0",
        peer: "0..8 version 0, 8..32 zeroes, 32..65 version 0, 65..70 zeroes, 70..128 version 0, 128..192 zeroes, 192..2048 version 0",
        reason: DISCARD,
    },
    Difference {
        case: "one longer",
        place: "start",
        ours: "nothing",
        peer: "refused",
        reason: LONGER,
    },
    Difference {
        case: "one longer",
        place: "step 0",
        ours: "0..8 version 0",
        peer: "nothing",
        reason: LONGER,
    },
];
