//! What the examples share: the server and key of the environment. Examples live beside this file's
//! folder, one file each.

use anyhow::Context;
use tinker_api::{ServiceClient, ServiceClientBuilder};

/// A client of the server that `TINKER_BASE_URL` and `TINKER_API_KEY` name.
///
/// # Errors
/// If a variable is missing or malformed.
pub fn service_from_environment() -> anyhow::Result<ServiceClient> {
    Ok(builder_from_environment()?.build()?)
}

/// The same, before it is built.
///
/// # Errors
/// If a variable is missing or malformed.
pub fn builder_from_environment() -> anyhow::Result<ServiceClientBuilder> {
    let base_url = variable("TINKER_BASE_URL")?;
    let key = variable("TINKER_API_KEY")?.parse()?;
    Ok(ServiceClient::builder(base_url).api_key(key))
}

#[expect(
    clippy::disallowed_methods,
    reason = "examples are programs: they read the environment"
)]
fn variable(name: &str) -> anyhow::Result<String> {
    std::env::var(name)
        .with_context(|| format!("set {name}; `tinker serve` prints it for the embedded server"))
}

/// The first model that can be trained.
///
/// # Errors
/// If the server offers none.
pub async fn first_model(service: &ServiceClient) -> anyhow::Result<String> {
    let offer = service.get_server_capabilities().await?;
    offer
        .supported_models
        .into_iter()
        .filter(|model| model.trainable != Some(false))
        .find_map(|model| model.model_name)
        .context("the server offers no model that can be trained")
}
