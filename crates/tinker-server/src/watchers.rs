//! Those who watch samples while they are drawn.

use std::collections::HashMap;
use std::sync::Mutex;

use tinker_types::RequestId;
use tokio::sync::mpsc;

use crate::core::lock;

/// A sampled token.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct DrawnToken {
    pub(crate) id: u32,
    /// Natural log, at most 0.
    pub(crate) logprob: f32,
    /// The most likely tokens in its place, if they were asked for.
    pub(crate) top: Vec<(u32, f32)>,
}

/// Tokens that were added to a sample.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct NewTokens {
    /// Which of the request's samples.
    pub(crate) sample: usize,
    pub(crate) tokens: Vec<DrawnToken>,
}

#[derive(Debug)]
struct Watcher {
    to: mpsc::UnboundedSender<NewTokens>,
    /// Tokens told so far, by sample.
    n_told: Vec<usize>,
}

/// All watchers, at most one of each request. What waits to be read is bounded by the length of the
/// samples.
#[derive(Debug, Default)]
pub(crate) struct Watchers(Mutex<HashMap<RequestId, Watcher>>);

impl Watchers {
    /// Watches a request that is going to be made. The channel ends with the request.
    pub(crate) fn watch(&self, id: RequestId) -> mpsc::UnboundedReceiver<NewTokens> {
        let (to, receiver) = mpsc::unbounded_channel();
        let watcher = Watcher {
            to,
            n_told: Vec::new(),
        };
        lock(&self.0).insert(id, watcher);
        receiver
    }

    /// Whether somebody watches a request.
    pub(crate) fn is_watched(&self, id: &RequestId) -> bool {
        lock(&self.0).contains_key(id)
    }

    /// Tells what is new of a sample that has `n` tokens; `token` gives one of them.
    pub(crate) fn tell(
        &self,
        id: &RequestId,
        sample: usize,
        n: usize,
        token: impl Fn(usize) -> DrawnToken,
    ) {
        let mut watchers = lock(&self.0);
        let Some(watcher) = watchers.get_mut(id) else {
            return;
        };
        if watcher.n_told.len() <= sample {
            watcher.n_told.resize(sample + 1, 0);
        }
        let tokens: Vec<DrawnToken> = (watcher.n_told[sample]..n).map(token).collect();
        watcher.n_told[sample] = n;
        // Whoever watched may be gone; then the request is being cancelled.
        if !tokens.is_empty() {
            let _ = watcher.to.send(NewTokens { sample, tokens });
        }
    }

    /// Ends the watch of a request.
    pub(crate) fn end(&self, id: &RequestId) {
        lock(&self.0).remove(id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn every_token_is_told_once_and_the_channel_ends_with_the_request() {
        let (watchers, id): (_, RequestId) = (Watchers::default(), "s:op:1".parse().unwrap());
        let mut heard = watchers.watch(id.clone());
        let token = |i: usize| DrawnToken {
            id: i as u32,
            logprob: 0.0,
            top: Vec::new(),
        };

        watchers.tell(&id, 1, 2, token);
        watchers.tell(&id, 1, 2, token);
        watchers.tell(&id, 1, 3, token);
        watchers.end(&id);

        let mut all = Vec::new();
        while let Some(new) = heard.recv().await {
            assert_eq!(new.sample, 1);
            all.push(new.tokens.iter().map(|t| t.id).collect::<Vec<_>>());
        }
        assert_eq!(all, [vec![0, 1], vec![2]]);
        assert!(!watchers.is_watched(&id));
    }
}
