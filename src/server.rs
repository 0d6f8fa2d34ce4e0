//! The life of a server: listen, load, serve, drain, stop.

mod upkeep;

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use metrics::gauge;
use metrics_exporter_prometheus::PrometheusHandle;
use rustls::ServerConfig;
use tokio::net::TcpListener;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;
use tonic::codec::CompressionEncoding;
use tonic::service::Routes;
use tower::ServiceBuilder;

use crate::audit::{self, Audit};
use crate::config::Settings;
use crate::edge::auth::{self, FileFault, Followed, Tokens};
use crate::edge::grpc::{Admin, Handlers, Health, Stage, grpc_only, status};
use crate::edge::layers::admission::Gate;
use crate::edge::layers::call::CallLayer;
use crate::edge::layers::crowd::CrowdLayer;
use crate::edge::proto::admin_service_server::AdminServiceServer;
use crate::edge::proto::health::health_server::HealthServer;
use crate::edge::proto::spatial_score_service_server::SpatialScoreServiceServer;
use crate::edge::transport::{self, Protocol, Wire};
use crate::edge::{http, proto};
use crate::engine::{
    self, Engine, IntoLoaded, Lifeline, LoadError, Loader, ModelControl, Models, Onlookers, Shadow, Tap,
};
use crate::model::Scorer;
use crate::recent::Recent;
use crate::telemetry;

/// How long connections may take to close once every call is answered. A health watcher never would.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// How long the lines of the audit log that wait for the disk may take at the end.
const AUDIT_TIMEOUT: Duration = Duration::from_secs(5);

/// The most bytes of a message that asks for health or a description: each names a service or a symbol.
const MOST_OF_A_NAME: usize = 4 << 10;
/// The most bytes of a message that describes a model.
const MOST_OF_A_MODEL: usize = 64 << 10;

/// The sockets of a server, already bound.
#[derive(Debug)]
pub struct Listeners {
    /// For gRPC.
    pub grpc: TcpListener,
    /// For trainers' own reward clients, which speak HTTP/1.1.
    pub http: Option<TcpListener>,
    /// For Prometheus.
    pub metrics: Option<TcpListener>,
    /// For those who have models come and go.
    pub admin: Option<TcpListener>,
}

/// Why a server ended otherwise than by being told to.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// There is no model to serve.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// A socket failed.
    #[error("{setting} = {address:?}: {source}")]
    Bind {
        /// The setting that names it.
        setting: &'static str,
        /// The address that was asked for.
        address: String,
        /// What the system said.
        source: io::Error,
    },
    /// The audit log cannot be written.
    #[error("audit.path = {0:?}: {1}")]
    Audit(PathBuf, io::Error),
    /// A file of tokens or certificates cannot be used.
    #[error(transparent)]
    Auth(#[from] FileFault),
    /// It was told to stop at once. What was not answered was refused.
    #[error("told to stop at once")]
    AtOnce,
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
        let bind = async |setting: &'static str, address: SocketAddr| {
            TcpListener::bind(address).await.map_err(|source| ServerError::Bind {
                setting,
                address: address.to_string(),
                source,
            })
        };
        let bind_if = async |setting: &'static str, address: Option<_>| match address {
            Some(address) => bind(setting, address).await.map(Some),
            None => Ok(None),
        };
        Ok(Self {
            grpc: bind("server.listen", settings.server.listen).await?,
            http: bind_if("http.listen", settings.http_listen).await?,
            metrics: bind_if("metrics.listen", settings.metrics_listen).await?,
            admin: bind_if("admin.listen", settings.admin.listen).await?,
        })
    }
}

/// Serves the checkpoint of the settings until `shutdown`, then answers what was accepted. What `shutdown` gives ends
/// where that is to be given up.
///
/// # Errors
/// The checkpoint cannot be served, the socket failed, or what was accepted was given up.
pub async fn run(
    settings: Settings,
    listeners: Listeners,
    metrics: Option<PrometheusHandle>,
    shutdown: impl Future<Output = impl Future<Output = ()>>,
) -> Result<(), ServerError> {
    let scrapes = async {
        match (listeners.metrics, metrics) {
            (Some(listener), Some(handle)) => transport::serve_metrics(listener, handle).await,
            _ => std::future::pending().await,
        }
    };
    let ports = Ports { grpc: listeners.grpc, http: listeners.http, admin: listeners.admin };
    tokio::select! {
        ended = serve_on(settings, ports, engine::load_all, Some(engine::loader()), shutdown) => ended,
        () = scrapes => Ok(()),
    }
}

/// The sockets that calls come by.
#[derive(Debug)]
struct Ports {
    grpc: TcpListener,
    http: Option<TcpListener>,
    admin: Option<TcpListener>,
}

/// Serves whatever `load` gives. It runs on a thread of its own while the server listens already.
///
/// # Errors
/// As [`run`].
pub async fn serve<L>(
    settings: Settings,
    grpc: TcpListener,
    http: Option<TcpListener>,
    load: impl FnOnce(&Settings) -> Result<L, LoadError> + Send + 'static,
    shutdown: impl Future<Output = impl Future<Output = ()>>,
) -> Result<(), ServerError>
where
    L: IntoLoaded<Scorer: Scorer + Send + 'static> + 'static,
{
    serve_on(settings, Ports { grpc, http, admin: None }, load, None, shutdown).await
}

/// As [`serve`], on all ports, with what loads more models.
async fn serve_on<L>(
    settings: Settings,
    ports: Ports,
    load: impl FnOnce(&Settings) -> Result<L, LoadError> + Send + 'static,
    loader: Option<Loader<L::Scorer>>,
    shutdown: impl Future<Output = impl Future<Output = ()>>,
) -> Result<(), ServerError>
where
    L: IntoLoaded<Scorer: Scorer + Send + 'static> + 'static,
{
    let (audit, writer) = open_audit(&settings)?.unzip();
    let (tap, shadow) = settings.shadow.as_ref().map(Tap::new).unzip();
    let recent = settings.recent.as_ref().map(Recent::new);
    let onlookers = (Onlookers { audit, shadow: tap, recent }, shadow);
    let ended = serve_models(settings, ports, load, loader, onlookers, shutdown).await;
    if let Some(writer) = writer {
        writer.end(AUDIT_TIMEOUT);
    }
    ended
}

/// Opens the log of what judged which item, where there shall be one.
fn open_audit(settings: &Settings) -> Result<Option<(Audit, audit::Writer)>, ServerError> {
    let Some(settings) = &settings.audit else { return Ok(None) };
    let opened = Audit::open(settings, |error| status::label(status::code(error)));
    opened.map(Some).map_err(|error| ServerError::Audit(settings.path.clone(), error))
}

/// As [`serve_on`], before the eyes of these.
async fn serve_models<L>(
    settings: Settings,
    ports: Ports,
    load: impl FnOnce(&Settings) -> Result<L, LoadError> + Send + 'static,
    loader: Option<Loader<L::Scorer>>,
    (onlookers, shadow): (Onlookers, Option<Shadow>),
    shutdown: impl Future<Output = impl Future<Output = ()>>,
) -> Result<(), ServerError>
where
    L: IntoLoaded<Scorer: Scorer + Send + 'static> + 'static,
{
    let (stage, watched) = watch::channel(Stage::Loading);
    let (manager_sender, manager) = watch::channel(None);
    let admin = Admin::new(manager, settings.model.clone(), settings.limits.clone());
    let (serving, transport) = open(&settings, ports, Handlers::new(watched), admin)?;
    let mut shutdown = pin!(shutdown);

    let (server, wakes, tests) =
        (settings.server.clone(), settings.admin.wake_on_call, settings.self_test.interval);
    let loading = on_thread("loader", move || {
        load(&settings).and_then(|loaded| Engine::start_managed(&settings, loaded, loader, onlookers))
    })?;
    let (engine, mut lifeline, manager) = tokio::select! {
        started = loading => started.unwrap_or_else(|_| Err(LoadError::Probe("the loader panicked".into())))?,
        _ = &mut shutdown => {
            tracing::info!("told to stop while the model was loading");
            return Ok(());
        }
    };

    if wakes {
        let manager = Arc::downgrade(&manager);
        engine.models().wake_by_calls(Box::new(move |name| {
            let (manager, name) = (manager.clone(), name.to_owned());
            // What came of it is in the log, and in the model's state, for which the call waits.
            let wake = move || manager.upgrade().map(|manager| manager.wake(&name));
            drop(tokio::task::spawn_blocking(wake));
        }));
    }
    manager_sender.send_replace(Some(manager.clone() as Arc<dyn ModelControl>));
    // It ends with the first word to stop: what it holds of the engine is nothing to wait for.
    let shadow = shadow.map(|shadow| AbortOnDropHandle::new(tokio::spawn(shadow.run(Arc::clone(&engine)))));
    let recent =
        engine.recent().map(|recent| AbortOnDropHandle::new(tokio::spawn(Arc::clone(recent).follow())));
    stage.send_replace(Stage::Serving(engine));
    let up = lifeline.workers_up();
    let stop = tokio::select! {
        lost = follow_workers(up, &serving, manager.models(), server.recovery_timeout) => Err(lost),
        never = upkeep::test_again(Arc::clone(&manager), tests) => match never {},
        never = upkeep::restore(Arc::clone(&manager), lifeline.workers_up()) => match never {},
        at_once = &mut shutdown => Ok(at_once),
    };

    drop((shadow, recent));
    serving.announce(false);
    manager_sender.send_replace(None);
    drop(manager);
    let at_once = match stop {
        Ok(at_once) => {
            async {
                at_once.await;
                tracing::warn!("a second signal: ending at once");
            }
        }
        Err(lost) => {
            stage.send_replace(Stage::Draining);
            lifeline.abandon();
            transport.close().await;
            return Err(lost.into());
        }
    };
    tracing::info!(grace = ?server.drain_grace, "told to stop");
    let mut at_once = pin!(at_once);
    let in_order = async {
        tokio::time::sleep(server.drain_grace).await;
        stage.send_replace(Stage::Draining);
        drain(&mut lifeline, server.drain_timeout).await;
    };
    let in_order = tokio::select! {
        () = in_order => true,
        () = &mut at_once => false,
    };
    let in_order = if in_order {
        // A forward that runs now ends first. A device that hangs for good takes a second signal.
        let join = tokio::task::spawn_blocking(|| lifeline.join());
        tokio::select! {
            _ = join => true,
            () = &mut at_once => false,
        }
    } else {
        stage.send_replace(Stage::Draining);
        give_up(&mut lifeline).await;
        false
    };
    transport.close().await;
    if in_order { Ok(()) } else { Err(ServerError::AtOnce) }
}

/// Keeps health true while the workers and the models come and go. Ends where there has been no worker for `limit`.
async fn follow_workers(
    mut up: watch::Receiver<usize>,
    serving: &Serving,
    models: &Models,
    limit: Duration,
) -> LoadError {
    let mut served = false;
    let mut changes = models.changes();
    loop {
        let count = *up.borrow_and_update();
        changes.mark_unchanged();
        gauge!(telemetry::WORKERS).set(count as f64);
        serving.announce(count > 0 && models.fault().is_none());
        if count > 0 && !std::mem::replace(&mut served, true) {
            // Last, since whoever waits for this line calls at once.
            let models: Vec<_> = models.all().into_iter().map(|(model, _)| model.info.clone()).collect();
            match models.as_slice() {
                [model] => tracing::info!(?model, "serving"),
                several => tracing::info!(model = ?several, "serving"),
            }
        }
        let patience = if count > 0 { Duration::MAX } else { limit };
        // The sender goes with the last worker, which no queue that is open lets go.
        let change = async {
            tokio::select! {
                changed = up.changed() => changed,
                changed = changes.changed(), if count > 0 => changed,
            }
        };
        if !timeout(patience, change).await.is_ok_and(|changed| changed.is_ok()) {
            return LoadError::Lost(limit);
        }
    }
}

/// Answers everything that was accepted, or says that it will not be.
async fn drain(lifeline: &mut Lifeline, limit: Duration) {
    tracing::info!(?limit, "draining");
    if timeout(limit, lifeline.released()).await.is_err() {
        tracing::warn!("the time for draining is over; what is left is answered with UNAVAILABLE");
        give_up(lifeline).await;
    }
}

/// Answers what is left with UNAVAILABLE.
async fn give_up(lifeline: &mut Lifeline) {
    lifeline.abandon();
    // Callers that do not read their answers may hold on; their connections are closed next.
    let _ = timeout(CLOSE_TIMEOUT, lifeline.released()).await;
}

/// Ports that are served.
struct Transport {
    close: watch::Sender<bool>,
    ports: JoinSet<()>,
}

impl Transport {
    /// Lets the connections end, and ends them where they do not.
    async fn close(mut self) {
        self.close.send_replace(true);
        // A panic, if any, has been logged, and every call was answered before. What is left goes with the set.
        let _ = timeout(CLOSE_TIMEOUT, async { while self.ports.join_next().await.is_some() {} }).await;
    }
}

/// Starts to listen, with every service, and with a health that says `NOT_SERVING`.
fn open(
    settings: &Settings,
    Ports { grpc, http, admin }: Ports,
    handlers: Handlers,
    admin_handlers: Admin,
) -> Result<(Serving, Transport), ServerError> {
    let (serving, is_serving) = watch::channel(false);
    let health = Health::new(is_serving.clone());
    let limits = &settings.limits;
    warn_of_plain_tokens(settings);
    let overseers = tokens("admin tokens", settings.admin.tokens_file.as_ref())?;
    let gate = Gate::new(tokens("tokens", settings.tokens_file.as_ref())?, overseers.clone(), limits);
    let calls = ServiceBuilder::new().layer(CrowdLayer::new(&gate)).layer(CallLayer).layer(gate);
    let wire = Wire::new(certificates(settings)?, settings);
    let (close, closed) = watch::channel(false);
    let mut ports = JoinSet::new();
    if let Some(listener) = http {
        let routes = http::routes(handlers.clone(), is_serving, settings);
        let service =
            http::translate(calls.clone().service(routes), handlers.clone(), settings.http_patience);
        ports.spawn(transport::serve(Arc::clone(&wire), Protocol::Http1, listener, service, closed.clone()));
    }
    if let Some(listener) = admin {
        let gate = Gate::new(overseers, None, limits);
        let calls = ServiceBuilder::new().layer(CrowdLayer::new(&gate)).layer(CallLayer).layer(gate);
        let service = AdminServiceServer::new(admin_handlers).max_decoding_message_size(MOST_OF_A_MODEL);
        let service = grpc_only(calls.service(Routes::new(service).prepare()));
        ports.spawn(transport::serve(Arc::clone(&wire), Protocol::Http2, listener, service, closed.clone()));
    }
    let health = HealthServer::new(health).max_decoding_message_size(MOST_OF_A_NAME);
    let routes = grpc_routes(Routes::new(health), handlers, limits.max_message_bytes)?;
    let service = grpc_only(calls.service(routes));
    ports.spawn(transport::serve(wire, Protocol::Http2, grpc, service, closed));
    Ok((Serving(serving), Transport { close, ports }))
}

/// The services of the gRPC port beside those in `routes`, with messages of at most `most` bytes.
fn grpc_routes(routes: Routes, handlers: Handlers, most: usize) -> Result<Routes, ServerError> {
    // Each version of reflection names the other too.
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .include_reflection_service(false)
            .register_encoded_file_descriptor_set(proto::DESCRIPTORS)
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

/// Says that tokens may be read by others on their way.
fn warn_of_plain_tokens(settings: &Settings) {
    let public = |address: &SocketAddr| !address.ip().is_loopback();
    let calls = settings
        .tokens_file
        .as_ref()
        .map_or([None; 2], |_| [Some(settings.server.listen), settings.http_listen]);
    // Those of who administers show what all callers do.
    let shown = settings.http_listen.filter(|_| settings.recent.is_some());
    let admin = settings.admin.tokens_file.as_ref().map_or([None; 2], |_| [settings.admin.listen, shown]);
    if settings.tls.is_none() && calls.into_iter().chain(admin).flatten().any(|address| public(&address)) {
        tracing::warn!("tokens cross the network in plain text: set tls.certificate, or let a proxy do TLS");
    }
}

/// The tokens of a file, read again whenever it changes.
fn tokens(what: &'static str, path: Option<&PathBuf>) -> Result<Option<Followed<Tokens>>, FileFault> {
    let Some(path) = path.cloned() else { return Ok(None) };
    let files = vec![path.clone()];
    let parse = move |contents: &[Vec<u8>]| {
        Tokens::parse(&path, contents.first().map(Vec::as_slice).unwrap_or_default())
    };
    let followed = auth::follow(what, files, parse)?;
    tracing::info!(count = followed.borrow().count(), what, "callers must show a token");
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

/// What health checkers are told, over gRPC and over HTTP.
struct Serving(watch::Sender<bool>);

impl Serving {
    /// Tells them, and the metrics.
    fn announce(&self, serving: bool) {
        self.0.send_if_modified(|now| std::mem::replace(now, serving) != serving);
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
