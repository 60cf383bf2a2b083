//! The server's token: made once per data directory, compared in constant time, never printed.

use std::fmt;
use std::path::Path;

use crate::disk::{Disk, write_private};
use crate::error::{Error, Result};

/// The key that every request must carry as `X-API-Key`.
#[derive(Clone, PartialEq, Eq)]
pub struct ApiToken(String);

impl ApiToken {
    /// A token with this text.
    ///
    /// # Errors
    /// If it is empty or holds anything but visible ASCII, which no HTTP header could carry.
    pub fn new(text: impl Into<String>) -> Result<Self> {
        let text = text.into();
        if text.is_empty() || !text.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(Error::Invalid(
                "the server's token must be visible ASCII without spaces".into(),
            ));
        }
        Ok(Self(text))
    }

    /// A fresh random token with the `tml-` prefix that clients expect (244 random bits).
    #[must_use]
    pub fn random() -> Self {
        let (a, b) = (uuid::Uuid::new_v4(), uuid::Uuid::new_v4());
        Self(format!("tml-{}{}", a.simple(), b.simple()))
    }

    /// The text, for a header or an export line.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// Whether `presented` is this token. The time taken depends on its length alone.
    #[must_use]
    pub fn matches(&self, presented: &str) -> bool {
        // Equal-length digests hide where two tokens differ; BLAKE3's `==` is constant-time.
        blake3::hash(presented.as_bytes()) == blake3::hash(self.0.as_bytes())
    }

    /// Reads the data directory's token, making it on first use, so that clients which outlive a
    /// restart keep the right one.
    pub(crate) fn load_or_create(disk: &dyn Disk, path: &Path) -> Result<Self> {
        match std::fs::read_to_string(path) {
            Ok(text) => Self::new(text.trim()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let token = Self::random();
                write_private(disk, path, token.expose().as_bytes())?;
                Ok(token)
            }
            Err(source) => Err(Error::io("read", path, source)),
        }
    }
}

impl fmt::Debug for ApiToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ApiToken(***)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matches_only_itself_and_hides_in_debug() {
        let token = ApiToken::new("tml-secret").unwrap();

        assert!(token.matches("tml-secret"));
        assert!(!token.matches("tml-secreT"));
        assert!(!token.matches(""));
        assert_eq!(format!("{token:?}"), "ApiToken(***)");
    }

    #[test]
    fn refuses_text_that_no_header_can_carry() {
        assert!(ApiToken::new("").is_err());
        assert!(ApiToken::new("two words").is_err());
        assert!(ApiToken::new("line\n").is_err());
    }
}
