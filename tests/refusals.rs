//! Refusals by the thousand on one connection, beside calls that must not notice.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use common::raw::{Raw, framed};
use common::*;
use futures::future::join_all;
use futures::{StreamExt, stream};
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use prost::Message;
use spatialscore::edge::proto;
use spatialscore::edge::proto::spatial_score_service_client::SpatialScoreServiceClient;
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

const GOOD: &str = "good-0123456789abcdef";
const GREEDY: &str = "greedy-0123456789abcdef";
/// Refusals of each sort.
const MANY: usize = 10_000;

type Client = SpatialScoreServiceClient<Channel>;

fn bearer<T>(token: &str, message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
    request
}

/// A server with two callers and little room, and the folder of its tokens.
async fn server(more: &[(&str, &str)]) -> (TestServer, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("tokens");
    std::fs::write(&file, format!("good:{GOOD}\ngreedy:{GREEDY}\n")).unwrap();
    let flags = [
        ("auth.tokens_file", file.to_str().unwrap()),
        ("queue.max_items", "8"),
        ("batch.max_items", "8"),
        ("limits.max_items_per_request", "8"),
        ("limits.max_calls_per_caller", "16"),
        ("limits.max_message_bytes", "131072"),
        ("limits.max_bytes_in_flight", "262144"),
        ("limits.max_refusals_per_second", "1000000"),
        ("server.drain_timeout_seconds", "60"),
    ];
    let server = TestServer::loading(&[&flags[..], more].concat()).await;
    server.device.release();
    let mut client = server.client().await;
    soon(async { while client.get_model(bearer(GOOD, proto::GetModelRequest::default())).await.is_err() {} })
        .await;
    (server, folder)
}

/// A request of so many bytes, about.
fn large(bytes: u32) -> proto::ScoreRequest {
    let image = image_of(100, bytes / 300, 9);
    proto::ScoreRequest { prompt: Some(PROMPT.into()), items: vec![item(image)], ..Default::default() }
}

/// Sends calls, so many at once, and counts those that are refused in this way. Whatever else they get is a score, or a
/// refusal of the same code.
async fn refused(
    client: &Client,
    at_once: usize,
    token: &str,
    message: &proto::ScoreRequest,
    (code, words): (Code, &str),
) -> usize {
    let (left, refused) = (AtomicUsize::new(MANY), AtomicUsize::new(0));
    let caller = || async {
        let mut client = client.clone();
        while left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_ok() {
            match client.score(bearer(token, message.clone())).await {
                Ok(response) => assert!(outcomes(&response.into_inner()).iter().all(Result::is_ok)),
                Err(status) => {
                    // Now and then something else is full before.
                    assert_eq!(status.code(), code, "{status}");
                    refused.fetch_add(usize::from(status.message().contains(words)), Ordering::SeqCst);
                }
            }
        }
    };
    join_all((0..at_once).map(|_| caller())).await;
    refused.into_inner()
}

/// Calls of another caller on the same connection: one after the other, and a stream that stays open.
struct Neighbours {
    stop: tokio::sync::watch::Sender<bool>,
    calls: JoinHandle<Result<usize, Status>>,
    stream: JoinHandle<Result<usize, Status>>,
}

impl Neighbours {
    async fn on(client: &Client) -> Self {
        let (stop, stopped) = tokio::sync::watch::channel(false);
        let mut caller = client.clone();
        let told = stopped.clone();
        let calls = tokio::spawn(async move {
            let mut count = 0;
            while !*told.borrow() {
                let response = caller.score(bearer(GOOD, request([7]))).await?.into_inner();
                assert_eq!(outcomes(&response), [Ok(7.0)]);
                count += 1;
            }
            Ok(count)
        });
        let (items, outgoing) = tokio::sync::mpsc::channel(1);
        let outgoing = bearer(GOOD, ReceiverStream::new(outgoing));
        let mut answers = client.clone().score_stream(outgoing).await.unwrap().into_inner();
        let stream = tokio::spawn(async move {
            let mut count = 0;
            while !*stopped.borrow() {
                items.send(stream_item("x", 8)).await.unwrap();
                let answer = answers.next().await.expect("the stream is open")?;
                assert_eq!(outcome(&answer.result.unwrap()), Ok(8.0));
                count += 1;
            }
            Ok(count)
        });
        Self { stop, calls, stream }
    }

    /// None of them failed, and there were some.
    async fn were_well(self) {
        let _ = self.stop.send(true);
        let (calls, stream) =
            (soon(self.calls).await.unwrap().unwrap(), soon(self.stream).await.unwrap().unwrap());
        assert!(calls > 0 && stream > 0, "{calls} calls and {stream} items of a stream");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn refusals_of_every_sort_harm_no_other_call_of_their_connection() {
    let (server, _tokens) = server(&[]).await;
    let client = server.client().await;
    server.device.pace(Duration::from_millis(2));
    let neighbours = Neighbours::on(&client).await;
    let sorts = [
        // At once, with whose token, a message of so many bytes, and what it is refused for.
        (64, "unknown-0123456789abcdef", 100_000, (Code::Unauthenticated, "not known here")),
        (16, GREEDY, 200_000, (Code::InvalidArgument, "message")),
        (12, GREEDY, 100_000, (Code::ResourceExhausted, "messages under way")),
        (64, GREEDY, 100_000, (Code::ResourceExhausted, "calls open")),
        (16, GREEDY, 3_000, (Code::ResourceExhausted, "queue")),
    ];
    for (at_once, token, bytes, refusal) in sorts {
        // Whoever has too many calls also has too many bytes.
        let words = if at_once == 64 && token == GREEDY { "" } else { refusal.1 };
        let count = refused(&client, at_once, token, &large(bytes), (refusal.0, words)).await;
        assert!(count > MANY / 2, "{refusal:?}: {count} of {MANY}");
    }
    neighbours.were_well().await;
}

/// A message that never ends, or ends late, or is given up half way.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_left_of_refused_messages_harms_no_other_call_of_their_connection() {
    let (server, _tokens) = server(&[]).await;
    let raw = Raw::connect(server.address).await;
    let authorization = format!("Bearer {GOOD}");
    let good = framed(&request([7]).encode_to_vec());
    let piece = Bytes::from(vec![0; 16_000]);
    for round in 0..20 {
        let calls = (0..200).map(|n| {
            let pieces = stream::iter(vec![piece.clone(); 5]).then(move |piece| async move {
                tokio::time::sleep(Duration::from_millis(n % 7)).await;
                piece
            });
            let endless = (n % 10 == 0).then(stream::pending::<Bytes>);
            let body = pieces.chain(stream::iter(endless).flatten());
            let call = raw.pieces("Score", &[], body);
            async move {
                match n % 3 {
                    0 => drop(tokio::time::timeout(Duration::from_millis(n % 20), call).await),
                    _ => assert_eq!(call.await.unwrap().status.code(), Code::Unauthenticated),
                }
            }
        });
        join_all(calls).await;
        let body = stream::iter([Bytes::from(good.clone())]);
        let headers = [("authorization", authorization.as_str())];
        let call = soon(raw.pieces("Score", &headers, body)).await;
        assert_eq!(call.unwrap().status.code(), Code::Ok, "round {round}");
        assert!(!raw.connection.is_finished(), "round {round}");
    }
}

/// A client that gives all its calls up at once.
#[tokio::test(flavor = "multi_thread")]
async fn calls_that_are_cancelled_by_the_thousand_harm_no_other_call_of_their_connection() {
    let (server, _tokens) = server(&[]).await;
    let client = server.client().await;
    let neighbours = Neighbours::on(&client).await;
    // The client's own library ends a connection after a thousand answers to calls that it has given up.
    for _ in 0..2 {
        let calls = (0..400).map(|n| {
            let mut client = client.clone();
            async move {
                let call = client.score(bearer(GREEDY, large(3_000 + 100 * n)));
                let _ = tokio::time::timeout(Duration::from_millis(2), call).await;
            }
        });
        join_all(calls).await;
    }
    neighbours.were_well().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_drains_refuses_by_the_thousand_and_answers_what_it_had_accepted() {
    let (server, _tokens) = server(&[]).await;
    let client = server.client().await;
    server.device.hold();
    let mut caller = client.clone();
    let accepted = tokio::spawn(async move { caller.score(bearer(GOOD, request([7]))).await });
    server.device.reached(7).await;
    let device = std::sync::Arc::clone(&server.device);
    let ending = server.shut_down();
    let model = || async { client.clone().get_model(bearer(GOOD, proto::GetModelRequest::default())).await };
    soon(async { while model().await.is_ok() {} }).await;
    let refusal = (Code::Unavailable, "shutting down");
    assert_eq!(refused(&client, 8, GREEDY, &large(9_000), refusal).await, MANY);
    device.release();
    assert_eq!(outcomes(&soon(accepted).await.unwrap().unwrap().into_inner()), [Ok(7.0)]);
    ending.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_of_http_1_survives_its_refusals() {
    let (server, _tokens) = server(&[]).await;
    let stream = TcpStream::connect(server.http).await.unwrap();
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
    let connection = tokio::spawn(connection);
    let mut post = async |token: &str, bytes: usize| {
        let body = format!("{{\"x\": \"{}\"}}", "x".repeat(bytes));
        let request = http::Request::post("/score").header("authorization", format!("Bearer {token}"));
        let request = request.header("host", "here").header("content-type", "application/json");
        sender.ready().await.unwrap();
        let response = sender.send_request(request.body(Full::<Bytes>::from(body)).unwrap()).await.unwrap();
        let status = response.status().as_u16();
        (status, response.into_body().collect().await.unwrap().to_bytes())
    };
    for round in 0..MANY / 3 {
        let refused = [
            post("unknown-0123456789abcdef", 100_000).await.0,
            post(GREEDY, 200_000).await.0,
            post(GREEDY, 100).await.0,
        ];
        assert_eq!(refused, [401, 413, 400], "round {round}");
    }
    assert!(!connection.is_finished());
}

#[tokio::test(flavor = "multi_thread")]
async fn refusals_that_come_too_fast_are_held_back_and_no_other_call_is() {
    let (server, _tokens) = server(&[("limits.max_refusals_per_second", "50")]).await;
    let client = server.client().await;
    let neighbours = Neighbours::on(&client).await;
    let start = Instant::now();
    let calls = (0..150).map(|_| {
        let mut client = client.clone();
        async move { client.score(bearer("unknown-0123456789abcdef", request([9]))).await.unwrap_err() }
    });
    let refusals = join_all(calls).await;
    assert!(refusals.iter().all(|status| status.code() == Code::Unauthenticated));
    // 50 at once, and 100 in the two seconds behind them.
    let took = start.elapsed();
    assert!(took >= Duration::from_millis(1900), "{took:?}");
    let mut good = client.clone();
    let start = Instant::now();
    good.score(bearer(GOOD, request([7]))).await.unwrap();
    assert!(start.elapsed() < took, "{:?}", start.elapsed());
    neighbours.were_well().await;
}
