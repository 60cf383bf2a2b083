//! Losses that the server computes from a traced graph.

use tinker_http::RequestType;
use tinker_types::{
    CreateCustomLossRequest, CreateCustomLossTag, CustomLossGraph, CustomLossInput, LossConfig,
    LossConfigValue, LossFn,
};

use crate::error::{Error, Result};
use crate::loss::Loss;
use crate::resolve::resolve;
use crate::service_client::ServiceClient;

/// Setting by which a pass names an uploaded loss.
const LOSS_ID: &str = "loss_id";

/// A loss that a server has; it lives with the session. As a [`Loss`], it is what
/// [`forward_backward`](crate::TrainingClient::forward_backward) computes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LossHandle {
    /// The server's name of it.
    pub loss_id: String,
}

impl From<LossHandle> for Loss {
    fn from(handle: LossHandle) -> Self {
        Self {
            function: LossFn::Custom,
            config: LossConfig::from([(LOSS_ID.to_owned(), LossConfigValue::Text(handle.loss_id))]),
        }
    }
}

impl ServiceClient {
    /// Uploads a traced loss, of which `logprobs` is the first input. Alpha on the service's side,
    /// which also says which operations a graph may hold.
    ///
    /// Endpoint: `POST /api/v1/create_custom_loss`.
    ///
    /// # Errors
    /// [`Error::InvalidRequest`] if this server does not compute uploaded losses, or the first input
    /// is not `logprobs`; [`Error::RequestFailed`] if the server does not take the graph.
    pub async fn create_custom_loss(
        &self,
        name: impl Into<String>,
        inputs: Vec<CustomLossInput>,
        graph: CustomLossGraph,
    ) -> Result<LossHandle> {
        check(&inputs)?;
        let session = self.session().await?;
        if !session.config.custom_loss_server_side {
            return Err(Error::InvalidRequest(
                "this server does not compute uploaded losses: compute it here with \
                 forward_backward_custom"
                    .into(),
            ));
        }
        let request = CreateCustomLossRequest {
            session_id: session.id.clone(),
            custom_loss_seq_id: session.next_loss(),
            name: name.into(),
            inputs,
            graph,
            tag: CreateCustomLossTag,
        };
        let future = session.http.create_custom_loss(&request).await?;
        let id = &future.request_id;
        let resolved = session.http.retrieve_create_custom_loss(id, None).await?;
        let created = resolve(RequestType::CreateCustomLoss, id, resolved)?;
        Ok(LossHandle {
            loss_id: created.loss_id,
        })
    }
}

fn check(inputs: &[CustomLossInput]) -> Result<()> {
    let fault = |text: String| Err(Error::InvalidRequest(text));
    match inputs {
        [first, ..] if first.name == "logprobs" && first.rank == 0 => {
            fault("input logprobs is a number: it must have rank 1 or 2".into())
        }
        [first, rest @ ..] if first.name == "logprobs" => {
            match rest.iter().find(|input| input.rank > 2) {
                Some(input) => fault(format!(
                    "input {} has rank {}: it must be 0, 1 or 2",
                    input.name, input.rank
                )),
                None => Ok(()),
            }
        }
        _ => fault("the first input of a loss must be logprobs".into()),
    }
}
