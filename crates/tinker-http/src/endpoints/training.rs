//! Forward, forward-backward and optimizer steps.

use std::sync::atomic::Ordering;

use reqwest::Method;
use tinker_types::{
    Datum, FORWARD_BACKWARD, ForwardBackwardRequest, OPTIM_STEP, OptimStepRequest, PROTOBUF,
    UntypedFuture, proto,
};

use crate::call::{Body, Call};
use crate::client::Client;
use crate::endpoints::json_pass;
use crate::error::{Error, ErrorKind, Result};
use crate::limits::BytePermit;
use crate::pools::TrafficClass;

/// Bodies above this size are encoded beside the runtime, not on it.
const LARGE_BODY: usize = 1 << 20;
/// Fast, and most of what can be gained: token ids compress well at any level.
const ZSTD_LEVEL: i32 = 1;

/// A forward-backward pass that is encoded and not yet sent. Holds its part of the byte budget.
#[derive(Debug)]
pub struct PreparedPass {
    body: Body,
    _permit: BytePermit,
}

impl Client {
    /// Submits a forward-backward pass, or a forward pass; its future brings a
    /// `ForwardBackwardOutput`. Waits while too many bytes are being sent already.
    ///
    /// Endpoint: `POST /api/v1/forward_backward`.
    ///
    /// # Errors
    /// If a chunk cannot be sent in protobuf, or the call fails.
    pub async fn forward_backward(&self, request: ForwardBackwardRequest) -> Result<UntypedFuture> {
        let (pass, ()) = self.prepare_forward_backward(request, |_| ()).await?;
        self.submit_forward_backward(pass).await
    }

    /// Encodes a pass, to be sent by [`submit_forward_backward`](Self::submit_forward_backward), and
    /// shows its bytes to `inspect`: before they are compressed, which is not the same for ever.
    /// Waits while too many bytes are being sent already.
    ///
    /// # Errors
    /// If a chunk cannot be sent in protobuf, or the server's settings cannot be fetched.
    pub async fn prepare_forward_backward<R: Send + 'static>(
        &self,
        request: ForwardBackwardRequest,
        inspect: impl FnOnce(&[u8]) -> R + Send + 'static,
    ) -> Result<(PreparedPass, R)> {
        let setup = self.setup().await?;
        let n_bytes = request
            .data
            .iter()
            .map(Datum::estimated_bytes)
            .sum::<usize>();
        let permit = setup.train_bytes.acquire(n_bytes as u64).await;
        let zstd = setup.config.proto_compress_fwdbwd;
        let (body, seen) = if n_bytes > LARGE_BODY {
            tokio::task::spawn_blocking(move || encode(&request, zstd, inspect))
                .await
                .map_err(|error| {
                    Error::new(ErrorKind::InvalidRequest, "encoding the request stopped")
                        .with_source(error)
                })??
        } else {
            encode(&request, zstd, inspect)?
        };
        let pass = PreparedPass {
            body,
            _permit: permit,
        };
        Ok((pass, seen))
    }

    /// Submits an encoded pass; its future brings a `ForwardBackwardOutput`. A server that takes no
    /// protobuf gets it in JSON.
    ///
    /// Endpoint: `POST /api/v1/forward_backward`; `POST /api/v1/forward` of such servers.
    ///
    /// # Errors
    /// If the call fails.
    pub async fn submit_forward_backward(&self, pass: PreparedPass) -> Result<UntypedFuture> {
        let takes_json_only = &self.setup().await?.takes_json_only;
        if !takes_json_only.load(Ordering::Relaxed) {
            let url = self.base_url().join(FORWARD_BACKWARD, []);
            let call = Call::new(self, Method::POST, TrafficClass::Train, url);
            match self.send(call.body(pass.body.clone())).await {
                Err(error) if json_pass::is_wanted(&error) => {
                    tracing::info!("the server takes no protobuf; passes are sent in JSON");
                    takes_json_only.store(true, Ordering::Relaxed);
                }
                answer => return answer?.json(),
            }
        }
        let (route, body) = json_pass::of(pass.body.clone()).await?;
        let url = self.base_url().join(route, []);
        let call = Call::new(self, Method::POST, TrafficClass::Train, url).body(body);
        self.send(call).await?.json()
    }

    /// Submits an optimizer step; its future brings an `OptimStepResponse`.
    ///
    /// Endpoint: `POST /api/v1/optim_step`.
    ///
    /// # Errors
    /// If the call fails.
    pub async fn optim_step(&self, request: &OptimStepRequest) -> Result<UntypedFuture> {
        let call = Call::post(self, TrafficClass::Train, OPTIM_STEP, request)?;
        self.send(call).await?.json()
    }
}

fn encode<R>(
    request: &ForwardBackwardRequest,
    zstd: bool,
    inspect: impl FnOnce(&[u8]) -> R,
) -> Result<(Body, R)> {
    let plain = proto::encode_forward_backward(request).map_err(|error| {
        Error::new(ErrorKind::InvalidRequest, "the request cannot be sent").with_source(error)
    })?;
    let seen = inspect(&plain);
    let bytes = if zstd {
        zstd::bulk::compress(&plain, ZSTD_LEVEL).map_err(|error| {
            Error::new(
                ErrorKind::InvalidRequest,
                "the request cannot be compressed",
            )
            .with_source(error)
        })?
    } else {
        plain
    };
    let body = Body {
        content_type: PROTOBUF,
        zstd,
        bytes: bytes.into(),
    };
    Ok((body, seen))
}

#[cfg(test)]
mod tests {
    use prost::Message;
    use tinker_types::{LossFn, ModelInput};

    use super::*;

    #[test]
    fn compressed_bodies_decode_to_the_same_request() {
        let datum = Datum::cross_entropy(
            ModelInput::from_tokens(vec![1, 2]),
            vec![2, 3],
            vec![1.0, 0.5],
        );
        let request = ForwardBackwardRequest {
            model_id: "S:train:0".parse().unwrap(),
            seq_id: 7,
            data: vec![datum.unwrap()],
            loss_fn: LossFn::CrossEntropy,
            loss_fn_config: [(
                "beta".to_owned(),
                tinker_types::LossConfigValue::Number(0.5),
            )]
            .into(),
            forward_only: false,
        };

        let (body, n_plain) = encode(&request, true, <[u8]>::len).unwrap();

        assert!(body.zstd && body.content_type == PROTOBUF);
        let plain = zstd::bulk::decompress(&body.bytes, 1 << 20).unwrap();
        let whole = proto::ForwardBackwardRequest::try_from(&request).unwrap();
        assert_eq!(plain, whole.encode_to_vec());
        assert_eq!(plain.len(), n_plain);
        let message = proto::ForwardBackwardRequest::decode(&plain[..]).unwrap();
        assert_eq!(ForwardBackwardRequest::try_from(&message).unwrap(), request);
    }
}
