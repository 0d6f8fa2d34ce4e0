//! `spatialscore load`: what a running server, or several, take from many callers at once.

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use clap::Args;
use serde::Serialize;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use tonic::{Code, Request, Status};
use tonic_types::StatusExt;

use super::bench::{PROMPT, noise};
use super::connection::{
    Client, Connection, RETRY_EVERY, Servers, Unanswered, Urgency, described, outcomes, runtime,
};
use super::{USAGE, fail};
use crate::edge::proto;

/// Connections to one server: callers beyond them share.
const CONNECTIONS: usize = 64;
/// What a refused caller waits where it is not told.
const PAUSE: Duration = Duration::from_secs(1);
/// A step whose rate is at least this share of the best one has what there is to have.
const ENOUGH: f64 = 0.95;

/// Load a running server with many callers, and tell what each step of them gets.
///
/// A caller sends a group of pictures, waits for its scores, and sends the next, as a rank of a training job does. No
/// two items are alike, so that nothing comes from the cache. Each step is measured once every caller has had an answer.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  spatialscore load --callers 32 --group 24 --sweep
      How the rate grows with 1, 2, 4, … 32 callers, and from where on it does not.
  spatialscore load --server gpu-0:50051,gpu-1:50051 --callers 128 --side 1024
      A fleet: callers are spread over all servers.
  spatialscore load --model hpsv3 --model layout
      What it gives with two models for each picture.
  spatialscore load --priority evaluation --callers 4
      Beside a training job, on what it leaves.

Columns:
  callers     that have a call under way, all the time
  pictures/s  that were scored, by all models that are asked
  call        from its first attempt to its answer, waits after refusals included: half of all calls, 95 and 99 of 100
  queue       of that, the wait for the device, as the server tells it: half of all calls, 95 of 100
  refused     attempts that heard RESOURCE_EXHAUSTED, and came again when they were told to
  failed      calls without scores, of any other reason; the first reason stands below the table

How many servers a job needs: its pictures a step, by the seconds that may pass, by the rate here.

Exit codes:
  0   measured, and no call failed
  1   no server answers, or a call failed
  64  the command line is wrong")]
pub struct Arguments {
    #[command(flatten)]
    connection: Connection,
    /// Callers at once.
    #[arg(long, value_name = "COUNT", default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=4096))]
    callers: u16,
    /// Pictures of a call.
    #[arg(long, value_name = "COUNT", default_value_t = 24, value_parser = clap::value_parser!(u16).range(1..))]
    group: u16,
    /// Begin with one caller and double their number until --callers is reached.
    #[arg(long)]
    sweep: bool,
    /// How long each step is measured for.
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=86400))]
    seconds: u64,
    /// What a caller gives each call, its attempts together.
    #[arg(long, value_name = "SECONDS", default_value_t = 120, value_parser = clap::value_parser!(u64).range(1..=86400))]
    timeout: u64,
    /// The side of the square pictures that are made up, in pixels.
    #[arg(long, value_name = "PIXELS", default_value_t = 512, conflicts_with = "images",
        value_parser = clap::value_parser!(u32).range(1..=8192))]
    side: u32,
    /// A model of a server that has several, by its name; may be given several times. Without one, its default model.
    #[arg(long, value_name = "NAME")]
    model: Vec<String>,
    /// How urgent it is beside what others ask of the server.
    #[arg(long, value_enum, default_value_t = Urgency::Training)]
    priority: Urgency,
    /// Write one JSON object for each step.
    #[arg(long)]
    json: bool,
    /// Pictures to send in place of made-up ones, by turns.
    #[arg(value_name = "IMAGE")]
    images: Vec<PathBuf>,
}

/// Runs the command.
pub fn run(arguments: Arguments) -> ExitCode {
    let prepared = arguments.connection.servers().and_then(|servers| Ok((servers, pictures(&arguments)?)));
    let (servers, pictures) = match prepared {
        Ok(prepared) => prepared,
        Err(error) => return fail(USAGE, &error),
    };
    let runtime = match runtime() {
        Ok(runtime) => runtime,
        Err(error) => return fail(1, &error),
    };
    match runtime.block_on(steps(&arguments, &servers, pictures)) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(failed) => fail(1, &format!("{failed} calls failed")),
        Err(error) => fail(1, &error),
    }
}

/// The files of the command line, or one that is made up.
fn pictures(arguments: &Arguments) -> Result<Vec<Bytes>, Box<dyn std::error::Error>> {
    let read =
        |path: &PathBuf| std::fs::read(path).map(Bytes::from).map_err(|e| format!("{}: {e}", path.display()));
    if arguments.images.is_empty() {
        return Ok(vec![drawn(arguments.side)?.into()]);
    }
    Ok(arguments.images.iter().map(read).collect::<Result<_, _>>()?)
}

/// A PNG with the grain of a photograph, about as large as one of that side.
fn drawn(side: u32) -> Result<Vec<u8>, png::EncodingError> {
    let shade = |place: usize, grain: u8| {
        let (row, column) = (place / 3 / side as usize, place / 3 % side as usize);
        (((row + column * (1 + place % 3)) * 128 / side as usize) as u8).wrapping_add(grain % 16)
    };
    let pixels: Vec<u8> =
        noise((side * side * 3) as usize).into_iter().enumerate().map(|(n, grain)| shade(n, grain)).collect();
    let mut file = Vec::new();
    let mut encoder = png::Encoder::new(&mut file, side, side);
    encoder.set_color(png::ColorType::Rgb);
    encoder.write_header()?.write_image_data(&pixels)?;
    Ok(file)
}

/// Measures every step; how many calls failed.
async fn steps(
    arguments: &Arguments,
    servers: &Servers,
    pictures: Vec<Bytes>,
) -> Result<usize, Box<dyn std::error::Error>> {
    let (mut client, default) = servers.first(arguments.timeout).await?;
    let most = default.limits.map_or(u32::MAX, |limits| limits.max_items_per_request);
    let models = if arguments.model.is_empty() {
        vec![default]
    } else {
        described(&mut client, &arguments.model).await?
    };
    let (group, each) = (u32::from(arguments.group), models.len() as u32);
    if group * each > most {
        let by = if each > 1 { format!(" by {each} models") } else { String::new() };
        return Err(format!("--group {group}{by}: the server takes {most} items in a call").into());
    }
    let pictures_of = |model: &proto::GetModelResponse| model.pictures.max(1) as usize;
    let references = pictures_of(&models[0]) - 1;
    if models.iter().any(|model| pictures_of(model) != references + 1) {
        return Err(
            "--model: an item of these models has different numbers of pictures; load them apart".into()
        );
    }
    let out = &mut io::stdout();
    if !arguments.json {
        for model in &models {
            writeln!(out, "{} {}, {}", model.name, model.revision, model.devices.join(", "))?;
        }
        writeln!(out)?;
        writeln!(
            out,
            "| callers | pictures/s | call s: 50 / 95 / 99 % | queue s: 50 / 95 % | refused | failed |"
        )?;
        writeln!(out, "|---:|---:|---:|---:|---:|---:|")?;
    }
    let work = Arc::new(Work {
        pictures,
        references,
        group: arguments.group.into(),
        models: arguments.model.clone(),
        priority: arguments.priority.into(),
        timeout: Duration::from_secs(arguments.timeout),
    });
    let callers = usize::from(arguments.callers);
    let doubling = std::iter::successors(Some(1), |n| Some(n * 2)).take_while(|&n| n < callers);
    let sizes = doubling.filter(|_| arguments.sweep).chain([callers]);
    let mut rows: Vec<Row> = Vec::new();
    for (number, callers) in sizes.enumerate() {
        let row = step(number, callers, servers, &work, Duration::from_secs(arguments.seconds)).await;
        let line = if arguments.json { serde_json::to_string(&row)? } else { row.markdown() };
        writeln!(out, "{line}")?;
        out.flush()?;
        rows.push(row);
    }
    if !arguments.json {
        writeln!(out, "{}", verdict(&rows))?;
    }
    Ok(rows.iter().map(|row| row.failed).sum())
}

/// What every call sends.
struct Work {
    pictures: Vec<Bytes>,
    /// How many pictures a model reads before the judged one.
    references: usize,
    group: usize,
    models: Vec<String>,
    priority: proto::Priority,
    timeout: Duration,
}

impl Work {
    /// A group of which no item is like any other that was ever sent: its prompts tell them apart.
    fn request(&self, step: usize, caller: usize, call: usize) -> proto::ScoreRequest {
        let image =
            |picture: &Bytes| proto::Image { source: Some(proto::image::Source::Encoded(picture.clone())) };
        let item = |(place, picture): (usize, &Bytes)| proto::ScoreItem {
            prompt: Some(format!("{PROMPT} Take {step}-{caller}-{call}-{place} of {}.", std::process::id())),
            image: Some(image(picture)),
            references: vec![image(picture); self.references],
            ..Default::default()
        };
        let items = self.pictures.iter().cycle().take(self.group).enumerate().map(item).collect();
        let (priority, models) = (self.priority.into(), self.models.clone());
        proto::ScoreRequest { items, priority, models, ..Default::default() }
    }
}

/// A call that ended, and when.
struct Call {
    at: Instant,
    seconds: f64,
    refused: usize,
    /// Pictures that were scored and the seconds in the queue, or why there are none.
    outcome: Result<(usize, f64), String>,
}

/// What callers share.
struct Round {
    work: Arc<Work>,
    step: usize,
    /// A permit for each caller that has had its first answer.
    warm: Semaphore,
    stop: AtomicBool,
}

async fn step(number: usize, callers: usize, servers: &Servers, work: &Arc<Work>, time: Duration) -> Row {
    let round = Arc::new(Round {
        work: work.clone(),
        step: number,
        warm: Semaphore::new(0),
        stop: AtomicBool::new(false),
    });
    let connections: Vec<Vec<Client>> = (0..callers.min(CONNECTIONS)).map(|_| servers.clients()).collect();
    let mut tasks = JoinSet::new();
    for (caller, clients) in (0..callers).zip(connections.iter().cycle()) {
        // By turns, so that each server has its part.
        if let Some(client) = clients.get(caller % clients.len()) {
            tasks.spawn(calls(round.clone(), caller, client.clone()));
        }
    }
    // Where this fails the semaphore was closed, which nobody does.
    let _ = round.warm.acquire_many(callers as u32).await;
    let begin = Instant::now();
    sleep(time).await;
    round.stop.store(true, Ordering::Relaxed);
    let end = Instant::now();
    let ended = tasks.join_all().await.into_iter().flatten();
    Row::of(callers, end - begin, ended.filter(|call| (begin..end).contains(&call.at)))
}

/// One call after the other, until the round stops.
async fn calls(round: Arc<Round>, caller: usize, mut client: Client) -> Vec<Call> {
    let mut ended = Vec::new();
    while !round.stop.load(Ordering::Relaxed) {
        let request = round.work.request(round.step, caller, ended.len());
        let call = call(&mut client, request, round.work.timeout).await;
        let failed = call.outcome.is_err();
        ended.push(call);
        if ended.len() == 1 {
            round.warm.add_permits(1);
        }
        if failed {
            // Not as fast as it can refuse.
            sleep(RETRY_EVERY).await;
        }
    }
    ended
}

/// One group, sent again after each refusal, when the server says.
async fn call(client: &mut Client, request: proto::ScoreRequest, time: Duration) -> Call {
    let start = Instant::now();
    let mut refused = 0;
    let outcome = loop {
        let left = time.saturating_sub(start.elapsed());
        let mut attempt = Request::new(request.clone());
        attempt.set_timeout(left);
        let answer = timeout(left, client.score(attempt)).await;
        match answer.unwrap_or_else(|_| Err(Status::deadline_exceeded("no answer within --timeout"))) {
            Ok(response) => break scored(response.into_inner(), request.models.len()),
            Err(status) if status.code() == Code::ResourceExhausted => {
                refused += 1;
                let told = status.get_details_retry_info().and_then(|info| info.retry_delay);
                sleep(told.unwrap_or(PAUSE).min(time.saturating_sub(start.elapsed()))).await;
            }
            Err(status) => break Err(Unanswered::from(status).to_string()),
        }
    };
    Call { at: Instant::now(), seconds: start.elapsed().as_secs_f64(), refused, outcome }
}

/// How many pictures have a score of each of so many models that were named, if all have, and how long they waited for the
/// device.
fn scored(response: proto::ScoreResponse, named: usize) -> Result<(usize, f64), String> {
    let (pictures, timings) = (response.results.len(), response.timings);
    for result in response.results {
        let scores = outcomes(result).into_iter().collect::<Result<Vec<_>, _>>()?;
        if scores.len() != named.max(1) {
            return Err(format!("the server gave {} scores of {} for a picture", scores.len(), named.max(1)));
        }
    }
    let queue = timings.and_then(|timings| timings.queue);
    let queue = queue.map_or(0.0, |wait| wait.seconds as f64 + f64::from(wait.nanos) / 1e9);
    Ok((pictures, queue))
}

/// A line of the table.
#[derive(Debug, Default, Serialize)]
struct Row {
    callers: usize,
    seconds: f64,
    calls: usize,
    pictures_per_second: f64,
    call_seconds: Percentiles,
    queue_seconds: Percentiles,
    refused: usize,
    failed: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

/// What half of them, 95 and 99 of 100 do not exceed.
#[derive(Debug, Default, PartialEq, Serialize)]
struct Percentiles {
    p50: Option<f64>,
    p95: Option<f64>,
    p99: Option<f64>,
}

impl Percentiles {
    fn of(mut numbers: Vec<f64>) -> Self {
        numbers.sort_by(f64::total_cmp);
        let [p50, p95, p99] = [0.5, 0.95, 0.99].map(|share: f64| {
            let place = (share * numbers.len() as f64).ceil() as usize;
            numbers.get(place.saturating_sub(1)).copied()
        });
        Self { p50, p95, p99 }
    }
}

impl Row {
    fn of(callers: usize, time: Duration, ended: impl Iterator<Item = Call>) -> Self {
        let mut row = Self { callers, seconds: time.as_secs_f64(), ..Self::default() };
        let (mut pictures, mut calls, mut queues) = (0, Vec::new(), Vec::new());
        for call in ended {
            row.refused += call.refused;
            match call.outcome {
                Ok((scored, queue)) => {
                    pictures += scored;
                    calls.push(call.seconds);
                    queues.push(queue);
                }
                Err(error) => {
                    row.failed += 1;
                    row.error.get_or_insert(error);
                }
            }
        }
        row.calls = calls.len();
        row.pictures_per_second = pictures as f64 / row.seconds;
        (row.call_seconds, row.queue_seconds) = (Percentiles::of(calls), Percentiles::of(queues));
        row
    }

    fn markdown(&self) -> String {
        let number = |seconds: Option<f64>| seconds.map_or("-".into(), |seconds| format!("{seconds:.3}"));
        let join = |all: &[Option<f64>]| all.iter().map(|&one| number(one)).collect::<Vec<_>>().join(" / ");
        let Self { callers, call_seconds: call, queue_seconds: queue, refused, failed, .. } = self;
        format!(
            "| {callers} | {:.1} | {} | {} | {refused} | {failed} |",
            self.pictures_per_second,
            join(&[call.p50, call.p95, call.p99]),
            join(&[queue.p50, queue.p95]),
        )
    }
}

/// What the table says, in words.
fn verdict(rows: &[Row]) -> String {
    let best = rows.iter().map(|row| row.pictures_per_second).fold(0.0, f64::max);
    let enough = rows.iter().find(|row| row.pictures_per_second >= ENOUGH * best);
    let mut said = String::new();
    if let (Some(row), true) = (enough, rows.len() > 1 && best > 0.0) {
        said += &format!(
            "\nFrom {} callers on the rate is {:.0} pictures/s or near it: more of them wait longer, and get no more.",
            row.callers, row.pictures_per_second
        );
    }
    if rows.iter().any(|row| row.calls == 0) {
        said +=
            "\nA step without a call that ended within its time: take more --seconds, or a smaller --group.";
    }
    if let Some(error) = rows.iter().find_map(|row| row.error.as_deref()) {
        said += &format!("\nThe first that failed: {error}");
    }
    said
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ended(seconds: f64, refused: usize, outcome: Result<(usize, f64), String>) -> Call {
        Call { at: Instant::now(), seconds, refused, outcome }
    }

    #[test]
    fn a_row_counts_what_ended() {
        let calls = (1..=100).map(|n| ended(f64::from(n), 0, Ok((24, f64::from(n) / 2.0))));
        let others = [ended(1.0, 3, Err("INTERNAL: x".into())), ended(1000.0, 2, Err("UNKNOWN: y".into()))];
        let row = Row::of(8, Duration::from_secs(10), calls.chain(others));
        assert_eq!((row.calls, row.failed, row.refused, row.pictures_per_second), (100, 2, 5, 240.0));
        assert_eq!(row.call_seconds, Percentiles { p50: Some(50.0), p95: Some(95.0), p99: Some(99.0) });
        assert_eq!(row.queue_seconds.p95, Some(47.5));
        assert_eq!(row.error.as_deref(), Some("INTERNAL: x"));
        assert_eq!(Percentiles::of(vec![]), Percentiles::default());
        assert_eq!(
            Percentiles::of(vec![3.0]),
            Percentiles { p50: Some(3.0), p95: Some(3.0), p99: Some(3.0) }
        );
    }

    #[test]
    fn the_verdict_names_the_first_that_has_enough() {
        let row =
            |callers, pictures_per_second| Row { callers, calls: 1, pictures_per_second, ..Row::default() };
        let said = verdict(&[row(1, 20.0), row(2, 40.0), row(4, 48.0), row(8, 50.0), row(16, 47.0)]);
        assert!(said.contains("From 4 callers on the rate is 48 pictures/s"), "{said}");
        assert!(!verdict(&[row(16, 47.0)]).contains("callers on"));
        assert!(verdict(&[Row::default()]).contains("more --seconds"));
    }

    #[test]
    fn made_up_pictures_are_png_and_no_two_items_are_alike() {
        let picture = drawn(64).unwrap();
        assert!(picture.starts_with(b"\x89PNG") && picture.len() > 64 * 64);
        let work = Work {
            pictures: vec![picture.into()],
            references: 0,
            group: 5,
            models: Vec::new(),
            priority: proto::Priority::Training,
            timeout: Duration::ZERO,
        };
        let calls = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)];
        let prompts = calls.map(|(step, caller, call)| work.request(step, caller, call).items);
        let all: std::collections::HashSet<_> = prompts.iter().flatten().map(|item| &item.prompt).collect();
        assert_eq!(all.len(), 20);
    }
}
