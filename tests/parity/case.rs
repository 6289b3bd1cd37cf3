// SPDX-License-Identifier: Apache-2.0
//! One comparison: what is set up, what is done, what came of it on either side.

use std::path::Path;
use std::time::{Duration, Instant};

use quorum_blk::front_end::{FrontEnd, FrontEndError, Options, Request, Segment, Status};

use crate::differences::listed;
use crate::image::{Image, Kind, SECTOR_BYTES, SECTORS, describe, sector_content};
use crate::server::{Server, Side};

/// How long the images must be left alone before they are looked at: rewriting goes on after the
/// reply on both sides.
const SETTLE: Duration = Duration::from_millis(300);

/// What the servers are told.
#[derive(Clone, Debug)]
pub struct Setup {
    /// Equal votes that win.
    pub threshold: usize,
    /// Whether dissenters are rewritten.
    pub repair: bool,
    /// Whether the first replica is asked alone.
    pub fifo: bool,
    /// Whether a threshold of half the replicas or less is allowed.
    pub minority: bool,
    /// Whether the first difference stops the server.
    pub blkverify: bool,
    /// Whether the guest may not write.
    pub read_only: bool,
    kinds: Vec<Kind>,
    longer: Option<usize>,
}

/// What is done, in order. Versions are those of [`sector_content`].
#[derive(Clone, Copy, Debug)]
pub enum Step {
    Read {
        sector: u64,
        count: u32,
    },
    Write {
        sector: u64,
        count: u32,
        version: u8,
    },
    Flush,
    WriteZeroes {
        sector: u64,
        count: u32,
        unmap: bool,
    },
    WriteZeroesFlags {
        sector: u64,
        count: u32,
        flags: u32,
    },
    Discard {
        sector: u64,
        count: u32,
    },
    DiscardFlags {
        sector: u64,
        count: u32,
        flags: u32,
    },
    GetId,
    /// A request of a type that nobody knows.
    Raw {
        kind: u32,
    },
    /// Overwrite sectors of one image behind the server's back.
    Spoil {
        replica: usize,
        sector: u64,
        count: u32,
        version: u8,
    },
    /// Cut one image to this length behind the server's back.
    Truncate {
        replica: usize,
        sectors: u64,
    },
    /// Wait for rewriting to end.
    Settle,
}

/// A place at which the sides can differ, and what was found there, in words.
type Finding = (String, String);

/// A comparison to be made.
#[derive(Clone, Debug)]
pub struct Case {
    name: &'static str,
    setup: Setup,
    steps: Vec<Step>,
}

impl Case {
    /// A case of this name with `replicas` equal images.
    pub fn new(name: &'static str, replicas: usize, threshold: usize) -> Self {
        Self {
            name,
            setup: Setup {
                threshold,
                repair: true,
                fifo: false,
                minority: false,
                blkverify: false,
                read_only: false,
                kinds: vec![Kind::File; replicas],
                longer: None,
            },
            steps: Vec::new(),
        }
    }

    /// Sets whether dissenters are rewritten.
    pub fn repair(mut self, repair: bool) -> Self {
        self.setup.repair = repair;
        self
    }

    /// Reads from the first replica alone.
    pub fn fifo(mut self) -> Self {
        self.setup.fifo = true;
        self
    }

    /// Allows a threshold of half the replicas or less.
    pub fn minority(mut self) -> Self {
        self.setup.minority = true;
        self
    }

    /// Stops at the first difference.
    pub fn blkverify(mut self) -> Self {
        self.setup.blkverify = true;
        self.setup.repair = false;
        self
    }

    /// Takes no writes.
    pub fn read_only(mut self) -> Self {
        self.setup.read_only = true;
        self
    }

    /// Puts one image on other storage.
    pub fn kind(mut self, replica: usize, kind: Kind) -> Self {
        self.setup.kinds[replica] = kind;
        self
    }

    /// Makes one image 1 MiB longer than the others.
    pub fn longer(mut self, replica: usize) -> Self {
        self.setup.longer = Some(replica);
        self
    }

    /// Adds a step.
    pub fn step(mut self, step: Step) -> Self {
        self.steps.push(step);
        self
    }

    /// Adds a wait for rewriting to end.
    pub fn settled(self) -> Self {
        self.step(Step::Settle)
    }

    /// Runs both sides and fails on a difference that is not listed, or a listed one that is no
    /// longer there.
    pub fn check(&self) {
        let ours = self.run(Side::Ours);
        let peer = self.run(Side::Peer);
        let mut places: Vec<&String> = ours.iter().chain(&peer).map(|(place, _)| place).collect();
        places.sort();
        places.dedup();
        let find = |findings: &[Finding], place: &String| {
            let found = findings.iter().find(|(other, _)| other == place);
            found.map_or_else(|| "nothing".to_owned(), |(_, what)| what.clone())
        };
        let mut problems = Vec::new();
        let mut seen = Vec::new();
        for place in places {
            let (our, their) = (find(&ours, place), find(&peer, place));
            if our == their {
                continue;
            }
            match listed(self.name, place) {
                Some(entry) if entry.ours == our && entry.peer == their => {
                    println!(
                        "{}: {place}: ours {our}; peer {their}: {}",
                        self.name, entry.reason
                    );
                    seen.push(place.clone());
                }
                _ => problems.push(format!("{place}:\n    ours: {our}\n    peer: {their}")),
            }
        }
        for entry in crate::differences::of_case(self.name) {
            if !seen.iter().any(|place| place == entry.place) {
                problems.push(format!(
                    "{}: listed as a difference, but is none",
                    entry.place
                ));
            }
        }
        assert!(
            problems.is_empty(),
            "case `{}` differs where it must not:\n  {}",
            self.name,
            problems.join("\n  ")
        );
    }

    /// Runs one side and returns everything that was found.
    fn run(&self, side: Side) -> Vec<Finding> {
        let folder = tempfile::Builder::new()
            .prefix("parity-")
            // Not in /tmp, which may be a tmpfs; not in cargo's folder: socket paths are short.
            .tempdir_in("/var/tmp")
            .expect("/var/tmp can be written");
        let images = self.images(folder.path());
        let mut findings = Vec::new();
        match Server::start(side, folder.path(), &self.setup, &images) {
            Ok(server) => self.run_steps(server, &images, &mut findings),
            Err(log) => {
                println!("{}: {side:?} did not start: {}", self.name, log.trim());
                findings.push(("start".to_owned(), "refused".to_owned()));
            }
        }
        for (index, image) in images.iter().enumerate() {
            let content = describe(0, &image.content());
            findings.push((format!("replica {index} afterwards"), content));
        }
        findings
    }

    fn images(&self, folder: &Path) -> Vec<Image> {
        let make = |(index, &kind): (usize, &Kind)| {
            let extra = if self.setup.longer == Some(index) {
                SECTORS
            } else {
                0
            };
            Image::new(folder, index, kind, SECTORS + extra)
        };
        self.setup.kinds.iter().enumerate().map(make).collect()
    }

    fn run_steps(&self, mut server: Server, images: &[Image], findings: &mut Vec<Finding>) {
        let mut front_end = match connect(server.socket()) {
            Ok(front_end) => front_end,
            Err(error) => {
                findings.push(("connection".to_owned(), error.to_string()));
                return;
            }
        };
        for (number, step) in self.steps.iter().enumerate() {
            if let Some(mut found) = run_step(step, &mut front_end, images) {
                // A verifier that met a difference ends; whether its client sees an I/O error
                // before the connection closes is a matter of microseconds.
                if self.setup.blkverify && (found == "IoError" || found.starts_with("no answer")) {
                    "no data".clone_into(&mut found);
                }
                findings.push((format!("step {number}"), found));
            }
        }
        // A server that stops by itself does so a moment after it closed the connection.
        let patience = if self.setup.blkverify { 1000 } else { 50 };
        let begin = Instant::now();
        while server.exit_status().is_none() && begin.elapsed() < Duration::from_millis(patience) {
            std::thread::sleep(Duration::from_millis(5));
        }
        match server.exit_status() {
            Some(status) => {
                let end = if status.success() { "ended" } else { "failed" };
                findings.push(("server".to_owned(), end.to_owned()));
            }
            None => {
                drop(front_end);
                server.stop();
            }
        }
    }
}

/// Does one step; for a request, returns how it ended and what it read.
fn run_step(step: &Step, front_end: &mut FrontEnd, images: &[Image]) -> Option<String> {
    let data;
    let segments;
    let one_segment = |sector, sectors, flags| {
        [Segment {
            sector,
            sectors,
            flags,
        }]
    };
    let request = match *step {
        Step::Spoil {
            replica,
            sector,
            count,
            version,
        } => {
            images[replica].spoil(sector, count, version);
            return None;
        }
        Step::Truncate { replica, sectors } => {
            images[replica].truncate(sectors);
            return None;
        }
        Step::Settle => {
            std::thread::sleep(SETTLE);
            return None;
        }
        Step::Read { sector, count } => Request::Read {
            sector,
            len: count as usize * SECTOR_BYTES,
        },
        Step::Write {
            sector,
            count,
            version,
        } => {
            let sectors = sector..sector + u64::from(count);
            data = sectors
                .flat_map(|sector| sector_content(sector, version))
                .collect::<Vec<u8>>();
            Request::Write {
                sector,
                data: &data,
            }
        }
        Step::Flush => Request::Flush,
        Step::WriteZeroes {
            sector,
            count,
            unmap,
        } => {
            segments = one_segment(sector, count, u32::from(unmap));
            Request::WriteZeroes(&segments)
        }
        Step::WriteZeroesFlags {
            sector,
            count,
            flags,
        } => {
            segments = one_segment(sector, count, flags);
            Request::WriteZeroes(&segments)
        }
        Step::Discard { sector, count } => {
            segments = one_segment(sector, count, 0);
            Request::Discard(&segments)
        }
        Step::DiscardFlags {
            sector,
            count,
            flags,
        } => {
            segments = one_segment(sector, count, flags);
            Request::Discard(&segments)
        }
        Step::GetId => Request::GetId,
        Step::Raw { kind } => Request::Raw {
            kind,
            sector: 0,
            out: &[],
            in_len: SECTOR_BYTES,
        },
    };
    let completion = match front_end.queue(0).run(&request) {
        Ok(completion) => completion,
        Err(error) => return Some(format!("no answer: {error}")),
    };
    let found = match (step, completion.status) {
        (Step::Read { sector, .. }, Status::Ok) => describe(*sector, &completion.data),
        (Step::GetId, Status::Ok) => {
            // QEMU 10.0 leaves what stood in the buffer behind the terminating NUL.
            let text = completion.data.split(|&byte| byte == 0).next();
            String::from_utf8_lossy(text.unwrap_or_default()).into_owned()
        }
        (_, status) => format!("{status:?}"),
    };
    Some(found)
}

/// Connects to a server whose socket is there. Between the moments at which it has a name and at
/// which somebody listens, connections are refused.
fn connect(socket: &Path) -> Result<FrontEnd, FrontEndError> {
    let begin = Instant::now();
    loop {
        match FrontEnd::connect(socket, &Options::default()) {
            Err(FrontEndError::Connect { .. }) if begin.elapsed() < Duration::from_secs(2) => {
                std::thread::sleep(Duration::from_millis(5));
            }
            result => return result,
        }
    }
}
