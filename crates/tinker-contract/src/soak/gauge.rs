//! A server's process from outside: its memory, files and threads, its data directory, its counters.

use std::path::Path;

use serde::Serialize;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::{Counts, Place};
use crate::process::{Process, size_of};

/// What is seen at a moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Sight {
    /// Seconds since the beginning.
    pub at: f64,
    /// Resident memory, bytes.
    pub rss: u64,
    /// Open file descriptors.
    pub fds: u64,
    /// Threads.
    pub threads: u64,
    /// Bytes of all files of the data directory.
    pub disk: u64,
    /// Processor time so far, seconds.
    pub cpu: f64,
    /// Adapters in memory, of runs and of samplers.
    pub adapters: u64,
    /// Futures that can be asked for.
    pub futures: u64,
    /// Requests that were answered so far.
    pub requests: u64,
    /// The median time of a sample of one token since the last sight, milliseconds.
    pub median_ms: f64,
    /// The longest.
    pub longest_ms: f64,
    /// What clients found wrong so far.
    pub errors: u64,
}

/// Looks at the process `pid`, which keeps its files in `home`.
///
/// # Errors
/// Says what cannot be seen: the process may have ended.
pub async fn look(
    pid: u32,
    home: &Path,
    place: &Place,
    at: f64,
    counts: &Counts,
) -> Result<Sight, String> {
    let process = Process::of(pid);
    let page = metrics(place).await?;
    let mut times: Vec<f64> = counts
        .latencies
        .iter()
        .map(|time| 1e3 * time.as_secs_f64())
        .collect();
    times.sort_by(f64::total_cmp);
    Ok(Sight {
        at,
        rss: process.memory("VmRSS")?,
        threads: process.threads()?,
        fds: process.open_files()?,
        disk: size_of(home),
        cpu: process.cpu_seconds()?,
        adapters: sum_of(&page, "tinker_adapters") as u64,
        futures: sum_of(&page, "tinker_futures") as u64,
        requests: sum_of(&page, "tinker_http_requests_total") as u64,
        median_ms: times.get(times.len() / 2).copied().unwrap_or_default(),
        longest_ms: times.last().copied().unwrap_or_default(),
        errors: counts.n_errors,
    })
}

fn text(error: std::io::Error) -> String {
    error.to_string()
}

async fn metrics(place: &Place) -> Result<String, String> {
    let host = place.base_url.trim_start_matches("http://");
    let mut stream = TcpStream::connect(host).await.map_err(text)?;
    let key = &place.api_key;
    let request = format!(
        "GET /metrics HTTP/1.1\r\nhost: {host}\r\nx-api-key: {key}\r\nconnection: close\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await.map_err(text)?;
    let mut page = String::new();
    stream.read_to_string(&mut page).await.map_err(text)?;
    Ok(page)
}

/// The sum over all labels of a family.
fn sum_of(page: &str, family: &str) -> f64 {
    let values = page.lines().filter_map(|line| {
        let rest = line.strip_prefix(family)?;
        let is_this = rest.starts_with([' ', '{']);
        is_this.then(|| rest.rsplit(' ').next()?.parse::<f64>().ok())?
    });
    values.sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_family_is_summed_over_its_labels_and_no_other() {
        let page = "# TYPE a counter\na{b=\"1\"} 2\na{b=\"2\"} 3\nab 100\na_sum 7\n";

        assert_eq!(sum_of(page, "a"), 5.0);
        assert_eq!(sum_of(page, "none"), 0.0);
    }
}
