// SPDX-License-Identifier: Apache-2.0
//! The command line: what may be typed, what is explained, and how it becomes a [`Config`].
//!
//! Programs that manage virtual machines start back-ends by a convention of their own (QEMU,
//! docs/interop/vhost-user): options without a subcommand, and `--print-capabilities`, which
//! beats everything else on the line.

mod ctl;
mod record;

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;

use clap::{Args, CommandFactory, Parser, Subcommand};
use thiserror::Error;

use crate::config::{self, ByteSize, Config, ConfigError, FileError, Settings};
pub use ctl::{CtlArgs, CtlCommand};
use record::RecordLine;
pub use record::{RecordCommand, RecordTarget};

/// What `--print-capabilities` prints (the schema is QEMU's docs/interop/vhost-user.json).
pub const CAPABILITIES: &str = r#"{"type": "block", "features": ["read-only", "blk-file"]}"#;

/// Exit status of a command that did what it was asked.
pub const EXIT_OK: u8 = 0;
/// Exit status of a command that failed while it ran.
pub const EXIT_FAILURE: u8 = 1;
/// Exit status of a command that was asked for something impossible.
pub const EXIT_USAGE: u8 = 2;

const ABOUT: &str = "A disk for virtual machines, kept on several replicas that vote";

const LONG_ABOUT: &str = "\
A disk for virtual machines, kept on several replicas that vote.

quorum-blk serves one disk to QEMU, cloud-hypervisor or any other vhost-user front-end. Every
write goes to all replicas; every read compares them sector by sector and returns what at least
T of N agree on. A replica that lies, fails or lags is outvoted, reported and repaired while the
guest sees the right data.";

const TOP_EXAMPLES: &str = "\
Examples:
  See it work, with nothing but this program:
    quorum-blk demo

  Serve a disk that is kept on three files:
    quorum-blk serve --socket-path /run/disk.sock \\
        --replica a.img --replica b.img --replica c.img

The options of `serve` may also be given without the word `serve`, as programs that start
vhost-user back-ends do.";

const SERVE_EXAMPLES: &str = "\
Examples:
  Three replicas of 10 GiB, on three disks, two of which must agree:
    truncate -s 10G /mnt/1/disk.img /mnt/2/disk.img /mnt/3/disk.img
    quorum-blk serve --socket-path /run/disk.sock --serial disk-1 \\
        --replica /mnt/1/disk.img,name=one \\
        --replica /mnt/2/disk.img,name=two \\
        --replica /mnt/3/disk.img,name=three

  The same from a file; flags win over what it says:
    quorum-blk serve --config disk.toml --read-only

  An image with a system on it, and two new disks that become copies of it:
    quorum-blk serve --socket-path /run/disk.sock --adopt-from one \\
        --replica /mnt/1/disk.img,name=one \\
        --replica /dev/sdb,name=two --replica /dev/sdc,name=three

  QEMU (guest memory must be shared):
    qemu-system-x86_64 -machine q35,accel=kvm,memory-backend=mem -m 2G \\
        -object memory-backend-memfd,id=mem,size=2G,share=on \\
        -chardev socket,id=disk,path=/run/disk.sock,reconnect-ms=1000 \\
        -device vhost-user-blk-pci,chardev=disk ...

  cloud-hypervisor:
    cloud-hypervisor --memory size=2G,shared=on \\
        --disk vhost_user=true,socket=/run/disk.sock,num_queues=4,queue_size=256 ...

Signals:
  SIGTERM, SIGINT  finish what the guest has asked for, then exit with status 0
  SIGUSR1          write states, progress and counters to the log
  SIGUSR2          read all replicas and compare them now (a scrub)
  SIGHUP           open the file of --events again (after it was rotated)

Exit status:
  0  ended as asked    1  failed    2  asked for something impossible";

/// `quorum-blk`.
#[derive(Debug, Parser)]
#[command(name = "quorum-blk", version, about = ABOUT, long_about = LONG_ABOUT)]
#[command(after_help = TOP_EXAMPLES, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: CliCommand,
}

#[derive(Debug, Subcommand)]
enum CliCommand {
    /// Serve one disk to a virtual machine
    #[command(after_long_help = SERVE_EXAMPLES)]
    Serve(Box<ServeArgs>),
    /// Show in some seconds what voting does: serve three replicas, spoil them, check every byte
    Demo(DemoArgs),
    /// Ask a daemon how its disk is, make it longer, begin a scrub
    #[command(after_help = ctl::EXAMPLES)]
    Ctl(CtlArgs),
    /// Show, make or remove the state record: what a disk remembers of itself
    #[command(subcommand)]
    Record(RecordLine),
}

#[derive(Debug, Args)]
struct ServeArgs {
    /// Read settings from this TOML file; names are those of the flags, flags win
    ///
    /// Relative paths in the file are relative to its folder.
    #[arg(long, value_name = "FILE", help_heading = "Front-end")]
    config: Option<PathBuf>,

    /// Print what this back-end can do as JSON, for programs that manage virtual machines
    ///
    /// All other options are then ignored.
    #[arg(long, help_heading = "Front-end")]
    print_capabilities: bool,

    #[command(flatten)]
    settings: Settings,
}

/// The options of `quorum-blk demo`.
#[derive(Clone, PartialEq, Eq, Debug, Args)]
pub struct DemoArgs {
    /// Make the replicas in this folder instead of a temporary one
    #[arg(long, value_name = "FOLDER")]
    pub dir: Option<PathBuf>,

    /// Keep the replicas when the demonstration is over, and say where they are
    #[arg(long)]
    pub keep: bool,

    /// How many replicas vote; from three on one of them can lie
    #[arg(long, value_name = "N", default_value_t = 3)]
    #[arg(value_parser = clap::value_parser!(u8).range(3..=16))]
    pub replicas: u8,

    /// The size of the disk
    #[arg(long, value_name = "SIZE", default_value = "64M", value_parser = demo_size)]
    pub size: ByteSize,
}

/// The smallest disk that has room for what the demonstration shows.
const DEMO_SIZE_MIN: ByteSize = ByteSize(4 << 20);

fn demo_size(text: &str) -> Result<ByteSize, String> {
    let size: ByteSize = text.parse().map_err(|error| format!("{error}"))?;
    if size < DEMO_SIZE_MIN || !size.0.is_multiple_of(1 << 20) {
        return Err(format!("give whole MiB, at least {DEMO_SIZE_MIN}"));
    }
    Ok(size)
}

/// What is to be done.
#[derive(Debug)]
pub enum Command {
    /// Serve a disk.
    Serve(Box<Config>),
    /// Show what voting does.
    Demo(DemoArgs),
    /// Ask a daemon for something.
    Ctl(CtlArgs),
    /// Do something with a state record.
    Record(RecordCommand),
    /// Print [`CAPABILITIES`].
    PrintCapabilities,
}

/// A command line that asks for nothing possible.
#[derive(Debug, Error)]
pub enum UsageError {
    /// The line cannot be read, or asks for help. Knows by itself how to be shown.
    #[error(transparent)]
    Line(#[from] clap::Error),
    /// The configuration file cannot be used.
    #[error(transparent)]
    File(#[from] FileError),
    /// The settings do not fit together.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A record of a disk that is to have none.
    #[error("the disk is configured with `record = \"none\"`: it has no state record")]
    NoRecord,
}

/// Reads the command line; `arguments` begins with the name of the program.
///
/// # Errors
/// If there is nothing that could be done; also for `--help` and `--version`.
pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Command, UsageError> {
    let mut arguments: Vec<OsString> = arguments.into_iter().collect();
    let first = arguments.get(1).map(OsString::as_os_str);
    let serves = first.is_some_and(|first| first == "serve" || is_serve_option(first));
    if serves && arguments.iter().any(|word| word == "--print-capabilities") {
        return Ok(Command::PrintCapabilities);
    }
    if first.is_some_and(is_serve_option) {
        arguments.insert(1, "serve".into());
    }
    match Cli::try_parse_from(arguments)?.command {
        CliCommand::Demo(demo) => Ok(Command::Demo(demo)),
        CliCommand::Ctl(arguments) => Ok(Command::Ctl(arguments)),
        CliCommand::Record(line) => Ok(Command::Record(line.command()?)),
        CliCommand::Serve(serve) => {
            let settings = match &serve.config {
                None => serve.settings,
                Some(path) => serve.settings.over(config::read_file(path)?),
            };
            Ok(Command::Serve(Box::new(Config::from_settings(settings)?)))
        }
    }
}

/// Whether the first word of the line belongs to `serve` although that was not said.
fn is_serve_option(first: &OsStr) -> bool {
    let own = ["-h", "--help", "-V", "--version"];
    first.as_encoded_bytes().starts_with(b"-") && !own.iter().any(|word| first == *word)
}

/// The whole command line, for checks and for generating documents.
#[must_use]
pub fn command() -> clap::Command {
    Cli::command()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::FrontEnd;

    fn line(words: &[&str]) -> Result<Command, UsageError> {
        let program = std::iter::once("quorum-blk");
        parse(program.chain(words.iter().copied()).map(OsString::from))
    }

    fn served(words: &[&str]) -> Config {
        match line(words).unwrap() {
            Command::Serve(config) => *config,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn line_definition_is_consistent() {
        command().debug_assert();
    }

    #[test]
    fn serve_reads_flags_with_and_without_its_name() {
        let flags = [
            "--socket-path",
            "/s",
            "--replica",
            "/a",
            "--blk-file=/b,name=x",
        ];
        let bare = served(&flags);
        let named = served(&[&["serve"][..], &flags[..]].concat());
        assert_eq!(bare, named);
        assert_eq!(bare.front_end, FrontEnd::SocketPath("/s".into()));
        assert_eq!(bare.replica_names(), ["replica0", "x"]);
    }

    #[test]
    fn switches_take_an_optional_value() {
        let flags = ["--fd", "3", "--replica", "/a", "--read-only"];
        assert!(served(&flags).read_only);
        let flags = ["--fd", "3", "--replica", "/a", "--read-only=false"];
        assert!(!served(&flags).read_only);
    }

    #[test]
    fn print_capabilities_beats_everything_else_of_serve() {
        let lines: [&[&str]; 4] = [
            &["--print-capabilities"],
            &["serve", "--print-capabilities"],
            &["--nonsense", "--socket-path", "--print-capabilities"],
            &["serve", "--threshold", "x", "--print-capabilities", "--fd"],
        ];
        for words in lines {
            let command = line(words).unwrap();
            assert!(matches!(command, Command::PrintCapabilities), "{words:?}");
        }
        assert!(line(&["demo", "--print-capabilities"]).is_err());
    }

    #[test]
    fn capabilities_are_json_of_the_expected_shape() {
        let value: serde_json::Value = serde_json::from_str(CAPABILITIES).unwrap();
        assert_eq!(value["type"], "block");
        assert_eq!(
            value["features"],
            serde_json::json!(["read-only", "blk-file"])
        );
    }

    #[test]
    fn every_setting_of_the_file_is_a_flag_of_the_same_name() {
        let text = config::parse_file("nonsense = 1", "x".as_ref())
            .unwrap_err()
            .to_string();
        let fields: Vec<&str> = text
            .split('`')
            .skip(3)
            .step_by(2)
            .filter(|field| *field != "blk-file")
            .collect();
        assert!(fields.len() >= 20, "{text}");
        let command = command();
        let serve = command.find_subcommand("serve").unwrap();
        let own = ["config", "print-capabilities", "help"];
        let mut flags: Vec<&str> = serve
            .get_arguments()
            .filter_map(|argument| argument.get_long())
            .filter(|long| !own.contains(long))
            .collect();
        let mut fields = fields;
        fields.sort_unstable();
        flags.sort_unstable();
        assert_eq!(fields, flags);
    }

    #[test]
    fn record_reads_its_commands() {
        let Ok(Command::Record(RecordCommand::Show { target, json })) =
            line(&["record", "show", "--json", "a.qrec", "b.qrec"])
        else {
            panic!("no show")
        };
        assert!(json && matches!(target, RecordTarget::Files(files) if files.len() == 2));
        let show = ["record", "show", "--replica", "/a", "--record-dir", "/r"];
        let Ok(Command::Record(RecordCommand::Show { target, .. })) = line(&show) else {
            panic!("no show")
        };
        assert!(matches!(target, RecordTarget::Disk(config) if config.replicas.len() == 1));
        let create = ["record", "create", "--assume-clean", "--replica", "/a"];
        let Ok(Command::Record(RecordCommand::Create(config))) = line(&create) else {
            panic!("no create")
        };
        assert_eq!(config.first_use, config::FirstUse::AssumeClean);
        let forget = ["record", "forget", "--replica", "/a"];
        assert!(matches!(
            line(&forget),
            Ok(Command::Record(RecordCommand::Forget { yes: false, .. }))
        ));
        assert!(line(&["record", "show"]).is_err());
        assert!(line(&["record", "show", "a.qrec", "--replica", "/a"]).is_err());
    }

    #[test]
    fn demo_checks_its_size() {
        assert!(matches!(line(&["demo"]), Ok(Command::Demo(_))));
        assert!(line(&["demo", "--size", "1M"]).is_err());
        assert!(line(&["demo", "--size", "5000000"]).is_err());
        assert!(line(&["demo", "--replicas", "2"]).is_err());
    }
}
