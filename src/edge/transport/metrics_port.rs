//! The port that metrics are read from.

use std::time::Duration;

use http_body_util::Full;
use hyper::body::Bytes;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode, header};
use hyper_util::rt::{TokioIo, TokioTimer};
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::net::{TcpListener, TcpStream};

use super::ACCEPT_PAUSE;
use super::slots::{Places, Slots};
use crate::telemetry;

/// How often histograms give up the samples they keep between two scrapes.
const UPKEEP: Duration = Duration::from_secs(5);
/// How long a scraper may take over its request, and between two.
const SCRAPE_TIMEOUT: Duration = Duration::from_secs(10);
/// Scrapers at once. All are strangers: the oldest gives way.
pub(super) const SCRAPERS: Places = Places { all: 64, of_address: 16, of_stranger: 16 };

/// Serves `GET /metrics` and nothing else, for as long as it is polled.
pub async fn serve_metrics(listener: TcpListener, handle: PrometheusHandle) {
    let slots = Slots::new(SCRAPERS);
    let mut upkeep = tokio::time::interval(UPKEEP);
    loop {
        tokio::select! {
            _ = upkeep.tick() => handle.run_upkeep(),
            accepted = listener.accept() => match accepted {
                Ok((stream, address)) => {
                    let Some(taken) = slots.take(address.ip()) else { continue };
                    let answered = answer_scraper(stream, handle.clone());
                    tokio::spawn(async move {
                        tokio::select! {
                            () = answered => {}
                            () = taken.slot().stranger_displaced() => {}
                        }
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "the metrics port");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
        }
    }
}

async fn answer_scraper(stream: TcpStream, handle: PrometheusHandle) {
    let answer = service_fn(move |request: Request<_>| {
        let answer = metrics_page(&request, &handle);
        async move { Ok::<_, std::convert::Infallible>(answer) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(SCRAPE_TIMEOUT)
        .serve_connection(TokioIo::new(stream), answer);
    if let Err(error) = connection.await {
        tracing::debug!(%error, "a scrape");
    }
}

fn metrics_page<B>(request: &Request<B>, handle: &PrometheusHandle) -> Response<Full<Bytes>> {
    if request.uri().path() != "/metrics" {
        let mut response = Response::new(Full::from("the metrics are at /metrics\n"));
        *response.status_mut() = StatusCode::NOT_FOUND;
        return response;
    }
    if ![Method::GET, Method::HEAD].contains(request.method()) {
        let mut response = Response::new(Full::from("the metrics are read with GET\n"));
        *response.status_mut() = StatusCode::METHOD_NOT_ALLOWED;
        response.headers_mut().insert(header::ALLOW, header::HeaderValue::from_static("GET, HEAD"));
        return response;
    }
    let mut response = Response::new(Full::from(telemetry::page(handle)));
    let format = header::HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, format);
    response
}
