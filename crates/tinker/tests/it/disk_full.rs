//! A disk that is full in the middle of a run: the server's, made so in this process, and that of
//! the run folder.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tempfile::TempDir;
use tinker_server::{ApiToken, App, AppOptions, Disk, OsDisk, router};

use crate::support::{Finished, Home, Running, adapter, pirate, short};

const KEY: &str = "tml-full";
const ENDLESS: usize = usize::MAX;

/// A disk with room for so many more checkpoints and log records.
#[derive(Debug)]
struct SmallDisk {
    checkpoints: AtomicUsize,
    records: AtomicUsize,
}

/// Takes one of what `room` there is.
fn take(room: &AtomicUsize) -> io::Result<()> {
    let one_less = |n: usize| match n {
        ENDLESS => Some(ENDLESS),
        n => n.checked_sub(1),
    };
    match room.fetch_update(Ordering::SeqCst, Ordering::SeqCst, one_less) {
        Ok(_) => Ok(()),
        Err(_) => Err(io::ErrorKind::StorageFull.into()),
    }
}

impl Disk for SmallDisk {
    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        OsDisk.create_dir_all(path)
    }
    fn write_new(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        OsDisk.write_new(path, bytes)
    }
    fn append(&self, file: &mut File, path: &Path, bytes: &[u8]) -> io::Result<()> {
        take(&self.records)?;
        OsDisk.append(file, path, bytes)
    }
    fn truncate(&self, file: &File, len: u64) -> io::Result<()> {
        OsDisk.truncate(file, len)
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        if to
            .components()
            .any(|part| part.as_os_str() == "checkpoints")
        {
            take(&self.checkpoints)?;
        }
        OsDisk.rename(from, to)
    }
}

/// A server in this process on such a disk, and where commands against it keep their runs.
struct SmallServer {
    disk: Arc<SmallDisk>,
    data: TempDir,
    url: String,
    app: Arc<App>,
    _runtime: tokio::runtime::Runtime,
    home: Home,
}

impl SmallServer {
    fn start() -> Self {
        let data = tempfile::tempdir().unwrap();
        let disk = Arc::new(SmallDisk {
            checkpoints: AtomicUsize::new(ENDLESS),
            records: AtomicUsize::new(ENDLESS),
        });
        let token = ApiToken::new(KEY).unwrap();
        let options = AppOptions {
            disk: disk.clone(),
            ..AppOptions::new(data.path().to_owned(), token)
        };
        let app = Arc::new(App::open(options).unwrap());
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let listening = tokio::net::TcpListener::bind("127.0.0.1:0");
        let listener = runtime.block_on(listening).unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        runtime.spawn(axum::serve(listener, router(app.clone())).into_future());
        Self {
            disk,
            data,
            url,
            app,
            _runtime: runtime,
            home: Home::new(),
        }
    }

    /// Starts a short run called `name`.
    fn train(&self, name: &str) -> Running {
        let data = pirate();
        let args = short(&data, &["--run", name, "--base-url", &self.url]);
        let mut command = self.home.command(&args);
        command.env("TINKER_API_KEY", KEY);
        Running::new(command)
    }

    fn adapter(&self, finished: &Finished) -> Vec<u8> {
        adapter(self.data.path(), finished)
    }
}

impl Drop for SmallServer {
    fn drop(&mut self) {
        // Nothing of what it wrote is needed any more.
        let _ = self.app.stop();
    }
}

#[test]
fn a_checkpoint_that_does_not_fit_ends_the_run_which_is_resumed_to_the_same_result() {
    let server = SmallServer::start();
    let whole = server.train("whole").finish().ok();

    server.disk.checkpoints.store(1, Ordering::SeqCst);
    let ended = server.train("full").finish();
    server.disk.checkpoints.store(ENDLESS, Ordering::SeqCst);
    let args = ["resume", "full", "--json"];
    let resumed = server.home.run_with_key(&args, KEY).ok();

    assert!(
        ended.stderr.contains("the disk is full: free some space"),
        "{ended:#?}"
    );
    ended.failed(
        1,
        "saving the checkpoint after step 7 failed",
        "resume --base-url",
    );
    assert!(
        resumed.stderr.contains("resuming from 000004 at step 4"),
        "{resumed:#?}"
    );
    assert!(
        server.adapter(&whole) == server.adapter(&resumed),
        "the adapters differ"
    );
}

#[test]
fn a_step_that_cannot_be_logged_is_waited_for_until_there_is_room() {
    let server = SmallServer::start();
    let whole = server.train("whole").finish().ok();

    server.disk.records.store(12, Ordering::SeqCst);
    let mut running = server.train("tight");
    running.wait_for("the disk is full: free some space");
    server.disk.records.store(ENDLESS, Ordering::SeqCst);
    let finished = running.finish().ok();

    assert!(
        server.adapter(&whole) == server.adapter(&finished),
        "the adapters differ"
    );
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_under_the_run_folder_ends_the_run_which_is_resumed_to_the_same_result() {
    let home = Home::new();
    let data = pirate();
    let whole = home.run(&short(&data, &["--run", "whole"])).ok();
    let folder = home.path("home/runs/full");
    let metrics = folder.join("metrics.jsonl");
    std::fs::create_dir_all(&folder).unwrap();
    std::os::unix::fs::symlink("/dev/full", &metrics).unwrap();

    let ended = home.run(&short(&data, &["--run", "full"]));
    std::fs::remove_file(&metrics).unwrap();
    let resumed = home.run(&["resume", "full", "--json"]).ok();

    assert!(ended.stderr.contains("hint: free some space"), "{ended:#?}");
    ended.failed(
        1,
        &format!("cannot append to `{}`", metrics.display()),
        "hint: go on with: ",
    );
    assert!(
        home.adapter(&whole) == home.adapter(&resumed),
        "the adapters differ"
    );
}
