//! One training run: passes, steps and saves, in the order of the calls.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{join_all, try_join_all};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tinker_http::{Client, Error as HttpError, RequestType, Resolved};
use tinker_types::{
    CheckpointKind, Datum, ForwardBackwardOutput, ForwardBackwardRequest, GetInfoResponse,
    OptimStepRequest, OptimStepResponse, OptimStepTag, OptimizerParams, RequestId, SamplerKind,
    SaveWeightsForSamplerRequest, SaveWeightsForSamplerResponse, SaveWeightsForSamplerTag,
    SaveWeightsRequest, SaveWeightsTag, TinkerPath, TrainingRunId, UntypedFuture,
};

use crate::api_future::{ApiFuture, Promise};
use crate::batching::split;
use crate::combine::combine;
use crate::error::{Error, Result};
use crate::ledger::{Begun, Digest, Earlier, Known, LedgerError, Pending, Ticket, check_view};
use crate::loss::Loss;
use crate::options::{SamplingSource, SaveOptions, check_step, checkpoint_name};
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
    pub(crate) inner: Arc<Inner>,
}

#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) session: Arc<Session>,
    model_id: TrainingRunId,
    info: GetInfoResponse,
    pub(crate) turns: Turns,
}

/// Whether a pass leaves a gradient.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pass {
    Forward,
    ForwardBackward,
}

impl Pass {
    const fn operation(self) -> RequestType {
        match self {
            Self::Forward => RequestType::Forward,
            Self::ForwardBackward => RequestType::ForwardBackward,
        }
    }
}

/// The requests of a pass that the server has.
#[derive(Debug)]
pub(crate) struct Sent {
    operation: RequestType,
    pending: Vec<Pending>,
}

impl TrainingClient {
    /// Describes a run that was just created, and starts its order of operations.
    pub(crate) async fn open(session: Arc<Session>, model_id: TrainingRunId) -> Result<Self> {
        let ledger = session.ledger.as_ref();
        let info = match ledger.filter(|ledger| ledger.has_run(&model_id)) {
            Some(ledger) => Box::pin(check_view(&session.http, ledger, &model_id)).await?,
            None => session.http.get_info(&model_id).await?,
        };
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

    /// Whether the ledger has operations of an earlier process that this one has yet to ask for
    /// again; no other may be asked for in their place. An operation counts until its turn has come.
    #[must_use]
    pub fn is_repeating(&self) -> bool {
        let ledger = self.inner.session.ledger.as_deref();
        ledger.is_some_and(|ledger| ledger.is_repeating(&self.inner.model_id))
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

    /// Takes one step of the run's optimizer along the stored gradient and clears it:
    /// `AdamParams`, `DimuonParams`, or another family's as [`OptimizerParams::Other`].
    ///
    /// Endpoint: `POST /api/v1/optim_step`.
    ///
    /// # Errors
    /// [`Error::InvalidRequest`] if a hyper-parameter is out of range; [`Error::RequestFailed`] if
    /// the server cannot take the step.
    pub fn optim_step(&self, params: impl Into<OptimizerParams>) -> ApiFuture<OptimStepResponse> {
        let params = params.into();
        if let Err(error) = check_step(&params) {
            return ApiFuture::refused(RequestType::OptimStep, error);
        }
        let (adam_params, optimizer_params) = params.into_fields();
        let model_id = self.inner.model_id.clone();
        self.operate(
            RequestType::OptimStep,
            move |seq_id| OptimStepRequest {
                model_id,
                seq_id,
                adam_params,
                optimizer_params,
                tag: OptimStepTag,
            },
            |http, request| async move { http.optim_step(&request).await },
            |http, id, took| async move { http.retrieve_optim_step(&id, took).await },
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
            move |seq_id| SaveWeightsRequest {
                model_id,
                path: Some(name),
                seq_id,
                ttl_seconds,
                overwrite: options.overwrite,
                user_metadata: options.user_metadata,
                tag: SaveWeightsTag,
            },
            |http, request| async move { http.save_weights(&request).await },
            |http, id, took| async move { http.retrieve_save_weights(&id, took).await },
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
            move |seq_id| SaveWeightsForSamplerRequest { seq_id, ..request },
            |http, request| async move { http.save_weights_for_sampler(&request).await },
            |http, id, took| async move { http.retrieve_save_weights_for_sampler(&id, took).await },
            convert,
        )
    }

    /// Submits an operation of one request in its turn and waits for its result.
    pub(crate) fn operate<Q, R, T, Submission, Retrieval>(
        &self,
        operation: RequestType,
        request: impl FnOnce(u64) -> Q + Send + 'static,
        submit: impl FnOnce(Client, Q) -> Submission + Send + 'static,
        retrieve: impl FnOnce(Client, RequestId, Option<Duration>) -> Retrieval + Send + 'static,
        convert: impl FnOnce(R) -> Result<T> + Send + 'static,
    ) -> ApiFuture<T>
    where
        Q: Serialize + Send + Sync + 'static,
        R: Serialize + DeserializeOwned + PartialEq + Send + Sync + 'static,
        T: Send + 'static,
        Submission: Future<Output = HttpResult<UntypedFuture>> + Send,
        Retrieval: Future<Output = HttpResult<Resolved<R>>> + Send,
    {
        if let Err(error) = self.inner.session.check_open() {
            return ApiFuture::refused(operation, error);
        }
        let (promise, future) = ApiFuture::new(operation);
        let turn = self.inner.turns.take();
        let sending = self.inner.session.submissions.begin();
        let http = self.http().clone();
        let inner = Arc::clone(&self.inner);
        // Not tied to the future: the operation is sent even if nobody waits for it.
        self.inner.session.runtime.spawn(async move {
            let submission = async {
                let turn = turn.begin().await?;
                let ticket = inner.ticket(operation, turn.seq_id());
                let request = request(turn.seq_id());
                let (fate, pending) = submit_one(&http, ticket, request, submit).await;
                turn.settle(operation, &[fate]);
                pending
            };
            let submitted: Result<_> = submission.await;
            // The turn of later operations does not keep the client alive, nor does a result.
            drop((inner, sending));
            deliver(&http, promise, async {
                let retrieve = |id, took| retrieve(http.clone(), id, took);
                convert(result_of(operation, submitted?, retrieve).await?)
            })
            .await;
        });
        future
    }

    fn pass(&self, pass: Pass, data: Vec<Datum>, loss: Loss) -> ApiFuture<ForwardBackwardOutput> {
        let operation = pass.operation();
        let checked = self.inner.session.check_open();
        if let Err(error) = checked.and_then(|()| loss.check(&data)) {
            return ApiFuture::refused(operation, error);
        }
        let (promise, future) = ApiFuture::new(operation);
        let turn = self.inner.turns.take();
        let sending = self.inner.session.submissions.begin();
        let http = self.http().clone();
        let inner = Arc::clone(&self.inner);
        let n_data = data.len();
        self.inner.session.runtime.spawn(async move {
            let sent: Result<_> = async {
                let turn = turn.begin().await?;
                submit_chunks(&inner, turn, pass, loss, data).await
            }
            .await;
            drop((inner, sending));
            deliver(&http, promise, async { sent?.output(&http, n_data).await }).await;
        });
        future
    }

    fn http(&self) -> &Client {
        &self.inner.session.http
    }
}

impl Inner {
    /// Sends the requests of one pass, numbered from `seq_id`: the first one last if they may travel
    /// together, so that the server begins when it has them all.
    pub(crate) async fn send(
        &self,
        pass: Pass,
        seq_id: u64,
        loss: Loss,
        chunks: Vec<Vec<Datum>>,
    ) -> (Vec<Fate>, Result<Sent>) {
        let operation = pass.operation();
        let config = match self.session.http.config().await {
            Ok(config) => config,
            Err(error) => return (Vec::new(), Err(error.into())),
        };
        let numbered = chunks.into_iter().zip(seq_id..);
        let mut requests = numbered.map(|(data, seq_id)| ForwardBackwardRequest {
            model_id: self.model_id.clone(),
            seq_id,
            data,
            loss_fn: loss.function.clone(),
            loss_fn_config: loss.config.clone(),
            forward_only: pass == Pass::Forward,
        });
        let submit = |request| submit_chunk(self, operation, request);
        let (fates, results): (Vec<_>, Vec<_>) = if config.parallel_fwdbwd_chunks {
            let first = requests.next();
            let (mut fates, mut results): (Vec<_>, Vec<_>) =
                join_all(requests.map(submit)).await.into_iter().unzip();
            match first {
                Some(request) if results.iter().all(Result::is_ok) => {
                    let (fate, result) = submit(request).await;
                    fates.insert(0, fate);
                    results.insert(0, result);
                }
                _ => fates.insert(0, Fate::Refused),
            }
            (fates, results)
        } else {
            let mut outcomes = Vec::new();
            for request in requests {
                let outcome = submit(request).await;
                let is_last = outcome.1.is_err();
                outcomes.push(outcome);
                if is_last {
                    break;
                }
            }
            outcomes.into_iter().unzip()
        };
        let pending = results.into_iter().collect::<Result<_>>();
        (fates, pending.map(|pending| Sent { operation, pending }))
    }

    /// A request's place in the run and, if steps are noted, in the ledger.
    fn ticket(&self, operation: RequestType, seq_id: u64) -> Ticket {
        Ticket {
            ledger: self.session.ledger.clone(),
            run: self.model_id.clone(),
            seq_id,
            operation,
        }
    }
}

impl Sent {
    /// Waits for the result of all requests: one output per datum.
    pub(crate) async fn output(
        self,
        http: &Client,
        n_data: usize,
    ) -> Result<ForwardBackwardOutput> {
        let results = self
            .pending
            .into_iter()
            .map(|pending| retrieve_chunk(http, self.operation, pending));
        one_output_each(combine(try_join_all(results).await?), n_data)
    }
}

/// Checks that a pass brought one output for each datum: an answer may have lost its end.
fn one_output_each(output: ForwardBackwardOutput, n_data: usize) -> Result<ForwardBackwardOutput> {
    let n_outputs = output.loss_fn_outputs.len();
    if n_outputs == n_data {
        return Ok(output);
    }
    Err(Error::Protocol(format!(
        "the server returned {n_outputs} outputs for {n_data} data; look into its log"
    )))
}

/// Waits for a result while somebody waits for it here.
pub(crate) async fn deliver<T>(
    http: &Client,
    mut promise: Promise<T>,
    result: impl Future<Output = Result<T>>,
) {
    tokio::select! {
        () = promise.closed() => {}
        result = result => {
            if let Err(error) = &result {
                error.report(http);
            }
            // Nobody listens any more if this fails.
            promise.send(result).ok();
        }
    }
}

/// Notes and sends a request, unless the ledger has its answer.
async fn submit_one<Q: Serialize, Submission>(
    http: &Client,
    ticket: Ticket,
    request: Q,
    submit: impl FnOnce(Client, Q) -> Submission,
) -> (Fate, Result<Pending>)
where
    Submission: Future<Output = HttpResult<UntypedFuture>>,
{
    // What cannot be written as JSON is refused by the transport.
    let digest = || Digest::of(&serde_json::to_vec(&request).unwrap_or_default());
    let earlier = match ticket.begin(digest).await {
        Ok(Begun::Send(earlier)) => earlier,
        Ok(Begun::Known(known)) => return (Fate::Accepted, Ok(Pending::Known(known))),
        Err(error) => return not_sent(error),
    };
    let started = http.now();
    let outcome = submit(http.clone(), request).await;
    let took = http.now().saturating_sub(started);
    pending(ticket, earlier, outcome, took).await
}

async fn pending(
    ticket: Ticket,
    earlier: Earlier,
    outcome: HttpResult<UntypedFuture>,
    took: Duration,
) -> (Fate, Result<Pending>) {
    let (fate, id) = ticket.submitted(earlier, outcome).await;
    (fate, id.map(|id| Pending::Sent(ticket, id, took)))
}

/// What the ledger's refusal means for the operations that follow.
fn not_sent(error: LedgerError) -> (Fate, Result<Pending>) {
    let fate = match &error {
        LedgerError::RefusedBefore { .. } => Fate::Refused,
        // What follows would build on it.
        error => Fate::Unknown(error.to_string()),
    };
    (fate, Err(error.into()))
}

/// The result of a request that the server has: the ledger's, or the server's, which is noted.
async fn result_of<R, Retrieval>(
    operation: RequestType,
    pending: Pending,
    retrieve: impl FnOnce(RequestId, Option<Duration>) -> Retrieval,
) -> Result<R>
where
    R: Serialize + DeserializeOwned + PartialEq,
    Retrieval: Future<Output = HttpResult<Resolved<R>>>,
{
    let (id, resolved) = match pending {
        Pending::Sent(ticket, id, took) => {
            let resolved = retrieve(id.clone(), Some(took)).await?;
            ticket.note(&resolved).await;
            (id, resolved)
        }
        Pending::Known(Known::Failed(failure, id)) => (id, Resolved::Failed(failure)),
        Pending::Known(Known::There(id)) => {
            let resolved = retrieve(id.clone(), None).await?;
            (id, resolved)
        }
        Pending::Known(Known::Result(value)) => {
            return serde_json::from_value(value).map_err(|error| {
                Error::Protocol(format!(
                    "the ledger's result of {operation} was not understood: {error}"
                ))
            });
        }
    };
    resolve(operation, &id, resolved)
}

/// Sends a pass in its turn.
async fn submit_chunks(
    inner: &Inner,
    turn: OpenTurn,
    pass: Pass,
    loss: Loss,
    data: Vec<Datum>,
) -> Result<Sent> {
    let operation = pass.operation();
    let config = match inner.session.http.config().await {
        Ok(config) => config,
        Err(error) => {
            turn.settle(operation, &[]);
            return Err(error.into());
        }
    };
    let chunks = split(data, config);
    let (fates, sent) = inner.send(pass, turn.seq_id(), loss, chunks).await;
    turn.settle(operation, &fates);
    sent
}

async fn submit_chunk(
    inner: &Inner,
    operation: RequestType,
    request: ForwardBackwardRequest,
) -> (Fate, Result<Pending>) {
    let http = &inner.session.http;
    let ticket = inner.ticket(operation, request.seq_id);
    let is_noted = ticket.is_noted();
    let started = http.now();
    let digest = move |bytes: &[u8]| is_noted.then(|| Digest::of(bytes));
    let (pass, digest) = match http.prepare_forward_backward(request, digest).await {
        Ok(prepared) => prepared,
        Err(error) => return (Fate::Refused, Err(error.into())),
    };
    let earlier = match ticket
        .begin(|| digest.unwrap_or_else(|| Digest::of(&[])))
        .await
    {
        Ok(Begun::Send(earlier)) => earlier,
        Ok(Begun::Known(known)) => return (Fate::Accepted, Ok(Pending::Known(known))),
        Err(error) => return not_sent(error),
    };
    let outcome = http.submit_forward_backward(pass).await;
    let took = http.now().saturating_sub(started);
    pending(ticket, earlier, outcome, took).await
}

async fn retrieve_chunk(
    http: &Client,
    operation: RequestType,
    pending: Pending,
) -> Result<ForwardBackwardOutput> {
    let retrieve = |id: RequestId, took| async move {
        match operation {
            RequestType::Forward => http.retrieve_forward(&id, took).await,
            _ => http.retrieve_forward_backward(&id, took).await,
        }
    };
    result_of(operation, pending, retrieve).await
}
