//! A sampler with the tokenizer and chat format of its model: text in, text out.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context as _;
use tinker_api::SamplingClient;
use tinker_chat::{Renderer, RendererName};
use tinker_types::{FinishReason, SamplingParams, Stop};

use crate::base_model::BaseModel;
use crate::commands::train;
use crate::connect::Connection;
use crate::context::Ctx;
use crate::failure::Result;
use crate::numbers::{positive, signed};
use crate::settings::DEFAULT_MODEL;
use crate::weights::Weights;

/// The flags that choose weights and how text becomes tokens.
#[derive(Debug, Clone, clap::Args)]
#[group(skip)]
pub(crate) struct Flags {
    /// Base model, model directory, tinker://RUN/sampler_weights/NAME, RUN@NAME of a run folder, or
    /// @last for the newest
    #[arg(short, long, value_name = "MODEL", default_value = DEFAULT_MODEL)]
    pub(crate) model: String,
    /// Chat format [default: that of the run, else of the model]
    #[arg(long, value_name = "NAME")]
    pub(crate) renderer: Option<RendererName>,
    /// Directory with the model's tokenizer, for models that are not on this machine
    #[arg(long, value_name = "DIR")]
    pub(crate) tokenizer: Option<PathBuf>,
}

/// How to draw tokens.
#[derive(Debug, Clone, clap::Args)]
#[group(skip)]
#[command(next_help_heading = "Sampling options")]
pub(crate) struct SamplingFlags {
    /// Most tokens to generate
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = positive)]
    pub(crate) max_tokens: u32,
    /// Softens the choice above 1, sharpens it below; 0 always takes the most likely token
    #[arg(long, value_name = "X", default_value_t = 1.0, value_parser = parse_temperature)]
    pub(crate) temperature: f64,
    /// Choose among the K most likely tokens; -1 among all
    #[arg(long, value_name = "K", default_value_t = -1, value_parser = parse_top_k)]
    pub(crate) top_k: i64,
    /// Choose among the most likely tokens up to this share
    #[arg(long, value_name = "P", default_value_t = 1.0, value_parser = parse_top_p)]
    pub(crate) top_p: f64,
    /// Seed of the draws
    #[arg(long, value_name = "N", value_parser = signed)]
    pub(crate) seed: Option<i64>,
    /// Stop at this text too; may be repeated
    #[arg(long, value_name = "TEXT", value_parser = parse_stop)]
    pub(crate) stop: Vec<String>,
}

impl SamplingFlags {
    /// The parameters to ask the server for, with `stop` of the chat format if there is one.
    fn params(&self, stop: Option<Stop>) -> SamplingParams {
        SamplingParams {
            max_tokens: Some(self.max_tokens),
            seed: self.seed,
            stop,
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
        }
    }
}

/// Weights that can be talked to.
#[derive(Debug)]
pub(crate) struct Speaker {
    connection: Connection,
    /// The sampler.
    pub(crate) sampler: SamplingClient,
    /// Its base model.
    pub(crate) model: BaseModel,
    /// What the person calls it: a path, or the base model's name.
    pub(crate) label: String,
    renderer: Option<RendererName>,
}

impl Speaker {
    /// Finds the weights, starts a server if need be, and makes a sampler of them.
    ///
    /// # Errors
    /// The weights do not exist or cannot be sampled, or the model's tokenizer is not here.
    pub(crate) async fn open(ctx: &Ctx, flags: &Flags) -> Result<Self> {
        let weights = Weights::find(&train::runs(ctx), &flags.model)?;
        let target = ctx.settings.target(weights.base_model())?;
        let find = |name: &str| {
            BaseModel::find(
                &ctx.settings.home,
                name,
                &target,
                flags.tokenizer.as_deref(),
            )
        };
        // What is known here is checked before a server is started.
        let known = weights.base_model().map(find).transpose()?;
        let connection = Connection::open(ctx, target.clone()).await?;
        let (sampler, model, label) = match &weights {
            Weights::Base(_) => {
                let model = known.context("a base model has a name")?;
                let sampler = connection.sampler_of_base(&model.name).await?;
                let label = model.name.clone();
                (sampler, model, label)
            }
            Weights::Checkpoint { path, .. } => {
                let sampler = connection.sampler_of_checkpoint(path).await?;
                let model = match known {
                    Some(model) => model,
                    None => find(&connection.weights_info(path).await?.base_model)?,
                };
                (sampler, model, path.to_string())
            }
        };
        let recorded = match &weights {
            Weights::Checkpoint {
                origin: Some(origin),
                ..
            } => Some(origin.renderer),
            _ => None,
        };
        Ok(Self {
            connection,
            sampler,
            model,
            label,
            renderer: flags.renderer.or(recorded),
        })
    }

    /// Ends the session that the sampler belongs to.
    pub(crate) async fn close(self) {
        self.connection.close(FinishReason::Success).await;
    }

    /// Makes sure that the server is still there.
    ///
    /// # Errors
    /// As [`Connection::mend`].
    pub(crate) async fn mend(&self, ctx: &Ctx) -> Result<()> {
        self.connection.mend(ctx).await
    }

    /// The chat format.
    ///
    /// # Errors
    /// Nobody names one, or the tokenizer lacks its markers.
    pub(crate) fn renderer(&self) -> Result<Arc<dyn Renderer>> {
        let name = self.model.renderer_name(self.renderer)?;
        let renderer = tinker_chat::renderer(name, Arc::clone(&self.model.tokenizer));
        Ok(renderer?)
    }

    /// The parameters for a reply in the format of `renderer`, or for plain text without one.
    ///
    /// # Errors
    /// The tokenizer cannot spell the format's stop token.
    pub(crate) fn params(
        &self,
        flags: &SamplingFlags,
        renderer: Option<&dyn Renderer>,
    ) -> Result<SamplingParams> {
        let own = renderer.map(Renderer::stop);
        if flags.stop.is_empty() {
            return Ok(flags.params(own));
        }
        // The wire takes texts or token ids, not both, so the format's stop joins as text.
        let mut texts = flags.stop.clone();
        match own {
            Some(Stop::Text(text)) => texts.push(text),
            Some(Stop::Texts(more)) => texts.extend(more),
            Some(Stop::Tokens(tokens)) => {
                for token in tokens {
                    let text = self.model.tokenizer.decode(&[token]);
                    texts.push(text.map_err(anyhow::Error::new)?);
                }
            }
            None => {}
        }
        Ok(flags.params(Some(Stop::Texts(texts))))
    }
}

/// A stop text ends the answer and is no part of it, nor is what its last token spells after it.
pub(crate) fn without_stop(mut text: String, stops: &[String]) -> String {
    let found = stops.iter().filter(|stop| !stop.is_empty());
    if let Some(at) = found.filter_map(|stop| text.find(stop.as_str())).min() {
        text.truncate(at);
    }
    text
}

fn parse_stop(text: &str) -> std::result::Result<String, String> {
    match text {
        "" => Err("write at least one character".to_owned()),
        text => Ok(text.to_owned()),
    }
}

fn parse_temperature(text: &str) -> std::result::Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value.is_finite() && value >= 0.0 => Ok(value),
        _ => Err("write a number of at least 0".to_owned()),
    }
}

fn parse_top_p(text: &str) -> std::result::Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value > 0.0 && value <= 1.0 => Ok(value),
        _ => Err("write a number above 0, at most 1".to_owned()),
    }
}

fn parse_top_k(text: &str) -> std::result::Result<i64, String> {
    match text.parse::<i64>() {
        Ok(value) if value == -1 || value > 0 => Ok(value),
        _ => Err("write a whole number of at least 1, or -1 for all".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stop_text_is_no_part_of_the_answer() {
        let stops = ["!".to_owned(), "END".to_owned()];

        assert_eq!(without_stop("aye END".to_owned(), &stops), "aye ");
        assert_eq!(without_stop("aye!). END".to_owned(), &stops), "aye");
        assert_eq!(without_stop("aye".to_owned(), &stops), "aye");
    }

    #[test]
    fn sampling_values_out_of_range_are_refused() {
        for bad in ["-1", "NaN", "inf", "warm"] {
            assert!(parse_temperature(bad).is_err(), "{bad}");
        }
        for bad in ["0", "1.1", "-0.5", "NaN"] {
            assert!(parse_top_p(bad).is_err(), "{bad}");
        }
        for bad in ["0", "-2", "1.5"] {
            assert!(parse_top_k(bad).is_err(), "{bad}");
        }
        assert_eq!(parse_temperature("0"), Ok(0.0));
        assert_eq!(parse_top_p("1"), Ok(1.0));
        assert_eq!(parse_top_k("-1"), Ok(-1));
    }
}
