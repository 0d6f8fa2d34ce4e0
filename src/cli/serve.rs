//! `spatialscore serve`: settings, logs, signals; the rest is [`server`].

use std::collections::HashMap;
use std::error::Error;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;

use super::{USAGE, fail, signals};
use crate::audit;
use crate::config::{Settings, Sources};
use crate::edge::auth;
use crate::files;
use crate::model::profile;
use crate::process;
use crate::server::{self, Listeners, ServerError};
use crate::telemetry;
use crate::telemetry::trace::Export;

/// What a process ends with that a second signal stopped: 128 and the number of SIGTERM.
const STOPPED: u8 = 143;

/// Serve a reward model over gRPC.
///
/// Listens at once, loads the checkpoint, runs it once, and serves. Health checks (grpc.health.v1) say NOT_SERVING
/// until then. SIGTERM, SIGINT or SIGHUP ends it: what was accepted is answered first, within the drain timeout; a
/// second signal, a second later or more, ends it at once.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Settings:
  Every flag above stands for a setting, named behind it. Each setting is read from the defaults,
  then the file, then the environment, then the flags; the last one wins. All of them, with units
  and ranges, stand in spatialscore.example.toml, which --print-settings writes out.
  Environment: SPATIALSCORE__SECTION__KEY, as in SPATIALSCORE__QUEUE__MAX_ITEMS=512.

Examples:
  spatialscore serve
      The built-in checkpoint on the loopback address, on CUDA where there is a device.
  spatialscore serve --checkpoint ./my-reward-model --device cuda:0,cuda:1
      A directory that save_pretrained wrote, one worker on each of two devices.
  spatialscore serve --listen 0.0.0.0:50051 --tokens-file tokens --tls-cert server.crt --tls-key server.key
      For other machines, where they show a token. A first one: echo trainer:$(openssl rand -hex 32) > tokens
  spatialscore serve --model hpsv3=./hpsv3,profile=hpsv3 --model layout=./my-reward-model
      Two rewards in one server; a call names those that it wants.
  spatialscore serve --http 127.0.0.1:8080
      For the remote reward clients that UniRL and Flow-Factory bring, beside gRPC.
  spatialscore serve --checkpoint owner/model --revision main --listen 0.0.0.0:50051 --allow-anonymous
      A checkpoint of the hub, for every machine that can reach this one.
  spatialscore serve --config server.toml --set queue.max_items=512
      A file, and one setting over it.

Exit codes:
  0   told to stop, and everything accepted was answered or refused
  1   the checkpoint cannot be served, an address is taken, or no device can compute any more
  64  the settings are wrong; all that is wrong with them is told at once
  143 stopped by a second signal")]
pub struct Arguments {
    /// A TOML file of settings.
    #[arg(long, value_name = "FILE", env = "SPATIALSCORE_CONFIG")]
    config: Option<PathBuf>,
    /// Where gRPC listens [server.listen; default: 127.0.0.1:50051].
    #[arg(long, value_name = "ADDRESS:PORT")]
    listen: Option<String>,
    /// Let anyone who reaches the address call: needed where it is not a loopback address and neither tokens nor
    /// clients' certificates say who calls [server.allow_anonymous].
    #[arg(long)]
    allow_anonymous: bool,
    /// A line subject:token for each token that a caller may show [auth.tokens_file].
    #[arg(long, value_name = "FILE")]
    tokens_file: Option<String>,
    /// The server's certificate, PEM [tls.certificate].
    #[arg(long, value_name = "FILE")]
    tls_cert: Option<String>,
    /// The certificate's private key, PEM [tls.key].
    #[arg(long, value_name = "FILE")]
    tls_key: Option<String>,
    /// The authorities of the certificates that clients must then show, PEM [tls.client_ca].
    #[arg(long, value_name = "FILE")]
    tls_client_ca: Option<String>,
    /// Where the remote reward clients of UniRL and Flow-Factory call, as in 127.0.0.1:8080 [http.listen; default: off].
    #[arg(long, value_name = "ADDRESS:PORT")]
    http: Option<String>,
    /// Where models are loaded, replaced, put to sleep and woken, as in 127.0.0.1:50052 [admin.listen; default: off].
    #[arg(long, value_name = "ADDRESS:PORT")]
    admin: Option<String>,
    /// Where Prometheus reads, empty for off [metrics.listen; default: 127.0.0.1:9464].
    #[arg(long, value_name = "ADDRESS:PORT")]
    metrics_listen: Option<String>,
    /// spatialscore-mini (built in), a directory, or a hub id (owner/model) [model.checkpoint].
    #[arg(long, value_name = "NAME")]
    checkpoint: Option<String>,
    /// A model of a name, which callers ask for by it; may be given several times, the default one first, in place of
    /// --checkpoint, --revision and --profile [models, a table each].
    #[arg(long, value_name = "NAME=CHECKPOINT[,profile=…,device=…,dtype=…]")]
    model: Vec<String>,
    /// A second model, and the share of the default one's items that it scores too, as in next:0.1 [shadow.model,
    /// shadow.share].
    #[arg(long, value_name = "NAME:SHARE", value_parser = name_and_share)]
    shadow: Option<(String, String)>,
    /// The branch, tag or commit of a hub id [model.revision; default: main].
    #[arg(long, value_name = "REVISION")]
    revision: Option<String>,
    /// How its reward is read: a profile that ships, such as hpsv3 or vqascore, or a file in place of the checkpoint's
    /// reward_config.json [model.reward_config].
    #[arg(long, value_name = "NAME|FILE", visible_alias = "reward-config")]
    profile: Option<String>,
    /// auto, cpu, or cuda:N, several separated by commas [model.device; default: auto].
    #[arg(long, value_name = "DEVICES")]
    device: Option<String>,
    /// auto, float32, bfloat16 or float16 [model.dtype; default: auto].
    #[arg(long, value_name = "FORMAT")]
    dtype: Option<String>,
    /// Compute so that a score is the same to the last bit in any batch, at a part of the rate [model.batch_invariant;
    /// default: false].
    #[arg(long)]
    batch_invariant: bool,
    /// Threads of a forward on the CPU, 0 for one per core [model.threads; default: 0].
    #[arg(long, value_name = "N")]
    threads: Option<String>,
    /// Seconds for answering what was accepted [server.drain_timeout_seconds; default: 30].
    #[arg(long, value_name = "SECONDS")]
    drain_timeout: Option<String>,
    /// error, warn, info, debug or trace [log.level; default: info].
    #[arg(long, value_name = "LEVEL")]
    log_level: Option<String>,
    /// text or json [log.format; default: text].
    #[arg(long, value_name = "FORMAT")]
    log_format: Option<String>,
    /// Any setting; may be given several times.
    #[arg(long, value_name = "SECTION.KEY=VALUE", value_parser = name_and_value)]
    set: Vec<(String, String)>,
    /// Write spatialscore.example.toml, which documents every setting, and end.
    #[arg(long)]
    print_settings: bool,
}

pub(super) fn name_and_value(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("must be SECTION.KEY=VALUE")?;
    Ok((name.trim().to_owned(), value.trim().to_owned()))
}

fn name_and_share(text: &str) -> Result<(String, String), String> {
    let (name, share) = text.rsplit_once(':').ok_or("must be NAME:SHARE, as in next:0.1")?;
    Ok((name.trim().to_owned(), share.trim().to_owned()))
}

impl Arguments {
    fn sources(self) -> Sources {
        let (shadow, share) = self.shadow.unzip();
        let named = [
            ("server.listen", self.listen),
            ("server.allow_anonymous", self.allow_anonymous.then(|| "true".to_owned())),
            ("server.drain_timeout_seconds", self.drain_timeout),
            ("auth.tokens_file", self.tokens_file),
            ("tls.certificate", self.tls_cert),
            ("tls.key", self.tls_key),
            ("tls.client_ca", self.tls_client_ca),
            ("http.listen", self.http),
            ("metrics.listen", self.metrics_listen),
            ("admin.listen", self.admin),
            ("model.checkpoint", self.checkpoint),
            ("model.revision", self.revision),
            ("model.reward_config", self.profile),
            ("model.device", self.device),
            ("model.dtype", self.dtype),
            ("model.batch_invariant", self.batch_invariant.then(|| "true".to_owned())),
            ("model.threads", self.threads),
            ("shadow.model", shadow),
            ("shadow.share", share),
            ("log.level", self.log_level),
            ("log.format", self.log_format),
        ];
        let named = named.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?)));
        // A variable that is not Unicode can name no setting.
        let text =
            |(name, value): (OsString, OsString)| Some((name.into_string().ok()?, value.into_string().ok()?));
        let environment: HashMap<String, String> = std::env::vars_os().filter_map(text).collect();
        let flags = named.chain(self.set).collect();
        Sources { file: self.config, environment, flags, models: self.model }
    }
}

/// Runs the command.
pub fn run(arguments: Arguments) -> ExitCode {
    if arguments.print_settings {
        print!("{}", crate::config::EXAMPLE);
        return ExitCode::SUCCESS;
    }
    let settings = match Settings::load_with(&arguments.sources(), file_faults) {
        Ok(settings) => settings,
        Err(faults) => return fail(USAGE, &format!("these settings are wrong:\n{faults}")),
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(1, &error),
    };
    let traces = match runtime.block_on(async { Export::start(&settings.trace) }) {
        Ok(traces) => traces,
        Err(error) => return fail(USAGE, &format!("trace.otlp_endpoint: {error}")),
    };
    if let Err(error) = telemetry::init_log(&settings.log, traces.as_ref()) {
        return fail(USAGE, &format!("RUST_LOG: {error}"));
    }
    let ended = runtime.block_on(serve(settings));
    if let Some(traces) = traces {
        traces.end();
    }
    // Nothing that is left, such as a health watcher's connection, is worth waiting for.
    runtime.shutdown_background();
    telemetry::end_log();
    let stopped = |error: &(dyn Error + 'static)| matches!(error.downcast_ref(), Some(ServerError::AtOnce));
    match ended {
        Ok(()) => signals::leave(0),
        Err(error) if stopped(&*error) => signals::leave(STOPPED),
        Err(error) => {
            fail(1, &*error);
            signals::leave(1)
        }
    }
}

/// What is wrong with the files that settings name, by the setting's name.
fn file_faults(settings: &Settings) -> Vec<(&'static str, String)> {
    let mut faults = auth::file_faults(settings);
    let audit = settings.audit.as_ref().and_then(|log| Some((log, audit::Writer::fault(log)?)));
    faults.extend(
        audit.map(|(log, error)| ("audit.path", format!("{}: the file {error}", log.path.display()))),
    );
    for model in &settings.models {
        if let Some(profile) = model.profile.as_deref().filter(|name| profile::shipped(name).is_none())
            && let Err(error) = files::read(Path::new(profile))
        {
            let names: Vec<&str> = profile::names().collect();
            let setting = if model.name.is_some() { "models.profile" } else { "model.reward_config" };
            faults.push((
                setting,
                format!("{profile}: the file {error}; the profiles that ship are {}", names.join(", ")),
            ));
        }
    }
    faults
}

async fn serve(mut settings: Settings) -> Result<(), Box<dyn Error>> {
    let shutdown = signals::stops()?;
    tracing::debug!(?settings, "the settings");
    process::fit_descriptors(&mut settings.server)?;
    process::give_memory_back()?;
    let metrics = telemetry::init_metrics()?;
    let listeners = Listeners::bind(&settings).await?;
    let at = |listener: &tokio::net::TcpListener| listener.local_addr().map(|address| address.to_string());
    tracing::info!(address = at(&listeners.grpc)?, "gRPC listens");
    if let Some(listener) = &listeners.http {
        let scheme = if settings.tls.is_some() { "https" } else { "http" };
        tracing::info!(http = format!("{scheme}://{}", at(listener)?), "HTTP listens");
    }
    if let Some(listener) = &listeners.admin {
        tracing::info!(admin = at(listener)?, "admin listens");
    }
    if let Some(listener) = &listeners.metrics {
        tracing::info!(url = format!("http://{}/metrics", at(listener)?), "metrics");
    }
    Ok(server::run(settings, listeners, Some(metrics), shutdown).await?)
}
