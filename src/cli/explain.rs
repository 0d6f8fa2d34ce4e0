//! `spatialscore explain`: why a picture has the score that it has.

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use crate::cli::connection::{Connection, Servers, Unanswered, runtime};
use crate::cli::{USAGE, fail};
use crate::edge::proto;
use crate::explain::{Plan, Probe, heat_map};
use crate::processor::decoded;

/// Pictures that are made ahead of the connection.
const AHEAD: usize = 4;

/// Say why a picture has the score that it has.
///
/// Scores the picture again with one thing changed at a time, on a running server and behind training: mirrored, each clause
/// of the prompt left out, each relation turned round, each cell of the picture covered with its mean colour, and with it those
/// around it: about a third of the shorter side. A cost is how much lower the score then is.
#[derive(Debug, Args)]
#[command(after_long_help = "\
What it tells:
  mirrored   whether left and right matter at all; lettering turns with the picture
  left out   how much the score hangs on a clause being there; not whether the picture keeps it
  turned     whether the direction is heeded; by a list of English words, which may turn one that is no relation
  the map    what covering each cell with those around it costs: red where the score falls, blue where it rises, the stronger the more
             of the largest; not where a thing ends, nor what two of them do together

Examples:
  spatialscore explain --prompt \"a banana is above a tree\" --map map.png samples/banana.right.png

Exit codes:
  0   everything has a score
  1   something has none, or the server could not be reached
  64  the command line is wrong")]
pub struct Arguments {
    #[command(flatten)]
    connection: Connection,
    /// What the picture should show.
    #[arg(long)]
    prompt: String,
    /// A model of a server that has several, by its name. Without it, the default model.
    #[arg(long, value_name = "NAME")]
    model: Option<String>,
    /// Where the map goes, a PNG file; without it there is none.
    #[arg(long, value_name = "FILE")]
    map: Option<PathBuf>,
    /// The most cells of the map: each is one more score.
    #[arg(long, value_name = "N", default_value_t = 49, value_parser = clap::value_parser!(u16).range(1..=4096))]
    cells: u16,
    /// Seconds to wait for each next answer before giving up.
    #[arg(long, value_name = "SECONDS", default_value_t = 300, value_parser = clap::value_parser!(u64).range(1..))]
    timeout: u64,
    /// The picture: PNG, JPEG or WebP.
    #[arg(value_name = "IMAGE")]
    image: PathBuf,
}

/// Why there is no explanation.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Unanswered(#[from] Unanswered),
    #[error("the server ended the stream early")]
    Cut,
    #[error("the picture itself has no score: {0}")]
    Unscored(String),
    #[error("the map: {0}")]
    Map(String),
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl From<Status> for Failure {
    fn from(status: Status) -> Self {
        Self::Unanswered(status.into())
    }
}

/// Runs the command.
pub fn run(arguments: Arguments) -> ExitCode {
    let picture =
        std::fs::read(&arguments.image).map_err(|error| error.to_string()).and_then(|file| decoded(&file));
    let picture = match picture {
        Ok(picture) => picture,
        Err(reason) => return fail(USAGE, &format!("{}: {reason}", arguments.image.display())),
    };
    let servers = match arguments.connection.servers() {
        Ok(servers) => servers,
        Err(error) => return fail(USAGE, &error),
    };
    let runtime = match runtime() {
        Ok(runtime) => runtime,
        Err(error) => return fail(1, &error),
    };
    let cells = if arguments.map.is_some() { usize::from(arguments.cells) } else { 0 };
    let plan = Arc::new(Plan::new(picture, arguments.prompt.clone(), cells));
    let told = runtime.block_on(explain(&arguments, &servers, &plan));
    // The thread that makes pictures may still wait for a connection that is gone.
    runtime.shutdown_background();
    match told {
        Ok(0) => ExitCode::SUCCESS,
        Ok(failed) => fail(1, &format!("{failed} without a score")),
        Err(error) => fail(1, &error),
    }
}

/// Explains, and tells; returns how many have no score.
async fn explain(arguments: &Arguments, servers: &Servers, plan: &Arc<Plan>) -> Result<usize, Failure> {
    let scores = scores(arguments, servers, plan).await?;
    let whole = match scores.first() {
        Some(Ok(mean)) => *mean,
        Some(Err(reason)) => return Err(Failure::Unscored(reason.clone())),
        None => return Err(Failure::Cut),
    };
    let mut out = io::stdout().lock();
    writeln!(out, "{:>9} {:>9}  WHAT IS CHANGED", "MEAN", "COST")?;
    for (probe, score) in plan.probes.iter().zip(&scores) {
        let what = match probe {
            Probe::Whole => "nothing".to_owned(),
            Probe::Mirrored => "mirrored".to_owned(),
            Probe::Dropped(clause) => format!("left out: {}", clause.text),
            Probe::Turned(turned) => format!("turned: {} to {}: {}", turned.from, turned.to, turned.prompt),
            Probe::Covered(_) => continue,
        };
        match score {
            Ok(mean) => writeln!(out, "{mean:>9.4} {:>9.4}  {what}", whole - mean)?,
            Err(reason) => writeln!(out, "{:>19}  {what}: {reason}", "ERROR")?,
        }
    }
    if let Some(path) = &arguments.map {
        let covered = plan.probes.iter().zip(&scores).filter(|(probe, _)| matches!(probe, Probe::Covered(_)));
        let costs: Vec<Option<f64>> =
            covered.map(|(_, score)| score.as_ref().ok().map(|mean| whole - mean)).collect();
        let map = heat_map(plan.picture(), plan.grid, &costs);
        std::fs::write(path, map.png().map_err(|error| Failure::Map(error.to_string()))?)?;
        let known = costs.iter().flatten();
        let largest = known.fold(0.0_f64, |most, cost| if cost.abs() > most.abs() { *cost } else { most });
        let (rows, columns) = (plan.grid.rows, plan.grid.columns);
        writeln!(
            out,
            "the map: {rows} rows of {columns} cells; the largest cost is {largest:.4}: {}",
            path.display()
        )?;
    }
    Ok(scores.iter().filter(|score| score.is_err()).count())
}

/// The mean of each probe, in order, or why it has none.
async fn scores(
    arguments: &Arguments,
    servers: &Servers,
    plan: &Arc<Plan>,
) -> Result<Vec<Result<f64, String>>, Failure> {
    let (mut client, _) = servers.first(arguments.timeout).await?;
    let (requests, outgoing) = mpsc::channel(AHEAD);
    let like = proto::ScoreStreamRequest {
        priority: proto::Priority::Evaluation.into(),
        models: arguments.model.iter().cloned().collect(),
        ..Default::default()
    };
    let making = Arc::clone(plan);
    tokio::task::spawn_blocking(move || {
        for (index, probe) in making.probes.iter().enumerate() {
            let (picture, prompt) = making.item(probe);
            let source = picture.png().ok().map(|file| proto::image::Source::Encoded(file.into()));
            let image = Some(proto::Image { source });
            let item =
                Some(proto::ScoreItem { prompt: Some(prompt.to_owned()), image, ..Default::default() });
            let request = proto::ScoreStreamRequest { id: index.to_string(), item, ..like.clone() };
            // Closed where the stream ended; its reader says why.
            if requests.blocking_send(request).is_err() {
                return;
            }
        }
    });
    let mut answers = client.score_stream(ReceiverStream::new(outgoing)).await?.into_inner();
    let mut scores: Vec<Option<Result<f64, String>>> = vec![None; plan.probes.len()];
    let seconds = arguments.timeout;
    loop {
        let answer = timeout(Duration::from_secs(seconds), answers.message()).await;
        let Some(answer) = answer.map_err(|_| Unanswered::Timeout(seconds))?? else { break };
        let index = answer.id.parse::<usize>().ok();
        if let Some(place) = index.and_then(|index| scores.get_mut(index)) {
            *place = Some(match answer.result.and_then(|result| result.outcome) {
                Some(proto::score_result::Outcome::Score(score)) => Ok(score.mean.into()),
                Some(proto::score_result::Outcome::Error(error)) => Err(error.message),
                None => Err("the server answered neither a score nor an error".into()),
            });
        }
    }
    scores.into_iter().collect::<Option<Vec<_>>>().ok_or(Failure::Cut)
}
