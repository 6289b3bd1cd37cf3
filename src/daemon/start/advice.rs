// SPDX-License-Identifier: Apache-2.0
//! What an operator is told about a start: one sentence each, with the reason and the cure.

use std::fmt;

use tracing::{info, warn};

use super::known::Doubt;

/// One thing to know.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Advice {
    /// Rule S4.
    Unclean {
        /// Extents that are dirty.
        dirty: u64,
        /// The host was not restarted since.
        same_boot: bool,
    },
    /// The last run ended cleanly, but extents are dirty: a page of the record was lost.
    DirtyAfterAll {
        /// Extents.
        dirty: u64,
    },
    /// Rule S3.
    Changed {
        /// Which replica.
        name: String,
        /// Why it is not relied on.
        doubt: Doubt,
    },
    /// The replicas are longer, and the disk stays as it is.
    NotGrown {
        /// Why.
        why: String,
    },
    /// Fewer than T replicas are as they were left.
    FewUnchanged {
        /// Those.
        names: String,
    },
    /// Rule S3, last sentence.
    AllChanged,
    /// A replica cannot be used.
    Absent {
        /// Why; names it.
        why: String,
    },
    /// A replica is not to be used.
    Failed {
        /// Which replica.
        name: String,
    },
    /// T is another (rule R7).
    ThresholdChanged {
        /// What it was.
        from: usize,
        /// What it is.
        to: usize,
    },
    /// The read pattern is another.
    PatternChanged,
    /// Rule S6, replicas.
    Forced {
        /// Replicas that are up.
        up: usize,
        /// N.
        replicas: usize,
        /// T of this run.
        threshold: usize,
    },
    /// Rule S6, copies of the record.
    RecordMinority,
    /// `--force` was given and changed nothing.
    ForceNotNeeded,
    /// `--adopt-from` or `--assume-clean` was given for a disk that has a record.
    FirstUseIgnored,
    /// Rule S5.
    FirstUse {
        /// Where the record was made.
        places: String,
        /// What the images are taken for.
        how: &'static str,
    },
    /// Nothing is remembered, as nothing may be written.
    ReadOnlyWithoutRecord,
    /// A copy of the record is not as it should be.
    Copy {
        /// A sentence.
        text: String,
    },
    /// Only replicas that were changed hold something there.
    LastCopies {
        /// In so many extents.
        extents: u64,
    },
    /// All copies are behind there (CONSISTENCY section 10).
    NoCopy {
        /// In so many extents.
        extents: u64,
    },
}

impl Advice {
    /// Whether somebody should act on it, or at least think about it.
    #[must_use]
    pub fn is_warning(&self) -> bool {
        match self {
            Self::Unclean { .. }
            | Self::ThresholdChanged { .. }
            | Self::PatternChanged
            | Self::ForceNotNeeded
            | Self::FirstUseIgnored
            | Self::FirstUse { .. }
            | Self::ReadOnlyWithoutRecord => false,
            Self::DirtyAfterAll { .. }
            | Self::Changed { .. }
            | Self::NotGrown { .. }
            | Self::FewUnchanged { .. }
            | Self::AllChanged
            | Self::Absent { .. }
            | Self::Failed { .. }
            | Self::Forced { .. }
            | Self::RecordMinority
            | Self::Copy { .. }
            | Self::LastCopies { .. }
            | Self::NoCopy { .. } => true,
        }
    }

    /// Writes it to the log.
    pub fn tell(&self) {
        if self.is_warning() {
            warn!("{self}");
        } else {
            info!("{self}");
        }
    }
}

impl fmt::Display for Advice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unclean { dirty: 0, .. } => f.write_str(
                "the last run did not stop cleanly, but no extent is dirty: nothing has to be \
                 settled",
            ),
            Self::Unclean { dirty, same_boot } => write!(
                f,
                "the last run did not stop cleanly ({}): {dirty} dirty extents are made equal on \
                 all replicas while the disk is served",
                if *same_boot {
                    "the daemon was killed or the guest was cut off"
                } else {
                    "the host was restarted since"
                }
            ),
            Self::DirtyAfterAll { dirty } => write!(
                f,
                "a part of the state record was lost: {dirty} extents count as dirty and are \
                 compared on all replicas while the disk is served"
            ),
            Self::Changed { name, doubt } => match doubt {
                Doubt::Changed => write!(
                    f,
                    "replica '{name}' changed while the disk was not served (its size or time of \
                     change differs): it will be rewritten from the others"
                ),
                Doubt::Replaced => write!(
                    f,
                    "replica '{name}' is not the file or device that it was when the disk was last \
                     served: it will be rewritten from the others"
                ),
                Doubt::Unknown => write!(
                    f,
                    "replica '{name}' was not in use when the disk was last stopped, and what \
                     became of it is not known: it will be rewritten from the others"
                ),
            },
            Self::NotGrown { why } => write!(f, "the disk is not made longer now: {why}"),
            Self::FewUnchanged { names } => write!(
                f,
                "fewer replicas than must agree are as the disk left them: what {names} holds \
                 becomes the content of all"
            ),
            Self::AllChanged => f.write_str(
                "every replica changed while the disk was not served: all of them vote, and they \
                 are compared once in the background; sectors that nobody agrees on give I/O \
                 errors. If one of them holds the disk, remove the record ('quorum-blk record \
                 forget') and start with --adopt-from NAME",
            ),
            Self::Absent { why } => write!(
                f,
                "{why}; the disk is served without it, and it gets what it missed when it is back"
            ),
            Self::Failed { name } => write!(
                f,
                "replica '{name}' is failed: it is not used before an operator clears it"
            ),
            Self::ThresholdChanged { from, to } => write!(
                f,
                "{to} replicas must agree from now on; it was {from} when the disk was last served"
            ),
            Self::PatternChanged => {
                f.write_str("the read pattern is another one than when the disk was last served")
            }
            Self::Forced {
                up,
                replicas,
                threshold,
            } => write!(
                f,
                "DANGEROUS: by force the disk is served with {up} of {replicas} replicas, of \
                 which {threshold} must agree; what the others hold counts as lost, and they are \
                 rewritten when they are back; start again without --force then"
            ),
            Self::RecordMinority => f.write_str(
                "DANGEROUS: by force a minority of the copies of the state record is taken as the \
                 truth; replicas that are not there count as lost, the others vote and are \
                 compared once in the background",
            ),
            Self::ForceNotNeeded => f.write_str(
                "--force was not needed: leave it out, or a start may one day serve a minority \
                 without asking",
            ),
            Self::FirstUseIgnored => f.write_str(
                "--adopt-from and --assume-clean are for images without a state record and change \
                 nothing here",
            ),
            Self::FirstUse { places, how } => write!(
                f,
                "the disk is served for the first time, its state record is made ({places}): {how}"
            ),
            Self::ReadOnlyWithoutRecord => f.write_str(
                "there is no state record, and none is made for a disk to which nothing is \
                 written: all replicas vote",
            ),
            Self::Copy { text } => f.write_str(text),
            Self::LastCopies { extents } => write!(
                f,
                "in {extents} extents only replicas that were changed hold what was written last: \
                 they vote there"
            ),
            Self::NoCopy { extents } => write!(
                f,
                "in {extents} extents every replica lacks what was written last: they give I/O \
                 errors until an operator names the replica to take them from (--force-current NAME)"
            ),
        }
    }
}

/// `'a', 'b' and 'c'`.
pub fn names_of(names: impl Iterator<Item = String>) -> String {
    let names: Vec<String> = names.map(|name| format!("'{name}'")).collect();
    match names.split_last() {
        None => "nobody".to_owned(),
        Some((last, [])) => last.clone(),
        Some((last, others)) => format!("{} and {last}", others.join(", ")),
    }
}
