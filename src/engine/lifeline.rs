//! What ends an engine.

use std::convert::Infallible;
use std::sync::{Arc, PoisonError};
use std::thread::JoinHandle;

use tokio::sync::{mpsc, watch};

use super::{STOPPED, manager};
use crate::error::ScoreError;
use crate::scheduler::Queue;

/// What the owner of an engine keeps: it outlives the engine and ends it.
#[derive(Debug)]
pub struct Lifeline {
    pub(super) queue: Arc<Queue>,
    pub(super) stop: watch::Sender<bool>,
    pub(super) up: watch::Receiver<usize>,
    pub(super) alive: mpsc::Receiver<Infallible>,
    pub(super) workers: manager::Workers,
}

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
        let workers = std::mem::take(&mut *self.workers.lock().unwrap_or_else(PoisonError::into_inner));
        end(&self.queue, workers);
    }
}

/// Ends workers once their queue is empty and waits for them.
pub(super) fn end(queue: &Queue, workers: Vec<JoinHandle<()>>) {
    queue.close(STOPPED);
    for worker in workers {
        if worker.join().is_err() {
            tracing::error!("a worker ended with a panic");
        }
    }
}
