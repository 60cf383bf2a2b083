//! Those who sample: with and without what the cache has, from samplers that come and go, and giving up.

use std::time::{Duration, Instant};

use tinker_api::{
    FinishReason, ModelInput, Page, SampleOptions, SamplingClient, SamplingParams, SamplingSource,
    ServiceClient, Stop,
};

use super::super::Tally;
use super::{Client, demand, text};

/// Tokens that prompts share with those before them.
const SHARED: usize = 96;
/// Rounds that a sampler lives.
const SAMPLER_LEN: u64 = 400;

/// A sampler in use.
#[derive(Debug)]
pub(super) struct Sampler {
    service: ServiceClient,
    client: SamplingClient,
    shared: Vec<u32>,
}

/// Draws so many tokens, never fewer.
pub(in crate::soak) fn params(max_tokens: u32) -> SamplingParams {
    SamplingParams {
        max_tokens: Some(max_tokens),
        stop: Some(Stop::Tokens(vec![])),
        ..SamplingParams::default()
    }
}

/// Ends a session. A failure is none: a closing client tries once for 3 s, and what it could not end
/// ends by its silence.
pub(super) async fn end(service: &ServiceClient) {
    let _ = service.close(FinishReason::Success, None).await;
}

impl Client {
    /// Some samples at once: a timed one of one token, one that shares its beginning, one that does not.
    pub(super) async fn sample(&mut self, tally: &Tally) -> Result<(), String> {
        let sampler = match self.sampler.take() {
            Some(sampler) => sampler,
            None => self.new_sampler().await?,
        };
        let short = ModelInput::from_tokens(self.tokens(4));
        let begun = Instant::now();
        let one = sampler
            .client
            .sample(short, params(1), SampleOptions::default());
        one.await.map_err(text)?;
        tally.took(begun.elapsed());
        let shared = [sampler.shared.clone(), self.tokens(6)].concat();
        let prompts = [shared, self.tokens(40)];
        let asked = prompts.map(|prompt| {
            let options = SampleOptions {
                num_samples: 1 + self.draws.below(3) as u32,
                ..SampleOptions::default()
            };
            let prompt = ModelInput::from_tokens(prompt);
            sampler.client.sample(prompt, params(6), options)
        });
        for sampled in asked {
            let sequences = sampled.await.map_err(text)?.sequences;
            let is_whole = sequences.iter().all(|sequence| sequence.tokens.len() == 6);
            demand(is_whole, || "a continuation of another length".to_owned())?;
        }
        if !self.n_done.is_multiple_of(SAMPLER_LEN) {
            self.sampler = Some(sampler);
        } else {
            end(&sampler.service).await;
        }
        Ok(())
    }

    async fn new_sampler(&mut self) -> Result<Sampler, String> {
        let service = self.service();
        let source = SamplingSource::BaseModel(self.place.base_model.clone());
        let client = service.create_sampling_client(source).await.map_err(text)?;
        let shared = self.tokens(SHARED);
        Ok(Sampler {
            service,
            client,
            shared,
        })
    }

    /// Samplers that are used once, in a session that is ended or not.
    pub(super) async fn make_samplers(&mut self) -> Result<(), String> {
        let sampler = self.new_sampler().await?;
        for _ in 0..3 {
            let source = SamplingSource::BaseModel(self.place.base_model.clone());
            let another = sampler.service.create_sampling_client(source);
            let another = another.await.map_err(text)?;
            let prompt = ModelInput::from_tokens(self.tokens(8));
            let sampled = another.sample(prompt, params(2), SampleOptions::default());
            sampled.await.map_err(text)?;
        }
        if self.draws.below(2) == 0 {
            return Ok(());
        }
        end(&sampler.service).await;
        Ok(())
    }

    /// Gives a long sample up after a moment; the next one is as good as any.
    pub(super) async fn cancel(&mut self) -> Result<(), String> {
        let sampler = match self.sampler.take() {
            Some(sampler) => sampler,
            None => self.new_sampler().await?,
        };
        for _ in 0..2 {
            let prompt = ModelInput::from_tokens(self.tokens(16));
            let long = sampler
                .client
                .sample(prompt, params(400), SampleOptions::default());
            let moment = Duration::from_millis(self.draws.below(60));
            if let Ok(Err(error)) = tokio::time::timeout(moment, long).await {
                return Err(text(error));
            }
        }
        let prompt = ModelInput::from_tokens(self.tokens(4));
        let sampled = sampler
            .client
            .sample(prompt, params(1), SampleOptions::default());
        sampled.await.map_err(text)?;
        self.sampler = Some(sampler);
        Ok(())
    }

    /// Looks at everything there is, in a session of its own.
    pub(super) async fn visit(&mut self) -> Result<(), String> {
        let service = self.service();
        service.session_id().await.map_err(text)?;
        service.get_server_capabilities().await.map_err(text)?;
        let rest = service.rest_client();
        let page = Page::first(20);
        rest.list_training_runs(page).await.map_err(text)?;
        rest.list_user_checkpoints(page).await.map_err(text)?;
        if self.draws.below(2) == 0 {
            return Ok(());
        }
        end(&service).await;
        Ok(())
    }
}
