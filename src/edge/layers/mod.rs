//! The layers that every call passes, over gRPC and HTTP alike: [`crowd`] (strangers with too many calls), [`call`] (deadline,
//! trace, count, log), then [`admission`] (who calls, how much at once: `byte_budget`, how slowly: `punctual`, how often
//! refused: `refusals`).

pub mod admission;
pub(crate) mod byte_budget;
pub mod call;
pub mod crowd;
pub(crate) mod fields;
pub(crate) mod framing;
pub mod http_path;
pub(crate) mod peer;
pub(crate) mod punctual;
pub(crate) mod refusals;

use std::convert::Infallible;

use http::{Request, Response};
use tonic::body::Body;
use tower::Service;

/// What answers the calls of a connection, over gRPC and HTTP alike. A layer's is one too.
pub trait CallService:
    Service<Request<Body>, Response = Response<Body>, Error = Infallible, Future: Send + 'static>
    + Clone
    + Send
    + 'static
{
}

impl<S> CallService for S where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible, Future: Send + 'static>
        + Clone
        + Send
        + 'static
{
}
