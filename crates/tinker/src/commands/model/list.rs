//! `tinker model list`.

use tinker_types::SupportedModel;

use crate::connect::Connection;
use crate::context::Ctx;
use crate::failure::{Failure, Result};
use crate::output::Output;

/// List the base models that the server offers
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Show only models whose name contains this, in either case
    #[arg(value_name = "TEXT")]
    filter: Option<String>,
}

pub(super) async fn run(ctx: &Ctx, args: &Args) -> Result<Output> {
    let connection = Connection::open(ctx, ctx.settings.target(None)?).await?;
    let mut models = connection.models().await?;
    if let Some(filter) = &args.filter {
        let filter_lower = filter.to_lowercase();
        models.retain(|model| name(model).to_lowercase().contains(&filter_lower));
        if models.is_empty() {
            return Err(
                Failure::not_found(format!("no model name contains `{filter}`"))
                    .hint("`tinker model list` shows every model of this server"),
            );
        }
    }
    let header = ["Model", "Max Context", "Trainable", "Sampleable"];
    let row = |model: &SupportedModel| {
        let length = model.max_context_length;
        vec![
            name(model).to_owned(),
            length.map_or_else(|| "-".to_owned(), |length| length.to_string()),
            yes(model.trainable),
            yes(model.sampleable),
        ]
    };
    Ok(Output::list("models", &models, &header, row)?)
}

fn name(model: &SupportedModel) -> &str {
    model.model_name.as_deref().unwrap_or("-")
}

fn yes(flag: Option<bool>) -> String {
    match flag {
        Some(true) => "Yes",
        Some(false) => "No",
        None => "-",
    }
    .to_owned()
}
