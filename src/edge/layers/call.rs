//! What is done for every call alike, whatever its method: its deadline, its count, its log line.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use http::{HeaderMap, HeaderValue, Request, Response};
use http_body::{Frame, SizeHint};
use metrics::{counter, histogram};
use tokio::time::{Sleep, sleep_until, timeout_at};
use tonic::body::Body;
use tonic::{Code, Status};
use tower::{Layer, Service};
use tracing::field::Empty;
use tracing::{Instrument, Level, Span};

use super::admission::Place;
use super::method::Method;
use super::peer::OpenCall;
use super::{Answering, CallService};
use crate::edge::grpc::status::{label, level, of_transport, status};
use crate::error::{MOST_TEXT, ScoreError, brief};
use crate::telemetry::trace;
use crate::telemetry::{REQUEST_DURATION, REQUESTS};

/// What the answer needs to be back in time.
const HEAD_START: Duration = Duration::from_millis(2);

/// When a call's caller stops waiting. Stands in the extensions of a request that has a `grpc-timeout`.
#[derive(Debug, Clone, Copy)]
pub struct Deadline(pub Instant);

/// The layer around all services.
#[derive(Debug, Clone, Copy)]
pub struct CallLayer;

impl<S> Layer<S> for CallLayer {
    type Service = Calls<S>;

    fn layer(&self, inner: S) -> Calls<S> {
        Calls { inner }
    }
}

/// A service whose calls have a deadline and are counted and logged.
#[derive(Debug, Clone)]
pub struct Calls<S> {
    inner: S,
}

impl<S: CallService> Service<Request<Body>> for Calls<S> {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Answering;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        let mut call = Call::new(&mut request);
        let deadline = timeout(request.headers())
            .and_then(|timeout| call.start.checked_add(timeout.saturating_sub(HEAD_START)));
        if let Some(deadline) = deadline {
            request.extensions_mut().insert(Deadline(deadline));
        }
        let span = call.span.clone();
        let inner = span.in_scope(|| self.inner.call(request));
        let answer = async move {
            let response = match deadline {
                Some(deadline) => timeout_at(deadline.into(), inner)
                    .await
                    .unwrap_or_else(|_| Ok(status(&ScoreError::DeadlineExceeded, "").into_http()))?,
                None => inner.await?,
            };
            let traceparent = call.traceparent.take();
            let mut response = call.watch(response, deadline);
            if let Some(traceparent) = traceparent {
                trace::answer(response.headers_mut(), traceparent);
            }
            Ok(response)
        };
        Box::pin(answer.instrument(span))
    }
}

/// One call, from its headers to its last byte.
struct Call {
    rpc: &'static str,
    start: Instant,
    span: Span,
    traceparent: Option<HeaderValue>,
    ended: bool,
    /// Given back when the call has ended.
    _on_connection: Option<OpenCall>,
    _of_caller: Option<Place>,
}

impl Call {
    fn new(request: &mut Request<Body>) -> Self {
        let rpc = Method::of(request.uri().path()).label;
        let span = tracing::info_span!(
            "call",
            rpc,
            trace_id = Empty,
            caller = Empty,
            models = Empty,
            code = Empty,
            otel.kind = "server",
            otel.name = rpc,
        );
        let traceparent = trace::join(&span, request.headers());
        let _on_connection = request.extensions_mut().remove();
        Self { rpc, start: Instant::now(), span, traceparent, ended: false, _on_connection, _of_caller: None }
    }

    /// Follows the response to its end.
    fn watch(mut self, mut response: Response<Body>, deadline: Option<Instant>) -> Response<Body> {
        self._of_caller = response.extensions_mut().remove();
        // An error without a body stands in the headers alone.
        if let Some(status) = Status::from_header_map(response.headers()) {
            let ours = of_transport(status);
            self.end(ours.code(), ours.message());
            return ours.into_http();
        }
        let expiry = deadline.map(|deadline| Box::pin(sleep_until(deadline.into())));
        response.map(|inner| Body::new(Watched { inner, expiry, call: self }))
    }

    fn end(&mut self, code: Code, message: &str) {
        if std::mem::replace(&mut self.ended, true) {
            return;
        }
        let took = self.start.elapsed();
        let code_label = label(code);
        counter!(REQUESTS, "rpc" => self.rpc, "code" => code_label).increment(1);
        histogram!(REQUEST_DURATION, "rpc" => self.rpc).record(took);
        self.span.record("code", code_label);
        let _in_call = self.span.enter();
        match level(code) {
            Level::ERROR => tracing::error!(message, ?took, "a call failed"),
            Level::INFO => tracing::info!(message, ?took, "a call got no scores"),
            _ => tracing::debug!(message, ?took, "a call ended"),
        }
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        self.end(Code::Cancelled, "the caller left");
    }
}

/// A body that ends at the deadline, and tells how it ended.
struct Watched {
    inner: Body,
    expiry: Option<Pin<Box<Sleep>>>,
    call: Call,
}

impl http_body::Body for Watched {
    type Data = <Body as http_body::Body>::Data;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Status>>> {
        if self.call.ended {
            return Poll::Ready(None);
        }
        let span = self.call.span.clone();
        let _in_call = span.enter();
        match Pin::new(&mut self.inner).poll_frame(context) {
            Poll::Ready(frame) => {
                match &frame {
                    Some(Ok(frame)) => {
                        if let Some(status) = frame.trailers_ref().and_then(Status::from_header_map) {
                            self.call.end(status.code(), status.message());
                        }
                    }
                    Some(Err(status)) => self.call.end(status.code(), status.message()),
                    None => self.call.end(Code::Ok, ""),
                }
                // HTTP/1.1 asks no more of a body that has brought what it announced.
                if self.inner.is_end_stream() {
                    self.call.end(Code::Ok, "");
                }
                Poll::Ready(frame.map(|frame| frame.map(with_brief_text)))
            }
            Poll::Pending => {
                let expired =
                    self.expiry.as_mut().is_some_and(|sleep| sleep.as_mut().poll(context).is_ready());
                if !expired {
                    return Poll::Pending;
                }
                let late = status(&ScoreError::DeadlineExceeded, "");
                self.call.end(late.code(), late.message());
                // Whatever works for this call is dropped with its body.
                self.inner = Body::empty();
                let mut trailers = HeaderMap::new();
                Poll::Ready(Some(late.add_header(&mut trailers).map(|()| Frame::trailers(trailers))))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.call.ended
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

/// Trailers whose text quotes what a caller sent, as those of reflection do, quote its beginning.
fn with_brief_text<T>(frame: Frame<T>) -> Frame<T> {
    let trailers = match frame.into_trailers() {
        Ok(trailers) => trailers,
        Err(frame) => return frame,
    };
    let status = Status::from_header_map(&trailers).filter(|status| status.message().len() > MOST_TEXT);
    let mut ours = HeaderMap::new();
    let said = status.map(|status| Status::new(status.code(), brief(status.message())).add_header(&mut ours));
    Frame::trailers(if matches!(said, Some(Ok(()))) { ours } else { trailers })
}

/// `grpc-timeout`: at most eight digits and a unit. One that cannot be read counts as none, as tonic has it.
fn timeout(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let number: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(number * 3600)),
        "M" => Some(Duration::from_secs(number * 60)),
        "S" => Some(Duration::from_secs(number)),
        "m" => Some(Duration::from_millis(number)),
        "u" => Some(Duration::from_micros(number)),
        "n" => Some(Duration::from_nanos(number)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Option<Duration> {
        timeout(&HeaderMap::from_iter([("grpc-timeout".parse().ok()?, text.parse().ok()?)]))
    }

    #[test]
    fn timeouts_are_read_as_grpc_writes_them() {
        assert_eq!(read("3S"), Some(Duration::from_secs(3)));
        assert_eq!(read("99999999H"), Some(Duration::from_secs(99_999_999 * 3600)));
        assert_eq!(read("250m"), Some(Duration::from_millis(250)));
        assert_eq!(read("7u"), Some(Duration::from_micros(7)));
        for text in ["", "S", "3", "3s", "-3S", "+3S", "123456789S", "3 S", "3é"] {
            assert_eq!(read(text), None, "{text:?}");
        }
    }
}
