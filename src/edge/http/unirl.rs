//! The reward service that UniRL's `RemoteRewardBackend` calls.
//!
//! Read in `unirl/reward/remote.py` of Tencent-Hunyuan/UniRL at 1a7b501e and of `unirl` 0.2.0 on PyPI, and in
//! `unirl-reward-service/reward_service/server.py`. A client of 0.2.0 tries again on 429 and 5xx and raises on every other
//! 4xx; the one before it tries again on all. Both take an item for failed that is left out of `results`.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use axum::body::Body;
use axum::extract::State;
use axum::response::Json;
use http::Request;
use serde::de::{Deserializer, Error, Visitor};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tonic::Status;

use super::json::{Base64, Structured};
use super::{Edge, Judge, Reply, Served, item};
use crate::edge::grpc::status;
use crate::edge::proto;
use crate::engine::Model;
use crate::error::{ScoreError, quoted};
use crate::model::profile::Output;

/// The only version of the protocol. Clients before it name none.
const PROTOCOL: &str = "1";
/// The most bytes of a name that a client gives to a sample and reads again beside its result.
const MOST_NAME: usize = 256;

/// The reward of a model that has no name of its own; where models have names, of the default one.
const OWN: &str = "spatialscore";
/// Behind the name of a reward: its standard deviation. That is a reward of its own, which only those have who name it:
/// beside the mean, under one name, it would be averaged with it.
const STDDEV: &str = "_stddev";

/// What can be asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Reward {
    name: String,
    judge: Judge,
    stddev: bool,
}

impl Reward {
    /// As clients of gRPC have it, who widen it: the shortest decimal of an `f32` is another `f64`.
    fn value(&self, score: &proto::Score) -> Result<f64, String> {
        if self.stddev {
            score.stddev.map(f64::from).ok_or("this checkpoint gives no standard deviation".into())
        } else {
            Ok(score.mean.into())
        }
    }
}

/// The name by which a model's reward is asked for.
fn name_of(model: &Model) -> &str {
    if model.terms.named { &model.info.name } else { OWN }
}

impl Served {
    /// The names of all rewards that are given.
    pub(super) fn rewards(&self) -> Vec<String> {
        let of = |model: &Arc<Model>| {
            let mean = name_of(model).to_owned();
            let stddev = (model.info.output == Output::Gaussian).then(|| format!("{mean}{STDDEV}"));
            std::iter::once(mean).chain(stddev)
        };
        self.all.iter().flat_map(of).collect()
    }

    /// The reward of this name.
    fn reward(&self, name: &str) -> Result<Reward, String> {
        let model = |name: &str| {
            let named = self.all.iter().find(|model| name_of(model) == name);
            named.or_else(|| (name == OWN).then_some(&self.own))
        };
        let mean = model(name).map(|model| (model, false));
        let found = mean.or_else(|| Some((model(name.strip_suffix(STDDEV)?)?, true)));
        let (model, stddev) = found.ok_or_else(|| {
            format!("unknown reward {}; there are {}", quoted(name), self.rewards().join(", "))
        })?;
        Ok(Reward { name: name.to_owned(), judge: Judge::of(model), stddev })
    }
}

/// A reward's name, as long as a model's can be. By hand, since serde would quote whole what it does not know.
struct RewardName(String);

impl<'de> Deserialize<'de> for RewardName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Name;
        impl Visitor<'_> for Name {
            type Value = RewardName;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a reward's name")
            }

            fn visit_str<E: Error>(self, name: &str) -> Result<RewardName, E> {
                if name.len() > MOST_NAME {
                    return Err(E::custom(format!("unknown reward {}", quoted(name))));
                }
                Ok(RewardName(name.to_owned()))
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
    required_rewards: Structured<Vec<RewardName>>,
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
    results: Vec<BTreeMap<String, BTreeMap<String, f64>>>,
    errors: Vec<BTreeMap<String, String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    protocol_version: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    identities: Vec<Identity>,
}

/// `GET /rewards`.
pub(super) async fn rewards(State(edge): State<Edge>) -> Reply<Value> {
    let served = Served::of(&*edge.handlers.engine()?, None)?;
    Ok(Json(json!({"rewards": served.rewards()})))
}

/// `POST /score`.
pub(super) async fn score(State(edge): State<Edge>, request: Request<Body>) -> Reply<ScoreResponse> {
    let (Work { mut answer, wanted, items, own }, call) = edge.read(request, Work::of).await?;
    // Samples that want the same models go together; as a rule all do.
    let mut groups: BTreeMap<Vec<Judge>, Vec<(usize, proto::ScoreItem)>> = BTreeMap::new();
    for (index, (rewards, item)) in wanted.iter().zip(items).enumerate() {
        let mut judges = judges(rewards);
        if judges.is_empty() {
            // It wants nothing, and hears whether it could have been scored.
            judges.push(own.clone());
        }
        groups.entry(judges).or_default().push((index, item));
    }
    answer.results.resize_with(wanted.len(), BTreeMap::new);
    answer.errors.resize_with(wanted.len(), BTreeMap::new);
    for (judges, group) in groups {
        let (places, items): (Vec<usize>, Vec<_>) = group.into_iter().unzip();
        let outcomes = edge.score(items, &judges, &call).await?;
        for (place, outcomes) in places.into_iter().zip(outcomes) {
            for reward in wanted.get(place).into_iter().flatten() {
                let own = judges.iter().position(|judge| *judge == reward.judge);
                let outcome = own.and_then(|own| outcomes.get(own)).map(Result::as_ref);
                let outcome = outcome.unwrap_or(Err(&no_result())).map_err(String::clone);
                let name = reward.name.clone();
                match outcome.and_then(|score| reward.value(score)) {
                    Ok(value) => {
                        let values = BTreeMap::from([(name.clone(), value)]);
                        answer.results.get_mut(place).map(|results| results.insert(name, values));
                    }
                    Err(reason) => {
                        drop(answer.errors.get_mut(place).map(|errors| errors.insert(name, reason)))
                    }
                }
            }
        }
    }
    Ok(Json(answer))
}

fn no_result() -> String {
    "this item has no result".to_owned()
}

/// The models of these rewards, each once.
fn judges(rewards: &[Reward]) -> Vec<Judge> {
    let mut judges: Vec<Judge> = Vec::new();
    for reward in rewards {
        if !judges.contains(&reward.judge) {
            judges.push(reward.judge.clone());
        }
    }
    judges
}

/// What a request asks for, and the beginning of its answer.
struct Work {
    answer: ScoreResponse,
    wanted: Vec<Vec<Reward>>,
    items: Vec<proto::ScoreItem>,
    /// What judges where nothing is named.
    own: Judge,
}

impl Work {
    fn of(asked: ScoreRequest, served: &Served) -> Result<Self, Status> {
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
            let reward = |(n, RewardName(name)): (usize, &RewardName)| {
                let place = format!("requests[{index}].required_rewards[{n}]");
                served.reward(name).map_err(|reason| status(&ScoreError::invalid("", reason), &place))
            };
            let rewards = rewards.iter().enumerate().map(reward).collect::<Result<Vec<Reward>, _>>()?;
            // Of several models, all of them in the order in which they are asked for.
            let revisions: Vec<String> = judges(&rewards).into_iter().map(|judge| judge.revision).collect();
            let revision =
                if revisions.is_empty() { served.own.info.revision.clone() } else { revisions.join("+") };
            let pinned = identity.scorer_version.replace(revision.clone());
            if let Some(other) = pinned.filter(|pinned| *pinned != revision) {
                let reason = format!("is pinned to {}; this server has {revision:?}", quoted(&other));
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
        Ok(Self { answer, wanted, items, own: Judge::of(&served.own) })
    }
}
