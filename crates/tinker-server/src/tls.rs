//! TLS by files: a certificate and its key, read again when they are replaced.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::serve::Listener;
use serde::{Deserialize, Serialize};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::{self, ServerConfig};
use tokio_rustls::server::TlsStream;

use crate::core::lock;
use crate::disk::{Stamp, stamp};
use crate::error::{Error, Result};

/// How long a client may take to shake hands.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Most clients that shake hands at a time; others wait to be accepted.
const MAX_HANDSHAKES: usize = 256;

/// Where certificate and key are, both PEM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TlsFiles {
    /// The certificate, followed by those that vouch for it.
    pub cert: PathBuf,
    /// Its private key: PKCS #8, PKCS #1 or SEC 1.
    pub key: PathBuf,
}

impl TlsFiles {
    fn stamps(&self) -> [Stamp; 2] {
        [stamp(&self.cert), stamp(&self.key)]
    }

    fn read(&self) -> Result<Arc<ServerConfig>> {
        let certs = CertificateDer::pem_slice_iter(&bytes(&self.cert)?)
            .collect::<std::result::Result<Vec<_>, _>>()
            .map_err(|e| unusable(&self.cert, e))?;
        if certs.is_empty() {
            return Err(unusable(&self.cert, "it has no certificate in PEM"));
        }
        let key = PrivateKeyDer::from_pem_slice(&bytes(&self.key)?)
            .map_err(|e| unusable(&self.key, e))?;
        let builder = ServerConfig::builder_with_provider(ring::default_provider().into());
        let versions = builder.with_safe_default_protocol_versions();
        let mut config = versions
            .map_err(|e| unusable(&self.cert, e))?
            .with_no_client_auth()
            .with_single_cert(certs, key)
            .map_err(|e: rustls::Error| unusable(&self.key, e))?;
        config.alpn_protocols = ["h2", "http/1.1"].map(Into::into).to_vec();
        Ok(config.into())
    }
}

fn bytes(path: &Path) -> Result<Vec<u8>> {
    // Not part of the data directory, which an error of reading would point to.
    std::fs::read(path).map_err(|e| unusable(path, e))
}

fn unusable(path: &Path, why: impl std::fmt::Display) -> Error {
    Error::Invalid(format!("cannot use {} for TLS: {why}", path.display()))
}

/// What new connections are shown.
#[derive(Debug)]
struct Identity {
    files: TlsFiles,
    known: Mutex<([Stamp; 2], Arc<ServerConfig>)>,
}

impl Identity {
    fn read(files: TlsFiles) -> Result<Self> {
        let known = Mutex::new((files.stamps(), files.read()?));
        Ok(Self { files, known })
    }

    /// That of the files as they are; while they cannot be used, what they were.
    fn now(&self) -> Arc<ServerConfig> {
        let stamps = self.files.stamps();
        let mut known = lock(&self.known);
        if known.0 != stamps {
            known.0 = stamps;
            match self.files.read() {
                Ok(config) => {
                    tracing::info!("read the new certificate");
                    known.1 = config;
                }
                Err(error) => tracing::error!(
                    error = error.with_causes(),
                    "cannot use the new certificate; the old one stays"
                ),
            }
        }
        Arc::clone(&known.1)
    }
}

/// Says of a request that it came by TLS.
#[derive(Debug, Clone, Copy)]
pub(crate) struct OverTls;

/// Connections whose handshake is over.
#[derive(Debug)]
pub(crate) struct TlsListener {
    ready: mpsc::Receiver<(TlsStream<TcpStream>, SocketAddr)>,
    addr: SocketAddr,
    accepting: JoinHandle<()>,
}

impl TlsListener {
    /// Takes the connections of a listener.
    ///
    /// # Errors
    /// If the files cannot be used.
    pub(crate) fn start(listener: TcpListener, addr: SocketAddr, files: TlsFiles) -> Result<Self> {
        let identity = Identity::read(files)?;
        let (sender, ready) = mpsc::channel(1);
        Ok(Self {
            ready,
            addr,
            accepting: tokio::spawn(accept(listener, identity, sender)),
        })
    }
}

impl Drop for TlsListener {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

impl Listener for TlsListener {
    type Io = TlsStream<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        match self.ready.recv().await {
            Some(connection) => connection,
            // Nothing is accepted any more.
            None => std::future::pending().await,
        }
    }

    fn local_addr(&self) -> std::io::Result<Self::Addr> {
        Ok(self.addr)
    }
}

/// Shakes hands with everybody at once: one who takes his time holds up nobody.
async fn accept(
    mut listener: TcpListener,
    identity: Identity,
    ready: mpsc::Sender<(TlsStream<TcpStream>, SocketAddr)>,
) {
    let places = Arc::new(Semaphore::new(MAX_HANDSHAKES));
    while let Ok(place) = Arc::clone(&places).acquire_owned().await {
        // This waits out a lack of file descriptors.
        let (stream, addr) = Listener::accept(&mut listener).await;
        let (acceptor, ready) = (TlsAcceptor::from(identity.now()), ready.clone());
        tokio::spawn(async move {
            let _place = place;
            match tokio::time::timeout(HANDSHAKE, acceptor.accept(stream)).await {
                // Without a receiver the server has stopped.
                Ok(Ok(stream)) => drop(ready.send((stream, addr)).await),
                Ok(Err(error)) => tracing::debug!(%addr, %error, "no handshake"),
                Err(_) => tracing::debug!(%addr, "a handshake took too long"),
            }
        });
    }
}
