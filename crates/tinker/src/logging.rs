//! Logs on standard error, for those who ask for them.

use std::io;

use tracing_subscriber::EnvFilter;

use crate::env;
use crate::ui::Ui;

/// Logs what `RUST_LOG` asks for, else `TINKER_LOG`, else `default`; nothing where all are silent.
pub(crate) fn init(ui: &Ui, default: Option<&str>) {
    // Other levels mean nothing to the official client either.
    let level = || {
        env::TINKER_LOG
            .get()
            .filter(|level| matches!(level.as_str(), "debug" | "info"))
    };
    let directives = env::RUST_LOG.get().or_else(level);
    let Some(directives) = directives.as_deref().or(default) else {
        return;
    };
    let has_colour = env::NO_COLOR.get().is_none() && io::IsTerminal::is_terminal(&io::stderr());
    let ui = ui.clone();
    tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::new(directives))
        .with_writer(move || ui.clone())
        .with_ansi(has_colour)
        .init();
}
