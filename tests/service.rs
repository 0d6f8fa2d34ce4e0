//! The promises of the contract, each through a real socket.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use common::*;
use futures::{StreamExt, stream};
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use prost::Message;
use spatialscore::edge::proto;
use spatialscore::edge::proto::spatial_score_service_client::SpatialScoreServiceClient;
use tokio::sync::{Mutex, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::codec::CompressionEncoding;
use tonic::{Code, Request};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_types::StatusExt;

const SERVICE: &str = "spatialscore.v1.SpatialScoreService";
/// For tests that read how a counter of the process grows.
static COUNTERS: Mutex<()> = Mutex::const_new(());

#[tokio::test(flavor = "multi_thread")]
async fn order_is_kept() {
    let server = TestServer::start(&[("batch.max_items", "7")]).await;
    let mut request = request(0..64);
    for item in request.items.iter_mut().skip(1).step_by(2) {
        let Some(proto::image::Source::Raw(raw)) = item.image.take().unwrap().source else { panic!() };
        item.image = Some(encoded(png(raw.rgb8[0])));
    }
    let response = server.client().await.score(request).await.unwrap().into_inner();
    assert_eq!(outcomes(&response), (0..64).map(|shade| Ok(f32::from(shade as u8))).collect::<Vec<_>>());
    let timings = response.timings.unwrap();
    for time in [timings.preprocess, timings.queue, timings.inference] {
        let time = Duration::try_from(time.unwrap()).unwrap();
        assert!(time > Duration::ZERO && time < Duration::from_secs(60), "{time:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_item_does_not_fail_its_neighbours() {
    let server = TestServer::start(&[]).await;
    let mut request = request([1, 0, 0, 0, 0, 0, 2]);
    request.items[1].image = Some(encoded(b"no picture at all".to_vec()));
    request.items[2].image = None;
    request.items[3].image = Some(proto::Image { source: None });
    request.items[4].image = Some(encoded(png(9)[..60].to_vec()));
    request.items[5].prompt = Some("x".repeat(8193));
    let response = server.client().await.score(request).await.unwrap().into_inner();
    let outcomes = outcomes(&response);
    assert_eq!(outcomes[0], Ok(1.0));
    assert_eq!(outcomes[6], Ok(2.0));
    let fields = ["image.encoded", "image", "image.source", "image.encoded", "prompt"];
    for (index, field) in (1..=5).zip(fields) {
        let path = format!("items[{index}].{field}");
        let (code, message) = outcomes[index].as_ref().unwrap_err();
        assert_eq!(*code, Code::InvalidArgument);
        assert!(message.starts_with(&format!("{path}: ")), "{message}");
        let Some(proto::score_result::Outcome::Error(error)) = &response.results[index].outcome else {
            panic!()
        };
        let detail = error.details.iter().find(|detail| detail.type_url.ends_with("BadRequest")).unwrap();
        let violations = tonic_types::pb::BadRequest::decode(&*detail.value).unwrap().field_violations;
        assert_eq!(violations[0].field, path);
    }
    assert_eq!(server.device.seen().iter().filter(|&&shade| shade == 9 || shade == 0).count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_that_breaks_a_limit_is_refused_whole() {
    let server = TestServer::start(&[("limits.max_items_per_request", "3")]).await;
    let mut client = server.client().await;
    for shades in [0..0, 0..4] {
        let status = client.score(request(shades)).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
        assert_eq!(status.get_details_bad_request().unwrap().field_violations[0].field, "items");
        assert!(status.message().contains("1 to 3"), "{status}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_item_needs_a_prompt_from_somewhere() {
    let server = TestServer::start(&[]).await;
    let mut request = request([1, 2]);
    request.prompt = None;
    request.items[1].prompt = Some("a plate".into());
    let response = server.client().await.score(request).await.unwrap().into_inner();
    let outcomes = outcomes(&response);
    assert!(outcomes[0].as_ref().unwrap_err().1.starts_with("items[0].prompt: "), "{outcomes:?}");
    assert_eq!(outcomes[1], Ok(2.0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_answers_by_id_and_goes_on_after_a_bad_item() {
    let server = TestServer::start(&[]).await;
    let mut items: Vec<_> = (0..50).map(|shade| stream_item(&shade.to_string(), shade)).collect();
    items[7].item = None;
    items[8].item.as_mut().unwrap().image = Some(encoded(vec![1, 2, 3]));
    items[9].id = "x".repeat(257);
    items[10].id = "y".repeat(1 << 20);
    let answers = server.client().await.score_stream(stream::iter(items)).await.unwrap().into_inner();
    let answers: Vec<_> = answers.map(Result::unwrap).collect().await;
    assert_eq!(answers.len(), 50);
    for answer in answers {
        let outcome = outcome(&answer.result.unwrap());
        let refused = |field: &str| {
            let (code, message) = outcome.clone().unwrap_err();
            assert_eq!(code, Code::InvalidArgument);
            assert!(message.starts_with(field), "{message}");
        };
        match answer.id.as_str() {
            "7" => refused("item: "),
            "8" => refused("item.image.encoded: "),
            id if id.len() == 257 => refused("id: "),
            id if id.starts_with("yyy") => {
                assert!(id.len() <= 512 && id.ends_with('…'), "{} bytes", id.len());
                refused("id: ");
            }
            id => assert_eq!(outcome, Ok(id.parse().unwrap())),
        }
    }
}

/// Two requests, of which each fills the queue: one is taken, the other refused. Gives the one that is taken, still
/// unanswered, and the refusal.
async fn fill_queue(
    client: &SpatialScoreServiceClient<tonic::transport::Channel>,
    shades: [u8; 2],
) -> (tokio::task::JoinHandle<Result<tonic::Response<proto::ScoreResponse>, tonic::Status>>, tonic::Status) {
    let call = |shade| {
        let mut client = client.clone();
        tokio::spawn(async move { client.score(request([shade, shade])).await })
    };
    let (mut a, mut b) = (call(shades[0]), call(shades[1]));
    tokio::select! {
        refused = &mut a => (b, refused.unwrap().unwrap_err()),
        refused = &mut b => (a, refused.unwrap().unwrap_err()),
    }
}

const SMALL_QUEUE: [(&str, &str); 3] =
    [("queue.max_items", "2"), ("batch.max_items", "2"), ("limits.max_items_per_request", "2")];

/// A server whose device is busy with a picture of shade 1 until it is released, and that call.
async fn busy(
    flags: &[(&str, &str)],
) -> (TestServer, SpatialScoreServiceClient<tonic::transport::Channel>, tokio::task::JoinHandle<()>) {
    let server = TestServer::start(flags).await;
    let client = server.client().await;
    server.device.hold();
    let mut first = client.clone();
    let first = tokio::spawn(async move {
        let response = first.score(request([1])).await.unwrap().into_inner();
        assert_eq!(outcomes(&response), [Ok(1.0)]);
    });
    server.device.reached(1).await;
    (server, client, first)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_refuses_calls_and_makes_streams_wait() {
    let (server, client, first) = busy(&SMALL_QUEUE).await;
    let (taken, refused) = fill_queue(&client, [2, 3]).await;
    assert_eq!(refused.code(), Code::ResourceExhausted);
    assert!(refused.get_details_retry_info().unwrap().retry_delay.unwrap() > Duration::ZERO);

    let items = stream::iter((10..20).map(|shade| stream_item("x", shade)));
    let mut answers = client.clone().score_stream(items).await.unwrap().into_inner();
    let early = tokio::time::timeout(Duration::from_millis(300), answers.next()).await;
    assert!(early.is_err(), "a full queue answered {early:?}");
    server.device.release();
    let answers: Vec<_> = answers.map(|answer| outcome(&answer.unwrap().result.unwrap())).collect().await;
    assert_eq!(answers.len(), 10);
    assert!(answers.iter().all(Result::is_ok), "{answers:?}");
    assert!(taken.await.unwrap().is_ok());
    first.await.unwrap();
}

/// While the queue is full the server reads no more than HTTP/2's window and a few items.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_stops_the_reading_of_a_stream() {
    let (server, client, first) = busy(&SMALL_QUEUE).await;
    let (sent, answered, most) = <(Arc<AtomicUsize>, AtomicUsize, Arc<AtomicUsize>)>::default();
    let answered = Arc::new(answered);
    let items = stream::iter(0..60).map({
        let (sent, answered, most) = (Arc::clone(&sent), Arc::clone(&answered), Arc::clone(&most));
        move |index: usize| {
            let ahead = sent.fetch_add(1, Ordering::SeqCst) + 1 - answered.load(Ordering::SeqCst);
            most.fetch_max(ahead, Ordering::SeqCst);
            let mut item = stream_item(&index.to_string(), 5);
            let mut rgb8 = vec![5; 512 * 512 * 3];
            stamp(&mut rgb8);
            let raw = proto::RawImage { width: 512, height: 512, rgb8: rgb8.into() };
            let source = Some(proto::image::Source::Raw(raw));
            item.item.as_mut().unwrap().image = Some(proto::Image { source });
            item
        }
    });
    let mut answers = client.clone().score_stream(items).await.unwrap().into_inner();
    // A server that reads on has the time to read it all.
    tokio::time::sleep(Duration::from_millis(500)).await;
    server.device.release();
    while let Some(answer) = answers.next().await {
        answered.fetch_add(1, Ordering::SeqCst);
        assert_eq!(outcome(&answer.unwrap().result.unwrap()), Ok(5.0));
    }
    assert_eq!(answered.load(Ordering::SeqCst), 60);
    assert!(most.load(Ordering::SeqCst) <= 12, "{most:?} items were on their way at once");
    first.await.unwrap();
}

/// A client without timers of its own: what it sees of a deadline is the server's doing.
fn plain_client(
    server: &TestServer,
) -> SpatialScoreServiceClient<Client<hyper_util::client::legacy::connect::HttpConnector, tonic::body::Body>>
{
    let client = Client::builder(TokioExecutor::new()).http2_only(true).build_http();
    SpatialScoreServiceClient::with_origin(client, format!("http://{}", server.address).parse().unwrap())
}

fn with_timeout<T>(message: T, timeout: Duration) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(timeout);
    request
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_late_is_dropped_before_a_forward() {
    let _counters = COUNTERS.lock().await;
    let late = "spatialscore_items_dropped_total{reason=\"late\"}";
    let before = metric(late);
    let (server, mut client, first) = busy(&[]).await;
    let timeout = Duration::from_millis(100);

    let status = soon(plain_client(&server).score(with_timeout(request([2, 3]), timeout))).await.unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status}");
    let items = stream::iter([stream_item("x", 4)]).chain(stream::pending());
    let mut answers =
        plain_client(&server).score_stream(with_timeout(items, timeout)).await.unwrap().into_inner();
    let status = soon(answers.next()).await.unwrap().unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status}");

    server.device.release();
    assert_eq!(outcomes(&client.score(request([5])).await.unwrap().into_inner()), [Ok(5.0)]);
    let seen = server.device.seen();
    assert!(seen.contains(&5) && !seen.iter().any(|shade| (2..=4).contains(shade)), "{seen:?}");
    assert_eq!(metric(late) - before, 3.0);
    first.await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_cancelled_is_dropped_before_a_forward() {
    let _counters = COUNTERS.lock().await;
    let dropped = "spatialscore_items_dropped_total{reason=\"cancelled\"}";
    let calls = "spatialscore_requests_total{rpc=\"Score\",code=\"CANCELLED\"}";
    let (dropped_before, calls_before) = (metric(dropped), metric(calls));
    let (server, mut client, first) = busy(&SMALL_QUEUE).await;
    let (taken, _) = fill_queue(&client, [2, 3]).await;
    // Time for its items to get from the pool, where they would be dropped too, into the queue.
    tokio::time::sleep(Duration::from_millis(200)).await;
    taken.abort();
    until(|| metric(calls) > calls_before).await;

    server.device.release();
    first.await.unwrap();
    while client.score(request([5])).await.is_err_and(|status| status.code() == Code::ResourceExhausted) {}
    let seen = server.device.seen();
    assert!(seen.contains(&5) && !seen.contains(&2) && !seen.contains(&3), "{seen:?}");
    assert_eq!(metric(dropped) - dropped_before, 2.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_score_is_never_invented() {
    let server = TestServer::start(&[]).await;
    let response =
        server.client().await.score(request([1, NAN, 2, POISON, 3, PANIC, 4])).await.unwrap().into_inner();
    let outcomes = outcomes(&response);
    for (index, mean) in [(0, 1.0), (2, 2.0), (4, 3.0), (6, 4.0)] {
        assert_eq!(outcomes[index], Ok(mean));
    }
    for (index, text) in [(1, "not finite"), (3, "a failure on purpose"), (5, "a panic on purpose")] {
        let (code, message) = outcomes[index].as_ref().unwrap_err();
        assert_eq!(*code, Code::Internal);
        assert!(message.contains(text), "{message}");
    }
    // And the worker goes on.
    assert!(server.client().await.score(request([5])).await.is_ok());
}

async fn health(server: &TestServer, service: &str) -> ServingStatus {
    let mut client = HealthClient::new(server.channel().await);
    let request = HealthCheckRequest { service: service.into() };
    client.check(request).await.unwrap().into_inner().status()
}

#[tokio::test(flavor = "multi_thread")]
async fn health_follows_the_life_of_the_server() {
    let server = TestServer::loading(&[]).await;
    let mut watcher = HealthClient::new(server.channel().await);
    let watch = HealthCheckRequest { service: SERVICE.into() };
    let mut watched = watcher.watch(watch).await.unwrap().into_inner();
    assert_eq!(soon(watched.next()).await.unwrap().unwrap().status(), ServingStatus::NotServing);
    assert_eq!(health(&server, "").await, ServingStatus::NotServing);
    let status = server.client().await.score(request([1])).await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::Unavailable, "the model is loading"));

    server.device.release();
    assert_eq!(soon(watched.next()).await.unwrap().unwrap().status(), ServingStatus::Serving);
    assert_eq!(health(&server, "").await, ServingStatus::Serving);
    let mut client = server.client().await;
    assert!(client.score(request([1])).await.is_ok());

    server.device.hold();
    let mut accepted = client.clone();
    let accepted = tokio::spawn(async move { accepted.score(request([2])).await });
    server.device.reached(2).await;
    let (address, device) = (server.address, Arc::clone(&server.device));
    let ending = server.shut_down();
    assert_eq!(soon(watched.next()).await.unwrap().unwrap().status(), ServingStatus::NotServing);
    // A new connection too: the port listens until the last answer is given.
    let mut fresh = SpatialScoreServiceClient::connect(format!("http://{address}")).await.unwrap();
    for client in [&mut client, &mut fresh] {
        until_unavailable(client).await;
    }
    assert!(!accepted.is_finished());
    device.release();
    assert_eq!(outcomes(&soon(accepted).await.unwrap().unwrap().into_inner()), [Ok(2.0)]);
    // The watcher's connection is still open, and does not hold up the end.
    ending.end().await;
}

/// Health is told a moment before the handlers turn away.
async fn until_unavailable(client: &mut SpatialScoreServiceClient<tonic::transport::Channel>) {
    let status = loop {
        if let Err(status) = soon(client.get_model(proto::GetModelRequest::default())).await {
            break status;
        }
    };
    assert_eq!((status.code(), status.message()), (Code::Unavailable, "the server is shutting down"));
    assert_eq!(client.score(request([9])).await.unwrap_err().code(), Code::Unavailable);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_answers_what_a_stream_has_sent() {
    let server = TestServer::start(&[]).await;
    server.device.hold();
    let (items, outgoing) = mpsc::channel(8);
    for shade in 1..=5 {
        items.send(stream_item("x", shade)).await.unwrap();
    }
    let mut answers =
        server.client().await.score_stream(ReceiverStream::new(outgoing)).await.unwrap().into_inner();
    let first = server.device.occupied().await;
    let device = Arc::clone(&server.device);
    // The stream stays open on the caller's side: the server ends it.
    let ending = server.shut_down();
    device.release();
    let mut means = Vec::new();
    let end = loop {
        match soon(answers.next()).await.unwrap() {
            Ok(answer) => means.push(outcome(&answer.result.unwrap()).unwrap()),
            Err(status) => break status,
        }
    };
    assert_eq!(end.code(), Code::Unavailable, "{end}");
    // What was not read before the drain began is the caller's to send elsewhere.
    assert!(first.iter().all(|&shade| means.contains(&f32::from(shade))), "{first:?} of {means:?}");
    assert_eq!(device.seen().iter().filter(|shade| (1..=5).contains(*shade)).count(), means.len());
    ending.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_that_takes_too_long_answers_unavailable() {
    let server = TestServer::start(&[("server.drain_timeout_seconds", "0")]).await;
    server.device.hold();
    let client = server.client().await;
    let call = |shade| {
        let mut client = client.clone();
        tokio::spawn(async move { client.score(request([shade])).await })
    };
    let on_device = call(1);
    server.device.reached(1).await;
    let waiting = call(2);
    let device = Arc::clone(&server.device);
    let ending = server.shut_down();
    let status = soon(on_device).await.unwrap().unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    assert!(status.message().contains("stopped before the item could be scored"), "{status}");
    assert_eq!(soon(waiting).await.unwrap().unwrap_err().code(), Code::Unavailable);
    device.release();
    ending.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_cannot_be_loaded_ends_the_server() {
    let error = TestServer::failing().await.ended().await.unwrap_err();
    assert!(error.to_string().contains("no model on purpose"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_over_the_limit_is_refused_with_the_limit() {
    let server = TestServer::start(&[("limits.max_message_bytes", "100000")]).await;
    let plain = server.client().await;
    let zipped = server.client().await.send_compressed(CompressionEncoding::Gzip);
    for mut client in [plain, zipped] {
        let status = client.score(request([1; 20])).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
        assert!(status.message().contains("100000 bytes"), "{status}");
        let mut item = stream_item("x", 1);
        item.item.as_mut().unwrap().prompt = Some("x".repeat(200_000));
        let answers = client.score_stream(stream::iter([item])).await;
        let status = soon(answers.unwrap().into_inner().next()).await.unwrap().unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
        assert!(status.message().contains("100000 bytes"), "{status}");
        // Compressed messages that are small enough once they are unpacked pass.
        assert_eq!(outcomes(&client.score(request([7])).await.unwrap().into_inner()), [Ok(7.0)]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn get_model_says_what_is_served_and_its_limits() {
    let server = TestServer::start(&[("limits.max_items_per_request", "17")]).await;
    let model =
        server.client().await.get_model(proto::GetModelRequest::default()).await.unwrap().into_inner();
    assert_eq!(
        (&*model.name, &*model.architecture, &*model.revision, &*model.dtype, &*model.notice),
        ("fake", "qwen2_5_vl", "none", "float32", "A fake.")
    );
    assert_eq!(model.devices, ["fake:0"]);
    assert_eq!(model.output(), proto::RewardOutput::Gaussian);
    assert_eq!(model.server_version, env!("CARGO_PKG_VERSION"));
    let limits = model.limits.unwrap();
    assert_eq!((limits.max_items_per_request, limits.max_message_bytes), (17, 64 << 20));
    assert_eq!((limits.max_prompt_bytes, limits.max_image_pixels), (8192, 50_000_000));
    assert_eq!(limits.max_item_tokens, 16384);
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_and_items_are_counted() {
    let _counters = COUNTERS.lock().await;
    let server = TestServer::start(&[]).await;
    let lines = [
        "spatialscore_requests_total{rpc=\"unknown\",code=\"UNIMPLEMENTED\"}",
        "spatialscore_requests_total{rpc=\"ScoreStream\",code=\"OK\"}",
    ];
    let before = lines.map(metric);
    let mut client = server.client().await;
    let answers = client.score_stream(stream::iter([stream_item("x", 1)])).await.unwrap().into_inner();
    assert_eq!(answers.count().await, 1);
    let mut grpc = tonic::client::Grpc::new(server.channel().await);
    grpc.ready().await.unwrap();
    let path = "/made.up/Method".parse().unwrap();
    let codec = tonic_prost::ProstCodec::<proto::GetModelRequest, proto::GetModelResponse>::default();
    let status = grpc.unary(Request::new(proto::GetModelRequest::default()), path, codec).await.unwrap_err();
    assert_eq!(status.code(), Code::Unimplemented);
    // The last byte of an answer can reach the caller a moment before the server has counted it.
    until(|| lines.iter().zip(&before).all(|(line, before)| metric(line) > *before)).await;
}
