//! The calls of a stranger that has as many open as it may are refused before they cost more than that: no span, no line of
//! the log each, and no more of them are read until their turn.

use std::convert::Infallible;
use std::future::{Ready, ready};
use std::task::{Context, Poll};

use futures::future::Either;
use http::{Request, Response};
use metrics::counter;
use tonic::body::Body;
use tower::{Layer, Service};

use super::CallService;
use super::admission::Gate;
use super::method::Method;
use crate::edge::grpc::code_name;
use crate::telemetry::REQUESTS;

/// The layer before all others. It stands beside the [`Gate`], which knows who may have how much.
#[derive(Clone)]
pub struct CrowdLayer(Gate);

impl CrowdLayer {
    /// Refuses what `gate` would refuse anyway.
    pub fn new(gate: &Gate) -> Self {
        Self(gate.clone())
    }
}

impl<S> Layer<S> for CrowdLayer {
    type Service = Crowd<S>;

    fn layer(&self, inner: S) -> Crowd<S> {
        Crowd { gate: self.0.clone(), inner }
    }
}

/// A service that strangers' crowds do not reach.
#[derive(Clone)]
pub struct Crowd<S> {
    gate: Gate,
    inner: S,
}

impl<S: CallService> Service<Request<Body>> for Crowd<S> {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Either<Ready<Result<Response<Body>, Infallible>>, S::Future>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let Some(refusal) = self.gate.turn_away(&request) else {
            return Either::Right(self.inner.call(request));
        };
        let code = code_name(refusal.code());
        counter!(REQUESTS, "rpc" => Method::of(request.uri().path()).label, "code" => code).increment(1);
        Either::Left(ready(Ok(refusal.into_http())))
    }
}
