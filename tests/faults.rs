//! What a server does when a part of it breaks, each through a real socket.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use common::raw::{Raw, framed};
use common::*;
use futures::{StreamExt, stream};
use prost::Message;
use spatialscore::edge::proto;
use spatialscore::edge::proto::health;
use spatialscore::edge::proto::spatial_score_service_client::SpatialScoreServiceClient;
use spatialscore::engine::{LoadError, ModelControl, Onlookers};
use spatialscore::error::ScoreError;
use spatialscore::processor::{Item, Picture};
use spatialscore::request_context::Claim;
use spatialscore::server::ServerError;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::runtime::Builder;
use tokio::sync::Mutex;
use tonic::transport::Channel;
use tonic::{Code, Request, Streaming};
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};

const RESTARTS: &str = "spatialscore_worker_restarts_total{device=\"fake:0\"}";
/// For tests that read how a counter of the process grows.
static COUNTERS: Mutex<()> = Mutex::const_new(());

async fn watch_health(server: &TestServer) -> Streaming<HealthCheckResponse> {
    let watch = HealthCheckRequest { service: String::new() };
    let mut watched = HealthClient::new(server.channel().await).watch(watch).await.unwrap().into_inner();
    // The first word is how things are.
    soon(watched.next()).await.unwrap().unwrap();
    watched
}

async fn until_health(watched: &mut Streaming<HealthCheckResponse>, wanted: ServingStatus) {
    while soon(watched.next()).await.unwrap().unwrap().status() != wanted {}
}

async fn score(
    server: &TestServer,
    shades: impl IntoIterator<Item = u8>,
) -> Vec<Result<f32, (Code, String)>> {
    let mut client = server.client().await;
    let response = soon(client.score(request(shades))).await.unwrap();
    outcomes(&response.into_inner())
}

/// Computes some pictures of which one fails: the others have their scores, and it has its error.
async fn only_the_guilty_fails(server: &TestServer, guilty: u8, text: &str) {
    server.device.hold();
    let client = server.client().await;
    // On the device while the batch comes together.
    let first = tokio::spawn(async move { client.clone().score(request([1])).await });
    server.device.reached(1).await;
    let batch = score(server, [2, 3, guilty, 4, 5]);
    let released = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        server.device.release();
    };
    let (outcomes, ()) = tokio::join!(batch, released);
    for (index, mean) in [(0, 2.0), (1, 3.0), (3, 4.0), (4, 5.0)] {
        assert_eq!(outcomes[index], Ok(mean), "{outcomes:?}");
    }
    let (code, message) = outcomes[2].as_ref().unwrap_err();
    assert_eq!(*code, Code::Internal);
    assert!(message.contains(text), "{message}");
    assert!(first.await.unwrap().is_ok());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_that_does_not_fit_memory_is_halved() {
    let server = TestServer::start(&[]).await;
    server.device.memory(2);
    server.device.hold();
    let client = server.client().await;
    let first = tokio::spawn(async move { client.clone().score(request([1])).await });
    server.device.reached(1).await;
    let batch = score(&server, [2, 3, 4, 5, 6, 7, 8]);
    let released = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        server.device.release();
    };
    let (outcomes, ()) = tokio::join!(batch, released);
    assert_eq!(outcomes, (2..=8).map(|shade| Ok(shade as f32)).collect::<Vec<_>>());
    let largest = server.device.forwards().iter().map(Vec::len).max().unwrap();
    assert!(largest > 2, "nothing was too large");
    assert!(first.await.unwrap().is_ok());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failing_forward_fails_only_its_cause() {
    let server = TestServer::start(&[]).await;
    for (guilty, text) in [
        (POISON, "a failure on purpose"),
        (PANIC, "a panic on purpose"),
        (NAN, "not finite"),
        (INFINITE, "not finite"),
        (NAN_STDDEV, "not finite"),
        (INFINITE_STDDEV, "not finite"),
    ] {
        only_the_guilty_fails(&server, guilty, text).await;
    }
    assert_eq!(server.device.made(), 1, "the worker was lost over it");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_worker_is_made_anew_and_nothing_is_lost_with_it() {
    let _counters = COUNTERS.lock().await;
    for guilty in [LOST, DEATH] {
        let server = TestServer::start(&[]).await;
        let before = metric(RESTARTS);
        let mut health = watch_health(&server).await;
        only_the_guilty_fails(&server, guilty, "workers were lost over this item").await;
        until_health(&mut health, ServingStatus::NotServing).await;
        until_health(&mut health, ServingStatus::Serving).await;
        // Once with its neighbours and once alone.
        assert_eq!(server.device.made(), 3);
        // Other tests lose workers too.
        assert!(metric(RESTARTS) - before >= 2.0);
        assert_eq!(score(&server, [6]).await, [Ok(6.0)]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_queue_holds_while_no_worker_is_up() {
    let _counters = COUNTERS.lock().await;
    let server = TestServer::start(&[]).await;
    let mut health = watch_health(&server).await;
    server.device.refuse(true);
    let mut client = server.client().await;
    let guilty = tokio::spawn(async move { client.score(request([LOST])).await });
    until_health(&mut health, ServingStatus::NotServing).await;
    let waits = score(&server, [2, 3]);
    tokio::pin!(waits);
    let early = tokio::time::timeout(Duration::from_millis(400), &mut waits).await;
    assert!(early.is_err(), "{early:?} without a worker");
    assert_eq!(metric("spatialscore_workers"), 0.0);
    server.device.refuse(false);
    assert_eq!(soon(waits).await, [Ok(2.0), Ok(3.0)]);
    until_health(&mut health, ServingStatus::Serving).await;
    let outcome = outcomes(&soon(guilty).await.unwrap().unwrap().into_inner());
    assert_eq!(outcome[0].as_ref().unwrap_err().0, Code::Internal);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_whose_device_stays_away_says_so_and_ends() {
    let server = TestServer::start(&[("server.recovery_timeout_seconds", "1")]).await;
    server.device.refuse(true);
    let mut client = server.client().await;
    let call = tokio::spawn(async move { client.score(request([LOST])).await });
    let status = soon(call).await.unwrap().unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    let error = server.ended().await.unwrap_err();
    assert!(matches!(error, ServerError::Load(LoadError::Lost(_))), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_whose_numbers_drift_is_taken_out_of_service() {
    let server = TestServer::of_models(&["steady", "drifts"], &[("selftest.interval_seconds", "1")]).await;
    let mut health = watch_health(&server).await;
    let tests = |model: &str, outcome: &str| {
        let labels = format!("{{model=\"{model}\",device=\"fake:0\",outcome=\"{outcome}\"}}");
        metric(&format!("spatialscore_self_tests_total{labels}"))
    };
    until(|| tests("steady", "passed") >= 1.0 && tests("drifts", "passed") >= 1.0).await;
    // A forward that fails says nothing of the scores.
    server.devices[1].memory(0);
    until(|| tests("drifts", "error") >= 1.0).await;
    server.devices[1].memory(usize::MAX);
    let mut client = server.client().await;
    let ask = |model: &str| proto::ScoreRequest { models: vec![model.into()], ..request([3]) };
    soon(client.score(ask("drifts"))).await.unwrap();

    server.devices[1].drift(0.001);
    until_health(&mut health, ServingStatus::NotServing).await;
    let status = soon(client.score(ask("drifts"))).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    let why = "the model is not what it was: an item of the self-test has the score mean 128.001, standard deviation 0.5 \
               on fake:0, and had mean 128, standard deviation 0.5";
    assert_eq!(status.message(), format!("the model \"drifts\" is out of service: {why}"));
    let named = proto::GetModelRequest { name: "drifts".into() };
    let model = client.get_model(named).await.unwrap().into_inner();
    assert_eq!(model.state(), proto::ModelState::Failed);
    assert_eq!(model.notice, format!("OUT OF SERVICE: {why}. A fake."));
    let models = client.list_models(proto::ListModelsRequest {}).await.unwrap().into_inner().models;
    assert_eq!(models[0].state(), proto::ModelState::Serving);
    assert_eq!(models[1], model);
    let page = tokio::task::spawn_blocking(move || process::get(&server.http.to_string(), "/health"));
    let page = page.await.unwrap();
    assert!(page.starts_with("HTTP/1.1 503") && page.contains("\\\"drifts\\\" is out of service"), "{page}");
    // The other one's numbers are its own.
    let answer = soon(client.score(ask("steady"))).await.unwrap().into_inner();
    assert_eq!(outcomes(&answer), [Ok(3.0)]);
    assert_eq!((tests("drifts", "failed"), tests("steady", "failed")), (1.0, 0.0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_cannot_be_made_anew_keeps_no_other_from_serving() {
    let server = TestServer::of_models(&["sound", "broken"], &[]).await;
    let mut client = server.client().await;
    let ask = |model: &str, shade| proto::ScoreRequest { models: vec![model.into()], ..request([shade]) };
    soon(client.score(ask("broken", 3))).await.unwrap();

    // The worker of both is lost.
    server.devices[1].refuse(true);
    let guilty = soon(client.score(ask("sound", LOST))).await.unwrap().into_inner();
    assert_eq!(outcomes(&guilty)[0].as_ref().unwrap_err().0, Code::Internal);
    assert_eq!(outcomes(&soon(client.score(ask("sound", 4))).await.unwrap().into_inner()), [Ok(4.0)]);
    // Before that it is told that it was taken out of service while it waited, and now and then that it is being woken.
    let refused = async |mut client: SpatialScoreServiceClient<Channel>, why: &str| {
        let is_why =
            |status: &tonic::Status| status.code() == Code::Unavailable && status.message().contains(why);
        soon(async { while !client.score(ask("broken", 5)).await.is_err_and(|status| is_why(&status)) {} })
            .await;
    };
    refused(client.clone(), "\"broken\" is out of service: it could not be made anew on fake:0").await;
    // What comes of it once it can be made again, and then is not what it was.
    server.devices[1].refuse(false);
    soon(async { while client.score(ask("broken", 6)).await.is_err() {} }).await;
    server.devices[1].drift(0.5);
    let made = server.devices[1].made();
    soon(client.score(ask("sound", LOST))).await.unwrap();
    until(|| server.devices[1].made() > made).await;
    refused(client.clone(), "\"broken\" is out of service: the model is not what it was").await;
    assert_eq!(outcomes(&soon(client.score(ask("sound", 7))).await.unwrap().into_inner()), [Ok(7.0)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_model_scored_before_it_failed_is_forgotten_and_it_wakes_only_as_it_was() {
    let ((engine, _lifeline, manager), devices) = engine(&["other", "wrong"], &[], Onlookers::default());
    let named = ["wrong".to_owned()];
    let rgb8 = Bytes::from(vec![7; (SIDE * SIDE * 3) as usize]);
    let score = async || {
        let models = engine.models().named(&named)?;
        let (claim, picture) =
            (Claim::default(), Picture::Raw { width: SIDE, height: SIDE, rgb8: rgb8.clone() });
        let item = engine.admit(&models, Item::new(PROMPT, picture), &claim).await?;
        let permits = engine.queue().reserve(&claim, &item.costs().collect::<Vec<_>>())?;
        engine.score(item, permits, &claim).await.pop().unwrap().map(|answer| answer.scored.score.mean)
    };
    let test_again = async || {
        let manager = Arc::clone(&manager);
        soon(tokio::task::spawn_blocking(move || manager.test_again())).await.unwrap();
    };
    test_again().await;
    devices[1].drift(f32::NAN);
    test_again().await;
    assert!(matches!(score().await, Err(ScoreError::NotServing { .. })), "no number is no score");
    devices[1].drift(0.0);
    manager.wake("wrong").unwrap();
    assert_eq!(score().await, Ok(7.0));

    devices[1].drift(0.25);
    let made = devices[1].made();
    test_again().await;
    test_again().await;
    assert!(matches!(score().await, Err(ScoreError::NotServing { .. })));
    assert!(manager.wake("wrong").is_err(), "it is still off");
    devices[1].drift(0.0);
    manager.wake("wrong").unwrap();
    assert_eq!(devices[1].made(), made + 2);
    let seen = devices[1].seen().len();
    assert_eq!(score().await, Ok(7.0));
    assert_eq!(devices[1].seen().len(), seen + 1, "it was not computed again");
    assert_eq!(devices[0].made(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_comes_to_the_queue_after_its_model_went_is_refused_though_waking_it_was_tried() {
    let ((engine, _lifeline, manager), devices) = engine(&["other", "gone"], &[], Onlookers::default());
    let rgb8 = Bytes::from(vec![7; (SIDE * SIDE * 3) as usize]);
    // A call whose picture is still being prepared when its model is taken out of service.
    let models = engine.models().named(&["gone".to_owned()]).unwrap();
    let claim = Claim::default();
    let picture = Picture::Raw { width: SIDE, height: SIDE, rgb8 };
    let item = engine.admit(&models, Item::new(PROMPT, picture), &claim).await.unwrap();
    let permits = engine.queue().reserve(&claim, &item.costs().collect::<Vec<_>>()).unwrap();
    devices[1].drift(0.25);
    let tester = Arc::clone(&manager);
    soon(tokio::task::spawn_blocking(move || tester.test_again())).await.unwrap();
    assert!(manager.wake("gone").is_err(), "it is not what it was");
    let told = soon(engine.score(item, permits, &claim)).await.pop().unwrap();
    assert!(told.is_err(), "{told:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_within_the_bound_serves_on() {
    let ((engine, _lifeline, manager), devices) =
        engine(&["bound"], &[("selftest.tolerance", "0.5")], Onlookers::default());
    let test_again = async || {
        let manager = Arc::clone(&manager);
        soon(tokio::task::spawn_blocking(move || manager.test_again())).await.unwrap();
    };
    for (drift, serves) in [(0.5, true), (-0.5, true), (0.75, false)] {
        devices[0].drift(drift);
        test_again().await;
        assert_eq!(engine.models().fault().is_none(), serves, "{drift}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_device_carries_on_without_the_other() {
    let server = Arc::new(TestServer::start_on(2, &[("batch.max_items", "1")]).await);
    let mut health = watch_health(&server).await;
    server.devices.iter().for_each(|device| {
        device.refuse(true);
        device.hold();
    });
    let held = tokio::spawn({
        let server = Arc::clone(&server);
        async move { score(&server, [1, 2]).await }
    });
    // Each has one of the two; then the first is lost over a third.
    until(|| server.devices.iter().all(|device| device.seen().len() > 1)).await;
    let mut client = server.client().await;
    let guilty = tokio::spawn(async move { client.score(request([LOST])).await });
    server.devices[0].release();
    until(|| server.devices[0].seen().contains(&LOST)).await;
    server.devices[1].refuse(false);
    server.devices[1].release();
    assert_eq!(soon(held).await.unwrap(), [Ok(1.0), Ok(2.0)]);
    // It takes the second with it, and that one comes back.
    let outcome = outcomes(&soon(guilty).await.unwrap().unwrap().into_inner());
    assert_eq!(outcome[0].as_ref().unwrap_err().0, Code::Internal);
    until_health(&mut health, ServingStatus::Serving).await;
    assert_eq!(score(&server, [3]).await, [Ok(3.0)]);
    assert_eq!(server.devices[0].made(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_forward_costs_its_callers_time_and_nothing_else() {
    let server = TestServer::start(&[]).await;
    server.device.pace(Duration::from_millis(400));
    let mut hasty = Request::new(request([2]));
    hasty.set_timeout(Duration::from_millis(100));
    let status = soon(server.client().await.score(hasty)).await.unwrap_err();
    assert!(matches!(status.code(), Code::DeadlineExceeded | Code::Cancelled), "{status}");
    assert_eq!(score(&server, [3]).await, [Ok(3.0)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn balancers_have_time_to_turn_away() {
    let server = TestServer::start(&[("server.drain_grace_seconds", "1")]).await;
    let mut health = watch_health(&server).await;
    let (mut client, mut late) = (server.client().await, server.client().await);
    let ending = server.shut_down();
    until_health(&mut health, ServingStatus::NotServing).await;
    // Whoever has not heard of it yet is still served.
    assert_eq!(outcomes(&client.score(request([1])).await.unwrap().into_inner()), [Ok(1.0)]);
    let refused = async {
        loop {
            if let Err(status) = late.get_model(proto::GetModelRequest::default()).await {
                break status;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    assert_eq!(soon(refused).await.code(), Code::Unavailable);
    ending.end().await;
}

/// A call that begins while the server answers what it had accepted hears so, whether its message is there or not.
#[tokio::test(flavor = "multi_thread")]
async fn a_call_that_begins_during_the_drain_is_unavailable() {
    let server = TestServer::start(&[]).await;
    let raw = Raw::connect(server.address).await;
    server.device.hold();
    let mut client = server.client().await;
    let accepted = tokio::spawn(async move { client.score(request([5])).await });
    server.device.reached(5).await;
    let device = Arc::clone(&server.device);
    let ending = server.shut_down();
    let model = async || raw.call("GetModel", framed(&[])).await.status.code();
    soon(async { while model().await == Code::Ok {} }).await;
    let message = framed(&stream_item("x", 1).encode_to_vec());
    for sent in [0, 3, 9, message.len()] {
        let sent = Bytes::copy_from_slice(&message[..sent]);
        let ended = soon(raw.pieces("ScoreStream", &[], stream::iter([sent.clone()]))).await.unwrap();
        let open = stream::iter([sent]).chain(stream::pending());
        let open = soon(raw.pieces("ScoreStream", &[], open)).await.unwrap();
        for answer in [ended, open] {
            assert_eq!(answer.status.code(), Code::Unavailable, "{}", answer.status);
        }
    }
    let call = raw.call("Score", framed(&request([1]).encode_to_vec())).await;
    assert_eq!(call.status.code(), Code::Unavailable, "{}", call.status);
    device.release();
    assert!(accepted.await.unwrap().is_ok());
    ending.end().await;
}

/// Who dies in the middle of a message has left. That is nobody's fault, and no error of the log.
#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_dies_while_it_sends_has_cancelled() {
    let _counters = COUNTERS.lock().await;
    let server = TestServer::start(&[]).await;
    let grown = growth();
    let count = |rpc: &str, code: &str| {
        grown(&format!("spatialscore_requests_total{{rpc=\"{rpc}\",code=\"{code}\"}}"))
    };
    let message = framed(&request([9]).encode_to_vec());
    for method in ["Score", "ScoreStream"] {
        for sent in [0, 3, 5, 100, message.len() - 1] {
            let before = count(method, "CANCELLED");
            // As a process of its own it dies with all that it holds.
            let client = Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
            let half = stream::iter([Bytes::copy_from_slice(&message[..sent])]).chain(stream::pending());
            let address = server.address;
            client.spawn(async move { Raw::connect(address).await.pieces(method, &[], half).await });
            tokio::time::sleep(Duration::from_millis(300)).await;
            client.shutdown_background();
            until(|| count(method, "CANCELLED") > before).await;
        }
    }
    for head in ["Content-Length: 50\r\n\r\n{", "Transfer-Encoding: chunked\r\n\r\n5\r\n{"] {
        let before = count("/score", "CANCELLED");
        let mut stream = TcpStream::connect(server.http).await.unwrap();
        stream.write_all(format!("POST /score HTTP/1.1\r\nHost: a\r\n{head}").as_bytes()).await.unwrap();
        tokio::time::sleep(Duration::from_millis(100)).await;
        drop(stream);
        until(|| count("/score", "CANCELLED") > before).await;
    }
    for rpc in ["Score", "ScoreStream", "/score"] {
        for code in ["UNKNOWN", "INTERNAL", "INVALID_ARGUMENT"] {
            assert_eq!(count(rpc, code), 0.0, "{rpc} {code}");
        }
    }
    assert!(!server.device.seen().contains(&9));
}

/// The health protocol: who watches a service that is not there hears so, and of the rest too.
#[tokio::test(flavor = "multi_thread")]
async fn health_is_told_of_every_service_and_of_none_other() {
    let server = TestServer::start(&[]).await;
    let mut health = health::health_client::HealthClient::new(server.channel().await);
    let asked = |service: &str| health::HealthCheckRequest { service: service.into() };
    use health::health_check_response::ServingStatus::{NotServing, ServiceUnknown, Serving};
    for service in ["", "spatialscore.v1.SpatialScoreService"] {
        assert_eq!(health.check(asked(service)).await.unwrap().into_inner().status(), Serving);
    }
    assert_eq!(health.check(asked("nobody")).await.unwrap_err().code(), Code::NotFound);
    let statuses = health.list(health::HealthListRequest {}).await.unwrap().into_inner().statuses;
    assert!(
        statuses.len() == 2 && statuses.values().all(|answer| answer.status() == Serving),
        "{statuses:?}"
    );
    let mut unknown = health.watch(asked("nobody")).await.unwrap().into_inner();
    assert_eq!(soon(unknown.next()).await.unwrap().unwrap().status(), ServiceUnknown);
    let mut known = health.watch(asked("")).await.unwrap().into_inner();
    assert_eq!(soon(known.next()).await.unwrap().unwrap().status(), Serving);
    let silent = tokio::time::timeout(Duration::from_millis(300), unknown.next()).await;
    assert!(silent.is_err(), "{silent:?}");
    let ending = server.shut_down();
    assert_eq!(soon(known.next()).await.unwrap().unwrap().status(), NotServing);
    ending.end().await;
}

/// A server in a process of its own.
struct Process(Child);

impl Process {
    fn start(address: SocketAddr) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_spatialscore"));
        command.args(["serve", "--device=cpu", "--metrics-listen=", "--listen", &address.to_string()]);
        command.args(["--checkpoint", checkpoint().to_str().unwrap()]);
        command.env_remove("RUST_LOG").env_remove("SPATIALSCORE_CONFIG").stderr(Stdio::null());
        Self(command.spawn().unwrap())
    }
}

impl Drop for Process {
    /// SIGKILL.
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// Calls until it has an answer, as a trainer's client does.
async fn insist(client: &mut SpatialScoreServiceClient<Channel>, request: &proto::ScoreRequest) -> Vec<f32> {
    let call = async {
        loop {
            if let Ok(response) = client.score(request.clone()).await {
                break response.into_inner();
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let response = tokio::time::timeout(Duration::from_secs(120), call).await.expect("it takes too long");
    outcomes(&response).into_iter().map(Result::unwrap).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn sigkill_and_restart_lose_nothing_that_a_retry_can_get() {
    let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let channel = Channel::from_shared(format!("http://{address}")).unwrap().connect_lazy();
    let mut client = SpatialScoreServiceClient::new(channel);
    let requests: Vec<_> =
        (0..30).map(|round| request([round, round + 60, round + 120, round + 180])).collect();
    let mut process = Process::start(address);
    let mut scores = Vec::new();
    for (round, request) in requests.iter().enumerate() {
        if round % 15 == 10 {
            // In the middle of a call.
            let (mut other, request) = (client.clone(), request.clone());
            let cut = tokio::spawn(async move { insist(&mut other, &request).await });
            tokio::time::sleep(Duration::from_millis(round as u64 / 10)).await;
            drop(process);
            process = Process::start(address);
            scores.push(cut.await.unwrap());
        } else {
            scores.push(insist(&mut client, request).await);
        }
    }
    // A server that nobody disturbs says the same, and no two calls have the same answer.
    for (round, (request, scores)) in requests.iter().zip(&scores).enumerate() {
        for (a, b) in insist(&mut client, request).await.iter().zip(scores) {
            assert!((a - b).abs() < 1e-4, "round {round}: {a} and {b}");
        }
    }
    scores.sort_by(|a, b| a.partial_cmp(b).unwrap());
    assert!(scores.windows(2).all(|pair| pair[0] != pair[1]), "scores that tell nothing apart");
}

/// What makes faults for these tests stands in these tests.
#[test]
fn the_program_has_no_fault_points() {
    let has = |file: &std::path::Path| {
        let bytes = std::fs::read(file).unwrap();
        bytes.windows(FAULT.len()).any(|window| window == FAULT.as_bytes())
    };
    assert!(has(&std::env::current_exe().unwrap()), "the search finds nothing anywhere");
    assert!(!has(env!("CARGO_BIN_EXE_spatialscore").as_ref()));
}
