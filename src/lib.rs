//! A gRPC server for **SpatialScore**, the reward model of *Enhancing Spatial Understanding in Image Generation
//! via Reward Modeling* (arXiv 2602.24233).
//!
//! # The path of a request
//!
//! One direction, no way back but the reply. A module may use those below it in this list and none above:
//!
//! 1. [`server`]: the life of a server: listen, load, serve, drain, stop.
//! 2. [`edge`]: connections, the layers that every call passes, the handlers of gRPC and HTTP, who may call. Checks limits
//!    and deadlines, refuses early.
//! 3. [`engine`]: what stands behind the edge: the models that are up, their processors, the one queue, the workers.
//! 4. [`processor`]: bytes to pixels to patches, prompt to token ids, on a CPU pool. The twin of the
//!    Hugging Face processor. Its product is a [`model::Sample`].
//! 5. [`scheduler`]: the queue, bounded in tokens and items, the plan of a batch, and one OS thread per device that takes
//!    batches from the queue, computes, and replies.
//! 6. [`model`]: the backbone and the readout on libtorch. No network, no tokio.
//!
//! [`audit`] is the log of what judged which item: the engine hands in its lines, and `spatialscore replay` reads them.
//!
//! [`recent`] is what was scored in the last minutes: the engine hands it in, and the edge shows it.
//!
//! [`explain`] is what an explanation changes in a picture or a prompt: the edge and the command line score what it makes.
//!
//! [`byte_room`], [`config`], [`device`], [`error`], [`files`], [`process`], [`request_context`], [`statistics`] and
//! [`telemetry`] may be used by all; [`cli`] is what the binary does with them.
#![warn(missing_docs)]
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

pub mod audit;
pub mod byte_room;
pub mod cli;
pub mod config;
pub mod device;
pub mod edge;
pub mod engine;
pub mod error;
pub mod explain;
pub mod files;
pub mod model;
pub mod process;
pub mod processor;
pub mod recent;
pub mod request_context;
pub mod scheduler;
pub mod server;
pub mod statistics;
pub mod telemetry;
