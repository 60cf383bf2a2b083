//! Every environment variable that `tinker` reads, and the only place that reads them.

/// An environment variable.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Variable {
    /// Its name.
    pub(crate) name: &'static str,
    /// What it does, one line.
    pub(crate) doc: &'static str,
}

impl Variable {
    /// Its value; an empty one counts as not set, as the convention is for most of these.
    #[expect(
        clippy::disallowed_methods,
        reason = "this is the one place that reads the environment"
    )]
    pub(crate) fn get(self) -> Option<String> {
        std::env::var(self.name)
            .ok()
            .filter(|value| !value.is_empty())
    }
}

/// The key of the service; with `tinker serve`, the key that the server asks for.
pub(crate) const TINKER_API_KEY: Variable = Variable {
    name: "TINKER_API_KEY",
    doc: "API key of the service; in the environment of `tinker serve`, the key it asks for",
};

/// Which server to talk to.
pub(crate) const TINKER_BASE_URL: Variable = Variable {
    name: "TINKER_BASE_URL",
    doc: "address of the service, as --base-url",
};

/// How often a session is kept alive.
pub(crate) const TINKER_HEARTBEAT: Variable = Variable {
    name: "TINKER_HEARTBEAT",
    doc: "time between two signs of life of a session, such as 5s [default: 10s]",
};

/// Where data is kept.
pub(crate) const TINKER_HOME: Variable = Variable {
    name: "TINKER_HOME",
    doc: "data directory: runs, checkpoints, the embedded server's files",
};

/// Colours off.
pub(crate) const NO_COLOR: Variable = Variable {
    name: "NO_COLOR",
    doc: "any value turns colours off",
};

/// What is logged.
pub(crate) const RUST_LOG: Variable = Variable {
    name: "RUST_LOG",
    doc: "what is logged on standard error, such as `debug` or `tinker_http=trace`",
};

/// Where Python's Hugging Face libraries keep models.
pub(crate) const HF_HUB_CACHE: Variable = Variable {
    name: "HF_HUB_CACHE",
    doc: "Hugging Face cache in which `tinker serve` puts its tokenizers for Python clients",
};

/// The directory above that cache.
pub(crate) const HF_HOME: Variable = Variable {
    name: "HF_HOME",
    doc: "directory of that cache, `hub` within it",
};

/// All of them, for the help.
pub(crate) const ALL: [Variable; 8] = [
    TINKER_API_KEY,
    TINKER_BASE_URL,
    TINKER_HOME,
    TINKER_HEARTBEAT,
    HF_HUB_CACHE,
    HF_HOME,
    NO_COLOR,
    RUST_LOG,
];

/// The section of the help that lists them.
pub(crate) fn help() -> String {
    let lines = ALL.map(|v| format!("  {:<17}{}", v.name, v.doc));
    format!("Environment:\n{}", lines.join("\n"))
}
