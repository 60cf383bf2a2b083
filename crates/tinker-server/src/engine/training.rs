//! The steps of training: passes that add to the gradient, and optimizer steps that use it up.

use std::sync::Arc;

use prost::Message as _;
use tinker_engine::{Optimizer, Work};
use tinker_types::{
    ForwardBackwardRequest, GradientStats, GradientStatsResponse, OptimStepRequest,
    OptimStepResponse, TrainingRunId, ZeroGradResponse, proto,
};

use super::Worker;
use super::optimizers::optimizer;
use super::runs::Turn;
use crate::error::Result;
use crate::loss_inputs;
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
        // What was done before is done again: refused, it would keep its run away for ever.
        if !request.forward_only && turn == Turn::First {
            let longest = sequences.iter().map(|s| s.tokens.len()).max().unwrap_or(0);
            let needed = base.backend.memory_for(Work::Pass {
                adapter: active.adapter,
                n: sequences.len(),
                longest,
            });
            let what = format!(
                "a pass over {} sequences, the longest of {longest} tokens,",
                sequences.len()
            );
            core.memory.check(
                needed,
                &what,
                "send shorter sequences, or restart the server with less for training (--training-memory) or fewer bits (--weights int8 or nf4)",
            )?;
        }
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
