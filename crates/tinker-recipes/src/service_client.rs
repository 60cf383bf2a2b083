//! The client library as the service that recipes train on.

use std::path::Path;
use std::time::Duration;

use tinker_api::{
    ApiFuture, Error, ErrorKind, LossFn, Result, SaveOptions, ServiceClient, StateOptions,
    TrainingClient,
};
use tinker_types::{
    AdamParams, Datum, ErrorCategory, FinishReason, ForwardBackwardOutput, OptimStepResponse,
    TinkerPath,
};

use crate::trainer::{Pending, Restored, Service, Trainer, TrainerSpec};

impl Service for ServiceClient {
    fn with_ledger(&self, path: &Path) -> Result<Box<dyn Service>> {
        Ok(Box::new(Self::with_ledger(self, path)?))
    }

    fn close(&self, reason: FinishReason) -> Pending<'_, ()> {
        Box::pin(Self::close(self, reason, None))
    }

    fn create<'a>(&'a self, spec: &'a TrainerSpec) -> Pending<'a, Box<dyn Trainer>> {
        Box::pin(async move {
            let client = match &spec.weights {
                None => {
                    let lora = spec.lora.clone();
                    self.create_lora_training_client(&spec.base_model, lora)
                        .await?
                }
                Some(weights) => {
                    let base_model = Some(spec.base_model.clone());
                    let options = StateOptions {
                        base_model,
                        ..StateOptions::default()
                    };
                    self.create_training_client_from_state(weights, options)
                        .await?
                }
            };
            Ok(Box::new(client) as Box<dyn Trainer>)
        })
    }

    fn restore<'a>(&'a self, state: &'a TinkerPath) -> Pending<'a, Restored> {
        Box::pin(async move {
            let options = StateOptions::default();
            match self
                .create_training_client_from_state_with_optimizer(state, options)
                .await
            {
                Ok(client) => Ok(Restored::Trainer(Box::new(client))),
                Err(error) if is_about_the_checkpoint(&error) => {
                    Ok(Restored::Unusable(error.to_string()))
                }
                Err(error) => Err(error),
            }
        })
    }
}

/// Whether the server says that this checkpoint is at fault, as opposed to failing itself, not
/// being reached or not allowing it: those may be over soon, and an earlier checkpoint lose steps.
fn is_about_the_checkpoint(error: &Error) -> bool {
    match error {
        Error::RequestFailed { category, .. } => *category == ErrorCategory::User,
        error => {
            matches!(
                error.kind(),
                Some(ErrorKind::NotFound | ErrorKind::InvalidRequest)
            )
        }
    }
}

impl Trainer for TrainingClient {
    fn is_repeating(&self) -> bool {
        Self::is_repeating(self)
    }

    fn forward_backward(&mut self, data: Vec<Datum>) -> Pending<'static, ForwardBackwardOutput> {
        pending(Self::forward_backward(self, data, LossFn::CrossEntropy))
    }

    fn forward(&mut self, data: Vec<Datum>) -> Pending<'static, ForwardBackwardOutput> {
        pending(Self::forward(self, data, LossFn::CrossEntropy))
    }

    fn optim_step(&mut self, adam: AdamParams) -> Pending<'static, OptimStepResponse> {
        pending(Self::optim_step(self, adam))
    }

    fn save_state(&mut self, name: &str, ttl_seconds: Option<u64>) -> Pending<'static, TinkerPath> {
        let ttl = ttl_seconds.map(Duration::from_secs);
        pending(Self::save_state(
            self,
            name,
            SaveOptions {
                ttl,
                ..SaveOptions::default()
            },
        ))
    }

    fn save_sampler(&mut self, name: &str) -> Pending<'static, TinkerPath> {
        pending(self.save_weights_for_sampler(name, SaveOptions::default()))
    }
}

/// The operation was submitted when `future` was made; this only changes its type.
fn pending<T: Send + 'static>(future: ApiFuture<T>) -> Pending<'static, T> {
    Box::pin(future)
}

#[cfg(test)]
mod tests {
    use tinker_api::RequestType;

    use super::*;

    #[test]
    fn only_the_users_fault_makes_a_checkpoint_unusable() {
        let check = |category, expected| {
            let error = Error::RequestFailed {
                operation: RequestType::LoadWeights,
                category,
                message: "m".to_owned(),
                request_id: "r".parse().unwrap(),
            };
            assert_eq!(is_about_the_checkpoint(&error), expected, "{error}");
        };

        check(ErrorCategory::User, true);
        check(ErrorCategory::Server, false);
        check(ErrorCategory::Unknown("new".to_owned()), false);
    }
}
