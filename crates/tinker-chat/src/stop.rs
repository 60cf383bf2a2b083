//! Finds stop strings in text that arrives token by token and may span their borders.

use std::sync::Arc;

use crate::error::Result;
use crate::stream::DecodeStream;
use crate::tokenizer::Tokenizer;

/// Watches one growing sequence for the first appearance of any of several strings.
///
/// Keeps only the last bytes that could still begin a match, so a push costs the same however long
/// the sequence has become.
#[derive(Debug, Clone)]
pub struct StopMatcher {
    stream: DecodeStream,
    stops: Vec<String>,
    tail: String,
    max_tail: usize,
}

impl StopMatcher {
    /// A matcher at the start of a sequence. Empty stop strings are ignored: they would match
    /// before the first token.
    pub fn new(tokenizer: Arc<Tokenizer>, stops: impl IntoIterator<Item = String>) -> Self {
        let stops: Vec<String> = stops.into_iter().filter(|stop| !stop.is_empty()).collect();
        let longest = stops.iter().map(String::len).max().unwrap_or(0);
        let stream = DecodeStream::new(tokenizer);
        Self {
            stream,
            stops,
            tail: String::new(),
            max_tail: longest.saturating_sub(1),
        }
    }

    /// Takes the next token and says whether a stop string is complete now.
    ///
    /// # Errors
    /// The tokenizer's decoder fails.
    pub fn push(&mut self, token: u32) -> Result<bool> {
        if self.stops.is_empty() {
            return Ok(false);
        }
        self.tail.push_str(&self.stream.push(token)?);
        let found = self.stops.iter().any(|stop| self.tail.contains(stop));
        let mut cut = self.tail.len().saturating_sub(self.max_tail);
        while !self.tail.is_char_boundary(cut) {
            cut -= 1;
        }
        self.tail.drain(..cut);
        Ok(found)
    }
}
