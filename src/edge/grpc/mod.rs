//! The gRPC edge: the contract of `spatialscore.proto` on one side, the [`Engine`] on the other.
//!
//! A call that passed the [`layers`](crate::edge::layers) ends in its handler here, which turns messages to work with
//! `convert`, hands it to the engine, and turns what comes back to messages; errors become statuses by the one table in
//! [`status`](mod@status).

mod admin;
mod convert;
mod grpc_only;
mod health;
pub mod status;

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use futures::{FutureExt, Stream, StreamExt, stream};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinError;
use tokio::time::sleep;
use tokio_util::task::AbortOnDropHandle;
use tonic::{Extensions, Request, Response, Status, Streaming};
use tracing::{Instrument, Span};

use crate::edge::proto;
use crate::edge::proto::spatial_score_service_server::SpatialScoreService;
use crate::engine::{Admitted, Answers, Engine, Model};
use crate::error::{ScoreError, brief};
use crate::request_context::{Caller, Claim, Priority};
use crate::scheduler::Permit;

pub use admin::Admin;
pub use convert::item as work_item;
pub use grpc_only::grpc_only;
pub use health::Health;
pub use status::{label as code_name, of_call, of_sender, status};

use crate::edge::layers::arrivals::Arrivals;
use crate::edge::layers::call::Deadline;

/// Where the server is in its life.
#[derive(Clone)]
pub enum Stage {
    /// The model is not there yet.
    Loading,
    /// Calls are taken.
    Serving(Arc<Engine>),
    /// What was accepted is being answered; nothing more is taken.
    Draining,
}

/// The handlers of the service.
#[derive(Clone)]
pub struct Handlers {
    stage: watch::Receiver<Stage>,
}

impl Handlers {
    /// Handlers that serve in the stage that `stage` says.
    pub fn new(stage: watch::Receiver<Stage>) -> Self {
        Self { stage }
    }

    /// What stands behind them.
    ///
    /// # Errors
    /// The model is not there yet, or nothing more is taken.
    pub fn engine(&self) -> Result<Arc<Engine>, ScoreError> {
        match &*self.stage.borrow() {
            Stage::Loading => Err(ScoreError::Unavailable("the model is loading")),
            Stage::Serving(engine) => Ok(Arc::clone(engine)),
            Stage::Draining => Err(ScoreError::Unavailable(DRAINING)),
        }
    }

    /// Reserves places for items of these costs, and waits for them as long as the call has patience.
    async fn reserve(
        &self,
        engine: &Engine,
        claim: &Claim,
        costs: &[usize],
        patience: Option<Patience>,
    ) -> Result<Vec<Permit>, ScoreError> {
        let queue = engine.queue();
        let Some(Patience(patience)) = patience else { return queue.reserve(claim, costs) };
        tokio::select! {
            biased;
            permits = queue.reserve_when_room(claim, costs) => permits,
            () = self.draining() => Err(ScoreError::Unavailable(DRAINING)),
            // Where there is none even now, this says when there should be.
            () = sleep(patience) => queue.reserve(claim, costs),
        }
    }

    /// Waits until nothing more is taken.
    pub async fn draining(&self) {
        let _ = self.stage.clone().wait_for(|stage| matches!(stage, Stage::Draining)).await;
    }
}

/// How long a call waits in line where the queue is full, before it is refused. Stands in the extensions of a request; one
/// without is refused at once, by a server whose callers know when to come back.
#[derive(Debug, Clone, Copy)]
pub struct Patience(pub Duration);

/// Stands in the extensions of a call whose items the server made up to explain another.
#[derive(Debug, Clone, Copy)]
pub struct MadeUp;

/// What callers are told while the server answers what it had accepted.
const DRAINING: &str = "the server is shutting down";

#[tonic::async_trait]
impl SpatialScoreService for Handlers {
    async fn score(
        &self,
        request: Request<proto::ScoreRequest>,
    ) -> Result<Response<proto::ScoreResponse>, Status> {
        let claim = claim(request.extensions());
        let engine = self.engine().map_err(|error| of_call(&error))?;
        let (arrivals, patience) = (arrivals(&request), request.extensions().get::<Patience>().copied());
        let request = arrivals.receive(request.into_inner()).map_err(|error| of_call(&error))?;
        // Who is replaced from now on still answers the whole of it.
        let models = engine.models().ready(&request.models).await.map_err(|error| of_call(&error))?;
        if models.iter().all(|model| model.terms.named) {
            let names: Vec<&str> = models.iter().map(|model| model.info.name.as_str()).collect();
            Span::current().record("models", names.join(","));
        }
        let wants_receipts = request.wants_receipts;
        let answers = score_batch(self, &engine, &models, request, claim, patience)
            .await
            .map_err(|error| of_call(&error))?;
        let place = |index| format!("items[{index}].");
        Ok(Response::new(proto::ScoreResponse {
            timings: Some(convert::timings(answers.iter().flatten().flatten())),
            results: answers
                .iter()
                .enumerate()
                .map(|(index, answers)| convert::result(&models, answers, &place(index)))
                .collect(),
            receipts: convert::receipts(&models, wants_receipts),
        }))
    }

    type ScoreStreamStream = Pin<Box<dyn Stream<Item = Result<proto::ScoreStreamResponse, Status>> + Send>>;

    async fn score_stream(
        &self,
        request: Request<Streaming<proto::ScoreStreamRequest>>,
    ) -> Result<Response<Self::ScoreStreamStream>, Status> {
        let claim = claim(request.extensions());
        let engine = self.engine().map_err(|error| of_call(&error))?;
        let arrivals = arrivals(&request);
        let (items, end) = read(request.into_inner(), arrivals, self.stage.clone());
        let most = engine.limits().max_stream_items;
        let answers = items
            // One after the other: while one waits for room in the queue, nothing more is read.
            .then({
                let engine = Arc::clone(&engine);
                move |message| admit_streamed(Arc::clone(&engine), message, claim.clone())
            })
            .map(move |streamed| answer_streamed(Arc::clone(&engine), streamed))
            .buffer_unordered(most)
            .map(Ok);
        // Why reading ended is told after everything that was read is answered.
        let end = end.into_stream().filter_map(async |end| end.ok().map(Err));
        Ok(Response::new(Box::pin(answers.chain(end))))
    }

    async fn get_model(
        &self,
        request: Request<proto::GetModelRequest>,
    ) -> Result<Response<proto::GetModelResponse>, Status> {
        let engine = self.engine().map_err(|error| of_call(&error))?;
        let request = arrivals(&request).receive(request.into_inner()).map_err(|error| of_call(&error))?;
        let (model, state) = engine.models().one(&request.name).map_err(|error| of_call(&error))?;
        Ok(Response::new(convert::model(&model, &state, engine.limits())))
    }

    async fn list_models(
        &self,
        request: Request<proto::ListModelsRequest>,
    ) -> Result<Response<proto::ListModelsResponse>, Status> {
        let engine = self.engine().map_err(|error| of_call(&error))?;
        arrivals(&request).receive(request.into_inner()).map_err(|error| of_call(&error))?;
        let models = engine.models().all();
        let models = models.iter().map(|(model, state)| convert::model(model, state, engine.limits()));
        let models = models.collect();
        Ok(Response::new(proto::ListModelsResponse { models }))
    }
}

/// Scores a request's items with these models. The outer error concerns the whole call, the inner ones an item and a model
/// each.
async fn score_batch(
    handlers: &Handlers,
    engine: &Engine,
    models: &[Arc<Model>],
    request: proto::ScoreRequest,
    claim: Claim,
    patience: Option<Patience>,
) -> Result<Vec<Answers>, ScoreError> {
    let most = engine.limits().max_items_per_request;
    match request.items.len() {
        0 => return Err(ScoreError::invalid("items", format!("is empty; send 1 to {most}"))),
        count if count > most => {
            return Err(ScoreError::invalid("items", format!("has {count} items; send 1 to {most}")));
        }
        _ => {}
    }
    let claim = Claim { priority: priority(request.priority)?, ..claim };
    if patience.is_none() {
        engine.expect_room(&claim, models, request.items.len())?;
    }
    let prompt = request.prompt.map(Arc::from);
    let admitted = join_all(request.items.into_iter().map(|item| async {
        let admitted = match convert::item(item, prompt.as_ref()) {
            Ok(item) => engine.admit(models, item, &claim).await,
            Err(error) => Err(error),
        };
        admitted.unwrap_or_else(|error| engine.refuse(models, &error, &claim))
    }))
    .await;

    // All that can be scored get their places together, or none does: a group is never half scored.
    let costs: Vec<usize> = admitted.iter().flat_map(Admitted::costs).collect();
    let mut permits = handlers.reserve(engine, &claim, &costs, patience).await?.into_iter();
    let scores = admitted.into_iter().map(|item| {
        let places: Vec<Permit> = permits.by_ref().take(item.costs().count()).collect();
        engine.score(item, places, &claim)
    });
    let answers = join_all(scores).await;
    let mut errors = answers.iter().flatten().filter_map(|answer| answer.as_ref().err());
    match errors.find(|error| status::concerns_call(error)) {
        Some(error) => Err(error.clone()),
        None => Ok(answers),
    }
}

/// The messages of a stream, until the caller ends it, or it breaks, or the server drains. For the last two there
/// is a status to tell once everything that was read is answered.
fn read(
    messages: Streaming<proto::ScoreStreamRequest>,
    arrivals: Arrivals,
    stage: watch::Receiver<Stage>,
) -> (impl Stream<Item = proto::ScoreStreamRequest>, oneshot::Receiver<Status>) {
    let (end, ended) = oneshot::channel();
    let items = stream::unfold(
        (messages, arrivals, stage, end),
        async |(mut messages, arrivals, mut stage, end)| {
            let message = tokio::select! {
                biased;
                _ = stage.wait_for(|stage| matches!(stage, Stage::Draining)) => {
                    Err(of_call(&ScoreError::Unavailable(DRAINING)))
                }
                message = messages.message() => message.map_err(status::of_transport).and_then(|message| {
                    message.map(|message| arrivals.receive(message)).transpose().map_err(|error| of_call(&error))
                }),
            };
            match message {
                Ok(Some(message)) => Some((message, (messages, arrivals, stage, end))),
                Ok(None) => None,
                Err(status) => {
                    let _ = end.send(status);
                    None
                }
            }
        },
    );
    (items, ended)
}

/// A stream's item on its way to its answer.
struct Streamed {
    id: String,
    models: Vec<Arc<Model>>,
    wants_receipts: bool,
    placed: Result<Placed, ScoreError>,
}

/// A stream's item that has its places in the queue.
struct Placed {
    item: Admitted,
    permits: Vec<Permit>,
    claim: Claim,
}

/// Finds places for a stream's item, and waits where there are none.
async fn admit_streamed(engine: Arc<Engine>, message: proto::ScoreStreamRequest, claim: Claim) -> Streamed {
    let proto::ScoreStreamRequest { id, item, priority: urgency, models, wants_receipts } = message;
    let named = engine.models().ready(&models).await;
    let models = named.as_ref().cloned().unwrap_or_default();
    let placed = async {
        named?;
        let claim = Claim { priority: priority(urgency)?, ..claim };
        let item = match convert::stream_item(&id, item) {
            Ok(item) => engine.admit(&models, item, &claim).await?,
            Err(error) => engine.refuse(&models, &error, &claim),
        };
        let costs: Vec<usize> = item.costs().collect();
        let permits = engine.queue().reserve_when_room(&claim, &costs).await?;
        Ok(Placed { item, permits, claim })
    }
    .await;
    // One that is refused for its length is not said again whole.
    Streamed { id: brief(id), models, wants_receipts, placed }
}

/// Scores a stream's item, on a task of its own until the stream ends: nothing asks for the answers of a caller that does
/// not read them, and others may wait for the same item.
fn answer_streamed(
    engine: Arc<Engine>,
    Streamed { id, models, wants_receipts, placed }: Streamed,
) -> impl Future<Output = proto::ScoreStreamResponse> {
    let score = placed.map(|Placed { item, permits, claim }| {
        let score = async move { engine.score(item, permits, &claim).await };
        AbortOnDropHandle::new(tokio::spawn(score.in_current_span()))
    });
    async move {
        let lost = |error: JoinError| ScoreError::Internal(format!("its task was lost: {error}"));
        let answers = match score {
            Ok(score) => score.await.map_err(lost),
            Err(error) => Err(error),
        };
        let answers = answers.unwrap_or_else(|error| vec![Err(error); models.len().max(1)]);
        proto::ScoreStreamResponse {
            id,
            timings: Some(convert::timings(answers.iter().flatten())),
            result: Some(convert::result(&models, &answers, convert::stream_place(&answers))),
            receipts: convert::receipts(&models, wants_receipts),
        }
    }
}

/// Where a call's messages have found room.
fn arrivals<T>(request: &Request<T>) -> Arrivals {
    request.extensions().get().cloned().unwrap_or_default()
}

/// Whose a call is, and until when its answer is wanted.
pub fn claim(extensions: &Extensions) -> Claim {
    let caller = extensions.get::<Caller>().cloned();
    let deadline = extensions.get::<Deadline>().map(|deadline| deadline.0);
    let made_up = extensions.get::<MadeUp>().is_some();
    Claim { caller: caller.unwrap_or_default(), priority: Priority::default(), deadline, made_up }
}

/// How urgent items are. A number that the contract does not have is not taken for another.
fn priority(number: i32) -> Result<Priority, ScoreError> {
    match proto::Priority::try_from(number) {
        Ok(proto::Priority::Unspecified | proto::Priority::Training) => Ok(Priority::Training),
        Ok(proto::Priority::Evaluation) => Ok(Priority::Evaluation),
        Err(_) => {
            let reason = format!("{number} is none; send 1 for training or 2 for evaluation");
            Err(ScoreError::invalid("priority", reason))
        }
    }
}
