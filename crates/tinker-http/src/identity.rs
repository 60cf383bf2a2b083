//! Whom a credential speaks for, as its token says.

use serde::Deserialize;
use tinker_types::Whoami;

use crate::auth::payload_of;
use crate::client::Client;
use crate::error::{Error, ErrorKind, Result};

/// What a token says of its owner.
#[derive(Deserialize)]
struct Claims {
    sub: String,
    org_id: String,
    #[serde(default)]
    email: Option<String>,
    #[serde(default)]
    iss: Option<String>,
}

/// Issuers of tokens that users hold themselves.
const USER_ISSUER: &str = "passport-";

impl Client {
    /// Says whom the credential speaks for: by the token it is exchanged for, or by the credential
    /// itself if that is a user's token. Asks no endpoint but the token exchange. The claims are
    /// read, not verified: the server does that.
    ///
    /// # Errors
    /// If the server hands out no tokens and the credential is an API key, or the token does not
    /// say.
    pub async fn whoami(&self) -> Result<Whoami> {
        let exchange = self.config().await?.pjwt_auth_enabled;
        let token = if exchange {
            self.token(None, None).await?
        } else {
            self.credential().await?
        };
        let claims = claims_of(&token);
        if !exchange {
            let issuer = claims.as_ref().and_then(|claims| claims.iss.as_deref());
            if !issuer.is_some_and(|issuer| issuer.starts_with(USER_ISSUER)) {
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    "this server hands out no tokens, and an API key does not say whose it is",
                ));
            }
        }
        let claims = claims.ok_or_else(|| {
            Error::new(
                ErrorKind::Decode,
                "the server's token does not say whose it is",
            )
        })?;
        Ok(Whoami {
            user_urn: claims.sub,
            org_urn: format!("tml:organization:{}", claims.org_id),
            email: claims.email.filter(|email| !email.is_empty()),
        })
    }
}

fn claims_of(token: &str) -> Option<Claims> {
    serde_json::from_slice(&payload_of(token)?).ok()
}
