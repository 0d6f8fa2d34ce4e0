//! One worker per device: takes the next batch, computes, replies. A worker that is lost is made anew.

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
use crate::scheduler::{Job, Queue, Scored};
use crate::telemetry::{
    BATCH_FILL, BATCH_ITEMS, BATCH_LENGTHS, BATCH_TOKENS, FORWARD, FORWARD_FAILURES, QUEUE_WAIT,
    WORKER_RESTARTS,
};

/// The wait before a lost worker is made anew: the first, doubled at each failure to make it, and the longest.
const BACKOFF: [Duration; 2] = [Duration::from_millis(100), Duration::from_secs(30)];

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
/// `make` runs on the thread that works, since a device's weights stay where they were made. `started` is told
/// whether it came up the first time, probe included, or is dropped where the thread died; if it did not come up
/// there is no second try.
///
/// # Errors
/// The system gave no thread.
pub fn spawn<S, E>(
    post: Post,
    make: impl Fn() -> Result<S, E> + Send + Sync + 'static,
    started: impl FnOnce(Result<(), E>) + Send + 'static,
) -> io::Result<JoinHandle<()>>
where
    S: Scorer,
    E: Display + Send + 'static,
{
    let name = format!("supervisor {}", post.device);
    thread::Builder::new().name(name).spawn(move || supervise(&post, &make, started))
}

fn supervise<S: Scorer, E: Display + Send>(
    post: &Post,
    make: &(impl Fn() -> Result<S, E> + Sync),
    started: impl FnOnce(Result<(), E>) + Send,
) {
    let mut started = Some(started);
    let mut wait = BACKOFF[0];
    loop {
        let mut came_up = false;
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
            let life = thread::Builder::new().name(name).spawn_scoped(scope, || live(post, make, &mut on_up));
            life.ok().and_then(|life| life.join().ok())
        });
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
fn live<S: Scorer, E>(post: &Post, make: &impl Fn() -> Result<S, E>, on_up: &mut impl FnMut()) -> End<E> {
    let scorer = match make() {
        Ok(scorer) => scorer,
        Err(error) => return End::NotMade(error),
    };
    let _up = Up::new(&post.up);
    on_up();
    match (Worker { post, scorer }).work() {
        Ok(()) => End::Done,
        Err(Lost) => End::Lost,
    }
}

/// The device can compute nothing any more.
struct Lost;

struct Worker<'a, S> {
    post: &'a Post,
    scorer: S,
}

/// Jobs that are on a worker. What it does not answer goes back to the queue, also where its thread dies.
struct Batch<'a> {
    queue: &'a Queue,
    jobs: Vec<Job>,
    tokens: usize,
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
        histogram!(BATCH_ITEMS).record(jobs.len() as f64);
        histogram!(BATCH_TOKENS).record(tokens as f64);
        histogram!(BATCH_FILL).record((tokens as f64 / post.budget.tokens as f64).min(1.0));
        let mut lengths: Vec<usize> = jobs.iter().map(|job| job.sample.tokens()).collect();
        lengths.sort_unstable();
        lengths.dedup();
        histogram!(BATCH_LENGTHS).record(lengths.len() as f64);
        let now = Instant::now();
        Self { queue: &post.queue, jobs, tokens, taken: now, launched: now }
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
        histogram!(FORWARD, "device" => device.to_owned()).record(inference);
        self.queue.record(self.tokens, self.taken.elapsed());
        for (job, score) in std::mem::take(&mut self.jobs).into_iter().zip(scores) {
            let waited = self.launched.saturating_duration_since(job.enqueued);
            histogram!(QUEUE_WAIT).record(waited);
            let _in_request = job.span.entered();
            tracing::debug!(?waited, ?inference, "scored");
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

impl<S: Scorer> Worker<'_, S> {
    /// Drains the queue until it is closed and empty.
    fn work(&mut self) -> Result<(), Lost> {
        let post = self.post;
        let mut running: Option<(Batch, S::Running)> = None;
        loop {
            // While the device computes, nothing is waited for: its batch is collected as soon as it is done.
            let next = match running {
                Some(_) => post.queue.try_batch(post.budget),
                None => match post.queue.next_batch(post.budget) {
                    Some(jobs) => jobs,
                    None => return Ok(()),
                },
            };
            let staged = (!next.is_empty()).then(|| {
                let batch = Batch::new(post, next);
                let staged = guarded(|| self.scorer.stage(&batch.samples()));
                (batch, staged)
            });
            if let Some((batch, run)) = running.take() {
                let scores = guarded(|| self.scorer.collect(run));
                self.finish(batch, scores)?;
            }
            let Some((mut batch, staged)) = staged else { continue };
            batch.launched = Instant::now();
            match staged.and_then(|staged| guarded(|| self.scorer.launch(staged))) {
                Ok(run) if batch.is_suspect() => {
                    let scores = guarded(|| self.scorer.collect(run));
                    self.finish(batch, scores)?;
                }
                Ok(run) => running = Some((batch, run)),
                Err(error) => self.finish(batch, Err(error))?,
            }
        }
    }

    /// Answers a batch with its scores, or finds out which of its samples make it fail.
    fn finish(&mut self, batch: Batch, scores: Result<Vec<Score>, ModelError>) -> Result<(), Lost> {
        let scores = self.settle(&batch.samples(), scores)?;
        batch.answer(&self.post.device, scores);
        Ok(())
    }

    /// One result per sample. A batch that fails is halved and tried again, so that only the samples that make it fail
    /// are without a score. Want of memory is no other case: before libtorch reports it, it has already given back
    /// to the device what it kept for later use.
    fn settle(
        &mut self,
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
        counter!(FORWARD_FAILURES).increment(1);
        tracing::error!(items = samples.len(), %error, "a forward failed");
        if catch_unwind(AssertUnwindSafe(|| self.scorer.is_lost())).unwrap_or(true) {
            return Err(Lost);
        }
        if samples.len() <= 1 {
            let error = ScoreError::Internal(format!("the forward of this item failed: {error}"));
            return Ok(vec![Err(error); samples.len()]);
        }
        let (left, right) = samples.split_at(samples.len() / 2);
        let mut results = Vec::with_capacity(samples.len());
        for half in [left, right] {
            let scores = guarded(|| self.scorer.score(half));
            results.extend(self.settle(half, scores)?);
        }
        Ok(results)
    }
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

    #[test]
    fn the_next_batch_is_staged_while_the_last_one_runs() {
        const LAST: usize = 5;
        let queue = Queue::new(Capacity { tokens: 100, items: 100 });
        let claim = Claim::default();
        let answers: Vec<_> = (1..=LAST)
            .map(|tokens| {
                let (reply, answer) = oneshot::channel();
                let pictures = vec![Patches { rows: 2, columns: 2, pixels: Vec::new() }];
                queue.push(Job {
                    sample: Sample { input_ids: vec![0; tokens], pictures, ..Sample::default() },
                    permit: queue.reserve(&claim, &[tokens]).unwrap().pop(),
                    claim: claim.clone(),
                    reply,
                    enqueued: Instant::now(),
                    span: Span::none(),
                    losses: 0,
                });
                answer
            })
            .collect();
        let log = Arc::new(Log::default());
        let post = Post {
            device: "fake".into(),
            queue: Arc::clone(&queue),
            budget: BatchBudget { tokens: 100, items: 1 },
            up: watch::Sender::new(0),
        };
        let make = {
            let log = Arc::clone(&log);
            move || Ok::<_, String>(Overlapped::new(Arc::clone(&log), LAST))
        };
        let worker = spawn(post, make, |up| up.unwrap()).unwrap();
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
