//! gRPC's health protocol: whether the server serves, said of the server as a whole and of its service alike.

use std::pin::Pin;

use futures::{Stream, StreamExt, stream};
use tokio::sync::watch;
use tokio_stream::wrappers::WatchStream;
use tonic::{Request, Response, Status};

use crate::edge::proto::health::health_check_response::ServingStatus;
use crate::edge::proto::health::health_server;
use crate::edge::proto::health::{
    HealthCheckRequest, HealthCheckResponse, HealthListRequest, HealthListResponse,
};
use crate::edge::proto::spatial_score_service_server::SERVICE_NAME;

/// What can be asked for.
const SERVICES: [&str; 2] = ["", SERVICE_NAME];

/// The handlers of health.
#[derive(Debug, Clone)]
pub struct Health {
    serving: watch::Receiver<bool>,
}

impl Health {
    /// Handlers that say what `serving` does.
    pub fn new(serving: watch::Receiver<bool>) -> Self {
        Self { serving }
    }

    fn now(&self) -> HealthCheckResponse {
        response(*self.serving.borrow())
    }
}

fn response(serving: bool) -> HealthCheckResponse {
    let status = if serving { ServingStatus::Serving } else { ServingStatus::NotServing };
    HealthCheckResponse { status: status.into() }
}

fn is_known(request: &Request<HealthCheckRequest>) -> bool {
    SERVICES.contains(&request.get_ref().service.as_str())
}

#[tonic::async_trait]
impl health_server::Health for Health {
    async fn check(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        if is_known(&request) {
            Ok(Response::new(self.now()))
        } else {
            Err(Status::not_found("there is no such service here"))
        }
    }

    async fn list(&self, _: Request<HealthListRequest>) -> Result<Response<HealthListResponse>, Status> {
        let statuses = SERVICES.map(|service| (service.to_owned(), self.now())).into();
        Ok(Response::new(HealthListResponse { statuses }))
    }

    type WatchStream = Pin<Box<dyn Stream<Item = Result<HealthCheckResponse, Status>> + Send>>;

    async fn watch(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        Ok(Response::new(if is_known(&request) {
            Box::pin(WatchStream::new(self.serving.clone()).map(response).map(Ok))
        } else {
            // The protocol has it that this stays open, for a service that may come yet.
            let status = ServingStatus::ServiceUnknown.into();
            Box::pin(stream::iter([Ok(HealthCheckResponse { status })]).chain(stream::pending()))
        }))
    }
}
