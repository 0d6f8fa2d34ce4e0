//! What is no call of gRPC is refused as HTTP does, before anything looks at it as if it were one.

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use tonic::body::Body;
use tower::{ServiceExt, service_fn};

use crate::edge::layers::CallService;

/// Calls of gRPC, as its protocol over HTTP/2 has them: POST, with a content type of its own.
pub fn grpc_only(calls: impl CallService) -> impl CallService {
    service_fn(move |request: Request<Body>| {
        let calls = calls.clone();
        async move {
            if request.method() != Method::POST {
                let mut refused = refusal(StatusCode::METHOD_NOT_ALLOWED, "a call of gRPC is a POST\n");
                refused.headers_mut().insert(header::ALLOW, HeaderValue::from_static("POST"));
                return Ok(refused);
            }
            if !is_grpc(request.headers().get(header::CONTENT_TYPE)) {
                let reason = "a call of gRPC has the content type application/grpc\n";
                return Ok(refusal(StatusCode::UNSUPPORTED_MEDIA_TYPE, reason));
            }
            calls.oneshot(request).await
        }
    })
}

fn refusal(status: StatusCode, reason: &'static str) -> Response<Body> {
    let mut response = Response::new(Body::new(Full::from(Bytes::from_static(reason.as_bytes()))));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain"));
    response
}

/// `application/grpc`, or with `+proto`: messages of another form would be read as what they are not.
fn is_grpc(content_type: Option<&HeaderValue>) -> bool {
    let named = content_type.and_then(|value| value.to_str().ok()).unwrap_or_default();
    let named = named.split(';').next().unwrap_or_default().trim_ascii();
    ["application/grpc", "application/grpc+proto"].iter().any(|form| named.eq_ignore_ascii_case(form))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_types_of_grpc_are_told_from_others() {
        let is = |text: &'static str| is_grpc(Some(&HeaderValue::from_static(text)));
        for right in
            ["application/grpc", "application/grpc+proto", "Application/gRPC", "application/grpc; a=b"]
        {
            assert!(is(right), "{right:?}");
        }
        for wrong in ["", "application/grpcx", "application/grpc-web", "application/grpc+json", "text/plain"]
        {
            assert!(!is(wrong), "{wrong:?}");
        }
        assert!(!is_grpc(None));
    }
}
