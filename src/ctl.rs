// SPDX-License-Identifier: Apache-2.0
//! `quorum-blk ctl`: the client of a daemon's control socket, for people.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use serde_json::{Value, json};
use thiserror::Error;

use crate::cli::{CtlArgs, CtlCommand};

/// A command that was not carried out.
#[derive(Debug, Error)]
pub enum CtlError {
    /// Nobody answers.
    #[error(
        "cannot reach a daemon at {}: is one running that was started with --control, and as the \
         same user?",
        path.display()
    )]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The daemon ended, or the output cannot be written.
    #[error("the conversation with the daemon ended early")]
    Io(#[from] io::Error),
    /// The daemon is gone.
    #[error("the daemon closed the connection; its log says why")]
    Closed,
    /// What it says cannot be understood.
    #[error("what answers there does not speak QMP")]
    Language(#[source] serde_json::Error),
    /// It was understood and refused.
    #[error("{text}")]
    Refused {
        /// Why.
        text: String,
    },
}

/// Asks the daemon; what it says goes to `out`.
///
/// # Errors
/// If it is not asked, or refuses.
pub fn run(arguments: &CtlArgs, out: &mut impl Write) -> Result<(), CtlError> {
    let mut conversation = Conversation::begin(arguments)?;
    let ask = |name: &str, replica: &str| (name.to_owned(), json!({"replica": replica}));
    let (command, details) = match &arguments.command {
        CtlCommand::Events => return conversation.follow(out),
        CtlCommand::Status { .. } => ("query-status".to_owned(), json!({})),
        CtlCommand::Counters => ("query-counters".to_owned(), json!({})),
        CtlCommand::Resize { size } => ("block_resize".to_owned(), json!({"size": size.0})),
        CtlCommand::Scrub { check } => ("scrub".to_owned(), json!({"repair": !check})),
        CtlCommand::StopScrub => ("scrub-stop".to_owned(), json!({})),
        CtlCommand::Clear { replica } => ask("replica-clear", replica),
        CtlCommand::Fail { replica } => ask("replica-fail", replica),
        CtlCommand::ForceCurrent { replica } => ask("replica-force-current", replica),
    };
    let answer = conversation.ask(&command, &details)?;
    match &arguments.command {
        CtlCommand::Status { json: false } => write!(out, "{}", status_text(&answer))?,
        CtlCommand::Status { json: true } | CtlCommand::Counters => {
            writeln!(out, "{}", pretty(&answer))?;
        }
        CtlCommand::Resize { .. } => writeln!(
            out,
            "the disk has {} bytes{}",
            answer["size"],
            if answer["front-end-told"] == true {
                ", and its guest was told"
            } else {
                "; no front-end was told: it sees the size when it connects or asks again"
            }
        )?,
        CtlCommand::Scrub { .. }
        | CtlCommand::StopScrub
        | CtlCommand::Clear { .. }
        | CtlCommand::Fail { .. }
        | CtlCommand::ForceCurrent { .. }
        | CtlCommand::Events => {
            writeln!(out, "asked; what comes of it is in the events and the log")?;
        }
    }
    Ok(())
}

struct Conversation {
    lines: BufReader<UnixStream>,
}

impl Conversation {
    fn begin(arguments: &CtlArgs) -> Result<Self, CtlError> {
        let path = &arguments.control;
        let stream = UnixStream::connect(path).map_err(|source| CtlError::Connect {
            path: path.clone(),
            source,
        })?;
        let mut conversation = Self {
            lines: BufReader::new(stream),
        };
        let _greeting = conversation.next()?;
        conversation.ask("qmp_capabilities", &json!({}))?;
        Ok(conversation)
    }

    fn next(&mut self) -> Result<Value, CtlError> {
        let mut line = String::new();
        if self.lines.read_line(&mut line)? == 0 {
            return Err(CtlError::Closed);
        }
        serde_json::from_str(&line).map_err(CtlError::Language)
    }

    /// Asks, and waits for the answer as long as that takes. Events meanwhile are passed over.
    fn ask(&mut self, command: &str, details: &Value) -> Result<Value, CtlError> {
        let request = json!({"execute": command, "arguments": details});
        self.lines
            .get_mut()
            .write_all(format!("{request}\n").as_bytes())?;
        loop {
            let mut answer = self.next()?;
            if let Some(error) = answer.get("error") {
                let text = error["desc"].as_str().unwrap_or("refused").to_owned();
                return Err(CtlError::Refused { text });
            }
            if answer.get("return").is_some() {
                return Ok(answer["return"].take());
            }
        }
    }

    fn follow(&mut self, out: &mut impl Write) -> Result<(), CtlError> {
        loop {
            match self.next() {
                Ok(event) => {
                    writeln!(out, "{event}")?;
                    out.flush()?;
                }
                Err(CtlError::Closed) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }
}

fn pretty(value: &Value) -> String {
    serde_json::to_string_pretty(value).expect("it was read a moment ago")
}

/// The status for people.
fn status_text(answer: &Value) -> String {
    let text = |value: &Value| {
        value
            .as_str()
            .map_or_else(|| value.to_string(), str::to_owned)
    };
    let mut lines = vec![format!(
        "{}: {}, {} bytes",
        text(&answer["name"]),
        match answer["status"].as_str() {
            Some("running") => "open",
            Some("inmigrate") => "closed, waits for its guest",
            Some("paused") => "being opened or closed",
            _ => "does not answer",
        },
        answer["size"],
    )];
    let disk = &answer["disk"];
    if disk.is_object() {
        let (dirty, open) = (&disk["dirty-extents"], &disk["unresolved-extents"]);
        let health = text(&disk["health"]);
        lines.push(format!(
            "{health}; {dirty} dirty extents, {open} of them to be settled"
        ));
        for replica in disk["replicas"].as_array().into_iter().flatten() {
            let (name, state) = (text(&replica["name"]), text(&replica["state"]));
            let mut line = format!("  {name:<20}{state:<10}");
            if replica["behind-bytes"] != 0 {
                line.push_str(&format!(" lacks {} bytes", replica["behind-bytes"]));
            }
            for flag in ["lagging", "suspect"] {
                if replica[flag] == true {
                    line.push(' ');
                    line.push_str(flag);
                }
            }
            lines.push(line.trim_end().to_owned());
        }
        for copy in disk["record"].as_array().into_iter().flatten() {
            let (path, state) = (text(&copy["path"]), text(&copy["state"]));
            lines.push(format!("  record {path}: {state}"));
        }
        if let Some(pass) = disk.get("pass").filter(|pass| pass.is_object()) {
            let (kind, sector, all) = (text(&pass["type"]), &pass["sector"], &pass["sectors"]);
            lines.push(format!("  {kind} at sector {sector} of {all}"));
        }
    }
    lines.push(String::new());
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_is_told_in_words() {
        let answer = json!({
            "name": "d", "status": "running", "size": 1024,
            "disk": {
                "health": "degraded", "dirty-extents": 3, "unresolved-extents": 1,
                "replicas": [
                    {"name": "a", "state": "in-sync", "behind-bytes": 0, "lagging": false},
                    {"name": "b", "state": "syncing", "behind-bytes": 512, "lagging": true},
                ],
                "record": [{"path": "a.qrec", "state": "in-use"}],
                "pass": {"type": "scrub", "sector": 5, "sectors": 9},
            },
        });
        let expected = "d: open, 1024 bytes\n\
             degraded; 3 dirty extents, 1 of them to be settled\n  \
             a                   in-sync\n  \
             b                   syncing    lacks 512 bytes lagging\n  \
             record a.qrec: in-use\n  \
             scrub at sector 5 of 9\n";
        assert_eq!(status_text(&answer), expected);
        let closed = json!({"name": "d", "status": "inmigrate", "size": 1, "disk": null});
        assert_eq!(
            status_text(&closed),
            "d: closed, waits for its guest, 1 bytes\n"
        );
    }
}
