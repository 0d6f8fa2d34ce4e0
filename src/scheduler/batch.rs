//! The plan of a batch.

use std::collections::VecDeque;
use std::time::Instant;

use metrics::counter;

use super::queue::{Job, Permit};
use crate::config::BatchBudget;
use crate::error::ScoreError;
use crate::telemetry::ITEMS_DROPPED;

/// Takes the oldest jobs that fit the budget together. Jobs whose caller is gone, or whose deadline has passed at
/// `now`, are answered; their permits come back to be dropped outside the queue's lock.
pub(super) fn take_batch(
    waiting: &mut VecDeque<Job>,
    budget: BatchBudget,
    now: Instant,
) -> (Vec<Job>, Vec<Permit>) {
    let (mut batch, mut dropped, mut tokens) = (Vec::new(), Vec::new(), 0);
    while let Some(job) = waiting.pop_front() {
        // The deadline comes first: it is also why the caller has left.
        let reason = if job.deadline.is_some_and(|deadline| deadline <= now) {
            Some(("late", ScoreError::DeadlineExceeded))
        } else if job.reply.is_closed() {
            Some(("cancelled", ScoreError::Cancelled))
        } else {
            None
        };
        if let Some((label, error)) = reason {
            counter!(ITEMS_DROPPED, "reason" => label).increment(1);
            let _ = job.reply.send(Err(error));
            dropped.push(job.permit);
            continue;
        }
        let fits = tokens + job.sample.tokens() <= budget.tokens && batch.len() < budget.items;
        if !fits && !batch.is_empty() {
            waiting.push_front(job);
            break;
        }
        tokens += job.sample.tokens();
        batch.push(job);
    }
    (batch, dropped)
}
