//! Transport of the Tinker API: everything between a typed request and a typed response.
//!
//! [`Client`] authenticates, retries and polls; it has one method per endpoint. Every decision
//! about time is made by the pure state machines of [`machine`]; the async code carries them out.

mod adaptive;
mod auth;
mod base_url;
mod builder;
mod call;
mod capability;
mod cassette;
mod client;
mod clock;
mod completion_poller;
mod completion_table;
mod credentials;
mod document;
mod download;
mod endpoints;
mod error;
mod event;
mod future_driver;
mod heartbeats;
mod identity;
mod in_flight;
mod inquiry;
mod limits;
pub mod machine;
mod pools;
mod request_type;
mod send;
mod setup;
mod spans;
mod stored_credentials;
mod telemetry;
mod tls;
mod tokens;

pub use adaptive::{AdaptiveGate, Place};
pub use auth::ApiKey;
pub use base_url::BaseUrl;
pub use builder::{ClientBuilder, PROTOCOL_VERSION};
pub use cassette::{
    Body, Cassette, Exchange, Outcome, Pace, Recorder, RecorderStats, Replay, ReplayReport,
    RouteSummary, Summary, Unmatched,
};
pub use client::Client;
pub use completion_poller::{Completed, CompletionPoller};
pub use credentials::{CredentialOrigin, CredentialSources, Credentials};
pub use download::{
    Download, DownloadEvent, DownloadLimits, DownloadOptions, MANIFEST, Manifest, ManifestEntry,
    RemoteFile, SignedFiles, Source, Unpacked, unpack,
};
pub use endpoints::AsampleReply;
pub use endpoints::PreparedPass;
pub use endpoints::{AccessScope, Page};
pub use error::{Error, ErrorKind, Result};
pub use event::Event;
pub use future_driver::Resolved;
pub use heartbeats::Heartbeats;
pub use in_flight::{FlightState, InFlight};
pub use limits::{ByteGate, BytePermit};
pub use machine::{PollPolicy, RetryPolicy};
pub use pools::{Timeouts, TrafficClass};
pub use request_type::RequestType;
pub use stored_credentials::{KeyOrigin, StoredCredentials, StoredKey};
