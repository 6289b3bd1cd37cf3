// SPDX-License-Identifier: Apache-2.0
//! The line of `quorum-blk record ...`.

use std::path::PathBuf;

use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::{Args, Subcommand};

use super::UsageError;
use crate::config::{
    self, BlockSize, Cache, Config, ReadPatternName, RecordConfig, ReplicaArgument, Settings,
};

pub(super) const SHOW_EXAMPLES: &str = "\
Examples:
  What the disk of a configuration file remembers, and what a start would do:
    quorum-blk record show --config disk.toml

  The same for a disk that was served with flags:
    quorum-blk record show --replica a.img --replica b.img --replica c.img

  What single copies hold, whatever they belong to:
    quorum-blk record show a.img.qrec b.img.qrec

A daemon may serve the disk meanwhile; the record is then shown as it is at this moment.

Exit status: 0  shown    1  the record cannot be opened    2  wrong usage";

pub(super) const CREATE_EXAMPLES: &str = "\
Examples:
  Three images just made by truncate, all zero, need no comparison:
    quorum-blk record create --assume-clean \\
        --replica a.img --replica b.img --replica c.img

  a.img has a system on it; the others become copies of it when the disk is served:
    quorum-blk record create --adopt-from a \\
        --replica a.img,name=a --replica b.img,name=b --replica c.img,name=c

`serve` makes the record by itself when there is none; this command is for doing it beforehand.";

/// What is to be done with a state record.
#[derive(Debug)]
pub enum RecordCommand {
    /// Print it.
    Show {
        /// Which one.
        target: RecordTarget,
        /// As JSON.
        json: bool,
    },
    /// Make one for plain images.
    Create(Box<Config>),
    /// Remove it.
    Forget {
        /// Of this disk.
        config: Box<Config>,
        /// The user knows what that means.
        yes: bool,
    },
}

/// Whose record.
#[derive(Debug)]
pub enum RecordTarget {
    /// What these files hold.
    Files(Vec<PathBuf>),
    /// That of a disk.
    Disk(Box<Config>),
}

#[derive(Debug, Subcommand)]
pub(super) enum RecordLine {
    /// Print who is in the disk, what each replica lacks, and what a start would do
    #[command(after_long_help = SHOW_EXAMPLES)]
    Show(ShowArgs),
    /// Make the state record of images that have none, without serving them
    #[command(after_long_help = CREATE_EXAMPLES)]
    Create(CreateArgs),
    /// Remove the state record: the disk forgets which replica missed what
    ///
    /// Dangerous: afterwards all replicas vote, also one with old data. Refused while a daemon
    /// serves the disk.
    Forget(ForgetArgs),
}

/// Which disk.
#[derive(Debug, Args)]
struct DiskArgs {
    /// Read the replicas and where the record is from this file, as `serve` does
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,

    /// A replica, as given to `serve`: the same ones in the same order
    #[arg(
        long,
        visible_alias = "blk-file",
        value_name = "PATH[,OPTION=VALUE]..."
    )]
    #[arg(value_parser = OsStringValueParser::new().try_map(|text| ReplicaArgument::parse(&text)))]
    replica: Vec<ReplicaArgument>,

    /// The folder of the record, if it was given to `serve`
    #[arg(long, value_name = "FOLDER")]
    record_dir: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(super) struct ShowArgs {
    /// Copies of a record
    #[arg(value_name = "FILE.qrec", conflicts_with_all = ["config", "replica", "record_dir"])]
    files: Vec<PathBuf>,

    #[command(flatten)]
    disk: DiskArgs,

    /// Print JSON for programs instead of tables for people
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(super) struct CreateArgs {
    #[command(flatten)]
    disk: DiskArgs,

    /// Take the images for equal: they are not compared in the background
    #[arg(long, conflicts_with = "adopt_from")]
    assume_clean: bool,

    /// This replica is right; the others are overwritten with it
    #[arg(long, value_name = "NAME")]
    adopt_from: Option<String>,

    /// How replicas are opened to look at them [default: direct]
    #[arg(long, value_name = "HOW")]
    cache: Option<Cache>,

    /// How many equal sectors make a winner [default: floor(N/2)+1]
    #[arg(long, value_name = "T")]
    #[arg(value_parser = config::whole_number::<u8>)]
    threshold: Option<u8>,

    /// Accept a threshold of N/2 or less
    #[arg(long)]
    allow_minority_threshold: bool,

    /// Vote on reads, or take the first replica that answers [default: quorum]
    #[arg(long, value_name = "PATTERN")]
    read_pattern: Option<ReadPatternName>,

    /// Logical block size, 512 or 4096 [default: the largest of the replicas]
    #[arg(long, value_name = "BYTES")]
    block_size: Option<BlockSize>,
}

#[derive(Debug, Args)]
pub(super) struct ForgetArgs {
    #[command(flatten)]
    disk: DiskArgs,

    /// Really remove it
    #[arg(long)]
    yes: bool,
}

impl DiskArgs {
    /// The disk, with the other settings that the line gives.
    fn config(self, more: Settings) -> Result<Box<Config>, UsageError> {
        let flags = Settings {
            replica: self.replica,
            record_dir: self.record_dir,
            ..more
        };
        let settings = match &self.config {
            None => flags,
            Some(path) => flags.over(config::read_file(path)?),
        };
        let config = Config::without_front_end(settings)?;
        if config.record == RecordConfig::None {
            return Err(UsageError::NoRecord);
        }
        Ok(Box::new(config))
    }
}

impl RecordLine {
    pub(super) fn command(self) -> Result<RecordCommand, UsageError> {
        Ok(match self {
            Self::Show(ShowArgs { files, disk, json }) => {
                let target = if files.is_empty() {
                    RecordTarget::Disk(disk.config(Settings::default())?)
                } else {
                    RecordTarget::Files(files)
                };
                RecordCommand::Show { target, json }
            }
            Self::Create(create) => RecordCommand::Create(create.disk.config(Settings {
                assume_clean: create.assume_clean.then_some(true),
                adopt_from: create.adopt_from,
                cache: create.cache,
                threshold: create.threshold,
                allow_minority_threshold: create.allow_minority_threshold.then_some(true),
                read_pattern: create.read_pattern,
                block_size: create.block_size,
                ..Settings::default()
            })?),
            Self::Forget(ForgetArgs { disk, yes }) => RecordCommand::Forget {
                config: disk.config(Settings::default())?,
                yes,
            },
        })
    }
}
