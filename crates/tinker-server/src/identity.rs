//! Who clients are told they are, and the short-lived tokens that say so.
//!
//! A user is whoever has a key: the data directory's own, or one of a name. A token made for one is a JWT
//! (RFC 7519) in form; only this server checks its signature, a keyed BLAKE3.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64;
use serde::{Deserialize, Serialize};
use tinker_types::{ApiKeyDetails, ApiKeyInfo, OrgDetails, UserDetails};

use crate::caller::Caller;
use crate::clock::now;
use crate::keys::KeyName;
use crate::token::ApiToken;

/// What names of users begin with.
const USER: &str = "tml:user:";
/// The name of whoever has the data directory's own key.
const LOCAL: &str = "local";
/// The one organization's id.
const ORG: &str = "local";
/// How long a token is good for, in seconds; clients renew it when half of that is over.
const LIFE: i64 = 60 * 60;
const HEADER: &str = r#"{"alg":"BLAKE3","typ":"JWT"}"#;

/// What a token claims; times are seconds since 1970.
#[derive(Debug, Serialize, Deserialize)]
struct Claims {
    iss: String,
    sub: String,
    org_id: String,
    email: String,
    /// Digest of the key that it was made for: a later key of the same name is another. Absent for the
    /// data directory's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    key_digest: Option<String>,
    iat: i64,
    exp: i64,
}

/// Whose a token is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Holder {
    /// Whoever has the data directory's own key.
    Own,
    /// Whoever has a key of this digest.
    Key { digest: String },
}

/// The user who has a key; `None` is the data directory's own.
pub(crate) fn user(key: Option<&KeyName>) -> String {
    format!("{USER}{}", key.map_or(LOCAL, KeyName::as_str))
}

fn email(key: Option<&KeyName>) -> String {
    format!("{}@localhost", key.map_or(LOCAL, KeyName::as_str))
}

/// Makes a token of an hour for whoever has a key.
///
/// # Errors
/// Never: the claims are text and numbers.
pub(crate) fn issue(token: &ApiToken, holder: &Caller) -> Result<String, serde_json::Error> {
    issue_at(token, holder, now() / 1000)
}

fn issue_at(token: &ApiToken, holder: &Caller, seconds: i64) -> Result<String, serde_json::Error> {
    let key = holder.key.as_ref();
    let claims = Claims {
        iss: "tinker-server".into(),
        sub: user(key),
        org_id: ORG.into(),
        email: email(key),
        key_digest: holder.digest.as_deref().map(str::to_owned),
        iat: seconds,
        exp: seconds + LIFE,
    };
    let text = serde_json::to_vec(&claims)?;
    let signed = format!("{}.{}", BASE64.encode(HEADER), BASE64.encode(text));
    let signature = sign(token, &signed);
    Ok(format!("{signed}.{signature}"))
}

fn sign(token: &ApiToken, text: &str) -> String {
    let key = blake3::derive_key("tinker-server session tokens v1", token.expose().as_bytes());
    BASE64.encode(blake3::keyed_hash(&key, text.as_bytes()).as_bytes())
}

/// Whether a text looks like a token made by [`issue`], and not like the server's own.
pub(crate) fn is_jwt(presented: &str) -> bool {
    presented.starts_with("eyJ")
}

/// Whose token this is, if this server made it and its time is not up.
pub(crate) fn holder(token: &ApiToken, presented: &str) -> Option<Holder> {
    holder_at(token, presented, now() / 1000)
}

fn holder_at(token: &ApiToken, presented: &str, seconds: i64) -> Option<Holder> {
    let (signed, signature) = presented.rsplit_once('.')?;
    // Digests compare in constant time.
    if blake3::hash(signature.as_bytes()) != blake3::hash(sign(token, signed).as_bytes()) {
        return None;
    }
    let (_header, claims) = signed.split_once('.')?;
    let claims: Claims = serde_json::from_slice(&BASE64.decode(claims).ok()?).ok()?;
    if claims.exp <= seconds {
        return None;
    }
    match claims.sub.strip_prefix(USER)? {
        LOCAL => Some(Holder::Own),
        _ => Some(Holder::Key {
            digest: claims.key_digest?,
        }),
    }
}

/// What there is to say of a key; `None` is the server's own token.
pub(crate) fn key_info(token: &ApiToken, key: Option<&KeyName>) -> ApiKeyInfo {
    let digest = match key {
        None => blake3::hash(token.expose().as_bytes()),
        Some(key) => blake3::hash(key.as_str().as_bytes()),
    };
    // 48 bits: exact in every JSON reader.
    let key_id = digest
        .as_bytes()
        .iter()
        .take(6)
        .fold(0, |id, &byte| id << 8 | u64::from(byte));
    let (name, note) = match key {
        None => ("embedded server", "the token of the data directory"),
        Some(key) => (key.as_str(), "a key of the data directory"),
    };
    ApiKeyInfo {
        key_id,
        name: name.into(),
        note: note.into(),
        details: ApiKeyDetails {
            org_details: OrgDetails { name: ORG.into() },
            user_details: UserDetails { email: email(key) },
        },
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::keys::KeyLimits;

    #[test]
    fn a_token_is_good_for_an_hour_on_the_server_that_made_it() {
        let token = ApiToken::new("tml-x").unwrap();
        let limits = KeyLimits::default();
        let ann = Caller::of_key("ann".parse().unwrap(), BTreeSet::new(), limits).with_digest("d");
        let of_ann = Holder::Key { digest: "d".into() };
        let jwt = issue_at(&token, &ann, 1000).unwrap();
        assert!(is_jwt(&jwt));

        assert_eq!(holder_at(&token, &jwt, 1000 + LIFE - 1), Some(of_ann));
        assert_eq!(holder_at(&token, &jwt, 1000 + LIFE), None);
        let other = ApiToken::new("tml-y").unwrap();
        assert_eq!(holder_at(&other, &jwt, 1000), None);
        let [header, claims, signature] = jwt.split('.').collect::<Vec<_>>()[..] else {
            panic!("{jwt}");
        };
        let later = issue_at(&token, &Caller::own(), 9000).unwrap();
        assert_eq!(holder_at(&token, &later, 9000), Some(Holder::Own));
        let other = later.split('.').nth(1).unwrap();
        for forged in [
            format!("{header}.{other}.{signature}"),
            format!("{header}.{claims}."),
            format!("{header}.{claims}"),
            "eyJ".to_owned(),
        ] {
            assert_eq!(holder_at(&token, &forged, 1000), None, "{forged}");
        }
    }

    #[test]
    fn a_token_says_who_one_is() {
        let token = ApiToken::new("tml-x").unwrap();
        let jwt = issue_at(&token, &Caller::own(), 1000).unwrap();

        let claims = BASE64.decode(jwt.split('.').nth(1).unwrap()).unwrap();
        let claims: serde_json::Value = serde_json::from_slice(&claims).unwrap();

        assert_eq!(claims["sub"], "tml:user:local");
        assert_eq!(claims["exp"].as_i64(), Some(1000 + LIFE));
    }

    #[test]
    fn the_number_of_a_key_fits_a_json_number_and_hides_the_key() {
        let info = key_info(&ApiToken::new("tml-secret").unwrap(), None);

        assert!(info.key_id < 1 << 48);
        assert!(!format!("{info:?}").contains("secret"));
    }
}
