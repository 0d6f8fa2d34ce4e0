//! Metrics tell what happened. They are the process's, so that here one test runs after the other, each with a device
//! that it can hold, and each waits for its server to end.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::collections::HashSet;
use std::time::Duration;

use common::*;
use futures::{StreamExt, stream};
use spatialscore::edge::proto;
use spatialscore::edge::proto::spatial_score_service_client::SpatialScoreServiceClient;
use tokio::sync::Mutex;
use tokio::task::JoinHandle;
use tokio::time::sleep;
use tonic::transport::Channel;
use tonic::{IntoRequest, Request, Status};

type Client = SpatialScoreServiceClient<Channel>;
type Call = JoinHandle<Result<proto::ScoreResponse, Status>>;

static ALONE: Mutex<()> = Mutex::const_new(());

const TRAINING_ITEMS: &str = "spatialscore_queue_items{priority=\"training\"}";
const PREPARED: &str = "spatialscore_preparation_seconds_count";
const CONNECTIONS: &str = "spatialscore_connections";

fn call(client: &Client, request: impl IntoRequest<proto::ScoreRequest>) -> Call {
    let (mut client, request) = (client.clone(), request.into_request());
    tokio::spawn(async move { client.score(request).await.map(tonic::Response::into_inner) })
}

async fn answer(call: Call) -> proto::ScoreResponse {
    soon(call).await.unwrap().unwrap()
}

async fn until_all(metrics: &[(&str, f64)]) {
    until(|| metrics.iter().all(|&(line, value)| metric(line) == value)).await;
}

/// Holds the device with a picture of shade 1 on it.
async fn occupy(server: &TestServer, client: &Client) -> Call {
    server.device.hold();
    let first = call(client, request([1]));
    server.device.reached(1).await;
    first
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_counted_is_what_happened() {
    const BUDGET: f64 = 1024.0;
    const HELD: Duration = Duration::from_millis(100);
    let _alone = ALONE.lock().await;
    let server = TestServer::start(&[("batch.max_tokens", "1024")]).await;
    let client = server.client().await;
    let grown = growth();

    let first = occupy(&server, &client).await;
    let sides = |shade| match shade {
        3 => (2 * SIDE, SIDE),
        4 => (2 * SIDE, 2 * SIDE),
        _ => (SIDE, SIDE),
    };
    let mut mixed = request([2]);
    let same = mixed.clone();
    for shade in [3, 4] {
        let (width, height) = sides(shade);
        mixed.items.push(item(image_of(width, height, shade)));
    }
    mixed.items.push(item(encoded(b"no picture".to_vec())));
    let mixed = call(&client, mixed);
    until(|| grown("spatialscore_cache_misses_total") == 4.0).await;
    let follower = call(&client, same.clone());
    // It waits for the other: six were admitted, and five have been looked up since.
    until(|| grown(PREPARED) == 11.0).await;
    sleep(HELD).await;
    server.device.release();
    for call in [first, mixed, follower] {
        answer(call).await;
    }
    // One after the other: beside others, a batch that fails is halved.
    answer(call(&client, request([POISON]))).await;
    answer(call(&client, same)).await;

    // The first forward was the probe's, at the start. How the rest came together is the device's to tell.
    let forwards = server.device.forwards().split_off(1);
    let lengths: Vec<Vec<usize>> = forwards
        .iter()
        .map(|shades| shades.iter().map(|&shade| sides(shade)).map(|(w, h)| cost(w, h)).collect())
        .collect();
    let tokens = lengths.iter().flatten().sum::<usize>() as f64;
    let different = |lengths: &Vec<usize>| lengths.iter().collect::<HashSet<_>>().len();
    let batches = forwards.len() as f64;
    // A call is counted once its last byte is on its way.
    until(|| grown("spatialscore_requests_total{rpc=\"Score\",code=\"OK\"}") == 5.0).await;
    let wanted = [
        ("request_duration_seconds_count{rpc=\"Score\"}", 5.0),
        ("batch_items_count", batches),
        ("batch_items_sum", 5.0),
        ("batch_tokens_count", batches),
        ("batch_tokens_sum", tokens),
        ("batch_fill_ratio_count", batches),
        ("batch_fill_ratio_sum", tokens / BUDGET),
        ("batch_lengths_count", batches),
        ("batch_lengths_sum", lengths.iter().map(different).sum::<usize>() as f64),
        ("forward_seconds_count{device=\"fake:0\"}", batches),
        ("forward_failures_total", 1.0),
        ("queue_wait_seconds_count", 5.0),
        ("cache_misses_total", 5.0),
        ("cache_hits_total{from=\"flight\"}", 1.0),
        ("cache_hits_total{from=\"memory\"}", 1.0),
        // Each of the seven once for its admission and once for its pixels, and once what was no picture.
        ("preparation_seconds_count", 15.0),
        ("items_total{outcome=\"OK\"}", 6.0),
        ("items_total{outcome=\"INTERNAL\"}", 1.0),
        ("items_total{outcome=\"INVALID_ARGUMENT\"}", 1.0),
        ("score_mean_count", 6.0),
        ("score_mean_sum", 1.0 + 2.0 + 3.0 + 4.0 + 2.0 + 2.0),
    ];
    let wrong: Vec<String> = wanted
        .iter()
        .map(|&(line, wanted)| (line, wanted, grown(&format!("spatialscore_{line}"))))
        .filter(|(_, wanted, grown)| (grown - wanted).abs() > 1e-9)
        .map(|(line, wanted, grown)| format!("{line} grew by {grown}, not {wanted}"))
        .collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
    // Three calls and a forward took as long as the device was held.
    let held = HELD.as_secs_f64();
    assert!(grown("spatialscore_request_duration_seconds_sum{rpc=\"Score\"}") >= 3.0 * held);
    assert!(grown("spatialscore_forward_seconds_sum{device=\"fake:0\"}") >= held);
    for line in ["queue_wait_seconds_sum", "preparation_seconds_sum"] {
        assert!(grown(&format!("spatialscore_{line}")) > 0.0, "{line}");
    }
    server.shut_down().end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_there_now_is_what_the_gauges_say() {
    const EVALUATION_ITEMS: &str = "spatialscore_queue_items{priority=\"evaluation\"}";
    const TRAINING_TOKENS: &str = "spatialscore_queue_tokens{priority=\"training\"}";
    const EVALUATION_TOKENS: &str = "spatialscore_queue_tokens{priority=\"evaluation\"}";
    const UP: [(&str, f64); 2] = [("spatialscore_workers", 1.0), ("spatialscore_serving", 1.0)];
    const DOWN: [(&str, f64); 2] = [("spatialscore_workers", 0.0), ("spatialscore_serving", 0.0)];
    let _alone = ALONE.lock().await;
    let server = TestServer::start(&[("server.drain_grace_seconds", "3")]).await;
    until_all(&UP).await;
    // Once the one that waited for the start is gone.
    until_all(&[(CONNECTIONS, 0.0)]).await;
    let (client, other) = (server.client().await, server.client().await);
    until_all(&[(CONNECTIONS, 2.0)]).await;
    drop(other);
    until_all(&[(CONNECTIONS, 1.0)]).await;

    let first = occupy(&server, &client).await;
    let evaluation = proto::ScoreRequest { priority: proto::Priority::Evaluation.into(), ..request([5]) };
    let waiting = [call(&client, request([2, 3, 4])), call(&client, evaluation)];
    let tokens = cost(SIDE, SIDE) as f64;
    until_all(&[
        (TRAINING_ITEMS, 3.0),
        (TRAINING_TOKENS, 3.0 * tokens),
        (EVALUATION_ITEMS, 1.0),
        (EVALUATION_TOKENS, tokens),
    ])
    .await;
    server.device.release();
    for call in waiting.into_iter().chain([first]) {
        answer(call).await;
    }
    let gauges = [TRAINING_ITEMS, TRAINING_TOKENS, EVALUATION_ITEMS, EVALUATION_TOKENS];
    until_all(&gauges.map(|line| (line, 0.0))).await;

    server.device.refuse(true);
    let guilty = call(&client, request([LOST]));
    until_all(&DOWN).await;
    server.device.refuse(false);
    answer(guilty).await;
    until_all(&UP).await;

    let ending = server.shut_down();
    until_all(&[("spatialscore_serving", 0.0)]).await;
    // It turned away before it stopped.
    answer(call(&client, request([6]))).await;
    ending.end().await;
    until_all(&[(CONNECTIONS, 0.0)]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_nobody_waits_for_is_not_decoded() {
    const MANY: usize = 16;
    let _alone = ALONE.lock().await;
    let server = TestServer::start(&[("processor.threads", "1")]).await;
    let client = server.client().await;
    let grown = growth();
    // What is decoded keeps its place in the queue, so that it tells how many callers there are.
    let first = occupy(&server, &client).await;
    let slow = call(&client, slow_request(MANY, 4));
    let waiting = |items: usize| until(move || metric(TRAINING_ITEMS) == items as f64);
    waiting(MANY).await;
    let cancelled = call(&client, request([2]));
    waiting(MANY + 1).await;
    let mut hasty = Request::new(request([3]));
    hasty.set_timeout(Duration::from_secs(1));
    soon(call(&client, hasty)).await.unwrap().unwrap_err();
    cancelled.abort();
    waiting(MANY).await;
    // The admission of all, and the pixels of those from before, which are not all there yet.
    let most = (2 + 2 * MANY + 2) as f64;
    assert!(grown(PREPARED) < most, "the thread was not busy for long enough");

    until(|| grown("spatialscore_items_dropped_total{reason=\"cancelled\"}") == 1.0).await;
    until(|| grown("spatialscore_items_dropped_total{reason=\"late\"}") == 1.0).await;
    server.device.release();
    for call in [first, slow] {
        answer(call).await;
    }
    assert!(grown(PREPARED) <= most, "{} pieces of work", grown(PREPARED));
    assert!(!server.device.seen().contains(&2) && !server.device.seen().contains(&3));
    server.shut_down().end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_is_read_no_further_than_its_items_may_be_under_way() {
    let _alone = ALONE.lock().await;
    let server = TestServer::start(&[("limits.max_stream_items", "3"), ("batch.max_items", "1")]).await;
    let mut client = server.client().await;
    let grown = growth();
    server.device.hold();
    let items = stream::iter((1..=10).map(|shade| stream_item("x", shade)));
    let answers = client.score_stream(items).await.unwrap().into_inner();
    let answers = tokio::spawn(answers.map(|answer| answer.unwrap().result.unwrap()).collect::<Vec<_>>());
    // Each for its admission and for its pixels.
    until(|| grown(PREPARED) >= 6.0).await;
    // Long enough for all the others to be there too.
    sleep(Duration::from_millis(500)).await;
    assert_eq!(grown(PREPARED), 6.0);
    server.device.release();
    let mut means: Vec<f32> = soon(answers).await.unwrap().iter().map(|a| outcome(a).unwrap()).collect();
    means.sort_by(f32::total_cmp);
    assert_eq!(means, (1..=10).map(|shade| shade as f32).collect::<Vec<_>>());
    server.shut_down().end().await;
}
