//! A queue that is bounded in tokens and items.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use metrics::gauge;
use tokio::sync::{Notify, oneshot};
use tracing::Span;

use super::batch::take_batch;
use crate::config::{BatchBudget, Capacity};
use crate::error::ScoreError;
use crate::model::{Sample, Score};
use crate::telemetry::{QUEUE_ITEMS, QUEUE_TOKENS};

/// A place in the queue. Dropping it gives the place back.
#[derive(Debug)]
pub struct Permit {
    queue: Arc<Queue>,
    tokens: usize,
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut state = self.queue.lock();
        state.tokens -= self.tokens;
        state.items -= 1;
        state.publish();
        drop(state);
        self.queue.room.notify_waiters();
    }
}

/// A score and where its time went.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scored {
    /// The reward.
    pub score: Score,
    /// From [`Queue::push`] to the start of the forward.
    pub queue: Duration,
    /// The forward of the batch.
    pub inference: Duration,
}

/// A sample on its way to a device.
#[derive(Debug)]
pub struct Job {
    /// What to score.
    pub sample: Sample,
    /// The sample's place in the queue.
    pub permit: Permit,
    /// When the caller stops waiting.
    pub deadline: Option<Instant>,
    /// Where the answer goes. A closed channel means that the caller went away.
    pub reply: oneshot::Sender<Result<Scored, ScoreError>>,
    /// When it was pushed.
    pub enqueued: Instant,
    /// The caller's request, for traces across threads.
    pub span: Span,
}

/// The queue that callers fill and workers drain.
#[derive(Debug)]
pub struct Queue {
    capacity: Capacity,
    state: Mutex<State>,
    /// Wakes a worker: there is a job, or the queue closed.
    ready: Condvar,
    /// Wakes callers that wait for room.
    room: Notify,
}

#[derive(Debug, Default)]
struct State {
    waiting: VecDeque<Job>,
    /// Reserved, whether waiting here or still being prepared.
    tokens: usize,
    items: usize,
    closed: Option<&'static str>,
    /// Tokens per second that the workers last managed, smoothed.
    rate: Option<f64>,
}

impl State {
    fn publish(&self) {
        gauge!(QUEUE_ITEMS).set(self.items as f64);
        gauge!(QUEUE_TOKENS).set(self.tokens as f64);
    }
}

impl Queue {
    /// An empty queue.
    pub fn new(capacity: Capacity) -> Arc<Self> {
        Arc::new(Self { capacity, state: Mutex::default(), ready: Condvar::new(), room: Notify::new() })
    }

    /// Reserves a place for each of these costs, in tokens: for all of them or for none, so that a group is
    /// never half scored.
    ///
    /// # Errors
    /// [`ScoreError::QueueFull`] with the time in which the queue should drain; [`ScoreError::Invalid`] where even
    /// an empty queue has no room; [`ScoreError::Unavailable`] once the queue is closed.
    pub fn reserve(self: &Arc<Self>, costs: &[usize]) -> Result<Vec<Permit>, ScoreError> {
        let tokens: usize = costs.iter().sum();
        let Capacity { tokens: most_tokens, items: most_items } = self.capacity;
        if tokens > most_tokens || costs.len() > most_items {
            return Err(ScoreError::invalid(
                "items",
                format!(
                    "{} items of {tokens} tokens together; the queue holds {most_items} items and {most_tokens} \
                     tokens: split the request",
                    costs.len()
                ),
            ));
        }
        let mut state = self.lock();
        if let Some(reason) = state.closed {
            return Err(ScoreError::Unavailable(reason));
        }
        if state.tokens + tokens > most_tokens || state.items + costs.len() > most_items {
            let seconds = state.rate.map_or(1.0, |rate| state.tokens as f64 / rate);
            return Err(ScoreError::QueueFull {
                retry_after: Duration::from_secs_f64(seconds.clamp(0.05, 60.0)),
            });
        }
        state.tokens += tokens;
        state.items += costs.len();
        state.publish();
        drop(state);
        Ok(costs.iter().map(|&tokens| Permit { queue: Arc::clone(self), tokens }).collect())
    }

    /// Reserves a place for one item, and waits for it where the queue is full.
    ///
    /// # Errors
    /// As [`Queue::reserve`], without [`ScoreError::QueueFull`].
    pub async fn reserve_when_room(self: &Arc<Self>, tokens: usize) -> Result<Permit, ScoreError> {
        loop {
            // Listens before it looks, so that room made in between is not missed.
            let room = self.room.notified();
            match self.reserve(&[tokens]) {
                Ok(mut permits) => {
                    if let Some(permit) = permits.pop() {
                        return Ok(permit);
                    }
                }
                Err(ScoreError::QueueFull { .. }) => room.await,
                Err(error) => return Err(error),
            }
        }
    }

    /// Hands a job to the workers. Once the queue is closed it is answered at once.
    pub fn push(&self, job: Job) {
        let mut state = self.lock();
        if let Some(reason) = state.closed {
            drop(state);
            let _ = job.reply.send(Err(ScoreError::Unavailable(reason)));
            return;
        }
        state.waiting.push_back(job);
        drop(state);
        self.ready.notify_one();
    }

    /// The next batch: whatever is there now, oldest first, within the budget. Waits only while there is nothing.
    /// Late and cancelled jobs are answered and left out. `None` once the queue is closed and empty.
    pub fn next_batch(&self, budget: BatchBudget) -> Option<Vec<Job>> {
        let mut state = self.lock();
        loop {
            let (batch, dropped) = take_batch(&mut state.waiting, budget, Instant::now());
            if !batch.is_empty() || !dropped.is_empty() {
                // Their permits lock the queue too.
                drop(state);
                drop(dropped);
                if !batch.is_empty() {
                    return Some(batch);
                }
                state = self.lock();
                continue;
            }
            if state.closed.is_some() {
                return None;
            }
            state = self.ready.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Tells the queue how fast a worker was, for the wait that a refused caller is told.
    pub fn record(&self, tokens: usize, took: Duration) {
        let now = tokens as f64 / took.as_secs_f64().max(1e-6);
        let mut state = self.lock();
        state.rate = Some(state.rate.map_or(now, |rate| 0.8 * rate + 0.2 * now));
    }

    /// Refuses new reservations and lets the workers finish what is waiting.
    pub fn close(&self, reason: &'static str) {
        self.lock().closed = Some(reason);
        self.ready.notify_all();
        self.room.notify_waiters();
    }

    /// Answers everything that waits with `error`.
    pub fn fail_waiting(&self, error: &ScoreError) {
        let jobs = std::mem::take(&mut self.lock().waiting);
        for job in jobs {
            let _ = job.reply.send(Err(error.clone()));
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it holds the lock, and counts stay true at every step.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
