//! Text in, text out: what the OpenAI- and Anthropic-compatible endpoints have in common.
//!
//! A request of theirs becomes a sample of a hidden session, so it takes the same way through log,
//! scheduler and engine as any other, and is watched while it is drawn.

pub(crate) mod chat;
pub(crate) mod reply;
pub(crate) mod split;
pub(crate) mod text;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use prost::Message as _;
use tinker_chat::{Renderer, RendererName, Tokenizer, renderer};
use tinker_types::{
    CheckpointKind, CreateSessionRequest, FailedFuture, ModelInput, RequestId, SampleRequest,
    SampleResponse, SamplingParams, SamplingSessionId, SessionId, Stop, StopReason, TinkerPath,
    proto,
};
use tokio::sync::{Notify, mpsc};

use crate::api_error::{ApiError, ApiResult};
use crate::app::App;
use crate::catalog::Sampler;
use crate::clock::now;
use crate::core::lock;
use crate::engine::Command;
use crate::error::Error;
use crate::future_store::Lookup;
use crate::operation::{Form, sample_request_id};
use crate::watchers::NewTokens;

/// What finds the hidden session again.
const SESSION_KEY: &str = "compatible inference";

/// Tokenizers in use, by model directory.
#[derive(Debug, Default)]
pub(crate) struct Tokenizers(Mutex<HashMap<PathBuf, Arc<Tokenizer>>>);

/// A model as a request names it, ready to be sampled from.
#[derive(Debug, Clone)]
pub(crate) struct Model {
    /// The name that was asked for, which answers repeat.
    pub(crate) name: String,
    pub(crate) sampler: SamplingSessionId,
    pub(crate) tokenizer: Arc<Tokenizer>,
    base_model: String,
}

impl Model {
    /// The chat format of the model.
    ///
    /// # Errors
    /// 400 if it has none that this program knows.
    pub(crate) fn renderer(&self) -> ApiResult<Arc<dyn Renderer>> {
        let name = RendererName::recommended(&self.base_model, &self.tokenizer);
        let Some(name) = name else {
            return Err(ApiError::bad_request(format!(
                "model {:?} has a chat template that cannot be used: send text completions",
                self.name
            )));
        };
        renderer(name, Arc::clone(&self.tokenizer))
            .map_err(|e| ApiError::bad_request(e.to_string()))
    }
}

/// How to continue a prompt.
#[derive(Debug, Clone)]
pub(crate) struct Ask {
    pub(crate) prompt: Vec<u32>,
    pub(crate) n: u32,
    /// `None`: as many as the context has room for.
    pub(crate) max_tokens: Option<u32>,
    pub(crate) temperature: f64,
    pub(crate) top_p: f64,
    pub(crate) top_k: i64,
    pub(crate) seed: Option<i64>,
    pub(crate) stops: Vec<String>,
    /// Most likely tokens to return for each one that is drawn.
    pub(crate) n_top: u32,
}

impl App {
    /// Finds a model by the names of the compatible endpoints: `BASE`, `BASE:peft:CONTEXT`,
    /// `tinker://RUN/sampler_weights/NAME`, or `BASE;tinker://…`.
    ///
    /// # Errors
    /// 404 with a list of what there is.
    pub(crate) fn inference_model(&self, name: &str) -> ApiResult<Model> {
        let path = name.split_once(';').map_or(name, |(_, path)| path);
        let (base_name, path) = if path.starts_with("tinker://") {
            let path: TinkerPath = path
                .parse()
                .map_err(|e: tinker_types::TypeError| ApiError::bad_request(e.to_string()))?;
            let found = self
                .core
                .catalog
                .checkpoint(&path, CheckpointKind::Sampler)?;
            (found.base_model, Some(path))
        } else {
            let base = path.split_once(":peft:").map_or(path, |(base, _)| base);
            (base.to_owned(), None)
        };
        let base = self.core.models.resolve(&base_name)?;
        let tokenizer = self.tokenizers.of(&base.dir).map_err(|error| {
            ApiError::bad_request(format!("model {name:?} has no usable tokenizer: {error}"))
        })?;
        Ok(Model {
            name: name.to_owned(),
            sampler: self.inference_sampler(&base.name, path)?,
            tokenizer,
            base_model: base.name,
        })
    }

    /// The sampler of the hidden session for some weights, made on first use.
    pub(crate) fn inference_sampler(
        &self,
        base_model: &str,
        model_path: Option<TinkerPath>,
    ) -> ApiResult<SamplingSessionId> {
        let catalog = &self.core.catalog;
        let _entering = lock(&self.entering);
        let session = self.inference_session()?;
        let (_, samplers) = catalog.of_session(&session);
        for id in &samplers {
            let known = catalog.sampler(id)?;
            if known.base_model == base_model && known.model_path == model_path {
                return Ok(known.id);
            }
        }
        let id = SamplingSessionId::of_session(&session, samplers.len() as u64);
        catalog.put_sampler(Sampler {
            id: id.clone(),
            session_id: session,
            base_model: base_model.to_owned(),
            model_path,
            request_id: None,
            created_at: now(),
            n_clients: 1,
            inflight: false,
        })?;
        Ok(id)
    }

    fn inference_session(&self) -> ApiResult<SessionId> {
        let request = CreateSessionRequest {
            tags: vec!["inference".into()],
            user_metadata: Default::default(),
            sdk_version: env!("CARGO_PKG_VERSION").into(),
            project_id: None,
            display_name: Some("OpenAI- and Anthropic-compatible requests".into()),
            tag: Default::default(),
        };
        let catalog = &self.core.catalog;
        Ok(catalog.create_session(request, Some(SESSION_KEY.into()))?)
    }

    /// Begins to continue a prompt.
    ///
    /// # Errors
    /// As for a sample.
    pub(crate) fn draw(self: &Arc<Self>, model: &Model, ask: Ask) -> ApiResult<Drawing> {
        let seq = random_number();
        let bad = |e: tinker_types::TypeError| ApiError::bad_request(e.to_string());
        let id = sample_request_id(&model.sampler, seq).map_err(bad)?;
        let request = sample_request(model, seq, ask);
        let body = serde_json::to_vec(&request)
            .map_err(|e| ApiError::internal("cannot log the request", e.to_string()))?;
        let tokens = self.core.watchers.watch(id.clone());
        let drawing = Drawing {
            app: Arc::clone(self),
            id: id.clone(),
            tokens,
            is_over: false,
        };
        self.sample(&request, &body)
            .inspect_err(|_| self.core.watchers.end(&id))?;
        Ok(drawing)
    }
}

/// A number for a sample of the hidden session: 63 random bits, as the journal remembers too many requests for a
/// counter to start anew.
pub(crate) fn random_number() -> u64 {
    (uuid::Uuid::new_v4().as_u128() >> 65) as u64
}

impl Tokenizers {
    fn of(&self, dir: &std::path::Path) -> tinker_chat::Result<Arc<Tokenizer>> {
        let mut known = lock(&self.0);
        if let Some(tokenizer) = known.get(dir) {
            return Ok(Arc::clone(tokenizer));
        }
        let tokenizer = Tokenizer::from_dir(dir)?;
        known.insert(dir.to_owned(), Arc::clone(&tokenizer));
        Ok(tokenizer)
    }
}

fn sample_request(model: &Model, seq: u64, ask: Ask) -> SampleRequest {
    SampleRequest {
        num_samples: ask.n,
        prompt: ModelInput::from_tokens(ask.prompt),
        sampling_params: SamplingParams {
            max_tokens: ask.max_tokens,
            seed: ask.seed,
            stop: Some(Stop::Texts(ask.stops)),
            temperature: ask.temperature,
            top_k: ask.top_k,
            top_p: ask.top_p,
        },
        sampling_session_id: Some(model.sampler.clone()),
        seq_id: Some(seq),
        prompt_logprobs: Some(false),
        topk_prompt_logprobs: 0,
        topk_sample_logprobs: ask.n_top,
        target_prompt_logprobs: None,
        prompt_alt_tokens_k: 0,
        prompt_logprobs_last_n: None,
        record_stability_info: false,
        base_model: None,
        model_path: None,
        tag: Default::default(),
    }
}

/// A request being drawn. Dropped before its end it is cancelled.
#[derive(Debug)]
pub(crate) struct Drawing {
    app: Arc<App>,
    id: RequestId,
    tokens: mpsc::UnboundedReceiver<NewTokens>,
    is_over: bool,
}

impl Drawing {
    /// The next tokens of any of its samples; `None` once all are there or it failed.
    pub(crate) async fn next(&mut self) -> Option<NewTokens> {
        self.tokens.recv().await
    }

    /// How each sample ended.
    ///
    /// # Errors
    /// 400 for what the request is to blame for, 500 for the rest.
    pub(crate) async fn end(&mut self) -> ApiResult<Vec<StopReason>> {
        self.is_over = true;
        let hold = self.app.poll_hold();
        let never = Notify::new();
        let found = self.app.core.futures.wait(&self.id, hold, &never).await;
        let Lookup::Ready(outcome) = found else {
            return Err(ApiError::stopping());
        };
        if outcome.form == Form::Failed {
            return Err(failure(&outcome.body));
        }
        let unreadable = |e: String| ApiError::internal("the result cannot be read", e);
        let message =
            proto::SampleResponse::decode(outcome.body).map_err(|e| unreadable(e.to_string()))?;
        let response = SampleResponse::try_from(&message).map_err(|e| unreadable(e.to_string()))?;
        let sequences = response.sequences.into_iter();
        Ok(sequences.map(|sequence| sequence.stop_reason).collect())
    }
}

fn failure(body: &[u8]) -> ApiError {
    match serde_json::from_slice::<FailedFuture>(body) {
        Ok(failed) if failed.category == tinker_types::ErrorCategory::User => {
            Error::Invalid(failed.error).into()
        }
        Ok(failed) => ApiError::internal(failed.error.clone(), failed.error),
        Err(error) => ApiError::internal("the result cannot be read", error.to_string()),
    }
}

impl Drop for Drawing {
    fn drop(&mut self) {
        if !self.is_over {
            self.app.core.watchers.end(&self.id);
            self.app.core.send(Command::Cancel(self.id.clone()));
        }
    }
}
