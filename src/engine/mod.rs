//! What stands behind the service: the models that are up, each with its processor, one queue, and the workers.

mod candidate;
mod cpu_pool;
mod lifeline;
mod load;
mod loaded;
mod look;
mod manager;
mod memory;
mod models;
mod onlookers;
mod score_cache;
mod self_test;
mod shadow;

use std::convert::Infallible;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future::join_all;
use tokio::sync::{mpsc, oneshot, watch};
use tracing::Span;

use crate::config::{Limits, Settings};
use crate::error::ScoreError;
use crate::model::{Sample, Score, Scorer};
use crate::processor::{Decoded, Draft, Item};
use crate::recent::{Recent, SketchCell};
use crate::request_context::Claim;
use crate::scheduler::{Job, Permit, Queue, Scored};

pub use lifeline::Lifeline;
pub use load::{Examination, load, load_all, loader};
pub use loaded::{LoadError, Loaded, MakeScorer, ModelInfo, Terms};
pub use look::Look;
pub use manager::{IntoLoaded, Loader, ModelControl, ModelControlError, ModelManager};
pub use memory::Memory;
pub use models::{Model, Models, State};
pub use onlookers::Onlookers;
pub use self_test::SelfTest;
pub use shadow::{Shadow, Tap};

use cpu_pool::{Cost, Pool};
use onlookers::Note;
use score_cache::{Follow, Key, Lead, Lookup, Results};

/// Bytes of JSON and base64 that are read in about the time that it takes to admit an item.
const ADMISSION_BYTES: usize = 128 << 10;

/// The models that are up, with the queue before their workers.
///
/// Calls hold it for as long as they need it; once the last has let go it tells [`Lifeline::released`].
pub struct Engine {
    models: Arc<Models>,
    limits: Limits,
    /// Reads headers and tokenises, so that a refusal never waits for another's pixels.
    admission: Pool,
    /// Decodes and resizes.
    preparation: Pool,
    results: Arc<Results>,
    onlookers: Arc<Onlookers>,
    queue: Arc<Queue>,
    stopped: watch::Receiver<bool>,
    _alive: mpsc::Sender<Infallible>,
}

/// An engine, what ends it, and what has its models come and go.
pub type Started<S> = (Arc<Engine>, Lifeline, Arc<ModelManager<S>>);

/// An item whose cost is known, for each of the models that shall score it.
#[derive(Debug)]
pub struct Admitted {
    parts: Vec<Result<Part, ScoreError>>,
    took: Duration,
    /// What is noted of it for who looks on.
    note: Option<Box<Note>>,
}

/// An item as one model reads it.
struct Part {
    model: Arc<Model>,
    draft: Draft,
    components: Arc<[String]>,
}

impl fmt::Debug for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Part").field("model", &self.model.info.name).finish_non_exhaustive()
    }
}

impl Admitted {
    /// What the item costs with each model that can score it. Each needs a place of its own.
    pub fn costs(&self) -> impl Iterator<Item = usize> {
        self.parts.iter().flatten().map(|part| part.model.cost(part.draft.tokens()))
    }
}

/// What each model made of an item.
pub type Answers = Vec<Result<Answer, ScoreError>>;

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
    pub fn start<S>(
        settings: &Settings,
        loaded: impl IntoLoaded<Scorer = S>,
    ) -> Result<(Arc<Self>, Lifeline), LoadError>
    where
        S: Scorer + Send + 'static,
    {
        Self::start_managed(settings, loaded, None, Onlookers::default())
            .map(|(engine, lifeline, _)| (engine, lifeline))
    }

    /// As [`Engine::start`], with what has models come and go, by means of `loader`, and with who looks on.
    ///
    /// # Errors
    /// As [`Engine::start`].
    pub fn start_managed<S>(
        settings: &Settings,
        loaded: impl IntoLoaded<Scorer = S>,
        loader: Option<Loader<S>>,
        onlookers: Onlookers,
    ) -> Result<Started<S>, LoadError>
    where
        S: Scorer + Send + 'static,
    {
        let pool = |name, memory| Pool::new(name, settings.processor_threads, memory);
        let admission = pool("admission", usize::MAX)?;
        let preparation = pool("processor", settings.limits.max_decode_bytes)?;
        let queue = Queue::new(settings.queue);
        let results = Results::new(settings.cache_items);
        let manager::Placed { manager, models, workers, up } =
            manager::place(settings, loaded.into_list(), &queue, &results, loader)?;
        let (stop, stopped) = watch::channel(false);
        let (alive_sender, alive) = mpsc::channel(1);
        let lifeline = Lifeline { queue: Arc::clone(&queue), stop, up, alive, workers };
        let engine = Self {
            models,
            limits: settings.limits.clone(),
            admission,
            preparation,
            results,
            onlookers: Arc::new(onlookers),
            queue,
            stopped,
            _alive: alive_sender,
        };
        Ok((Arc::new(engine), lifeline, Arc::new(manager)))
    }

    /// The models.
    pub fn models(&self) -> &Models {
        &self.models
    }

    /// What is kept of the last minutes, where something is.
    pub fn recent(&self) -> Option<&Arc<Recent>> {
        self.onlookers.recent.as_ref()
    }

    /// What a caller must keep.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// The queue in which admitted items need a place.
    pub fn queue(&self) -> &Arc<Queue> {
        &self.queue
    }

    /// Whether so many items might find room with all of these models: a first look that costs nothing, so that an
    /// overloaded server refuses before it works.
    ///
    /// # Errors
    /// As [`Queue::reserve`].
    pub fn expect_room(&self, claim: &Claim, models: &[Arc<Model>], items: usize) -> Result<(), ScoreError> {
        let least: usize = models.iter().map(|model| model.least_cost).sum();
        self.queue.expect_room(claim, items * models.len(), items * least)
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

    /// Checks an item and finds out what it costs with each of these models, without decoding its picture.
    ///
    /// # Errors
    /// Its caller left. What can never be scored by a model is told with its place.
    pub async fn admit(
        &self,
        models: &[Arc<Model>],
        item: Item,
        claim: &Claim,
    ) -> Result<Admitted, ScoreError> {
        let start = Instant::now();
        // Each question is tokenised with its conversation.
        let cost = Cost { time: item.questions.len().max(1) * models.len(), memory: 0 };
        let questions: Option<Arc<[String]>> = (!item.questions.is_empty())
            .then(|| item.questions.iter().map(|question| question.text.clone()).collect());
        let first = self.onlookers.first_of(models, &self.models);
        let (models, onlookers, whose) = (models.to_vec(), Arc::clone(&self.onlookers), claim.clone());
        let work = move || {
            let note = onlookers.look(&models, first, Some(&item), &whose);
            let part = |model: Arc<Model>| {
                let draft = model.processor.admit_item(item.clone())?;
                let components = questions.clone().unwrap_or_else(|| Arc::clone(&model.components));
                Ok(Part { model, draft, components })
            };
            Ok((models.into_iter().map(part).collect(), note))
        };
        let (parts, note) = self.admission.run(claim, cost, work).await?;
        Ok(Admitted { parts, took: start.elapsed(), note })
    }

    /// An item that can never be scored, by any of these models.
    pub fn refuse(&self, models: &[Arc<Model>], error: &ScoreError, claim: &Claim) -> Admitted {
        let parts = models.iter().map(|_| Err(error.clone())).collect();
        Admitted { parts, took: Duration::ZERO, note: self.onlookers.look(models, None, None, claim) }
    }

    /// Prepares an admitted item on the pool, its pictures decoded once, hands it to the workers, and waits for the score of
    /// each model. What is known or being computed already is not computed again. There is a permit for each of
    /// [`Admitted::costs`].
    ///
    /// Dropping the future cancels the item wherever it is, unless a device computes it already.
    pub async fn score(
        &self,
        Admitted { parts, took, note }: Admitted,
        permits: impl IntoIterator<Item = Permit>,
        claim: &Claim,
    ) -> Answers {
        let sketch = note.as_ref().and_then(|note| note.sketch());
        let answers = self.answers(parts, took, sketch, permits, claim).await;
        if let Some(note) = note {
            self.onlookers.tell(*note, &answers);
        }
        answers
    }

    async fn answers(
        &self,
        parts: Vec<Result<Part, ScoreError>>,
        took: Duration,
        sketch: Option<SketchCell>,
        permits: impl IntoIterator<Item = Permit>,
        claim: &Claim,
    ) -> Answers {
        let (mut permits, mut places, mut tasks) = (permits.into_iter(), Vec::new(), Vec::new());
        let parts: Vec<Result<(), ScoreError>> = parts
            .into_iter()
            .map(|part| {
                let part = part?;
                let place = permits.next();
                places.push((
                    place.ok_or_else(no_place)?,
                    Arc::clone(&part.model),
                    Arc::clone(&part.components),
                ));
                tasks.push(Task { model: part.model, draft: part.draft, key: None });
                Ok(())
            })
            .collect();
        let start = Instant::now();
        let steps = if tasks.is_empty() { Ok(Vec::new()) } else { self.prepare(tasks, sketch, claim).await };
        let preprocess = took + start.elapsed();
        let steps = match steps {
            Ok(steps) => steps,
            // What stops them all is said of each.
            Err(error) => return parts.into_iter().map(|part| part.and(Err(error.clone()))).collect(),
        };
        let answers = places.into_iter().zip(steps).map(|((permit, model, components), step)| async move {
            let (scored, preprocess) = self.answer(&model, step, permit, claim, preprocess).await?;
            Ok(Answer { scored, components, preprocess })
        });
        let mut answers = join_all(answers).await.into_iter();
        let lost = || Err(ScoreError::Internal("an item has no answer".into()));
        parts.into_iter().map(|part| part.and_then(|()| answers.next().unwrap_or_else(lost))).collect()
    }

    /// Scores an item with the model of this name, in what callers leave: it takes no place in the queue, and has a score only
    /// where there would be one; nor does anyone who asks for the same wait for it.
    async fn score_aside(
        &self,
        model: &str,
        item: Item,
        claim: &Claim,
    ) -> Result<(Arc<Model>, Score), ScoreError> {
        let model = self.models.named(&[model.to_owned()])?.pop().ok_or_else(no_place)?;
        let cost = Cost { time: item.questions.len().max(1), memory: 0 };
        let processor = Arc::clone(&model.processor);
        let draft = self.admission.run(claim, cost, move || processor.admit_item(item)).await?;
        if !self.queue.has_room(claim, model.cost(draft.tokens())) {
            return Err(ScoreError::QueueFull { retry_after: Duration::ZERO });
        }
        let cost = Cost { time: draft.memory() >> 10, memory: draft.memory() };
        let processor = Arc::clone(&model.processor);
        let sample = self.preparation.run(claim, cost, move || processor.prepare(draft)).await?;
        let scored = self.forward(&model, sample, None, claim).await?;
        Ok((model, scored.score))
    }

    /// Follows an item that is prepared to its score, with one model. Says too how long it was prepared.
    async fn answer(
        &self,
        model: &Arc<Model>,
        step: Result<Step, ScoreError>,
        permit: Permit,
        claim: &Claim,
        mut preprocess: Duration,
    ) -> Result<(Scored, Duration), ScoreError> {
        let mut step = step?;
        loop {
            let (draft, key) = match step {
                Step::Known(score) => {
                    let scored = Scored { score, queue: Duration::ZERO, inference: Duration::ZERO };
                    return Ok((scored, preprocess));
                }
                Step::Lead(sample, lead) => {
                    let outcome = self.forward(model, sample, Some(permit), claim).await;
                    lead.finish(&outcome);
                    return Ok((outcome?, preprocess));
                }
                Step::Follow(draft, key, follow) => {
                    if let Some(outcome) = self.unless_stopped(follow.outcome()).await? {
                        return Ok((outcome?, preprocess));
                    }
                    // Who computed it gave up. The place in the queue has been kept for this.
                    (draft, Some(key))
                }
            };
            let start = Instant::now();
            let task = Task { model: Arc::clone(model), draft, key };
            step = self.prepare(vec![task], None, claim).await?.pop().ok_or_else(no_place)??;
            preprocess += start.elapsed();
        }
    }

    /// Prepares an item on the pool for each of its models, unless the score is known or another prepares it. Pictures
    /// are decoded once. Whoever prepares it makes the `sketch` of it, where that is wanted.
    async fn prepare(
        &self,
        tasks: Vec<Task>,
        sketch: Option<SketchCell>,
        claim: &Claim,
    ) -> Result<Vec<Result<Step, ScoreError>>, ScoreError> {
        let (results, onlookers) = (Arc::clone(&self.results), Arc::clone(&self.onlookers));
        let mut memory = tasks.iter().map(|task| task.draft.memory()).max().unwrap_or_default();
        let shared = tasks.len() > 1 || sketch.is_some();
        if shared {
            // They stay until the last of them has read them.
            memory += tasks.first().map(|task| task.draft.decoded_memory()).unwrap_or_default();
        }
        // The larger a picture, the longer it takes, in about the same measure.
        let cost = Cost { time: tasks.iter().map(|task| task.draft.memory() >> 10).sum(), memory };
        let work = move || {
            let mut decoded = shared.then(Decoded::default);
            let step = |Task { model, draft, key }: Task| {
                let key = key.unwrap_or_else(|| {
                    let mut hasher = model.seed.clone();
                    draft.digest_into(&mut hasher);
                    *hasher.finalize().as_bytes()
                });
                match results.look_up(key, &model.tag.labels) {
                    Lookup::Known(score) => Ok(Step::Known(score)),
                    Lookup::Follow(follow) => Ok(Step::Follow(draft, key, follow)),
                    Lookup::Lead(lead) => match model.processor.prepare_with(draft, decoded.as_mut()) {
                        Ok(sample) => Ok(Step::Lead(sample, lead)),
                        Err(error) => {
                            lead.finish(&Err(error.clone()));
                            Err(error)
                        }
                    },
                }
            };
            let steps: Vec<_> = tasks.into_iter().map(step).collect();
            // Where one is prepared, all of its pictures are decoded.
            if let (Some(sketch), Some(decoded)) = (sketch, decoded)
                && steps.iter().any(|step| matches!(step, Ok(Step::Lead(..))))
                && let Some(picture) = decoded.judged()
            {
                onlookers.sketch(&sketch, picture);
            }
            Ok(steps)
        };
        self.preparation.run(claim, cost, work).await
    }

    /// Hands a sample to the workers and waits for its score.
    async fn forward(
        &self,
        model: &Model,
        sample: Sample,
        permit: Option<Permit>,
        claim: &Claim,
    ) -> Result<Scored, ScoreError> {
        let (reply, scored) = oneshot::channel();
        self.queue.push(Job {
            model: Arc::clone(&model.tag),
            cost: model.cost(sample.tokens()),
            sample,
            permit,
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

/// An item that is to be prepared for a model.
struct Task {
    model: Arc<Model>,
    draft: Draft,
    /// Where it is known.
    key: Option<Key>,
}

fn no_place() -> ScoreError {
    ScoreError::Internal("an item got no place".into())
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
