//! The reward server that Flow-Factory's `RemotePointwiseRewardModel` and `RemoteGroupwiseRewardModel` call.
//!
//! Read in `src/flow_factory/rewards/my_reward_remote.py` and `reward_server/example_server.py` of X-GenGroup/Flow-Factory
//! at a0b2bc5a. Its client tries three times at once, whatever is not a 2xx, and then raises without a reason; on a 200
//! with an `error` it raises that text and tries no more. So what no retry mends comes as the latter. Of several models one
//! is named by the path, /models/NAME/compute.

use axum::body::Body;
use axum::extract::State;
use axum::response::Json;
use http::Request;
use serde::{Deserialize, Serialize};
use tonic::Status;

use super::json::{Base64, Structured};
use super::{Edge, Judge, Reply, Served, item};
use crate::edge::grpc::status;
use crate::edge::proto;
use crate::error::{ScoreError, brief};

/// How many items without a score an error names.
const NAMED: usize = 5;

/// The body of `POST /compute`. Pictures that a prompt was about, and videos, are nothing to this reward.
#[derive(Deserialize)]
struct ComputeRequest {
    prompt: Structured<Vec<String>>,
    image: Option<Structured<Vec<Base64>>>,
}

/// The answer: all the rewards in their order, or none.
#[derive(Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum ComputeResponse {
    Rewards(Vec<f64>),
    Error(String),
}

/// `POST /compute`.
pub(super) async fn compute(State(edge): State<Edge>, request: Request<Body>) -> Reply<ComputeResponse> {
    let ((items, judge), call) = edge.read(request, items).await?;
    let outcomes: Vec<_> = edge.score(items, &[judge], &call).await?.into_iter().flatten().collect();
    let failed: Vec<&str> =
        outcomes.iter().filter_map(|outcome| outcome.as_ref().err()).map(String::as_str).collect();
    if !failed.is_empty() {
        let named: Vec<&str> = failed.iter().copied().take(NAMED).collect();
        let more = if failed.len() > named.len() { "; …" } else { "" };
        let (count, all) = (failed.len(), outcomes.len());
        let named = named.join("; ");
        let said = brief(format_args!("{count} of {all} pictures have no score: {named}{more}"));
        return Ok(Json(ComputeResponse::Error(said)));
    }
    Ok(Json(ComputeResponse::Rewards(outcomes.iter().flatten().map(|score| score.mean.into()).collect())))
}

fn items(asked: ComputeRequest, served: &Served) -> Result<(Vec<proto::ScoreItem>, Judge), Status> {
    let ComputeRequest { prompt: Structured(prompts), image } = asked;
    let images = image.map(|Structured(images)| images).unwrap_or_default();
    if prompts.len() != images.len() {
        let reason =
            format!("has {} pictures for {} prompts; send one for each", images.len(), prompts.len());
        return Err(status(&ScoreError::invalid("image", reason), ""));
    }
    let items = prompts.into_iter().zip(images).map(|(prompt, Base64(file))| item(prompt, file));
    Ok((items.collect(), Judge::of(&served.own)))
}
