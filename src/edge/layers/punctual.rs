//! A request's body that must bring what it has begun within a time.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Frame, SizeHint};
use tokio::time::{Sleep, sleep};
use tonic::Status;
use tonic::body::Body;

use super::framing::Framing;
use crate::edge::grpc::status::{of_sender, status};
use crate::error::ScoreError;

/// A body whose messages must arrive whole within a time of their first byte. A stream may be silent between two
/// messages for as long as its caller likes.
pub struct Punctual {
    inner: Body,
    framing: Framing,
    /// Whether the body as a whole is one message, which has begun with the call.
    whole: bool,
    limit: Duration,
    timer: Option<Pin<Box<Sleep>>>,
}

impl Punctual {
    /// Watches `inner`. `whole` says that the call has one message, and ends with it.
    pub fn new(inner: Body, whole: bool, limit: Duration) -> Self {
        Self { inner, framing: Framing::default(), whole, limit, timer: None }
    }
}

impl http_body::Body for Punctual {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if let Poll::Ready(frame) = Pin::new(&mut self.inner).poll_frame(context) {
            if let Some(data) = frame.as_ref().and_then(|frame| frame.as_ref().ok()?.data_ref()) {
                self.framing.advance(data);
            }
            // A timer that has run out unseen ran while nobody wanted to read: that time was not the caller's.
            let unseen = self.timer.as_ref().is_some_and(|timer| timer.is_elapsed());
            if unseen || !(self.whole || self.framing.within_message()) {
                self.timer = None;
            }
            return Poll::Ready(frame.map(|frame| frame.map_err(of_sender)));
        }
        if !(self.whole || self.framing.within_message()) {
            return Poll::Pending;
        }
        let limit = self.limit;
        let timer = self.timer.get_or_insert_with(|| Box::pin(sleep(limit)));
        timer.as_mut().poll(context).map(|()| Some(Err(status(&ScoreError::SlowMessage(limit), ""))))
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use futures::{StreamExt, stream};
    use http_body_util::{BodyExt, StreamBody};
    use tokio::time::Instant;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);

    /// A body whose pieces come after pauses, in seconds.
    fn body(whole: bool, pieces: Vec<(u64, Vec<u8>)>) -> Punctual {
        let pieces = stream::iter(pieces).then(|(pause, piece)| async move {
            sleep(Duration::from_secs(pause)).await;
            Ok::<_, Status>(Frame::data(Bytes::from(piece)))
        });
        Punctual::new(Body::new(StreamBody::new(Box::pin(pieces))), whole, LIMIT)
    }

    async fn end(mut body: Punctual) -> (Option<tonic::Code>, u64) {
        let start = Instant::now();
        while let Some(frame) = body.frame().await {
            if let Err(status) = frame {
                return (Some(status.code()), start.elapsed().as_secs());
            }
        }
        (None, start.elapsed().as_secs())
    }

    #[tokio::test(start_paused = true)]
    async fn what_has_begun_must_end_in_time() {
        let (head, tail) = (vec![0, 0, 0, 0, 2], vec![7, 7]);
        let late = Some(tonic::Code::DeadlineExceeded);
        let within = vec![(0, head.clone()), (9, tail.clone())];
        assert_eq!(end(body(true, within.clone())).await, (None, 9));
        // Bytes that drip do not buy time.
        let dripping = vec![(0, head.clone()), (8, vec![7]), (8, vec![7])];
        assert_eq!(end(body(true, dripping.clone())).await, (late, 10));
        assert_eq!(end(body(false, dripping)).await, (late, 10));
        // Silence between messages is a stream's right, and nothing that a single message's call has.
        let pause = vec![(60, head.clone()), (1, tail.clone()), (60, head), (1, tail)];
        assert_eq!(end(body(false, pause.clone())).await, (None, 122));
        assert_eq!(end(body(true, pause)).await, (late, 10));
    }

    #[tokio::test(start_paused = true)]
    async fn time_in_which_the_server_did_not_read_is_not_the_callers() {
        let mut slow = body(false, vec![(0, vec![0, 0, 0, 0, 2, 7]), (1, vec![7]), (0, vec![0])]);
        assert!(slow.frame().await.unwrap().is_ok());
        // It looks for more, and then for a minute not.
        assert!(futures::poll!(slow.frame()).is_pending());
        sleep(6 * LIMIT).await;
        assert!(slow.frame().await.unwrap().is_ok());
        assert!(slow.frame().await.unwrap().is_ok());
    }
}
