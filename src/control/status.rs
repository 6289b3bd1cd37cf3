// SPDX-License-Identifier: Apache-2.0
//! How the disk is: states of the replicas, what they lack, what is under way (SIGUSR1, end of the
//! process). Numbers that only grow are in [`super::counters`].

use std::fmt;

use serde::Serialize;

use super::events::{Names, pass_name, state_name};
use super::keeper_text::{counts_text, size};
use crate::quorum::{KeeperStatus, PassStatus, ReplicaState, ScrubCounts};
use crate::record::CopyStanding;

/// What is known of a disk at a moment.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DiskFacts {
    /// What the keeper says.
    pub keeper: KeeperStatus,
    /// What part the copies of its record play, in their order; none without a record.
    pub record: Vec<CopyStanding>,
}

/// The disk; shown as text, or as JSON by `serde`.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct DiskStatus {
    /// `healthy`: all replicas are in sync; `degraded`: at least T; `lost`: fewer.
    pub health: &'static str,
    /// The replicas, in order of configuration.
    pub replicas: Vec<ReplicaLine>,
    /// Extents whose replicas may differ or are not flushed.
    pub dirty_extents: u64,
    /// Extents to be settled since a crash (rule S4).
    pub unresolved_extents: u64,
    /// Sectors to be settled since a failed write (rule W7).
    pub unresolved_sectors: u64,
    /// The copies of the state record, in order; none without a record.
    pub record: Vec<CopyLine>,
    /// The scrub or first comparison that is under way.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pass: Option<PassLine>,
}

/// A replica.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct ReplicaLine {
    /// Its name.
    pub name: String,
    /// `in-sync`, `syncing`, `missing`, `failed` or `removed`.
    pub state: &'static str,
    /// Nobody waits for it (rule W6).
    pub lagging: bool,
    /// It decides no tie.
    pub suspect: bool,
    /// Extents in which it does not vote.
    pub behind_extents: u64,
    /// Bytes in them.
    pub behind_bytes: u64,
    /// Bytes brought up to date since it began to lack something.
    pub resynced_bytes: u64,
}

/// A copy of the state record.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct CopyLine {
    /// Its file.
    pub path: String,
    /// `in-use`; `returning`: it is being written whole; `left-out`: it is not written, and is
    /// tried again with growing pauses.
    pub state: &'static str,
}

/// A pass over the disk.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct PassLine {
    /// `scrub` or `verify`.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// The first sector that was not read.
    pub sector: u64,
    /// Sectors of the disk.
    pub sectors: u64,
    /// Sectors that were not alike, in any way.
    pub bad_sectors: u64,
    /// What it met, for people.
    #[serde(skip)]
    counts: ScrubCounts,
}

impl DiskStatus {
    /// What is known, with names; `threshold` is T.
    #[must_use]
    pub fn new(facts: &DiskFacts, names: &Names, threshold: usize) -> Self {
        let status = &facts.keeper;
        let copies = facts.record.iter().zip(0..);
        let copy = |(standing, copy): (&CopyStanding, u8)| CopyLine {
            path: names.record_copy(copy).display().to_string(),
            state: match standing {
                CopyStanding::Good => "in-use",
                CopyStanding::Joining => "returning",
                CopyStanding::Out => "left-out",
            },
        };
        let in_sync = |state| state == ReplicaState::InSync;
        let count = status.replicas.iter().filter(|r| in_sync(r.state)).count();
        let line = |replica: &crate::quorum::ReplicaStatus| ReplicaLine {
            name: names.replica(replica.replica).to_owned(),
            state: state_name(replica.state),
            lagging: replica.lagging,
            suspect: replica.suspect,
            behind_extents: replica.behind_extents,
            behind_bytes: replica.behind_bytes,
            resynced_bytes: replica.resynced_bytes,
        };
        Self {
            health: if count == status.replicas.len() {
                "healthy"
            } else if count >= threshold {
                "degraded"
            } else {
                "lost"
            },
            replicas: status.replicas.iter().map(line).collect(),
            dirty_extents: status.dirty_extents,
            unresolved_extents: status.unresolved_extents,
            unresolved_sectors: status.unresolved_sectors,
            record: copies.map(copy).collect(),
            pass: status.pass.map(PassLine::new),
        }
    }

    /// The status as one JSON object.
    #[must_use]
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("a status is texts and numbers")
    }
}

impl PassLine {
    fn new(pass: PassStatus) -> Self {
        let counts = pass.counts;
        Self {
            kind: pass_name(pass.kind),
            sector: pass.sector,
            sectors: pass.sectors,
            bad_sectors: counts.differing + counts.unreadable + counts.unresolved + counts.failed,
            counts,
        }
    }
}

impl fmt::Display for DiskStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "the disk is {}", self.health)?;
        let width = self.replicas.iter().map(|replica| replica.name.len()).max();
        let width = width.unwrap_or(0);
        for replica in &self.replicas {
            write!(f, "  {:<width$}  {}", replica.name, replica.state)?;
            if replica.lagging {
                write!(f, ", lagging")?;
            }
            if replica.suspect {
                write!(f, ", suspect")?;
            }
            if replica.behind_extents > 0 {
                write!(
                    f,
                    ", behind in {} extents: {} to go, {} done",
                    replica.behind_extents,
                    size(replica.behind_bytes),
                    size(replica.resynced_bytes)
                )?;
            }
            writeln!(f)?;
        }
        write!(
            f,
            "extents: {} dirty, {} to be settled, and {} single sectors",
            self.dirty_extents, self.unresolved_extents, self.unresolved_sectors
        )?;
        for copy in &self.record {
            let state = copy.state.replace('-', " ");
            write!(f, "\nstate record {}: {state}", copy.path)?;
        }
        if let Some(pass) = &self.pass {
            let percent = u128::from(pass.sector) * 100 / u128::from(pass.sectors.max(1));
            write!(
                f,
                "\n{}: at sector {} of {} ({percent} %); {}",
                pass.kind,
                pass.sector,
                pass.sectors,
                counts_text(&pass.counts)
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quorum::{PassKind, ReplicaStatus};
    use crate::units::ReplicaId;

    fn names() -> Names {
        Names {
            disk: "disk".to_owned(),
            replicas: vec!["one".to_owned(), "two".to_owned(), "three".to_owned()],
            record_copies: ["/1.qrec", "/2.qrec", "/3.qrec"].map(Into::into).to_vec(),
            disk_sectors: 1000,
        }
    }

    fn status(states: [ReplicaState; 3]) -> DiskFacts {
        let replica = |(index, state): (usize, ReplicaState)| ReplicaStatus {
            replica: ReplicaId::new(index),
            state,
            lagging: index == 1,
            suspect: false,
            behind_extents: 0,
            behind_bytes: 0,
            resynced_bytes: 0,
            reopens_at: None,
        };
        DiskFacts {
            keeper: KeeperStatus {
                replicas: states.into_iter().enumerate().map(replica).collect(),
                dirty_extents: 3,
                unresolved_extents: 0,
                unresolved_sectors: 0,
                pass: None,
            },
            record: vec![CopyStanding::Good, CopyStanding::Joining, CopyStanding::Out],
        }
    }

    #[test]
    fn health_follows_from_the_states() {
        use ReplicaState::{InSync, Missing, Syncing};
        let cases = [
            ([InSync, InSync, InSync], "healthy"),
            ([InSync, InSync, Missing], "degraded"),
            ([InSync, Syncing, Missing], "lost"),
        ];
        for (states, health) in cases {
            assert_eq!(DiskStatus::new(&status(states), &names(), 2).health, health);
        }
    }

    #[test]
    fn status_tells_what_is_left_to_do() {
        use ReplicaState::{InSync, Syncing};
        let mut status = status([InSync, InSync, Syncing]);
        status.keeper.replicas[2].behind_extents = 2;
        status.keeper.replicas[2].behind_bytes = 2 << 20;
        status.keeper.pass = Some(PassStatus {
            kind: PassKind::Scrub,
            sector: 250,
            sectors: 1000,
            counts: ScrubCounts::default(),
        });
        let status = DiskStatus::new(&status, &names(), 2);
        let text = status.to_string();
        let lines = [
            "the disk is degraded",
            "  two    in-sync, lagging",
            "  three  syncing, behind in 2 extents: 2 MiB to go, 0 bytes done",
            "extents: 3 dirty",
            "state record /1.qrec: in use",
            "state record /2.qrec: returning",
            "state record /3.qrec: left out",
            "scrub: at sector 250 of 1000 (25 %)",
        ];
        for line in lines {
            assert!(text.contains(line), "no {line:?} in {text}");
        }
        let json: serde_json::Value = serde_json::from_str(&status.to_json()).unwrap();
        assert_eq!(json["replicas"][2]["behind-bytes"], 2 << 20);
        assert_eq!(json["pass"]["type"], "scrub");
        assert_eq!(json["record"][2]["state"], "left-out");
    }
}
