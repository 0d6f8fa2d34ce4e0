//! The reward service that UniRL's `RemoteRewardBackend` calls.
//!
//! Read in `unirl/reward/remote.py` of Tencent-Hunyuan/UniRL at 1a7b501e and of `unirl` 0.2.0 on PyPI, and in
//! `unirl-reward-service/reward_service/server.py`. A client of 0.2.0 tries again on 429 and 5xx and raises on every other
//! 4xx; the one before it tries again on all. Both take an item for failed that is left out of `results`.

use std::collections::BTreeMap;
use std::fmt;

use axum::body::Body;
use axum::extract::State;
use axum::response::Json;
use http::Request;
use serde::de::{Deserializer, Error, Visitor};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tonic::Status;

use super::json::{Base64, Structured};
use super::{Edge, Reply, item};
use crate::edge::grpc::status;
use crate::edge::proto;
use crate::engine::ModelInfo;
use crate::error::{ScoreError, quoted};
use crate::model::profile::Output;

/// The only version of the protocol. Clients before it name none.
const PROTOCOL: &str = "1";
/// The most bytes of a name that a client gives to a sample and reads again beside its result.
const MOST_NAME: usize = 256;

/// What can be asked for. The standard deviation is a reward of its own, which only those have who name it: beside the
/// mean, under one name, it would be averaged with it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Reward {
    Spatialscore,
    SpatialscoreStddev,
}

impl Reward {
    /// Those that a checkpoint gives.
    pub(super) fn of(info: &ModelInfo) -> &'static [Self] {
        match info.output {
            Output::Gaussian => &[Self::Spatialscore, Self::SpatialscoreStddev],
            Output::Scalar | Output::Probability => &[Self::Spatialscore],
        }
    }

    /// As clients of gRPC have it, who widen it: the shortest decimal of an `f32` is another `f64`.
    fn value(self, score: &proto::Score) -> Result<f64, String> {
        match self {
            Self::Spatialscore => Ok(score.mean.into()),
            Self::SpatialscoreStddev => {
                score.stddev.map(f64::from).ok_or("this checkpoint gives no standard deviation".into())
            }
        }
    }
}

/// By hand, since serde would quote whole what it does not know.
impl<'de> Deserialize<'de> for Reward {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Name;
        impl Visitor<'_> for Name {
            type Value = Reward;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a reward's name")
            }

            fn visit_str<E: Error>(self, name: &str) -> Result<Reward, E> {
                match name {
                    "spatialscore" => Ok(Reward::Spatialscore),
                    "spatialscore_stddev" => Ok(Reward::SpatialscoreStddev),
                    other => {
                        let other = quoted(other);
                        Err(E::custom(format!(
                            "unknown reward {other}; there are spatialscore and spatialscore_stddev"
                        )))
                    }
                }
            }
        }
        deserializer.deserialize_str(Name)
    }
}

/// The body of `POST /score`.
#[derive(Deserialize)]
struct ScoreRequest {
    protocol_version: Option<String>,
    requests: Structured<Vec<Structured<Sample>>>,
}

#[derive(Deserialize)]
struct Sample {
    /// The last turn has the prompt and the picture that count.
    history: Structured<Vec<Structured<Turn>>>,
    required_rewards: Structured<Vec<Reward>>,
    #[serde(flatten)]
    identity: Identity,
}

#[derive(Deserialize)]
struct Turn {
    text: String,
    image_b64: Option<Base64>,
}

/// What a client of protocol 1 expects to read again beside each result: nulls, numbers, and short texts.
#[derive(Default, Deserialize, Serialize)]
#[serde(default)]
struct Identity {
    request_id: Value,
    sample_id: Value,
    group_id: Value,
    source_rank: Value,
    policy_version: Value,
    idempotency_key: Value,
    /// The checkpoint that must score, where the client pins one; in the answer the one that did.
    scorer_version: Option<String>,
}

impl Identity {
    /// The first of the names that is none.
    fn fault(&self) -> Option<&'static str> {
        let names = [
            ("request_id", &self.request_id),
            ("sample_id", &self.sample_id),
            ("group_id", &self.group_id),
            ("source_rank", &self.source_rank),
            ("policy_version", &self.policy_version),
            ("idempotency_key", &self.idempotency_key),
        ];
        let is_name = |value: &Value| match value {
            Value::String(text) => text.len() <= MOST_NAME,
            Value::Array(_) | Value::Object(_) => false,
            _ => true,
        };
        names.into_iter().find(|(_, value)| !is_name(value)).map(|(name, _)| name)
    }
}

/// The answer. What has no score stands in `errors` and not in `results`.
#[derive(Default, Serialize)]
pub(super) struct ScoreResponse {
    results: Vec<BTreeMap<Reward, BTreeMap<Reward, f64>>>,
    errors: Vec<BTreeMap<Reward, String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    protocol_version: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    identities: Vec<Identity>,
}

/// `GET /rewards`.
pub(super) async fn rewards(State(edge): State<Edge>) -> Reply<Value> {
    let engine = edge.handlers.engine()?;
    Ok(Json(json!({"rewards": Reward::of(&engine.models().one("")?.info)})))
}

/// `POST /score`.
pub(super) async fn score(State(edge): State<Edge>, request: Request<Body>) -> Reply<ScoreResponse> {
    let (Work { mut answer, wanted, items }, call) = edge.read(request, Work::of).await?;
    let outcomes = edge.score(items, call).await?;
    for (rewards, outcome) in wanted.into_iter().zip(outcomes) {
        let (mut scores, mut errors) = (BTreeMap::new(), BTreeMap::new());
        for reward in rewards {
            match outcome.as_ref().map_err(String::clone).and_then(|score| reward.value(score)) {
                Ok(value) => drop(scores.insert(reward, BTreeMap::from([(reward, value)]))),
                Err(reason) => drop(errors.insert(reward, reason)),
            }
        }
        answer.results.push(scores);
        answer.errors.push(errors);
    }
    Ok(Json(answer))
}

/// What a request asks for, and the beginning of its answer.
struct Work {
    answer: ScoreResponse,
    wanted: Vec<Vec<Reward>>,
    items: Vec<proto::ScoreItem>,
}

impl Work {
    fn of(asked: ScoreRequest, model: &ModelInfo) -> Result<Self, Status> {
        let ScoreRequest { protocol_version, requests: Structured(requests) } = asked;
        if let Some(other) = protocol_version.as_ref().filter(|&version| version != PROTOCOL) {
            let reason = format!("is {}; only {PROTOCOL:?} is spoken here", quoted(other));
            return Err(status(&ScoreError::invalid("protocol_version", reason), ""));
        }
        let (mut wanted, mut items, mut identities) = (Vec::new(), Vec::new(), Vec::new());
        for (index, Structured(sample)) in requests.into_iter().enumerate() {
            let Sample {
                history: Structured(mut history),
                required_rewards: Structured(rewards),
                mut identity,
            } = sample;
            let refuse =
                |field, reason| status(&ScoreError::invalid(field, reason), &format!("requests[{index}]."));
            if let Some(name) = identity.fault() {
                let reason = format!("must be null, a number, or a text of at most {MOST_NAME} bytes");
                return Err(refuse(name, reason));
            }
            let served = Some(model.revision.clone());
            let pinned = std::mem::replace(&mut identity.scorer_version, served);
            if let Some(other) = pinned.filter(|pinned| *pinned != model.revision) {
                let reason = format!("is pinned to {}; this server has {:?}", quoted(&other), model.revision);
                return Err(refuse("scorer_version", reason));
            }
            let Some(Structured(Turn { text, image_b64: Some(Base64(file)) })) = history.pop() else {
                return Err(refuse(
                    "history",
                    "its last turn has no image_b64; only pictures are scored".into(),
                ));
            };
            items.push(item(text, file));
            wanted.push(rewards);
            identities.push(identity);
        }
        // A client from before the protocol had versions looks for none of this.
        if protocol_version.is_none() {
            identities.clear();
        }
        let answer = ScoreResponse { protocol_version, identities, ..ScoreResponse::default() };
        Ok(Self { answer, wanted, items })
    }
}
