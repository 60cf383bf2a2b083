//! A training run's weights for use outside the service, and other weights into a run.

use tinker_http::RequestType;
use tinker_types::{
    CheckpointKind, LoadWeightsRequest, LoadWeightsTag, SaveWeightsExternalRequest,
    SaveWeightsExternalTag, TinkerPath,
};

use crate::api_future::ApiFuture;
use crate::error::{Error, Result};
use crate::options::{ExportOptions, checkpoint_name, seconds_to_live};
use crate::training_client::TrainingClient;

/// Most recipients of an encrypted export.
const MAX_RECIPIENTS: usize = 10;

impl TrainingClient {
    /// Saves weights as files for use outside the service:
    /// `tinker://<run>/external_weights/<name>`. See
    /// [`RestClient::get_external_weights_urls`](crate::RestClient::get_external_weights_urls) for
    /// where to read them.
    ///
    /// Endpoint: `POST /api/v1/save_weights_external`.
    ///
    /// # Errors
    /// [`Error::InvalidRequest`] if the name, the time to live or a recipient is malformed;
    /// [`Error::RequestFailed`] if the server cannot save them.
    pub fn save_weights_external(
        &self,
        name: impl AsRef<str>,
        options: ExportOptions,
    ) -> ApiFuture<TinkerPath> {
        let operation = RequestType::SaveWeightsExternal;
        let request = match self.export_request(name.as_ref(), options) {
            Ok(request) => request,
            Err(error) => return ApiFuture::refused(operation, error),
        };
        self.operate(
            operation,
            move |seq_id| SaveWeightsExternalRequest { seq_id, ..request },
            |http, request| async move { http.save_weights_external(&request).await },
            |http, id, took| async move { http.retrieve_save_weights_external(&id, took).await },
            |saved| {
                saved.path.ok_or_else(|| {
                    Error::Protocol("the server exported weights and did not say where".into())
                })
            },
        )
    }

    fn export_request(
        &self,
        name: &str,
        options: ExportOptions,
    ) -> Result<SaveWeightsExternalRequest> {
        let recipients = options.age_encryption_recipients;
        check_recipients(&recipients)?;
        Ok(SaveWeightsExternalRequest {
            model_id: self.training_run_id().clone(),
            path: checkpoint_name(CheckpointKind::External, name)?,
            seq_id: 0,
            ttl_seconds: seconds_to_live(options.ttl)?,
            age_encryption_recipients: (!recipients.is_empty()).then_some(recipients),
            tag: SaveWeightsExternalTag,
        })
    }

    /// Replaces the weights of this run by those of a training checkpoint, with a new optimizer.
    /// `weights_access_token` is a permission to read somebody else's.
    ///
    /// The official SDK discourages it, and some servers take it as a run's first operation only:
    /// [`create_training_client_from_state`](crate::ServiceClient::create_training_client_from_state)
    /// makes a new run instead.
    ///
    /// Endpoint: `POST /api/v1/load_weights`.
    ///
    /// # Errors
    /// If the path is not of a training checkpoint; [`Error::RequestFailed`] if the server cannot
    /// load it.
    pub fn load_state(
        &self,
        path: &TinkerPath,
        weights_access_token: Option<String>,
    ) -> ApiFuture<()> {
        self.load(path, weights_access_token, false)
    }

    /// As [`load_state`](Self::load_state), with the state of the optimizer.
    ///
    /// Endpoint: `POST /api/v1/load_weights`.
    ///
    /// # Errors
    /// As [`load_state`](Self::load_state).
    pub fn load_state_with_optimizer(
        &self,
        path: &TinkerPath,
        weights_access_token: Option<String>,
    ) -> ApiFuture<()> {
        self.load(path, weights_access_token, true)
    }

    fn load(&self, path: &TinkerPath, token: Option<String>, optimizer: bool) -> ApiFuture<()> {
        let operation = RequestType::LoadWeights;
        if let Err(error) = Error::check_kind(path, CheckpointKind::Training) {
            return ApiFuture::refused(operation, error);
        }
        let request = LoadWeightsRequest {
            session_id: None,
            model_seq_id: None,
            model_id: Some(self.training_run_id().clone()),
            seq_id: None,
            base_model: None,
            user_metadata: None,
            optimizer_config: None,
            path: path.clone(),
            optimizer,
            weights_access_token: token,
            tag: LoadWeightsTag,
        };
        self.operate(
            operation,
            move |seq_id| LoadWeightsRequest {
                seq_id: Some(seq_id),
                ..request
            },
            |http, request| async move { http.load_weights(&request).await },
            |http, id, took| async move { http.retrieve_load_weights(&id, took).await },
            |_| Ok(()),
        )
    }

    /// The page of this run in the hosted service's console.
    #[must_use]
    pub fn get_console_url(&self) -> String {
        crate::console::training_run_url(self.training_run_id())
    }
}

fn check_recipients(recipients: &[String]) -> Result<()> {
    if recipients.len() > MAX_RECIPIENTS {
        return Err(Error::InvalidRequest(format!(
            "{} age recipients: at most {MAX_RECIPIENTS} are possible",
            recipients.len()
        )));
    }
    let is_known = |text: &&String| text.starts_with("age1") || text.starts_with("ssh-");
    match recipients.iter().find(|text| !is_known(text)) {
        None => Ok(()),
        // What was given by mistake may be a private key.
        Some(_) => Err(Error::InvalidRequest(
            "an age recipient must start with age1, or be an SSH public key".into(),
        )),
    }
}
