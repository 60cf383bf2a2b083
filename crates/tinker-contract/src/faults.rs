//! A wire that fails: a TCP server before another one that passes requests on and misbehaves where
//! told to, in ways that an HTTP double cannot: cut and stalled answers, resets, repeated delivery.

mod message;

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

use message::Message;

/// What happens to one request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// Nothing.
    None,
    /// The connection is reset; the request does not reach the server.
    ResetBefore,
    /// The connection is closed in good order; the request does not reach the server.
    CloseBefore,
    /// The request is not delivered and stays without an answer.
    StallBefore,
    /// The server does it; the connection is reset before its answer.
    ResetAfter,
    /// The server does it and its answer never comes.
    StallAfter,
    /// The answer ends after this many bytes of its head.
    CutHead(usize),
    /// The answer ends after this many bytes of its body, short of the length it announced.
    CutBody(usize),
    /// The connection is reset after this many bytes of the body.
    ResetBody(usize),
    /// Silence after this many bytes of the body.
    StallBody(usize),
    /// The request is delivered twice; the second answer is passed on.
    DeliverTwice,
    /// The request is delivered twice, and the connection is reset before any answer.
    DeliverTwiceAndReset,
    /// The answer comes a byte at a time.
    Trickle,
    /// The answer comes in chunks of this many bytes.
    Chunked(usize),
    /// The answer comes in chunks and without the last one.
    CutChunked,
    /// The answer has no length and ends with the connection, as of HTTP/1.0.
    WithoutLength,
    /// As [`WithoutLength`](Self::WithoutLength), and only this much of the body comes.
    CutWithoutLength(usize),
    /// The connection is closed after a good answer, without saying so.
    CloseAfter,
    /// The request is not delivered; these bytes are the answer, then the connection is closed.
    Raw(Vec<u8>),
    /// The server does it; these bytes come instead of its answer, then the connection is closed.
    RawAfter(Vec<u8>),
    /// The request is held back for this long, so that later ones overtake it.
    Hold(Duration),
}

/// What was seen on the wire.
#[derive(Debug, Clone, Copy)]
pub enum Seen<'a> {
    /// A request that arrived here, by path and body.
    Arrived(&'a str, &'a [u8]),
    /// A request whose whole answer, the server's own, was passed on: path, body of the request,
    /// body of the answer.
    Answered(&'a str, &'a [u8], &'a [u8]),
}

type Decide = Box<dyn FnMut(&str) -> Fault + Send>;
type Observe = Box<dyn FnMut(Seen<'_>) + Send>;

/// A server before another one. Ends when dropped.
pub struct FaultServer {
    address: SocketAddr,
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

struct Shared {
    upstream: String,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    scripts: HashMap<String, VecDeque<Fault>>,
    decide: Option<Decide>,
    observe: Option<Observe>,
    arrived: Vec<String>,
    delivered: Vec<String>,
    n_connections: usize,
}

impl FaultServer {
    /// Listens on a free port and passes everything on to `upstream`, such as
    /// `http://127.0.0.1:8000`.
    ///
    /// # Panics
    /// If `upstream` is not `http://host:port`, or no port is free.
    pub async fn before(upstream: &str) -> Self {
        let upstream = upstream.strip_prefix("http://").expect("http://host:port");
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("its address");
        let shared = Arc::new(Shared {
            upstream: upstream.trim_end_matches('/').to_owned(),
            state: Mutex::default(),
        });
        let task = tokio::spawn(accept(listener, Arc::clone(&shared)));
        Self {
            address,
            shared,
            task,
        }
    }

    /// Where it listens, without a trailing slash.
    #[must_use]
    pub fn base_url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Queues faults for a path, one for each of its next requests.
    pub fn script(&self, path: &str, faults: impl IntoIterator<Item = Fault>) {
        let mut state = self.shared.lock();
        state
            .scripts
            .entry(path.to_owned())
            .or_default()
            .extend(faults);
    }

    /// Decides for every request that no script is for, by its path.
    pub fn decide(&self, decide: impl FnMut(&str) -> Fault + Send + 'static) {
        self.shared.lock().decide = Some(Box::new(decide));
    }

    /// Tells of every request that arrives and every answer that is passed on.
    pub fn observe(&self, observe: impl FnMut(Seen<'_>) + Send + 'static) {
        self.shared.lock().observe = Some(Box::new(observe));
    }

    /// How often a path was asked for here.
    #[must_use]
    pub fn n_arrived(&self, path: &str) -> usize {
        count(&self.shared.lock().arrived, path)
    }

    /// How often a path was asked for at the server behind.
    #[must_use]
    pub fn n_delivered(&self, path: &str) -> usize {
        count(&self.shared.lock().delivered, path)
    }

    /// How many connections were made.
    #[must_use]
    pub fn n_connections(&self) -> usize {
        self.shared.lock().n_connections
    }
}

fn count(paths: &[String], path: &str) -> usize {
    paths.iter().filter(|other| *other == path).count()
}

impl Drop for FaultServer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl fmt::Debug for FaultServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "FaultServer({} -> {})",
            self.address, self.shared.upstream
        )
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes note of a request and says what happens to it.
    fn fault_for(&self, path: &str) -> Fault {
        let mut state = self.lock();
        state.arrived.push(path.to_owned());
        if let Some(fault) = state.scripts.get_mut(path).and_then(VecDeque::pop_front) {
            return fault;
        }
        match &mut state.decide {
            Some(decide) => decide(path),
            None => Fault::None,
        }
    }

    fn note(&self, seen: Seen<'_>) {
        if let Some(observe) = &mut self.lock().observe {
            observe(seen);
        }
    }

    /// Asks the server behind; its whole answer.
    async fn deliver(&self, request: &Message) -> io::Result<Message> {
        let mut upstream = TcpStream::connect(&self.upstream).await?;
        let request = request.with_headers(&[("host", &self.upstream), ("connection", "close")]);
        upstream.write_all(&request.to_bytes()).await?;
        let mut bytes = Vec::new();
        upstream.read_to_end(&mut bytes).await?;
        let answer = Message::parse(&bytes).ok_or(io::ErrorKind::InvalidData)?;
        self.lock().delivered.push(request.path().to_owned());
        Ok(answer.with_headers(&[("connection", "keep-alive")]))
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    // Dropped with this task, and the connections with it.
    let mut connections = tokio::task::JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        shared.lock().n_connections += 1;
        let shared = Arc::clone(&shared);
        connections.spawn(async move {
            // What goes wrong here is what clients are to live with.
            serve(stream, &shared).await.ok();
        });
    }
}

/// Answers the requests of one connection until a fault ends it.
async fn serve(mut stream: TcpStream, shared: &Shared) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut buffer = Vec::new();
    while let Some(request) = message::read(&mut stream, &mut buffer).await? {
        shared.note(Seen::Arrived(request.path(), &request.body));
        let fault = shared.fault_for(request.path());
        if !play(&mut stream, shared, &request, fault).await? {
            break;
        }
    }
    Ok(())
}

/// Whether the connection lives on.
async fn play(
    stream: &mut TcpStream,
    shared: &Shared,
    request: &Message,
    fault: Fault,
) -> io::Result<bool> {
    match fault {
        Fault::ResetBefore => return reset(stream),
        Fault::CloseBefore => return Ok(false),
        Fault::StallBefore => return stall(stream).await,
        Fault::Raw(bytes) => {
            stream.write_all(&bytes).await?;
            stream.shutdown().await?;
            return Ok(false);
        }
        Fault::Hold(time) => tokio::time::sleep(time).await,
        _ => {}
    }
    let mut answer = shared.deliver(request).await?;
    if matches!(fault, Fault::DeliverTwice | Fault::DeliverTwiceAndReset) {
        answer = shared.deliver(request).await?;
    }
    let (head, body) = (answer.head_bytes(), &answer.body[..]);
    let start = |n: usize| [&head[..], &body[..n.min(body.len())]].concat();
    match fault {
        Fault::ResetAfter | Fault::DeliverTwiceAndReset => return reset(stream),
        Fault::StallAfter => return stall(stream).await,
        Fault::CutHead(n) => stream.write_all(&head[..n.min(head.len())]).await?,
        Fault::CutBody(n) => stream.write_all(&start(n)).await?,
        Fault::ResetBody(n) => {
            stream.write_all(&start(n)).await?;
            return reset(stream);
        }
        Fault::StallBody(n) => {
            stream.write_all(&start(n)).await?;
            return stall(stream).await;
        }
        Fault::Trickle => {
            for byte in start(body.len()) {
                stream.write_all(&[byte]).await?;
                tokio::task::yield_now().await;
            }
            return Ok(true);
        }
        Fault::Chunked(n) => {
            stream.write_all(&answer.chunked(n, true)).await?;
            return Ok(true);
        }
        Fault::RawAfter(bytes) => stream.write_all(&bytes).await?,
        Fault::CutChunked => stream.write_all(&answer.chunked(8, false)).await?,
        Fault::WithoutLength => stream.write_all(&answer.without_length(usize::MAX)).await?,
        Fault::CutWithoutLength(n) => stream.write_all(&answer.without_length(n)).await?,
        Fault::CloseAfter => stream.write_all(&start(body.len())).await?,
        _ => {
            stream.write_all(&start(body.len())).await?;
            shared.note(Seen::Answered(request.path(), &request.body, body));
            return Ok(true);
        }
    }
    stream.shutdown().await?;
    Ok(false)
}

/// Ends the connection without a goodbye: whatever was not read by the other side is lost.
fn reset(stream: &TcpStream) -> io::Result<bool> {
    stream.set_zero_linger()?;
    Ok(false)
}

/// Says nothing until the other side leaves.
async fn stall(stream: &mut TcpStream) -> io::Result<bool> {
    let mut ignored = [0; 256];
    while stream.read(&mut ignored).await? > 0 {}
    Ok(false)
}
