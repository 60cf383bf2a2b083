//! Loads a server for hours and looks at it: `soak TINKER DIR MINUTES SEED`.
//!
//! Starts `TINKER serve` with its data in `DIR/home`, prints a line of a table every minute and, at the
//! end, whether memory and file descriptors stayed as they were. `DIR/sights.jsonl` has everything that
//! was seen, `DIR/server.log` what the server logged.

#![expect(
    clippy::expect_used,
    clippy::print_stdout,
    reason = "a test program fails by panicking and reports by printing"
)]

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tinker_contract::soak::gauge::{Sight, look};
use tinker_contract::soak::verdict::judge;
use tinker_contract::soak::{Place, Tally, fill_caches, keep_busy};

/// Between two sights.
const EVERY: Duration = Duration::from_secs(10);
/// Sights for one line of the table.
const LINES_EVERY: usize = 6;
/// Rounds that are under way at the end are waited for.
const LAST_ROUNDS: Duration = Duration::from_secs(60);
/// The embedded model, and its vocabulary.
const MODEL: (&str, u32) = ("tinker/nano", 1024);

/// The server under load; it ends with this.
struct Server {
    child: Child,
    home: PathBuf,
    place: Place,
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Server {
    fn start(program: &Path, dir: &Path) -> Self {
        let home = dir.join("home");
        let log = File::create(dir.join("server.log")).expect("a log");
        let mut child = Command::new(program)
            // If this program is killed, nobody else ends it.
            .args(["serve", "--port", "0", "--idle-timeout", "10m"])
            .env("TINKER_HOME", &home)
            .env("RUST_LOG", "warn")
            .env_remove("TINKER_API_KEY")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .expect("a server");
        let stdout = child.stdout.take().expect("a pipe");
        let mut lines = BufReader::new(stdout).lines();
        let mut exported = |name: &str| {
            let line = lines.next().expect("a line").expect("text");
            let value = line.strip_prefix(&format!("export {name}="));
            value.expect("where the server is").to_owned()
        };
        let place = Place {
            base_url: exported("TINKER_BASE_URL"),
            api_key: exported("TINKER_API_KEY"),
            base_model: MODEL.0.to_owned(),
            n_tokens: MODEL.1,
        };
        Self { child, home, place }
    }

    async fn look(&self, begun: Instant, tally: &Tally) -> Sight {
        let at = begun.elapsed().as_secs_f64();
        let counts = tally.take();
        let seen = look(self.child.id(), &self.home, &self.place, at, &counts);
        seen.await.expect("a server that runs")
    }
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let mut next = |what: &str| arguments.next().expect(what);
    let program = PathBuf::from(next("the program `tinker`"));
    let dir = PathBuf::from(next("a directory"));
    let minutes: f64 = next("minutes").parse().expect("a number");
    let seed = next("a seed").parse().expect("a number");
    fs::create_dir_all(&dir).expect("a directory");
    // What an earlier run left is not this one's.
    let _ = fs::remove_dir_all(dir.join("home"));
    let server = Server::start(&program, &dir);
    fill_caches(&server.place).await.expect("samples");
    let (begun, length) = (Instant::now(), Duration::from_secs_f64(60.0 * minutes));
    let tally = Arc::<Tally>::default();
    let mut clients = keep_busy(&server.place, seed, begun + length, &tally);
    let sights = watch(&server, &dir, begun, length, &tally).await;
    let ended = async { while clients.join_next().await.is_some() {} };
    let hang = tokio::time::timeout(LAST_ROUNDS, ended).await.is_err();
    report(&sights, &tally, hang)
}

async fn watch(
    server: &Server,
    dir: &Path,
    begun: Instant,
    length: Duration,
    tally: &Tally,
) -> Vec<Sight> {
    let mut file = File::create(dir.join("sights.jsonl")).expect("a file");
    println!(
        "| min | RSS MB | fds | threads | disk MB | CPU | adapters | futures | requests | sample ms, median / longest | errors |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|---|");
    let mut sights: Vec<Sight> = Vec::new();
    while begun.elapsed() < length {
        tokio::time::sleep(EVERY.min(length.saturating_sub(begun.elapsed()))).await;
        let sight = server.look(begun, tally).await;
        let line = serde_json::to_string(&sight).expect("plain data");
        writeln!(file, "{line}").expect("room for a line");
        if sights.len().is_multiple_of(LINES_EVERY) {
            println!("{}", row(&sight));
        }
        sights.push(sight);
    }
    sights
}

fn row(sight: &Sight) -> String {
    let mb = |bytes: u64| bytes as f64 / 1e6;
    format!(
        "| {:.1} | {:.1} | {} | {} | {:.1} | {:.2} | {} | {} | {} | {:.1} / {:.0} | {} |",
        sight.at / 60.0,
        mb(sight.rss),
        sight.fds,
        sight.threads,
        mb(sight.disk),
        sight.cpu / sight.at,
        sight.adapters,
        sight.futures,
        sight.requests,
        sight.median_ms,
        sight.longest_ms,
        sight.errors,
    )
}

fn report(sights: &[Sight], tally: &Tally, hang: bool) -> ExitCode {
    if let Some(last) = sights.last() {
        println!("{}\n", row(last));
    }
    let counts = tally.take();
    println!("rounds: {:?}", counts.rounds);
    for text in &counts.errors {
        println!("error: {text}");
    }
    let mut is_well = counts.n_errors == 0 && !hang;
    if hang {
        println!("clients hang");
    }
    for verdict in judge(sights) {
        is_well &= verdict.holds();
        println!(
            "{}: level {:.0}, growth {:+.0} over the last three quarters, allowed {:.0}: {}",
            verdict.what,
            verdict.line.level,
            verdict.line.growth,
            verdict.allowed,
            match (verdict.is_seen, verdict.holds()) {
                (false, _) => "not seen for long enough",
                (true, true) => "flat",
                (true, false) => "grows",
            }
        );
    }
    println!("{}", if is_well { "passed" } else { "FAILED" });
    if is_well {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
