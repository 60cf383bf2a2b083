//! The Tinker API served from this machine: sessions, LoRA training and sampling over HTTP.
//!
//! [`serve`] (or [`Server::bind`] and [`Server::run`]) is the whole interface for the command line;
//! [`read_lock`] and [`is_running`] find a server that another process started, and
//! [`resolve_model`] finds a base model by name. [`App`] and [`router()`] are the server without its
//! socket, as tests use it.

mod access;
mod accounts;
mod adapter_files;
mod api_error;
mod app;
mod attempts;
mod auth;
mod backup;
mod blob;
mod body;
mod bundle;
mod caller;
mod catalog;
mod clock;
mod completions;
mod copies;
mod core;
mod custom_loss;
mod db;
mod deletions;
mod disk;
mod engine;
mod error;
mod future_store;
mod identity;
mod imports;
mod inference;
mod journal;
mod keys;
mod limits;
mod links;
mod lock;
mod loss_inputs;
mod metrics;
mod models;
mod names;
mod operation;
mod options;
mod paths;
mod pending;
mod process;
mod quota;
mod router;
mod routes;
mod scheduler;
mod segment_log;
mod server;
mod summary;
mod tls;
mod token;
mod trace;
mod watchers;

pub use crate::core::LoadBackend;
pub use access::ACCESS_LOG;
pub use app::{App, AppOptions};
pub use backup::{Backup, back_up, check_free, place_backup};
pub use caller::Scope;
pub use disk::{Disk, OsDisk};
pub use error::{Error, Result};
pub use keys::{KeyLimits, KeyName, StoredKey, add_key, list_keys, remove_key};
pub use limits::Limits;
pub use lock::{LockInfo, Outside, create_server_dir, is_running, read_lock, server_dir};
pub use models::{BaseModel, list_models, resolve_model};
pub use options::ServeOptions;
pub use router::router;
pub use server::{Server, serve};
pub use summary::{Observer, Summary};
pub use tinker_engine::{Precision, Quantization};
pub use tls::TlsFiles;
pub use token::ApiToken;
