//! Logs on standard error, for those who ask for them.

use std::io;

use tracing_subscriber::EnvFilter;

use crate::env;
use crate::ui::Ui;

/// Logs what `RUST_LOG` asks for, else `TINKER_LOG`, else `default`; nothing where all are silent.
pub(crate) fn init(ui: &Ui, default: Option<&str>) {
    let Some(directives) = directives(env::RUST_LOG.get(), env::TINKER_LOG.get(), default) else {
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

/// The official client knows the first two words of `TINKER_LOG`; the others keep a server quiet. Other words mean
/// nothing, there as here.
fn directives(
    rust_log: Option<String>,
    tinker_log: Option<String>,
    default: Option<&str>,
) -> Option<String> {
    let is_level = |word: &String| {
        let words = ["debug", "info", "warn", "error", "off"];
        words.contains(&word.as_str())
    };
    let level = tinker_log.filter(is_level);
    rust_log.or(level).or_else(|| default.map(str::to_owned))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_level_of_tinker_log_takes_the_place_of_the_default_and_other_words_do_not() {
        let chosen = |rust_log: Option<&str>, tinker_log: Option<&str>, default| {
            let owned = |word: Option<&str>| word.map(str::to_owned);
            directives(owned(rust_log), owned(tinker_log), default)
        };
        let of_server = |word| chosen(None, Some(word), Some("info")).unwrap();

        assert_eq!(
            ["debug", "warn", "off"].map(of_server),
            ["debug", "warn", "off"]
        );
        assert_eq!(of_server("loud"), "info");
        assert_eq!(
            chosen(Some("x=trace"), Some("warn"), None).unwrap(),
            "x=trace"
        );
        assert_eq!(chosen(None, Some("loud"), None), None);
    }
}
