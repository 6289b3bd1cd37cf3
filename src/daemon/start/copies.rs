// SPDX-License-Identifier: Apache-2.0
//! The copies of the record at a start: which of them are written from now on.

use super::advice::Advice;
use super::decision::Refused;
use crate::daemon::record_files::{RecordFiles, has_replica};
use crate::record::{CopyState, Note, Opened};

/// Makes copies that are missing or empty anew, and says of each whether it can be written. Nothing
/// that holds anything but a copy of this record is touched: it is somebody's.
///
/// With `beside` the copies are beside replicas. There none is made where the replica is missing:
/// its file system may not be mounted.
pub fn prepare(files: &mut RecordFiles, opened: &Opened, beside: bool) -> (Vec<bool>, Vec<Advice>) {
    let length_bytes = opened.superblock.layout().length_bytes();
    let mut writable = Vec::with_capacity(files.files().len());
    let mut advice: Vec<Advice> = opened.notes.iter().filter_map(of_note).collect();
    for copy in 0..files.files().len() {
        let name = files.files()[copy].path().display().to_string();
        // One that was absent when the disk became longer is written whole now.
        if *opened.state(copy) == CopyState::Stale
            && let Err(error) = files.lengthen(copy, length_bytes)
        {
            let text = error.to_string();
            advice.push(Advice::Copy { text });
        }
        let file = &files.files()[copy];
        let whole = file.length_bytes() >= Some(length_bytes);
        let usable = match opened.state(copy) {
            CopyState::Current | CopyState::Stale if file.read_only().is_some() => {
                let why = file.read_only().unwrap_or_default();
                let text = format!(
                    "{name} of the state record can be read and not written ({why}): what it says \
                     counts, and the record is kept without it until it can"
                );
                advice.push(Advice::Copy { text });
                false
            }
            CopyState::Current | CopyState::Stale if whole => true,
            CopyState::Current | CopyState::Stale => {
                let text = format!(
                    "{name} of the state record is shorter than it was made, and the record is \
                     kept without it: remove it, and it is made anew"
                );
                advice.push(Advice::Copy { text });
                false
            }
            CopyState::Missing if beside && !has_replica(files.files()[copy].path()) => {
                let text = format!("{name} of the state record is missing, as its replica is");
                advice.push(Advice::Copy { text });
                false
            }
            CopyState::Blank | CopyState::Missing => match files.create(copy, length_bytes) {
                Ok(()) => {
                    let text = format!("{name} of the state record was missing: it is made anew");
                    advice.push(Advice::Copy { text });
                    true
                }
                Err(error) => {
                    let cause = std::error::Error::source(&error);
                    let cause = cause.map_or(String::new(), |cause| format!(" ({cause})"));
                    let text = format!("{error}{cause}; the record is kept without it");
                    advice.push(Advice::Copy { text });
                    false
                }
            },
            CopyState::Unreadable(_) => false,
        };
        writable.push(usable);
    }
    for path in files.elsewhere() {
        let text = format!(
            "{} is a copy of a state record in a place where none is kept now, left from when the \
             replicas had another order or number; remove it",
            path.display()
        );
        advice.push(Advice::Copy { text });
    }
    (writable, advice)
}

/// Whether each copy that counts is the one that belongs in its place. Where the copies are beside
/// replicas, or have their names, a copy in the place of another one shows that replicas were given
/// in another order, also when all of them have changed since and nothing else tells.
///
/// # Errors
/// [`Refused::Places`].
pub fn check_places(files: &RecordFiles, opened: &Opened) -> Result<(), Refused> {
    let counts = |copy: &usize| *opened.state(*copy) == CopyState::Current;
    let moved = (0..files.files().len()).filter(counts).filter_map(|place| {
        let index = opened.index(place);
        (index != place).then(|| {
            let path = files.files()[place].path().display();
            format!("{path} is number {} and was {}", place + 1, index + 1)
        })
    });
    let moves = moved.collect::<Vec<_>>().join(", ");
    if moves.is_empty() {
        Ok(())
    } else {
        Err(Refused::Places { moves })
    }
}

fn of_note(note: &Note) -> Option<Advice> {
    let text = match note {
        Note::NotUsed { copy, state } => match state {
            CopyState::Stale => format!(
                "{copy} of the state record is old and is brought up to date from the others"
            ),
            // Told when it is known what is done about it.
            CopyState::Blank | CopyState::Missing | CopyState::Current => return None,
            CopyState::Unreadable(why) => format!(
                "{copy} of the state record cannot be used ({why}), and the record is kept without \
                 it until it can; if it is damaged and nothing else is in it, remove it, and it is \
                 made anew"
            ),
        },
        Note::PageLost(name) => format!(
            "page {} of map {} of the state record is lost: all that it speaks of counts as \
             marked, and is compared and rewritten",
            name.page,
            name.bitmap.number()
        ),
        Note::DamagedSlots { copy, count } => format!(
            "{copy} of the state record has {count} damaged blocks, which are written anew; after \
             a power loss that is nothing to worry about"
        ),
    };
    Some(Advice::Copy { text })
}
