//! One reply of a chat as it is drawn: tokens in, parts out.

use std::sync::Arc;

use tinker_types::StopReason;

use super::Model;
use super::split::{Part, Splitter};
use super::text::TextReader;
use crate::api_error::{ApiError, ApiResult};
use crate::watchers::DrawnToken;

/// A reply under way.
#[derive(Debug)]
pub(crate) struct Reply {
    reader: TextReader,
    splitter: Splitter,
    n_tokens: usize,
    n_calls: usize,
}

/// How a reply ended.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Turn {
    pub(crate) reason: StopReason,
    pub(crate) n_tokens: usize,
    pub(crate) n_calls: usize,
    /// The stop that ended it, if one did.
    pub(crate) stop: Option<String>,
}

impl Reply {
    /// Replies of a request for `n`.
    pub(crate) fn several(
        model: &Model,
        stops: Arc<[String]>,
        with_tools: bool,
        n: u32,
    ) -> Vec<Self> {
        let reply = || Self {
            reader: TextReader::new(Arc::clone(&model.tokenizer), Arc::clone(&stops)),
            splitter: Splitter::new(with_tools),
            n_tokens: 0,
            n_calls: 0,
        };
        std::iter::repeat_with(reply).take(n as usize).collect()
    }

    /// The parts that more tokens add.
    pub(crate) fn push(&mut self, tokens: &[DrawnToken]) -> ApiResult<Vec<Part>> {
        let mut text = String::new();
        for token in tokens {
            text.push_str(&self.reader.push(token.id).map_err(undecodable)?);
        }
        self.n_tokens += tokens.len();
        let parts = self.splitter.push(&text);
        Ok(self.counted(parts))
    }

    /// The rest.
    pub(crate) fn finish(&mut self, reason: StopReason) -> ApiResult<(Vec<Part>, Turn)> {
        let text = self.reader.finish().map_err(undecodable)?;
        let mut parts = self.splitter.push(&text);
        parts.extend(self.splitter.finish());
        let parts = self.counted(parts);
        let turn = Turn {
            reason,
            n_tokens: self.n_tokens,
            n_calls: self.n_calls,
            stop: self.reader.found().map(str::to_owned),
        };
        Ok((parts, turn))
    }

    fn counted(&mut self, parts: Vec<Part>) -> Vec<Part> {
        let is_call = |part: &&Part| matches!(part, Part::Tool(_));
        self.n_calls += parts.iter().filter(is_call).count();
        parts
    }
}

fn undecodable(error: tinker_chat::Error) -> ApiError {
    ApiError::internal("the tokens cannot be decoded", error.to_string())
}
