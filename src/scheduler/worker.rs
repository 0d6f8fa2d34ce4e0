//! One worker per device, with all models that are placed on it: takes the next batch, which is of one of them, computes,
//! replies. A worker that is lost is made anew.

mod models;

use std::collections::BTreeMap;
use std::fmt::Display;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use metrics::{counter, histogram};
use tokio::sync::watch;

use crate::config::BatchBudget;
use crate::error::ScoreError;
use crate::model::{ModelError, Sample, Score, Scorer};
use crate::scheduler::{Job, Queue, Scored, Tag};
use crate::telemetry::{
    BATCH_FILL, BATCH_ITEMS, BATCH_LENGTHS, BATCH_TOKENS, FORWARD, FORWARD_FAILURES, QUEUE_WAIT,
    WORKER_RESTARTS,
};

pub use models::{Make, Models, Run};

use models::Runner;

/// The wait before what was lost is made anew: the first, doubled at each failure to make it, and the longest.
pub const BACKOFF: [Duration; 2] = [Duration::from_millis(100), Duration::from_secs(30)];

/// Where a worker works.
#[derive(Debug, Clone)]
pub struct Post {
    /// The name of its device.
    pub device: String,
    /// What it drains.
    pub queue: Arc<Queue>,
    /// What one forward may hold.
    pub budget: BatchBudget,
    /// How many workers are up.
    pub up: watch::Sender<usize>,
}

/// How a worker's life ended.
enum End<E> {
    /// The queue is closed and empty.
    Done,
    /// It did not come up.
    NotMade(E),
    /// Its device can compute nothing any more.
    Lost,
}

/// Starts a worker, and starts it anew for as long as the queue is open.
///
/// Its models are made on the thread that works, unless they are given to it later. `started` is told whether it came up
/// the first time, probes included, or is dropped where the thread died; if it did not come up there is no second try.
///
/// # Errors
/// The system gave no thread.
pub fn spawn<S, E>(
    post: Post,
    models: Arc<Models<S, E>>,
    started: impl FnOnce(Result<(), E>) + Send + 'static,
) -> io::Result<JoinHandle<()>>
where
    S: Scorer + Send + 'static,
    E: Display + Send + 'static,
{
    let name = format!("supervisor {}", post.device);
    thread::Builder::new().name(name).spawn(move || supervise(&post, &models, started))
}

fn supervise<S: Scorer + Send, E: Display + Send>(
    post: &Post,
    models: &Models<S, E>,
    started: impl FnOnce(Result<(), E>) + Send,
) {
    let mut started = Some(started);
    let mut wait = BACKOFF[0];
    loop {
        let mut came_up = false;
        let anew = started.is_none();
        let mut on_up = || {
            came_up = true;
            match started.take() {
                Some(started) => started(Ok(())),
                None => counter!(WORKER_RESTARTS, "device" => post.device.clone()).increment(1),
            }
        };
        // A thread of its own for each life: what libtorch keeps per thread begins anew with it.
        let end = thread::scope(|scope| {
            let name = format!("worker {}", post.device);
            let life = thread::Builder::new().name(name);
            let life = life.spawn_scoped(scope, || live(post, models, anew, &mut on_up));
            life.ok().and_then(|life| life.join().ok())
        });
        models.lost();
        if came_up {
            wait = BACKOFF[0];
        }
        let reason = match end {
            Some(End::Done) => return,
            Some(End::NotMade(error)) => match started.take() {
                Some(started) => return started(Err(error)),
                None => error.to_string(),
            },
            Some(End::Lost) => "its device can compute nothing any more".to_owned(),
            None => "its thread died".to_owned(),
        };
        if started.is_some() {
            return;
        }
        tracing::error!(device = post.device, reason, ?wait, "a worker was lost and is made anew");
        if post.queue.closed_within(wait) {
            return;
        }
        wait = (wait * 2).min(BACKOFF[1]);
    }
}

/// Counts a worker as up for as long as it lives, however it ends.
struct Up<'a>(&'a watch::Sender<usize>);

impl<'a> Up<'a> {
    fn new(count: &'a watch::Sender<usize>) -> Self {
        count.send_modify(|up| *up += 1);
        Self(count)
    }
}

impl Drop for Up<'_> {
    fn drop(&mut self) {
        self.0.send_modify(|up| *up -= 1);
    }
}

/// One life of a worker.
fn live<S: Scorer, E: Display>(
    post: &Post,
    models: &Models<S, E>,
    anew: bool,
    on_up: &mut impl FnMut(),
) -> End<E> {
    let scorers = match models.make_all(anew) {
        Ok(scorers) => scorers,
        Err(error) => return End::NotMade(error),
    };
    // In this order: whoever hears that it is up may ask it.
    let (_errands, _up) = (Runner::new(models), Up::new(&post.up));
    on_up();
    match (Worker { post, models, scorers }).work() {
        Ok(()) => End::Done,
        Err(Lost) => End::Lost,
    }
}

/// The device can compute nothing any more.
struct Lost;

struct Worker<'a, S, E> {
    post: &'a Post,
    models: &'a Models<S, E>,
    scorers: BTreeMap<u64, S>,
}

/// Jobs of one model that are on a worker. What it does not answer goes back to the queue, also where its thread dies.
struct Batch<'a> {
    queue: &'a Queue,
    model: Arc<Tag>,
    jobs: Vec<Job>,
    cost: usize,
    taken: Instant,
    launched: Instant,
}

impl<'a> Batch<'a> {
    fn new(post: &'a Post, mut jobs: Vec<Job>) -> Self {
        for job in &mut jobs {
            // What is on a worker no longer takes the queue's room.
            job.permit = None;
        }
        let tokens: usize = jobs.iter().map(|job| job.sample.tokens()).sum();
        let model = jobs.first().map(|job| Arc::clone(&job.model)).unwrap_or_default();
        let labels = &model.labels;
        histogram!(BATCH_ITEMS, labels.alone()).record(jobs.len() as f64);
        histogram!(BATCH_TOKENS, labels.alone()).record(tokens as f64);
        histogram!(BATCH_FILL, labels.alone()).record((tokens as f64 / post.budget.tokens as f64).min(1.0));
        let mut lengths: Vec<usize> = jobs.iter().map(|job| job.sample.tokens()).collect();
        lengths.sort_unstable();
        lengths.dedup();
        histogram!(BATCH_LENGTHS, labels.alone()).record(lengths.len() as f64);
        let now = Instant::now();
        let cost = jobs.iter().map(|job| job.cost).sum();
        Self { queue: &post.queue, model, jobs, cost, taken: now, launched: now }
    }

    fn samples(&self) -> Vec<&Sample> {
        self.jobs.iter().map(|job| &job.sample).collect()
    }

    /// Whether a worker was lost over it, so that nothing else should be near it.
    fn is_suspect(&self) -> bool {
        self.jobs.iter().any(|job| job.losses > 0)
    }

    /// Answers each job.
    fn answer(mut self, device: &str, scores: Vec<Result<Score, ScoreError>>) {
        let inference = self.launched.elapsed();
        let labels = &self.model.labels;
        histogram!(FORWARD, labels.with([("device", device.to_owned())])).record(inference);
        self.queue.record(self.cost, self.taken.elapsed());
        let queue_wait = histogram!(QUEUE_WAIT, labels.alone());
        for (job, score) in std::mem::take(&mut self.jobs).into_iter().zip(scores) {
            let waited = self.launched.saturating_duration_since(job.enqueued);
            queue_wait.record(waited);
            let _in_request = job.span.entered();
            tracing::debug!(model = &*self.model.name, ?waited, ?inference, "scored");
            // A closed channel is a caller that left while the device computed.
            let _ = job.reply.send(score.map(|score| Scored { score, queue: waited, inference }));
        }
    }
}

impl Drop for Batch<'_> {
    fn drop(&mut self) {
        if !self.jobs.is_empty() {
            self.queue.put_back(std::mem::take(&mut self.jobs));
        }
    }
}

impl<S: Scorer, E> Worker<'_, S, E> {
    /// Drains the queue until it is closed and empty.
    fn work(&mut self) -> Result<(), Lost> {
        let post = self.post;
        let mut running: Option<(Batch, S::Running)> = None;
        loop {
            if running.is_none() {
                self.models.settle(&mut self.scorers);
                self.run_errands(Some(Instant::now()))?;
            }
            let takes = |id| self.scorers.contains_key(&id);
            // While the device computes, nothing is waited for: its batch is collected as soon as it is done. Nothing new
            // begins where its models are about to change, or an errand is due.
            let next = match running {
                Some(_) if self.models.is_changed() || self.models.has_errands(Some(Instant::now())) => {
                    Vec::new()
                }
                Some(_) => post.queue.try_batch(post.budget, &takes),
                None => {
                    let interrupted = || self.models.is_changed() || self.models.has_errands(None);
                    match post.queue.next_batch(post.budget, &takes, &interrupted) {
                        Some(jobs) if jobs.is_empty() => {
                            self.run_errands(None)?;
                            continue;
                        }
                        Some(jobs) => jobs,
                        None => return Ok(()),
                    }
                }
            };
            let staged = (!next.is_empty()).then(|| {
                let batch = Batch::new(post, next);
                let staged = self.guarded(&batch, |scorer, batch| scorer.stage(&batch.samples()));
                (batch, staged)
            });
            if let Some((batch, run)) = running.take() {
                let scores = self.guarded(&batch, |scorer, _| scorer.collect(run));
                self.finish(batch, scores)?;
            }
            let Some((mut batch, staged)) = staged else { continue };
            batch.launched = Instant::now();
            match staged.and_then(|staged| self.guarded(&batch, |scorer, _| scorer.launch(staged))) {
                Ok(run) if batch.is_suspect() => {
                    let scores = self.guarded(&batch, |scorer, _| scorer.collect(run));
                    self.finish(batch, scores)?;
                }
                Ok(run) => running = Some((batch, run)),
                Err(error) => self.finish(batch, Err(error))?,
            }
        }
    }

    /// Does what it was asked to do and is due by then; by no time: all of it.
    fn run_errands(&mut self, by: Option<Instant>) -> Result<(), Lost> {
        for (model, run) in self.models.take_errands(by) {
            let Some(scorer) = self.scorers.get_mut(&model) else { continue };
            if guarded(|| run(scorer)).is_err() && guarded(|| Ok(scorer.is_lost())).unwrap_or(true) {
                return Err(Lost);
            }
        }
        Ok(())
    }

    /// A step with a batch's model, in which a panic is an error.
    fn guarded<T>(
        &mut self,
        batch: &Batch,
        step: impl FnOnce(&mut S, &Batch) -> Result<T, ModelError>,
    ) -> Result<T, ModelError> {
        let scorer = scorer(&mut self.scorers, batch.model.id)?;
        guarded(|| step(scorer, batch))
    }

    /// Answers a batch with its scores, or finds out which of its samples make it fail.
    fn finish(&mut self, batch: Batch, scores: Result<Vec<Score>, ModelError>) -> Result<(), Lost> {
        let scores = self.settle(&batch, &batch.samples(), scores)?;
        batch.answer(&self.post.device, scores);
        Ok(())
    }

    /// One result per sample. A batch that fails is halved and tried again, so that only the samples that make it fail
    /// are without a score. Want of memory is no other case: before libtorch reports it, it has already given back
    /// to the device what it kept for later use.
    fn settle(
        &mut self,
        batch: &Batch,
        samples: &[&Sample],
        scores: Result<Vec<Score>, ModelError>,
    ) -> Result<Vec<Result<Score, ScoreError>>, Lost> {
        let error = match scores {
            Ok(scores) if scores.len() == samples.len() => {
                return Ok(scores.into_iter().map(finite).collect());
            }
            Ok(scores) => {
                ModelError::Sample(format!("{} scores for {} samples", scores.len(), samples.len()))
            }
            Err(error) => error,
        };
        counter!(FORWARD_FAILURES, batch.model.labels.alone()).increment(1);
        tracing::error!(model = &*batch.model.name, items = samples.len(), %error, "a forward failed");
        if self.guarded(batch, |scorer, _| Ok(scorer.is_lost())).unwrap_or(true) {
            return Err(Lost);
        }
        if samples.len() <= 1 {
            let error = ScoreError::Internal(format!("the forward of this item failed: {error}"));
            return Ok(vec![Err(error); samples.len()]);
        }
        let (left, right) = samples.split_at(samples.len() / 2);
        let mut results = Vec::with_capacity(samples.len());
        for half in [left, right] {
            let scores = self.guarded(batch, |scorer, _| scorer.score(half));
            results.extend(self.settle(batch, half, scores)?);
        }
        Ok(results)
    }
}

/// The model of this id, of which a worker takes no jobs that it has not.
fn scorer<S>(scorers: &mut BTreeMap<u64, S>, id: u64) -> Result<&mut S, ModelError> {
    scorers.get_mut(&id).ok_or_else(|| ModelError::Sample("the worker has no such model".into()))
}

/// A step in which a panic is an error.
fn guarded<T>(step: impl FnOnce() -> Result<T, ModelError>) -> Result<T, ModelError> {
    catch_unwind(AssertUnwindSafe(step)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("a panic");
        Err(ModelError::Sample(text.to_owned()))
    })
}

/// A NaN or an infinity is no score.
fn finite(score: Score) -> Result<Score, ScoreError> {
    if score.is_finite() {
        Ok(score)
    } else {
        Err(ScoreError::Internal("the model gave a score that is not finite".into()))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::sync::{Condvar, Mutex};

    use tokio::sync::oneshot;
    use tracing::Span;

    use super::*;
    use crate::config::Capacity;
    use crate::model::Patches;
    use crate::request_context::Claim;

    /// What has happened, in order, for any thread to wait for.
    #[derive(Default)]
    struct Log(Mutex<Vec<(&'static str, usize)>>, Condvar);

    impl Log {
        fn note(&self, step: &'static str, batch: usize) {
            self.0.lock().unwrap().push((step, batch));
            self.1.notify_all();
        }

        fn wait_for(&self, step: &'static str, batch: usize) {
            let missing = |log: &mut Vec<_>| !log.contains(&(step, batch));
            let limit = Duration::from_secs(20);
            let waited = self.1.wait_timeout_while(self.0.lock().unwrap(), limit, missing).unwrap();
            assert!(!waited.1.timed_out(), "{step} {batch} never came");
        }
    }

    type Work = (usize, mpsc::Sender<Vec<Score>>);

    /// A model whose device is a thread of its own. A batch is known by the length of its first sample.
    struct Overlapped {
        log: Arc<Log>,
        device: mpsc::Sender<Work>,
    }

    impl Overlapped {
        /// On a device that runs each batch but the last until the next one is staged.
        fn new(log: Arc<Log>, last: usize) -> Self {
            let (device, work) = mpsc::channel::<Work>();
            let seen = Arc::clone(&log);
            thread::spawn(move || {
                for (batch, reply) in work {
                    if batch < last {
                        seen.wait_for("staged", batch + 1);
                    }
                    seen.note("done", batch);
                    reply.send(vec![Score { mean: batch as f32, ..Score::default() }]).unwrap();
                }
            });
            Self { log, device }
        }
    }

    impl Scorer for Overlapped {
        type Staged = usize;
        type Running = mpsc::Receiver<Vec<Score>>;

        fn stage(&mut self, samples: &[&Sample]) -> Result<usize, ModelError> {
            self.log.note("staged", samples[0].tokens());
            Ok(samples[0].tokens())
        }

        fn launch(&mut self, batch: usize) -> Result<Self::Running, ModelError> {
            self.log.note("launched", batch);
            let (reply, scores) = mpsc::channel();
            self.device.send((batch, reply)).unwrap();
            Ok(scores)
        }

        fn collect(&mut self, running: Self::Running) -> Result<Vec<Score>, ModelError> {
            running.recv().map_err(|error| ModelError::Sample(error.to_string()))
        }
    }

    /// A model whose batches end when a test says so.
    struct Gated(Arc<Log>);

    impl Scorer for Gated {
        type Staged = usize;
        type Running = usize;

        fn stage(&mut self, samples: &[&Sample]) -> Result<usize, ModelError> {
            Ok(samples[0].tokens())
        }

        fn launch(&mut self, batch: usize) -> Result<usize, ModelError> {
            self.0.note("launched", batch);
            self.0.wait_for("go", batch);
            Ok(batch)
        }

        fn collect(&mut self, batch: usize) -> Result<Vec<Score>, ModelError> {
            Ok(vec![Score { mean: batch as f32, ..Score::default() }])
        }
    }

    /// The order of four batches of one item and an errand that comes while the first one runs and is due after so long.
    fn errand_among_batches(due: Duration) -> Vec<(&'static str, usize)> {
        const LAST: usize = 4;
        let queue = Queue::new(Capacity { tokens: 100, items: 100 });
        let log = Arc::new(Log::default());
        let seen = Arc::clone(&log);
        let (models, worker) = worker(&queue, move || Gated(Arc::clone(&seen)));
        let answers: Vec<_> = (1..=LAST)
            .map(|tokens| {
                let (job, answer) = job(&queue, tokens);
                queue.push(job);
                if tokens == 1 {
                    log.wait_for("launched", 1);
                }
                answer
            })
            .collect();
        let ask = |model, number| {
            let log = Arc::clone(&log);
            let run = move |_: &mut Gated| {
                log.note("errand", number);
                Ok(())
            };
            models.ask(model, Instant::now() + due, Box::new(run));
        };
        ask(Tag::default().id, 0);
        ask(Tag::default().id, 1);
        // Nobody has it: nobody waits for it.
        ask(7, 2);
        (1..=LAST).for_each(|batch| log.note("go", batch));
        for (batch, answer) in (1..).zip(answers) {
            assert_eq!(answer.blocking_recv().unwrap().unwrap().score.mean, batch as f32);
        }
        log.wait_for("errand", 1);
        queue.close("the test is over");
        worker.join().unwrap();
        models.ask(Tag::default().id, Instant::now(), Box::new(|_| panic!("nobody is there")));
        let log = log.0.lock().unwrap();
        log.iter().copied().filter(|(step, _)| *step != "go").collect()
    }

    #[test]
    fn an_errand_waits_for_an_idle_moment_and_not_beyond_its_time() {
        let far = errand_among_batches(Duration::from_secs(3600));
        let launched = |batch| ("launched", batch);
        assert_eq!(far, [launched(1), launched(2), launched(3), launched(4), ("errand", 1)]);
        let due = errand_among_batches(Duration::ZERO);
        assert_eq!(due, [launched(1), ("errand", 1), launched(2), launched(3), launched(4)]);
    }

    /// A worker of one model whose batches have one item.
    fn worker<S: Scorer + Send + 'static>(
        queue: &Arc<Queue>,
        make: impl Fn() -> S + Send + Sync + 'static,
    ) -> (Arc<Models<S, String>>, JoinHandle<()>) {
        let post = Post {
            device: "fake".into(),
            queue: Arc::clone(queue),
            budget: BatchBudget { tokens: 100, items: 1 },
            up: watch::Sender::new(0),
        };
        let make: Make<S, String> = Arc::new(move || Ok(make()));
        let models = Models::new(queue, [(Tag::default().id, make)]);
        let worker = spawn(post, Arc::clone(&models), |up| up.unwrap()).unwrap();
        (models, worker)
    }

    /// A job of so many tokens, and where its answer comes.
    fn job(queue: &Arc<Queue>, tokens: usize) -> (Job, oneshot::Receiver<Result<Scored, ScoreError>>) {
        let (claim, (reply, answer)) = (Claim::default(), oneshot::channel());
        let pictures = vec![Patches { rows: 2, columns: 2, pixels: Vec::new() }];
        let job = Job {
            model: Arc::default(),
            cost: tokens,
            sample: Sample { input_ids: vec![0; tokens], pictures, ..Sample::default() },
            permit: queue.reserve(&claim, &[tokens]).unwrap().pop(),
            claim,
            reply,
            enqueued: Instant::now(),
            span: Span::none(),
            losses: 0,
        };
        (job, answer)
    }

    #[test]
    fn the_next_batch_is_staged_while_the_last_one_runs() {
        const LAST: usize = 5;
        let queue = Queue::new(Capacity { tokens: 100, items: 100 });
        let answers: Vec<_> = (1..=LAST)
            .map(|tokens| {
                let (job, answer) = job(&queue, tokens);
                queue.push(job);
                answer
            })
            .collect();
        let log = Arc::new(Log::default());
        let seen = Arc::clone(&log);
        let (_models, worker) = worker(&queue, move || Overlapped::new(Arc::clone(&seen), LAST));
        for (batch, answer) in (1..).zip(answers) {
            assert_eq!(answer.blocking_recv().unwrap().unwrap().score.mean, batch as f32);
        }
        queue.close("the test is over");
        worker.join().unwrap();
        let log = log.0.lock().unwrap();
        let at = |step, batch| log.iter().position(|entry| *entry == (step, batch)).unwrap();
        for batch in 1..LAST {
            assert!(at("launched", batch) < at("staged", batch + 1), "{log:?}");
            assert!(at("staged", batch + 1) < at("done", batch), "{log:?}");
        }
    }
}
