// SPDX-License-Identifier: Apache-2.0
//! The operations that are in flight: what is left of each, and what its completion means.

use crate::quorum::{BufferId, OpId, Operation, OperationKind, Outcome};
use crate::units::ReplicaId;

/// How often an operation that was interrupted, or met a lack of resources, is tried again.
const ATTEMPTS_MAX: u8 = 16;

/// How zeroes get onto a replica, the quickest first.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum ZeroMethod {
    /// `FALLOC_FL_PUNCH_HOLE`: gives the space back.
    Punch,
    /// `FALLOC_FL_ZERO_RANGE`: keeps the space.
    ZeroRange,
    /// Writing them.
    Write,
}

/// The quicker ways to zero that a replica has not refused so far.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct ZeroMethods {
    pub(super) punch: bool,
    pub(super) zero_range: bool,
}

impl ZeroMethods {
    /// The best method left.
    fn best(self, unmap: bool) -> ZeroMethod {
        match (unmap && self.punch, self.zero_range) {
            (true, _) => ZeroMethod::Punch,
            (false, true) => ZeroMethod::ZeroRange,
            (false, false) => ZeroMethod::Write,
        }
    }

    /// Remembers that a method was refused.
    fn forget(&mut self, method: ZeroMethod) {
        match method {
            ZeroMethod::Punch => self.punch = false,
            ZeroMethod::ZeroRange => self.zero_range = false,
            ZeroMethod::Write => {}
        }
    }
}

/// What an operation does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Work {
    Read { buffer: BufferId, skip_bytes: u32 },
    Write { buffer: BufferId, skip_bytes: u32 },
    Zero { method: ZeroMethod },
    Flush,
}

/// One operation in flight.
#[derive(Clone, Copy, Debug)]
pub(super) struct Flight {
    pub(super) op: OpId,
    pub(super) replica: ReplicaId,
    pub(super) work: Work,
    /// Where on the replica it begins.
    offset: u64,
    /// How long it is.
    len: u32,
    /// How much of it is done.
    done: u32,
    attempts: u8,
}

/// What follows from a completion.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Next {
    /// The operation has ended.
    Ended(Outcome),
    /// What is left is to be submitted.
    Again,
}

impl Flight {
    /// An operation of which nothing is done yet, on a replica that zeroes by `methods`.
    pub(super) fn new(operation: &Operation, methods: ZeroMethods) -> Self {
        let (work, range) = match operation.kind {
            OperationKind::Read {
                range,
                buffer,
                skip_bytes,
            } => (Work::Read { buffer, skip_bytes }, Some(range)),
            OperationKind::Write {
                range,
                buffer,
                skip_bytes,
            } => (Work::Write { buffer, skip_bytes }, Some(range)),
            OperationKind::WriteZeroes { range, unmap } => {
                let method = methods.best(unmap);
                (Work::Zero { method }, Some(range))
            }
            OperationKind::Flush => (Work::Flush, None),
        };
        let len = range.map_or(0, |range| range.len_bytes());
        Self {
            op: operation.op,
            replica: operation.replica,
            work,
            offset: range.map_or(0, |range| range.offset_bytes()),
            len: u32::try_from(len).expect("an operation lies in one extent of at most 64 MiB"),
            done: 0,
            attempts: 0,
        }
    }

    /// Where on the replica the rest begins.
    pub(super) fn rest_offset(&self) -> u64 {
        self.offset + u64::from(self.done)
    }

    /// How long the rest is.
    pub(super) fn rest_bytes(&self) -> u32 {
        self.len - self.done
    }

    /// How much is done.
    pub(super) fn done_bytes(&self) -> u32 {
        self.done
    }

    /// Takes in the result of a submission: a count of bytes or a negative errno.
    /// `alignment_bytes` is what the replica's I/O must be a multiple of.
    pub(super) fn advance(
        &mut self,
        result: i32,
        alignment_bytes: u32,
        methods: &mut ZeroMethods,
    ) -> Next {
        match u32::try_from(result) {
            Ok(transferred) => self.succeeded(transferred, alignment_bytes),
            Err(_) => self.failed(result.saturating_neg(), methods),
        }
    }

    fn succeeded(&mut self, transferred: u32, alignment_bytes: u32) -> Next {
        let transfers = match self.work {
            Work::Read { .. } | Work::Write { .. } => true,
            Work::Zero { method } => method == ZeroMethod::Write,
            Work::Flush => false,
        };
        if !transfers {
            return Next::Ended(Outcome::Done);
        }
        assert!(
            transferred <= self.rest_bytes(),
            "{transferred} bytes transferred of {}",
            self.rest_bytes()
        );
        self.done += transferred;
        self.attempts = 0;
        if self.done == self.len {
            return Next::Ended(Outcome::Done);
        }
        // Nothing, or a part that cannot be continued from: the end of the replica.
        if transferred == 0 || !self.done.is_multiple_of(alignment_bytes) {
            return Next::Ended(Outcome::Short {
                expected: self.len,
                got: self.done,
            });
        }
        Next::Again
    }

    fn failed(&mut self, errno: i32, methods: &mut ZeroMethods) -> Next {
        if let Work::Zero { method } = self.work {
            let refused = matches!(errno, libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL);
            if refused && method != ZeroMethod::Write {
                methods.forget(method);
                let method = methods.best(method == ZeroMethod::Punch);
                self.work = Work::Zero { method };
                return Next::Again;
            }
        }
        if matches!(errno, libc::EINTR | libc::EAGAIN) && self.attempts < ATTEMPTS_MAX {
            self.attempts += 1;
            return Next::Again;
        }
        Next::Ended(Outcome::Failed { errno })
    }
}

/// The operations in flight, by slot. Slots are used again; the table grows only when more are
/// in flight than ever before.
#[derive(Debug)]
pub(super) struct Flights {
    slots: Vec<Option<Flight>>,
    free: Vec<u32>,
}

impl Flights {
    /// A table with room for `capacity` before it grows.
    pub(super) fn new(capacity: u32) -> Self {
        Self {
            slots: vec![None; capacity as usize],
            // Backwards, so that the low slots, which share cache lines, are used first.
            free: (0..capacity).rev().collect(),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    pub(super) fn insert(&mut self, flight: Flight) -> u32 {
        if let Some(slot) = self.free.pop() {
            self.slots[slot as usize] = Some(flight);
            return slot;
        }
        let slot = u32::try_from(self.slots.len()).expect("fewer than 2^32 operations in flight");
        self.slots.push(Some(flight));
        // So that giving slots back never allocates.
        self.free.reserve(self.slots.len());
        slot
    }

    /// The operation in `slot`.
    ///
    /// # Panics
    /// If there is none: a completion for nothing.
    pub(super) fn get_mut(&mut self, slot: u32) -> &mut Flight {
        self.slots
            .get_mut(slot as usize)
            .and_then(Option::as_mut)
            .expect("a completion belongs to an operation in flight")
    }

    pub(super) fn remove(&mut self, slot: u32) {
        let removed = self.slots[slot as usize].take();
        assert!(removed.is_some(), "slot {slot} is empty");
        self.free.push(slot);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::SectorRange;

    const ALL: ZeroMethods = ZeroMethods {
        punch: true,
        zero_range: true,
    };

    fn operation(kind: OperationKind) -> Operation {
        Operation {
            op: OpId(7),
            replica: ReplicaId::new(0),
            kind,
        }
    }

    fn read(sectors: u32) -> Flight {
        let range = SectorRange::new(16, sectors).unwrap();
        let buffer = BufferId(0);
        Flight::new(
            &operation(OperationKind::Read {
                range,
                buffer,
                skip_bytes: 0,
            }),
            ALL,
        )
    }

    #[test]
    fn advance_of_a_partial_read_goes_on_where_it_stopped() {
        let mut flight = read(16);
        let mut methods = ALL;
        assert_eq!(flight.advance(4096, 512, &mut methods), Next::Again);
        assert_eq!((flight.rest_offset(), flight.rest_bytes()), (12_288, 4096));
        let next = flight.advance(4096, 512, &mut methods);
        assert_eq!(next, Next::Ended(Outcome::Done));
    }

    #[test]
    fn advance_at_the_end_of_a_replica_is_short() {
        let mut methods = ALL;
        let (expected, got) = (8192, 4096);
        let mut flight = read(16);
        assert_eq!(flight.advance(4096, 512, &mut methods), Next::Again);
        let short = Next::Ended(Outcome::Short { expected, got });
        assert_eq!(flight.advance(0, 512, &mut methods), short);
        let mut flight = read(16);
        let next = flight.advance(4097, 512, &mut methods);
        let got = 4097;
        assert_eq!(next, Next::Ended(Outcome::Short { expected, got }));
    }

    #[test]
    fn advance_of_interruptions_ends_some_time() {
        let mut flight = read(8);
        let mut methods = ALL;
        for _ in 0..ATTEMPTS_MAX {
            assert_eq!(flight.advance(-libc::EINTR, 512, &mut methods), Next::Again);
        }
        let errno = libc::EAGAIN;
        let next = flight.advance(-errno, 512, &mut methods);
        assert_eq!(next, Next::Ended(Outcome::Failed { errno }));
    }

    #[test]
    fn advance_of_refused_zeroing_tries_the_next_method_and_remembers() {
        let range = SectorRange::new(0, 8).unwrap();
        let unmap = true;
        let mut methods = ALL;
        let operation = operation(OperationKind::WriteZeroes { range, unmap });
        let mut flight = Flight::new(&operation, methods);
        let expected = [ZeroMethod::Punch, ZeroMethod::ZeroRange, ZeroMethod::Write];
        for (index, method) in expected.into_iter().enumerate() {
            assert_eq!(flight.work, Work::Zero { method });
            if index < 2 {
                let next = flight.advance(-libc::EOPNOTSUPP, 512, &mut methods);
                assert_eq!(next, Next::Again);
            }
        }
        let method = ZeroMethod::Write;
        assert_eq!(Flight::new(&operation, methods).work, Work::Zero { method });
        let errno = libc::EOPNOTSUPP;
        let next = flight.advance(-errno, 512, &mut methods);
        assert_eq!(next, Next::Ended(Outcome::Failed { errno }));
    }

    #[test]
    fn flights_reuse_slots_and_grow_when_full() {
        let mut flights = Flights::new(2);
        let slots: Vec<u32> = (0..3).map(|_| flights.insert(read(1))).collect();
        assert_eq!(slots, [0, 1, 2]);
        flights.remove(1);
        assert_eq!(flights.len(), 2);
        assert_eq!(flights.insert(read(1)), 1);
    }
}
