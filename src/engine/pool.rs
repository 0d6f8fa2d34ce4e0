//! The CPU pools on which items are checked and prepared, away from the threads that serve the network.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use metrics::{counter, histogram};
use rayon::ThreadPool;
use tokio::sync::oneshot;

use crate::caller::Claim;
use crate::config::BatchBudget;
use crate::error::ScoreError;
use crate::scheduler::Fair;
use crate::telemetry::{ITEMS_DROPPED, PREPARATION};

type Work = Box<dyn FnOnce() + Send>;

/// A pool of threads for processor work. Whoever has much of it takes turns with whoever has little.
#[derive(Debug)]
pub(super) struct Pool {
    threads: ThreadPool,
    waiting: Arc<Waiting>,
}

#[derive(Default)]
struct Waiting(Mutex<Fair<Work>>);

impl std::fmt::Debug for Waiting {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Waiting")
    }
}

impl Waiting {
    fn lock(&self) -> MutexGuard<'_, Fair<Work>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn next(&self) -> Option<Work> {
        self.lock().take_batch(BatchBudget { tokens: usize::MAX, items: 1 }).pop()
    }
}

impl Pool {
    /// A pool of this many threads, or one per core.
    pub fn new(name: &'static str, threads: Option<usize>) -> io::Result<Self> {
        let threads = rayon::ThreadPoolBuilder::new()
            .num_threads(threads.unwrap_or(0))
            .thread_name(move |index| format!("{name} {index}"))
            .build()
            .map_err(io::Error::other)?;
        Ok(Self { threads, waiting: Arc::default() })
    }

    /// Runs `work`, of about `cost` in tokens, on the pool. Where the caller has left by the time a thread is free,
    /// or its deadline has passed, the work is not done.
    pub async fn run<T: Send + 'static>(
        &self,
        claim: &Claim,
        cost: usize,
        work: impl FnOnce() -> Result<T, ScoreError> + Send + 'static,
    ) -> Result<T, ScoreError> {
        let (reply, answer) = oneshot::channel();
        let deadline = claim.deadline;
        let work = Box::new(move || {
            let start = Instant::now();
            let late = deadline.is_some_and(|deadline| deadline <= start);
            if late || reply.is_closed() {
                counter!(ITEMS_DROPPED, "reason" => if late { "late" } else { "cancelled" }).increment(1);
                let _ = reply.send(Err(ScoreError::DeadlineExceeded));
                return;
            }
            // A panic in a decoder fails its item; left alone it would end the process.
            let result = catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| {
                Err(ScoreError::Internal("the preparation of this item panicked".into()))
            });
            histogram!(PREPARATION).record(start.elapsed());
            let _ = reply.send(result);
        });
        self.waiting.lock().push(&claim.caller, claim.priority, cost, work);
        // A turn for each piece of work: which one it is for is settled when a thread is free.
        let waiting = Arc::clone(&self.waiting);
        self.threads.spawn_fifo(move || {
            if let Some(work) = waiting.next() {
                work();
            }
        });
        let lost = || Err(ScoreError::Internal("the preparation of this item was lost".into()));
        answer.await.unwrap_or_else(|_| lost())
    }
}
