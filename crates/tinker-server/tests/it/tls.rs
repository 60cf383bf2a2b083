//! TLS by files: what is served over it, and certificates that change.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tinker_server::{Outside, ServeOptions, Server, TlsFiles, read_lock};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

pub(crate) fn fixture(name: &str) -> PathBuf {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/tls");
    dir.join(name)
}

/// Puts a certificate and its key where a server looks for its own.
fn install(dir: &Path, name: &str) -> TlsFiles {
    let put = |kind: &str| {
        let (temp, path) = (dir.join("new.pem"), dir.join(format!("{kind}.pem")));
        std::fs::copy(fixture(&format!("{name}.{kind}.pem")), &temp).unwrap();
        std::fs::rename(temp, &path).unwrap();
        path
    };
    TlsFiles {
        cert: put("cert"),
        key: put("key"),
    }
}

struct Running {
    addr: SocketAddr,
    local: SocketAddr,
    key: String,
    stop: oneshot::Sender<()>,
    running: JoinHandle<tinker_server::Result<()>>,
}

impl Running {
    async fn start(home: &Path, files: TlsFiles) -> Self {
        let options = ServeOptions {
            tls: Some(files),
            ..ServeOptions::new(home)
        };
        let server = Server::bind(options).await.unwrap();
        let (addr, local) = (server.tls_addr().unwrap(), server.addr());
        let key = server.token().expose().to_owned();
        let (stop, stopped) = oneshot::channel();
        let running = tokio::spawn(server.run(async move { drop(stopped.await) }));
        Self {
            addr,
            local,
            key,
            stop,
            running,
        }
    }

    fn request(&self, method: &str, path: &str, host: &str) -> String {
        let key = &self.key;
        format!(
            "{method} {path} HTTP/1.1\r\nHost: {host}\r\nX-API-Key: {key}\r\nContent-Type: application/json\r\n\
             Content-Length: 0\r\nConnection: close\r\n\r\n"
        )
    }

    /// Sends a request to somebody who must be `name` by the certificate.
    async fn by_tls(&self, trusted: &str, request: &str) -> std::io::Result<String> {
        let name = ServerName::try_from(format!("{trusted}.example")).unwrap();
        let stream = TcpStream::connect(self.addr).await?;
        exchange(trusting(trusted).connect(name, stream).await?, request).await
    }

    async fn stop(self) {
        drop(self.stop);
        self.running.await.unwrap().unwrap();
    }
}

/// A client that believes who has a certificate of the fixtures, and nobody else.
pub(crate) fn trusting(trusted: &str) -> TlsConnector {
    let mut roots = RootCertStore::empty();
    let pem = std::fs::read(fixture(&format!("{trusted}.cert.pem"))).unwrap();
    roots
        .add(CertificateDer::from_pem_slice(&pem).unwrap())
        .unwrap();
    let config = ClientConfig::builder_with_provider(ring::default_provider().into())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    TlsConnector::from(Arc::new(config))
}

async fn exchange(
    mut stream: impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
    request: &str,
) -> std::io::Result<String> {
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await?;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

#[tokio::test]
async fn others_are_served_by_tls_and_this_machine_without() {
    let home = tempfile::tempdir().unwrap();
    let files = install(home.path(), "first");
    let server = Running::start(home.path(), files.clone()).await;
    let sign = read_lock(home.path()).unwrap().unwrap();
    assert_eq!(sign.base_url(), format!("http://{}", server.local));
    let outside = Outside {
        addr: server.addr,
        tls: Some(files),
    };
    assert_eq!(sign.outside, Some(outside), "nobody else starts it again");

    let host = "first.example:8642";
    let sessions = server.request("GET", "/api/v1/sessions", host);
    let answer = server.by_tls("first", &sessions).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");

    assert!(server.local.ip().is_loopback());
    let plain = || TcpStream::connect(server.local);
    let local = server.request("GET", "/api/v1/sessions", &server.local.to_string());
    let answer = exchange(plain().await.unwrap(), &local).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    // Without a certificate a name could lead here by a trick.
    let answer = exchange(plain().await.unwrap(), &sessions).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 403"), "{answer}");
    server.stop().await;
}

#[tokio::test]
async fn links_lead_back_the_way_the_request_came() {
    let home = tempfile::tempdir().unwrap();
    let server = Running::start(home.path(), install(home.path(), "first")).await;
    let host = "first.example:8642";
    let create = server
        .request("POST", "/api/v1/create_session", host)
        .replace("Content-Length: 0", "Content-Length: 50")
        + r#"{"tags":[],"user_metadata":{},"sdk_version":"tls"}"#;
    let answer = server.by_tls("first", &create).await.unwrap();
    let session = answer.split("\"session_id\":\"").nth(1).unwrap();
    let session = session.split('"').next().unwrap();

    let export = format!("/api/v1/sessions/{session}/trace_export");
    let export = server.request("GET", &export, host);
    let answer = server.by_tls("first", &export).await.unwrap();

    assert!(
        answer.contains("https://first.example:8642/signed/"),
        "{answer}"
    );
    server.stop().await;
}

#[tokio::test]
async fn a_certificate_that_is_replaced_is_shown_to_the_next_client() {
    let home = tempfile::tempdir().unwrap();
    let server = Running::start(home.path(), install(home.path(), "first")).await;
    let request = server.request("GET", "/api/v1/healthz", "x");
    assert!(server.by_tls("second", &request).await.is_err());

    // One that cannot be used changes nothing.
    std::fs::write(home.path().join("cert.pem"), "no certificate").unwrap();
    assert!(server.by_tls("first", &request).await.is_ok());

    install(home.path(), "second");
    assert!(server.by_tls("second", &request).await.is_ok());
    assert!(server.by_tls("first", &request).await.is_err());
    server.stop().await;
}

#[tokio::test]
async fn files_that_cannot_be_used_are_named_at_the_start() {
    let home = tempfile::tempdir().unwrap();
    let good = install(home.path(), "first");
    let odd = home.path().join("odd.pem");
    std::fs::write(&odd, "nothing").unwrap();
    let other_key = fixture("second.key.pem");
    let cases = [
        (odd.clone(), good.key.clone(), "odd.pem"),
        (good.cert.clone(), odd, "odd.pem"),
        (good.cert.clone(), other_key, "second.key.pem"),
        (home.path().join("none.pem"), good.key, "none.pem"),
    ];

    for (cert, key, named) in cases {
        let options = ServeOptions {
            tls: Some(TlsFiles { cert, key }),
            ..ServeOptions::new(home.path())
        };
        let error = Server::bind(options).await.unwrap_err().to_string();
        assert!(
            error.starts_with("cannot use ") && error.contains(named),
            "{error}"
        );
    }
}
