//! The queue between the callers and the devices, and the plan of a batch.

mod batch;
mod queue;

pub use queue::{Job, Permit, Queue, Scored};
