//! `spatialscore admin`: models come and go on a running server.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Subcommand};
use tonic::Status;

use crate::cli::connection::{AdminClient, Connection};
use crate::cli::{USAGE, fail};
use crate::config::models::Table;
use crate::edge::grpc::code_name;
use crate::edge::proto;

/// Load, replace, unload, put to sleep or wake the models of a running server, or list them.
///
/// It speaks to the address of `serve --admin`. Each command ends when what it asks for is done; one that fails leaves what
/// was there. Paths are the server's.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  spatialscore admin list
  spatialscore admin load hpsv3=./HPSv3,profile=hpsv3
  spatialscore admin replace layout=./step-2000
      The new one takes calls before the old one lets go; no call is lost.
  spatialscore admin sleep layout
      Gives its memory back. Calls for it are refused, or wake it (admin.wake_on_call).
  spatialscore admin wake layout

Exit codes:
  0   it is done
  1   it is not, and what was there is there still
  64  the command line is wrong")]
pub struct Arguments {
    /// The server's address for this: HOST:PORT, or a URL, of which https:// asks for TLS.
    #[arg(
        long,
        value_name = "TARGET",
        env = "SPATIALSCORE_ADMIN_TARGET",
        default_value = "127.0.0.1:50052",
        global = true
    )]
    server: String,
    /// A file with the token to show: one line, the token or subject:token.
    #[arg(long, value_name = "FILE", env = "SPATIALSCORE_ADMIN_TOKEN_FILE", global = true)]
    token_file: Option<PathBuf>,
    /// The authorities that sign the server's certificate, PEM, or that certificate itself. Asks for TLS.
    #[arg(long, value_name = "FILE", env = "SPATIALSCORE_CA", global = true)]
    tls_ca: Option<PathBuf>,
    #[command(subcommand)]
    order: Order,
}

#[derive(Debug, Subcommand)]
enum Order {
    /// Load a model under a new name.
    Load {
        /// NAME=CHECKPOINT[,revision=…,profile=…,device=…,dtype=…]
        #[arg(value_name = "MODEL")]
        model: String,
    },
    /// Put a model in the place of one of its name.
    Replace {
        /// NAME=CHECKPOINT[,revision=…,profile=…,device=…,dtype=…]
        #[arg(value_name = "MODEL")]
        model: String,
    },
    /// Take a model away.
    Unload {
        /// Its name.
        name: String,
    },
    /// Give a model's memory back.
    Sleep {
        /// Its name.
        name: String,
    },
    /// Load a sleeping model again.
    Wake {
        /// Its name.
        name: String,
    },
    /// List the models, the default one first.
    List {
        /// One JSON object a line.
        #[arg(long)]
        json: bool,
    },
}

/// Runs the command.
pub fn run(arguments: Arguments) -> ExitCode {
    let Arguments { server, token_file, tls_ca, order } = arguments;
    let client = match Connection::admin(&server, token_file.as_deref(), tls_ca) {
        Ok(client) => client,
        Err(error) => return fail(USAGE, &error),
    };
    let source = match &order {
        Order::Load { model } | Order::Replace { model } => match source(model) {
            Ok(source) => Some(source),
            Err(error) => return fail(USAGE, &error),
        },
        _ => None,
    };
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(1, &error),
    };
    match runtime.block_on(async { ask(client.connect(), order, source).await }) {
        Ok(models) => {
            models.iter().for_each(|line| println!("{line}"));
            ExitCode::SUCCESS
        }
        Err(status) => fail(1, &format!("{}: {}", code_name(status.code()), status.message())),
    }
}

/// Gives lines to print.
async fn ask(
    mut client: AdminClient,
    order: Order,
    model: Option<proto::ModelSource>,
) -> Result<Vec<String>, Status> {
    let lines = |model: Option<proto::GetModelResponse>| model.iter().map(line).collect();
    Ok(match order {
        Order::Load { .. } => {
            lines(client.load_model(proto::LoadModelRequest { model }).await?.into_inner().model)
        }
        Order::Replace { .. } => {
            lines(client.replace_model(proto::ReplaceModelRequest { model }).await?.into_inner().model)
        }
        Order::Unload { name } => {
            client.unload_model(proto::UnloadModelRequest { name }).await?;
            Vec::new()
        }
        Order::Sleep { name } => {
            client.sleep_model(proto::SleepModelRequest { name }).await?;
            Vec::new()
        }
        Order::Wake { name } => {
            client.wake_model(proto::WakeModelRequest { name }).await?;
            Vec::new()
        }
        Order::List { json } => {
            let models = client.describe_models(proto::DescribeModelsRequest {}).await?.into_inner().models;
            models.iter().map(if json { object } else { line }).collect()
        }
    })
}

/// What `NAME=CHECKPOINT,…` says.
fn source(text: &str) -> Result<proto::ModelSource, String> {
    let mut source = proto::ModelSource::default();
    for (key, value) in Table::of_flag(0, text, "from the command line").keys {
        *match key.as_str() {
            "name" => &mut source.name,
            "checkpoint" => &mut source.checkpoint,
            "revision" => &mut source.revision,
            "profile" => &mut source.profile,
            "device" => &mut source.device,
            "dtype" => &mut source.dtype,
            other => {
                return Err(format!(
                    "{other:?} is not known; give NAME=CHECKPOINT[,profile=…,device=…,dtype=…]"
                ));
            }
        } = value;
    }
    Ok(source)
}

fn state(model: &proto::GetModelResponse) -> &'static str {
    match model.state() {
        proto::ModelState::Unspecified | proto::ModelState::Serving => "serving",
        proto::ModelState::Asleep => "asleep",
        proto::ModelState::Waking => "waking",
        proto::ModelState::Failed => "failed",
    }
}

fn line(model: &proto::GetModelResponse) -> String {
    let proto::GetModelResponse { name, revision, checkpoint, dtype, .. } = model;
    let (state, devices) = (state(model), model.devices.join(","));
    format!("{name}  {state}  {devices}  {dtype}  {checkpoint}  {revision}")
}

fn object(model: &proto::GetModelResponse) -> String {
    serde_json::json!({
        "name": model.name,
        "state": state(model),
        "checkpoint": model.checkpoint,
        "revision": model.revision,
        "profile": model.profile,
        "profile_digest": model.profile_digest,
        "dtype": model.dtype,
        "devices": model.devices,
        "weight_bytes": model.weight_bytes,
        "forward_bytes": model.forward_bytes,
    })
    .to_string()
}
