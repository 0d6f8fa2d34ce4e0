//! `spatialscore score`: the shell's client of a server.

mod manifest;
mod report;

use std::collections::{HashMap, VecDeque};
use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use crate::audit::Part;
use crate::cli::connection::{Connection, Servers, Unanswered, Urgency, described, outcomes, runtime};
use crate::cli::{USAGE, fail};
use crate::edge::proto;
use manifest::{Entry, Rows};
use report::{Format, Report, Row};

/// Pictures that are read ahead of the connection.
const READ_AHEAD: usize = 4;
/// Room for the parts of a message that are not the picture or the prompt.
const MESSAGE_OVERHEAD: usize = 1024;
/// Score pictures on a running server.
///
/// Give one prompt and its pictures, or a manifest of many. Pictures are PNG, JPEG or WebP files. Results come in
/// the order of the input, as they are ready; a manifest may be of any length.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Manifests:
  FILE.csv has a header; FILE.jsonl has one JSON object a line. Both have the columns
    prompt   what the picture should show
    image    the picture's path; a relative one is found from the manifest's folder
    id       a name of your own, given back with the result (optional)
  and a JSON object may have
    references   the paths of the pictures that the model reads before it, for models that compare
    questions    what is asked about the picture, for models that read the probability of answers; no prompt is needed
  as in
    prompt,image,id
    \"a cup to the left of a plate\",cup.png,first
  or
    {\"prompt\": \"a cup to the left of a plate\", \"image\": \"cup.png\", \"id\": \"first\"}

Output:
  table   a line for each picture; where there is no score, the next line says why
  json    one object a line: id, image, prompt, mean and stddev, or error; components where the score has them
  csv     a header, then id,image,prompt,mean,stddev,error
  With several of --model each picture has a line for each of them, in their order: model stands in the JSON object, and in a
  column of the CSV before mean.
  Higher means are better; their scale is the checkpoint's own, and they are often negative.

Examples:
  spatialscore score --prompt \"a cup to the left of a plate\" a.png b.jpg
  spatialscore score --manifest pictures.csv --format csv > scores.csv
  spatialscore score --question \"Is there a cup?\" --question \"Is the cup left of the plate?\" a.png
  spatialscore score --reference before.png --prompt \"add a cup\" after.png
  spatialscore score --model hpsv3 --model layout --prompt \"a cup\" a.png
  spatialscore score --priority evaluation --manifest held_out.csv
  spatialscore score --server 10.0.0.5:50051 --wait 120 --manifest pictures.jsonl --format json
  spatialscore score --server https://rewards.example:50051 --token-file token --tls-ca ca.crt --prompt \"a cup\" a.png

Exit codes:
  0   every picture has a score
  1   one or more have none, or the server could not be reached
  64  the command line is wrong")]
pub struct Arguments {
    #[command(flatten)]
    connection: Connection,
    /// The prompt of all the pictures.
    #[arg(long, required_unless_present_any = ["manifest", "question"], conflicts_with = "manifest")]
    prompt: Option<String>,
    /// A question about each of the pictures, for models that read the probability of answers; may be given several times.
    #[arg(long, value_name = "TEXT", conflicts_with = "manifest")]
    question: Vec<String>,
    /// A picture that the model reads before each of the pictures, for models that compare; may be given several times.
    #[arg(long, value_name = "IMAGE", conflicts_with = "manifest")]
    reference: Vec<PathBuf>,
    /// A model of a server that has several, by its name; may be given several times. Without one, its default model.
    #[arg(long, value_name = "NAME")]
    model: Vec<String>,
    /// A CSV or JSON lines file of prompts and pictures.
    #[arg(long, value_name = "FILE", conflicts_with = "images")]
    manifest: Option<PathBuf>,
    /// How urgent it is beside what others ask of the server: evaluation takes what training leaves, and a small share.
    #[arg(long, value_enum, default_value_t = Urgency::Training)]
    priority: Urgency,
    /// How results are written.
    #[arg(long, value_enum, default_value_t = Format::Table)]
    format: Format,
    /// Seconds to wait for each next answer before giving up.
    #[arg(long, value_name = "SECONDS", default_value_t = 300, value_parser = clap::value_parser!(u64).range(1..))]
    timeout: u64,
    /// The pictures.
    #[arg(value_name = "IMAGE", required_unless_present = "manifest")]
    images: Vec<PathBuf>,
}

/// Why scoring ended early.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Unanswered(#[from] Unanswered),
    #[error("the server ended the stream with {0} items unanswered")]
    Cut(usize),
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
    let (rows, count): (Rows, Option<u64>) = match (&arguments.manifest, &arguments.prompt) {
        (Some(path), _) => match manifest::open(path) {
            Ok(rows) => (rows, None),
            Err(error) => return fail(USAGE, &error),
        },
        (None, prompt) => {
            let prompt = prompt.clone().unwrap_or_default();
            let (references, questions) = (arguments.reference.clone(), arguments.question.clone());
            let like = Entry { prompt, references, questions, ..Entry::default() };
            let entry = move |image| Ok(Entry { image, ..like.clone() });
            let images = arguments.images.clone();
            let count = images.len() as u64;
            (Box::new(images.into_iter().map(entry)), Some(count))
        }
    };
    let servers = match arguments.connection.servers() {
        Ok(servers) => servers,
        Err(error) => return fail(USAGE, &error),
    };
    let runtime = match runtime() {
        Ok(runtime) => runtime,
        Err(error) => return fail(1, &error),
    };
    let scored = runtime.block_on(score(&arguments, &servers, rows, count));
    // The thread that reads pictures may still wait for a connection that is gone.
    runtime.shutdown_background();
    match scored {
        Ok(0) => ExitCode::SUCCESS,
        Ok(failed) => fail(1, &format!("{failed} without a score")),
        Err(error) => fail(1, &error),
    }
}

/// Scores the rows and writes the results; returns how many have no score.
async fn score(
    arguments: &Arguments,
    servers: &Servers,
    rows: Rows,
    count: Option<u64>,
) -> Result<u64, Failure> {
    let (mut client, model) = servers.first(arguments.timeout).await?;
    let most = model.limits.map_or(usize::MAX, |limits| limits.max_message_bytes as usize);
    let models = described(&mut client, &arguments.model).await?;
    let shown = if models.is_empty() { std::slice::from_ref(&model) } else { models.as_slice() };
    let mut report = Report::begin(arguments.format, io::stdout(), shown)?;
    let bar = progress_bar(count);

    let (entries, mut read) = mpsc::channel(READ_AHEAD);
    let (requests, outgoing) = mpsc::channel(READ_AHEAD);
    let like = proto::ScoreStreamRequest {
        priority: proto::Priority::from(arguments.priority).into(),
        models: arguments.model.clone(),
        wants_receipts: !arguments.model.is_empty(),
        ..Default::default()
    };
    tokio::task::spawn_blocking(move || read_all(rows, most, &like, &entries, &requests));
    let mut answers = client.score_stream(ReceiverStream::new(outgoing)).await?.into_inner();

    let mut ordered = Ordered { models: arguments.model.clone(), ..Ordered::default() };
    let mut failed = 0;
    let (mut reading, mut answering) = (true, true);
    while reading || (answering && !ordered.is_empty()) {
        tokio::select! {
            entry = read.recv(), if reading => match entry {
                Some((row, local)) => ordered.expect(row, local),
                None => reading = false,
            },
            answer = next(&mut answers, arguments.timeout), if answering => match answer? {
                Some(answer) => ordered.answer(answer),
                None => answering = false,
            },
        }
        while let Some(rows) = ordered.pop() {
            failed += u64::from(rows.iter().any(|row| row.error.is_some()));
            bar.suspend(|| rows.iter().try_for_each(|row| report.row(row)))?;
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    if ordered.is_empty() { Ok(failed) } else { Err(Failure::Cut(ordered.waiting.len())) }
}

async fn next(
    answers: &mut Streaming<proto::ScoreStreamResponse>,
    seconds: u64,
) -> Result<Option<proto::ScoreStreamResponse>, Failure> {
    let answer = timeout(Duration::from_secs(seconds), answers.message()).await;
    Ok(answer.map_err(|_| Unanswered::Timeout(seconds))??)
}

type Expected = (Row, Option<String>);

/// Reads rows and pictures one by one; each row is announced, and sent where it can be. Blocks where the server is
/// slower, so that only a few pictures are in memory at a time.
fn read_all(
    rows: Rows,
    most: usize,
    like: &proto::ScoreStreamRequest,
    entries: &mpsc::Sender<Expected>,
    requests: &mpsc::Sender<proto::ScoreStreamRequest>,
) {
    for (index, row) in rows.enumerate() {
        let (row, request) = match row {
            Ok(entry) => {
                let request = request(index, &entry, most, like);
                (new_row(entry), request)
            }
            Err(error) => (new_row(Entry::default()), Err(error)),
        };
        let (request, local) = match request {
            Ok(request) => (Some(request), None),
            Err(error) => (None, Some(error)),
        };
        let announced = entries.blocking_send((row, local)).is_ok();
        // Closed channels are a stream that ended; its reader says why.
        if !announced || request.is_some_and(|request| requests.blocking_send(request).is_err()) {
            return;
        }
    }
}

fn request(
    index: usize,
    entry: &Entry,
    most: usize,
    like: &proto::ScoreStreamRequest,
) -> Result<proto::ScoreStreamRequest, String> {
    let mut size = 0;
    let mut read = |path: &PathBuf| {
        let bytes = std::fs::read(path).map_err(|error| error.to_string())?;
        size += bytes.len();
        let source = Some(proto::image::Source::Encoded(bytes.into()));
        Ok::<_, String>(proto::Image { source })
    };
    let image = read(&entry.image)?;
    let of_reference =
        |path| read(path).map_err(|error| format!("{}: {error}", PathBuf::as_path(path).display()));
    let references = entry.references.iter().map(of_reference).collect::<Result<_, _>>()?;
    let question = |text: &String| proto::Question { text: text.clone(), answers: Vec::new() };
    let item = proto::ScoreItem {
        prompt: Some(entry.prompt.clone()),
        image: Some(image),
        references,
        questions: entry.questions.iter().map(question).collect(),
    };
    let texts = entry.prompt.len() + entry.questions.iter().map(String::len).sum::<usize>();
    if size + texts + MESSAGE_OVERHEAD > most {
        return Err(format!("has {size} bytes; the server takes messages of {most}"));
    }
    Ok(proto::ScoreStreamRequest { id: index.to_string(), item: Some(item), ..like.clone() })
}

fn new_row(Entry { id, prompt, image, .. }: Entry) -> Row {
    Row { id, image: image.display().to_string(), prompt, ..Row::default() }
}

/// Puts answers back into the order of the input.
#[derive(Default)]
struct Ordered {
    /// Announced and not yet written, with what is known already.
    waiting: VecDeque<(Vec<Row>, bool)>,
    /// The index of the first of them.
    first: usize,
    /// Answers that came before their row was announced.
    early: HashMap<usize, proto::ScoreStreamResponse>,
    /// The models that are asked by name.
    models: Vec<String>,
}

impl Ordered {
    fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    fn expect(&mut self, mut row: Row, local: Option<String>) {
        let index = self.first + self.waiting.len();
        let known = local.is_some();
        row.error = local;
        let of = |model: &String| Row { model: Some(model.clone()), ..row.clone() };
        let rows = if self.models.is_empty() { vec![row] } else { self.models.iter().map(of).collect() };
        self.waiting.push_back((rows, known));
        if let Some(answer) = self.early.remove(&index) {
            self.answer(answer);
        }
    }

    fn answer(&mut self, answer: proto::ScoreStreamResponse) {
        let Some(index) = answer.id.parse::<usize>().ok().filter(|&index| index >= self.first) else {
            return;
        };
        let Some((rows, known)) = self.waiting.get_mut(index - self.first) else {
            self.early.insert(index, answer);
            return;
        };
        *known = true;
        // A server of before models had names answers by the one that it has, and says nothing of it.
        let judged = answer.receipts.iter().map(|receipt| &receipt.model);
        let refused = matches!(
            answer.result.as_ref().and_then(|result| result.outcome.as_ref()),
            Some(proto::score_result::Outcome::Error(_))
        );
        if !refused && judged.ne(&self.models) {
            rows.iter_mut().for_each(|row| row.error = Some("the server answered by another model".into()));
            return;
        }
        let outcomes = outcomes(answer.result.unwrap_or_default());
        for (index, row) in rows.iter_mut().enumerate() {
            // What refuses an item as a whole is said once.
            match outcomes.get(index).or(outcomes.first().filter(|outcome| outcome.is_err())) {
                Some(Ok(score)) => {
                    (row.mean, row.stddev) = (Some(score.mean), score.stddev);
                    row.components = score.components.iter().cloned().map(Part::from).collect();
                }
                Some(Err(error)) => row.error = Some(error.clone()),
                None => row.error = Some("the server answered neither a score nor an error".into()),
            }
        }
    }

    /// The next row, once it is known.
    fn pop(&mut self) -> Option<Vec<Row>> {
        if !self.waiting.front()?.1 {
            return None;
        }
        self.first += 1;
        self.waiting.pop_front().map(|(rows, _)| rows)
    }
}

/// Drawn on a terminal, and nowhere else.
fn progress_bar(count: Option<u64>) -> ProgressBar {
    let bar = count.map_or_else(ProgressBar::no_length, ProgressBar::new);
    let template =
        if count.is_some() { "{bar:40} {pos}/{len} {per_sec} {eta}" } else { "{spinner} {pos} {per_sec}" };
    match ProgressStyle::with_template(template) {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}
