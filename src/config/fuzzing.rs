// SPDX-License-Identifier: Apache-2.0
//! Entry points for fuzzing what users and programs write: any bytes, no panic, and what was
//! accepted holds what was promised.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::{Config, ReplicaArgument, parse_file};

/// Reads `data` as a replica argument. What was accepted reads back from its own writing.
pub fn fuzz_replica_argument(data: &[u8]) {
    let Ok(replica) = ReplicaArgument::parse(OsStr::from_bytes(data)) else {
        return;
    };
    let written = replica.to_argument();
    assert_eq!(ReplicaArgument::parse(&written).as_ref(), Ok(&replica));
}

/// Reads `data` as a configuration file and, if it can be read, checks it as a whole.
pub fn fuzz_config_toml(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let Ok(settings) = parse_file(text, Path::new("fuzz.toml")) else {
        return;
    };
    if let Ok(config) = Config::from_settings(settings) {
        config
            .policy()
            .validate()
            .expect("an accepted configuration has a valid policy");
        assert!(config.queue_size.is_power_of_two());
        assert!((1..=config.num_queues).contains(&config.workers));
        if let Ok(Some(places)) = config.record.places(&config.replicas, |_| true) {
            assert!(matches!(places.copies.len(), 1 | 3 | 5));
        }
    }
}
