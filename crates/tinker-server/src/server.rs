//! The life of a server: lock, bind, answer, stop.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use axum::Extension;
use futures_util::FutureExt as _;
use tinker_engine::CpuOptions;
use tokio::net::{TcpListener, TcpSocket};

use crate::app::{App, AppOptions};
use crate::connections::max_connections;
use crate::disk::{Disk, OsDisk};
use crate::error::{Error, Result};
use crate::limits::Limits;
use crate::lock::{HomeLock, LockInfo, Outside, base_url, server_dir};
use crate::options::ServeOptions;
use crate::paths::Paths;
use crate::quota::check_limit;
use crate::router::router;
use crate::serving::{Plain, serve as serve_over};
use crate::summary::Observer;
use crate::tls::{Identity, OverTls, TlsFiles, TlsListener};
use crate::token::ApiToken;

/// How often the idle clock is looked at, at most.
const IDLE_CHECK: Duration = Duration::from_secs(10);
/// Clients that may wait to be accepted; the operating system may have a lower limit.
const BACKLOG: u32 = 4096;
/// How long answers under way are waited for at the end. Connections that are still busy then are dropped,
/// and their clients, who saw no end of the answer, ask again.
const DRAIN: Duration = Duration::from_secs(5);

/// A server that is bound and ready to run.
#[derive(Debug)]
pub struct Server {
    app: Arc<App>,
    listener: TcpListener,
    addr: SocketAddr,
    /// Those of other machines, where `listener` is for this one alone.
    tls: Option<TlsListener>,
    lock: HomeLock,
    idle_timeout: Option<Duration>,
}

/// Serves until `shutdown` completes or the idle time-out passes.
///
/// # Errors
/// As [`Server::bind`] and [`Server::run`].
pub async fn serve(
    options: ServeOptions,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<()> {
    Server::bind(options).await?.run(shutdown).await
}

impl Server {
    /// Takes the data directory's lock, recovers what an earlier server left, and binds the port.
    ///
    /// # Errors
    /// [`Error::AlreadyRunning`], [`Error::PortTaken`], or a data directory that cannot be used.
    pub async fn bind(options: ServeOptions) -> Result<Self> {
        let disk: Arc<dyn Disk> = Arc::new(OsDisk);
        let lock = HomeLock::take(disk.as_ref(), &options.home)?;
        let asked = SocketAddr::new(options.host, options.port);
        let (mut listener, mut addr) = listen(asked)?;
        let outside = outside(&options, addr);
        let mut by_tls = None;
        if let Some(files) = options.tls.clone() {
            let identity = Identity::read(files)?;
            by_tls = Some(((listener, addr), identity));
            (listener, addr) = listen(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))?;
        }
        let token_path = server_dir(&options.home).join("token");
        let token = match options.token.clone() {
            Some(token) => token,
            None => ApiToken::load_or_create(disk.as_ref(), &token_path)?,
        };
        let app = open_app(&options, token.clone()).await?;
        let tls = by_tls.map(|(listener, identity)| {
            TlsListener::start(listener, identity, Arc::clone(&app.core.connections))
        });
        let sign = LockInfo {
            outside,
            ..lock_info(&options, addr, &token)
        };
        lock.publish(disk.as_ref(), &sign)?;
        Ok(Self {
            app,
            listener,
            addr,
            tls,
            lock,
            idle_timeout: options.idle_timeout,
        })
    }

    /// Where it listens without TLS.
    #[must_use]
    pub const fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Where it listens by TLS, if it does.
    #[must_use]
    pub fn tls_addr(&self) -> Option<SocketAddr> {
        self.tls.as_ref().map(TlsListener::addr)
    }

    /// Where a client on this machine reaches it.
    #[must_use]
    pub fn base_url(&self) -> String {
        base_url(self.addr.ip(), self.addr.port())
    }

    /// The token it asks for.
    #[must_use]
    pub fn token(&self) -> &ApiToken {
        self.app.token()
    }

    /// Looks at the server while it runs.
    #[must_use]
    pub fn observer(&self) -> Observer {
        self.app.observer()
    }

    /// Answers requests until `shutdown` completes or the idle time-out passes; then waits five seconds at
    /// most for answers under way, drops the connections that are still busy, finishes the running
    /// operation, flushes and takes the lock file's sign down.
    ///
    /// # Errors
    /// If the last flush fails.
    pub async fn run(self, shutdown: impl Future<Output = ()> + Send + 'static) -> Result<()> {
        let app = self.app;
        let (asked, was_asked) = tokio::sync::oneshot::channel();
        let idle = idle_watch(Arc::clone(&app), self.idle_timeout);
        let stopping = Arc::clone(&app);
        let until = async move {
            tokio::select! {
                () = shutdown => {}
                () = idle => tracing::info!("leaving after the idle time-out"),
            }
            stopping.begin_stop();
            // The receiver is gone only if serving ended before.
            let _ = asked.send(());
        };
        let until = until.boxed().shared();
        let routes = router(Arc::clone(&app));
        let plain = Plain {
            listener: self.listener,
            connections: Arc::clone(&app.core.connections),
        };
        let by_tls = async {
            if let Some(listener) = self.tls {
                let routes = routes.clone().layer(Extension(OverTls));
                serve_over(listener, routes, until.clone()).await;
            }
        };
        let without = serve_over(plain, routes.clone(), until.clone());
        tokio::select! {
            _ = async { tokio::join!(without, by_tls) } => {}
            () = after(was_asked, DRAIN) => {}
        }
        let stopped = tokio::task::spawn_blocking(move || app.stop()).await;
        self.lock.withdraw();
        stopped.unwrap_or(Err(Error::Stopping))
    }
}

/// Completes `grace` after the signal: a connection that does not end is not waited for.
async fn after(signal: tokio::sync::oneshot::Receiver<()>, grace: Duration) {
    if signal.await.is_err() {
        std::future::pending::<()>().await;
    }
    tokio::time::sleep(grace).await;
}

async fn open_app(options: &ServeOptions, token: ApiToken) -> Result<Arc<App>> {
    let training_memory = options
        .training_memory
        .map(|bytes| usize::try_from(bytes).unwrap_or(usize::MAX));
    let (weights, precision) = (options.weights, options.precision);
    let cpu = CpuOptions {
        training_memory,
        weights,
        precision,
        ..CpuOptions::default()
    };
    let device = options.device.find(&cpu)?;
    let (loader, second_loader) = device.loaders(&cpu);
    let held = Limits::default();
    let app_options = AppOptions {
        device,
        loader,
        second_loader,
        weights,
        precision,
        models: options.models.clone(),
        named_models: options.named_models.clone(),
        threads: options.threads,
        client_config: options.client_config.clone(),
        version: options.version.clone(),
        limits: Limits {
            max_disk_bytes: options.max_disk_bytes,
            max_connections: options.max_connections.or_else(max_connections),
            poll_hold: options.poll_hold.unwrap_or(held.poll_hold),
            completions_hold: options.poll_hold.unwrap_or(held.completions_hold),
            ..held
        },
        ..AppOptions::new(options.home.clone(), token)
    };
    let hf_cache = options.hf_cache.clone();
    let opening = tokio::task::spawn_blocking(move || {
        if let Some(limit) = app_options.limits.max_disk_bytes {
            let paths = Paths::new(&app_options.home);
            check_limit(limit, paths.root(), &paths.temp())?;
        }
        let app = App::open(app_options)?;
        if let Some(cache) = hf_cache {
            app.core.models.fill_hub_cache(&cache)?;
        }
        Ok(Arc::new(app))
    });
    opening.await.unwrap_or(Err(Error::Stopping))
}

/// Binds an address; with the port that it got.
fn listen(addr: SocketAddr) -> Result<(TcpListener, SocketAddr)> {
    let bound = || {
        let socket = match addr {
            SocketAddr::V4(_) => TcpSocket::new_v4()?,
            SocketAddr::V6(_) => TcpSocket::new_v6()?,
        };
        // Else the port stays taken for a while after a server. Elsewhere this would share it.
        #[cfg(unix)]
        socket.set_reuseaddr(true)?;
        socket.bind(addr)?;
        let listener = socket.listen(BACKLOG)?;
        let addr = listener.local_addr()?;
        Ok((listener, addr))
    };
    bound().map_err(|source: std::io::Error| {
        if source.kind() == std::io::ErrorKind::AddrInUse {
            Error::PortTaken { addr }
        } else {
            Error::Io {
                action: "listen on",
                path: addr.to_string().into(),
                source,
            }
        }
    })
}

fn lock_info(options: &ServeOptions, addr: SocketAddr, token: &ApiToken) -> LockInfo {
    LockInfo {
        pid: std::process::id(),
        host: addr.ip(),
        port: addr.port(),
        token: token.expose().to_owned(),
        version: options.version.clone(),
        started: jiff::Timestamp::now().to_string(),
        models: options.models.clone(),
        named_models: options.named_models.clone(),
        training_memory: options.training_memory,
        weights: options.weights.map(|weights| weights.name().to_owned()),
        device: Some(options.device.name().to_owned()),
        precision: options.precision.name().to_owned(),
        threads: options.threads,
        max_disk_bytes: options.max_disk_bytes,
        outside: None,
    }
}

/// How a server that was told so is open to other machines, at the address that it got.
fn outside(options: &ServeOptions, addr: SocketAddr) -> Option<Outside> {
    // Whoever starts it again may do so elsewhere.
    let full = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let tls = options.tls.as_ref().map(|files| TlsFiles {
        cert: full(&files.cert),
        key: full(&files.key),
    });
    (tls.is_some() || !addr.ip().is_loopback()).then_some(Outside { addr, tls })
}

/// Completes once nobody has been there for `timeout`; never without one.
async fn idle_watch(app: Arc<App>, timeout: Option<Duration>) {
    let Some(timeout) = timeout else {
        return std::future::pending().await;
    };
    while let Some(left) = timeout.checked_sub(app.idle_for()).filter(|d| !d.is_zero()) {
        tokio::time::sleep(left.min(IDLE_CHECK)).await;
    }
}
