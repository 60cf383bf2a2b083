//! Uploading a traced loss, to be computed by the server.

use serde::{Deserialize, Serialize};

use crate::SessionId;
use crate::tags::type_tag;

type_tag!(CreateCustomLossTag, "create_custom_loss");

/// Request of `POST /api/v1/create_custom_loss`; answered by a future of
/// [`CreateCustomLossResponse`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CreateCustomLossRequest {
    /// Owner.
    pub session_id: SessionId,
    /// Number of the loss within the session, from 0.
    pub custom_loss_seq_id: u64,
    /// Its name, for people.
    pub name: String,
    /// What it reads, in the order of its parameters; the first one is `logprobs`.
    pub inputs: Vec<CustomLossInput>,
    /// What it computes.
    pub graph: CustomLossGraph,
    /// Literal tag.
    #[serde(rename = "type", default)]
    pub tag: CreateCustomLossTag,
}

/// A parameter of a loss.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CustomLossInput {
    /// The loss input that it is bound to.
    pub name: String,
    /// 0 for a number, 1 for `[tokens]`, 2 for `[tokens, k]`.
    pub rank: u8,
}

/// A traced computation: its operations in order.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CustomLossGraph {
    /// Version of the format: 1.
    pub format: u32,
    /// The operations.
    pub nodes: Vec<CustomLossNode>,
}

/// An operation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CustomLossNode {
    /// `placeholder`, `get_attr`, `call_function`, `call_method`, `call_module` or `output`.
    pub op: String,
    /// What other operations refer to it by.
    pub name: String,
    /// What is called, such as `torch.exp`.
    pub target: String,
    /// Its arguments. `{"ref": NAME}` is another operation's result; plain JSON is itself.
    #[serde(default)]
    pub args: Vec<serde_json::Value>,
    /// Its arguments by name.
    #[serde(default)]
    pub kwargs: serde_json::Map<String, serde_json::Value>,
}

/// Result of [`CreateCustomLossRequest`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CreateCustomLossResponse {
    /// What `loss_fn_config` names it by, as `loss_id`.
    pub loss_id: String,
    /// Literal tag.
    #[serde(rename = "type", default)]
    pub tag: CreateCustomLossTag,
}
