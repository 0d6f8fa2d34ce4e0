//! The HTTP edge: the remote reward clients that trainers bring call it as they are.
//!
//! A call passes the [`layers`](crate::edge::layers) as gRPC's do and ends in its handler: here JSON becomes
//! the message of the contract, and what comes back becomes JSON. `unirl` and `flow_factory` hold a framework's form
//! each, `v1` our own, `page` is what people look with, and `response` says a gRPC status as HTTP does.

mod flow_factory;
mod json;
mod page;
mod response;
mod unirl;
mod v1;

use std::collections::BTreeMap;
use std::sync::Arc;

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
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::sync::watch;
use tonic::body::Body;
use tonic::metadata::MetadataMap;
use tonic::{Code, Status};
use tower::ServiceExt;
use tower::util::MapResponse;

use crate::config::Settings;
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
    /// The most cells of an explanation's map.
    explain_cells: usize,
}

/// The services of the HTTP port, as a layer of ours takes them.
pub type Routes = MapResponse<Router, fn(Response<AxumBody>) -> Response<Body>>;

/// The paths of the HTTP port. `serving` is what health is told. Calls wait in line for a while: no trainer's client waits
/// by itself for as long as it is told.
pub fn routes(handlers: Handlers, serving: watch::Receiver<bool>, settings: &Settings) -> Routes {
    let patience = Patience(settings.http_patience);
    let most = settings.limits.max_message_bytes;
    let elsewhere = async || {
        let there = "there are POST /score, /compute, /v1/score and /v1/explain, GET /health, /rewards, /v1/models, \
                     /v1/recent and /v1/openapi.json";
        Refused::from(Status::not_found(there))
    };
    let router = Router::new()
        .route(method::HEALTH, get(health))
        .route(method::REWARDS, get(unirl::rewards))
        .route(method::SCORE, post(unirl::score))
        .route(method::COMPUTE, post(flow_factory::compute))
        .route(method::V1_MODELS, get(v1::models))
        .route(method::V1_SCORE, post(v1::score))
        .route(method::V1_EXPLAIN, post(v1::explain))
        .route(method::V1_RECENT, get(v1::recent))
        .route(method::V1_OPENAPI, get(v1::openapi));
    let router = if settings.http_page {
        router.route(method::PAGE, get(page::page)).route("/page/{*part}", get(page::part))
    } else {
        router
    };
    let router = router.fallback(elsewhere).method_not_allowed_fallback(wrong_method).with_state(Edge {
        handlers,
        serving,
        most,
        patience,
        explain_cells: settings.http_explain_cells,
    });
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
    /// Reads a call's body of JSON, and makes of it what `work` does. Says too whose call it is, and how urgent.
    async fn read<T, W>(
        &self,
        request: Request<AxumBody>,
        work: impl FnOnce(T, &Served) -> Result<W, Status> + Send + 'static,
    ) -> Result<(W, Call), Refused>
    where
        T: DeserializeOwned,
        W: Send + 'static,
    {
        self.read_as(request, |body, most_values| json::message(&body, most_values), work).await
    }

    /// The same of a body in the form that `parse` reads, which is told how many values it may have. All of it is done on
    /// the threads that admit items.
    async fn read_as<T, W: Send + 'static>(
        &self,
        request: Request<AxumBody>,
        parse: impl FnOnce(Bytes, usize) -> Result<T, ScoreError> + Send + 'static,
        work: impl FnOnce(T, &Served) -> Result<W, Status> + Send + 'static,
    ) -> Result<(W, Call), Refused> {
        let (parts, body) = request.into_parts();
        let priority = priority(&parts.headers, parts.extensions.get())?;
        let body = whole(body, self.most).await?;
        let engine = self.handlers.engine()?;
        let claim = Claim { priority, ..claim(&parts.extensions) };
        let (bytes, served) = (body.len(), Served::of(&engine, parts.extensions.get())?);
        let most_values = MOST_VALUES * (1 + engine.limits().max_items_per_request);
        let work = move || parse(body, most_values).map(|message| work(message, &served));
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
        let names = models.iter().map(|judge| judge.name.clone()).collect();
        let message = proto::ScoreRequest { items, models: names, ..Default::default() };
        let proto::ScoreResponse { results, receipts, .. } = self.ask(message, call).await?;
        // What it said of the judges must be true of those who judged.
        if receipts.iter().map(|receipt| &receipt.revision).ne(models.iter().map(|judge| &judge.revision)) {
            return Err(ScoreError::Unavailable("a model was replaced while the call ran: try again").into());
        }
        let in_words = |outcome: Outcome| outcome.map_err(|error| error.message);
        Ok(results.into_iter().map(|result| outcomes(result).into_iter().map(in_words).collect()).collect())
    }

    /// Makes a `Score` call, with receipts.
    async fn ask(&self, message: proto::ScoreRequest, call: &Call) -> Result<proto::ScoreResponse, Refused> {
        let mut extensions = call.extensions.clone();
        extensions.insert(self.patience);
        let priority = match call.priority {
            Priority::Training => proto::Priority::Training,
            Priority::Evaluation => proto::Priority::Evaluation,
        };
        let message = proto::ScoreRequest { priority: priority.into(), wants_receipts: true, ..message };
        let request = tonic::Request::from_parts(MetadataMap::new(), extensions, message);
        Ok(self.handlers.score(request).await?.into_inner())
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

/// What a model made of an item.
type Outcome = Result<proto::Score, tonic_types::Status>;

/// An item's scores, one for each model, or why it has none.
fn outcomes(result: proto::ScoreResult) -> Vec<Outcome> {
    use proto::model_outcome::Outcome as Of;
    use proto::score_result::Outcome;
    let none = || {
        let message = "this item has no result".to_owned();
        Err(tonic_types::Status { code: Code::Internal.into(), message, details: Vec::new() })
    };
    if result.outcomes.is_empty() {
        return vec![match result.outcome {
            Some(Outcome::Score(score)) => Ok(score),
            Some(Outcome::Error(error)) => Err(error),
            None => none(),
        }];
    }
    let outcome = |outcome: proto::ModelOutcome| match outcome.outcome {
        Some(Of::Score(score)) => Ok(score),
        Some(Of::Error(error)) => Err(error),
        None => none(),
    };
    result.outcomes.into_iter().map(outcome).collect()
}

/// An item of a prompt and a picture's file.
fn item(prompt: String, file: Bytes) -> proto::ScoreItem {
    let source = Some(proto::image::Source::Encoded(file));
    proto::ScoreItem { prompt: Some(prompt), image: Some(proto::Image { source }), ..Default::default() }
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
