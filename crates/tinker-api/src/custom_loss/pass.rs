//! The pass of a custom loss: forward, loss, backward, in one place of the order of operations.

use std::sync::Arc;

use tinker_http::RequestType;
use tinker_types::{Datum, ForwardBackwardOutput, LossFn};

use super::error::CustomLossError;
use super::evaluation::{Logprobs, LossAndGradient};
use super::surrogate;
use crate::api_future::ApiFuture;
use crate::batching::split;
use crate::error::{Error, Result};
use crate::loss::Loss;
use crate::training_client::{Inner, Pass, Sent, TrainingClient, deliver};
use crate::turns::{Fate, OpenTurn};

const OPERATION: RequestType = RequestType::ForwardBackward;

impl TrainingClient {
    /// Runs forward and backward on `data` with a loss that is computed here, and adds to the
    /// stored gradient.
    ///
    /// `loss` is called once, on a thread that may block, with the data and with the
    /// log-probabilities of their targets in the same order, and returns the loss and its gradient.
    /// [`differentiate`](super::differentiate) makes one of a function without derivatives. Only
    /// `target_tokens` (required) and `weights` are sent; the other inputs are for the loss.
    ///
    /// The result is that of the backward pass with `loss:sum` of the custom loss, the loss's own
    /// metrics, and `surrogate_loss:sum`, the cross-entropy that stood for it. It takes two
    /// operations for each request of the data, and later operations wait until the second half is
    /// sent: `loss` must not wait for one of this run, or it waits for itself.
    ///
    /// Endpoint: `POST /api/v1/forward_backward`, twice.
    ///
    /// # Errors
    /// [`Error::InvalidRequest`] if there is no data or a datum has no targets. Any failure after
    /// that, such as [`Error::CustomLoss`], stops the client: operations that were called after
    /// this one count on its gradient and end with [`Error::Stopped`].
    pub fn forward_backward_custom<F>(
        &self,
        data: Vec<Datum>,
        loss: F,
    ) -> ApiFuture<ForwardBackwardOutput>
    where
        F: FnOnce(&[Datum], &[Logprobs]) -> Result<LossAndGradient, CustomLossError>
            + Send
            + 'static,
    {
        let inner = Arc::clone(&self.inner);
        let checked = inner.session.check_open();
        let checked = checked.and_then(|()| cross_entropy().check(&data));
        let forward = match checked.and_then(|()| surrogate::forward_data(&data)) {
            Ok(forward) => forward,
            Err(error) => return ApiFuture::refused(OPERATION, error),
        };
        let (promise, future) = ApiFuture::new(OPERATION);
        let turn = inner.turns.take();
        let sending = inner.session.submissions.begin();
        let http = inner.session.http.clone();
        let n_data = data.len();
        // Not tied to the future: what was called afterwards counts on this gradient.
        self.inner.session.runtime.spawn(async move {
            let sent: Result<_> = async {
                let turn = turn.begin().await?;
                submit(&inner, turn, forward, data, loss).await
            }
            .await;
            drop((inner, sending));
            deliver(&http, promise, async {
                let (backward, evaluation) = sent?;
                let output = backward.output(&http, n_data).await?;
                surrogate::relabel(output, evaluation.loss, evaluation.metrics)
            })
            .await;
        });
        future
    }
}

fn cross_entropy() -> Loss {
    LossFn::CrossEntropy.into()
}

/// Goes through all steps up to the acknowledgement of the backward pass, and passes the turn on.
async fn submit<F>(
    inner: &Inner,
    turn: OpenTurn,
    forward: Vec<Datum>,
    data: Vec<Datum>,
    loss: F,
) -> Result<(Sent, LossAndGradient)>
where
    F: FnOnce(&[Datum], &[Logprobs]) -> Result<LossAndGradient, CustomLossError> + Send + 'static,
{
    let mut n_sent = 0;
    let result = run(inner, turn.seq_id(), &mut n_sent, forward, data, loss).await;
    match &result {
        Ok(_) => turn.settle(OPERATION, &vec![Fate::Accepted; n_sent]),
        Err(error) => turn.settle(OPERATION, &[Fate::Unknown(error.to_string())]),
    }
    result
}

async fn run<F>(
    inner: &Inner,
    seq_id: u64,
    n_sent: &mut usize,
    forward: Vec<Datum>,
    data: Vec<Datum>,
    loss: F,
) -> Result<(Sent, LossAndGradient)>
where
    F: FnOnce(&[Datum], &[Logprobs]) -> Result<LossAndGradient, CustomLossError> + Send + 'static,
{
    let http = &inner.session.http;
    let chunks = split(forward, http.config().await?);
    let lengths: Vec<usize> = chunks.iter().map(Vec::len).collect();
    let (_, sent) = inner
        .send(Pass::Forward, seq_id, cross_entropy(), chunks)
        .await;
    let output = sent?.output(http, data.len()).await?;
    let logprobs = surrogate::logprobs(&data, output)?;
    let (data, logprobs, mut evaluation) = evaluate(inner, data, logprobs, loss).await?;
    let gradients = std::mem::take(&mut evaluation.gradients);
    let backward = surrogate::backward_data(&data, &logprobs, gradients)?;
    // The boundaries stay: the numbers were counted with them.
    let mut backward = backward.into_iter();
    let chunks: Vec<Vec<Datum>> = lengths
        .iter()
        .map(|&n| backward.by_ref().take(n).collect())
        .collect();
    *n_sent = 2 * chunks.len();
    let seq_id = seq_id + chunks.len() as u64;
    let (_, sent) = inner
        .send(Pass::ForwardBackward, seq_id, cross_entropy(), chunks)
        .await;
    Ok((sent?, evaluation))
}

/// Calls the loss where it may take its time.
async fn evaluate<F>(
    inner: &Inner,
    data: Vec<Datum>,
    logprobs: Vec<Logprobs>,
    loss: F,
) -> Result<(Vec<Datum>, Vec<Logprobs>, LossAndGradient)>
where
    F: FnOnce(&[Datum], &[Logprobs]) -> Result<LossAndGradient, CustomLossError> + Send + 'static,
{
    let task = inner.session.runtime.spawn_blocking(move || {
        let evaluation = loss(&data, &logprobs)?;
        evaluation.check(&logprobs)?;
        Ok((data, logprobs, evaluation))
    });
    task.await.unwrap_or_else(|error| {
        Err(match error.try_into_panic() {
            Ok(payload) => CustomLossError::panicked(&*payload).into(),
            Err(_) => Error::Abandoned("the runtime ended before the loss was computed".into()),
        })
    })
}
