//! Encryption of connections: rustls with ring, and the trust store of the operating system.
//!
//! Loading the trust store takes long, so all clients of a pool share one configuration, made when an
//! address first needs it.

use std::sync::{Arc, Mutex, PoisonError};

use rustls::crypto::{CryptoProvider, ring};
use rustls::{ClientConfig, ConfigBuilder, RootCertStore, WantsVerifier};
use rustls_platform_verifier::BuilderVerifierExt as _;

use crate::error::{Error, ErrorKind, Result};

/// What a connection may speak, dearest first.
const PROTOCOLS: [&[u8]; 2] = [b"h2", b"http/1.1"];

/// The configuration of a pool's clients.
#[derive(Debug, Default)]
pub(crate) struct Tls {
    trusting: Mutex<Option<ClientConfig>>,
}

impl Tls {
    /// Trusts whom the operating system trusts (and `SSL_CERT_FILE` and `SSL_CERT_DIR` name).
    ///
    /// # Errors
    /// [`ErrorKind::Connect`] if the system has no usable trust store.
    pub(crate) fn trusting(&self) -> Result<ClientConfig> {
        let mut trusting = self.trusting.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(config) = &*trusting {
            return Ok(config.clone());
        }
        let verified = builder()?.with_platform_verifier().map_err(no_tls)?;
        let config = speaking(verified.with_no_client_auth());
        *trusting = Some(config.clone());
        Ok(config)
    }

    /// Trusts nobody: for clients that make no encrypted connection.
    pub(crate) fn trusting_nobody() -> Result<ClientConfig> {
        let nobody = builder()?.with_root_certificates(RootCertStore::empty());
        Ok(speaking(nobody.with_no_client_auth()))
    }
}

/// Named here and not taken from the process, in which others may have installed none or two.
fn builder() -> Result<ConfigBuilder<ClientConfig, WantsVerifier>> {
    let provider: Arc<CryptoProvider> = Arc::new(ring::default_provider());
    ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(no_tls)
}

fn speaking(mut config: ClientConfig) -> ClientConfig {
    config.alpn_protocols = PROTOCOLS.map(<[u8]>::to_vec).to_vec();
    config
}

fn no_tls(error: rustls::Error) -> Error {
    Error::new(ErrorKind::Connect, "cannot set up encryption").with_source(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_of_a_pool_share_what_was_loaded_once() {
        let tls = Tls::default();

        let (one, other) = (tls.trusting().unwrap(), tls.trusting().unwrap());

        assert!(Arc::ptr_eq(one.crypto_provider(), other.crypto_provider()));
        assert_eq!(one.alpn_protocols, PROTOCOLS);
    }
}
