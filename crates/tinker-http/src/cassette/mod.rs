//! Record and replay: a file of all that was said to a server, without its secrets, which can be
//! read by people and programs and answers a client in the server's place.
//!
//! A cassette is text, one JSON object a line: a head with the version of the format, then one
//! [`Exchange`] for every time that a request was sent, repetitions and failures included. A
//! [`Recorder`] writes it, [`Cassette`] reads it, [`Replay`] serves it.
//!
//! What never gets into it: the API key, tokens, the headers of gateways and proxies (only harmless
//! headers are kept at all), and the queries of absolute addresses, which is where signed URLs
//! carry their permission. Prompts, data and results are kept: they are what is recorded.

mod body;
mod matching;
mod recorder;
mod redact;
mod replay;
mod summary;
mod tape;

pub use body::Body;
pub use recorder::{Recorder, RecorderStats};
pub(crate) use redact::Secrets;
pub use replay::{Pace, Replay, ReplayReport, Unmatched};
pub use summary::{RouteSummary, Summary};
pub use tape::{Cassette, Exchange, Outcome};
