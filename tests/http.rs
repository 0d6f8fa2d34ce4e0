//! The HTTP edge as the clients of UniRL and Flow-Factory call it, each promise through a real socket.
//!
//! `clients/python/tests/test_http.py` runs those clients; here is what they would not show.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::cell::Cell;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use common::process::{Server, get};
use common::web::*;
use common::*;
use futures::future::select_all;
use futures::{StreamExt, stream};
use http::Request;
use http_body_util::StreamBody;
use hyper::body::Frame;
use rand::SeedableRng;
use rand::rngs::StdRng;
use serde_json::{Value, json};
use spatialscore::edge::proto;
use spatialscore::edge::proto::spatial_score_service_client::SpatialScoreServiceClient;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::sleep;
use tonic::Code;

const SMALL_QUEUE: [(&str, &str); 3] =
    [("queue.max_items", "2"), ("batch.max_items", "2"), ("limits.max_items_per_request", "2")];

/// A sample as UniRL sends it.
fn sample(file: &[u8]) -> Value {
    json!({
        "history": [{"text": PROMPT, "image_b64": BASE64.encode(file)}],
        "required_rewards": ["spatialscore"],
        "metadata": null,
    })
}

fn unirl(files: &[Vec<u8>]) -> Value {
    json!({"requests": files.iter().map(|file| sample(file)).collect::<Vec<_>>()})
}

fn flow_factory(files: &[Vec<u8>]) -> Value {
    let images: Vec<_> = files.iter().map(|file| BASE64.encode(file)).collect();
    json!({
        "prompt": vec![PROMPT; files.len()], "image": images,
        "video": null, "condition_images": null, "condition_videos": null,
    })
}

fn pngs(shades: impl IntoIterator<Item = u8>) -> Vec<Vec<u8>> {
    shades.into_iter().map(png).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_program_answers_over_http_what_it_answers_over_grpc() {
    let (server, http) = process(&["--set=model.checkpoint=spatialscore-mini"]);
    let files = pngs((0..24).map(|index| index * 10));
    let mut request = request([]);
    request.items.extend(files.iter().map(|file| item(encoded(file.clone()))));
    let mut client = SpatialScoreServiceClient::connect(server.url()).await.unwrap();
    let response = client.score(request).await.unwrap().into_inner();
    let scores: Vec<proto::Score> = response
        .results
        .iter()
        .map(|result| match &result.outcome {
            Some(proto::score_result::Outcome::Score(score)) => score.clone(),
            other => panic!("{other:?}"),
        })
        .collect();
    let means: Vec<f64> = scores.iter().map(|score| score.mean.into()).collect();
    assert!(means.windows(2).any(|pair| pair[0] != pair[1]), "{means:?} show no order");

    // Bit for bit what a client of gRPC reads as a double, and nothing beside it that could be averaged with it. As text,
    // since serde_json may read a double's last bit wrong.
    let list = |row: &dyn Fn(&f64) -> String| means.iter().map(row).collect::<Vec<_>>().join(",");
    let results = list(&|mean| format!(r#"{{"spatialscore":{{"spatialscore":{mean:?}}}}}"#));
    let answer = post(http, "/score", &unirl(&files)).await;
    assert_eq!(answer.text, format!(r#"{{"results":[{results}],"errors":[{}]}}"#, ["{}"; 24].join(",")));
    let answer = post(http, "/compute", &flow_factory(&files)).await;
    assert_eq!(answer.text, format!(r#"{{"rewards":[{}]}}"#, list(&|mean| format!("{mean:?}"))));
    let mut asked = unirl(&files[..1]);
    asked["requests"][0]["required_rewards"] = json!(["spatialscore_stddev", "spatialscore"]);
    let (mean, stddev) = (means[0], f64::from(scores[0].stddev.unwrap()));
    let both = format!(
        r#"{{"spatialscore":{{"spatialscore":{mean:?}}},"spatialscore_stddev":{{"spatialscore_stddev":{stddev:?}}}}}"#
    );
    assert_eq!(post(http, "/score", &asked).await.text, format!(r#"{{"results":[{both}],"errors":[{{}}]}}"#));
    assert_eq!(look(http, "/rewards").await.body["rewards"], json!(["spatialscore", "spatialscore_stddev"]));

    let page = tokio::task::block_in_place(|| get(server.metrics_address(), "/metrics"));
    assert!(page.contains(r#"spatialscore_requests_total{rpc="/score",code="OK"} 2"#), "{page}");
    assert!(page.contains(r#"spatialscore_requests_total{rpc="/compute",code="OK"} 1"#), "{page}");
    assert!(!page.contains("CANCELLED"), "{page}");
    server.signal("TERM");
    assert_eq!(tokio::task::block_in_place(|| server.code()), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_scalar_checkpoint_has_no_sigma_that_could_be_asked_for() {
    let (_server, http) = process(&[]);
    assert_eq!(look(http, "/rewards").await.text, r#"{"rewards":["spatialscore"]}"#);
    let health = r#"{"status":"ok","rewards":{"spatialscore":["spatialscore:ready"]}}"#;
    assert_eq!(look(http, "/health").await.text, health);
    let mut asked = unirl(&pngs([1]));
    asked["requests"][0]["required_rewards"] = json!(["spatialscore_stddev"]);
    let answer = post(http, "/score", &asked).await;
    let error = json!([{"spatialscore_stddev": "this checkpoint gives no standard deviation"}]);
    assert_eq!((&answer.body["results"], &answer.body["errors"]), (&json!([{}]), &error));
}

#[test]
fn nobody_listens_for_http_who_was_not_told_to() {
    let server = Server::start();
    assert_eq!(server.http, None);
    assert!(server.lines.contains("gRPC listens") && !server.lines.contains("HTTP"), "{}", server.lines);
}

#[tokio::test(flavor = "multi_thread")]
async fn order_is_kept() {
    let server = TestServer::start(&[("batch.max_items", "7")]).await;
    let means: Vec<f64> = (0..64).map(f64::from).collect();
    let files = pngs(0..64);
    let scores = post(server.http, "/score", &unirl(&files)).await.scores();
    assert_eq!(scores, means.iter().copied().map(Some).collect::<Vec<_>>());
    assert_eq!(post(server.http, "/compute", &flow_factory(&files)).await.rewards(), means);
    // A rank without samples asks all the same.
    assert_eq!(
        post(server.http, "/compute", &json!({"prompt": [], "image": null})).await.rewards(),
        [0.0; 0]
    );
    assert_eq!(post(server.http, "/score", &unirl(&[])).await.scores(), []);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_item_without_a_score_has_an_error_and_no_number() {
    let server = TestServer::start(&[]).await;
    let mut files = pngs([1, 2, POISON, NAN, 5]);
    files[1] = b"no picture at all".to_vec();
    let answer = post(server.http, "/score", &unirl(&files)).await;
    assert_eq!(answer.scores(), [Some(1.0), None, None, None, Some(5.0)]);
    let (results, errors) = (&answer.body["results"], &answer.body["errors"]);
    assert_eq!((&errors[0], &errors[4]), (&json!({}), &json!({})));
    for (index, text) in [(1, "items[1].image.encoded: "), (2, "a failure on purpose"), (3, "not finite")] {
        assert_eq!(results[index], json!({}));
        assert!(errors[index]["spatialscore"].as_str().unwrap().contains(text), "{answer:?}");
    }
    // Their client tries again whatever is not a 2xx, and raises what stands here.
    files.remove(3);
    let answer = post(server.http, "/compute", &flow_factory(&files)).await;
    assert_eq!(answer.status, 200);
    assert_eq!(answer.body.as_object().unwrap().keys().collect::<Vec<_>>(), ["error"]);
    let error = answer.body["error"].as_str().unwrap();
    assert!(error.starts_with("2 of 4 pictures have no score: items[1].image.encoded: "), "{error}");
    assert!(error.ends_with("a failure on purpose"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_names_samples_has_the_names_back() {
    let server = TestServer::start(&[]).await;
    let mut asked = unirl(&pngs([1, 2]));
    asked["protocol_version"] = json!("1");
    for (index, sample) in asked["requests"].as_array_mut().unwrap().iter_mut().enumerate() {
        sample["request_id"] = json!(format!("request-{index}"));
        sample["sample_id"] = json!(format!("sample-{index}"));
        sample["group_id"] = json!("group");
        sample["source_rank"] = json!(3);
        sample["policy_version"] = json!(7);
        sample["idempotency_key"] = json!(format!("key-{index}"));
        sample["scorer_version"] = Value::Null;
    }
    // The picture that counts is the last turn's; the one before is what was to be edited.
    let turn = json!({"text": "other", "image_b64": BASE64.encode(png(9))});
    asked["requests"][1]["history"].as_array_mut().unwrap().insert(0, turn);
    let answer = post(server.http, "/score", &asked).await;
    assert_eq!(answer.scores(), [Some(1.0), Some(2.0)]);
    assert_eq!(answer.body["protocol_version"], "1");
    for index in 0..2 {
        let mut named = asked["requests"][index].clone();
        for other in ["history", "required_rewards", "metadata"] {
            named.as_object_mut().unwrap().remove(other);
        }
        named["scorer_version"] = json!("none");
        assert_eq!(answer.body["identities"][index], named);
    }

    asked["requests"][1]["scorer_version"] = json!("none");
    assert_eq!(post(server.http, "/score", &asked).await.status, 200);
    asked["requests"][1]["scorer_version"] = json!("another");
    let answer = post(server.http, "/score", &asked).await;
    let words = r#"requests[1].scorer_version: is pinned to "another"; this server has "none""#;
    assert_eq!((answer.status, &answer.body), (400, &json!({"detail": words})));
    assert!(!server.device.seen().contains(&9));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_cannot_be_read_is_refused_with_the_place() {
    let server = TestServer::start(&[("limits.max_items_per_request", "3")]).await;
    let changed = |pointer: &str, value: Value| {
        let mut asked = unirl(&pngs([9, 9]));
        asked["protocol_version"] = json!("1");
        let (object, key) = pointer.rsplit_once('/').unwrap();
        match asked.pointer_mut(object).unwrap() {
            Value::Object(object) => drop(object.insert(key.to_owned(), value)),
            list => list[key.parse::<usize>().unwrap()] = value,
        }
        asked
    };
    for (asked, words) in [
        (json!([]), "body: "),
        (json!({}), "missing field `requests`"),
        (changed("/protocol_version", json!("2")), r#"protocol_version: is "2"; only "1" is spoken here"#),
        (changed("/requests/1/history", json!([])), "requests[1].history: its last turn has no image_b64"),
        (changed("/requests/1/history/0/image_b64", Value::Null), "requests[1].history: its last turn"),
        (
            changed("/requests/1/history/0/image_b64", json!("n\no!")),
            "requests[1].history[0].image_b64: no base64",
        ),
        (
            changed("/requests/1/required_rewards", json!(["clip"])),
            "requests[1].required_rewards[0]: unknown",
        ),
        (
            changed("/requests/1/group_id", json!(["a"])),
            "requests[1].group_id: must be null, a number, or a text",
        ),
        (changed("/requests/1/sample_id", json!("x".repeat(257))), "requests[1].sample_id: must be null"),
        // Two bytes in the body would be thirty-two in memory.
        (changed("/requests/1/history", json!(vec![0; 256])), "body: it has more than 256 values"),
        (unirl(&pngs([9; 4])), "items: has 4 items; send 1 to 3"),
    ] {
        let answer = post(server.http, "/score", &asked).await;
        assert_eq!(answer.status, 400, "{answer:?}");
        assert!(answer.body["detail"].as_str().unwrap().contains(words), "{answer:?}");
        // `requests` shows its user the reason phrase and nothing else.
        assert!(answer.reason.starts_with(&answer.body["detail"].as_str().unwrap()[..20]), "{answer:?}");
    }
    for (asked, words) in [
        (json!({"prompt": ["a"], "image": null}), "image: has 0 pictures for 1 prompts; send one for each"),
        (json!({"prompt": ["a"], "image": ["?"]}), "image[0]: no base64"),
        (flow_factory(&pngs([9; 4])), "items: has 4 items; send 1 to 3"),
    ] {
        let answer = post(server.http, "/compute", &asked).await;
        assert_eq!((answer.status, answer.body.get("rewards")), (200, None));
        assert!(answer.body["error"].as_str().unwrap().contains(words), "{answer:?}");
    }
    for (path, answer) in [
        ("/x", look(server.http, "/x").await),
        ("/page/x", look(server.http, "/page/x").await),
        ("/scores", post(server.http, "/scores", &json!({})).await),
        ("/evaluation", look(server.http, "/evaluation").await),
        ("/evaluations/health", look(server.http, "/evaluations/health").await),
    ] {
        assert_eq!(answer.status, 404, "{path}: {answer:?}");
    }
    for (answer, methods) in [
        (look(server.http, "/score").await, "POST"),
        (look(server.http, "/evaluation/compute").await, "POST"),
        (post(server.http, "/health", &json!({})).await, "GET, HEAD"),
        (post(server.http, "/rewards", &json!({})).await, "GET, HEAD"),
    ] {
        assert_eq!((answer.status, answer.headers["allow"].to_str().unwrap()), (405, methods), "{answer:?}");
    }
    assert!(!server.device.seen().contains(&9));
}

#[tokio::test(flavor = "multi_thread")]
async fn rubbish_is_refused_and_good_neighbours_have_their_scores() {
    let server = TestServer::start(&[("cache.max_items", "0")]).await;
    let mut random = StdRng::seed_from_u64(20_261_124);
    let (scored, computed) = (unirl(&pngs([7])), flow_factory(&pngs([7])));
    let mut in_requests = ["/history", "/history/0", "/history/0/text", "/history/0/image_b64"].to_vec();
    in_requests.extend(["", "/required_rewards", "/required_rewards/0"]);
    let in_requests: Vec<String> = in_requests.iter().map(|field| format!("/requests/0{field}")).collect();
    let mut fields = vec!["", "/requests"];
    fields.extend(in_requests.iter().map(String::as_str));
    let of_score = spoilt(&scored, &fields, &mut random);
    let of_compute = spoilt(&computed, &["", "/prompt", "/prompt/0", "/image", "/image/0"], &mut random);
    println!("{} and {} bad bodies", of_score.len(), of_compute.len());
    let bad =
        of_score.iter().map(|bad| ("/score", bad)).chain(of_compute.iter().map(|bad| ("/compute", bad)));
    let calls = bad.enumerate().map(|(index, (path, bad))| {
        let (address, scored, computed) = (server.http, &scored, &computed);
        async move {
            bad.check(path, &post_bytes(address, path, bad.body.clone()).await);
            if index % 16 == 0 {
                assert_eq!(post(address, "/score", scored).await.scores(), [Some(7.0)], "{}", bad.what);
                assert_eq!(post(address, "/compute", computed).await.rewards(), [7.0], "{}", bad.what);
            }
        }
    });
    stream::iter(calls).buffer_unordered(16).collect::<Vec<()>>().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_token_there_is_health_and_nothing_else() {
    let (token, other) = ("trainer-0123456789abcdef", "evaluation-0123456789abcdef");
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), format!("trainer:{token}\nevaluation:{other}\n")).unwrap();
    let server = TestServer::loading(&[("auth.tokens_file", file.path().to_str().unwrap())]).await;
    server.device.release();
    soon(async { while look(server.http, "/health").await.status != 200 {} }).await;
    let send = async |path: &str, authorization: Option<String>| {
        let mut request = post_request(path, unirl(&pngs([1])).to_string().into());
        if let Some(value) = authorization {
            request.headers_mut().insert("authorization", value.parse().unwrap());
        }
        soon(try_send(server.http, request)).await.unwrap()
    };
    let basic = |text: String| Some(format!("Basic {}", BASE64.encode(text)));
    for refused in [
        send("/score", None).await,
        send("/compute", None).await,
        look(server.http, "/rewards").await,
        send("/score", Some("Bearer trainer-0123456789abcdeF".into())).await,
        send("/score", basic(format!("evaluation:{token}"))).await,
        send("/score", basic(token.into())).await,
        send("/score", Some("Basic ?".into())).await,
    ] {
        assert_eq!((refused.status, &refused.headers["www-authenticate"]), (401, &"Bearer".parse().unwrap()));
        assert!(refused.body["detail"].as_str().unwrap().contains("token"), "{refused:?}");
    }
    for admitted in [Some(format!("Bearer {token}")), basic(format!("trainer:{token}"))] {
        assert_eq!(send("/score", admitted).await.scores(), [Some(1.0)]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_is_too_large_is_refused_before_it_is_there() {
    let server = TestServer::start(&[("limits.max_message_bytes", "100000")]).await;
    // Sends all of it before it reads, as `requests` does: more than the sockets' buffers hold.
    let mut stream = TcpStream::connect(server.http).await.unwrap();
    let (all, piece) = (64 << 20, vec![b' '; 1 << 20]);
    let head = format!("POST /compute HTTP/1.1\r\nHost: a\r\nContent-Length: {all}\r\n\r\n");
    let said = soon(async {
        stream.write_all(head.as_bytes()).await.unwrap();
        for _ in 0..all / piece.len() {
            stream.write_all(&piece).await.unwrap();
        }
        let mut said = String::new();
        stream.read_to_string(&mut said).await.unwrap();
        said
    })
    .await;
    assert!(said.starts_with("HTTP/1.1 413 body: has more than 100000 bytes; send fewer"), "{said}");
    assert!(
        said.ends_with(r#"{"detail":"body: has more than 100000 bytes; send fewer pictures at once"}"#),
        "{said}"
    );

    // One that does not say how much there will be, and one that is as large as it may be.
    let body = stream::repeat_with(|| Ok(Frame::data(Bytes::from_static(&[b' '; 1 << 10]))));
    let request = Request::post("/score").header("host", "a").body(StreamBody::new(body)).unwrap();
    assert_eq!(soon(try_send(server.http, request)).await.unwrap().status, 413);
    let mut fits = unirl(&pngs([3])).to_string();
    fits += &" ".repeat(100_000 - fits.len());
    assert_eq!(post_bytes(server.http, "/score", fits).await.scores(), [Some(3.0)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_under_way_share_a_bounded_memory() {
    let limits = [("limits.max_message_bytes", "100000"), ("limits.max_bytes_in_flight", "100000")];
    let server = TestServer::start(&limits).await;
    let small = unirl(&pngs([3]));
    for announced in ["Content-Length: 90000", "Transfer-Encoding: chunked"] {
        // It announces its body and sends none of it.
        let mut stream = TcpStream::connect(server.http).await.unwrap();
        stream
            .write_all(format!("POST /score HTTP/1.1\r\nHost: a\r\n{announced}\r\n\r\n").as_bytes())
            .await
            .unwrap();
        let refused = soon(async {
            loop {
                let answer = post(server.http, "/score", &small).await;
                if answer.status != 200 {
                    return answer;
                }
            }
        })
        .await;
        assert_eq!(refused.status, 429);
        drop(stream);
        soon(async { while post(server.http, "/score", &small).await.status != 200 {} }).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_finds_the_queue_full_waits_in_line_and_health_answers_meanwhile() {
    let server = TestServer::start(&SMALL_QUEUE).await;
    server.device.hold();
    let address = server.http;
    let call = move |shades: &[u8]| {
        let asked = flow_factory(&pngs(shades.iter().copied()));
        tokio::spawn(async move { post(address, "/compute", &asked).await })
    };
    let first = call(&[1]);
    server.device.reached(1).await;
    // One of them fills the queue, and ten are behind it: all are of one caller.
    let others: Vec<_> = (2..13).map(|shade| call(&[shade, shade])).collect();
    for _ in 0..10 {
        let asked = Instant::now();
        assert_eq!(look(address, "/health").await.status, 200);
        assert!(asked.elapsed() < Duration::from_secs(5));
        sleep(Duration::from_millis(50)).await;
    }
    assert!(!others.iter().any(tokio::task::JoinHandle::is_finished));
    server.device.release();
    assert_eq!(soon(first).await.unwrap().rewards(), [1.0]);
    for (shade, other) in (2..).zip(others) {
        assert_eq!(soon(other).await.unwrap().rewards(), [f64::from(shade); 2]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_waited_in_vain_is_told_when_to_come_again_from_now() {
    let server = TestServer::start(&[&SMALL_QUEUE[..], &[("http.queue_wait_seconds", "1")]].concat()).await;
    server.device.hold();
    let address = server.http;
    let call = move |shades: &[u8]| {
        let asked = flow_factory(&pngs(shades.iter().copied()));
        tokio::spawn(async move { post(address, "/compute", &asked).await })
    };
    let first = call(&[1]);
    server.device.reached(1).await;
    let start = Instant::now();
    let (mut a, mut b) = (call(&[2, 2]), call(&[3, 3]));
    let (taken, refused) = soon(async {
        tokio::select! {
            refused = &mut a => (b, refused),
            refused = &mut b => (a, refused),
        }
    })
    .await;
    let refused = refused.unwrap();
    let words = "the queue is full; try again in ";
    assert_eq!((refused.status, &refused.reason[..words.len()]), (429, words));
    assert!(start.elapsed() >= Duration::from_secs(1), "it came at once");
    // Nothing was measured yet: a second, as both say.
    assert_eq!(&refused.reason[words.len()..], "1.0 s");
    assert_eq!(refused.headers["retry-after"], "2");
    assert!(metric("spatialscore_calls_refused_total{reason=\"queue\"}") >= 1.0);
    server.device.release();
    assert_eq!(soon(first).await.unwrap().rewards(), [1.0]);
    assert_eq!(soon(taken).await.unwrap().rewards().len(), 2);
    assert_eq!(soon(call(&[4, 4])).await.unwrap().rewards(), [4.0, 4.0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_waits_in_line_is_told_when_the_server_stops() {
    let server = TestServer::start(&SMALL_QUEUE).await;
    let (address, device) = (server.http, Arc::clone(&server.device));
    let call = move |shades: &[u8]| {
        let asked = flow_factory(&pngs(shades.iter().copied()));
        tokio::spawn(async move { post(address, "/compute", &asked).await })
    };
    device.hold();
    let first = call(&[2]);
    device.reached(2).await;
    // One is laid out behind it, one fills the queue: of four at least two wait in line.
    let mut others: Vec<_> = (3..7).map(|shade| call(&[shade, shade])).collect();
    // Long enough for all to be there.
    sleep(Duration::from_secs(1)).await;
    assert!(others.iter().all(|other| !other.is_finished()));
    let ending = server.shut_down();
    for _ in 0..2 {
        let (refused, _, rest) = soon(select_all(others)).await;
        let refused = refused.unwrap();
        assert_eq!((refused.status, refused.reason.as_str()), (503, "the server is shutting down"));
        others = rest;
    }
    device.release();
    assert_eq!(soon(first).await.unwrap().rewards(), [2.0]);
    for other in others {
        let other = soon(other).await.unwrap();
        assert!(other.status == 503 || other.rewards().len() == 2, "{}", other.status);
    }
    ending.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_hangs_up_costs_no_forward_and_calls_of_both_ports_count_together() {
    let server = TestServer::start(&[("limits.max_calls_per_caller", "2")]).await;
    let client = server.client().await;
    server.device.hold();
    let mut held = client.clone();
    let held = tokio::spawn(async move { held.score(request([1])).await });
    server.device.reached(1).await;
    let (address, asked) = (server.http, unirl(&pngs([2, 2])));
    // Again where one of those that look whether it has begun was in its place.
    let abandoned = tokio::spawn(async move { while post(address, "/score", &asked).await.status == 429 {} });
    let get_model = async || client.clone().get_model(proto::GetModelRequest::default()).await;
    // It has begun once there is no call left for another.
    let code = soon(async {
        loop {
            if let Err(status) = get_model().await {
                return status.code();
            }
        }
    })
    .await;
    assert_eq!(code, Code::ResourceExhausted);
    let refused = post(address, "/score", &unirl(&pngs([9]))).await;
    assert_eq!((refused.status, refused.reason.contains("has 2 calls open")), (429, true), "{refused:?}");
    // Long enough for it to reach the queue.
    sleep(Duration::from_millis(300)).await;
    abandoned.abort();
    soon(async { while get_model().await.is_err() {} }).await;
    server.device.release();
    assert!(held.await.unwrap().is_ok());
    assert_eq!(post(address, "/score", &unirl(&pngs([3]))).await.scores(), [Some(3.0)]);
    assert!(!server.device.seen().contains(&2) && !server.device.seen().contains(&9));
}

#[tokio::test(flavor = "multi_thread")]
async fn health_and_calls_follow_the_servers_life() {
    let server = TestServer::loading(&[]).await;
    let address = server.http;
    for path in ["/health", "/rewards"] {
        assert_eq!(look(address, path).await.status, 503);
    }
    let early = post(address, "/score", &unirl(&pngs([1]))).await;
    assert_eq!((early.status, early.reason.as_str()), (503, "the model is loading"));
    server.device.release();
    soon(async { while look(address, "/health").await.status != 200 {} }).await;
    let rewards =
        json!({"spatialscore": ["spatialscore:ready"], "spatialscore_stddev": ["spatialscore:ready"]});
    assert_eq!(look(address, "/health").await.body, json!({"status": "ok", "rewards": rewards}));

    server.device.hold();
    let accepted = tokio::spawn(async move { post(address, "/score", &unirl(&pngs([5]))).await });
    server.device.reached(5).await;
    let device = Arc::clone(&server.device);
    let ending = server.shut_down();
    let late = soon(async {
        loop {
            let late = post(address, "/score", &unirl(&[])).await;
            if late.status != 200 {
                return late;
            }
        }
    })
    .await;
    assert_eq!((late.status, late.reason.as_str()), (503, "the server is shutting down"));
    // The next try should find another replica.
    assert_eq!(late.headers["connection"], "close");
    assert_eq!(look(address, "/health").await.status, 503);
    device.release();
    assert_eq!(soon(accepted).await.unwrap().scores(), [Some(5.0)]);
    ending.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_does_not_arrive_is_given_up() {
    let server = TestServer::start(&[("limits.message_timeout_seconds", "1")]).await;
    for begun in ["", "{"] {
        let mut stream = TcpStream::connect(server.http).await.unwrap();
        let head = format!("POST /score HTTP/1.1\r\nHost: a\r\nContent-Length: 50\r\n\r\n{begun}");
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut said = vec![0; 64];
        soon(stream.read_exact(&mut said)).await.unwrap();
        let said = String::from_utf8(said).unwrap();
        assert!(said.starts_with("HTTP/1.1 504 the message did not arrive whole within 1 s"), "{said}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_carries_one_call_after_the_other_until_it_is_idle() {
    let server = TestServer::start(&[("server.idle_timeout_seconds", "1")]).await;
    let mut stream = TcpStream::connect(server.http).await.unwrap();
    let parent = "traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let head = format!("GET /rewards HTTP/1.1\r\nHost: a\r\n{parent}\r\n\r\n");
    for _ in 0..2 {
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut said = Vec::new();
        while !said.ends_with(b"}") {
            said.push(soon(stream.read_u8()).await.unwrap());
        }
        let said = String::from_utf8(said).unwrap();
        assert!(said.starts_with("HTTP/1.1 200 OK\r\n"), "{said}");
        assert!(said.contains("traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-"), "{said}");
    }
    assert_eq!(soon(stream.read(&mut [0])).await.unwrap(), 0);
}

/// Sends a body of this form with `text` in it, which is refused in a few words.
async fn refuse(http: SocketAddr, path: &str, form: &str, text: &str) {
    let body = Bytes::from(form.replacen("HERE", text, 1));
    let answer = tokio::time::timeout(Duration::from_secs(120), try_send(http, post_request(path, body)));
    let answer = answer.await.unwrap().unwrap();
    let key = if path == "/compute" { "error" } else { "detail" };
    let said = answer.body[key].as_str().unwrap_or_else(|| panic!("{answer:?}"));
    assert!(said.len() <= 512, "{path} {form:?}: {} bytes: {said:.200}", said.len());
}

/// Sends a call that says in a header how urgent it is.
async fn send_as(address: SocketAddr, path: &str, priority: Option<&str>, body: &Value) -> Answer {
    let mut request = post_request(path, body.to_string().into());
    if let Some(priority) = priority {
        request.headers_mut().insert("x-spatialscore-priority", priority.parse().unwrap());
    }
    soon(try_send(address, request)).await.unwrap()
}

/// Each is a body of 60 MiB with a text of that size where another value belongs, of letters that take six times as much
/// where they are quoted.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_refused_is_never_said_again_whole() {
    const LARGE: usize = 60 << 20;
    let (server, http) = process(&["--set=limits.max_bytes_in_flight=4294967296"]);
    let mut client = SpatialScoreServiceClient::connect(server.url()).await.unwrap();
    let text = "\u{7f}".repeat(LARGE);
    let sound = |mut asked: Value, pointer: &str| {
        *asked.pointer_mut(pointer).unwrap() = json!("HERE");
        asked.to_string()
    };
    let mut named = unirl(&pngs([1]));
    named["protocol_version"] = json!("1");
    for name in ["scorer_version", "request_id"] {
        named["requests"][0][name] = json!("");
    }
    let (scored, computed) = (unirl(&pngs([1])), flow_factory(&pngs([1])));
    let ours = json!({
        "prompt": "", "items": [{"image": "", "references": [""], "questions": [{"text": "", "answers": [""]}]}],
        "models": [""], "inspect": true,
    });
    let of_ours = ["/prompt", "/items", "/items/0", "/items/0/image", "/items/0/references", "/models"];
    let of_ours = of_ours.into_iter().chain(["/models/0", "/inspect", "/items/0/questions/0"]);
    let of_ours = of_ours.map(|pointer| ("/v1/score", sound(ours.clone(), pointer)));
    let bodies = [
        ("/score", r#""HERE""#.to_owned()),
        ("/score", r#"{"HERE": 1}"#.to_owned()),
        ("/score", r#"{"requests": [{"HERE": [}]}"#.to_owned()),
        ("/score", sound(scored.clone(), "/requests")),
        ("/score", sound(scored.clone(), "/requests/0")),
        ("/score", sound(scored.clone(), "/requests/0/history")),
        ("/score", sound(scored.clone(), "/requests/0/history/0")),
        ("/score", sound(scored.clone(), "/requests/0/history/0/image_b64")),
        ("/score", sound(scored.clone(), "/requests/0/required_rewards")),
        ("/score", sound(scored, "/requests/0/required_rewards/0")),
        ("/score", sound(named.clone(), "/protocol_version")),
        ("/score", sound(named.clone(), "/requests/0/scorer_version")),
        ("/score", sound(named, "/requests/0/request_id")),
        ("/compute", sound(computed.clone(), "/prompt")),
        ("/compute", sound(computed.clone(), "/prompt/0")),
        ("/compute", sound(computed.clone(), "/image")),
        ("/compute", sound(computed, "/image/0")),
    ];
    let bodies: Vec<_> = bodies.into_iter().chain(of_ours).collect();
    let refuse = |at: usize| {
        let (path, form): &(&str, String) = &bodies[at];
        refuse(http, path, form, &text)
    };
    refuse(0).await;
    for (at, (path, form)) in bodies.iter().enumerate() {
        let (before, start) = (server.reset_peak(), Instant::now());
        refuse(at).await;
        let more = server.memory("VmHWM").saturating_sub(before) >> 20;
        println!("one, {path} {form:.60}: {more} MiB more, {:?}", start.elapsed());
        // The body, and its text where it is taken for a name.
        assert!(more < 5 * (LARGE as u64 >> 20), "{path} {form}: {more} MiB");
    }
    // Four at once, of those that took most; meanwhile the model is asked for.
    let before = server.reset_peak();
    let slowest = Cell::new(Duration::ZERO);
    let asked = async {
        loop {
            let start = Instant::now();
            client.get_model(proto::GetModelRequest::default()).await.unwrap();
            slowest.set(slowest.get().max(start.elapsed()));
            sleep(Duration::from_millis(10)).await;
        }
    };
    let four = futures::future::join_all([3, 9, 10, 11].map(refuse));
    tokio::select! {
        _ = four => {}
        () = asked => unreachable!(),
    }
    let more = server.memory("VmHWM").saturating_sub(before) >> 20;
    println!("GetModel beside them: {:?} at most", slowest.get());
    println!("four at once: {more} MiB more");
    assert!(more < 16 * (LARGE as u64 >> 20), "{more} MiB");
}

/// Evaluation over HTTP lets training go first, whichever way it says what it is.
#[tokio::test(flavor = "multi_thread")]
async fn evaluation_over_http_goes_behind_training() {
    let server = TestServer::start(&[("batch.max_items", "1")]).await;
    let address = server.http;
    server.device.pace(Duration::from_millis(50));
    for (path, header, evaluated, trained) in [
        ("/evaluation/score", None, 10, 11),
        ("/score", Some("evaluation"), 20, 21),
        ("/evaluation/compute", Some("evaluation"), 30, 31),
        ("/v1/score", Some("evaluation"), 40, 41),
    ] {
        // Three seconds of work, before which the one behind it would have to wait.
        let files = pngs(std::iter::repeat_n(evaluated, 64));
        let body = match path {
            "/v1/score" => {
                let item = |file: &Vec<u8>| json!({"prompt": PROMPT, "image": BASE64.encode(file)});
                json!({"items": files.iter().map(item).collect::<Vec<_>>()})
            }
            _ if path.ends_with("compute") => flow_factory(&files),
            _ => unirl(&files),
        };
        let evaluation = tokio::spawn(async move { send_as(address, path, header, &body).await });
        // Nothing else here is evaluation.
        until(|| metric("spatialscore_queue_items{priority=\"evaluation\"}") >= 30.0).await;
        let training = post(address, "/score", &unirl(&pngs([trained]))).await;
        assert_eq!(training.scores(), [Some(f64::from(trained))]);
        assert_eq!(evaluation.await.unwrap().status, 200);
        assert_ne!(server.device.seen().last(), Some(&trained), "{path} {header:?}: it was the last");
    }
    assert_eq!(look(address, "/evaluation/health").await.status, 200);
    assert_eq!(look(address, "/evaluation/rewards").await.status, 200);
    assert_eq!(
        send_as(address, "/training/score", Some("training"), &unirl(&pngs([5]))).await.scores(),
        [Some(5.0)]
    );
    for (path, header, words) in [
        ("/score", "urgent", "x-spatialscore-priority: is \"urgent\"; there are training and evaluation"),
        ("/evaluation/score", "training", "x-spatialscore-priority: is not what the path says"),
    ] {
        let answer = send_as(address, path, Some(header), &unirl(&pngs([9]))).await;
        assert_eq!(answer.status, 400, "{answer:?}");
        assert!(answer.body["detail"].as_str().unwrap().starts_with(words), "{answer:?}");
    }
    let answer = send_as(address, "/score", Some(&"x".repeat(8000)), &unirl(&pngs([9]))).await;
    assert!(answer.status == 400 && answer.text.len() < 400, "{answer:?}");
    assert!(!server.device.seen().contains(&9));
}

#[tokio::test(flavor = "multi_thread")]
async fn chunks_that_nobody_can_read_are_the_callers() {
    let server = TestServer::start(&[]).await;
    let head = "POST /score HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n";
    for chunks in ["zz\r\n{}", "2\r\n{}x\r\n", "-1\r\n", "ffffffffffffffffff\r\n", "2\n\n{}"] {
        let mut stream = TcpStream::connect(server.http).await.unwrap();
        stream.write_all(format!("{head}{chunks}").as_bytes()).await.unwrap();
        let mut said = vec![0; 60];
        soon(stream.read_exact(&mut said)).await.unwrap();
        let said = String::from_utf8(said).unwrap();
        assert!(said.starts_with("HTTP/1.1 400 body: its chunks are not framed"), "{chunks:?}: {said}");
    }
}
