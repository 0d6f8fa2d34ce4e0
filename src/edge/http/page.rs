//! The page to look with: files of the binary, which hold no secret and are given to whoever asks. What they show comes
//! from the calls of `v1`, which ask for a token where the others do.

use axum::body::Body as AxumBody;
use axum::extract::Path;
use axum::response::IntoResponse;
use http::{HeaderName, Response, header};
use tonic::Status;

use super::response::Refused;

/// Files by their names, from a folder.
macro_rules! files {
    ($folder:literal: $($name:literal)*) => {
        [$(($name, include_bytes!(concat!($folder, $name)).as_slice())),*]
    };
}

static FILES: [(&str, &[u8]); 12] = files!["page/":
    "index.html" "style.css" "icon.svg" "main.js" "api.js" "dom.js" "maths.js" "pictures.js" "score.js" "compare.js" "why.js" "recent.js"];
static SAMPLES: [(&str, &[u8]); 9] = files!["../../../samples/":
    "manifest.jsonl" "panda.right.png" "panda.twin.png" "banana.right.png" "banana.twin.png" "sunflower.right.png"
    "sunflower.twin.png" "apple.right.png" "apple.twin.png"];

/// Nothing from elsewhere, nothing inline, and nobody's frame.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; \
                      img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

const HEADERS: [(HeaderName, &str); 5] = [
    (header::CONTENT_SECURITY_POLICY, POLICY),
    (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (header::REFERRER_POLICY, "no-referrer"),
    (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
    // A newer server has a newer page.
    (header::CACHE_CONTROL, "no-cache"),
];

/// `GET /`.
pub(super) async fn page() -> Result<Response<AxumBody>, Refused> {
    file("index.html")
}

/// `GET /page/…`.
pub(super) async fn part(Path(path): Path<String>) -> Result<Response<AxumBody>, Refused> {
    file(&path)
}

fn file(path: &str) -> Result<Response<AxumBody>, Refused> {
    let (name, among) = match path.strip_prefix("samples/") {
        Some(sample) => (sample, SAMPLES.as_slice()),
        None => (path, FILES.as_slice()),
    };
    let found = among.iter().find(|(there, _)| *there == name);
    let (_, bytes) = *found.ok_or_else(|| Refused::from(Status::not_found("the page has no such part")))?;
    let kind = match path.rsplit_once('.').map_or("", |(_, extension)| extension) {
        "html" => "text/html; charset=utf-8",
        "css" => "text/css; charset=utf-8",
        "js" => "text/javascript; charset=utf-8",
        "svg" => "image/svg+xml",
        "png" => "image/png",
        _ => "text/plain; charset=utf-8",
    };
    Ok((HEADERS, [(header::CONTENT_TYPE, kind)], bytes).into_response())
}
