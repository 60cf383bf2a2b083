//! Downloads of weights: the files of an external checkpoint, or an archive that is unpacked.
//!
//! A file comes in ranged parts, several at a time. What has come is written down as it comes, so
//! that a download that was cut off, in this process or another, goes on where it stopped. Signed
//! addresses are asked for anew before they expire. When all is there its SHA-256 sums are taken and
//! compared with those that are known, and the folder appears under its name in one step.
//!
//! The key never goes to where the addresses point: these requests are made by a client that does
//! not have it, redirects included. What comes from there is not trusted either: names that lead
//! out of the folder, links, devices and floods of entries are refused.

mod event;
mod journal;
mod manifest;
mod names;
mod options;
mod parts;
mod source;
mod storage;
mod taken;
mod transfer;
mod unpack;
mod whole;

pub use event::DownloadEvent;
pub use manifest::{MANIFEST, Manifest, ManifestEntry};
pub use options::{DownloadLimits, DownloadOptions};
pub use source::{RemoteFile, SignedFiles, Source};
pub use unpack::{Unpacked, unpack};
pub use whole::Download;
