//! The queue between the callers and the devices, and the plan of a batch.

mod batch;
mod caller;
mod queue;

pub use caller::Caller;
pub use queue::{Job, Permit, Queue, Scored};
