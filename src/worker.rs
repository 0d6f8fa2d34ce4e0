//! One OS thread per device: takes the next batch, computes, replies.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Instant;

use metrics::{counter, histogram};

use crate::config::BatchBudget;
use crate::error::ScoreError;
use crate::model::{ModelError, Sample, Score, Scorer};
use crate::scheduler::{Job, Queue, Scored};
use crate::telemetry::{BATCH_ITEMS, BATCH_TOKENS, FORWARD, FORWARD_FAILURES, QUEUE_WAIT};

/// Starts a worker on a thread of its own.
///
/// `make` runs on that thread, since a device's weights stay where they were made. `started` is told whether it
/// came up, probe included; then the thread drains `queue` until the queue is closed and empty.
///
/// # Errors
/// The system gave no thread.
pub fn spawn<S, E>(
    name: &str,
    queue: Arc<Queue>,
    budget: BatchBudget,
    make: impl FnOnce() -> Result<S, E> + Send + 'static,
    started: impl FnOnce(Result<(), E>) + Send + 'static,
) -> io::Result<JoinHandle<()>>
where
    S: Scorer,
{
    thread::Builder::new().name(name.to_owned()).spawn(move || match make() {
        Ok(mut scorer) => {
            started(Ok(()));
            while let Some(batch) = queue.next_batch(budget) {
                run_batch(&mut scorer, batch, &queue);
            }
        }
        Err(error) => started(Err(error)),
    })
}

/// Scores a batch and answers each of its jobs.
fn run_batch(scorer: &mut dyn Scorer, batch: Vec<Job>, queue: &Queue) {
    let start = Instant::now();
    let mut samples = Vec::with_capacity(batch.len());
    let mut replies = Vec::with_capacity(batch.len());
    for job in batch {
        let waited = start.saturating_duration_since(job.enqueued);
        histogram!(QUEUE_WAIT).record(waited);
        samples.push(job.sample);
        replies.push((job.reply, waited, job.span));
        // The permit goes here: what is on the device no longer takes the queue's room.
    }
    let tokens: usize = samples.iter().map(Sample::tokens).sum();
    histogram!(BATCH_ITEMS).record(samples.len() as f64);
    histogram!(BATCH_TOKENS).record(tokens as f64);

    let scores = score_each(scorer, &samples.iter().collect::<Vec<_>>());
    let inference = start.elapsed();
    histogram!(FORWARD).record(inference);
    queue.record(tokens, inference);

    for ((reply, waited, span), score) in replies.into_iter().zip(scores) {
        let _in_request = span.entered();
        tracing::debug!(?waited, ?inference, "scored");
        // A closed channel is a caller that left while the device computed.
        let _ = reply.send(score.map(|score| Scored { score, queue: waited, inference }));
    }
}

/// One result per sample. A batch that fails is halved and tried again, so that only the samples that make it fail
/// are without a score.
fn score_each(scorer: &mut dyn Scorer, samples: &[&Sample]) -> Vec<Result<Score, ScoreError>> {
    match score_guarded(scorer, samples) {
        Ok(scores) => scores.into_iter().map(finite).collect(),
        Err(error) => {
            counter!(FORWARD_FAILURES).increment(1);
            tracing::error!(items = samples.len(), %error, "a forward failed");
            if samples.len() <= 1 {
                let error = ScoreError::Internal(format!("the forward of this item failed: {error}"));
                return vec![Err(error); samples.len()];
            }
            let (left, right) = samples.split_at(samples.len() / 2);
            let mut results = score_each(scorer, left);
            results.extend(score_each(scorer, right));
            results
        }
    }
}

/// A forward in which a panic is an error, and so is an answer of the wrong length.
fn score_guarded(scorer: &mut dyn Scorer, samples: &[&Sample]) -> Result<Vec<Score>, ModelError> {
    let scores = catch_unwind(AssertUnwindSafe(|| scorer.score(samples))).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("a panic");
        Err(ModelError::Sample(text.to_owned()))
    })?;
    if scores.len() != samples.len() {
        return Err(ModelError::Sample(format!("{} scores for {} samples", scores.len(), samples.len())));
    }
    Ok(scores)
}

/// A NaN or an infinity is no score.
fn finite(score: Score) -> Result<Score, ScoreError> {
    if score.mean.is_finite() && score.stddev.is_none_or(f32::is_finite) {
        Ok(score)
    } else {
        Err(ScoreError::Internal("the model gave a score that is not finite".into()))
    }
}
