//! A gRPC server for **SpatialScore**, the reward model of *Enhancing Spatial Understanding in Image Generation
//! via Reward Modeling* (arXiv 2602.24233).
//!
//! # The path of a request
//!
//! One direction, no way back but the reply. A module may use those below it in this list and none above:
//!
//! 1. [`server`]: the life of a server: listen, load, serve, drain, stop. [`transport`]: its connections, TLS.
//! 2. [`service`]: the gRPC edge. Knows who calls, checks limits and deadlines, refuses early. [`http`] puts the JSON of
//!    trainers' own reward clients before it.
//! 3. [`engine`]: what stands behind the service: processor, queue and workers of a model that is up.
//! 4. [`processor`]: bytes to pixels to patches, prompt to token ids, on a CPU pool. The twin of the
//!    Hugging Face processor. Its product is a [`model::Sample`].
//! 5. [`worker`]: one OS thread per device takes batches from the queue, computes, and replies.
//! 6. [`scheduler`]: the queue, bounded in tokens and items, and the plan of a batch.
//! 7. [`model`]: Qwen-VL and the reward head on libtorch. No network, no tokio.
//!
//! [`auth`], [`caller`], [`config`], [`device`], [`error`], [`files`], [`process`], [`telemetry`] and [`trace`] may be used
//! by all; [`cli`] is what the binary does with them, [`proto`] the contract on the wire.
#![warn(missing_docs)]
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

pub mod auth;
pub mod caller;
pub mod cli;
pub mod config;
pub mod device;
pub mod engine;
pub mod error;
pub mod files;
pub mod http;
pub mod model;
pub mod process;
pub mod processor;
pub mod proto;
pub mod scheduler;
pub mod server;
pub mod service;
pub mod telemetry;
pub mod trace;
pub mod transport;
pub mod worker;
