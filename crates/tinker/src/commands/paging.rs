//! How much of a list to show: the same flags for every list.

use crate::numbers::whole;

/// Flags of a list.
#[derive(Debug, Clone, Copy, clap::Args)]
#[group(skip)]
pub(crate) struct Flags {
    /// Most rows to show; 0 shows all
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = whole::<u64>)]
    limit: u64,
    /// Show all rows
    #[arg(long, conflicts_with = "limit")]
    all: bool,
}

impl Flags {
    /// Most rows to fetch; `None` is all.
    pub(crate) fn limit(self) -> Option<u64> {
        (!self.all && self.limit > 0).then_some(self.limit)
    }
}
