//! A server's process from outside: its memory, files and threads, its data directory, its counters.

use std::fs;
use std::path::Path;

use serde::Serialize;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::{Counts, Place};

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
    let proc = Path::new("/proc").join(pid.to_string());
    let status = read(&proc.join("status"))?;
    let page = metrics(place).await?;
    let mut times: Vec<f64> = counts
        .latencies
        .iter()
        .map(|time| 1e3 * time.as_secs_f64())
        .collect();
    times.sort_by(f64::total_cmp);
    Ok(Sight {
        at,
        rss: 1024 * number_after(&status, "VmRSS:").ok_or("no VmRSS")?,
        threads: number_after(&status, "Threads:").ok_or("no Threads")?,
        fds: fs::read_dir(proc.join("fd")).map_err(text)?.count() as u64,
        disk: size_of(home),
        cpu: cpu_seconds(&read(&proc.join("stat"))?).ok_or("no processor time")?,
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

fn read(path: &Path) -> Result<String, String> {
    fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))
}

fn number_after(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}

/// Time in user and kernel mode: fields 14 and 15 of `/proc/PID/stat`, in ticks of 10 ms.
fn cpu_seconds(stat: &str) -> Option<f64> {
    // The second field may have spaces, and ends with the last parenthesis.
    let (_, rest) = stat.rsplit_once(") ")?;
    let mut fields = rest.split(' ').skip(11);
    let mut ticks = || fields.next()?.parse::<u64>().ok();
    Some((ticks()? + ticks()?) as f64 / 100.0)
}

/// Files come and go meanwhile.
fn size_of(dir: &Path) -> u64 {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let sizes = entries.map(|entry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() => size_of(&entry.path()),
        Ok(metadata) => metadata.len(),
        Err(_) => 0,
    });
    sizes.sum()
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

    #[test]
    fn processor_time_is_found_behind_any_name() {
        let stat = "7 (a) b) S 1 2 3 4 5 6 7 8 9 10 150 50 0 0 20 0 3";

        assert_eq!(cpu_seconds(stat), Some(2.0));
    }
}
