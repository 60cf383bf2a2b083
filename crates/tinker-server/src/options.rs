//! How to serve.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::time::Duration;

use tinker_engine::{Precision, Quantization};
use tinker_types::ClientConfig;

use crate::device::Device;
use crate::tls::TlsFiles;
use crate::token::ApiToken;

/// The settings handed to clients: the defaults of the API are right for a server on the same machine
/// (nothing is gained by compressing), and clients that share a sampler are told apart by the server.
pub(crate) fn default_client_config() -> ClientConfig {
    ClientConfig {
        custom_loss_server_side: true,
        sample_join_sampling_session: true,
        ..ClientConfig::default()
    }
}

/// Settings of a server.
#[derive(Debug, Clone)]
pub struct ServeOptions {
    /// Data directory; the server keeps its files in `server/` and `models/` under it.
    pub home: PathBuf,
    /// Address to bind. Anything but loopback should come with keys ([`crate::add_key`]).
    pub host: IpAddr,
    /// Port to bind; 0 takes any free one.
    pub port: u16,
    /// Serve this address by TLS. Clients on this machine have an address without beside it, on loopback.
    pub tls: Option<TlsFiles>,
    /// Token to ask for; `None` keeps the data directory's own, made on first use.
    pub token: Option<ApiToken>,
    /// Model directories on offer beside the embedded model.
    pub models: Vec<PathBuf>,
    /// More of them, by the names under which they are on offer; see [`crate::check_model_name`].
    pub named_models: BTreeMap<String, PathBuf>,
    /// Bytes that each base model may take in training for what its backward passes read; `None` lets
    /// the engine choose. What does not fit is computed again.
    pub training_memory: Option<u64>,
    /// Fewer bits for the weights of base models; `None` keeps those of their files.
    pub weights: Option<Quantization>,
    /// What computes.
    pub device: Device,
    /// Numbers that weights and what they are multiplied with are rounded to.
    pub precision: Precision,
    /// Threads of the engine; 0 takes one per core.
    pub threads: usize,
    /// Most bytes of files that the server keeps; `None` for as many as the disk has room for.
    pub max_disk_bytes: Option<u64>,
    /// Most connections at a time; `None` for as many as this process may have files, less a quarter for
    /// everything else.
    pub max_connections: Option<usize>,
    /// Longest a poll is held; `None` for as long as clients wait for its answer.
    pub poll_hold: Option<Duration>,
    /// Leave after this long without requests, heartbeats or work; `None` stays.
    pub idle_timeout: Option<Duration>,
    /// A Hugging Face hub cache to put the embedded model's tokenizer in, so that
    /// `AutoTokenizer.from_pretrained("tinker/nano")` works offline.
    pub hf_cache: Option<PathBuf>,
    /// Settings handed to clients.
    pub client_config: ClientConfig,
    /// Version to report.
    pub version: String,
}

impl ServeOptions {
    /// Serves `home` on any free loopback port with everything else at its default.
    #[must_use]
    pub fn new(home: impl Into<PathBuf>) -> Self {
        Self {
            home: home.into(),
            host: IpAddr::V4(Ipv4Addr::LOCALHOST),
            port: 0,
            tls: None,
            token: None,
            models: Vec::new(),
            named_models: BTreeMap::new(),
            training_memory: None,
            weights: None,
            device: Device::Auto,
            precision: Precision::default(),
            threads: 0,
            max_disk_bytes: None,
            max_connections: None,
            poll_hold: None,
            idle_timeout: None,
            hf_cache: None,
            client_config: default_client_config(),
            version: env!("CARGO_PKG_VERSION").into(),
        }
    }
}
