//! A request's body that is read to its end although nobody wants it.
//!
//! A call that is refused before its message is read would leave the rest of the message on its way. HTTP/2 then resets
//! the call's stream, forgets it, and takes what still arrives for a fault of the connection: about a thousand of those,
//! and the connection ends with all calls on it. HTTP/1.1 can only close. So what is left is read on and thrown away,
//! within bounds.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes};
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use tokio::runtime::Handle;
use tokio::time::timeout;

use crate::edge::layers::peer::Peer;

/// How much of a body is read on at least, where messages are small: what is a little too large to be taken.
const LEAST: u64 = 4 << 20;
/// How long it may take to arrive.
const LIMIT: Duration = Duration::from_secs(10);

/// A body that reads on when it is dropped before its end.
pub struct ReadOn<B: Body<Data = Bytes> + Unpin + Send + 'static = Incoming> {
    /// `None` once there is no more.
    inner: Option<B>,
    most: u64,
    peer: Peer,
    /// Whether the other end waits for a word before it sends: one who is refused sends nothing.
    waits: bool,
}

impl<B: Body<Data = Bytes> + Unpin + Send + 'static> ReadOn<B> {
    /// Reads on as much of the body of a call of `peer` as a message may have. `waits` says that the caller expects to be
    /// told to go on.
    pub fn new(inner: B, max_message_bytes: usize, peer: Peer, waits: bool) -> Self {
        Self { inner: Some(inner), most: LEAST.max(max_message_bytes as u64), peer, waits }
    }
}

impl<B: Body<Data = Bytes> + Unpin + Send + 'static> Body for ReadOn<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        self.waits = false;
        let Some(inner) = &mut self.inner else { return Poll::Ready(None) };
        let frame = ready!(Pin::new(inner).poll_frame(context));
        if let Some(Ok(frame)) = &frame {
            take(&self.peer, frame);
        }
        if !matches!(frame, Some(Ok(_))) {
            self.inner = None;
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.as_ref().map_or(SizeHint::with_exact(0), Body::size_hint)
    }
}

impl<B: Body<Data = Bytes> + Unpin + Send + 'static> Drop for ReadOn<B> {
    fn drop(&mut self) {
        let Some(mut inner) = self.inner.take() else { return };
        let (most, peer) = (self.most, self.peer.clone());
        // One that announces more would only be cut later.
        if inner.is_end_stream() || self.waits || inner.size_hint().lower() > most {
            return;
        }
        let Ok(runtime) = Handle::try_current() else { return };
        runtime.spawn(timeout(LIMIT, async move {
            let mut read = 0;
            while let Some(Ok(frame)) = inner.frame().await {
                read += take(&peer, &frame);
                if read > most {
                    break;
                }
            }
        }));
    }
}

/// Notes what a call has taken of its connection.
fn take(peer: &Peer, frame: &Frame<Bytes>) -> u64 {
    let bytes = frame.data_ref().map_or(0, Buf::remaining) as u64;
    peer.take(bytes);
    bytes
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use futures::StreamExt;
    use futures::channel::mpsc;
    use http_body_util::StreamBody;

    use super::*;

    /// A body of pieces that are sent to it.
    fn body()
    -> (mpsc::UnboundedSender<usize>, ReadOn<impl Body<Data = Bytes, Error = Infallible> + Unpin + Send>)
    {
        let (pieces, incoming) = mpsc::unbounded();
        let frames = incoming.map(|bytes| Ok(Frame::data(Bytes::from(vec![7; bytes]))));
        (pieces, ReadOn::new(StreamBody::new(frames), 8 << 20, Peer::stranger([192, 0, 2, 7].into()), false))
    }

    async fn gone(pieces: &mpsc::UnboundedSender<usize>) {
        while !pieces.is_closed() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_nobody_wants_is_read_on_within_bounds() {
        let start = tokio::time::Instant::now();
        let (pieces, unread) = body();
        drop(unread);
        for _ in 0..8 {
            pieces.unbounded_send(1 << 20).unwrap();
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert!(!pieces.is_closed(), "as much as a message may have");
        pieces.unbounded_send(1).unwrap();
        gone(&pieces).await;
        assert!(start.elapsed() < LIMIT);

        let (pieces, mut half) = body();
        pieces.unbounded_send(1).unwrap();
        assert!(half.frame().await.is_some());
        drop(half);
        pieces.unbounded_send(1).unwrap();
        let start = tokio::time::Instant::now();
        gone(&pieces).await;
        assert_eq!(start.elapsed().as_secs(), LIMIT.as_secs(), "and for no longer");
    }

    #[tokio::test]
    async fn who_waits_for_a_word_is_not_read_on() {
        let (pieces, mut unread) = body();
        unread.waits = true;
        drop(unread);
        assert!(pieces.is_closed());
    }
}
