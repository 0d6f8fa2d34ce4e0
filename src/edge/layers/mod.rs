//! The layers that every call passes, over gRPC and HTTP alike: [`call`] (deadline, trace, count, log), then [`admission`]
//! (who calls, how much at once: `byte_budget`, how slowly: `punctual`).

pub mod admission;
pub(crate) mod byte_budget;
pub mod call;
pub(crate) mod fields;
pub(crate) mod framing;
pub mod http_path;
pub(crate) mod peer;
pub(crate) mod punctual;
pub(crate) mod refusals;
