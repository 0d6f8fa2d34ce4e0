//! Load on a server, of ours or of another kind, and how it held.
//!
//!     cargo bench --bench load -- --grpc http://127.0.0.1:50051 --callers 32 --seconds 10 --prompt TEXT PICTURE …
//!     cargo bench --bench load -- --http http://127.0.0.1:8000/score --callers 32 --seconds 10 --prompt TEXT PICTURE …
//!     cargo bench --bench load -- --grpc http://127.0.0.1:50051 --rate 1000 --seconds 60 --prompt TEXT PICTURE …
//!
//! With `--callers`, so many send one picture after another, each the next when its answer is there. With `--rate`,
//! so many pictures are sent a second, whatever becomes of those before. Prints one line of JSON. A client that costs
//! little, so that it takes nothing from the server beside it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use clap::Parser;
use http_body_util::{BodyExt, Full};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde_json::json;
use spatialscore::edge::proto;
use spatialscore::edge::proto::spatial_score_service_client::SpatialScoreServiceClient;
use tokio::sync::mpsc;
use tonic::transport::{Channel, Endpoint};

#[derive(Parser)]
struct Arguments {
    #[arg(long, conflicts_with = "http", required_unless_present = "http")]
    grpc: Option<Endpoint>,
    /// Takes {"prompt", "image"} with the picture's file in base64, answers {"mean"}.
    #[arg(long)]
    http: Option<http::Uri>,
    #[arg(long, default_value_t = 32)]
    callers: usize,
    #[arg(long, conflicts_with = "callers")]
    rate: Option<f64>,
    #[arg(long)]
    seconds: f64,
    #[arg(long)]
    prompt: String,
    pictures: Vec<PathBuf>,
    /// What cargo passes on.
    #[arg(long, hide = true)]
    bench: bool,
}

/// A call's time and what came of it.
struct Call {
    took: Duration,
    outcome: String,
}

#[derive(Clone)]
enum Target {
    Grpc(SpatialScoreServiceClient<Channel>, Arc<Vec<proto::ScoreRequest>>),
    Http(Box<Client<HttpConnector, Full<Bytes>>>, http::Uri, Arc<Vec<Bytes>>),
}

const SCORED: &str = "scored";

impl Target {
    /// Requests are made once; sending one costs no copy of the picture.
    async fn connect(arguments: &Arguments) -> Vec<Self> {
        let files: Vec<Bytes> =
            arguments.pictures.iter().map(|path| std::fs::read(path).unwrap().into()).collect();
        let prompt = &arguments.prompt;
        if let Some(uri) = &arguments.http {
            let body = |file: &Bytes| json!({"prompt": prompt, "image": base64(file)}).to_string().into();
            let bodies = Arc::new(files.iter().map(body).collect());
            let client = Client::builder(TokioExecutor::new()).build_http();
            return vec![Self::Http(Box::new(client), uri.clone(), bodies)];
        }
        let request = |file: &Bytes| {
            let source = proto::image::Source::Encoded(file.clone());
            let image = Some(proto::Image { source: Some(source) });
            let items = vec![proto::ScoreItem { image, ..Default::default() }];
            proto::ScoreRequest { prompt: Some(prompt.clone()), items, ..Default::default() }
        };
        let requests = Arc::new(files.iter().map(request).collect::<Vec<_>>());
        // Several connections, as several machines would have.
        let mut targets = Vec::new();
        for _ in 0..8 {
            let channel = arguments.grpc.clone().unwrap().connect().await.unwrap();
            targets.push(Self::Grpc(SpatialScoreServiceClient::new(channel), Arc::clone(&requests)));
        }
        targets
    }

    async fn call(&mut self, n: usize) -> Call {
        let start = Instant::now();
        let outcome = match self {
            Self::Grpc(client, requests) => match client.score(requests[n % requests.len()].clone()).await {
                Ok(answer) => match &answer.get_ref().results[0].outcome {
                    Some(proto::score_result::Outcome::Score(_)) => SCORED.to_owned(),
                    Some(proto::score_result::Outcome::Error(e)) => {
                        format!("{:?}", tonic::Code::from(e.code))
                    }
                    None => "nothing".to_owned(),
                },
                Err(status) => format!("{:?}", status.code()),
            },
            Self::Http(client, uri, bodies) => {
                let request = http::Request::post(uri.clone())
                    .header("content-type", "application/json")
                    .body(Full::new(bodies[n % bodies.len()].clone()))
                    .unwrap();
                let answer = client.request(request).await.unwrap();
                let code = answer.status();
                answer.into_body().collect().await.unwrap();
                if code.is_success() { SCORED.to_owned() } else { code.to_string() }
            }
        };
        Call { took: start.elapsed(), outcome }
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let arguments = Arguments::parse();
    let targets = Target::connect(&arguments).await;
    let (report, mut calls) = mpsc::unbounded_channel();
    let (start, time) = (Instant::now(), Duration::from_secs_f64(arguments.seconds));
    match arguments.rate {
        None => {
            for caller in 0..arguments.callers {
                let (mut target, report) = (targets[caller % targets.len()].clone(), report.clone());
                let step = arguments.callers;
                tokio::spawn(async move {
                    let mut n = caller;
                    while start.elapsed() < time {
                        report.send(target.call(n).await).unwrap();
                        n += step;
                    }
                });
            }
        }
        Some(rate) => {
            let mut ticks = tokio::time::interval(Duration::from_secs_f64(1.0 / rate));
            let mut n = 0;
            while start.elapsed() < time {
                ticks.tick().await;
                let (mut target, report) = (targets[n % targets.len()].clone(), report.clone());
                tokio::spawn(async move { report.send(target.call(n).await).unwrap() });
                n += 1;
            }
        }
    }
    drop(report);
    let mut outcomes: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    while let Some(Call { took, outcome }) = calls.recv().await {
        outcomes.entry(outcome).or_default().push(took.as_secs_f64() * 1e3);
    }
    let seconds = start.elapsed().as_secs_f64();
    let summary: BTreeMap<_, _> = outcomes
        .into_iter()
        .map(|(outcome, mut ms)| {
            ms.sort_by(f64::total_cmp);
            let at = |share: f64| ms[((ms.len() - 1) as f64 * share) as usize];
            (outcome, json!({"count": ms.len(), "median_ms": at(0.5), "p99_ms": at(0.99)}))
        })
        .collect();
    println!("{}", json!({"seconds": seconds, "outcomes": summary}));
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let group =
        |chunk: &[u8]| {
            let bits = chunk.iter().fold(0_u32, |bits, &byte| bits << 8 | u32::from(byte))
                << (8 * (3 - chunk.len()));
            (0..4)
                .map(move |n| {
                    if n > chunk.len() {
                        '='
                    } else {
                        char::from(DIGITS[(bits >> (18 - 6 * n)) as usize & 63])
                    }
                })
                .collect::<String>()
        };
    bytes.chunks(3).map(group).collect()
}
