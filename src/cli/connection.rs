//! How the commands that talk to servers reach them: addresses, TLS, a token.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, ValueEnum};
use tokio::runtime::{Builder, Runtime};
use tokio::time::{Instant, sleep, timeout};
use tonic::metadata::errors::InvalidMetadataValue;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};

use crate::edge::auth::{self, Secret};
use crate::edge::grpc::code_name;
use crate::edge::proto;
use crate::edge::proto::admin_service_client::AdminServiceClient;
use crate::edge::proto::spatial_score_service_client::SpatialScoreServiceClient;

/// The port of a server that names none.
const PORT: u16 = 50051;
/// The pause between two attempts to reach a server that is not up yet.
pub(super) const RETRY_EVERY: Duration = Duration::from_millis(200);

/// Where the servers are, and what is shown to them.
#[derive(Debug, Args)]
pub(super) struct Connection {
    /// The server: HOST:PORT, or a URL, of which https:// asks for TLS; of several, separated by commas, `score` takes the
    /// first that answers, and `load` all of them.
    #[arg(long, value_name = "TARGET", env = "SPATIALSCORE_TARGET", default_value = "127.0.0.1:50051")]
    server: String,
    /// A file with the token to show: one line, the token or subject:token. Without it the token is that of
    /// SPATIALSCORE_TOKEN, or of the file that SPATIALSCORE_TOKEN_FILE names.
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// The authorities that sign the server's certificate, PEM, or that certificate itself; those of the system where
    /// this is not given. Asks for TLS.
    #[arg(long, value_name = "FILE", env = "SPATIALSCORE_CA")]
    tls_ca: Option<PathBuf>,
    /// The certificate to show to a server that asks for one, PEM.
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// The private key of --tls-cert, PEM.
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// Seconds to wait for a server that is not up yet, or still loads its model.
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    wait: u64,
}

/// How urgent the pictures are.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(super) enum Urgency {
    Training,
    Evaluation,
}

impl From<Urgency> for proto::Priority {
    fn from(urgency: Urgency) -> Self {
        match urgency {
            Urgency::Training => Self::Training,
            Urgency::Evaluation => Self::Evaluation,
        }
    }
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unanswered {
    #[error("{}: {}", code_name(.0.code()), .0.message())]
    Status(Box<Status>),
    #[error("no answer within {0} s")]
    Timeout(u64),
}

impl From<Status> for Unanswered {
    fn from(status: Status) -> Self {
        Self::Status(Box::new(status))
    }
}

/// A client that shows its token.
pub(super) type Client = SpatialScoreServiceClient<InterceptedService<Channel, Bearer>>;

/// What a command runs on that talks to servers.
pub(super) fn runtime() -> io::Result<Runtime> {
    Builder::new_multi_thread().worker_threads(2).enable_all().build()
}

/// What a server says of its models of these names.
pub(super) async fn described(
    client: &mut Client,
    names: &[String],
) -> Result<Vec<proto::GetModelResponse>, Unanswered> {
    let mut models = Vec::new();
    for name in names {
        models.push(client.get_model(proto::GetModelRequest { name: name.clone() }).await?.into_inner());
    }
    Ok(models)
}

/// What became of an item: of each model, where several were asked.
pub(super) fn outcomes(result: proto::ScoreResult) -> Vec<Result<proto::Score, String>> {
    use proto::model_outcome::Outcome as Of;
    use proto::score_result::Outcome;
    let said = |code: i32, message: String| Err(format!("{}: {message}", code_name(code.into())));
    let of = |outcome: proto::ModelOutcome| {
        Some(match outcome.outcome? {
            Of::Score(score) => Ok(score),
            Of::Error(error) => said(error.code, error.message),
        })
    };
    match result.outcome {
        Some(Outcome::Score(score)) => vec![Ok(score)],
        Some(Outcome::Error(error)) => vec![said(error.code, error.message)],
        None => result.outcomes.into_iter().filter_map(of).collect(),
    }
}

/// The servers of a command line.
pub(super) struct Servers {
    endpoints: Vec<Endpoint>,
    bearer: Bearer,
    wait: u64,
}

/// A client of the service that has models come and go.
pub(super) type AdminClient = AdminServiceClient<InterceptedService<Channel, Bearer>>;

/// A server where models come and go.
pub(super) struct AdminServer {
    endpoint: Endpoint,
    bearer: Bearer,
}

impl AdminServer {
    /// A client of it, on a connection that is made when it is first used: within a runtime.
    pub(super) fn connect(&self) -> AdminClient {
        AdminServiceClient::with_interceptor(self.endpoint.connect_lazy(), self.bearer.clone())
    }
}

impl Connection {
    /// A server that is named in another way.
    pub(super) fn to(server: &str, token_file: Option<PathBuf>, tls_ca: Option<PathBuf>) -> Self {
        Self { server: server.to_owned(), token_file, tls_ca, tls_cert: None, tls_key: None, wait: 0 }
    }

    /// What was named, read and checked; nothing is connected yet.
    pub(super) fn servers(&self) -> Result<Servers, Box<dyn std::error::Error>> {
        self.servers_with(token(self.token_file.as_deref())?.as_ref())
    }

    /// Where models come and go on a server. Its tokens are not the callers'.
    pub(super) fn admin(
        server: &str,
        token_file: Option<&Path>,
        tls_ca: Option<PathBuf>,
    ) -> Result<AdminServer, Box<dyn std::error::Error>> {
        let connection = Self::to(server, None, tls_ca);
        let token = token_file.map(auth::client_token).transpose()?;
        let Servers { mut endpoints, bearer, .. } = connection.servers_with(token.as_ref())?;
        let endpoint = endpoints.pop().filter(|_| endpoints.is_empty()).ok_or("give one server")?;
        Ok(AdminServer { endpoint, bearer })
    }

    fn servers_with(&self, token: Option<&Secret>) -> Result<Servers, Box<dyn std::error::Error>> {
        let Self { tls_ca, tls_cert, tls_key, server, wait, .. } = self;
        let identity = tls_cert.as_deref().zip(tls_key.as_deref());
        let tls = tls_ca.is_some() || identity.is_some();
        let mut endpoints = Vec::new();
        for target in server.split(',').map(str::trim).filter(|target| !target.is_empty()) {
            let endpoint = Endpoint::from_shared(url(target, tls)?)?;
            endpoints.push(match endpoint.uri().scheme_str() {
                Some("https") => auth::client_config(tls_ca.as_deref(), identity)?.on(endpoint)?,
                _ if tls => {
                    return Err(format!(
                        "{target} is not TLS: it must begin with https://, or with no scheme"
                    )
                    .into());
                }
                _ => endpoint,
            });
        }
        if endpoints.is_empty() {
            return Err("--server, or SPATIALSCORE_TARGET, is empty; give host:port".into());
        }
        Ok(Servers { endpoints, bearer: Bearer::new(token)?, wait: *wait })
    }
}

impl Servers {
    /// A client of each, on a connection of its own, which is made when it is first used.
    pub(super) fn clients(&self) -> Vec<Client> {
        let client = |endpoint: &Endpoint| {
            SpatialScoreServiceClient::with_interceptor(endpoint.connect_lazy(), self.bearer.clone())
        };
        self.endpoints.iter().map(client).collect()
    }

    /// Reaches the first server that answers and asks what it serves, again and again within `--wait`.
    pub(super) async fn first(&self, seconds: u64) -> Result<(Client, proto::GetModelResponse), Unanswered> {
        let clients = self.clients();
        let until = Instant::now() + Duration::from_secs(self.wait);
        let last = clients.len().saturating_sub(1);
        for (turn, mut client) in (0..clients.len()).cycle().zip(clients.iter().cloned().cycle()) {
            let model =
                timeout(Duration::from_secs(seconds), client.get_model(proto::GetModelRequest::default()));
            match model.await.map_err(|_| Unanswered::Timeout(seconds))? {
                Ok(model) => return Ok((client, model.into_inner())),
                Err(status) if status.code() == Code::Unavailable && turn < last => {}
                Err(status) if status.code() == Code::Unavailable && Instant::now() < until => {
                    sleep(RETRY_EVERY).await;
                }
                Err(status) => return Err(status.into()),
            }
        }
        Err(Status::unavailable("there is no server to ask").into())
    }
}

/// The token of the file that is named, else that of the environment, as the Python client reads it.
fn token(file: Option<&Path>) -> Result<Option<Secret>, Box<dyn std::error::Error>> {
    let named = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    if let Some(file) = file {
        return Ok(Some(auth::client_token(file)?));
    }
    if let Some(token) = named("SPATIALSCORE_TOKEN") {
        let token = token.to_str().ok_or("is not Unicode").and_then(auth::one_token);
        return Ok(Some(token.map_err(|fault| format!("SPATIALSCORE_TOKEN: {fault}"))?));
    }
    let file = named("SPATIALSCORE_TOKEN_FILE").map(PathBuf::from);
    Ok(file.as_deref().map(auth::client_token).transpose()?)
}

/// The URL of a target as the Python client takes it: with the contract's own port where it names none, and with TLS
/// where it says nothing of it and there is a certificate.
fn url(target: &str, tls: bool) -> Result<String, String> {
    let wrong = || format!("{target:?} is no server; give host:port, or a URL of http:// or https://");
    let (scheme, rest) = match target.split_once("://") {
        Some((scheme @ ("http" | "https"), rest)) => (scheme, rest.trim_end_matches('/')),
        Some(_) => return Err(wrong()),
        None if tls => ("https", target),
        None => ("http", target),
    };
    // An address of IPv6 without brackets has no port.
    let bare = rest.parse::<std::net::Ipv6Addr>().map(|address| format!("[{address}]"));
    let authority: http::uri::Authority =
        bare.unwrap_or_else(|_| rest.to_owned()).parse().map_err(|_| wrong())?;
    let (host, port) = (authority.host(), authority.port_u16());
    // What stands behind the host and is no port.
    let more = port.is_none() && authority.as_str() != host;
    if host.is_empty() || more || authority.as_str().contains('@') || port == Some(0) {
        return Err(wrong());
    }
    Ok(format!("{scheme}://{host}:{}", port.unwrap_or(PORT)))
}

/// Shows a token on every call, where there is one.
#[derive(Clone)]
pub(super) struct Bearer(Option<MetadataValue<Ascii>>);

impl Bearer {
    fn new(token: Option<&Secret>) -> Result<Self, InvalidMetadataValue> {
        let value = |token: &Secret| {
            let mut value: MetadataValue<Ascii> = format!("Bearer {}", token.reveal()).parse()?;
            value.set_sensitive(true);
            Ok(value)
        };
        token.map(value).transpose().map(Self)
    }
}

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(value) = &self.0 {
            request.metadata_mut().insert("authorization", value.clone());
        }
        Ok(request)
    }
}
