// SPDX-License-Identifier: Apache-2.0
//! Requests that are understood, and a table of those that are not.

use super::*;

fn names() -> Names {
    Names {
        disk: "disk".to_owned(),
        replicas: vec!["a".to_owned(), "b".to_owned()],
        record_copies: Vec::new(),
        disk_sectors: 2048,
    }
}

fn read(bytes: &[u8]) -> Vec<Request> {
    let mut input = Input::default();
    input.push(bytes);
    std::iter::from_fn(|| input.next(&names())).collect()
}

fn one(text: &str) -> Result<Ask, String> {
    let requests = read(text.as_bytes());
    assert_eq!(requests.len(), 1, "{text}");
    requests[0].ask.clone().map_err(|error| error.to_string())
}

#[test]
fn requests_are_understood() {
    let b = ReplicaId::new(1);
    let cases = [
        (r#"{"execute": "qmp_capabilities"}"#, Ask::Capabilities),
        (
            r#"{"execute": "qmp_capabilities", "arguments": {"enable": []}}"#,
            Ask::Capabilities,
        ),
        (r#"{"execute": "query-commands"}"#, Ask::Commands),
        (
            r#"{"execute": "query-version", "arguments": {}}"#,
            Ask::Version,
        ),
        (r#"{"execute": "query-status", "id": [1, {}]}"#, Ask::Status),
        (
            r#"{"execute": "block_resize", "arguments": {"size": 1048576}}"#,
            Ask::Resize { bytes: 1 << 20 },
        ),
        (
            r#"{"execute": "block_resize", "arguments": {"node-name": "disk", "size": 0}}"#,
            Ask::Resize { bytes: 0 },
        ),
        (
            r#"{"execute": "scrub"}"#,
            Ask::Command(Command::Scrub { repair: true }),
        ),
        (
            r#"{"execute": "scrub", "arguments": {"repair": false}}"#,
            Ask::Command(Command::Scrub { repair: false }),
        ),
        (
            r#"{"execute": "scrub-stop"}"#,
            Ask::Command(Command::StopScrub),
        ),
        (
            r#"{"execute": "replica-fail", "arguments": {"replica": "b"}}"#,
            Ask::Command(Command::Fail { replica: b }),
        ),
        (
            r#"{"execute": "replica-clear", "arguments": {"replica": "b"}}"#,
            Ask::Command(Command::Clear { replica: b }),
        ),
    ];
    for (text, expected) in cases {
        assert_eq!(one(text), Ok(expected), "{text}");
    }
}

#[test]
fn what_makes_no_sense_is_refused_with_a_reason() {
    let cases = [
        ("1 ", "must be a JSON object"),
        ("[]", "must be a JSON object"),
        ("null\n", "must be a JSON object"),
        ("{}", "lacks member 'execute'"),
        (r#"{"execute": 3}"#, "must be a string"),
        (
            r#"{"execute": "quit"}"#,
            "The command quit has not been found",
        ),
        (r#"{"exec-oob": "query-status"}"#, "lacks member 'execute'"),
        (
            r#"{"execute": "query-status", "x": 1}"#,
            "'x' is unexpected",
        ),
        (
            r#"{"execute": "query-status", "arguments": 1}"#,
            "must be an object",
        ),
        (
            r#"{"execute": "query-status", "arguments": {"a": 1}}"#,
            "'a' is unexpected",
        ),
        (
            r#"{"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}"#,
            "no capabilities",
        ),
        (r#"{"execute": "block_resize"}"#, "'size' is missing"),
        (
            r#"{"execute": "block_resize", "arguments": {"size": -1}}"#,
            "not negative",
        ),
        (
            r#"{"execute": "block_resize", "arguments": {"size": 1.5}}"#,
            "number of bytes",
        ),
        (
            r#"{"execute": "block_resize", "arguments": {"size": "1G"}}"#,
            "number of bytes",
        ),
        (
            r#"{"execute": "block_resize", "arguments": {"size": 1e30}}"#,
            "number of bytes",
        ),
        (
            r#"{"execute": "block_resize", "arguments": {"size": 1, "device": "x"}}"#,
            "Cannot find device='x'",
        ),
        (
            r#"{"execute": "scrub", "arguments": {"repair": 1}}"#,
            "must be a boolean",
        ),
        (r#"{"execute": "replica-fail"}"#, "'replica' is missing"),
        (
            r#"{"execute": "replica-fail", "arguments": {"replica": "c"}}"#,
            "there are a, b",
        ),
        (
            r#"{"execute": "replica-fail", "arguments": {"replica": 0}}"#,
            "must be a string",
        ),
        ("}\n", "JSON parse error"),
        ("\u{0}\n", "JSON parse error"),
        ("{\"execute\": \"\\ud800\"}\n", "JSON parse error"),
    ];
    for (text, expected) in cases {
        let refused = one(text).unwrap_err();
        assert!(refused.contains(expected), "{text}: {refused}");
    }
}

#[test]
fn requests_come_in_pieces_and_several_at_once() {
    let text = br#"{"execute": "query-status"}{"execute": "query-name", "id": 7} "#;
    let mut input = Input::default();
    let mut found = Vec::new();
    for byte in text {
        input.push(&[*byte]);
        found.extend(std::iter::from_fn(|| input.next(&names())));
    }
    assert_eq!(found.len(), 2);
    assert_eq!(found[1].id, Some(Value::from(7)));
    assert_eq!(read(text).len(), 2);
}

#[test]
fn nonsense_is_skipped_to_the_end_of_its_line() {
    let found = read(b"GET / HTTP/1.1\r\n{\"execute\": \"query-name\"}\n");
    assert_eq!(found.len(), 2);
    assert!(found[0].ask.is_err());
    assert_eq!(found[1].ask, Ok(Ask::Name));
}

#[test]
fn endless_and_deep_requests_are_cut_off() {
    let mut input = Input::default();
    let mut refusals = 0;
    input.push(b"{\"execute\": \"");
    for _ in 0..100 {
        input.push(&[b'x'; 4096]);
        refusals += usize::from(input.next(&names()).is_some());
        assert!(input.bytes.len() <= REQUEST_LEN_MAX + 4096);
    }
    assert_eq!(refusals, 1);
    input.push(b"\n{\"execute\": \"query-name\"}");
    assert_eq!(input.next(&names()).unwrap().ask, Ok(Ask::Name));
    let deep = [b'['; 10_000];
    let text = read(&deep)[0].ask.clone().unwrap_err().to_string();
    assert!(text.contains("recursion"), "{text}");
}

#[test]
fn answers_have_the_shape_of_qmp() {
    let done = answer(Ok(json!({})), Some(json!("x")));
    let expected = json!({"return": {}, "id": "x"});
    assert_eq!(serde_json::from_str::<Value>(&done).unwrap(), expected);
    let refused = answer(Err(QmpError::generic("no")), None);
    let expected = json!({"error": {"class": "GenericError", "desc": "no"}});
    assert_eq!(serde_json::from_str::<Value>(&refused).unwrap(), expected);
    let greeting: Value = serde_json::from_str(&greeting()).unwrap();
    assert!(greeting["QMP"]["version"]["qemu"]["major"].is_u64());
    assert_eq!(commands().as_array().unwrap().len(), COMMANDS.len());
}

#[test]
fn every_command_that_is_told_is_known() {
    for command in COMMANDS {
        let refused = one(&json!({"execute": command}).to_string());
        assert!(
            refused.is_ok_and(|_| true)
                || !one(&json!({"execute": command}).to_string())
                    .unwrap_err()
                    .contains("not been found")
        );
    }
}

#[test]
fn negotiation_comes_first_and_once() {
    assert!(check_negotiated(Ask::Capabilities, false).is_ok());
    assert!(check_negotiated(Ask::Status, true).is_ok());
    assert!(check_negotiated(Ask::Status, false).is_err());
    assert!(check_negotiated(Ask::Capabilities, true).is_err());
}
