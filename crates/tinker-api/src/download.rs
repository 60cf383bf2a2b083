//! Downloads of weights: in parallel parts, gone on with after an interruption, checked and safely
//! unpacked.
//!
//! ```no_run
//! # async fn example(service: tinker_api::ServiceClient) -> tinker_api::Result<()> {
//! use std::path::Path;
//! use tinker_api::TinkerPath;
//! use tinker_api::download::DownloadEvent;
//!
//! let path: TinkerPath = "tinker://S1:train:0/external_weights/final".parse()?;
//! let download = service.rest_client().download().observer(|event| {
//!     if let DownloadEvent::Progress { done_bytes, known_bytes } = event {
//!         println!("{done_bytes} of {known_bytes}");
//!     }
//! });
//! let manifest = download.external_weights(&path, Path::new("final")).await?;
//! manifest.verify(Path::new("final"))?;
//! # Ok(())
//! # }
//! ```

pub use tinker_http::{
    Download, DownloadEvent, DownloadLimits, DownloadOptions, MANIFEST, Manifest, ManifestEntry,
    RemoteFile, SignedFiles, Source, Unpacked, unpack,
};
