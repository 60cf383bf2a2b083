//! What the engine did, for the counters.

use tinker_types::{RequestId, TrainingRunId};

use super::Worker;
use crate::accounts::Counter;
use crate::completions::SamplerClient;
use crate::core::Core;
use crate::operation::{Operation, Outcome};

impl Worker {
    /// Counts an operation that has just been executed.
    pub(super) fn count(&self, run: &TrainingRunId, operation: &Operation, outcome: &Outcome) {
        if outcome.is_failure() {
            return;
        }
        let (counter, amount) = match operation {
            Operation::ForwardBackward(request) => {
                let lengths = request.data.iter();
                let tokens = lengths.filter_map(|datum| datum.model_input.length().ok());
                (Counter::Training, tokens.sum())
            }
            Operation::SaveWeights(_)
            | Operation::SaveWeightsForSampler(_)
            | Operation::SaveWeightsExternal(_) => (Counter::Checkpoint, 1),
            _ => return,
        };
        if counter == Counter::Training {
            self.core.metrics.add_trained(amount);
        }
        if let Ok(row) = self.core.catalog.run(run) {
            let accounts = &self.core.accounts;
            accounts.count(&row.session_id, &row.base_model, counter, amount);
        }
    }
}

/// Counts the tokens of a sample that has just been drawn.
pub(super) fn count_sample(core: &Core, id: &RequestId, n_prompt: usize, n_drawn: usize) {
    core.metrics.add_sampled(n_prompt, n_drawn);
    let sampler = SamplerClient::of(id).map(|client| core.catalog.sampler(&client.sampler));
    if let Some(Ok(sampler)) = sampler {
        let (session, base) = (&sampler.session_id, &sampler.base_model);
        core.accounts
            .count(session, base, Counter::Prefill, n_prompt);
        core.accounts.count(session, base, Counter::Sample, n_drawn);
    }
}
