//! The queue between the callers and the devices, and the plan of a batch.
//!
//! `queue` holds what waits and hands out batches, `quota` bounds it, `fair_queue` says whose turn it is, `batching`
//! what goes together, `throughput` how long things take. [`worker`] is the thread that owns a device.

mod batching;
mod fair_queue;
mod line;
mod queue;
mod quota;
mod throughput;
pub mod worker;

pub use fair_queue::Fair;
pub use queue::{Job, Permit, Queue, Scored, Tag};
