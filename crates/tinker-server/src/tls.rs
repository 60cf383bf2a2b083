//! TLS by files: a certificate and its key, read again when they are replaced.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinHandle, JoinSet};
use tokio::time::Instant;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::{self, ServerConfig};
use tokio_rustls::server::TlsStream;

use crate::connections::{Connection, Connections};
use crate::core::lock;
use crate::disk::{Stamp, stamp};
use crate::error::{Error, Result};
use crate::serving::{Accept, take_up};
use crate::watched::Watched;

/// How long a client may take to shake hands.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// Bounds on clients that shake hands.
#[derive(Debug, Clone, Copy)]
struct Bounds {
    /// Most at a time; others wait to be accepted.
    most: usize,
    /// How long one may take while others wait. So clients that say nothing hold nobody up for longer,
    /// however many they are.
    patience: Duration,
}

const BOUNDS: Bounds = Bounds {
    most: 256,
    patience: Duration::from_secs(1),
};

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
pub(crate) struct Identity {
    files: TlsFiles,
    known: Mutex<([Stamp; 2], Arc<ServerConfig>)>,
}

impl Identity {
    /// Reads the files.
    ///
    /// # Errors
    /// If they cannot be used.
    pub(crate) fn read(files: TlsFiles) -> Result<Self> {
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
    ready: mpsc::Receiver<(TlsStream<Watched<TcpStream>>, Connection)>,
    addr: SocketAddr,
    accepting: JoinHandle<()>,
}

impl TlsListener {
    /// Takes the connections of a listener at an address while there are places for them.
    pub(crate) fn start(
        (listener, addr): (TcpListener, SocketAddr),
        identity: Identity,
        connections: Arc<Connections>,
    ) -> Self {
        Self::start_with((listener, addr), identity, connections, BOUNDS)
    }

    fn start_with(
        (listener, addr): (TcpListener, SocketAddr),
        identity: Identity,
        connections: Arc<Connections>,
        bounds: Bounds,
    ) -> Self {
        let (sender, ready) = mpsc::channel(1);
        let accepting = accept(listener, identity, connections, sender, bounds);
        Self {
            ready,
            addr,
            accepting: tokio::spawn(accepting),
        }
    }

    /// Where it listens.
    pub(crate) const fn addr(&self) -> SocketAddr {
        self.addr
    }
}

impl Drop for TlsListener {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

impl Accept for TlsListener {
    type Io = TlsStream<Watched<TcpStream>>;

    async fn accept(&mut self) -> (Self::Io, Connection) {
        match self.ready.recv().await {
            Some(connection) => connection,
            // Nothing is accepted any more.
            None => std::future::pending().await,
        }
    }
}

/// Shakes hands with everybody at once: one who takes his time holds up nobody.
async fn accept(
    mut listener: TcpListener,
    identity: Identity,
    connections: Arc<Connections>,
    ready: mpsc::Sender<(TlsStream<Watched<TcpStream>>, Connection)>,
    bounds: Bounds,
) {
    let mut handshakes = Handshakes::default();
    loop {
        let place = connections.place().await;
        // This waits out a lack of file descriptors.
        let (stream, addr) = axum::serve::Listener::accept(&mut listener).await;
        let (stream, connection) = take_up(place, stream);
        handshakes.make_room(bounds).await;
        let (acceptor, ready) = (TlsAcceptor::from(identity.now()), ready.clone());
        handshakes.begin(async move {
            let shaken = tokio::select! {
                shaken = tokio::time::timeout(HANDSHAKE, acceptor.accept(stream)) => shaken,
                () = connection.asked_to_leave() => {
                    tracing::debug!(%addr, "a handshake gave way to others");
                    return;
                }
            };
            match shaken {
                // Without a receiver the server has stopped.
                Ok(Ok(stream)) => drop(ready.send((stream, connection)).await),
                Ok(Err(error)) => tracing::debug!(%addr, %error, "no handshake"),
                Err(_) => tracing::debug!(%addr, "a handshake took too long"),
            }
        });
    }
}

/// Handshakes under way; they end with this.
#[derive(Debug, Default)]
struct Handshakes {
    running: JoinSet<()>,
    /// When each began, the oldest first; some may have ended.
    order: VecDeque<(Instant, AbortHandle)>,
}

impl Handshakes {
    fn begin(&mut self, handshake: impl Future<Output = ()> + Send + 'static) {
        let handle = self.running.spawn(handshake);
        self.order.push_back((Instant::now(), handle));
    }

    /// Waits until there is room for one more: one has ended, or the oldest has had its time.
    async fn make_room(&mut self, bounds: Bounds) {
        while self.running.try_join_next().is_some() {}
        if self.order.len() >= bounds.most {
            self.order.retain(|(_, handle)| !handle.is_finished());
        }
        while self.running.len() >= bounds.most {
            let oldest = self.order.front().map(|(began, _)| *began);
            let out_of_time = oldest.unwrap_or_else(Instant::now) + bounds.patience;
            tokio::select! {
                _ = self.running.join_next() => {}
                () = tokio::time::sleep_until(out_of_time) => {
                    tracing::debug!("a handshake took too long while others waited");
                    if let Some((_, oldest)) = self.order.pop_front() {
                        oldest.abort();
                    }
                    self.running.join_next().await;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio_rustls::TlsConnector;
    use tokio_rustls::rustls::pki_types::ServerName;
    use tokio_rustls::rustls::{ClientConfig, RootCertStore};

    fn fixture(name: &str) -> PathBuf {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/tls");
        dir.join(name)
    }

    fn connector() -> TlsConnector {
        let pem = std::fs::read(fixture("first.cert.pem")).unwrap();
        let mut roots = RootCertStore::empty();
        let cert = CertificateDer::from_pem_slice(&pem).unwrap();
        roots.add(cert).unwrap();
        let builder = ClientConfig::builder_with_provider(ring::default_provider().into());
        let versions = builder.with_safe_default_protocol_versions().unwrap();
        let config = versions.with_root_certificates(roots).with_no_client_auth();
        TlsConnector::from(Arc::new(config))
    }

    /// A listener whose bounds are small.
    async fn listening(bounds: Bounds) -> (TlsListener, SocketAddr) {
        listening_for(Connections::new(None), bounds).await
    }

    async fn listening_for(
        connections: Arc<Connections>,
        bounds: Bounds,
    ) -> (TlsListener, SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let files = TlsFiles {
            cert: fixture("first.cert.pem"),
            key: fixture("first.key.pem"),
        };
        let identity = Identity::read(files).unwrap();
        let listening = TlsListener::start_with((listener, addr), identity, connections, bounds);
        (listening, addr)
    }

    async fn connected(addr: SocketAddr) -> std::io::Result<()> {
        let stream = TcpStream::connect(addr).await?;
        let name = ServerName::try_from("first.example").unwrap();
        connector().connect(name, stream).await.map(drop)
    }

    #[tokio::test]
    async fn clients_that_say_nothing_hold_up_nobody() {
        let bounds = Bounds {
            most: 2,
            patience: Duration::ZERO,
        };
        let (mut listener, addr) = listening(bounds).await;
        let mut silent = Vec::new();
        for _ in 0..5 {
            silent.push(TcpStream::connect(addr).await.unwrap());
        }

        let (connected, _) = tokio::join!(connected(addr), listener.accept());

        connected.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn clients_that_say_nothing_give_their_places_to_others() {
        let connections = Connections::new(Some(3));
        let (mut listener, addr) = listening_for(Arc::clone(&connections), BOUNDS).await;
        let mut silent = Vec::new();
        for _ in 0..9 {
            silent.push(TcpStream::connect(addr).await.unwrap());
        }

        // The clock may run ahead of one that speaks, who comes again then.
        let speaking = async {
            for _ in 0..100 {
                drop(connected(addr).await);
            }
        };
        let accepted = tokio::select! {
            (_, accepted) = listener.accept() => accepted,
            () = speaking => panic!("nobody who spoke got in"),
        };

        let (n_open, most) = accepted.all().count();
        assert!(n_open <= 3 && most == Some(3), "{n_open} connections");
    }

    #[tokio::test]
    async fn a_client_waits_for_a_place_rather_than_take_one_from_another() {
        let bounds = Bounds {
            most: 1,
            patience: Duration::from_secs(3600),
        };
        let (mut listener, addr) = listening(bounds).await;

        // Each waits until the one before it has ended.
        let all = async { tokio::join!(connected(addr), connected(addr), connected(addr)) };
        let accepted = async {
            for _ in 0..3 {
                listener.accept().await;
            }
        };
        let ((a, b, c), ()) = tokio::join!(all, accepted);

        a.and(b).and(c).unwrap();
    }
}
