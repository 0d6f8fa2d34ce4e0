//! The service of those who run a server: models come and go while it serves.

use std::sync::Arc;

use tokio::sync::watch;
use tonic::{Request, Response, Status};

use super::convert;
use crate::config::models::Table;
use crate::config::{Limits, ModelSettings};
use crate::edge::proto;
use crate::edge::proto::admin_service_server::AdminService;
use crate::engine::{Model, ModelControl, ModelControlError, State};
use crate::error::brief;

/// The handlers of the service.
#[derive(Clone)]
pub struct Admin {
    manager: watch::Receiver<Option<Arc<dyn ModelControl>>>,
    /// What a model's own description does not say.
    common: ModelSettings,
    limits: Limits,
}

impl Admin {
    /// Handlers for the models of `manager`, once it has them.
    pub fn new(
        manager: watch::Receiver<Option<Arc<dyn ModelControl>>>,
        common: ModelSettings,
        limits: Limits,
    ) -> Self {
        Self { manager, common, limits }
    }

    /// Does something that takes its time, on a thread that may wait. It goes on where its caller leaves.
    async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&dyn ModelControl) -> Result<T, ModelControlError> + Send + 'static,
    ) -> Result<T, Status> {
        let manager = self.manager.borrow().clone();
        let manager =
            manager.ok_or_else(|| Status::unavailable("the server is loading its models, or stops"))?;
        let done = tokio::task::spawn_blocking(move || work(&*manager)).await;
        done.map_err(|_| Status::internal("it panicked"))?.map_err(|error| status(&error))
    }

    async fn bring(
        &self,
        source: Option<proto::ModelSource>,
        replaces: bool,
    ) -> Result<Option<proto::GetModelResponse>, Status> {
        let settings = settings(source, &self.common)?;
        let limits = self.limits.clone();
        let bring = move |manager: &dyn ModelControl| {
            let model = if replaces { manager.replace(&settings) } else { manager.load(&settings) }?;
            Ok(convert::model(&model, &State::Serving, &limits))
        };
        self.run(bring).await.map(Some)
    }
}

/// The model that a message describes.
fn settings(source: Option<proto::ModelSource>, common: &ModelSettings) -> Result<ModelSettings, Status> {
    let proto::ModelSource { name, checkpoint, revision, profile, device, dtype } =
        source.unwrap_or_default();
    let said = [("revision", revision), ("profile", profile), ("device", device), ("dtype", dtype)];
    let said = said.into_iter().filter(|(_, value)| !value.is_empty());
    let keys = [("name", name), ("checkpoint", checkpoint)].into_iter().chain(said);
    let keys = keys.map(|(key, value)| (key.to_owned(), value)).collect();
    let table = Table { place: "model".to_owned(), origin: "from the call".to_owned(), keys };
    table.model(common).map_err(|faults| {
        let faults: Vec<String> = faults.iter().map(ToString::to_string).collect();
        Status::invalid_argument(brief(faults.join("; ")))
    })
}

fn status(error: &ModelControlError) -> Status {
    let text = brief(error);
    match error {
        ModelControlError::NoSuch(_) => Status::not_found(text),
        ModelControlError::Exists(_) => Status::already_exists(text),
        ModelControlError::Default(_) => Status::invalid_argument(text),
        ModelControlError::Fixed | ModelControlError::Load(_) | ModelControlError::Changed(_) => {
            Status::failed_precondition(text)
        }
    }
}

#[tonic::async_trait]
impl AdminService for Admin {
    async fn load_model(
        &self,
        request: Request<proto::LoadModelRequest>,
    ) -> Result<Response<proto::LoadModelResponse>, Status> {
        let model = self.bring(request.into_inner().model, false).await?;
        Ok(Response::new(proto::LoadModelResponse { model }))
    }

    async fn replace_model(
        &self,
        request: Request<proto::ReplaceModelRequest>,
    ) -> Result<Response<proto::ReplaceModelResponse>, Status> {
        let model = self.bring(request.into_inner().model, true).await?;
        Ok(Response::new(proto::ReplaceModelResponse { model }))
    }

    async fn unload_model(
        &self,
        request: Request<proto::UnloadModelRequest>,
    ) -> Result<Response<proto::UnloadModelResponse>, Status> {
        let name = request.into_inner().name;
        self.run(move |manager| manager.unload(&name)).await?;
        Ok(Response::new(proto::UnloadModelResponse {}))
    }

    async fn sleep_model(
        &self,
        request: Request<proto::SleepModelRequest>,
    ) -> Result<Response<proto::SleepModelResponse>, Status> {
        let name = request.into_inner().name;
        self.run(move |manager| manager.sleep(&name)).await?;
        Ok(Response::new(proto::SleepModelResponse {}))
    }

    async fn wake_model(
        &self,
        request: Request<proto::WakeModelRequest>,
    ) -> Result<Response<proto::WakeModelResponse>, Status> {
        let name = request.into_inner().name;
        self.run(move |manager| manager.wake(&name)).await?;
        Ok(Response::new(proto::WakeModelResponse {}))
    }

    async fn describe_models(
        &self,
        _: Request<proto::DescribeModelsRequest>,
    ) -> Result<Response<proto::DescribeModelsResponse>, Status> {
        let limits = self.limits.clone();
        let describe = move |manager: &dyn ModelControl| {
            let model = |(model, state): (Arc<Model>, State)| convert::model(&model, &state, &limits);
            Ok(manager.models().all().into_iter().map(model).collect())
        };
        Ok(Response::new(proto::DescribeModelsResponse { models: self.run(describe).await? }))
    }
}
