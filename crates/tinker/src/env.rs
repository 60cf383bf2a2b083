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
    doc: "API key of the service; of `tinker serve`, the key it asks for",
};

/// Which server to talk to.
pub(crate) const TINKER_BASE_URL: Variable = Variable {
    name: "TINKER_BASE_URL",
    doc: "address of the service, as --base-url",
};

/// A credential that is made when it is needed.
pub(crate) const TINKER_CREDENTIAL_CMD: Variable = Variable {
    name: "TINKER_CREDENTIAL_CMD",
    doc: "shell command that prints a key or a token, run for each use",
};

/// Whose the sessions are.
pub(crate) const TINKER_PROJECT_ID: Variable = Variable {
    name: "TINKER_PROJECT_ID",
    doc: "project to file new sessions under",
};

/// Labels of sessions.
pub(crate) const TINKER_TAGS: Variable = Variable {
    name: "TINKER_TAGS",
    doc: "labels of new sessions, separated by commas",
};

/// Whether failures are reported to the service.
pub(crate) const TINKER_TELEMETRY: Variable = Variable {
    name: "TINKER_TELEMETRY",
    doc: "`1`: report failures to the service, without data [default: 0]",
};

/// The first half of what a Cloudflare gateway asks for.
pub(crate) const CLOUDFLARE_ACCESS_CLIENT_ID: Variable = Variable {
    name: "CLOUDFLARE_ACCESS_CLIENT_ID",
    doc: "client id for a Cloudflare Access gateway before the service",
};

/// The second half.
pub(crate) const CLOUDFLARE_ACCESS_CLIENT_SECRET: Variable = Variable {
    name: "CLOUDFLARE_ACCESS_CLIENT_SECRET",
    doc: "its secret",
};

/// How often a session is kept alive.
pub(crate) const TINKER_HEARTBEAT: Variable = Variable {
    name: "TINKER_HEARTBEAT",
    doc: "time between two signs of life of a session [default: 10s]",
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

/// What is logged, in the words of the official client.
pub(crate) const TINKER_LOG: Variable = Variable {
    name: "TINKER_LOG",
    doc: "`debug`, `info`, `warn`, `error` or `off`: what is logged, where RUST_LOG does not say",
};

/// What is logged.
pub(crate) const RUST_LOG: Variable = Variable {
    name: "RUST_LOG",
    doc: "what is logged, such as `debug` or `tinker_http=trace`",
};

/// Where Python's Hugging Face libraries keep models.
pub(crate) const HF_HUB_CACHE: Variable = Variable {
    name: "HF_HUB_CACHE",
    doc: "Hugging Face cache; `tinker serve` puts its tokenizers there",
};

/// The directory above that cache.
pub(crate) const HF_HOME: Variable = Variable {
    name: "HF_HOME",
    doc: "directory of that cache, `hub` within it",
};

/// All of them, for the help.
pub(crate) const ALL: [Variable; 15] = [
    TINKER_API_KEY,
    TINKER_CREDENTIAL_CMD,
    TINKER_BASE_URL,
    TINKER_PROJECT_ID,
    TINKER_TAGS,
    CLOUDFLARE_ACCESS_CLIENT_ID,
    CLOUDFLARE_ACCESS_CLIENT_SECRET,
    TINKER_TELEMETRY,
    TINKER_HOME,
    TINKER_HEARTBEAT,
    HF_HUB_CACHE,
    HF_HOME,
    NO_COLOR,
    TINKER_LOG,
    RUST_LOG,
];

/// Those that a process started for somebody else must not inherit: they are for the service.
pub(crate) const FOR_THE_SERVICE: [Variable; 5] = [
    TINKER_API_KEY,
    TINKER_CREDENTIAL_CMD,
    TINKER_BASE_URL,
    CLOUDFLARE_ACCESS_CLIENT_ID,
    CLOUDFLARE_ACCESS_CLIENT_SECRET,
];

/// The section of the help that lists them, and says which credential is used.
pub(crate) fn help() -> String {
    let lines = ALL.map(|v| format!("  {:<33}{}", v.name, v.doc));
    format!(
        "Environment:\n{}\n\n\
         A server is shown TINKER_API_KEY, else what TINKER_CREDENTIAL_CMD prints, else the default key in\n\
         ~/.tinker/credentials.json, where the official client stores keys.",
        lines.join("\n")
    )
}
