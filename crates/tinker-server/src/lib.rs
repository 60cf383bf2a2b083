//! The Tinker API served from this machine: sessions, LoRA training and sampling over HTTP.
//!
//! [`serve`] (or [`Server::bind`] and [`Server::run`]) is the whole interface for the command line;
//! [`read_lock`] and [`is_running`] find a server that another process started, and
//! [`resolve_model`] finds a base model by name.

pub mod api_error;
mod app;
mod auth;
mod disk;
mod error;
mod lock;
mod models;
mod options;
mod router;
mod routes;
mod server;
mod token;

pub use disk::{Disk, OsDisk};
pub use error::{Error, Result};
pub use lock::{LockInfo, is_running, read_lock, server_dir};
pub use models::{BaseModel, list_models, resolve_model};
pub use options::ServeOptions;
pub use server::{Server, serve};
pub use token::ApiToken;
