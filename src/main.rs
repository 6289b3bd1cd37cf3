// SPDX-License-Identifier: Apache-2.0
//! The command line program; everything it does is in the library.

use std::error::Error;
use std::process::ExitCode;

use quorum_blk::cli::{self, Command, DemoArgs, UsageError};
use quorum_blk::control::logging;
use quorum_blk::ctl;
use quorum_blk::daemon;
use quorum_blk::demo::{self, DemoError, DemoOptions};
use quorum_blk::record_cli;

fn main() -> ExitCode {
    let command = match cli::parse(std::env::args_os()) {
        Ok(command) => command,
        Err(error) => return refuse(&error),
    };
    match command {
        Command::PrintCapabilities => {
            println!("{}", cli::CAPABILITIES);
            ExitCode::from(cli::EXIT_OK)
        }
        Command::Serve(config) => {
            if let Err(error) = logging::init(config.log_format, config.log_level) {
                return fail(&error);
            }
            match daemon::run(*config) {
                Ok(()) => ExitCode::from(cli::EXIT_OK),
                Err(error) => fail(&error),
            }
        }
        Command::Ctl(arguments) => match ctl::run(&arguments, &mut std::io::stdout().lock()) {
            Ok(()) => ExitCode::from(cli::EXIT_OK),
            Err(error) => fail(&error),
        },
        Command::Record(command) => {
            match record_cli::run(&command, &mut std::io::stdout().lock()) {
                Ok(()) => ExitCode::from(cli::EXIT_OK),
                Err(error) => fail(&error),
            }
        }
        Command::Demo(arguments) => match run_demo(arguments) {
            Ok(true) => ExitCode::from(cli::EXIT_OK),
            // The report has said what was wrong.
            Ok(false) => ExitCode::from(cli::EXIT_FAILURE),
            Err(error) => fail(&error),
        },
    }
}

fn run_demo(arguments: DemoArgs) -> Result<bool, DemoError> {
    let defaults = DemoOptions::of_this_program()?;
    let options = DemoOptions {
        parent: arguments.dir.unwrap_or(defaults.parent),
        keep: arguments.keep,
        replicas: usize::from(arguments.replicas),
        disk_bytes: arguments.size.0,
        ..defaults
    };
    demo::run(&options, &mut std::io::stdout().lock())
}

/// Shows why nothing could be done. Help and version come this way too and are no failure.
fn refuse(error: &UsageError) -> ExitCode {
    if let UsageError::Line(error) = error {
        // Nothing can be done if even that cannot be shown.
        let _ = error.print();
        return if error.use_stderr() {
            ExitCode::from(cli::EXIT_USAGE)
        } else {
            ExitCode::from(cli::EXIT_OK)
        };
    }
    show(error);
    eprintln!("For more information, try 'quorum-blk serve --help'.");
    ExitCode::from(cli::EXIT_USAGE)
}

fn fail(error: &dyn Error) -> ExitCode {
    show(error);
    ExitCode::from(cli::EXIT_FAILURE)
}

/// Prints an error and what it came from, once, on one line.
fn show(error: &dyn Error) {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    eprintln!("quorum-blk: {text}");
}
