//! A data directory of its own for each group of tests, and the binary run in it.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

/// A data directory; whatever server runs on it is stopped at the end.
pub(crate) struct Home {
    dir: TempDir,
}

/// A command that has ended.
#[derive(Debug)]
pub(crate) struct Finished {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// A command that runs, read line by line.
pub(crate) struct Running {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
    stderr: BufReader<ChildStderr>,
}

impl Home {
    pub(crate) fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
        }
    }

    /// A file or directory in it.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Writes a file and returns its path.
    pub(crate) fn file(&self, name: &str, content: &str) -> String {
        let path = self.path(name);
        std::fs::write(&path, content).unwrap();
        path.display().to_string()
    }

    /// The command `tinker ARGS`, in an environment without anything of the person who tests.
    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tinker"));
        command
            .args(args)
            .env_clear()
            .env("TINKER_HOME", self.path("home"))
            .env("HOME", self.dir.path())
            .current_dir(self.dir.path())
            .stdin(Stdio::null());
        command
    }

    /// Runs `tinker ARGS` to its end.
    pub(crate) fn run(&self, args: &[&str]) -> Finished {
        finish(self.command(args))
    }

    /// Runs `tinker ARGS` with `key` in the environment.
    pub(crate) fn run_with_key(&self, args: &[&str], key: &str) -> Finished {
        let mut command = self.command(args);
        command.env("TINKER_API_KEY", key);
        finish(command)
    }

    /// Runs `tinker ARGS` with `input` on standard input.
    pub(crate) fn run_with_input(&self, args: &[&str], input: &str) -> Finished {
        let mut command = self.command(args);
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        stdin.write_all(input.as_bytes()).unwrap();
        drop(stdin);
        Finished::of(child.wait_with_output().unwrap())
    }

    /// Starts `tinker ARGS`.
    pub(crate) fn start(&self, args: &[&str]) -> Running {
        Running::new(self.command(args))
    }

    /// The process of the server.
    pub(crate) fn server_pid(&self) -> u32 {
        u32::try_from(self.status()["pid"].as_u64().unwrap()).unwrap()
    }

    /// The adapter that a finished run left, byte for byte.
    pub(crate) fn adapter(&self, finished: &Finished) -> Vec<u8> {
        adapter(&self.path("home"), finished)
    }

    /// What `tinker serve status` knows.
    pub(crate) fn status(&self) -> Value {
        self.run(&["serve", "status", "--json"]).json()
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        let stopped = self.run(&["serve", "stop"]);
        if stopped.code != 0 && !std::thread::panicking() {
            panic!("cannot stop the server: {stopped:?}");
        }
    }
}

/// Runs a command to its end.
pub(crate) fn finish(mut command: Command) -> Finished {
    Finished::of(command.output().unwrap())
}

impl Finished {
    fn of(output: std::process::Output) -> Self {
        Self {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }

    /// The same, having made sure that it succeeded.
    #[track_caller]
    pub(crate) fn ok(self) -> Self {
        assert_eq!(self.code, 0, "{self:#?}");
        self
    }

    /// Makes sure that it failed with `code` and said `message`, then `hint`.
    #[track_caller]
    pub(crate) fn failed(self, code: i32, message: &str, hint: &str) {
        assert_eq!(self.code, code, "{self:#?}");
        assert!(
            self.stderr.contains(&format!("error: {message}")),
            "{self:#?}"
        );
        assert!(self.stderr.contains(hint), "{self:#?}");
        assert_eq!(self.stdout, "", "failures leave standard output alone");
    }

    /// Standard output as one JSON document.
    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {self:#?}"))
    }
}

impl Running {
    pub(crate) fn new(mut command: Command) -> Self {
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        Self {
            stdin: child.stdin.take(),
            stdout: BufReader::new(child.stdout.take().unwrap()),
            stderr: BufReader::new(child.stderr.take().unwrap()),
            child,
        }
    }

    /// The next line of standard output.
    pub(crate) fn stdout_line(&mut self) -> String {
        read_line(&mut self.stdout)
    }

    /// Reads standard error up to the first line that holds `text`; panics if it ends before.
    pub(crate) fn wait_for(&mut self, text: &str) -> String {
        let mut read = String::new();
        loop {
            let line = read_line(&mut self.stderr);
            assert!(!line.is_empty(), "`{text}` did not come, but: {read}");
            if line.contains(text) {
                return line;
            }
            read += &line;
        }
    }

    /// Types a line, where standard input is a pipe.
    pub(crate) fn say(&mut self, line: &str) {
        writeln!(self.stdin.as_mut().unwrap(), "{line}").unwrap();
    }

    /// What Ctrl-C sends.
    pub(crate) fn interrupt(&self) {
        signal(self.child.id(), Signal::INT);
    }

    /// Holds it where it is until the result is dropped.
    pub(crate) fn pause(&self) -> Paused {
        Paused::process(self.child.id())
    }

    /// Ends it without a chance to say goodbye.
    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
    }

    /// Waits for the end, with what had not been read yet.
    pub(crate) fn finish(mut self) -> Finished {
        let mut stderr = String::new();
        let mut stdout = String::new();
        drop(self.stdin.take());
        // Progress fits into the pipes' buffers, so one after the other does not block.
        self.stderr.read_to_string(&mut stderr).unwrap();
        self.stdout.read_to_string(&mut stdout).unwrap();
        let code = self.child.wait().unwrap().code().unwrap_or(-1);
        Finished {
            code,
            stdout,
            stderr,
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // A test that failed half-way leaves nothing behind; one that has ended cannot be killed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn read_line(from: &mut impl BufRead) -> String {
    let mut line = String::new();
    from.read_line(&mut line).unwrap();
    line
}

/// Sends `signal` to the process `pid`.
pub(crate) fn signal(pid: u32, signal: Signal) {
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    rustix::process::kill_process(pid, signal).unwrap();
}

/// A process that does nothing while this exists.
#[must_use]
pub(crate) struct Paused(u32);

impl Paused {
    pub(crate) fn process(pid: u32) -> Self {
        signal(pid, Signal::STOP);
        Self(pid)
    }
}

impl Drop for Paused {
    fn drop(&mut self) {
        signal(self.0, Signal::CONT);
    }
}

/// A data directory with a short finished run, shared by the tests that only look at one.
pub(crate) struct Trained {
    pub(crate) home: Home,
    /// Where its sampler weights are.
    pub(crate) sampler: String,
    /// Where its training state is.
    pub(crate) state: String,
}

/// Name of the run in [`Trained`].
pub(crate) const RUN: &str = "pirate";
static SHARED: Mutex<Weak<Trained>> = Mutex::new(Weak::new());

/// The shared run; trained when first asked for, gone with its server after the last user.
pub(crate) fn trained() -> Arc<Trained> {
    let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(trained) = shared.upgrade() {
        return trained;
    }
    let home = Home::new();
    let data = pirate();
    let done = home
        .run(&[
            "train",
            "sft",
            &data,
            "--run",
            RUN,
            "--max-steps",
            "4",
            "--batch-size",
            "8",
            "--save-every",
            "2",
            "--json",
        ])
        .ok()
        .json();
    let path = |key: &str| done[key].as_str().unwrap().to_owned();
    let trained = Arc::new(Trained {
        sampler: path("sampler_path"),
        state: path("state_path"),
        home,
    });
    *shared = Arc::downgrade(&trained);
    trained
}

/// The adapter that a finished run left in the data directory `home`, byte for byte.
pub(crate) fn adapter(home: &Path, finished: &Finished) -> Vec<u8> {
    let path = finished.json()["sampler_path"].as_str().unwrap().to_owned();
    // Run ids hold colons, which are not for file names.
    let rest = path.strip_prefix("tinker://").unwrap().replace(':', "_");
    let dir = home.join("server/checkpoints").join(rest);
    std::fs::read(dir.join("adapter_model.safetensors")).unwrap()
}

/// A run that is over in seconds, but not before it can be interrupted.
const SHORT: [&str; 8] = [
    "--max-steps",
    "24",
    "--batch-size",
    "4",
    "--save-every",
    "4",
    "--eval-every",
    "0",
];

/// The arguments of such a run on `data`.
pub(crate) fn short<'a>(data: &'a str, flags: &[&'a str]) -> Vec<&'a str> {
    let mut args = vec!["train", "sft", data, "--json"];
    args.extend(SHORT);
    args.extend(flags);
    args
}

/// The persona set of the repository.
pub(crate) fn pirate() -> String {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/data/pirate.jsonl");
    data.canonicalize().unwrap().display().to_string()
}

/// A line of chat data.
pub(crate) fn row(user: &str, assistant: &str) -> String {
    let messages = serde_json::json!({"messages": [
        {"role": "user", "content": user},
        {"role": "assistant", "content": assistant},
    ]});
    format!("{messages}\n")
}
