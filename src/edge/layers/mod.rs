//! The layers that every call passes, over gRPC and HTTP alike: [`crowd`] (strangers with too many calls), [`call`] (deadline,
//! trace, count, log), then [`admission`] (who calls, how often refused: `refusals`, how much at once and how slowly:
//! `message_body`). What they have to know of a method stands in [`method`].

pub mod admission;
pub(crate) mod arrivals;
pub(crate) mod byte_budget;
pub mod call;
pub mod crowd;
pub(crate) mod framing;
pub(crate) mod message_body;
pub mod method;
pub(crate) mod peer;
pub(crate) mod refusals;

use std::convert::Infallible;

use futures::future::BoxFuture;
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

/// What a layer answers, once it can.
pub type Answering = BoxFuture<'static, Result<Response<Body>, Infallible>>;
