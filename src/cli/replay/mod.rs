//! `spatialscore replay`: an audit log is scored again, and compared.

mod comparison;
mod judge;

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use futures::{StreamExt, stream};
use serde_json::json;

use super::connection::runtime;
use super::serve::name_and_value;
use super::{USAGE, fail};
use crate::audit::{self, Entry, Fault, Image, Read};
use crate::config::models::is_name;
use crate::edge::proto;
use comparison::Comparison;
use judge::Judge;

/// Calls at once.
const CALLS: usize = 4;
/// Items of a call, and bytes of their pictures.
const ITEMS: usize = 32;
const BYTES: usize = 16 << 20;

/// Score an audit log again, and tell what differs.
///
/// Reads LOG and the files that it grew out of (LOG.1, LOG.2, …), the oldest first, and scores each of their items again: by a
/// checkpoint on this machine, or by a running server. Lines without a score are passed over, and so are lines that were
/// never written to their end; both are counted. The log must have prompts and pictures in it (audit.prompts and
/// audit.pictures).
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  spatialscore serve --set audit.path=audit.jsonl --set audit.prompts=true --set audit.pictures=true
      Records what it scores.
  spatialscore replay audit.jsonl --model ./my-reward-model
      Whether that checkpoint gives today the scores that it gave then.
  spatialscore replay audit.jsonl --model layout=./step-2000,dtype=bfloat16 --tolerance 0.05
      What would change with another checkpoint, for the lines of the model `layout`.
  spatialscore replay audit.jsonl --server gpu-1:50051
      The same items by a running server, each by the model of the same name.
  spatialscore replay audit.jsonl --server gpu-1:50051 --model layout=layout-next
      The lines of `layout` by its model `layout-next`. What a server has in its memory it does not score again: start it
      with --set cache.max_items=0 where that matters.

Output, for each model of the log:
  COMPARED    lines with a score then and now
  DIFFERENCE  the largest and the mean one: of an item the greatest of its mean, standard deviation and components
  SHIFT       how much higher the means are now
  RANK        Spearman's correlation of the means: 1 where the order is the same
  WORST       the lines that differ most

Exit codes:
  0   all differences are within the tolerance
  1   one is not, an item has no score now, or nothing scores
  64  the command line is wrong, or the log is none that can be scored again")]
pub struct Arguments {
    /// The log.
    #[arg(value_name = "LOG")]
    log: PathBuf,
    /// What scores: a checkpoint (built in, a directory, a hub id); with --server a model of that server. NAME= says whose
    /// lines; a log with lines of several models needs it. May be given several times.
    #[arg(
        long,
        value_name = "[NAME=]MODEL[,profile=…,device=…,dtype=…]",
        required_unless_present = "server"
    )]
    model: Vec<String>,
    /// A running server that scores, in place of this process: HOST:PORT, or a URL.
    #[arg(long, value_name = "TARGET")]
    server: Option<String>,
    /// A file with the token to show to the server.
    #[arg(long, value_name = "FILE", requires = "server")]
    token_file: Option<PathBuf>,
    /// The authorities that sign the server's certificate, PEM. Asks for TLS.
    #[arg(long, value_name = "FILE", requires = "server")]
    tls_ca: Option<PathBuf>,
    /// A setting of `serve` for this process, such as limits.max_image_pixels; may be given several times.
    #[arg(long, value_name = "SECTION.KEY=VALUE", value_parser = name_and_value, conflicts_with = "server")]
    set: Vec<(String, String)>,
    /// The greatest difference that is none, in the unit of the scores.
    #[arg(long, value_name = "DIFFERENCE", default_value_t = 1e-4, value_parser = tolerance)]
    tolerance: f32,
    /// Seconds to wait for each answer.
    #[arg(long, value_name = "SECONDS", default_value_t = 300, value_parser = clap::value_parser!(u64).range(1..))]
    timeout: u64,
    /// Write one JSON object for each model, and one for the log.
    #[arg(long)]
    json: bool,
}

fn tolerance(text: &str) -> Result<f32, String> {
    let number = text.parse::<f32>().ok().filter(|number| *number >= 0.0 && number.is_finite());
    number.ok_or_else(|| "must be a number that is not negative".to_owned())
}

/// Why nothing is compared.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Line(#[from] Fault),
    #[error("{0}")]
    Usage(String),
    #[error("{0}")]
    Scorer(String),
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Whose lines are scored by what.
#[derive(Debug, Clone)]
struct Target {
    /// `None`: all lines, which are one model's.
    of: Option<String>,
    /// What `--model` says of what scores them.
    said: String,
    /// The name of the model that scores them.
    by: String,
}

impl Target {
    fn of(text: &str) -> Self {
        match text.split_once('=').filter(|(name, _)| is_name(name)) {
            Some((of, by)) => Self { of: Some(of.to_owned()), said: by.to_owned(), by: by.to_owned() },
            None => Self { of: None, said: text.to_owned(), by: text.to_owned() },
        }
    }
}

/// A line that is to be scored again.
struct Line {
    place: String,
    entry: Entry,
    item: proto::ScoreItem,
}

/// Lines that go in one call.
struct Batch {
    /// The model that scores them.
    by: String,
    lines: Vec<Line>,
}

/// What was passed over.
#[derive(Debug, Default)]
struct Counts {
    lines: usize,
    without_score: usize,
    torn: usize,
    of_others: usize,
}

/// Runs the command.
pub fn run(arguments: Arguments) -> ExitCode {
    let runtime = match runtime() {
        Ok(runtime) => runtime,
        Err(error) => return fail(1, &error),
    };
    let replayed = replay(&arguments, &runtime);
    runtime.shutdown_background();
    match replayed {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error @ (Failure::Line(_) | Failure::Usage(_))) => fail(USAGE, &error),
        Err(error) => fail(1, &error),
    }
}

/// Scores and compares; whether all is as it was.
fn replay(arguments: &Arguments, runtime: &tokio::runtime::Runtime) -> Result<bool, Failure> {
    let mut targets: Vec<Target> = arguments.model.iter().map(|text| Target::of(text)).collect();
    if targets.len() > 1 && targets.iter().any(|target| target.of.is_none()) {
        return Err(Failure::Usage(
            "of several --model each must say whose lines it scores: NAME=MODEL".into(),
        ));
    }
    let read = audit::read(&arguments.log)
        .map_err(|error| Failure::Usage(format!("{}: {error}", arguments.log.display())))?;
    let judge = match &arguments.server {
        Some(server) => {
            let (token, ca) = (arguments.token_file.clone(), arguments.tls_ca.clone());
            runtime.block_on(Judge::remote(server, token, ca, arguments.timeout))?
        }
        None => Judge::local(&mut targets, &arguments.set)?,
    };
    let mut lines = Lines {
        read,
        targets: &targets,
        most: judge.most(ITEMS, BYTES),
        counts: Counts::default(),
        only: None,
        waiting: BTreeMap::new(),
    };
    let mut comparisons = BTreeMap::new();
    let compared = runtime.block_on(compare(&mut lines, &judge, arguments.timeout, &mut comparisons));
    judge.end();
    compared?;
    report(arguments, &lines.counts, &comparisons)
}

/// Scores all lines, a few calls at a time.
async fn compare(
    lines: &mut Lines<'_, impl Iterator<Item = (audit::Place, Result<Read, Fault>)>>,
    judge: &Judge,
    timeout: u64,
    comparisons: &mut BTreeMap<String, Comparison>,
) -> Result<(), Failure> {
    let batches = std::iter::from_fn(|| lines.batch().transpose());
    let mut answers = stream::iter(batches)
        .map(async |batch| {
            let Batch { by, lines } = batch?;
            let items = lines.iter().map(|line| line.item.clone()).collect();
            Ok::<_, Failure>((lines, judge.score(&by, items, timeout).await?))
        })
        .buffer_unordered(CALLS);
    while let Some(answer) = answers.next().await {
        let (lines, (receipt, outcomes)) = answer?;
        if outcomes.len() != lines.len() {
            return Err(Failure::Scorer("an answer has not as many results as the call had items".into()));
        }
        for (Line { place, entry, .. }, outcome) in lines.into_iter().zip(outcomes) {
            let comparison = comparisons.entry(entry.model.clone()).or_default();
            if comparison.judges[0].is_empty() {
                let was = format!("{}, {}, {}", entry.revision, entry.dtype, entry.server_version);
                comparison.judges = [was, receipt.clone()];
            }
            match outcome {
                Ok(score) => comparison.add(place, &entry, &score),
                Err(error) => comparison.failed.push((place, error)),
            }
        }
    }
    Ok(())
}

/// The lines of a log that are to be scored again.
struct Lines<'a, R> {
    read: R,
    targets: &'a [Target],
    /// The most items of a call, and bytes of theirs.
    most: (usize, usize),
    counts: Counts,
    /// The model whose lines all are, where nothing says whose are wanted.
    only: Option<String>,
    /// What is to be scored by each model, and its bytes.
    waiting: BTreeMap<String, (Vec<Line>, usize)>,
}

impl<R: Iterator<Item = (audit::Place, Result<Read, Fault>)>> Lines<'_, R> {
    /// The next lines that one model scores; none at the end.
    fn batch(&mut self) -> Result<Option<Batch>, Failure> {
        while let Some((place, read)) = self.read.next() {
            self.counts.lines += 1;
            let entry = match read? {
                Read::Entry(entry) => *entry,
                Read::Torn => {
                    self.counts.torn += 1;
                    continue;
                }
            };
            if entry.mean.is_none() {
                self.counts.without_score += 1;
                continue;
            }
            let Some(by) = self.by(&entry)? else {
                self.counts.of_others += 1;
                continue;
            };
            let item = item(&entry).map_err(|reason| Fault::new(&place, reason))?;
            let bytes = prost::Message::encoded_len(&item);
            let line = Line { place: format!("{}:{}", place.0.display(), place.1), entry, item };
            let (lines, held) = self.waiting.entry(by.clone()).or_default();
            // One that does not fit beside the others goes with the next.
            let full = !lines.is_empty() && (lines.len() >= self.most.0 || *held + bytes > self.most.1);
            let batch = full.then(|| Batch { by, lines: std::mem::take(lines) });
            *held = if full { bytes } else { *held + bytes };
            lines.push(line);
            if batch.is_some() {
                return Ok(batch);
            }
        }
        Ok(self.waiting.pop_first().map(|(by, (lines, _))| Batch { by, lines }))
    }

    /// What scores a line; nothing where it is not wanted.
    fn by(&mut self, entry: &Entry) -> Result<Option<String>, Failure> {
        match self.targets {
            [] => Ok(Some(entry.model.clone())),
            [Target { of: None, said, by }] => {
                let only = self.only.get_or_insert_with(|| entry.model.clone());
                if *only != entry.model {
                    return Err(Failure::Usage(format!(
                        "the log has lines of {only:?} and of {:?}: say whose are wanted, as in --model {only}={said}",
                        entry.model
                    )));
                }
                Ok(Some(by.clone()))
            }
            several => {
                let own = several.iter().find(|target| target.of.as_ref() == Some(&entry.model));
                Ok(own.map(|target| target.by.clone()))
            }
        }
    }
}

/// The item of a line, or why there is none.
fn item(entry: &Entry) -> Result<proto::ScoreItem, String> {
    let missing = |what: &str, setting: &str| {
        format!(
            "has no {what} and cannot be scored again: only with audit.{setting} = true are they recorded"
        )
    };
    let prompt = entry.prompt.clone().ok_or_else(|| missing("prompt", "prompts"))?;
    let picture = |image: &Image| {
        let bytes = image.bytes.clone();
        let source = match (image.width, image.height) {
            (Some(width), Some(height)) => {
                proto::image::Source::Raw(proto::RawImage { width, height, rgb8: bytes })
            }
            _ => proto::image::Source::Encoded(bytes),
        };
        proto::Image { source: Some(source) }
    };
    let image = entry.image.as_ref().map(picture).ok_or_else(|| missing("picture", "pictures"))?;
    let question = |asked: &audit::Question| proto::Question {
        text: asked.text.clone(),
        answers: asked.answers.clone(),
    };
    Ok(proto::ScoreItem {
        prompt: Some(prompt),
        image: Some(image),
        references: entry.references.iter().map(picture).collect(),
        questions: entry.questions.iter().map(question).collect(),
    })
}

/// Says what was found; whether all is as it was.
fn report(
    arguments: &Arguments,
    counts: &Counts,
    comparisons: &BTreeMap<String, Comparison>,
) -> Result<bool, Failure> {
    let (out, tolerance) = (&mut io::stdout().lock(), arguments.tolerance);
    let Counts { lines, without_score, torn, of_others } = counts;
    if comparisons.is_empty() {
        let why = "no line can be compared: none has a score, or none is of a model that is wanted";
        return Err(Failure::Usage(format!("{}: {why}", arguments.log.display())));
    }
    if arguments.json {
        let log =
            json!({"lines": lines, "without_score": without_score, "torn": torn, "of_others": of_others});
        writeln!(out, "{log}")?;
    } else {
        writeln!(
            out,
            "LOG           {}: {lines} lines, {without_score} without a score, {torn} torn, {of_others} of other models",
            arguments.log.display()
        )?;
    }
    let mut same = true;
    for (model, comparison) in comparisons {
        let summary = comparison.summary(model, tolerance);
        same &= summary.is_same();
        if arguments.json {
            writeln!(out, "{}", serde_json::to_string(&summary).map_err(io::Error::from)?)?;
        } else {
            summary.write(out, tolerance)?;
        }
    }
    Ok(same)
}
