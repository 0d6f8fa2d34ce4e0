//! What scores a log again: checkpoints in this process, or a running server.

use std::path::PathBuf;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tonic::{Code, Request, Status};
use tonic_types::StatusExt;

use super::{Failure, Target};
use crate::cli::connection::{Client, Connection, Unanswered, outcomes};
use crate::config::{Settings, Sources};
use crate::edge::grpc::{Handlers, Stage};
use crate::edge::proto;
use crate::edge::proto::spatial_score_service_server::SpatialScoreService;
use crate::engine::{self, Engine, Lifeline};

/// What a refused call waits where it is not told.
const PAUSE: Duration = Duration::from_secs(1);

/// What scores.
pub(super) enum Judge {
    Local(Box<Local>),
    Remote(Box<Remote>),
}

/// A running server, and what it asks callers to keep.
pub(super) struct Remote {
    client: Client,
    limits: proto::Limits,
}

/// Checkpoints in this process.
pub(super) struct Local {
    handlers: Handlers,
    stage: watch::Sender<Stage>,
    lifeline: Lifeline,
}

/// What judged a call, and what became of each item.
pub(super) type Judged = (String, Vec<Result<proto::Score, String>>);

impl Judge {
    /// Loads the checkpoints of these targets, which are named for that.
    pub fn local(targets: &mut [Target], set: &[(String, String)]) -> Result<Self, Failure> {
        let mut models = Vec::new();
        for (index, target) in targets.iter_mut().enumerate() {
            let name = format!("model-{index}");
            models.push(format!("{name}={}", target.said));
            target.by = name;
        }
        // What was scored before is to be scored again.
        let own = [("cache.max_items", "0"), ("selftest.interval_seconds", "0"), ("metrics.listen", "")];
        let own = own.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let flags = own.into_iter().chain(set.iter().cloned()).collect();
        let settings = Settings::load(&Sources { flags, models, ..Sources::default() });
        let settings = settings.map_err(|faults| Failure::Usage(faults.to_string()))?;
        let loaded = engine::load_all(&settings).map_err(|error| Failure::Scorer(error.to_string()))?;
        let (engine, lifeline) =
            Engine::start(&settings, loaded).map_err(|error| Failure::Scorer(error.to_string()))?;
        let (stage, watched) = watch::channel(Stage::Serving(engine));
        Ok(Self::Local(Box::new(Local { handlers: Handlers::new(watched), stage, lifeline })))
    }

    /// Reaches a server.
    pub async fn remote(
        server: &str,
        token_file: Option<PathBuf>,
        tls_ca: Option<PathBuf>,
        seconds: u64,
    ) -> Result<Self, Failure> {
        let servers = Connection::to(server, token_file, tls_ca).servers();
        let servers = servers.map_err(|error| Failure::Usage(error.to_string()))?;
        let (client, model) =
            servers.first(seconds).await.map_err(|error| Failure::Scorer(error.to_string()))?;
        Ok(Self::Remote(Box::new(Remote { client, limits: model.limits.unwrap_or_default() })))
    }

    /// The most items of a call and bytes of theirs, where no more than these are wanted.
    pub fn most(&self, items: usize, bytes: usize) -> (usize, usize) {
        match self {
            Self::Local(_) => (items, bytes),
            Self::Remote(remote) => {
                let limits = &remote.limits;
                // Half, for whatever stands around them.
                let most_bytes = usize::try_from(limits.max_message_bytes / 2).unwrap_or(usize::MAX);
                (items.min(limits.max_items_per_request as usize).max(1), bytes.min(most_bytes))
            }
        }
    }

    /// Scores items by a model of this name; again where it is refused for want of room.
    pub async fn score(
        &self,
        model: &str,
        items: Vec<proto::ScoreItem>,
        seconds: u64,
    ) -> Result<Judged, Failure> {
        let message = proto::ScoreRequest {
            items,
            models: vec![model.to_owned()],
            priority: proto::Priority::Evaluation.into(),
            wants_receipts: true,
            ..Default::default()
        };
        let failure = |error: Unanswered| Failure::Scorer(error.to_string());
        let answer = loop {
            let request = Request::new(message.clone());
            let call = async {
                match self {
                    Self::Local(local) => local.handlers.score(request).await,
                    Self::Remote(remote) => remote.client.clone().score(request).await,
                }
            };
            let answer = timeout(Duration::from_secs(seconds), call).await;
            match answer.map_err(|_| failure(Unanswered::Timeout(seconds)))? {
                Ok(answer) => break answer.into_inner(),
                Err(status) if status.code() == Code::ResourceExhausted => sleep(pause(&status)).await,
                Err(status) => return Err(failure(status.into())),
            }
        };
        // A server of before models had names answers by the one that it has, and says nothing of it.
        let receipt = answer.receipts.first().filter(|receipt| receipt.model == model);
        let receipt =
            receipt.ok_or_else(|| Failure::Scorer("the server answered by another model".into()))?;
        let receipt = format!("{}, {}, {}", receipt.revision, receipt.dtype, receipt.server_version);
        let outcome = |result| {
            let none = || Err("the server answered neither a score nor an error".into());
            outcomes(result).pop().unwrap_or_else(none)
        };
        Ok((receipt, answer.results.into_iter().map(outcome).collect()))
    }

    /// Ends what scores in this process.
    pub fn end(self) {
        if let Self::Local(local) = self {
            let Local { stage, lifeline, handlers } = *local;
            stage.send_replace(Stage::Draining);
            drop((stage, handlers));
            lifeline.join();
        }
    }
}

fn pause(status: &Status) -> Duration {
    status.get_details_retry_info().and_then(|info| info.retry_delay).unwrap_or(PAUSE)
}
