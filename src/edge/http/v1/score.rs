//! Scores in our own form.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::State;
use axum::response::IntoResponse;
use bytes::Bytes;
use http::{Request, Response, header};
use serde::{Deserialize, Serialize};

use super::form;
use super::seen::{self, Looks, SeenAnswer};
use crate::edge::grpc::{code_name, status, work_item};
use crate::edge::http::json::{Base64, Plain, Structured};
use crate::edge::http::response::Refused;
use crate::edge::http::{Edge, Outcome, Served, outcomes};
use crate::edge::proto;
use crate::error::{ScoreError, quoted};

/// What a call asks for, whichever form its body has.
pub(super) struct Asked {
    /// Of every item that has none of its own.
    pub prompt: Option<String>,
    pub items: Vec<ItemAsked>,
    /// Their names; none for the default one.
    pub models: Vec<String>,
    /// Whether the answer shows what the models see.
    pub inspect: bool,
}

/// An item that a call asks for.
pub(super) struct ItemAsked {
    pub prompt: Option<String>,
    pub image: Bytes,
    pub references: Vec<Bytes>,
    pub questions: Vec<QuestionAsked>,
}

/// A question about a picture.
#[derive(Deserialize)]
pub(super) struct QuestionAsked {
    text: String,
    #[serde(default)]
    answers: Vec<String>,
}

impl QuestionAsked {
    /// One that is answered as the profile has it.
    pub fn plain(text: String) -> Self {
        Self { text, answers: Vec::new() }
    }
}

/// The body of `POST /v1/score` in JSON.
#[derive(Deserialize)]
struct ScoreRequest {
    prompt: Option<String>,
    items: Structured<Vec<Structured<Item>>>,
    models: Option<Structured<Vec<String>>>,
    #[serde(default)]
    inspect: Plain<bool>,
}

#[derive(Deserialize)]
pub(super) struct Item {
    pub prompt: Option<String>,
    pub image: Base64,
    pub references: Option<Structured<Vec<Base64>>>,
    pub questions: Option<Structured<Vec<Structured<QuestionAsked>>>>,
}

impl From<ScoreRequest> for Asked {
    fn from(ScoreRequest { prompt, items, models, inspect: Plain(inspect) }: ScoreRequest) -> Self {
        let items = items.0.into_iter().map(|Structured(item)| item.into()).collect();
        Self { prompt, items, models: models.map(|models| models.0).unwrap_or_default(), inspect }
    }
}

impl From<Item> for ItemAsked {
    fn from(Item { prompt, image: Base64(image), references, questions }: Item) -> Self {
        let references = references.into_iter().flat_map(|list| list.0).map(|Base64(file)| file).collect();
        let questions = questions.into_iter().flat_map(|list| list.0).map(|Structured(one)| one).collect();
        Self { prompt, image, references, questions }
    }
}

impl From<ItemAsked> for proto::ScoreItem {
    fn from(ItemAsked { prompt, image, references, questions }: ItemAsked) -> Self {
        let picture = |file| proto::Image { source: Some(proto::image::Source::Encoded(file)) };
        let question = |QuestionAsked { text, answers }| proto::Question { text, answers };
        Self {
            prompt,
            image: Some(picture(image)),
            references: references.into_iter().map(picture).collect(),
            questions: questions.into_iter().map(question).collect(),
        }
    }
}

/// The answer.
#[derive(Serialize)]
struct ScoreAnswer {
    items: Vec<ItemAnswer>,
    timings: Timings,
    receipts: Vec<Receipt>,
}

/// One item's, of each model in the order of their names.
#[derive(Serialize)]
struct ItemAnswer {
    scores: Vec<ModelScore>,
}

/// One model's score, or why there is none.
#[derive(Serialize)]
struct ModelScore {
    model: String,
    #[serde(flatten)]
    outcome: OutcomeAnswer,
    #[serde(skip_serializing_if = "Option::is_none")]
    seen: Option<SeenAnswer>,
}

#[derive(Serialize)]
#[serde(untagged)]
pub(super) enum OutcomeAnswer {
    Score(Score),
    Error { error: ErrorAnswer },
}

/// Numbers as clients of gRPC have them, who widen them.
#[derive(Serialize)]
pub(super) struct Score {
    mean: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    stddev: Option<f64>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    components: Vec<Component>,
}

#[derive(Serialize)]
struct Component {
    name: String,
    mean: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    stddev: Option<f64>,
}

/// Why there is no score: the code of gRPC, and words.
#[derive(Serialize)]
pub(super) struct ErrorAnswer {
    pub code: &'static str,
    pub message: String,
}

impl From<Outcome> for OutcomeAnswer {
    fn from(outcome: Outcome) -> Self {
        match outcome {
            Ok(score) => Self::Score(score.into()),
            Err(error) => Self::Error { error: error.into() },
        }
    }
}

impl From<proto::Score> for Score {
    fn from(proto::Score { mean, stddev, components }: proto::Score) -> Self {
        let components = components.into_iter().map(Component::from).collect();
        Self { mean: mean.into(), stddev: stddev.map(f64::from), components }
    }
}

impl From<tonic_types::Status> for ErrorAnswer {
    fn from(tonic_types::Status { code, message, .. }: tonic_types::Status) -> Self {
        Self { code: code_name(code.into()), message }
    }
}

impl From<proto::Component> for Component {
    fn from(proto::Component { name, mean, stddev }: proto::Component) -> Self {
        Self { name, mean: mean.into(), stddev: stddev.map(f64::from) }
    }
}

/// Where the time went: the longest of the call's items.
#[derive(Serialize)]
struct Timings {
    preprocess_seconds: f64,
    queue_seconds: f64,
    inference_seconds: f64,
}

impl From<proto::Timings> for Timings {
    fn from(proto::Timings { preprocess, queue, inference }: proto::Timings) -> Self {
        let [preprocess_seconds, queue_seconds, inference_seconds] = [preprocess, queue, inference]
            .map(|time| time.map_or(0.0, |time| time.seconds as f64 + f64::from(time.nanos) / 1e9));
        Self { preprocess_seconds, queue_seconds, inference_seconds }
    }
}

/// What judged.
#[derive(PartialEq, Eq, Serialize)]
pub(super) struct Receipt {
    pub model: String,
    pub revision: String,
    profile_digest: String,
    dtype: String,
    server_version: String,
}

impl From<proto::Receipt> for Receipt {
    fn from(receipt: proto::Receipt) -> Self {
        let proto::Receipt { model, revision, profile_digest, dtype, server_version } = receipt;
        Self { model, revision, profile_digest, dtype, server_version }
    }
}

/// `POST /v1/score`.
pub(in crate::edge::http) async fn score(
    State(edge): State<Edge>,
    request: Request<Body>,
) -> Result<Response<Body>, Refused> {
    let parse = form::or_json::<ScoreRequest, _, _>(request.headers(), "inspect", |asked, inspect| {
        let inspect = match inspect.as_deref() {
            None | Some("false") => false,
            Some("true") => true,
            Some(other) => {
                let reason = format!("is {}; send true or false", quoted(other));
                return Err(ScoreError::invalid("inspect", reason));
            }
        };
        Ok(Asked { inspect, ..asked })
    })?;
    let (mut asked, call) = edge
        .read_as(request, parse, |mut asked: Asked, served: &Served| {
            if asked.models.is_empty() {
                asked.models.push(served.own.info.name.clone());
            }
            Ok(asked)
        })
        .await?;
    let items: Vec<proto::ScoreItem> = asked.items.drain(..).map(Into::into).collect();
    let looks = if asked.inspect {
        let prompt = asked.prompt.as_deref().map(Arc::from);
        let work = items.iter().map(|item| work_item(item.clone(), prompt.as_ref())).collect();
        seen::look(&edge, work, &asked.models, &call).await?
    } else {
        Looks::default()
    };
    let Looks { seen, room, revisions } = looks;
    let message =
        proto::ScoreRequest { items, prompt: asked.prompt, models: asked.models, ..Default::default() };
    let proto::ScoreResponse { results, timings, receipts } = edge.ask(message, &call).await?;
    let receipts: Vec<Receipt> = receipts.into_iter().map(Receipt::from).collect();
    // What was shown must be what those saw who judged.
    if !revisions.is_empty() && receipts.iter().map(|receipt| &receipt.revision).ne(&revisions) {
        return Err(ScoreError::Unavailable("a model was replaced while the call ran: try again").into());
    }
    let mut seen = seen.into_iter();
    let mut item = |result| {
        let score = |(outcome, receipt): (Outcome, &Receipt)| {
            let seen = seen.next().flatten();
            ModelScore { model: receipt.model.clone(), outcome: outcome.into(), seen }
        };
        ItemAnswer { scores: outcomes(result).into_iter().zip(&receipts).map(score).collect() }
    };
    let items = results.into_iter().map(&mut item).collect();
    let answer = ScoreAnswer { items, timings: timings.unwrap_or_default().into(), receipts };
    let body = serde_json::to_vec(&answer)
        .map_err(|fault| status(&ScoreError::Internal(format!("the answer is no JSON: {fault}")), ""))?;
    Ok(([(header::CONTENT_TYPE, "application/json")], seen::held(body, room)).into_response())
}
