//! The API key, and the short-lived token it may have to be exchanged for.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::Deserialize;

use crate::error::{Error, ErrorKind};

/// Tokens are not used in their last minute.
const MARGIN: Duration = Duration::from_secs(60);
/// How long a token that does not say is used.
const UNKNOWN_LIFETIME: Duration = Duration::from_secs(120);

/// An API key. Never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct ApiKey(String);

impl ApiKey {
    /// The key itself, for a header or a file that only its owner reads.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// Whether it is a token, which expires, and not a key.
    pub(crate) fn is_token(&self) -> bool {
        self.0.starts_with("eyJ")
    }
}

impl FromStr for ApiKey {
    type Err = Error;

    /// Accepts keys (`tml-…`) and tokens (`eyJ…`) that can stand in a header.
    fn from_str(text: &str) -> Result<Self, Error> {
        let text = text.trim();
        let fault = if text.is_empty() {
            "API key is empty"
        } else if !text.starts_with("tml-") && !text.starts_with("eyJ") {
            "API key must start with the tml- prefix"
        } else if text.len() > 16_384 || !text.bytes().all(|b| b.is_ascii_graphic()) {
            "API key holds characters that cannot stand in a header, or is too long"
        } else {
            return Ok(Self(text.to_owned()));
        };
        Err(Error::new(ErrorKind::Unauthenticated, fault))
    }
}

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ApiKey(***)")
    }
}

/// A token and when to replace it, in the client's time: a clock that is set back does not matter.
#[derive(Clone)]
pub(crate) struct Token {
    text: String,
    refresh_at: Duration,
    urgent_at: Duration,
    expires_at: Duration,
}

impl Token {
    /// A token received at `now`, to be replaced after 45 to 55 % of its life as `draw`, in
    /// `[0, 1)`, has it. Its claims are read, not verified: the server does that.
    pub(crate) fn received(text: String, now: Duration, draw: f64) -> Self {
        let known = lifetime_of(&text);
        let lifetime = known.unwrap_or(UNKNOWN_LIFETIME);
        let refresh_after = match known {
            Some(lifetime) => lifetime.mul_f64(0.45 + 0.1 * draw),
            None => UNKNOWN_LIFETIME.saturating_sub(MARGIN),
        };
        Self {
            text,
            refresh_at: now.saturating_add(refresh_after),
            urgent_at: now.saturating_add(lifetime.saturating_sub(MARGIN)),
            expires_at: now.saturating_add(lifetime),
        }
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.text
    }

    /// When it should be replaced beside the calls.
    pub(crate) const fn refresh_at(&self) -> Duration {
        self.refresh_at
    }

    /// Puts that off.
    pub(crate) const fn refresh_again_at(&mut self, time: Duration) {
        self.refresh_at = time;
    }

    /// Whether it should be replaced before the next call.
    pub(crate) fn is_urgent(&self, now: Duration) -> bool {
        now >= self.urgent_at
    }

    /// Uses it up to this time, or to its end.
    pub(crate) fn tolerate_until(&mut self, time: Duration) {
        self.urgent_at = time.min(self.expires_at);
    }

    /// Whether it still works if it cannot be replaced.
    pub(crate) fn is_valid(&self, now: Duration) -> bool {
        now < self.expires_at
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(***)")
    }
}

#[derive(Deserialize)]
struct Claims {
    exp: f64,
    #[serde(default)]
    iat: Option<f64>,
}

/// When a token expires, since 1970, if it says.
pub(crate) fn expiry_of(token: &str) -> Option<Duration> {
    let claims: Claims = serde_json::from_slice(&payload_of(token)?).ok()?;
    Duration::try_from_secs_f64(claims.exp).ok()
}

/// `exp - iat` of a three-part token, if it says and is positive.
fn lifetime_of(token: &str) -> Option<Duration> {
    let claims: Claims = serde_json::from_slice(&payload_of(token)?).ok()?;
    Duration::try_from_secs_f64(claims.exp - claims.iat?)
        .ok()
        .filter(|lifetime| !lifetime.is_zero())
}

/// The claims of a three-part token, as JSON.
pub(crate) fn payload_of(token: &str) -> Option<Vec<u8>> {
    base64url_decode(token.split('.').nth(1)?)
}

/// URL-safe base64 without padding (RFC 4648, section 5).
fn base64url_decode(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len() * 3 / 4);
    let (mut word, mut n_bits) = (0_u32, 0);
    for symbol in text.trim_end_matches('=').bytes() {
        let sextet = match symbol {
            b'A'..=b'Z' => symbol - b'A',
            b'a'..=b'z' => symbol - b'a' + 26,
            b'0'..=b'9' => symbol - b'0' + 52,
            b'-' | b'+' => 62,
            b'_' | b'/' => 63,
            _ => return None,
        };
        word = (word << 6) | u32::from(sextet);
        n_bits += 6;
        if n_bits >= 8 {
            n_bits -= 8;
            // Keeps the eight bits that are complete.
            bytes.push((word >> n_bits) as u8);
            word &= (1 << n_bits) - 1;
        }
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_checked_and_never_printed() {
        let key: ApiKey = " tml-secret\n".parse().unwrap();
        assert_eq!(key.expose(), "tml-secret");
        assert_eq!(format!("{key:?}"), "ApiKey(***)");

        for (text, message) in [
            ("", "API key is empty"),
            ("sk-1", "API key must start with the tml- prefix"),
        ] {
            assert_eq!(text.parse::<ApiKey>().unwrap_err().to_string(), message);
        }
        assert!("tml-a\nb".parse::<ApiKey>().is_err());
    }

    /// {"exp":1600,"iat":1000}: ten minutes.
    const TEN_MINUTES: &str = "eyJh.eyJleHAiOjE2MDAsImlhdCI6MTAwMH0.x";

    #[test]
    fn tokens_are_replaced_about_half_way_and_urgently_in_their_last_minute() {
        for (draw, refresh_at) in [(0.0, 280), (0.5, 310), (1.0, 340)] {
            let token = Token::received(TEN_MINUTES.into(), secs(10), draw);

            assert_eq!(token.refresh_at(), secs(refresh_at));
        }
        let token = Token::received(TEN_MINUTES.into(), secs(10), 0.5);
        assert!(!token.is_urgent(secs(549)) && token.is_urgent(secs(550)));
        assert!(token.is_valid(secs(609)) && !token.is_valid(secs(610)));
        assert_eq!(format!("{token:?}"), "Token(***)");
    }

    #[test]
    fn a_token_that_could_not_be_replaced_is_tolerated_to_its_end() {
        let mut token = Token::received(TEN_MINUTES.into(), secs(0), 0.5);

        token.tolerate_until(secs(590));
        assert!(!token.is_urgent(secs(589)) && token.is_urgent(secs(590)));
        token.tolerate_until(secs(650));
        assert!(token.is_urgent(secs(600)) && !token.is_valid(secs(600)));
    }

    #[test]
    fn tokens_without_claims_are_replaced_every_minute() {
        let token = Token::received("opaque".into(), secs(0), 0.5);

        assert_eq!(token.refresh_at(), secs(60));
        assert!(!token.is_urgent(secs(59)) && token.is_urgent(secs(60)));
    }

    #[test]
    fn a_token_may_live_for_ever() {
        // {"exp":18000000000000000000,"iat":0}
        let text = "eyJh.eyJleHAiOjE4MDAwMDAwMDAwMDAwMDAwMDAwLCJpYXQiOjB9.x";

        let token = Token::received(text.into(), Duration::MAX, 0.5);

        assert!(token.is_valid(secs(1)));
    }

    #[test]
    fn tokens_say_when_they_expire() {
        assert_eq!(expiry_of(TEN_MINUTES), Some(secs(1600)));
        assert_eq!(expiry_of("eyJh.e30.x"), None);
        assert_eq!(expiry_of("eyJ"), None);
    }

    const fn secs(n: u64) -> Duration {
        Duration::from_secs(n)
    }
}
