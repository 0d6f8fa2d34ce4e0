//! What stands behind the service: a model that is up, with its processor, its queue and its workers.

mod pool;

use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot, watch};
use tracing::Span;

use crate::config::{Limits, Settings};
use crate::device::NoDevice;
use crate::error::ScoreError;
use crate::model::checkpoint::{CheckpointError, Output};
use crate::model::{Sample, Scorer};
use crate::processor::{Draft, Picture, Processor};
use crate::scheduler::{Job, Permit, Queue, Scored};
use crate::worker;

use pool::Pool;

/// What is served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelInfo {
    /// The name by which the checkpoint was asked for.
    pub name: String,
    /// `model_type` of its `config.json`.
    pub architecture: String,
    /// The hub's commit or the digest of its files.
    pub revision: String,
    /// The number format of the weights and of the forward.
    pub dtype: String,
    /// Where it runs, one name per worker.
    pub devices: Vec<String>,
    /// What its head gives.
    pub output: Output,
    /// What its makers want its callers to know.
    pub notice: String,
}

/// What a loader gives: all that an engine is made of.
pub struct Loaded<S> {
    /// What is served.
    pub info: ModelInfo,
    /// The processor of the checkpoint.
    pub processor: Processor,
    /// What makes the model, on the thread that will own it. One worker for each.
    pub workers: Vec<MakeScorer<S>>,
}

/// Makes a model on the thread that will own it.
pub type MakeScorer<S> = Box<dyn FnOnce() -> Result<S, LoadError> + Send>;

/// Why there is no model to serve.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The checkpoint cannot be served.
    #[error("the checkpoint cannot be served: {0}")]
    Checkpoint(#[from] CheckpointError),
    /// A device is not there.
    #[error(transparent)]
    Device(#[from] NoDevice),
    /// The model was loaded and could not score.
    #[error("the model was loaded, but its first forward failed: {0}")]
    Probe(String),
    /// The system gave no thread.
    #[error("no thread: {0}")]
    Thread(#[from] io::Error),
}

/// A model that is up.
///
/// Calls hold it for as long as they need it; once the last has let go it tells [`Lifeline::released`].
pub struct Engine {
    info: ModelInfo,
    limits: Limits,
    processor: Arc<Processor>,
    pool: Pool,
    queue: Arc<Queue>,
    stopped: watch::Receiver<bool>,
    _alive: mpsc::Sender<Infallible>,
}

/// What the owner of an engine keeps: it outlives the engine and ends it.
#[derive(Debug)]
pub struct Lifeline {
    queue: Arc<Queue>,
    stop: watch::Sender<bool>,
    alive: mpsc::Receiver<Infallible>,
    workers: Vec<JoinHandle<()>>,
}

/// An item whose cost is known.
#[derive(Debug)]
pub struct Admitted {
    draft: Draft,
    took: Duration,
}

impl Admitted {
    /// What the item costs.
    pub fn tokens(&self) -> usize {
        self.draft.tokens()
    }
}

/// An item's score and where its time went.
#[derive(Debug, Clone, Copy)]
pub struct Answer {
    /// The score, with its time in the queue and on the device.
    pub scored: Scored,
    /// Decoding, resizing and tokenising, the wait for a thread included.
    pub preprocess: Duration,
}

impl Engine {
    /// Starts the workers and waits until each has run once. Blocks.
    ///
    /// # Errors
    /// The first worker that did not come up, after the others were ended.
    pub fn start<S>(settings: &Settings, loaded: Loaded<S>) -> Result<(Arc<Self>, Lifeline), LoadError>
    where
        S: Scorer + 'static,
    {
        let pool = Pool::new(settings.processor_threads)?;
        let probe = probe(&loaded.processor)?;
        let queue = Queue::new(settings.queue);
        let (report, reports) = std::sync::mpsc::channel();
        let mut workers = Vec::new();
        let count = loaded.workers.len();
        for (make, device) in loaded.workers.into_iter().zip(&loaded.info.devices) {
            let (probe, report) = (probe.clone(), report.clone());
            let make = move || make().and_then(|scorer| try_once(scorer, &probe));
            // The receiver is gone only if another worker has failed already.
            let started = move |result| drop(report.send(result));
            workers.push(worker::spawn(
                &format!("worker {device}"),
                Arc::clone(&queue),
                settings.batch,
                make,
                started,
            )?);
        }
        drop(report);
        // A worker that ended without a report has dropped its sender, so this ends in any case.
        let up: Result<Vec<()>, LoadError> = reports.iter().take(count).collect();
        let (stop, stopped) = watch::channel(false);
        let (alive_sender, alive) = mpsc::channel(1);
        let lifeline = Lifeline { queue: Arc::clone(&queue), stop, alive, workers };
        if let Err(error) = up.and_then(|up| {
            if up.len() == count { Ok(()) } else { Err(LoadError::Probe("a worker ended".into())) }
        }) {
            lifeline.join();
            return Err(error);
        }
        let engine = Self {
            info: loaded.info,
            limits: settings.limits.clone(),
            processor: Arc::new(loaded.processor),
            pool,
            queue,
            stopped,
            _alive: alive_sender,
        };
        Ok((Arc::new(engine), lifeline))
    }

    /// What is served.
    pub fn info(&self) -> &ModelInfo {
        &self.info
    }

    /// What a caller must keep.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// The queue in which admitted items need a place.
    pub fn queue(&self) -> &Arc<Queue> {
        &self.queue
    }

    /// Checks an item and finds out what it costs, on the pool.
    ///
    /// # Errors
    /// The item can never be scored; or its caller left.
    pub async fn admit(
        &self,
        prompt: Arc<str>,
        picture: Picture,
        deadline: Option<Instant>,
    ) -> Result<Admitted, ScoreError> {
        let start = Instant::now();
        let processor = Arc::clone(&self.processor);
        let draft = self.pool.run(deadline, move || processor.admit(&prompt, picture)).await?;
        Ok(Admitted { draft, took: start.elapsed() })
    }

    /// Prepares an admitted item on the pool, hands it to the workers, and waits for its score.
    ///
    /// Dropping the future cancels the item wherever it is, unless a device computes it already.
    ///
    /// # Errors
    /// Why there is no score.
    pub async fn score(
        &self,
        item: Admitted,
        permit: Permit,
        deadline: Option<Instant>,
    ) -> Result<Answer, ScoreError> {
        let start = Instant::now();
        let processor = Arc::clone(&self.processor);
        let sample = self.pool.run(deadline, move || processor.prepare(item.draft)).await?;
        let preprocess = item.took + start.elapsed();
        let (reply, scored) = oneshot::channel();
        let enqueued = Instant::now();
        self.queue.push(Job { sample, permit, deadline, reply, enqueued, span: Span::current() });
        let mut stopped = self.stopped.clone();
        tokio::select! {
            biased;
            scored = scored => {
                let lost = || ScoreError::Internal("the worker ended without an answer".into());
                let scored = scored.unwrap_or_else(|_| Err(lost()))?;
                Ok(Answer { scored, preprocess })
            }
            _ = stopped.wait_for(|&stopped| stopped) => Err(ScoreError::Unavailable(STOPPED)),
        }
    }
}

/// What an item is told that a stopping server could not score in time.
const STOPPED: &str = "the server stopped before the item could be scored";

impl Lifeline {
    /// Waits until no call needs the engine any more.
    pub async fn released(&mut self) {
        // Nothing is ever sent: this ends when the engine, and with it the last sender, is dropped.
        let _ = self.alive.recv().await;
    }

    /// Answers everything that is not answered yet with [`ScoreError::Unavailable`].
    pub fn abandon(&self) {
        self.queue.close(STOPPED);
        self.queue.fail_waiting(&ScoreError::Unavailable(STOPPED));
        self.stop.send_replace(true);
    }

    /// Ends the workers once the queue is empty and waits for them.
    pub fn join(self) {
        self.queue.close(STOPPED);
        for worker in self.workers {
            if worker.join().is_err() {
                tracing::error!("a worker ended with a panic");
            }
        }
    }
}

/// A small grey picture, through the real processor.
fn probe(processor: &Processor) -> Result<Sample, LoadError> {
    const SIDE: u32 = 64;
    let rgb8 = vec![128; (SIDE * SIDE * 3) as usize].into();
    processor
        .admit("A cup stands to the left of a plate.", Picture::Raw { width: SIDE, height: SIDE, rgb8 })
        .and_then(|draft| processor.prepare(draft))
        .map_err(|error| LoadError::Probe(error.to_string()))
}

/// The scorer, once it has scored.
fn try_once<S: Scorer>(mut scorer: S, probe: &Sample) -> Result<S, LoadError> {
    match scorer.score(&[probe]) {
        Ok(scores) if scores.iter().any(|score| score.mean.is_finite()) => Ok(scorer),
        Ok(_) => Err(LoadError::Probe("its score is not finite".into())),
        Err(error) => Err(LoadError::Probe(error.to_string())),
    }
}
