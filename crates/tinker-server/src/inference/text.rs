//! From sampled tokens to the text before the stop, as it comes.

use std::sync::Arc;

use tinker_chat::{DecodeStream, Tokenizer};

/// Reads one sample. Text that may be the beginning of a stop is held back until it is not.
#[derive(Debug)]
pub(crate) struct TextReader {
    decode: Option<DecodeStream>,
    stops: Arc<[String]>,
    held: String,
    found: Option<String>,
}

impl TextReader {
    /// A reader that ends before any of `stops`.
    pub(crate) fn new(tokenizer: Arc<Tokenizer>, stops: Arc<[String]>) -> Self {
        Self {
            decode: Some(DecodeStream::new(tokenizer)),
            stops,
            held: String::new(),
            found: None,
        }
    }

    /// The text that a token adds.
    ///
    /// # Errors
    /// If the tokenizer cannot decode it.
    pub(crate) fn push(&mut self, token: u32) -> tinker_chat::Result<String> {
        let Some(decode) = self.decode.as_mut().filter(|_| self.found.is_none()) else {
            return Ok(String::new());
        };
        let text = decode.push(token)?;
        self.held.push_str(&text);
        Ok(self.take_shown())
    }

    /// The text that was held back and turned out to be no stop.
    ///
    /// # Errors
    /// If the tokenizer cannot decode the last token.
    pub(crate) fn finish(&mut self) -> tinker_chat::Result<String> {
        if let Some(decode) = self.decode.take().filter(|_| self.found.is_none()) {
            self.held.push_str(&decode.finish()?);
        }
        let shown = self.take_shown();
        Ok(shown + &std::mem::take(&mut self.held))
    }

    /// The stop that ended the text, if one did.
    pub(crate) fn found(&self) -> Option<&str> {
        self.found.as_deref()
    }

    fn take_shown(&mut self) -> String {
        let ends = self.stops.iter().filter_map(|stop| {
            let end = self.held.find(stop.as_str())?;
            Some((end, stop))
        });
        if let Some((end, stop)) = ends.min_by_key(|(end, _)| *end) {
            self.found = Some(stop.clone());
            let mut shown = std::mem::take(&mut self.held);
            shown.truncate(end);
            return shown;
        }
        let stops = self.stops.iter().map(String::as_str);
        let n_held = n_held_back(&self.held, stops);
        let kept = self.held.split_off(self.held.len() - n_held);
        std::mem::replace(&mut self.held, kept)
    }
}

/// Length of the longest end of `text` that is the beginning of a mark.
pub(crate) fn n_held_back<'a>(text: &str, marks: impl Iterator<Item = &'a str>) -> usize {
    let longest = |mark: &str| {
        let starts = mark.char_indices().map(|(i, _)| i).skip(1);
        starts
            .filter(|&n| text.ends_with(&mark[..n]))
            .max()
            .unwrap_or(0)
    };
    marks.map(longest).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_may_begin_a_mark_is_held_back() {
        let held = |text: &str| n_held_back(text, ["<tool>", "\n\nUser:"].into_iter());

        assert_eq!(held("hello"), 0);
        assert_eq!(held("hello <to"), 3);
        assert_eq!(held("a\n"), 1);
        assert_eq!(held("a\n\nUse"), 5);
        assert_eq!(held("<<"), 1);
        assert_eq!(n_held_back("é", ["éa"].into_iter()), 2);
    }
}
