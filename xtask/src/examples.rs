//! `cargo xtask examples`: runs every example against the embedded server, as a reader would.

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};

use anyhow::{Context as _, Result, bail};

use crate::process::{cargo, check, command, target_dir};

/// Builds the examples and runs each to its end; `resume` twice, since that is what it is about.
pub(crate) fn run(root: &Path) -> Result<()> {
    check(&mut cargo(
        root,
        ["build", "--package", "examples", "--examples"],
    ))?;
    let server = [
        "build",
        "--package",
        "tinker-contract",
        "--bin",
        "contract-server",
    ];
    check(&mut cargo(root, server))?;
    let dir = target_dir(root).join("examples-run");
    if dir.exists() {
        std::fs::remove_dir_all(&dir).with_context(|| format!("cannot empty {}", dir.display()))?;
    }
    std::fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let server = Server::start(root, &dir)?;
    for name in names(root)? {
        let n_runs = if name == "resume" { 2 } else { 1 };
        for _ in 0..n_runs {
            let program = target_dir(root).join("debug/examples").join(&name);
            check(
                command::<&str>(&dir, program, [])
                    .env("TINKER_BASE_URL", &server.base_url)
                    .env("TINKER_API_KEY", &server.api_key),
            )?;
        }
    }
    Ok(())
}

/// The examples: one file each.
fn names(root: &Path) -> Result<Vec<String>> {
    let dir = root.join("examples");
    let entries =
        std::fs::read_dir(&dir).with_context(|| format!("cannot read {}", dir.display()))?;
    let mut names = Vec::new();
    for entry in entries {
        let path: PathBuf = entry.context("cannot read a file's name")?.path();
        let stem = path.file_stem().and_then(|stem| stem.to_str());
        if let (Some("rs"), Some(stem)) = (path.extension().and_then(|e| e.to_str()), stem) {
            names.push(stem.to_owned());
        }
    }
    names.sort();
    if names.is_empty() {
        bail!("there is no example in {}", dir.display());
    }
    Ok(names)
}

/// The embedded server with the model that is part of it; ends when dropped.
struct Server {
    base_url: String,
    api_key: String,
    child: Child,
}

impl Server {
    fn start(root: &Path, home: &Path) -> Result<Self> {
        let program = target_dir(root).join("debug/contract-server");
        let model = root.join("models/nano");
        let arguments = [
            home.as_os_str(),
            model.as_os_str(),
            "0".as_ref(),
            "2".as_ref(),
        ];
        let mut child = command(root, program, arguments)
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start the server")?;
        let stdout = child.stdout.take().context("the server has no output")?;
        let mut line = String::new();
        let read = BufReader::new(stdout).read_line(&mut line);
        let mut server = Self {
            base_url: String::new(),
            api_key: String::new(),
            child,
        };
        read.context("cannot read what the server says")?;
        let words = line.trim().split_once(' ');
        let (base_url, api_key) = words.context("the server did not start")?;
        base_url.clone_into(&mut server.base_url);
        api_key.clone_into(&mut server.api_key);
        Ok(server)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}
