//! What a server is busy with, in a few numbers, for people who watch it.

use std::sync::Arc;

use crate::app::App;
use crate::process;

/// A server at a moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Summary {
    /// Base models in memory.
    pub n_models: usize,
    /// Adapters in memory, of training runs and of samplers.
    pub n_adapters: usize,
    /// Accepted operations that wait for their turn.
    pub n_waiting: usize,
    /// Operations under way.
    pub n_running: usize,
    /// Tokens trained on since the start.
    pub tokens_trained: u64,
    /// Tokens sampled since the start.
    pub tokens_sampled: u64,
    /// Memory in use; `None` where the operating system does not say.
    pub memory_bytes: Option<u64>,
}

/// Looks at a server while it runs. It does not keep the server from stopping.
#[derive(Debug, Clone)]
pub struct Observer(pub(crate) Arc<App>);

impl Observer {
    /// The server now.
    #[must_use]
    pub fn summary(&self) -> Summary {
        let core = &self.0.core;
        let loaded = core.metrics.loaded();
        let (tokens_trained, tokens_sampled) = core.metrics.tokens();
        let (mut n_waiting, mut n_running) = (0, 0);
        for count in core.queue().values() {
            n_waiting += count.n_waiting;
            n_running += count.n_running;
        }
        Summary {
            n_models: loaded.n_models,
            n_adapters: loaded.n_training + loaded.n_sampling,
            n_waiting,
            n_running,
            tokens_trained,
            tokens_sampled,
            memory_bytes: process::memory_bytes(),
        }
    }
}
