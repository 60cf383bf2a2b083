//! Record and replay: a file of all that was said to a server, without its secrets, that can be
//! looked into and answers clients in the server's place.
//!
//! ```no_run
//! # async fn example() -> tinker_api::Result<()> {
//! use tinker_api::ServiceClient;
//! use tinker_api::cassette::{Cassette, Pace, Recorder, Replay};
//!
//! let recorder = Recorder::create("run.cassette.jsonl")?;
//! let service = ServiceClient::builder("http://127.0.0.1:8000")
//!     .api_key("tml-…".parse()?)
//!     .record(recorder.clone())
//!     .build()?;
//! service.get_server_capabilities().await?;
//! recorder.finish().await?;
//!
//! let cassette = Cassette::open("run.cassette.jsonl")?;
//! print!("{}", cassette.summary());
//! let replay = Replay::start(cassette, Pace::Instant).await?;
//! let service = ServiceClient::builder(replay.base_url().to_string())
//!     .api_key("tml-any".parse()?)
//!     .build()?;
//! service.get_server_capabilities().await?;
//! assert!(replay.report().unmatched.is_empty());
//! # Ok(())
//! # }
//! ```

pub use tinker_http::{
    Body, Cassette, Exchange, Outcome, Pace, Recorder, RecorderStats, Replay, ReplayReport,
    RouteSummary, Summary, Unmatched,
};
