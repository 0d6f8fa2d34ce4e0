//! Traces: W3C's `traceparent` of callers, and their export to an OTLP collector.

use std::fmt;
use std::str::FromStr;
use std::time::{Duration, SystemTime};

use http::{HeaderMap, HeaderValue};
use opentelemetry::trace::{
    Span as _, SpanContext, SpanId, TraceContextExt, TraceFlags, TraceId, TraceState, Tracer as _,
    TracerProvider,
};
use opentelemetry::{Context, KeyValue, global};
use opentelemetry_otlp::{ExporterBuildError, SpanExporter, WithExportConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{Sampler, SdkTracerProvider, Tracer};
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt;

use crate::config::TraceSettings;

/// The header of W3C Trace Context.
const TRACEPARENT: &str = "traceparent";
/// How long the last spans may take on their way out.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(5);

/// A place in a trace, as `traceparent` writes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    trace: u128,
    span: u64,
    sampled: bool,
}

impl FromStr for Place {
    type Err = ();

    /// Version 00, and of later ones what they have in common with it.
    fn from_str(text: &str) -> Result<Self, ()> {
        let mut parts = text.split('-');
        let mut hex = |length| {
            let lower = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
            parts.next().filter(|part| part.len() == length && part.bytes().all(lower)).ok_or(())
        };
        let (version, trace, span, flags) = (hex(2)?, hex(32)?, hex(16)?, hex(2)?);
        if version == "ff" || (version == "00" && parts.next().is_some()) {
            return Err(());
        }
        let place = Self {
            trace: u128::from_str_radix(trace, 16).map_err(|_| ())?,
            span: u64::from_str_radix(span, 16).map_err(|_| ())?,
            sampled: u8::from_str_radix(flags, 16).map_err(|_| ())? & 1 == 1,
        };
        if place.trace == 0 || place.span == 0 { Err(()) } else { Ok(place) }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "00-{:032x}-{:016x}-{:02x}", self.trace, self.span, u8::from(self.sampled))
    }
}

impl From<&SpanContext> for Place {
    fn from(context: &SpanContext) -> Self {
        Self {
            trace: u128::from_be_bytes(context.trace_id().to_bytes()),
            span: u64::from_be_bytes(context.span_id().to_bytes()),
            sampled: context.is_sampled(),
        }
    }
}

/// Puts a call's span into the trace that its caller names, or begins one, and gives the `traceparent` to answer with.
/// The trace's id becomes the span's field `trace_id`.
pub fn join(span: &Span, headers: &HeaderMap) -> Option<HeaderValue> {
    let remote = headers.get(TRACEPARENT).and_then(|value| value.to_str().ok()?.parse::<Place>().ok());
    if let Some(Place { trace, span: parent, sampled }) = remote {
        let flags = if sampled { TraceFlags::SAMPLED } else { TraceFlags::default() };
        let (trace, parent) = (TraceId::from(trace), SpanId::from(parent));
        let context = SpanContext::new(trace, parent, flags, true, TraceState::default());
        // Where traces are not exported there is nothing to set it on.
        let _ = span.set_parent(Context::new().with_remote_span_context(context));
    }
    let exported = Place::from(span.context().span().span_context());
    let place = if exported.trace == 0 {
        let (trace, sampled) =
            remote.map_or((rand::random(), false), |remote| (remote.trace, remote.sampled));
        Place { trace, span: rand::random(), sampled }
    } else {
        exported
    };
    span.record("trace_id", format!("{:032x}", place.trace));
    HeaderValue::try_from(place.to_string()).ok()
}

/// Puts [`join`]'s answer among the response's metadata.
pub fn answer(headers: &mut HeaderMap, traceparent: HeaderValue) {
    headers.insert(TRACEPARENT, traceparent);
}

/// Has the current call's span show how long an item was in each of the rooms behind the service, which it has just
/// left: a span for each, in their order.
pub fn rooms(times: [(&'static str, Duration); 3]) {
    let call = Span::current().context();
    if !call.span().span_context().is_sampled() {
        return;
    }
    let tracer = global::tracer(env!("CARGO_PKG_NAME"));
    let mut end = SystemTime::now();
    for (room, time) in times.into_iter().rev() {
        let start = end.checked_sub(time).unwrap_or(end);
        let span = tracer.span_builder(room).with_start_time(start);
        span.start_with_context(&tracer, &call).end_with_timestamp(end);
        end = start;
    }
}

/// What exports the spans of this process. Ending it sends the last of them.
#[derive(Debug)]
pub struct Export(SdkTracerProvider);

impl Export {
    /// Exports to the collector of the settings, if they name one. Needs a tokio runtime.
    ///
    /// # Errors
    /// The endpoint cannot be used.
    pub fn start(settings: &TraceSettings) -> Result<Option<Self>, ExporterBuildError> {
        let Some(endpoint) = &settings.otlp_endpoint else { return Ok(None) };
        let exporter = SpanExporter::builder().with_tonic().with_endpoint(endpoint).build()?;
        let resource = Resource::builder()
            .with_service_name(env!("CARGO_PKG_NAME"))
            .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")));
        let begun_here = Sampler::TraceIdRatioBased(settings.sample_ratio);
        let provider = SdkTracerProvider::builder()
            .with_batch_exporter(exporter)
            .with_sampler(Sampler::ParentBased(Box::new(begun_here)))
            .with_resource(resource.build())
            .build();
        global::set_tracer_provider(provider.clone());
        Ok(Some(Self(provider)))
    }

    /// What makes the spans.
    pub fn tracer(&self) -> Tracer {
        self.0.tracer(env!("CARGO_PKG_NAME"))
    }

    /// Sends what has not been sent. Blocks.
    pub fn end(&self) {
        if let Err(error) = self.0.shutdown_with_timeout(FLUSH_TIMEOUT) {
            tracing::warn!(%error, "the last traces were not exported");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn traceparents_are_read_as_w3c_writes_them() {
        let text = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        let place: Place = text.parse().unwrap();
        assert_eq!((place.span, place.sampled), (0x00f0_67aa_0ba9_02b7, true));
        assert_eq!(place.to_string(), text);
        let later = "cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-02-what-may-come";
        assert!(!later.parse::<Place>().unwrap().sampled);
        for wrong in [
            "",
            "00",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-more",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b-01",
        ] {
            assert_eq!(wrong.parse::<Place>(), Err(()), "{wrong}");
        }
    }

    #[test]
    fn a_callers_trace_goes_on_and_a_missing_one_begins() {
        let answer = |headers: &HeaderMap| -> Place {
            join(&Span::none(), headers).unwrap().to_str().unwrap().parse().unwrap()
        };
        let text = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        let theirs: Place = text.parse().unwrap();
        let ours = answer(&HeaderMap::from_iter([(TRACEPARENT.parse().unwrap(), text.parse().unwrap())]));
        assert_eq!((ours.trace, ours.sampled), (theirs.trace, true));
        assert_ne!(ours.span, theirs.span);
        assert_ne!(answer(&HeaderMap::new()).trace, answer(&HeaderMap::new()).trace);
    }
}
