//! The HTTP edge: the remote reward clients that trainers bring call it as they are.
//!
//! A call passes the [`layers`](crate::edge::layers) as gRPC's do and ends in its handler: here JSON becomes
//! the message of the contract, and what comes back becomes JSON. `unirl` and `flow_factory` hold a framework's form
//! each, and `response` says a gRPC status as HTTP does.

mod flow_factory;
mod json;
mod response;
mod unirl;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body as AxumBody;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Json;
use axum::routing::{get, post};
use bytes::{Bytes, BytesMut};
use http::{Extensions, HeaderMap, Request, Response};
use http_body::Body as _;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use memchr::memchr2;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::sync::watch;
use tonic::Status;
use tonic::body::Body;
use tonic::metadata::MetadataMap;
use tower::ServiceExt;
use tower::util::MapResponse;

use crate::edge::grpc::{Handlers, Patience, claim, of_sender};
use crate::edge::layers::method;
use crate::edge::proto;
use crate::edge::proto::spatial_score_service_server::SpatialScoreService;
use crate::engine::{Engine, Model};
use crate::error::{ScoreError, brief, quoted};
use crate::request_context::{Claim, Priority};

pub use response::translate;
use response::{Refused, too_large, wrong_method};

/// The most values that a body may have for each item that a request may have, and for one more. They take up to fifty times
/// as much memory as their text.
const MOST_VALUES: usize = 64;

/// Says how urgent a call is; so does a path that begins with `/evaluation`, for clients that have nothing but a URL.
const PRIORITY: &str = "x-spatialscore-priority";

/// What a handler gives.
type Reply<T> = Result<Json<T>, Refused>;

/// What the handlers need.
#[derive(Clone)]
struct Edge {
    handlers: Handlers,
    serving: watch::Receiver<bool>,
    /// Bytes of a body.
    most: usize,
    patience: Patience,
}

/// The services of the HTTP port, as a layer of ours takes them.
pub type Routes = MapResponse<Router, fn(Response<AxumBody>) -> Response<Body>>;

/// The paths of trainers' clients, whose bodies have at most `most` bytes. `serving` is what health is told. Calls wait
/// in line for `patience`: no client of these waits by itself for as long as it is told.
pub fn routes(handlers: Handlers, serving: watch::Receiver<bool>, most: usize, patience: Duration) -> Routes {
    let patience = Patience(patience);
    let elsewhere = async || {
        Refused::from(Status::not_found("there are POST /score and /compute, GET /health and /rewards"))
    };
    let router = Router::new()
        .route(method::HEALTH, get(health))
        .route(method::REWARDS, get(unirl::rewards))
        .route(method::SCORE, post(unirl::score))
        .route(method::COMPUTE, post(flow_factory::compute))
        .fallback(elsewhere)
        .method_not_allowed_fallback(wrong_method)
        .with_state(Edge { handlers, serving, most, patience });
    ServiceExt::<Request<Body>>::map_response(router, |response| response.map(Body::new))
}

/// For both frameworks: UniRL reads the rewards in it, Flow-Factory its status alone.
async fn health(State(edge): State<Edge>) -> (StatusCode, Json<Value>) {
    let engine = edge.handlers.engine();
    let fault = engine.as_ref().map_or_else(|error| Some(error.clone()), |engine| engine.models().fault());
    let engine = engine.ok().filter(|_| *edge.serving.borrow());
    match engine.and_then(|engine| Served::of(&engine, None).ok()) {
        Some(served) => {
            let rewards = served.rewards().into_iter().map(|reward| (reward, ["spatialscore:ready"]));
            let rewards: BTreeMap<_, _> = rewards.collect();
            (StatusCode::OK, Json(json!({"status": "ok", "rewards": rewards})))
        }
        None => {
            let why = brief(fault.map_or_else(|| "no worker is up".to_owned(), |fault| fault.to_string()));
            let said = json!({"status": "not serving", "reason": why, "rewards": {}});
            (StatusCode::SERVICE_UNAVAILABLE, Json(said))
        }
    }
}

/// The model that a path names. Stands in the extensions of a request.
#[derive(Debug, Clone)]
struct ModelOfPath(String);

/// What a call finds served.
struct Served {
    all: Vec<Arc<Model>>,
    /// The one that the path names, else the default one.
    own: Arc<Model>,
}

impl Served {
    fn of(engine: &Engine, path: Option<&ModelOfPath>) -> Result<Self, ScoreError> {
        let (own, _) = engine.models().one(path.map_or("", |ModelOfPath(name)| name))?;
        Ok(Self { all: engine.models().all().into_iter().map(|(model, _)| model).collect(), own })
    }
}

impl Edge {
    /// Reads a call's body, and makes of it what `work` does, on the threads that admit items. Says too whose call it is,
    /// and how urgent.
    async fn read<T, W>(
        &self,
        request: Request<AxumBody>,
        work: impl FnOnce(T, &Served) -> Result<W, Status> + Send + 'static,
    ) -> Result<(W, Call), Refused>
    where
        T: DeserializeOwned,
        W: Send + 'static,
    {
        let (parts, body) = request.into_parts();
        let priority = priority(&parts.headers, parts.extensions.get())?;
        let body = whole(body, self.most).await?;
        let engine = self.handlers.engine()?;
        let claim = Claim { priority, ..claim(&parts.extensions) };
        let (bytes, served) = (body.len(), Served::of(&engine, parts.extensions.get())?);
        let most_values = MOST_VALUES * (1 + engine.limits().max_items_per_request);
        let work = move || {
            if has_more_values(&body, most_values) {
                return Err(ScoreError::invalid("body", format!("it has more than {most_values} values")));
            }
            let read = json::read(&body).map_err(|fault| ScoreError::invalid("body", fault));
            read.map(|message| work(message, &served))
        };
        let work = engine.unpack(&claim, bytes, work).await??;
        Ok((work, Call { priority, extensions: parts.extensions }))
    }

    /// Scores items as a `Score` call does, with models of these names and revisions: a result of each for each item, in
    /// their order.
    async fn score(
        &self,
        items: Vec<proto::ScoreItem>,
        models: &[Judge],
        call: &Call,
    ) -> Result<Vec<Vec<Result<proto::Score, String>>>, Refused> {
        // A rank that has nothing this time asks all the same.
        if items.is_empty() {
            return Ok(Vec::new());
        }
        let mut extensions = call.extensions.clone();
        extensions.insert(self.patience);
        let priority = match call.priority {
            Priority::Training => proto::Priority::Training,
            Priority::Evaluation => proto::Priority::Evaluation,
        };
        let message = proto::ScoreRequest {
            items,
            priority: priority.into(),
            models: models.iter().map(|judge| judge.name.clone()).collect(),
            wants_receipts: true,
            ..Default::default()
        };
        let request = tonic::Request::from_parts(MetadataMap::new(), extensions, message);
        let proto::ScoreResponse { results, receipts, .. } = self.handlers.score(request).await?.into_inner();
        // What it said of the judges must be true of those who judged.
        if receipts.iter().map(|receipt| &receipt.revision).ne(models.iter().map(|judge| &judge.revision)) {
            return Err(ScoreError::Unavailable("a model was replaced while the call ran: try again").into());
        }
        Ok(results.into_iter().map(outcomes).collect())
    }
}

/// A model that is to judge, as it was when the call was read.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Judge {
    name: String,
    revision: String,
}

impl Judge {
    fn of(model: &Model) -> Self {
        Self { name: model.info.name.clone(), revision: model.info.revision.clone() }
    }
}

/// Whose a call is, and how urgent.
struct Call {
    priority: Priority,
    /// What the layers have said of it.
    extensions: Extensions,
}

/// How urgent a call is: by the beginning of its `path`, or by its header. Where they say different things, neither is
/// believed.
fn priority(headers: &HeaderMap, path: Option<&Priority>) -> Result<Priority, ScoreError> {
    let Some(value) = headers.get(PRIORITY) else { return Ok(path.copied().unwrap_or_default()) };
    let named = |priority: &Priority| priority.name().as_bytes() == value.as_bytes();
    match Priority::ALL.into_iter().find(named) {
        Some(priority) if path.is_none_or(|&path| path == priority) => Ok(priority),
        Some(_) => Err(ScoreError::invalid(PRIORITY, "is not what the path says; leave one of them out")),
        None => {
            let value = quoted(&String::from_utf8_lossy(value.as_bytes()));
            Err(ScoreError::invalid(PRIORITY, format!("is {value}; there are training and evaluation")))
        }
    }
}

/// An item's scores, one for each model, or why it has none.
fn outcomes(result: proto::ScoreResult) -> Vec<Result<proto::Score, String>> {
    use proto::model_outcome::Outcome as Of;
    use proto::score_result::Outcome;
    let none = || Err("this item has no result".into());
    if result.outcomes.is_empty() {
        return vec![match result.outcome {
            Some(Outcome::Score(score)) => Ok(score),
            Some(Outcome::Error(error)) => Err(error.message),
            None => none(),
        }];
    }
    let outcome = |outcome: proto::ModelOutcome| match outcome.outcome {
        Some(Of::Score(score)) => Ok(score),
        Some(Of::Error(error)) => Err(error.message),
        None => none(),
    };
    result.outcomes.into_iter().map(outcome).collect()
}

/// An item of a prompt and a picture's file.
fn item(prompt: String, file: Bytes) -> proto::ScoreItem {
    let source = Some(proto::image::Source::Encoded(file));
    proto::ScoreItem { prompt: Some(prompt), image: Some(proto::Image { source }), ..Default::default() }
}

/// Whether a text of JSON has more than so many values. Before each stands a comma or a bracket.
fn has_more_values(text: &[u8], most: usize) -> bool {
    let (mut rest, mut values) = (text, 0);
    while let Some((&byte, behind)) = rest.split_first() {
        rest = behind;
        match byte {
            b',' | b'[' | b'{' => values += 1,
            b'"' => {
                // To the end of the string, which no escaped quote is.
                loop {
                    let Some(at) = memchr2(b'"', b'\\', rest) else { return false };
                    let escaped = rest.get(at) == Some(&b'\\');
                    rest = rest.get(at + 1 + usize::from(escaped)..).unwrap_or_default();
                    if !escaped {
                        break;
                    }
                }
            }
            _ => {}
        }
        if values > most {
            return true;
        }
    }
    false
}

/// The whole of a body that has at most `most` bytes. One that announces more is not read at all.
async fn whole(body: AxumBody, most: usize) -> Result<Bytes, Refused> {
    if body.size_hint().lower() > most as u64 {
        return Err(too_large(most));
    }
    let mut bytes = BytesMut::with_capacity(usize::try_from(body.size_hint().lower()).unwrap_or(most));
    let mut body = Limited::new(body, most);
    while let Some(frame) = body.frame().await {
        match frame.map(http_body::Frame::into_data) {
            Ok(Ok(data)) => bytes.extend_from_slice(&data),
            Ok(Err(_trailers)) => {}
            Err(error) if error.is::<LengthLimitError>() => return Err(too_large(most)),
            Err(error) => return Err(of_sender(Status::from_error(error)).into()),
        }
    }
    Ok(bytes.freeze())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_counted_outside_strings() {
        for (text, values) in [
            ("", 0),
            ("7", 0),
            ("[1,2,3]", 3),
            (r#"{"a": [[], {}], "b": null}"#, 6),
            (r#"["[,{", "\",[", "\\", ","]"#, 4),
            (r#"["no end,,,"#, 1),
            (r#"["no end\"#, 1),
        ] {
            assert!(!has_more_values(text.as_bytes(), values), "{text}");
            assert!(values == 0 || has_more_values(text.as_bytes(), values - 1), "{text}");
        }
    }
}
