//! A queue that is bounded in tokens and items, as a whole and for each caller.

use std::collections::BTreeSet;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use metrics::counter;
use tokio::sync::oneshot;
use tracing::Span;

use super::batching::Measure;
use super::fair_queue::Fair;
use super::line::{Ahead, Line, Waiter};
use super::quota::{Held, Room};
use super::throughput::{Drain, Latency};
use crate::config::{BatchBudget, Capacity};
use crate::error::ScoreError;
use crate::model::{Sample, Score};
use crate::request_context::{Caller, Claim, Priority};
use crate::telemetry::{ITEMS_DROPPED, ModelLabels};

/// How many workers may be lost with a job on them before it gets no further try.
const TRIES: u8 = 2;

/// A place in the queue. Dropping it gives the place back.
#[derive(Debug)]
pub struct Permit {
    queue: Arc<Queue>,
    caller: Caller,
    priority: Priority,
    tokens: usize,
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut state = self.queue.lock();
        state.room.give_back(&self.caller, self.priority, self.tokens);
        let granted = self.queue.serve_line(&mut state);
        // The places of one who has left come back here.
        drop(state);
        granted.into_iter().for_each(|(waiter, permits)| waiter.answer(Ok(permits)));
    }
}

/// A score and where its time went.
#[derive(Debug, Clone, PartialEq)]
pub struct Scored {
    /// The reward.
    pub score: Score,
    /// From [`Queue::push`] to the start of the forward.
    pub queue: Duration,
    /// The forward of the batch.
    pub inference: Duration,
}

/// A model, as the queue and its workers know it.
#[derive(Debug, Default)]
pub struct Tag {
    /// No other model that this process has had has the same.
    pub id: u64,
    /// Its name, for the log.
    pub name: Arc<str>,
    /// The labels of what is measured of it.
    pub labels: ModelLabels,
}

/// A sample on its way to a device.
#[derive(Debug)]
pub struct Job {
    /// What scores it.
    pub model: Arc<Tag>,
    /// What to score.
    pub sample: Sample,
    /// What it costs: its tokens, in those of the first model.
    pub cost: usize,
    /// The sample's place in the queue. `None` once a worker has taken it, and for what takes nobody's place.
    pub permit: Option<Permit>,
    /// Whose it is, how urgent, and until when it is wanted.
    pub claim: Claim,
    /// Where the answer goes. A closed channel means that the caller went away.
    pub reply: oneshot::Sender<Result<Scored, ScoreError>>,
    /// When it was pushed.
    pub enqueued: Instant,
    /// The caller's request, for traces across threads.
    pub span: Span,
    /// How many workers were lost with it.
    pub losses: u8,
}

impl Job {
    /// Why nobody waits for its score any more, if so. The deadline comes first: it is also why the caller has left.
    fn dead(&self, now: Instant) -> Option<(&'static str, ScoreError)> {
        if self.claim.is_late(now) {
            Some(("late", ScoreError::DeadlineExceeded))
        } else if self.reply.is_closed() {
            Some(("cancelled", ScoreError::Cancelled))
        } else {
            None
        }
    }
}

/// What a job is told whose model went while it waited.
fn gone(job: &Job) -> ScoreError {
    let why = "was taken out of service before the item could be scored".into();
    ScoreError::NotServing { model: job.model.name.to_string(), why }
}

/// Whether a worker has the model of this id.
pub type Takes<'a> = dyn Fn(u64) -> bool + 'a;

/// The queue that callers fill and workers drain.
#[derive(Debug)]
pub struct Queue {
    capacity: Capacity,
    state: Mutex<State>,
    /// Wakes a worker: there is a job, or the queue closed.
    ready: Condvar,
    /// Wakes who waits for the queue to close.
    closing: Condvar,
}

#[derive(Debug, Default)]
struct State {
    waiting: Fair<Job>,
    /// What is in `waiting`.
    load: Held,
    /// Jobs whose deadline was too near for a batch as large as they were then. They have what time is left over.
    hopeless: Vec<Job>,
    /// What is reserved, whether waiting here or still being prepared.
    room: Room,
    /// Who waits for places.
    line: Line,
    /// Batches that workers have taken and not answered.
    on_devices: usize,
    closed: Option<&'static str>,
    /// Models that no worker has any more, by their ids.
    gone: BTreeSet<u64>,
    drain: Drain,
    latency: Latency,
}

fn size(jobs: &[Job]) -> Held {
    Held { tokens: jobs.iter().map(|job| job.cost).sum(), items: jobs.len() }
}

impl State {
    /// Why a job is not taken.
    fn refusal(&self, job: &Job) -> Option<ScoreError> {
        let is_gone = self.gone.contains(&job.model.id).then(|| gone(job));
        self.closed.map(ScoreError::Unavailable).or(is_gone)
    }

    /// Takes out what nobody waits for any more.
    fn take_dead(&mut self, now: Instant) -> Vec<Job> {
        let mut dead = self.waiting.extract(|job| job.dead(now).is_some());
        self.load = self.load.minus(size(&dead));
        dead.extend(self.hopeless.extract_if(.., |job| job.dead(now).is_some()));
        dead
    }

    /// Whatever is there now. Who cannot be answered in time, as things go, stands back for who can: else a queue
    /// that is longer than its callers' patience would compute only what comes too late.
    fn take_batch(&mut self, budget: BatchBudget, takes: &Takes, now: Instant) -> Vec<Job> {
        let mean = self.load.tokens.div_ceil(self.load.items.max(1));
        let tokens = self.load.tokens.min(budget.tokens).min(budget.items.saturating_mul(mean));
        let horizon = now + self.latency.of(tokens);
        let hopeless = self.waiting.extract(|job| job.claim.is_late(horizon));
        self.load = self.load.minus(size(&hopeless));
        self.hopeless.extend(hopeless);
        let measure = |job: &Job, _| {
            takes(job.model.id).then(|| Measure { kind: job.model.id, tokens: job.sample.tokens() })
        };
        let mut batch = self.waiting.take_batch_of(budget, measure);
        if batch.is_empty() {
            // A device that would be idle tries even those: the estimate may be wrong, and learns from it.
            std::mem::take(&mut self.hopeless).into_iter().for_each(|job| self.push(job));
            batch = self.waiting.take_batch_of(budget, measure);
        }
        self.load = self.load.minus(size(&batch));
        if self.waiting.is_empty() && self.hopeless.is_empty() {
            self.drain.lull();
        }
        batch
    }

    /// Whether a call that wants so much should be answered before its deadline.
    fn expect_in_time(&mut self, claim: &Claim, wanted: Held) -> Result<(), ScoreError> {
        self.room
            .expect_in_time(claim, wanted, &self.drain)
            .map_err(|(expected, retry_after)| ScoreError::ExpectedLate { expected, retry_after })
    }

    fn push(&mut self, job: Job) {
        let Claim { caller, priority, .. } = job.claim.clone();
        let cost = job.cost;
        self.load = self.load.plus(Held { tokens: cost, items: 1 });
        if job.losses > 0 {
            // Before all others and alone: one that kills whoever computes it takes no other with it.
            self.waiting.push_first(&caller, priority, cost, job);
        } else {
            self.waiting.push(&caller, priority, cost, job);
        }
    }

    /// Whether anything waits for the models that `takes`.
    fn has_any(&self, takes: &Takes) -> bool {
        self.waiting.any(|job| takes(job.model.id)) || self.hopeless.iter().any(|job| takes(job.model.id))
    }

    /// Whether there is no work anywhere.
    fn is_idle(&self) -> bool {
        self.room.is_empty() && self.on_devices == 0
    }
}

impl Queue {
    /// An empty queue.
    pub fn new(capacity: Capacity) -> Arc<Self> {
        Arc::new(Self { capacity, state: Mutex::default(), ready: Condvar::new(), closing: Condvar::new() })
    }

    /// Reserves a place for each of these costs, in tokens of the first model: for all of them or for none, so that a group is
    /// never half scored.
    ///
    /// # Errors
    /// [`ScoreError::QueueFull`] with the time in which there should be room; [`ScoreError::ExpectedLate`] where the
    /// claim's deadline should be over by its turn; [`ScoreError::Invalid`] where even an empty queue has no room;
    /// [`ScoreError::Unavailable`] once the queue is closed.
    pub fn reserve(self: &Arc<Self>, claim: &Claim, costs: &[usize]) -> Result<Vec<Permit>, ScoreError> {
        let wanted = Held { tokens: costs.iter().sum(), items: costs.len() };
        let mut state = self.lock();
        self.admit(&mut state, claim, wanted)?;
        state.expect_in_time(claim, wanted)?;
        Ok(self.take(&mut state, claim, costs))
    }

    /// Takes places that there are.
    fn take(self: &Arc<Self>, state: &mut State, claim: &Claim, costs: &[usize]) -> Vec<Permit> {
        let wanted = Held { tokens: costs.iter().sum(), items: costs.len() };
        if wanted.items > 0 {
            if state.is_idle() {
                state.drain.begin(Instant::now());
            }
            state.room.take(claim, wanted);
        }
        let permit = |&tokens| Permit {
            queue: Arc::clone(self),
            caller: claim.caller.clone(),
            priority: claim.priority,
            tokens,
        };
        costs.iter().map(permit).collect()
    }

    /// Whether there would be room for so many items of at least so many tokens together.
    ///
    /// # Errors
    /// As [`Queue::reserve`].
    pub fn expect_room(&self, claim: &Claim, items: usize, tokens: usize) -> Result<(), ScoreError> {
        let (wanted, mut state) = (Held { tokens, items }, self.lock());
        self.admit(&mut state, claim, wanted)?;
        state.expect_in_time(claim, wanted)
    }

    /// Whether one more item of this cost would find a place at once. Nobody is promised anything.
    pub fn has_room(&self, claim: &Claim, cost: usize) -> bool {
        let (wanted, state) = (Held { tokens: cost, items: 1 }, self.lock());
        self.check(&state, wanted).is_ok() && self.excess(&state, claim, wanted).is_none()
    }

    fn admit(&self, state: &mut State, claim: &Claim, wanted: Held) -> Result<(), ScoreError> {
        self.check(state, wanted)?;
        let Some(excess) = self.excess(state, claim, wanted) else { return Ok(()) };
        Err(ScoreError::QueueFull { retry_after: state.room.promise(claim, excess, wanted, &state.drain) })
    }

    /// Whether there can ever be room for so much.
    fn check(&self, state: &State, wanted: Held) -> Result<(), ScoreError> {
        let Capacity { tokens: most_tokens, items: most_items } = self.capacity;
        if wanted.over(self.capacity) != Held::default() {
            return Err(ScoreError::invalid(
                "items",
                format!(
                    "{} items of {} tokens together; the queue holds {most_items} items and {most_tokens} tokens: \
                     split the request",
                    wanted.items, wanted.tokens
                ),
            ));
        }
        state.closed.map_or(Ok(()), |reason| Err(ScoreError::Unavailable(reason)))
    }

    /// What must drain before a claim that comes now has its places, in tokens; `None` where it has them at once.
    fn excess(&self, state: &State, claim: &Claim, wanted: Held) -> Option<usize> {
        let room = state.room.excess(self.capacity, claim, wanted);
        let line = state.line.ahead_of(claim, &state.room, self.capacity);
        (room.is_some() || line.is_some()).then(|| room.unwrap_or_default() + line.unwrap_or_default())
    }

    /// As [`Queue::reserve`], but waits in line where there is no room. Who drops the future leaves the line.
    ///
    /// # Errors
    /// As [`Queue::reserve`], without [`ScoreError::QueueFull`] and [`ScoreError::ExpectedLate`].
    pub async fn reserve_when_room(
        self: &Arc<Self>,
        claim: &Claim,
        costs: &[usize],
    ) -> Result<Vec<Permit>, ScoreError> {
        let wanted = Held { tokens: costs.iter().sum(), items: costs.len() };
        let granted = {
            let mut state = self.lock();
            self.check(&state, wanted)?;
            // Nobody is promised a time who waits here.
            if self.excess(&state, claim, wanted).is_none() {
                return Ok(self.take(&mut state, claim, costs));
            }
            let (waiter, granted) = Waiter::new(claim, costs);
            state.line.push(waiter);
            granted
        };
        granted.await.unwrap_or_else(|_| Err(ScoreError::Internal("a place in the line was lost".into())))
    }

    /// Takes what places there are for those in line. They are to be told once the lock is gone.
    fn serve_line(self: &Arc<Self>, state: &mut State) -> Vec<(Waiter, Vec<Permit>)> {
        let mut granted = Vec::new();
        if state.line.is_empty() {
            return granted;
        }
        let mut ahead = Ahead::default();
        for waiter in std::mem::take(&mut state.line).into_waiters() {
            let (claim, wanted) = (&waiter.claim, waiter.wanted());
            if ahead.lets_pass(claim, &state.room)
                && state.room.excess(self.capacity, claim, wanted).is_none()
            {
                let permits = self.take(state, claim, &waiter.costs);
                granted.push((waiter, permits));
            } else {
                ahead.add(&waiter, &state.room, self.capacity);
                state.line.push(waiter);
            }
        }
        granted
    }

    /// Hands a job to the workers. Once the queue is closed it is answered at once.
    pub fn push(&self, job: Job) {
        let mut state = self.lock();
        if let Some(error) = state.refusal(&job) {
            drop(state);
            let _ = job.reply.send(Err(error));
            return;
        }
        state.push(job);
        drop(state);
        // Each worker takes what is of its own models.
        self.ready.notify_all();
    }

    /// Has every worker look up from its wait.
    pub fn wake(&self) {
        // Who is about to wait holds the lock until it does.
        drop(self.lock());
        self.ready.notify_all();
    }

    /// Takes back a batch of a worker that was lost. Each of its jobs is tried once more.
    pub fn put_back(&self, jobs: Vec<Job>) {
        let mut answers = Vec::new();
        let mut state = self.lock();
        state.on_devices = state.on_devices.saturating_sub(1);
        for mut job in jobs {
            job.losses += 1;
            let error = match state.refusal(&job) {
                Some(error) => error,
                None if job.losses >= TRIES => {
                    ScoreError::Internal(format!("{TRIES} workers were lost over this item"))
                }
                None => {
                    state.push(job);
                    continue;
                }
            };
            answers.push((job, error));
        }
        drop(state);
        for (job, error) in answers {
            let _ = job.reply.send(Err(error));
        }
        self.ready.notify_all();
    }

    /// The next batch: whatever is there now of the models that `takes`, within the budget, and of one model. Waits only
    /// while there is nothing, and not once `interrupted`: then the batch is empty. Late and cancelled jobs are answered
    /// and left out. `None` once the queue is closed and has nothing more.
    pub fn next_batch(
        &self,
        budget: BatchBudget,
        takes: &Takes,
        interrupted: &dyn Fn() -> bool,
    ) -> Option<Vec<Job>> {
        loop {
            let batch = self.try_batch(budget, takes);
            if !batch.is_empty() {
                return Some(batch);
            }
            let state = self.lock();
            if interrupted() {
                return Some(Vec::new());
            }
            // Something may have come since.
            if state.has_any(takes) {
                continue;
            }
            if state.closed.is_some() {
                return None;
            }
            drop(self.ready.wait(state).unwrap_or_else(PoisonError::into_inner));
        }
    }

    /// As [`Queue::next_batch`], but empty where it would wait.
    pub fn try_batch(&self, budget: BatchBudget, takes: &Takes) -> Vec<Job> {
        let now = Instant::now();
        let mut state = self.lock();
        let dead = state.take_dead(now);
        let batch = state.take_batch(budget, takes, now);
        state.on_devices += usize::from(!batch.is_empty());
        // Permits lock the queue too.
        drop(state);
        for job in dead {
            if let Some((reason, error)) = job.dead(now) {
                counter!(ITEMS_DROPPED, "reason" => reason).increment(1);
                let _ = job.reply.send(Err(error));
            }
        }
        batch
    }

    /// Tells the queue that a batch of so many tokens was answered, for the wait that a refused caller is told.
    pub fn record(&self, tokens: usize, took: Duration) {
        let mut state = self.lock();
        state.on_devices = state.on_devices.saturating_sub(1);
        let idle = state.is_idle();
        state.drain.answered(tokens, idle, Instant::now());
        state.latency.record(tokens, took);
    }

    /// Refuses new reservations and lets the workers finish what is waiting.
    pub fn close(&self, reason: &'static str) {
        let mut state = self.lock();
        state.closed = Some(reason);
        let line = std::mem::take(&mut state.line);
        drop(state);
        self.ready.notify_all();
        self.closing.notify_all();
        line.into_waiters().for_each(|waiter| waiter.answer(Err(ScoreError::Unavailable(reason))));
    }

    /// Waits until the queue is closed, at most so long; whether it is.
    pub fn closed_within(&self, limit: Duration) -> bool {
        let waited = self.closing.wait_timeout_while(self.lock(), limit, |state| state.closed.is_none());
        waited.unwrap_or_else(PoisonError::into_inner).0.closed.is_some()
    }

    /// Answers everything that waits with `error`.
    pub fn fail_waiting(&self, error: &ScoreError) {
        self.fail(|_| true, |_| error.clone());
    }

    /// Takes no more jobs of a model, and answers those that wait: no worker will have it.
    pub fn retire(&self, model: u64) {
        self.lock().gone.insert(model);
        self.fail(|job| job.model.id == model, gone);
    }

    /// Takes jobs of a model again.
    pub fn admit_model(&self, model: u64) {
        self.lock().gone.remove(&model);
    }

    fn fail(&self, fails: impl Fn(&Job) -> bool, error: impl Fn(&Job) -> ScoreError) {
        let mut state = self.lock();
        let mut jobs = state.waiting.extract(&fails);
        state.load = state.load.minus(size(&jobs));
        jobs.extend(state.hopeless.extract_if(.., |job| fails(job)));
        drop(state);
        for job in jobs {
            let error = error(&job);
            let _ = job.reply.send(Err(error));
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it holds the lock, and counts stay true at every step.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Patches;

    const BUDGET: BatchBudget = BatchBudget { tokens: 1000, items: 8 };

    fn claim(name: &str) -> Claim {
        Claim { caller: Caller(name.into()), ..Claim::default() }
    }

    fn queue(tokens: usize, items: usize) -> Arc<Queue> {
        Queue::new(Capacity { tokens, items })
    }

    type Reply = oneshot::Receiver<Result<Scored, ScoreError>>;

    /// A job of so many tokens, and where its answer comes.
    fn job(queue: &Arc<Queue>, claim: &Claim, tokens: usize) -> (Job, Reply) {
        let (reply, answer) = oneshot::channel();
        let pictures = vec![Patches { rows: 2, columns: 2, pixels: Vec::new() }];
        let job = Job {
            model: Arc::default(),
            cost: tokens,
            sample: Sample { input_ids: vec![0; tokens], pictures, ..Sample::default() },
            permit: queue.reserve(claim, &[tokens]).unwrap().pop(),
            claim: claim.clone(),
            reply,
            enqueued: Instant::now(),
            span: Span::none(),
            losses: 0,
        };
        (job, answer)
    }

    fn refused(queue: &Arc<Queue>, claim: &Claim, costs: &[usize]) -> Duration {
        match queue.reserve(claim, costs) {
            Err(ScoreError::QueueFull { retry_after }) => retry_after,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_greedy_caller_leaves_room_for_the_others() {
        let queue = queue(1200, 100);
        let [greedy, second, third] = ["greedy", "second", "third"].map(claim);
        let take_all = |claim: &Claim| {
            std::iter::from_fn(|| queue.reserve(claim, &[10]).ok()).flatten().collect::<Vec<_>>()
        };
        let mut first = take_all(&greedy);
        assert_eq!(first.len(), 50, "half of the items while nobody else is there");
        let others = take_all(&second);
        assert_eq!(others.len(), 33, "a third now that there are two");
        assert_eq!(take_all(&third).len(), 17, "what is left");
        drop(first.split_off(20));
        refused(&queue, &greedy, &[10; 20]);
        // Who holds nothing may send a group that is larger than a share, whatever evaluation of its own waits.
        drop((first, others));
        assert_eq!(queue.reserve(&third, &[10; 80]).unwrap().len(), 80);
        let evaluation = Claim { priority: Priority::Evaluation, ..third.clone() };
        assert_eq!(take_all(&evaluation).len(), 50);
        assert_eq!(queue.reserve(&third, &[10; 50]).unwrap().len(), 50);
    }

    #[test]
    fn an_idle_device_has_what_there_is_at_once() {
        let queue = queue(10_000, 100);
        let took = (0..5).map(|_| {
            let (job, _answer) = job(&queue, &claim("a"), 10);
            queue.push(job);
            let start = Instant::now();
            assert_eq!(queue.next_batch(BUDGET, &|_| true, &|| false).unwrap().len(), 1);
            start.elapsed()
        });
        // The quickest: this machine may be busy with other things.
        let quickest = took.min().unwrap();
        assert!(quickest < Duration::from_millis(20), "it waited {quickest:?} for a fuller batch");
    }

    #[test]
    fn who_looks_for_room_takes_none() {
        let queue = queue(100, 2);
        let [a, b] = ["a", "b"].map(claim);
        assert!(queue.has_room(&a, 100) && !queue.has_room(&a, 101));
        let held = queue.reserve(&b, &[40, 40]).unwrap();
        assert!(!queue.has_room(&a, 1), "there are two items");
        drop(held);
        assert!(queue.has_room(&a, 100));
        queue.close("it is over");
        assert!(!queue.has_room(&a, 1));
    }

    #[test]
    fn all_places_come_back() {
        let queue = queue(1000, 10);
        let claim = claim("a");
        drop(queue.reserve(&claim, &[100; 10]).unwrap());
        let (job, _answer) = job(&queue, &claim, 1000);
        queue.push(job);
        assert_eq!(queue.next_batch(BUDGET, &|_| true, &|| false).unwrap().len(), 1);
        assert_eq!(queue.reserve(&claim, &[100; 10]).unwrap().len(), 10);
        assert!(queue.lock().room.is_empty());
        assert_eq!(queue.lock().load, Held::default());
    }

    #[test]
    fn a_refused_caller_is_told_the_wait_that_is_measured() {
        let queue = queue(1000, 100);
        let [a, b] = ["a", "b"].map(claim);
        let held = queue.reserve(&a, &[1000]).unwrap();
        assert_eq!(refused(&queue, &b, &[100]), Duration::from_secs(1), "nothing is known yet");
        queue.lock().drain = Drain::default();
        let start = Instant::now();
        queue.lock().drain.begin(start);
        queue.lock().drain.answered(2000, false, start + Duration::from_secs(10));
        // 200 tokens a second: room for 100 comes in half a second, for 600 in three.
        let near = |wait: Duration, seconds: f64| (wait.as_secs_f64() - seconds).abs() < 0.05;
        assert!(near(refused(&queue, &b, &[100]), 0.5));
        queue.lock().room.forget_promises();
        assert!(near(refused(&queue, &b, &[600]), 3.0));
        // Its own share is 500: what it has above that drains first.
        assert!(near(refused(&queue, &a, &[100]), 3.0));
        drop(held);
    }

    #[test]
    fn time_without_work_is_no_part_of_the_wait() {
        let queue = queue(1000, 100);
        let [a, b] = ["a", "b"].map(claim);
        // Its item was found in the cache, or could not be decoded.
        drop(queue.reserve(&a, &[10]).unwrap());
        queue.lock().drain.begin(Instant::now() - Duration::from_secs(60));
        let (job, _answer) = job(&queue, &a, 100);
        queue.push(job);
        let mut batch = queue.try_batch(BUDGET, &|_| true);
        batch[0].permit = None;
        // A call that comes while the device computes begins nothing anew.
        let begun = queue.lock().drain.clone();
        drop(queue.reserve(&b, &[10]).unwrap());
        assert_eq!(queue.lock().drain, begun);
        queue.record(100, Duration::from_millis(10));
        let _held = queue.reserve(&a, &[1000]).unwrap();
        assert!(refused(&queue, &b, &[100]) < Duration::from_secs(6), "a minute ago there was no work");
    }

    #[tokio::test]
    async fn who_waits_for_room_is_promised_no_time() {
        let queue = queue(1000, 100);
        let [a, b] = ["a", "b"].map(claim);
        let _held = queue.reserve(&a, &[1000]).unwrap();
        queue.lock().drain.begin(Instant::now());
        queue.lock().drain.answered(1000, false, Instant::now() + Duration::from_secs(10));
        for _ in 0..5 {
            assert!(futures::poll!(std::pin::pin!(queue.reserve_when_room(&b, &[100]))).is_pending());
        }
        assert!(refused(&queue, &b, &[100]) < Duration::from_secs(2), "it is the first who is refused");
    }

    #[tokio::test]
    async fn places_go_to_those_in_line_in_its_order() {
        let queue = queue(1000, 8);
        let [job, other, third] = ["job", "other", "third"].map(claim);
        let mut held = queue.reserve(&other, &[10; 4]).unwrap();
        held.extend(queue.reserve(&job, &[10; 2]).unwrap());
        macro_rules! waits {
            ($claim:expr, $count:expr) => {{
                let (queue, claim) = (Arc::clone(&queue), $claim.clone());
                let mut wait = Box::pin(async move { queue.reserve_when_room(&claim, &[10; $count]).await });
                assert!(futures::poll!(&mut wait).is_pending());
                wait
            }};
        }
        let mut first = waits!(third, 4);
        let mut second = waits!(third, 1);
        // There is room for one, and it is not its turn; nor is it that of one who would be refused.
        assert!(matches!(queue.reserve(&job, &[10]), Err(ScoreError::QueueFull { .. })));
        drop(held.split_off(4));
        let places = futures::poll!(&mut first);
        assert!(matches!(&places, std::task::Poll::Ready(Ok(places)) if places.len() == 4), "{places:?}");
        assert!(futures::poll!(&mut second).is_pending(), "there is no room for it yet");
        drop(places);
        assert!(futures::poll!(&mut second).is_ready());
        // Whose share is used up keeps back nobody else, and one who has left nobody at all.
        let own = waits!(other, 4);
        let held_by_job = queue.reserve(&job, &[10]).unwrap();
        drop((own, held_by_job));
        assert!(queue.reserve(&claim("fourth"), &[10; 4]).is_ok());
        // All are told once there is no more turn to wait for.
        let mut last = waits!(other, 8);
        queue.close("closed");
        assert!(matches!(last.as_mut().await, Err(ScoreError::Unavailable("closed"))));
        assert!(queue.lock().line.is_empty());
    }

    #[test]
    fn who_would_be_late_is_refused_by_what_goes_before_it() {
        let queue = queue(10_000, 100);
        let deadline = Instant::now() + Duration::from_secs(10);
        let until = |name, priority| Claim { priority, deadline: Some(deadline), ..claim(name) };
        let late = |claim: &Claim, tokens| match queue.reserve(claim, &[tokens]) {
            Err(ScoreError::ExpectedLate { expected, .. }) => Some(expected.as_secs()),
            other => other.map(|_| None).unwrap(),
        };
        let (training, evaluation) = (Priority::Training, Priority::Evaluation);
        let held = queue.reserve(&claim("a"), &[4000]).unwrap();
        assert_eq!(late(&until("a", training), 100), None, "nothing has been measured");
        let start = Instant::now();
        queue.lock().drain.begin(start);
        queue.lock().drain.answered(1000, false, start + Duration::from_secs(10));
        // A hundred tokens a second.
        assert_eq!(late(&until("a", training), 100), Some(40));
        assert_eq!(late(&claim("a"), 100), None, "it has the time");
        assert_eq!(late(&until("b", training), 100), None, "another takes turns with it");
        assert_eq!(late(&until("b", training), 3000), Some(30));
        assert_eq!(late(&until("b", evaluation), 100), None, "it has a tenth");
        assert_eq!(late(&until("b", evaluation), 300), Some(27));
        drop(held);
        assert_eq!(late(&until("a", training), 5000), None, "nothing goes before it");
    }

    #[test]
    fn what_cannot_be_in_time_stands_back_for_what_can() {
        let queue = queue(10_000, 100);
        let now = Instant::now();
        let until = |seconds| Claim { deadline: Some(now + Duration::from_secs(seconds)), ..claim("a") };
        queue.record(1000, Duration::from_secs(100));
        let mut answers = Vec::new();
        for (tokens, seconds) in [(501, 30), (502, 30), (103, 3000)] {
            let (job, answer) = job(&queue, &until(seconds), tokens);
            queue.push(job);
            answers.push(answer);
        }
        let costs = |jobs: Vec<Job>| jobs.iter().map(|job| job.sample.tokens()).collect::<Vec<_>>();
        assert_eq!(costs(queue.try_batch(BUDGET, &|_| true)), [103]);
        // An idle device tries even those, and so learns that it is faster by now.
        assert_eq!(queue.try_batch(BUDGET, &|_| true).len(), 1);
        answers.clear();
        assert!(queue.try_batch(BUDGET, &|_| true).is_empty());
    }

    #[test]
    fn a_lost_job_is_tried_once_more_and_then_answered() {
        let queue = queue(10_000, 100);
        let (job, mut answer) = job(&queue, &claim("a"), 10);
        queue.push(job);
        queue.put_back(queue.try_batch(BUDGET, &|_| true));
        assert!(answer.try_recv().is_err(), "answered too early");
        queue.put_back(queue.try_batch(BUDGET, &|_| true));
        assert!(matches!(answer.try_recv(), Ok(Err(ScoreError::Internal(_)))));
        assert!(queue.try_batch(BUDGET, &|_| true).is_empty());
    }

    #[test]
    fn a_lost_job_is_alone_though_it_should_be_late() {
        let queue = queue(10_000, 100);
        queue.record(1000, Duration::from_secs(1000));
        let soon = Claim { deadline: Some(Instant::now() + Duration::from_secs(10)), ..claim("a") };
        let mut answers = Vec::new();
        for tokens in [100, 101] {
            let (job, answer) = job(&queue, &soon, tokens);
            queue.push(job);
            answers.push(answer);
        }
        let both = queue.try_batch(BUDGET, &|_| true);
        assert_eq!(both.len(), 2);
        queue.put_back(both);
        assert_eq!(queue.try_batch(BUDGET, &|_| true).len(), 1);
        assert_eq!(queue.try_batch(BUDGET, &|_| true).len(), 1);
    }
}
