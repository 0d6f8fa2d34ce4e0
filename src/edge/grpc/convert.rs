//! Messages to work, and scores to messages.

use std::sync::Arc;
use std::time::Duration;

use metrics::{counter, histogram};
use tonic::Code;

use super::status::{code, item_status, label};
use crate::config::Limits;
use crate::edge::proto;
use crate::engine::{Answer, Answers, Memory, Model, State};
use crate::error::ScoreError;
use crate::model::profile::Output;
use crate::processor::{Item, Picture, Question};
use crate::telemetry::trace;
use crate::telemetry::{ITEMS, ModelLabels, SCORE_MEAN};

/// The most bytes of a stream item's id.
const MAX_ID_BYTES: usize = 256;

/// What an item asks to be scored. A prompt of its own comes before `shared`, the request's; questions need none.
pub fn item(item: proto::ScoreItem, shared: Option<&Arc<str>>) -> Result<Item, ScoreError> {
    let proto::ScoreItem { prompt, image, references, questions } = item;
    let prompt = prompt.map(Arc::from).or_else(|| shared.cloned());
    let prompt = prompt.or_else(|| (!questions.is_empty()).then(Arc::default));
    let prompt = prompt
        .ok_or_else(|| ScoreError::invalid("prompt", "is absent, and the request has none for all items"))?;
    let judged = picture(image, "image")?;
    let references = references.into_iter().map(|image| picture(Some(image), "references"));
    let mut pictures = references.collect::<Result<Vec<_>, _>>()?;
    pictures.push(judged);
    let question = |proto::Question { text, answers }| Question { text, answers };
    Ok(Item { prompt, pictures, questions: questions.into_iter().map(question).collect() })
}

/// What a stream's item asks to be scored.
pub fn stream_item(id: &str, item: Option<proto::ScoreItem>) -> Result<Item, ScoreError> {
    if id.len() > MAX_ID_BYTES {
        let reason = format!("has {} bytes; at most {MAX_ID_BYTES} are allowed", id.len());
        return Err(ScoreError::invalid("id", reason));
    }
    self::item(item.ok_or_else(|| ScoreError::invalid("item", "is absent"))?, None)
}

/// The path to the message that has the field of a stream item's error.
pub fn stream_place(answers: &Answers) -> &'static str {
    match answers.first() {
        Some(Err(ScoreError::Invalid { field: "id" | "item" | "priority" | "models", .. })) => "",
        _ => "item.",
    }
}

fn picture(image: Option<proto::Image>, field: &'static str) -> Result<Picture, ScoreError> {
    use proto::image::Source;
    let image = image.ok_or_else(|| ScoreError::invalid(field, "is absent"))?;
    match image.source {
        Some(Source::Encoded(bytes)) => Ok(Picture::Encoded(bytes)),
        Some(Source::Raw(proto::RawImage { width, height, rgb8 })) => {
            Ok(Picture::Raw { width, height, rgb8 })
        }
        None if field == "image" => {
            Err(ScoreError::invalid("image.source", "is absent; give encoded or raw"))
        }
        None => Err(ScoreError::invalid(field, "have one without source; give encoded or raw")),
    }
}

/// An item's result as its caller sees it, counted: of each of `models` where there are several. `place` is as in
/// [`super::status::status`].
pub fn result(models: &[Arc<Model>], answers: &Answers, place: &str) -> proto::ScoreResult {
    use proto::model_outcome::Outcome as Of;
    use proto::score_result::Outcome;
    let unknown = ModelLabels::default();
    let labels = |index: usize| models.get(index).map_or(&unknown, |model| &model.tag.labels);
    let mut said = answers.iter().enumerate().map(|(index, answer)| outcome(answer, labels(index), place));
    if models.len() <= 1 {
        let outcome = said.next().map(|said| match said {
            Ok(score) => Outcome::Score(score),
            Err(error) => Outcome::Error(error),
        });
        return proto::ScoreResult { outcome, outcomes: Vec::new() };
    }
    let outcomes = said.zip(models).map(|(said, model)| proto::ModelOutcome {
        model: model.info.name.clone(),
        outcome: Some(match said {
            Ok(score) => Of::Score(score),
            Err(error) => Of::Error(error),
        }),
    });
    proto::ScoreResult { outcome: None, outcomes: outcomes.collect() }
}

/// What one model made of an item.
fn outcome(
    answer: &Result<Answer, ScoreError>,
    labels: &ModelLabels,
    place: &str,
) -> Result<proto::Score, tonic_types::Status> {
    let (code, said) =
        match answer {
            Ok(Answer { scored, components, .. }) => {
                let score = &scored.score;
                histogram!(SCORE_MEAN, labels.alone()).record(score.mean);
                let components = components.iter().zip(&score.components).map(|(name, part)| {
                    proto::Component { name: name.clone(), mean: part.mean, stddev: part.stddev }
                });
                let components = components.collect();
                (Code::Ok, Ok(proto::Score { mean: score.mean, stddev: score.stddev, components }))
            }
            Err(error) => (code(error), Err(item_status(error, place))),
        };
    counter!(ITEMS, labels.with([("outcome", label(code).to_owned())])).increment(1);
    said
}

/// What judged a call, where its caller wants it.
pub fn receipts(models: &[Arc<Model>], wanted: bool) -> Vec<proto::Receipt> {
    let receipt = |model: &Arc<Model>| proto::Receipt {
        model: model.info.name.clone(),
        revision: model.info.revision.clone(),
        profile_digest: model.terms.profile_digest.clone(),
        dtype: model.info.dtype.clone(),
        server_version: env!("CARGO_PKG_VERSION").into(),
    };
    if wanted { models.iter().map(receipt).collect() } else { Vec::new() }
}

/// The longest time of each kind among these answers. The current call's trace shows those of the slowest.
pub fn timings<'a>(answers: impl Iterator<Item = &'a Answer>) -> proto::Timings {
    let mut longest = [Duration::ZERO; 3];
    let mut slowest = longest;
    for answer in answers {
        let times = [answer.preprocess, answer.scored.queue, answer.scored.inference];
        for (longest, time) in longest.iter_mut().zip(times) {
            *longest = time.max(*longest);
        }
        slowest = std::cmp::max_by_key(slowest, times, |times| times.iter().sum::<Duration>());
    }
    let [preprocess, queue, inference] = slowest;
    if !preprocess.is_zero() {
        trace::rooms([("preprocess", preprocess), ("queue", queue), ("inference", inference)]);
    }
    // A duration that does not fit would be 292 billion years.
    let [preprocess, queue, inference] = longest.map(|time| time.try_into().ok());
    proto::Timings { preprocess, queue, inference }
}

/// What is served.
pub fn model(model: &Model, state: &State, limits: &Limits) -> proto::GetModelResponse {
    let Model { info, terms, .. } = model;
    let memory = |of: fn(&Memory) -> u64| terms.memory.iter().map(of).max().unwrap_or_default();
    let output = match info.output {
        Output::Gaussian => proto::RewardOutput::Gaussian,
        Output::Scalar => proto::RewardOutput::Scalar,
        Output::Probability => proto::RewardOutput::Probability,
    };
    proto::GetModelResponse {
        name: info.name.clone(),
        architecture: info.architecture.clone(),
        revision: info.revision.clone(),
        dtype: info.dtype.clone(),
        devices: info.devices.clone(),
        output: output.into(),
        notice: match state {
            State::Failed(why) => format!("OUT OF SERVICE: {why}. {}", info.notice).trim_end().to_owned(),
            _ => info.notice.clone(),
        },
        profile: info.profile.clone(),
        pictures: narrow(info.pictures),
        components: info.components.clone(),
        takes_questions: info.takes_questions,
        checkpoint: terms.checkpoint.clone(),
        profile_digest: terms.profile_digest.clone(),
        state: self::state(state).into(),
        weight_bytes: memory(|memory| memory.weights),
        forward_bytes: memory(|memory| memory.forward),
        server_version: env!("CARGO_PKG_VERSION").into(),
        limits: Some(proto::Limits {
            max_items_per_request: narrow(limits.max_items_per_request),
            max_message_bytes: limits.max_message_bytes as u64,
            max_prompt_bytes: narrow(limits.max_prompt_bytes),
            max_image_pixels: limits.max_image_pixels,
            max_item_tokens: narrow(limits.max_item_tokens),
            max_prompt_tokens: narrow(limits.max_prompt_tokens),
            max_image_bytes: limits.max_image_bytes as u64,
            max_calls_per_caller: narrow(limits.max_calls_per_caller),
            max_questions_per_item: narrow(limits.max_questions_per_item),
        }),
    }
}

fn state(state: &State) -> proto::ModelState {
    match state {
        State::Serving => proto::ModelState::Serving,
        State::Asleep => proto::ModelState::Asleep,
        State::Waking => proto::ModelState::Waking,
        State::Failed(_) => proto::ModelState::Failed,
    }
}

/// The settings' ranges keep these far below the bound.
fn narrow(limit: usize) -> u32 {
    u32::try_from(limit).unwrap_or(u32::MAX)
}
