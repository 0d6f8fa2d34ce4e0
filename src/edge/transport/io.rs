//! What connections are read from and written to.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Sleep, sleep, sleep_until};

use crate::edge::layers::peer::Peer;

/// What is read of a stranger before others have their turn. What it begins meanwhile is bounded before more is read.
const STRANGERS_SHARE: usize = 4 << 10;
/// The same of one that has as many calls open as it may: a few calls, which are refused before more are read.
const CROWDED_SHARE: usize = 512;
/// How long an HTTP/1.1 connection that the server ends is read on for.
const LINGER: Duration = Duration::from_secs(30);

/// A connection that reads nothing while the other end does not take what there is to be written, since frames are answered
/// with frames, which would all be kept; and nothing of a stranger that is to wait.
pub(super) struct Returning<I> {
    io: I,
    peer: Peer,
    /// How many calls a stranger may have open.
    crowd: usize,
    /// Runs while a stranger waits.
    pause: Option<Pin<Box<Sleep>>>,
    /// Whether something waits to be written.
    stuck: bool,
    /// Whether others come first now.
    had_turn: bool,
}

impl<I> Returning<I> {
    pub(super) fn new(io: I, peer: Peer, crowd: usize) -> Self {
        Self { io, peer, crowd, pause: None, stuck: false, had_turn: false }
    }

    /// Notes whether a write got through. Whoever wanted to read meanwhile tries again.
    fn wrote<T>(&mut self, context: &Context<'_>, written: Poll<T>) -> Poll<T> {
        if std::mem::replace(&mut self.stuck, written.is_pending()) && !self.stuck {
            context.waker().wake_by_ref();
        }
        written
    }
}

impl<I: AsyncRead + Unpin> AsyncRead for Returning<I> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        // The writer has left word with the socket, for the task of both.
        if self.stuck {
            return Poll::Pending;
        }
        if self.peer.is_known() {
            return Pin::new(&mut self.io).poll_read(context, buffer);
        }
        if std::mem::take(&mut self.had_turn) {
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        if let Some(until) = self.peer.paused() {
            let pause = self.pause.get_or_insert_with(|| Box::pin(sleep_until(until)));
            if pause.deadline() != until {
                pause.as_mut().reset(until);
            }
            ready!(pause.as_mut().poll(context));
        }
        let mut share = [0; STRANGERS_SHARE];
        let crowded = self.peer.calls().receiver_count() >= self.crowd;
        let most = if crowded { CROWDED_SHARE } else { STRANGERS_SHARE }.min(buffer.remaining());
        let mut share = ReadBuf::new(share.split_at_mut(most).0);
        ready!(Pin::new(&mut self.io).poll_read(context, &mut share))?;
        self.had_turn = !share.filled().is_empty();
        buffer.put_slice(share.filled());
        Poll::Ready(Ok(()))
    }
}

impl<I: AsyncWrite + Unpin> AsyncWrite for Returning<I> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.io).poll_write(context, bytes);
        self.wrote(context, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.io).poll_write_vectored(context, pieces);
        self.wrote(context, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(context)
    }
}

/// A connection that, once the server has said its last word, is read on until the other end closes it too. Who is
/// refused before all is sent would find its connection reset, and not see why: a socket that is closed with unread bytes
/// takes the answer with it.
pub(super) struct Lingering<I> {
    io: I,
    /// Runs once nothing more is written.
    limit: Option<Pin<Box<Sleep>>>,
}

impl<I> Lingering<I> {
    pub(super) fn new(io: I) -> Self {
        Self { io, limit: None }
    }
}

impl<I: AsyncRead + Unpin> AsyncRead for Lingering<I> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(context, buffer)
    }
}

impl<I: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Lingering<I> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Self { io, limit } = self.get_mut();
        if limit.is_none() {
            ready!(Pin::new(&mut *io).poll_shutdown(context))?;
        }
        let limit = limit.get_or_insert_with(|| Box::pin(sleep(LINGER)));
        let mut ignored = [0; 8 << 10];
        loop {
            let mut buffer = ReadBuf::new(&mut ignored);
            match Pin::new(&mut *io).poll_read(context, &mut buffer) {
                Poll::Ready(Ok(())) if !buffer.filled().is_empty() => {}
                Poll::Ready(_) => return Poll::Ready(Ok(())),
                Poll::Pending => return limit.as_mut().poll(context).map(Ok),
            }
        }
    }
}
