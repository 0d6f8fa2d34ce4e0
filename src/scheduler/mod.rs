//! The queue between the callers and the devices, and the plan of a batch.

mod batch;
mod queue;

pub use batch::BatchBudget;
pub use queue::{Capacity, Job, Permit, Queue, Scored};
