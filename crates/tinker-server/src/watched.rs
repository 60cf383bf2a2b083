//! Signs of life of a connection: bytes that move, and answers that are made.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Instant;

/// What a connection was seen to do.
#[derive(Debug)]
pub(crate) struct Activity {
    began: Instant,
    /// Microseconds from then to the last sign of life.
    last_micros: AtomicU64,
    /// Whether bytes wait until the client has taken others.
    is_blocked: AtomicBool,
    /// Answers whose next piece is still to be made.
    n_awaited: AtomicUsize,
}

impl Activity {
    pub(crate) fn new() -> Self {
        Self {
            began: Instant::now(),
            last_micros: AtomicU64::new(0),
            is_blocked: AtomicBool::new(false),
            n_awaited: AtomicUsize::new(0),
        }
    }

    /// Something happened.
    pub(crate) fn touch(&self) {
        let micros = self.began.elapsed().as_micros();
        let micros = u64::try_from(micros).unwrap_or(u64::MAX);
        self.last_micros.store(micros, Ordering::Relaxed);
    }

    /// When something happened last.
    pub(crate) fn last(&self) -> Instant {
        self.began + Duration::from_micros(self.last_micros.load(Ordering::Relaxed))
    }

    pub(crate) fn is_blocked(&self) -> bool {
        self.is_blocked.load(Ordering::Relaxed)
    }

    pub(crate) fn is_awaited(&self) -> bool {
        self.n_awaited.load(Ordering::Relaxed) > 0
    }

    /// The next piece of an answer is waited for.
    pub(crate) fn begin_await(&self) {
        self.n_awaited.fetch_add(1, Ordering::Relaxed);
    }

    /// It is there, or not needed any more.
    pub(crate) fn end_await(&self) {
        self.n_awaited.fetch_sub(1, Ordering::Relaxed);
        self.touch();
    }

    fn wrote(&self, written: &Poll<io::Result<usize>>) {
        self.is_blocked
            .store(written.is_pending(), Ordering::Relaxed);
        if matches!(written, Poll::Ready(Ok(1..))) {
            self.touch();
        }
    }
}

/// Notes when bytes move. Belongs below TLS, which keeps some to itself.
#[derive(Debug)]
pub(crate) struct Watched<T> {
    io: T,
    activity: Arc<Activity>,
}

impl<T> Watched<T> {
    pub(crate) const fn new(io: T, activity: Arc<Activity>) -> Self {
        Self { io, activity }
    }

    #[cfg(test)]
    pub(crate) const fn get_ref(&self) -> &T {
        &self.io
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Watched<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let n_before = buf.filled().len();
        let read = Pin::new(&mut self.io).poll_read(cx, buf);
        if buf.filled().len() > n_before {
            self.activity.touch();
        }
        read
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Watched<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.io).poll_write(cx, bytes);
        self.activity.wrote(&written);
        written
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.io).poll_write_vectored(cx, slices);
        self.activity.wrote(&written);
        written
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt as _;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    #[tokio::test(start_paused = true)]
    async fn bytes_either_way_are_signs_of_life_and_waiting_is_none() {
        let activity = Arc::new(Activity::new());
        let (mut far, near) = tokio::io::duplex(4);
        let mut near = Watched::new(near, Arc::clone(&activity));
        let began = Instant::now();
        let second = Duration::from_secs(1);

        tokio::time::advance(second).await;
        assert!(near.read_u8().now_or_never().is_none());
        assert_eq!(activity.last(), began);
        far.write_all(b"x").await.unwrap();
        near.read_u8().await.unwrap();
        assert_eq!(activity.last(), began + second);

        tokio::time::advance(second).await;
        near.write_all(b"1234").await.unwrap();
        assert_eq!(activity.last(), began + 2 * second);
        tokio::time::advance(second).await;
        assert!(near.write_all(b"5").now_or_never().is_none());
        assert!(activity.is_blocked());
        assert_eq!(activity.last(), began + 2 * second);
        far.read_u8().await.unwrap();
        let slices = [IoSlice::new(b"5")];
        assert_eq!(near.write_vectored(&slices).await.unwrap(), 1);
        assert!(!activity.is_blocked() && near.is_write_vectored());
        assert_eq!(activity.last(), began + 3 * second);
    }
}
