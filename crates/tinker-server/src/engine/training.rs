//! The steps of training: passes that add to the gradient, and optimizer steps that use it up.

use std::sync::Arc;

use prost::Message as _;
use tinker_engine::{AdapterId, Optimizer, TrainSequence, Work};
use tinker_types::{
    ForwardBackwardRequest, GradientStats, GradientStatsResponse, OptimStepRequest,
    OptimStepResponse, TrainingRunId, ZeroGradResponse, proto,
};

use super::Worker;
use super::base::Base;
use super::optimizers::optimizer;
use super::runs::Turn;
use crate::error::Result;
use crate::loss_inputs;
use crate::memory::{Ask, Purpose};
use crate::operation::{Form, Outcome};

impl Worker {
    pub(super) fn forward_backward(
        &mut self,
        run: &TrainingRunId,
        request: &ForwardBackwardRequest,
        turn: Turn,
    ) -> Result<Outcome> {
        let core = Arc::clone(&self.core);
        let session = core.catalog.run(run)?.session_id;
        let find = |id: &str| core.custom_losses.get(&session, id);
        let (base, active) = self.active(run)?;
        let sequences = loss_inputs::sequences(request, base.backend.info(), &find)?;
        let ask = ask_for(base, active.adapter, &sequences, request.forward_only);
        // What was done before is done again: refused, it would keep its run away for ever.
        let _memory = match turn {
            Turn::First => Some(self.promise(&ask)?),
            Turn::Again => None,
        };
        let (base, active) = self.active(run)?;
        let outputs = if request.forward_only {
            base.backend.forward(Some(active.adapter), &sequences)?
        } else {
            base.backend.forward_backward(active.adapter, &sequences)?
        };
        // A failure must not leave its gradient behind.
        let output =
            loss_inputs::output(request, &sequences, outputs).inspect_err(|_| self.free(run))?;
        Ok(Outcome {
            form: Form::OutputProto,
            body: proto::ForwardBackwardOutput::from(&output)
                .encode_to_vec()
                .into(),
        })
    }

    pub(super) fn optim_step(
        &mut self,
        run: &TrainingRunId,
        request: &OptimStepRequest,
    ) -> Result<Outcome> {
        let (base, active) = self.active(run)?;
        let optimizer = optimizer(request, active.family)?;
        let report = base.backend.optim_step(active.adapter, &optimizer)?;
        let learning_rate = match optimizer {
            Optimizer::AdamW(params) => params.learning_rate,
            Optimizer::Dimuon(params) => params.learning_rate,
        };
        let metrics = [
            // As the service names it, and short.
            ("unclipped_grad_l2:mean".to_owned(), report.grad_norm),
            ("grad_norm".to_owned(), report.grad_norm),
            ("learning_rate".to_owned(), f64::from(learning_rate)),
            ("step".to_owned(), report.step as f64),
        ];
        Ok(Outcome::json(&OptimStepResponse {
            metrics: Some(metrics.into()),
        }))
    }

    pub(super) fn zero_grad(&mut self, run: &TrainingRunId) -> Result<Outcome> {
        let (base, active) = self.active(run)?;
        base.backend.clear_gradient(active.adapter)?;
        Ok(Outcome::json(&ZeroGradResponse::default()))
    }

    pub(super) fn gradient_stats(&mut self, run: &TrainingRunId) -> Result<Outcome> {
        let (base, active) = self.active(run)?;
        let state = base.backend.export_adapter(active.adapter)?;
        let all = state.gradient.values().flatten().copied();
        let tensors = state.gradient.iter();
        let tensors = tensors.map(|(name, g)| (name.clone(), stats(g.iter().copied())));
        Ok(Outcome::json(&GradientStatsResponse {
            total: stats(all),
            tensors: tensors.collect(),
            tag: Default::default(),
        }))
    }
}

/// The activations of a pass, and the gradients of its sequences.
fn ask_for(
    base: &Base,
    adapter: AdapterId,
    sequences: &[TrainSequence],
    forward_only: bool,
) -> Ask<'static> {
    let n = sequences.len();
    let longest = sequences.iter().map(|s| s.tokens.len()).max().unwrap_or(0);
    let (work, advice) = if forward_only {
        let work = Work::Forward {
            adapter,
            n,
            longest,
        };
        let advice =
            "send shorter sequences, or restart the server with fewer bits (--weights int8 or nf4)";
        (work, advice)
    } else {
        let work = Work::Pass {
            adapter,
            n,
            longest,
        };
        let advice = "send shorter sequences, or restart the server with less for training (--training-memory) or fewer bits (--weights int8 or nf4)";
        (work, advice)
    };
    Ask {
        purpose: Purpose::Task,
        n_bytes: base.backend.memory_for(work),
        what: format!("a pass over {n} sequences, the longest of {longest} tokens,"),
        advice,
    }
}

fn stats(gradient: impl Iterator<Item = f32>) -> GradientStats {
    let (mut stats, mut squares) = (GradientStats::default(), 0.0);
    for g in gradient.map(f64::from) {
        squares += g * g;
        stats.max_abs = stats.max_abs.max(g.abs());
        stats.n_zero += u64::from(g == 0.0);
        stats.n_values += 1;
    }
    stats.l2 = squares.sqrt();
    stats
}
