// SPDX-License-Identifier: Apache-2.0
//! The language of the control socket: QMP, as QEMU speaks it (QEMU, docs/interop/qmp-spec), with
//! commands of a disk. Bytes in, requests out; whoever carries them out is elsewhere. What comes in
//! is not trusted. `docs/control.md` describes it for people; keep both in step.

use serde_json::{Map, Value, json};
use thiserror::Error;

use super::events::Names;
use crate::quorum::Command;
use crate::units::ReplicaId;

/// The longest request in bytes: the longest that makes sense has some hundred.
pub const REQUEST_LEN_MAX: usize = 64 << 10;

/// The commands, as `query-commands` tells them.
pub const COMMANDS: [&str; 12] = [
    "block_resize",
    "qmp_capabilities",
    "query-commands",
    "query-counters",
    "query-name",
    "query-status",
    "query-version",
    "replica-clear",
    "replica-fail",
    "replica-force-current",
    "scrub",
    "scrub-stop",
];

/// What a client wants.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ask {
    /// The end of the negotiation, in which nothing is negotiated.
    Capabilities,
    /// Which commands there are.
    Commands,
    /// Which program this is.
    Version,
    /// The name of the disk.
    Name,
    /// How the disk is.
    Status,
    /// What was counted.
    Counters,
    /// Another size of the disk, in bytes.
    Resize {
        /// The size.
        bytes: u64,
    },
    /// Something for the keeper.
    Command(Command),
}

/// Why a request is not carried out, in the shape QMP gives errors.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
#[error("{text}")]
pub struct QmpError {
    class: &'static str,
    text: String,
}

impl QmpError {
    /// One of the usual class.
    #[must_use]
    pub fn generic(text: impl Into<String>) -> Self {
        Self {
            class: "GenericError",
            text: text.into(),
        }
    }

    fn no_command(text: String) -> Self {
        Self {
            class: "CommandNotFound",
            text,
        }
    }
}

/// A request, or what is wrong with it, and the id that its answer carries.
#[derive(Clone, PartialEq, Debug)]
pub struct Request {
    /// What is wanted.
    pub ask: Result<Ask, QmpError>,
    /// Any JSON; comes back with the answer.
    pub id: Option<Value>,
}

/// The bytes of a client, cut into requests.
#[derive(Debug, Default)]
pub struct Input {
    bytes: Vec<u8>,
    /// The rest of the line is of something that could not be understood.
    skipping: bool,
}

impl Input {
    /// Takes bytes in, as many as a read gave.
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// The next request that is complete. Requests need nothing between them: some clients send no
    /// newline.
    pub fn next(&mut self, names: &Names) -> Option<Request> {
        if self.skipping {
            let Some(end) = self.bytes.iter().position(|&byte| byte == b'\n') else {
                self.bytes.clear();
                return None;
            };
            self.bytes.drain(..=end);
            self.skipping = false;
        }
        let mut values = serde_json::Deserializer::from_slice(&self.bytes).into_iter::<Value>();
        let first = values.next();
        let used = values.byte_offset();
        match first {
            None => {
                self.bytes.clear();
                None
            }
            Some(Ok(value)) => {
                self.bytes.drain(..used);
                Some(request(value, names))
            }
            Some(Err(error)) if error.is_eof() && self.bytes.len() <= REQUEST_LEN_MAX => None,
            Some(Err(error)) => {
                self.skipping = true;
                let text = if error.is_eof() {
                    format!("a request has at most {REQUEST_LEN_MAX} bytes")
                } else {
                    format!("JSON parse error: {error}")
                };
                Some(Request {
                    ask: Err(QmpError::generic(text)),
                    id: None,
                })
            }
        }
    }
}

fn request(value: Value, names: &Names) -> Request {
    let Value::Object(mut members) = value else {
        let ask = Err(QmpError::generic("QMP input must be a JSON object"));
        return Request { ask, id: None };
    };
    let id = members.remove("id");
    let ask = ask(members, names);
    Request { ask, id }
}

fn ask(mut members: Map<String, Value>, names: &Names) -> Result<Ask, QmpError> {
    let Some(command) = members.remove("execute") else {
        return Err(QmpError::generic("QMP input lacks member 'execute'"));
    };
    let Value::String(command) = command else {
        let text = "QMP input member 'execute' must be a string";
        return Err(QmpError::generic(text));
    };
    let arguments = match members.remove("arguments") {
        None => Map::new(),
        Some(Value::Object(arguments)) => arguments,
        Some(_) => {
            let text = "QMP input member 'arguments' must be an object";
            return Err(QmpError::generic(text));
        }
    };
    if let Some(member) = members.keys().next() {
        let text = format!("QMP input member '{}' is unexpected", shown(member));
        return Err(QmpError::generic(text));
    }
    let mut arguments = Arguments(arguments);
    let ask = match command.as_str() {
        "qmp_capabilities" => {
            // Out-of-band execution is not offered, so there is nothing to switch on.
            match arguments.0.remove("enable") {
                None => Ask::Capabilities,
                Some(Value::Array(wanted)) if wanted.is_empty() => Ask::Capabilities,
                Some(_) => {
                    return Err(QmpError::generic(
                        "this server has no capabilities to enable",
                    ));
                }
            }
        }
        "query-commands" => Ask::Commands,
        "query-version" => Ask::Version,
        "query-name" => Ask::Name,
        "query-status" => Ask::Status,
        "query-counters" => Ask::Counters,
        "block_resize" => {
            for which in ["device", "node-name"] {
                if let Some(name) = arguments.text(which)?
                    && name != names.disk
                {
                    let (name, disk) = (shown(&name), &names.disk);
                    let text = format!("Cannot find {which}='{name}': this disk is '{disk}'");
                    return Err(QmpError::generic(text));
                }
            }
            let bytes = arguments.0.remove("size");
            let bytes = bytes.ok_or_else(|| QmpError::generic("Parameter 'size' is missing"))?;
            let bytes = bytes.as_u64().ok_or_else(|| {
                let text = "Parameter 'size' must be a number of bytes, not negative";
                QmpError::generic(text)
            })?;
            Ask::Resize { bytes }
        }
        "scrub" => Ask::Command(Command::Scrub {
            repair: arguments.flag("repair")?.unwrap_or(true),
        }),
        "scrub-stop" => Ask::Command(Command::StopScrub),
        "replica-clear" => Ask::Command(Command::Clear {
            replica: arguments.replica(names)?,
        }),
        "replica-fail" => Ask::Command(Command::Fail {
            replica: arguments.replica(names)?,
        }),
        "replica-force-current" => Ask::Command(Command::ForceCurrent {
            replica: arguments.replica(names)?,
        }),
        other => {
            let text = format!("The command {} has not been found", shown(other));
            return Err(QmpError::no_command(text));
        }
    };
    arguments.end().map(|()| ask)
}

/// What is left of the arguments.
struct Arguments(Map<String, Value>);

impl Arguments {
    fn text(&mut self, name: &str) -> Result<Option<String>, QmpError> {
        match self.0.remove(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => {
                let text = format!("Parameter '{name}' must be a string");
                Err(QmpError::generic(text))
            }
        }
    }

    fn flag(&mut self, name: &str) -> Result<Option<bool>, QmpError> {
        match self.0.remove(name) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(flag)),
            Some(_) => {
                let text = format!("Parameter '{name}' must be a boolean");
                Err(QmpError::generic(text))
            }
        }
    }

    fn replica(&mut self, names: &Names) -> Result<ReplicaId, QmpError> {
        let name = self.text("replica")?;
        let name = name.ok_or_else(|| QmpError::generic("Parameter 'replica' is missing"))?;
        let slot = names.replicas.iter().position(|own| *own == name);
        slot.map(ReplicaId::new).ok_or_else(|| {
            let (name, known) = (shown(&name), names.replicas.join(", "));
            let text = format!("there is no replica '{name}'; there are {known}");
            QmpError::generic(text)
        })
    }

    fn end(&self) -> Result<(), QmpError> {
        match self.0.keys().next() {
            None => Ok(()),
            Some(name) => {
                let text = format!("Parameter '{}' is unexpected", shown(name));
                Err(QmpError::generic(text))
            }
        }
    }
}

/// The beginning of a text of somebody else's.
fn shown(text: &str) -> String {
    text.chars().take(64).collect()
}

/// What is sent first.
#[must_use]
pub fn greeting() -> String {
    line(&json!({"QMP": {"version": version(), "capabilities": []}}))
}

/// What `query-version` answers. Clients look for the member `qemu`.
#[must_use]
pub fn version() -> Value {
    let number = |text: &str| text.parse::<u64>().unwrap_or(0);
    json!({
        "qemu": {
            "major": number(env!("CARGO_PKG_VERSION_MAJOR")),
            "minor": number(env!("CARGO_PKG_VERSION_MINOR")),
            "micro": number(env!("CARGO_PKG_VERSION_PATCH")),
        },
        "package": concat!("quorum-blk ", env!("CARGO_PKG_VERSION")),
    })
}

/// What `query-commands` answers.
#[must_use]
pub fn commands() -> Value {
    COMMANDS.iter().map(|name| json!({"name": name})).collect()
}

/// The line that answers a request.
#[must_use]
pub fn answer(result: Result<Value, QmpError>, id: Option<Value>) -> String {
    let mut answer = match result {
        Ok(value) => json!({"return": value}),
        Err(error) => json!({"error": {"class": error.class, "desc": error.text}}),
    };
    if let Some(id) = id {
        answer["id"] = id;
    }
    line(&answer)
}

fn line(value: &Value) -> String {
    format!("{value}\r\n")
}

/// A request of a client before the negotiation has ended is not one of the commands.
///
/// # Errors
/// For every other request.
pub fn check_negotiated(ask: Ask, negotiated: bool) -> Result<(), QmpError> {
    match (negotiated, ask) {
        (false, Ask::Capabilities) => Ok(()),
        (true, Ask::Capabilities) => {
            let text = "Capabilities negotiation is already complete, command ignored";
            Err(QmpError::no_command(text.to_owned()))
        }
        (false, _) => {
            let text = "Expecting capabilities negotiation with 'qmp_capabilities'";
            Err(QmpError::no_command(text.to_owned()))
        }
        (true, _) => Ok(()),
    }
}

/// Reads `data` as what a client sends, in two pieces: no panic, and memory is bounded.
#[doc(hidden)]
pub fn fuzz_input(data: &[u8]) {
    let names = Names {
        disk: "disk".to_owned(),
        replicas: vec!["a".to_owned(), "b".to_owned()],
        record_copies: Vec::new(),
        disk_sectors: 2048,
    };
    let mut input = Input::default();
    let (first, second) = data.split_at(data.len() / 2);
    for piece in [first, second] {
        for piece in piece.chunks(4096) {
            input.push(piece);
            while let Some(request) = input.next(&names) {
                let text = answer(request.ask.map(|_| Value::Null), request.id);
                assert!(serde_json::from_str::<Value>(&text).is_ok());
            }
            assert!(input.bytes.len() <= REQUEST_LEN_MAX + 4096);
        }
    }
}

#[cfg(test)]
#[path = "qmp_tests.rs"]
mod tests;
