//! Who a credential belongs to.

use serde::{Deserialize, Serialize};

/// Answer of `GET /api/v1/auth/apikey/me`: the key that was presented.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApiKeyInfo {
    /// Its number.
    pub key_id: u64,
    /// Its name.
    pub name: String,
    /// What it is for.
    pub note: String,
    /// Whose it is.
    pub details: ApiKeyDetails,
}

/// Whose a key is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApiKeyDetails {
    /// The organization.
    pub org_details: OrgDetails,
    /// The user.
    pub user_details: UserDetails,
}

/// An organization.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OrgDetails {
    /// Its name.
    pub name: String,
}

/// A user.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserDetails {
    /// The user's address.
    pub email: String,
}

/// Whom a token speaks for; read from its claims, no endpoint gives it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Whoami {
    /// The user, as a URN.
    pub user_urn: String,
    /// The organization, as a URN.
    pub org_urn: String,
    /// The user's address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub email: Option<String>,
}
