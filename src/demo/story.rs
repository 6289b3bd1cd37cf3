// SPDX-License-Identifier: Apache-2.0
//! What the demonstration does, in order, and what must come of it.

use std::ffi::OsString;
use std::io::Write;
use std::time::{Duration, Instant};

use super::daemon::Daemon;
use super::load::{self, Kind, Tally};
use super::pattern::{Pattern, Random};
use super::replicas::Replicas;
use super::report::{Report, mebibytes, per_second, speed, time};
use super::{DemoError, DemoOptions};
use crate::front_end::{FrontEnd, Options};
use crate::units::{REPLICAS_MAX, SectorRange};

/// With fewer replicas a liar cannot be told from an honest one.
const REPLICAS_MIN: usize = 3;
/// Queues that are driven at the same time.
const QUEUES: u16 = 4;
/// Longest request of the first pass: 256 KiB.
const SECTORS_MAX: u32 = 512;
/// How long small random reads are measured.
const MEASURE: Duration = Duration::from_millis(500);
/// Sectors in a small read: 4 KiB.
const SMALL: u32 = 8;
/// Smallest disk: the places that are spoiled are a MiB apart.
const DISK_BYTES_MIN: u64 = 4 << 20;

/// One replica's damaged sectors.
type Damage = (usize, SectorRange);

/// Runs the demonstration and writes its report to `out`. Returns whether every byte was right,
/// every damage was found, told and repaired, and the daemon ended well.
///
/// # Errors
/// If it cannot be run at all, or the disk stops answering.
pub fn run(options: &DemoOptions, out: &mut impl Write) -> Result<bool, DemoError> {
    let disk_bytes = options.disk_bytes.max(DISK_BYTES_MIN) >> 20 << 20;
    let count = options.replicas.clamp(REPLICAS_MIN, REPLICAS_MAX);
    let mut folder = tempfile::Builder::new()
        .prefix("quorum-blk-demo-")
        .tempdir_in(&options.parent)
        .map_err(|source| DemoError::File {
            what: "create a folder in",
            path: options.parent.clone(),
            source,
        })?;
    folder.disable_cleanup(options.keep);
    let replicas = Replicas::create(folder.path(), count, disk_bytes)?;
    let cache = if replicas.direct() {
        "direct"
    } else {
        "buffered"
    };
    let mut daemon = Daemon::start(
        &options.program,
        folder.path(),
        &arguments(&replicas, cache),
    )?;
    let mut report = Report::new(out);
    report.heading(&format!(
        "One disk of {} on {count} replicas; {} must agree on every sector",
        mebibytes(disk_bytes),
        count / 2 + 1
    ))?;
    report.tell("folder", &folder.path().display().to_string())?;
    report.tell(
        "daemon",
        &format!(
            "process {}, replicas opened with cache={cache}",
            daemon.id()
        ),
    )?;
    let mut disk = daemon.connect(&Options {
        queues: QUEUES,
        ..Options::default()
    })?;
    let mut story = Story {
        pattern: Pattern::new(options.seed),
        random: Random::new(options.seed),
        sectors: disk.config()?.capacity_sectors,
        voted: 0,
        spoiled: 0,
    };
    let told = story.tell(&mut report, &mut disk, &replicas);
    if told.is_err() {
        report.tell("log", &daemon.said())?;
    }
    told?;
    let blamed = replicas.sectors_blamed()?;
    drop(disk);
    end(&mut report, daemon, &replicas, story.pattern)?;
    report.heading(&format!(
        "{} sectors voted on, {} spoiled, {blamed} blamed; {}",
        story.voted,
        story.spoiled,
        if report.right() {
            "every byte was right"
        } else {
            "NOT everything was right"
        }
    ))?;
    Ok(report.right())
}

fn arguments(replicas: &Replicas, cache: &str) -> Vec<OsString> {
    let mut arguments: Vec<OsString> = Vec::new();
    for path in replicas.paths() {
        arguments.extend(["--replica".into(), path.into()]);
    }
    arguments.extend(["--events".into(), replicas.events().into()]);
    arguments.extend(["--cache".into(), cache.into()]);
    arguments.extend(["--num-queues".into(), QUEUES.to_string().into()]);
    arguments
}

/// The part that needs the disk.
struct Story {
    pattern: Pattern,
    random: Random,
    sectors: u64,
    voted: u64,
    spoiled: u64,
}

impl Story {
    fn tell(
        &mut self,
        report: &mut Report<'_, impl Write>,
        disk: &mut FrontEnd,
        replicas: &Replicas,
    ) -> Result<(), DemoError> {
        report.heading("Healthy: write everything, read everything back, on 4 queues")?;
        self.pass(report, disk, Kind::Write)?;
        let begun = Instant::now();
        let flushed = disk.queue(0).flush().is_ok();
        let text = format!("made durable on every replica in {}", time(begun.elapsed()));
        report.check("flush", &text, flushed)?;
        self.pass(report, disk, Kind::Read)?;
        self.measure(report, disk)?;

        report.heading("8 sectors of replica1 are overwritten with garbage")?;
        let start = self.sectors / 2;
        self.damage(report, disk, replicas, start, &[(1, range(start + 24, 8))])?;

        report
            .heading("Different sectors of replica0 and replica2: no two whole replicas agree")?;
        let start = self.sectors / 4;
        let damage = [(0, range(start + 8, 16)), (2, range(start + 40, 24))];
        self.damage(report, disk, replicas, start, &damage)
    }

    /// Writes or reads all sectors, in requests of all sizes.
    fn pass(
        &mut self,
        report: &mut Report<'_, impl Write>,
        disk: &mut FrontEnd,
        kind: Kind,
    ) -> Result<(), DemoError> {
        let share = self.sectors / u64::from(QUEUES);
        let work = (0..u64::from(QUEUES))
            .map(|queue| {
                let end = if queue + 1 == u64::from(QUEUES) {
                    self.sectors
                } else {
                    (queue + 1) * share
                };
                load::cover(queue * share, end, SECTORS_MAX, &mut self.random)
            })
            .collect();
        let tally = load::run(disk.queues(), work, kind, self.pattern, None)?;
        let label = match kind {
            Kind::Write => "write",
            Kind::Read => "read",
        };
        if kind == Kind::Read {
            self.voted += tally.sectors;
        }
        let text = format!(
            "{} in {} requests of 512 B to 256 KiB, {}",
            mebibytes(tally.bytes()),
            tally.requests,
            speed(tally.bytes(), tally.elapsed)
        );
        report.check(label, &text, all_right(&tally, self.sectors))
    }

    /// Small random reads for a while.
    fn measure(
        &mut self,
        report: &mut Report<'_, impl Write>,
        disk: &mut FrontEnd,
    ) -> Result<(), DemoError> {
        let blocks = self.sectors / u64::from(SMALL);
        let mut list = || {
            (0..1 << 17)
                .map(|_| range(self.random.below(blocks) * u64::from(SMALL), SMALL))
                .collect()
        };
        let work = (0..QUEUES).map(|_| list()).collect();
        let tally = load::run(disk.queues(), work, Kind::Read, self.pattern, Some(MEASURE))?;
        self.voted += tally.sectors;
        let text = format!(
            "{} random reads of 4 KiB, {} a second, all verified",
            tally.requests,
            per_second(tally.requests, tally.elapsed)
        );
        report.check("read", &text, tally.wrong == 0 && tally.requests > 0)
    }

    /// Spoils sectors behind the daemon's back, reads 64 sectors from `start` on in one request,
    /// and looks at what became of it.
    fn damage(
        &mut self,
        report: &mut Report<'_, impl Write>,
        disk: &mut FrontEnd,
        replicas: &Replicas,
        start: u64,
        damage: &[Damage],
    ) -> Result<(), DemoError> {
        for &(replica, range) in damage {
            replicas.spoil(replica, range)?;
            self.spoiled += u64::from(range.count());
            report.tell("spoil", &format!("replica{replica}: {}", sectors_of(range)))?;
        }
        let whole = range(start, 64);
        let mut bytes = vec![0; whole.len_bytes()];
        let begun = Instant::now();
        let read = disk.queue(0).read(whole.start(), &mut bytes);
        let elapsed = begun.elapsed();
        self.voted += u64::from(whole.count());
        let right = read.is_ok() && self.pattern.first_wrong(whole, &bytes).is_none();
        let text = format!("{} in one request, {}", sectors_of(whole), time(elapsed));
        report.check("read", &text, right)?;
        for &(replica, range) in damage {
            if replicas.was_late(replica)? {
                report.tell("late", &late(replica))?;
                continue;
            }
            let votes = replicas.paths().len() - 1;
            let text = format!(
                "replica{replica} outvoted {votes} to 1 in exactly {}",
                sectors_of(range)
            );
            report.check("blame", &text, replicas.blamed(replica, range)?)?;
            let text = format!("replica{replica} has the right bytes in its file again");
            let repaired = replicas.repaired(replica, range, self.pattern)?;
            report.check("repair", &text, repaired)?;
        }
        Ok(())
    }
}

/// How long a replica that was late is given to catch up.
const CATCH_UP: Duration = Duration::from_secs(5);

/// Ends the daemon and looks at what it leaves behind.
fn end(
    report: &mut Report<'_, impl Write>,
    daemon: Daemon,
    replicas: &Replicas,
    pattern: Pattern,
) -> Result<(), DemoError> {
    report.heading("The end")?;
    let all: Vec<usize> = (0..replicas.paths().len()).collect();
    for &replica in &all {
        if replicas.was_late(replica)? {
            report.tell("late", &late(replica))?;
        }
    }
    // What a late replica missed is copied to it in the background.
    let begun = Instant::now();
    while !replicas.identical(&all)? && begun.elapsed() < CATCH_UP {
        std::thread::sleep(Duration::from_millis(100));
    }
    let begun = Instant::now();
    let (status, removed) = daemon.stop()?;
    let text = format!(
        "SIGTERM, {status} after {}, socket {}",
        time(begun.elapsed()),
        if removed { "removed" } else { "left behind" }
    );
    report.check("stop", &text, status.success() && removed)?;
    report.check(
        "compare",
        &format!("{} files are the same, byte by byte", all.len()),
        replicas.identical(&all)?,
    )?;
    let wrong = replicas.first_wrong(&all, pattern)?;
    let text = wrong.map_or_else(
        || "and they hold what was written".to_owned(),
        |(replica, sector)| format!("replica{replica} holds something else in sector {sector}"),
    );
    report.check("compare", &text, wrong.is_none())
}

/// What is said of a replica whose disk was busy with something else: no reason to wait for it.
fn late(replica: usize) -> String {
    format!("replica{replica} was too slow once; what it missed is copied to it afterwards")
}

fn all_right(tally: &Tally, sectors: u64) -> bool {
    tally.wrong == 0 && tally.sectors == sectors
}

fn range(start: u64, count: u32) -> SectorRange {
    SectorRange::new(start, count).expect("places on a disk that was just made")
}

fn sectors_of(range: SectorRange) -> String {
    format!("sectors {} to {}", range.start(), range.end() - 1)
}
