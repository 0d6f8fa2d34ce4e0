//! A request's body, as the layers let it through: what it has begun must arrive within a time, and what will cost
//! something finds room in the [`ByteBudget`] as it begins, and arrives beside the body.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http_body::{Frame, SizeHint};
use tokio::time::{Sleep, sleep, timeout};
use tonic::body::Body;
use tonic::{Code, Status};

use super::arrivals::{Arrivals, Content, unreadable};
use super::byte_budget::{ByteBudget, Hold};
use super::framing::{Framing, Prefix};
use crate::edge::grpc::status::{of_call, of_sender, status};
use crate::error::ScoreError;
use crate::request_context::Caller;

/// A body whose messages must arrive whole within a time of their first byte.
pub struct MessageBody {
    inner: Body,
    framing: Framing,
    /// Whether there may be any number of messages, with as long a silence between two as the caller likes. Else the body as
    /// a whole is one, which has begun with the call.
    streaming: bool,
    limit: Duration,
    /// Runs while the caller has something to bring.
    timer: Option<Pin<Box<Sleep>>>,
    /// Where messages are counted.
    intake: Option<Intake>,
}

/// Where a body's messages find room, and where they are put.
pub struct Intake {
    budget: Arc<ByteBudget>,
    caller: Caller,
    arrivals: Arrivals,
    /// How long a stream's message may wait for room; `None`: the body has one message, which is refused at once.
    patience: Option<Duration>,
    /// Whether messages may be packed, which the headers say.
    gzip: bool,
    /// What has come and is not part of a message yet.
    rest: Bytes,
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

type Waiting = Pin<Box<dyn Future<Output = Result<Hold, ScoreError>> + Send>>;

/// What tonic gets for each message: an empty one.
const EMPTY: &[u8] = &[0; 5];

impl MessageBody {
    /// Gives `inner` so long for each message.
    pub fn new(inner: Body, streaming: bool, limit: Duration) -> Self {
        Self { inner, framing: Framing::default(), streaming, limit, timer: None, intake: None }
    }

    /// Counts what it brings in `budget`, and puts it into `arrivals`. `gzip` says whether messages may be packed.
    pub fn counted(self, budget: Arc<ByteBudget>, caller: Caller, arrivals: Arrivals, gzip: bool) -> Self {
        let patience = self.streaming.then_some(self.limit);
        let (rest, next) = (Bytes::new(), Next::Prefix);
        let intake = Some(Intake { budget, caller, arrivals, patience, gzip, rest, next });
        Self { intake, ..self }
    }

    /// Says that a message has ended, with `data`. What begins behind it has a time of its own.
    fn message_ended(&mut self, data: Bytes) -> Frame<Bytes> {
        if self.streaming {
            self.timer = None;
        }
        Frame::data(data)
    }

    /// Whether something is missing at the end of what is counted.
    fn lacks(&self) -> bool {
        let takes = |intake: &Intake| !matches!(intake.next, Next::Nothing);
        self.intake.as_ref().is_some_and(takes) && self.framing.within_message()
    }

    /// Says why nothing more is taken.
    fn refuse(&mut self, error: &ScoreError) -> Option<Result<Frame<Bytes>, Status>> {
        if let Some(intake) = &mut self.intake {
            intake.rest.clear();
            intake.next = Next::Nothing;
        }
        Some(Err(of_call(error)))
    }

    /// Waits no longer than the caller may take.
    fn wait(&mut self, context: &mut Context<'_>) -> Poll<Status> {
        if self.streaming && !self.framing.within_message() {
            return Poll::Pending;
        }
        let limit = self.limit;
        let timer = self.timer.get_or_insert_with(|| Box::pin(sleep(limit)));
        timer.as_mut().poll(context).map(|()| status(&ScoreError::SlowMessage(limit), ""))
    }
}

impl http_body::Body for MessageBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        loop {
            if let Some(intake) = &mut this.intake {
                match ready!(intake.go_on(&mut this.framing, context)) {
                    Ok(true) => return Poll::Ready(Some(Ok(this.message_ended(Bytes::from_static(EMPTY))))),
                    Ok(false) => {}
                    Err(error) => return Poll::Ready(this.refuse(&error)),
                }
            }
            let Poll::Ready(frame) = Pin::new(&mut this.inner).poll_frame(context) else {
                return this.wait(context).map(|late| Some(Err(late)));
            };
            // A timer that has run out unseen ran while nobody wanted to read: that time was not the caller's.
            this.timer.take_if(|timer| timer.is_elapsed());
            let data = match frame.map(|frame| frame.map(Frame::into_data)) {
                Some(Ok(Ok(data))) => data,
                Some(Ok(Err(trailers))) => return Poll::Ready(Some(Ok(trailers))),
                Some(Err(left)) => match of_sender(left) {
                    // tonic would take it for the end of a body without a message. The call is dropped next.
                    left if this.intake.is_some() && left.code() == Code::Cancelled => return Poll::Pending,
                    left => return Poll::Ready(Some(Err(left))),
                },
                None if this.lacks() => {
                    return Poll::Ready(this.refuse(&unreadable("the body ends within it")));
                }
                None => return Poll::Ready(None),
            };
            match &mut this.intake {
                Some(intake) => intake.rest = data,
                // A call's body is looked at as a whole.
                None if this.streaming && this.framing.skip(data.clone()) => {
                    return Poll::Ready(Some(Ok(this.message_ended(data))));
                }
                None => return Poll::Ready(Some(Ok(Frame::data(data)))),
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        let rest = self.intake.as_ref().is_some_and(|intake| !intake.rest.is_empty());
        self.inner.is_end_stream() && !rest && !self.lacks()
    }

    fn size_hint(&self) -> SizeHint {
        if self.intake.is_some() { SizeHint::default() } else { self.inner.size_hint() }
    }
}

impl Intake {
    /// Goes on with what is there. Gives whether a message is.
    fn go_on(&mut self, framing: &mut Framing, context: &mut Context<'_>) -> Poll<Result<bool, ScoreError>> {
        loop {
            match &mut self.next {
                Next::Room(waiting, prefix) => {
                    let hold = ready!(waiting.as_mut().poll(context))?;
                    self.next = Next::body(hold, *prefix);
                }
                Next::Body(_, _, body) => {
                    body.extend_from_slice(&framing.part(&mut self.rest));
                    if !framing.within_message() {
                        self.arrive();
                    }
                    return Poll::Ready(Ok(!framing.within_message()));
                }
                _ if self.rest.is_empty() => return Poll::Ready(Ok(false)),
                Next::Nothing => return Poll::Ready(Err(one_too_many())),
                Next::Prefix => {
                    if let Some(prefix) = framing.prefix(&mut self.rest) {
                        self.next = self.begin(prefix)?;
                    }
                }
            }
        }
    }

    /// Finds room for a message that begins, or waits for it.
    fn begin(&self, prefix: Prefix) -> Result<Next, ScoreError> {
        let Prefix { flags, length } = prefix;
        match flags {
            0 => {}
            1 if self.gzip => {}
            1 => return Err(unreadable("it is packed, and grpc-encoding is not gzip")),
            _ => return Err(unreadable(format!("its flags are {flags}; 0 and 1 are known"))),
        }
        let largest = self.budget.largest;
        if length > largest {
            return Err(unreadable(format!("it has {length} bytes; it may have {largest} bytes")));
        }
        match (Hold::new(&self.budget, &self.caller, length), self.patience) {
            (Ok(hold), _) => Ok(Next::body(hold, prefix)),
            (Err(error), None) => Err(error),
            (Err(error), Some(patience)) => {
                let hold = Hold::when_room(Arc::clone(&self.budget), self.caller.clone(), length);
                let waiting = async move { timeout(patience, hold).await.map_err(|_| error) };
                Ok(Next::Room(Box::pin(waiting), prefix))
            }
        }
    }

    /// Hands the message on that is there.
    fn arrive(&mut self) {
        let next = if self.patience.is_some() { Next::Prefix } else { Next::Nothing };
        if let Next::Body(hold, prefix, body) = std::mem::replace(&mut self.next, next) {
            let body = body.freeze();
            let content = if prefix.flags == 0 { Content::Plain(body) } else { Content::Gzip(body) };
            self.arrivals.push(hold, content);
        }
    }
}

impl Next {
    fn body(hold: Hold, prefix: Prefix) -> Self {
        Self::Body(hold, prefix, BytesMut::with_capacity(prefix.length))
    }
}

fn one_too_many() -> ScoreError {
    ScoreError::invalid("message", "there is more than one; a call of this method has one")
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::write::GzEncoder;
    use futures::{StreamExt, stream};
    use http_body_util::{BodyExt, StreamBody};
    use prost::Message;
    use tokio::time::Instant;

    use super::*;
    use crate::edge::proto;
    use crate::edge::proto::image::Source;

    fn caller(name: &str) -> Caller {
        Caller(name.into())
    }

    const LIMIT: Duration = Duration::from_secs(10);

    /// A body whose pieces come after pauses, in seconds.
    fn body(streaming: bool, pieces: Vec<(u64, Vec<u8>)>) -> MessageBody {
        let pieces = stream::iter(pieces).then(|(pause, piece)| async move {
            sleep(Duration::from_secs(pause)).await;
            Ok::<_, Status>(Frame::data(Bytes::from(piece)))
        });
        MessageBody::new(Body::new(StreamBody::new(Box::pin(pieces))), streaming, LIMIT)
    }

    async fn end(mut body: MessageBody) -> (Option<Code>, u64) {
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
        let late = Some(Code::DeadlineExceeded);
        let within = vec![(0, head.clone()), (9, tail.clone())];
        assert_eq!(end(body(false, within.clone())).await, (None, 9));
        // Bytes that drip do not buy time.
        let dripping = vec![(0, head.clone()), (8, vec![7]), (8, vec![7])];
        assert_eq!(end(body(false, dripping.clone())).await, (late, 10));
        assert_eq!(end(body(true, dripping)).await, (late, 10));
        // Silence between messages is a stream's right, and nothing that a single message's call has.
        let pause = vec![(60, head.clone()), (1, tail.clone()), (60, head.clone()), (1, tail.clone())];
        assert_eq!(end(body(true, pause.clone())).await, (None, 122));
        assert_eq!(end(body(false, pause)).await, (late, 10));
        // Each message has its own time, also where what is sent at once never ends with one.
        let busy = [vec![(0, head.clone())], vec![(6, [tail.clone(), head].concat()); 9], vec![(6, tail)]];
        assert_eq!(end(body(true, busy.concat())).await, (None, 60));
    }

    #[tokio::test(start_paused = true)]
    async fn time_in_which_the_server_did_not_read_is_not_the_callers() {
        let mut slow = body(true, vec![(0, vec![0, 0, 0, 0, 2, 7]), (1, vec![7]), (0, vec![0])]);
        assert!(slow.frame().await.unwrap().is_ok());
        // It looks for more, and then for a minute not.
        assert!(futures::poll!(slow.frame()).is_pending());
        sleep(6 * LIMIT).await;
        assert!(slow.frame().await.unwrap().is_ok());
        assert!(slow.frame().await.unwrap().is_ok());
    }

    /// A message of a stream, as its decoder gives it, with a picture of so many bytes.
    fn message(bytes: usize) -> proto::ScoreStreamRequest {
        let source = Some(Source::Encoded(vec![0; bytes].into()));
        let item = Some(proto::ScoreItem { image: Some(proto::Image { source }), ..Default::default() });
        proto::ScoreStreamRequest { item, ..Default::default() }
    }

    fn counted(budget: &Arc<ByteBudget>, inner: Body, streaming: bool) -> (MessageBody, Arrivals) {
        let arrivals = Arrivals::default();
        let body = MessageBody::new(inner, streaming, LIMIT);
        (body.counted(Arc::clone(budget), caller("a"), arrivals.clone(), true), arrivals)
    }

    fn framed(flag: u8, message: &[u8]) -> Vec<u8> {
        [&[flag][..], &(message.len() as u32).to_be_bytes(), message].concat()
    }

    fn whole(bytes: Vec<u8>) -> Body {
        Body::new(http_body_util::Full::from(bytes))
    }

    #[tokio::test]
    async fn a_stream_holds_what_it_has_of_a_message_and_nothing_once_its_picture_is_gone() {
        let budget = ByteBudget::of(1000);
        let held = || budget.held();
        let sent = message(400).encode_to_vec();
        let (pieces, incoming) = futures::channel::mpsc::unbounded();
        let frames = incoming.map(|piece: Vec<u8>| Ok::<_, Status>(Frame::data(Bytes::from(piece))));
        let (mut body, arrivals) = counted(&budget, Body::new(StreamBody::new(frames)), true);
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
            let mut packed = GzEncoder::new(Vec::new(), flate2::Compression::best());
            packed.write_all(message).unwrap();
            framed(1, &packed.finish().unwrap())
        };
        let budget = ByteBudget::of(1000);
        let (mut body, arrivals) = counted(&budget, whole(pack(&message(900).encode_to_vec())), false);
        body.frame().await.unwrap().unwrap();
        assert!(budget.held() < 100);
        let received: proto::ScoreStreamRequest = arrivals.receive(Default::default()).unwrap();
        assert!(budget.held() > 900, "alone it may have all there is");
        drop(received);
        for (bytes, words) in
            [(pack(&[0; 1001]), "more than 1000 bytes"), (framed(1, b"none"), "cannot be read")]
        {
            let (mut body, arrivals) = counted(&budget, whole(bytes), false);
            body.frame().await.unwrap().unwrap();
            let refused = arrivals.receive(proto::ScoreStreamRequest::default()).unwrap_err();
            assert!(refused.to_string().contains(words), "{refused}");
        }
        let other = Hold::new(&budget, &caller("b"), 400).unwrap();
        let (mut body, arrivals) = counted(&budget, whole(pack(&message(900).encode_to_vec())), false);
        body.frame().await.unwrap().unwrap();
        let refused = arrivals.receive(proto::ScoreStreamRequest::default()).unwrap_err();
        assert!(matches!(refused, ScoreError::TooManyBytes { .. }), "{refused}");
        drop((body, arrivals, other));
        assert_eq!(budget.held(), 0);
    }

    /// However it is cut, and whatever is behind it.
    #[tokio::test]
    async fn a_call_has_one_message_and_all_of_it() {
        let budget = ByteBudget::of(100);
        let sent = message(50).encode_to_vec();
        let bytes = framed(0, &sent);
        let body = |bytes: &[u8], size: usize| {
            let pieces: Vec<_> = bytes.chunks(size).map(Bytes::copy_from_slice).collect();
            let frames = stream::iter(pieces).map(|piece| Ok::<_, Status>(Frame::data(piece)));
            counted(&budget, Body::new(StreamBody::new(frames)), false)
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
                assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
            }
        }
        for wrong in [framed(2, &sent), framed(0, &[0; 101]), framed(0, &[0xff; 9])] {
            let (body, arrivals) = counted(&budget, whole(wrong), false);
            let read = body.collect().await.map(|_| arrivals.receive(proto::ScoreStreamRequest::default()));
            assert!(!matches!(read, Ok(Ok(_))));
        }
        assert_eq!(budget.held(), 0);
    }

    /// Two messages in one piece, of which the second finds no room before the first is gone.
    #[tokio::test(start_paused = true)]
    async fn a_stream_waits_between_its_messages_and_a_call_does_not() {
        let sent = framed(0, &message(50).encode_to_vec());
        let body = || whole([&sent[..], &sent].concat());
        let budget = ByteBudget::of(100);
        let taken = Hold::new(&budget, &caller("b"), 60).unwrap();
        let refused = counted(&budget, body(), false).0.frame().await.unwrap().unwrap_err();
        assert_eq!(refused.code(), Code::ResourceExhausted);
        drop(taken);
        let (mut stream, arrivals) = counted(&budget, body(), true);
        let receive = || arrivals.receive(proto::ScoreStreamRequest::default()).unwrap();
        assert!(stream.frame().await.unwrap().is_ok());
        let first = receive();
        assert!(futures::poll!(stream.frame()).is_pending());
        drop(first);
        assert!(stream.frame().await.unwrap().is_ok());
        let _second = receive();
        assert!(stream.frame().await.is_none());
        let (mut other, _arrivals) = counted(&budget, body(), true);
        let start = Instant::now();
        let refused = other.frame().await.unwrap().unwrap_err();
        assert_eq!((refused.code(), start.elapsed()), (Code::ResourceExhausted, LIMIT));
    }
}
