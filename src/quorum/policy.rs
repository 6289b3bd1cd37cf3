// SPDX-License-Identifier: Apache-2.0
//! The numbers and choices a replica set runs with. Validated once, here.

use std::time::Duration;

use thiserror::Error;

use crate::units::{REPLICAS_MAX, SectorRange};

/// Sectors in an extent unless the disk is large: 1 MiB (CONSISTENCY section 1).
pub const EXTENT_SECTORS_DEFAULT: u64 = 2048;

/// An extent is doubled until a disk has at most this many.
pub const EXTENTS_MAX: u64 = 1 << 20;

/// Longest request a lane takes: 256 KiB. Three replicas of it stay in the second-level cache of
/// one core while they are compared.
pub const REQUEST_SECTORS_MAX: u32 = 512;

/// The shape of the disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Geometry {
    sectors: u64,
    block_sectors: u32,
    extent_shift: u32,
}

impl Geometry {
    /// A disk of `sectors` sectors whose logical blocks have `block_sectors` of them (a power of
    /// two, 1 to 8). The extent size follows from the size of the disk.
    ///
    /// # Errors
    /// If the disk is empty or no whole number of blocks.
    pub fn new(sectors: u64, block_sectors: u32) -> Result<Self, PolicyError> {
        let extent_shift = EXTENT_SECTORS_DEFAULT.trailing_zeros();
        let mut geometry = Self::with_extent_shift(sectors, block_sectors, extent_shift)?;
        while geometry.extents() > EXTENTS_MAX {
            geometry.extent_shift += 1;
        }
        Ok(geometry)
    }

    /// Like [`Geometry::new`] with extents of `2^extent_shift` sectors.
    ///
    /// # Errors
    /// If the disk is empty or no whole number of blocks.
    pub fn with_extent_shift(
        sectors: u64,
        block_sectors: u32,
        extent_shift: u32,
    ) -> Result<Self, PolicyError> {
        assert!(block_sectors.is_power_of_two() && block_sectors <= 8);
        if sectors == 0
            || !sectors.is_multiple_of(u64::from(block_sectors))
            || sectors > i64::MAX as u64 / 512
        {
            return Err(PolicyError::Size {
                sectors,
                block_sectors,
            });
        }
        Ok(Self {
            sectors,
            block_sectors,
            extent_shift,
        })
    }

    /// Sectors of the disk.
    #[must_use]
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// Sectors in a logical block: no request begins or ends inside one (rule L2).
    #[must_use]
    pub fn block_sectors(&self) -> u32 {
        self.block_sectors
    }

    /// Longest request a lane takes, in sectors.
    #[must_use]
    pub fn request_sectors_max(&self) -> u32 {
        let extent = 1u64 << self.extent_shift;
        REQUEST_SECTORS_MAX.min(u32::try_from(extent).unwrap_or(REQUEST_SECTORS_MAX))
    }

    /// Extents have `2^extent_shift` sectors.
    #[must_use]
    pub fn extent_shift(&self) -> u32 {
        self.extent_shift
    }

    /// Number of extents.
    #[must_use]
    pub fn extents(&self) -> u64 {
        self.sectors.div_ceil(1 << self.extent_shift)
    }

    /// The extent that holds `sector`.
    #[must_use]
    pub fn extent_of(&self, sector: u64) -> u64 {
        sector >> self.extent_shift
    }

    /// The sectors of extent `extent`; the last one may be shorter.
    #[must_use]
    pub fn extent_range(&self, extent: u64) -> SectorRange {
        let start = extent << self.extent_shift;
        let count = (self.sectors - start).min(1 << self.extent_shift);
        let count = u32::try_from(count).expect("an extent is at most 64 MiB");
        SectorRange::new(start, count).expect("extent lies inside the disk")
    }

    /// Whether a lane takes a request for `range`: inside the disk, inside one extent, aligned.
    #[must_use]
    pub fn admits(&self, range: SectorRange) -> bool {
        range.end() <= self.sectors
            && range.is_aligned(self.block_sectors)
            && self.extent_of(range.start()) == self.extent_of(range.end() - 1)
    }

    /// The longest prefix of `range` that a lane takes as one data request.
    #[must_use]
    pub fn first_piece(&self, range: SectorRange) -> SectorRange {
        self.prefix(range, self.request_sectors_max())
    }

    /// The longest prefix of `range` in one extent: a request without data.
    #[must_use]
    pub fn first_extent_piece(&self, range: SectorRange) -> SectorRange {
        self.prefix(range, u32::MAX)
    }

    fn prefix(&self, range: SectorRange, sectors_max: u32) -> SectorRange {
        let extent_end = (self.extent_of(range.start()) + 1) << self.extent_shift;
        let left = u32::try_from(extent_end - range.start()).unwrap_or(u32::MAX);
        let count = range.count().min(left).min(sectors_max);
        SectorRange::new(range.start(), count).expect("a prefix of a range is a range")
    }
}

/// Who is asked on a read.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum ReadPattern {
    /// All current copies; T equal sectors win (QEMU's `quorum`).
    #[default]
    Quorum,
    /// The first current copy in the order of configuration, the next one if it fails. No vote
    /// (QEMU's `fifo`).
    Fifo,
}

/// How a replica set decides.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Policy {
    /// N, 1 to 16.
    pub replicas: usize,
    /// T: how many equal sectors make a winner, 1 to N.
    pub threshold: usize,
    /// Take a T of at most N/2 (rule V3).
    pub allow_minority_threshold: bool,
    /// Who is asked on a read.
    pub read_pattern: ReadPattern,
    /// Whether dissenters are rewritten with the winner's bytes (rule Y4).
    pub repair: bool,
    /// Whether a difference stops the daemon: two replicas, T = 2 (QEMU's `blkverify`).
    pub blkverify: bool,
    /// How long a write waits for the rest once T copies hold it, at least and at most (rule W6);
    /// between the two it is four times what the T-th copy took.
    pub write_grace_min: Duration,
    /// See `write_grace_min`.
    pub write_grace_max: Duration,
    /// How long a flush waits for the rest once T copies are flushed (rule F2).
    pub flush_grace: Duration,
    /// How long an operation may take before its replica is declared not up.
    pub io_timeout: Duration,
    /// Whether requests wait when fewer than T replicas are up, instead of failing (rule V6).
    pub pause: bool,
    /// Whether sectors that nobody agrees on since a crash are an error, instead of any of their
    /// legal versions (rule Y3).
    pub crash_tie_error: bool,
    /// Whether discard zeroes: every replica can do it exactly (rule Z2). Otherwise a discard
    /// does nothing on any replica.
    pub discard_zeroes: bool,
}

impl Policy {
    /// The defaults for `replicas` replicas: T = floor(N/2)+1, voting, repairing.
    #[must_use]
    pub fn new(replicas: usize) -> Self {
        Self {
            replicas,
            threshold: replicas / 2 + 1,
            allow_minority_threshold: false,
            read_pattern: ReadPattern::Quorum,
            repair: true,
            blkverify: false,
            write_grace_min: Duration::from_millis(20),
            write_grace_max: Duration::from_secs(1),
            flush_grace: Duration::from_secs(5),
            io_timeout: Duration::from_secs(30),
            pause: false,
            crash_tie_error: false,
            discard_zeroes: true,
        }
    }

    /// Checks the choices against each other.
    ///
    /// # Errors
    /// The first rule that is broken.
    pub fn validate(&self) -> Result<(), PolicyError> {
        if self.replicas == 0 || self.replicas > REPLICAS_MAX {
            return Err(PolicyError::Replicas {
                replicas: self.replicas,
            });
        }
        if self.threshold == 0 || self.threshold > self.replicas {
            return Err(PolicyError::Threshold {
                threshold: self.threshold,
                replicas: self.replicas,
            });
        }
        if !self.majority()
            && !self.allow_minority_threshold
            && self.read_pattern == ReadPattern::Quorum
        {
            return Err(PolicyError::MinorityThreshold {
                threshold: self.threshold,
                replicas: self.replicas,
                least: self.replicas / 2 + 1,
            });
        }
        if self.blkverify && (self.replicas != 2 || self.threshold != 2) {
            return Err(PolicyError::Blkverify {
                replicas: self.replicas,
                threshold: self.threshold,
            });
        }
        if self.blkverify && self.read_pattern == ReadPattern::Fifo {
            return Err(PolicyError::BlkverifyFifo);
        }
        Ok(())
    }

    /// Whether two different versions can never both reach T (rule V2).
    #[must_use]
    pub fn majority(&self) -> bool {
        2 * self.threshold > self.replicas
    }
}

/// A choice that cannot be run with.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum PolicyError {
    /// Too few or too many replicas.
    #[error("{replicas} replicas given; a disk has 1 to 16")]
    Replicas {
        /// N.
        replicas: usize,
    },
    /// Threshold out of range.
    #[error("threshold {threshold} is impossible with {replicas} replicas; give 1 to {replicas}")]
    Threshold {
        /// T.
        threshold: usize,
        /// N.
        replicas: usize,
    },
    /// Rule V3.
    #[error(
        "with {replicas} replicas two different versions could both get {threshold} votes; \
         give --threshold {least} or more, or --allow-minority-threshold to take the largest group"
    )]
    MinorityThreshold {
        /// T.
        threshold: usize,
        /// N.
        replicas: usize,
        /// The smallest safe T.
        least: usize,
    },
    /// Blkverify compares exactly two copies.
    #[error(
        "--blkverify compares exactly two replicas with threshold 2, \
         not {replicas} with threshold {threshold}"
    )]
    Blkverify {
        /// N.
        replicas: usize,
        /// T.
        threshold: usize,
    },
    /// Blkverify needs votes.
    #[error("--blkverify needs --read-pattern quorum: fifo compares nothing")]
    BlkverifyFifo,
    /// The disk is empty or no whole number of blocks.
    #[error(
        "a disk of {sectors} sectors is empty, too large or no multiple of {block_sectors}-sector blocks"
    )]
    Size {
        /// Sectors of the disk.
        sectors: u64,
        /// Sectors in a block.
        block_sectors: u32,
    },
}
