//! The memory that messages take on their way in, over all calls: from a message's first byte until its last picture is
//! decoded.
//!
//! A message counts by the length that stands before it, so that what has begun to arrive can always end. A call whose
//! message does not fit is refused at once; a stream waits, for as long as a message may take to arrive.

use std::collections::{HashMap, VecDeque};
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Frame, SizeHint};
use metrics::gauge;
use prost::Message;
use tokio::sync::Notify;
use tokio::time::timeout;
use tonic::Status;
use tonic::body::Body;

use super::framing::Framing;
use super::status::of_call;
use crate::caller::Caller;
use crate::config::Limits;
use crate::error::ScoreError;
use crate::proto;
use crate::proto::image::Source;
use crate::telemetry::MESSAGE_BYTES;

/// What the messages of all callers hold together.
#[derive(Debug)]
pub struct InFlight {
    /// The most that they may hold.
    most: usize,
    /// The most that one of them may have.
    largest: usize,
    held: Mutex<Held>,
    /// Wakes messages that wait for room.
    freed: Notify,
}

#[derive(Debug, Default)]
struct Held {
    bytes: usize,
    /// Who holds nothing is not listed.
    by_caller: HashMap<Caller, usize>,
}

impl InFlight {
    /// Room for the messages of all callers, within these limits.
    pub fn new(limits: &Limits) -> Arc<Self> {
        let Limits { max_bytes_in_flight: most, max_message_bytes: largest, .. } = *limits;
        Arc::new(Self { most, largest, held: Mutex::default(), freed: Notify::new() })
    }

    /// Takes room, as the queue gives it: where `n` callers hold some, none may hold more than one part in `n + 1`, and
    /// who holds nothing but `had`, of the same message, may take whatever fits.
    fn take(&self, caller: &Caller, bytes: usize, had: usize) -> Result<(), ScoreError> {
        if bytes == 0 {
            return Ok(());
        }
        let mut held = self.lock();
        let own = held.by_caller.get(caller).copied().unwrap_or_default();
        let holders = held.by_caller.len() + usize::from(own == 0);
        let within_share = own == had || own + bytes <= self.most / (holders + 1);
        if held.bytes + bytes > self.most || !within_share {
            return Err(ScoreError::TooManyBytes { limit: self.most });
        }
        held.bytes += bytes;
        *held.by_caller.entry(caller.clone()).or_default() += bytes;
        gauge!(MESSAGE_BYTES).increment(bytes as f64);
        Ok(())
    }

    fn give_back(&self, caller: &Caller, bytes: usize) {
        let mut held = self.lock();
        held.bytes -= bytes;
        if let Some(own) = held.by_caller.get_mut(caller) {
            *own -= bytes;
            if *own == 0 {
                held.by_caller.remove(caller);
            }
        }
        drop(held);
        gauge!(MESSAGE_BYTES).decrement(bytes as f64);
        self.freed.notify_waiters();
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The room of one message. Dropping it gives the room back.
#[derive(Debug)]
struct Hold {
    room: Arc<InFlight>,
    caller: Caller,
    bytes: AtomicUsize,
}

impl Hold {
    fn new(room: &Arc<InFlight>, caller: &Caller, bytes: usize) -> Result<Self, ScoreError> {
        room.take(caller, bytes, 0)?;
        Ok(Self { room: Arc::clone(room), caller: caller.clone(), bytes: bytes.into() })
    }

    async fn when_room(room: Arc<InFlight>, caller: Caller, bytes: usize) -> Self {
        loop {
            // Listens before it looks, so that room made in between is not missed.
            let freed = room.freed.notified();
            match Self::new(&room, &caller, bytes) {
                Ok(hold) => return hold,
                Err(_) => freed.await,
            }
        }
    }

    fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Takes what is missing to so many bytes.
    fn grow(&self, bytes: usize) -> Result<(), ScoreError> {
        let more = bytes.saturating_sub(self.bytes());
        self.room.take(&self.caller, more, self.bytes())?;
        self.bytes.fetch_add(more, Ordering::Relaxed);
        Ok(())
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.room.give_back(&self.caller, self.bytes());
    }
}

/// The room of a call's messages that have begun to arrive, in their order. Stands in the extensions of a request.
#[derive(Debug, Clone, Default)]
pub struct Arrivals(Arc<Mutex<VecDeque<Arc<Hold>>>>);

impl Arrivals {
    fn lock(&self) -> MutexGuard<'_, VecDeque<Arc<Hold>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Finds room for a body that is one message before it arrives: one that does not say how long it is may have all
    /// that a message may have.
    ///
    /// # Errors
    /// There is none.
    pub fn announce(&self, room: &Arc<InFlight>, caller: &Caller, size: SizeHint) -> Result<(), ScoreError> {
        let bytes = size.exact().map_or(room.largest, |bytes| usize::try_from(bytes).unwrap_or(usize::MAX));
        // One that is too large is refused before it is read.
        if bytes <= room.largest {
            self.lock().push_back(Arc::new(Hold::new(room, caller, bytes)?));
        }
        Ok(())
    }

    /// Has the call's next message count for as long as one of its pictures is there.
    ///
    /// # Errors
    /// There is no room for what the message is once it is unpacked.
    pub fn receive<M: Pictures>(&self, mut message: M) -> Result<M, ScoreError> {
        let hold = self.lock().pop_front();
        if let Some(hold) = hold {
            // Nobody knew before: a compressed message has arrived as less than it is.
            hold.grow(message.encoded_len())?;
            message.pictures(|bytes| {
                let bytes = std::mem::take(bytes);
                Bytes::from_owner(Kept { bytes, _hold: Arc::clone(&hold) })
            });
        }
        Ok(message)
    }
}

/// Bytes of a picture, which stand in the memory of their message, with the room of it.
struct Kept {
    bytes: Bytes,
    _hold: Arc<Hold>,
}

impl AsRef<[u8]> for Kept {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

/// A message with pictures in it.
pub trait Pictures: Message {
    /// Puts other bytes in the place of each picture's.
    fn pictures(&mut self, other: impl FnMut(&mut Bytes) -> Bytes);
}

impl Pictures for proto::ScoreRequest {
    fn pictures(&mut self, mut other: impl FnMut(&mut Bytes) -> Bytes) {
        self.items.iter_mut().filter_map(bytes_of).for_each(|bytes| *bytes = other(bytes));
    }
}

impl Pictures for proto::ScoreStreamRequest {
    fn pictures(&mut self, mut other: impl FnMut(&mut Bytes) -> Bytes) {
        self.item.iter_mut().filter_map(bytes_of).for_each(|bytes| *bytes = other(bytes));
    }
}

fn bytes_of(item: &mut proto::ScoreItem) -> Option<&mut Bytes> {
    Some(match item.image.as_mut()?.source.as_mut()? {
        Source::Encoded(bytes) => bytes,
        Source::Raw(raw) => &mut raw.rgb8,
    })
}

/// A body whose messages find room as they begin.
pub struct Counted {
    inner: Body,
    framing: Framing,
    room: Arc<InFlight>,
    caller: Caller,
    arrivals: Arrivals,
    /// How long a stream's message may wait for room; `None`: the body has one message, which is refused at once.
    patience: Option<Duration>,
    /// Whether a message has begun.
    begun: bool,
    /// The end of a body's one message, which is kept back until the body ends: tonic unpacks a message once it has it
    /// all, and nobody counts what it is then before the body has ended too.
    whole: Option<Bytes>,
    /// The room that a message waits for, and what is there of it and of those behind it.
    waiting: Option<(Waiting, Bytes)>,
    /// The message that arrived last: tonic's buffer keeps its memory until the next one.
    last: Option<Arc<Hold>>,
}

type Waiting = Pin<Box<dyn Future<Output = Result<Hold, ScoreError>> + Send>>;

impl Counted {
    /// Counts what `inner` brings in `room`, and tells of it in `arrivals`.
    pub fn new(
        inner: Body,
        room: Arc<InFlight>,
        caller: Caller,
        arrivals: Arrivals,
        patience: Option<Duration>,
    ) -> Self {
        let framing = Framing::default();
        let (begun, whole, waiting, last) = (false, None, None, None);
        Self { inner, framing, room, caller, arrivals, patience, begun, whole, waiting, last }
    }

    /// Finds room for a message that begins; or gives what to wait for.
    fn begin(&mut self, bytes: usize) -> Result<Option<Waiting>, ScoreError> {
        if std::mem::replace(&mut self.begun, true) && self.patience.is_none() {
            return Err(one_too_many());
        }
        if bytes > self.room.largest {
            // Refused where it is decoded, before it is stored.
            return Ok(None);
        }
        // The buffer takes it where the last one was, if it fits and no picture is left there.
        let last = self.last.take().and_then(Arc::into_inner).filter(|last| last.bytes() >= bytes);
        match (last.map_or_else(|| Hold::new(&self.room, &self.caller, bytes), Ok), self.patience) {
            (Ok(hold), _) => self.arrive(hold),
            (Err(error), None) => return Err(error),
            (Err(error), Some(patience)) => {
                let hold = Hold::when_room(Arc::clone(&self.room), self.caller.clone(), bytes);
                return Ok(Some(Box::pin(async move { timeout(patience, hold).await.map_err(|_| error) })));
            }
        }
        Ok(None)
    }

    fn arrive(&mut self, hold: Hold) {
        let hold = Arc::new(hold);
        self.arrivals.lock().push_back(Arc::clone(&hold));
        self.last = Some(hold);
    }

    /// What of `data` may be handed on now.
    fn let_in(&mut self, mut data: Bytes) -> Result<Bytes, ScoreError> {
        let mut at = 0;
        while let Some((end, length)) = self.framing.next(data.get(at..).unwrap_or_default()) {
            at += end;
            if let Some(waiting) = self.begin(length)? {
                self.waiting = Some((waiting, data.split_off(at)));
                break;
            }
        }
        if self.patience.is_none() && self.begun && self.framing.within_prefix() {
            return Err(one_too_many());
        }
        Ok(data)
    }
}

impl http_body::Body for Counted {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if let Some((mut waiting, rest)) = self.waiting.take() {
            let Poll::Ready(hold) = waiting.as_mut().poll(context) else {
                self.waiting = Some((waiting, rest));
                return Poll::Pending;
            };
            let data = hold.and_then(|hold| {
                self.arrive(hold);
                self.let_in(rest)
            });
            return Poll::Ready(Some(data.map(Frame::data).map_err(|error| of_call(&error))));
        }
        loop {
            let frame = match ready!(Pin::new(&mut self.inner).poll_frame(context)) {
                Some(Ok(frame)) => frame.into_data(),
                None => return Poll::Ready(self.whole.take().map(|data| Ok(Frame::data(data)))),
                error => return Poll::Ready(error),
            };
            let data = match frame {
                Ok(data) => self.let_in(data).map_err(|error| of_call(&error))?,
                // A body that is kept back has none.
                Err(_) if self.whole.is_some() => continue,
                Err(trailers) => return Poll::Ready(Some(Ok(trailers))),
            };
            let is_whole = self.patience.is_none() && self.begun && !self.framing.within_message();
            if !is_whole || self.inner.is_end_stream() && self.whole.is_none() {
                return Poll::Ready(Some(Ok(Frame::data(data))));
            }
            self.whole.get_or_insert(data);
        }
    }

    fn is_end_stream(&self) -> bool {
        self.waiting.is_none() && self.whole.is_none() && self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

fn one_too_many() -> ScoreError {
    ScoreError::invalid("message", "there is more than one; a call of this method has one")
}

#[cfg(test)]
mod tests {
    use futures::{StreamExt, stream};
    use http_body_util::{BodyExt, StreamBody};

    use super::*;

    fn room(most: usize) -> Arc<InFlight> {
        Arc::new(InFlight { most, largest: most, held: Mutex::default(), freed: Notify::new() })
    }

    fn caller(name: &str) -> Caller {
        Caller(name.into())
    }

    #[test]
    fn a_greedy_caller_leaves_room_and_the_largest_message_always_fits_an_empty_one() {
        let room = room(1200);
        let hold = |name, bytes| Hold::new(&room, &caller(name), bytes);
        drop(hold("a", 1200).unwrap());
        let greedy: Vec<_> = std::iter::from_fn(|| hold("greedy", 100).ok()).collect();
        assert_eq!(greedy.len(), 6, "half of it while nobody else is there");
        let other: Vec<_> = std::iter::from_fn(|| hold("other", 100).ok()).collect();
        assert_eq!(other.len(), 4, "a third now that there are two");
        assert!(hold("third", 201).is_err());
        let third = hold("third", 200).unwrap();
        assert!(hold("third", 1).is_err() && hold("fourth", 1).is_err());
        drop((greedy, other, third));
        let held = room.lock();
        assert_eq!((held.bytes, held.by_caller.len()), (0, 0));
    }

    /// A message of a stream, as its decoder gives it, with a picture of so many bytes.
    fn message(bytes: usize) -> proto::ScoreStreamRequest {
        let source = Some(Source::Encoded(vec![0; bytes].into()));
        let item = Some(proto::ScoreItem { image: Some(proto::Image { source }), prompt: None });
        proto::ScoreStreamRequest { item, ..Default::default() }
    }

    fn counted(room: &Arc<InFlight>, inner: Body, patience: Option<Duration>) -> (Counted, Arrivals) {
        let arrivals = Arrivals::default();
        (Counted::new(inner, Arc::clone(room), caller("a"), arrivals.clone(), patience), arrivals)
    }

    #[test]
    fn a_stream_counts_the_memory_that_its_buffer_keeps() {
        let room = room(1000);
        let (mut body, arrivals) = counted(&room, Body::empty(), Some(Duration::ZERO));
        let held = || room.lock().bytes;
        assert!(body.begin(400).unwrap().is_none());
        drop(arrivals.receive(message(10)).unwrap());
        assert_eq!(held(), 400, "the buffer is as large as before");
        assert!(body.begin(300).unwrap().is_none());
        let second = arrivals.receive(message(10)).unwrap();
        assert_eq!(held(), 400, "it was read into the same buffer");
        assert!(body.begin(50).unwrap().is_none());
        assert_eq!(held(), 450, "a picture is still there, so it was not");
        drop(second);
        assert_eq!(held(), 50);
        // What is larger once it is unpacked.
        let third = arrivals.receive(message(300)).unwrap();
        assert!((300..320).contains(&held()), "{}", held());
        drop((third, body));
        assert_eq!(held(), 0);
        let (mut body, arrivals) = counted(&room, Body::empty(), Some(Duration::ZERO));
        assert!(body.begin(50).unwrap().is_none());
        assert!(arrivals.receive(message(900)).is_ok(), "alone it may have all there is");
        assert!(body.begin(50).unwrap().is_none());
        assert!(arrivals.receive(message(1000)).is_err());
    }

    /// However it is cut: the last byte of a call's message is handed on with the end of its body.
    #[tokio::test]
    async fn a_calls_message_is_whole_only_once_its_body_has_ended() {
        let room = room(100);
        let message = [&[0, 0, 0, 0, 60][..], &[7; 60]].concat();
        for size in 1..=65 {
            let (pieces, incoming) = futures::channel::mpsc::unbounded();
            let frames = incoming.map(|piece| Ok::<_, Status>(Frame::data(piece)));
            let (mut body, _arrivals) = counted(&room, Body::new(StreamBody::new(frames)), None);
            for piece in message.chunks(size).chain([&[][..]]) {
                pieces.unbounded_send(Bytes::copy_from_slice(piece)).unwrap();
            }
            let mut read = 0;
            while let Poll::Ready(piece) = futures::poll!(body.frame()) {
                read += piece.unwrap().unwrap().into_data().unwrap().len();
            }
            assert!(read < message.len() && !http_body::Body::is_end_stream(&body), "in pieces of {size}");
            drop(pieces);
            assert_eq!(read + body.collect().await.unwrap().to_bytes().len(), message.len());
        }
        // A prefix is enough to see that another follows.
        for more in [&[0][..], &[0, 0, 0, 0, 0]] {
            let two = [&message, more].concat();
            let whole = Body::new(http_body_util::Full::from(two.clone()));
            let apart = StreamBody::new(stream::iter(
                [message.clone(), more.to_vec()]
                    .map(|piece| Ok::<_, Status>(Frame::data(Bytes::from(piece)))),
            ));
            for body in [whole, Body::new(apart)] {
                let refused = counted(&room, body, None).0.collect().await.unwrap_err();
                assert_eq!(refused.code(), tonic::Code::InvalidArgument);
            }
        }
    }

    /// Two messages of 60 bytes in one piece, of which the second finds no room before the first is gone.
    #[tokio::test(start_paused = true)]
    async fn a_stream_waits_between_its_messages_and_a_call_does_not() {
        let prefixed = [&[0, 0, 0, 0, 60][..], &[7; 60]].concat();
        let body = || Body::new(http_body_util::Full::from([&prefixed[..], &prefixed].concat()));
        let room = room(100);
        let taken = Hold::new(&room, &caller("b"), 60).unwrap();
        let refused = counted(&room, body(), None).0.frame().await.unwrap().unwrap_err();
        assert_eq!(refused.code(), tonic::Code::ResourceExhausted);
        drop(taken);
        let patience = Duration::from_secs(10);
        let (mut stream, arrivals) = counted(&room, body(), Some(patience));
        // All of the first message, so that it can be decoded, and the second's prefix.
        assert_eq!(stream.frame().await.unwrap().unwrap().into_data().unwrap().len(), 70);
        let first = arrivals.receive(message(50)).unwrap();
        assert!(futures::poll!(stream.frame()).is_pending());
        drop(first);
        assert_eq!(stream.frame().await.unwrap().unwrap().into_data().unwrap().len(), 60);
        let _second = arrivals.receive(message(50)).unwrap();
        assert!(stream.frame().await.is_none());
        let (mut other, _arrivals) = counted(&room, body(), Some(patience));
        assert_eq!(other.frame().await.unwrap().unwrap().into_data().unwrap().len(), 5);
        let start = tokio::time::Instant::now();
        let refused = other.frame().await.unwrap().unwrap_err();
        assert_eq!((refused.code(), start.elapsed()), (tonic::Code::ResourceExhausted, patience));
    }
}
