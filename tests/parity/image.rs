// SPDX-License-Identifier: Apache-2.0
//! Replica images whose content can be recognised, on the kinds of storage the cases need.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Bytes in a sector.
pub const SECTOR_BYTES: usize = 512;

/// Sectors of every disk here: 1 MiB.
pub const SECTORS: u64 = 2048;

/// Versions that are looked for when content is described; 0 is what images begin with.
const VERSIONS: u8 = 10;

/// What an image lies on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// A file.
    File,
    /// A loop device over a file; reads beyond the file's end fail with EIO.
    Loop,
    /// A sparse file on a full tmpfs: reads give zeroes, writes fail with ENOSPC. The image
    /// begins with zeroes, not with version 0.
    Full,
}

/// One replica's image. What was set up for it is taken away when it is dropped.
#[derive(Debug)]
pub struct Image {
    /// What a server opens.
    pub path: PathBuf,
    /// Whether it can be opened with O_DIRECT.
    pub direct: bool,
    backing: PathBuf,
    kind: Kind,
}

impl Image {
    /// Makes the image `replica<index>` of `sectors` sectors in `folder`.
    pub fn new(folder: &Path, index: usize, kind: Kind, sectors: u64) -> Self {
        let mut backing = folder.join(format!("replica{index}.img"));
        if kind == Kind::Full {
            let mount = folder.join(format!("full{index}"));
            fs::create_dir(&mount).expect("the folder can be written");
            privileged(
                &["mount", "-t", "tmpfs", "-o", "size=64k,mode=777", "tmpfs"],
                &mount,
            );
            backing = mount.join("image");
        }
        let file = File::create(&backing).expect("the image can be made");
        let mut path = backing.clone();
        match kind {
            Kind::File | Kind::Loop => {
                for sector in 0..sectors {
                    write_sector(&file, sector, 0);
                }
            }
            Kind::Full => {
                let bytes = sectors * SECTOR_BYTES as u64;
                file.set_len(bytes).expect("a sparse file needs no space");
                let filler = File::create(backing.with_file_name("filler")).expect("one inode");
                let page = [1; 4096];
                let mut offset = 0;
                while filler.write_all_at(&page, offset).is_ok() {
                    offset += 4096;
                }
            }
        }
        file.sync_all().expect("the image can be made durable");
        if kind == Kind::Loop {
            path = PathBuf::from(privileged(&["losetup", "--find", "--show"], &backing));
        }
        Self {
            path,
            direct: kind != Kind::Full,
            backing,
            kind,
        }
    }

    /// Overwrites sectors behind the server's back.
    pub fn spoil(&self, sector: u64, count: u32, version: u8) {
        let file = OpenOptions::new()
            .write(true)
            .open(&self.backing)
            .expect("the image is there");
        for sector in sector..sector + u64::from(count) {
            write_sector(&file, sector, version);
        }
        file.sync_all().expect("the image can be made durable");
    }

    /// Cuts the image short.
    pub fn truncate(&self, sectors: u64) {
        OpenOptions::new()
            .write(true)
            .open(&self.backing)
            .and_then(|file| file.set_len(sectors * SECTOR_BYTES as u64))
            .expect("the image can be cut");
    }

    /// Everything in it.
    pub fn content(&self) -> Vec<u8> {
        fs::read(&self.backing).expect("the image can be read")
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        match self.kind {
            Kind::File => {}
            Kind::Loop => {
                privileged(&["losetup", "--detach"], &self.path);
            }
            Kind::Full => {
                let mount = self.backing.parent().expect("the image lies in a folder");
                privileged(&["umount", "--lazy"], mount);
            }
        }
    }
}

/// What `sector` holds in a version: its number, then a byte that only this version has.
pub fn sector_content(sector: u64, version: u8) -> [u8; SECTOR_BYTES] {
    let mut content = [version + 1; SECTOR_BYTES];
    content[..8].copy_from_slice(&sector.to_le_bytes());
    content
}

/// Says in words which versions the sectors from `first` on hold: `0..8 version 0, 8 zeroes`.
pub fn describe(first: u64, content: &[u8]) -> String {
    let mut runs: Vec<(u64, u64, String)> = Vec::new();
    for (sector, bytes) in (first..).zip(content.chunks(SECTOR_BYTES)) {
        let name = recognise(sector, bytes);
        match runs.last_mut() {
            Some((_, end, last)) if *last == name => *end = sector + 1,
            _ => runs.push((sector, sector + 1, name)),
        }
    }
    let runs: Vec<String> = runs
        .iter()
        .map(|(start, end, name)| match end - start {
            1 => format!("{start} {name}"),
            _ => format!("{start}..{end} {name}"),
        })
        .collect();
    runs.join(", ")
}

fn recognise(sector: u64, bytes: &[u8]) -> String {
    if bytes.iter().all(|&byte| byte == 0) {
        return "zeroes".to_owned();
    }
    (0..VERSIONS)
        .find(|&version| bytes == sector_content(sector, version))
        .map_or_else(
            || "something else".to_owned(),
            |found| format!("version {found}"),
        )
}

fn write_sector(file: &File, sector: u64, version: u8) {
    file.write_all_at(
        &sector_content(sector, version),
        sector * SECTOR_BYTES as u64,
    )
    .expect("the image can be written");
}

/// Runs a command on `path` as root and returns what it prints.
fn privileged(command: &[&str], path: &Path) -> String {
    let (program, arguments) = command.split_first().expect("a command has a name");
    let run = |mut command: Command| {
        let output = command.args(arguments).arg(path).output();
        output.expect("the command can be run; scripts/install-test-deps installs it")
    };
    let mut output = run(Command::new(program));
    if !output.status.success() {
        let mut sudo = Command::new("sudo");
        sudo.args(["-n", program]);
        output = run(sudo);
    }
    assert!(
        output.status.success(),
        "{command:?} needs root: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}
