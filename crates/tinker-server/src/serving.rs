//! Accepts connections while there are places for them, and answers their requests over HTTP/1.1 and 2.

use std::convert::Infallible;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use axum::Router;
use axum::body::Body;
use axum::http::header::CONNECTION;
use axum::http::{HeaderValue, Request, Response, Version};
use bytes::Bytes;
use hyper::body::{Body as HttpBody, Frame, Incoming, SizeHint};
use hyper::service::{Service as _, service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use crate::connections::{Connection, Connections, Place, Protocol, UnderWay};
use crate::watched::Watched;

/// Most bytes of an answer that are handed on at once. So its request is under way until almost all of it
/// is sent; hyper takes a piece of any size and waits with the next one until there is room.
const PIECE: usize = 64 << 10;

/// Where connections come from.
pub(crate) trait Accept {
    /// What is read from and written to.
    type Io: AsyncRead + AsyncWrite + Unpin + Send + 'static;

    /// The next connection, accepted once there is a place for it.
    fn accept(&mut self) -> impl Future<Output = (Self::Io, Connection)> + Send;
}

/// Connections as they are.
#[derive(Debug)]
pub(crate) struct Plain {
    pub(crate) listener: TcpListener,
    pub(crate) connections: Arc<Connections>,
}

impl Accept for Plain {
    type Io = Watched<TcpStream>;

    async fn accept(&mut self) -> (Self::Io, Connection) {
        let place = self.connections.place().await;
        // This waits out errors.
        let (stream, _) = axum::serve::Listener::accept(&mut self.listener).await;
        take_up(place, stream)
    }
}

/// Has a connection that was accepted take its place.
pub(crate) fn take_up(place: Place, stream: TcpStream) -> (Watched<TcpStream>, Connection) {
    // A piece of an answer is not to wait until the client has confirmed the one before it.
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "cannot send small pieces at once");
    }
    let connection = place.take_up();
    (connection.watch(stream), connection)
}

/// Answers until `until` completes, and then what has begun.
pub(crate) async fn serve<A: Accept>(
    mut door: A,
    routes: Router,
    until: impl Future<Output = ()> + Clone + Send + 'static,
) {
    let mut running = JoinSet::new();
    let mut stopped = pin!(until.clone());
    loop {
        let (io, connection) = tokio::select! {
            accepted = door.accept() => accepted,
            () = &mut stopped => break,
        };
        running.spawn(answer(io, connection, routes.clone(), until.clone()));
        while running.try_join_next().is_some() {}
    }
    drop(door);
    while running.join_next().await.is_some() {}
}

/// Answers the requests of a connection until it ends. It is closed between two of them when its place is
/// needed or `until` completes.
async fn answer(
    io: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    connection: Connection,
    routes: Router,
    until: impl Future<Output = ()>,
) {
    let routes = TowerToHyperService::new(routes);
    let respond = service_fn(|request: Request<Incoming>| {
        let protocol = match request.version() {
            Version::HTTP_2 => Protocol::Http2,
            _ => Protocol::Http1,
        };
        let mut under_way = connection.begin_request(protocol);
        let response = routes.call(request);
        async move {
            let mut response: Response<Body> = response.await?;
            // Over HTTP/2 others may be under way, and some clients take nothing after a GOAWAY, not even
            // the answer that it follows.
            if protocol == Protocol::Http1 && under_way.is_crowded() {
                let close = HeaderValue::from_static("close");
                response.headers_mut().insert(CONNECTION, close);
            }
            under_way.begin_answer();
            Ok::<_, Infallible>(response.map(|body| Answer {
                body,
                rest: Bytes::new(),
                under_way,
            }))
        }
    });
    let builder = Builder::new(TokioExecutor::new());
    let mut serving = pin!(builder.serve_connection(TokioIo::new(io), respond));
    let ended = tokio::select! {
        ended = serving.as_mut() => Some(ended),
        () = connection.asked_to_leave() => None,
        () = until => None,
    };
    let ended = match ended {
        Some(ended) => ended,
        None => {
            serving.as_mut().graceful_shutdown();
            tokio::select! {
                ended = serving => ended,
                () = connection.overstayed() => Ok(()),
            }
        }
    };
    if let Err(error) = ended {
        tracing::debug!(error, "a connection broke");
    }
}

/// An answer's body. The request is under way until it has been handed on.
#[derive(Debug)]
struct Answer {
    body: Body,
    /// What is left of the frame that is being handed on.
    rest: Bytes,
    under_way: UnderWay,
}

impl HttpBody for Answer {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let answer = &mut *self;
        if answer.rest.is_empty() {
            let polled = Pin::new(&mut answer.body).poll_frame(cx);
            match polled.is_pending() {
                true => answer.under_way.await_piece(),
                false => answer.under_way.have_piece(),
            }
            match ready!(polled) {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => answer.rest = data,
                    Err(other) => return Poll::Ready(Some(Ok(other))),
                },
                end => return Poll::Ready(end),
            }
        }
        let piece = answer.rest.split_to(answer.rest.len().min(PIECE));
        Poll::Ready(Some(Ok(Frame::data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let (body, n_left) = (self.body.size_hint(), self.rest.len() as u64);
        let mut hint = SizeHint::new();
        hint.set_lower(body.lower().saturating_add(n_left));
        if let Some(upper) = body.upper().and_then(|upper| upper.checked_add(n_left)) {
            hint.set_upper(upper);
        }
        hint
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::connections::Policy;
    use axum::body::to_bytes;
    use axum::routing::get;
    use futures_util::{FutureExt as _, StreamExt as _, stream};
    use hyper::client::conn::http2::{self, SendRequest};
    use std::net::SocketAddr;
    use std::time::Duration;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};
    use tokio::sync::{Notify, mpsc, oneshot};
    use tokio::task::JoinHandle;
    use tokio::time::Instant;

    const PROMPT: Policy = Policy {
        grace: Duration::from_millis(1),
        short_hold: Duration::from_millis(1),
        linger: Duration::from_millis(1),
        linger_http2: Duration::from_millis(1),
        stall: Duration::from_secs(3600),
    };

    /// Connections without a request stay.
    const PATIENT: Policy = Policy {
        grace: Duration::from_secs(3600),
        linger: Duration::from_secs(3600),
        ..PROMPT
    };

    struct Running {
        addr: SocketAddr,
        connections: Arc<Connections>,
        go_on: Arc<Notify>,
        stop: oneshot::Sender<()>,
        serving: JoinHandle<()>,
    }

    /// Of the answer that is large.
    const BIG: usize = 8 << 20;

    /// Answers: at once, when others wait for the connection, stopping in the middle, after an hour, and a
    /// large one.
    fn routes(connections: &Arc<Connections>, go_on: &Arc<Notify>) -> Router {
        let held = Arc::clone(connections);
        let held = async move || {
            held.pressing().await;
            "held"
        };
        let last = Arc::clone(go_on);
        let long = async move || {
            let last = async move {
                last.notified().await;
                "last"
            };
            let parts = stream::once(async { "first" }).chain(stream::once(last));
            Body::from_stream(parts.map(Ok::<_, Infallible>))
        };
        let slow = async || {
            tokio::time::sleep(Duration::from_secs(3600)).await;
            "slow"
        };
        Router::new()
            .route("/quick", get(async || "quick"))
            .route("/held", get(held))
            .route("/long", get(long))
            .route("/slow", get(slow))
            .route("/big", get(async || Bytes::from(vec![b'x'; BIG])))
    }

    async fn running(most: usize, policy: Policy) -> Running {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let connections = Connections::with_policy(Some(most), policy);
        let go_on = Arc::<Notify>::default();
        let routes = routes(&connections, &go_on);
        let (stop, stopped) = oneshot::channel::<()>();
        let until = async move { drop(stopped.await) }.boxed().shared();
        let plain = Plain {
            listener,
            connections: Arc::clone(&connections),
        };
        Running {
            addr,
            connections,
            go_on,
            stop,
            serving: tokio::spawn(serve(plain, routes, until)),
        }
    }

    impl Running {
        async fn connect(&self) -> TcpStream {
            TcpStream::connect(self.addr).await.unwrap()
        }

        async fn stop(self) {
            self.stop.send(()).unwrap();
            self.serving.await.unwrap();
            assert_eq!(self.connections.count().0, 0);
        }
    }

    async fn send(stream: &mut (impl AsyncWrite + Unpin), path: &str) {
        let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
    }

    /// Reads up to the end of an answer's body.
    async fn received(stream: &mut (impl AsyncRead + Unpin), body: &str) -> String {
        let mut answer = Vec::new();
        while !answer.ends_with(body.as_bytes()) {
            let n = stream.read_buf(&mut answer).await.unwrap();
            assert_ne!(n, 0, "{}", String::from_utf8_lossy(&answer));
        }
        String::from_utf8(answer).unwrap()
    }

    /// Asks over a connection of its own, again if that had to give way before it was heard.
    async fn asked(server: &Running, path: &str) -> String {
        for _ in 0..100 {
            let mut stream = server.connect().await;
            let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
            let mut answer = String::new();
            let ended = stream.write_all(request.as_bytes()).await.is_ok()
                && stream.read_to_string(&mut answer).await.is_ok();
            if ended && !answer.is_empty() {
                return answer;
            }
        }
        panic!("not once is there an answer");
    }

    #[tokio::test]
    async fn the_connection_that_is_idle_for_longest_gives_way_to_those_who_wait() {
        let server = running(4, PROMPT).await;
        let mut idle = Vec::new();
        for _ in 0..2 {
            let mut stream = server.connect().await;
            send(&mut stream, "/quick").await;
            let answer = received(&mut stream, "quick").await;
            assert!(!answer.contains("connection: close"), "{answer}");
            idle.push(stream);
        }
        // They take the last places and say nothing.
        let _silent = (server.connect().await, server.connect().await);

        for _ in 0..9 {
            assert!(asked(&server, "/quick").await.ends_with("quick"));
        }

        assert_eq!(idle[0].read(&mut [0]).await.unwrap(), 0, "it is closed");
        server.stop().await;
    }

    #[tokio::test]
    async fn in_a_crowd_a_poll_is_answered_soon_and_its_connection_ends_with_it() {
        let server = running(4, PATIENT).await;
        let mut polls = Vec::new();
        for _ in 0..16 {
            let mut stream = server.connect().await;
            send(&mut stream, "/held").await;
            polls.push(stream);
        }

        // Behind the last of them others wait.
        let mut n_closed = 0;
        for poll in &mut polls[..12] {
            let answer = received(poll, "held").await;
            n_closed += usize::from(answer.contains("connection: close\r\n"));
            assert!(server.connections.count().0 <= 4);
        }

        assert!(
            n_closed >= 9,
            "three are no crowd, and only {n_closed} ended"
        );
        drop(polls);
        server.stop().await;
    }

    #[tokio::test]
    async fn small_pieces_are_sent_at_once() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let connections = Connections::new(None);
        let mut plain = Plain {
            listener,
            connections,
        };

        let (client, (io, _)) = tokio::join!(TcpStream::connect(addr), plain.accept());

        assert!(client.is_ok() && io.get_ref().nodelay().unwrap());
    }

    #[tokio::test]
    async fn an_answer_under_way_does_not_give_way() {
        let server = running(2, PROMPT).await;
        let mut long = server.connect().await;
        send(&mut long, "/long").await;
        received(&mut long, "first\r\n").await;

        let mut silent = Vec::new();
        for _ in 0..9 {
            silent.push(server.connect().await);
            assert!(asked(&server, "/quick").await.ends_with("quick"));
        }

        server.go_on.notify_one();
        received(&mut long, "last\r\n0\r\n\r\n").await;
        drop(long);
        server.stop().await;
    }

    /// Connections within this process, so that the clock can be the test's own.
    struct Pipes {
        ends: mpsc::UnboundedReceiver<DuplexStream>,
        connections: Arc<Connections>,
    }

    impl Accept for Pipes {
        type Io = Watched<DuplexStream>;

        async fn accept(&mut self) -> (Self::Io, Connection) {
            let place = self.connections.place().await;
            let Some(end) = self.ends.recv().await else {
                return std::future::pending().await;
            };
            let connection = place.take_up();
            (connection.watch(end), connection)
        }
    }

    struct Piped {
        ends: mpsc::UnboundedSender<DuplexStream>,
        go_on: Arc<Notify>,
    }

    impl Piped {
        fn start(most: usize) -> Self {
            let connections = Connections::new(Some(most));
            let go_on = Arc::<Notify>::default();
            let routes = routes(&connections, &go_on);
            let (sender, ends) = mpsc::unbounded_channel();
            let door = Pipes { ends, connections };
            tokio::spawn(serve(door, routes, std::future::pending()));
            Self {
                ends: sender,
                go_on,
            }
        }

        fn connect(&self) -> DuplexStream {
            let (near, far) = tokio::io::duplex(4096);
            self.ends.send(far).unwrap();
            near
        }

        /// Two clients: one whose request takes an hour, and one that waits with another.
        async fn is_full(&self) -> (DuplexStream, DuplexStream) {
            let (mut slow, mut waits) = (self.connect(), self.connect());
            send(&mut slow, "/slow").await;
            send(&mut waits, "/quick").await;
            (slow, waits)
        }

        async fn is_let_in(&self) -> Duration {
            let (mut client, began) = (self.connect(), Instant::now());
            send(&mut client, "/quick").await;
            received(&mut client, "quick").await;
            began.elapsed()
        }

        /// A client over HTTP/2 whose answers have so large a window.
        async fn connect_http2(&self, window: u32) -> (SendRequest<Body>, Driver) {
            let io = TokioIo::new(self.connect());
            let mut builder = http2::Builder::new(TokioExecutor::new());
            builder.initial_stream_window_size(window);
            builder.handshake(io).await.unwrap()
        }
    }

    type Driver = http2::Connection<TokioIo<DuplexStream>, Body, TokioExecutor>;

    const WINDOW: u32 = 1 << 16;

    fn get_http2(path: &str) -> Request<Body> {
        let uri = format!("http://x{path}");
        Request::get(uri).body(Body::empty()).unwrap()
    }

    async fn text(answer: Response<Incoming>) -> Bytes {
        assert!(!answer.headers().contains_key(CONNECTION));
        to_bytes(Body::new(answer.into_body()), usize::MAX)
            .await
            .unwrap()
    }

    /// Two places: one for whose answer is looked at, and one that others take turns at.
    const TWO: usize = 2;

    #[tokio::test(start_paused = true)]
    async fn a_large_answer_that_is_taken_slowly_is_sent_to_its_end() {
        let server = Piped::start(TWO);
        let mut client = server.connect();
        send(&mut client, "/big").await;
        let (_other, mut waits) = server.is_full().await;
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(client.read_u8().await.unwrap());
        }
        let (mut n_left, mut buffer) = (BIG, vec![0; 256 << 10]);

        while n_left > 0 {
            tokio::time::sleep(Duration::from_secs(30)).await;
            let n = n_left.min(buffer.len());
            client.read_exact(&mut buffer[..n]).await.unwrap();
            n_left -= n;
        }

        // After that it gives way like any other.
        received(&mut waits, "quick").await;
        assert_eq!(client.read(&mut buffer).await.unwrap(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn so_is_one_over_http_2() {
        let server = Piped::start(TWO);
        let (mut requests, driver) = server.connect_http2(WINDOW).await;
        let driver = tokio::spawn(driver);
        let answer = requests.send_request(get_http2("/big")).await.unwrap();
        let (_other, mut waits) = server.is_full().await;
        let (mut n_bytes, mut body) = (0, Body::new(answer.into_body()).into_data_stream());

        while let Some(piece) = body.next().await {
            n_bytes += piece.unwrap().len();
            if n_bytes % (1 << 20) < 1 << 14 {
                tokio::time::sleep(Duration::from_secs(30)).await;
            }
        }

        assert_eq!(n_bytes, BIG);
        received(&mut waits, "quick").await;
        drop((requests, body));
        driver.await.unwrap().unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_that_nobody_takes_gives_way() {
        let policy = Policy::default();
        let server = Piped::start(TWO);
        let mut stalled = server.connect();
        send(&mut stalled, "/big").await;
        let mut waits = server.connect();
        send(&mut waits, "/slow").await;

        let waited = server.is_let_in().await;

        assert!(waited >= policy.stall, "{waited:?}");
        assert!(
            waited <= policy.stall + 2 * (policy.linger + policy.grace),
            "{waited:?}"
        );
        received(&mut waits, "slow").await;
    }

    #[tokio::test(start_paused = true)]
    async fn so_does_one_over_http_2_that_there_is_no_window_for() {
        let policy = Policy::default();
        let server = Piped::start(TWO);
        let (mut requests, driver) = server.connect_http2(0).await;
        tokio::spawn(driver);
        let answer = requests.send_request(get_http2("/big")).await.unwrap();
        let mut waits = server.connect();
        send(&mut waits, "/slow").await;

        let waited = server.is_let_in().await;

        assert!(waited >= policy.stall, "{waited:?}");
        // That it is asked is a sign of life, too.
        assert!(waited <= 2 * policy.stall + 4 * policy.grace, "{waited:?}");
        received(&mut waits, "slow").await;
        let cut_off = to_bytes(Body::new(answer.into_body()), usize::MAX);
        assert!(cut_off.await.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_still_computed_is_no_answer_that_nobody_takes() {
        let server = Piped::start(TWO);
        let mut long = server.connect();
        send(&mut long, "/long").await;
        received(&mut long, "first\r\n").await;
        let mut slow = server.connect();
        send(&mut slow, "/slow").await;

        let (waited, ()) = tokio::join!(server.is_let_in(), async {
            received(&mut slow, "slow").await;
            server.go_on.notify_one();
            received(&mut long, "last\r\n0\r\n\r\n").await;
        });

        assert!(waited >= Duration::from_secs(3600), "{waited:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn http_2_is_not_ended_by_an_answer() {
        let server = Piped::start(TWO);
        let (mut requests, driver) = server.connect_http2(WINDOW).await;
        let driver = tokio::spawn(driver);
        let mut other = server.connect();
        send(&mut other, "/slow").await;
        let _waits = server.connect();

        for _ in 0..9 {
            let held = requests.send_request(get_http2("/held"));
            let quick = requests.send_request(get_http2("/quick"));
            let (held, quick) = tokio::join!(held, quick);
            assert_eq!(text(held.unwrap()).await, "held");
            assert_eq!(text(quick.unwrap()).await, "quick");
            assert!(!driver.is_finished());
        }

        // It was idle then, and somebody waits.
        driver.await.unwrap().unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn an_idle_client_over_http_2_that_hears_nothing_is_soon_cut_off() {
        let policy = Policy::default();
        let server = Piped::start(TWO);
        let (mut requests, mut driver) = server.connect_http2(WINDOW).await;
        let answer = tokio::select! {
            answer = requests.send_request(get_http2("/quick")) => answer.unwrap(),
            _ = &mut driver => panic!("it is open"),
        };
        let mut body = pin!(text(answer));
        let body = tokio::select! {
            body = body.as_mut() => body,
            _ = &mut driver => panic!("it is open"),
        };
        assert_eq!(body, "quick");
        let mut waits = server.connect();
        send(&mut waits, "/slow").await;

        let waited = server.is_let_in().await;

        assert!(
            waited <= policy.grace + 2 * policy.linger_http2,
            "{waited:?}"
        );
        drop(driver);
    }
}
