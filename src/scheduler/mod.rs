//! The queue between the callers and the devices, and the plan of a batch.
//!
//! `queue` holds what waits and hands out batches, `room` bounds it, `fair` says whose turn it is, `batch` what goes
//! together, `rate` how long things take.

mod batch;
mod fair;
mod line;
mod queue;
mod rate;
mod room;

pub use fair::Fair;
pub use queue::{Job, Permit, Queue, Scored};
