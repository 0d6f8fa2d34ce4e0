//! What stands behind the service: a model that is up, with its processor, its queue and its workers.

mod cpu_pool;
mod load;
mod score_cache;
mod self_test;

use std::convert::Infallible;
use std::io;
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use metrics::gauge;
use tokio::sync::{mpsc, oneshot, watch};
use tracing::Span;

use crate::config::{Limits, Settings};
use crate::device::NoDevice;
use crate::error::ScoreError;
use crate::model::checkpoint::CheckpointError;
use crate::model::profile::Output;
use crate::model::{Sample, Score, Scorer};
use crate::processor::{Draft, Item, Processor};
use crate::request_context::Claim;
use crate::scheduler::worker::{self, Post};
use crate::scheduler::{Job, Permit, Queue, Scored};
use crate::telemetry::CONSTANT_SCORES;

pub use load::{Examination, load};
pub use self_test::SelfTest;

use cpu_pool::{Cost, Pool};
use score_cache::{Follow, Key, Lead, Lookup, Results};

/// Bytes of JSON and base64 that are read in about the time that it takes to admit an item.
const ADMISSION_BYTES: usize = 128 << 10;

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
    /// What it gives.
    pub output: Output,
    /// What its reward is read by: the name of the profile that ships, or the file that says it.
    pub profile: String,
    /// How many pictures an item has, the judged one among them.
    pub pictures: usize,
    /// The names of a score's components, where its profile has several passes.
    pub components: Vec<String>,
    /// Whether an item may ask questions of its own.
    pub takes_questions: bool,
    /// What its makers want its callers to know; before it, what the self-test found.
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

/// Makes a model on the thread that will own it; again where that thread was lost.
pub type MakeScorer<S> = Box<dyn Fn() -> Result<S, LoadError> + Send + Sync>;

/// Why there is no model to serve.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The checkpoint cannot be served.
    #[error("the checkpoint cannot be served: {0}")]
    Checkpoint(#[from] CheckpointError),
    /// Several things are wrong.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))]
    Several(Vec<LoadError>),
    /// A device is not there.
    #[error(transparent)]
    Device(#[from] NoDevice),
    /// Not even the smallest item keeps the limits.
    #[error(
        "nothing could ever be scored: the smallest picture with the shortest prompt breaks a limit: {0}"
    )]
    Limits(String),
    /// The model was loaded and could not score.
    #[error("the model was loaded, but its first forward failed: {0}")]
    Probe(String),
    /// All workers were lost, and none could be made anew.
    #[error("no worker has been up for {:.0} s", .0.as_secs_f64())]
    Lost(Duration),
    /// The system gave no thread.
    #[error("no thread: {0}")]
    Thread(#[from] io::Error),
}

impl LoadError {
    /// All that is wrong as one error.
    fn all(mut errors: Vec<Self>) -> Option<Self> {
        if errors.len() > 1 { Some(Self::Several(errors)) } else { errors.pop() }
    }
}

/// A model that is up.
///
/// Calls hold it for as long as they need it; once the last has let go it tells [`Lifeline::released`].
pub struct Engine {
    info: ModelInfo,
    /// The names of a score's components, where the item asks no questions.
    components: Arc<[String]>,
    limits: Limits,
    processor: Arc<Processor>,
    /// Reads headers and tokenises, so that a refusal never waits for another's pixels.
    admission: Pool,
    /// Decodes and resizes.
    preparation: Pool,
    /// The cost in tokens of the cheapest item.
    least_cost: usize,
    results: Arc<Results>,
    /// What a digest begins with: it stands for the model.
    seed: blake3::Hasher,
    queue: Arc<Queue>,
    stopped: watch::Receiver<bool>,
    _alive: mpsc::Sender<Infallible>,
}

/// What the owner of an engine keeps: it outlives the engine and ends it.
#[derive(Debug)]
pub struct Lifeline {
    queue: Arc<Queue>,
    stop: watch::Sender<bool>,
    up: watch::Receiver<usize>,
    alive: mpsc::Receiver<Infallible>,
    workers: Vec<JoinHandle<()>>,
}

/// An item whose cost is known.
#[derive(Debug)]
pub struct Admitted {
    draft: Draft,
    components: Arc<[String]>,
    took: Duration,
}

impl Admitted {
    /// What the item costs.
    pub fn tokens(&self) -> usize {
        self.draft.tokens()
    }
}

/// An item's score and where its time went.
#[derive(Debug, Clone)]
pub struct Answer {
    /// The score, with its time in the queue and on the device.
    pub scored: Scored,
    /// The names of the score's components, in order.
    pub components: Arc<[String]>,
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
        let pool = |name, memory| Pool::new(name, settings.processor_threads, memory);
        let admission = pool("admission", usize::MAX)?;
        let preparation = pool("processor", settings.limits.max_decode_bytes)?;
        let processor = Arc::new(loaded.processor);
        let test = SelfTest::new(&processor).map_err(|error| LoadError::Limits(error.to_string()))?;
        let least_cost = test.cheapest.tokens();
        let remark = Arc::new(OnceLock::new());
        let queue = Queue::new(settings.queue);
        let (up_sender, up) = watch::channel(0);
        let (report, reports) = std::sync::mpsc::channel();
        let mut workers = Vec::new();
        let count = loaded.workers.len();
        for (make, device) in loaded.workers.into_iter().zip(&loaded.info.devices) {
            let (test, remark, report) = (test.clone(), Arc::clone(&remark), report.clone());
            let make = move || {
                let mut scorer = make()?;
                if let Some(found) = test.run(&mut scorer)? {
                    tracing::error!(found, "the self-test at load");
                    remark.get_or_init(|| found);
                }
                Ok(scorer)
            };
            // The receiver is gone only if another worker has failed already.
            let started = move |result| drop(report.send(result));
            let post = Post {
                device: device.clone(),
                queue: Arc::clone(&queue),
                budget: settings.batch,
                up: up_sender.clone(),
            };
            workers.push(worker::spawn(post, make, started)?);
        }
        drop((report, up_sender));
        // A worker that ended without a report has dropped its sender, so this ends in any case.
        let came_up: Result<Vec<()>, LoadError> = reports.iter().take(count).collect();
        let (stop, stopped) = watch::channel(false);
        let (alive_sender, alive) = mpsc::channel(1);
        let lifeline = Lifeline { queue: Arc::clone(&queue), stop, up, alive, workers };
        if let Err(error) = came_up.and_then(|came_up| {
            if came_up.len() == count { Ok(()) } else { Err(LoadError::Probe("a worker ended".into())) }
        }) {
            lifeline.join();
            return Err(error);
        }
        let mut info = loaded.info;
        gauge!(CONSTANT_SCORES).set(if remark.get().is_some() { 1.0 } else { 0.0 });
        if let Some(found) = remark.get() {
            info.notice = [found, info.notice.as_str()].join(" ").trim_end().to_owned();
        }
        let mut seed = blake3::Hasher::new();
        seed.update(info.revision.as_bytes()).update(&[0]);
        let engine = Self {
            components: info.components.iter().cloned().collect(),
            info,
            limits: settings.limits.clone(),
            processor,
            admission,
            preparation,
            least_cost,
            results: Results::new(settings.cache_items),
            seed,
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

    /// Whether so many items might find room: a first look that costs nothing, so that an overloaded server refuses
    /// before it works.
    ///
    /// # Errors
    /// As [`Queue::reserve`].
    pub fn expect_room(&self, claim: &Claim, items: usize) -> Result<(), ScoreError> {
        self.queue.expect_room(claim, items, items * self.least_cost)
    }

    /// Runs `work` on a message of so many bytes from which a caller's items come, with the admission of items and in turn
    /// with it: a long message is nothing for the threads that serve the network.
    ///
    /// # Errors
    /// Those of `work`; or the caller left.
    pub async fn unpack<T: Send + 'static>(
        &self,
        claim: &Claim,
        bytes: usize,
        work: impl FnOnce() -> Result<T, ScoreError> + Send + 'static,
    ) -> Result<T, ScoreError> {
        self.admission.run(claim, Cost { time: 1 + bytes / ADMISSION_BYTES, memory: 0 }, work).await
    }

    /// Checks an item and finds out what it costs, without decoding its picture.
    ///
    /// # Errors
    /// The item can never be scored; or its caller left.
    pub async fn admit(&self, item: Item, claim: &Claim) -> Result<Admitted, ScoreError> {
        let start = Instant::now();
        let processor = Arc::clone(&self.processor);
        // Each question is tokenised with its conversation.
        let cost = Cost { time: item.questions.len().max(1), memory: 0 };
        let components = match item.questions.as_slice() {
            [] => Arc::clone(&self.components),
            questions => questions.iter().map(|question| question.text.clone()).collect(),
        };
        let draft = self.admission.run(claim, cost, move || processor.admit_item(item)).await?;
        Ok(Admitted { draft, components, took: start.elapsed() })
    }

    /// Prepares an admitted item on the pool, hands it to the workers, and waits for its score. An item that is known
    /// or being computed already is not computed again.
    ///
    /// Dropping the future cancels the item wherever it is, unless a device computes it already.
    ///
    /// # Errors
    /// Why there is no score.
    pub async fn score(&self, item: Admitted, permit: Permit, claim: &Claim) -> Result<Answer, ScoreError> {
        let Admitted { mut draft, components, took: mut preprocess } = item;
        let mut key = None;
        loop {
            let start = Instant::now();
            let step = self.prepare(draft, key, claim).await?;
            preprocess += start.elapsed();
            match step {
                Step::Known(score) => {
                    let scored = Scored { score, queue: Duration::ZERO, inference: Duration::ZERO };
                    return Ok(Answer { scored, components, preprocess });
                }
                Step::Lead(sample, lead) => {
                    let outcome = self.forward(sample, permit, claim).await;
                    lead.finish(&outcome);
                    return Ok(Answer { scored: outcome?, components, preprocess });
                }
                Step::Follow(back, its_key, follow) => {
                    if let Some(outcome) = self.unless_stopped(follow.outcome()).await? {
                        return Ok(Answer { scored: outcome?, components, preprocess });
                    }
                    // Who computed it gave up. The place in the queue has been kept for this.
                    (draft, key) = (back, Some(its_key));
                }
            }
        }
    }

    /// Prepares an item on the pool, unless its score is known or another prepares it.
    async fn prepare(&self, draft: Draft, key: Option<Key>, claim: &Claim) -> Result<Step, ScoreError> {
        let (processor, results) = (Arc::clone(&self.processor), Arc::clone(&self.results));
        // The larger a picture, the longer it takes, in about the same measure.
        let memory = draft.memory();
        let cost = Cost { time: memory >> 10, memory };
        let mut hasher = self.seed.clone();
        let work = move || {
            let key = key.unwrap_or_else(|| {
                draft.digest_into(&mut hasher);
                *hasher.finalize().as_bytes()
            });
            match results.look_up(key) {
                Lookup::Known(score) => Ok(Step::Known(score)),
                Lookup::Follow(follow) => Ok(Step::Follow(draft, key, follow)),
                Lookup::Lead(lead) => match processor.prepare(draft) {
                    Ok(sample) => Ok(Step::Lead(sample, lead)),
                    Err(error) => {
                        lead.finish(&Err(error.clone()));
                        Err(error)
                    }
                },
            }
        };
        self.preparation.run(claim, cost, work).await
    }

    /// Hands a sample to the workers and waits for its score.
    async fn forward(&self, sample: Sample, permit: Permit, claim: &Claim) -> Result<Scored, ScoreError> {
        let (reply, scored) = oneshot::channel();
        self.queue.push(Job {
            sample,
            permit: Some(permit),
            claim: claim.clone(),
            reply,
            enqueued: Instant::now(),
            span: Span::current(),
            losses: 0,
        });
        let lost = || Err(ScoreError::Internal("the worker ended without an answer".into()));
        self.unless_stopped(scored).await?.unwrap_or_else(|_| lost())
    }

    /// Waits for `answer`, or until the server stops without it.
    async fn unless_stopped<T>(&self, answer: impl Future<Output = T>) -> Result<T, ScoreError> {
        let mut stopped = self.stopped.clone();
        tokio::select! {
            biased;
            answer = answer => Ok(answer),
            _ = stopped.wait_for(|&stopped| stopped) => Err(ScoreError::Unavailable(STOPPED)),
        }
    }
}

/// What became of an item on the pool.
enum Step {
    /// Its score is known.
    Known(Score),
    /// It is ready for a device.
    Lead(Sample, Lead),
    /// Another computes the same.
    Follow(Draft, Key, Follow),
}

/// What an item is told that a stopping server could not score in time.
const STOPPED: &str = "the server stopped before the item could be scored";

impl Lifeline {
    /// Waits until no call needs the engine any more.
    pub async fn released(&mut self) {
        // Nothing is ever sent: this ends when the engine, and with it the last sender, is dropped.
        let _ = self.alive.recv().await;
    }

    /// How many workers are up, now and from now on.
    pub fn workers_up(&self) -> watch::Receiver<usize> {
        self.up.clone()
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
