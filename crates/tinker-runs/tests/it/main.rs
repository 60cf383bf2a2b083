//! Run folders on a real file system, in temporary directories.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

mod finding;
mod reading;
mod writing;
