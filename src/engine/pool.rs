//! The CPU pool on which items are checked and prepared, away from the threads that serve the network.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use metrics::{counter, histogram};
use rayon::ThreadPool;
use tokio::sync::oneshot;

use crate::error::ScoreError;
use crate::telemetry::{ITEMS_DROPPED, PREPARATION};

/// A pool of threads for processor work.
#[derive(Debug)]
pub(super) struct Pool(ThreadPool);

impl Pool {
    /// A pool of this many threads, or one per core.
    pub fn new(threads: Option<usize>) -> io::Result<Self> {
        rayon::ThreadPoolBuilder::new()
            .num_threads(threads.unwrap_or(0))
            .thread_name(|index| format!("processor {index}"))
            .build()
            .map(Self)
            .map_err(io::Error::other)
    }

    /// Runs `work` on the pool. Where the caller has left by the time a thread is free, or its deadline has
    /// passed, the work is not done.
    pub async fn run<T: Send + 'static>(
        &self,
        deadline: Option<Instant>,
        work: impl FnOnce() -> Result<T, ScoreError> + Send + 'static,
    ) -> Result<T, ScoreError> {
        let (reply, answer) = oneshot::channel();
        self.0.spawn_fifo(move || {
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
        let lost = || Err(ScoreError::Internal("the preparation of this item was lost".into()));
        answer.await.unwrap_or_else(|_| lost())
    }
}
