//! The life of a server: listen, load, serve, drain, stop.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use metrics::gauge;
use metrics_exporter_prometheus::PrometheusHandle;
use rustls::ServerConfig;
use serde::Deserialize;
use tch::{Device, Kind};
use tokio::net::TcpListener;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tonic::codec::CompressionEncoding;
use tonic::service::Routes;
use tonic_health::ServingStatus;
use tonic_health::server::{HealthReporter, health_reporter};
use tower::ServiceBuilder;

use crate::auth::{self, FileFault, Followed, Tokens};
use crate::config::Settings;
use crate::device;
use crate::engine::{Engine, Lifeline, LoadError, Loaded, MakeScorer, ModelInfo};
use crate::model::checkpoint::{CheckpointFiles, RewardConfig};
use crate::model::{Normalisation, RewardModel, Scorer};
use crate::processor::{Processor, ProcessorLimits};
use crate::proto::spatial_score_service_server::{SERVICE_NAME, SpatialScoreServiceServer};
use crate::service::{CallLayer, Gate, Handlers, Stage};
use crate::transport::{self, Protocol, Wire};
use crate::{http, proto, telemetry};

/// How long connections may take to close once every call is answered. A health watcher never would.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// The most bytes of a message that asks for health or a description: each names a service or a symbol.
const MOST_OF_A_NAME: usize = 4 << 10;

/// The sockets of a server, already bound.
#[derive(Debug)]
pub struct Listeners {
    /// For gRPC.
    pub grpc: TcpListener,
    /// For trainers' own reward clients, which speak HTTP/1.1.
    pub http: Option<TcpListener>,
    /// For Prometheus.
    pub metrics: Option<TcpListener>,
}

/// Why a server ended otherwise than by being told to.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// There is no model to serve.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// A socket failed.
    #[error("{address}: {source}")]
    Bind {
        /// The address that was asked for.
        address: String,
        /// What the system said.
        source: io::Error,
    },
    /// A file of tokens or certificates cannot be used.
    #[error(transparent)]
    Auth(#[from] FileFault),
    /// The reflection service cannot be made.
    #[error("reflection: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
}

impl Listeners {
    /// Binds the addresses of the settings.
    ///
    /// # Errors
    /// An address is taken or not this machine's.
    pub async fn bind(settings: &Settings) -> Result<Self, ServerError> {
        let bind = async |address: SocketAddr| {
            TcpListener::bind(address)
                .await
                .map_err(|source| ServerError::Bind { address: address.to_string(), source })
        };
        let bind_if = async |address: Option<_>| match address {
            Some(address) => bind(address).await.map(Some),
            None => Ok(None),
        };
        Ok(Self {
            grpc: bind(settings.server.listen).await?,
            http: bind_if(settings.http_listen).await?,
            metrics: bind_if(settings.metrics_listen).await?,
        })
    }
}

/// Serves the checkpoint of the settings until `shutdown`, then answers what was accepted.
///
/// # Errors
/// The checkpoint cannot be served, or the socket failed.
pub async fn run(
    settings: Settings,
    listeners: Listeners,
    metrics: Option<PrometheusHandle>,
    shutdown: impl Future<Output = ()>,
) -> Result<(), ServerError> {
    let scrapes = async {
        match (listeners.metrics, metrics) {
            (Some(listener), Some(handle)) => transport::serve_metrics(listener, handle).await,
            _ => std::future::pending().await,
        }
    };
    tokio::select! {
        ended = serve(settings, listeners.grpc, listeners.http, load_checkpoint, shutdown) => ended,
        () = scrapes => Ok(()),
    }
}

/// Serves whatever `load` gives. It runs on a thread of its own while the server listens already.
///
/// # Errors
/// As [`run`].
pub async fn serve<S: Scorer + 'static>(
    settings: Settings,
    grpc: TcpListener,
    http: Option<TcpListener>,
    load: impl FnOnce(&Settings) -> Result<Loaded<S>, LoadError> + Send + 'static,
    shutdown: impl Future<Output = ()>,
) -> Result<(), ServerError> {
    let (stage, watched) = watch::channel(Stage::Loading);
    let (health, transport) = open(&settings, grpc, http, Handlers::new(watched)).await?;
    let mut shutdown = std::pin::pin!(shutdown);

    let server = settings.server.clone();
    let loading =
        on_thread("loader", move || load(&settings).and_then(|loaded| Engine::start(&settings, loaded)))?;
    let (engine, lifeline) = tokio::select! {
        started = loading => started.unwrap_or_else(|_| Err(LoadError::Probe("the loader panicked".into())))?,
        () = &mut shutdown => {
            tracing::info!("told to stop while the model was loading");
            return Ok(());
        }
    };

    let info = engine.info().clone();
    publish(&info);
    stage.send_replace(Stage::Serving(engine));
    let up = lifeline.workers_up();
    let lost = tokio::select! {
        lost = follow_workers(up, &health, &info, server.recovery_timeout) => Some(lost),
        () = &mut shutdown => None,
    };

    health.announce(ServingStatus::NotServing).await;
    if let Some(lost) = lost {
        stage.send_replace(Stage::Draining);
        lifeline.abandon();
        transport.close().await?;
        return Err(lost.into());
    }
    tracing::info!(grace = ?server.drain_grace, "told to stop");
    tokio::time::sleep(server.drain_grace).await;
    stage.send_replace(Stage::Draining);
    drain(lifeline, server.drain_timeout).await;
    transport.close().await
}

/// Keeps health true while the workers come and go. Ends where there has been none for `limit`.
async fn follow_workers(
    mut up: watch::Receiver<usize>,
    health: &Health,
    info: &ModelInfo,
    limit: Duration,
) -> LoadError {
    let mut served = false;
    loop {
        let count = *up.borrow_and_update();
        gauge!(telemetry::WORKERS).set(count as f64);
        let status = if count > 0 { ServingStatus::Serving } else { ServingStatus::NotServing };
        health.announce(status).await;
        if count > 0 && !std::mem::replace(&mut served, true) {
            // Last, since whoever waits for this line calls at once.
            tracing::info!(model = ?info, "serving");
        }
        let patience = if count > 0 { Duration::MAX } else { limit };
        // The sender goes with the last worker, which no queue that is open lets go.
        if !timeout(patience, up.changed()).await.is_ok_and(|changed| changed.is_ok()) {
            return LoadError::Lost(limit);
        }
    }
}

/// Answers everything that was accepted, or says that it will not be, and ends the workers.
async fn drain(mut lifeline: Lifeline, limit: Duration) {
    tracing::info!(?limit, "draining");
    if timeout(limit, lifeline.released()).await.is_err() {
        tracing::warn!("the time for draining is over; what is left is answered with UNAVAILABLE");
        lifeline.abandon();
        // Callers that do not read their answers may hold on; their connections are closed next.
        let _ = timeout(CLOSE_TIMEOUT, lifeline.released()).await;
    }
    // A forward that runs now ends first: libtorch must not be taken down under it. A device that hangs for good
    // takes a second signal.
    let _ = tokio::task::spawn_blocking(|| lifeline.join()).await;
}

/// Ports that are served.
struct Transport {
    close: watch::Sender<bool>,
    ports: JoinSet<()>,
}

impl Transport {
    /// Lets the connections end, and ends them where they do not.
    async fn close(mut self) -> Result<(), ServerError> {
        self.close.send_replace(true);
        // A panic, if any, has been logged, and every call was answered before. What is left goes with the set.
        let _ = timeout(CLOSE_TIMEOUT, async { while self.ports.join_next().await.is_some() {} }).await;
        Ok(())
    }
}

/// Starts to listen, with every service, and with a health that says `NOT_SERVING`.
async fn open(
    settings: &Settings,
    grpc: TcpListener,
    http: Option<TcpListener>,
    handlers: Handlers,
) -> Result<(Health, Transport), ServerError> {
    let (reporter, health_service) = health_reporter();
    let (serving, is_serving) = watch::channel(false);
    let health = Health { reporter, serving };
    health.announce(ServingStatus::NotServing).await;
    let limits = &settings.limits;
    let gate = Gate::new(tokens(settings)?, limits);
    let calls = ServiceBuilder::new().layer(CallLayer).layer(gate);
    let wire = Wire::new(certificates(settings)?, settings);
    let (close, closed) = watch::channel(false);
    let mut ports = JoinSet::new();
    if let Some(listener) = http {
        let routes = http::routes(handlers.clone(), is_serving, limits.max_message_bytes);
        let service = http::translate(calls.clone().service(routes), handlers.clone());
        ports.spawn(transport::serve(Arc::clone(&wire), Protocol::Http1, listener, service, closed.clone()));
    }
    let health_service = health_service.max_decoding_message_size(MOST_OF_A_NAME);
    let routes = grpc_routes(Routes::new(health_service), handlers, limits.max_message_bytes)?;
    ports.spawn(transport::serve(wire, Protocol::Http2, grpc, calls.service(routes), closed));
    Ok((health, Transport { close, ports }))
}

/// The services of the gRPC port beside those in `routes`, with messages of at most `most` bytes.
fn grpc_routes(routes: Routes, handlers: Handlers, most: usize) -> Result<Routes, ServerError> {
    // Each version of reflection names the other too.
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .include_reflection_service(false)
            .register_encoded_file_descriptor_set(proto::DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_reflection::pb::v1alpha::FILE_DESCRIPTOR_SET)
    };
    let service = SpatialScoreServiceServer::new(handlers)
        .max_decoding_message_size(most)
        .accept_compressed(CompressionEncoding::Gzip);
    Ok(routes
        .add_service(reflection().build_v1()?.max_decoding_message_size(MOST_OF_A_NAME))
        .add_service(reflection().build_v1alpha()?.max_decoding_message_size(MOST_OF_A_NAME))
        .add_service(service)
        .prepare())
}

/// The tokens of the settings' file, read again whenever it changes.
fn tokens(settings: &Settings) -> Result<Option<Followed<Tokens>>, FileFault> {
    let Some(path) = settings.tokens_file.clone() else { return Ok(None) };
    let public = |address: &SocketAddr| !address.ip().is_loopback();
    if settings.tls.is_none()
        && [Some(settings.server.listen), settings.http_listen].iter().flatten().any(public)
    {
        tracing::warn!("tokens cross the network in plain text: set tls.certificate, or let a proxy do TLS");
    }
    let parse = move |contents: &[Vec<u8>]| {
        Tokens::parse(&path, contents.first().map(Vec::as_slice).unwrap_or_default())
    };
    let followed = auth::follow("tokens", settings.tokens_file.iter().cloned().collect(), parse)?;
    tracing::info!(count = followed.borrow().count(), "callers must show a token");
    Ok(Some(followed))
}

/// The certificates of the settings' files, read again whenever they change.
fn certificates(settings: &Settings) -> Result<Option<Followed<ServerConfig>>, FileFault> {
    let Some(tls) = settings.tls.clone() else { return Ok(None) };
    let files = tls.files();
    tracing::info!(clients = tls.client_ca.is_some(), "connections use TLS");
    let parse = move |contents: &[Vec<u8>]| auth::server_config(&tls, contents);
    auth::follow("certificates", files, parse).map(Some)
}

/// Shows what is served among the metrics.
fn publish(info: &ModelInfo) {
    gauge!(
        telemetry::MODEL_INFO,
        "name" => info.name.clone(),
        "revision" => info.revision.clone(),
        "dtype" => info.dtype.clone(),
        "devices" => info.devices.join(","),
    )
    .set(1.0);
}

/// What health checkers are told.
struct Health {
    reporter: HealthReporter,
    /// The same for those that ask over HTTP.
    serving: watch::Sender<bool>,
}

impl Health {
    /// Tells them, of the server as a whole and of the service alike, and the metrics.
    async fn announce(&self, status: ServingStatus) {
        self.reporter.set_service_status("", status).await;
        self.reporter.set_service_status(SERVICE_NAME, status).await;
        let serving = status == ServingStatus::Serving;
        self.serving.send_replace(serving);
        gauge!(telemetry::SERVING).set(if serving { 1.0 } else { 0.0 });
    }
}

/// Runs blocking work on a thread of its own, which the end of the runtime does not wait for.
fn on_thread<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<oneshot::Receiver<T>, LoadError> {
    let (done, result) = oneshot::channel();
    std::thread::Builder::new().name(name.to_owned()).spawn(move || drop(done.send(work())))?;
    Ok(result)
}

/// Finds the checkpoint of the settings, its processor, and the devices that it shall run on.
fn load_checkpoint(settings: &Settings) -> Result<Loaded<RewardModel>, LoadError> {
    #[derive(Deserialize)]
    struct Architecture {
        model_type: String,
    }
    let model = &settings.model;
    let files =
        CheckpointFiles::open(&model.checkpoint, model.revision.as_deref(), model.reward_config.as_deref())?;
    let reward: RewardConfig = files.require_json("reward_config.json")?;
    let processor = Processor::load(&files, &reward, ProcessorLimits::from(&settings.limits))?;
    let devices = model.device.resolve()?;
    let mut kinds: Vec<&str> = devices.iter().map(|&d| device::kind_name(model.dtype.on(d))).collect();
    kinds.dedup();
    let info = ModelInfo {
        name: files.name().to_owned(),
        architecture: files.require_json::<Architecture>("config.json")?.model_type,
        revision: files.revision()?,
        dtype: kinds.join(","),
        devices: devices.iter().copied().map(device::name).collect(),
        output: reward.output,
        notice: reward.notice.unwrap_or_default(),
    };
    let files = Arc::new(files);
    let workers = devices
        .into_iter()
        .map(|device| {
            make_model(
                Arc::clone(&files),
                processor.normalisation(),
                device,
                model.dtype.on(device),
                model.threads,
            )
        })
        .collect();
    Ok(Loaded { info, processor, workers })
}

fn make_model(
    files: Arc<CheckpointFiles>,
    normalisation: Normalisation,
    device: Device,
    kind: Kind,
    threads: Option<usize>,
) -> MakeScorer<RewardModel> {
    Box::new(move || {
        if let Some(threads) = threads.and_then(|threads| i32::try_from(threads).ok()) {
            // OpenMP keeps the number per thread, so it is set on the thread that will compute.
            tch::set_num_threads(threads);
        }
        Ok(RewardModel::load(&files, normalisation, device, kind)?)
    })
}
