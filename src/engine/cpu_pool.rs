//! The CPU pools on which items are checked and prepared, away from the threads that serve the network.
//!
//! A piece of work says beforehand how much memory it will take, and begins once there is room for it beside what runs.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use metrics::{counter, histogram};
use rayon::ThreadPool;
use tokio::sync::oneshot;

use crate::config::BatchBudget;
use crate::error::ScoreError;
use crate::request_context::Claim;
use crate::scheduler::Fair;
use crate::telemetry::{ITEMS_DROPPED, PREPARATION};

/// A piece of work, and the memory that it takes while it runs.
struct Work {
    memory: usize,
    run: Box<dyn FnOnce() + Send>,
}

/// What a piece of work costs, with which turns are shared out, and what it holds.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cost {
    /// About how long it takes, in a unit that is the same for all work of a pool.
    pub time: usize,
    /// In bytes, at most.
    pub memory: usize,
}

/// A pool of threads for processor work. Whoever has much of it takes turns with whoever has little.
#[derive(Debug)]
pub(super) struct Pool {
    threads: ThreadPool,
    waiting: Arc<Waiting>,
}

struct Waiting {
    state: Mutex<State>,
    /// Wakes threads that wait for memory.
    freed: Condvar,
    /// The memory that may be held. Work that takes more runs alone.
    most: usize,
}

#[derive(Default)]
struct State {
    turns: Fair<Work>,
    /// The memory of what runs.
    held: usize,
}

impl std::fmt::Debug for Waiting {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Waiting")
    }
}

impl Waiting {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the work whose turn it is, once there is room for it. Nothing goes before it meanwhile, unless it comes from
    /// one whose turn is sooner: what is large would never find room between the small.
    fn next(&self) -> Option<Work> {
        let mut state = self.lock();
        loop {
            let memory = state.turns.head()?.memory;
            if state.held == 0 || memory <= self.most.saturating_sub(state.held) {
                let work = state.turns.take_batch(BatchBudget { tokens: usize::MAX, items: 1 }).pop()?;
                state.held += work.memory;
                return Some(work);
            }
            state = self.freed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn run(&self, work: Work) {
        let _held = Held { waiting: self, memory: work.memory };
        (work.run)();
    }
}

/// The memory of work that runs, which goes back however it ends.
struct Held<'a> {
    waiting: &'a Waiting,
    memory: usize,
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.waiting.lock().held -= self.memory;
        self.waiting.freed.notify_all();
    }
}

impl Pool {
    /// A pool of this many threads, or one per core, whose work holds at most so much memory together.
    pub fn new(name: &'static str, threads: Option<usize>, most: usize) -> io::Result<Self> {
        let threads = rayon::ThreadPoolBuilder::new()
            .num_threads(threads.unwrap_or(0))
            .thread_name(move |index| format!("{name} {index}"))
            .build()
            .map_err(io::Error::other)?;
        let waiting = Waiting { state: Mutex::default(), freed: Condvar::new(), most };
        Ok(Self { threads, waiting: Arc::new(waiting) })
    }

    /// Runs `work` on the pool, in its caller's turn. Where the caller has left by the time a thread is free,
    /// or its deadline has passed, the work is not done.
    pub async fn run<T: Send + 'static>(
        &self,
        claim: &Claim,
        Cost { time, memory }: Cost,
        work: impl FnOnce() -> Result<T, ScoreError> + Send + 'static,
    ) -> Result<T, ScoreError> {
        let (reply, answer) = oneshot::channel();
        let deadline = claim.deadline;
        let run = Box::new(move || {
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
        self.waiting.lock().turns.push(&claim.caller, claim.priority, time, Work { memory, run });
        // A turn for each piece of work: which one it is for is settled when a thread is free.
        let waiting = Arc::clone(&self.waiting);
        self.threads.spawn_fifo(move || {
            if let Some(work) = waiting.next() {
                waiting.run(work);
            }
        });
        let lost = || Err(ScoreError::Internal("the preparation of this item was lost".into()));
        answer.await.unwrap_or_else(|_| lost())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::thread::sleep;
    use std::time::Duration;

    use futures::future::join_all;

    use super::*;
    use crate::request_context::Caller;

    const MOST: usize = 100;

    fn claim(name: &str) -> Claim {
        Claim { caller: Caller(name.into()), ..Claim::default() }
    }

    /// Runs work of these costs in memory, and gives the most that ran together: in memory, and in pieces.
    async fn together(memory: &[usize], wait: impl Fn() + Clone + Send + 'static) -> (usize, usize) {
        let pool = Pool::new("test", Some(4), MOST).unwrap();
        let now = Arc::new((AtomicUsize::new(0), AtomicUsize::new(0)));
        let most = Arc::new((AtomicUsize::new(0), AtomicUsize::new(0)));
        let work = memory.iter().enumerate().map(|(index, &memory)| {
            let (now, most, wait) = (Arc::clone(&now), Arc::clone(&most), wait.clone());
            let work = move || {
                let held = now.0.fetch_add(memory, Ordering::SeqCst) + memory;
                let pieces = now.1.fetch_add(1, Ordering::SeqCst) + 1;
                most.0.fetch_max(held, Ordering::SeqCst);
                most.1.fetch_max(pieces, Ordering::SeqCst);
                wait();
                now.0.fetch_sub(memory, Ordering::SeqCst);
                now.1.fetch_sub(1, Ordering::SeqCst);
                Ok(())
            };
            let (pool, claim) = (&pool, claim(&format!("{}", index % 3)));
            async move { pool.run(&claim, Cost { time: memory, memory }, work).await.unwrap() }
        });
        join_all(work).await;
        (most.0.load(Ordering::SeqCst), most.1.load(Ordering::SeqCst))
    }

    #[tokio::test]
    async fn work_begins_once_there_is_room_for_it() {
        let pause = || sleep(Duration::from_millis(3));
        assert_eq!(together(&[60; 12], pause).await, (60, 1));
        let (held, _) = together(&[10, 50, 90, 30, 20, 40, 70, 5, 100, 15, 1, 1, 1], pause).await;
        assert!(held <= MOST, "{held}");
        // Three fit, and run together.
        let barrier = Arc::new(Barrier::new(3));
        let all_there = move || {
            barrier.wait();
        };
        assert_eq!(together(&[33; 3], all_there).await, (99, 3));
    }

    #[tokio::test]
    async fn what_is_larger_than_all_there_is_runs_alone() {
        let (held, _) = together(&[500, 10, 10, 500, 10], || sleep(Duration::from_millis(3))).await;
        assert_eq!(held, 500);
    }

    #[tokio::test]
    async fn memory_comes_back_from_work_that_panics_or_is_not_done() {
        let pool = Pool::new("test", Some(2), MOST).unwrap();
        let cost = Cost { time: 1, memory: MOST };
        let fails = || -> Result<(), ScoreError> { panic!("on purpose") };
        assert!(matches!(pool.run(&claim("a"), cost, fails).await, Err(ScoreError::Internal(_))));
        let late = Claim { deadline: Some(Instant::now()), ..claim("a") };
        assert_eq!(pool.run(&late, cost, || Ok(())).await, Err(ScoreError::DeadlineExceeded));
        assert_eq!(pool.run(&claim("a"), cost, || Ok(7)).await, Ok(7));
    }

    /// One whose pictures are large is charged for their size: the small ones of another go between.
    #[tokio::test]
    async fn a_caller_with_little_work_does_not_wait_for_one_with_much() {
        let pool = Pool::new("test", Some(1), MOST).unwrap();
        let order = Arc::new(Mutex::new(Vec::new()));
        let run = |name: &'static str, memory: usize, pause: u64| {
            let (order, pool) = (Arc::clone(&order), &pool);
            let work = move || {
                sleep(Duration::from_millis(pause));
                order.lock().unwrap().push(name);
                Ok(())
            };
            async move { pool.run(&claim(name), Cost { time: memory, memory }, work).await.unwrap() }
        };
        let first = run("large", 90, 100);
        let large = join_all((0..3).map(|_| run("large", 90, 1)));
        let small = join_all((0..5).map(|_| run("small", 9, 1)));
        tokio::join!(first, large, small);
        let order = order.lock().unwrap();
        let last = order.iter().rposition(|&name| name == "small").unwrap();
        assert!(order[..last].iter().filter(|&&name| name == "large").count() <= 2, "{order:?}");
    }
}
