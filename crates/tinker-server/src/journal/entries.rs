//! The index of a log: what its records say of each operation.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};
use tinker_types::RequestId;

use crate::clock::Millis;
use crate::operation::{Form, OpKind};
use crate::segment_log::Location;

#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "record", rename_all = "snake_case")]
pub(super) enum Header {
    Accepted {
        request_id: RequestId,
        kind: OpKind,
        seq: u64,
        /// BLAKE3 of the body, hexadecimal.
        hash: String,
        at: Millis,
        /// Copied from an older segment without its body.
        #[serde(default)]
        carried: bool,
    },
    Finished {
        request_id: RequestId,
        form: Form,
        at: Millis,
    },
}

#[derive(Debug)]
pub(super) struct Entry {
    pub(super) kind: OpKind,
    pub(super) seq: u64,
    pub(super) hash: String,
    pub(super) accepted: Location,
    pub(super) at: Millis,
    pub(super) carried: bool,
    pub(super) finished: Option<Finished>,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Finished {
    pub(super) form: Form,
    /// `None` if the disk refused the record; the operation is repeated after a crash.
    pub(super) location: Option<Location>,
    pub(super) at: Millis,
}

impl Entry {
    /// The older of the segments of request and result.
    pub(super) fn first_segment(&self) -> u64 {
        let result = self.finished.and_then(|f| f.location);
        result.map_or(self.accepted.segment, |l| {
            l.segment.min(self.accepted.segment)
        })
    }
}

pub(super) fn apply(entries: &mut HashMap<RequestId, Entry>, header: Header, location: Location) {
    match header {
        Header::Accepted {
            request_id,
            kind,
            seq,
            hash,
            at,
            carried,
        } => {
            // A copy whose result may not have followed it: the original is still there.
            if carried && entries.contains_key(&request_id) {
                return;
            }
            let entry = Entry {
                kind,
                seq,
                hash,
                accepted: location,
                at,
                carried,
                finished: None,
            };
            entries.insert(request_id, entry);
        }
        Header::Finished {
            request_id,
            form,
            at,
        } => {
            if let Some(entry) = entries.get_mut(&request_id) {
                entry.finished = Some(Finished {
                    form,
                    location: Some(location),
                    at,
                });
            }
        }
    }
}
