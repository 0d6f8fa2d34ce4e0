//! Measurements on demand: a line of JSON in, a line of JSON out.
//!
//! So that another program can alternate this one with a rival, and both are measured under the same load of the
//! machine. The first line out describes this side; then each line in gets one out:
//!
//! | in | does | out |
//! |---|---|---|
//! | `{"load": [{"prompt": …, "image": PATH}, …]}` | reads items, in place of those before, and prepares them | `{"tokens": [N, …]}` |
//! | `{"forward": [0, 2, …]}` | one forward over these items | `{"seconds": S, "means": [M, …]}` |
//! | `{"process": [0, …]}` | checks and prepares these items, one after another | `{"seconds": S}` |
//! | `{"score": [0, …]}` | both, the items prepared side by side | `{"seconds": S, "means": [M, …]}` |
//!
//! An item with `width` and `height` is a file of raw RGB. It may have `references`, paths of the pictures before the
//! judged one, and `questions`, texts.

use std::io::{BufRead, Write};
use std::path::PathBuf;
use std::time::Instant;

use bytes::Bytes;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::Subject;
use crate::device;
use crate::model::{Sample, Score};
use crate::processor::{self, Picture, Processor, Question};

#[derive(Debug, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
enum Command {
    Load(Vec<Item>),
    Forward(Vec<usize>),
    Process(Vec<usize>),
    Score(Vec<usize>),
}

#[derive(Debug, Deserialize)]
struct Item {
    prompt: String,
    image: PathBuf,
    width: Option<u32>,
    height: Option<u32>,
    #[serde(default)]
    references: Vec<PathBuf>,
    #[serde(default)]
    questions: Vec<String>,
}

#[derive(Debug, Default, Serialize)]
struct Answer {
    #[serde(skip_serializing_if = "Option::is_none")]
    seconds: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    means: Option<Vec<f32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tokens: Option<Vec<usize>>,
}

#[derive(Debug, Serialize)]
struct Description {
    version: &'static str,
    device: String,
    dtype: &'static str,
    threads: i32,
}

/// What has been loaded.
#[derive(Default)]
struct Loaded {
    sources: Vec<processor::Item>,
    samples: Vec<Sample>,
}

/// Answers each line of `input`.
///
/// # Errors
/// A line that is no command, a picture that cannot be read, a forward that failed.
pub(super) fn run(mut subject: Subject, input: impl BufRead, output: &mut impl Write) -> Result<(), String> {
    let processor = subject.processor.take().ok_or("a checkpoint is needed")?;
    let description = Description {
        version: env!("CARGO_PKG_VERSION"),
        device: device::name(subject.device),
        dtype: device::kind_name(subject.kind),
        threads: tch::get_num_threads(),
    };
    reply(output, &description)?;
    let mut loaded = Loaded::default();
    for line in input.lines() {
        let line = line.map_err(|e| e.to_string())?;
        let command: Command = serde_json::from_str(&line).map_err(|e| e.to_string())?;
        let answer = match command {
            Command::Load(items) => {
                loaded = load(&processor, items)?;
                Answer {
                    tokens: Some(loaded.samples.iter().map(Sample::tokens).collect()),
                    ..Answer::default()
                }
            }
            Command::Forward(places) => {
                let samples = pick(&loaded.samples, &places)?;
                let (seconds, scores) = subject.forward(&samples)?;
                timed(seconds, Some(&scores))
            }
            Command::Process(places) => {
                let (seconds, _) = process(&processor, &pick(&loaded.sources, &places)?)?;
                timed(seconds, None)
            }
            Command::Score(places) => {
                let sources = pick(&loaded.sources, &places)?;
                let start = Instant::now();
                let prepared: Result<Vec<_>, _> =
                    sources.par_iter().map(|source| prepare(&processor, source)).collect();
                let (prepared, samples) = (start.elapsed().as_secs_f64(), prepared?);
                let (computed, scores) = subject.forward(&samples.iter().collect::<Vec<_>>())?;
                timed(prepared + computed, Some(&scores))
            }
        };
        reply(output, &answer)?;
    }
    Ok(())
}

fn timed(seconds: f64, scores: Option<&[Score]>) -> Answer {
    let means = scores.map(|scores| scores.iter().map(|score| score.mean).collect());
    Answer { seconds: Some(seconds), means, tokens: None }
}

fn reply(output: &mut impl Write, answer: &impl Serialize) -> Result<(), String> {
    let line = serde_json::to_string(answer).map_err(|e| e.to_string())?;
    writeln!(output, "{line}").and_then(|()| output.flush()).map_err(|e| e.to_string())
}

fn pick<'a, T>(list: &'a [T], places: &[usize]) -> Result<Vec<&'a T>, String> {
    let get = |&place: &usize| list.get(place).ok_or_else(|| format!("no item {place} has been loaded"));
    places.iter().map(get).collect()
}

fn load(processor: &Processor, items: Vec<Item>) -> Result<Loaded, String> {
    let mut sources = Vec::with_capacity(items.len());
    let read =
        |path: &PathBuf| std::fs::read(path).map(Bytes::from).map_err(|e| format!("{}: {e}", path.display()));
    for Item { prompt, image, width, height, references, questions } in items {
        let mut pictures = Vec::new();
        for reference in &references {
            pictures.push(Picture::Encoded(read(reference)?));
        }
        pictures.push(match (width, height) {
            (Some(width), Some(height)) => Picture::Raw { width, height, rgb8: read(&image)? },
            _ => Picture::Encoded(read(&image)?),
        });
        let question = |text| Question { text, answers: Vec::new() };
        let questions = questions.into_iter().map(question).collect();
        sources.push(processor::Item { prompt: prompt.into(), pictures, questions });
    }
    let (_, samples) = process(processor, &sources.iter().collect::<Vec<_>>())?;
    Ok(Loaded { sources, samples })
}

/// Prepares items one after another; the seconds that it took, and what came of it.
fn process(processor: &Processor, sources: &[&processor::Item]) -> Result<(f64, Vec<Sample>), String> {
    let start = Instant::now();
    let samples: Result<Vec<_>, _> = sources.iter().map(|source| prepare(processor, source)).collect();
    Ok((start.elapsed().as_secs_f64(), samples?))
}

fn prepare(processor: &Processor, item: &processor::Item) -> Result<Sample, String> {
    let sample = processor.admit_item(item.clone()).and_then(|draft| processor.prepare(draft));
    sample.map_err(|e| e.to_string())
}
