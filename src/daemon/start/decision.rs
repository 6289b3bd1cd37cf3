// SPDX-License-Identifier: Apache-2.0
//! What a start does with what it finds: who takes part, who lacks everything, what has to be
//! settled (rules S2 to S6, R7). A function of facts; whoever asks finds the facts and carries the
//! decision out.

use thiserror::Error;

use super::advice::{Advice, names_of};
use super::known::{Doubt, Remembered};
use crate::quorum::ReadPattern;
use crate::record::MemberState;
use crate::replica::Fingerprint;
use crate::units::{ReplicaId, ReplicaSet};

/// What is wanted, what is remembered and what is there.
#[derive(Clone, Debug)]
pub struct Facts {
    /// By the configuration.
    pub wanted: Wanted,
    /// By the record.
    pub past: Past,
    /// Now, by slot.
    pub replicas: Vec<Candidate>,
}

/// What the configuration says.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    /// T.
    pub threshold: usize,
    /// Who is asked on a read.
    pub pattern: ReadPattern,
    /// A minority is enough (rule S6).
    pub force: bool,
    /// Nothing may be written to a replica (rule Z4).
    pub read_only: bool,
}

/// What the record says.
#[derive(Clone, Debug)]
pub struct Past {
    /// T.
    pub threshold: usize,
    /// Who was asked on a read.
    pub pattern: ReadPattern,
    /// The last run ended cleanly (rule R8).
    pub clean: bool,
    /// The host was not restarted since the last run began.
    pub same_boot: bool,
    /// Extents that are dirty.
    pub dirty: u64,
    /// Fewer than a majority of the copies of the record could be read: it may be old.
    pub minority: bool,
    /// By slot, as many as there were replicas.
    pub members: Vec<Remembered>,
}

/// A configured replica.
#[derive(Clone, Debug)]
pub struct Candidate {
    /// Its name.
    pub name: String,
    /// Its fingerprint as it was found, or why it cannot be used, in a sentence that names it.
    pub found: Result<Fingerprint, String>,
}

/// What is to be done.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Decision {
    /// T of this run.
    pub threshold: usize,
    /// The disk is served by a minority (rule S6).
    pub forced: bool,
    /// Replicas that are not up.
    pub absent: ReplicaSet,
    /// Replicas that are up and behind everywhere where another copy is left (rule S3).
    pub changed: ReplicaSet,
    /// Those of them that are another file or device, or of which nothing is known: they are
    /// behind everywhere, whoever else has a copy. A blank disk in the place of the last good one
    /// must not become the content of all.
    pub replaced: ReplicaSet,
    /// Replicas that are behind everywhere, whoever else has a copy (rule S6).
    pub written_off: ReplicaSet,
    /// What is dirty is unresolved (rule S4).
    pub resolve: bool,
    /// All copies are to be compared from the first sector on (rule S5).
    pub verify: bool,
    /// For the operator.
    pub advice: Vec<Advice>,
}

impl Decision {
    /// Whether every replica is there and known to be the one that was left in its slot.
    #[must_use]
    pub fn is_as_left(&self) -> bool {
        let odd = [self.absent, self.changed, self.replaced, self.written_off];
        odd.iter().all(|replicas| replicas.is_empty()) && !self.verify
    }

    /// Of plain images, which are all there (rule S5).
    #[must_use]
    pub fn of_first_use(threshold: usize) -> Self {
        Self {
            threshold,
            forced: false,
            absent: ReplicaSet::EMPTY,
            changed: ReplicaSet::EMPTY,
            replaced: ReplicaSet::EMPTY,
            written_off: ReplicaSet::EMPTY,
            resolve: false,
            verify: false,
            advice: Vec::new(),
        }
    }
}

/// Why the disk is not served.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum Refused {
    /// N is another.
    #[error(
        "the state record is of a disk of {recorded} replicas, and {configured} are given: give \
         the same replicas in the same order as before. To make a disk of other replicas of what \
         one of them holds, remove the record ('quorum-blk record forget') and start with \
         --adopt-from NAME"
    )]
    Count {
        /// N of the record.
        recorded: usize,
        /// N of the configuration.
        configured: usize,
    },
    /// Replicas are in the wrong slots.
    #[error(
        "the replicas are in another order than when the disk was last served ({moves}), and the \
         state record knows them by their order: {cure}. If they were copied or restored since \
         and are where they belong, remove the record ('quorum-blk record forget')"
    )]
    Order {
        /// Who was where.
        moves: String,
        /// What to do.
        cure: String,
    },
    /// Nobody knows what the disk is.
    #[error(
        "every replica that is there was changed or replaced while the disk was not served, and \
         {missing} cannot be used: {why}. Bring back what is missing; or, if those that are there \
         hold what the disk is to be, start with --force, which rewrites all others"
    )]
    AllChanged {
        /// Who is missing.
        missing: String,
        /// Why.
        why: String,
    },
    /// Rule S3 would overwrite most of the replicas with the rest.
    #[error(
        "while the disk was not served somebody wrote to {changed}, and only {kept} is as the disk \
         left it, which is too few to agree. Put back what was there; or, if {kept} holds what \
         the disk is to be, start with --force, which rewrites the others; or, if the others do, \
         remove the record ('quorum-blk record forget'): then all of them vote"
    )]
    FewUnchanged {
        /// As it was left.
        kept: String,
        /// Not so.
        changed: String,
    },
    /// Fewer than T are up (rule S2).
    #[error(
        "only {up} of {replicas} replicas can be used, and {needed} are needed: {why}. Bring back \
         what is missing{}",
        if *up > 0 {
            "; or, if it is lost for good, start with --force, which serves what is left and \
             rewrites all others"
        } else {
            ""
        }
    )]
    TooFew {
        /// Those that can be used.
        up: usize,
        /// N.
        replicas: usize,
        /// T.
        needed: usize,
        /// What is wrong with the others.
        why: String,
    },
    /// Copies of the record lie beside other replicas than they were written beside.
    #[error(
        "the copies of the state record are not where they were written ({moves}). If the replicas \
         were given in another order than before, give them as before: the record knows them by \
         their order. If only files of the record were moved, move them back"
    )]
    Places {
        /// Which copy is where.
        moves: String,
    },
    /// Nothing can be settled where nothing may be written (rule Z4).
    #[error(
        "the disk did not stop cleanly, {dirty} extents have to be made equal on its replicas, \
         and nothing may be written to them: add --repair on, or serve it once without --read-only"
    )]
    ReadOnly {
        /// Extents that are dirty.
        dirty: u64,
    },
}

/// Whether the record is of as many replicas as are configured. To be asked before they are
/// opened.
///
/// # Errors
/// [`Refused::Count`].
pub fn check_count(recorded: usize, configured: usize) -> Result<(), Refused> {
    if recorded == configured {
        return Ok(());
    }
    Err(Refused::Count {
        recorded,
        configured,
    })
}

/// Decides.
///
/// # Errors
/// [`Refused`]: the disk is not to be served.
pub fn decide(facts: &Facts) -> Result<Decision, Refused> {
    let Facts {
        wanted,
        past,
        replicas,
    } = facts;
    assert_eq!(past.members.len(), replicas.len(), "counted before");
    let mut verdicts = Vec::with_capacity(replicas.len());
    for (candidate, member) in replicas.iter().zip(&past.members) {
        verdicts.push(Verdict::of(candidate, member, past.clean));
    }
    check_order(facts, &verdicts)?;

    let set = |wanted: fn(&Verdict) -> bool| -> ReplicaSet {
        let slots = (0..replicas.len()).map(ReplicaId::new);
        slots.filter(|r| wanted(&verdicts[r.index()])).collect()
    };
    let absent = set(|verdict| matches!(verdict, Verdict::Absent | Verdict::Failed));
    let mut decision = Decision {
        threshold: wanted.threshold,
        forced: false,
        absent,
        changed: set(|verdict| matches!(verdict, Verdict::Doubted(_))),
        replaced: set(|verdict| {
            matches!(verdict, Verdict::Doubted(Doubt::Replaced | Doubt::Unknown))
        }),
        written_off: ReplicaSet::EMPTY,
        resolve: !past.clean || past.dirty > 0,
        verify: false,
        advice: Vec::new(),
    };
    let up = ReplicaSet::first(replicas.len()).minus(absent);
    if up.is_empty() {
        return Err(too_few(facts, 0));
    }
    judge_origin(facts, &mut decision);
    judge_changes(facts, &verdicts, up, &mut decision)?;
    judge_number(facts, up, &mut decision)?;
    if decision.resolve && wanted.read_only && past.dirty > 0 {
        return Err(Refused::ReadOnly { dirty: past.dirty });
    }
    Ok(decision)
}

/// What a replica is, compared with what is remembered of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Verdict {
    /// As it was left.
    Same,
    /// Here, but what it holds does not follow from what is remembered.
    Doubted(Doubt),
    /// Not here.
    Absent,
    /// Out of use, whatever is there (CONSISTENCY section 10).
    Failed,
}

impl Verdict {
    fn of(candidate: &Candidate, member: &Remembered, clean: bool) -> Self {
        if matches!(member.state, MemberState::Failed | MemberState::Removed) {
            return Self::Failed;
        }
        match &candidate.found {
            Err(_) => Self::Absent,
            Ok(found) => match member.doubt(found, clean) {
                None => Self::Same,
                Some(doubt) => Self::Doubted(doubt),
            },
        }
    }
}

/// Replicas are known by their slots. One that is where another one was would be taken for it: its
/// old data would count as new.
fn check_order(facts: &Facts, verdicts: &[Verdict]) -> Result<(), Refused> {
    let Facts { past, replicas, .. } = facts;
    let mut order: Vec<usize> = (0..replicas.len()).collect();
    let mut moves = Vec::new();
    for (now, candidate) in replicas.iter().enumerate() {
        let (Verdict::Doubted(_), Ok(found)) = (verdicts[now], &candidate.found) else {
            continue;
        };
        // Whoever is where it was has not moved, however alike another one is.
        let away = |&slot: &usize| slot != now && verdicts[slot] != Verdict::Same;
        let was = (0..replicas.len()).filter(away).find(|&slot| {
            let present = replicas[slot].found.is_ok();
            past.members[slot].is_recognised_in(found, past.clean, present)
        });
        if let Some(was) = was {
            let name = &candidate.name;
            moves.push(format!(
                "'{name}' is number {} and was {}",
                now + 1,
                was + 1
            ));
            order[was] = now;
        }
    }
    if moves.is_empty() {
        return Ok(());
    }
    let mut seen = order.clone();
    seen.sort_unstable();
    seen.dedup();
    let cure = if seen.len() == order.len() {
        let order = order.iter().map(|&slot| replicas[slot].name.as_str());
        format!("give them as {}", order.collect::<Vec<_>>().join(", "))
    } else {
        "give them as before".to_owned()
    };
    Err(Refused::Order {
        moves: moves.join(", "),
        cure,
    })
}

/// How the last run ended, and what can be relied on of what it wrote down.
fn judge_origin(facts: &Facts, decision: &mut Decision) {
    let Facts { wanted, past, .. } = facts;
    if past.minority {
        // The copies that are lost may have known of later runs. Those that changed since the run
        // that is remembered may hold the newer data then: nobody is better than another.
        decision.written_off = decision.absent;
        decision.changed = ReplicaSet::EMPTY;
        decision.verify = true;
        decision.advice.push(Advice::RecordMinority);
    }
    if !past.clean {
        decision.advice.push(Advice::Unclean {
            dirty: past.dirty,
            same_boot: past.same_boot,
        });
    } else if past.dirty > 0 {
        decision
            .advice
            .push(Advice::DirtyAfterAll { dirty: past.dirty });
    }
    if past.pattern != wanted.pattern {
        decision.advice.push(Advice::PatternChanged);
    }
}

/// Rule S3.
fn judge_changes(
    facts: &Facts,
    verdicts: &[Verdict],
    up: ReplicaSet,
    decision: &mut Decision,
) -> Result<(), Refused> {
    let Facts {
        wanted, replicas, ..
    } = facts;
    let name = |replica: ReplicaId| replicas[replica.index()].name.clone();
    if decision.changed == up {
        if !decision.absent.is_empty() && !wanted.force {
            return Err(Refused::AllChanged {
                missing: names_of(decision.absent.iter().map(name)),
                why: reasons(facts),
            });
        }
        decision.changed = ReplicaSet::EMPTY;
        decision.replaced = ReplicaSet::EMPTY;
        decision.written_off = decision.absent;
        decision.verify = true;
        decision.advice.push(Advice::AllChanged);
    }
    for replica in decision.changed.iter() {
        if let Verdict::Doubted(doubt) = verdicts[replica.index()] {
            let name = name(replica);
            decision.advice.push(Advice::Changed { name, doubt });
        }
    }
    let kept = up.minus(decision.changed);
    if kept.count() < wanted.threshold && !decision.changed.is_empty() {
        let kept = names_of(kept.iter().map(name));
        let written_to =
            |&replica: &ReplicaId| verdicts[replica.index()] == Verdict::Doubted(Doubt::Changed);
        let changed: ReplicaSet = decision.changed.iter().filter(written_to).collect();
        // Nobody can say who is right: those few, or those that somebody has written to. What is
        // another file or unknown holds nothing of the disk, and a reader overwrites nothing.
        if !changed.is_empty() && !wanted.force && !wanted.read_only {
            let changed = names_of(changed.iter().map(name));
            return Err(Refused::FewUnchanged { kept, changed });
        }
        decision.advice.push(Advice::FewUnchanged { names: kept });
    }
    for replica in decision.absent.iter() {
        let name = name(replica);
        decision
            .advice
            .push(match &replicas[replica.index()].found {
                _ if verdicts[replica.index()] == Verdict::Failed => Advice::Failed { name },
                Err(why) => Advice::Absent { why: why.clone() },
                Ok(_) => continue,
            });
    }
    Ok(())
}

/// Rules S2, S6, R7.
fn judge_number(facts: &Facts, up: ReplicaSet, decision: &mut Decision) -> Result<(), Refused> {
    let Facts { wanted, past, .. } = facts;
    if up.count() >= wanted.threshold {
        if wanted.threshold != past.threshold {
            decision.advice.push(Advice::ThresholdChanged {
                from: past.threshold,
                to: wanted.threshold,
            });
        }
        let few = |advice: &Advice| matches!(advice, Advice::FewUnchanged { .. });
        let needed = !decision.written_off.is_empty() || decision.advice.iter().any(few);
        if wanted.force && !past.minority && !needed {
            decision.advice.push(Advice::ForceNotNeeded);
        }
        return Ok(());
    }
    if !wanted.force {
        return Err(too_few(facts, up.count()));
    }
    decision.forced = true;
    decision.threshold = up.count() / 2 + 1;
    decision.written_off = decision.absent;
    decision.advice.push(Advice::Forced {
        up: up.count(),
        replicas: facts.replicas.len(),
        threshold: decision.threshold,
    });
    Ok(())
}

fn too_few(facts: &Facts, up: usize) -> Refused {
    Refused::TooFew {
        up,
        replicas: facts.replicas.len(),
        needed: facts.wanted.threshold,
        why: reasons(facts),
    }
}

/// Why replicas cannot be used.
fn reasons(facts: &Facts) -> String {
    let replicas = facts.replicas.iter().zip(&facts.past.members);
    let reasons = replicas.filter_map(|(candidate, member)| {
        let failed = matches!(member.state, MemberState::Failed | MemberState::Removed);
        match &candidate.found {
            _ if failed => Some(format!(
                "replica '{}' is failed, and not used before it is cleared",
                candidate.name
            )),
            Err(why) => Some(why.clone()),
            Ok(_) => None,
        }
    });
    reasons.collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
#[path = "decision_tests.rs"]
mod tests;
