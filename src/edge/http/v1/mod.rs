//! Our own form over HTTP, for people and their scripts: what the contract of gRPC says, in JSON and multipart.
//! `openapi.json` describes it.

mod explain;
mod form;
mod models;
mod recent;
mod score;
mod seen;

use axum::response::IntoResponse;
use http::header;

pub(super) use explain::explain;
pub(super) use models::models;
pub(super) use recent::recent;
pub(super) use score::score;

/// `GET /v1/openapi.json`.
pub(super) async fn openapi() -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "application/json")], include_str!("openapi.json"))
}
