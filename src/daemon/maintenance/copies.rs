// SPDX-License-Identifier: Apache-2.0
//! Copies of the record that are left out and come back (rule R1): from the recorder's hands into
//! those of their wardens, and back.

use std::fs::File;
use std::sync::Arc;
use std::sync::mpsc::Sender;

use tracing::{debug, warn};

use super::super::copy_warden::{self, CopyBack, CopyOrder, CopyWardenSetup};
use super::super::worker::Message;
use super::{Maintenance, OpenRecord, RecordEvent};
use crate::device::mailbox::Mailbox;
use crate::io::RingError;
use crate::record::CopyStanding;

/// The wardens of the copies, and who has what.
#[derive(Default)]
pub(super) struct Copies {
    wardens: Vec<Sender<CopyOrder>>,
    /// The warden has the copy.
    away: Vec<bool>,
    /// It was said that what is in the place of the copy must not be used.
    told: Vec<bool>,
}

impl Copies {
    /// Starts a warden for each copy of `record`, which mails to `mailbox`.
    pub fn new(record: &OpenRecord, mailbox: &Arc<Mailbox<Message>>) -> std::io::Result<Self> {
        let mut copies = Self::default();
        let length_bytes = record.recorder.superblock().layout().length_bytes();
        for (path, copy) in record.paths.iter().zip(0..) {
            copies.wardens.push(copy_warden::spawn(CopyWardenSetup {
                copy,
                path: path.clone(),
                beside: record.beside,
                length_bytes,
                disk: record.recorder.superblock().disk,
                maintenance: Arc::clone(mailbox),
            })?);
            copies.away.push(false);
            copies.told.push(false);
        }
        Ok(copies)
    }

    /// Ends the wardens: what they have is closed.
    pub fn end(&mut self) {
        self.wardens.clear();
    }

    /// A warden is to bring the copy back. Closing its files may hang: it does that, too.
    fn hand_over(&mut self, copy: usize, files: Vec<File>) {
        self.away[copy] = true;
        // They end with this thread, or after it.
        if let Some(warden) = self.wardens.get(copy) {
            let _ = warden.send(CopyOrder::Bring(files));
        }
    }
}

impl Maintenance {
    /// What part the copies of the record play, in their order; none without a record.
    pub(super) fn standings(&self) -> Vec<CopyStanding> {
        let record = self.record.iter();
        record
            .flat_map(|record| record.recorder.standings())
            .collect()
    }

    /// Hands copies that are left out, and on which no write is under way any more, to their
    /// wardens.
    pub(super) fn move_copies(&mut self) -> Result<(), RingError> {
        if self.stop.is_begun() {
            return Ok(());
        }
        let Some(record) = &mut self.record else {
            return Ok(());
        };
        for (copy, standing) in record.recorder.standings().enumerate() {
            let idle = record.under_way[copy] == 0;
            if standing != CopyStanding::Out || record.copies.away[copy] || !idle {
                continue;
            }
            let written = record.writer.exchange(copy, None)?;
            let files = [written, record.files[copy].take()];
            record
                .copies
                .hand_over(copy, files.into_iter().flatten().collect());
        }
        Ok(())
    }

    /// A warden has brought a copy.
    pub(super) fn copy_back(&mut self, copy: u8, back: CopyBack) -> Result<(), RingError> {
        let Some(record) = &mut self.record else {
            return Ok(());
        };
        let place = usize::from(copy);
        let CopyBack { file, image } = back;
        let name = record.paths[place].display().to_string();
        if self.stop.is_begun() {
            record.copies.hand_over(place, vec![file]);
            return Ok(());
        }
        let second = file.try_clone().map_err(|error| error.to_string());
        let readmitted = second.and_then(|second| {
            let readmitted = record.recorder.readmit(copy, &name, &mut &image);
            readmitted.map_err(|error| error.to_string())?;
            Ok(second)
        });
        match readmitted {
            Ok(second) => {
                record.writer.exchange(place, Some(file))?;
                record.files[place] = Some(second);
                record.copies.away[place] = false;
                record.copies.told[place] = false;
                self.tell_recorder(RecordEvent::Poll);
            }
            Err(why) => {
                if std::mem::replace(&mut record.copies.told[place], true) {
                    debug!("a copy of the state record is not used: {why}");
                } else {
                    warn!("a copy of the state record is not used: {why}; it is tried again");
                }
                record.copies.hand_over(place, vec![file]);
            }
        }
        Ok(())
    }
}
