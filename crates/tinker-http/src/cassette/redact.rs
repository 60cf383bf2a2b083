//! What is taken out of traffic before it is written: by field, by value and by shape.

use std::collections::BTreeSet;

use bytes::Bytes;
use serde_json::Value;

use super::body::Body;

/// Stands for a secret.
const REDACTED: &str = "***";

/// Stands for a token: `{"exp":253402300799,"iat":0,"sub":"redacted","org_id":"redacted"}`, so that
/// a replayed client takes it and does not ask for another before the year 9999.
const TOKEN: &str = "eyJhbGciOiJub25lIn0.eyJleHAiOjI1MzQwMjMwMDc5OSwiaWF0IjowLCJzdWIiOiJyZWRhY3RlZCIsIm9yZ19pZCI6InJlZGFjdGVkIn0.redacted";

/// Fields of JSON bodies whose text is a secret.
const SECRET_FIELDS: [&str; 12] = [
    "access_token",
    "api_key",
    "apikey",
    "authorization",
    "client_secret",
    "credential",
    "password",
    "secret",
    "signature",
    "token",
    "weights_access_token",
    "x-api-key",
];

/// Shorter texts are not looked for: they would be found where they mean something else.
const MIN_SECRET: usize = 5;

/// The secrets that have been seen, which are taken out wherever they stand.
#[derive(Clone, Default)]
pub(crate) struct Secrets(BTreeSet<String>);

impl std::fmt::Debug for Secrets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Secrets({})", self.0.len())
    }
}

impl Secrets {
    /// Learns a secret; whether it is new.
    pub(crate) fn learn(&mut self, secret: &str) -> bool {
        let is_new = secret.len() >= MIN_SECRET && secret != TOKEN && !self.0.contains(secret);
        if is_new {
            self.0.insert(secret.to_owned());
        }
        is_new
    }

    /// A body without secrets. Learns the tokens in it.
    pub(crate) fn body(&mut self, body: Body) -> Body {
        let Ok(text) = std::str::from_utf8(&body.bytes) else {
            return Body {
                bytes: self.binary(body.bytes),
                ..body
            };
        };
        // Only a document that held a secret is written anew: the others keep their spelling.
        let clean = match self.document(text) {
            Some(Some(document)) => self.known_or(document),
            Some(None) => match self.known(text) {
                Some(clean) => clean,
                None => return body,
            },
            None => self.text(text),
        };
        Body {
            bytes: clean.into(),
            ..body
        }
    }

    /// A JSON document that is cleaned, if it had to be; nothing if it is none.
    fn document(&mut self, text: &str) -> Option<Option<String>> {
        let mut value = serde_json::from_str(text).ok()?;
        Some(self.value(&mut value).then(|| value.to_string()))
    }

    /// A text without secrets.
    pub(crate) fn text(&self, text: &str) -> String {
        let text = without_credentials(&without_signatures(text));
        self.known(&text).unwrap_or(text)
    }

    /// A text without the secrets that have been seen; addresses stay as they are.
    pub(crate) fn known_or(&self, text: String) -> String {
        self.known(&text).unwrap_or(text)
    }

    /// Takes secrets out of a document; whether there were any.
    pub(crate) fn value(&mut self, value: &mut Value) -> bool {
        match value {
            Value::String(text) => {
                let clean = self.text(text);
                let found = clean != *text;
                *text = clean;
                found
            }
            Value::Array(values) => {
                // No shortcut: all of them are cleaned.
                values
                    .iter_mut()
                    .fold(false, |found, v| self.value(v) | found)
            }
            Value::Object(fields) => fields
                .iter_mut()
                .fold(false, |found, (name, v)| self.field(name, v) | found),
            _ => false,
        }
    }

    fn field(&mut self, name: &str, value: &mut Value) -> bool {
        let Value::String(text) = value else {
            return self.value(value);
        };
        let name = name.to_ascii_lowercase();
        let stand_in = match name.as_str() {
            "jwt" => TOKEN,
            name if SECRET_FIELDS.contains(&name) => REDACTED,
            _ => return self.value(value),
        };
        self.learn(text);
        let found = text != stand_in;
        stand_in.clone_into(text);
        found
    }

    /// `text` with known secrets replaced, if it holds any.
    fn known(&self, text: &str) -> Option<String> {
        let mut clean = None;
        // The longest first: one may begin with another.
        let mut secrets: Vec<&String> = self.0.iter().collect();
        secrets.sort_by_key(|secret| std::cmp::Reverse(secret.len()));
        for secret in secrets {
            let current = clean.as_deref().unwrap_or(text);
            if current.contains(secret.as_str()) {
                clean = Some(current.replace(secret.as_str(), REDACTED));
            }
        }
        clean
    }

    /// The same for bytes, which keep their length: they are framed.
    fn binary(&self, bytes: Bytes) -> Bytes {
        let mut clean = bytes.to_vec();
        for secret in &self.0 {
            blank(&mut clean, secret.as_bytes());
        }
        blank_queries(&mut clean);
        if clean == bytes { bytes } else { clean.into() }
    }
}

/// Blanks every occurrence of `needle`.
fn blank(bytes: &mut [u8], needle: &[u8]) {
    let mut from = 0;
    while let Some(at) = find(bytes.get(from..).unwrap_or_default(), needle) {
        let found = from + at..from + at + needle.len();
        from = found.end;
        if let Some(found) = bytes.get_mut(found) {
            found.fill(b'*');
        }
    }
}

/// Blanks what follows the `?` of absolute addresses.
fn blank_queries(bytes: &mut [u8]) {
    let mut from = 0;
    while let Some(at) = find(bytes.get(from..).unwrap_or_default(), b"://") {
        let start = from + at + 3;
        let rest = bytes.get_mut(start..).unwrap_or_default();
        let is_end = |byte: u8| !byte.is_ascii_graphic() || b"\"'<>`".contains(&byte);
        let end = end_of_address(rest, is_end);
        let address = rest.get_mut(..end).unwrap_or_default();
        if let Some(query) = address.iter().position(|&b| b == b'?') {
            address.iter_mut().skip(query + 1).for_each(|b| *b = b'*');
        }
        from = start + end;
    }
}

/// Where an address ends: before a byte that ends it, or a backslash unless it spells `&` (`\u0026`),
/// as some encoders of JSON do.
fn end_of_address(bytes: &[u8], is_end: impl Fn(u8) -> bool) -> usize {
    let ends = |(at, byte): (usize, &u8)| {
        let rest = bytes.get(at..).unwrap_or_default();
        is_end(*byte) || *byte == b'\\' && !rest.starts_with(b"\\u0026")
    };
    bytes
        .iter()
        .enumerate()
        .position(ends)
        .unwrap_or(bytes.len())
}

fn find(bytes: &[u8], needle: &[u8]) -> Option<usize> {
    // Most bodies hold no such byte, and this search is fast.
    let first = *needle.first()?;
    let mut from = 0;
    loop {
        from += bytes.get(from..)?.iter().position(|&b| b == first)?;
        if bytes.get(from..)?.starts_with(needle) {
            return Some(from);
        }
        from += 1;
    }
}

/// Replaces the words that look like a key or a token, whoever they belong to.
fn without_credentials(text: &str) -> String {
    if !text.contains("tml-") && !text.contains("eyJ") {
        return text.to_owned();
    }
    let is_separator = |c: char| !(c.is_ascii_alphanumeric() || "-_.".contains(c));
    let clean = |word: &str| {
        let rest = word.trim_end_matches(is_separator);
        let (rest, separators) = word.split_at(rest.len());
        let is_key = rest.starts_with("tml-") && rest.len() >= 8;
        let is_token = rest.starts_with("eyJ") && rest.len() >= 20 && rest.contains('.');
        match (is_key || is_token) && rest != TOKEN {
            true => format!("{REDACTED}{separators}"),
            false => word.to_owned(),
        }
    };
    text.split_inclusive(is_separator).map(clean).collect()
}

/// Cuts the query, the fragment and the user off every address in a text: signed URLs carry their
/// permission there.
fn without_signatures(text: &str) -> String {
    if text.starts_with('/')
        && let Some((path, _)) = text.split_once('?')
    {
        return format!("{path}?{REDACTED}");
    }
    let mut clean = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("://") {
        let (before, address) = rest.split_at(at + 3);
        clean.push_str(before);
        let is_end = |byte: u8| byte.is_ascii_whitespace() || b"\"'<>`".contains(&byte);
        let end = end_of_address(address.as_bytes(), is_end);
        let (address, after) = address.split_at(end);
        clean.push_str(&bare_address(address));
        rest = after;
    }
    clean.push_str(rest);
    clean
}

/// An address, from its host on, without user, query and fragment.
fn bare_address(address: &str) -> String {
    let end = address.find(['?', '#']).unwrap_or(address.len());
    let (place, query) = address.split_at(end);
    let (host, path) = place.split_at(place.find('/').unwrap_or(place.len()));
    let host = match host.rsplit_once('@') {
        Some((_, host)) => format!("{REDACTED}@{host}"),
        None => host.to_owned(),
    };
    let query = match query.get(..1) {
        Some(mark) => format!("{mark}{REDACTED}"),
        None => String::new(),
    };
    format!("{host}{path}{query}")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn clean(secrets: &mut Secrets, bytes: &[u8]) -> Vec<u8> {
        let body = Body {
            content_type: String::new(),
            bytes: Bytes::copy_from_slice(bytes),
        };
        secrets.body(body).bytes.to_vec()
    }

    fn check(text: &str, expected: &str) {
        let mut secrets = Secrets::default();
        secrets.learn("tml-secret");
        let found = clean(&mut secrets, text.as_bytes());
        assert_eq!(String::from_utf8(found).unwrap(), expected);
    }

    #[test]
    fn bodies_without_secrets_keep_their_spelling() {
        for text in [
            "{ \"lr\": 1.10, \"model\": \"tinker://r/weights/0001\" }",
            "<html>no</html>",
            "see https://host/page",
            "[0.30000000000000004, 1e400]",
            "",
        ] {
            check(text, text);
        }
    }

    #[test]
    fn secrets_go_by_field_by_value_and_by_shape() {
        check(
            r#"{"n":1,"weights_access_token":"w"}"#,
            r#"{"n":1,"weights_access_token":"***"}"#,
        );
        check(
            r#"{"detail":"key tml-secret is not known"}"#,
            r#"{"detail":"key *** is not known"}"#,
        );
        check(
            r#"{"urls":{"a.bin":"https:\/\/u:p@host:1\/a.bin?X-Sig=abc#d"}}"#,
            r#"{"urls":{"a.bin":"https://***@host:1/a.bin?***"}}"#,
        );
        check(r#"{"url":"/files/a?sig=abc"}"#, r#"{"url":"/files/a?***"}"#);
        check(
            "go to https://host/a?sig=abc or tml-secret",
            "go to https://host/a?*** or ***",
        );
        check(
            r#"[{"x-api-key":"other-key"},{"said":"other-key"}]"#,
            r#"[{"x-api-key":"***"},{"said":"***"}]"#,
        );
    }

    #[test]
    fn what_looks_like_a_key_or_a_token_goes_too() {
        check(
            r#"{"detail":"tml-other_key.1 and eyJhbGci.eyJzdWIi.c2ln-x, tml-run eyJ.x"}"#,
            r#"{"detail":"*** and ***, tml-run eyJ.x"}"#,
        );
    }

    #[test]
    fn a_token_is_replaced_by_one_that_works_and_known_from_then_on() {
        let mut secrets = Secrets::default();

        let answer = clean(&mut secrets, br#"{"jwt":"eyJreal.a.b"}"#);

        let answer: Value = serde_json::from_slice(&answer).unwrap();
        let token = answer["jwt"].as_str().unwrap().to_owned();
        assert!(token.starts_with("eyJ") && token.split('.').count() == 3);
        assert_eq!(secrets.text("eyJreal.a.b"), "***");
        assert_eq!(secrets.text(&token), token);
    }

    #[test]
    fn binary_bodies_keep_their_length() {
        let mut secrets = Secrets::default();
        secrets.learn("tml-secret");

        let found = clean(&mut secrets, b"\xff\x0atml-secret\x00https://h/a?sig=1\x00");

        assert_eq!(found, b"\xff\x0a**********\x00https://h/a?*****\x00");
    }

    proptest! {
        #[test]
        fn no_known_secret_survives(before in ".*", after in ".*", raw in prop::collection::vec(any::<u8>(), 0..40)) {
            let mut secrets = Secrets::default();
            secrets.learn("tml-secret");
            let document = serde_json::json!({ before.clone(): format!("{after}tml-secret{before}") });
            let mut binary = raw.clone();
            binary.extend_from_slice(b"tml-secret\xff");
            for bytes in [
                document.to_string().into_bytes(),
                format!("{before}tml-secret{after}").into_bytes(),
                binary,
            ] {
                prop_assert!(find(&clean(&mut secrets, &bytes), b"tml-secret").is_none());
            }
        }
    }

    #[test]
    fn a_signature_after_an_escaped_ampersand_is_removed() {
        let text = r#"{"line": "https://h/o?a=1\u0026X-Amz-Signature=abc123\" and more"}"#;

        let clean = Secrets::default().text(text);

        assert!(!clean.contains("abc123"), "{clean}");
        assert!(clean.ends_with(r#"\" and more"}"#), "{clean}");
    }

    #[test]
    fn of_two_secrets_that_begin_alike_nothing_is_left() {
        let mut secrets = Secrets::default();
        secrets.learn("tml-abcdefghij");
        secrets.learn("tml-abcdefghij-and-more");

        let clean = secrets.known_or("key tml-abcdefghij-and-more!".to_owned());

        assert_eq!(clean, format!("key {REDACTED}!"));
    }
}
