//! Refusals as HTTP says them. The layers and the handlers say them with a gRPC status; this is the last to touch them.

use std::time::{Duration, Instant};

use axum::body::Body as AxumBody;
use axum::response::IntoResponse;
use bytes::Bytes;
use http::{HeaderValue, Request, Response, StatusCode, Uri, header};
use http_body_util::Full;
use hyper::ext::ReasonPhrase;
use serde_json::json;
use tokio::time::sleep;
use tonic::body::Body;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};
use tower::{ServiceExt, service_fn};

use super::ModelOfPath;
use crate::edge::grpc::{Handlers, of_call};
use crate::edge::layers::CallService;
use crate::edge::layers::method::{self, Method};
use crate::error::ScoreError;
use crate::request_context::Priority;

/// The most bytes of a reason phrase.
const MOST_REASON: usize = 200;

/// Why a handler has no answer.
pub(super) struct Refused(Status);

impl Refused {
    /// What it says.
    pub fn status(&self) -> &Status {
        &self.0
    }
}

impl From<Status> for Refused {
    fn from(status: Status) -> Self {
        Self(status)
    }
}

impl From<ScoreError> for Refused {
    fn from(error: ScoreError) -> Self {
        Self(of_call(&error))
    }
}

impl IntoResponse for Refused {
    fn into_response(self) -> Response<AxumBody> {
        self.0.into_http()
    }
}

/// The refusal of a body of more than `most` bytes. gRPC has no code for it, and tonic itself takes this one.
pub(super) fn too_large(most: usize) -> Refused {
    let reason = format!("has more than {most} bytes; send fewer pictures at once");
    let details = ErrorDetails::with_bad_request_violation("body", &reason);
    Refused(Status::with_error_details(Code::OutOfRange, format!("body: {reason}"), details))
}

/// The refusal of a method that a path does not have. gRPC has no code for it.
pub(super) async fn wrong_method(uri: Uri) -> Refused {
    Refused(Status::unimplemented(format!("this path takes {} and no other method", methods(uri.path()))))
}

/// What a path takes.
fn methods(path: &str) -> &'static str {
    if Method::of(path).scoring { "POST" } else { "GET, HEAD" }
}

/// Takes the name of a priority off the beginning of a path, for clients that have nothing but a URL.
fn priority_of_path(uri: &mut Uri) -> Option<Priority> {
    let whole = uri.path_and_query()?.as_str();
    let (priority, rest) = Priority::ALL.into_iter().find_map(|priority| {
        let rest = whole.strip_prefix('/')?.strip_prefix(priority.name())?;
        rest.starts_with('/').then(|| Some((priority, rest.parse().ok()?)))?
    })?;
    let mut parts = uri.clone().into_parts();
    parts.path_and_query = Some(rest);
    *uri = Uri::from_parts(parts).ok()?;
    Some(priority)
}

/// Takes `/models/NAME` off the beginning of a path, for the same clients.
fn model_of_path(uri: &mut Uri) -> Option<ModelOfPath> {
    let (name, rest) = uri.path_and_query()?.as_str().strip_prefix("/models/")?.split_once('/')?;
    let (name, rest) = (name.to_owned(), format!("/{rest}").parse().ok()?);
    let mut parts = uri.clone().into_parts();
    parts.path_and_query = Some(rest);
    *uri = Uri::from_parts(parts).ok()?;
    Some(ModelOfPath(name))
}

/// Calls whose refusals are said as HTTP does, and held back until it makes sense to come again, but no call for longer
/// than `patience` in all: neither UniRL's client nor Flow-Factory's waits by itself for as long as it is told. One that
/// was refused for a full queue has waited there already.
pub fn translate(calls: impl CallService, handlers: Handlers, patience: Duration) -> impl CallService {
    service_fn(move |mut request: Request<Body>| {
        let (calls, handlers) = (calls.clone(), handlers.clone());
        async move {
            if let Some(priority) = priority_of_path(request.uri_mut()) {
                request.extensions_mut().insert(priority);
            }
            if let Some(model) = model_of_path(request.uri_mut()) {
                request.extensions_mut().insert(model);
            }
            let compute = request.uri().path() == method::COMPUTE;
            let methods = methods(request.uri().path());
            let start = Instant::now();
            let response = calls.oneshot(request).await?;
            let Some(status) = Status::from_header_map(response.headers()) else { return Ok(response) };
            let wait = status.get_details_retry_info().and_then(|info| info.retry_delay).unwrap_or_default();
            let held = wait.min(patience.saturating_sub(start.elapsed()));
            tokio::select! {
                () = sleep(held) => {}
                () = handlers.draining(), if !held.is_zero() => {}
            }
            let code = match http_code(status.code()) {
                // Flow-Factory's client reads the reason of this alone.
                StatusCode::BAD_REQUEST if compute => StatusCode::OK,
                code => code,
            };
            let mut refused = refusal(response, &status, code, wait - held);
            if code == StatusCode::METHOD_NOT_ALLOWED {
                refused.headers_mut().insert(header::ALLOW, HeaderValue::from_static(methods));
            }
            Ok(refused)
        }
    })
}

/// The HTTP status of a code, as `google/rpc/code.proto` has it.
fn http_code(code: Code) -> StatusCode {
    match code {
        Code::InvalidArgument => StatusCode::BAD_REQUEST,
        Code::OutOfRange => StatusCode::PAYLOAD_TOO_LARGE,
        Code::Unauthenticated => StatusCode::UNAUTHORIZED,
        Code::NotFound => StatusCode::NOT_FOUND,
        Code::Unimplemented => StatusCode::METHOD_NOT_ALLOWED,
        // For the log of a proxy: who would read it has left.
        Code::Cancelled => StatusCode::from_u16(499).unwrap_or(StatusCode::BAD_REQUEST),
        Code::ResourceExhausted => StatusCode::TOO_MANY_REQUESTS,
        Code::DeadlineExceeded => StatusCode::GATEWAY_TIMEOUT,
        Code::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

/// What `said` with a gRPC status, with an HTTP status and JSON. `wait` is how long the caller should still wait.
fn refusal(said: Response<Body>, status: &Status, code: StatusCode, wait: Duration) -> Response<Body> {
    let (mut parts, _) = said.into_parts();
    // The length is that of the body that a status had not.
    for name in ["grpc-status", "grpc-message", "grpc-status-details-bin", "content-length"] {
        parts.headers.remove(name);
    }
    parts.status = code;
    parts.headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    match code {
        StatusCode::UNAUTHORIZED => {
            parts.headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        // Another connection may lead to another replica.
        StatusCode::SERVICE_UNAVAILABLE => {
            parts.headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        _ => {}
    }
    if !wait.is_zero() {
        parts.headers.insert(header::RETRY_AFTER, HeaderValue::from(wait.as_secs() + 1));
    }
    // All that `requests` puts into its exception: the clients never look into the body.
    let reason: String =
        status.message().chars().filter(|c| matches!(c, ' '..='~')).take(MOST_REASON).collect();
    if let Ok(reason) = ReasonPhrase::try_from(reason)
        && code != StatusCode::OK
    {
        parts.extensions.insert(reason);
    }
    let key = if code == StatusCode::OK { "error" } else { "detail" };
    let body = json!({key: status.message()}).to_string();
    Response::from_parts(parts, Body::new(Full::from(Bytes::from(body))))
}
