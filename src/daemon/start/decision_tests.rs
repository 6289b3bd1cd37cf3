// SPDX-License-Identifier: Apache-2.0
//! What follows from what is found, case by case.

use super::*;

/// A file that was left like this and is found like this.
fn print(inode: u64) -> Fingerprint {
    Fingerprint {
        size_bytes: 1 << 20,
        mtime_ns: 1_000 + i128::from(inode),
        inode,
        device: 1,
    }
}

fn changed(inode: u64) -> Fingerprint {
    Fingerprint {
        mtime_ns: 1,
        ..print(inode)
    }
}

/// After a clean stop of three replicas, two of which must agree; all are there as they were left.
fn facts() -> Facts {
    let member = |inode| Remembered {
        state: MemberState::InSync,
        fingerprint: Some(print(inode)),
    };
    let candidate = |(name, inode): (&str, u64)| Candidate {
        name: name.to_owned(),
        found: Ok(print(inode)),
    };
    Facts {
        wanted: Wanted {
            threshold: 2,
            pattern: ReadPattern::Quorum,
            force: false,
            read_only: false,
        },
        past: Past {
            threshold: 2,
            pattern: ReadPattern::Quorum,
            clean: true,
            same_boot: true,
            dirty: 0,
            minority: false,
            members: [11, 12, 13].map(member).to_vec(),
        },
        replicas: [("a", 11), ("b", 12), ("c", 13)].map(candidate).to_vec(),
    }
}

fn unclean(facts: &mut Facts) {
    facts.past.clean = false;
    facts.past.dirty = 5;
    for (member, candidate) in facts.past.members.iter_mut().zip(&mut facts.replicas) {
        member.fingerprint = member
            .fingerprint
            .map(|kept| super::super::known::in_use(&kept));
        if let Ok(found) = &mut candidate.found {
            found.mtime_ns += 77;
        }
    }
}

fn lose(facts: &mut Facts, slots: &[usize]) {
    for &slot in slots {
        let name = &facts.replicas[slot].name;
        facts.replicas[slot].found = Err(format!("replica '{name}': cannot open"));
    }
}

fn find(facts: &mut Facts, found: [u64; 3]) {
    for (candidate, inode) in facts.replicas.iter_mut().zip(found) {
        candidate.found = Ok(print(inode));
    }
}

fn slots(set: ReplicaSet) -> Vec<usize> {
    set.iter().map(ReplicaId::index).collect()
}

/// What a decision comes to, in a line.
fn told(facts: &Facts) -> String {
    let decision = match decide(facts) {
        Ok(decision) => decision,
        Err(refused) => return format!("refused: {refused}"),
    };
    let mut words = vec![format!("T={}", decision.threshold)];
    for (name, set) in [
        ("absent", decision.absent),
        ("changed", decision.changed),
        ("lost", decision.written_off),
    ] {
        if !set.is_empty() {
            words.push(format!("{name}={:?}", slots(set)));
        }
    }
    for (name, flag) in [
        ("forced", decision.forced),
        ("resolve", decision.resolve),
        ("verify", decision.verify),
    ] {
        if flag {
            words.push(name.to_owned());
        }
    }
    words.join(" ")
}

type Case = (&'static str, fn(&mut Facts), &'static str);

#[test]
fn decision_for_every_kind_of_find() {
    let cases: &[Case] = &[
        ("clean", |_| {}, "T=2"),
        ("unclean", unclean, "T=2 resolve"),
        (
            "unclean, nothing dirty",
            |f| f.past.clean = false,
            "T=2 resolve",
        ),
        (
            "clean, but a page was lost",
            |f| f.past.dirty = 9,
            "T=2 resolve",
        ),
        ("missing", |f| lose(f, &[1]), "T=2 absent=[1]"),
        (
            "missing and unclean",
            |f| {
                unclean(f);
                lose(f, &[1]);
            },
            "T=2 absent=[1] resolve",
        ),
        (
            "changed",
            |f| f.replicas[1].found = Ok(changed(12)),
            "T=2 changed=[1]",
        ),
        (
            "two changed, by force: the one that is left decides",
            |f| {
                f.wanted.force = true;
                f.replicas[1].found = Ok(changed(12));
                f.replicas[2].found = Ok(changed(13));
            },
            "T=2 changed=[1, 2]",
        ),
        (
            "grown",
            |f| {
                let found = f.replicas[1].found.as_mut().unwrap();
                found.size_bytes *= 2;
            },
            "T=2 changed=[1]",
        ),
        (
            "another device number after a boot",
            |f| {
                let found = f.replicas[1].found.as_mut().unwrap();
                found.device = 77;
            },
            "T=2",
        ),
        (
            "another file, unclean",
            |f| {
                unclean(f);
                f.replicas[1].found = Ok(print(99));
            },
            "T=2 changed=[1] resolve",
        ),
        (
            "two changed, and a reader overwrites nothing",
            |f| {
                f.wanted.read_only = true;
                f.replicas[1].found = Ok(changed(12));
                f.replicas[2].found = Ok(changed(13));
            },
            "T=2 changed=[1, 2]",
        ),
        (
            "two replaced: blank disks do not outvote the one that is left",
            |f| find(f, [11, 22, 23]),
            "T=2 changed=[1, 2]",
        ),
        ("all changed", |f| find(f, [21, 22, 23]), "T=2 verify"),
        (
            "all changed, unclean",
            |f| {
                unclean(f);
                find(f, [21, 22, 23]);
            },
            "T=2 resolve verify",
        ),
        (
            "all that are there changed, by force",
            |f| {
                find(f, [21, 22, 23]);
                lose(f, &[2]);
                f.wanted.force = true;
            },
            "T=2 absent=[2] lost=[2] verify",
        ),
        (
            "minority by force",
            |f| {
                lose(f, &[0, 2]);
                f.wanted.force = true;
            },
            "T=1 absent=[0, 2] lost=[0, 2] forced",
        ),
        (
            "force without need",
            |f| {
                lose(f, &[0]);
                f.wanted.force = true;
            },
            "T=2 absent=[0]",
        ),
        (
            "minority of record copies by force",
            |f| {
                lose(f, &[0]);
                f.wanted.force = true;
                f.past.minority = true;
            },
            "T=2 absent=[0] lost=[0] verify",
        ),
        (
            "minority of record copies, which may not know of the last run",
            |f| {
                f.wanted.force = true;
                f.past.minority = true;
                f.replicas[0].found = Ok(changed(11));
                f.replicas[1].found = Ok(changed(12));
            },
            "T=2 verify",
        ),
        ("T changed", |f| f.wanted.threshold = 3, "T=3"),
        (
            "failed, though it is there",
            |f| f.past.members[1].state = MemberState::Failed,
            "T=2 absent=[1]",
        ),
        (
            "back after it was missing at the stop: the marks tell what it lacks",
            |f| f.past.members[1].state = MemberState::Missing,
            "T=2",
        ),
        (
            "back after it was kicked: nobody knows what it is",
            |f| {
                f.past.members[1].state = MemberState::Missing;
                f.past.members[1].fingerprint = None;
            },
            "T=2 changed=[1]",
        ),
        (
            "back after it was kicked in a run that ended badly, with the same inode",
            |f| {
                unclean(f);
                f.past.members[1].state = MemberState::Missing;
            },
            "T=2 changed=[1] resolve",
        ),
        (
            "back after it was missing all through a run that ended badly",
            |f| {
                unclean(f);
                f.past.members[1].state = MemberState::Missing;
                f.past.members[1].fingerprint = Some(print(12));
                f.replicas[1].found = Ok(print(12));
            },
            "T=2 resolve",
        ),
        (
            "the same, but written to meanwhile",
            |f| {
                unclean(f);
                f.past.members[1].state = MemberState::Missing;
                f.past.members[1].fingerprint = Some(print(12));
                f.replicas[1].found = Ok(changed(12));
            },
            "T=2 changed=[1] resolve",
        ),
        (
            "a new file with the inode of another replica that is where it was",
            |f| {
                unclean(f);
                f.replicas[1].found = Ok(print(13));
            },
            "T=2 changed=[1] resolve",
        ),
    ];
    for (name, change, expected) in cases {
        let mut facts = facts();
        change(&mut facts);
        assert_eq!(told(&facts), *expected, "{name}");
    }
}

#[test]
fn another_number_of_replicas_is_refused() {
    assert_eq!(check_count(3, 3), Ok(()));
    let said = check_count(3, 2).unwrap_err().to_string();
    let expected = "is of a disk of 3 replicas, and 2 are given: give the same replicas";
    assert!(said.contains(expected), "{said}");
}

#[test]
fn refusals_say_what_to_do() {
    let cases: &[Case] = &[
        (
            "too few",
            |f| lose(f, &[0, 2]),
            "only 1 of 3 replicas can be used, and 2 are needed: replica 'a': cannot open; replica \
             'c': cannot open. Bring back what is missing; or, if it is lost for good, start with \
             --force",
        ),
        (
            "none, also by force",
            |f| {
                lose(f, &[0, 1, 2]);
                f.wanted.force = true;
            },
            "only 0 of 3 replicas can be used",
        ),
        (
            "too few as one is failed",
            |f| {
                f.past.members[1].state = MemberState::Failed;
                lose(f, &[0]);
            },
            "replica 'b' is failed, and not used before it is cleared",
        ),
        (
            "two have changed places",
            |f| find(f, [11, 13, 12]),
            "('b' is number 2 and was 3, 'c' is number 3 and was 2), and the state record knows \
             them by their order: give them as a, c, b",
        ),
        (
            "all have changed places",
            |f| find(f, [12, 13, 11]),
            "give them as c, a, b",
        ),
        (
            "two have changed places, unclean",
            |f| {
                unclean(f);
                find(f, [11, 13, 12]);
            },
            "give them as a, c, b",
        ),
        (
            "one is in the place of one that is missing, unclean",
            |f| {
                unclean(f);
                find(f, [11, 13, 99]);
                lose(f, &[2]);
            },
            "'b' is number 2 and was 3",
        ),
        (
            "all that are there changed",
            |f| {
                find(f, [21, 22, 23]);
                lose(f, &[2]);
            },
            "and 'c' cannot be used: replica 'c': cannot open. Bring back",
        ),
        (
            "somebody wrote to two of three",
            |f| {
                f.replicas[1].found = Ok(changed(12));
                f.replicas[2].found = Ok(changed(13));
            },
            "somebody wrote to 'b' and 'c', and only 'a' is as the disk left it",
        ),
        (
            "nothing may be written",
            |f| {
                unclean(f);
                f.wanted.read_only = true;
            },
            "5 extents have to be made equal",
        ),
    ];
    for (name, change, expected) in cases {
        let mut facts = facts();
        change(&mut facts);
        let told = told(&facts);
        assert!(told.starts_with("refused: "), "{name}: {told}");
        assert!(told.contains(expected), "{name}: {told}");
    }
}

#[test]
fn operator_is_told_the_reason_and_the_cure() {
    let cases: &[Case] = &[
        ("clean", |_| {}, ""),
        (
            "unclean",
            unclean,
            "the last run did not stop cleanly (the daemon was killed or the guest was cut off): 5 \
             dirty extents are made equal",
        ),
        (
            "unclean after a power loss",
            |f| {
                unclean(f);
                f.past.same_boot = false;
            },
            "(the host was restarted since)",
        ),
        (
            "changed",
            |f| f.replicas[1].found = Ok(changed(12)),
            "replica 'b' changed while the disk was not served (its size or time of change \
             differs): it will be rewritten from the others",
        ),
        (
            "replaced",
            |f| f.replicas[1].found = Ok(print(99)),
            "replica 'b' is not the file or device that it was",
        ),
        (
            "majority changed, by force",
            |f| {
                f.wanted.force = true;
                f.replicas[0].found = Ok(changed(11));
                f.replicas[1].found = Ok(changed(12));
            },
            "what 'c' holds becomes the content of all",
        ),
        (
            "all changed",
            |f| find(f, [21, 22, 23]),
            "--adopt-from NAME",
        ),
        (
            "missing",
            |f| lose(f, &[1]),
            "replica 'b': cannot open; the disk is served without it",
        ),
        (
            "T changed",
            |f| f.wanted.threshold = 3,
            "3 replicas must agree from now on; it was 2",
        ),
        (
            "force without need",
            |f| f.wanted.force = true,
            "--force was not needed",
        ),
        (
            "minority by force",
            |f| {
                lose(f, &[0, 2]);
                f.wanted.force = true;
            },
            "served with 1 of 3 replicas, of which 1 must agree",
        ),
    ];
    for (name, change, expected) in cases {
        let mut facts = facts();
        change(&mut facts);
        let advice = decide(&facts).unwrap().advice;
        let told: Vec<String> = advice.iter().map(ToString::to_string).collect();
        let told = told.join("\n");
        assert_eq!(told.is_empty(), expected.is_empty(), "{name}: {told}");
        assert!(told.contains(expected), "{name}: {told}");
    }
}
