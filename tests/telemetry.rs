//! What an operator sees: metrics as a real Prometheus reads them, traces as a collector gets them, and a log without
//! what callers sent.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::collections::BTreeSet;
use std::io::Write;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use common::process::{Server, get, say};
use common::raw::{Raw, framed};
use common::*;
use futures::{StreamExt, stream};
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::trace::v1::Span;
use prost::Message;
use regex::Regex;
use serde_json::{Value, json};
use spatialscore::edge::proto;
use spatialscore::edge::proto::spatial_score_service_client::SpatialScoreServiceClient;
use tokio::sync::mpsc;
use tonic::transport::server::TcpIncoming;
use tonic::{Code, Request, Response, Status};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// One of Prometheus' programs: Debian's, fetched where it is not there yet.
///
/// `make test` has it fetched before. Where it cannot be had, as without a network, `None` is told and said loudly;
/// with SPATIALSCORE_TEST_PROMETHEUS set, as there, that is a failure.
fn prometheus(program: &str) -> Option<PathBuf> {
    let wanted = std::env::var_os("SPATIALSCORE_TEST_PROMETHEUS");
    let required = wanted.is_some();
    let folder = wanted.map_or_else(|| Path::new(ROOT).join(".cache/prometheus"), PathBuf::from);
    let path = folder.join(program);
    static FETCH: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _one_at_a_time = FETCH.lock().unwrap();
    if !path.exists() {
        let script = Path::new(ROOT).join("scripts/debian.sh");
        let fetched =
            Command::new(script).arg("prometheus").arg(&folder).args(["prometheus", "promtool"]).status();
        if !fetched.is_ok_and(|status| status.success()) {
            assert!(!required, "{} is missing and cannot be fetched", path.display());
            eprintln!("SKIPPED, AND NOTHING WAS TESTED: no {program}; scripts/debian.sh cannot fetch it");
            return None;
        }
    }
    Some(path)
}

/// What a command says on both streams; it must succeed.
fn output(command: &mut Command, input: &str) -> String {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut process = command.spawn().unwrap();
    process.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let Output { status, stdout, stderr } = process.wait_with_output().unwrap();
    let said = String::from_utf8(stdout).unwrap() + &String::from_utf8(stderr).unwrap();
    assert!(status.success(), "{status}: {said}");
    said
}

/// A server that has answered calls of every sort, so that its page has all that it can have.
async fn used() -> Server {
    let server = tokio::task::block_in_place(Server::serving);
    let mut client = SpatialScoreServiceClient::connect(server.url()).await.unwrap();
    let mut mixed = request([1, 2]);
    mixed.items.push(item(encoded(b"no picture".to_vec())));
    client.score(mixed).await.unwrap();
    client.score(request([])).await.unwrap_err();
    let answers = client.score_stream(stream::iter([stream_item("x", 1)])).await.unwrap();
    assert!(answers.into_inner().message().await.unwrap().is_some());
    server
}

#[tokio::test(flavor = "multi_thread")]
async fn promtool_finds_nothing_to_say_about_the_metrics() {
    let Some(promtool) = prometheus("promtool") else { return };
    let server = used().await;
    tokio::task::block_in_place(|| {
        let page = get(server.metrics_address(), "/metrics");
        let (_, body) = page.split_once("\r\n\r\n").unwrap();
        assert!(body.lines().count() > 100, "{body}");
        assert_eq!(output(Command::new(promtool).args(["check", "metrics"]), body), "");
    });
}

struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The shipped configuration and rules, on another port and in a hurry.
#[tokio::test(flavor = "multi_thread")]
async fn a_real_prometheus_scrapes_the_server() {
    let (Some(prometheus), Some(promtool)) = (prometheus("prometheus"), prometheus("promtool")) else {
        return;
    };
    let server = used().await;
    let folder = tempfile::tempdir().unwrap();
    let shipped = Path::new(ROOT).join("deploy/prometheus");
    let config = std::fs::read_to_string(shipped.join("prometheus.yml")).unwrap();
    assert!(config.contains("127.0.0.1:9464") && config.contains("15s"), "{config}");
    let config = config.replace("127.0.0.1:9464", server.metrics_address()).replace("15s", "1s");
    std::fs::write(folder.path().join("prometheus.yml"), config).unwrap();
    std::fs::copy(shipped.join("rules.yml"), folder.path().join("rules.yml")).unwrap();
    let said = output(
        Command::new(promtool).args(["check", "config"]).arg(folder.path().join("prometheus.yml")),
        "",
    );
    assert!(said.contains("SUCCESS") && said.contains("rules found"), "{said}");

    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let _running = Running(
        Command::new(prometheus)
            .current_dir(folder.path())
            .args(["--config.file=prometheus.yml", "--storage.tsdb.path=data", "--log.level=error"])
            .arg(format!("--web.listen-address={address}"))
            .spawn()
            .unwrap(),
    );
    let ask = |query: &str| -> Option<String> {
        std::net::TcpStream::connect(&address).ok()?;
        let answer = get(&address, &format!("/api/v1/query?query={query}"));
        let (_, body) = answer.split_once("\r\n\r\n")?;
        // The body may come in chunks; the JSON is on one line of it.
        let json = body.lines().find(|line| line.starts_with('{'))?;
        let json: Value = serde_json::from_str(json).ok()?;
        Some(json["data"]["result"][0]["value"][1].as_str()?.to_owned())
    };
    tokio::task::block_in_place(|| {
        for (query, value) in [
            ("up", "1"),
            ("spatialscore_serving", "1"),
            ("spatialscore_items_total%7Boutcome%3D%22OK%22%7D", "3"),
            ("spatialscore_score_mean_count", "3"),
        ] {
            let mut tries = (0..300).map(|_| {
                std::thread::sleep(Duration::from_millis(100));
                ask(query)
            });
            assert!(
                tries.any(|got| got.as_deref() == Some(value)),
                "{query} is {:?}, not {value}",
                ask(query)
            );
        }
    });
}

/// The metrics that dashboard and rules ask for are those that there are.
#[test]
fn dashboard_and_rules_name_metrics_that_exist() {
    let name = Regex::new(r"\b(spatialscore|process)_[a-z_]+").unwrap();
    let names = |text: &str| -> BTreeSet<String> {
        name.find_iter(text).map(|found| found.as_str().to_owned()).collect()
    };
    let known = names(include_str!("../src/telemetry/mod.rs"));
    let dashboard: Value = serde_json::from_str(include_str!("../deploy/grafana/spatialscore.json")).unwrap();
    let panels = dashboard["panels"].as_array().unwrap();
    let targets = panels.iter().flat_map(|panel| panel["targets"].as_array().unwrap());
    let queries: Vec<&str> = targets.map(|target| target["expr"].as_str().unwrap()).collect();
    assert!(queries.len() > 20);
    let asked =
        names(&queries.join("\n")).into_iter().chain(names(include_str!("../deploy/prometheus/rules.yml")));
    let asked: BTreeSet<String> = asked.collect();
    // What the planner, the cache and the workers do, and what is turned away.
    for name in [
        "batch_fill_ratio_sum",
        "batch_lengths_sum",
        "batch_tokens_sum",
        "cache_hits_total",
        "cache_misses_total",
        "worker_restarts_total",
        "workers",
        "items_dropped_total",
        "calls_refused_total",
        "messages_in_flight_bytes",
    ] {
        assert!(asked.contains(&format!("spatialscore_{name}")), "{name} has no panel");
    }
    for asked in asked {
        let plain = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| asked.strip_suffix(suffix));
        let exists = known.contains(&asked) || plain.is_some_and(|plain| known.contains(plain));
        assert!(exists, "{asked} is asked for and does not exist");
    }
    let Some(promtool) = prometheus("promtool") else { return };
    // A query that cannot be parsed fails here: each becomes a rule.
    let rule = |(index, query): (usize, &&str)| {
        let query = query.replace("$__rate_interval", "1m").replace('\'', "''");
        format!("      - {{record: 'q{index}', expr: '{query}'}}\n")
    };
    let rules: String = queries.iter().enumerate().map(rule).collect();
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), format!("groups:\n  - name: dashboard\n    rules:\n{rules}")).unwrap();
    let said = output(Command::new(promtool).args(["check", "rules"]).arg(file.path()), "");
    assert!(said.contains(&format!("{} rules found", queries.len())), "{said}");
}

/// The alerts for rewards that teach nothing and for rewards that drift go off where they should, and nowhere else.
#[test]
fn alerts_go_off_for_constant_and_for_drifting_rewards() {
    let Some(promtool) = prometheus("promtool") else { return };
    let rules = Path::new(ROOT).join("deploy/prometheus/rules.yml");
    let of = |name: &str, of: &str| format!("spatialscore_{name}{{instance=\"{of}\",model=\"m\"}}");
    let series = [
        // Three groups in four, from the twentieth minute.
        (of("recent_groups", "flat"), "16x240"),
        (of("recent_groups_without_spread", "flat"), "0x19 12x220"),
        // As many, of too few to tell; and a half of many.
        (of("recent_groups", "few"), "4x240"),
        (of("recent_groups_without_spread", "few"), "3x240"),
        (of("recent_groups", "half"), "16x240"),
        (of("recent_groups_without_spread", "half"), "8x240"),
        // From 1 to 5 in the ninetieth minute, with a standard deviation of 1; and the same with one of 3.
        (of("score_mean_count", "drift"), "0+10x240"),
        (of("score_mean_sum", "drift"), "0+10x90 950+50x149"),
        (of("recent_score_stddev", "drift"), "1x240"),
        (of("score_mean_count", "wide"), "0+10x240"),
        (of("score_mean_sum", "wide"), "0+10x90 950+50x149"),
        (of("recent_score_stddev", "wide"), "3x240"),
        // Nothing is kept.
        (of("score_mean_count", "off"), "0+10x240"),
        (of("score_mean_sum", "off"), "0+10x90 950+50x149"),
    ];
    let flat = "75% of the groups that flat scored of late have no spread: look at its page, under Recent.";
    let drift = "Scores of drift have moved by two standard deviations within an hour: a policy that learns, or one \
                 that fools the reward. Look at its page, under Recent.";
    let fired = |of: &str, summary: &str| json!([{"exp_labels": {"instance": of, "model": "m"}, "exp_annotations": {"summary": summary}}]);
    let cases = [
        ("SpatialScoreGroupsWithoutSpread", "25m", json!([])),
        ("SpatialScoreGroupsWithoutSpread", "35m", fired("flat", flat)),
        ("SpatialScoreScoresDrift", "85m", json!([])),
        ("SpatialScoreScoresDrift", "120m", fired("drift", drift)),
        ("SpatialScoreScoresDrift", "190m", json!([])),
    ];
    let series = series.map(|(series, values)| json!({"series": series, "values": values}));
    let cases =
        cases.map(|(name, time, alerts)| json!({"alertname": name, "eval_time": time, "exp_alerts": alerts}));
    let test = json!({"interval": "1m", "input_series": series, "alert_rule_test": cases});
    let file = json!({"rule_files": [rules], "evaluation_interval": "1m", "tests": [test]});
    let folder = tempfile::tempdir().unwrap();
    // JSON is YAML.
    let path = folder.path().join("test.yml");
    std::fs::write(&path, file.to_string()).unwrap();
    let said = output(Command::new(promtool).args(["test", "rules"]).arg(path), "");
    assert!(said.contains("SUCCESS"), "{said}");
}

/// A collector that keeps what it is sent.
struct Collector(mpsc::UnboundedSender<Span>);

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        for resource in request.into_inner().resource_spans {
            let attributes = resource.resource.unwrap().attributes;
            assert!(attributes.iter().any(|attribute| attribute.key == "service.name"));
            for span in resource.scope_spans.into_iter().flat_map(|scope| scope.spans) {
                self.0.send(span).unwrap();
            }
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

async fn collector() -> (String, mpsc::UnboundedReceiver<Span>) {
    let (spans, received) = mpsc::unbounded_channel();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let server = tonic::transport::Server::builder().add_service(TraceServiceServer::new(Collector(spans)));
    tokio::spawn(server.serve_with_incoming(TcpIncoming::from(listener)));
    (url, received)
}

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const PARENT: &str = "00f067aa0ba902b7";

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Trace and span of an answer's `traceparent`.
fn place(headers: &http::HeaderMap) -> (String, String, String) {
    let text = headers["traceparent"].to_str().unwrap();
    let parts: Vec<&str> = text.split('-').collect();
    let [version, trace, span, flags] = parts[..] else { panic!("{text}") };
    assert_eq!(version, "00");
    (trace.into(), span.into(), flags.into())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_is_one_span_of_its_callers_trace() {
    let (url, mut spans) = collector().await;
    let endpoint = format!("trace.otlp_endpoint={url}");
    let server = tokio::task::block_in_place(|| Server::serving_with(&["--set", &endpoint]));
    let raw = Raw::connect(server.address.parse().unwrap()).await;
    let call = async |method, flags, message: Vec<u8>| {
        let traceparent = format!("00-{TRACE}-{PARENT}-{flags}");
        let body = stream::iter([Bytes::from(framed(&message))]);
        raw.pieces(method, &[("traceparent", &traceparent)], body).await.unwrap()
    };
    let scored = call("Score", "01", request([1, 2]).encode_to_vec()).await;
    assert_eq!(scored.status.code(), Code::Ok);
    let streamed = call("ScoreStream", "01", stream_item("x", 1).encode_to_vec()).await;
    let refused = call("Score", "01", request([]).encode_to_vec()).await;
    assert_eq!(refused.status.code(), Code::InvalidArgument);
    // Its caller does not want this one kept.
    let unsampled = call("Score", "00", request([1]).encode_to_vec()).await;
    let begun_here = raw.call("Score", framed(&request([3]).encode_to_vec())).await;
    let wanted = [&scored, &streamed, &refused, &begun_here].map(|answer| place(&answer.headers));
    assert_eq!(place(&unsampled.headers).2, "00");
    for (trace, _, flags) in &wanted[..3] {
        assert_eq!((trace.as_str(), flags.as_str()), (TRACE, "01"));
    }
    assert_ne!(wanted[3].0, TRACE);

    server.signal("TERM");
    let (mut calls, mut inner) = (Vec::new(), Vec::new());
    // Its end sends what is left. Other spans are those of health checks and the like.
    while calls.len() < wanted.len() {
        let span = soon(spans.recv()).await.unwrap();
        assert_ne!(hex(&span.span_id), place(&unsampled.headers).1, "nobody wanted this one");
        if let Some((trace, ..)) = wanted.iter().find(|(_, id, _)| *id == hex(&span.span_id)) {
            assert_eq!(hex(&span.trace_id), *trace);
            calls.push(span);
        } else {
            inner.push(span);
        }
    }
    assert_eq!(tokio::task::block_in_place(|| server.code()), Some(0));
    for span in &calls {
        let theirs = hex(&span.trace_id) == TRACE;
        assert_eq!(hex(&span.parent_span_id), if theirs { PARENT } else { "" });
        assert_eq!(span.kind, 2, "a server's");
        let attributes: Vec<&str> = span.attributes.iter().map(|attribute| attribute.key.as_str()).collect();
        for key in ["rpc", "code", "caller", "trace_id"] {
            assert!(attributes.contains(&key), "{key} is not in {attributes:?}");
        }
    }
    let scored = calls.iter().find(|span| hex(&span.span_id) == place(&scored.headers).1).unwrap();
    assert_eq!(scored.name, "Score");
    // A call's rooms are spans within its own, one after the other.
    let rooms_of = |call: &Span| -> Vec<Span> {
        let mut rooms: Vec<Span> =
            inner.iter().filter(|span| span.parent_span_id == call.span_id).cloned().collect();
        rooms.sort_by_key(|room| room.end_time_unix_nano);
        rooms
    };
    for answer in [&scored.span_id, &calls.iter().find(|span| span.name == "ScoreStream").unwrap().span_id] {
        let call = calls.iter().find(|span| span.span_id == *answer).unwrap();
        let rooms = rooms_of(call);
        let names: Vec<&str> = rooms.iter().map(|room| room.name.as_str()).collect();
        assert_eq!(names, ["preprocess", "queue", "inference"]);
        assert!(rooms.iter().all(|room| room.trace_id == call.trace_id));
        assert!(rooms.windows(2).all(|pair| pair[0].end_time_unix_nano == pair[1].start_time_unix_nano));
        // The clocks of the call and of its rooms are not the same.
        let slack = 2_000_000;
        assert!(rooms[0].start_time_unix_nano + slack >= call.start_time_unix_nano);
        assert!(rooms[2].end_time_unix_nano <= call.end_time_unix_nano + slack);
    }
    assert!(rooms_of(calls.iter().find(|span| hex(&span.span_id) == wanted[2].1).unwrap()).is_empty());
    assert!(inner.iter().all(|span| hex(&span.parent_span_id) != place(&unsampled.headers).1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trace_goes_on_though_nobody_collects_it() {
    let server = TestServer::start(&[]).await;
    let raw = Raw::connect(server.address).await;
    let traceparent = format!("00-{TRACE}-{PARENT}-01");
    let body = stream::iter([Bytes::from(framed(&request([1]).encode_to_vec()))]);
    let answer = raw.pieces("Score", &[("traceparent", &traceparent)], body).await.unwrap();
    let (trace, span, flags) = place(&answer.headers);
    assert_eq!((trace.as_str(), flags.as_str()), (TRACE, "01"));
    assert_ne!(span, PARENT);
    let garbage =
        raw.pieces("Score", &[("traceparent", "00-zz")], stream::iter([Bytes::new()])).await.unwrap();
    assert_ne!(place(&garbage.headers).0, TRACE);
}

/// The pipe is full, and then all that is kept for a reader who comes late.
#[tokio::test(flavor = "multi_thread")]
async fn nobody_waits_for_who_reads_the_log() {
    let mut server = tokio::task::block_in_place(|| Server::serving_with(&["--log-level=trace"]));
    let mut client = SpatialScoreServiceClient::connect(server.url()).await.unwrap();
    let metrics = server.metrics_address().to_owned();
    let dropped = || {
        let page = tokio::task::block_in_place(|| get(&metrics, "/metrics"));
        let line = page.lines().find_map(|line| line.strip_prefix("spatialscore_log_lines_dropped_total "));
        line.unwrap().parse::<u64>().unwrap()
    };
    assert_eq!(dropped(), 0);
    let patience = std::time::Instant::now() + Duration::from_secs(60);
    while dropped() == 0 {
        assert!(std::time::Instant::now() < patience, "it logs nothing");
        for _ in 0..32 {
            soon(client.get_model(proto::GetModelRequest::default())).await.unwrap();
        }
    }
    soon(client.score(request([1]))).await.unwrap();
    server.signal("TERM");
    let code =
        soon(tokio::task::spawn_blocking(move || server.process.wait().unwrap().code())).await.unwrap();
    assert_eq!(code, Some(0));
}

/// A busy server at its default level, with every sort of failure.
#[tokio::test(flavor = "multi_thread")]
async fn what_callers_send_never_stands_in_the_log() {
    const GOOD: &str = "CANARY-token-good-0123";
    let folder = tempfile::tempdir().unwrap();
    let tokens = folder.path().join("tokens");
    std::fs::write(&tokens, format!("trainer:{GOOD}\n")).unwrap();
    let flags = ["--tokens-file", tokens.to_str().unwrap(), "--set", "limits.message_timeout_seconds=1"];
    let flags = [&flags[..], &["--http=127.0.0.1:0"]].concat();
    let small = ["queue.max_items=2", "batch.max_items=2", "limits.max_items_per_request=2"];
    let small = small.into_iter().flat_map(|setting| ["--set", setting]);
    let flags: Vec<&str> = flags.into_iter().chain(small).collect();
    let mut server = tokio::task::block_in_place(|| Server::serving_with(&flags));
    let client = SpatialScoreServiceClient::connect(server.url()).await.unwrap();
    let call = |token: &str, mut message: proto::ScoreRequest| {
        message.prompt = Some("CANARY prompt".into());
        let mut request = Request::new(message);
        request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
        let mut client = client.clone();
        async move { client.score(request).await.map(Response::into_inner) }
    };
    let mut bad = request([1]);
    bad.items.push(item(encoded([&b"CANARY picture"[..], &png(7)].concat())));
    let answer = call(GOOD, bad).await.unwrap();
    assert!(outcomes(&answer)[0].is_ok() && outcomes(&answer)[1].is_err());
    let refused = call("CANARY-token-bad-01234", request([1])).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated);
    // More than the queue holds, slow ones, late ones, and ones that are no message.
    let crowd = (0..64).map(|shade| call(GOOD, request([shade, shade])));
    let crowd = futures::future::join_all(crowd).await;
    assert!(crowd.iter().any(Result::is_ok));
    let raw = Raw::connect(server.address.parse().unwrap()).await;
    let bearer = format!("Bearer {GOOD}");
    let headers = [("authorization", bearer.as_str())];
    let late = [("authorization", bearer.as_str()), ("grpc-timeout", "1n")];
    let mut message = request([1]);
    message.prompt = Some("CANARY prompt".into());
    let message = Bytes::from(framed(&message.encode_to_vec()));
    let half = stream::iter([message.slice(..30)]).chain(stream::pending());
    let slow = raw.pieces("Score", &headers, half).await.unwrap();
    let late = raw.pieces("Score", &late, stream::iter([message.clone()])).await.unwrap();
    for answer in [slow, late] {
        assert_eq!(answer.status.code(), Code::DeadlineExceeded);
    }
    let mut spoilt = message.to_vec();
    let at = spoilt.windows(6).position(|window| window == b"CANARY").unwrap();
    spoilt[at + 7] = 0xff;
    let spoilt = raw.pieces("Score", &headers, stream::iter([Bytes::from(spoilt)])).await.unwrap();
    assert_eq!(spoilt.status.code(), Code::InvalidArgument);
    assert!(!spoilt.status.message().contains("CANARY"), "{}", spoilt.status);
    // The same over HTTP, and what JSON has room for beside it.
    let http = server.http.as_ref().unwrap().strip_prefix("http://").unwrap().to_owned();
    let basic = |token: &str| BASE64.encode(format!("trainer:{token}"));
    let (known, unknown) = (basic(GOOD), basic("CANARY-token-bad-01234"));
    let picture = BASE64.encode(png(7));
    let body = |text: &str, picture: &str, reward: &str| {
        let history = json!([{"text": text, "image_b64": picture}]);
        let sample = json!({"history": history, "required_rewards": [reward], "CANARY field": "CANARY"});
        json!({"requests": [sample], "CANARY field": ["CANARY"], "metadata": "CANARY"}).to_string()
    };
    let (prompt, reward) = ("CANARY prompt", "spatialscore");
    for (path, basic, body, status) in [
        ("/score", &known, body(prompt, &picture, reward), 200),
        ("/score", &unknown, body(prompt, &picture, reward), 401),
        ("/score", &known, body(prompt, &BASE64.encode("CANARY picture"), reward), 200),
        ("/score", &known, body(prompt, "CANARY picture", reward), 400),
        ("/score", &known, body(prompt, &picture, "CANARY reward"), 400),
        ("/score", &known, body("CANARY ".repeat(2000).as_str(), &picture, reward), 200),
        ("/score", &known, "CANARY body".into(), 400),
        ("/score", &known, json!({"requests": "CANARY", "protocol_version": "CANARY"}).to_string(), 400),
        ("/compute", &known, json!({"prompt": [prompt], "image": ["CANARY"]}).to_string(), 200),
        ("/compute", &known, json!({"prompt": [prompt, prompt], "image": [picture]}).to_string(), 200),
        ("/score?CANARY", &known, body(prompt, &picture, reward), 200),
        ("/CANARY", &known, body(prompt, &picture, reward), 404),
    ] {
        let head = format!("POST {path} HTTP/1.1\r\nAuthorization: Basic {basic}");
        let answer = tokio::task::block_in_place(|| say(&http, &head, body.as_bytes()));
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{path} {body}: {answer}");
    }
    std::fs::write(&tokens, GOOD).unwrap();
    let kept = "a change cannot be used: what was read before stays in force";
    tokio::task::block_in_place(|| server.logged(kept, "what"));
    drop((client, raw));
    server.signal("TERM");
    let (code, log) = tokio::task::block_in_place(|| server.end());
    assert_eq!(code, Some(0));
    // The log has the calls that went wrong, and of what was in them nothing.
    for word in ["UNAUTHENTICATED", "DEADLINE_EXCEEDED", "trainer"] {
        assert!(log.contains(word), "{word} is not in {log}");
    }
    for secret in ["CANARY", &known, &unknown] {
        assert!(!log.contains(secret), "{secret} is in {log}");
    }
}
