//! What every command gets: settings, and the terminal beside the data.

use crate::cli::GlobalFlags;
use crate::failure::Result;
use crate::output::Format;
use crate::settings::Settings;
use crate::ui::Ui;

/// The surroundings of a command.
#[derive(Debug)]
pub(crate) struct Ctx {
    /// Which server, and where data lives.
    pub(crate) settings: Settings,
    /// Notes, questions and progress.
    pub(crate) ui: Ui,
    /// How the data will be printed.
    pub(crate) format: Format,
}

impl Ctx {
    /// The surroundings that `flags` and the environment describe.
    ///
    /// # Errors
    /// There is no place to keep data.
    pub(crate) fn new(flags: &GlobalFlags, ui: &Ui) -> Result<Self> {
        Ok(Self {
            settings: Settings::load(&flags.server)?,
            ui: ui.clone(),
            format: flags.format(),
        })
    }
}
