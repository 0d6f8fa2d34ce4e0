//! What connections are read from and written to.

use std::future::{Future, poll_fn};
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep, sleep_until};

use crate::edge::layers::peer::Peer;
use crate::edge::layers::refusals::MOST_PAUSE;

/// What is read of a stranger in one turn of its task: a few calls, which end or are refused before more is read.
const STRANGERS_SHARE: usize = 1 << 10;
/// What a stranger may send that no call takes, headers and frames, before it shares with all others.
const STRANGERS_OWN: u64 = 64 << 10;
/// What strangers share, in bytes a second. To read headers costs about 40 ns a byte, refused or not.
const STRANGERS_RATE: u32 = 2 << 20;
/// How long an HTTP/1.1 connection that the server ends is read on for.
const LINGER: Duration = Duration::from_secs(30);

/// What all strangers may send together beside what calls take.
#[derive(Debug, Default)]
pub(super) struct StrangersRate(Mutex<Option<Instant>>);

impl StrangersRate {
    /// Takes one share more. Gives when it is due, where that is not now.
    fn take(&self) -> Option<Instant> {
        let now = Instant::now();
        let mut next = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let due = next.map_or(now, |next| next.clamp(now, now + MOST_PAUSE));
        *next = Some(due + Duration::from_secs(1) * STRANGERS_SHARE as u32 / STRANGERS_RATE);
        (due > now).then_some(due)
    }
}

/// A connection that reads nothing while the other end does not take what there is to be written, since frames are answered
/// with frames, which would all be kept; and nothing of a stranger that is to wait.
pub(super) struct Returning<I> {
    io: I,
    /// What was read of it before it came here.
    first: Bytes,
    peer: Peer,
    /// How many calls a stranger may have open.
    crowd: usize,
    rate: Arc<StrangersRate>,
    /// What was read of a stranger, and what of it was its own or taken from the rate.
    read: u64,
    granted: u64,
    /// Runs while a stranger waits.
    pause: Option<Pin<Box<Sleep>>>,
    /// Whether something waits to be written.
    stuck: bool,
}

/// A peer's connection, whose every turn is one of its task: HTTP/2 reads again for each call that it has read.
pub(super) async fn in_turns<C: Future>(peer: &Peer, mut connection: Pin<&mut C>) -> C::Output {
    let poll = |context: &mut Context<'_>| {
        peer.set_turn(true);
        connection.as_mut().poll(context)
    };
    poll_fn(poll).await
}

impl<I> Returning<I> {
    pub(super) fn new(io: I, first: Bytes, peer: Peer, crowd: usize, rate: Arc<StrangersRate>) -> Self {
        let (read, granted) = (0, STRANGERS_OWN);
        Self { io, first, peer, crowd, rate, read, granted, pause: None, stuck: false }
    }

    /// Waits until one more share of a stranger may be read.
    fn turn(&mut self, context: &mut Context<'_>) -> Poll<()> {
        if !self.peer.has_turn() {
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        if self.peer.is_crowded(self.crowd, context) {
            return Poll::Pending;
        }
        if self.read >= self.granted + self.peer.taken() {
            self.granted += STRANGERS_SHARE as u64;
            self.rate.take().inspect(|&due| self.peer.pause(due));
        }
        if let Some(until) = self.peer.paused() {
            let pause = self.pause.get_or_insert_with(|| Box::pin(sleep_until(until)));
            if pause.deadline() != until {
                pause.as_mut().reset(until);
            }
            ready!(pause.as_mut().poll(context));
        }
        Poll::Ready(())
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
        if !self.first.is_empty() {
            let most = self.first.len().min(buffer.remaining());
            buffer.put_slice(&self.first.split_to(most));
            return Poll::Ready(Ok(()));
        }
        // The writer has left word with the socket, for the task of both.
        if self.stuck {
            return Poll::Pending;
        }
        if self.peer.is_known() {
            return Pin::new(&mut self.io).poll_read(context, buffer);
        }
        ready!(self.turn(context));
        let mut share = [0; STRANGERS_SHARE];
        let most = share.len().min(buffer.remaining());
        let mut share = ReadBuf::new(share.split_at_mut(most).0);
        ready!(Pin::new(&mut self.io).poll_read(context, &mut share))?;
        self.read += share.filled().len() as u64;
        self.peer.set_turn(share.filled().is_empty());
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

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use futures::FutureExt;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
    use tokio::time::timeout;

    use super::*;

    fn stranger(rate: &Arc<StrangersRate>) -> (DuplexStream, Returning<DuplexStream>, Peer) {
        let (far, near) = duplex(1 << 20);
        let peer = Peer::stranger([192, 0, 2, 7].into());
        (far, Returning::new(near, Bytes::new(), peer.clone(), 8, Arc::clone(rate)), peer)
    }

    /// Seconds in which so many bytes are read.
    async fn read(io: &mut Returning<DuplexStream>, bytes: usize) -> f64 {
        let start = Instant::now();
        let peer = io.peer.clone();
        in_turns(&peer, pin!(io.read_exact(&mut vec![0; bytes]))).await.unwrap();
        start.elapsed().as_secs_f64()
    }

    #[tokio::test(start_paused = true)]
    async fn strangers_share_a_rate_beyond_what_is_their_own_and_what_calls_take() {
        let (own, mebibyte) = (STRANGERS_OWN as usize, 1 << 20);
        let rate = Arc::default();
        let (mut far, mut one, peer) = stranger(&rate);
        let (mut afar, mut other, _) = stranger(&rate);
        for far in [&mut far, &mut afar] {
            far.write_all(&vec![0; mebibyte]).await.unwrap();
        }
        assert!(read(&mut one, own).await < 0.01);
        let (one_took, other_took) = tokio::join!(read(&mut one, mebibyte - own), read(&mut other, mebibyte));
        assert!((0.9..1.1).contains(&one_took.max(other_took)), "{one_took} and {other_took}");
        // What calls have taken is not counted.
        far.write_all(&vec![0; mebibyte]).await.unwrap();
        peer.take(mebibyte as u64);
        assert!(read(&mut one, mebibyte).await < 0.01);
        // Nor is who is known.
        far.write_all(&vec![0; mebibyte]).await.unwrap();
        assert!(timeout(Duration::from_millis(100), read(&mut one, mebibyte)).await.is_err());
        peer.know();
        assert!(read(&mut one, mebibyte / 2).await < 0.01);
    }

    #[tokio::test]
    async fn a_stranger_is_read_once_in_a_turn_and_wakes_nobody_where_there_is_nothing() {
        let (mut far, mut io, peer) = stranger(&Arc::default());
        far.write_all(&[7; 2 * STRANGERS_SHARE]).await.unwrap();
        for _ in 0..2 {
            let (first, more) = (io.read_u8().now_or_never(), io.read_u8().now_or_never());
            assert!(first.is_none() && more.is_none(), "no turn has begun");
            let mut share = [0; 2 * STRANGERS_SHARE];
            let turn = in_turns(
                &peer,
                pin!(async { (io.read(&mut share).await.unwrap(), io.read_u8().now_or_never()) }),
            )
            .await;
            assert!(matches!(turn, (STRANGERS_SHARE, None)), "{turn:?}");
        }
        let quiet = timeout(Duration::from_millis(20), io.read_u8());
        assert!(in_turns(&peer, pin!(quiet)).await.is_err());
        assert!(peer.has_turn());
    }
}
