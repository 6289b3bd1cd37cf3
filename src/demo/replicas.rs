// SPDX-License-Identifier: Apache-2.0
//! The replica files behind the daemon's back, and the events it writes about them.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::Deserialize;

use super::DemoError;
use super::pattern::Pattern;
use crate::units::{SECTOR_BYTES, SectorRange};

/// How long an event or a repair may take: events of one replica are a second apart at least.
const PATIENCE: Duration = Duration::from_secs(3);

/// How often to look.
const INTERVAL: Duration = Duration::from_millis(2);

/// Bytes compared at a time.
const CHUNK: usize = 1 << 20;

/// The files, in the order the daemon is told of them, and thus `replica0`, `replica1`, ...
pub(super) struct Replicas {
    paths: Vec<PathBuf>,
    events: PathBuf,
}

/// One line of the events file, as far as it matters here.
#[derive(Deserialize)]
struct Event {
    event: String,
    data: Data,
}

/// The data of QUORUM_REPORT_BAD and QUORUM_BLK_REPLICA_BEHIND; other events lack some of it.
#[derive(Deserialize, Default)]
#[serde(rename_all = "kebab-case", default)]
struct Data {
    replica: String,
    cause: String,
    node_name: String,
    sector_num: u64,
    sectors_count: u64,
}

impl Replicas {
    /// Makes `count` files of `bytes` zero bytes in `folder`.
    pub(super) fn create(folder: &Path, count: usize, bytes: u64) -> Result<Self, DemoError> {
        let paths: Vec<PathBuf> = (0..count)
            .map(|index| folder.join(format!("replica{index}.img")))
            .collect();
        for path in &paths {
            File::create(path)
                .and_then(|file| file.set_len(bytes))
                .map_err(failed("create", path))?;
        }
        Ok(Self {
            paths,
            events: folder.join("events.jsonl"),
        })
    }

    /// The files.
    pub(super) fn paths(&self) -> &[PathBuf] {
        &self.paths
    }

    /// Where the daemon writes events.
    pub(super) fn events(&self) -> &Path {
        &self.events
    }

    /// Whether the file system can bypass the page cache, as the daemon does unless told
    /// otherwise.
    pub(super) fn direct(&self) -> bool {
        let mut options = OpenOptions::new();
        options.read(true).custom_flags(libc::O_DIRECT);
        self.paths.iter().all(|path| options.open(path).is_ok())
    }

    /// Inverts every byte of `range` in one file.
    pub(super) fn spoil(&self, replica: usize, range: SectorRange) -> Result<(), DemoError> {
        let path = &self.paths[replica];
        let spoil = || {
            let file = OpenOptions::new().read(true).write(true).open(path)?;
            let mut bytes = vec![0; range.len_bytes()];
            file.read_exact_at(&mut bytes, range.offset_bytes())?;
            for byte in &mut bytes {
                *byte = !*byte;
            }
            file.write_all_at(&bytes, range.offset_bytes())?;
            file.sync_data()
        };
        spoil().map_err(failed("spoil", path))
    }

    /// Whether the file holds the right bytes in `range`, now or soon.
    pub(super) fn repaired(
        &self,
        replica: usize,
        range: SectorRange,
        pattern: Pattern,
    ) -> Result<bool, DemoError> {
        let path = &self.paths[replica];
        let file = File::open(path).map_err(failed("open", path))?;
        let mut bytes = vec![0; range.len_bytes()];
        soon(|| {
            file.read_exact_at(&mut bytes, range.offset_bytes())
                .map_err(failed("read", path))?;
            Ok(pattern.first_wrong(range, &bytes).is_none())
        })
    }

    /// Whether an event blames exactly `range` of this replica, now or soon.
    pub(super) fn blamed(&self, replica: usize, range: SectorRange) -> Result<bool, DemoError> {
        let name = format!("replica{replica}");
        soon(|| {
            let blames = |blame: &Data| {
                blame.node_name == name
                    && blame.sector_num == range.start()
                    && blame.sectors_count == u64::from(range.count())
            };
            Ok(self.told("QUORUM_REPORT_BAD")?.iter().any(blames))
        })
    }

    /// Sectors in all events that blame a replica.
    pub(super) fn sectors_blamed(&self) -> Result<u64, DemoError> {
        let blames = self.told("QUORUM_REPORT_BAD")?;
        Ok(blames.iter().map(|blame| blame.sectors_count).sum())
    }

    /// Whether this replica was once so much slower than the others that it was left behind
    /// (rule W6). It does not vote there any more, and its file lacks what was written.
    pub(super) fn was_late(&self, replica: usize) -> Result<bool, DemoError> {
        let name = format!("replica{replica}");
        let behind = self.told("QUORUM_BLK_REPLICA_BEHIND")?;
        Ok(behind
            .iter()
            .any(|data| data.replica == name && data.cause == "late"))
    }

    /// The data of all events of this name so far.
    fn told(&self, name: &str) -> Result<Vec<Data>, DemoError> {
        let text = match std::fs::read_to_string(&self.events) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(failed("read", &self.events)(error)),
        };
        // The last line may be half written; it is whole the next time.
        let events = text
            .lines()
            .filter_map(|line| serde_json::from_str(line).ok());
        let named = events.filter(|event: &Event| event.event == name);
        Ok(named.map(|event| event.data).collect())
    }

    /// The first sector in which one of these files is not what it must be, with the file.
    pub(super) fn first_wrong(
        &self,
        among: &[usize],
        pattern: Pattern,
    ) -> Result<Option<(usize, u64)>, DemoError> {
        for &replica in among {
            let path = &self.paths[replica];
            let mut file = File::open(path).map_err(failed("open", path))?;
            let mut bytes = Vec::with_capacity(CHUNK);
            let mut sector = 0;
            loop {
                bytes.clear();
                let chunk = u64::try_from(CHUNK).expect("a small number");
                let mut part = file.by_ref().take(chunk);
                part.read_to_end(&mut bytes).map_err(failed("read", path))?;
                let Ok(sectors) = u32::try_from(bytes.len() as u64 / SECTOR_BYTES) else {
                    break;
                };
                let Some(range) = SectorRange::new(sector, sectors) else {
                    break;
                };
                if let Some(wrong) = pattern.first_wrong(range, &bytes) {
                    return Ok(Some((replica, wrong)));
                }
                sector = range.end();
            }
        }
        Ok(None)
    }

    /// Whether these files have the same bytes.
    pub(super) fn identical(&self, among: &[usize]) -> Result<bool, DemoError> {
        let mut files = Vec::new();
        for &replica in among {
            let path = &self.paths[replica];
            files.push((File::open(path).map_err(failed("open", path))?, path));
        }
        let Some(((first_file, first_path), others)) = files.split_first_mut() else {
            return Ok(true);
        };
        let mut first = vec![0; CHUNK];
        let mut other = vec![0; CHUNK];
        loop {
            let len = fill(first_file, &mut first).map_err(failed("read", first_path))?;
            for (file, path) in &mut *others {
                let other_len = fill(file, &mut other).map_err(failed("read", path))?;
                if first[..len] != other[..other_len] {
                    return Ok(false);
                }
            }
            if len == 0 {
                return Ok(true);
            }
        }
    }
}

/// Reads until `bytes` is full or the file ends.
fn fill(file: &mut File, bytes: &mut [u8]) -> io::Result<usize> {
    let mut len = 0;
    while len < bytes.len() {
        match file.read(&mut bytes[len..]) {
            Ok(0) => break,
            Ok(more) => len += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(len)
}

/// Whether `condition` becomes true in time.
fn soon(mut condition: impl FnMut() -> Result<bool, DemoError>) -> Result<bool, DemoError> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if condition()? {
            return Ok(true);
        }
        if Instant::now() >= deadline {
            return Ok(false);
        }
        std::thread::sleep(INTERVAL);
    }
}

fn failed(what: &'static str, path: &Path) -> impl Fn(io::Error) -> DemoError {
    let path = path.to_owned();
    move |source| DemoError::File {
        what,
        path: path.clone(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spoiled_sectors_are_found_and_files_differ() {
        let folder = tempfile::tempdir().unwrap();
        let replicas = Replicas::create(folder.path(), 3, 1 << 20).unwrap();
        let pattern = Pattern::new(9);
        let all = SectorRange::new(0, 2048).unwrap();
        for path in replicas.paths() {
            std::fs::write(path, pattern.bytes(all)).unwrap();
        }
        let all = [0, 1, 2];
        assert!(replicas.identical(&all).unwrap());
        assert_eq!(replicas.first_wrong(&all, pattern).unwrap(), None);
        let spoiled = SectorRange::new(77, 2).unwrap();
        replicas.spoil(2, spoiled).unwrap();
        assert!(!replicas.identical(&all).unwrap());
        assert!(replicas.identical(&[0, 1]).unwrap());
        assert_eq!(replicas.first_wrong(&all, pattern).unwrap(), Some((2, 77)));
        assert_eq!(replicas.first_wrong(&[1], pattern).unwrap(), None);
        assert!(replicas.repaired(1, spoiled, pattern).unwrap());
    }

    #[test]
    fn blame_is_read_from_events_only() {
        let folder = tempfile::tempdir().unwrap();
        let replicas = Replicas::create(folder.path(), 3, 4096).unwrap();
        assert_eq!(replicas.sectors_blamed().unwrap(), 0);
        let events = concat!(
            r#"{"event":"QUORUM_REPORT_BAD","data":{"type":"read","node-name":"replica1","#,
            r#""sector-num":8,"sectors-count":2},"timestamp":{"seconds":1,"microseconds":2}}"#,
            "\n",
            r#"{"event":"QUORUM_FAILURE","data":{"reference":"disk","sector-num":8,"#,
            r#""sectors-count":2}}"#,
            "\n",
            r#"{"event":"QUORUM_BLK_REPLICA_BEHIND","data":{"reference":"disk","#,
            r#""replica":"replica2","cause":"late","sector-num":0,"sectors-count":8}}"#,
            "\n",
            r#"{"event":"QUORUM_REPO"#,
        );
        std::fs::write(replicas.events(), events).unwrap();
        assert!(replicas.blamed(1, SectorRange::new(8, 2).unwrap()).unwrap());
        assert_eq!(replicas.sectors_blamed().unwrap(), 2);
        assert!(replicas.was_late(2).unwrap());
        assert!(!replicas.was_late(1).unwrap());
    }
}
