//! The uploaded losses of all sessions, one file each.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use tinker_types::{CreateCustomLossRequest, SessionId};

use super::Program;
use crate::core::lock;
use crate::disk::{Disk, create_dir, read_file};
use crate::error::{Error, Result};
use crate::names::safe_id;

/// Most losses of a session; a program traces a few.
const MAX_LOSSES: u64 = 1000;
/// Checked losses that are kept in memory.
const MAX_KNOWN: usize = 64;

/// Where uploaded losses are kept: a run may need one again as long as it lives.
#[derive(Debug)]
pub(crate) struct CustomLosses {
    dir: PathBuf,
    disk: Arc<dyn Disk>,
    known: Mutex<HashMap<String, Arc<Program>>>,
    /// Held while a loss is written: of two requests for one number, the first stays.
    writing: Mutex<()>,
}

/// The name of a session's loss.
pub(crate) fn loss_id(session: &SessionId, number: u64) -> String {
    format!("{}{number}", prefix(session))
}

fn prefix(session: &SessionId) -> String {
    format!("{session}:loss:")
}

impl CustomLosses {
    pub(crate) fn new(dir: PathBuf, disk: Arc<dyn Disk>) -> Self {
        Self {
            dir,
            disk,
            known: Mutex::default(),
            writing: Mutex::default(),
        }
    }

    /// Checks a loss and keeps it if `room` has room for its bytes; the same request again changes
    /// nothing.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming what is not understood, [`Error::Conflict`] if the number stands for
    /// another loss, or `room` or the disk refuses.
    pub(crate) fn create(
        &self,
        request: &CreateCustomLossRequest,
        room: impl FnOnce(u64) -> Result<()>,
    ) -> Result<String> {
        let number = request.custom_loss_seq_id;
        if number >= MAX_LOSSES {
            return Err(Error::Invalid(format!(
                "custom_loss_seq_id {number} is too large: a session may have {MAX_LOSSES} losses"
            )));
        }
        let id = loss_id(&request.session_id, number);
        let program = parse(request)?;
        let _writing = lock(&self.writing);
        match self.read(&id)? {
            Some(known) if known == *request => {}
            Some(_) => {
                return Err(Error::Conflict(format!(
                    "custom loss {number} of session {} was created with another graph: a number stands for one loss",
                    request.session_id
                )));
            }
            None => self.write(&id, request, room)?,
        }
        self.remember(id.clone(), program);
        Ok(id)
    }

    /// A loss of a session.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the session has none of this name, or the disk refuses.
    pub(crate) fn get(&self, session: &SessionId, id: &str) -> Result<Arc<Program>> {
        let unknown = || {
            Error::Invalid(format!(
                "custom loss {id:?} is unknown to session {session}: create_custom_loss makes one"
            ))
        };
        if !id.starts_with(&prefix(session)) {
            return Err(unknown());
        }
        if let Some(program) = lock(&self.known).get(id) {
            return Ok(Arc::clone(program));
        }
        let request = self.read(id)?.ok_or_else(unknown)?;
        let program = parse(&request)?;
        self.remember(id.to_owned(), Arc::clone(&program));
        Ok(program)
    }

    fn remember(&self, id: String, program: Arc<Program>) {
        let mut known = lock(&self.known);
        if known.len() >= MAX_KNOWN {
            known.clear();
        }
        known.insert(id, program);
    }

    fn path(&self, id: &str) -> PathBuf {
        self.dir.join(format!("{}.json", safe_id(id)))
    }

    fn read(&self, id: &str) -> Result<Option<CreateCustomLossRequest>> {
        let path = self.path(id);
        let bytes = match read_file(self.disk.as_ref(), &path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::io("read", &path, error)),
        };
        let parsed = serde_json::from_slice(&bytes);
        parsed.map(Some).map_err(|error| Error::Corrupt {
            path,
            message: error.to_string(),
        })
    }

    fn write(
        &self,
        id: &str,
        request: &CreateCustomLossRequest,
        room: impl FnOnce(u64) -> Result<()>,
    ) -> Result<()> {
        let path = self.path(id);
        let bytes = serde_json::to_vec(request).map_err(|e| Error::Invalid(e.to_string()))?;
        room(bytes.len() as u64)?;
        create_dir(self.disk.as_ref(), &self.dir)?;
        let temp = self.dir.join(format!("{}.tmp", uuid::Uuid::now_v7()));
        let written = self.disk.write_new(&temp, &bytes);
        let placed = written.and_then(|()| self.disk.rename(&temp, &path));
        if placed.is_err() {
            // The write error is the one to report.
            let _ = std::fs::remove_file(&temp);
        }
        placed.map_err(|error| Error::io("write", &path, error))
    }
}

fn parse(request: &CreateCustomLossRequest) -> Result<Arc<Program>> {
    let parsed = Program::parse(request);
    parsed
        .map(Arc::new)
        .map_err(|why| Error::Invalid(format!("loss {}: {why}", request.name)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::OsDisk;

    fn request(number: u64, function: &str) -> CreateCustomLossRequest {
        let json = serde_json::json!({
            "session_id": "s", "custom_loss_seq_id": number, "name": "f",
            "inputs": [{"name": "logprobs", "rank": 1}],
            "graph": {"format": 1, "nodes": [
                {"op": "placeholder", "name": "logprobs", "target": "logprobs"},
                {"op": "call_function", "name": "x", "target": function, "args": [{"ref": "logprobs"}]},
                {"op": "output", "name": "output", "target": "output",
                 "args": [{"tuple": [{"ref": "x"}, {"dict": {}}]}]}]}
        });
        serde_json::from_value(json).unwrap()
    }

    fn fits(_: u64) -> Result<()> {
        Ok(())
    }

    #[test]
    fn a_loss_outlives_the_process_and_belongs_to_its_session() {
        let home = tempfile::tempdir().unwrap();
        let store = || CustomLosses::new(home.path().join("losses"), Arc::new(OsDisk));
        let session: SessionId = "s".parse().unwrap();
        let id = store().create(&request(3, "torch.sum"), fits).unwrap();

        let again = store();

        assert_eq!(id, "s:loss:3");
        assert_eq!(again.get(&session, &id).unwrap().name(), "f");
        assert_eq!(again.create(&request(3, "torch.sum"), fits).unwrap(), id);
        let error = again.get(&"t".parse().unwrap(), &id).unwrap_err();
        assert_eq!(
            error.to_string(),
            "custom loss \"s:loss:3\" is unknown to session t: create_custom_loss makes one"
        );
        assert!(again.get(&session, "s:loss:4").is_err());
        assert!(again.get(&session, "s:loss:../3").is_err());
    }

    #[test]
    fn a_number_stands_for_one_loss() {
        let home = tempfile::tempdir().unwrap();
        let store = CustomLosses::new(home.path().join("losses"), Arc::new(OsDisk));
        store.create(&request(0, "torch.sum"), fits).unwrap();

        let error = store.create(&request(0, "torch.mean"), fits).unwrap_err();

        assert!(matches!(error, Error::Conflict(_)), "{error}");
        let unknown = store.create(&request(1, "torch.load"), fits).unwrap_err();
        let text = unknown.to_string();
        assert!(
            text.starts_with("loss f: node x (torch.load): this function is not among"),
            "{text}"
        );
        assert!(store.create(&request(1000, "torch.sum"), fits).is_err());
    }
}
