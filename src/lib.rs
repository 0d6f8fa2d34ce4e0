//! A gRPC server for **SpatialScore**, the reward model of *Enhancing Spatial Understanding in Image Generation
//! via Reward Modeling* (arXiv 2602.24233).
//!
//! # The path of a request
//!
//! One direction, no way back but the reply. A module may use those below it in this list and none above:
//!
//! 1. [`service`]: the gRPC edge. Checks limits and deadlines, refuses early.
//! 2. [`processor`]: bytes to pixels to patches, prompt to token ids, on a CPU pool. The twin of the
//!    Hugging Face processor. Its product is a [`model::Sample`].
//! 3. [`worker`]: one OS thread per device takes batches from the queue, computes, and replies.
//! 4. [`scheduler`]: the queue, bounded in tokens and items, and the plan of a batch.
//! 5. [`model`]: Qwen2.5-VL and the reward head on libtorch. No network, no tokio.
//!
//! [`config`], [`error`] and [`telemetry`] may be used by all.
#![warn(missing_docs)]

pub mod error;
pub mod model;
pub mod scheduler;
pub mod telemetry;
pub mod worker;
