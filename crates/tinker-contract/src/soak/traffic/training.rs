//! Those who train: steps, saves of every kind, loads, and runs that end or are left.

use std::time::Duration;

use serde_json::json;
use tinker_api::{
    AdamParams, Datum, LoraConfig, LossFn, ModelInput, SampleOptions, SamplerKind, SamplingClient,
    SaveOptions, ServiceClient, StateOptions, TrainingClient,
};

use super::plain::call;
use super::sampling::{end, params};
use super::{Client, demand, text};

/// Rounds of a run.
const RUN_LEN: u64 = 48;
/// Of so many runs one is left silent at its end, the others are unloaded and their sessions ended.
const LEFT_ONE_IN: u64 = 8;
/// Data of a step.
const N_DATA: u64 = 3;

/// A run under way.
#[derive(Debug)]
pub(super) struct Trainer {
    service: ServiceClient,
    client: TrainingClient,
}

impl Client {
    /// One step, and whatever else is due.
    pub(super) async fn train(&mut self, rank: u32) -> Result<(), String> {
        let trainer = match self.trainer.take() {
            Some(trainer) => trainer,
            None => self.begin_run(rank).await?,
        };
        self.step(&trainer.client).await?;
        let client = &trainer.client;
        match self.n_done % 16 {
            2 => save_latest(client).await?,
            5 => self.save_and_delete(&trainer).await?,
            8 => self.sample_named(&trainer).await?,
            11 => {
                let sampler = client.save_weights_and_get_sampling_client(SamplerKind::Snapshot);
                self.sample_from(&sampler.await.map_err(text)?).await?;
            }
            14 => self.load_latest(&trainer).await?,
            _ => {}
        }
        if !self.n_done.is_multiple_of(RUN_LEN) {
            self.trainer = Some(trainer);
        } else if self.draws.below(LEFT_ONE_IN) > 0 {
            self.unload(&trainer.client).await?;
            end(&trainer.service).await;
        }
        Ok(())
    }

    /// Lets the server free the memory of a run, as those do who need it no longer.
    async fn unload(&self, client: &TrainingClient) -> Result<(), String> {
        let request = json!({"model_id": client.training_run_id(), "type": "unload_model"});
        let asked = call(&self.place, "/api/v1/unload_model", &request).await?;
        asked.success().map(drop)
    }

    /// A second run from what the first one saved last, in the same session; it is not trained.
    async fn load_latest(&self, trainer: &Trainer) -> Result<(), String> {
        save_latest(&trainer.client).await?;
        let checkpoints = trainer.service.rest_client();
        let run = trainer.client.training_run_id();
        let found = checkpoints.list_checkpoints(run).await.map_err(text)?;
        let latest = found
            .into_iter()
            .map(|checkpoint| checkpoint.tinker_path)
            .find(|path| path.checkpoint.name() == "latest")
            .ok_or("the list has no checkpoint `latest`")?;
        let created = trainer
            .service
            .create_training_client_from_state_with_optimizer(&latest, StateOptions::default());
        self.unload(&created.await.map_err(text)?).await
    }

    async fn begin_run(&mut self, rank: u32) -> Result<Trainer, String> {
        let service = self.service();
        let lora = LoraConfig {
            rank,
            seed: Some(self.draws.below(1 << 30)),
            ..LoraConfig::default()
        };
        let created = service.create_lora_training_client(&self.place.base_model, lora);
        let client = created.await.map_err(text)?;
        Ok(Trainer { service, client })
    }

    async fn step(&mut self, client: &TrainingClient) -> Result<(), String> {
        let data = (0..N_DATA).map(|_| self.datum()).collect();
        let pass = client.forward_backward(data, LossFn::CrossEntropy);
        let step = client.optim_step(AdamParams {
            learning_rate: 1e-4,
            grad_clip_norm: 1.0,
            ..AdamParams::default()
        });
        let loss = pass.await.map_err(text)?.metrics["loss:sum"];
        step.await.map_err(text)?;
        demand(loss.is_finite(), || format!("a loss of {loss}"))
    }

    fn datum(&mut self) -> Datum {
        let n = 8 + self.draws.below(56) as usize;
        let row = self.tokens(n + 1);
        let input = ModelInput::from_tokens(row[..n].to_vec());
        Datum::cross_entropy(input, row[1..].to_vec(), vec![1.0; n]).expect("equal lengths")
    }

    async fn save_and_delete(&mut self, trainer: &Trainer) -> Result<(), String> {
        let options = SaveOptions {
            ttl: Some(Duration::from_secs(3600)),
            ..SaveOptions::default()
        };
        let name = format!("state-{}", self.n_done);
        let path = trainer.client.save_state(name, options).await;
        let deleted = trainer.service.rest_client();
        let path = path.map_err(text)?;
        deleted.delete_checkpoint(&path).await.map_err(text)
    }

    async fn sample_named(&mut self, trainer: &Trainer) -> Result<(), String> {
        let name = format!("sampler-{}", self.n_done);
        let saved = trainer
            .client
            .save_weights_for_sampler(name, SaveOptions::default());
        let path = saved.await.map_err(text)?;
        let sampler = trainer.service.create_sampling_client(&path);
        let sampler = sampler.await.map_err(text)?;
        self.sample_from(&sampler).await?;
        let rest = trainer.service.rest_client();
        rest.delete_checkpoint(&path).await.map_err(text)
    }

    async fn sample_from(&mut self, sampler: &SamplingClient) -> Result<(), String> {
        let prompt = ModelInput::from_tokens(self.tokens(12));
        let options = SampleOptions {
            num_samples: 2,
            ..SampleOptions::default()
        };
        let sampled = sampler.sample(prompt, params(8), options).await;
        let n = sampled.map_err(text)?.sequences.len();
        demand(n == 2, || format!("{n} continuations instead of 2"))
    }
}

async fn save_latest(client: &TrainingClient) -> Result<(), String> {
    let options = SaveOptions {
        overwrite: true,
        ..SaveOptions::default()
    };
    let saved = client.save_state("latest", options).await;
    saved.map(drop).map_err(text)
}
