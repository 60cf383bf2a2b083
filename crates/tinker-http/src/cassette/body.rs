//! Bodies on a cassette: text where they are text, base64 where they are not.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A body as it was before compression.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Body {
    /// Its content type, in lower case; empty if none was given.
    pub content_type: String,
    /// Its bytes, byte for byte as sent unless a secret was taken out.
    pub bytes: Bytes,
}

impl Body {
    /// The body as JSON, if it is.
    #[must_use]
    pub fn json(&self) -> Option<serde_json::Value> {
        serde_json::from_slice(&self.bytes).ok()
    }
}

/// How a body stands in a line.
#[derive(Serialize, Deserialize)]
struct Line<'a> {
    #[serde(default, skip_serializing_if = "str::is_empty")]
    content_type: &'a str,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    text: Option<&'a str>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    base64: Option<String>,
}

#[derive(Deserialize)]
struct OwnedLine {
    #[serde(default)]
    content_type: String,
    text: Option<String>,
    base64: Option<String>,
}

impl Serialize for Body {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let text = std::str::from_utf8(&self.bytes).ok();
        let base64 = match text {
            Some(_) => None,
            None => Some(STANDARD.encode(&self.bytes)),
        };
        let line = Line {
            content_type: &self.content_type,
            text,
            base64,
        };
        line.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Body {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let line = OwnedLine::deserialize(deserializer)?;
        let bytes = match (line.text, line.base64) {
            (Some(text), None) => text.into_bytes(),
            (None, Some(base64)) => STANDARD.decode(base64).map_err(serde::de::Error::custom)?,
            _ => {
                return Err(serde::de::Error::custom(
                    "a body has either text or base64, and one of them",
                ));
            }
        };
        Ok(Self {
            content_type: line.content_type,
            bytes: bytes.into(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(bytes: &[u8], expected: &str) {
        let body = Body {
            content_type: "x/y".into(),
            bytes: Bytes::copy_from_slice(bytes),
        };

        let line = serde_json::to_string(&body).unwrap();

        assert_eq!(line, expected);
        assert_eq!(serde_json::from_str::<Body>(&line).unwrap(), body);
    }

    #[test]
    fn bodies_keep_every_byte() {
        check(
            b"{ \"a\":1.10 }\n",
            r#"{"content_type":"x/y","text":"{ \"a\":1.10 }\n"}"#,
        );
        check(&[0xff, 0, 1], r#"{"content_type":"x/y","base64":"/wAB"}"#);
        check(b"", r#"{"content_type":"x/y","text":""}"#);
    }

    #[test]
    fn a_body_that_says_two_things_or_none_is_refused() {
        for line in [r#"{"text":"a","base64":""}"#, "{}", r#"{"base64":"?"}"#] {
            assert!(serde_json::from_str::<Body>(line).is_err(), "{line}");
        }
    }
}
