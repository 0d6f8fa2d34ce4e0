//! What is served, in JSON.

use axum::extract::State;
use axum::response::Json;
use serde_json::{Value, json};

use crate::edge::http::{Edge, Reply};
use crate::edge::proto;
use crate::edge::proto::spatial_score_service_server::SpatialScoreService;

/// `GET /v1/models`: what `ListModels` gives.
pub(in crate::edge::http) async fn models(State(edge): State<Edge>) -> Reply<Value> {
    let asked = tonic::Request::new(proto::ListModelsRequest {});
    let proto::ListModelsResponse { models } = edge.handlers.list_models(asked).await?.into_inner();
    let models: Vec<Value> = models.iter().map(model).collect();
    Ok(Json(json!({"models": models, "explain": {"max_cells": edge.explain_cells}})))
}

fn model(model: &proto::GetModelResponse) -> Value {
    let limits = model.limits.unwrap_or_default();
    json!({
        "name": model.name,
        "architecture": model.architecture,
        "revision": model.revision,
        "checkpoint": model.checkpoint,
        "dtype": model.dtype,
        "devices": model.devices,
        "output": named(model.output().as_str_name(), "REWARD_OUTPUT_"),
        "profile": model.profile,
        "profile_digest": model.profile_digest,
        "notice": model.notice,
        "pictures": model.pictures,
        "components": model.components,
        "takes_questions": model.takes_questions,
        "state": named(model.state().as_str_name(), "MODEL_STATE_"),
        "weight_bytes": model.weight_bytes,
        "forward_bytes": model.forward_bytes,
        "server_version": model.server_version,
        "limits": {
            "max_items_per_request": limits.max_items_per_request,
            "max_message_bytes": limits.max_message_bytes,
            "max_prompt_bytes": limits.max_prompt_bytes,
            "max_image_pixels": limits.max_image_pixels,
            "max_item_tokens": limits.max_item_tokens,
            "max_prompt_tokens": limits.max_prompt_tokens,
            "max_image_bytes": limits.max_image_bytes,
            "max_calls_per_caller": limits.max_calls_per_caller,
            "max_questions_per_item": limits.max_questions_per_item,
        },
    })
}

/// A value of the contract's as JSON has it: `REWARD_OUTPUT_GAUSSIAN` is `gaussian`.
fn named(value: &str, prefix: &str) -> String {
    value.strip_prefix(prefix).unwrap_or(value).to_lowercase()
}
