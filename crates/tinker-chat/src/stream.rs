//! Token by token decoding that hands out text only once its characters are complete.

use std::sync::Arc;

use crate::error::Result;
use crate::tokenizer::Tokenizer;

/// Tokens to hold back at most while waiting for the rest of a character: UTF-8 needs at most
/// four bytes for one, and a token has at least one byte, so more means bytes that are no text.
const MAX_HELD: usize = 4;

/// Decodes a growing sequence of tokens.
///
/// The pieces joined are the decoding of the whole sequence. A piece is decoded behind the tokens
/// of the piece before it, since decoders may treat the first token of a text differently. A
/// character that is itself `U+FFFD` looks incomplete and may take its successor with it.
#[derive(Debug, Clone)]
pub struct DecodeStream {
    tokenizer: Arc<Tokenizer>,
    /// The tokens of the last piece, then those held back.
    window: Vec<u32>,
    n_emitted: usize,
}

impl DecodeStream {
    /// A stream at the start of a sequence; special tokens are decoded to their names.
    pub fn new(tokenizer: Arc<Tokenizer>) -> Self {
        Self {
            tokenizer,
            window: Vec::new(),
            n_emitted: 0,
        }
    }

    /// Takes the next token and returns the text that is complete now, which may be empty.
    ///
    /// # Errors
    /// The tokenizer's decoder fails.
    pub fn push(&mut self, token: u32) -> Result<String> {
        self.window.push(token);
        let text = self.pending()?;
        let n_held = self.window.len() - self.n_emitted;
        if text.ends_with(char::REPLACEMENT_CHARACTER) && n_held < MAX_HELD {
            return Ok(String::new());
        }
        self.window.drain(..self.n_emitted);
        self.n_emitted = self.window.len();
        Ok(text)
    }

    /// Ends the sequence and returns what was held back, incomplete characters as `U+FFFD`.
    ///
    /// # Errors
    /// The tokenizer's decoder fails.
    pub fn finish(self) -> Result<String> {
        self.pending()
    }

    fn pending(&self) -> Result<String> {
        let emitted = self.tokenizer.decode(&self.window[..self.n_emitted])?;
        let all = self.tokenizer.decode(&self.window)?;
        // A decoder that rewrote the earlier piece leaves no common prefix; nothing is new then.
        Ok(all.strip_prefix(&emitted).unwrap_or_default().to_owned())
    }
}
