//! One training run: passes, steps and saves, in the order of the calls.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{join_all, try_join_all};
use tinker_http::{Client, Error as HttpError, RequestType, Resolved};
use tinker_types::{
    AdamParams, CheckpointKind, Datum, ForwardBackwardOutput, ForwardBackwardRequest,
    GetInfoResponse, OptimStepRequest, OptimStepResponse, OptimStepTag, RequestId, SamplerKind,
    SaveWeightsForSamplerRequest, SaveWeightsForSamplerResponse, SaveWeightsForSamplerTag,
    SaveWeightsRequest, SaveWeightsTag, TinkerPath, TrainingRunId, UntypedFuture,
};

use crate::api_future::{ApiFuture, Promise};
use crate::batching::split;
use crate::combine::combine;
use crate::error::{Error, Result};
use crate::loss::Loss;
use crate::options::{SamplingSource, SaveOptions, check_adam, checkpoint_name};
use crate::resolve::resolve;
use crate::sampling_client::SamplingClient;
use crate::session::Session;
use crate::turns::{Fate, OpenTurn, Turns};

/// Number of a run's first operation; its creation counts as 0.
const FIRST_SEQ_ID: u64 = 1;

type HttpResult<T> = std::result::Result<T, HttpError>;

/// A training run. Cheap to clone; clones share one order of operations.
///
/// Each method submits its operation when it is called and returns a future of its result. The
/// server executes operations in the order of the calls; the futures may be awaited in any order,
/// so that the next pass is on its way before the result of this one has come.
#[derive(Debug, Clone)]
pub struct TrainingClient {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    session: Arc<Session>,
    model_id: TrainingRunId,
    info: GetInfoResponse,
    turns: Turns,
}

/// Whether a pass leaves a gradient.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pass {
    Forward,
    ForwardBackward,
}

impl TrainingClient {
    /// Describes a run that was just created, and starts its order of operations.
    pub(crate) async fn open(session: Arc<Session>, model_id: TrainingRunId) -> Result<Self> {
        let info = session.http.get_info(&model_id).await?;
        Ok(Self {
            inner: Arc::new(Inner {
                session,
                model_id,
                info,
                turns: Turns::starting_at(FIRST_SEQ_ID),
            }),
        })
    }

    /// The training run.
    #[must_use]
    pub fn training_run_id(&self) -> &TrainingRunId {
        &self.inner.model_id
    }

    /// The run as the server described it at creation: base model, tokenizer, rank.
    #[must_use]
    pub fn info(&self) -> &GetInfoResponse {
        &self.inner.info
    }

    /// Name of the base model, if the server said.
    #[must_use]
    pub fn base_model(&self) -> Option<&str> {
        let info = &self.inner.info;
        info.model_data
            .model_name
            .as_deref()
            .or(info.model_name.as_deref())
    }

    /// Asks the server to describe the run anew.
    ///
    /// Endpoint: `POST /api/v1/get_info`.
    ///
    /// # Errors
    /// If the call fails.
    pub async fn get_info(&self) -> Result<GetInfoResponse> {
        Ok(self.http().get_info(&self.inner.model_id).await?)
    }

    /// Computes the loss of `data` without touching the gradient.
    ///
    /// The result is as that of [`forward_backward`](Self::forward_backward).
    ///
    /// Endpoint: `POST /api/v1/forward_backward`.
    ///
    /// # Errors
    /// As [`forward_backward`](Self::forward_backward).
    pub fn forward(
        &self,
        data: Vec<Datum>,
        loss: impl Into<Loss>,
    ) -> ApiFuture<ForwardBackwardOutput> {
        self.pass(Pass::Forward, data, loss.into())
    }

    /// Runs forward and backward on `data` and adds to the stored gradient.
    ///
    /// The loss is a sum over tokens and data, not a mean: metric `loss:sum`. One output per datum,
    /// in input order; `logprobs` is shaped like the targets, natural log, ≤ 0. Large data travels
    /// in several requests whose results are joined.
    ///
    /// Endpoint: `POST /api/v1/forward_backward`.
    ///
    /// # Errors
    /// [`Error::InvalidRequest`] if there is no data or the loss needs an input that a datum lacks;
    /// [`Error::RequestFailed`] if the server cannot compute it.
    pub fn forward_backward(
        &self,
        data: Vec<Datum>,
        loss: impl Into<Loss>,
    ) -> ApiFuture<ForwardBackwardOutput> {
        self.pass(Pass::ForwardBackward, data, loss.into())
    }

    /// Takes one AdamW step along the stored gradient and clears it.
    ///
    /// Endpoint: `POST /api/v1/optim_step`.
    ///
    /// # Errors
    /// [`Error::InvalidRequest`] if a hyper-parameter is out of range; [`Error::RequestFailed`] if
    /// the server cannot take the step.
    pub fn optim_step(&self, adam: AdamParams) -> ApiFuture<OptimStepResponse> {
        if let Err(error) = check_adam(&adam) {
            return ApiFuture::refused(RequestType::OptimStep, error);
        }
        let model_id = self.inner.model_id.clone();
        self.operate(
            RequestType::OptimStep,
            move |http, seq_id| async move {
                let request = OptimStepRequest {
                    model_id,
                    seq_id,
                    adam_params: Some(adam),
                    optimizer_params: None,
                    tag: OptimStepTag,
                };
                http.optim_step(&request).await
            },
            |http, id, took| async move { http.retrieve_optim_step(&id, Some(took)).await },
            Ok,
        )
    }

    /// Saves weights and optimizer state as `tinker://<run>/weights/<name>`.
    ///
    /// Endpoint: `POST /api/v1/save_weights`.
    ///
    /// # Errors
    /// [`Error::InvalidRequest`] if the name or the time to live is out of range;
    /// [`Error::RequestFailed`] if the name is taken and `overwrite` is off.
    pub fn save_state(&self, name: impl AsRef<str>, options: SaveOptions) -> ApiFuture<TinkerPath> {
        let operation = RequestType::SaveWeights;
        let checked = checkpoint_name(CheckpointKind::Training, name.as_ref())
            .and_then(|name| Ok((name, options.ttl_seconds()?)));
        let (name, ttl_seconds) = match checked {
            Ok(checked) => checked,
            Err(error) => return ApiFuture::refused(operation, error),
        };
        let model_id = self.inner.model_id.clone();
        self.operate(
            operation,
            move |http, seq_id| async move {
                let request = SaveWeightsRequest {
                    model_id,
                    path: Some(name),
                    seq_id,
                    ttl_seconds,
                    overwrite: options.overwrite,
                    user_metadata: options.user_metadata,
                    tag: SaveWeightsTag,
                };
                http.save_weights(&request).await
            },
            |http, id, took| async move { http.retrieve_save_weights(&id, Some(took)).await },
            |saved| Ok(saved.path),
        )
    }

    /// Saves weights to sample from as `tinker://<run>/sampler_weights/<name>`.
    ///
    /// Endpoint: `POST /api/v1/save_weights_for_sampler`.
    ///
    /// # Errors
    /// As [`save_state`](Self::save_state).
    pub fn save_weights_for_sampler(
        &self,
        name: impl AsRef<str>,
        options: SaveOptions,
    ) -> ApiFuture<TinkerPath> {
        let operation = RequestType::SaveWeightsForSampler;
        let checked = checkpoint_name(CheckpointKind::Sampler, name.as_ref())
            .and_then(|name| Ok((name, options.ttl_seconds()?)));
        let (name, ttl_seconds) = match checked {
            Ok(checked) => checked,
            Err(error) => return ApiFuture::refused(operation, error),
        };
        let request = SaveWeightsForSamplerRequest {
            path: Some(name),
            ttl_seconds,
            user_metadata: options.user_metadata,
            ..self.sampler_request(SamplerKind::Snapshot)
        };
        self.save_for_sampler(request, |saved| {
            saved.path.ok_or_else(|| {
                Error::Protocol("the server saved sampler weights and did not say where".into())
            })
        })
    }

    /// Saves weights for this session only and returns a sampler of them.
    ///
    /// [`SamplerKind::Snapshot`] keeps the weights as they are now;
    /// [`SamplerKind::Inflight`] follows later saves of the same kind.
    ///
    /// Endpoint: `POST /api/v1/save_weights_for_sampler`.
    ///
    /// # Errors
    /// [`Error::RequestFailed`] if the server cannot save them.
    pub fn save_weights_and_get_sampling_client(
        &self,
        kind: SamplerKind,
    ) -> ApiFuture<SamplingClient> {
        let request = SaveWeightsForSamplerRequest {
            sampling_session_seq_id: Some(self.inner.session.next_sampler()),
            ..self.sampler_request(kind)
        };
        let session = Arc::clone(&self.inner.session);
        let base_model = self.base_model().unwrap_or_default().to_owned();
        self.save_for_sampler(request, move |saved| {
            let id = saved.sampling_session_id.ok_or_else(|| {
                Error::Protocol("the server saved sampler weights and named no sampler".into())
            })?;
            Ok(SamplingClient::of_sampler(session, id, base_model))
        })
    }

    /// Creates a sampler of a sampler checkpoint in this client's session.
    ///
    /// Endpoints: `POST /api/v1/create_sampling_session`, `GET /api/v1/samplers/{id}`.
    ///
    /// # Errors
    /// If the path is not of a sampler checkpoint, or the server does not have it.
    pub async fn create_sampling_client(
        &self,
        source: impl Into<SamplingSource>,
    ) -> Result<SamplingClient> {
        SamplingClient::create(Arc::clone(&self.inner.session), source.into()).await
    }

    fn sampler_request(&self, kind: SamplerKind) -> SaveWeightsForSamplerRequest {
        SaveWeightsForSamplerRequest {
            model_id: self.inner.model_id.clone(),
            seq_id: 0,
            path: None,
            ttl_seconds: None,
            user_metadata: None,
            sampling_session_seq_id: None,
            kind,
            tag: SaveWeightsForSamplerTag,
        }
    }

    fn save_for_sampler<T: Send + 'static>(
        &self,
        request: SaveWeightsForSamplerRequest,
        convert: impl FnOnce(SaveWeightsForSamplerResponse) -> Result<T> + Send + 'static,
    ) -> ApiFuture<T> {
        self.operate(
            RequestType::SaveWeightsForSampler,
            move |http, seq_id| async move {
                let request = SaveWeightsForSamplerRequest { seq_id, ..request };
                http.save_weights_for_sampler(&request).await
            },
            |http, id, took| async move {
                http.retrieve_save_weights_for_sampler(&id, Some(took))
                    .await
            },
            convert,
        )
    }

    /// Submits an operation of one request in its turn and waits for its result.
    fn operate<R, T, Submission, Retrieval>(
        &self,
        operation: RequestType,
        submit: impl FnOnce(Client, u64) -> Submission + Send + 'static,
        retrieve: impl FnOnce(Client, RequestId, Duration) -> Retrieval + Send + 'static,
        convert: impl FnOnce(R) -> Result<T> + Send + 'static,
    ) -> ApiFuture<T>
    where
        R: Send + 'static,
        T: Send + 'static,
        Submission: Future<Output = HttpResult<UntypedFuture>> + Send,
        Retrieval: Future<Output = HttpResult<Resolved<R>>> + Send,
    {
        let (promise, future) = ApiFuture::new(operation);
        let turn = self.inner.turns.take();
        let http = self.http().clone();
        // Not tied to the future: the operation is sent even if nobody waits for it.
        self.inner.session.runtime.spawn(async move {
            let submission = async {
                let turn = turn.begin().await?;
                let started = http.now();
                let outcome = submit(http.clone(), turn.seq_id()).await;
                let took = http.now().saturating_sub(started);
                turn.settle(operation, &[Fate::of(&outcome)]);
                Ok((outcome?.request_id, took))
            };
            let submitted: Result<_> = submission.await;
            deliver(promise, async {
                let (id, took) = submitted?;
                let resolved = retrieve(http, id.clone(), took).await?;
                convert(resolve(operation, &id, resolved)?)
            })
            .await;
        });
        future
    }

    fn pass(&self, pass: Pass, data: Vec<Datum>, loss: Loss) -> ApiFuture<ForwardBackwardOutput> {
        let operation = match pass {
            Pass::Forward => RequestType::Forward,
            Pass::ForwardBackward => RequestType::ForwardBackward,
        };
        if let Err(error) = loss.check(&data) {
            return ApiFuture::refused(operation, error);
        }
        let (promise, future) = ApiFuture::new(operation);
        let turn = self.inner.turns.take();
        let http = self.http().clone();
        let template = ForwardBackwardRequest {
            model_id: self.inner.model_id.clone(),
            seq_id: 0,
            data: Vec::new(),
            loss_fn: loss.function,
            loss_fn_config: loss.config,
            forward_only: pass == Pass::Forward,
        };
        self.inner.session.runtime.spawn(async move {
            let submitted: Result<_> = async {
                let turn = turn.begin().await?;
                submit_chunks(&http, turn, operation, template, data).await
            }
            .await;
            deliver(promise, async {
                let results = submitted?
                    .into_iter()
                    .map(|(id, took)| retrieve_chunk(&http, operation, id, took));
                Ok(combine(try_join_all(results).await?))
            })
            .await;
        });
        future
    }

    fn http(&self) -> &Client {
        &self.inner.session.http
    }
}

/// Waits for a result while somebody waits for it here.
async fn deliver<T>(mut promise: Promise<T>, result: impl Future<Output = Result<T>>) {
    tokio::select! {
        () = promise.closed() => {}
        result = result => {
            // Nobody listens any more if this fails.
            promise.send(result).ok();
        }
    }
}

/// Sends the requests of one pass: the first one last if they may travel together, so that the
/// server begins when it has them all.
async fn submit_chunks(
    http: &Client,
    turn: OpenTurn,
    operation: RequestType,
    template: ForwardBackwardRequest,
    data: Vec<Datum>,
) -> Result<Vec<(RequestId, Duration)>> {
    let config = match http.config().await {
        Ok(config) => config,
        Err(error) => {
            turn.settle(operation, &[]);
            return Err(error.into());
        }
    };
    let mut requests =
        split(data, config)
            .into_iter()
            .zip(turn.seq_id()..)
            .map(|(data, seq_id)| ForwardBackwardRequest {
                data,
                seq_id,
                ..template.clone()
            });
    let mut outcomes = Vec::new();
    let mut fates = Vec::new();
    if config.parallel_fwdbwd_chunks {
        let first = requests.next();
        outcomes = join_all(requests.map(|request| submit_chunk(http, request))).await;
        fates = outcomes.iter().map(Fate::of).collect();
        match first {
            Some(request) if !outcomes.iter().any(Result::is_err) => {
                let outcome = submit_chunk(http, request).await;
                fates.insert(0, Fate::of(&outcome));
                outcomes.insert(0, outcome);
            }
            _ => fates.insert(0, Fate::Refused),
        }
    } else {
        for request in requests {
            let outcome = submit_chunk(http, request).await;
            let is_last = outcome.is_err();
            fates.push(Fate::of(&outcome));
            outcomes.push(outcome);
            if is_last {
                break;
            }
        }
    }
    turn.settle(operation, &fates);
    Ok(outcomes.into_iter().collect::<HttpResult<_>>()?)
}

async fn submit_chunk(
    http: &Client,
    request: ForwardBackwardRequest,
) -> HttpResult<(RequestId, Duration)> {
    let started = http.now();
    let future = http.forward_backward(request).await?;
    Ok((future.request_id, http.now().saturating_sub(started)))
}

async fn retrieve_chunk(
    http: &Client,
    operation: RequestType,
    id: RequestId,
    took: Duration,
) -> Result<ForwardBackwardOutput> {
    let resolved = match operation {
        RequestType::Forward => http.retrieve_forward(&id, Some(took)).await?,
        _ => http.retrieve_forward_backward(&id, Some(took)).await?,
    };
    resolve(operation, &id, resolved)
}
