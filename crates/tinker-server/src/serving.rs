//! Accepts connections while there are places for them, and answers their requests over HTTP/1.1 and 2.

use std::convert::Infallible;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};

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

use crate::connections::{Connection, Connections, UnderWay};

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
    type Io = TcpStream;

    async fn accept(&mut self) -> (TcpStream, Connection) {
        let place = self.connections.place().await;
        // This waits out errors.
        let (stream, _) = axum::serve::Listener::accept(&mut self.listener).await;
        (stream, place.take_up())
    }
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
        let under_way = connection.begin_request();
        let version = request.version();
        let response = routes.call(request);
        async move {
            let mut response: Response<Body> = response.await?;
            match under_way.is_last() {
                // It has no such header, and others may be under way.
                true if version > Version::HTTP_11 => under_way.end_connection(),
                true => {
                    let close = HeaderValue::from_static("close");
                    response.headers_mut().insert(CONNECTION, close);
                }
                false => {}
            }
            Ok::<_, Infallible>(response.map(|body| Answer {
                body,
                _under_way: under_way,
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
    _under_way: UnderWay,
}

impl HttpBody for Answer {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::connections::Policy;
    use axum::body::to_bytes;
    use axum::routing::get;
    use futures_util::{FutureExt as _, StreamExt as _, stream};
    use std::net::SocketAddr;
    use std::time::Duration;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::sync::{Notify, oneshot};
    use tokio::task::JoinHandle;

    const PROMPT: Policy = Policy {
        grace: Duration::from_millis(1),
        short_hold: Duration::from_millis(1),
        linger: Duration::from_millis(1),
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

    /// Serves three routes: one answers at once, one when others wait for its connection, and one stops
    /// in the middle of its answer.
    async fn running(most: usize, policy: Policy) -> Running {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let connections = Connections::with_policy(Some(most), policy);
        let held = Arc::clone(&connections);
        let held = async move || {
            held.pressing().await;
            "held"
        };
        let go_on = Arc::<Notify>::default();
        let last = Arc::clone(&go_on);
        let long = async move || {
            let last = async move {
                last.notified().await;
                "last"
            };
            let parts = stream::once(async { "first" }).chain(stream::once(last));
            Body::from_stream(parts.map(Ok::<_, Infallible>))
        };
        let routes = Router::new()
            .route("/quick", get(async || "quick"))
            .route("/held", get(held))
            .route("/long", get(long));
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

    async fn send(stream: &mut TcpStream, path: &str) {
        let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
    }

    /// Reads up to the end of an answer's body.
    async fn received(stream: &mut TcpStream, body: &str) -> String {
        let mut answer = Vec::new();
        while !answer.ends_with(body.as_bytes()) {
            let n = stream.read_buf(&mut answer).await.unwrap();
            assert_ne!(n, 0, "{}", String::from_utf8_lossy(&answer));
        }
        String::from_utf8(answer).unwrap()
    }

    /// Asks over a connection of its own, again if that had to give way before it was heard.
    async fn asked(server: &Running, path: &str) -> String {
        loop {
            let mut stream = server.connect().await;
            let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
            let mut answer = String::new();
            let ended = stream.write_all(request.as_bytes()).await.is_ok()
                && stream.read_to_string(&mut answer).await.is_ok();
            if ended && !answer.is_empty() {
                return answer;
            }
        }
    }

    #[tokio::test]
    async fn the_connection_that_is_idle_for_longest_gives_way_to_those_who_wait() {
        let server = running(4, PROMPT).await;
        let mut idle = Vec::new();
        for _ in 0..3 {
            let mut stream = server.connect().await;
            send(&mut stream, "/quick").await;
            let answer = received(&mut stream, "quick").await;
            assert!(!answer.contains("connection: close"), "{answer}");
            idle.push(stream);
        }
        // Takes the last place and says nothing.
        let _silent = server.connect().await;

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
    async fn in_a_crowd_http_2_is_told_to_go_and_its_requests_are_answered() {
        let server = running(2, PATIENT).await;
        let _other = server.connect().await;
        let io = TokioIo::new(server.connect().await);
        let handshake = hyper::client::conn::http2::handshake(TokioExecutor::new(), io);
        let (mut requests, connection) = handshake.await.unwrap();
        let connection = tokio::spawn(connection);
        let request = |path: &str| {
            let uri = format!("http://x{path}");
            Request::get(uri).body(Body::empty()).unwrap()
        };

        let held = requests.send_request(request("/held"));
        let quick = requests.send_request(request("/quick"));
        let (held, quick) = tokio::join!(held, quick);

        for (answer, text) in [(held, "held"), (quick, "quick")] {
            let answer = answer.unwrap();
            assert!(!answer.headers().contains_key(CONNECTION));
            let body = to_bytes(Body::new(answer.into_body()), 99).await.unwrap();
            assert_eq!(body, text);
        }
        // The server has ended it; the client still could send.
        connection.await.unwrap().unwrap();
        server.stop().await;
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
}
