// SPDX-License-Identifier: Apache-2.0
//! What the record says of a replica (rule R3).

use super::error::FormatError;
use super::fields::{Reader, Writer};

/// Bit of a member's flags on disk.
const SUSPECT: u8 = 1;

/// State of a replica (CONSISTENCY section 10).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum MemberState {
    /// No replica was ever in the slot.
    #[default]
    Vacant,
    /// Up, behind nowhere.
    InSync,
    /// Up, behind somewhere.
    Syncing,
    /// Not up.
    Missing,
    /// Out of use until an operator clears it.
    Failed,
    /// Taken out for good.
    Removed,
}

impl MemberState {
    const ALL: [Self; 6] = [
        Self::Vacant,
        Self::InSync,
        Self::Syncing,
        Self::Missing,
        Self::Failed,
        Self::Removed,
    ];

    fn number(self) -> u8 {
        match self {
            Self::Vacant => 0,
            Self::InSync => 1,
            Self::Syncing => 2,
            Self::Missing => 3,
            Self::Failed => 4,
            Self::Removed => 5,
        }
    }
}

/// By what a file is known again after a clean stop (rules R8, S3). All zero: not taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Fingerprint {
    /// Length in bytes.
    pub size_bytes: u64,
    /// Last change of the content: seconds since 1970.
    pub mtime_seconds: i64,
    /// Nanoseconds of that second, below 10^9.
    pub mtime_nanos: u32,
    /// Inode number.
    pub inode: u64,
    /// Device the file is on, or the device itself.
    pub device: u64,
}

/// A replica in the record. Its place among the members is its slot.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Member {
    /// Who it is, whatever its name; all zero if vacant.
    pub uuid: [u8; 16],
    /// State when the record was written.
    pub state: MemberState,
    /// Half of an error budget is used up: it votes, but never decides a tie.
    pub suspect: bool,
    /// The last epoch in which it was in sync; 0 if it never was.
    pub epoch_in_sync: u64,
    /// Of the last clean stop.
    pub fingerprint: Fingerprint,
}

/// Bytes of a member on disk.
pub(super) const MEMBER_BYTES: usize = 72;

impl Member {
    pub(super) fn encode(&self, slot: usize, writer: &mut Writer<'_>) {
        writer.bytes(&self.uuid);
        writer.u8(u8::try_from(slot).expect("at most 16 slots"));
        writer.u8(self.state.number());
        writer.u8(if self.suspect { SUSPECT } else { 0 });
        writer.bytes(&[0; 5]);
        writer.u64(self.epoch_in_sync);
        writer.u64(self.fingerprint.size_bytes);
        writer.i64(self.fingerprint.mtime_seconds);
        writer.u32(self.fingerprint.mtime_nanos);
        writer.u32(0);
        writer.u64(self.fingerprint.inode);
        writer.u64(self.fingerprint.device);
    }

    pub(super) fn decode(slot: usize, reader: &mut Reader<'_>) -> Result<Self, FormatError> {
        let wrong = |field| FormatError::Field { field };
        let uuid = reader.bytes();
        if usize::from(reader.u8()) != slot {
            return Err(wrong("slot of a member"));
        }
        let state = usize::from(reader.u8());
        let state = *MemberState::ALL
            .get(state)
            .ok_or(wrong("state of a member"))?;
        let flags = reader.u8();
        if flags & !SUSPECT != 0 || reader.bytes() != [0; 5] {
            return Err(wrong("flags of a member"));
        }
        let epoch_in_sync = reader.u64();
        let fingerprint = Fingerprint {
            size_bytes: reader.u64(),
            mtime_seconds: reader.i64(),
            mtime_nanos: reader.u32(),
            inode: {
                if reader.u32() != 0 {
                    return Err(wrong("fingerprint of a member"));
                }
                reader.u64()
            },
            device: reader.u64(),
        };
        if fingerprint.mtime_nanos >= 1_000_000_000 {
            return Err(wrong("fingerprint of a member"));
        }
        Ok(Self {
            uuid,
            state,
            suspect: flags & SUSPECT != 0,
            epoch_in_sync,
            fingerprint,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_have_the_numbers_of_their_places() {
        for (number, state) in (0..).zip(MemberState::ALL) {
            assert_eq!(state.number(), number);
        }
    }
}
