//! Who clients are told they are, and the short-lived tokens that say so.
//!
//! There is one user: whoever has the server's token. A token made from it is a JWT (RFC 7519) in form;
//! only this server checks its signature, a keyed BLAKE3.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64;
use serde::{Deserialize, Serialize};
use tinker_types::{ApiKeyDetails, ApiKeyInfo, OrgDetails, UserDetails};

use crate::clock::now;
use crate::token::ApiToken;

/// The one user.
pub(crate) const USER: &str = "tml:user:local";
/// The one organization's id.
const ORG: &str = "local";
/// The one user's address.
const EMAIL: &str = "local@localhost";
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
    iat: i64,
    exp: i64,
}

/// Makes a token of an hour.
///
/// # Errors
/// Never: the claims are text and numbers.
pub(crate) fn issue(token: &ApiToken) -> Result<String, serde_json::Error> {
    issue_at(token, now() / 1000)
}

fn issue_at(token: &ApiToken, seconds: i64) -> Result<String, serde_json::Error> {
    let claims = Claims {
        iss: "tinker-server".into(),
        sub: USER.into(),
        org_id: ORG.into(),
        email: EMAIL.into(),
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

/// Whether a token was made by this server and its time is not up.
pub(crate) fn is_valid(token: &ApiToken, presented: &str) -> bool {
    is_valid_at(token, presented, now() / 1000)
}

fn is_valid_at(token: &ApiToken, presented: &str, seconds: i64) -> bool {
    let Some((signed, signature)) = presented.rsplit_once('.') else {
        return false;
    };
    // Digests compare in constant time.
    if blake3::hash(signature.as_bytes()) != blake3::hash(sign(token, signed).as_bytes()) {
        return false;
    }
    let claims = signed
        .split_once('.')
        .map(|(_, claims)| BASE64.decode(claims));
    let Some(Ok(claims)) = claims else {
        return false;
    };
    serde_json::from_slice::<Claims>(&claims).is_ok_and(|claims| claims.exp > seconds)
}

/// What there is to say of the server's token.
pub(crate) fn key_info(token: &ApiToken) -> ApiKeyInfo {
    let digest = blake3::hash(token.expose().as_bytes());
    // 48 bits: exact in every JSON reader.
    let key_id = digest
        .as_bytes()
        .iter()
        .take(6)
        .fold(0, |id, &byte| id << 8 | u64::from(byte));
    ApiKeyInfo {
        key_id,
        name: "embedded server".into(),
        note: "the token of the data directory".into(),
        details: ApiKeyDetails {
            org_details: OrgDetails { name: ORG.into() },
            user_details: UserDetails {
                email: EMAIL.into(),
            },
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_good_for_an_hour_on_the_server_that_made_it() {
        let token = ApiToken::new("tml-x").unwrap();
        let jwt = issue_at(&token, 1000).unwrap();
        assert!(is_jwt(&jwt));

        assert!(is_valid_at(&token, &jwt, 1000 + LIFE - 1));
        assert!(!is_valid_at(&token, &jwt, 1000 + LIFE));
        assert!(!is_valid_at(&ApiToken::new("tml-y").unwrap(), &jwt, 1000));
        let [header, claims, signature] = jwt.split('.').collect::<Vec<_>>()[..] else {
            panic!("{jwt}");
        };
        let later = issue_at(&token, 9000).unwrap();
        let other = later.split('.').nth(1).unwrap();
        for forged in [
            format!("{header}.{other}.{signature}"),
            format!("{header}.{claims}."),
            format!("{header}.{claims}"),
            "eyJ".to_owned(),
        ] {
            assert!(!is_valid_at(&token, &forged, 1000), "{forged}");
        }
    }

    #[test]
    fn a_token_says_who_one_is() {
        let token = ApiToken::new("tml-x").unwrap();
        let jwt = issue_at(&token, 1000).unwrap();

        let claims = BASE64.decode(jwt.split('.').nth(1).unwrap()).unwrap();
        let claims: serde_json::Value = serde_json::from_slice(&claims).unwrap();

        assert_eq!(claims["sub"], USER);
        assert_eq!(claims["exp"].as_i64(), Some(1000 + LIFE));
    }

    #[test]
    fn the_number_of_a_key_fits_a_json_number_and_hides_the_key() {
        let info = key_info(&ApiToken::new("tml-secret").unwrap());

        assert!(info.key_id < 1 << 48);
        assert!(!format!("{info:?}").contains("secret"));
    }
}
