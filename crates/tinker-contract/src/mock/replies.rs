//! Answers that a script is made of.

use prost::Message;
use serde_json::{Value, json};
use tinker_types::PROTOBUF;
use wiremock::ResponseTemplate;

/// One answer of a script.
#[derive(Debug, Clone)]
pub enum Reply {
    /// An HTTP answer.
    Template(Box<ResponseTemplate>),
    /// No answer: the connection breaks after the request was read. Works in scripts only.
    LostConnection,
}

impl Reply {
    /// The answer with another header.
    #[must_use]
    pub fn header(self, name: &'static str, value: &str) -> Self {
        self.map(|template| template.insert_header(name, value))
    }

    /// Changes the answer, if it is one.
    #[must_use]
    pub fn map(self, change: impl FnOnce(ResponseTemplate) -> ResponseTemplate) -> Self {
        match self {
            Self::Template(template) => Self::from(change(*template)),
            Self::LostConnection => self,
        }
    }
}

impl From<ResponseTemplate> for Reply {
    fn from(template: ResponseTemplate) -> Self {
        Self::Template(Box::new(template))
    }
}

/// A JSON body.
#[must_use]
pub fn json(status: u16, body: &Value) -> Reply {
    ResponseTemplate::new(status).set_body_json(body).into()
}

/// A protobuf body with status 200.
#[must_use]
pub fn proto(message: &impl Message) -> Reply {
    ResponseTemplate::new(200)
        .set_body_raw(message.encode_to_vec(), PROTOBUF)
        .into()
}

/// A refusal with a reason.
#[must_use]
pub fn refusal(status: u16, detail: &str) -> Reply {
    json(status, &json!({ "detail": detail }))
}

/// An answer without a body.
#[must_use]
pub fn empty(status: u16) -> Reply {
    ResponseTemplate::new(status).into()
}

/// "Not yet", with what else the body says.
#[must_use]
pub fn try_again(status: u16, mut more: Value) -> Reply {
    more["type"] = json!("try_again");
    json(status, &more)
}

/// "Ready, and this large".
#[must_use]
pub fn metadata_only(request_id: &str, size: u64) -> Reply {
    json(
        200,
        &json!({
            "status": "complete_metadata", "request_id": request_id, "response_payload_size": size,
        }),
    )
}

/// The result of a failed operation.
#[must_use]
pub fn failed(error: &str, category: &str) -> Reply {
    json(200, &json!({ "error": error, "category": category }))
}

/// The connection breaks after the request was read.
#[must_use]
pub const fn lost_connection() -> Reply {
    Reply::LostConnection
}
