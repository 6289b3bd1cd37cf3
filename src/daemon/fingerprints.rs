// SPDX-License-Identifier: Apache-2.0
//! Fingerprints of replicas as the record keeps them.

use crate::{record, replica};

const NANOS: i128 = 1_000_000_000;

/// As the record keeps it. A time that does not fit is as good as none.
#[must_use]
pub fn to_record(found: &replica::Fingerprint) -> record::Fingerprint {
    let seconds = i64::try_from(found.mtime_ns.div_euclid(NANOS));
    let nanos = u32::try_from(found.mtime_ns.rem_euclid(NANOS)).expect("below 10^9");
    record::Fingerprint {
        size_bytes: found.size_bytes,
        mtime_seconds: seconds.unwrap_or_default(),
        mtime_nanos: nanos,
        inode: found.inode,
        device: found.device,
    }
}

/// As replicas are compared. `None`: it was not taken.
#[must_use]
pub fn from_record(kept: &record::Fingerprint) -> Option<replica::Fingerprint> {
    if *kept == record::Fingerprint::default() {
        return None;
    }
    Some(replica::Fingerprint {
        size_bytes: kept.size_bytes,
        mtime_ns: i128::from(kept.mtime_seconds) * NANOS + i128::from(kept.mtime_nanos),
        inode: kept.inode,
        device: kept.device,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fingerprints_survive_the_record() {
        for mtime_ns in [0, 1, -1, NANOS, 1_900_000_000_123_456_789, -NANOS - 5] {
            let found = replica::Fingerprint {
                size_bytes: 1 << 40,
                mtime_ns,
                inode: 7,
                device: 9,
            };
            assert_eq!(from_record(&to_record(&found)), Some(found));
        }
        assert_eq!(from_record(&record::Fingerprint::default()), None);
    }
}
