//! The clients for scripts without an async runtime.
//!
//! Each client here owns the async one beside a runtime on a thread of its own. Training and
//! sampling methods submit at once and return a [`Pending`]; [`Pending::wait`] blocks. Everything
//! that has no method here, such as the calls of a [`RestClient`](crate::RestClient), runs through
//! [`ServiceClient::wait_for`]. Blocking is allowed anywhere, also within another runtime, whose
//! thread it then holds up; only not in an observer of the same client, whose thread brings the results:
//! there it is an error.
//!
//! A training operation that was called is sent, even if nobody waits for its result: dropping the
//! last of these clients and results takes until all of them are sent, at most 30 s.
//!
//! ```no_run
//! # fn example(data: Vec<tinker_api::Datum>) -> tinker_api::Result<()> {
//! use tinker_api::{AdamParams, LoraConfig, LossFn, blocking};
//!
//! let builder = tinker_api::ServiceClient::builder("http://127.0.0.1:8000");
//! let service = blocking::ServiceClient::new(builder.api_key("tml-…".parse()?))?;
//! let trainer = service.create_lora_training_client("tinker/nano", LoraConfig::default())?;
//! let pass = trainer.forward_backward(data, LossFn::CrossEntropy);
//! let step = trainer.optim_step(AdamParams::default());
//! println!("loss {}", pass.wait()?.metrics["loss:sum"]);
//! step.wait()?;
//! let rest = service.inner().rest_client();
//! let runs = service.wait_for(async move { rest.list_all_training_runs(None).await })?;
//! println!("{} training runs", runs.len());
//! # Ok(())
//! # }
//! ```

mod background;
mod pending;
mod sampling_client;
mod service_client;
mod training_client;

use background::Background;
pub use pending::Pending;
pub use sampling_client::SamplingClient;
pub use service_client::ServiceClient;
pub use training_client::TrainingClient;
