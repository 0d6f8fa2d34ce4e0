//! The memory that messages take on their way in, over all calls: from a message's first byte until its last picture is
//! decoded.
//!
//! A message counts by the length that stands before it, so that what has begun to arrive can always end. A call whose
//! message does not fit is refused at once; a stream waits, for as long as a message may take to arrive.
//!
//! Messages are put together here and not by tonic, whose buffers keep the memory of a stream's last one for as long as the
//! stream is open: it gets an empty message for each, and the handler the real one.

use std::collections::{HashMap, VecDeque};
use std::io::Read;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use flate2::read::GzDecoder;
use http_body::{Frame, SizeHint};
use metrics::gauge;
use prost::Message;
use tokio::sync::Notify;
use tokio::time::timeout;
use tonic::body::Body;
use tonic::{Code, Status};

use super::fields::has_too_many_fields;
use crate::config::Limits;
use crate::edge::grpc::status::of_call;
use crate::edge::proto;
use crate::edge::proto::image::Source;
use crate::error::ScoreError;
use crate::request_context::Caller;
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

/// A call's messages that have arrived, in their order. Stands in the extensions of a request.
#[derive(Debug, Clone, Default)]
pub struct Arrivals(Arc<Mutex<VecDeque<Arrival>>>);

/// A message with its room.
#[derive(Debug)]
struct Arrival {
    hold: Hold,
    /// `None` where the handler has it already.
    body: Option<MessageBody>,
}

/// A message as it arrived.
#[derive(Debug)]
enum MessageBody {
    Plain(Bytes),
    Gzip(Bytes),
}

impl Arrivals {
    fn lock(&self) -> MutexGuard<'_, VecDeque<Arrival>> {
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
            let hold = Hold::new(room, caller, bytes)?;
            self.lock().push_back(Arrival { hold, body: None });
        }
        Ok(())
    }

    /// The call's next message, in the place of what tonic gave for it. It counts for as long as one of its pictures is
    /// there.
    ///
    /// # Errors
    /// It cannot be read, or there is no room for what it is once it is unpacked.
    pub fn receive<M: Pictures + Default>(&self, given: M) -> Result<M, ScoreError> {
        let Some(Arrival { hold, body }) = self.lock().pop_front() else { return Ok(given) };
        let mut message = match body {
            None => given,
            Some(MessageBody::Plain(bytes)) => decode(bytes)?,
            Some(MessageBody::Gzip(bytes)) => decode(unpack(&bytes, &hold)?)?,
        };
        // Of HTTP's message nobody knew before.
        hold.grow(message.encoded_len())?;
        let hold = Arc::new(hold);
        message.pictures(|bytes| {
            let bytes = std::mem::take(bytes);
            Bytes::from_owner(Kept { bytes, _hold: Arc::clone(&hold) })
        });
        Ok(message)
    }
}

fn unreadable(reason: impl std::fmt::Display) -> ScoreError {
    ScoreError::invalid("message", format!("cannot be read: {reason}"))
}

fn decode<M: Message + Default>(bytes: Bytes) -> Result<M, ScoreError> {
    if has_too_many_fields(&bytes) {
        return Err(unreadable("it has too many fields"));
    }
    M::decode(bytes).map_err(unreadable)
}

/// Unpacks a message, and takes room as it grows.
fn unpack(packed: &[u8], hold: &Hold) -> Result<Bytes, ScoreError> {
    const STEP: u64 = 1 << 16;
    let largest = hold.room.largest;
    let (mut packed, mut message) = (GzDecoder::new(packed), Vec::new());
    loop {
        let read = packed.by_ref().take(STEP).read_to_end(&mut message).map_err(unreadable)?;
        if message.len() > largest {
            return Err(unreadable(format!("it has more than {largest} bytes once it is unpacked")));
        }
        if read == 0 {
            message.shrink_to_fit();
            return Ok(message.into());
        }
        hold.grow(message.len())?;
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

impl Pictures for proto::GetModelRequest {
    fn pictures(&mut self, _: impl FnMut(&mut Bytes) -> Bytes) {}
}

impl Pictures for proto::ListModelsRequest {
    fn pictures(&mut self, _: impl FnMut(&mut Bytes) -> Bytes) {}
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

/// A body whose messages find room as they begin, and arrive beside it.
pub struct Counted {
    inner: Body,
    room: Arc<InFlight>,
    caller: Caller,
    arrivals: Arrivals,
    /// How long a stream's message may wait for room; `None`: the body has one message, which is refused at once.
    patience: Option<Duration>,
    /// Whether messages may be packed, which the headers say.
    gzip: bool,
    /// What has arrived and is not part of a message yet.
    rest: Bytes,
    /// What is there of the next message's prefix.
    prefix: Vec<u8>,
    next: Next,
}

/// What is to be done for the next message.
enum Next {
    /// Its prefix must be there.
    Prefix,
    /// It must find room.
    Room(Waiting, Prefix),
    /// It must be there.
    Body(Hold, Prefix, BytesMut),
    /// There is none: the body had its one.
    Nothing,
}

/// What stands before a message.
#[derive(Clone, Copy)]
struct Prefix {
    packed: bool,
    length: usize,
}

type Waiting = Pin<Box<dyn Future<Output = Result<Hold, ScoreError>> + Send>>;

/// What tonic gets for each message: an empty one.
const EMPTY: &[u8] = &[0; 5];

impl Counted {
    /// Counts what `inner` brings in `room`, and puts it into `arrivals`. `gzip` says whether messages may be packed.
    pub fn new(
        inner: Body,
        room: Arc<InFlight>,
        caller: Caller,
        arrivals: Arrivals,
        patience: Option<Duration>,
        gzip: bool,
    ) -> Self {
        let (rest, prefix, next) = (Bytes::new(), Vec::new(), Next::Prefix);
        Self { inner, room, caller, arrivals, patience, gzip, rest, prefix, next }
    }

    /// Finds room for a message that begins, or waits for it.
    fn begin(&self, prefix: Prefix) -> Result<Next, ScoreError> {
        let (largest, length) = (self.room.largest, prefix.length);
        if length > largest {
            return Err(unreadable(format!("it has {length} bytes; it may have {largest} bytes")));
        }
        match (Hold::new(&self.room, &self.caller, length), self.patience) {
            (Ok(hold), _) => Ok(Next::body(hold, prefix)),
            (Err(error), None) => Err(error),
            (Err(error), Some(patience)) => {
                let hold = Hold::when_room(Arc::clone(&self.room), self.caller.clone(), length);
                let waiting = async move { timeout(patience, hold).await.map_err(|_| error) };
                Ok(Next::Room(Box::pin(waiting), prefix))
            }
        }
    }

    /// Goes on with what is there. Gives whether a message is.
    fn go_on(&mut self, context: &mut Context<'_>) -> Poll<Result<bool, ScoreError>> {
        loop {
            match &mut self.next {
                Next::Room(waiting, prefix) => {
                    let hold = ready!(waiting.as_mut().poll(context))?;
                    self.next = Next::body(hold, *prefix);
                }
                Next::Body(_, prefix, body) => {
                    let missing = prefix.length - body.len();
                    let there = self.rest.split_to(missing.min(self.rest.len()));
                    body.extend_from_slice(&there);
                    if there.len() < missing {
                        return Poll::Ready(Ok(false));
                    }
                    self.arrive();
                    return Poll::Ready(Ok(true));
                }
                _ if self.rest.is_empty() => return Poll::Ready(Ok(false)),
                Next::Nothing => return Poll::Ready(Err(one_too_many())),
                Next::Prefix => {
                    self.prefix.push(self.rest.get_u8());
                    if let [flag, length @ ..] = &self.prefix[..]
                        && let Ok(length) = <[u8; 4]>::try_from(length)
                    {
                        let packed = match flag {
                            0 => false,
                            1 if self.gzip => true,
                            1 => {
                                return Poll::Ready(Err(unreadable(
                                    "it is packed, and grpc-encoding is not gzip",
                                )));
                            }
                            flag => {
                                return Poll::Ready(Err(unreadable(format!(
                                    "its flags are {flag}; 0 and 1 are known"
                                ))));
                            }
                        };
                        let prefix = Prefix { packed, length: u32::from_be_bytes(length) as usize };
                        self.prefix.clear();
                        self.next = self.begin(prefix)?;
                    }
                }
            }
        }
    }

    /// Hands the message on that is there.
    fn arrive(&mut self) {
        let next = if self.patience.is_some() { Next::Prefix } else { Next::Nothing };
        if let Next::Body(hold, prefix, body) = std::mem::replace(&mut self.next, next) {
            let body = body.freeze();
            let body = Some(if prefix.packed { MessageBody::Gzip(body) } else { MessageBody::Plain(body) });
            self.arrivals.lock().push_back(Arrival { hold, body });
        }
    }
}

impl Next {
    fn body(hold: Hold, prefix: Prefix) -> Self {
        Self::Body(hold, prefix, BytesMut::with_capacity(prefix.length))
    }
}

impl http_body::Body for Counted {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        loop {
            match ready!(self.go_on(context)) {
                Ok(true) => return Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(EMPTY))))),
                Ok(false) => {}
                Err(error) => {
                    self.rest.clear();
                    self.next = Next::Nothing;
                    return Poll::Ready(Some(Err(of_call(&error))));
                }
            }
            let frame = match ready!(Pin::new(&mut self.inner).poll_frame(context)) {
                Some(Ok(frame)) => frame.into_data(),
                None if matches!(self.next, Next::Body(..)) || !self.prefix.is_empty() => {
                    self.next = Next::Nothing;
                    self.prefix.clear();
                    return Poll::Ready(Some(Err(of_call(&unreadable("the body ends within it")))));
                }
                // tonic would take it for the end of a body without a message. The call is dropped next.
                Some(Err(left)) if left.code() == Code::Cancelled => return Poll::Pending,
                end => return Poll::Ready(end),
            };
            match frame {
                Ok(data) => self.rest = data,
                Err(trailers) => return Poll::Ready(Some(Ok(trailers))),
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty()
            && matches!(self.next, Next::Prefix | Next::Nothing)
            && self.inner.is_end_stream()
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
        let item = Some(proto::ScoreItem { image: Some(proto::Image { source }), ..Default::default() });
        proto::ScoreStreamRequest { item, ..Default::default() }
    }

    fn counted(room: &Arc<InFlight>, inner: Body, patience: Option<Duration>) -> (Counted, Arrivals) {
        let arrivals = Arrivals::default();
        (Counted::new(inner, Arc::clone(room), caller("a"), arrivals.clone(), patience, true), arrivals)
    }

    fn framed(flag: u8, message: &[u8]) -> Vec<u8> {
        [&[flag][..], &(message.len() as u32).to_be_bytes(), message].concat()
    }

    fn whole(bytes: Vec<u8>) -> Body {
        Body::new(http_body_util::Full::from(bytes))
    }

    const PATIENCE: Option<Duration> = Some(Duration::from_secs(10));

    #[tokio::test]
    async fn a_stream_holds_what_it_has_of_a_message_and_nothing_once_its_picture_is_gone() {
        let room = room(1000);
        let held = || room.lock().bytes;
        let sent = message(400).encode_to_vec();
        let (pieces, incoming) = futures::channel::mpsc::unbounded();
        let frames = incoming.map(|piece: Vec<u8>| Ok::<_, Status>(Frame::data(Bytes::from(piece))));
        let (mut body, arrivals) = counted(&room, Body::new(StreamBody::new(frames)), PATIENCE);
        for _ in 0..3 {
            pieces.unbounded_send(framed(0, &sent)[..100].to_vec()).unwrap();
            assert!(futures::poll!(body.frame()).is_pending());
            assert_eq!(held(), sent.len(), "from its beginning");
            pieces.unbounded_send(framed(0, &sent)[100..].to_vec()).unwrap();
            assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), EMPTY);
            let received: proto::ScoreStreamRequest = arrivals.receive(Default::default()).unwrap();
            assert_eq!((received == message(400), held()), (true, sent.len()));
            drop(received);
            assert_eq!(held(), 0);
        }
    }

    #[tokio::test]
    async fn a_packed_message_takes_room_for_what_it_is_once_it_is_unpacked() {
        let pack = |message: &[u8]| {
            let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
            std::io::Write::write_all(&mut packed, message).unwrap();
            framed(1, &packed.finish().unwrap())
        };
        let room = room(1000);
        let (mut body, arrivals) = counted(&room, whole(pack(&message(900).encode_to_vec())), None);
        body.frame().await.unwrap().unwrap();
        assert!(room.lock().bytes < 100);
        let received: proto::ScoreStreamRequest = arrivals.receive(Default::default()).unwrap();
        assert!(room.lock().bytes > 900, "alone it may have all there is");
        drop(received);
        for (bytes, words) in
            [(pack(&[0; 1001]), "more than 1000 bytes"), (framed(1, b"none"), "cannot be read")]
        {
            let (mut body, arrivals) = counted(&room, whole(bytes), None);
            body.frame().await.unwrap().unwrap();
            let refused = arrivals.receive(proto::ScoreStreamRequest::default()).unwrap_err();
            assert!(refused.to_string().contains(words), "{refused}");
        }
        let other = Hold::new(&room, &caller("b"), 400).unwrap();
        let (mut body, arrivals) = counted(&room, whole(pack(&message(900).encode_to_vec())), None);
        body.frame().await.unwrap().unwrap();
        let refused = arrivals.receive(proto::ScoreStreamRequest::default()).unwrap_err();
        assert!(matches!(refused, ScoreError::TooManyBytes { .. }), "{refused}");
        drop((body, arrivals, other));
        assert_eq!(room.lock().bytes, 0);
    }

    /// However it is cut, and whatever is behind it.
    #[tokio::test]
    async fn a_call_has_one_message_and_all_of_it() {
        let room = room(100);
        let sent = message(50).encode_to_vec();
        let bytes = framed(0, &sent);
        let body = |bytes: &[u8], size: usize| {
            let pieces: Vec<_> = bytes.chunks(size).map(Bytes::copy_from_slice).collect();
            let frames = stream::iter(pieces).map(|piece| Ok::<_, Status>(Frame::data(piece)));
            counted(&room, Body::new(StreamBody::new(frames)), None)
        };
        for size in 1..=bytes.len() + 1 {
            let (whole, arrivals) = body(&bytes, size);
            assert_eq!(whole.collect().await.unwrap().to_bytes(), EMPTY);
            assert!(arrivals.receive(proto::ScoreStreamRequest::default()).unwrap() == message(50));
            for wrong in [
                [&bytes[..], &[0]].concat(),
                [&bytes[..], EMPTY].concat(),
                bytes[..20].to_vec(),
                bytes[..3].to_vec(),
            ] {
                let refused = body(&wrong, size).0.collect().await.unwrap_err();
                assert_eq!(refused.code(), tonic::Code::InvalidArgument, "{refused}");
            }
        }
        for wrong in [framed(2, &sent), framed(0, &[0; 101]), framed(0, &[0xff; 9])] {
            let (body, arrivals) = counted(&room, whole(wrong), None);
            let read = body.collect().await.map(|_| arrivals.receive(proto::ScoreStreamRequest::default()));
            assert!(!matches!(read, Ok(Ok(_))));
        }
        assert_eq!(room.lock().bytes, 0);
    }

    /// Two messages in one piece, of which the second finds no room before the first is gone.
    #[tokio::test(start_paused = true)]
    async fn a_stream_waits_between_its_messages_and_a_call_does_not() {
        let sent = framed(0, &message(50).encode_to_vec());
        let body = || whole([&sent[..], &sent].concat());
        let room = room(100);
        let taken = Hold::new(&room, &caller("b"), 60).unwrap();
        let refused = counted(&room, body(), None).0.frame().await.unwrap().unwrap_err();
        assert_eq!(refused.code(), tonic::Code::ResourceExhausted);
        drop(taken);
        let (mut stream, arrivals) = counted(&room, body(), PATIENCE);
        let receive = || arrivals.receive(proto::ScoreStreamRequest::default()).unwrap();
        assert!(stream.frame().await.unwrap().is_ok());
        let first = receive();
        assert!(futures::poll!(stream.frame()).is_pending());
        drop(first);
        assert!(stream.frame().await.unwrap().is_ok());
        let _second = receive();
        assert!(stream.frame().await.is_none());
        let (mut other, _arrivals) = counted(&room, body(), PATIENCE);
        let start = tokio::time::Instant::now();
        let refused = other.frame().await.unwrap().unwrap_err();
        assert_eq!((refused.code(), Some(start.elapsed())), (tonic::Code::ResourceExhausted, PATIENCE));
    }
}
